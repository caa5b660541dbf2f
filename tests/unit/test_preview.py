"""Sample grids of latents: pictures where their VAE lies here, else a sheet that says what it shows."""

import json
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from largescale.data.format import LATENT_RGB, DatasetInfo
from largescale.data.images import LINEAR, UNDECODED, grid, headed, linear_rgb, to_uint8
from largescale.data.writer import ShardWriter
from largescale.encoders.vae import load_vae
from tests.conftest import RunHere, assert_same_run

LATENTS = ("--model.in-channels", 4, "--model.input-size", 8, "--model.patch-size", 2, "--train.steps", 2,
           "--telemetry.preview-every", 2, "--telemetry.preview-images", 3)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, scaling_factor=0.5,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    model.save_pretrained(path := tmp_path_factory.mktemp("vae"))
    return path


def packed(path: Path, identity: str | None, made_with: Any) -> Path:
    info = DatasetInfo("latents", "latents", (4, 8, 8), 10, 0.5, {"vae": identity} if identity else {})
    random = np.random.default_rng(0)
    with ShardWriter(path, info) as writer:
        for i in range(20):
            writer.write(id=str(i), latent=random.normal(size=(4, 8, 8)).astype(np.float16), label=i % 10)
    manifest = json.loads((path / "manifest.json").read_text()) | {"made_with": made_with}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("largescale.training.preview.draw_samples", lambda *_, index, **__: x[list(index)])
    return x


def sheet(run: Path) -> np.ndarray:
    return np.asarray(Image.open(run / "samples/step_00000002.png"))


def test_latents_are_decoded_by_the_vae_that_packed_them(vae_folder: Path, drawn: torch.Tensor, run_here: RunHere, tmp_path: Path) -> None:
    vae = load_vae(str(vae_folder), torch.device("cpu"))
    data = packed(tmp_path / "data", vae.identity, {"vae": str(vae_folder)})
    dry = run_here(*LATENTS, "--dry-run", data=data)
    assert f"previews: decoded by {vae.identity}; rank 0 holds 0.28 GiB more of host memory" in dry.err
    outcome = run_here(*LATENTS, data=data)
    assert outcome.code == 0 and f"note: previews are decoded by {vae.identity}" in outcome.err
    pictures = vae.decode(drawn).permute(0, 2, 3, 1).numpy()
    assert pictures.shape == (3, 16, 16, 3) and np.array_equal(sheet(outcome.run), grid(pictures, 3, 4))
    without = run_here(*LATENTS, "--telemetry.preview-every", 0, data=data, output=tmp_path / "without")
    assert_same_run(without.run, outcome.run)  # loading a network draws from no generator of the run's


@pytest.mark.parametrize(("identity", "made_with", "why"), [
    ("AutoencoderKL sha256:0123456789abcdef", {}, "does not record where its VAE was"), (None, "x", "does not record where its VAE was"),
    ("AutoencoderKL sha256:0123456789abcdef", {"vae": "/nowhere/gone"}, "/nowhere/gone is not a folder"),
    ("AutoencoderKL sha256:0123456789abcdef", {"vae": "nobody/has-this-vae"}, "nobody/has-this-vae cannot be loaded"),
    ("AutoencoderKL sha256:0123456789abcdef", {"vae": "HERE"}, ", the data are of AutoencoderKL sha256:0123456789abcdef"),
])
def test_latents_whose_vae_is_not_here(identity: str | None, made_with: Any, why: str, vae_folder: Path, drawn: torch.Tensor,
                                       run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not asked, which without a network takes a minute to fail."""
    asked: list[str] = []
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *how, **more: (asked.append(str(host)), resolve(host, *how, **more))[1])
    if made_with == {"vae": "HERE"}:
        made_with = {"vae": str(vae_folder)}
    data = packed(tmp_path / "data", identity, made_with)
    assert why in run_here(*LATENTS, "--dry-run", data=data).err
    outcome = run_here(*LATENTS, data=data)
    (note,) = [line for line in outcome.err.splitlines() if line.startswith("note: previews")]
    assert outcome.code == 0 and note.startswith("note: previews show latents, not decoded: ") and why in note
    assert not [host for host in asked if "hugging" in host]
    assert np.array_equal(sheet(outcome.run), headed(grid(to_uint8(drawn), 3, 8), UNDECODED))


def test_latents_by_the_map_that_was_fitted_while_packing(drawn: torch.Tensor, run_here: RunHere, tmp_path: Path) -> None:
    data = packed(tmp_path / "data", None, {})
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(2)) / 3
    (data / LATENT_RGB).write_text(json.dumps(matrix.tolist()))
    outcome = run_here(*LATENTS, data=data)
    assert outcome.code == 0 and "note: previews show latents by a linear map to colours, not decoded" in outcome.err
    colours = torch.stack([torch.stack([(x * matrix[:4, c, None, None]).sum(0) + matrix[4, c] for c in range(3)]) for x in drawn])
    assert np.abs(sheet(outcome.run).astype(int) - headed(grid(to_uint8(colours), 3, 8), LINEAR)).max() <= 1
    for number, content in enumerate(("[[1, 2, 3]]", "{", "[[null]]", json.dumps([[float("nan")] * 3] * 5))):  # of other latents, damaged
        (data / LATENT_RGB).write_text(content)
        other = run_here(*LATENTS, data=data, output=tmp_path / f"{number}")
        assert other.code == 0 and "note: previews show latents, not decoded" in other.err


def test_the_map_to_colours_is_the_best_linear_one(vae_folder: Path) -> None:
    """Of a decoder that is linear itself it is exact."""
    vae = load_vae(str(vae_folder), torch.device("cpu"))
    true = torch.tensor([[0.2, -0.1, 0.0], [0.1, 0.1, 0.1], [-0.2, 0.0, 0.1], [0.0, 0.1, -0.2], [0.1, -0.1, 0.05]])
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)

    class Linear:
        def decode(self, latent: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (linear_rgb(latent * vae.scale_factor, true.tolist()).repeat_interleave(2, 2).repeat_interleave(2, 3),)

    found = replace(vae, module=Linear()).fit_rgb(x)  # type: ignore[arg-type]
    assert np.abs(np.array(found) - true.numpy()).max() < 2e-3  # pictures have 256 levels


def test_no_vae_is_looked_for_where_none_is_needed(run_here: RunHere, tmp_path: Path) -> None:
    assert "previews" not in run_here("--train.steps", 2, "--telemetry.preview-every", 2).err  # pixels
    data = packed(tmp_path / "data", None, {})
    for never in (0, 3):
        assert "previews" not in run_here(*LATENTS, "--telemetry.preview-every", never, data=data, output=tmp_path / f"{never}").err


def test_a_decoder_without_memory(vae_folder: Path, drawn: torch.Tensor, run_here: RunHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that training fills: the run goes on."""
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("largescale.encoders.vae.Vae.decode", full)
    identity = load_vae(str(vae_folder), torch.device("cpu")).identity
    outcome = run_here(*LATENTS, data=packed(tmp_path / "data", identity, {"vae": str(vae_folder)}))
    assert outcome.code == 0 and np.array_equal(sheet(outcome.run), headed(grid(to_uint8(drawn), 3, 8), UNDECODED))


def test_what_stands_above_a_sheet() -> None:
    sheet = np.full((20, 100, 3), 7, np.uint8)
    with_text = headed(sheet, UNDECODED)
    assert np.array_equal(with_text[-20:], sheet) and with_text.shape[1:] == (100, 3)
    assert len(with_text) - 20 == 14 * 3 and all(with_text[row : row + 14].max() > 200 for row in range(0, 42, 14))
