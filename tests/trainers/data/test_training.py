"""Training on data in other forms than the digits: the same bits for every world size and number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.trainers.data import made_up
from tests.trainers.distributed import run_ranks
from tests.trainers.tiny import UNET, tiny_config, train_tiny

COUNT = 11


def images_config(path: Path, source: str, **data: Any) -> dict[str, Any]:
    """A UNet of colour images, on whatever `data` says."""
    model = {**UNET, "args": {**UNET["args"], "in_channels": 3, "out_channels": 3, "num_class_embeds": None}}
    data = {"source": source, "path": str(path), "image_size": 8, "cache": str(path.parent / "cache"), **data}
    return tiny_config(model, data=data, train={"global_batch_size": 6, "microbatch_size": 2})


def test_one_result_for_every_world_size_and_number_of_threads(tmp_path: Path) -> None:
    """With buckets, every random change, and two images that are broken."""
    path = made_up.write_folder(tmp_path / "images", COUNT)
    for name in ("03.png", "08.png"):
        (path / name).write_bytes(b"rubbish")
    everything = {
        "buckets": {"multiple_of": 4, "max_ratio": 4.0},
        "crop": "random",
        "flip": True,
        "rotation": 10.0,
        "color": {"brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05},
        "on_broken": "skip",
    }
    alone = run_ranks(1, train_tiny, images_config(path, "folder", **everything), 4)[0]
    threads = {**everything, "num_workers": 2, "prefetch": 3}
    for shared in run_ranks(2, train_tiny, images_config(path, "folder", **threads), 4):
        assert shared == alone
    broken = [step["data/broken"] for step in alone[0]]
    assert sum(broken) >= 2 and len({step["loss"] for step in alone[0]}) == 4
