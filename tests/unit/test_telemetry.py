import json
from pathlib import Path

import numpy as np

from largescale.monitoring.telemetry import Telemetry, peak_flops, read_metrics, rows_from


def telemetry(run: Path, step: int = 0, active: bool = True) -> Telemetry:
    return Telemetry(run, active=active, tensorboard=False, step=step, steps=10)


def test_rows_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    with telemetry(tmp_path) as first:
        for step in range(1, 6):
            first.log(step, {"loss": 1 / step, "unknown": None})
        first.event(5, "transition", "on we go", index=3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut short by a crash
    with telemetry(tmp_path, step=3) as second:
        second.log(4, {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.5)]
    assert "unknown" not in read_metrics(tmp_path)[0]


def test_rows_from_a_step_on(tmp_path: Path) -> None:
    """Whatever their lines look like; a line that only begins like a row cuts nothing off."""
    lines = ['{"step": 1, "loss": 1}', '{"loss": 1, "step": 2}', '{"step": 9, "lo', "", '{"step":3}', '{"step": 4, "event": "spike"}', '{"step": 5, "loss"']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    for first in range(-1, 7):
        assert [row["step"] for row in rows_from(tmp_path, first)] == [step for step in (1, 2, 3, 4) if step >= first]
    with telemetry(tmp_path, step=3):
        pass
    assert (tmp_path / "metrics.jsonl").read_text() == "\n".join(lines[:5]) + "\n"
    assert list(rows_from(tmp_path / "none", 0)) == []


def test_every_line_is_json_and_exact(tmp_path: Path) -> None:
    with telemetry(tmp_path) as t:
        t.log(1, {"loss": 0.1 + 0.2})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 1, "loss": 0.1 + 0.2}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with telemetry(tmp_path / "run", active=False) as t:
        t.log(1, {"loss": 1.0})
        t.event(1, "transition", "text")
        t.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
        t.progress(1, loss=1)
        t.message("nothing")
    assert not (tmp_path / "run").exists()


def test_peaks() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "fp16") == 756e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None and peak_flops("cpu", "bf16") is None
