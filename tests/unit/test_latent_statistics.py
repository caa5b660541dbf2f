"""Mean and std of latents, from packing over data.normalize to the picture that a model draws."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import describe, folder
from largescale.config.schema import Config, DataConfig, ModelConfig
from largescale.data.compatibility import open_dataset, open_validation
from largescale.data.format import DatasetInfo, normalization_of
from largescale.data.loader import to_x_start
from largescale.data.shards import ShardDataset
from largescale.data.statistics import Statistics, measure, measure_rows, merge
from largescale.data.writer import ShardWriter
from largescale.encoders.normalization import Normalization
from largescale.errors import DataError
from tests.conftest import RunHere

INFO = DatasetInfo("toy", "latents", (4, 8, 8), num_classes=10, scale_factor=0.5, encoders={"vae": "toy"})
OFFSETS = np.array([10.0, -3.0, 0.0, 100.0])[:, None, None]
STDS = np.array([0.1, 2.0, 1.0, 5.0])[:, None, None]
LATENTS = ("--model.in-channels", 4, "--model.input-size", 8, "--model.patch-size", 2, "--train.steps", 2)


def latents(n: int, seed: int = 0) -> Any:
    return (OFFSETS + STDS * np.random.default_rng(seed).normal(size=(n, 4, 8, 8))).astype(np.float16)


def pack(path: Path, n: int = 20, info: DatasetInfo = INFO, seed: int = 0, rows_per_shard: int = 7) -> Path:
    with ShardWriter(path, info, rows_per_shard) as writer:
        for i, latent in enumerate(latents(n, seed)):
            writer.write(id=f"{seed}-{i}", latent=latent, label=i % 10)
    return path


def config(path: Path, normalize: Any, **data: Any) -> Config:
    model = ModelConfig(input_size=8, in_channels=4, patch_size=2, num_classes=10, hidden_size=32, depth=1, num_heads=2)
    return Config("toy", model=model, data=DataConfig(str(path), normalize=normalize, horizontal_flip=False, **data))


def edit_manifest(path: Path, **changes: Any) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({k: v for k, v in (manifest | changes).items() if v is not None}))


def test_merging_is_exact_where_sums_of_squares_are_not() -> None:
    values = (1e4 + np.random.default_rng(0).normal(size=(1000, 2, 3, 3))).astype(np.float64)
    parts = [measure(part, "latents") for part in np.array_split(values, [1, 10, 500, 999])]
    for order in (parts, parts[::-1]):
        merged = merge(order)
        assert merged.images == 1000
        np.testing.assert_allclose(merged.mean, values.mean((0, 2, 3)), rtol=1e-13)
        np.testing.assert_allclose(merged.variance, values.var((0, 2, 3)), rtol=1e-9)
    with pytest.raises(ValueError, match="no latents"):
        merge([])


def test_of_moments_it_is_what_the_draws_have() -> None:
    random = np.random.default_rng(0)
    mean, logvar = random.normal(size=(400, 2, 8, 8)) * 2 + 3, random.normal(size=(400, 2, 8, 8)) - 1
    stored = np.concatenate([mean, logvar], 1).astype(np.float16)
    found = measure_rows(list(stored), "moments")
    noise = torch.randn(400, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = to_x_start(torch.from_numpy(stored), "moments", Normalization(), noise).double()
    np.testing.assert_allclose(found.mean, drawn.mean((0, 2, 3)), atol=0.03)
    np.testing.assert_allclose(found.std, drawn.std((0, 2, 3)), rtol=0.01)


def test_statistics_do_not_depend_on_shards_and_are_not_the_content(tmp_path: Path) -> None:
    one, many = ShardDataset(pack(tmp_path / "a", rows_per_shard=20)), ShardDataset(pack(tmp_path / "b", rows_per_shard=3))
    a, b = (Statistics(**data.manifest["statistics"]) for data in (one, many))
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-12)
    np.testing.assert_allclose(a.variance, b.variance, rtol=1e-12)
    np.testing.assert_allclose(a.mean, latents(20).astype(np.float64).mean((0, 2, 3)), rtol=1e-12)
    assert (a.images, a.encoder) == (20, "toy")
    assert all("statistics" not in shard for shard in many.manifest["shards"])
    edit_manifest(one.path, statistics=None)  # as of an older version
    assert ShardDataset(one.path, verify=True).fingerprint == one.fingerprint


def test_normalize_chooses_what_makes_x_start(tmp_path: Path) -> None:
    path = pack(tmp_path / "data")
    stored = torch.from_numpy(latents(20))
    for how, expected in (("encoder", stored.float() * 0.5), ("none", stored.float())):
        info = open_dataset(config(path, how)).info
        assert to_x_start(stored, "latents", info.normalization, None).equal(expected)
    data = open_dataset(config(path, "dataset"))
    x_start = to_x_start(stored, "latents", data.info.normalization, None).double()
    np.testing.assert_allclose(x_start.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(x_start.std((0, 2, 3), correction=0), 1, rtol=1e-4)
    # What a checkpoint keeps of it is enough to undo it; the files are read as before.
    kept = json.loads(json.dumps(data.info.plain()))
    torch.testing.assert_close(normalization_of(kept).undo(x_start.float()), stored.float(), atol=1e-3, rtol=1e-3)
    assert data.gather(np.arange(3))["latent"].shape == (3, 4, 8, 8) and "latent_mean" not in ShardDataset(path).info.plain()


def test_statistics_of_an_encoder_are_a_part_of_the_set(tmp_path: Path) -> None:
    info = dataclasses.replace(INFO, latent_mean=(1.0, 2.0, 3.0, 4.0), latent_std=(1.0, 2.0, 1.0, 2.0))
    data = ShardDataset(pack(tmp_path / "a", info=info), verify=True)
    assert data.info == info and data.fingerprint != ShardDataset(pack(tmp_path / "b")).fingerprint
    edit_manifest(data.path, info=info.plain() | {"latent_mean": [1.0, 2.0]})
    with pytest.raises(DataError, match="2 statistics for 4 channels"):
        ShardDataset(data.path)


def test_held_out_images_are_normalised_as_the_training_set_is(tmp_path: Path) -> None:
    path, held_out = pack(tmp_path / "a"), pack(tmp_path / "b", seed=1)
    chosen = config(path, "dataset", validation=str(held_out))
    training = open_dataset(chosen)
    validation = open_validation(chosen, training)
    assert validation is not None and validation.info.normalization == training.info.normalization
    other = pack(tmp_path / "c", seed=2, info=dataclasses.replace(INFO, latent_mean=(0.0,) * 4, latent_std=(2.0,) * 4))
    with pytest.raises(DataError, match="has latent_mean="):
        open_validation(config(path, "dataset", validation=str(other)), training)


@pytest.mark.parametrize(("change", "message"), [
    ({"statistics": None}, "no statistics for --data.normalize dataset; measure them anew with python -m data_prep.describe DATA --measure"),
    ({"statistics": {"images": 9, "mean": [0.0] * 8, "variance": [1.0] * 8, "encoder": "toy"}}, "of 8 channels of toy, .* 4 channels .* another encoder's"),
    ({"statistics": {"images": 9, "mean": [0.0] * 4, "variance": [1.0] * 4, "encoder": "other"}}, "4 channels of other, .* of toy: they are another encoder's"),
    ({"statistics": {"images": 9, "mean": [0.0] * 4, "variance": [1.0, 1.0, 0.0, 1.0], "encoder": "toy"}}, "channel 2 of the latents .* is constant"),
    ({"statistics": {"images": 9}}, "cannot be used"),
    ({"statistics": {"images": 9, "mean": ["x"] * 4, "variance": [1.0] * 4}}, "cannot be used"),
])
def test_statistics_that_are_not_of_these_latents(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = pack(tmp_path / "data")
    edit_manifest(path, **change)
    with pytest.raises(DataError, match=message):
        open_dataset(config(path, "dataset"))
    assert open_dataset(config(path, "encoder")).info == INFO, "which needs none"


def test_pixels_have_no_normalisation_to_choose(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, DatasetInfo("grey", "pixels", (4, 8, 8), 10)) as writer:
        writer.write(id="0", latent=np.zeros((4, 8, 8), np.uint8))
    assert "statistics" not in ShardDataset(tmp_path).manifest
    with pytest.raises(DataError, match="holds pixels, .* leave out --data.normalize dataset"):
        open_dataset(config(tmp_path, "dataset"))


def test_an_encoder_of_another_stride_than_the_model_is_for(tmp_path: Path) -> None:
    path = pack(tmp_path / "data")
    small = dataclasses.replace(config(path, "encoder").model, input_size=4)
    with pytest.raises(DataError, match=r"takes \(4, 4, 4\), and these latents of toy are 2 times as large: an encoder of another stride"):
        open_dataset(dataclasses.replace(config(path, "encoder"), model=small))


def test_describe_measures_what_an_older_packer_did_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pack(tmp_path / "data")
    before = (path / "manifest.json").read_text()
    edit_manifest(path, statistics=None)
    assert describe.main([str(path), "--measure", "--verify"]) == 0
    assert json.loads((path / "manifest.json").read_text()) == json.loads(before), "to the last digit"
    assert "mean -3" in capsys.readouterr().out


def test_a_run_keeps_its_normalisation(tmp_path: Path, run_here: RunHere) -> None:
    path = pack(tmp_path / "data")
    first = run_here(*LATENTS, "--data.normalize", "dataset", data=path)
    assert first.code == 0
    kept = json.loads((first.run / "checkpoints" / "step_00000002" / "manifest.json").read_text())["state"]["data_info"]
    assert kept["latent_mean"] == json.loads((path / "manifest.json").read_text())["statistics"]["mean"] and kept["scale_factor"] == 1.0
    again = run_here(*LATENTS, "--train.steps", 3, data=path, output=first.run)
    assert again.code != 0 and "data.normalize: dataset -> encoder" in again.err
    found = json.loads((path / "manifest.json").read_text())["statistics"]
    edit_manifest(path, statistics=found | {"mean": [0.0] * 4})
    other = run_here(*LATENTS, "--train.steps", 3, "--data.normalize", "dataset", data=path, output=first.run)
    assert other.code != 0 and "normalization.mean" in other.err


def test_a_packer_measures_and_reports_the_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        latent_channels=4, shift_factor=0.0).save_pretrained(tmp_path / "vae")
    (tmp_path / "images").mkdir()
    for i in range(10):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    args = ["--images", tmp_path / "images", "--vae", tmp_path / "vae", "--out", tmp_path / "out", "--resolution", 16, "--rows-per-shard", 4,
            "--device", "cpu"]
    assert folder.main([*map(str, args)]) == 0
    data = ShardDataset(tmp_path / "out")
    everything = data.gather(np.arange(10))["latent"].astype(np.float64)
    found = Statistics(**data.manifest["statistics"])
    np.testing.assert_allclose(found.mean, everything.mean((0, 2, 3)), rtol=1e-6, atol=1e-9)
    assert found.encoder == data.info.encoders["vae"] and data.manifest["round_trip"]["images"] == 8
    words = f"{np.mean(data.manifest['round_trip']['psnr']):.1f} dB"
    assert f"round trip: {words}" in capsys.readouterr().out
    assert describe.main([str(tmp_path / "out")]) == 0 and words in capsys.readouterr().out
