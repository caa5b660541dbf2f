"""Every world size sees the same global batch; a step's batch depends on nothing but (seed, step)."""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largescale.data.format import CaptionInfo, DatasetInfo
from largescale.data.loader import DeviceBatches, Loader, to_x_start
from largescale.data.order import ORDERS, chunks
from largescale.data.read_ahead import ReadAhead
from largescale.data.shards import ShardDataset, check_flip
from largescale.data.writer import ShardWriter
from largescale.encoders.normalization import Normalization
from largescale.errors import ConfigError, DataError, StorageError
from largescale.randomness import host_draws

ROWS, GLOBAL, SEED = 50, 16, 3
INFO = DatasetInfo("toy", "pixels", (1, 2, 2), num_classes=ROWS)


class Counting(ShardDataset):
    calls = 0

    def gather(self, *args: Any) -> dict[str, np.ndarray]:
        self.calls += 1
        return super().gather(*args)


@pytest.fixture
def data(tmp_path: Path) -> Counting:
    """A row's label and pixels are its index."""
    with ShardWriter(tmp_path, INFO, rows_per_shard=20) as writer:
        for i in range(ROWS):
            writer.write(id=str(i), latent=np.full((1, 2, 2), i, np.uint8), label=i)
    return Counting(tmp_path)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def loader(data: ShardDataset, rank: int = 0, world_size: int = 1, micro: int = 4, **settings: Any) -> Loader:
    return Loader(data, seed=SEED, global_batch_size=GLOBAL, micro_batch_size=micro, rank=rank, world_size=world_size,
                  **settings)


def expected(step: int, order: str = "full") -> np.ndarray:
    return ORDERS[order](np.arange(step * GLOBAL, (step + 1) * GLOBAL), ROWS, SEED, GLOBAL)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_world_size_sees_the_same_rows_in_the_same_places(data: Counting, world_size: int, micro: int, order: str) -> None:
    for step in (0, 1, 2, 3, 1000):                     # step 3 straddles the first epoch's end
        labels = []
        for rank in range(world_size):
            with loader(data, rank, world_size, micro, start_step=step, order=order) as ranks_loader:
                batch = ranks_loader.batch(step)
            assert batch["label"].shape == (GLOBAL // world_size // micro, micro) and batch["label"].dtype == torch.int64
            assert batch["latent"].shape == (*batch["label"].shape, 1, 2, 2) and batch["latent"].dtype == torch.uint8
            assert torch.equal(batch["latent"][..., 0, 0, 0].long(), batch["label"])
            labels.append(batch["label"])
        assert np.array_equal(torch.stack(labels, dim=1).flatten(), expected(step, order))  # (accum, world, micro)


def test_a_retry_returns_the_same_batch_without_reading_again(data: Counting) -> None:
    with loader(data, prefetch=0) as batches:
        assert batches.batch(0) is batches.batch(0)
        assert data.calls == 1


def test_any_step_may_follow_any_other(data: Counting) -> None:
    with loader(data, start_step=5, prefetch=3) as batches:
        for step in (5, 6, 7, 7, 8, 100, 101, 99, 2, 0, 10**6, 5):
            assert np.array_equal(batches.batch(step)["label"].flatten(), expected(step))


def test_reads_ahead_and_no_further(data: Counting) -> None:
    with loader(data, prefetch=3) as batches:
        for step in range(4):
            batches.batch(step)
            deadline = time.monotonic() + 60
            while data.calls < step + 4 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)                            # for what must not happen
            assert data.calls == step + 4 and len(batches._pending) == 4


@pytest.mark.parametrize("micro", [2, 8])
def test_in_blocks_ranks_read_their_own_chunks_once_and_in_time(data: Counting, micro: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5,000 rows, over the end of an epoch; and after a jump those that are open there."""
    n_rows, steps = 5000, 340
    monkeypatch.setattr(Counting, "__len__", lambda self: n_rows)
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(ReadAhead, "_read", lambda self, first, n: asked.append((self.rank, first, n)))  # type: ignore[attr-defined]
    found = chunks(np.arange((steps + 80) * GLOBAL).reshape(-1, GLOBAL), n_rows, SEED, GLOBAL)
    for rank in range(2):
        mine = np.arange(GLOBAL).reshape(-1, 2, micro)[:, rank].ravel()
        with ReadAhead(data, SEED, GLOBAL, mine, mirrors=False, captions=False) as ahead:
            ahead.rank = rank  # type: ignore[attr-defined]
            for step in range(steps):
                ahead.advance(step)
                needed = {*found.first[step:step + 16, mine].ravel().tolist()}
                if step % 20 == 0:
                    wait(ahead._reads)
                    assert needed <= {first for who, first, _ in asked if who == rank}
            begun = len(asked)
            ahead.advance(7)
            wait(ahead._reads)
            assert {first for _, first, _ in asked[begun:]} >= {*found.first[7, mine].tolist()}
            del asked[begun:]
    for rank in range(2):                               # each chunk that begins in its places, once, and no other
        mine = np.arange(GLOBAL).reshape(-1, 2, micro)[:, rank].ravel()
        begins = found.place[:, mine] == 0
        its_own = Counter(zip(found.first[:, mine][begins].tolist(), found.size[:, mine][begins].tolist(), strict=True))
        read = Counter((first, n) for who, first, n in asked if who == rank)
        assert not read - its_own and read.total() > steps * GLOBAL / 2 / 64


def test_pieces_of_the_files_are_those_of_the_rows(tmp_path: Path, captioned: ShardDataset) -> None:
    def read(data: ShardDataset, first: int, n: int) -> list[bytes]:
        found = data.pieces(first, n, mirrors=True, captions=True)
        return [path.read_bytes()[offset:offset + size] for path, offset, size in found]

    with ShardWriter(tmp_path / "mirrored", DatasetInfo("toy", "latents", (1, 1, 2), 50), rows_per_shard=20) as writer:
        for i in range(50):
            writer.write(id=str(i), latent=np.full((1, 1, 2), i, np.float16), latent_mirror=np.full((1, 1, 2), -i, np.float16), label=i)
    mirrored = ShardDataset(tmp_path / "mirrored")

    def values(*rows: int) -> bytes:
        return np.repeat(rows, 2).astype(np.float16).tobytes()

    # Over the edge of two shards, and over the end of the set.
    assert read(mirrored, 18, 3) == [values(18, 19), values(-18, -19), values(20), values(-20)]
    assert read(mirrored, 49, 2) == [values(49), values(-49), values(0), values(0)]
    latents, *lists = read(captioned, 41, 2)            # rows of 3 and 1 captions
    assert latents == bytes([41] * 4 + [42] * 4)
    tokens, pooled = (np.frombuffer(lists[k], np.float16) for k in (2, 5))
    assert tokens.tolist() == [410] * 2 + [411] * 4 + [412] * 6 + [420] * 2 and pooled.tolist() == [410, 411, 412, 420]


def test_blocks_that_cannot_be_read_ahead_are_an_error_where_they_are_needed(data: Counting) -> None:
    (data.path / "shard_00001.arrow").unlink()
    with loader(data, order="blocks") as batches:
        assert batches._chunks
        wait(batches._chunks._reads)
        for step in itertools.count():                  # 50 rows are three steps
            if (expected(step, "blocks") // 20 == 1).any():
                with pytest.raises(StorageError, match=r"shard_00001.arrow cannot be read at present"):
                    batches.batch(step)
                break


def test_what_fails_in_the_thread_reaches_the_caller(data: Counting) -> None:
    (data.path / "shard_00001.arrow").unlink()          # after the start's checks, before it is mapped
    with loader(data) as batches:
        for _ in range(2):                              # asked again, it is read again
            with pytest.raises(StorageError, match=r"shard_00001.arrow cannot be read at present"):
                batches.batch(0)


def test_close_waits_for_what_is_read_and_drops_what_was_to_be(data: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, closing = threading.Event(), threading.Event()

    class Slow(Counting):
        def gather(self, *args: Any) -> dict[str, np.ndarray]:
            begun.set()
            closing.wait(60)
            return super().gather(*args)

    slow = Slow(data.path)
    batches = loader(slow, prefetch=100)
    assert begun.wait(60)
    dropped = batches._pending[max(batches._pending)].add_done_callback
    dropped(lambda _: closing.set())                    # then those that are being read go on
    batches.close()
    batches.close()                                     # again does no harm
    assert slow.calls < 100                             # and of the 100 most were never read
    with pytest.raises(RuntimeError, match="after shutdown"):
        batches.batch(0)


def test_refuses_a_batch_that_cannot_be_shared_out(data: Counting) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=16 .*world_size=6; try --train.global-batch-size 18"):
        loader(data, world_size=2, micro=3)


@pytest.mark.parametrize("kind", ["pixels", "latents"])
def test_half_of_the_rows_are_flipped_as_the_seed_and_the_step_say(tmp_path: Path, kind: str) -> None:
    """Latents are taken of the mirrored image, pixels turned along W."""
    dtype = np.uint8 if kind == "pixels" else np.float16
    with ShardWriter(tmp_path, DatasetInfo("toy", kind, (1, 1, 2), 40), rows_per_shard=16) as writer:
        for i in range(40):
            latent = np.array([[[i, i + 100]]], dtype)
            writer.write(id=str(i), latent=latent, label=i, **({"latent_mirror": latent[..., ::-1]} if kind == "latents" else {}))
    data, seen = ShardDataset(tmp_path), set()
    for step in range(4):
        with loader(data, rank=1, world_size=2, micro=4, flip=True, start_step=step) as batches:
            batch = batches.batch(step)
        flip = host_draws(SEED, step, GLOBAL)[0].reshape(2, 2, 4)[:, 1]
        seen |= set(flip.ravel())
        label = batch["label"]
        expected = torch.stack([label, label + 100], dim=-1)
        expected = torch.where(torch.from_numpy(flip)[..., None], expected.flip(-1), expected)
        assert torch.equal(batch["latent"][..., 0, 0, :].long(), expected)
    assert seen == {True, False}
    with loader(data) as batches:
        assert (batches.batch(0)["latent"][..., 0].long() < 100).all()


def test_latents_without_mirrors_are_not_flipped_in_silence(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, DatasetInfo("toy", "latents", (1, 1, 1), 8)) as writer:
        writer.write(id="0", latent=np.zeros((1, 1, 1), np.float16), label=0)
    with pytest.raises(DataError, match="without a latent_mirror"):
        ShardDataset(tmp_path).gather(np.array([0]), flip=np.array([True]))


def test_pixels_are_scaled() -> None:
    pixels = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).reshape(1, 1, 2, 2)
    x_start = to_x_start(pixels, "pixels", Normalization(), None)
    assert x_start.dtype == torch.float32
    torch.testing.assert_close(x_start[0, 0], torch.tensor([[-1, 1], [-0.6, -0.2]]))


def test_latents_are_scaled_in_fp32() -> None:
    latent = torch.full((2, 4, 3, 3), 3, dtype=torch.float16)
    torch.testing.assert_close(to_x_start(latent, "latents", Normalization(0.18215), None), torch.full((2, 4, 3, 3), 3 * 0.18215))


def test_moments_are_sampled_as_in_the_ldm() -> None:
    mean, noise = torch.randn(2, 3, 4, 4).half(), torch.randn(2, 3, 4, 4)
    logvar = torch.tensor([-40.0, -1.0, 30.0]).half().reshape(1, 3, 1, 1).expand(2, 3, 4, 4)
    std = torch.exp(0.5 * torch.tensor([-30.0, -1.0, 20.0])).reshape(1, 3, 1, 1)    # the clamp's ends
    mean[:, 0] = 0                                      # so that the smallest std shows
    x_start = to_x_start(torch.cat([mean, logvar], dim=1), "moments", Normalization(0.5), noise)
    torch.testing.assert_close(x_start, (mean.float() + std * noise) * 0.5, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="posterior_noise"):
        to_x_start(torch.cat([mean, logvar], dim=1), "moments", Normalization(), None)


@pytest.mark.parametrize(("kind", "has_mirror", "ok"), [
    ("pixels", False, True), ("latents", True, True), ("latents", False, False), ("moments", False, False),
])
def test_flips_need_pixels_or_mirrors(kind: str, has_mirror: bool, ok: bool) -> None:
    info = DatasetInfo("toy", kind, (8, 4, 4), num_classes=10)
    if ok:
        check_flip(info, has_mirror)
    else:
        with pytest.raises(DataError, match=r"--data.no-horizontal-flip"):
            check_flip(info, has_mirror)


@pytest.fixture
def captioned(tmp_path: Path) -> ShardDataset:
    """Row i has 1 + i % 3 captions; the k-th's embedding is 10 i + k."""
    info = DatasetInfo("toy", "pixels", (1, 2, 2), num_classes=0, captions=CaptionInfo(tokens=3, width=2, pooled_width=1))
    with ShardWriter(tmp_path / "captioned", info, rows_per_shard=20) as writer:
        for i in range(ROWS):
            pooled = [np.full(1, 10 * i + k, np.float16) for k in range(1 + i % 3)]
            tokens = [np.full((1 + k, 2), 10 * i + k, np.float16) for k in range(1 + i % 3)]
            writer.write(id=str(i), latent=np.full((1, 2, 2), i, np.uint8), captions=["x"] * len(pooled),
                         caption_tokens=tokens, caption_pooled=pooled)
        writer.write_empty_caption(np.zeros((1, 2), np.float16), np.zeros(1, np.float16))
    return ShardDataset(tmp_path / "captioned")


@pytest.mark.parametrize(("world_size", "micro"), [(1, 16), (2, 2), (4, 4)])
def test_captions_follow_the_seed_and_the_step_alone(captioned: ShardDataset, world_size: int, micro: int) -> None:
    for step in (0, 7):
        rows = expected(step)
        chosen = (host_draws(SEED, step, GLOBAL)[1] * (1 + rows % 3)).astype(int)
        got = np.empty((GLOBAL // world_size // micro, world_size, micro))
        for rank in range(world_size):
            with loader(captioned, rank, world_size, micro, captions=True, start_step=step) as ranks_loader:
                batch = ranks_loader.batch(step)
                assert batch["caption_tokens"].shape == (*batch["label"].shape, 3, 2)
                assert torch.equal(batch["caption_length"], 1 + batch["caption_pooled"][..., 0].long() % 10)
                got[:, rank] = batch["caption_pooled"][..., 0]
        assert np.array_equal(got.ravel(), 10 * rows + chosen)
    with loader(captioned) as without:
        assert set(without.batch(0)) == {"latent", "label"}


def test_every_caption_is_seen(captioned: ShardDataset) -> None:
    with loader(captioned, micro=GLOBAL, captions=True) as batches:
        seen = {int(c) for step in range(60) for c in batches.batch(step)["caption_pooled"].flatten()}
    assert seen == {10 * i + k for i in range(ROWS) for k in range(1 + i % 3)}


def test_batches_on_a_device(blobs: Path) -> None:
    """The same rows as the loader's in any order of steps; the next step's are there before they are asked for."""
    rows: dict[str, Any] = {"seed": 3, "global_batch_size": 8, "micro_batch_size": 4, "rank": 0, "world_size": 1}
    with Loader(ShardDataset(blobs), **rows) as loader, Loader(ShardDataset(blobs), **rows) as other:
        batches = DeviceBatches(loader, torch.device("cpu"))
        for step in (0, 0, 1, 2, 7, 7, 3):
            for name, values in other.batch(step).items():
                assert torch.equal(batches.batch(step)[name], values)
        loader.batch(4)
        batches.batch(3)
        assert batches._copied.keys() == {3, 4}
        ahead = batches._copied[4]
        assert batches.batch(4) is ahead


def test_a_row_that_cannot_be_read_ahead_is_an_error_only_when_it_is_asked_for(blobs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: dict[str, Any] = {"seed": 3, "global_batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1}
    load = Loader._load
    monkeypatch.setattr(Loader, "_load", lambda self, step: load(self, step) if step != 1 else (_ for _ in ()).throw(OSError("gone")))
    with Loader(ShardDataset(blobs), **rows) as loader:
        batches = DeviceBatches(loader, torch.device("cpu"))
        for _ in range(2):
            batches.batch(0)
        with pytest.raises(OSError, match="gone"):
            batches.batch(1)
        batches.batch(2)
