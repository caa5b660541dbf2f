"""benchmarks/roofline.py, which needs no GPU: what it counts is what the formulas say."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Inductor writes code for GPUs with Triton only")
from largescale.config.presets import PRESETS
from largescale.models.fused_norm import ROWS
from largescale.models.fused_products import PACK_ROWS, TILE_ROWS
from largescale.planning.cost import HARDWARE

ROOT = Path(__file__).parents[2]
IMAGES = 2


@pytest.fixture(scope="module")
def roofline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("roofline")


@pytest.fixture(scope="module")
def kernels_of(roofline: Any) -> Any:
    """(preset, train.kernels) -> the kernels of a block, for 2 images on an H100; compiled once."""
    return functools.cache(lambda preset, kernels="inductor": roofline.kernels_of_block(PRESETS[preset](), IMAGES, "h100", kernels))


@pytest.mark.parametrize("preset", ["dit_s2_imagenet256", "dit_s2_coco256"])
def test_the_operations_of_a_block_are_the_formulas(preset: str, roofline: Any, kernels_of: Any) -> None:
    kernels = kernels_of(preset)
    forward = {kind: sum(k.flops for k in kernels if k.kind == kind and not k.backward) for kind in ("product", "attention")}
    backward = {kind: sum(k.flops for k in kernels if k.kind == kind and k.backward) for kind in ("product", "attention")}
    assert sum(forward.values()) == IMAGES * roofline.forward_flops(PRESETS[preset]())[0]
    # Each product has two in the backward pass; attention computes its weights again.
    assert backward["product"] == 2 * forward["product"] and backward["attention"] == 2.5 * forward["attention"]


def test_the_bytes_of_fused_kernels(roofline: Any, kernels_of: Any) -> None:
    """Those that Triton's interpreter sees the kernels touch (tests/unit/test_fused_norm.py and test_fused_products.py, in
    the same words). Each is launched by the code that Inductor writes for an H100."""
    tokens, width = 256, 384
    rows = IMAGES * tokens
    elements, around = rows * width, 2 * 4 * rows + 2 * width
    sums = 4 * 4 * width * rows // ROWS
    products = [("gelu_product_kernel", 18 * elements + 2 * 4 * width * (width + 1)),
                ("gelu_product_backward_kernel", 18 * elements + 2 * 4 * width * width + 4 * 4 * width * rows // TILE_ROWS)]
    ours = [(k.name, k.bytes) for k in kernels_of("dit_s2_imagenet256", "fused") if k.kind in ("ours", "product with GELU")]
    assert sorted(ours) == sorted([
        *products, *[("residual_norm_kernel", 12 * elements + around + 3 * 2 * IMAGES * width)] * 2,
        *[("residual_norm_backward_kernel", 18 * elements + around + 2 * 2 * IMAGES * width + sums)] * 2,
        ("pack_qkv_kernel", 12 * elements + 3 * 4 * width * rows // PACK_ROWS)])
    plain, fused = (roofline.bytes_per_element(kernels_of("dit_s2_imagenet256", kernels), elements) for kernels in ("inductor", "fused"))
    assert fused < 80 < plain


def test_the_operations_of_fused_kernels(kernels_of: Any) -> None:
    plain, fused = (sum(k.flops for k in kernels_of("dit_s2_imagenet256", kernels)) for kernels in ("inductor", "fused"))
    assert plain == fused


def test_the_report(roofline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["dit_s2_imagenet256", "--gpus", "1", "8", "--images", "32", "--json", str(tmp_path / "report.json")])
    out, report = capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())
    moved = report["bytes_per_element"]
    assert f"\nbytes per residual element and block: {moved:.1f}\n" in out
    # A block reads and writes the stream at least once in each pass, and today's code about 40 times.
    assert 16 < moved < 170
    elements = 32 * 256 * 384
    assert moved == pytest.approx(sum(k["bytes"] for k in report["kernels"] if k["kind"] == "elementwise") / elements)
    one, eight = report["steps"]
    assert one["parts"]["all-gather"] == 0 < eight["parts"]["all-gather"]
    for step in report["steps"]:
        seconds = sum(step["parts"].values())
        assert step["images_per_s"] == pytest.approx(256 / seconds) and 0.02 < step["mfu"] < 0.8
        assert step["hours"] == pytest.approx(PRESETS["dit_s2_imagenet256"]().train.steps * seconds / 3600)
    assert HARDWARE["h100"].name in out
