from __future__ import annotations

from pathlib import Path

import pytest

from bench.__main__ import ROWS, main
from bench.comparison import Comparison, conditions, load, section, store

RESULTS = Path(__file__).parents[2] / "bench" / "results"
README = Path(__file__).parents[2] / "bench" / "README.md"


def compare(ours: list[float], reference: list[float], **options: float) -> Comparison:
    return Comparison(name="ours", reference_name="theirs", ours_s=ours, reference_s=reference, **options)


def test_the_ratio_is_the_median_of_pairs():
    assert compare([2.0, 30.0, 4.0], [1.0, 10.0, 4.0]).ratio == 2.0


@pytest.mark.parametrize(
    ("ours", "options", "verdict"),
    [
        ([1.0] * 8, {}, ""),
        ([1.0] * 8, {"goal": 1.0}, "holds"),
        ([1.0] * 8, {"goal": 1.0, "max_s": 0.9}, "missed"),
        ([1.1] * 8, {"goal": 1.05}, "missed"),
        ([1.0] * 5 + [2.0] * 3, {"goal": 1.05}, "open"),
    ],
)
def test_a_goal_holds_only_with_its_bound(ours: list[float], options: dict[str, float], verdict: str):
    assert compare(ours, [1.0] * 8, **options).verdict == verdict


def test_a_result_is_read_as_it_was_written(tmp_path: Path):
    one = compare([1.0, 2.0], [1.0, 1.5], goal=1.05)
    store("row", conditions(), [one], tmp_path)
    where, (read,) = load("row", tmp_path)
    assert read == one
    assert where["cores"] >= 1 and where["torch"]


@pytest.mark.parametrize("row", [row for row in ROWS if (RESULTS / f"{row}.json").exists()])
def test_the_readme_shows_the_stored_results(row: str):
    assert section(row, *load(row)) in README.read_text(), f"paste what `python -m bench {row}` printed into {README}"


@pytest.mark.slow
def test_reduction_and_ema_can_be_measured(capsys: pytest.CaptureFixture[str]):
    main(["reduction", "ema", "--quick"])
    printed = capsys.readouterr().out
    assert "invariant | " in printed and "collectives in an update: 0" in printed


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["speed"])
    assert "no such row: speed" in capsys.readouterr().err
