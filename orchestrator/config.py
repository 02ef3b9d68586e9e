"""The config of a run: YAML and `key=value` overrides in, one checked and frozen `RunConfig` out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.checkpoint.policy import RetentionConfig
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.schedules import ScheduleConfig, depends_on_num_steps

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_RESERVED_PROFILES = ("raw", "ema", "both")  # words of --weights

_ABSENT = "not set"

# What changes no number, and so may differ between two attempts of one run. (With `parallel.reduction: fast` the number
# of workers and the strategy do change numbers: that is what choosing it means.)
_ORCHESTRATION = frozenset({"run", "storage", "workers", "resources", "checkpoint"})
_PLACEMENT = frozenset({"parallel.strategy", "parallel.shard_size"})


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What the run is called."""

    name: str
    """Folder of the run inside `storage`: letters, digits, `.`, `_`, `-`, at most 100. The same name continues it."""

    def __post_init__(self) -> None:
        if not _SAFE_NAME.fullmatch(self.name):
            raise ConfigError(
                f"name={json.dumps(self.name)} is no safe folder name; start with a letter or digit and use only"
                " letters, digits, '.', '_' and '-', at most 100"
            )


@dataclass(frozen=True, kw_only=True)
class Workers:
    """A range of workers: the run takes what the cluster has."""

    min: int
    """Fewest workers to run with, >= 1."""
    max: int
    """Most workers to run with, >= min."""

    def __post_init__(self) -> None:
        if self.min < 1:
            raise ConfigError(f"min={self.min} must be at least 1")
        if self.max < self.min:
            raise ConfigError(f"max={self.max} is below min={self.min}; set max to at least {self.min}")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one worker asks Ray for."""

    cpu: float = 1.0
    """CPUs a worker, >= 0."""
    gpu: float = 0.0
    """GPUs a worker, 0 <= gpu <= 1: a worker drives one device."""

    def __post_init__(self) -> None:
        if self.cpu < 0:
            raise ConfigError(f"cpu={self.cpu:g} must be at least 0")
        if not 0 <= self.gpu <= 1:
            raise ConfigError(f"gpu={self.gpu:g} must be between 0 and 1; for more GPUs raise workers")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved, and for how long."""

    every_steps: int = 1000
    """A checkpoint after every so many steps, and one at the end, >= 1."""
    keep: RetentionConfig = field(default_factory=RetentionConfig)

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ConfigError(f"every_steps={self.every_steps} must be at least 1")
        if self.keep.every_steps is not None and self.keep.every_steps % self.every_steps:
            raise ConfigError(
                f"keep.every_steps={self.keep.every_steps} is not a multiple of every_steps={self.every_steps}:"
                " most of these steps have no checkpoint; set a multiple"
            )


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

    def __post_init__(self) -> None:
        if not self.storage:
            raise ConfigError('storage="" is empty; give a folder or a URL such as s3://bucket/prefix')
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} is out of range; give 0 <= seed < 2**63")
        self._check_workers()
        for name in self.ema:
            if not _SAFE_NAME.fullmatch(name) or name in _RESERVED_PROFILES:
                raise ConfigError(
                    f"ema.{name} is no usable profile name; use letters, digits, '.', '_' and '-', but none of"
                    f" {', '.join(_RESERVED_PROFILES)}"
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
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, Workers) else self.workers

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, Workers) else self.workers


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The checked config of `path` with `overrides` (`train.num_steps=500`) applied and `${...}` resolved.

    Raises:
        ConfigError: one line that names the file and line, or the key and its value, and what to do.
    """
    tree = _merge(_read(Path(path)), _parse_overrides(overrides))
    try:
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}: {reason}; give it a value, or correct the ${{...}} in it") from None
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{path} is not a section; write `key: value` lines")
    return decode(RunConfig, plain)  # pyright: ignore[reportArgumentType]


def run_url(config: RunConfig) -> str:
    """Where the run lives: `<storage>/<run.name>`. A local path is made absolute: workers start in other folders."""
    storage = config.storage
    if "://" not in storage:
        storage = os.path.abspath(os.path.expanduser(storage))
    return f"{storage}{'' if storage.endswith('/') else '/'}{config.run.name}"


def to_dict(config: TrainerConfig) -> dict[str, Any]:
    """Every key with its value, in JSON's types; `decode` brings the config back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def trainer_dict(config: TrainerConfig) -> dict[str, Any]:
    """The part that `trainers` needs, in JSON's types: what `torchrun -m trainers FILE.json` reads."""
    return {name: value for name, value in to_dict(config).items() if name not in _ORCHESTRATION}


def to_yaml(config: TrainerConfig) -> str:
    """Every key with its value, as a config file that `load_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def config_hash(config: TrainerConfig) -> str:
    """SHA-256 of what decides the numbers of a run; equal for runs that must end in the same bits."""
    decisive = {key: value for key, value in _flatten(to_dict(config)) if not _is_free(key, config.schedule)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def conflicting_keys(old: Mapping[str, Any], new: TrainerConfig) -> list[str]:
    """The keys that decide numbers and differ between a run so far (its `to_dict`) and the config to go on with.

    Workers, strategy, storage, intervals and resources may change between attempts. So may `train.num_steps`, unless
    the learning rate depends on it.

    Returns:
        One text for each key: the key, and both values.
    """
    return [
        f"{key} ({_show(before)} in the run, {_show(after)} in the config)"
        for key, before, after in _differences(old, to_dict(new))
        if not _is_free(key, new.schedule)
    ]


def _is_free(key: str, schedule: ScheduleConfig) -> bool:
    if key == "train.num_steps":
        return not depends_on_num_steps(schedule)
    return key in _PLACEMENT or key.split(".")[0] in _ORCHESTRATION


def _flatten(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**old, **new}:
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{where}{key}.")
        elif before != after:
            yield f"{where}{key}", before, after


def _show(value: Any) -> str:
    return _ABSENT if value == _ABSENT else json.dumps(value)


def _read(path: Path) -> DictConfig:
    try:
        tree = OmegaConf.create(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 text; give a YAML file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_yaml_reason(error)}; correct the YAML") from None
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path} holds a list; write `key: value` lines")
    return tree


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    seen = set()
    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign or not all(key.split(".")):
            raise ConfigError(f"override {override!r} is not of the form key=value, such as train.num_steps=500")
        if key in seen:
            raise ConfigError(f"override {override!r} sets {key} a second time; give it once")
        seen.add(key)
        try:
            OmegaConf.from_dotlist([override])
        except (yaml.YAMLError, OmegaConfBaseException, ValueError):
            raise ConfigError(f"override {override!r} has no valid YAML value; quote it: {key}='\"...\"'") from None
    return OmegaConf.from_dotlist(list(overrides))


def _merge(tree: DictConfig, overrides: DictConfig) -> DictConfig:
    try:
        merged = OmegaConf.merge(tree, overrides)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        keys = ", ".join(key for key, _ in _flatten(OmegaConf.to_container(overrides)))  # pyright: ignore[reportArgumentType]
        reason = str(error).splitlines()[0]
        raise ConfigError(f"overrides of {keys} do not fit the file: {reason}; replace whole lists") from None
    assert isinstance(merged, DictConfig)
    return merged


def _yaml_reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f", line {error.problem_mark.line + 1}: {error.problem}"
    return f": {' '.join(str(error).split())}"
