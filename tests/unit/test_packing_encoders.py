"""Packing by a VAE: moments, mirrors, and bytes that depend on nothing else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import folder, packer
from data_prep.images import decode
from largescale.data.format import LATENT_RGB
from largescale.data.shards import ShardDataset
from largescale.errors import DataError
from tests.ranks import ROOT
from tests.unit.packed_pictures import files, one_thread, pack, picture, start  # noqa: F401


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    model.save_pretrained(path := tmp_path_factory.mktemp("vae"))
    return path


def test_moments_of_the_image_and_its_mirror(images: Path, vae: Path, tmp_path: Path) -> None:
    from largescale.encoders.vae import load_vae

    assert pack(images, tmp_path / "out", "--vae", vae) == 0
    data, encoder = ShardDataset(tmp_path / "out", verify=True), load_vae(str(vae), torch.device("cpu"))
    assert (data.info.kind, data.info.shape, data.info.scale_factor) == ("moments", (8, 8, 8), 0.5)
    assert data.info.encoders == {"vae": encoder.identity} and data.has_mirror
    pixels = torch.from_numpy(np.stack([decode(picture(i), 16, 4) for i in range(5)]))
    for flip in (False, True):
        rows = data.gather(np.arange(5), flip=np.full(5, flip))["latent"]
        expected = encoder.encode(pixels.flip(-1) if flip else pixels)
        torch.testing.assert_close(torch.from_numpy(rows).float(), expected.float(), atol=2e-3, rtol=2e-3)
    # Its card, with a picture by the map to colours; without the map there is none, and nothing is said of one.
    card = (tmp_path / "out/README.md").read_text()
    assert "- moments\n" in card and "- vae encoder: AutoencoderKL sha256:" in card and ", in fp32\n" in card and str(vae) not in card
    assert "latents of 34 images have, over their 4 channels, means of" in card and "PSNR of" in card
    assert "by a linear map of their latents to colours](images.png)" in card and np.asarray(Image.open(tmp_path / "out/images.png")).std() > 5
    for name in LATENT_RGB, "README.md", "images.png":
        (tmp_path / "out" / name).unlink()
    assert pack(images, tmp_path / "out", "--vae", vae) == 0
    assert "images.png" not in (tmp_path / "out/README.md").read_text() and not (tmp_path / "out/images.png").exists()
    assert pack(images, tmp_path / "plain", "--vae", vae, "--no-mirror") == 0
    assert not ShardDataset(tmp_path / "plain").has_mirror


def test_bytes_do_not_depend_on_threads_or_ranks(images: Path, vae: Path, tmp_path: Path) -> None:
    """Nor on how a launcher sets them; a resume with another batch size, which would change them, is refused."""
    torch.set_num_threads(2)
    assert pack(images, tmp_path / "one", "--vae", vae, "--batch-size", 4) == 0
    ranks = [start(images, tmp_path / "two", rank, 2, "--vae", vae, "--batch-size", 4, code="import torch; torch.set_num_threads(1)")
             for rank in range(2)]
    assert [rank.wait(900) for rank in ranks] == [0, 0]
    assert files(tmp_path / "one") == files(tmp_path / "two")
    to_colours = np.array(json.loads((tmp_path / "one" / LATENT_RGB).read_text()))
    assert to_colours.shape == (ShardDataset(tmp_path / "one").info.x_shape[0] + 1, 3) and np.abs(to_colours).max() < 10
    assert pack(images, tmp_path / "one", "--vae", vae, "--batch-size", 3) == 2


def test_shards_of_different_encoders_do_not_mix(images: Path, truth: Path, vae: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    pack(images, tmp_path / "a", "--vae", vae)
    with torch.no_grad():
        other = pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(vae)
        other.quant_conv.bias += 1
    other.save_pretrained(tmp_path / "vae")
    assert pack(images, tmp_path / "a", "--vae", tmp_path / "vae") == 2
    assert "holds another data set" in capsys.readouterr().err
    pack(images, tmp_path / "b", "--vae", tmp_path / "vae")
    # a shard of the one put into the other, with the manifest's size and hash corrected by hand
    shutil.copy(tmp_path / "b/shard_00001.arrow", tmp_path / "a")
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    entry = json.loads((tmp_path / "b/manifest.json").read_text())["shards"][1]
    manifest["shards"][1] |= {key: entry[key] for key in ("bytes", "sha256")}
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"shard_00001.arrow is of another data set than the manifest: .*encoders"):
        ShardDataset(tmp_path / "a", verify=True)


def test_a_vae_that_does_not_fit_the_preset_is_said_by_the_dry_run(images: Path, vae: Path, tmp_path: Path) -> None:
    pack(images, tmp_path / "out", "--vae", vae)
    done = subprocess.run([sys.executable, "-m", "largescale.train", "dit_b2_ffhq256", "--data.path", tmp_path / "out", "--dry-run"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds moments of shape (4, 8, 8), the model takes (4, 32, 32), and these latents" in done.stderr and "another stride" in done.stderr


def test_every_thread_of_a_rank_is_on_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the first one, where a stray allocation of each of eight ranks would take half a gigabyte."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images/a.png")
    current: list[torch.device] = []
    for name, value in {"is_available": lambda: True, "device_count": lambda: 8, "set_device": current.append}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("LOCAL_RANK", "3")
    packer.Packer(folder.Folder(images=tmp_path / "images", out=tmp_path / "out", vae="none", resolution=16, device="cuda"))
    assert current == [torch.device("cuda", 3)]
