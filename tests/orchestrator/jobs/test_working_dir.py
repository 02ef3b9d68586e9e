from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from orchestrator.jobs.job_server import ignore_rules
from orchestrator.jobs.working_dir import Package, pack
from trainers.errors import ConfigError


def make(folder: Path, *names: str, size: int = 1) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)


def packed(folder: Path, config: str = "configs/c.yaml", max_bytes: int = 10**6) -> tuple[Package, set[str]]:
    package = pack(folder, folder / config, folder.parent / "package.zip", ignore_rules, max_bytes)
    with zipfile.ZipFile(package.path) as archive:
        return package, set(archive.namelist())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make(tmp_path / "wd", "configs/c.yaml", "code/a.py", "code/runs/b.py")
    return tmp_path / "wd"


def test_large_and_secret_places_stay_here(folder: Path):
    make(folder, ".git/x", ".venv/x", "code/venv/x", "code/__pycache__/x", "runs/digits/run.json", "wandb/x")
    make(folder, ".env", "code/.netrc", ".aws/credentials", ".ssh/id_rsa", ".kube/config")
    package, names = packed(folder)
    assert names == {"configs/c.yaml", "code/a.py", "code/runs/b.py"}
    assert (package.config, package.num_files, package.size_bytes) == ("configs/c.yaml", 3, 3)


def test_ignore_files_count_at_every_level_but_the_config_travels(folder: Path):
    make(folder, "data/x.bin", "code/y.tmp", "code/z.py")
    (folder / ".gitignore").write_text("data/\nconfigs\n")
    (folder / "code/.rayignore").write_text("*.tmp\n")
    _, names = packed(folder)
    assert names == {".gitignore", "code/.rayignore", "code/a.py", "code/runs/b.py", "code/z.py", "configs/c.yaml"}


def test_a_config_from_elsewhere_travels_too(folder: Path):
    make(folder.parent, "other.yaml")
    package, names = packed(folder, "../other.yaml")
    assert package.config == ".unbroken/other.yaml" and package.config in names


def test_links_to_nowhere_and_in_circles_do_no_harm(folder: Path):
    (folder / "gone").symlink_to("nowhere")
    (folder / "circle").symlink_to(folder)
    assert packed(folder)[0].num_files == 3


def test_too_large_names_what_is_large(folder: Path):
    make(folder, "data/a.bin", "data/b.bin", size=600_000)
    with pytest.raises(ConfigError, match=r"more than Ray's limit of 1 MiB; the most so far is data \(1.1 MiB\)"):
        packed(folder, max_bytes=2**20)
