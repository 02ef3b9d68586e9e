"""How a model is cut: into the units that FSDP gathers and frees together, and into its blocks."""

from __future__ import annotations

from collections import Counter

from torch import nn


def sharding_units(model: nn.Module) -> list[list[nn.Module]]:
    """The modules that FSDP shards together, in the order in which `fully_shard` must see them; the root comes last.

    A unit is a block: an element of a ModuleList that hangs on the model, or a child that itself holds a ModuleList
    (a UNet's mid_block). What is small and single (time embedding, first and last convolution) stays with the root.
    """
    units = [[part] for part in called_from_outside(model)]
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            units += [[block] for block in _blocks(child)]
        elif any(isinstance(module, nn.ModuleList) for module in child.modules()):
            units.append([child])
    # A weight tied between two units would silently come apart; those blocks stay with the root.
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [unit for unit in units if (own := list(unit[0].parameters())) and all(uses[id(p)] == 1 for p in own)]


def _blocks(container: nn.ModuleList) -> list[nn.Module]:
    """The blocks of a list; lists in lists are opened, single layers are left to the root."""
    blocks: list[nn.Module] = []
    for element in container:
        if isinstance(element, nn.ModuleList):
            blocks += _blocks(element)
        elif any(True for _ in element.children()):
            blocks.append(element)
    return blocks


def compilable_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of `model` that are not made of blocks themselves: of a transformer its layers; of a UNet the residual
    blocks and the layers of its attention, not its stages.

    A block of which the root calls a part directly is none: with FSDP's hook inside there is no graph of it.
    """
    apart = {id(part) for part in called_from_outside(model)}
    found = _innermost(model)
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            found += _innermost(child)
    return [block for block in found if not any(id(part) in apart for part in block.modules())]


def _innermost(module: nn.Module) -> list[nn.Module]:
    """The blocks in the lists that hang on `module`; what wraps a single layer (up and down sampling) is none."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    blocks = [block for blocks in lists for block in _blocks(blocks) if len(list(block.children())) > 1]
    return [inner for block in blocks for inner in _innermost(block) or [block]]


def called_from_outside(model: nn.Module) -> list[nn.Module]:
    """Parts of a block that the root calls directly, past the hook of the block that would gather their weights.

    DiTTransformer2DModel and Transformer2DModel call `transformer_blocks[0].norm1.emb` from their own forward; as a
    unit of its own, applied before its block, it has its own hook.
    """
    blocks = getattr(model, "transformer_blocks", None)
    emb = getattr(getattr(blocks[0], "norm1", None), "emb", None) if blocks else None
    return [emb] if isinstance(emb, nn.Module) else []
