from __future__ import annotations

import builtins
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.data.config import DataConfig
from trainers.data.images import number_classes
from trainers.data.sources import open_source
from trainers.errors import BrokenSampleError, ConfigError


def test_digits():
    source = open_source(DataConfig())
    assert (len(source), source.channels, source.num_classes) == (1797, 1, 10)
    samples = source.read(np.array([0, 5, 0]))
    images, labels = samples.images, samples.labels
    assert images.shape == (3, 1, 8, 8) and images.dtype == torch.float32
    assert labels is not None and labels.tolist() == [0, 5, 0]
    assert torch.equal(images[0], images[2])
    everything = source.read(np.arange(1797)).images
    assert everything.min() == -1 and everything.max() == 1
    images.zero_()
    assert source.read(np.array([0])).images.abs().sum() > 0, "reading must not hand out the source's own memory"


def test_digits_resized():
    images = open_source(DataConfig(image_size=16)).read(np.arange(50)).images
    assert images.shape == (50, 1, 16, 16) and images.min() >= -1 and images.max() <= 1


def test_digits_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def no_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(ConfigError, match=r"data\.source=digits needs scikit-learn"):
        open_source(DataConfig())


@pytest.fixture
def folder(tmp_path):
    for name, color in (("b/1.png", (255, 0, 0)), ("a/x.jpg", (0, 255, 0)), ("a/deep/y.png", (0, 0, 255))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10), color).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    return tmp_path


def test_folder_with_classes(folder):
    source = open_source(DataConfig(source="folder", path=str(folder), image_size=4))
    assert (len(source), source.channels, source.num_classes) == (3, 3, 2)
    samples = source.read(np.array([2, 0]))
    images, labels = samples.images, samples.labels
    assert images.shape == (2, 3, 4, 4) and images.dtype == torch.float32
    assert labels is not None and labels.tolist() == [1, 0]
    assert torch.equal(images[0].mean((1, 2)), torch.tensor([1.0, -1.0, -1.0]))


def test_folder_without_classes(tmp_path):
    Image.new("L", (5, 9), 128).save(tmp_path / "grey.png")
    source = open_source(DataConfig(source="folder", path=str(tmp_path), image_size=8))
    samples = source.read(np.array([0]))
    images, labels = samples.images, samples.labels
    assert images.shape == (1, 3, 8, 8) and labels is None and source.num_classes is None


def test_turned_photos_are_set_upright(tmp_path):
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[0] = 255  # a white top row
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = open_source(DataConfig(source="folder", path=str(tmp_path), image_size=4)).read(np.array([0])).images[0]
    assert (image[:, :, -1] == 1).all() and (image[:, :, :-1] == -1).all()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nrubbish", None])
def test_an_unreadable_image_is_named(folder, content):
    file = folder / "b" / "1.png"
    file.write_bytes(file.read_bytes()[:45] if content is None else content)
    source = open_source(DataConfig(source="folder", path=str(folder), image_size=4))
    with pytest.raises(ConfigError, match=r"1\.png can not be read as an image"):
        source.read(np.array([2]))


def test_a_missing_file_stays_an_error_of_the_file_system(folder):
    source = open_source(DataConfig(source="folder", path=str(folder), image_size=4))
    (folder / "b" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1\.png"):
        source.read(np.array([2]))


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="path=null"):
        DataConfig(source="folder")
    with pytest.raises(ConfigError, match="path=x has no effect"):
        DataConfig(path="x")
    with pytest.raises(ConfigError, match="image_size=512 must be at most 256 for source=digits"):
        DataConfig(image_size=512)
    with pytest.raises(ConfigError, match="image_size=0"):
        DataConfig(image_size=0)
    with pytest.raises(ConfigError, match="is not there"):
        open_source(DataConfig(source="folder", path=str(tmp_path / "none")))
    (tmp_path / "file.yaml").touch()
    with pytest.raises(ConfigError, match="is not there as a folder; give"):
        open_source(DataConfig(source="folder", path=str(tmp_path / "file.yaml")))
    (tmp_path / "file.yaml").unlink()
    with pytest.raises(ConfigError, match="holds no images"):
        open_source(DataConfig(source="folder", path=str(tmp_path)))
    with pytest.raises(ConfigError, match=f"labels such as 0 and {2**64} are no classes"):
        number_classes([0, 2**64], "data.path=x")


def test_captions(folder):
    digits = open_source(DataConfig(captions=True)).read(np.array([7, 0]))
    assert digits.captions == ("a handwritten seven", "a handwritten zero")
    assert open_source(DataConfig()).read(np.array([7])).captions is None
    config = DataConfig(source="folder", path=str(folder), image_size=4, captions=True)
    with pytest.raises(ConfigError, match=r"data\.captions=true needs .*metadata\.jsonl"):
        open_source(config)
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.[pj][np]g"))
    lines = [json.dumps({"file_name": str(file), "text": f"picture {file.stem}"}) for file in files]
    (folder / "metadata.jsonl").write_text("\n".join(lines[1:]))
    with pytest.raises(ConfigError, match="has no line for 1 images"):
        open_source(config)
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    samples = open_source(config).read(np.array([2, 0]))
    assert samples.captions == (f"picture {files[2].stem}", f"picture {files[0].stem}")
    # 20 x 10 pixels, made 8 x 4 and cropped to the middle 4 x 4
    assert samples.sizes.tolist() == [[10, 20, 0, 2, 4, 4]] * 2


def test_a_text_beside_every_image_is_its_caption(tmp_path):
    (tmp_path / "10_dog").mkdir()
    for name in ("10_dog/a.b.png", "10_dog/c.JPG"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    config = DataConfig(source="folder", path=str(tmp_path), image_size=4, captions=True)
    (tmp_path / "10_dog/a.b.txt").write_bytes(b"\xef\xbb\xbfa dog, \xc3\xa9\n")
    with pytest.raises(ConfigError, match=r"and 1 have none, such as 10_dog/c\.JPG; write 10_dog/c\.txt, or"):
        open_source(config)
    (tmp_path / "10_dog/c.txt").write_text("")
    found = open_source(config)
    assert found.read(np.array([0, 1])).captions == ("a dog, \u00e9", "")
    (tmp_path / "10_dog/c.txt").write_text("a cat")
    assert open_source(config).identity != found.identity, "other texts are other data"
    (tmp_path / "10_dog/c.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"10_dog/c\.txt is not UTF-8"):
        open_source(config)


def pixels_of(tmp_path, name, image, **saved):
    image.save(tmp_path / name, **saved)
    source = open_source(DataConfig(source="folder", path=str(tmp_path), image_size=2))
    pixels = (source.read(np.array([0])).images[0] + 1) * 127.5
    (tmp_path / name).unlink()
    return pixels.round().byte().permute(1, 2, 0).tolist()


def test_images_of_every_kind_are_read_as_they_are_seen(tmp_path):
    grey = Image.fromarray(np.array([[0, 0x4080], [0x8000, 0xFFFF]], dtype=np.uint16))
    expected = [[[0] * 3, [64] * 3], [[128] * 3, [255] * 3]]
    assert pixels_of(tmp_path, "grey.png", grey) == pixels_of(tmp_path, "grey.tif", grey) == expected
    red, white = [255, 0, 0], [255] * 3
    see_through = Image.new("RGBA", (2, 2), (255, 0, 0, 255))
    see_through.putpixel((0, 0), (0, 0, 0, 0))  # nothing is seen of this black
    see_through.putpixel((1, 0), (0, 0, 0, 51))
    assert pixels_of(tmp_path, "rgba.png", see_through) == [[white, [204] * 3], [red, red]]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, *red])
    palette.putpixel((0, 0), 0)
    assert pixels_of(tmp_path, "palette.png", palette, transparency=0) == [[white, red], [red, red]]
    assert pixels_of(tmp_path, "palette.gif", palette) == [[[0] * 3, red], [red, red]]
    assert pixels_of(tmp_path, "la.png", Image.new("LA", (2, 2), (0, 0))) == [[white] * 2] * 2
    assert pixels_of(tmp_path, "bits.png", Image.new("1", (2, 2), 1)) == [[white] * 2] * 2
    with pytest.raises(ConfigError, match=r"pixels of 32 bits, mode F; make them 8 or 16"):
        pixels_of(tmp_path, "depth.tif", Image.new("F", (2, 2), 0.5))


def test_metadata_of_any_text(tmp_path):
    """Of every character that Python takes for the end of a line, and nothing else; and each image once."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    config = DataConfig(source="folder", path=str(tmp_path), image_size=4, captions=True)
    text = "one\u2028two\x85three \u00e9 \U0001f600"
    line = json.dumps({"file_name": "a.png", "text": text}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n")
    assert open_source(config).read(np.array([0])).captions == (text,)
    (tmp_path / "metadata.jsonl").write_text(f"{line}\n{line}")
    with pytest.raises(ConfigError, match=r"metadata\.jsonl, line 2: a\.png has a line already"):
        open_source(config)
    (tmp_path / "metadata.jsonl").write_bytes(line.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"metadata\.jsonl is not UTF-8"):
        open_source(config)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "cut \\ud83d"}')
    with pytest.raises(BrokenSampleError, match=r"the text of .*a\.png has half a character \('\\ud83d'\)"):
        open_source(config).read(np.array([0]))


def test_file_names_of_any_bytes(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    source = open_source(DataConfig(source="folder", path=str(tmp_path), image_size=4))
    assert source.read(np.array([0])).images.max() == -1
