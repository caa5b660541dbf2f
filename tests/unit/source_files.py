"""Files that packers read, made small, and what is read of them."""

import csv
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.sources import Item, Source

SHARED = Path(os.environ.get("LARGESCALE_SHARED", Path(__file__).parents[2].parent / "shared")) / "data"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here; LARGESCALE_SHARED names the folder above data/")
    return SHARED / name


def picture(shade: int = 0, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("L", (size, size), shade).save(file, "PNG")
    return file.getvalue()


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture())
    return root


def items(source: Source, rows_per_shard: int = 2) -> list[Item]:
    """Of all parts, each read twice."""
    every = [list(source.part(i, rows_per_shard)) for i in range(source.parts(rows_per_shard))]
    again = [[item.id for item in source.part(i, rows_per_shard)] for i in range(source.parts(rows_per_shard))]
    assert again == [[item.id for item in part] for part in every]
    found = [item for part in every for item in part]
    assert source.size in (None, len(found)) and len({item.id for item in found}) == len(found)
    assert json.loads(json.dumps(source.facts)) == source.facts
    known = source.ids()
    assert known is None or [id for some in known for id in some] == [item.id for item in found]
    return found


def ids(source: Source) -> list[str]:
    return [item.id for item in items(source)]


def captions_file(path: Path, images: Sequence[tuple[Any, str]], captions: Sequence[tuple[Any, Any, str]]) -> Path:
    path.write_text(json.dumps({"images": [{"id": id, "file_name": file} for id, file in images], "annotations": [
        {"image_id": image, "id": id, "caption": text} for image, id, text in captions]}))
    return path


GOOD: dict[str, Any] = {"images": [(1, "a.png"), (2, "b.png")], "captions": [(1, 1, "x"), (2, 2, "y")]}


def table(path: Path, *rows: Sequence[Any], header: Sequence[str] = ("file", "label")) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            (info := tarfile.TarInfo(name)).size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


SAMPLES = [("1.jpg", picture(1)), ("1.txt", b"one\n"), ("1.cls", b"4"), ("d/2.png", picture(2)), ("d/2.txt", b"two"), ("d/2.cls", b" 9\n")]


def rows(path: Path, group: int = 3, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=group)
    return path


def pictures(n: int) -> pa.Array:
    return pa.array([picture(i) for i in range(n)], pa.binary())
