"""Distances between two steps: the same bits for every layout, and training does not notice them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.trainers.distributed import run_ranks
from tests.trainers.evaluation.test_evaluate import Witness
from tests.trainers.evaluation.test_metrics import save_clip, save_network
from tests.trainers.families import text_config
from tests.trainers.pipelines import write_text_encoder
from tests.trainers.tiny import UNET, build_tiny, tiny_config
from trainers.config import TrainerConfig
from trainers.data.sampler import sample_indices
from trainers.data.sources import open_source
from trainers.decode import decode
from trainers.errors import ConfigError
from trainers.evaluation.config import ValidationConfig
from trainers.evaluation.distances import measure
from trainers.evaluation.drawing import draw_images, under_text
from trainers.evaluation.metrics import frechet_distance, kernel_distance
from trainers.fitting import check_fits
from trainers.loop import train
from trainers.models import empty_model
from trainers.sampling import to_pixels
from trainers.state import fingerprints

METRICS = {"every_steps": 2, "num_images": 7, "num_steps": 1}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A model of classes and one of text, each with and without metrics."""
    folder = tmp_path_factory.mktemp("distances")
    network, clip = str(save_network(folder / "means.pt2")), str(save_clip(folder / "clip", 5))
    text = {**text_config(write_text_encoder(folder / "encoder")), "ema": {"main": {"decay": 0.5}}}
    classes = tiny_config(UNET, objective={"label_drop": 0.1}, train={"num_steps": 3})
    of_text = {**METRICS, "names": ["fid", "kid", "clip"], "network": network, "clip": clip}
    of_classes = {**METRICS, "network": network, "guidance": 3.0}
    found = {}
    for name, config, metrics in (("text", text, of_text), ("classes", classes, of_classes)):
        found[name] = {**config, "validation": {"num_samples": 9, "every_steps": None, "metrics": metrics}}
        found[f"{name}, unmeasured"] = {**config, "validation": {"num_samples": 9, "every_steps": None}}
    grids = {"every_steps": 3, "num_images": 4, "num_steps": 1, "prompts": ["a three", "a seven"]}
    found["text"] = {**found["text"], "samples": grids}
    return found


def run(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, config in configs.items():
        state, task = build_tiny(config)
        witness = Witness()
        train(state, task, witness, witness, witness)
        state.generators.capture()
        found[name] = (fingerprints(state), witness.validations, witness.pictures, witness.evaluated_at)
    return found


def _again(config: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Numbers of the first weights, and the same from the images, all at once."""
    state, task = build_tiny(config)
    metrics, networks, source = task.config.validation.metrics, task.networks, task.validation
    assert metrics and networks and networks.features and networks.clip and source
    state.model.eval()
    numbers = measure(state, task, lambda: None)
    order = sample_indices(task.config.seed, np.arange(metrics.num_images), len(source))
    held_out = [source.read(np.array([index])) for index in range(len(source))]
    captions = tuple(text for index in order for text in held_out[index].captions or ())
    drawn = draw_images(
        state,
        task,
        metrics,
        lambda numbers: under_text(task, captions[slice(*numbers[[0, -1]] + [0, 1])]),
        lambda: None,
    )
    real = networks.features(to_pixels(torch.cat([sample.images for sample in held_out])))
    ours = networks.features(drawn)
    expected = {
        f"fid/{networks.features.name}": frechet_distance(real, ours),
        f"kid/{networks.features.name}": kernel_distance(real, ours, metrics.seed)[0],
        f"clip/{networks.clip.name}": networks.clip(drawn, captions),
    }
    return numbers, expected


def run_and_again(configs: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], Any]:
    return run(configs), _again(configs["text"])


@pytest.fixture(scope="module")
def both(configs: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], Any]:
    return run_ranks(1, run_and_again, configs)[0]


@pytest.fixture(scope="module")
def on_one_rank(both: tuple[dict[str, Any], Any]) -> dict[str, Any]:
    return both[0]


@pytest.mark.parametrize("name", ["text", "classes"])
def test_training_does_not_notice_them(on_one_rank: dict[str, Any], name: str) -> None:
    assert on_one_rank[name][0] == on_one_rank[f"{name}, unmeasured"][0]
    assert on_one_rank[f"{name}, unmeasured"][1] == {}


def test_one_result_for_every_layout(configs: dict[str, dict[str, Any]], on_one_rank: dict[str, Any]) -> None:
    measured = {name: {**configs[name], "parallel": {"strategy": "ddp"}} for name in ("text", "classes")}
    for rank, found in enumerate(run_ranks(2, run, measured)):
        for name in measured:
            state, numbers, pictures, when = on_one_rank[name]
            assert found[name] == (state, numbers, pictures if rank == 0 else {}, when)


def test_each_is_named_after_its_network_and_the_weights(on_one_rank: dict[str, Any]) -> None:
    _, numbers, _, _ = on_one_rank["text"]
    assert list(numbers) == [2, 3]  # every two steps, and at the end
    kinds = {name.split("-")[0] for name in numbers[2]}
    assert kinds == {"fid/means", "kid/means", "clip/clip"} and len(numbers[2]) == len(numbers[3]) == 2 * 3
    assert {name.partition("/ema/")[2] for name in numbers[3]} == {"", "main"}
    assert len({*numbers[2].values(), *numbers[3].values()}) == 12, "other weights, other numbers"
    found = {name.partition("/ema/")[2] for name in on_one_rank["classes"][1][3]}
    assert found == {"", "slow", "late"}


def test_they_compare_with_all_that_is_held_out(both: tuple[dict[str, Any], Any]) -> None:
    numbers, expected = both[1]
    assert numbers == pytest.approx(expected, rel=1e-3)  # together rather than in parts: that rounds otherwise


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"names": []}, "measures nothing"),
        ({"names": ["clip"]}, "the CLIP score needs both"),
        ({"clip": "folder"}, "the CLIP score needs both"),
        ({"names": ["clip"], "clip": "folder"}, "needs a model of text"),
        ({"network": "absent.pt2"}, r"validation\.metrics\.network=absent\.pt2 is not there"),
        ({"guidance": 2.0}, r"validation\.metrics\.guidance=2\.0 needs a model"),
        ({"num_images": 1}, r"validation\.metrics\.num_images=1 must be at least 2"),
    ],
)
def test_refused_before_anything_starts(metrics: dict[str, Any], message: str) -> None:
    plain = tiny_config(UNET, validation={"num_samples": 5, "metrics": metrics})
    with pytest.raises(ConfigError, match=message):
        config = decode(TrainerConfig, plain)
        check_fits(empty_model(config.model, 0), open_source(config.data), config)


def test_metrics_without_what_they_need_are_refused() -> None:
    with pytest.raises(ConfigError, match="held out"):
        decode(ValidationConfig, {"metrics": {}})
    with pytest.raises(ConfigError, match="never measured"):
        decode(ValidationConfig, {"num_samples": 2, "every_steps": None, "metrics": {}})
    plain = tiny_config(UNET, validation={"num_samples": 1, "metrics": {}})
    config = decode(TrainerConfig, plain)
    with pytest.raises(ConfigError, match="hold out 2 or more"):
        check_fits(empty_model(config.model, 0), open_source(config.data), config)
