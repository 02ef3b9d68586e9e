"""FID, KID and CLIP score with small networks of our own: nothing is downloaded."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import transformers

from tests.trainers.pipelines import _clip_tokenizer
from trainers.errors import ConfigError
from trainers.evaluation.metrics import frechet_distance, kernel_distance, open_clip, open_network

CPU = torch.device("cpu")


class Means(torch.nn.Module):
    """Mean of each channel, and of the upper half."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scaled = images.float() / 255
        return torch.cat([scaled.mean((2, 3)), scaled[:, :, : images.shape[2] // 2].mean((2, 3))], 1)


def save_network(path: Path) -> Path:
    example = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.export.save(torch.export.export(Means(), (example,), dynamic_shapes=[{0: batch}]), path)
    return path


def features(mean: float, num: int = 400) -> torch.Tensor:
    return torch.randn(num, 6, generator=torch.Generator().manual_seed(int(mean * 10) + num)) + mean


def test_the_frechet_distance_is_that_of_the_paper() -> None:
    a, b = features(0.0), features(0.5, num=300) * 2
    means, covariances = zip(*((x.double().mean(0).numpy(), np.cov(x.double().numpy().T)) for x in (a, b)), strict=True)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-4)


def test_the_kernel_distance_grows_and_is_the_same_for_a_seed() -> None:
    same, near, far = (kernel_distance(features(0.0), features(m, num=500), seed=3)[0] for m in (0.0, 0.3, 1.0))
    assert abs(same) < 0.05 < near < far
    state = torch.get_rng_state()
    first, again, other = (kernel_distance(features(0.0, 1100), features(0.3, 1200), seed=s) for s in (3, 3, 4))
    assert first == again != other and torch.equal(state, torch.get_rng_state())


def test_a_network_is_named_after_its_content(tmp_path: Path) -> None:
    network = open_network(str(save_network(tmp_path / "means.pt2")), CPU)
    stem, digest = network.name.split("-")
    assert stem == "means" and len(digest) == 8
    other = tmp_path / "other"
    other.mkdir()
    scripted = other / "means.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(Means()), scripted)
    second = open_network(str(scripted), CPU)
    assert second.name.startswith("means-") and second.name != network.name
    grey = torch.randint(0, 255, (70, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert network(grey).shape == (70, 6) and torch.equal(network(grey), second(grey))
    torch.testing.assert_close(network(grey)[:, 0], grey.float().mean((1, 2, 3)) / 255)


class Scalars(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean((1, 2, 3))


def test_networks_that_are_none_are_refused(tmp_path: Path) -> None:
    broken, other = tmp_path / "broken.pt2", tmp_path / "other.pt"
    broken.write_bytes(b"no network")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/data", "no network")
    for path, message in [(tmp_path / "nothing.pt", "neither"), (broken, "neither"), (other, "can not be loaded")]:
        with pytest.raises(ConfigError, match=message):
            open_network(str(path), CPU)
    flat = tmp_path / "flat.pt2"
    example = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    torch.export.save(torch.export.export(Scalars(), (example,)), flat)
    network = open_network(str(flat), CPU)
    with pytest.raises(ConfigError, match=r"makes \[2\] of 2 images"):
        network(example)


def save_clip(folder: Path, seed: int) -> Path:
    """A CLIP model with random weights, and its processor."""
    vocabulary = folder.parent / f"{folder.name}-vocabulary"
    vocabulary.mkdir(parents=True)
    tokenizer = _clip_tokenizer(vocabulary)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 8,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {**shared, "image_size": 8, "patch_size": 4}
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    transformers.CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_the_clip_score_is_a_cosine_of_the_model_in_its_name(tmp_path: Path) -> None:
    pixels = torch.randint(0, 255, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = ["a handwritten three", "a handwritten seven", "a handwritten one"]
    clip = open_clip(str(save_clip(tmp_path / "clip", 5)), CPU)
    second = open_clip(str(save_clip(tmp_path / "second" / "clip", 7)), CPU)
    score, other = clip(pixels, texts), second(pixels, texts)
    assert clip.name.startswith("clip-") and second.name.startswith("clip-") and clip.name != second.name
    assert score != other and clip(pixels, texts) == score
    model = transformers.CLIPModel.from_pretrained(tmp_path / "clip")
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "clip")
    inputs = processor(text=texts, images=list(pixels.expand(-1, 3, -1, -1)), return_tensors="pt", padding=True)
    with torch.no_grad():
        cosines = model(**inputs).logits_per_text.diag() / model.logit_scale.exp()
    assert score == pytest.approx(100 * cosines.mean().item(), rel=1e-4) and score > 1
    with pytest.raises(ConfigError, match="can not be loaded"):
        open_clip(str(tmp_path), CPU)
