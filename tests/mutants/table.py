"""All mutants. Each guard of the code that keeps a run alive should have one here that takes it away."""

from __future__ import annotations

from tests.mutants.of_checkpoints import CHECKPOINTS
from tests.mutants.of_coordination import COORDINATION
from tests.mutants.of_failures import FAILURES
from tests.mutants.of_numbers import NUMBERS
from tests.mutants.of_records import RECORDS
from tests.mutants.of_storage import STORAGE
from tests.mutants.of_trainers import TRAINERS

MUTANTS = (*CHECKPOINTS, *STORAGE, *TRAINERS, *COORDINATION, *FAILURES, *NUMBERS, *RECORDS)
