"""Where an attempt begins after a rollback: with the last checkpoint that has none of the steps that are undone."""

from __future__ import annotations

import uuid

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.restore_point import newest_sound
from tests.orchestrator.checkpoint.states import make_state, save
from trainers.exclusions import Exclusions

UNDONE = Exclusions(steps=((6, 9),))


def test_the_first_undone_step_is_in_no_checkpoint_that_is_gone_on_from() -> None:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    for step in (4, 5, 6, 8, 9):
        save(store, make_state(step), step=step)
    quarantined: list[int] = []
    attempt = claim_attempt(store, {})
    found = newest_sound(store, attempt, lambda info, _: quarantined.append(info.ref.samples_seen // 10), UNDONE)
    assert found is not None and found.step == 5 and quarantined == [9, 8, 6]
    known = save(store, make_state(7), step=7, attempt=attempt, scalars={"exclusions": UNDONE.scalars()})
    found = newest_sound(store, attempt, lambda *_: None, UNDONE)
    assert found is not None and found.ref == known.ref, "it was made without them"
