"""data_prep.latents: the formats of others, written here as their own code writes them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from data_prep import describe, latents
from largescale.data.format import DatasetInfo
from largescale.data.loader import to_x_start
from largescale.data.shards import ShardDataset
from tests.random_models import make_vae

N = 9


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(N, *shape)).astype(np.float32) * 2 + 1


def stored(path: Path) -> tuple[DatasetInfo, dict[str, Any]]:
    data = ShardDataset(path, verify=True)
    return data.info, data.gather(np.arange(len(data)))


def run(source: Path, out: Path, *more: Any) -> int:
    return latents.main(["--latents", str(source), "--out", str(out), "--rows-per-shard", "4", *map(str, more)])


def repa(folder: Path, name: str = "vae-sd") -> tuple[Any, Any]:
    """preprocessing/dataset_tools.py encode: mean and std, and the labels."""
    mean, std = values(4, 8, 8), np.exp(values(4, 8, 8, seed=1) / 4)
    std[0, 0, 0, 0] = 0
    labels = []
    for i in range(N):
        file = f"{i:08d}"[:5] + f"/img-mean-std-{i:08d}.npy"
        (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
        np.save(buffer := io.BytesIO(), np.concatenate([mean[i], std[i]]))
        (folder / name / file).write_bytes(buffer.getbuffer())
        labels.append([file, (i * 3) % 7])
    (folder / name / "dataset.json").write_text(json.dumps({"labels": labels}))
    return mean, std


@pytest.mark.parametrize("inner", ["", "vae-sd"])
def test_repa(tmp_path: Path, inner: str) -> None:
    mean, std = repa(tmp_path / "in")
    vae = make_vae(tmp_path / "vae", shift_factor=0.25)
    assert run(tmp_path / "in" / inner, tmp_path / "out", "--vae", tmp_path / "vae") == 0
    info, rows = stored(tmp_path / "out")
    assert (info.name, info.kind, info.shape, info.num_classes, info.scale_factor) == ("in", "moments", (8, 8, 8), 7, 0.5)
    assert info.encoders == {"vae": vae.identity} and rows["label"].tolist() == [(i * 3) % 7 for i in range(N)]
    noise = torch.randn(N, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    x_start = to_x_start(torch.from_numpy(rows["latent"]), info.kind, info.normalization, noise)
    # Their sample_posterior, of a latent that our VAE shifts.
    torch.testing.assert_close(x_start, (torch.from_numpy(mean) - 0.25 + torch.from_numpy(std) * noise) * 0.5, atol=4e-3, rtol=4e-3)


def lightningdit(folder: Path, stats: bool = True) -> tuple[Any, Any]:
    """extract_features.py: shards of a rank, and datasets/img_latent_dataset.py: statistics."""
    folder.mkdir()
    z, flip = values(32, 4, 4), values(32, 4, 4, seed=1)
    labels = torch.arange(N) * 2
    for shard, part in enumerate((slice(0, 5), slice(5, N))):
        tensors = {"latents": torch.from_numpy(z[part]), "latents_flip": torch.from_numpy(flip[part]), "labels": labels[part].clone()}
        save_file(tensors, folder / f"latents_rank00_shard{shard:03d}.safetensors", metadata={"total_size": "5"})
    if stats:
        every = torch.from_numpy(z)
        torch.save({"mean": every.mean(dim=[0, 2, 3], keepdim=True), "std": every.std(dim=[0, 2, 3], keepdim=True)}, folder / "latents_stats.pt")
    return z, flip


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


@pytest.mark.parametrize(("stats", "message"), [
    ({"mean": torch.zeros(1, 16, 1, 1), "std": torch.ones(1, 16, 1, 1)}, "statistics of 16 channels, the latents have 32: they are another encoder's"),
    ({"mean": torch.zeros(1, 32, 1, 1), "std": torch.full((1, 32, 1, 1), 0.2)}, "another encoder's: channel .* std 0.2 there"),
    ({"mean": torch.zeros(1, 32, 1, 1), "std": torch.zeros(1, 32, 1, 1)}, "another encoder's"),
    ({"other": torch.zeros(1)}, "latents_stats.pt cannot be read"),
])
def test_statistics_of_another_encoder(tmp_path: Path, stats: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    lightningdit(tmp_path / "in")
    torch.save(stats, tmp_path / "in" / "latents_stats.pt")
    assert run(tmp_path / "in", tmp_path / "out") == 2
    error = " ".join(capsys.readouterr().err.split())
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert not (tmp_path / "out" / "manifest.json").exists()


def mds(folder: Path) -> tuple[Any, list[str]]:
    """micro_diffusion's precompute.py with streaming's MDSWriter, on two ranks whose indices are merged."""
    z, captions = values(4, 8, 8), [f"é caption {i}" * (i + 1) for i in range(N)]
    names, shards = ["caption", "caption_latents", "latents_256", "latents_512"], []
    for rank, part in enumerate((range(5), range(5, N))):
        samples = []
        for i in part:
            columns = [captions[i].encode(), b"\0" * 12, z[i].astype(np.float16).tobytes(), b"\0" * 64]
            samples.append(np.array([*map(len, columns)], np.uint32).tobytes() + b"".join(columns))
        config = json.dumps({"column_names": names}).encode()
        offsets = np.array([0, *map(len, samples)]).cumsum().astype(np.uint32)
        offsets += 4 + offsets.nbytes + len(config)
        (folder / f"{rank}").mkdir(parents=True)
        name = f"{rank}/shard.00000.mds"
        (folder / name).write_bytes(np.uint32(len(samples)).tobytes() + offsets.tobytes() + config + b"".join(samples))
        shards.append({"column_names": names, "column_encodings": ["str", "bytes", "bytes", "bytes"], "column_sizes": [None] * 4,
                       "compression": None, "format": "mds", "hashes": [], "raw_data": {"basename": name, "bytes": 0, "hashes": {}},
                       "samples": len(samples), "size_limit": 2**28, "version": 2, "zip_data": None})
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))
    return z, captions


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


def nothing(folder: Path) -> None:
    folder.mkdir()


def several_sets(folder: Path) -> None:
    folder.mkdir()
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))


def images_only(folder: Path) -> None:
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({"labels": [["00000/img00000000.png", 6]]}))


def cut_npy(folder: Path) -> None:
    repa(folder)
    next((folder / "vae-sd" / "00000").iterdir()).write_bytes(b"\x93NUMPY")


def odd_shape(folder: Path) -> None:
    repa(folder)
    for path in (folder / "vae-sd" / "00000").iterdir():
        np.save(path, np.zeros((7, 8, 8), np.float32))


def cut_mds(folder: Path) -> None:
    mds(folder)
    path = folder / "1" / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-5])


def compressed_mds(folder: Path) -> None:
    mds(folder)
    index = json.loads((folder / "index.json").read_text())
    index["shards"][0]["compression"] = "zstd"
    (folder / "index.json").write_text(json.dumps(index))


def cut_safetensors(folder: Path) -> None:
    lightningdit(folder)
    (folder / "latents_rank00_shard001.safetensors").write_bytes(b"123")


def too_large(folder: Path) -> None:
    lightningdit(folder, stats=False)
    save_file({"latents": torch.full((2, 32, 4, 4), 1e6), "labels": torch.zeros(2)}, folder / "latents_rank00_shard002.safetensors")


@pytest.mark.parametrize(("make", "more", "message"), [
    (nothing, (), "has neither dataset.json"),
    (several_sets, (), "holds several sets; give one of its folders train, test"),
    (images_only, (), "lists images, not latents"),
    (cut_npy, (), "npy cannot be read"),
    (odd_shape, (), "not mean and std of latents"),
    (cut_mds, (), "is cut short"),
    (compressed_mds, (), "only uncompressed MDS is read"),
    (mds, ("--column", "x"), "none of them x; name the one with the latents by --column"),
    (mds, ("--shape", 3, 8, 8), "256 values a row, which --shape"),
    (cut_safetensors, (), "shard001.safetensors cannot be read"),
    (too_large, (), "is not finite"),
    (lightningdit, ("--scale-factor", 0), r"--scale-factor 0.0 must lie in"),
    (repa, ("--rows-per-shard", 0), "rows-per-shard"),
])
def test_what_cannot_be_repacked(tmp_path: Path, make: Callable[[Path], Any], more: tuple[Any, ...], message: str,
                                 capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", *more) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_vae_of_other_latents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightningdit(tmp_path / "in")
    make_vae(tmp_path / "vae")
    assert run(tmp_path / "in", tmp_path / "out", "--vae", tmp_path / "vae") == 2
    assert "has latents of 4 channels, those in" in " ".join(capsys.readouterr().err.split())
