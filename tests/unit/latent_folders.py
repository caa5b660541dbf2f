"""Latents in the formats of others, written as their own code writes them, and what is packed of them."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from data_prep import latents

N = 9


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(N, *shape)).astype(np.float32) * 2 + 1


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


def on_disk(folder: Path, labels: Any = None, names: Any = None) -> Any:
    """datasets.save_to_disk: two files of two batches each."""
    z = values(4, 8, 8)
    folder.mkdir()
    columns = {"latent": pa.array(z.tolist())} | ({} if labels is None else {"label": labels})
    table = pa.table(columns)
    for number, part in enumerate((table.slice(0, 5), table.slice(5))):
        with pa.OSFile(str(folder / f"data-{number}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, part.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": f"data-{number}.arrow"} for number in range(2)]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"label": {"names": names}}}))
    return z


def labelled(folder: Path) -> None:
    on_disk(folder, list(range(N)), [f"class {i}" for i in range(N + 1)])


MAKE: dict[str, Callable[[Path], Any]] = {"repa": repa, "lightningdit": lightningdit, "mds": mds, "on_disk": labelled}


def source_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in (".npy", ".safetensors", ".mds", ".arrow"))
