"""Which runs a hyper-parameter search makes, and what came of them: all but running them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import struct
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from orchestrator.config import override
from orchestrator.messages.attempts import Event
from orchestrator.tracking.record import of_the_owner
from trainers.errors import ConfigError

_DRAWN = re.compile(r"(choice|uniform|loguniform|randint)\((.*)\)", re.DOTALL)
_FORMS = "key=[a, b], key=choice(a, b), key=uniform(low, high), key=loguniform(low, high) or key=randint(low, high)"
_NOT_SEARCHED = ("run", "storage", "checkpoint", "tracking", "deploy")
_MOST = {"uniform": 1e307, "loguniform": math.inf, "randint": 2**63}
"""Where bounds end: their difference must be a number, and NumPy's integers have 64 bits."""
_LAST_SHARE = 0.1
_FLOAT = struct.Struct("<d")
_OF_STEPS = ("loss", "grad_norm")
VALIDATION = "validation/"
_VALIDATED = re.compile(rf"{VALIDATION}(loss(/ema/.+)?|(fid|kid|clip)/.+)")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A key of the config, and its values."""

    key: str
    kind: str
    """grid: each of the values, in every combination; else how one is drawn for each sample."""
    values: tuple[Any, ...]
    """Of a grid or choice; or the bounds of an interval, the upper one excluded."""

    def draw(self, seed: int, sample: int) -> Any:
        """The value in this sample: a function of (seed, sample, key)."""
        generator = np.random.default_rng([seed, sample, zlib.crc32(self.key.encode())])
        match self.kind:
            case "choice":
                return self.values[generator.integers(len(self.values))]
            case "uniform":
                return float(generator.uniform(self.values[0], self.values[1]))
            case "loguniform":
                return math.exp(generator.uniform(math.log(self.values[0]), math.log(self.values[1])))
        return int(generator.integers(self.values[0], self.values[1]))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a search."""

    name: str
    values: Mapping[str, Any]

    @property
    def overrides(self) -> list[str]:
        """As on the command line of `unbroken train`."""
        return [f"run.name={self.name}", *(override(key, value) for key, value in self.values.items())]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a trial."""

    name: str
    url: str
    values: Mapping[str, Any]
    state: str
    """finished, or why not."""
    step: int
    metric: float | None
    """As `last_mean` or `last_validation` has it; None: it was never measured."""


def parse_parameter(text: str) -> Parameter:
    """The parameter that `--param` describes.

    Raises:
        ConfigError: it is of no known form, or searches what decides no number.
    """
    key, sign, value = (part.strip() for part in text.partition("="))
    wrong = ConfigError(f"--param {text!r} is of no known form; write {_FORMS}")
    if not sign or not all(key.split(".")):
        raise wrong
    if key.split(".")[0] in _NOT_SEARCHED:
        raise ConfigError(
            f"--param {text!r}: {key} decides no number, so there is nothing to search; set it as {key}=..."
        )
    drawn = _DRAWN.fullmatch(value)
    try:
        values = yaml.safe_load(f"[{drawn[2]}]" if drawn else value)
    except yaml.YAMLError:
        raise wrong from None
    if not isinstance(values, list) or not values:
        raise wrong
    kind = drawn[1] if drawn else "grid"
    values = [_number(entry) for entry in values]
    try:
        json.dumps(values)
    except TypeError:  # YAML takes 2026-11-30 for a date
        raise ConfigError(f"--param {text!r}: a config has no dates; put them into quotes") from None
    if kind in ("uniform", "loguniform", "randint"):
        numbers = int if kind == "randint" else (int, float)
        fits = len(values) == 2 and all(isinstance(bound, numbers) and abs(bound) < _MOST[kind] for bound in values)
        if not fits or values[0] >= values[1] or (kind == "loguniform" and values[0] <= 0):
            more = ", above 0" if kind == "loguniform" else ""
            raise ConfigError(f"--param {text!r}: {kind} takes a lower and a higher {_numbers_of(kind)}{more}")
    return Parameter(key=key, kind=kind, values=tuple(values))


def _numbers_of(kind: str) -> str:
    return "integer" if kind == "randint" else "number"


def _number(value: Any) -> Any:
    """YAML 1.1 takes 1e-4 for a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def make_trials(name: str, parameters: Sequence[Parameter], num_samples: int, seed: int) -> list[Trial]:
    """Every combination of the grids, each with `num_samples` draws of the others; the same for the same arguments.

    A trial is named after its values, so that the same values are the same run in any search of this `name`.

    Raises:
        ConfigError: a key twice, or samples without anything to draw.
    """
    keys = [parameter.key for parameter in parameters]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise ConfigError(f"--param {twice}=... is given twice; give it once")
    grids = [parameter for parameter in parameters if parameter.kind == "grid"]
    drawn = [parameter for parameter in parameters if parameter.kind != "grid"]
    if num_samples > 1 and not drawn:
        raise ConfigError(
            f"--samples {num_samples} has no effect without a drawn parameter; leave it out, or write {_FORMS}"
        )
    trials: dict[str, Trial] = {}
    for sample in range(num_samples):
        draws = {parameter.key: parameter.draw(seed, sample) for parameter in drawn}
        for combination in itertools.product(*(grid.values for grid in grids)):
            found = {**dict(zip((grid.key for grid in grids), combination, strict=True)), **draws}
            values = {key: found[key] for key in keys}
            digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
            trials[digest] = Trial(name=f"{name}-{digest}", values=values)
    return list(trials.values())


def last_mean(found: Iterable[Any]) -> float | None:
    """The mean of a metric over the last tenth of the steps that have it; None if none has.

    Args:
        found: of every step, by step; what is no number counts not.
    """
    with tempfile.TemporaryFile() as file:  # which tenth is the last is known at the end, and memory is dearer
        count = sum(file.write(_FLOAT.pack(value)) for value in found if isinstance(value, int | float)) // _FLOAT.size
        last = max(1, round(count * _LAST_SHARE))
        file.seek(_FLOAT.size * max(0, count - last))
        total = sum(_FLOAT.unpack(data)[0] for data in iter(lambda: file.read(_FLOAT.size), b""))
    return total / last if count else None


def last_validation(events: Iterable[Event], name: str) -> float | None:
    """What `name` was when it was last measured on the samples that are held out; None if it never was."""
    values = [event.fields["metrics"].get(name) for event in of_the_owner(events) if event.kind == "validation"]
    return next((value for value in reversed(values) if value is not None), None)


def check_metric(metric: str, validates: bool) -> None:
    """Raises ConfigError if nothing of that name is measured. Args: validates: whether the runs hold samples out."""
    if metric.startswith(VALIDATION):
        if not validates:
            raise ConfigError(f"--metric {metric}: nothing is held out; set validation.num_samples and every_steps")
        if not _VALIDATED.fullmatch(metric):
            raise ConfigError(f"--metric {metric} is not measured; give {VALIDATION}loss, or fid, kid or clip/NETWORK")
    elif metric not in _OF_STEPS and not metric.startswith("ema/"):
        raise ConfigError(f"--metric {metric} is not measured; give {', '.join(_OF_STEPS)} or {VALIDATION}loss")


def ranked(results: Sequence[Result], mode: str) -> list[Result]:
    """The best one first; those without a metric last."""
    sign = 1 if mode == "min" else -1
    return sorted(results, key=lambda result: (result.metric is None, sign * (result.metric or 0.0)))
