"""How long checkpoints take and how often they are best written: against simulated failures."""

import math
import random
from dataclasses import replace

import pytest

from largescale.config.deepspeed import load_ds_config
from largescale.config.presets import PRESETS
from largescale.planning.cost import Plan, daly, slowdown, young
from largescale.training.dry_run import workload
from tests.conftest import RunHere
from tests.unit.costs import ROUND, WORK


def simulate(interval: float, stall: float, write: float, mtbf: float, restart: float, work: float) -> float:
    """Wall time over `work`: failures at random, also during a restart; a checkpoint counts `write` after its stall."""
    chance = random.Random(0)
    clock, done, saved, pending = 0.0, 0.0, 0.0, math.inf  # `pending`: when the one that is written will count
    failure = chance.expovariate(1 / mtbf)
    while done < work:
        end = clock + interval + stall
        if failure > end:
            clock, saved = end, max(saved, done if pending <= end else saved)
            done += interval
            pending = end + write
            continue
        saved = done if pending <= failure else saved
        clock = failure
        while True:  # the restart may fail too
            failure = clock + chance.expovariate(1 / mtbf)
            if failure > clock + restart:
                clock += restart
                break
            clock = failure
        done, pending = saved, math.inf
    return clock / done


@pytest.mark.parametrize(("interval", "stall", "write", "restart"), [(100, 5, 0, 0), (600, 20, 0, 30), (300, 2, 60, 60), (1200, 60, 0, 300)])
def test_slowdown_is_that_of_simulated_failures(interval: float, stall: float, write: float, restart: float) -> None:
    expected = slowdown(interval, stall_s=stall, write_s=write, mtbf_s=3600, restart_s=restart)
    assert simulate(interval, stall, write, 3600, restart, work=4e7) - 1 == pytest.approx(expected - 1, rel=0.03)


@pytest.mark.parametrize("stall", [0.1, 1, 10, 100, 400])
def test_daly_is_the_best_interval(stall: float) -> None:
    """By trying all. Young's is further off, the more so the longer a checkpoint takes."""
    cost = {"stall_s": stall, "write_s": 0.0, "mtbf_s": 1000.0, "restart_s": 0.0}
    best = min((10 ** (i / 1000) for i in range(4000)), key=lambda interval: slowdown(interval, **cost))
    assert daly(stall, 1000) == pytest.approx(best, rel=0.005)
    assert abs(young(stall, 1000) - best) > abs(daly(stall, 1000) - best)
    assert slowdown(daly(stall, 1000), **cost) <= 1.0001 * slowdown(best, **cost)


def test_daly_where_a_checkpoint_takes_longer_than_a_failure() -> None:
    assert daly(2000, 1000) == daly(5000, 1000) == 1000


def test_what_is_never_completed_is_never_done() -> None:
    assert slowdown(1e6, stall_s=1, write_s=0, mtbf_s=1, restart_s=0) == math.inf


def test_plan_by_hand() -> None:
    plan = Plan(WORK, ROUND, gpus=8, steps=1000, every=100)
    assert plan.mtbf_s == 3600 * 10 / 2
    assert plan.stall_s == pytest.approx((16 / 8 + 2) * 1e9 / 1e9)
    assert plan.write_s == pytest.approx(4.0)  # of rank 0; all 18 GB take 2.25 s
    assert replace(plan, hardware=replace(ROUND, storage_bandwidth=1e9)).write_s == pytest.approx(18.0)
    bare = 1000 * plan.step.seconds / 3600
    assert plan.hours == pytest.approx(bare * plan.slowdown(100)) and plan.hours > bare
    assert plan.wasted(plan.best_every) < min(plan.wasted(plan.best_every * 2), plan.wasted(plan.best_every / 2))


def test_checkpoints_wait_for_each_other() -> None:
    """One that takes longer to write than the interval holds up the steps."""
    plan = Plan(WORK, replace(ROUND, write_bandwidth=0.01e9, node_mtbf_hours=1e6), gpus=4, steps=1000, every=1)
    assert plan.slowdown(1) == pytest.approx((plan.write_s + plan.stall_s) / plan.step.seconds, rel=1e-3)
    often = replace(plan, hardware=replace(plan.hardware, node_mtbf_hours=1.0))
    assert daly(often.stall_s, often.mtbf_s) < often.write_s / 2
    assert often.best_every * often.step.seconds == pytest.approx(often.write_s, rel=0.01)


def test_bytes_of_a_checkpoint(run_here: RunHere) -> None:
    run = run_here("--train.steps", 5).run
    written = sum(path.stat().st_size for path in run.glob("checkpoints/step_00000005/*.pt"))
    config = PRESETS["debug"]()
    expected = workload(config, load_ds_config(config.train.ds_config), 1).checkpoint_bytes
    assert expected < written < 1.2 * expected + 30_000  # names, and the position embedding, come on top
