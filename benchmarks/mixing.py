"""How well an order of rows mixes a sorted set, ours beside those of its peers; a part of
benchmarks/loader.py --mixing, which runs it in the peers' environment.

The set is as large as ImageNet and sorted by class, as packers write it: 1,281,167 rows of 1,000
classes, in shards of 4,096 rows (webdataset: tars of 1,000). Each library makes the order of an
epoch by its own code, without data; batches are of 256.

    mixing.py      prints one line of JSON: {order: {figure: value}}
"""

import itertools
import json
import random
from collections.abc import Callable
from functools import partial

import numpy as np

from largescale.data.order import ORDERS

ROWS = 1_281_167
CLASSES = 1000
BATCH = 256
SHARD = 4096
TAR = 1000
# Batches in a row whose classes are counted together, and how often.
STEPS = 64
WINDOWS = 40

Order = np.ndarray
HEADS = {
    "classes": "classes in a batch",
    "classes_64": "in 64 batches",
    "neighbours": "stored neighbours come apart by",
    "shards": "shards of a batch",
}


def ours(order: str) -> Order:
    return ORDERS[order](np.arange(ROWS), ROWS, 0, BATCH)


def webdataset(buffer: int) -> Order:
    """Its shuffle of 100 tars, then of rows."""
    from webdataset.filters import _shuffle

    rng = random.Random(0)
    tars = range(-(-ROWS // TAR))
    rows = (
        range(tar * TAR, min((tar + 1) * TAR, ROWS)) for tar in _shuffle(iter(tars), 100, rng=rng)
    )
    return np.fromiter(
        _shuffle(itertools.chain.from_iterable(rows), buffer, rng=rng), np.int64, ROWS
    )


def streaming(algorithm: str, canonical_nodes: int, block: int) -> Order:
    """Its order on one node with one rank and worker."""
    from streaming.base.partition import get_partitions
    from streaming.base.shuffle import get_shuffle

    sizes = np.full(-(-ROWS // SHARD), SHARD)
    sizes[-1] = ROWS - SHARD * (len(sizes) - 1)
    places = get_partitions("relaxed", ROWS, canonical_nodes, 1, 1, 1, BATCH).ravel()
    # What fills the last batch, and what it repeats so that all canonical nodes have as many, goes.
    places = places[np.sort(np.unique(places, return_index=True)[1])]
    return get_shuffle(algorithm, sizes, canonical_nodes, 0, 0, block)[places[places >= 0]]


# As each library's defaults on one node have it, and with a block that is as large as our window
# is, 64 x 256 rows, or as large as 16 shards.
ORDERS_OF: dict[str, Callable[[], Order]] = {
    "full": partial(ours, "full"),
    "blocks": partial(ours, "blocks"),
    "webdataset, buffer of 1,000": partial(webdataset, 1000),
    "webdataset, buffer of 16,384": partial(webdataset, 16_384),
    "streaming py1e, block of 4,000,000": partial(streaming, "py1e", 1, 4_000_000),
    "streaming py1e, block of 65,536": partial(streaming, "py1e", 1, 65_536),
    "streaming py1s, block of 262,144": partial(streaming, "py1s", 64, 1 << 18),
    "streaming py1s, block of 65,536": partial(streaming, "py1s", 1, 65_536),
}


def distinct(values: Order, together: int) -> float:
    """The mean number of different values in so many neighbours, at places spread over the order."""
    starts = np.linspace(0, len(values) - together, WINDOWS).astype(int)
    return float(np.mean([len(np.unique(values[start : start + together])) for start in starts]))


def figures(order: Order) -> dict[str, float]:
    """What an order does to a set that is sorted by class."""
    assert len(np.unique(order)) == ROWS == len(order), "not every row once"
    place = np.empty(ROWS, np.int64)
    place[order] = np.arange(ROWS)
    return {
        "classes": distinct(order * CLASSES // ROWS, BATCH),
        "classes_64": distinct(order * CLASSES // ROWS, STEPS * BATCH),
        "neighbours": float(np.median(np.abs(np.diff(place)))) / ROWS,
        "shards": distinct(order // SHARD, BATCH),
    }


def markdown(found: dict[str, dict[str, float]]) -> str:
    """The figures as a table."""
    heads = ["order", *(HEADS[name] for name in next(iter(found.values())))]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for name, row in found.items():
        cells = [f"{row['classes']:.0f}", f"{row['classes_64']:,.0f}"]
        cells += [f"{row['neighbours']:.1%} of the epoch", f"{row['shards']:.0f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    print(json.dumps({name: figures(make()) for name, make in ORDERS_OF.items()}))


if __name__ == "__main__":
    main()
