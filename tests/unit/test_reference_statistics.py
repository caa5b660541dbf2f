"""Files of statistics of reference images: ours, ADM's, pytorch-fid's; damaged ones are named."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.scoring.image_sets import open_images
from eval.scoring.reference_statistics import Statistics, read_statistics, write_statistics
from largescale.errors import DataError
from tests.unit.image_files import ORDER, PIXELS, H, W, alter, expected, npz

RANDOM = np.random.default_rng(1)
FEATURES = RANDOM.normal(size=(30, 5)).astype(np.float32)
FULL = Statistics(FEATURES.mean(0).astype(np.float64), np.cov(FEATURES.T), RANDOM.normal(size=3), np.eye(3), 30, "net sha256:1", (12, 16),
                  FEATURES, {"dataset": "abc", "n": 3})
ARRAYS = ("mean", "cov", "mean_spatial", "cov_spatial", "features")


@pytest.mark.parametrize("statistics", [FULL, Statistics(FULL.mean, FULL.cov), Statistics(FULL.mean, FULL.cov, features=FEATURES)])
def test_statistics_come_back(statistics: Statistics, tmp_path: Path) -> None:
    write_statistics(tmp_path / "new/reference.npz", statistics)
    read = read_statistics(tmp_path / "new/reference.npz")
    for name in ARRAYS:
        before, after = getattr(statistics, name), getattr(read, name)
        assert (before is None) == (after is None)
        if before is not None:
            assert np.array_equal(before, after) and after.dtype == (np.float32 if name == "features" else np.float64)
    assert (read.count, read.extractor, read.resolution, read.facts) == (
        statistics.count, statistics.extractor, statistics.resolution, statistics.facts)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["reference.npz"]


def test_others_read_ours(tmp_path: Path) -> None:
    """ADM's evaluator and pytorch-fid take the same keys."""
    write_statistics(tmp_path / "r.npz", FULL)
    with np.load(tmp_path / "r.npz") as file:
        assert np.array_equal(file["mu"], FULL.mean) and np.array_equal(file["sigma"], FULL.cov)
        assert np.array_equal(file["mu_s"], FULL.mean_spatial) and np.array_equal(file["sigma_s"], FULL.cov_spatial)


def test_adms_and_pytorch_fids(tmp_path: Path) -> None:
    adm = npz(tmp_path / "adm.npz", PIXELS, mu=FULL.mean.astype(np.float32), sigma=FULL.cov, mu_s=FULL.mean_spatial, sigma_s=FULL.cov_spatial)
    read = read_statistics(adm)
    assert read.mean.dtype == np.float64 and np.array_equal(read.cov, FULL.cov) and read.cov_spatial is not None
    assert (read.count, read.extractor, read.features, read.resolution) == (None, None, None, (H, W))
    assert torch.equal(open_images(adm).read(ORDER), expected(ORDER))
    fid = read_statistics(npz(tmp_path / "fid.npz", mu=FULL.mean, sigma=FULL.cov))
    assert (fid.mean_spatial, fid.cov_spatial, fid.resolution) == (None, None, None)


def test_damaged_statistics(tmp_path: Path) -> None:
    """Also of content that someone changed, with CRCs that fit."""
    path = tmp_path / "r.npz"
    write_statistics(path, FULL)
    with np.load(path) as file:
        content = dict(file)
    changes: dict[str, dict[str, Any]] = {
        "value": {"mu": content["mu"] + 1e-12}, "about": {"largescale": np.array(str(content["largescale"]).replace("30", "31"))},
        "type": {"mu": content["mu"].view(np.int64)}, "features": {"features": content["features"][:-1]}}
    for name, change in changes.items():
        with pytest.raises(DataError, match=r"cannot be used \(its hash is not that of its content\); make it anew"):
            read_statistics(npz(tmp_path / f"{name}.npz", **(content | change)))
    for gone in ("sha256", "features"):
        with pytest.raises(DataError, match="its hash is not that of its content"):
            read_statistics(npz(tmp_path / "gone.npz", **{k: v for k, v in content.items() if k != gone}))
    for at in range(40, path.stat().st_size, 211):
        alter(path, at)
        try:
            same = read_statistics(path)                # a bit that nothing depends on, as zip's date
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert all(np.array_equal(getattr(same, name), getattr(FULL, name)) for name in ARRAYS) and same.facts == FULL.facts
        alter(path, at)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be used"):
        read_statistics(path)


def test_no_statistics(tmp_path: Path) -> None:
    npz(tmp_path / "images.npz", PIXELS)
    npz(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.eye(4))
    npz(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    npz(tmp_path / "half.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(3))
    for name, message in {"images.npz": r"holds arr_0, and no statistics \(mu, sigma\)", "none.npz": "is not a file; give statistics",
                          "shapes.npz": r"a mean of shape \(3,\) does not fit a covariance of shape \(4, 4\)", "nan.npz": "not finite",
                          "half.npz": "does not fit a covariance of shape None", "": "is not a file"}.items():
        with pytest.raises(DataError, match=message):
            read_statistics(tmp_path / name)
    for change in ({"mean": np.zeros(4)}, {"features": FEATURES[:, :4]}, {"cov_spatial": None}, {"mean": np.full(5, np.inf)}):
        with pytest.raises(ValueError, match="fit|finite"):
            dataclasses.replace(FULL, **change)
    with pytest.raises(ValueError, match="does not fit"):
        Statistics(np.zeros(()), np.zeros(()))


def test_statistics_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.npz"
    write_statistics(path, FULL)
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_statistics(path, dataclasses.replace(FULL, count=31))
    assert path.read_bytes() == before and json.dumps(read_statistics(path).count) == "30"
