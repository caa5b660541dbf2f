"""The model card of an export, of both formats."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from largescale import export
from largescale.config.presets import PRESETS
from largescale.config.serialise import to_dict
from largescale.interop.card_text import CardFacts, as_yaml, card_text
from largescale.interop.diffusers_pipeline import PipelineFacts
from largescale.interop.markdown import code, plain
from largescale.interop.model_card import (
    is_our_card,
    only_card,
    read_scores,
    sample_sets,
    write_card,
)
from tests.conftest import RunHere

yaml = pytest.importorskip("yaml")

ODD = ("plain", "a: b", '"', "'", "- x", "#", "{}", "[a", "a\nb: c\n---\n", "\u2028", "\x07\x7f\x85", "é 🙂", "\\", "|", "`<b>", "null", "~", "%", "&a *b", "\ufeff", " ")


def description(preset: str = "debug", **more: Any) -> dict[str, Any]:
    config = to_dict(PRESETS[preset]())
    info = {"name": "blobs", "kind": "pixels", "shape": [1, 16, 16], "num_classes": config["model"]["num_classes"]}
    return {"config": config, "step": 1234, "data_info": info, **more}


def metadata(text: str) -> dict[str, Any]:
    start, front, rest = text.split("---\n", 2)
    assert start == "" and re.match(r"\n<!-- written by largescale\.export; .* -->\n\n# ", rest)
    found = yaml.safe_load(front)
    assert isinstance(found, dict)
    return found


def row(fid: float, step: int = 1234, **more: Any) -> dict[str, Any]:
    return {"samples": "s", "n": 1000, "drawn": {"run": "debug", "step": step, "sampler": "ddpm", "steps": 250, "cfg_scale": 1.5},
            "figures": {"FID": {"value": fid, "error": 0.1}, "KID x 1000": {"value": 2.0, "error": 0.25}}, "reference": {"path": "/data/real"}} | more


def test_the_card_of_our_own_format() -> None:
    text = card_text(CardFacts(description(samples_seen=5000, precision="bf16"), 51_200))
    assert metadata(text) == {"library_name": "largescale", "pipeline_tag": "unconditional-image-generation",
                              "tags": ["largescale", "diffusion", "dit", "gaussian", "class-conditional", "curriculum-learning"]}
    for says in ("# debug\n", "A DiT (patch size 4, width 32, 2 blocks, 2 heads) of 0.1 million parameters, trained with 10 classes on blobs: pixels (1, 16, 16)",
                 "noise prediction (DDPM), 1,234 steps, 5,000 images. These are the EMA weights in fp32.",
                 "python -m eval.sample FOLDER", 'largescale.load("FOLDER")', "model.sample(labels=[1, 2], cfg_scale=1.5",
                 "| precision | bf16 |", "All settings are in `config.json`.", "None was given when this card was written."):
        assert says in text
    assert "diffusers" not in text and "grid.png" not in text and "## Scores" not in text


@pytest.mark.parametrize("name", ODD)
def test_no_name_breaks_the_card(name: str) -> None:
    """Neither its metadata nor a table or heading of it."""
    d = description()
    d["config"]["name"] = d["data_info"]["name"] = name
    scores = ({**read_row(row(2.5)), "reference": name},)
    text = card_text(CardFacts(d, 1, license=name, datasets=(name,), scores=scores))
    found = metadata(text)
    assert found["license"] == name and found["datasets"] == [name] and found["model-index"][0]["name"] == name
    tables = [line for line in text.splitlines() if line.startswith("|")]
    # Cells are parted by bars that are not escaped.
    assert {line.replace("\\\\", "").replace("\\|", "").count("|") for line in tables} == {3, 9}


def read_row(content: dict[str, Any]) -> dict[str, Any]:
    from largescale.interop import model_card

    found = model_card._score(json.dumps(content).encode())
    assert found is not None
    return found


def test_half_a_character_becomes_a_whole_one() -> None:
    """As the bytes of a file's name that are not UTF-8."""
    assert yaml.safe_load(as_yaml("a\udc80")) == "a\ufffd" and plain("a\udc80") == "a?"


def test_names_of_others_have_no_meaning_in_markdown() -> None:
    assert plain("a_b_ |x|\n<i>") == r"a\_b\_ \|x\| \<i\>" and code("a_b`c\n|") == "`a_bc |`"


def test_the_hubs_own_reader_takes_it() -> None:
    hub = pytest.importorskip("huggingface_hub")
    scores = (read_row(row(2.5)), read_row(row(3.5, reference=None)))
    card = hub.ModelCard(card_text(CardFacts(description(), 1, license="mit", datasets=("me/digits",), scores=scores)))
    assert card.data.license == "mit" and card.data.datasets == ["me/digits"]
    results = [(r.metric_type, r.metric_value, r.dataset_name) for r in card.data.eval_results]
    assert results == [("fid", 2.5, "real"), ("kid x 1000", 2.0, "real"), ("fid", 3.5, "blobs"), ("kid x 1000", 2.0, "blobs")]


def test_scores_are_those_of_the_step(tmp_path: Path) -> None:
    for name, rows in (("a/cfg1.5", [row(2.5), row(9.0, step=1000)]), ("b", [row(float("nan")), {"loss": 1}]),
                       ("curve", [{"step": 1234, "n": 50, "protocol": {"sampler": "ddim", "steps": 50, "cfg_scale": 1.0},
                                   "figures": {"FID": {"value": 7.0, "error": 1}}, "reference": None}])):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{half")
    sets = sample_sets(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in sets] == ["a/cfg1.5", "b", "curve"]
    found = read_scores(sets, 1234)
    assert [(r["figures"], r["sampler"], r["n"]) for r in found] == [
        ({"FID": (2.5, 0.1), "KID x 1000": (2.0, 0.25)}, "ddpm", 1000), ({"KID x 1000": (2.0, 0.25)}, "ddpm", 1000), ({"FID": (7.0, 1.0)}, "ddim", 50)]
    assert len(read_scores(sets, None)) == 4
    text = card_text(CardFacts(description(), 1, scores=found))
    assert "| step | sampler | sampling steps | guidance | images | reference | FID | KID x 1000 |" in text
    assert "| 1234 | ddpm | 250 | 1.5 | 1000 | real | 2.5 ± 0.1 | 2 ± 0.25 |" in text and "| 1234 | ddim | 50 | 1.0 | 50 |  | 7 ± 1 |  |" in text


def test_the_curriculum_and_its_transitions() -> None:
    state = {"edges": [i / 20 for i in range(21)], "transitions": [[100 * i, 20 - i] for i in range(1, 21)]}
    text = card_text(CardFacts(description(curriculum=state), 1))
    assert "20 clusters of noise levels (uniform), easy_first, accumulating; pacing patience" in text
    assert "| 100 | 19 | stage 2 of 20 |" in text and "| 2,000 | 0 | complete |" in text
    other = description("debug_sit")
    other["config"]["curriculum"]["loss_smoothing"], other["config"]["noise"]["shift"] = 0.99, 3.0
    text = card_text(CardFacts(other, 1))
    assert "patience 1 on losses smoothed by 0.99, which is not the paper's." in text
    assert "| draw and weighting of noise levels | uniform (shift 3.0), none |" in text
    none = description()
    none["config"]["curriculum"]["pacing"] = "none"
    assert "None: all noise levels from the first step on." in card_text(CardFacts(none, 1))
    assert "No transition up to this step." in card_text(CardFacts(description(), 1))
    state["transitions"] = [[i, 1000 - i] for i in range(1, 1000)]
    long = card_text(CardFacts(description(curriculum=state), 1))
    assert "| 20 | 980 |" in long and "| ... | ... | ... |" in long and "| 500 |" not in long and "| 999 | 1 |" in long


def test_what_differs_in_diffusers() -> None:
    facts = PipelineFacts(("the model has null class 10",), True, {"0": 2e-7}, {"0": 1e-7, "999": 0.0042})
    text = card_text(CardFacts(description(), 1, diffusers=True, pipeline=facts, repository="me/digits"))
    assert metadata(text)["library_name"] == "diffusers"
    for says in ('DiffusionPipeline.from_pretrained("me/digits", trust_remote_code=True)', "a pipeline and a transformer, because the model has null class 10.",
                 "is off: one forward pass by up to 0.004 of the output's range (1e-07 at t = 0, 0.004 at t = 999)", "to within 2e-07 of their range",
                 "--sampler ddim --steps 50`", "drops the learned variance", "hf download me/digits", "python -m largescale.convert FOLDER --out EXPORT",
                 "All settings are in `largescale.json`."):
        assert says in text
    stock = PipelineFacts((), False, {"0": 2e-7}, {}, vae="AutoencoderKL sha256:1")
    text = card_text(CardFacts(description(), 1, diffusers=True, pipeline=stock))
    assert 'from_pretrained("FOLDER")' in text and "`DiTPipeline` is exact" in text and "--steps ddim50`" in text
    assert "Not measured: this card was written without the weights." in card_text(CardFacts(description(), 1, diffusers=True))


@pytest.mark.parametrize(("preset", "says"), [
    ("debug_sit", "velocity prediction (SiT)"), ("debug_edm", "preconditioned denoising (EDM)"), ("edm_ddpmpp_cifar10", "A DDPM++ U-Net"),
    ("dit_b2_coco256", "trained with captions"), ("dit_b2_ffhq256", "trained without labels"), ("emoji", 'prompts=["a red bus"]'),
])
def test_models_of_every_kind_have_a_card(preset: str, says: str) -> None:
    text = card_text(CardFacts(description(preset), 1_000_000))
    assert says in text and metadata(text)["library_name"] == "largescale"


def test_somebody_elses_readme_stays(tmp_path: Path) -> None:
    facts = CardFacts(description(), 1)
    assert write_card(tmp_path, facts, None) and is_our_card(tmp_path / "README.md") and only_card(tmp_path)
    assert write_card(tmp_path, facts, None)
    (tmp_path / "README.md").write_text("# Mine\n")
    assert not write_card(tmp_path, facts, None) and (tmp_path / "README.md").read_text() == "# Mine\n" and not only_card(tmp_path)


def test_an_export_has_its_card(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores and grid are those below the run, of its step; those that are given count whatever their step."""
    run = run_here("--train.steps", 6, "--curriculum.patience", 0).run
    for name, content in (("samples/cfg1.5", row(2.5, step=6)), ("old", row(9.75, step=3))):
        (run / name).mkdir(parents=True)
        (run / name / "results.jsonl").write_text(json.dumps(content) + "\n")
        (run / name / "grid.png").write_bytes(name.encode())
        (run / name / "provenance.json").write_text(json.dumps({"step": content["drawn"]["step"]}))
    assert export.main([str(run), "--license", "mit"]) == 0
    text = (run / "export/README.md").read_text()
    assert "| 2.5 ± 0.1 |" in text and "9.75" not in text and "![samples](grid.png)" in text and "| 3 | 4 | stage 2 of 5 |" in text
    # The grid of the set with the scores of that step.
    assert (run / "export/grid.png").read_bytes() == b"samples/cfg1.5"
    assert export.main([str(run), "--samples", str(run / "old")]) == 0
    assert "9.75" in (run / "export/README.md").read_text() and (run / "export/grid.png").read_bytes() == b"old"
    (run / "export/README.md").write_text("# Mine\n")
    assert export.main([str(run)]) == 0 and (run / "export/README.md").read_text() == "# Mine\n"
    assert "README.md is not one of largescale, and stays as it is" in capsys.readouterr().err


def test_the_card_only(run_here: RunHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = run_here("--train.steps", 2).run, tmp_path / "out"
    assert export.main([str(run), "--out", str(out), "--card-only"]) == 0
    assert [path.name for path in out.iterdir()] == ["README.md"] and capsys.readouterr().out == f"card: {out}/README.md\n"
    # It does not stand in the way of the export.
    assert export.main([str(run), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    before = (out / "model.safetensors").stat()
    assert export.main([str(run), "--out", str(out), "--card-only", "--license", "mit"]) == 0
    assert (out / "model.safetensors").stat() == before and 'license: "mit"' in (out / "README.md").read_text()
    # Nor does it lie down among other people's files.
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/notes.txt").write_text("")
    assert export.main([str(run), "--out", str(tmp_path / "theirs"), "--card-only"]) == 2
