"""The cost model against DeepSpeed's own calls, and arithmetic done by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from largescale.config.deepspeed import load_ds_config
from largescale.config.presets import PRESETS
from largescale.models.build import blank_condition, build_model, latent_shape
from largescale.monitoring.telemetry import peak_flops
from largescale.planning.cost import BLOCK_CODE, Plan, compute_parts, step
from largescale.planning.hardware import ATTENTION_SHARE, GAP_S, HARDWARE, PRODUCT_SHARE, Rates
from largescale.training.dry_run import prediction_source, span, workload
from tests.conftest import QUIET, RunHere
from tests.ranks import ranks_of
from tests.unit.costs import ROUND, WORK, dit_l

# ---- the step


def test_parts_of_a_step_by_hand() -> None:
    parts = step(replace(WORK, overlap=False), ROUND, 4).parts
    assert parts["compute"] == pytest.approx(3e12 * 8 / (4 * 0.5 * 2e12))
    # an all-reduce sends 2 * 3/4 of 4 GB over each link; 24 bytes a gradient pass through memory
    assert parts["gradient reduction"] == pytest.approx(1.5 * 4e9 / 4e9 + 24e9 / 1e12)
    assert parts["all-gather"] == pytest.approx(0.75 * 2e9 / 4e9)
    assert parts["optimizer"] == pytest.approx((4 + 28 + 12 + 6) * 1e9 / 4 / 1e12)
    assert parts["kernel launches"] == parts["data"] == 0


@pytest.mark.parametrize("all_reduce", [True, False])
def test_nothing_is_sent_by_one_gpu(all_reduce: bool) -> None:
    """Gradients are only read in bf16 and written in fp32, which nothing hides."""
    parts = step(replace(WORK, all_reduce=all_reduce), ROUND, 1).parts
    assert parts["gradient reduction"] == pytest.approx(6e9 / 1e12) and parts["all-gather"] == 0


def test_a_reduction_to_one_rank_sends_everything_once() -> None:
    for n in (2, 4):
        parts = step(replace(WORK, overlap=False, all_reduce=False), ROUND, n).parts
        assert parts["gradient reduction"] == pytest.approx(4e9 / 4e9 + 24e9 / 1e12)


def test_a_ring_leaves_a_node_over_all_its_cards() -> None:
    assert ROUND.link(4) == 4e9 and ROUND.link(8) == 4 * 0.5e9
    assert replace(ROUND, inter_bandwidth=3e9).link(8) == 4e9  # inside it goes no faster
    assert HARDWARE["h100"].link(8) == 450e9 and HARDWARE["h100"].link(16) == 400e9


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("bandwidth", [0.5e9, 4e9, 100e9])
@pytest.mark.parametrize("bucket", [100_000_000, 250_000_000, 10**9])
def test_reduction_hides_behind_backward(micro: int, bandwidth: float, bucket: int) -> None:
    """Against the timeline itself: a full bucket is sent once the one before has arrived, and backward waits for that."""
    hardware = replace(ROUND, intra_bandwidth=bandwidth)
    work = replace(WORK, reduce_bucket_size=bucket, grad_accum_steps=micro)
    whole = step(replace(work, overlap=False), hardware, 4).parts
    backward = 2 / 3 * whole["compute"] / micro
    buckets = 10**9 // bucket
    computed = sent = 0.0
    for _ in range(buckets):
        computed = max(computed + backward / buckets, sent)
        sent = computed + whole["gradient reduction"] / micro / buckets
    assert step(work, hardware, 4).parts["gradient reduction"] == pytest.approx(micro * (sent - backward))


def test_every_micro_step_reduces() -> None:
    plain = replace(WORK, overlap=False)
    once, four = (step(replace(plain, grad_accum_steps=n), ROUND, 4).parts for n in (1, 4))
    assert four["gradient reduction"] == pytest.approx(4 * once["gradient reduction"])
    assert {k: v for k, v in four.items() if k != "gradient reduction"} == {k: v for k, v in once.items() if k != "gradient reduction"}


COUNTING = """
import os, sys
os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed import comm
from deepspeed.runtime.zero import stage_1_and_2
from largescale.engine import deepspeed_patches as engine
from largescale.train import main

engine._broadcast_parts = stage_1_and_2.all_gather_dp_groups  # DeepSpeed's own, as on a GPU

sent = {}
def counted(name):
    real = getattr(comm, name)
    def call(tensor, *args, **more):
        if tensor.numel() > 1000:
            key = f"{name} {tensor.dtype}".replace("torch.", "")
            calls, elements = sent.get(key, (0, 0))
            sent[key] = calls + 1, elements + tensor.numel()
        return real(tensor, *args, **more)
    setattr(comm, name, call)

for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather", "all_gather_into_tensor"):
    counted(name)
status = main(sys.argv[1:])
print(sorted(sent.items()))
sys.exit(status)
"""


@pytest.mark.parametrize("switches", ["as shipped", "to the owner, in bf16"])
def test_deepspeed_sends_what_is_counted(switches: str, blobs: Path, tmp_path: Path) -> None:
    """What the model is built on, in 2 steps of 4 micro steps: every gradient is all-reduced at every micro step, though
    the JSON says reduce_scatter, and the weights are gathered once a step, in one message. With both of DeepSpeed's switches
    each part is reduced to the rank that needs it, in half as many bytes (docs/benchmarks.md has the table)."""
    ds = load_ds_config("ds_configs/zero2_bf16.json")
    if switches != "as shipped":
        ds["zero_optimization"]["use_multi_rank_bucket_allreduce"] = False
        ds["communication_data_type"] = "bf16"
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds))
    done = ranks_of("-c", COUNTING, "debug", "--data.path", blobs, "--output", tmp_path / "run", *QUIET, "--train.steps", 2,
                    "--train.micro-batch-size", 2, "--train.ds-config", path)
    assert [rank.returncode for rank in done] == [0, 0], done[0].stderr
    work = workload(PRESETS["debug"](), ds, 4)
    n, kind = work.parameters, {4: "float32", 2: "bfloat16"}[work.reduce_bytes]
    reduced = (f"all_reduce {kind}", (8, 8 * n)) if work.all_reduce else (f"reduce {kind}", (16, 8 * n))
    for rank in done:
        assert rank.stdout.splitlines()[-1] == str([("all_gather_into_tensor bfloat16", (2, 2 * n)), reduced])


def test_data_that_come_too_slowly() -> None:
    work = replace(WORK, image_bytes=1e9)
    fast, slow = (step(work, replace(ROUND, data_bandwidth=rate), 8) for rate in (1e12, 0.1e9))
    assert fast.parts["data"] == 0
    assert slow.seconds == pytest.approx(8e9 / (2 * 0.1e9)) and slow.bottleneck == "data"
    assert slow.data_rate == pytest.approx(2 * 0.1e9)


def test_small_micro_batches_wait_for_launches() -> None:
    work = replace(WORK, flops_per_image=1e6)
    assert step(work, replace(ROUND, launch_s=1e-3), 4).parts["kernel launches"] == pytest.approx(1.0, rel=1e-3)
    assert step(WORK, replace(ROUND, launch_s=1e-3), 4).parts["kernel launches"] == 0  # hidden behind 6 s of work


def test_activations_computed_again() -> None:
    config, ds = dit_l()
    plain, again = (workload(replace(config, train=replace(config.train, activation_checkpointing=on)), ds, 1) for on in (False, True))
    assert plain.flops_per_image == again.flops_per_image and plain.flops_again == 0
    assert 0.32 < again.flops_again / again.flops_per_image < 1 / 3
    assumed = replace(HARDWARE["h100"], mfu=0.5)
    ratio = step(again, assumed, 8).parts["compute"] / step(plain, assumed, 8).parts["compute"]
    assert ratio == pytest.approx(1 + again.flops_again / again.flops_per_image)
    assert plain.backward_share == pytest.approx(2 / 3) and again.backward_share == pytest.approx(3 / 4, rel=0.01)


def test_products_of_float32() -> None:
    """TF32 at half the rate, without it the units of float32; twice the bytes of half precision."""
    config, _ = dit_l()
    half = Plan(workload(config, load_ds_config("ds_configs/zero2_fp32.json"), 1), HARDWARE["a100"], 8, 1000, 1000)
    tf32, fp32 = half.in_fp32(tf32=True), half.in_fp32(tf32=False)
    of = [compute_parts(plan.work, plan.hardware, 8) for plan in (half, tf32, fp32)]
    for part in ("matrix products", "attention"):
        assert of[1][part] == pytest.approx(2 * of[0][part]) and of[2][part] == pytest.approx(270 / 19.5 * of[0][part])
    assert of[1]["elementwise"] == of[2]["elementwise"] == pytest.approx(2 * of[0]["elementwise"])
    assert tf32.hardware.peak_flops == 156e12 and fp32.hardware.peak_flops == 19.5e12 and half.hours < tf32.hours < fp32.hours
    assert tf32.work.weight_bytes == 4 and not tf32.hardware.rates.measured  # type: ignore[union-attr]


def test_an_answer_of_the_model() -> None:
    """A third of the operations of forward and backward pass of an image, on one GPU."""
    plan = Plan(WORK, ROUND, 4, 10, 10)
    assert plan.sampling_seconds == pytest.approx(1e12 / (0.5 * 2e12))
    assert replace(plan, gpus=8).sampling_seconds == pytest.approx(plan.sampling_seconds)


def test_the_headline_workload() -> None:
    config, ds = dit_l()
    work = workload(config, ds, 1)
    assert (work.parameters, work.weight_bytes, work.reduce_bytes, work.reduce_bucket_size) == (457_840_672, 2, 4, 50_000_000)
    assert work.image_bytes == 2 * 8 * 32 * 32 and work.overlap and work.all_reduce
    assert not workload(replace(config, train=replace(config.train, device="cpu")), ds, 1).overlap
    reduced = {**ds, "zero_optimization": {**ds["zero_optimization"], "use_multi_rank_bucket_allreduce": False}}
    assert not workload(config, reduced, 1).all_reduce
    assert workload(config, {k: v for k, v in ds.items() if k != "communication_data_type"}, 1).reduce_bytes == 2


class Attention(torch.autograd.Function):
    """One kernel in each direction, as on a GPU; on the meta device it is spelt out in some 16 operations."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *map(torch.empty_like, ctx.saved_tensors), None


@pytest.mark.parametrize("preset", ["dit_l2_imagenet256", "dit_l2_coco256"])
def test_what_an_eager_block_moves(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted anew: every operation reads its arguments and writes its result once."""
    none = {"view", "t", "transpose", "permute", "expand", "split", "unbind", "detach", "unsqueeze", "squeeze", "_unsafe_view", "empty_like"}

    class Count(TorchDispatchMode):
        calls = moved = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
            self.calls += name not in none
            if name not in {*none, "mm", "addmm", "bmm"}:
                self.moved += sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor))
            return result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda q, k, v, attn_mask=None: Attention.apply(q, k, v, attn_mask))
    config, counts = PRESETS[preset](), []
    for depth in (1, 2):
        with torch.device("meta"):
            model = build_model(replace(config.model, depth=depth)).to(torch.bfloat16)
            x, t = torch.empty(32, *latent_shape(config.model)), torch.zeros(32, dtype=torch.long)
            with Count() as count:
                output = model(x, t, blank_condition(config.model, 32))
                forward = count.moved
                output.sum().backward()
        counts.append((forward, count.moved - forward, count.calls))
    (forward, backward, calls), captions = (b - a for a, b in zip(*counts, strict=True)), config.model.max_caption_tokens > 0
    code, elements = BLOCK_CODE["eager", captions], 32 * 256 * 1024
    assert (code.forward_bytes, code.backward_bytes) == (pytest.approx(forward / elements, rel=0.01), pytest.approx(backward / elements, rel=0.01))
    assert code.kernels == calls + 2 * (1 + captions)


def test_parts_of_computing_by_hand() -> None:
    config, ds = dit_l()
    work, card = workload(config, ds, 2), HARDWARE["h100"]
    assert work.blocks and card.rates
    parts = compute_parts(work, card, 4)  # 64 images
    tokens, width, depth = 256, 1024, 24
    products = depth * (tokens * 2 * 12 * width**2 + 2 * 6 * width**2)
    assert parts["matrix products"] == pytest.approx(64 * 3 * products / (798e12 * PRODUCT_SHARE))
    assert parts["attention"] == pytest.approx(64 * 3.5 * depth * 4 * tokens**2 * width / (798e12 * ATTENTION_SHARE))
    assert parts["elementwise"] == pytest.approx(64 * depth * tokens * width * 151.1 / 3e12)
    assert parts["gaps"] == pytest.approx(2 * depth * 39 * GAP_S)
    around = work.flops_per_image - 3 * (work.blocks.product_flops + work.blocks.attention_flops)
    assert parts["embedding and final layer, fp32"] == pytest.approx(64 * around / 67e12)
    assert step(work, card, 4).parts["compute"] == pytest.approx(sum(parts.values()))
    assert compute_parts(work, replace(card, mfu=0.25), 4) == {"compute": pytest.approx(64 * work.flops_per_image / (0.25 * 989e12))}


def test_what_is_predicted_follows_the_settings() -> None:
    """Fused kernels move less, eager code more; a network that is not counted is assumed, and said to be."""
    config, ds = dit_l()
    mfu = {}
    for name, changes in {"inductor": {}, "fused": {"kernels": "fused"}, "eager": {"compile": "off"}, "again": {"activation_checkpointing": True}}.items():
        work = workload(replace(config, train=replace(config.train, **changes)), ds, 1)  # type: ignore[arg-type]
        mfu[name] = Plan(work, HARDWARE["h100"], 8, 1000, 100).mfu
    assert mfu["fused"] > mfu["inductor"] > max(mfu["eager"], mfu["again"])
    unet = PRESETS["edm_ddpmpp_cifar10"]()
    plan = Plan(workload(unet, ds, 1), HARDWARE["h100"], 8, 1000, 100)
    assert prediction_source(plan) == "assumed: forward and backward reach 50 % of the peak" and plan.work.blocks is None
    slow = replace(HARDWARE["h100"], rates=Rates(products=400e12, copies=1e12, fp32=67e12, measured=False))
    assert "400 TFLOP/s and 1.0 TB/s (assumed)" in prediction_source(Plan(work, slow, 8, 1000, 100))


def test_peaks_are_those_of_the_log() -> None:
    assert [h.peak_flops for h in HARDWARE.values()] == [peak_flops(f"NVIDIA {h.name} 80GB", "bf16") for h in HARDWARE.values()]


def test_computing_is_no_bottleneck() -> None:
    s = step(WORK, ROUND, 4)
    assert max(s.parts, key=s.parts.__getitem__) == "compute" and s.bottleneck == "gradient reduction"


# ---- what --dry-run says


def test_dry_run_costs_the_run_at_hand(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    said = run_here("--dry-run", preset="dit_l2_imagenet256", data=None).err
    config, ds = dit_l()
    plan = Plan(workload(config, ds, 1), HARDWARE["h100"], 16, 2_000_000, 5_000)
    slow = [f"{plan.at(mfu).hours:,.0f} h" for mfu in (0.25, 0.12)]
    assert plan.hours < plan.at(0.25).hours < plan.at(0.12).hours
    assert (f"time: {plan.hours:,.0f} h at an MFU of {100 * plan.mfu:.0f} %, predicted; {' to '.join(slow)} where forward and backward reach "
            "25 to 12 % of the peak, as in published trainers; on 16 x H100, never measured on a GPU here") in said
    assert "predicted from 151 bytes per residual element and block" in said and "798 TFLOP/s and 3.0 TB/s (measured on such a card)" in said
    assert f"first bottleneck beside it: {plan.step.bottleneck}" in said
    assert "disk: 8.24 GB a checkpoint, 363 GB for the 44 that are kept: the last 3, 40 for ever, 1 of a stop" in said
    assert f"best every {plan.best_every:,} steps (Daly); configured: 5,000" in said
    assert "pack data/imagenet256 with python -m data_prep.imagenet" in said
    assert "too much for the" not in said


def test_dry_run_of_minutes(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    said = run_here("--dry-run", preset="sit_b2_ffhq256", data=None).err
    assert re.search(r"time: \d\d min at an MFU of \d\d %, predicted; \d\d min to [\dh min]+ where", said)
    assert [span(hours) for hours in (0.002, 0.5, 1.99, 2.0, 1234.5)] == ["7.2 s", "30 min", "1 h 59 min", "2 h", "1,234 h"]


def test_dry_run_of_what_does_not_fit(run_here: RunHere) -> None:
    said = run_here("--dry-run", preset="dit_l2_imagenet256", data=None).err
    assert "too much for the 79 GiB of one H100: try --train.micro-batch-size 128 (or auto) or --train.activation-checkpointing" in said
    auto = run_here("--dry-run", "--train.micro-batch-size", "auto", preset="dit_l2_imagenet256", data=None).err
    assert "auto: 128 by the estimate" in auto and "256 = 128 x 2 accumulation" in auto and "too much for the" not in auto
    again = run_here("--dry-run", "--train.activation-checkpointing", preset="dit_l2_imagenet256", data=None).err
    assert "GFLOP per image, 161" in again and "GiB  in all without" in again and "too much for the" not in again


def test_dry_run_invents_no_gpu_and_no_peak(run_here: RunHere) -> None:
    for precision in ("fp32", "bf16"):
        said = run_here("--dry-run", "--train.ds-config", f"ds_configs/zero2_{precision}.json").err
        assert re.search(r"disk: [\d.]+ [KM]B a checkpoint", said) and "time:" not in said and "H100" not in said
    said = run_here("--dry-run", "--train.ds-config", "ds_configs/zero2_fp32.json", preset="dit_l2_imagenet256", data=None).err
    assert "disk: 9.16 GB a checkpoint" in said and "time:" not in said  # the peak is that of half precision
