"""Every option of every program is explained by a sentence that can be read alone."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS = {  # file: dataclasses whose fields are options
    "data_prep/coco.py": ["Coco"],
    "data_prep/describe.py": ["Describe"],
    "data_prep/digits.py": ["Digits"],
    "data_prep/emoji.py": ["Emoji"],
    "data_prep/encoding.py": ["EncoderOptions"],
    "data_prep/folder.py": ["Folder"],
    "data_prep/imagenet.py": ["ImageNet"],
    "data_prep/latents.py": ["Latents"],
    "data_prep/packing.py": ["PackerOptions"],
    "data_prep/parquet.py": ["Parquet"],
    "data_prep/split.py": ["Split"],
    "data_prep/webdataset.py": ["WebDataset"],
    "eval/compare.py": ["Compare"],
    "eval/curves/options.py": ["Curve"],
    "eval/difficulty_study/study.py": ["Study"],
    "eval/digits.py": ["Digits"],
    "eval/gradients.py": ["Gradients"],
    "eval/paper.py": ["Paper"],
    "eval/prompts.py": ["Freeze"],
    "eval/sample.py": ["Sample"],
    "eval/score.py": ["Score"],
    "largescale/config/schema.py": [
        "UNetConfig", "ModelConfig", "DiffusionConfig", "NoiseConfig", "CurriculumConfig", "DataConfig", "OptimizerConfig",
        "TrainConfig", "CheckpointConfig", "AnomalyConfig", "TelemetryConfig", "Config",
    ],
    "largescale/convert.py": ["Convert"],
    "largescale/ema.py": ["Ema"],
    "largescale/export.py": ["Export"],
    "largescale/interop/choices.py": ["Choices"],
    "largescale/requeue.py": ["Requeue"],
    "largescale/status.py": ["Status"],
}


def helps(path: Path, name: str) -> dict[str, str | None]:
    """Field -> the text below it."""
    (found,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef) and node.name == name)
    texts: dict[str, str | None] = {}
    for node, after in zip(found.body, [*found.body[1:], None], strict=True):
        section = isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).endswith("Config")
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not section:
            text = after.value if isinstance(after, ast.Expr) else None
            texts[node.target.id] = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else None
    return texts


@pytest.mark.parametrize("file", OPTIONS)
def test_every_option_has_a_sentence_of_its_own(file: str) -> None:
    for name in OPTIONS[file]:
        for field, text in helps(ROOT / file, name).items():
            assert text and text.endswith("."), f"{name}.{field} has no sentence"
            assert not re.match(r"(Likewise|Of |As |Or |And |\.\.\.)", text), f"{name}.{field} cannot be read alone: {text}"


def test_no_program_is_forgotten() -> None:
    programs = {
        str(path.relative_to(ROOT)) for package in ("largescale", "data_prep", "eval") for path in (ROOT / package).rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    elsewhere = {"largescale/train.py", "eval/curve.py", "eval/difficulty.py"}  # config/schema.py, curves/options.py, difficulty_study/study.py
    assert programs - elsewhere <= OPTIONS.keys()


def test_the_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs/make_reference.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert (ROOT / "docs/reference.md").read_text() == made.reference(), "run python docs/make_reference.py"
    assert {f"{module.replace('.', '/')}.py" for module in made.PROGRAMS} <= {*OPTIONS, "eval/curve.py", "eval/difficulty.py"}
