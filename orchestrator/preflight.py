"""What can be known to fail before any worker starts."""

from __future__ import annotations

import torch

from trainers.config import TrainerConfig
from trainers.data.sources import open_source
from trainers.errors import ConfigError
from trainers.models import build_model, call_model, check_fits, null_label


def check_trainable(config: TrainerConfig) -> None:
    """Build the model without memory for its weights, open the data, and let the model see the shape of one sample.

    Raises:
        ConfigError: unknown model, refused arguments, missing data, or a model that does not fit the data.
    """
    with torch.device("meta"):  # shapes only: no memory and no arithmetic, however large the model
        model = build_model(config.model, config.seed)
    source = open_source(config.data)
    size = config.data.image_size
    check_fits(
        model,
        channels=source.channels,
        image_size=size,
        num_classes=source.num_classes,
        label_drop=config.objective.label_drop,
    )
    images = torch.zeros((1, source.channels, size, size), device="meta")
    index = torch.zeros(1, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            labels = None if null_label(model) is None else index
            output = call_model(model, images, index, labels, with_variance=config.objective.learned_variance)
    except NotImplementedError:  # an operation that has no shape-only form: the first step will tell
        return
    except Exception as error:  # whatever a layer raises about the shapes that it was given
        raise ConfigError(_misfit(config, f"{type(error).__name__}: {error}")) from error
    if config.objective.learned_variance:
        config.objective.check_variance(output.shape[1], source.channels)
        output = output.chunk(2, dim=1)[0]
    if output.shape != images.shape:
        raise ConfigError(_misfit(config, f"it makes {list(output.shape)} of {list(images.shape)}"))


def _misfit(config: TrainerConfig, reason: str) -> str:
    return (
        f"model.class_name={config.model.class_name} cannot take images of data.image_size={config.data.image_size}:"
        f" {reason}; change model.args or data.image_size"
    )
