"""Saves and restores through the memory of an agent that is played here: what a trainer does of them is the real one's.

The agent of a real run is another process. Here it is a thread, for which a snapshot is safe as soon as it is taken.
"""

from __future__ import annotations

import mmap
import os
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import cast

import torch.distributed as dist

from orchestrator.agents.checkpointer import SharedMemoryCheckpointer
from orchestrator.agents.snapshot_layout import layout, owned_tensors
from orchestrator.checkpoint.keys import shard_name
from orchestrator.checkpoint.writer import hash_shard, lay_out_shard
from orchestrator.messages.attempts import Begin
from orchestrator.messages.saves import MemorySnapshot, SaveEnded, Snapshot
from orchestrator.sections import CheckpointConfig
from trainers.exclusions import Exclusions
from trainers.parallel import weights_changed
from trainers.progress import Progress
from trainers.state import TrainState

_NUM_STEPS = 1_000_000


class Snapshots:
    """Of one state on this rank; they come one after the other into the same memory."""

    def __init__(self, state: TrainState) -> None:
        """Collective: all ranks."""
        self._state = state
        self._buffer = os.memfd_create("snapshot")
        self._agent, self._trainer = (cast(Connection, end) for end in Pipe())
        self._snapshot: Snapshot | None = None
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        self._checkpointer = self._begin(None)
        self.size_bytes = layout(owned_tensors(state))[-1].end

    def save(self) -> None:
        """Take a snapshot. Collective: all ranks; returns when the state may change."""
        self._checkpointer.save(self._state)

    def load(self) -> None:
        """Bring the state back to the last snapshot, checked by its fingerprint. Collective: all ranks.

        Raises:
            StateMismatchError: what was loaded is not what was saved.
        """
        self._checkpointer.wait()
        snapshot = self._snapshot
        assert snapshot is not None, "nothing was saved"
        data = memoryview(mmap.mmap(self._buffer, 0))[: snapshot.size_bytes]
        name = shard_name(dist.get_rank(), dist.get_world_size())
        receipts = hash_shard(lay_out_shard(name, snapshot.chunks, data, {})).chunks
        self._checkpointer = self._begin(MemorySnapshot(snapshot=snapshot, chunks=receipts, pending=False))
        weights_changed(self._state.model, self._state.parameters)

    def close(self) -> None:
        self._trainer.close()  # the thread reads its end
        self._thread.join()
        self._agent.close()
        os.close(self._buffer)

    def _begin(self, memory: MemorySnapshot | None) -> SharedMemoryCheckpointer:
        """A checkpointer that has restored the state, if there is something to restore."""
        begin = Begin(
            config={},
            run_url="",
            checkpoint=CheckpointConfig(every_steps=1),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            restore=None,
            peers=None,
            memory=memory,
            committed=Progress(0, 0),
            exclusions=Exclusions(),
        )
        checkpointer = SharedMemoryCheckpointer(self._trainer, self._buffer, begin, _NUM_STEPS)
        checkpointer.restore(self._state)
        return checkpointer

    def _listen(self) -> None:
        while True:
            try:
                message = self._agent.recv()
            except EOFError:
                return
            if isinstance(message, Snapshot):
                self._snapshot = message
                self._agent.send(SaveEnded(progress=message.progress))
