from __future__ import annotations

import mmap

import torch

from orchestrator.agents.snapshot_layout import layout, owned_rows, targets
from trainers.shards import TensorSpec
from trainers.state import SAFETENSORS_DTYPES, LocalTensor


def local(name: str, tensor: torch.Tensor, replica: int = 0, num_replicas: int = 1) -> LocalTensor:
    spec = TensorSpec(name=name, dtype=SAFETENSORS_DTYPES[tensor.dtype], shape=tuple(tensor.shape))
    return LocalTensor(spec=spec, row_offset=0, tensor=tensor, replica=replica, num_replicas=num_replicas)


def test_rows_of_any_kind_are_copied_to_their_place_in_order_of_their_elements() -> None:
    weight = torch.arange(6.0, requires_grad=True).reshape(2, 3)
    owned = [
        local("count", torch.tensor(3)),
        local("strided", weight.t()),
        local("mine", torch.arange(5, dtype=torch.int32), replica=1, num_replicas=2),
        local("half", torch.ones(3, dtype=torch.bfloat16)),
        local("mask", torch.tensor([[True, False]])),
    ]
    chunks, rows = layout(owned), owned_rows(owned)
    assert [(chunk.row_offset, chunk.num_rows) for chunk in chunks] == [(0, 1), (0, 3), (2, 3), (0, 3), (0, 1)]
    buffer = mmap.mmap(-1, chunks[-1].end)
    torch._foreach_copy_(targets(chunks, rows, buffer), rows)
    expected = b"".join(row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for row in rows)
    assert buffer[:] == expected
