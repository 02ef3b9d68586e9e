"""Adam and AdamW on a CPU in one pass over memory, the same bits for every element wherever the rows are cut."""

from __future__ import annotations

from typing import Any

import torch

_ALIGNED = 16
"""Elements: whole vectors on every CPU that torch has kernels for (AVX-512: 16 float32)."""


class _Pieces:
    """What the kernel sees of some parameters: each one up to its last whole vector, and copies of all that is left."""

    def __init__(self, tensors: list[tuple[torch.Tensor, ...]]) -> None:
        """Args: tensors: of every parameter its weights, first and second moment, flat."""
        self.whole = [_whole(flat.numel()) for flat, *_ in tensors]
        """Elements in whole vectors."""
        self.tails = [
            flat[whole:]
            for kinds in zip(*tensors, strict=True)
            for flat, whole in zip(kinds, self.whole, strict=True)
            if whole < flat.numel()
        ]
        """Of all weights, then of all first and of all second moments, where they belong."""
        self.grads = torch.zeros(len(self.tails) // 3, _ALIGNED)
        """Room for the ends of gradients, which are new in every step."""
        self.grad_rows = [row[: len(tail)] for row, tail in zip(self.grads, self.tails, strict=False)]
        room = torch.zeros(3, *self.grads.shape)
        self.copies = [row[: len(tail)] for row, tail in zip(room.flatten(0, 1), self.tails, strict=True)]
        """And where each fills a vector, whose other elements stay zero."""
        self.updated = [
            [flat[:whole] for flat, whole in zip(kinds, self.whole, strict=True) if whole]
            + [copies] * bool(len(copies))
            for kinds, copies in zip(zip(*tensors, strict=True), room, strict=True)
        ]


class FusedAdam(torch.optim.Optimizer):
    """torch's fused kernel, called so that it treats all elements alike.

    It computes what is left over after the last whole vector in another way, with another rounding; and what that is
    depends on the rows that this rank holds. So these elements are copied to where they fill a vector of their own.
    torch's other implementations pass over memory some ten times: on a CPU they take five times as long.
    """

    def __init__(self, groups: list[dict[str, Any]], *, decoupled: bool, **defaults: Any) -> None:
        """
        Args:
            groups: of contiguous float32 tensors on a CPU, each with its `weight_decay`.
            decoupled: AdamW's weight decay, else Adam's.
            defaults: `lr`, `betas` and `eps`.
        """
        super().__init__(groups, defaults)
        self._update = torch._fused_adamw_ if decoupled else torch._fused_adam_
        self._pieces: dict[tuple[int, ...], _Pieces] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient, whose state has to be there. Local."""
        assert closure is None, "the gradients are there before"
        for group in self.param_groups:
            members = [member for member in group["params"] if member.grad is not None]
            if members:
                self._step(group, members)

    def _step(self, group: dict[str, Any], members: list[torch.Tensor]) -> None:
        key = tuple(map(id, members))
        if key not in self._pieces:
            states = [(member, self.state[member]["exp_avg"], self.state[member]["exp_avg_sq"]) for member in members]
            self._pieces[key] = _Pieces([tuple(tensor.view(-1) for tensor in tensors) for tensors in states])
        pieces = self._pieces[key]
        grads, left = [], []
        for member, whole in zip(members, pieces.whole, strict=True):
            assert member.grad is not None
            flat = member.grad.reshape(-1)
            if whole == flat.numel():
                grads += [flat] * bool(whole)
            else:
                grads += [flat[:whole]] * bool(whole)
                left.append(flat[whole:])
        if pieces.tails:
            torch._foreach_copy_([*pieces.copies, *pieces.grad_rows], [*pieces.tails, *left])
            grads.append(pieces.grads)
        steps = [self.state[member]["step"] for member in members]
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        weights, first, second = pieces.updated
        self._update(
            weights,
            grads,
            first,
            second,
            [],
            steps[:1] * len(grads),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        if pieces.tails:
            torch._foreach_copy_(pieces.tails, pieces.copies)


def _whole(numel: int) -> int:
    """As many of `numel` elements as fill whole vectors."""
    return numel - numel % _ALIGNED
