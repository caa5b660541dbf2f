"""benchmarks/roofline.py, which needs no GPU: what it counts is what the formulas say."""

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Inductor writes code for GPUs with Triton only")
from largescale.config.deepspeed import load_ds_config
from largescale.config.presets import PRESETS
from largescale.models.fused_norm import ROWS
from largescale.models.fused_products import PACK_ROWS, TILE_ROWS
from largescale.planning.cost import BLOCK_CODE, Plan, compute_parts
from largescale.planning.hardware import HARDWARE
from largescale.training.dry_run import workload

ROOT = Path(__file__).parents[2]
IMAGES = 32


@pytest.fixture(scope="module")
def roofline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("roofline")


@pytest.fixture(scope="module")
def kernels_of(roofline: Any) -> Any:
    """(preset, train.kernels) -> the kernels of a block, on an H100; compiled once. The sizes cost nothing: nothing is computed."""
    return functools.cache(lambda preset, kernels: roofline.kernels_of_block(PRESETS[preset](), IMAGES, "h100", kernels))


@pytest.mark.parametrize("preset", ["dit_l2_imagenet256", "dit_l2_coco256"])
def test_the_operations_of_a_block_are_the_formulas(preset: str, roofline: Any, kernels_of: Any) -> None:
    kernels = kernels_of(preset, "inductor")
    forward = {kind: sum(k.flops for k in kernels if k.kind == kind and not k.backward) for kind in ("product", "attention")}
    backward = {kind: sum(k.flops for k in kernels if k.kind == kind and k.backward) for kind in ("product", "attention")}
    assert sum(forward.values()) == IMAGES * roofline.forward_flops(PRESETS[preset]().model)[0]
    # Each product has two in the backward pass; attention computes its weights again.
    assert backward["product"] == 2 * forward["product"] and backward["attention"] == 2.5 * forward["attention"]


def test_the_bytes_of_fused_kernels(roofline: Any, kernels_of: Any) -> None:
    """Those that Triton's interpreter sees the kernels touch (tests/unit/test_fused_norm.py and test_fused_products.py, in
    the same words). Each is launched by the code that Inductor writes for an H100."""
    tokens, width = 256, 1024
    rows = IMAGES * tokens
    elements, around = rows * width, 2 * 4 * rows + 2 * width
    sums = 4 * 4 * width * rows // ROWS
    products = [("gelu_product_kernel", 18 * elements + 2 * 4 * width * (width + 1)),
                ("gelu_product_backward_kernel", 18 * elements + 2 * 4 * width * width + 4 * 4 * width * rows // TILE_ROWS)]
    ours = [(k.name, k.bytes) for k in kernels_of("dit_l2_imagenet256", "fused") if k.kind in ("ours", "product with GELU")]
    assert sorted(ours) == sorted([
        *products, *[("residual_norm_kernel", 12 * elements + around + 3 * 2 * IMAGES * width)] * 2,
        *[("residual_norm_backward_kernel", 18 * elements + around + 2 * 2 * IMAGES * width + sums)] * 2,
        ("pack_qkv_kernel", 12 * elements + 3 * 4 * width * rows // PACK_ROWS)])
    plain, fused = (roofline.bytes_per_element(kernels_of("dit_l2_imagenet256", kernels), elements) for kernels in ("inductor", "fused"))
    assert fused < 80 < plain


def test_the_operations_of_fused_kernels(kernels_of: Any) -> None:
    plain, fused = (sum(k.flops for k in kernels_of("dit_l2_imagenet256", kernels)) for kernels in ("inductor", "fused"))
    assert plain == fused


@pytest.mark.parametrize(("kernels", "captions"), [key for key in BLOCK_CODE if key[0] != "eager"])
def test_a_plan_counts_what_the_code_moves(kernels: str, captions: bool, roofline: Any, kernels_of: Any) -> None:
    """The constants of largescale/planning/cost.py, by which a dry run predicts without compiling."""
    found = kernels_of("dit_l2_coco256" if captions else "dit_l2_imagenet256", kernels)
    elements, code = IMAGES * 256 * 1024, BLOCK_CODE[kernels, captions]
    forward, backward = (roofline.bytes_per_element([k for k in found if k.backward == half], elements) for half in (False, True))
    assert (code.forward_bytes, code.backward_bytes) == (pytest.approx(forward, rel=0.01), pytest.approx(backward, rel=0.01))
    assert code.kernels == len(found)


def test_a_plan_predicts_what_the_roofline_does(roofline: Any, kernels_of: Any) -> None:
    """On 8 GPUs, whose micro batch is what is compiled here."""
    config = PRESETS["dit_l2_imagenet256"]()
    finer = roofline.predict(config, "h100", 8, lambda images: kernels_of(config.name, "inductor"))
    work = workload(config, load_ds_config(config.train.ds_config), 1)
    plan = Plan(work, HARDWARE["h100"], 8, config.train.steps, config.checkpoint.every)
    assert finer.micro_batch == IMAGES and plan.mfu == pytest.approx(finer.mfu, rel=0.03)
    parts = compute_parts(work, HARDWARE["h100"], 8)
    assert parts == {name: pytest.approx(finer.parts[name], rel=0.06) for name in parts}


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
