"""Data at URLs: read in parts through the same store as checkpoints."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.store import Store
from orchestrator.data.files import StoreFiles, data_files, with_absolute_paths
from tests.trainers.data import made_up
from tests.trainers.tiny import tiny_config
from trainers.config import TrainerConfig
from trainers.data.config import Columns, DataConfig
from trainers.data.files import LocalFiles
from trainers.data.sources import open_source
from trainers.decode import decode
from trainers.errors import ConfigError


def upload(folder: Path, url: str) -> str:
    store = Store.open(url)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        store.write(str(file.relative_to(folder)), [file.read_bytes()])
    return url


@pytest.mark.parametrize(
    ("source", "write"),
    [("folder", made_up.write_folder), ("table", made_up.write_parquet), ("webdataset", made_up.write_tars)],
)
def test_the_same_samples_come_from_a_url(tmp_path: Path, source: Any, write: Any) -> None:
    local = write(tmp_path / "data" / source, 5)
    (local / ".hidden.png").write_bytes(made_up.encoded(5))
    columns = Columns(caption="json.caption") if source == "webdataset" else Columns()
    common = {"source": source, "image_size": 8, "captions": True, "columns": columns, "cache": str(tmp_path / "cache")}
    url = upload(tmp_path / "data", f"memory://{tmp_path.name}")
    there = open_source(DataConfig(**common, path=f"{url}/{source}"), data_files)
    here = open_source(DataConfig(**common, path=str(local)), data_files)
    order = np.array([4, 1, 0])
    assert torch.equal(there.read(order).images, here.read(order).images)
    assert there.read(order).captions == here.read(order).captions
    assert there.identity == here.identity, "where data is does not make it other data"


@pytest.mark.s3
def test_shards_on_s3(tmp_path: Path, s3_url: str) -> None:
    """Read by threads at once, as `data.num_workers` does."""
    made_up.write_tars(tmp_path / "data" / "shards", 5)
    upload(tmp_path / "data", s3_url)
    common = {"source": "webdataset", "image_size": 8, "cache": str(tmp_path / "cache")}
    there = open_source(DataConfig(**common, path=f"{s3_url}/shards"), data_files)
    here = open_source(DataConfig(**common, path=str(tmp_path / "data" / "shards")), data_files)
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda index: there.read(np.array([index])).images, range(5)))
    assert torch.equal(torch.cat(read), here.read(np.arange(5)).images) and there.identity == here.identity


def test_sub_folders_and_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Store.list
    store = Store.open(f"memory://{tmp_path.name}")
    for name in ("a/1.png", "b.c/2.PNG", "b.c/notes.txt", "top.png"):
        store.write(name, [b"0123456789"])
    files = StoreFiles(store.url)
    assert files.names((".png",)) == ["a/1.png", "b.c/2.PNG", "top.png"]
    assert files.exists("top.png") and not files.exists("none.png") and files.exists(None)
    assert not StoreFiles(f"{store.url}/nowhere").exists(None)
    assert files.size("a/1.png") == 10
    assert files.read("a/1.png", 2, 5) == b"234" and files.read("a/1.png", 7) == b"789"
    assert files.read("a/1.png", 5, 5) == b"" and files.read("a/1.png") == b"0123456789"
    asked: list[str] = []
    monkeypatch.setattr(Store, "list", lambda self, folder: asked.append(folder) or listed(self, folder))
    assert files.names((".txt",)) == ["b.c/notes.txt"] and files.names((".png",))
    assert asked == ["", "a", "b.c"] * 2, "a request for each folder, and none for what is a file by its name"
    with pytest.raises(FileNotFoundError, match=r"a/2\.png is not there any more"):
        files.read("a/2.png")


def test_a_local_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    for path, expected in (
        ("images", str(tmp_path / "images")),
        ("s3://b/images", "s3://b/images"),
        ("hub/x", "hub/x"),
    ):
        plain = tiny_config(data={"source": "datasets", "path": path})
        plain["conditioning"] = {"text_encoder": path}
        plain["validation"] = {"num_samples": 2, "metrics": {"network": path}}
        placed = with_absolute_paths(decode(TrainerConfig, plain))
        assert placed.data.path == placed.conditioning.text_encoder == expected
        assert placed.validation.metrics is not None and placed.validation.metrics.network == expected


def test_what_opens_what() -> None:
    assert isinstance(data_files("/images"), LocalFiles) and isinstance(data_files("file:///images"), LocalFiles)
    with pytest.raises(ConfigError, match=r"data\.path='nosuch://x'"):
        data_files("nosuch://x")
    with pytest.raises(ConfigError, match=r"data\.path=memory://nothing/there is not there"):
        open_source(DataConfig(source="folder", path="memory://nothing/there", image_size=8), data_files)
