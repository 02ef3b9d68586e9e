"""`unbroken sweep` where there is nothing to train: what needs no Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.checkpoint.run_record import open_or_create
from orchestrator.checkpoint.store import Store
from orchestrator.cli import main
from orchestrator.config import load_config, run_url, to_dict
from orchestrator.search.trials import make_trials, parse_parameter
from tests.orchestrator.tiny_run import CONFIG, parameters, save

PARAM = "optimizer.lr=[1e-3, 2e-3]"


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A config whose search of PARAM is finished."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "storage": str(tmp_path)}))
    for trial in make_trials("tiny", [parse_parameter(PARAM)], 1, 0):
        config = load_config(path, trial.overrides)
        store = Store.open(run_url(config))
        open_or_create(store, to_dict(config))
        save(store, config.train.num_steps, {f"model/{name}": tensor for name, tensor in parameters(0).items()})
    return str(path)


def sweep(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["sweep", "--param", PARAM, "--json", *arguments])


def test_a_finished_search_is_shown_and_not_trained_again(path: str) -> None:
    result = sweep(path, "workers=3", "checkpoint.every_steps=5")
    assert result.exit_code == 0, result.output
    assert [(one["values"], one["state"]) for one in json.loads(result.stdout)] == [
        ({"optimizer.lr": 0.001}, "finished"),
        ({"optimizer.lr": 0.002}, "finished"),
    ]


def test_trials_of_another_config_are_no_results_of_this_one(path: str) -> None:
    result = sweep(path, "optimizer.weight_decay=0.5")
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert "made with another configuration: optimizer.weight_decay (0.0 in the run, 0.5 in the" in result.stderr
    assert "choose another run.name" in result.stderr


def test_a_value_that_the_search_replaces_is_refused(path: str) -> None:
    result = sweep(path, "optimizer.lr=0.5")
    assert result.exit_code == 2 and "optimizer.lr=0.5 has no effect" in result.stderr, result.output
