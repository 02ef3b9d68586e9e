from __future__ import annotations

from typing import Any

import torch

from tests.trainers.tiny import DIT
from trainers.models import ModelConfig, build_model


def new_dit(seed: int = 0) -> Any:
    return build_model(ModelConfig(class_name=DIT["class_name"], args={**DIT["args"], "dropout": 0.0}), seed)


def test_it_begins_with_blocks_that_change_nothing_and_predicts_zero() -> None:
    model, x = new_dit(), torch.randn(2, 1, 8, 8)
    times, labels = torch.tensor([3, 999]), torch.tensor([0, 10])
    assert not model(x, times, labels).sample.any()
    tokens = model.pos_embed(x)
    assert torch.equal(model.transformer_blocks[1](tokens, timestep=times, class_labels=labels), tokens)
    assert all(parameter.any() for name, parameter in model.named_parameters() if name.endswith("to_q.weight"))
    table = model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    assert table.shape == (11, 16) and 0.01 < table.std() < 0.03
    other = new_dit(seed=1).state_dict()
    assert any(not torch.equal(tensor, other[name]) for name, tensor in model.state_dict().items())


def test_no_block_drops_labels_for_itself() -> None:
    """A sample that is without its label in some blocks only teaches nothing of how to do without."""
    embeds = new_dit().train().transformer_blocks[0].norm1.emb
    labels = torch.zeros(200, dtype=torch.long)
    embedded = embeds(torch.zeros(200, dtype=torch.long), labels, hidden_dtype=torch.float32)
    assert torch.equal(embedded, embedded[:1].expand_as(embedded))
