from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from orchestrator.cli import main
from orchestrator.config import flatten, load_config, to_dict
from orchestrator.config_reference import explain

DIGITS = Path(__file__).parents[2] / "configs/digits.yaml"


def test_every_key_is_explained():
    keys = explain()
    assert len({key.name for key in keys}) == len(keys) > 100
    assert not [key.name for key in keys if not key.text or key.text == "None"]
    of_digits = dict(flatten({**to_dict(load_config(DIGITS)), "model": {}}))
    assert not [name for name in of_digits if not explain(name)]


def test_kind_default_and_text():
    (every,) = explain("checkpoint.every_steps")
    assert (every.kind, every.default) == ("whole number | auto", "1000") and every.text.startswith(
        "A checkpoint after"
    )


def test_names_of_your_own_and_entries_of_lists():
    assert [key.name for key in explain("ema.slow.decay")] == ["ema.NAME.decay"]
    assert [key.name for key in explain("checkpoint.tiers[0].url")] == ["checkpoint.tiers[].url"]
    assert {key.name for key in explain("workers")} == {"workers", "workers.min", "workers.max"}


def test_the_command():
    told = CliRunner().invoke(main, ["config", "explain", "train.num_steps"])
    assert told.stdout.splitlines() == [
        "train.num_steps  (whole number; required)",
        "    Optimizer steps of the whole run, >= 1.",
    ]
    assert len(json.loads(CliRunner().invoke(main, ["config", "explain", "--json"]).stdout)) == len(explain())
    wrong = CliRunner().invoke(main, ["config", "explain", "train.num_step"])
    assert wrong.exit_code == 2 and "is not a known key; did you mean train.num_steps?" in wrong.stderr
