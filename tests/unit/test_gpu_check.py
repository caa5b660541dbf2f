"""benchmarks/gpu_check.py: it goes on, goes on again, and says what it found. Its stages are rehearsed with --rehearse."""

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from largescale.config.presets import PRESETS
from largescale.host.files import try_lock
from tests.conftest import RunHere
from tests.ranks import ROOT


@pytest.fixture(scope="module")
def modules() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module


@pytest.fixture
def check(modules: Any) -> Any:
    return modules("gpu_check")


@pytest.fixture
def fake(check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The program with four stages of some milliseconds; each adds its name to a file."""
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    write = f"import json, sys; {note}('%s '); open(sys.argv[1], 'w').write(json.dumps({{'recompilations': 0, 'lines': []}}))"
    programs = {
        "good": write % "good",
        "bad": f"import sys; {note}('bad '); print('about to fail'); sys.exit('no such thing')",
        "slow": f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); {note}('slow '); time.sleep(600)",
        "last": write % "last",
    }
    stages = [check.Stage(name, name, ["-c", program, "{json}"], "recompiles") for name, program in programs.items()]
    stages.append(check.Stage("peer", "peer", [], "steps", missing="no checkout of it"))
    monkeypatch.setattr(check.Plan, "stages", lambda self: stages)
    run = check.run
    monkeypatch.setattr(check, "run", lambda stage, out, limit_s: run(stage, out, limit_s if stage.name == "slow" else 600))
    return lambda *args: check.main(["--rehearse", "--out", str(tmp_path / "out"), "--limit-s", "2", *args])


def test_a_stage_that_fails_and_one_over_its_limit(fake: Callable[..., int], tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    """The others go on; a second start does what is not done, and what is asked for again."""
    assert fake() == 1
    report = json.loads((tmp_path / "out/gpu_report.json").read_text())
    assert {name: stage["status"] for name, stage in report["stages"].items()} == {
        "good": "done", "bad": "failed", "slow": "over its limit", "last": "done", "peer": "not run"}
    text = (tmp_path / "out/gpu_report.md").read_text()
    assert "about to fail\nno such thing\n" in text and ": over its limit." in text and "no checkout of it" in text
    assert "Rehearsed on a CPU" in text and report["verdicts"] == ["no verdicts: rehearsed on a CPU"]
    assert "bad: bad\n    failed after 0 s; no such thing" in capsys.readouterr().out

    assert fake("--again", "last", "--only", "bad", "good") == 1
    assert (tmp_path / "ran").read_text() == "good bad slow last bad last "


def test_all_done(fake: Callable[..., int], tmp_path: Path) -> None:
    assert fake("--only", "good", "last") == 0
    assert "`slow` was not run: not run yet" in (tmp_path / "out/gpu_report.md").read_text()


def test_a_stage_ends_with_the_program(fake: Callable[..., int], tmp_path: Path) -> None:
    """That is told to stop, as by Slurm."""
    def stop() -> None:
        while not (tmp_path / "ran").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(SystemExit) as stopped:
        fake("--only", "slow", "--limit-s", "600")
    assert stopped.value.code == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(("args", "said"), [
    (["--again", "goood"], "there is no stage goood; did you mean good? there are good, bad, slow, last, peer"),
    (["--only", "xyz"], "there is no stage xyz; there are good"),
])
def test_a_stage_that_there_is_not(args: list[str], said: str, fake: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fake(*args)
    assert said in capsys.readouterr().err


def test_a_folder_of_other_results(fake: Callable[..., int], tmp_path: Path) -> None:
    fake("--only", "good")
    report = tmp_path / "out/gpu_report.json"
    written = json.loads(report.read_text())
    report.write_text(json.dumps(written | {"card": "NVIDIA H100"}))
    with pytest.raises(SystemExit, match="holds results with card 'NVIDIA H100', and this is .*; give another --out"):
        fake()
    report.write_text(json.dumps(written | {"commit": "0" * 40}))
    with pytest.raises(SystemExit, match="holds results with commit '0000"):
        fake()


def test_another_check_in_the_same_folder(fake: Callable[..., int], tmp_path: Path) -> None:
    fake("--only", "good")
    lock = try_lock(tmp_path / "out/lock")
    assert lock
    with pytest.raises(SystemExit, match=r"another check writes to .*/out; wait for it, or give another --out"):
        fake()
    lock.close()


def test_a_result_that_was_not_written_to_its_end(fake: Callable[..., int], tmp_path: Path, check: Any) -> None:
    """The stage has failed, and the others go on; one that ended so before is done again."""
    half = "import sys; open(sys.argv[1], 'w').write('{\"recomp')"
    check.Plan.stages(None).insert(0, check.Stage("half", "half", ["-c", half, "{json}"], "recompiles"))
    assert fake("--only", "half", "good") == 1
    stages = json.loads((tmp_path / "out/gpu_report.json").read_text())["stages"]
    assert (stages["half"]["status"], stages["good"]["status"]) == ("failed: it wrote no result", "done")
    (tmp_path / "out/stages/good.json").write_text("{")
    fake("--only", "good")
    assert (tmp_path / "ran").read_text() == "good good "


def test_a_folder_that_cannot_be_made(fake: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(SystemExit, match=r"error: .*/out.*; give a folder that can be written, by --out"):
        fake()


def test_without_a_gpu(check: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        check.main([])
    assert "torch sees no CUDA device; --rehearse" in capsys.readouterr().err


@pytest.mark.parametrize("rehearse", [True, False])
def test_programs_take_what_they_are_given(rehearse: bool, check: Any, modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card too, where nothing of this has run yet."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not rehearse)
    checkout = str(ROOT / "benchmarks/dit_stand_in")
    words = ["--full", "--dit", checkout, "--fast-dit", checkout, *["--rehearse"] * rehearse]
    plan = check.Plan(check.make_parser().parse_args(words), 8, "NVIDIA H100 80GB HBM3")
    stages = plan.stages()
    assert len({stage.name for stage in stages}) == len(stages) > 15
    without_gpu = {stage.name for stage in stages if not stage.needs_gpu}
    assert without_gpu == ({stage.name for stage in stages} if rehearse else {"predict_l2"})
    for stage in stages:
        program, *args = stage.words
        if stage.missing or (stage.kind == "predict" and not find_spec("triton")):
            continue  # diffusers is not installed; Triton is not made for this machine
        if program == "-m":
            assert args[:2] == ["pytest", "tests/gpu"]
            continue
        if program.endswith("gpu_check_stages.py"):
            monkeypatch.setattr(modules("gpu_check_stages"), "STAGES", {args[0]: lambda options: {}})
        name = Path(program).stem
        if name == "train_step":
            modules(name).parse(args)
        elif name == "sampling":
            monkeypatch.setattr(sys, "argv", ["sampling.py", *args])
            modules(name).parse()
        else:
            modules(name).make_parser().parse_args(args)


def test_the_card(check: Any, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for in another process, so that this one takes none of its memory."""
    stages = modules("gpu_check_stages")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_200)
    monkeypatch.setattr(check.subprocess, "run", lambda words, **more: stages.main(words[2:]))
    monkeypatch.setattr(check, "driver", lambda: "580.95.05, 700.00 W, 1980 MHz")
    monkeypatch.setattr(check, "commit", lambda checkout: "0" * 40)
    found = check.machine(True)
    assert (found["card"], found["gpus"], found["driver"][:3]) == ("NVIDIA H100 80GB HBM3", 8, "580")
    assert found["versions"]["nccl"] == "2.28.9" and found["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_make() -> None:
    """Without an installation where another Python is named."""
    said = subprocess.run(["make", "--no-print-directory", "-n", "gpu", "PY=python3", "SITE=/wheels", "GPU_ARGS=--full"], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout == f'PYTHONPATH="{ROOT}:/wheels" python3 benchmarks/gpu_check.py --full\n', said.stderr
    said = subprocess.run(["make", "--no-print-directory", "-n", "gpu"], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.splitlines() == [
        "python3 install.py prep eval dev", f'PYTHONPATH="{ROOT}" .venv/bin/python benchmarks/gpu_check.py '], said.stderr


# ---- the stages


def launch(name: str, begin: float, length: float, at: float, number: int) -> list[dict[str, Any]]:
    """A kernel, and the call that launched it."""
    return [{"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": at, "dur": 1, "args": {"correlation": number}},
            {"ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": length, "args": {"correlation": number}}]


def test_the_time_of_kernels(modules: Any) -> None:
    """By the part of the step that launched them, later than that part or not."""
    laps = [{"ph": "X", "cat": "user_annotation", "name": name, "ts": ts, "dur": 10}
            for name, ts in (("forward", 0), ("backward", 10), ("optimizer", 20))]
    events = [
        *laps, *launch("nvjet_tst_128x256", 15, 6, 2, 1), *launch("triton_tem_fused_mm", 21, 4, 4, 6), *launch("cudnn_generated_fort_native_sdpa_sm90_flash", 25, 5, 3, 2),
        *launch("triton_poi_fused__scaled_dot_product_flash_attention_backward_stack_1", 32, 8, 12, 3), *launch("ncclDevKernel_AllReduce", 30, 6, 13, 4),
        *launch("multi_tensor_apply_kernel<FusedAdam>", 50, 10, 22, 5), {"ph": "M", "name": "thread_name"}]
    found = modules("gpu_check_stages").kernel_times(events)
    us = {part: {kind: round(1e6 * s) for kind, s in kinds.items()} for part, kinds in found["parts"].items()}
    assert us == {"forward": {"matrix products": 10, "attention": 5}, "backward": {"elementwise": 8, "communication": 6},
                  "optimizer": {"optimizer": 10}}
    assert found["steps"] == 1 and round(1e6 * found["span_s"]) == 45 and round(1e6 * found["gaps_s"]) == 10


def test_operations_without_what_they_call(modules: Any) -> None:
    events = [{"tid": tid, "ts": ts, "dur": dur} for tid, ts, dur in ((1, 0, 100), (1, 10, 30), (1, 15, 5), (1, 50, 20), (2, 0, 7))]
    assert modules("gpu_check_stages").own_times(events) == [50, 25, 5, 20, 7]


def test_time_outside_the_step(modules: Any) -> None:
    """At the preset's own intervals of 5,000 steps, and of 50,000 for previews."""
    plain = {"loss": 1.0, "images_per_s": 256.0, "memory_gib": 1.0, "time/overhead_share": 0.01}
    rows = [{"step": step} | plain for step in (10, 20, 30, 40)]
    rows[2] |= {"time/reference_ms": 5e3, "time/preview_ms": 1e4, "images_per_s": 64.0}
    rows.append({"step": 30, "checkpoint/stall_s": 5.0})
    found = modules("gpu_check_stages").outside("dit_l2_imagenet256", rows)
    assert PRESETS["dit_l2_imagenet256"]().checkpoint.every == 5000
    assert found["step_s"] == 1 and found["events_s"] == {"checkpoint": 5, "reference": 50, "preview": 100}
    assert found["outside"] == pytest.approx((0.01 + 0.001 + 0.01 + 0.002) / 1.013)


def test_a_run_and_a_profile(modules: Any, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: what the report shows of them."""
    stages, report = modules("gpu_check_stages"), modules("gpu_check_report")
    monkeypatch.setattr(stages, "ranks_of", lambda ranks, m, module, preset, *args: run_here(*args, preset=preset, data=None))
    monkeypatch.setattr(stages, "sample", lambda options, run: {"samples": 8, "images_s": 2.0})
    given = ["--json", str(tmp_path / "found"), "--folder", str(tmp_path), "--device", "cpu", "--preset", "debug"]
    whole: dict[str, Any] = {"rehearsal": True, "stages": {"predict_l2": {"missing": "not run yet"}}}

    stages.main(["train", *given, "--steps", "24"])
    found = json.loads((tmp_path / "found").read_text())
    assert 0 < found["shares"]["data, draws, report, log"] < 1 and found["events_s"]["checkpoint"] > 0
    assert any(line.startswith("| in all, at the preset's intervals | ") for line in report.run(found, whole))

    stages.train.__globals__["make_latents"](tmp_path / "other", PRESETS["debug"]().model, 8)
    monkeypatch.setattr(stages, "make_latents", lambda *args: None)
    (tmp_path / "run").rename(tmp_path / "before")
    stages.main(["profile", *given, "--batch", "4"])
    found = json.loads((tmp_path / "found").read_text())
    assert found["parts"]["forward"]["matrix products"] > 0 and found["parts"]["optimizer"]["optimizer"] > 0
    assert any(line.startswith("| attention |  | ") for line in report.profile(found, whole))


# ---- the verdicts


def way(kind: str = "ours", **more: Any) -> dict[str, Any]:
    return {"name": kind, "kind": kind, "error": None, "of_peak": 0.3, "step_s": 1.0} | more


def steps(*ways: dict[str, Any]) -> dict[str, Any]:
    return {"status": "done", "result": {"batches": [{"batch": 32, "ways": [*ways]}]}}


def test_verdicts(modules: Any) -> None:
    report = modules("gpu_check_report")
    stages = {
        "step_l2": steps(way(), way(of_peak=0.47), way("ddp", of_peak=0.6)),
        "kernels_l2": steps(way(of_peak=0.52)),
        "against_fast_dit": steps(way(times_as_fast_as={"fast-DiT, bf16": 2.4})),
        "run_l2": {"status": "done", "result": {"outside": 0.013}},
    }
    found = {"rehearsal": False, "card": "NVIDIA H100 80GB HBM3", "stages": stages}
    assert report.verdicts(found) == [
        "50% MFU of DiT-L/2 on an H100: met (52.0%)", "2.5 times as fast as fast-DiT: missed (2.40 times)",
        "at most 2% of the time outside the step: met (1.30%)"]
    stages |= {"against_fast_dit": {"status": "not run", "missing": "no checkout of it"}, "run_l2": {"status": "over its limit", "result": None}}
    found["card"] = "NVIDIA A100"
    assert report.verdicts(found) == [
        "50% MFU of DiT-L/2 on an H100: not measured (the card is NVIDIA A100; there it is 52.0% of the card's peak)",
        "2.5 times as fast as fast-DiT: not measured (no checkout of it)",
        "at most 2% of the time outside the step: not measured (over its limit)"]


def test_what_is_wrong_with_a_stage_that_ended_well(modules: Any) -> None:
    trouble = modules("gpu_check_report").trouble
    full = way(error="OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert trouble("steps", steps(way(), full)["result"]) is None
    assert trouble("steps", steps(way(), way(error="TypeError: no"))["result"]) == "ours: TypeError: no"
    del full["step_s"]
    assert trouble("steps", steps(full)["result"]) == "no way was measured"
    assert trouble("profile", None) == "it wrote no result" and trouble("tests", None) is None
