"""Every world size sees the same global batch; a step's batch depends on nothing but (seed, step)."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from largescale.data.loader import Loader, check_flip, to_x_start
from largescale.data.order import sample_indices
from largescale.data.shards import DatasetInfo, ShardDataset, ShardWriter
from largescale.errors import ConfigError, DataError

ROWS, GLOBAL, SEED = 50, 16, 3
INFO = DatasetInfo("toy", "pixels", (1, 2, 2), num_classes=ROWS)


class Counting(ShardDataset):
    calls = 0

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        self.calls += 1
        return super().gather(indices)


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


def expected(step: int) -> np.ndarray:
    return sample_indices(np.arange(step * GLOBAL, (step + 1) * GLOBAL), ROWS, SEED)


@pytest.mark.parametrize("micro", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_world_size_sees_the_same_rows_in_the_same_places(data: Counting, world_size: int, micro: int) -> None:
    for step in (0, 1, 2, 3, 1000):                     # step 3 straddles the first epoch's end
        labels = []
        for rank in range(world_size):
            with loader(data, rank, world_size, micro, start_step=step) as ranks_loader:
                batch = ranks_loader.batch(step)
            assert batch.label.shape == (GLOBAL // world_size // micro, micro) and batch.label.dtype == torch.int64
            assert batch.latent.shape == (*batch.label.shape, 1, 2, 2) and batch.latent.dtype == torch.uint8
            assert torch.equal(batch.latent[..., 0, 0, 0].long(), batch.label) and batch.latent_mirror is None
            labels.append(batch.label)
        assert np.array_equal(torch.stack(labels, dim=1).flatten(), expected(step))  # (accum, world, micro)


def test_a_retry_returns_the_same_batch_without_reading_again(data: Counting) -> None:
    with loader(data, prefetch=0) as batches:
        assert batches.batch(0) is batches.batch(0)
        assert data.calls == 1


def test_any_step_may_follow_any_other(data: Counting) -> None:
    with loader(data, start_step=5, prefetch=3) as batches:
        for step in (5, 6, 7, 7, 8, 100, 101, 99, 2, 0, 10**6, 5):
            assert np.array_equal(batches.batch(step).label.flatten(), expected(step))


def test_reads_ahead_and_no_further(data: Counting) -> None:
    with loader(data, prefetch=3) as batches:
        for step in range(4):
            batches.batch(step)
            deadline = time.monotonic() + 1.5
            while data.calls < step + 4 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)                            # for what must not happen
            assert data.calls == step + 4 and len(batches._pending) == 4


def test_what_fails_in_the_thread_reaches_the_caller(data: Counting) -> None:
    (data.path / "shard_00001.arrow").unlink()          # after the start's checks, before it is mapped
    with loader(data) as batches:
        with pytest.raises(DataError, match=r"shard_00001.arrow cannot be read"):
            batches.batch(0)


def test_close_is_prompt_and_drops_what_was_read_ahead(data: Counting) -> None:
    class Slow(Counting):
        def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
            time.sleep(0.1)
            return super().gather(indices)

    batches = loader(Slow(data.path), prefetch=100)
    started = time.monotonic()
    batches.close()
    batches.close()                                     # again does no harm
    assert time.monotonic() - started < 1
    with pytest.raises(RuntimeError, match="after shutdown"):
        batches.batch(0)


def test_refuses_a_batch_that_cannot_be_shared_out(data: Counting) -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=16 .*world_size=6; try --train.global-batch-size 18"):
        loader(data, world_size=2, micro=3)


def test_mirrors_travel_with_their_rows(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, DatasetInfo("toy", "latents", (1, 1, 1), 8)) as writer:
        for i in range(8):
            latent = np.full((1, 1, 1), i, np.float16)
            writer.write(id=str(i), latent=latent, latent_mirror=-latent, label=i)
    with loader(ShardDataset(tmp_path)) as batches:
        batch = batches.batch(0)
    assert batch.latent_mirror is not None and torch.equal(batch.latent_mirror, -batch.latent)


FLIP = torch.tensor([True, False])


def test_pixels_are_scaled_and_flipped_along_w() -> None:
    pixels = torch.tensor([0, 255, 51, 102], dtype=torch.uint8).reshape(1, 1, 2, 2).repeat(2, 1, 1, 1)
    x_start = to_x_start(pixels, None, "pixels", 1.0, FLIP, None)
    assert x_start.dtype == torch.float32
    torch.testing.assert_close(x_start[:, 0], torch.tensor([[[1, -1], [-0.2, -0.6]], [[-1, 1], [-0.6, -0.2]]]))


def test_latents_are_scaled_in_fp32_and_take_the_mirrors_where_flipped() -> None:
    latent, mirror = torch.full((2, 4, 3, 3), 2, dtype=torch.float16), torch.full((2, 4, 3, 3), 3, dtype=torch.float16)
    x_start = to_x_start(latent, mirror, "latents", 0.18215, FLIP, None)
    expected = torch.tensor([3.0, 2.0]).reshape(2, 1, 1, 1).expand(2, 4, 3, 3) * 0.18215
    torch.testing.assert_close(x_start, expected)
    assert torch.equal(to_x_start(latent, mirror, "latents", 0.5, None, None), torch.ones(2, 4, 3, 3))


def test_moments_are_sampled_as_in_the_ldm() -> None:
    mean, noise = torch.randn(2, 3, 4, 4).half(), torch.randn(2, 3, 4, 4)
    logvar = torch.tensor([-40.0, -1.0, 30.0]).half().reshape(1, 3, 1, 1).expand(2, 3, 4, 4)
    std = torch.exp(0.5 * torch.tensor([-30.0, -1.0, 20.0])).reshape(1, 3, 1, 1)    # the clamp's ends
    mean[:, 0] = 0                                      # so that the smallest std shows
    moments, mirror = torch.cat([mean, logvar], dim=1), torch.cat([-mean, logvar], dim=1)
    sign = torch.where(FLIP, -1.0, 1.0).reshape(2, 1, 1, 1)
    x_start = to_x_start(moments, mirror, "moments", 0.5, FLIP, noise)
    torch.testing.assert_close(x_start, (sign * mean.float() + std * noise) * 0.5, rtol=1e-5, atol=0)


def test_x_start_needs_what_its_kind_needs() -> None:
    latent = torch.zeros(2, 4, 3, 3, dtype=torch.float16)
    with pytest.raises(ValueError, match="posterior_noise"):
        to_x_start(latent, None, "moments", 1.0, None, None)
    with pytest.raises(ValueError, match="mirror"):
        to_x_start(latent, None, "latents", 1.0, FLIP, None)


@pytest.mark.parametrize(("kind", "has_mirror", "horizontal_flip", "ok"), [
    ("pixels", False, True, True), ("latents", True, True, True), ("moments", False, False, True),
    ("latents", False, True, False), ("moments", False, True, False),
])
def test_flips_need_pixels_or_mirrors(kind: str, has_mirror: bool, horizontal_flip: bool, ok: bool) -> None:
    info = DatasetInfo("toy", kind, (8, 4, 4), num_classes=10)
    if ok:
        check_flip(info, has_mirror, horizontal_flip)
    else:
        with pytest.raises(DataError, match=r"--data.no-horizontal-flip"):
            check_flip(info, has_mirror, horizontal_flip)
