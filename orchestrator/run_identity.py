"""Which keys make a run the same run: what decides numbers, and what may change between two attempts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from orchestrator.checkpoint import run_record
from orchestrator.checkpoint.run_record import RunRecord
from orchestrator.checkpoint.store import Store
from orchestrator.config import SECTIONS_OF_RUN, RunConfig, flatten, to_dict
from orchestrator.errors import RunMismatchError
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.schedules import ScheduleConfig, depends_on_num_steps

_ABSENT = "not set"

# What changes no number, and so may differ between two attempts of one run. (With `parallel.reduction: fast` the number
# of workers and the strategy do change numbers: that is what choosing it means. What quarantine leaves out is state.)
_PLACEMENT = frozenset(
    {
        "parallel.strategy",
        "parallel.shard_size",
        "parallel.accumulation",
        "model.gradient_checkpointing",
        "data.quarantine",
        "data.num_workers",
        "data.prefetch",
        "data.cache",
    }
)
_OBSERVATION = frozenset({"train.ema_health_every", "validation.every_steps"})


def config_of(store: Store) -> RunConfig:
    """The config that the run at `store` was first started with, with today's defaults for keys that are newer.

    Raises:
        RunNotFoundError: there is no run.
        RunMismatchError: it has keys or values that this version of unbroken does not know.
    """
    try:
        return decode(RunConfig, run_record.load(store).config)
    except ConfigError as error:
        raise RunMismatchError(
            f"the config in {store.url} is of another version of unbroken, this one cannot read it ({error}); use the"
            " version that made the run, or a newer one"
        ) from error


def config_hash(config: TrainerConfig) -> str:
    """SHA-256 of what decides the numbers of a run; equal for runs that must end in the same bits."""
    decisive = {key: value for key, value in flatten(to_dict(config)) if not _is_free(key, config.schedule)}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def conflicting_keys(old: Mapping[str, Any], new: TrainerConfig) -> list[str]:
    """The keys that decide numbers and differ between a run so far (its `to_dict`) and the config to go on with.

    Workers, strategy, storage, intervals and resources may change between attempts. So may `train.num_steps`, unless
    the learning rate depends on it.

    Returns:
        One text for each key: the key, and both values.
    """
    with suppress(ConfigError):  # a key that has been removed or renamed since shows up as a difference
        old = to_dict(decode(RunConfig, old))  # keys that are newer than the run have their defaults
    return [
        f"{key} ({_show(before)} in the run, {_show(after)} in the config)"
        for key, before, after in _differences(old, to_dict(new))
        if not _is_free(key, new.schedule)
    ]


def check_same_run(store: Store, record: RunRecord, config: TrainerConfig) -> None:
    """Check that the run at `store` may go on with `config`. Raises RunMismatchError: it may not; names the keys."""
    if conflicts := conflicting_keys(record.config, config):
        raise RunMismatchError(
            f"the run at {store.url} was made with another configuration: {'; '.join(conflicts)};"
            " set these back, or choose another run.name"
        )


def _is_free(key: str, schedule: ScheduleConfig) -> bool:
    if key == "train.num_steps":
        return not depends_on_num_steps(schedule)
    if key.startswith("validation.metrics"):
        return True
    return key in _PLACEMENT | _OBSERVATION or key.split(".")[0] in SECTIONS_OF_RUN | {"samples", "integrity"}


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in {**old, **new}:
        before, after = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _differences(before, after, f"{where}{key}.")
        elif before != after:
            yield f"{where}{key}", before, after


def _show(value: Any) -> str:
    return _ABSENT if value == _ABSENT else json.dumps(value, ensure_ascii=False)
