"""--profile: a trace of a few steps, which changes nothing else."""

import gzip
import json
from pathlib import Path
from typing import Any

from largescale.monitoring.profiling import RECORDED, SKIPPED, WARM_UP, Profile
from largescale.monitoring.telemetry import Telemetry
from tests.conftest import RunHere, assert_same_run

LAPS = {"data", "draws", "forward", "agree", "backward", "optimizer"}


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]  # type: ignore[no-any-return]


def test_profile(run_here: RunHere, tmp_path: Path) -> None:
    plain = run_here("--train.steps", 12, output=tmp_path / "plain")
    profiled = run_here("--train.steps", 12, "--profile", output=tmp_path / "profiled")
    assert profiled.code == 0, profiled.err
    assert_same_run(profiled.run, plain.run)

    last = SKIPPED + WARM_UP + RECORDED
    files = sorted((profiled.run / "profile").iterdir())
    assert [f.name for f in files] == [f"step_{last:08d}.pt.trace.json.gz", f"step_{last:08d}.txt"]
    assert f"profiled the steps up to {last}" in profiled.err and str(files[0]) in profiled.err
    assert not (plain.run / "profile").exists() and "profiled" not in plain.err

    trace = events(files[0])
    ranges = [event for event in trace if event.get("cat") == "user_annotation"]
    assert {name: sum(r["name"] == name for r in ranges) for name in LAPS} == dict.fromkeys(LAPS, RECORDED) | {"agree": 2 * RECORDED}
    first = {lap: min(r["ts"] for r in ranges if r["name"] == lap) for lap in LAPS}
    assert first["data"] < first["draws"] < first["forward"] < first["backward"] < first["optimizer"]
    forward = next(r for r in ranges if r["name"] == "forward")
    inside = [e for e in trace if e.get("cat") == "cpu_op" and forward["ts"] <= e["ts"] < forward["ts"] + forward["dur"]]
    products = [e for e in inside if e["name"] == "aten::addmm"]
    assert products and all(e["args"]["Input Dims"] for e in products)

    rows = [line.split()[0] for line in files[1].read_text().split("\n---")[1].splitlines()[1:]]
    assert len(rows) == 10 and not LAPS & set(rows)


def test_profile_of_accumulation_and_of_a_resumed_run(run_here: RunHere) -> None:
    args = ("--train.micro-batch-size", 8, "--profile")
    run_here("--train.steps", 10, *args)
    run = run_here("--train.steps", 20, *args).run
    assert sorted(p.name[:13] for p in (run / "profile").glob("*.gz")) == ["step_00000009", "step_00000019"]
    forward = [e for e in events(run / "profile/step_00000019.pt.trace.json.gz") if e["name"] == "forward"]
    assert len(forward) == 2 * RECORDED


def test_profile_of_a_run_that_ends_too_soon(run_here: RunHere, tmp_path: Path) -> None:
    short = run_here("--train.steps", SKIPPED + WARM_UP, "--profile", output=tmp_path / "short")
    assert short.code == 0 and "too few steps for a profile" in short.err and not (short.run / "profile").exists()
    longer = run_here("--train.steps", SKIPPED + WARM_UP + 1, "--profile", output=tmp_path / "longer")
    assert longer.code == 0 and "too few" not in longer.err
    (trace,) = (longer.run / "profile").glob("*.gz")
    assert sum(e["name"] == "forward" for e in events(trace)) == 1


def test_profile_that_cannot_be_written(run_here: RunHere, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_here("--train.steps", 2, output=run).code == 0
    (run / "profile").write_text("in the way")
    outcome = run_here("--train.steps", 12, "--profile", output=run)
    assert outcome.code == 0 and "telemetry cannot be written, training continues" in outcome.err
    assert len(outcome.trace()) == 12


def test_a_trace_that_is_cut_short_is_said(run_here: RunHere, monkeypatch: Any) -> None:
    """The profiler itself says nothing of a full disk."""
    import torch.profiler

    export = torch.profiler.profile.export_chrome_trace

    def cut_short(self: Any, path: str) -> None:
        export(self, path)
        Path(path).write_bytes(Path(path).read_bytes()[:-1000])

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", cut_short)
    outcome = run_here("--train.steps", 12, "--profile")
    assert outcome.code == 0 and "is the disk full?" in outcome.err and not list((outcome.run / "profile").iterdir())


def test_only_rank_0_profiles(tmp_path: Path) -> None:
    """Of a program of 64 ranks, one writes. Nothing is asked of the meter, which is none here."""
    elsewhere = Telemetry(tmp_path, active=False, tensorboard=False, step=0, steps=20)
    with Profile(None, elsewhere, wanted=True, cuda=False) as profile:  # type: ignore[arg-type]
        for step in range(20):
            profile.step(step + 1)
    assert not list(tmp_path.iterdir())
