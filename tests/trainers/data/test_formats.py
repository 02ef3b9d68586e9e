"""The same samples come out of every format, by index and in any order."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.trainers.data import made_up
from trainers.data.config import BucketConfig, Columns, DataConfig
from trainers.data.files import LocalFiles, local_files
from trainers.data.samples import Source
from trainers.data.sources import open_source
from trainers.errors import BrokenSampleError, ConfigError

COUNT = 7
WRITERS = {
    "folder": made_up.write_folder,
    "table": made_up.write_parquet,
    "arrow": made_up.write_arrow,
    "webdataset": made_up.write_tars,
    "datasets": made_up.write_saved,
}


def config(place: Path, source: str, **changes: Any) -> DataConfig:
    columns = Columns(caption="json.caption") if source == "webdataset" else Columns()
    kind: Any = "table" if source == "arrow" else source
    settings = {"path": str(place), "image_size": 8, "captions": True, "cache": str(place.parent / "cache"), **changes}
    return DataConfig(source=kind, **{"columns": columns, **settings})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("formats")
    return {name: write(root / name, COUNT) for name, write in WRITERS.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_samples(data: dict[str, Path], name: str) -> None:
    source, folder = open_source(config(data[name], name)), open_source(config(data["folder"], "folder"))
    order = np.array([6, 0, 3, 3, 5])
    samples, expected = source.read(order), folder.read(order)
    assert len(source) == COUNT and torch.equal(samples.images, expected.images)
    assert samples.captions == expected.captions == tuple(made_up.caption(index) for index in order)
    assert torch.equal(samples.sizes, expected.sizes)
    assert samples.sizes[0].tolist() == [12, 8, 2, 0, 8, 8], "index 6 is 12 x 8, cut in the middle"
    if name != "folder":
        assert samples.labels is not None and samples.labels.tolist() == [0, 0, 0, 0, 2]
        assert source.num_classes == (4 if name == "datasets" else 3)
    assert source.identity == open_source(config(data[name], name)).identity != folder.identity or name == "folder"


@pytest.mark.parametrize("name", WRITERS)
def test_other_data_has_another_identity(data: dict[str, Path], name: str, tmp_path: Path) -> None:
    other = WRITERS[name](tmp_path / name, COUNT + 1)
    assert open_source(config(other, name)).identity != open_source(config(data[name], name)).identity


def test_labels_of_metadata(tmp_path: Path) -> None:
    path = made_up.write_folder(tmp_path / "named", 4, label=lambda index: "xy"[index % 2])
    source = open_source(config(path, "folder", captions=False))
    samples = source.read(np.arange(4))
    assert samples.labels is not None and samples.labels.tolist() == [0, 1, 0, 1] and source.num_classes == 2
    lines = (path / "metadata.jsonl").read_text().splitlines()
    lines[2] = json.dumps({"file_name": "02.png", "label": None, "text": ""})
    (path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"metadata\.jsonl: labels such as 'x' and None are no classes"):
        open_source(config(path, "folder"))


def test_the_index_of_a_tar_is_made_once(
    data: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = config(data["webdataset"], "webdataset", cache=str(tmp_path))
    first = open_source(made).read(np.arange(COUNT))
    assert len(list(tmp_path.glob("tar-*.npy"))) == 2
    monkeypatch.setattr(tarfile, "open", None)
    assert torch.equal(open_source(made).read(np.arange(COUNT)).images, first.images)
    (broken,) = list(tmp_path.glob("tar-*.npy"))[:1]
    broken.write_bytes(broken.read_bytes()[:100])  # a cache is no reason to fail: made anew
    monkeypatch.undo()
    assert torch.equal(open_source(made).read(np.arange(COUNT)).images, first.images)


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        (
            "table",
            {"columns": Columns(image="picture")},
            "no column picture, but image, text, label; set data.columns.i",
        ),
        ("table", {"columns": Columns(label="kind")}, "has no column kind"),
        ("datasets", {"columns": Columns(caption="title")}, "has no column title"),
        ("datasets", {"split": "train"}, "one data set without splits; remove data.split"),
        ("webdataset", {"columns": Columns()}, r"no sample has a member .txt, only cls, json, png; set data.columns.c"),
        ("webdataset", {"columns": Columns(image="jpg", caption="json.caption")}, "suffix jpg; set data.columns.image"),
        ("webdataset", {"path": "s3://bucket/data"}, "by `unbroken train` only"),
        ("table", {"path": "/nowhere/a.parquet"}, "data.path=/nowhere/a.parquet is not there"),
    ],
)
def test_what_is_missing_is_one_line(data: dict[str, Path], name: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as error:
        open_source(config(data[name], name, **changes))
    assert word in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("source", "file"), [("table", "a.parquet"), ("table", "a.arrow"), ("webdataset", "a.tar")])
def test_damaged_and_empty_files_are_one_line(tmp_path: Path, source: str, file: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"holds no {source}"):
        open_source(config(tmp_path / "empty", source))
    (tmp_path / file).write_bytes(b"no such thing" * 100)
    with pytest.raises(ConfigError, match=f"{file} is no whole"):
        open_source(config(tmp_path, source))


def test_a_broken_sample_is_named(tmp_path: Path) -> None:
    path = made_up.write_tars(tmp_path / "tars", 4)
    with tarfile.open(path / "a.tar", "a") as tar:
        made_up.add(tar, "x.png", b"rubbish")
        made_up.add(tar, "x.json", b"{}")
    source = open_source(config(path, "webdataset", captions=False, columns=Columns()))
    assert len(source) == 5
    with pytest.raises(BrokenSampleError, match=r"a\.tar, sample x can not be read as an image"):
        source.read(np.array([2]))
    with pytest.raises(BrokenSampleError, match=r"a\.tar, sample x has no text json\.caption"):
        open_source(config(path, "webdataset")).read(np.array([2]))


def test_members_of_tars_are_what_they_say(tmp_path: Path) -> None:
    def tar_of(name: str, members: dict[str, bytes]) -> Path:
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "a.tar", "w") as tar:
            for member, data in members.items():
                made_up.add(tar, member, data)
        return tmp_path / name

    nothing = tar_of("null", {"x.png": made_up.encoded(0), "x.json": b'{"caption": null}'})
    with pytest.raises(BrokenSampleError, match=r"sample x has no text json\.caption \(it is null\)"):
        open_source(config(nothing, "webdataset")).read(np.array([0]))
    twice = tar_of("twice", {"x.png": made_up.encoded(0), "y.png": made_up.encoded(1), "x.PNG": made_up.encoded(2)})
    with pytest.raises(ConfigError, match=r"a\.tar holds 'x\.PNG' twice"):
        open_source(config(twice, "webdataset", captions=False, columns=Columns()))
    odd = tar_of("odd", {"\udcff.png": made_up.encoded(0)})  # a name in another encoding than UTF-8
    source = open_source(config(odd, "webdataset", captions=False, columns=Columns()))
    assert source.read(np.array([0])).images.shape == (1, 3, 8, 8)


def test_buckets_follow_the_images_that_are_there(tmp_path: Path) -> None:
    """Two folders with the same names, or one with other images, share no sizes; and they are other data."""

    def opened(root: Path) -> Source:
        buckets = BucketConfig(multiple_of=4, max_ratio=4.0)
        return open_source(config(root, "folder", captions=False, buckets=buckets, cache=str(tmp_path / "cache")))

    found = {}
    for name, size in (("tall", (4, 16)), ("wide", (16, 4))):
        (tmp_path / name).mkdir()
        Image.new("RGB", size).save(tmp_path / name / "0.png")
        found[name] = opened(tmp_path / name)
    Image.new("RGB", (8, 8)).save(tmp_path / "wide" / "0.png")
    found["square"] = opened(tmp_path / "wide")
    assert [source.read(np.array([0])).images.shape[2:] for source in found.values()] == [(16, 4), (4, 16), (8, 8)]
    assert len({source.identity for source in found.values()}) == 3


def test_buckets(data: dict[str, Path]) -> None:
    found: list[Source] = []
    for name in ("folder", "webdataset"):
        found.append(open_source(config(data[name], name, buckets=BucketConfig(multiple_of=4, max_ratio=4.0))))
    buckets = found[0].buckets
    assert buckets is not None and buckets.shapes == ((4, 12), (4, 16), (8, 8), (12, 4), (16, 4))
    for index in range(COUNT):
        height, width = buckets.shapes[buckets.of[index]]
        samples = [source.read(np.array([index])) for source in found]
        assert samples[0].images.shape == (1, 3, height, width) and torch.equal(samples[0].images, samples[1].images)
        assert samples[0].sizes[0, 4:].tolist() == [height, width]
        own = made_up.SIZES[index % len(made_up.SIZES)]
        distance = [abs(np.log(own[0] / own[1]) - np.log(h / w)) for h, w in buckets.shapes]
        assert buckets.of[index] == int(np.argmin(distance))


def test_files_in_parts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.BIN").write_bytes(b"0123456789")
    (tmp_path / ".hidden.bin").write_bytes(b"")
    files = LocalFiles(str(tmp_path))
    assert files.names((".bin",)) == ["sub/a.BIN"] and files.size("sub/a.BIN") == 10
    assert files.read("sub/a.BIN", 3, 5) == b"34" and files.read("sub/a.BIN", 8) == b"89"
    with pytest.raises(ConfigError, match="local path"):
        local_files("s3://bucket/x")
