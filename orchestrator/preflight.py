"""What can be known to fail before any worker starts."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from orchestrator.checkpoint.store import Store
from orchestrator.data.files import data_files
from trainers.conditioning import call_model
from trainers.config import TrainerConfig
from trainers.data.sources import open_source
from trainers.errors import ConfigError
from trainers.fitting import blank_condition, check_fits, data_shape
from trainers.memory import largest_optimizer
from trainers.models import empty_model


def check_trainable(config: TrainerConfig, *, patient: bool = False) -> None:
    """Build the model without memory for its weights, open the data, and let the model see the shape of one sample.

    Args:
        patient: wait for data that is far away as long as a training does, not as long as a person does.

    Raises:
        ConfigError: unknown model, refused arguments, missing data, a model that does not fit the data, or an optimizer
            that is not installed or has a group without parameters.
    """
    with torch.device("meta"):  # shapes only: no memory and no arithmetic, however large the model
        model = empty_model(config.model, config.seed)
    largest_optimizer(model, config.optimizer)  # or raises
    source = open_source(config.data, data_files if patient else partial(data_files, opened=Store.reach))
    channels, height, width = check_fits(model, source, config) or data_shape(source, config)
    size = config.data.image_size
    shapes = source.buckets.shapes if source.buckets else ((size, size),)
    for rows, columns in shapes:
        _check_shape(model, (channels, height * rows // size, width * columns // size), config)


def _check_shape(model: nn.Module, shape: tuple[int, int, int], config: TrainerConfig) -> None:
    noisy = torch.zeros((1, *shape), device="meta")
    index = torch.zeros(1, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            condition = blank_condition(model, 1, num_tokens=8, device=noisy.device)
            output = call_model(model, noisy, index, condition, with_variance=config.objective.learned_variance)
    except NotImplementedError:  # an operation that has no shape-only form: the first step will tell
        return
    except Exception as error:  # whatever a layer raises about the shapes that it was given
        raise ConfigError(_misfit(config, f"{type(error).__name__}: {error}")) from error
    if config.objective.learned_variance:
        config.objective.check_variance(output.shape[1], noisy.shape[1])
        output = output.chunk(2, dim=1)[0]
    if output.shape != noisy.shape:
        raise ConfigError(_misfit(config, f"it makes {list(output.shape)} of {list(noisy.shape)}"))


def _misfit(config: TrainerConfig, reason: str) -> str:
    which = f"model.class_name={config.model.class_name}"
    if config.model.pretrained:
        which = f"model.pretrained={config.model.pretrained}"
    return (
        f"{which} cannot take images of data.image_size={config.data.image_size}:"
        f" {reason}; change model.args or data.image_size"
    )
