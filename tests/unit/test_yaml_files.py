"""Settings as YAML files: --config, --print-config, and the config.yaml of every run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from largescale import train
from largescale.config.presets import PRESETS
from largescale.config.schema import Config
from largescale.config.serialise import flatten, to_dict
from largescale.config.yaml_files import OF_A_START, to_yaml
from largescale.errors import ConfigError
from tests.conftest import RunHere, assert_same_run


def parsed(*words: Any) -> Config:
    return train.parse([str(word) for word in words])


@pytest.mark.parametrize("preset", ["dit_l2_imagenet256", "emoji", "edm_ddpmpp_cifar10_original"])
def test_there_and_back(preset: str, tmp_path: Path) -> None:
    """With the preset's name on the command line and without; and every field is there, with its explanation."""
    config = PRESETS[preset]()
    text = to_yaml(config)
    (tmp_path / "config.yaml").write_text(text)
    assert parsed("--config", tmp_path / "config.yaml", "--output", tmp_path / "run") == dataclasses.replace(config, output=str(tmp_path / "run"))
    other = parsed("debug", "--config", tmp_path / "config.yaml", f"--output={tmp_path}/run")
    assert other == dataclasses.replace(config, output=str(tmp_path / "run"))
    written = dict(flatten(yaml.safe_load(text)))
    assert written.keys() == {key for key, _ in flatten(to_dict(config))} - {*OF_A_START} | {"preset"}
    assert "  # Number of DiT's blocks. \n".replace(" \n", "\n") in text and "the preset has" not in text


def test_a_part_and_the_order(tmp_path: Path) -> None:
    """Files in the order given, then the command line; YAML's 1e-4, which its parsers take for text, is a number."""
    (tmp_path / "a.yaml").write_text("optimizer: {lr: 1e-4, betas: [0.5, 0.9]}\ndata: {horizontal_flip: true}\ntrain: {steps: 7, init_new: []}\n")
    (tmp_path / "b.json").write_text(json.dumps({"train": {"steps": 8, "micro_batch_size": None}, "diffusion": {"p_mean": -1.2}}))
    found = parsed("debug", "--config", tmp_path / "a.yaml", f"--config={tmp_path}/b.json", "--optimizer.betas", "0.1", "0.2")
    assert (found.optimizer.lr, found.optimizer.betas, found.train.steps, found.data.horizontal_flip) == (1e-4, (0.1, 0.2), 8, True)
    assert parsed("debug", "--config", tmp_path / "a.yaml", "--train.steps", 9, "--data.no-horizontal-flip").train.steps == 9
    assert parsed("debug", "--config", tmp_path / "a.yaml").train.init_new == ()
    (tmp_path / "c.yaml").write_text("name: 2026-13-41\noptimizer:\n  # lr: 1e-3\ntrain: {compile: off, init_from: null}\n")
    found = parsed("debug", "--config", tmp_path / "c.yaml")
    assert (found.name, found.train.compile, found.train.init_from) == ("2026-13-41", "off", None)


def test_every_run_writes_its_settings(run_here: RunHere, tmp_path: Path) -> None:
    """A sister run from them is the same run; what was changed from the preset is marked."""
    first = run_here("--train.steps", 6, "--optimizer.lr", 2e-3, output=tmp_path / "first")
    text = (first.run / "config.yaml").read_text()
    assert "steps: 6  # the preset has 20" in text and "lr: 0.002  # the preset has 0.001" in text and text.startswith("# Settings for python -m")
    sister = run_here("--config", first.run / "config.yaml", output=tmp_path / "sister")
    assert sister.code == 0, sister.err
    assert_same_run(sister.run, first.run)
    again = run_here("--train.steps", 8, "--optimizer.lr", 2e-3, output=tmp_path / "first")
    assert again.code == 0 and "steps: 8  # the preset has 20" in (first.run / "config.yaml").read_text()


def test_print_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert train.main(["digits", "--optimizer.lr", "0.5", "--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    assert "lr: 0.5  # the preset has 0.002" in text and parsed("--config", tmp_path / "mine.yaml").optimizer.lr == 0.5


@pytest.mark.parametrize(("content", "message"), [
    ("optimiser: {lr: 1}", "has the setting optimiser, which does not exist; did you mean optimizer? "),
    ("optimizer: {learning_rate: 1}", "has the setting optimizer.learning_rate, which does not exist"),
    ("model: {unet: {droput: 0.1}}", "did you mean model.unet.dropout? "),
    ("optimizer: 3", "optimizer must have settings of its own below it"),
    ("optimizer: {lr: {x: 1}}", "optimizer.lr={'x': 1} must be one value, or a list of them"),
    ("data: {horizontal_flip: 3}", "data.horizontal_flip=3 must be true or false"),
    ("train: {steps: true}", "train.steps=True must be one value"),
    ("dry_run: true", "has dry_run, which is of one start and not of the run; give it on the command line"),
    ("output: runs/x", "has output, which is of one start"),
    ("train:\n  steps: 3\n  seed: 4\n  steps: 5\n", "has steps twice, the second time in line 4; keep one of them"),
    ('{"optimizer": {"lr": 1}, "optimizer": {"lr": 2}}', "has optimizer twice, the second time in line 1"),
    ("train:\n\tsteps: 3\n", "line 2, column 1; indent with spaces"),
    ("data: {horizontal_flip: off}", "data.horizontal_flip=off must be true or false"),
    ("[" * 500, "is neither YAML nor JSON"),
    ("- 1\n- 2", "must have settings by their names"),
    ("a: [", "is neither YAML nor JSON"),
])
def test_what_is_no_file_of_settings(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        parsed("debug", "--config", tmp_path / "x.yaml")
    assert message in str(error.value) and "x.yaml" in str(error.value)


def test_what_the_command_line_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text("train: {steps: many}")
    with pytest.raises(SystemExit):
        parsed("debug", "--config", tmp_path / "x.yaml")
    assert "many" in capsys.readouterr().err
    for words, message in ((("debug", "--config"), "needs a file"), (("debug", "--config", "--dry-run"), "needs a file"),
                           (("debug", "--config", tmp_path / "none.yaml"), "cannot be read"), (("--config", tmp_path / "x.yaml"), "names no preset"),
                           (("--print-config",), "no preset is given before --print-config"),
                           (("debug", "--config", tmp_path), "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            parsed(*words)


def test_a_sister_run_has_a_folder_of_its_own(run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_here("--train.steps", 2, output=tmp_path / "runs/debug").run
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is of the run in runs/debug; give another one --output DIR"):
        parsed("--config", run / "config.yaml")
