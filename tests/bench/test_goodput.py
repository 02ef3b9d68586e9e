from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from bench.goodput import Kill, Run, best_interval, draw, read
from bench.simulation import DAY_S, Costs, Loss, draw_losses, expected_goodput, simulate
from orchestrator.sections import CheckpointConfig, Tier

COSTS = Costs(step_s=1.0, stall_s=0.5, peer_s=2.0, storage_s=30.0, in_place_s=3.0, replace_s=60.0)
TIERS = CheckpointConfig(
    tiers=(Tier(url="peer://", every=10, keep=2), Tier(url="file:///runs", every=100, keep=2)),
)


def test_without_failures_only_saves_cost_something():
    outcome = simulate([], 10_500 / DAY_S, COSTS, CheckpointConfig(every_steps=10))
    assert outcome.goodput == pytest.approx(10 / 10.5) and outcome.num_failures == outcome.lost_steps == 0


@pytest.mark.parametrize(
    ("losses", "lost_steps", "seconds", "from_storage"),
    [
        ([Loss(at_s=1000.0, node=3, whole_node=False)], 2, 3.0, 0),  # step 952 is done, 950 is in memory
        ([Loss(at_s=1000.0, node=3, whole_node=True)], 2, 60.0, 0),
        ([Loss(at_s=998.4, node=3, whole_node=True)], 10, 60.0, 0),  # 950 has not arrived at the neighbour
        ([Loss(at_s=1000.0, node=n, whole_node=True) for n in (3, 5)], 2, 60.0, 0),
        ([Loss(at_s=1000.0, node=n, whole_node=True) for n in (3, 4)], 52, 60.0, 1),
        ([Loss(at_s=at_s, node=3, whole_node=False) for at_s in (1000.0, 1002.0)], 2, 5.0, 0),
    ],
)
def test_what_a_failure_costs(losses: list[Loss], lost_steps: int, seconds: float, from_storage: int):
    outcome = simulate(losses, 2000 / DAY_S, COSTS, TIERS)
    assert (outcome.lost_steps, outcome.from_storage) == (lost_steps, from_storage)
    done = 2000 - seconds - 1000 % 1.05  # the step under way when it failed counts for nothing
    assert outcome.goodput * 2000 == pytest.approx(done / 1.05 - lost_steps, abs=2.5)


def test_the_simulation_agrees_with_the_formula():
    losses = draw_losses(6.5, 10_000, 60, node_share=0.0)
    mean_s = DAY_S * 1000 / 65_000
    costs = replace(COSTS, step_s=20.0)
    found = simulate(losses, 60, costs, CheckpointConfig(every_steps=2)).goodput
    assert found == pytest.approx(expected_goodput(mean_s, 40.0, 0.5, 0.0, 3.0), abs=0.002)


def test_a_schedule_follows_from_its_seed():
    assert draw(60.0, 1e6) == draw(60.0, 1e6) != draw(60.0, 1e6, seed=2)
    assert len(draw(60.0, 1e6)) == pytest.approx(1e6 / 60, rel=0.05)


def line(kind: str, time_s: float, step: int, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "time_s": time_s, "step": step, **fields}


def test_a_run_is_read_from_what_it_says():
    lines = [line("step", 100.0 + step / 2, step) for step in range(5, 21)]  # 20 at 110.0
    lines.insert(6, line("snapshot", 105.1, 10, stall_s=0.1))
    lines += [line("step", 110.3, 21), line("training", 111.0, 10), line("step", 111.5, 11), line("step", 112.0, 12)]
    lines += [line("step", 131.0, 13)]  # after the end
    run = read(lines, killed_s=[110.2], began_s=102.5, wall_s=20.0)
    assert (run.useful_steps, run.steps, run.step_s, run.stalls_s) == (12 - 5, 18, 0.5, [0.1])
    assert run.recoveries_s == [pytest.approx(1.3)], "the step that was under way is no recovery"
    assert run.goodput == 7 * 0.5 / 20
    never = read(lines[:17], killed_s=[110.2], began_s=102.5, wall_s=20.0)
    assert never.recoveries_s == [pytest.approx(12.3)], "it lasts to the end at least"


def test_a_save_costs_all_the_time_that_nothing_else_explains():
    run = Run(100.0, step_s=0.5, steps=181, stalls_s=[0.1] * 10, recoveries_s=[5.0])
    assert run.save_s == pytest.approx((100 - 180 * 0.5 - 5.0) / 10)
    assert replace(run, steps=199).save_s == 0.1, "its pause at least"


def test_the_best_interval_is_short_where_saves_cost_little_and_kills_are_many():
    kills = [Kill(at_s, 0) for at_s in (20.0, 55.0, 90.0, 125.0)]
    cheap = Run(150.0, step_s=0.5, steps=299, stalls_s=[0.001], recoveries_s=[1.0])
    dear = Run(150.0, step_s=0.5, steps=295, stalls_s=[2.0], recoveries_s=[1.0])
    (most, often), (less, rarely) = best_interval(cheap, kills), best_interval(dear, kills)
    assert often < rarely and less < most < 1
