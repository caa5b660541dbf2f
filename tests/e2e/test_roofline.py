"""benchmarks/roofline.py, which needs no GPU: what it counts is what the formulas say."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Inductor writes code for GPUs with Triton only")
from largescale.config.presets import PRESETS
from largescale.models.fused_norm import ROWS
from largescale.planning.cost import HARDWARE

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def roofline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("roofline")


@pytest.mark.parametrize(("preset", "images"), [("dit_s2_imagenet256", 2), ("dit_s2_coco256", 2)])
def test_the_operations_of_a_block_are_the_formulas(preset: str, images: int, roofline: Any) -> None:
    config = PRESETS[preset]()
    kernels = roofline.kernels_of_block(config, images, "h100")
    forward = {kind: sum(k.flops for k in kernels if k.kind == kind and not k.backward) for kind in ("product", "attention")}
    backward = {kind: sum(k.flops for k in kernels if k.kind == kind and k.backward) for kind in ("product", "attention")}
    assert sum(forward.values()) == images * roofline.forward_flops(config)[0]
    # Each product has two in the backward pass; attention computes its weights again.
    assert backward["product"] == 2 * forward["product"] and backward["attention"] == 2.5 * forward["attention"]


def test_the_bytes_of_fused_kernels(roofline: Any) -> None:
    """Those that Triton's interpreter sees the kernels touch (tests/unit/test_fused_norm.py, in the same words)."""
    images, tokens, width = 2, 256, 384
    kernels = [k for k in roofline.kernels_of_block(PRESETS["dit_s2_imagenet256"](), images, "h100", "fused") if k.kind == "ours"]
    elements, around = images * tokens * width, 2 * 4 * images * tokens + 2 * width
    sums = 4 * 4 * width * images * tokens // ROWS
    assert [k.bytes for k in kernels if not k.backward] == [12 * elements + around + 3 * 2 * images * width] * 2
    assert [k.bytes for k in kernels if k.backward] == [18 * elements + around + 2 * 2 * images * width + sums] * 2


def test_fused_kernels_move_fewer_bytes(roofline: Any) -> None:
    config, elements = PRESETS["dit_s2_imagenet256"](), 2 * 256 * 384
    moved = [roofline.bytes_per_element(roofline.kernels_of_block(config, 2, "h100", kernels), elements) for kernels in ("inductor", "fused")]
    assert moved[1] < 0.85 * moved[0]


def test_the_report(roofline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["dit_s2_imagenet256", "--gpus", "1", "8", "--images", "4", "--json", str(tmp_path / "report.json")])
    out, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    moved = report["bytes_per_element"]
    assert f"\nbytes per residual element and block: {moved:.1f}\n" in out
    # A block reads and writes the stream at least once in each pass, and today's code about 40 times.
    assert 16 < moved < 170
    elements = 4 * 256 * 384
    assert moved == pytest.approx(sum(k["bytes"] for k in report["kernels"] if k["kind"] == "elementwise") / elements)
    one, eight = report["steps"]
    assert one["parts"]["all-gather"] == 0 < eight["parts"]["all-gather"]
    for step in report["steps"]:
        seconds = sum(step["parts"].values())
        assert step["images_per_s"] == pytest.approx(256 / seconds) and 0.02 < step["mfu"] < 0.8
        assert step["hours"] == pytest.approx(PRESETS["dit_s2_imagenet256"]().train.steps * seconds / 3600)
    assert HARDWARE["h100"].name in out
