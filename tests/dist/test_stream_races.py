"""DeepSpeed's streams under our engine: no access to memory is left to chance."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ds_json
from tests.ranks import ROOT, ranks_of


def races(waits: str, data: Path, ds: Path, run: Path, *options: Any) -> dict[str, int]:
    done = ranks_of(ROOT / "tests/dist/stream_races.py", waits, "debug", "--data.path", data, "--output", run,
                    "--train.ds-config", ds, "--train.steps", 3, *options)
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    found = json.loads(done[0].stdout.splitlines()[-1])
    assert len(found["operations"]) >= 2, "everything ran on one stream"
    return found["races"]


def many_buckets(precision: str, folder: Path) -> Path:
    path = ds_json(precision, folder, initial_scale_power=8)
    ds = json.loads(path.read_text())
    ds["zero_optimization"] |= {"reduce_bucket_size": 6000, "overlap_comm": True}
    path.write_text(json.dumps(ds))
    return path


@pytest.mark.parametrize("waits", ["all", "streams"])
@pytest.mark.parametrize(("precision", "options"), [
    ("fp32", ()),
    ("bf16", ("--train.micro-batch-size", 4)),
    ("fp16", ("--optimizer.clip-grad-norm", 0.3, "--train.micro-batch-size", 4)),
    ("bf16", ("--optimizer.kernel", "fused", "--optimizer.clip-grad-norm", 0.3)),
])
def test_no_access_is_left_to_chance(
    precision: str, options: tuple[Any, ...], waits: str, blobs: Path, tmp_path: Path
) -> None:
    """With many small buckets, whose reduction overlaps with the backward pass, accumulation and clipping; also where
    DeepSpeed does not wait for the whole device at the end of a backward pass."""
    if "fused" in options:
        pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")
    assert races(waits, blobs, many_buckets(precision, tmp_path), tmp_path / "run", *options) == {}


def test_a_wait_that_is_left_out_is_seen(blobs: Path, tmp_path: Path) -> None:
    """The norm reads gradients that another stream still writes."""
    found = races("none", blobs, many_buckets("bf16", tmp_path), tmp_path / "run")
    assert any("_foreach_norm" in race or "norm" in race.split()[0] for race in found), found
