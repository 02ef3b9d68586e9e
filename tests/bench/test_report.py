from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import report
from bench.__main__ import ROWS, main
from bench.comparison import Comparison
from bench.figure import Figure

COMPARISON = Comparison(
    name="a step", reference_name="theirs", ours_s=[1.0, 2.0], reference_s=[1.0, 1.5], goal=1.05, notes={"steps": 4}
)
CURVE = Figure(name="commit <exponent>", value=1.02, goal=1.15, points=[(8, 1.5), (64, 12.5)])
PLAIN = Figure(name="goodput", value=0.97, unit="of all", goal=0.95, at_least=True)


def test_a_result_is_read_as_it_was_written(tmp_path: Path):
    report.store("row", report.conditions(), [COMPARISON, PLAIN], tmp_path)
    where, results = report.load("row", tmp_path)
    assert results == [COMPARISON, PLAIN]
    assert where["cores"] >= 1 and where["torch"]


def test_the_readme_has_what_was_measured_and_nothing_else(tmp_path: Path):
    report.store("overhead", report.conditions(), [COMPARISON], tmp_path)
    report.store("goodput", report.conditions(), [PLAIN], tmp_path)
    report.write_readme(tuple(ROWS), tmp_path / "README.md", tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| [overhead](#overhead) | a step / theirs | 1.167 (1.000 .. 1.333) | <= 1.05 | missed |" in text
    assert "| [goodput](#goodput) | goodput | 0.97 of all | >= 0.95 | holds |" in text
    assert text.count("\n## ") == 2 and "- a step: steps: 4" in text
    assert {file.name for file in tmp_path.glob("*.svg")} == {"overhead.svg", "goodput.svg"}


@pytest.mark.parametrize("results", [[COMPARISON], [COMPARISON, PLAIN], [CURVE, PLAIN], [PLAIN]])
def test_a_plot_is_whole(results: list[report.Result]):
    texts = [element.text for element in ET.fromstring(report.draw(results)).iter("{http://www.w3.org/2000/svg}text")]
    assert any(text and text.startswith(results[0].name) for text in texts)


def test_the_readme_is_what_follows_from_the_stored_results():
    assert report.README.read_text() == report.compose(tuple(ROWS)), "run `python -m bench readme`"
    for row in (row for row in ROWS if (report.RESULTS / f"{row}.json").exists()):
        file = report.RESULTS / f"{row}.svg"
        assert (file.read_text() if file.exists() else "") == report.plotted(report.load(row)[1]), row


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "no such row: speed" in capsys.readouterr().err


def test_a_row_that_fails_takes_no_other_along_and_none_but_gpu_sees_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    seen: list[tuple[str, str | None]] = []

    def row(name: str) -> SimpleNamespace:
        def measure(quick: bool) -> list[report.Result]:
            seen.append((name, os.environ.get("CUDA_VISIBLE_DEVICES")))
            if name == "bench.ema":
                raise OSError("no room")
            return [PLAIN]

        return SimpleNamespace(measure=measure)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process is not only the benchmark's
    monkeypatch.setattr("importlib.import_module", row)
    with pytest.raises(SystemExit, match=r"failed: ema$"):
        main(["ema", "reduction", "gpu", "--quick"])
    assert seen == [("bench.gpu", "3"), ("bench.ema", ""), ("bench.reduction", "")]
    assert capsys.readouterr().out.count("| goodput | 0.97 of all |") == 2


def test_a_part_is_measured_anew_and_the_others_are_kept(tmp_path: Path):
    def figures(value: float, *names: str) -> list[report.Result]:
        return [Figure(name=name, value=value) for name in names]

    conditions = report.conditions()
    report.store("gpu", conditions, figures(1.0, "limits: copy", "dit: a step", "dit-compiled: a step"), tmp_path)
    report.store("gpu", conditions, figures(2.0, "limits: copy", "dit: a step"), tmp_path, only="dit")
    assert {one.name: one.value for one in report.load("gpu", tmp_path)[1] if isinstance(one, Figure)} == {
        "limits: copy": 2.0,
        "dit: a step": 2.0,
        "dit-compiled: a step": 1.0,
    }
