"""The working directory of a job: which files travel to the cluster, in one zip file."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainers.errors import ConfigError

NEVER = (".git", ".venv", "venv", "__pycache__", ".env", ".netrc", ".aws", ".ssh", ".kube")
"""Names that do not travel, at any depth: large or secret."""
OUTPUTS = ("runs", "wandb")
"""Folders at the top that do not travel."""

IgnoreRules = Callable[[Path], Sequence[Callable[[Path], bool]]]


@dataclass(frozen=True, kw_only=True)
class Package:
    """What was packed."""

    path: Path
    config: str
    """Where the config is in it."""
    num_files: int
    size_bytes: int


def pack(folder: Path, config: Path, target: Path, rules: IgnoreRules, max_bytes: int) -> Package:
    """Write the files of `folder` to the zip file `target`, and `config` with them even if it is ignored or elsewhere.

    Args:
        rules: what the .gitignore and .rayignore of one folder leave out.
        max_bytes: of all files together.

    Raises:
        ConfigError: they are larger.
    """
    folder, config = folder.resolve(), config.resolve()
    inside = config.is_relative_to(folder)
    name = str(config.relative_to(folder)) if inside else f".unbroken/{config.name}"
    sizes: Counter[str] = Counter()
    names = set()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
        for path in _files(folder, [], rules, OUTPUTS):
            relative = path.relative_to(folder)
            sizes[relative.parts[0]] += path.stat().st_size
            if sizes.total() > max_bytes:
                top, size = sizes.most_common(1)[0]
                raise ConfigError(
                    f"--working-dir {folder} holds more than Ray's limit of {max_bytes / 2**20:,.0f} MiB; the most so"
                    f" far is {top} ({size / 2**20:,.1f} MiB): name what the job does not need in .gitignore or"
                    " .rayignore, or choose another --working-dir"
                )
            names.add(str(relative))
            archive.write(path, relative)
        if name not in names:
            archive.write(config, name)
            sizes[name] += config.stat().st_size
            names.add(name)
    return Package(path=target, config=name, num_files=len(names), size_bytes=sizes.total())


def _files(
    folder: Path, ignored: list[Callable[[Path], bool]], rules: IgnoreRules, outputs: Sequence[str] = ()
) -> Iterator[Path]:
    ignored = [*ignored, *rules(folder)]
    for path in sorted(folder.iterdir()):
        if path.name in NEVER or path.name in outputs or any(match(path) for match in ignored):
            continue
        if path.is_dir():
            if not path.is_symlink():  # it may lead back here
                yield from _files(path, ignored, rules)
        elif path.is_file():  # neither a socket nor a link to nowhere
            yield path
