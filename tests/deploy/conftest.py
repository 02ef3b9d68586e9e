"""The files of every target, rendered from the example: what is in `deploy/` is this, byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.config import RunConfig, load_config
from orchestrator.deploy.plan import TARGETS
from orchestrator.deploy.render import EXAMPLE_STORAGE, render

ROOT = Path(__file__).parents[2]
COMPONENTS = frozenset({"s3-role", "spot", "token-auth"})


def example(target: str, *overrides: str) -> RunConfig:
    """The config that the files in `deploy/` were written for."""
    own = {"compose": ["workers=2"], "skypilot": ["resources.gpu=1", "deploy.accelerator=L4"]}.get(target, [])
    workers = [] if target == "compose" else ["workers={min: 2, max: 4}"]
    return load_config(ROOT / "configs/digits.yaml", [f"storage={EXAMPLE_STORAGE}", *workers, *own, *overrides])


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all targets; not to be changed."""
    out = tmp_path_factory.mktemp("rendered")
    for target in TARGETS:
        render(example(target), target, out, COMPONENTS if target == "kuberay" else ())
    # By hand: the policies of the other way to keep few checkpoints.
    render(example("s3", "checkpoint.keep.last=null"), "s3", out / "elsewhere")
    return out
