"""The weights of a run, whole, out of a checkpoint: for sampling and export."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from orchestrator.checkpoint.manifest import Manifest
from orchestrator.checkpoint.reader import Destination, read_rows
from orchestrator.checkpoint.selection import select_checkpoint
from orchestrator.checkpoint.store import Store
from orchestrator.config import RunConfig
from orchestrator.ema_synthesis import synthesize
from orchestrator.errors import DamagedCheckpointError
from orchestrator.run_identity import config_of
from trainers.errors import ConfigError
from trainers.models import build_model
from trainers.state import SAFETENSORS_DTYPES

_POSTHOC = "sigma_rel="
_TORCH_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The model of one checkpoint of a run."""

    store: Store
    manifest: Manifest
    config: RunConfig
    """The configuration that the run was first started with."""

    def describe(self, weights: str) -> str:
        """What `--weights` means here, for people."""
        if weights.startswith(_POSTHOC):
            kind = f"post-hoc EMA weights ({weights})"
        else:
            profile = self.profile(weights)
            kind = "raw weights" if profile is None else f"EMA weights ({profile})"
        return f"{kind} of step {self.manifest.progress.step}"

    def profile(self, weights: str) -> str | None:
        """The EMA profile that `--weights` means: `ema` is the first one, `raw` none.

        Raises:
            ConfigError: the run has no such profile.
        """
        if weights == "raw":
            return None
        profiles = list(self.config.ema)
        name = profiles[0] if weights == "ema" and profiles else weights
        if name not in profiles:
            raise ConfigError(f"weights={weights} are not in {self.store.url}; give {' or '.join(['raw', *profiles])}")
        return name

    def tensors(self, weights: str) -> dict[str, torch.Tensor]:
        """Every parameter by name, whole, on the CPU.

        Args:
            weights: `raw`, `ema`, the name of an EMA profile, or `sigma_rel=0.1` for a post-hoc average.

        Raises:
            ConfigError: the run has no such weights, or they begin after this checkpoint.
            DamagedCheckpointError: the files are not what was written.
        """
        if weights.startswith(_POSTHOC):
            return dict(synthesize(self.store, self.config, self.manifest, _width(weights)).tensors())
        profile = self.profile(weights)
        prefix = "model/" if profile is None else f"ema/{profile}/"
        names = [name for name in self.manifest.tensors if name.startswith(prefix)]
        if not names:
            step, start = self.manifest.progress.step, self.config.ema[profile].start_step if profile else 0
            raise ConfigError(
                f"weights={weights} begin after step {start}, this checkpoint is of step {step};"
                " take raw or a later checkpoint"
            )
        found, wanted = {}, []
        for name in names:
            spec = self.manifest.spec(name)
            tensor = torch.empty(spec.shape, dtype=_TORCH_DTYPES[spec.dtype])
            out = tensor.view(-1).view(torch.uint8).numpy().data
            wanted.append(Destination(spec=spec, row_offset=0, num_rows=spec.num_rows, out=out))
            found[name.removeprefix(prefix)] = tensor
        try:
            read_rows(self.store, self.manifest, wanted)  # whole chunks, so every byte is checked by its hash
        except DamagedCheckpointError as error:
            raise DamagedCheckpointError(
                f"{self.store.url}: {error}; take another checkpoint with --step; `unbroken checkpoints verify` says"
                " which are intact"
            ) from error
        return found

    def load(self, weights: str) -> torch.nn.Module:
        """The model with these weights, on the CPU, in float32."""
        model = build_model(self.config.model, self.config.seed)
        loaded = model.load_state_dict(self.tensors(weights), strict=False)
        # Buffers are constants of the class; what is not trained follows from the configuration.
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        missing = [name for name in loaded.missing_keys if name in trained]
        assert not missing and not loaded.unexpected_keys, (missing, loaded.unexpected_keys)
        return model


def _width(weights: str) -> float:
    try:
        return float(weights.removeprefix(_POSTHOC))
    except ValueError:
        raise ConfigError(f"weights={weights} gives no number; write sigma_rel=0.1") from None


def open_model(url: str, step: int | None = None) -> SavedModel:
    """The model of the run at `url`, at the newest stable checkpoint or the one of `step`.

    Raises:
        RunNotFoundError: there is no run.
        ConfigError: there is no such checkpoint.
    """
    store = Store.reach(url)
    config = config_of(store)
    manifest = select_checkpoint(store, step).manifest
    assert manifest is not None
    return SavedModel(store=store, manifest=manifest, config=config)
