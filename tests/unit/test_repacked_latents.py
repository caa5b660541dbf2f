"""data_prep.latents: the formats of others, written here as their own code writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from data_prep import describe
from largescale.data.format import DatasetInfo
from largescale.data.loader import to_x_start
from largescale.data.shards import ShardDataset
from tests.random_models import make_vae
from tests.unit.latent_folders import N, labelled, lightningdit, mds, repa, run, values
from tests.unit.packed_pictures import one_thread  # noqa: F401


def stored(path: Path) -> tuple[DatasetInfo, dict[str, Any]]:
    data = ShardDataset(path, verify=True)
    return data.info, data.gather(np.arange(len(data)))


@pytest.mark.parametrize("inner", ["", "vae-sd"])
def test_repa(tmp_path: Path, inner: str) -> None:
    mean, std = repa(tmp_path / "in")
    vae = make_vae(tmp_path / "vae", shift_factor=0.25)
    assert run(tmp_path / "in" / inner, tmp_path / "out", "--vae", tmp_path / "vae") == 0
    info, rows = stored(tmp_path / "out")
    assert (info.name, info.kind, info.shape, info.num_classes, info.scale_factor) == ("in", "moments", (8, 8, 8), 7, 0.5)
    assert info.encoders == {"vae": vae.identity} and rows["label"].tolist() == [(i * 3) % 7 for i in range(N)]
    assert ShardDataset(tmp_path / "out").manifest["job"]["shift_factor"] == 0.25
    noise = torch.randn(N, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x_start = to_x_start(torch.from_numpy(rows["latent"]), info.kind, info.normalization, noise)
    # Their sample_posterior, of a latent that our VAE shifts.
    torch.testing.assert_close(x_start, (torch.from_numpy(mean) - 0.25 + torch.from_numpy(std) * noise) * 0.5, atol=4e-3, rtol=4e-3)


def test_lightningdit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    z, flip = lightningdit(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    info, rows = stored(tmp_path / "out")
    assert (info.kind, info.shape, info.num_classes, info.encoders) == ("latents", (32, 4, 4), 17, {})
    mirrored = ShardDataset(tmp_path / "out").gather(np.arange(N), flip=np.ones(N, bool))["latent"]
    assert np.array_equal(rows["latent"], z.astype(np.float16)) and np.array_equal(mirrored, flip.astype(np.float16))
    # Their __getitem__ with latent_norm.
    stats = torch.load(tmp_path / "in" / "latents_stats.pt")
    expected = (torch.from_numpy(z) - stats["mean"]) / stats["std"]
    torch.testing.assert_close(to_x_start(torch.from_numpy(rows["latent"]), info.kind, info.normalization, None), expected, atol=3e-3, rtol=3e-3)
    capsys.readouterr()
    assert describe.main([str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "LightningDiT's safetensors" in said and "of encoder" in said and "measured" in said


def test_lightningdit_without_statistics(tmp_path: Path) -> None:
    lightningdit(tmp_path / "in", stats=False)
    assert run(tmp_path / "in", tmp_path / "out", "--scale-factor", 0.3) == 0
    info, _ = stored(tmp_path / "out")
    assert (info.scale_factor, info.latent_mean) == (0.3, None)


def test_mds(tmp_path: Path) -> None:
    """Its latents are scaled already; captions are kept as texts."""
    z, captions = mds(tmp_path / "in")
    vae = make_vae(tmp_path / "vae", shift_factor=0.25)
    assert run(tmp_path / "in", tmp_path / "out", "--vae", tmp_path / "vae") == 0
    info, rows = stored(tmp_path / "out")
    assert (info.shape, info.num_classes, info.scale_factor, info.encoders) == ((4, 8, 8), 0, 0.5, {"vae": vae.identity})
    x_start = to_x_start(torch.from_numpy(rows["latent"]), info.kind, info.normalization, None)
    torch.testing.assert_close(x_start, torch.from_numpy(z), atol=4e-3, rtol=4e-3)
    assert ShardDataset(tmp_path / "out").texts(np.arange(N)) == [[caption] for caption in captions]


@pytest.mark.parametrize("nested", [True, False])
def test_datasets_on_disk(tmp_path: Path, nested: bool) -> None:
    """save_to_disk: state.json, and Arrow streams of record batches; Array3D is stored as nested lists."""
    z = values(4, 8, 8)
    (tmp_path / "in").mkdir()
    column = pa.array(z.tolist()) if nested else pa.FixedSizeListArray.from_arrays(pa.array(z.reshape(-1)), 256)
    table = pa.table({"moments": column, "label": list(range(N))})
    for number, part in enumerate((table.slice(0, 6), table.slice(6))):
        with pa.OSFile(str(tmp_path / "in" / f"data-{number:05d}-of-00002.arrow"), "wb") as sink:
            with pa.ipc.new_stream(sink, part.schema) as writer:
                writer.write_table(part, max_chunksize=4)
    files = [{"filename": f"data-{number:05d}-of-00002.arrow"} for number in range(2)]
    (tmp_path / "in" / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    assert run(tmp_path / "in", tmp_path / "out", "--scale-factor", 0.5, *(() if nested else ("--kind", "moments", "--shape", 4, 8, 8))) == 0
    info, rows = stored(tmp_path / "out")
    assert (info.kind, info.shape, info.num_classes) == ("latents" if nested else "moments", (4, 8, 8), N)
    assert np.array_equal(rows["latent"], z.astype(np.float16)) and rows["label"].tolist() == list(range(N))


@pytest.mark.parametrize("library", ["mds", "datasets"])
def test_what_the_library_itself_wrote(tmp_path: Path, library: str) -> None:
    """tests/reference/README.md says how."""
    options = ("--scale-factor", 0.5) if library == "datasets" else ("--vae", tmp_path / "vae")
    make_vae(tmp_path / "vae")
    assert run(Path(__file__).parents[1] / "reference" / library, tmp_path / "out", *options) == 0
    info, rows = stored(tmp_path / "out")
    truth = np.arange(48, dtype=np.float16).reshape(3, 4, 2, 2) / 8
    if library == "datasets":
        assert np.array_equal(rows["latent"], truth)
        # The fourth class has a name and no row.
        assert info.num_classes == 4 and rows["label"].tolist() == [2, 0, 1]
    else:
        # micro_diffusion's are multiplied by the factor already, as a model learns them.
        x_start = to_x_start(torch.from_numpy(rows["latent"]), info.kind, info.normalization, None)
        assert np.array_equal(x_start.numpy(), truth)
        assert ShardDataset(tmp_path / "out").texts(np.arange(3)) == [["größe 0"], ["größe 1"], ["größe 2"]]


def test_bfloat16(tmp_path: Path) -> None:
    """Which NumPy does not have."""
    z = torch.from_numpy(values(4, 2, 2)).bfloat16()
    (tmp_path / "in").mkdir()
    save_file({"latents": z, "labels": torch.arange(N)}, tmp_path / "in/0.safetensors")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert np.array_equal(ShardDataset(tmp_path / "out").gather(np.arange(N))["latent"], z.half().numpy())


def test_class_names_of_datasets(tmp_path: Path) -> None:
    labelled(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    data = ShardDataset(tmp_path / "out")
    assert data.manifest["class_names"] == [f"class {i}" for i in range(N + 1)] and data.info.num_classes == N + 1
