from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.config import (
    RunConfig,
    load_config,
    run_url,
    to_dict,
    to_yaml,
    trainer_dict,
)
from orchestrator.run_identity import config_hash, conflicting_keys
from orchestrator.sections import Workers
from trainers.config import TrainerConfig
from trainers.decode import decode
from trainers.errors import ConfigError

BASE = """\
run:
  name: digits
seed: 3
workers: 2
model:
  class_name: UNet2DModel
  args: {sample_size: 8, block_out_channels: [32, 64]}
ema:
  slow: {decay: 0.999}
optimizer:
  lr: 1e-3
train:
  num_steps: 100
  global_batch_size: 64
  microbatch_size: 16
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "digits.yaml"
    file.write_text(BASE)
    return file


def test_a_file_and_overrides_make_one_config(path: Path):
    config = load_config(
        path, ["train.num_steps=7", "ema.fast.decay=0.9", "run.name=${model.class_name}-a", "workers=3"]
    )
    assert (config.train.num_steps, config.workers, config.run.name) == (7, 3, "UNet2DModel-a")
    assert list(config.ema) == ["slow", "fast"] and config.ema["fast"].decay == 0.9
    assert config.optimizer.lr == 1e-3  # YAML 1.1 would read 1e-3 as a text
    assert config.storage == "runs"


def test_a_range_of_workers(path: Path):
    config = load_config(path, ["workers={min: 1, max: 4}"])
    assert config.workers == Workers(min=1, max=4)
    assert (config.min_workers, config.max_workers) == (1, 4)
    assert load_config(path, ["workers.min=2", "workers.max=2"]).max_workers == 2


PEER, DISK = "{url: peer://, every: 20, keep: 2}", "{url: /data/runs, every: 100, keep: 5}"

REFUSED = [
    (["train.num_step=5"], "train.num_step=5 is not a known key; did you mean train.num_steps?"),
    (["trian.num_steps=5"], "is not a known key; did you mean train?"),
    (["train.num_steps=many"], 'train.num_steps="many" is a text; give a whole number'),
    (["train.num_steps=1e3"], "train.num_steps=1000.0 is a number; give a whole number"),
    (["train.num_steps=0"], "train.num_steps=0 must be at least 1"),
    (["train=5"], "train=5 is not a section"),
    (["train.microbatch_size=48"], "train.global_batch_size=64 is not a multiple of microbatch_size=48"),
    (["workers=5"], "/ train.microbatch_size=16); set workers=4 or less"),
    (["workers=0"], "workers=0 must be at least 1"),
    (["workers=two"], 'workers="two" is a text; give a whole number or a section'),
    (["workers={min: 2}"], "workers.max is missing"),
    (["workers={min: 3, max: 2}"], "workers.max=2 is below min=3"),
    (["workers={min: 0, max: 2}"], "workers.min=0 must be at least 1"),
    (["workers={min: 1, max: 9}"], "workers.max=9 is more than the 4 microbatches"),
    (["parallel.strategy=hsdp", "workers=3"], "parallel.shard_size=2 does not divide workers=3"),
    (["parallel.strategy=hsdp", "workers={min: 2, max: 4}"], "does not divide workers={min: 2, max: 4}"),
    (["parallel.cpu_threads=100000000000"], "parallel.cpu_threads=100000000000 is more than any machine runs; give"),
    (["parallel.strategy=zero"], 'parallel.strategy="zero" is not one of ddp, fsdp, hsdp'),
    (["run.name=a/b"], 'run.name="a/b" is no safe folder name'),
    (["run.name=.."], 'run.name=".." is no safe folder name'),
    (["run.name=''"], 'run.name="" is no safe folder name'),
    (["run.name=2026"], "run.name=2026 is a whole number; give a text, in quotes"),
    (["storage=''"], 'storage="" is empty'),
    (["storage=s3:/bucket/runs"], "storage=s3:/bucket/runs lacks a slash"),
    (["seed=-1"], "seed=-1 is out of range"),
    (["seed=9223372036854775808"], "seed=9223372036854775808 is out of range"),
    (["seed=" + "9" * 5000], "has no valid YAML value"),
    (["resources.gpu=2"], "resources.gpu=2 must be between 0 and 1"),
    (["resources.cpu=-1"], "resources.cpu=-1 must be at least 0"),
    (["checkpoint.every_steps=0"], "checkpoint.every_steps=0 must be at least 1, or auto"),
    (["checkpoint.every_steps=often"], 'checkpoint.every_steps="often" is a text; give a whole number or auto'),
    ([f"checkpoint.tiers=[{PEER}, {DISK}]", "checkpoint.every_steps=auto"], "every_steps=auto and keep.last=10 are"),
    (["checkpoint.every_steps=auto", "checkpoint.max_lag_steps=1"], "checkpoint.max_lag_steps=1 is less than two"),
    (["checkpoint.keep.last=0"], "checkpoint.keep.last=0 must be at least 1, or null to keep all"),
    (["checkpoint.keep.every_steps=1500"], "checkpoint.keep.every_steps=1500 is not a multiple of every_steps=1000"),
    (["checkpoint.deadline_s=-1"], "checkpoint.deadline_s=-1 must be at least 0"),
    (["checkpoint.max_lag_steps=1999"], "checkpoint.max_lag_steps=1999 is less than two intervals"),
    (["checkpoint.when_busy=drop"], 'checkpoint.when_busy="drop" is not one of wait, skip'),
    (["checkpoint.keep.best.metric=fid"], "checkpoint.keep.best.metric='fid' is no number of a step"),
    (["checkpoint.tiers=[{url: peer://, every: 5, keep: 1}]"], "and exactly one tier that outlives the nodes"),
    ([f"checkpoint.tiers=[{PEER}, {DISK}]", "checkpoint.every_steps=7"], "are given by the tiers"),
    ([f"checkpoint.tiers=[{PEER}, {DISK}]", "storage=/other"], "name two places; give one of them"),
    ([f"checkpoint.tiers=[{PEER}, {{url: /a, every: 5, keep: 1}}]"], "which is not more often than every=5"),
    (["failures.kills=0"], "failures.kills=0 must be at least 1"),
    (["failures.on_replay_difference=ignore"], 'failures.on_replay_difference="ignore" is not one of warn, stop'),
    (["divergence.patience=0"], "divergence.patience=0 must be at least 1"),
    (["train.ema_health_every=0"], "train.ema_health_every=0 must be at least 1, or null"),
    (
        ["objective.prediction_type=flow", "objective.contrastive=0.1", "train.microbatch_size=1"],
        "objective.contrastive=0.1 pairs the samples of a microbatch, and train.microbatch_size=1",
    ),
    (["optimizer.name=lamb"], 'optimizer.name="lamb" is not one of adamw, adam, sgd, rmsprop'),
    (["optimizer.groups=[{match: (}]"], "optimizer.groups[0].match=( is no regular expression"),
    (["optimizer.lr=.nan"], "optimizer.lr=NaN is not finite"),
    (["model.args.scale=.inf"], "model.args.scale=Infinity is not finite"),
    (["ema.raw.decay=0.9"], "ema.raw is no usable profile name"),
    (["ema.a/b.decay=0.9"], "ema.a/b is no usable profile name"),
    (["model=null"], "model=null is not a section"),
    (["run.name=${nowhere}"], "run.name: Interpolation key 'nowhere' not found"),
    (["run.name=${run.name}"], "run.name: Recursive interpolation detected"),
    (["run.name=${oc.env:UNBROKEN_NOT_SET}"], "'UNBROKEN_NOT_SET' not found"),
    (["optimizer.betas.0=0.5"], "overrides of optimizer.betas.0 do not fit the file"),
    (["ema={}"], "override 'ema={}' changes nothing"),
    (["fast"], "override 'fast' is not of the form key=value"),
    (["=3"], "override '=3' is not of the form key=value"),
    (["train..x=3"], "override 'train..x=3' is not of the form key=value"),
    (["seed=1", "seed=2"], "override 'seed=2' sets seed a second time"),
    (["storage=[a"], "override 'storage=[a' has no valid YAML value"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_what_cannot_run_is_refused_with_one_line(path: Path, overrides: list[str], message: str):
    path.write_text(BASE.replace("lr: 1e-3", "lr: 1e-3\n  betas: [0.9, 0.99]"))
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BASE + "seed: 4\n", "digits.yaml, line 16: found duplicate key seed; correct the YAML"),
        (BASE.replace("[32, 64]}", "[32, 64}"), "digits.yaml, line 7: "),
        (BASE.replace("  name", "\tname"), "digits.yaml, line 2: "),
        ("- run\n- train\n", "digits.yaml holds a list"),
        (BASE.replace("name: digits", "name: ???"), "run.name: Missing mandatory value: name; give it a value"),
        ("hello\n", "digits.yaml holds one value; write"),
        (BASE + "null: x\n", "digits.yaml: Incompatible key type"),
        ("", "model.class_name is missing"),
        (BASE.replace("  name: digits", "  {}"), "run.name is missing; add it to the config or as run.name=VALUE"),
        ("a: !!python/object:os.system {}\n", "digits.yaml, line 1: could not determine a constructor"),
        ("a: 1\n--- \nb: 2\n", "digits.yaml, line 2: but found another document"),
        ("a: \x00\n", "digits.yaml: "),
        (BASE + "7: seven\n", '7="seven" is not a known key'),
    ],
)
def test_a_broken_file_is_refused_with_its_line(path: Path, text: str, message: str):
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: No such file or directory; give the path of a YAML file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"ab\xff")
    with pytest.raises(ConfigError, match="byte 2 is not UTF-8 text"):
        load_config(tmp_path / "binary")


def test_yaml_and_json_bring_the_same_config_back(path: Path):
    config = load_config(path, ["run.name='1e5'", "workers={min: 1, max: 2}", "optimizer.eps=1e-8"])
    assert decode(RunConfig, json.loads(json.dumps(to_dict(config)))) == config
    path.write_text(to_yaml(config))
    assert load_config(path) == config


def test_the_trainers_part_is_a_config_of_its_own(path: Path):
    config = load_config(path)
    part = trainer_dict(config)
    trainers_alone = decode(TrainerConfig, part)
    assert trainers_alone.train == config.train and trainers_alone.ema == config.ema
    assert "workers" not in part and "run" not in part


@pytest.mark.parametrize(
    ("storage", "url"),
    [
        ("s3://bucket/prefix", "s3://bucket/prefix/digits"),
        ("s3://bucket/prefix/", "s3://bucket/prefix/digits"),
        ("memory://", "memory://digits"),
        ("/data/runs", "/data/runs/digits"),
    ],
)
def test_a_run_lives_in_its_storage(path: Path, storage: str, url: str):
    assert run_url(load_config(path, [f"storage={storage}"])) == url


def test_a_relative_storage_is_made_absolute(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert run_url(load_config(path)) == f"{tmp_path}/runs/digits"


FREE = [
    "run.name=other",
    "storage=elsewhere",
    "workers=4",
    "workers={min: 1, max: 2}",
    "resources.cpu=2",
    "checkpoint.every_steps=7",
    "checkpoint.every_steps=auto",
    "checkpoint.keep.last=3",
    "parallel.strategy=ddp",
    "parallel.shard_size=1",
    "train.num_steps=200",
    "failures.kills=5",
    "data.quarantine=true",
    "train.ema_health_every=7",
]
DECISIVE = [
    "seed=4",
    "train.global_batch_size=128",
    "train.microbatch_size=8",
    "train.precision=bf16",
    "model.class_name=DiTTransformer2DModel",
    "model.args.sample_size=16",
    "model.args.dropout=0.1",
    "data.flip=true",
    "divergence.patience=5",
    "objective.prediction_type=flow",
    "optimizer.lr=2e-3",
    "optimizer.groups=[{match: bias}]",
    "optimizer.clip_norm=null",
    "schedule.warmup_steps=10",
    "ema.slow.decay=0.99",
    "ema.fast={decay: 0.9}",
    "parallel.reduction=fast",
    "parallel.cpu_threads=2",
]


@pytest.mark.parametrize("override", FREE)
def test_what_decides_no_number_may_change(path: Path, override: str):
    old, new = load_config(path), load_config(path, [override])
    assert old != new
    assert conflicting_keys(to_dict(old), new) == []
    assert config_hash(old) == config_hash(new)


@pytest.mark.parametrize("override", DECISIVE)
def test_what_decides_numbers_is_named_when_it_changes(path: Path, override: str):
    old, new = load_config(path), load_config(path, [override])
    (line, *_) = conflicting_keys(to_dict(old), new)
    assert line.startswith(override.partition("=")[0])
    assert config_hash(old) != config_hash(new)


def test_a_key_that_is_newer_than_the_run_had_its_default(path: Path):
    new = load_config(path)
    old = to_dict(new)
    del old["optimizer"]["weight_decay"], old["parallel"]["accumulation"]
    assert conflicting_keys(old, new) == []
    assert conflicting_keys(old, load_config(path, ["optimizer.weight_decay=0.1"])) == [
        "optimizer.weight_decay (0.0 in the run, 0.1 in the config)"
    ]


def test_a_conflict_names_both_values(path: Path):
    old, new = load_config(path), load_config(path, ["seed=4", "model.args.dropout=0.1"])
    assert set(conflicting_keys(to_dict(old), new)) == {
        "seed (3 in the run, 4 in the config)",
        "model.args.dropout (not set in the run, 0.1 in the config)",
    }


def test_the_number_of_steps_is_fixed_where_the_learning_rate_follows_it(path: Path):
    cosine = ["schedule.kind=cosine"]
    old, new = load_config(path, cosine), load_config(path, [*cosine, "train.num_steps=200"])
    assert conflicting_keys(to_dict(old), new) == ["train.num_steps (100 in the run, 200 in the config)"]
    assert config_hash(old) != config_hash(new)


def test_the_order_of_keys_in_a_file_changes_no_hash(path: Path):
    first = config_hash(load_config(path))
    path.write_text(BASE.replace("seed: 3\n", "") + "seed: 3\n")
    assert config_hash(load_config(path)) == first
