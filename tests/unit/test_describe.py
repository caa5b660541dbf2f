"""What a packed data set is, in words and in a picture."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import describe, folder
from largescale.data.format import DatasetInfo
from largescale.data.writer import ShardWriter
from largescale.errors import DataError
from largescale.host.launch import print_error


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    lines = [re.split(r"  +|: ", line, maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    return dict(lines)  # type: ignore[arg-type]


def test_pixels_with_labels(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "a.png"
    assert describe.main([str(blobs), "--verify", "--picture", str(picture), "--images", "7"]) == 0
    lines = said(capsys)
    assert lines["images"].startswith("300 as pixels (1, 16, 16)") and lines["labels"] == "10 classes"
    assert lines["captions"] == "none" and "verified" in lines and "shards: 3," in lines["on disk"]
    sheet = np.asarray(Image.open(picture))
    assert sheet.shape == (2 * (128 + 26 + 2) + 2, 5 * 130 + 2, 3)
    assert sheet[:128].std() > 20
    other = tmp_path / "b.png"
    describe.main([str(blobs), "--picture", str(other), "--images", "7", "--seed", "1"])
    assert (np.asarray(Image.open(other)) != sheet).any()


def test_captions(captioned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main([str(captioned), "--picture", str(tmp_path / "a.png")]) == 0
    lines = said(capsys)
    assert lines["captions"] == "texts, up to 5 tokens of 8, and one vector of 6, a caption" and lines["labels"] == "none"


def test_latents_are_decoded_by_their_own_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    for seed in (0, 1):
        torch.manual_seed(seed)
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ).save_pretrained(tmp_path / f"vae{seed}")
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    (tmp_path / "images/broken.png").write_bytes(b"")
    args = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--resolution", "16", "--device", "cpu"]
    assert folder.main([*args, "--vae", str(tmp_path / "vae0")]) == 0
    assert "; vae: AutoencoderKL sha256:" in capsys.readouterr().out
    assert describe.main([str(tmp_path / "out"), "--picture", str(tmp_path / "a.png")]) == 0
    lines = said(capsys)
    assert re.fullmatch(rf"AutoencoderKL sha256:[0-9a-f]{{16}}, from {tmp_path}/vae0", lines["vae encoder"])
    assert lines["left out"] == "1 images"
    assert lines["source images"] == str(tmp_path / "images") and "with mirror images" in lines["images"]
    assert np.asarray(Image.open(tmp_path / "a.png")).shape == (130 + 2, 3 * 130 + 2, 3)
    assert describe.main([str(tmp_path / "out"), "--picture", str(tmp_path / "a.png"), "--vae", str(tmp_path / "vae1")]) == 2
    assert "the latents are of AutoencoderKL" in capsys.readouterr().err
    shutil.move(tmp_path / "vae0", tmp_path / "moved")
    assert describe.main([str(tmp_path / "out"), "--picture", str(tmp_path / "b.png"), "--vae", str(tmp_path / "moved")]) == 0


def test_latents_of_an_unknown_vae(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path, DatasetInfo("toy", "latents", (4, 2, 2), 0, encoders={"vae": "a VAE"})) as writer:
        writer.write(id="0", latent=np.zeros((4, 2, 2), np.float16))
    assert describe.main([str(tmp_path)]) == 0
    assert describe.main([str(tmp_path), "--picture", str(tmp_path / "a.png")]) == 2
    assert "latents of a VAE need their VAE to be seen; give it with --vae" in capsys.readouterr().err


def test_what_is_wrong_is_said(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(blobs, tmp_path / "data")
    content = bytearray((data / "shard_00001.arrow").read_bytes())
    content[-2000] ^= 1
    (data / "shard_00001.arrow").write_bytes(content)
    assert describe.main([str(data)]) == 0
    assert describe.main([str(data), "--verify"]) == 2
    assert "shard_00001.arrow was altered" in capsys.readouterr().err
    assert describe.main([str(tmp_path / "nowhere")]) == 2 and "does not exist" in capsys.readouterr().err
    assert describe.main([str(blobs / "manifest.json")]) == 2
    assert f"error: {blobs / 'manifest.json'} is a file; give the folder that holds the data set\n" == capsys.readouterr().err
    assert describe.main([str(blobs), "--picture", str(tmp_path / "no/such/folder.png")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert describe.main([str(blobs), "--images", "0"]) == 2
    assert describe.main([str(blobs), "--picture", str(tmp_path / "sheet")]) == 2
    assert "has no suffix of a picture; try" in capsys.readouterr().err


def test_what_others_wrote_does_not_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In names of classes and of data sets; in errors too, which keep their own line breaks."""
    with ShardWriter(tmp_path / "x", DatasetInfo("a\x1b[2Jb\u202ec", "pixels", (1, 2, 2), 2)) as writer:
        writer.write(id="0", latent=np.zeros((1, 2, 2), np.uint8))
    manifest = tmp_path / "x/manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"class_names": ["\x1b]0;title\x07", "\ud83d\n猫 é"]}))
    assert describe.main([str(tmp_path / "x")]) == 0
    shown = capsys.readouterr().out
    assert r"a\x1b[2Jb\u202ec" in shown and r"2 classes: \x1b]0;title\x07, \ud83d\n猫 é" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    print_error(DataError("one\n  \x1b[31mtwo"))
    assert capsys.readouterr().err == "error: one\n  \\x1b[31mtwo\n"


def test_samples_and_what_no_program_wrote(blobs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(blobs, tmp_path / "data")
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"job": {"run": "x", "step": 7, "sampling": {"steps": 50}}}))
    assert describe.main([str(data)]) == 0
    shown = said(capsys)
    assert (shown["run"], shown["step"], shown["sampling"]) == ("x", "7", "{'steps': 50}")
    for odd in {"job": 5}, {"job": {"source": {}}}, {"skipped": None, "job": {"source": {}, "crop": "x", "rows_per_shard": 1}}, {"made_with": "x"}:
        (data / "manifest.json").write_text(json.dumps(manifest | odd))
        assert describe.main([str(data)]) == 2
        assert "manifest.json is not what packing programs write" in capsys.readouterr().err


def test_packed_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images/a.png")
    args = ["--images", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--resolution", "16", "--device", "cpu"]
    assert folder.main([*args, "--vae", "none"]) == 0
    capsys.readouterr()
    assert describe.main([str(tmp_path / "out")]) == 0
    assert said(capsys)["packed"] == "ADM's centre crop, 4096 rows a shard"
