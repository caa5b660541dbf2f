"""benchmarks/train_step.py, on a tiny model: what it compares is the same work, and what it counts is right."""

import importlib
import importlib.util
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from largescale.models.dit import DiT, flops_per_image

ROOT = Path(__file__).parents[2]
PEERS = ["ddp", *(["diffusers"] if importlib.util.find_spec("diffusers") else [])]


@pytest.fixture(scope="module")
def benchmark() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        module = importlib.import_module("train_step")
        patch.setattr(module, "peaks", lambda device: {"fp32": 1e9, "bf16": 2e9})
        yield module


@pytest.fixture(scope="module")
def measured(benchmark: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("measured") / "measured.json"
    threads = torch.get_num_threads()
    try:
        benchmark.main(["debug", "--batch", "4", "--rounds", "2", "--steps", "2", "--device", "cpu", "--threads", "1",
                        "--precision", "fp32", "bf16", "--against", *PEERS, "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_all_ways_do_the_same_work(measured: Any) -> None:
    (batch,) = measured["batches"]
    ways = {way["name"]: way for way in batch["ways"]}
    assert batch["base"] == "our model in DDP, fp32" and len(ways) == 2 * (1 + len(PEERS))
    ours = ways["ours, fp32"]
    assert len(ours["losses"]) == 2 and ours["losses"][0] != ours["losses"][1]
    for name, way in ways.items():
        assert way["error"] is None, name
        assert way["away"] < (1e-2 if way["kind"] == "diffusers" else 1e-6 if way["precision"] == "fp32" else 1e-3), name
        assert way["mses"] == pytest.approx(ours["mses"], rel=1e-2), name
    assert ways["our model in DDP, fp32"]["ratio"] == 1


def test_the_numbers_are_those_of_the_turns(measured: Any) -> None:
    for way in measured["batches"][0]["ways"]:
        assert [len(turn["times"]) for turn in way["turns"]] == [2, 2]
        assert way["step_s"] == pytest.approx(statistics.median(sum(turn["times"]) / 2 for turn in way["turns"]))
        assert way["images_s"] == pytest.approx(4 / way["step_s"])
        assert way["first_s"] > 0 and way["peak_bytes"] > 1e8
        peak = measured["peak_flops"][way["precision"]]
        assert way["of_peak"] == pytest.approx(measured["flops_per_image"] * way["images_s"] / peak)
        # while others have their turns it does nothing
        assert sum(turn["idle_cpu_s"] for turn in way["turns"]) < 0.1 * sum(turn["idle_s"] for turn in way["turns"])
    assert measured["versions"]["torch"] == torch.__version__.partition("+")[0] and measured["date"]


def test_the_parts_of_our_step(benchmark: Any, measured: Any) -> None:
    for way in measured["batches"][0]["ways"]:
        if way["kind"] != "ours":
            assert all(turn["parts"] is None for turn in way["turns"])
            continue
        for turn in way["turns"]:
            assert turn["parts"].keys() == benchmark.PARTS.keys()
            assert all(seconds >= 0 for seconds in turn["parts"].values())
            assert turn["parts"]["forward"] > 0 and turn["parts"]["backward"] > 0
        assert 0 < way["overhead"] <= way["outside"] < 1
        assert way["times_as_fast_as"].keys() == {
            other["name"] for other in measured["batches"][0]["ways"] if other["kind"] != "ours"}


def test_a_split_adds_up(benchmark: Any) -> None:
    child = importlib.import_module("train_step_child")
    ticks = iter(range(1000))

    class Ticks:
        def now(self) -> int:
            return next(ticks)

        between = staticmethod(lambda stamps: [b - a for a, b in pairwise(stamps)])

    split = child.Split(Ticks())
    with split.part("before"):
        pass
    assert next(ticks) == 0, "read when nobody asked"

    def step() -> None:
        with split.part("forward"):
            split.becomes("backward")
            with split.part("reduce"):
                pass

    # pacing, forward, backward, reduce, backward, pacing, each of one tick
    assert split.take(3, step) == pytest.approx({"pacing": 4 / 3, "forward": 1, "backward": 2, "reduce": 1})


def test_flops_are_torchs(measured: Any) -> None:
    """Of a forward pass exactly. Of a backward pass twice that: torch counts attention's scores, which its backward
    computes again (as with checkpointing, not work of the model), and not the gradients of x_t and of t's sinusoids."""
    batch, width, depth, heads, patch = 2, 64, 3, 2, 4
    model = DiT(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads, num_classes=10)
    x, t, y = torch.randn(batch, 4, 32, 32), torch.tensor([1, 999]), torch.tensor([3, 10])
    with FlopCounterMode(display=False) as forward:
        output = model(x, t, y)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    tokens = model.grid**2
    scores = 2 * depth * tokens**2 * width
    nobody_needs = 2 * (tokens * 4 * patch**2 * width + model.t_embedder.frequency_dim * width)
    assert forward.get_total_flops() == batch * flops_per_image(model)
    assert backward.get_total_flops() == batch * (2 * flops_per_image(model) + scores - nobody_needs)


@pytest.mark.parametrize(("arguments", "said"), [
    (["dit_s9"], "no preset dit_s9"),
    (["dit_s2_coco256"], "not class-conditional"),
    (["debug", "--against", "jax"], "no peer jax"),
    (["debug", "--against", "dit"], "dit=PATH"),
    (["debug", "--against", "ddp=/tmp"], "takes no path"),
    (["debug", "--against", "fast-dit=/nowhere"], "no checkout"),
    (["debug", "--json", "/nowhere/steps.json"], "there is no folder /nowhere"),
])
def test_what_is_wrong_is_said_at_once(benchmark: Any, capsys: pytest.CaptureFixture[str], arguments: list[str],
                                       said: str) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert said in capsys.readouterr().err


def test_a_peer_without_its_library(benchmark: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        benchmark.main(["debug", "--against", "diffusers"])
    assert "needs diffusers: pip install diffusers" in capsys.readouterr().err


def test_a_way_that_fails_is_told_and_others_go_on(benchmark: Any, tmp_path: Path) -> None:
    for name in ("models.py", "train.py"):
        (tmp_path / name).write_text("raise MemoryError('too large')\n")
    (tmp_path / "diffusion").mkdir()
    result = benchmark.main(["debug", "--batch", "4", "--rounds", "1", "--steps", "1", "--device", "cpu",
                             "--precision", "fp32", "--restart", "--against", f"dit={tmp_path}"])
    ours, dit = result["batches"][0]["ways"]
    assert dit["error"] == "MemoryError: too large" and "step_s" not in dit
    assert ours["error"] is None and ours["images_s"] > 0 and ours["ratio"] == 1
