"""The state from the snapshots in the agents' buffers: every rank has its own rows, and gets those of its replicas."""

from __future__ import annotations

import mmap

import torch
import torch.distributed as dist

from orchestrator.messages.saves import MemorySnapshot
from trainers.errors import StateMismatchError
from trainers.fingerprint import format_fingerprint
from trainers.state import LocalTensor, TrainState


def fill_from_memory(state: TrainState, memory: MemorySnapshot, buffer: mmap.mmap) -> dict[str, str]:
    """Fill every tensor of `state` from the snapshots of the same step and layout that all ranks hold.

    Collective: all ranks. Nothing is checked here: the buffers may have been damaged since.

    Returns:
        For every tensor the fingerprint that it had when the snapshots were taken.

    Raises:
        StateMismatchError: this rank's snapshot is not of such a state.
    """
    chunks = {chunk.spec.name: chunk for chunk in memory.snapshot.chunks}
    partials = {chunk.spec.name: chunk.fingerprint for chunk in memory.chunks}
    data = torch.frombuffer(buffer, dtype=torch.uint8)
    names, expected = [], []
    for local in state.tensors():
        names.append(local.spec.name)
        partial = partials.get(local.spec.name, 0)
        expected.append(partial - (1 << 64) if partial >= 1 << 63 else partial)  # as the bits of an int64
        if not local.tensor.numel():
            continue
        start, stop = local.owned_rows()
        own = None
        if stop > start:
            chunk = chunks.get(local.spec.name)
            if chunk is None or (chunk.row_offset, chunk.num_rows) != (local.row_offset + start, stop - start):
                raise StateMismatchError(f"the snapshot in memory has {chunk}, wanted are rows of {local.spec}")
            own = data[chunk.begin : chunk.end]
        _fill(state, local, own, start * local.spec.row_bytes)
    sums = torch.tensor(expected, dtype=torch.int64, device=state.parameters[0].local.device)
    dist.all_reduce(sums)  # wraps around: addition modulo 2**64
    return {name: format_fingerprint(value % (1 << 64)) for name, value in zip(names, sums.tolist(), strict=True)}


def _fill(state: TrainState, local: LocalTensor, own: torch.Tensor | None, begin: int) -> None:
    """Collective: the ranks that hold the same rows; each has written others of them."""
    target = local.tensor.detach()
    whole = torch.zeros(target.numel() * target.element_size(), dtype=torch.uint8, device=target.device)
    if own is not None:
        whole[begin : begin + len(own)] = own
    if local.num_replicas > 1:
        everybody = local.num_replicas == state.topology.world_size
        group = dist.group.WORLD if everybody else state.topology.replicate_group
        dist.all_reduce(whole, group=group)  # every byte is zero on all ranks but one
    target.copy_(whole.view(target.dtype).view(target.shape))
