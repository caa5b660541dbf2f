"""Half precision on a CPU without instructions for it: torch computes all the same, only slowly, and we say so."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep import folder
from eval import curve, sample
from largescale.errors import ConfigError
from largescale.models import half_precision
from tests.conftest import RunHere

FP16, BF16 = ("--train.ds-config", "ds_configs/zero2_fp16.json"), ("--train.ds-config", "ds_configs/zero2_bf16.json")


@pytest.fixture(autouse=True)
def said_to_nobody() -> Iterator[None]:
    yield
    half_precision.check_on_cpu.cache_clear()


def without(monkeypatch: pytest.MonkeyPatch, *precisions: str) -> None:
    """As in a new process, on a CPU without instructions for these; also to DeepSpeed."""
    half_precision.check_on_cpu.cache_clear()
    for precision in ("bf16", "fp16"):
        question = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported")
        monkeypatch.setattr(question, "_op", lambda answer=precision not in precisions: answer)


def refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a torch that lacks a kernel."""
    def layer_norm(*args: Any, **more: Any) -> None:
        raise RuntimeError("\"LayerNormKernelImpl\" not implemented for 'Half'\nand more")

    without(monkeypatch, "bf16", "fp16")
    monkeypatch.setattr(torch.nn.functional, "layer_norm", layer_norm)


@pytest.mark.parametrize(("lacking", "settings", "faster"), [
    (("fp16",), FP16, "bf16"), (("fp16", "bf16"), FP16, "fp32"), (("fp16", "bf16"), BF16, "fp32")])
def test_training(lacking: tuple[str, ...], settings: tuple[str, str], faster: str, run_here: RunHere, tmp_path: Path,
                  monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the instructions, and one line more."""
    without(monkeypatch)
    truth = run_here("--train.steps", 4, *settings, output=tmp_path / "truth")
    without(monkeypatch, *lacking)
    run = run_here("--train.steps", 4, *settings)
    assert (truth.code, run.code) == (0, 0), run.err
    precision = settings[1][-9:-5]
    line = (f"{precision} is slow on this CPU, which has no instructions for it: {faster} is faster, set "
            f"--train.ds-config ds_configs/zero2_{faster}.json")
    assert run.err.splitlines()[0] == line and "is slow" not in truth.err and f", {precision}, batch" in run.err
    assert run.trace() == truth.trace()


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_training_where_torch_cannot(more: tuple[str, ...], run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch)
    run = run_here(*FP16, *more)
    assert run.code == 2 and not run.run.exists()
    assert run.err == ("error: torch does not compute in fp16 on this CPU (\"LayerNormKernelImpl\" not implemented for "
                       "'Half'); set --train.ds-config ds_configs/zero2_fp32.json\n")


@pytest.mark.parametrize(("program", "precision", "args"), [
    (sample, "fp16", ["{run}", "--out", "{tmp}/out"]), (curve, "bf16", ["{run}", "--reference", "{tmp}", "--out", "{tmp}/out"]),
    (folder, "bf16", ["--images", "{tmp}", "--out", "{tmp}/out", "--vae", "none"])])
def test_other_programs_where_torch_cannot(program: Any, precision: str, args: list[str], run_here: RunHere, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2).run
    refuse(monkeypatch)
    capsys.readouterr()
    words = [word.format(run=run, tmp=tmp_path) for word in args]
    assert program.main([*words, "--device", "cpu", "--precision", precision]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: torch does not compute in {precision} on this CPU (") and said.endswith("; set --precision fp32\n")
    assert not (tmp_path / "out").exists()


def test_sampling(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2).run
    without(monkeypatch, "fp16")
    args = (run, "--out", tmp_path / "out", "--device", "cpu", "--precision", "fp16", "--steps", 2, "--num-samples", 4)
    assert sample.main([*map(str, args)]) == 0
    assert capsys.readouterr().err.count("fp16 is slow on this CPU, which has no instructions for it: bf16 is faster, set --precision bf16\n") == 1


def test_every_kind_of_layer_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "fp16")
    for name in ("linear", "conv2d", "layer_norm", "group_norm", "silu", "gelu", "scaled_dot_product_attention"):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match=f"fp16 on this CPU .{name}."):
            patch.setattr(torch.nn.functional, name, raising(name))
            half_precision.check_on_cpu("fp16", "{}")
    half_precision.check_on_cpu("fp16", "{}")


def raising(name: str) -> Any:
    def kernel(*args: Any, **more: Any) -> None:
        raise RuntimeError(name)

    return kernel
