"""python -m largescale.export RUN --format diffusers, from a run to a folder and back."""

import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from eval import sample
from largescale import convert, export
from largescale.checkpoint.export_folder import write_export
from largescale.checkpoint.files import checkpoints, named_weights
from largescale.checkpoint.weights import load_trained
from largescale.config.serialise import to_dict
from largescale.host.files import sole_writer, visible
from largescale.interop.pipeline_folder import is_pipeline
from largescale.randomness import stream_seed
from tests.conftest import RunHere
from tests.diffusers_models import save_pipeline, their_dit
from tests.lazy import Lazy
from tests.random_models import STOCK, make_trained, make_vae
from tests.unit.exported_pipelines import content, modules_of_folders  # noqa: F401

diffusers = Lazy("diffusers")

FILES = ["README.md", "largescale.json", "largescale_dit_pipeline.py", "model_index.json", "scheduler", "transformer"]


def main(*args: object) -> int:
    return export.main([*map(str, args), "--format", "diffusers"])


def test_from_a_run_to_images_that_are_those_of_eval_sample(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network that was trained, the folder, diffusers' own loading, and the files of eval.sample."""
    run = run_here("--train.steps", 20, "--optimizer.ema-decay", 0.5, "--curriculum.pacing", "none").run
    assert main(run) == 0
    out = run / "diffusers"
    assert capsys.readouterr().out == f"EMA weights, as a diffusers pipeline: {out}, how to open it: {out}/README.md\n"
    assert [path.name for path in visible(out)] == FILES and len({path.stat().st_mode for path in out.rglob("*") if path.is_file()}) == 1
    pipe = diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    for name in ("ddim", "dpm++2m"):
        if name == "dpm++2m":
            pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        assert sample.main([str(run), "--out", str(tmp_path / name), "--num-samples", "12", "--sampler", name, "--steps", "20", "--cfg-scale", "2.0",
                            "--device", "cpu", "--compile", "off", "--also", "npz"]) == 0
        with np.load(tmp_path / name / "cfg2.0/samples.npz") as file:
            drawn, labels = file["arr_0"][..., :1].astype(float), file["arr_1"].tolist()
        generators = [torch.Generator().manual_seed(stream_seed(0, "sample", i)) for i in range(12)]
        images = 255 * pipe(class_labels=labels, guidance_scale=2.0, generator=generators, num_inference_steps=20, output_type="np").images
        # eval.sample has rounded to bytes.
        assert np.abs(drawn - images).max() < 0.5 + 255e-4 and drawn.std() > 10


def test_the_card_is_right_about_how_to_use_it(run_here: RunHere, tmp_path: Path) -> None:
    """Its lines run as they are printed, but for the folders' names."""
    run = run_here("--train.steps", 3).run
    assert main(run) == 0
    text = (run / "diffusers/README.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n)+", text, re.MULTILINE) if block.strip()]
    python = blocks[0].replace("FOLDER", str(run / "diffusers")).replace("num_inference_steps=50", "num_inference_steps=2")
    names: dict[str, Any] = {}
    exec(python, names)
    assert names["image"].size == (16, 16) and type(names["pipe"].scheduler) is diffusers.DPMSolverMultistepScheduler
    assert names["pipe"](class_labels=[3], num_inference_steps=3).images[0].size == (16, 16)
    commands = blocks[1].replace("FOLDER", str(run / "diffusers")).replace("EXPORT", str(tmp_path / "back")).replace("--out samples", f"--out {tmp_path}/samples")
    for command, program in zip(commands.strip().splitlines(), (convert.main, sample.main), strict=True):
        _, _, _, *arguments = command.split()
        assert program([*arguments, *(["--steps", "2", "--device", "cpu"] if program is sample.main else [])]) == 0
    assert (tmp_path / "samples/cfg1.5/grid.png").exists()


@pytest.mark.parametrize(("settings", "ddim"), [(STOCK, "ddim20"), ({}, "20")], ids=["stock", "own"])
def test_from_an_export_of_latents_to_images(settings: dict[str, Any], ddim: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With diffusers' own class where it has the frequencies of the network, and its VAE from where the data were packed with it."""
    trained, vae = make_trained(**settings), make_vae(tmp_path / "vae")
    trained.info["data_info"] |= {"encoders": {"vae": vae.identity}, "scale_factor": vae.normalization.scale_factor}
    write_export(tmp_path / "export", dict(trained.model.state_dict()),
                 {"config": to_dict(trained.config), **trained.info, "made_with": {"vae": str(tmp_path / "vae")}})
    assert main(tmp_path / "export", "--out", tmp_path / "out", "--scheduler", "dpm++2m") == 0
    shutil.rmtree(tmp_path / "vae")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", trust_remote_code=settings != STOCK)
    assert (type(pipe) is diffusers.DiTPipeline) == (settings == STOCK) and type(pipe.scheduler) is diffusers.DPMSolverMultistepScheduler
    pipe.set_progress_bar_config(disable=True)
    schedulers = {"dpm++2m": pipe.scheduler, "ddim": diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, timestep_spacing="leading" if settings == STOCK else "linspace")}
    for name, steps in (("dpm++2m", "20"), ("ddim", ddim)):
        assert sample.main([str(tmp_path / "export"), "--vae", str(tmp_path / "out/vae"), "--out", str(tmp_path / name), "--num-samples", "3",
                            "--classes", "1", "7", "9", "--sampler", name, "--steps", steps, "--cfg-scale", "2.0", "--device", "cpu", "--also", "npz"]) == 0
        with np.load(tmp_path / name / "cfg2.0/samples.npz") as file:
            drawn = file["arr_0"].astype(float)
        pipe.scheduler = schedulers[name]
        generators = [torch.Generator().manual_seed(stream_seed(0, "sample", i)) for i in range(3)]
        images = 255 * pipe(class_labels=[1, 7, 9], guidance_scale=2.0, generator=generators, num_inference_steps=20, output_type="np").images
        assert np.abs(drawn - images).max() < 0.5 + 255e-4 and drawn.std() > 10
    # Converted back, it is drawn from with the VAE that the folder carries.
    assert convert.main([str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    assert load_trained(tmp_path / "back").info["made_with"] == {"vae": str(tmp_path / "out/vae")}
    assert sample.main([str(tmp_path / "back"), "--out", str(tmp_path / "again"), "--num-samples", "3", "--classes", "1", "7", "9", "--sampler", "ddim",
                        "--steps", ddim, "--cfg-scale", "2.0", "--device", "cpu", "--also", "npz"]) == 0
    with np.load(tmp_path / "again/cfg2.0/samples.npz") as file:
        assert np.array_equal(file["arr_0"], drawn)


@pytest.mark.parametrize("described", [True, False])
def test_a_published_pipeline_goes_in_and_out(described: bool, tmp_path: Path) -> None:
    """Bitwise, to a folder that diffusers' own class opens, also without what only we read."""
    save_pipeline(tmp_path / "theirs", their_dit(classes=1000))
    labels = {str(i): f"class {i}, {i}" for i in range(1000)}
    index = json.loads((tmp_path / "theirs/model_index.json").read_text())
    (tmp_path / "theirs/model_index.json").write_text(json.dumps(index | {"id2label": labels}))
    assert convert.main([str(tmp_path / "theirs"), "--out", str(tmp_path / "export")]) == 0
    assert main(tmp_path / "export", "--out", tmp_path / "out") == 0
    theirs, ours = (diffusers.DiTPipeline.from_pretrained(tmp_path / name) for name in ("theirs", "out"))
    for part in ("transformer", "vae"):
        first, second = getattr(theirs, part).state_dict(), getattr(ours, part).state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert theirs.transformer.config["norm_eps"] == ours.transformer.config["norm_eps"] == 1e-5 and ours.labels["class 7"] == 7
    images = []
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
        images.append(pipe(class_labels=[3, 999], generator=torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images)
    assert np.abs(images[0] - images[1]).max() < 1e-5
    if not described:
        (tmp_path / "out/largescale.json").unlink()
    assert convert.main([str(tmp_path / "out"), "--out", str(tmp_path / "again")]) == 0
    first, again = load_trained(tmp_path / "export"), load_trained(tmp_path / "again")
    assert all(torch.equal(w, again.model.state_dict()[name]) for name, w in first.model.state_dict().items())
    assert again.config.diffusion == first.config.diffusion and again.config.model == first.config.model


def test_a_vae_that_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is written; without it the card says so."""
    trained = make_trained()
    write_export(tmp_path / "export", dict(trained.model.state_dict()), {"config": to_dict(trained.config), **trained.info, "made_with": {"vae": "/nowhere"}})
    assert main(tmp_path / "export", "--out", tmp_path / "out") == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "/nowhere is not a folder" in said and "--vae none leaves it out, as the card then says" in said and len(said.splitlines()) == 1
    assert main(tmp_path / "export", "--out", tmp_path / "out", "--vae", "none") == 0
    assert "note: the folder carries no VAE; give the one of the data with --vae DIR" in capsys.readouterr().err
    card = (tmp_path / "out/README.md").read_text()
    assert "The folder carries no VAE" in card and ", vae=vae, trust_remote_code=True" in card


@pytest.mark.parametrize("source", ["run", "export"])
@pytest.mark.parametrize("settings", [(), ("--model.downscale-freq-shift", 1, "--model.mlp-norm-eps", 1e-5, "--model.class-dropout-prob", 0),
                                      ("--model.num-classes", 0, "--model.class-dropout-prob", 0)], ids=str)
def test_back_in_it_is_bitwise(source: str, settings: tuple[Any, ...], run_here: RunHere, tmp_path: Path) -> None:
    run = run_here("--train.steps", 3, *settings, "--telemetry.preview-cfg-scale", 1).run
    given = run if source == "run" else export.export(run)
    assert main(given, "--out", tmp_path / "out", "--max-shard-size", "100KB") == 0
    assert len(list((tmp_path / "out/transformer").glob("*.safetensors"))) > 1
    assert convert.main([str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    first, back = load_trained(run), load_trained(tmp_path / "back")
    assert back.config == first.config and back.info == first.info
    ours, theirs = first.model.state_dict(), back.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("form", ["diffusers", "largescale"])
def test_half_precision(dtype: str, form: str, run_here: RunHere, tmp_path: Path) -> None:
    """Half the bytes; back in fp32 they are the rounded weights."""
    run = run_here("--train.steps", 3).run
    out, half = tmp_path / "out", {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert export.main([str(run), "--out", str(out), "--format", form, "--dtype", dtype]) == 0
    (file,) = out.rglob("*.safetensors")
    assert {w.dtype for w in load_file(file).values()} == {half} and f"EMA weights in {dtype}" in (out / "README.md").read_text()
    if form == "diffusers":
        assert convert.main([str(out), "--out", str(tmp_path / "back")]) == 0
        out = tmp_path / "back"
        assert "dtype" not in load_trained(out).info
    # An export of an export keeps its type; what convert writes is in fp32, and says so.
    else:
        assert convert.main([str(out), "--out", str(tmp_path / "converted")]) == 0
        assert "dtype" not in json.loads((tmp_path / "converted/config.json").read_text())
        assert {w.dtype for w in load_file(tmp_path / "converted/model.safetensors").values()} == {torch.float32}
        assert {w.dtype for w in load_file(export.export(out) / "model.safetensors").values()} == {half}
        assert {w.dtype for w in load_file(export.export(out, tmp_path / "fp32", dtype="fp32") / "model.safetensors").values()} == {torch.float32}
    for name, w in load_trained(run).model.state_dict().items():
        # Of diffusers' folder the positions are computed.
        if name != "pos_embed":
            assert torch.equal(load_trained(out).model.state_dict()[name], w.to(half).float())


@pytest.mark.parametrize("form", ["diffusers", "largescale"])
def test_weights_that_fp16_cannot_hold(form: str, run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = export.export(run_here("--train.steps", 2).run)
    weights = load_file(out / "model.safetensors")
    weights["blocks.0.mlp.fc1.bias"][0] = 7e4
    save_file(weights, out / "model.safetensors", metadata={"format": "pt", "weights": "ema"})
    assert export.main([str(out), "--out", str(tmp_path / "out"), "--format", form, "--dtype", "fp16"]) == 2
    assert "are too large for fp16; use --dtype bf16" in capsys.readouterr().err
    assert export.main([str(out), "--out", str(tmp_path / "out"), "--format", form, "--dtype", "bf16"]) == 0


@pytest.mark.parametrize("form", ["diffusers", "largescale"])
def test_raw_weights(form: str, run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that the optimizer updates, and what says so."""
    run, out = run_here("--train.steps", 6).run, tmp_path / "out"
    capsys.readouterr()
    assert export.main([str(run), "--out", str(out), "--format", form, "--weights", "raw"]) == 0
    said = capsys.readouterr()
    # How much of the EMA is untrained does not concern them.
    assert said.out.startswith("raw weights") and not said.err and "These are the raw weights" in (out / "README.md").read_text()
    if form == "diffusers":
        assert convert.main([str(out), "--out", str(tmp_path / "back")]) == 0
        out = tmp_path / "back"
    raw, ema = named_weights(checkpoints(run)[0], "master"), named_weights(checkpoints(run)[0])
    found = load_trained(out)
    for name, w in found.model.state_dict().items():
        assert torch.equal(w, raw[name])
    assert not torch.equal(raw["blocks.0.mlp.fc1.weight"], ema["blocks.0.mlp.fc1.weight"]) and found.info["weights"] == "raw"
    assert export.main([str(out), "--out", str(tmp_path / "again"), "--weights", "ema"]) == 2
    assert f"{out} is an export of the raw weights, not of the ema; give the run" in capsys.readouterr().err
    assert sample.main([str(out), "--out", str(tmp_path / "drawn"), "--num-samples", "1", "--steps", "2", "--device", "cpu"]) == 0
    assert json.loads((tmp_path / "drawn/cfg1.5/provenance.json").read_text())["weights"] == "raw"
    # It is replaced as one of the EMA is.
    assert export.main([str(run), "--out", str(out)]) == 0 and "weights" not in load_trained(out).info


# ---- the folder


def test_it_is_written_again(run_here: RunHere, tmp_path: Path) -> None:
    """Over one of other parts and shards, of which nothing stays; hidden files and other people's do."""
    run = run_here("--train.steps", 6, "--checkpoint.every", 3).run
    out = tmp_path / "out"
    assert main(run, "--out", out, "--max-shard-size", "100KB", "--step", 3) == 0
    (out / "vae").mkdir()
    (out / ".gitattributes").write_text("")
    (out / "LICENSE").write_text("mine")
    assert main(run, "--out", out) == 0
    assert [path.name for path in visible(out)] == sorted(["LICENSE", *FILES]) and (out / ".gitattributes").exists()
    assert [path.name for path in (out / "transformer").glob("*.s*")] == ["diffusion_pytorch_model.safetensors"]
    assert json.loads((out / "largescale.json").read_text())["step"] == 6


@pytest.mark.parametrize(("where", "error"), [
    ("diffusers.DDIMScheduler.save_pretrained", OSError(28, "No space left on device")),
    ("diffusers.DiTTransformer2DModel.save_pretrained", SafetensorError("No space left on device (os error 28)")),
])
def test_one_that_fails_leaves_the_one_before(where: str, error: Exception, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_here("--train.steps", 2).run
    out = tmp_path / "out"
    assert main(run, "--out", out) == 0
    before = content(out)

    def fail(*args: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(where, fail)
    assert main(run, "--out", out) == 2 and content(out) == before
    # Without one before, nothing is left, and the next one is written there.
    assert main(run, "--out", tmp_path / "new") == 2 and not list((tmp_path / "new").iterdir())
    monkeypatch.undo()
    assert main(run, "--out", tmp_path / "new") == 0


def test_one_that_was_killed_is_ours(run_here: RunHere, tmp_path: Path) -> None:
    run, out = run_here("--train.steps", 2).run, tmp_path / "out"
    assert main(run, "--out", out) == 0
    for name in ("model_index.json", "README.md", "scheduler/scheduler_config.json"):
        (out / name).unlink()
    (out / ".writing/transformer").mkdir(parents=True)
    (out / ".writing/half").write_bytes(b"half")
    assert is_pipeline(out) and main(run, "--out", out) == 0
    assert [path.name for path in visible(out)] == FILES and not (out / ".writing").exists()


def test_one_that_is_not_complete_is_not_converted(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its description may be of other weights than those that lie there."""
    run, out = run_here("--train.steps", 2).run, tmp_path / "out"
    assert main(run, "--out", out) == 0
    (out / "model_index.json").rename(tmp_path / "kept")
    assert convert.main([str(out), "--out", str(tmp_path / "back")]) == 2
    assert f"error: the pipeline {out} is not complete: it has no model_index.json" in capsys.readouterr().err
    (tmp_path / "kept").rename(out / "model_index.json")
    with sole_writer(out):
        assert main(run, "--out", out) == 2 and f"another process is writing to {out}" in capsys.readouterr().err
    assert convert.main([str(out), "--out", str(tmp_path / "back")]) == 0


@pytest.mark.parametrize("there", ["notes.txt", "model_index.json", "README.md", "an export", "a run", "checkpoints", "a file"])
def test_an_output_folder_that_holds_something_else(there: str, run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2).run
    out = {"an export": run / "export", "a run": run, "checkpoints": run / "checkpoints/new", "a file": run / "metrics.jsonl"}.get(there, tmp_path / "out")
    if there == "an export":
        export.export(run)
    elif out == tmp_path / "out":
        out.mkdir()
        (out / there).write_text("{}")
    before = content(tmp_path)
    assert main(run, "--out", out) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "--out" in said and len(said.splitlines()) == 1 and content(tmp_path) == before
    # The other way round.
    if there == "an export":
        assert main(run) == 0 and export.main([str(run), "--out", str(run / "diffusers")]) == 2
        assert "no export of largescale" in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "says"), [("debug_sit", "objective=flow"), ("debug_edm", "architecture=ddpmpp")])
def test_models_that_diffusers_has_no_class_for(preset: str, says: str, run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2, preset=preset).run
    capsys.readouterr()
    assert main(run) == 2
    said = capsys.readouterr().err
    assert says in said and "leave out --format diffusers" in said and len(said.splitlines()) == 1 and not (run / "diffusers").exists()
    assert main(run, "--card-only") == 2 and says in capsys.readouterr().err
    assert export.main([str(run)]) == 0 and (run / "export/README.md").exists()


@pytest.mark.parametrize(("options", "says"), [
    (("--vae", "x"), "--vae is an option of --format diffusers"), (("--scheduler", "dpm++2m"), "--scheduler is an option of"),
    (("--labels", "x"), "--labels is an option of"), (("--max-shard-size", "1GB"), "--max-shard-size is an option of"),
    (("--format", "diffusers", "--max-shard-size", "big"), "--max-shard-size big must be as 500MB or 5GB are"),
    (("--private",), "--private is an option of --push-to-hub"), (("--samples", "/nowhere"), "--samples /nowhere is not a folder"),
    (("--format", "diffusers", "--labels", "/nowhere"), "--labels /nowhere cannot be read"),
    (("--format", "diffusers", "--vae", "/nowhere"), "draws pixels, which need no --vae /nowhere"),
])
def test_options_that_contradict_each_other(options: tuple[str, ...], says: str, run_here: RunHere, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_here("--train.steps", 2).run
    capsys.readouterr()
    assert export.main([str(run), *options]) == 2
    said = capsys.readouterr().err
    assert says in said and len(said.splitlines()) == 1


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is read; our own format needs none."""
    for name in ("diffusers", "huggingface_hub", "huggingface_hub.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    for options, says in (((tmp_path, "--format", "diffusers"), "diffusers is not installed"), ((tmp_path, "--push-to-hub", "me/x"), "huggingface_hub is not installed"),
                          ((tmp_path,), "holds no checkpoint")):
        assert export.main([*map(str, options)]) == 2
        said = capsys.readouterr().err
        assert says in said and len(said.splitlines()) == 1 and ("pip install" in said) == ("not installed" in said)
