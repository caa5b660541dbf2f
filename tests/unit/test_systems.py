"""SiT, EDM and every baseline in the trainer: what they draw, that they go on where they were, in every precision."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.sample import Sample, Sampler
from largescale import status
from largescale.checkpoint.files import CheckpointDir
from largescale.data.augment import augment
from largescale.data.format import DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.diffusion.noise_levels import LossSecondMoment
from largescale.models.unet import DDPMpp
from largescale.monitoring.telemetry import read_metrics
from largescale.randomness import Draws
from largescale.training.step import TrainStep
from tests.conftest import RunHere, assert_same_run, cut, ds_json, trace

RESAMPLED = ("--noise.sampling", "loss_second_moment", "--diffusion.timesteps", 10)
SYSTEMS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "sit": ("debug_sit", ()),
    "sit gvp": ("debug_sit", ("--diffusion.interpolant", "gvp", "--model.no-learn-sigma")),
    "edm": ("debug_edm", ()),
    "edm augmented": ("debug_edm", ("--model.unet.augment-dim", 9, "--data.augment", 0.5)),
    "edm with a DiT": ("debug", ("--diffusion.objective", "edm", "--model.no-learn-sigma")),
    "hard first": ("debug", ("--curriculum.order", "hard_first")),
    "separate stages": ("debug", ("--curriculum.stages", "separate")),
    "one cluster": ("debug", ("--curriculum.pacing", "none", "--curriculum.only-cluster", 2)),
    "naive": ("debug", ("--curriculum.pacing", "fixed", "--curriculum.interval", 3)),
    "resampled": ("debug", RESAMPLED),
    "resampled sit": ("debug_sit", RESAMPLED),
    "min-SNR": ("debug_sit", ("--noise.weighting", "min_snr")),
    "P2": ("debug_edm", ("--noise.weighting", "p2")),
    "SpeeD": ("debug", ("--noise.sampling", "speed", "--noise.weighting", "p2")),
    "logit-normal": ("debug_sit", ("--noise.sampling", "logit_normal")),
    "shifted beta, smoothed": ("debug_sit", ("--noise.sampling", "beta", "--noise.beta-alpha", 2, "--noise.beta-beta", 0.5, "--noise.shift", 3,
                                             "--curriculum.loss-smoothing", 0.6)),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_goes_on_where_it_was(name: str, run_here: RunHere, tmp_path: Path) -> None:
    preset, args = SYSTEMS[name]
    args = ("--train.steps", 16, "--curriculum.patience", 1, "--checkpoint.every", 4, "--checkpoint.keep-last", 100, *args)
    truth = run_here(*args, preset=preset, output=tmp_path / "truth")
    assert truth.code == 0, truth.err
    for step in (0, 4, 8, 12):
        run = tmp_path / f"cut{step}"
        cut(truth.run, run, step)
        assert f"resumed {run} at step {step}," in run_here(*args, preset=preset, output=run).err
        assert_same_run(run, truth.run)
        shutil.rmtree(run)


def test_resampling_is_lost_with_its_state(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above would see it."""
    args = ("--train.steps", 24, "--checkpoint.every", 12, "--curriculum.pacing", "none", *RESAMPLED)
    truth = run_here(*args, output=tmp_path / "truth").run
    state = CheckpointDir.at(truth, 12).manifest()["state"]["noise_sampler"]
    assert state, "its history is in the checkpoint"
    cut(truth, tmp_path / "cut", 12)
    monkeypatch.setattr(LossSecondMoment, "load_state_dict", lambda self, state: None)
    run_here(*args, output=tmp_path / "cut")
    assert trace(tmp_path / "cut") != trace(truth)


def clusters_drawn(rows: list[dict[str, Any]]) -> list[set[int]]:
    return [{int(key.removeprefix("cluster/C")) for key in row if key.startswith("cluster/C")} for row in rows]


@pytest.mark.parametrize("preset", ["debug", "debug_sit", "debug_edm"])
@pytest.mark.parametrize("order, stages", [("easy_first", "accumulating"), ("hard_first", "accumulating"),
                                           ("easy_first", "separate"), ("hard_first", "separate")])
def test_only_active_noise_levels_are_drawn(preset: str, order: str, stages: str, run_here: RunHere) -> None:
    """Each row's clusters are those of the stage that its step was drawn in: the one in force after the step before."""
    rows = run_here("--train.steps", 8, "--curriculum.pacing", "fixed", "--curriculum.interval", 1, "--curriculum.order", order,
                    "--curriculum.stages", stages, "--train.global-batch-size", 64, preset=preset).trace()
    of_stages: dict[tuple[str, str], list[set[int]]] = {
        ("easy_first", "accumulating"): [{5}, {4, 5}, {3, 4, 5}, {2, 3, 4, 5}],
        ("hard_first", "accumulating"): [{1}, {1, 2}, {1, 2, 3}, {1, 2, 3, 4}],
        ("easy_first", "separate"): [{5}, {4}, {3}, {2}, {1}],
        ("hard_first", "separate"): [{1}, {2}, {3}, {4}, {5}],
    }
    expected = of_stages[order, stages]
    assert clusters_drawn(rows) == expected + [{1, 2, 3, 4, 5}] * (8 - len(expected))


def test_one_cluster_from_start_to_end(run_here: RunHere) -> None:
    rows = run_here("--train.steps", 3, "--curriculum.pacing", "none", "--curriculum.only-cluster", 4).trace()
    assert clusters_drawn(rows) == [{4}] * 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("preset", ["debug_sit", "debug_edm"])
def test_in_half_precision(preset: str, precision: str, run_here: RunHere, tmp_path: Path) -> None:
    """Close to fp32, on the same inputs; the weights that train are half, the master weights not."""
    args = ("--train.steps", 4, "--train.global-batch-size", 8, "--curriculum.pacing", "none")  # fp16 is slow on a CPU
    full = run_here(*args, preset=preset, output=tmp_path / "fp32").trace()
    half = run_here(*args, "--train.ds-config", ds_json(precision, tmp_path), preset=preset, output=tmp_path / precision)
    assert half.code == 0, half.err
    losses = [[row["loss"] for row in rows] for rows in (full, half.trace())]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("preset, sampler, steps", [("debug_sit", "sde", 250), ("debug_edm", "heun", 18)])
def test_watched_and_sampled(preset: str, sampler: str, steps: int, run_here: RunHere, tmp_path: Path) -> None:
    """The reference loss, a preview, and eval.sample with the objective's own sampler."""
    outcome = run_here("--train.steps", 4, "--telemetry.reference-every", 4, "--telemetry.preview-every", 4, preset=preset)
    assert outcome.code == 0, outcome.err
    assert len([row for row in read_metrics(outcome.run) if "reference/C5" in row]) == 1
    assert len(list((outcome.run / "samples").glob("*.png"))) == 1
    made = Sampler(Sample(outcome.run, tmp_path / "samples", num_samples=10, steps=6, compile="off"))
    assert (made.sampler, made.trained.objective.default_steps) == (sampler, steps)
    made()
    assert (tmp_path / "samples" / "cfg1.5" / "manifest.json").exists()


@pytest.mark.parametrize("change, refused", [
    (("--diffusion.objective", "flow"), "diffusion.objective: gaussian -> flow"),
    (("--noise.sampling", "logit_normal"), "noise.sampling: uniform -> logit_normal"),
    (("--noise.weighting", "p2"), "noise.weighting: none -> p2"),
    (("--curriculum.order", "hard_first"), "curriculum.order: easy_first -> hard_first"),
    (("--curriculum.stages", "separate"), "curriculum.stages: accumulating -> separate"),
])
def test_a_checkpoint_of_another_run_is_refused(change: tuple[str, str], refused: str, run_here: RunHere) -> None:
    assert run_here("--train.steps", 2).code == 0
    again = run_here("--train.steps", 4, *change)
    assert again.code == 2 and refused in again.err


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TrainStep, Any, Draws, int, Any]]:
    """What every call of `TrainStep.micro_step_losses` was given and gave."""
    seen: list[tuple[TrainStep, Any, Draws, int, Any]] = []
    losses = TrainStep.micro_step_losses

    def recording(self: TrainStep, model: Any, batch: Any, draws: Draws, k: int) -> Any:
        result = losses(self, model, batch, draws, k)
        seen.append((self, batch, draws, k, result))
        return result

    monkeypatch.setattr(TrainStep, "micro_step_losses", recording)
    return seen


@pytest.mark.parametrize("preset", ["debug", "debug_sit", "debug_edm"])
def test_how_a_loss_is_put_together(preset: str, run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """importance (w mse + vb), w from the SNR; resampling is told it without the importance, of all rows in order."""
    seen, told = recorded(monkeypatch), []
    observe = LossSecondMoment.observe
    monkeypatch.setattr(LossSecondMoment, "observe", lambda self, *args: told.append(args) or observe(self, *args))
    args = ("--train.steps", 24, "--curriculum.pacing", "none", "--noise.weighting", "min_snr", "--noise.min-snr-gamma", 0.1,
            "--train.micro-batch-size", 8)
    assert run_here(*args, *RESAMPLED, preset=preset).code == 0
    assert len(seen) == 48 and len(told) == 24
    for i, (step, _, _, k, (losses, t, importance)) in enumerate(seen):
        if preset == "debug":
            snr = step.objective.log_snr(t).exp()
            weight = torch.minimum(snr, torch.tensor(0.1)) / snr
        elif preset == "debug_sit":
            weight = torch.minimum((t / (1 - t)) ** 2, torch.tensor(0.1)) * (1 - t) ** 2
        else:
            weight = torch.minimum(t**-2, torch.tensor(0.1)) * (0.5 * t) ** 2 / (t**2 + 0.25)
        before = weight * losses.mse + losses.vb
        torch.testing.assert_close(losses.loss.double(), importance * before, rtol=1e-5, atol=1e-7)
        bins, of_rows = told[i // 2]
        mine = slice(8 * k, 8 * k + 8)
        assert of_rows[mine] == pytest.approx(before.tolist(), rel=1e-5)
        assert bins[mine] == (step.objective.noise_level(t) * 10).floor().tolist()
    assert len({x for *_, (_, _, importance) in seen[-8:] for x in importance.tolist()}) > 3  # it has warmed up


def test_the_network_is_told_how_its_image_was_augmented(run_here: RunHere, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the labels of the very draws, row by row; and each micro step drops other activations, derived from the step."""
    seen, given, seeds = recorded(monkeypatch), [], []
    forward, seed = DDPMpp.forward, torch.manual_seed

    def telling(self: DDPMpp, x: torch.Tensor, t: torch.Tensor, y: Any, augment_labels: Any = None) -> torch.Tensor:
        if not x.is_meta:  # as in the estimate of the memory
            given.append(augment_labels)
        return forward(self, x, t, y, augment_labels)

    monkeypatch.setattr(DDPMpp, "forward", telling)
    monkeypatch.setattr(torch, "manual_seed", lambda value: seeds.append(value) or seed(value))
    args = ("--train.steps", 3, "--train.micro-batch-size", 8, "--model.unet.augment-dim", 9, "--data.augment", 0.5)
    assert run_here(*args, preset="debug_edm").code == 0
    assert len(given) == 6 and len(set(seeds[-6:])) == 6
    for (_, batch, draws, k, _), labels in zip(seen, given, strict=True):
        rows = draws.augment[8 * k : 8 * k + 8]  # type: ignore[index]
        x = batch["latent"][k].float() / 127.5 - 1
        _, expected = augment(x, rows[:, :9], torch.special.ndtri(rows[:, 9:]), 0.5)
        assert torch.equal(labels, expected) and labels.any()
    first = seeds[-6:]
    assert run_here(*args, preset="debug_edm", output=seen[0][0].config.run_dir.parent / "again").code == 0
    assert seeds[-6:] == first


def test_latents_are_not_augmented(run_here: RunHere, blobs: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "latents", DatasetInfo("latents", "latents", (1, 16, 16), 10), rows_per_shard=20) as writer:
        for i in range(20):
            writer.write(id=str(i), latent=np.zeros((1, 16, 16), np.float16), label=i % 10)
    refused = run_here("--model.unet.augment-dim", 9, "--data.augment", 0.5, preset="debug_edm", data=tmp_path / "latents")
    assert refused.code == 2 and "holds latents, and augmentation is of pixels" in refused.err


def test_another_micro_batch_drops_other_activations_which_is_said(run_here: RunHere, tmp_path: Path) -> None:
    for preset, said in (("debug_edm", True), ("debug_sit", False)):
        args = ("--train.steps", 2, "--checkpoint.every", 1, "--train.micro-batch-size")
        assert run_here(*args, 8, preset=preset, output=tmp_path / preset).code == 0
        again = run_here(*args, 4, "--train.steps", 3, preset=preset, output=tmp_path / preset)
        assert again.code == 0 and ("train.micro_batch_size: 8 -> 4" in again.err) == said


@pytest.mark.parametrize("settings, said", [
    (("--curriculum.order", "hard_first"), "training on u in [0, 0."),
    (("--curriculum.stages", "separate"), "training on u in ["),
    (("--curriculum.pacing", "none", "--curriculum.only-cluster", 2), "training on u in [0.2, 0.4)"),
    (("--curriculum.pacing", "none"), "complete: all noise levels"),
])
def test_inspect_tells_the_active_noise_levels(settings: tuple[Any, ...], said: str, run_here: RunHere,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here("--train.steps", 4, "--curriculum.patience", 0, *settings)
    last = outcome.trace()[-1]
    status.main([str(outcome.run)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("curriculum"))
    assert said in line
    if "training on" in line:
        assert f"[{last['curriculum/lowest']:.3g}, {last['curriculum/highest']:.3g})" in line


def test_inspect_names_the_network(run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here("--train.steps", 1, preset="debug_edm")
    status.main([str(outcome.run)])
    out = capsys.readouterr().out
    assert "DDPM++, 1 blocks a resolution, 16 channels times [1, 2], on (1, 16, 16)" in out and "DiT" not in out
