"""A life with a memory tier ends before or after any operation on its tiers; the next one loses nothing committed."""

from __future__ import annotations

import pytest

from orchestrator.checkpoint.attempts import claim_attempt
from orchestrator.checkpoint.catalog import CheckpointState, list_checkpoints
from orchestrator.checkpoint.policy import RetentionConfig
from orchestrator.checkpoint.retention import Pruner
from orchestrator.checkpoint.store import Store
from orchestrator.coordination.opening import Opener, Opening, Remembered
from orchestrator.sections import CheckpointConfig, Tier
from orchestrator.stores import Stores
from tests.orchestrator.checkpoint.dict_store import DictStore
from tests.orchestrator.checkpoint.serial_reads import serial_reads
from tests.orchestrator.checkpoint.states import equal, load, make_info, make_state, save
from tests.orchestrator.checkpoint.test_crash_points import Countdown, Died, MortalStore
from tests.orchestrator.group import make_spec
from trainers.exclusions import Exclusions

TIERS = (Tier(url="peer://", every=1, keep=1), Tier(url="/runs", every=3, keep=1))
SPEC = make_spec("", checkpoint=CheckpointConfig(tiers=TIERS))
STATES = {step: make_state(step) for step in range(1, 10)}


def history() -> tuple[DictStore, DictStore]:
    """Storage has steps 1 and 2, the memory of the nodes step 3."""
    storage, peer = DictStore(), DictStore()
    for store, steps in ((storage, (1, 2)), (peer, (3,))):
        assert claim_attempt(store, {"session": "old", "conditional_create": True}) == 1
        for step in steps:
            save(store, STATES[step], step=step, world_size=2)
    return storage, peer


def begin(opener: Opener, stores: Stores) -> Opening:
    """From a checkpoint, which is what was saved."""
    opening = opener.open("start", Exclusions())
    assert opening.checkpoint is not None and opening.checkpoint.manifest is not None
    loaded = load(stores.of(opening.tier), opening.checkpoint.manifest, 3)
    assert equal(loaded, STATES[opening.progress.step])
    return opening


def live(stores: Stores) -> None:
    """Begin, save near, save near and far; the trainers die, go on from the agents' buffers, save far; tidy up."""
    opener = Opener(SPEC, stores, 2, lambda *_, **__: None)
    opening = begin(opener, stores)
    step, attempt = opening.progress.step, opening.attempt
    save(stores.of("peer"), STATES[step + 1], step=step + 1, attempt=attempt, world_size=2)
    for tier in ("peer", "storage"):
        save(stores.of(tier), STATES[step + 2], step=step + 2, attempt=attempt, world_size=2)
    held = make_info(step + 2, attempt).progress
    again = opener.open("killed", Exclusions(), Remembered(progress=held, committed=held, checkpoint=None))
    assert (again.memory, again.attempt) == (held, attempt + 1)
    save(stores.storage, STATES[step + 3], step=step + 3, attempt=again.attempt, world_size=2)
    for tier in ("peer", "storage"):
        Pruner(stores.of(tier), RetentionConfig(last=1, grace_s=0.0)).prune(again.attempt, lambda _: None)


def newest(*stores: Store) -> int:
    return max(
        info.step for store in stores for info in list_checkpoints(store) if info.state is CheckpointState.STABLE
    )


@pytest.mark.parametrize("nodes", ["live", "lost"])
def test_every_operation_of_a_life_with_tiers(nodes):
    before = history()
    with serial_reads():
        for moment in range(1000):
            storage, peer = (DictStore(dict(store.objects)) for store in before)
            countdown = Countdown(moment)
            try:
                live(Stores(storage=MortalStore(storage, countdown), peer=MortalStore(peer, countdown)))
            except Died:
                peer = peer if nodes == "live" else DictStore()
                expected = newest(storage, peer)
                stores = Stores(storage=storage, peer=peer)
                assert begin(Opener(SPEC, stores, 2, lambda *_, **__: None), stores).progress.step == expected
            else:
                break
    assert newest(storage) == newest(storage, peer) == 6 and moment > 150
