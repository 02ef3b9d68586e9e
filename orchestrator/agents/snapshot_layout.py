"""What of a state a rank writes, and where that lies in a snapshot."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from orchestrator.messages.saves import Chunks
from trainers.shards import DTYPE_BYTES, Chunk
from trainers.state import LocalTensor, TrainState


def owned_tensors(state: TrainState) -> list[LocalTensor]:
    """Those of which this rank saves rows. Larger elements go first in a file, so that every tensor is aligned."""
    owned = [local for local in state.tensors() if local.tensor.numel() and _num_rows(local)]
    return sorted(owned, key=lambda local: local.tensor.element_size(), reverse=True)


def _num_rows(local: LocalTensor) -> int:
    start, stop = local.owned_rows()
    return stop - start


def layout(owned: Sequence[LocalTensor]) -> Chunks:
    """Where the rows that this rank saves lie in a snapshot: back to back."""
    chunks, end = [], 0
    for local in owned:
        start, stop = local.owned_rows()
        begin, end = end, end + (stop - start) * local.spec.row_bytes
        offset = local.row_offset + start
        chunks.append(Chunk(spec=local.spec, row_offset=offset, num_rows=stop - start, begin=begin, end=end))
    return Chunks(chunks)


def owned_rows(owned: Sequence[LocalTensor]) -> list[torch.Tensor]:
    """What is copied into a snapshot, on whatever device it is."""
    tensors = [local.tensor.detach() for local in owned]
    places = zip(tensors, owned, strict=True)
    return [tensor[slice(*local.owned_rows())] if tensor.ndim else tensor for tensor, local in places]


def targets(chunks: Chunks, rows: Sequence[torch.Tensor], buffer: mmap.mmap) -> list[torch.Tensor]:
    """Where each of `rows` is copied to. To make them takes as long as to copy a megabyte."""
    whole = torch.frombuffer(buffer, dtype=torch.uint8)
    places = zip(chunks, rows, strict=True)
    return [whole[chunk.begin : chunk.end].view(tensor.dtype).view(tensor.shape) for chunk, tensor in places]


def snapshot_bytes(state: TrainState) -> int:
    """What this rank's snapshot takes, with the EMA profiles that begin in the next step."""
    chunks = layout(owned_tensors(state))
    trained = {f"model/{parameter.name}" for parameter in state.parameters}
    sizes = [
        (chunk.end - chunk.begin) // DTYPE_BYTES[chunk.spec.dtype] for chunk in chunks if chunk.spec.name in trained
    ]
    profiles = len(state.ema.beginning(state.progress.step + 1))
    return sum(chunk.end - chunk.begin for chunk in chunks) + profiles * sum(sizes) * DTYPE_BYTES["F32"]
