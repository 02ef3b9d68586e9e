"""Slices of gradients on their way between the ranks of a group, each of which owns one slice.

On a GPU they go by collectives. On a CPU they go as messages from rank to rank: gloo's all-to-all would copy what stays
as well, and has a thread run each collective, which takes the core from the backward pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainers.exchanges import Reduction
from trainers.tree import add_up

# Renamed in torch 2.13; the old name warns there, the new one is missing before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_FEW = 3
"""Members of a group on a GPU that hand each other their slices one by one."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Slices that are on their way."""

    works: Sequence[dist.Work]
    """To wait for; none on a GPU, where streams wait."""
    sent: Sequence[torch.Tensor]
    """Must not go before it has arrived."""
    received: torch.Tensor
    """The memory that the others' slices arrive in."""
    parts: list[torch.Tensor]
    """This rank's slice of all members' nodes, in leaf order: its own nodes' too, where they are."""


def by_messages(tensor: torch.Tensor) -> bool:
    """Whether slices of `tensor` go from rank to rank, and not by collectives."""
    return not tensor.is_cuda


def exchange(
    nodes: list[torch.Tensor], counts: Sequence[int], like: torch.Tensor, group: dist.ProcessGroup
) -> Exchange:
    """Begin to hand every member of `group` its slice of `nodes`. Collective: all members.

    Args:
        nodes: (like.numel(),) each, contiguous.
        counts: how many nodes each member brings.
    """
    if by_messages(like):
        return _send(nodes, counts, like, group)
    return _all_to_all(nodes, counts, like, group)


def hand_back(
    nodes: list[torch.Tensor], heights: Sequence[int], output: torch.Tensor, group: dist.ProcessGroup
) -> Reduction:
    """Put the sum of `nodes`, of which each member has its slice, into everybody's `output`. Collective: all members.

    Shapes: nodes (slice,) each; output (numel,), contiguous.
    """
    part = _part(output, group)
    if not by_messages(output) and group.size() > _FEW:
        add_up(nodes, heights, nodes[0])
        gathered = output.new_empty(group.size() * part)
        _all_gather(gathered, nodes[0], group=group)
        output.copy_(gathered[: output.numel()])
        return
    # In place, where an all-gather would need memory for all of it.
    slices = output.split(part)
    if group.rank() < len(slices):  # with few elements not everybody has a slice
        add_up(nodes, heights, slices[group.rank()])
    if by_messages(output):
        empty = output[:0]
        theirs = [*slices, *[empty] * (group.size() - len(slices))]
        mine = theirs[group.rank()]
        yield _swap([[mine]] * group.size(), [[other] for other in theirs], group)
    else:
        for owner, other in enumerate(slices):
            dist.broadcast(other, group_src=owner, group=group)


def _part(whole: torch.Tensor, group: dist.ProcessGroup) -> int:
    """Elements of a slice; the last ones may be shorter, or empty."""
    return max(1, -(-whole.numel() // group.size()))


def _send(nodes: list[torch.Tensor], counts: Sequence[int], like: torch.Tensor, group: dist.ProcessGroup) -> Exchange:
    part, own = _part(like, group), group.rank()
    begins = [min(like.numel(), part * member) for member in range(group.size() + 1)]
    sent = [[node[first:stop] for node in nodes] for first, stop in itertools.pairwise(begins)]
    received = like.new_empty(sum(counts) - counts[own], begins[own + 1] - begins[own])
    rows = iter(received.unbind(0))
    parts = [sent[own] if member == own else [next(rows) for _ in range(count)] for member, count in enumerate(counts)]
    return Exchange(
        works=_swap(sent, parts, group), sent=nodes, received=received, parts=[part for some in parts for part in some]
    )


def _swap(
    sent: Sequence[Sequence[torch.Tensor]], received: Sequence[Sequence[torch.Tensor]], group: dist.ProcessGroup
) -> list[dist.Work]:
    """Begin to send tensors to every other member, and to receive as many as it sends. Collective: all members.

    Messages between two ranks arrive in the order in which they are sent; and all ranks begin their exchanges in one
    order, so they need no tags.
    """
    others = [(group.rank() + ahead) % group.size() for ahead in range(1, group.size())]
    works = [dist.irecv(t, group=group, group_src=rank) for rank in reversed(others) for t in received[rank] if len(t)]
    works += [dist.isend(t, group=group, group_dst=rank) for rank in others for t in sent[rank] if len(t)]
    return [work for work in works if work is not None]


def _all_to_all(
    nodes: list[torch.Tensor], counts: Sequence[int], like: torch.Tensor, group: dist.ProcessGroup
) -> Exchange:
    """All slices padded to one length, in one contiguous message a member."""
    numel, num_members, part = like.numel(), group.size(), _part(like, group)
    if len(nodes) == 1 and part * num_members == numel:
        sent = nodes[0]
    else:
        padded = like.new_zeros(len(nodes), part * num_members)
        for row, node in zip(padded, nodes, strict=True):
            row[:numel].copy_(node)
        # (nodes, members, part) -> (members, nodes, part)
        sent = padded.view(len(nodes), num_members, part).transpose(0, 1).contiguous().view(-1)
    received = like.new_empty(sum(counts) * part)
    dist.all_to_all_single(
        received, sent, [count * part for count in counts], [len(nodes) * part] * num_members, group=group
    )
    return Exchange(works=(), sent=[sent], received=received, parts=list(received.view(-1, part).unbind(0)))
