"""Writes the files of `deploy/` with the figures of a config.

Each file there works as it is. A value that follows from the config is marked: `# <- name` at the end of its line, or
alone on the line before where a format takes no comment behind a value. Rendering replaces that value and nothing else.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from orchestrator.config import RunConfig, to_yaml
from orchestrator.deploy.plan import bucket_and_prefix, check, figures, make_plan
from orchestrator.doctor import state_size
from trainers.errors import ConfigError

FILES = Path(__file__).parents[2] / "deploy"
"""Beside the packages, in a checkout and in a wheel."""

EXAMPLE_STORAGE = "s3://my-bucket/runs"
"""What the policies in `deploy/s3` are written for: JSON takes no marks."""

_FOLDERS = {"compose": ("compose", "monitoring", "grafana")}
_CONFIG_IN = {"kuberay": "kuberay/base/config.yaml"}
_TRAINERS_PRUNE, _RETENTION_ELSEWHERE = "bucket-policy.json", "bucket-policy-retention-elsewhere.json"
_MARK = re.compile(r"(?P<before>.*?)(?P<gap>[ \t]*)# <- (?P<name>\w+)")
_VALUE = re.compile(r'(?P<head>.*(?:: |=|- ))(?P<quote>"?)[^"]*(?P=quote)')


def render(config: RunConfig, target: str, out: Path, components: Collection[str] = ()) -> list[Path]:
    """Write the files of one target into `out`.

    Returns:
        The files written.

    Raises:
        ConfigError: the config contradicts the target or itself, or `out` is taken.
    """
    plan = make_plan(config, state_size(config))
    check(config, plan, target, components)
    values = figures(config, plan, components)
    unfit = _RETENTION_ELSEWHERE if config.checkpoint.retention.last is not None else _TRAINERS_PRUNE
    written: list[Path] = []
    for name in _FOLDERS.get(target, (target,)):
        if (out / name).exists():
            raise ConfigError(f"{out / name} exists; remove it, or give another folder with --out")
        for source in sorted(path for path in (FILES / name).rglob("*") if path.is_file()):
            if source.name != unfit:
                written.append(_write(source, out / source.relative_to(FILES), config, values))
    if target != "s3":
        path = out / _CONFIG_IN.get(target, f"{target}/config.yaml")
        path.write_text(config_text(config), encoding="utf-8")
        if path not in written:
            written.append(path)
    return written


def _write(source: Path, path: Path, config: RunConfig, values: Mapping[str, str | None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = source.read_text(encoding="utf-8")
    if source.parent == FILES / "s3":
        text = policy_for(text, config.storage_url)
    path.write_text(fill_in(text, values), encoding="utf-8")
    shutil.copymode(source, path)
    return path


def config_text(config: RunConfig) -> str:
    """The whole config, so that the cluster's run does not depend on the defaults of the image."""
    return f"# Every key of the run; written by `unbroken deploy render`.\n{to_yaml(config)}"


def fill_in(text: str, values: Mapping[str, str | None]) -> str:
    """`text` with the marked values replaced; quotes stay."""
    lines: list[str] = []
    above: str | None = None
    for line in text.split("\n"):
        mark = _MARK.fullmatch(line)
        value = values[mark["name"]] if mark else None
        if above is not None:
            lines.append(_replace(line, above))
            above = None
        elif mark is None:
            lines.append(line)
        elif not mark["before"]:
            lines.append(line)
            above = value
        elif value is not None:
            lines.append(f"{_replace(mark['before'], value)}{mark['gap']}# <- {mark['name']}")
    return "\n".join(lines)


def _replace(line: str, value: str) -> str:
    found = _VALUE.fullmatch(line)
    assert found, f"no value in the marked line {line!r}"
    return f"{found['head']}{found['quote']}{value}{found['quote']}"


def policy_for(text: str, storage: str) -> str:
    """A policy of `EXAMPLE_STORAGE`, for the bucket and prefix of `storage`."""
    old_bucket, old_prefix = bucket_and_prefix(EXAMPLE_STORAGE)
    bucket, prefix = bucket_and_prefix(storage)
    folder = f"{prefix}/" if prefix else ""
    text = text.replace(f":::{old_bucket}/{old_prefix}/", f":::{bucket}/{folder}")
    return text.replace(f":::{old_bucket}", f":::{bucket}").replace(f'"{old_prefix}/"', f'"{folder}"')
