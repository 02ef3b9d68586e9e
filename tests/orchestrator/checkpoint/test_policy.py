"""The table of what is kept. One letter a checkpoint, oldest first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoint.catalog import CheckpointInfo, CheckpointState
from orchestrator.checkpoint.keys import MANIFEST_NAME, CheckpointRef
from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.policy import BestConfig, RetentionConfig, judge
from trainers.errors import ConfigError
from trainers.progress import Progress

ATTEMPT = 7
STATES = {
    "s": CheckpointState.STABLE,
    "w": CheckpointState.WRITING,
    "W": CheckpointState.WRITING,  # of the newest attempt
    "a": CheckpointState.ABANDONED,
    "A": CheckpointState.ABANDONED,  # with files left
    "q": CheckpointState.QUARANTINED,
    "d": CheckpointState.DAMAGED,
    "u": CheckpointState.UNHEALTHY,
    "x": CheckpointState.EXPIRED,
    "p": CheckpointState.STABLE,  # pinned
    "P": CheckpointState.QUARANTINED,  # pinned
}


def make_manifest(step: int, **metrics: float) -> Manifest:
    return Manifest(
        run_id="r",
        attempt=1,
        progress=Progress(step, step * 10),
        reason="interval",
        world_size=1,
        strategy="ddp",
        config_hash="h",
        versions={},
        scalars={},
        health={"ok": True},
        metrics=metrics,
        created_at="",
        files=(),
        tensors={},
    )


def info(letter: str, step: int) -> CheckpointInfo:
    names = {"a": (MANIFEST_NAME,), "A": (MANIFEST_NAME, "shard")}.get(letter, ("shard",))
    return CheckpointInfo(
        ref=CheckpointRef(step * 10, ATTEMPT if letter == "W" else 1),
        state=STATES[letter],
        manifest=make_manifest(step) if letter in "spu" else None,
        names=names,
        pinned="why" if letter in "pP" else None,
    )


def kept(letters: str, undo_steps: int = 0, **config) -> str:
    """The letters that are kept, those that go as dots; steps are 1, 2, ..."""
    infos = [info(letter, step) for step, letter in enumerate(letters, 1)]
    verdicts = judge(reversed(infos), RetentionConfig(**config), ATTEMPT, undo_steps)
    assert [verdict.info for verdict in verdicts] == infos[::-1] and all(verdict.reason for verdict in verdicts)
    return "".join(letter if v.keep else "." for letter, v in zip(letters, reversed(verdicts), strict=True))


@pytest.mark.parametrize(
    ("letters", "config", "expected"),
    [
        ("", {"last": 1}, ""),
        ("s", {"last": 1}, "s"),
        ("ss", {"last": 1}, ".s"),
        ("sssss", {"last": 2}, "...ss"),
        ("sss", {"last": 3}, "sss"),
        ("s" * 12, {}, ".." + "s" * 10),  # the default
        ("s" * 50, {"last": None}, "s" * 50),
        # every k-th stays for good
        ("ssssssss", {"last": 1, "every_steps": 3}, "..s..s.s"),
        ("ssssss", {"last": 2, "every_steps": 3}, "..s.ss"),
        # what is not stable does not count as one of the newest
        ("ssqqq", {"last": 2}, "ssqqq"),
        ("sssddd", {"last": 2}, ".ssddd"),
        ("ssuW", {"last": 1}, ".suW"),
        ("qdu", {"last": 1}, "qdu"),
        # evidence stays as long as a stable one of its age would
        ("qsdsus", {"last": 2}, "...sus"),
        ("qds", {"last": None}, "qds"),
        ("qqqq", {"last": 1, "every_steps": 1}, "qqqq"),
        ("qs", {"last": 1, "every_steps": 1}, ".s"),
        # one stays that a rollback can go back to: so old that nothing in it is undone, or the oldest; and the next
        ("sssss", {"last": 1, "undo_steps": 2}, "..sss"),
        ("sssss", {"last": 3, "undo_steps": 2}, "..sss"),
        ("sssss", {"last": 1, "undo_steps": 9}, "ss..s"),
        ("ssqus", {"last": 1, "undo_steps": 2}, ".s..s"),
        ("ssssss", {"last": 1, "every_steps": 3, "undo_steps": 1}, "..s.ss"),
        ("psss", {"last": 1, "undo_steps": 3}, "ps.s"),
        ("quw", {"last": 1, "undo_steps": 3}, "qu."),
        # pins
        ("psss", {"last": 1}, "p..s"),
        ("pppp", {"last": 1}, "pppp"),
        ("Psss", {"last": 1}, "P..s"),
        ("sp", {"last": 1}, ".p"),
        # what was never committed
        ("wsW", {"last": 1}, ".sW"),
        ("w", {"last": None}, "."),
        ("Wss", {"last": 1}, "W.s"),
        ("aAsA", {"last": 1}, "a.s."),
        # a removal that was interrupted is completed, whatever the policy has become
        ("xs", {"last": None}, ".s"),
        ("x", {"last": 5}, "."),
    ],
)
def test_what_is_kept(letters, config, expected):
    assert kept(letters, **config) == expected


@given(
    letters=st.text(st.sampled_from(sorted(STATES)), max_size=12),
    last=st.none() | st.integers(1, 5),
    every_steps=st.none() | st.integers(1, 4),
)
def test_whatever_there_is(letters, last, every_steps):
    result = kept(letters, last=last, every_steps=every_steps)
    stable = [i for i, letter in enumerate(letters) if letter in "sp"]
    newest = stable[-last:] if last else stable
    assert all(result[i] != "." for i in newest), "the newest stable ones stay"
    assert all(result[i] != "." for i, letter in enumerate(letters) if letter in "pPW")
    gone = [i for i, letter in enumerate(letters) if result[i] == "." and letter not in "wAx"]
    assert not gone or (last is not None and len([i for i in stable if i > max(gone)]) >= last)
    if every_steps is None and last is not None:
        bounded = [i for i, letter in enumerate(letters) if result[i] == "s"]
        assert len(bounded) <= last


def test_reasons_say_which_rule():
    infos = [info(letter, step) for step, letter in enumerate("spqss", 1)][::-1]
    reasons = [verdict.reason for verdict in judge(infos, RetentionConfig(last=2, every_steps=9), ATTEMPT)]
    assert reasons == ["newest stable", "newest 2", "older than the newest 2", "pinned: why", "older than the newest 2"]


@pytest.mark.parametrize("last", [1, 2, 10])
@pytest.mark.parametrize("every", [1, 7, 10, 30])
def test_where_a_rollback_goes_back_to_moves_on_with_the_run(last: int, every: int):
    undo_steps, present = 20, []
    for step in range(every, 1000, every):
        present.append(info("s", step))
        verdicts = judge(present, RetentionConfig(last=last), ATTEMPT, undo_steps)
        present = [verdict.info for verdict in verdicts if verdict.keep]
        old_enough = [one.step for one in present if one.step <= step - undo_steps]
        assert len(present) <= last + 2
        assert step < 2 * undo_steps + every or step - max(old_enough) < 2 * undo_steps + every


def test_of_a_thousand_checkpoints_each_is_compared_a_few_times(monkeypatch: pytest.MonkeyPatch):
    infos, asked, greater = [info("s", step) for step in range(1, 1001)], [], CheckpointRef.__gt__
    monkeypatch.setattr(CheckpointRef, "__gt__", lambda a, b: (asked.append(1), greater(a, b))[1])
    judge(infos, RetentionConfig(last=1, every_steps=2), ATTEMPT, 20)
    assert len(asked) < 20_000


@pytest.mark.parametrize("bad", [{"last": 0}, {"every_steps": 0}, {"grace_s": -1.0}, {"grace_s": float("inf")}])
def test_limits(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        RetentionConfig(**bad)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (BestConfig(), [3, 5]),
        (BestConfig(num=2), [3, 4, 5]),
        (BestConfig(mode="max"), [1, 5]),
        (BestConfig(metric="grad_norm"), [5]),
    ],
)
def test_the_best_are_kept(config, kept):
    losses = {1: 0.9, 2: 0.7, 3: 0.2, 4: 0.2001, 5: 0.5}
    infos = [
        CheckpointInfo(
            ref=CheckpointRef(step * 10, 1),
            state=CheckpointState.STABLE,
            manifest=make_manifest(step, loss=loss),
        )
        for step, loss in losses.items()
    ]
    verdicts = judge(infos, RetentionConfig(last=1, best=config), ATTEMPT)
    assert [verdict.info.step for verdict in verdicts if verdict.keep] == kept
