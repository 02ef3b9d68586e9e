"""The table does not rot: whoever changes what a mutant changes hears of it here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.mutants.table import MUTANTS

ROOT = Path(__file__).parent.parent.parent


def test_every_mutant_can_be_planted_and_has_tests_that_are_there() -> None:
    assert [problem for mutant in MUTANTS if (problem := mutant.problem(ROOT)) is not None] == []
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
    assert replace(MUTANTS[0], old="not in any file").problem(ROOT) is not None
    assert replace(MUTANTS[0], tests="tests/test_layers.py::test_of_nothing").problem(ROOT) is not None
