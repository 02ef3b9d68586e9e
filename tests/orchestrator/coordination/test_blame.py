from __future__ import annotations

from orchestrator.coordination.blame import stuck_ranks, where
from orchestrator.messages.liveness import Stack

WAITING = """Thread 0x00007f0a (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 320 in wait

Current thread 0x00007f0b (most recent call first):
  File "/site-packages/torch/distributed/distributed_c10d.py", line 5049 in all_to_all_single
  File "/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/app/trainers/reduction.py", line 162 in __call__
  File "/app/trainers/step.py", line 60 in train_step
"""
IN_USER_CODE = """Thread 0x00007f0b (most recent call first):
  File "/app/dataset.py", line 12 in __getitem__
  File "/app/a.py", line 1 in a
  File "/app/b.py", line 1 in b
  File "/app/c.py", line 1 in c
  File "/app/d.py", line 1 in d
  File "/app/e.py", line 1 in e
  File "/site-packages/torch/distributed/fsdp/_fully_shard/_fsdp_state.py", line 62 in fsdp_hook_wrapper
"""


def stack(text: str, state: str = "S") -> Stack:
    return Stack(attempt=1, state=state, text=text)


def test_names_the_one_that_the_others_wait_for() -> None:
    stuck = stuck_ranks({0: stack(WAITING), 1: stack(IN_USER_CODE), 2: stack(WAITING)})
    assert stuck == {1: "at /app/dataset.py:12 in __getitem__"}


def test_names_stopped_silent_and_missing_ones() -> None:
    stuck = stuck_ranks({0: stack(WAITING), 1: stack("", "T"), 2: stack("", "D"), 3: None})
    assert list(stuck) == [1, 2, 3]
    assert "SIGSTOP" in stuck[1] and "state D" in stuck[2] and "agent" in stuck[3]


def test_names_nobody_who_is_at_work_beside_one_that_is_stopped() -> None:
    assert list(stuck_ranks({0: stack(IN_USER_CODE), 1: stack("", "T"), 2: stack(WAITING), 3: None})) == [1, 3]


def test_names_nobody_when_all_wait_or_have_ended() -> None:
    assert stuck_ranks({0: stack(WAITING), 1: stack("", "Z"), 2: stack("", "")}) == {}


def test_where() -> None:
    assert where(WAITING).endswith("distributed_c10d.py:5049 in all_to_all_single")
    assert where("") == "no Python frame"
