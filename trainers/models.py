"""Models by their diffusers class name, or out of a pretrained folder: how they are built and what they fit."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import diffusers
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trainers.conditioning import call_convention, takes_guidance, takes_text, type_name
from trainers.dit import prepare_dit
from trainers.errors import ConfigError
from trainers.lora import LoraConfig, add_adapters, is_adapter
from trainers.pretrained import FileWeights, PretrainedFolder, open_pretrained, weight_files
from trainers.rng import Stream, derive_seed
from trainers.units import compilable_blocks


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which network is trained, and from which weights on.

    Either class_name and args, or pretrained: a pipeline folder of diffusers, whose VAE and text encoders are then
    used as well, frozen.
    """

    class_name: str | None = None
    """A diffusers ModelMixin by name: UNet2DModel, DiTTransformer2DModel, ... With pretrained: null."""
    args: dict[str, Any] = field(default_factory=dict)
    """The arguments of that class; with pretrained and from_scratch, those that differ from the folder's."""
    pretrained: str | None = None
    """A folder in diffusers form (a pipeline, or a network alone), or the name of a repository on the hub."""
    subfolder: str | None = None
    """Where the network lies in the pretrained folder; null: unet or transformer, as the pipeline has it."""
    variant: str | None = None
    """Which of the folder's weights, in diffusers' words: fp16, non_ema, ...; null: the default ones."""
    from_scratch: bool = False
    """Take the pretrained folder's architecture and frozen parts, but begin at random weights."""
    lora: LoraConfig | None = None
    """Train low-rank adapters instead of the weights themselves; null: the weights."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time, same numbers."""
    compile: bool | str = False
    """true: torch.compile of the model's blocks, for faster steps after a first one that takes a minute or so. Other
    kernels, so other numbers than without; but the same for every number of workers, and after every restart."""

    def __post_init__(self) -> None:
        if isinstance(self.compile, str):
            raise ConfigError(
                f"compile={self.compile} is not true or false, and there are no modes: max-autotune takes the kernels"
                " that were fastest when tried, so noise would decide numbers; reduce-overhead replays CUDA graphs over"
                " memory that FSDP frees; set compile=true"
            )
        if self.pretrained is None:
            if self.class_name is None:
                raise ConfigError("class_name is missing; name a model class of diffusers, or set pretrained")
            for key in ("subfolder", "variant", "from_scratch", "lora"):
                if value := getattr(self, key):
                    raise ConfigError(f"{key}={value} has no effect without pretrained; set it, or remove {key}")
            return
        if self.class_name is not None:
            raise ConfigError(f"class_name={self.class_name} does not go with pretrained, which has one; remove it")
        if self.args and not self.from_scratch:
            raise ConfigError(f"args={self.args} do not fit pretrained weights; remove them, or set from_scratch=true")
        if self.lora and self.from_scratch:
            raise ConfigError("lora adapts pretrained weights, but from_scratch=true; remove one of them")

    def folder(self) -> PretrainedFolder | None:
        """The pretrained folder, if there is one; looked up, and from the hub if need be.

        Raises:
            ConfigError: it is not there, or holds no network.
        """
        return open_pretrained(self.pretrained, self.subfolder, self.variant) if self.pretrained else None

    def classes(self) -> list[str]:
        """What builds the model, for whoever wants it imported early: `library:class` of the network and of its
        pipeline's parts, and the compiler if it is compiled."""
        folder, compiler = self.folder(), ["torch._inductor.compile_fx"] if self.compile else []
        if folder is None:
            return [f"diffusers:{self.class_name}", *compiler]
        return [
            f"diffusers:{folder.class_name}",
            *(f"{library}:{name}" for library, name in sorted(folder.libraries())),
            *compiler,
        ]


def model_class(config: ModelConfig) -> tuple[type[diffusers.ModelMixin], dict[str, Any]]:
    """The class of `config` and its arguments, after checking all that can be checked without building it.

    Raises:
        ConfigError: not a model, not callable as a denoiser of images, or an argument that the class does not have.
    """
    folder = config.folder()
    key = f"model.pretrained={config.pretrained}: class" if folder else "model.class_name"
    name = folder.class_name if folder else cast(str, config.class_name)
    cls = getattr(diffusers, name, None)
    if cls is None:
        near = [match for match in difflib.get_close_matches(name, dir(diffusers), n=8) if _is_model(match)]
        hint = f"did you mean {' or '.join(near[:3])}?" if near else "give a model class of diffusers, e.g. UNet2DModel"
        raise ConfigError(f"{key}={name} is not a class of diffusers {diffusers.__version__}; {hint}")
    if not _is_model(name):
        raise ConfigError(f"{key}={name} is not a model; give a ModelMixin of diffusers, e.g. UNet2DModel")
    call_convention(cls)
    known = [key for key in inspect.signature(cls.__init__).parameters if key != "self"]
    for key, value in config.args.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known arguments: {', '.join(known)}"
            raise ConfigError(f"model.args.{key}={value!r} is not an argument of {name}; {hint}")
    stored = {key: value for key, value in folder.args.items() if key in known} if folder else {}
    return cls, {**stored, **config.args}


def build_model(config: ModelConfig, seed: int) -> nn.Module:
    """The float32 model at its first step, whole, on the CPU: pretrained, or initialised from `seed` alone.

    Raises:
        ConfigError: see `model_class`; or the class refuses its arguments; or the model keeps running statistics.
    """
    if config.pretrained is None or config.from_scratch:
        return _construct(config, seed)
    model = empty_model(config, seed)
    model._apply(lambda tensor: torch.empty_like(tensor, device="cpu") if tensor.is_meta else tensor)
    weights = pretrained_weights(config, model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if (stored := stored_name(name)) is not None:
                tensor.copy_(weights.whole(stored))
            else:
                assert config.lora is not None
                tensor.copy_(config.lora.initial(name, tuple(tensor.shape), seed))
    return model


def empty_model(config: ModelConfig, seed: int) -> nn.Module:
    """The model with the shapes of its parameters only, on the meta device; its buffers hold their values.

    Raises:
        ConfigError: as `build_model`.
    """
    with _parameters_without_memory():
        model = _construct(config, seed)
        if config.lora is not None:
            add_adapters(model, config.lora)
    return model


def pretrained_weights(config: ModelConfig, model: nn.Module) -> FileWeights:
    """The stored weights of `model`, not yet read.

    Raises:
        ConfigError: they are not there, or are those of another model.
    """
    folder = config.folder()
    assert folder is not None
    weights = FileWeights(weight_files(folder, config.variant))
    shapes = {
        stored: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if (stored := stored_name(name)) is not None
    }
    missing, extra = sorted(shapes.keys() - weights.names()), sorted(weights.names() - shapes.keys())
    wrong = [name for name in shapes.keys() & weights.names() if weights.shape(name) != shapes[name]]
    if missing or extra or wrong:
        raise ConfigError(
            f"model.pretrained={config.pretrained}: the weights in {folder.network} are not those of its config.json:"
            f" missing {missing[:3]}, unknown {extra[:3]}, of another shape {wrong[:3]};"
            " load and save it once with this version of diffusers"
        )
    return weights


def stored_name(name: str) -> str | None:
    """What a tensor of the model is called in the pretrained files; None for an adapter, which is not in them."""
    return None if is_adapter(name) else name.replace(".base_layer.", ".")


def _construct(config: ModelConfig, seed: int) -> nn.Module:
    cls, arguments = model_class(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Stream.MODEL_INIT))
        try:
            model = cls(**arguments)
        except Exception as error:  # whatever the class raises, the cause is what the user wrote
            args = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise ConfigError(
                f"model.args={{{args}}} is refused by {cls.__name__}: {type(error).__name__}: {error};"
                " correct the arguments"
            ) from error
        if cls.__name__ == "DiTTransformer2DModel":
            prepare_dit(model)
    for name, module in model.named_modules():
        # They are averaged per rank from the microbatches it happened to run, so they depend on the world size.
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise ConfigError(
                f"model.class_name={cls.__name__} keeps running statistics in {name} ({type(module).__name__}),"
                " which depend on the number of workers; choose a model with group, layer or RMS norm"
            )
    if config.gradient_checkpointing:
        if not getattr(model, "_supports_gradient_checkpointing", False):
            raise ConfigError(f"model.gradient_checkpointing=true is not supported by {cls.__name__}; set it to false")
        cast(Any, model).enable_gradient_checkpointing()
    if config.compile and not compilable_blocks(model):
        raise ConfigError(f"model.compile=true: {cls.__name__} has no blocks to compile; set it to false")
    return model


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device, each moved there as soon as it is made.

    Not `torch.device("meta")`: that would also take the values of buffers, which no file holds if they are constants.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def null_label(model: nn.Module) -> int | None:
    """The label that stands for "no label", or None for a model without classes.

    It is the last row of the label embedding: of the `num_class_embeds` rows of a UNet2DModel (give one more than
    there are classes), and the extra row that DiT appends to its `num_embeds_ada_norm` classes.
    """
    config = settings_of(model)
    if config.get("num_embeds_ada_norm") is not None:
        return config["num_embeds_ada_norm"]
    if config.get("num_class_embeds") is not None:
        return config["num_class_embeds"] - 1
    return None


def learns_null_label(model: nn.Module, label_drop: float) -> bool:
    """Whether training shows the model its null label, so that it can be guided."""
    return null_label(model) is not None and label_drop > 0


def can_be_guided(model: nn.Module, config: ModelConfig, label_drop: float) -> bool:
    """Whether guidance means something to the model: it is told one; or it knows images without their label or text,
    out of this training, or as a pretrained model of text does."""
    if takes_guidance(model):
        return True
    if not takes_text(model):
        return learns_null_label(model, label_drop)
    # Flux schnell is distilled to do without.
    knows = config.pretrained is not None and not config.from_scratch and type_name(model) != "FluxTransformer2DModel"
    return knows or label_drop > 0


def num_classes_of(model: nn.Module, label_drop: float) -> int:
    """How many labels stand for a class, in a model of classes: all but the null label, where that is in use."""
    null = null_label(model)
    assert null is not None
    return null + (settings_of(model).get("num_embeds_ada_norm") is None and label_drop == 0)


def settings_of(model: nn.Module) -> Mapping[str, Any]:
    """The arguments of `model`, with its class's defaults filled in."""
    return cast("Any", model).config


def _is_model(name: str) -> bool:
    cls = getattr(diffusers, name, None)
    return inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)
