from __future__ import annotations

import pytest

from orchestrator.checkpoint.catalog import quarantine
from orchestrator.checkpoint.selection import select_checkpoint
from tests.orchestrator.checkpoint.states import make_state, save
from trainers.errors import ConfigError


def test_of_one_step_the_newest_attempt_that_is_intact_is_meant(store):
    with pytest.raises(ConfigError, match="has no stable checkpoint"):
        select_checkpoint(store, None)
    refs = [save(store, make_state(step), step=step, attempt=attempt).ref for step, attempt in ((1, 1), (1, 2), (2, 2))]
    assert select_checkpoint(store, 1).ref == refs[1] and select_checkpoint(store, None).ref == refs[2]
    quarantine(store, refs[1], "rotten", attempt=2)
    assert select_checkpoint(store, 1).ref == refs[0]
    with pytest.raises(ConfigError, match="there are steps 1, 2"):
        select_checkpoint(store, 3)
