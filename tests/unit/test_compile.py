"""Training with torch.compile: the same numbers up to rounding, and what was compiled is kept."""

import os
from pathlib import Path

import pytest
import torch

from largescale.checkpoint.files import checkpoints
from largescale.config.serialise import differences
from largescale.errors import ConfigError, LargescaleError
from largescale.models import compile
from largescale.models.compile import (
    Compiled,
    Gelu,
    has_compiler,
    use_private_cache,
    what_to_compile,
)
from largescale.models.dit import DiT, attention
from tests.conftest import RunHere

compiles = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")


def test_what_auto_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "has_compiler", lambda: True)
    assert [what_to_compile("auto", device) for device in ("cuda", "cpu")] == ["blocks", "off"]
    assert what_to_compile("model", "cpu") == "model"
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/no/include")
    assert what_to_compile("auto", "cuda") == "off" and what_to_compile("blocks", "cpu") == "blocks"
    with pytest.raises(ConfigError, match=r"needs Python's header /no/include/Python.h, .*python3-dev.*--train.compile off"):
        what_to_compile("blocks", "cuda")
    monkeypatch.setattr(compile, "has_compiler", lambda: False)
    assert what_to_compile("auto", "cuda") == what_to_compile("off", "cuda") == "off"
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler.*--train.compile off"):
        what_to_compile("blocks", "cuda")


def test_no_compiler_is_said_before_anything_starts(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    run = run_here("--train.compile", "blocks")
    assert run.code == 2 and "needs a C++ compiler" in run.err and not run.run.exists()


@compiles
@pytest.mark.parametrize("what", ["blocks", "model"])
def test_a_compiled_run(what: str, run_here: RunHere, tmp_path: Path) -> None:
    """Its losses are the eager run's up to rounding; evaluations between its steps compile nothing."""
    args = ("--train.steps", 8, "--telemetry.reference-every", 4)
    eager = run_here(*args, output=tmp_path / "eager")
    run = run_here(*args, "--train.compile", what, output=tmp_path / "run")
    assert run.code == 0 and f"compiled: {what}" in run.err, run.err
    losses = [[row["loss"] for row in outcome.trace()] for outcome in (eager, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[1] != losses[0]
    cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert any(cache.rglob("*.so")) and cache.parent.stat().st_mode & 0o077 == 0


def cache_folder(env: dict[str, str]) -> Path:
    use_private_cache(env)
    inductor, triton = (Path(env[f"{name}_CACHE_DIR"]) for name in ("TORCHINDUCTOR", "TRITON"))
    assert inductor.parent == triton.parent
    return inductor.parent


@pytest.mark.parametrize(("device", "around"), [("cpu", set()), ("cuda", {"x_embedder", "t_embedder", "final_layer"})])
def test_what_is_around_the_blocks_is_compiled_on_gpus(device: str, around: set[str]) -> None:
    model = DiT(patch_size=2, hidden_size=16, depth=2, num_heads=2, input_size=4, in_channels=1)
    Compiled(model, "blocks", device)
    compiled = {name for name, module in model.named_modules() if module._compiled_call_impl is not None}
    assert compiled == {"blocks.0", "blocks.1", *around}


def test_what_is_compiled_is_kept_where_nobody_else_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the cache is run: never in a folder that another user made, or may write to."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = {"HOME": str(tmp_path / "home")}
    usual = cache_folder(dict(home))
    assert usual == tmp_path / "home/.cache/largescale" and usual.stat().st_mode & 0o777 == 0o700
    assert cache_folder({**home, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torchinductor_me")}) == usual  # torch's own
    assert cache_folder({"XDG_CACHE_HOME": str(tmp_path / "xdg")}) == tmp_path / "xdg/largescale"

    usual.chmod(0o770)  # planted, as far as anybody can tell
    in_tmp = tmp_path / f"largescale_{os.getuid()}"
    assert cache_folder(dict(home)) == in_tmp
    in_tmp.rmdir()
    in_tmp.symlink_to(tmp_path / "xdg/largescale")  # by somebody who knows the name
    fresh = cache_folder(dict(home))
    assert fresh.parent == tmp_path and fresh.name.startswith("largescale_") and fresh != in_tmp
    assert fresh.stat().st_mode & 0o777 == 0o700
    in_tmp.unlink()
    in_tmp.mkdir(mode=0o700)
    usual.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # both folders are another's
    assert cache_folder(dict(home)) not in (usual, in_tmp)

    chosen = {"TORCHINDUCTOR_CACHE_DIR": "/shared/by/the/user"}
    use_private_cache(chosen)
    assert chosen == {"TORCHINDUCTOR_CACHE_DIR": "/shared/by/the/user"}


def test_code_of_another_kind_of_cpu_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home directory is shared by machines."""
    env = {"HOME": str(tmp_path)}
    use_private_cache(env)
    monkeypatch.setattr(compile, "_cpu_kind", lambda: "another")
    other = {"HOME": str(tmp_path)}
    use_private_cache(other)
    assert env["TORCHINDUCTOR_CACHE_DIR"] != other["TORCHINDUCTOR_CACHE_DIR"]
    assert Path(env["TORCHINDUCTOR_CACHE_DIR"]).parent == Path(other["TORCHINDUCTOR_CACHE_DIR"]).parent


def test_a_failure_says_what_to_do(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(*args: object, **kwargs: object) -> None:
        raise Broken("backend='inductor' raised:\nthe C++ compiler says no\n\nand a page of it")

    def end(error: LargescaleError) -> None:
        raise error  # this process has more to do

    monkeypatch.setattr("largescale.training.step.TrainStep.micro_step_losses", fail)
    monkeypatch.setattr("largescale.training.startup.end_at_once", end)
    run = run_here("--train.steps", 2)
    assert run.code == 2 and run.err.endswith(
        "torch.compile failed (Broken: backend='inductor' raised: the C++ compiler says no); train without it: "
        "--train.compile off\n"), run.err


def test_gelu_by_sigmoid() -> None:
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    torch.testing.assert_close(Gelu()(x), torch.nn.functional.gelu(x, approximate="tanh"), rtol=1e-12, atol=1e-14)


def test_attention_in_bf16_on_a_cpu() -> None:
    """With a gradient it is made of products: as near to float32's as torch's own kernel, forward and backward."""
    q, k, v, g = torch.randn(4, 2, 3, 64, 16, generator=torch.Generator().manual_seed(0))

    def answers(dtype: torch.dtype, by: object) -> list[torch.Tensor]:
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = by(*given)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, given, g.to(dtype))]

    exact = answers(torch.float32, torch.nn.functional.scaled_dot_product_attention)
    off = {by.__name__: [(a.float() - e).norm() / e.norm() for a, e in zip(answers(torch.bfloat16, by), exact, strict=True)]
           for by in (attention, torch.nn.functional.scaled_dot_product_attention)}
    assert all(ours < 1e-2 and ours < 2 * theirs for ours, theirs in zip(off["attention"], off["scaled_dot_product_attention"], strict=True)), off
    with torch.no_grad():
        same = [by(*(x.bfloat16() for x in (q, k, v))) for by in (attention, torch.nn.functional.scaled_dot_product_attention)]
    assert torch.equal(*same)


def test_off_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with Compiled(None, "off", "cpu").eager():  # type: ignore[arg-type]
        assert not list(tmp_path.iterdir())


def test_what_auto_stood_for_is_what_a_later_start_is_compared_with(run_here: RunHere, tmp_path: Path) -> None:
    """And nothing is said of a checkpoint that has "auto", from before that was so."""
    run = run_here("--train.steps", 2, output=tmp_path / "run")
    saved = checkpoints(run.run)[0].manifest()["state"]["config"]
    assert (saved["train"]["compile"], saved["optimizer"]["kernel"]) == ("off", "torch")
    again = run_here("--train.steps", 4, output=tmp_path / "run")
    assert again.code == 0 and "train.steps: 2 -> 4" in again.err and again.err.count(" -> ") == 1
    assert differences({"train": {"compile": "auto"}}, {"train": {"compile": "off"}}) == ([], [])
    assert differences({"train": {"compile": "off"}}, {"train": {"compile": "blocks"}}) == ([], ["train.compile: off -> blocks"])
