"""From autograd to the reduction, where every rank holds all parameters and there is nothing left to gather.

FSDP would do it too: with a dozen calls in Python for each parameter and some hundred for each unit in every step,
which on a CPU was a twentieth of a small UNet's step.

What stays of it is a node of autograd's graph at the entrance of every unit. Where a tensor goes to several places,
autograd adds the gradients that come back as they come; with the node those from inside a unit are added to each other
first. So it decides numbers, and they are to be those of the other strategies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch._utils import _unflatten_dense_tensors
from torch.distributed.fsdp import FSDPModule

from trainers.parallel import LocalParameter, fsdp_modules
from trainers.reduction import InvariantReduction, Rounds, Topology

# Private paths: what FSDP takes for an input of a unit, and nothing else.
try:
    from torch.distributed.fsdp._common_utils import collect_grad_tensors, replace_grad_tensors
except ImportError:  # torch 2.11
    from torch.utils._pytree import tree_iter, tree_map_only

    def collect_grad_tensors(output: Any) -> tuple[torch.Tensor, ...]:
        return tuple(leaf for leaf in tree_iter(output) if torch.is_tensor(leaf) and leaf.requires_grad)

    def replace_grad_tensors(output: Any, tensor_iter: Iterator[torch.Tensor]) -> Any:
        return tree_map_only(torch.Tensor, lambda leaf: next(tensor_iter) if leaf.requires_grad else leaf, output)


def reduce_directly(
    model: torch.nn.Module, parameters: Sequence[LocalParameter], topology: Topology, rounds: Rounds
) -> list[LocalParameter]:
    """Have the units of a model that `gather_for_good` has gathered reduce their gradients without FSDP. Local.

    Returns:
        `parameters`, each with the parameter that the model computes with; its gradient is a plain tensor.
    """
    owners: dict[torch.nn.Parameter, FSDPModule] = {}
    units = fsdp_modules(model)
    for unit in units:  # the root first: the innermost one owns a parameter
        _remove_hooks(unit)
        module = cast(torch.nn.Module, unit)
        module.register_forward_pre_hook(_enter, prepend=True, with_kwargs=True)
        owners |= dict.fromkeys((parameter for parameter in module.parameters() if parameter.requires_grad), unit)
    for unit in units:
        if own := [parameter for parameter, owner in owners.items() if owner is unit]:
            rounds.after_backward.append(_Unit(own, InvariantReduction(topology, rounds)).reduce)
    computed_with = dict(model.named_parameters())
    return [replace(parameter, parameter=computed_with[parameter.name]) for parameter in parameters]


def _remove_hooks(unit: FSDPModule) -> None:
    """The counterpart of what `fully_shard` registers, which torch has no public name for."""
    state = unit._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()


def _enter(
    _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    inputs = collect_grad_tensors((args, kwargs)) if torch.is_grad_enabled() else ()
    return replace_grad_tensors((args, kwargs), iter(_Entrance.apply(*inputs))) if inputs else None


class _Entrance(torch.autograd.Function):
    """Hands tensors in, and the gradients of all of them out when they are complete."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return inputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads


class _Unit:
    """Parameters whose gradients are reduced together, as soon as the backward pass has made all of them."""

    def __init__(self, parameters: list[torch.nn.Parameter], reduction: InvariantReduction) -> None:
        self._parameters = parameters
        self._reduction = reduction
        self._num_ready = 0
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, _: torch.Tensor) -> None:
        self._num_ready += 1
        if self._num_ready == len(self._parameters):
            self.reduce()

    def reduce(self) -> None:
        """Begin to reduce the gradients that there are; none if they have been reduced. Collective: all ranks."""
        if not self._num_ready:
            return
        self._num_ready = 0
        having = [parameter for parameter in self._parameters if parameter.grad is not None]
        grads = [parameter.grad for parameter in having if parameter.grad is not None]
        whole = self._reduction.room(sum(grad.numel() for grad in grads), grads[0])
        torch.cat([grad.reshape(-1) for grad in grads], out=whole)
        for parameter, grad in zip(having, _unflatten_dense_tensors(whole, grads), strict=True):
            parameter.grad = grad  # what it holds counts when the exchanges of the step are finished
        del grads
        self._reduction.finish_round(whole)
