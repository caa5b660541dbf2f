"""python -m eval.digits SAMPLE_DIR ... --data data/digits: are the demo's samples the digits that
were asked for?

Trains a small CNN on 4,000 of the real digits, checks it on the other 1,000, and lets it read the
samples. A test of the demo only: it is not FID, not comparable with anything published, and blind
to a lack of variety.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import trange

from largescale.checkpoint.files import require_outside_checkpoints
from largescale.config.command_line import parse_options, run_program
from largescale.data.shards import ShardDataset
from largescale.errors import DataError
from largescale.host.files import require_writable, write_atomically

# The training of the classifier; results name them, so a change trains it again.
EPOCHS = 8
BATCH_SIZE = 100
LR = 8e-3
HELD_OUT = 0.2
SEED = 0


@dataclass(frozen=True)
class Digits:
    """Options of eval.digits."""

    samples: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that eval.sample wrote, such as samples/cfg1.5."""
    data: Path = Path("data/digits")
    """The real digits, as data_prep.digits packed them."""
    out: Path | None = None
    """A JSON file for the results. If it holds those of the same images, nothing is trained
    again."""


def to_input(images: npt.NDArray[np.uint8]) -> Tensor:
    """(N, 1, H, W) uint8 -> float32 in [-1, 1]."""
    return torch.from_numpy(images).float() / 127.5 - 1


def load_real(path: Path) -> tuple[Tensor, Tensor, str]:
    """Images (N, 1, H, W), labels (N,), and the data set's fingerprint. Raises DataError."""
    data = ShardDataset(path)
    # Another data set would train a classifier of something else.
    if data.info.kind != "pixels" or data.info.shape[0] != 1:
        raise DataError(
            f"{path} holds {data.info.kind} of shape {data.info.shape}, not grey digits; "
            "give --data the folder that data_prep.digits wrote"
        )
    rows = data.gather(np.arange(len(data)))
    return to_input(rows["latent"]), torch.from_numpy(rows["label"]), data.fingerprint


def load_samples(folder: Path, shape: torch.Size) -> tuple[Tensor, Tensor, str]:
    """Images (N, 1, H, W), the labels asked for, and the set's fingerprint. Raises DataError where
    there are none."""
    if not (folder / "provenance.json").is_file():
        raise DataError(
            f"{folder} holds no samples; give a folder that eval.sample wrote, such as "
            "samples/cfg1.5"
        )
    data = ShardDataset(folder, verify=True)
    # Samples of another shape would be read as nonsense, and scored as such.
    if data.info.shape != tuple(shape[1:]):
        raise DataError(
            f"{folder} holds images of shape {data.info.shape}, the real digits have "
            f"{tuple(shape[1:])}; give samples of a model that was trained on them"
        )
    rows = data.gather(np.arange(len(data)))
    return to_input(rows["latent"]), torch.from_numpy(rows["label"]), data.fingerprint


def split(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out, the same share of each class in both."""
    generator = torch.Generator().manual_seed(SEED)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        # Class by class, so that both parts have all digits.
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        held_out[members[order[: round(HELD_OUT * len(members))]]] = True
    return (~held_out).nonzero()[:, 0], held_out.nonzero()[:, 0]


def train(images: Tensor, labels: Tensor) -> nn.Module:
    """A classifier (N, 1, H, W) -> (N, classes); the same one for the same data."""
    torch.manual_seed(SEED)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.LazyLinear(int(labels.max()) + 1),
    )
    # The first call lets the last layer find its size, which the optimizer needs.
    model(images[:2])
    # A cycle of the learning rate that ends near 0: a few epochs are enough.
    optimizer = torch.optim.AdamW(model.parameters())
    steps = EPOCHS * math.ceil(len(images) / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
    for _ in trange(EPOCHS, desc="classifier", unit="epoch", dynamic_ncols=True):
        for batch in torch.randperm(len(images)).split(BATCH_SIZE):
            # By a pixel at most, into an empty margin: no ink reappears at the far side.
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = F.cross_entropy(model(images[batch].roll(shift, (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def recognised(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """The share of images that are read as their label, over all and for each class."""
    predicted = torch.cat([model(part).argmax(1) for part in images.split(500)])
    right = predicted == labels
    per_class = {}
    for label in labels.unique():
        per_class[int(label)] = right[labels == label].float().mean().item()
    return {"n": len(labels), "recognised": right.float().mean().item(), "per_class": per_class}


def score(sample_dirs: tuple[Path, ...], data: Path, earlier: Path | None = None) -> dict[str, Any]:
    """The results of all sample sets. `earlier`: a file of results of a previous start, which are
    returned where they are of the same images and settings."""
    images, labels, fingerprint = load_real(data)
    # All sets are loaded before training: an error comes before the work.
    sets = {}
    fingerprints = {}
    for folder in sample_dirs:
        drawn, asked, fingerprints[str(folder)] = load_samples(folder, images.shape)
        sets[str(folder)] = (drawn, asked)

    # What the results depend on.
    of = {
        "classifier": [EPOCHS, BATCH_SIZE, LR, HELD_OUT, SEED],
        "data": fingerprint,
        "samples": fingerprints,
    }
    # A file that is missing, damaged or something else holds no earlier results.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if earlier and (results := json.loads(earlier.read_text())).get("of") == of:
            return dict(results)

    kept, held_out = split(labels)
    start = time.perf_counter()
    model = train(images[kept], labels[kept])
    print(
        f"classifier: trained on {len(kept)} real digits in {time.perf_counter() - start:.1f} s",
        file=sys.stderr,
    )
    on_real = recognised(model, images[held_out], labels[held_out])
    on_samples = {}
    for name, (drawn, asked) in sets.items():
        on_samples[name] = recognised(model, drawn, asked)
    return {"of": of, "trained_on": len(kept), "held_out": on_real, "samples": on_samples}


def line(name: str, result: dict[str, Any]) -> str:
    """One set's result, over all and for each class."""
    classes = [f"{label}: {share:.0%}" for label, share in result["per_class"].items()]
    return f"{name}: {result['recognised']:.1%} of {result['n']} recognised ({', '.join(classes)})"


def in_plain_words(results: dict[str, Any]) -> str:
    """A sentence for somebody who does not know the scores."""
    # The best of the sets, as guidance scales are tried to find it.
    folder, best = max(results["samples"].items(), key=lambda item: item[1]["recognised"])
    real = results["held_out"]
    return (
        f"In plain words: of {best['n']:,} digits drawn ({folder}), {best['recognised']:.0%} are "
        f"read as the one asked for, by a network that reads {real['recognised']:.0%} of real ones "
        "rightly."
    )


def main(args: Sequence[str] | None = None) -> int:
    options = parse_options(Digits, args, program="eval.digits", description=__doc__)
    # More threads gain nothing on so small a network, and lose ten times the time on a busy machine.
    torch.set_num_threads(1)
    return run_program(lambda: run(options), "correct the cause, and run again")


def run(options: Digits) -> None:
    """Print the results, and write them where --out is given."""
    # An --out that cannot be written is an error before training.
    if options.out:
        require_outside_checkpoints(options.out, "--out")
        require_writable(options.out, remedy="choose another --out")
    results = score(options.samples, options.data, options.out)
    print(line("held-out real digits", results["held_out"]))
    for name, result in results["samples"].items():
        print(line(name, result))
    print(in_plain_words(results))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
