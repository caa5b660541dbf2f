"""The benchmark's own arithmetic: the table, and the way from what is measured on one rank to what is predicted for two."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

from largescale.config.deepspeed import load_ds_config  # noqa: E402
from largescale.config.presets import PRESETS  # noqa: E402
from largescale.planning.cost import step  # noqa: E402
from largescale.planning.hardware import HARDWARE  # noqa: E402
from largescale.training.dry_run import workload  # noqa: E402

ALONE = {"products alone": 1.0, "products together": 1.0, "copies alone": 1.0, "copies together": 1.0, "all-reduce": 0.03,
         "all-gather": 0.01}
ONE = {"forward and backward": 1.3, "optimizer": 0.2}


def test_tables_have_a_row_a_size() -> None:
    config = PRESETS["dit_l2_imagenet256"]()
    plans = [scaling.plan(config, HARDWARE["h100"], n, 2_000_000) for n in (1, 8, 256)]
    tables = [table.splitlines() for table in scaling.tables(plans).split("\n\n")]
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + 3
    one, eight, most = tables[0][2:]
    assert "| 128 x 2 |" in one and "| 32 |" in eight  # 256 images do not fit into one GPU at once
    assert "| all-gather | " in eight and "| gradient reduction | " in most and "optimizer" in one
    shares = [float(cell.split()[0]) for cell in most.split("|") if cell.endswith(" % ")]
    assert sum(shares) == pytest.approx(100, abs=1)


def test_one_rank_gives_back_what_was_measured() -> None:
    work = workload(PRESETS["digits"](), load_ds_config(scaling.FP32), 1)
    parts = step(work, scaling.calibrated(work, ONE, ALONE), 1).parts
    assert parts["compute"] + parts["gradient reduction"] == pytest.approx(ONE["forward and backward"])
    assert parts["optimizer"] == pytest.approx(ONE["optimizer"])


def test_two_ranks_halve_the_work_and_add_what_they_send() -> None:
    work = workload(PRESETS["digits"](), load_ds_config(scaling.FP32), 1)
    alone, staging = (ONE["optimizer"] * work.staging_bytes(n) / work.update_bytes for n in (1, 2))
    two = scaling.predicted(work, scaling.calibrated(work, ONE, ALONE))
    assert sum(two.values()) == pytest.approx((1.3 - alone) / 2 + staging + 0.2 / 2 + 0.03 + 0.01)
    shared = scaling.predicted(work, scaling.calibrated(work, ONE, {**ALONE, "products together": 2.0, "copies together": 2.0}))
    assert sum(shared.values()) == pytest.approx(1.3 - alone + 2 * staging + 0.2 + 0.03 + 0.01)


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gpus", "7", "0"], "--gpus must be positive"), (["--preset", "debgu"], "invalid choice: 'debgu'"), (["--mfu", "0"], "--mfu must be positive"),
    (["--mfu", "50"], "--mfu 50 is a share of the peak"), (["--steps", "0"], "--steps must be positive"), (["--batch-size", "-1"], "--batch-size must"),
    (["--gpus", "7"], "a batch of 256 cannot be shared by 7 GPUs"),
])
def test_mistakes(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["scaling.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        scaling.main()
    assert stopped.value.code == 2 and message in capsys.readouterr().err
