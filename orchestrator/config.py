"""The config of a run: YAML and `key=value` overrides in, one checked and frozen `RunConfig` out."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.coordination.failures import FailureConfig
from orchestrator.coordination.watchdog import WatchdogConfig
from orchestrator.credentials import refuse_secrets
from orchestrator.deploy.config import DeployConfig
from orchestrator.sections import SAFE_NAME, CheckpointConfig, Resources, RunSection, Workers
from orchestrator.tracking.config import TrackingConfig
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError

_RESERVED_PROFILES = ("raw", "ema", "both")  # words of --weights


@dataclass(frozen=True, kw_only=True)
class RunConfig(TrainerConfig):
    """A whole run: what is trained (`TrainerConfig`), and what keeps it alive."""

    run: RunSection
    storage: str = "runs"
    """Folder or URL (s3://bucket/prefix, ...) in which runs live; this one lives in `<storage>/<run.name>`."""
    workers: int | Workers = 1
    """Ray Train workers: a number, or {min, max}; at most one for each microbatch of a step."""
    resources: Resources = field(default_factory=Resources)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    deploy: DeployConfig = field(default_factory=DeployConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    failures: FailureConfig = field(default_factory=FailureConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.storage:
            raise ConfigError('storage="" is empty; give a folder or a URL such as s3://bucket/prefix')
        if re.match(r"\w+:/(?!/)", self.storage_url):
            raise ConfigError(f"storage={self.storage_url} lacks a slash; a URL is written s3://bucket/prefix")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} is out of range; give 0 <= seed < 2**63")
        tier = self.checkpoint.storage
        if tier is not None and self.storage not in ("runs", tier.url):
            raise ConfigError(f"storage={self.storage!r} and the tier {tier.url!r} name two places; give one of them")
        self._check_workers()
        self._check_best()
        for name in self.ema:
            if not SAFE_NAME.fullmatch(name) or name in _RESERVED_PROFILES:
                raise ConfigError(
                    f"ema.{name} is no usable profile name; use letters, digits, '.', '_' and '-', but none of"
                    f" {', '.join(_RESERVED_PROFILES)}"
                )

    def _check_best(self) -> None:
        best, every, save = self.checkpoint.keep.best, self.validation.every_steps, self.checkpoint.interval_steps
        if best is None or not best.metric.startswith("validation/"):
            return
        known = ["validation/loss", *(f"validation/loss/ema/{name}" for name in self.ema)]
        if best.metric not in known:
            raise ConfigError(f"checkpoint.keep.best.metric={best.metric} is not measured; give {' or '.join(known)}")
        if not self.validation.holds_out or every is None:
            raise ConfigError(
                f"checkpoint.keep.best.metric={best.metric} is not measured; set validation.fraction and"
                " validation.every_steps"
            )
        if self.checkpoint.automatic:
            raise ConfigError(
                f"checkpoint.keep.best.metric={best.metric}: with checkpoint.every_steps=auto few checkpoints have a"
                " validation; give a number of steps"
            )
        if save % every and every % save:
            raise ConfigError(
                f"checkpoint.keep.best.metric={best.metric}: few of the checkpoints of every {save} steps have a"
                f" validation of every {every} steps; make one of the two a multiple of the other"
            )

    def _check_workers(self) -> None:
        fewest, most = self.min_workers, self.max_workers
        key = "workers.max" if isinstance(self.workers, Workers) else "workers"
        if fewest < 1:
            raise ConfigError(f"workers={fewest} must be at least 1")
        if most > self.train.num_microbatches:
            raise ConfigError(
                f"{key}={most} is more than the {self.train.num_microbatches} microbatches of a step"
                f" (train.global_batch_size={self.train.global_batch_size} /"
                f" train.microbatch_size={self.train.microbatch_size}); set {key}={self.train.num_microbatches} or less"
            )
        size = self.parallel.shard_size
        if self.parallel.strategy == "hsdp" and any(count % size for count in range(fewest, most + 1)):
            shown = fewest if fewest == most else f"{{min: {fewest}, max: {most}}}"
            raise ConfigError(
                f"parallel.shard_size={size} does not divide workers={shown}; hsdp needs whole shard groups, so give a"
                f" fixed number of workers that is a multiple of {size}"
            )

    @property
    def rollback_steps(self) -> int:
        """Steps that may have to be undone: so old a checkpoint is kept, whatever `checkpoint.keep` says."""
        return max(self.divergence.rollback_steps, self.integrity.recompute_every or 0)

    @property
    def storage_url(self) -> str:
        """What holds all runs: `storage`, or the tier that takes its place."""
        return self.checkpoint.storage.url if self.checkpoint.storage else self.storage

    @property
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, Workers) else self.workers

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, Workers) else self.workers


SECTIONS_OF_RUN = frozenset(f.name for f in fields(RunConfig)) - frozenset(f.name for f in fields(TrainerConfig))
"""The top-level keys that decide no number."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked config of `path` with `overrides` (`train.num_steps=500`) applied and `${...}` resolved.

    Raises:
        ConfigError: one line that names the file and line, or the key and its value, and what to do. The value of
            what looks like a secret is not shown.
    """
    tree = _merge(_read(Path(path)), _parse_overrides(overrides))
    try:
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}; give it a value, or correct the ${{...}} in it") from None
    refuse_secrets(plain, str(path))
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{path} is not a section; write `key: value` lines")
    return decode(RunConfig, plain)  # pyright: ignore[reportArgumentType]


def override(key: str, value: Any) -> str:
    """`key=value` for `load_config` and the command line, whatever is in the value."""
    # Not in ASCII: JSON writes what is beyond 16 bits, such as an emoji, in two halves, which YAML does not take.
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def run_url(config: RunConfig) -> str:
    """Where the run lives: `<storage>/<run.name>`. A local path is made absolute: workers start in other folders."""
    storage = config.storage_url
    if "://" not in storage:
        storage = os.path.abspath(os.path.expanduser(storage))
    return f"{storage}{'' if storage.endswith('/') else '/'}{config.run.name}"


def to_dict(config: TrainerConfig) -> dict[str, Any]:
    """Every key with its value, in JSON's types; `decode` brings the config back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def trainer_dict(config: TrainerConfig) -> dict[str, Any]:
    """The part that `trainers` needs, in JSON's types: what `torchrun -m trainers FILE.json` reads."""
    return {name: value for name, value in to_dict(config).items() if name not in SECTIONS_OF_RUN}


def to_yaml(config: TrainerConfig) -> str:
    """Every key with its value, as a config file that `load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def flatten(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _read(path: Path) -> DictConfig:
    try:
        text = path.read_text(encoding="utf-8")
        if isinstance(yaml.safe_load(text), str | int | float):  # which is no config, but OmegaConf makes one of it
            raise ConfigError(f"{path} holds one value; write `key: value` lines")
        tree = OmegaConf.create(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a YAML file") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}; name keys with letters") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; give a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_reason(error)}; correct the YAML") from None
    except RecursionError:
        raise ConfigError(
            f"{path}: lists or sections lie in each other too deep; give the YAML file of a run"
        ) from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path} holds a list; write `key: value` lines")
    refuse_secrets(OmegaConf.to_container(tree), str(path))  # also where ${oc.env:NAME} would fetch one
    return tree


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    seen = set()
    for override in overrides:
        key, sign, value = override.partition("=")
        refuse_secrets({key: value or key}, "an override")
        if not sign or not all(key.split(".")):
            raise ConfigError(f"override {override!r} is not of the form key=value, such as train.num_steps=500")
        if key in seen:
            raise ConfigError(f"override {override!r} sets {key} a second time; give it once")
        seen.add(key)
        try:
            OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException, ValueError):
            raise ConfigError(f"override {override!r} has no valid YAML value; quote it: {key}='\"...\"'") from None
    tree = OmegaConf.from_dotlist(list(overrides))
    refuse_secrets(OmegaConf.to_container(tree), "an override")
    return tree


def _merge(tree: DictConfig, overrides: DictConfig) -> DictConfig:
    for key, value in flatten(OmegaConf.to_container(overrides)):  # pyright: ignore[reportArgumentType]
        if value == {} and OmegaConf.select(tree, key, throw_on_resolution_failure=False):
            raise ConfigError(f"override '{key}={{}}' changes nothing: a section keeps its other keys; edit the file")
    try:
        merged = OmegaConf.merge(tree, overrides)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        keys = ", ".join(key for key, _ in flatten(OmegaConf.to_container(overrides)))  # pyright: ignore[reportArgumentType]
        reason = str(error).splitlines()[0]
        raise ConfigError(f"overrides of {keys} do not fit the file: {reason}; replace whole lists") from None
    assert isinstance(merged, DictConfig)
    return merged


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f", line {error.problem_mark.line + 1}: {error.problem}"
    return f": {' '.join(str(error).split())}"
