from __future__ import annotations

import pytest

from bench.comparison import Comparison
from bench.figure import Figure


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


@pytest.mark.parametrize(
    ("value", "options", "verdict"),
    [
        (0.9, {}, ""),
        (0.9, {"goal": 0.95, "at_least": True}, "missed"),
        (0.96, {"goal": 0.95, "at_least": True}, "holds"),
        (1.2, {"goal": 1.15}, "missed"),
    ],
)
def test_a_figure_is_held_against_its_goal(value: float, options: dict[str, float], verdict: str):
    assert Figure(name="f", value=value, **options).verdict == verdict
