from __future__ import annotations

import pytest

from orchestrator.config import RunConfig, load_config
from orchestrator.deploy.plan import TARGETS, check, figures, job_name, make_plan
from orchestrator.doctor import StateSize
from tests.deploy.conftest import ROOT
from trainers.errors import ConfigError

SMALL = StateSize(parameters=2_000_000, total=8_000_000)
LARGE = StateSize(parameters=10**10, total=4 * 10**10)  # 2.5 billion parameters, one EMA


def config(*overrides: str) -> RunConfig:
    given = {override.partition("=")[0] for override in overrides}
    defaults = [pair for pair in ("storage=s3://b/runs", "workers=2") if pair.partition("=")[0] not in given]
    return load_config(ROOT / "configs/digits.yaml", [*defaults, *overrides])


def test_figures_follow_from_the_config():
    loaded = config(
        "workers={min: 2, max: 4}", "resources={cpu: 3, gpu: 1}", "deploy={workers_per_node: 2, grace_s: 90}"
    )
    plan = make_plan(loaded, SMALL)
    values = figures(loaded, plan, ["spot"])
    assert (plan.min_nodes, plan.max_nodes, plan.node_cpus, plan.node_gpus) == (1, 2, 6, 2)
    assert (values["nodes"], values["node_gpus"], values["warning"]) == ("1-2", "2", "B:USR1@90")
    assert (values["grace_s"], values["drain_s"], values["grace"]) == ("90", "85", "90s")
    assert values["components"] == "[components/autoscaling, components/spot]"
    assert values["accelerators"] == "None:2"  # refused by `check`
    fixed = config("workers=3")
    assert figures(fixed, make_plan(fixed, SMALL))["nodes"] == "3"
    assert figures(fixed, make_plan(fixed, SMALL))["components"] == "[]"


def test_a_save_is_written_and_read_back_by_the_fewest_nodes():
    loaded = config("workers={min: 2, max: 4}", "deploy.store_mb_per_s=200")
    assert make_plan(loaded, LARGE).save_s == 10 + 2 * 40_000 / (2 * 200)
    assert make_plan(config("deploy={store_mb_per_s: 200, workers_per_node: 2}"), LARGE).save_s == 10 + 400


def test_memory_is_counted_for_the_fewest_nodes():
    gib = 2**30
    sharded = make_plan(config("workers={min: 2, max: 4}"), LARGE).node_bytes
    assert sharded == (5 * 10**10) / 2 + (4 * 10**10) / 2 + gib
    replicated = make_plan(config("parallel.strategy=ddp"), LARGE).node_bytes
    assert replicated == 5 * 10**10 + (4 * 10**10) / 2 + gib
    on_gpu = make_plan(config("resources.gpu=1", "parallel.strategy=ddp"), LARGE).node_bytes
    assert on_gpu == (4 * 10**10) / 2 + gib


@pytest.mark.parametrize("target", TARGETS)
def test_what_fits_is_taken(target: str):
    loaded = config()
    check(loaded, make_plan(loaded, SMALL), target)


REFUSED = [
    ("kuberay", "deploy.retries=0", (), "deploy.retries=0, but the node of the driver can be lost"),
    ("slurm", "deploy.retries=0", (), "deploy.retries=0"),
    ("systemd", "deploy.retries=0", (), "deploy.retries=0"),
    ("compose", "deploy.retries=0", (), "deploy.retries=0"),
    ("slurm", "deploy.grace_s=5", (), "deploy.grace_s=5 is shorter than a save, which takes up to 11 s"),
    ("aws", "deploy.grace_s=300", (), "a spot node is gone 120 s after its notice"),
    ("kuberay", "deploy.grace_s=300", ("spot",), "a spot node is gone 120 s after its notice"),
    ("kuberay", "storage=runs", (), "storage=runs is local to one machine"),
    ("aws", "storage=/data/runs", (), "storage=/data/runs is local to one machine"),
    ("slurm", "storage=file:///data/runs", (), "is local to one machine"),
    ("compose", "storage=runs", (), "is local to one machine"),
    ("slurm", "storage=memory://runs", (), "is gone with its process"),
    ("s3", "storage=gs://b/runs", (), "is no S3 bucket"),
    ("slurm", 'storage="s3://b/a b"', (), "has a blank"),
    ("skypilot", "resources.gpu=1", (), "deploy.accelerator=null, but resources.gpu=1"),
    ("kuberay", "workers={min: 1, max: 2}", ("kueue",), "Kueue takes no job with one"),
    ("kuberay", "seed=0", ("s3-role", "s3-secret"), "two ways of the same"),
    ("kuberay", "seed=0", ("retention",), "checkpoint.keep.last=10 lets trainers delete"),
    ("kuberay", "data={source: folder, path: photos}", (), "data.path=photos is relative"),
]


@pytest.mark.parametrize(("target", "override", "components", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_contradiction_is_refused(target: str, override: str, components: tuple[str, ...], message: str):
    loaded = config(override)
    with pytest.raises(ConfigError) as error:
        check(loaded, make_plan(loaded, SMALL), target, components)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_too_little_memory_is_refused_with_what_would_do():
    loaded = config("deploy={grace_s: 600, memory_gib: 16}")
    with pytest.raises(ConfigError, match=r"memory_gib=16 is less than the 42.9 GiB .* set deploy.memory_gib=43"):
        check(loaded, make_plan(loaded, LARGE), "slurm")
    enough = config("deploy={grace_s: 600, memory_gib: 43}")
    check(enough, make_plan(enough, LARGE), "slurm")


def test_data_at_a_url_is_no_relative_path():
    remote = config("data={source: folder, path: 's3://bucket/photos'}")
    check(remote, make_plan(remote, SMALL), "kuberay")


def test_a_shared_path_is_taken_if_every_node_finds_it():
    shared = config("storage=/nfs/runs", "deploy.shared_storage=true")
    check(shared, make_plan(shared, SMALL), "slurm")
    relative = config("storage=runs", "deploy.shared_storage=true")
    with pytest.raises(ConfigError, match="give the absolute path"):
        check(relative, make_plan(relative, SMALL), "slurm")


@pytest.mark.parametrize(
    ("run", "expected"), [("digits", "digits"), ("Digits_v2.1", "digits-v2-1"), ("2nd", "run-2nd"), ("a--b_", "a-b")]
)
def test_a_run_gets_a_name_that_kubernetes_takes(run: str, expected: str):
    assert job_name(run) == expected


def test_a_name_that_is_too_long_is_refused():
    with pytest.raises(ConfigError, match="at most 47"):
        job_name("a" * 48)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("deploy.grace_s=0", "deploy: grace_s=0 must be at least 1"),
        ("deploy.retries=-1", "retries=-1 must be at least 0"),
        ("deploy.store_mb_per_s=0", "store_mb_per_s=0 must be above 0"),
        ("deploy.image='a\"b'", "is no image reference"),
        ("deploy.accelerator='L4: 1'", "is no such name"),
        ("deploy.backoff=1", "deploy.backoff=1 is not a known key"),
    ],
)
def test_a_mistake_in_the_section_is_refused(override: str, message: str):
    with pytest.raises(ConfigError) as error:
        config(override)
    assert message.removeprefix("deploy: ") in str(error.value)
