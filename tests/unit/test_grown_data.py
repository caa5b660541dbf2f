"""A run whose data set has grown: the epoch ends as if nothing were added, and the next has all rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from largescale.checkpoint.files import checkpoints
from largescale.config.presets import PRESETS
from largescale.data import loader
from largescale.data.loader import Loader
from largescale.data.order import ORDERS, Extent, grown_extents, indices_in_extents, sample_indices
from largescale.data.shards import ShardDataset
from largescale.diffusion.build import build_objective
from largescale.training.state import SkippedInputs, TrainingState
from tests.conftest import RunHere, Train, final_state, trace
from tests.unit.packed_pictures import picture
from tests.unit.test_append import pack

BEFORE, AFTER, BATCH, CUT = 40, 64, 8, 3
# An epoch has 5 steps, and once the set has grown 8.
LAST_OF_EPOCH, LAST = 5, 13


@pytest.mark.parametrize(("extents", "position", "expected"), [
    ([(0, 40)], 24, [(0, 40), (40, 64)]),               # within the first epoch
    ([(0, 40)], 41, [(0, 40), (80, 64)]),               # and just in the second
    ([(0, 40)], 40, [(0, 40), (40, 64)]),               # between two: at once
    ([(0, 40)], 0, [(0, 64)]),                          # nothing is read yet
    ([(0, 40), (40, 50)], 30, [(0, 40), (40, 64)]),     # grown again before the first addition came to be read
    ([(0, 40), (40, 50)], 40, [(0, 40), (40, 64)]),
    ([(0, 40), (40, 50)], 100, [(0, 40), (40, 50), (140, 64)]),
])
def test_from_where_on_all_rows_are_read(extents: list[tuple[int, int]], position: int, expected: list[tuple[int, int]]) -> None:
    assert grown_extents([Extent(*extent) for extent in extents], position, AFTER) == [Extent(*extent) for extent in expected]


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_of_a_set_that_has_grown_twice(name: str) -> None:
    def order(positions: npt.NDArray[np.int64], n_rows: int) -> npt.NDArray[np.int64]:
        return ORDERS[name](positions, n_rows, 3, BATCH)

    extents = [Extent(0, 40), Extent(80, 50), Extent(130, 64)]
    rows = indices_in_extents(np.arange(130 + 64), extents, order)
    assert np.array_equal(rows[:80], order(np.arange(80), 40))
    assert sorted(rows[80:130]) == list(range(50)) and sorted(rows[130:]) == list(range(64))
    shuffled = np.random.default_rng(0).permutation(len(rows)).reshape(2, -1)
    assert np.array_equal(indices_in_extents(shuffled, extents, order), rows[shuffled])


def test_going_back_keeps_what_was_found() -> None:
    """A roll back loads a checkpoint from before the growth; inputs that were skipped count as read."""
    config = PRESETS["debug"]()
    state = TrainingState(config, build_objective(config))
    before = json.loads(json.dumps(state.state_dict()))
    batch = state.global_batch_size
    state.step, state.skips = 2, [SkippedInputs(at=1, count=3, why="")]
    assert state.data_has_grown(4 * batch, 9 * batch) == Extent(8 * batch, 9 * batch)
    kept = state.extents
    state.load_state_dict(before)
    assert state.extents == kept and state.step == 0
    again = TrainingState(config, build_objective(config))
    again.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert again.extents == kept


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set `before`, and `after`: the same with more images added by the packer."""
    root = tmp_path_factory.mktemp("sets")
    for name, numbers in ("first", range(BEFORE)), ("more", range(BEFORE, AFTER)):
        (root / name).mkdir()
        for i in numbers:
            (root / name / f"{i:03d}.png").write_bytes(picture(i))
    assert pack(root / "first", root / "before", "--rows-per-shard", 16) == 0
    shutil.copytree(root / "before", root / "after")
    assert pack(root / "more", root / "after", "--append", "--rows-per-shard", 16) == 0
    return root


def test_what_the_set_was(sets: Path) -> None:
    before, after = ShardDataset(sets / "before"), ShardDataset(sets / "after")
    assert (len(before), len(after), before.first_rows, after.first_rows) == (BEFORE, AFTER, BEFORE, BEFORE)
    assert after.rows_when(before.fingerprint, "") == BEFORE and before.rows_when(after.fingerprint, "") is None
    assert after.rows_when(after.fingerprint, "") is None and not after.has_fingerprint(before.fingerprint, "")


SETTINGS = ("--model.in-channels", 3, "--model.num-classes", 0, "--model.class-dropout-prob", 0, "--train.global-batch-size", BATCH,
            "--train.micro-batch-size", 2, "--checkpoint.every", CUT, "--checkpoint.keep-last", 9, "--telemetry.log-every", 1)


def noting(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The row that was read at each position."""
    read: dict[int, int] = {}

    def note(positions: npt.NDArray[np.int64], extents: Any, indices: Callable[..., Any]) -> npt.NDArray[np.int64]:
        rows = indices_in_extents(positions, extents, indices)
        read.update(zip(positions.ravel().tolist(), rows.ravel().tolist(), strict=True))
        return rows

    monkeypatch.setattr(loader, "indices_in_extents", note)
    return read


def test_a_run_goes_on_with_a_set_that_has_grown(sets: Path, run_here: RunHere, train: Train, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    truth = run_here(*SETTINGS, "--train.steps", LAST_OF_EPOCH, data=sets / "before", output=tmp_path / "truth")
    cut = run_here(*SETTINGS, "--train.steps", CUT, data=sets / "before", output=tmp_path / "cut")
    assert truth.code == cut.code == 0
    go_on = (*SETTINGS, "--data.grown", "next_epoch", "--train.steps")
    for name in "epoch", "two":
        shutil.copytree(cut.run, tmp_path / name)

    # It says what has changed, and goes on only where it is told to.
    refused = run_here(*SETTINGS, "--train.steps", LAST, data=sets / "after", output=cut.run)
    assert refused.code == 2 and "has grown from 40 to 64 rows since" in refused.err and "set --data.grown next_epoch" in refused.err

    # To the end of the epoch: to the bit as without the addition.
    epoch = run_here(*go_on, LAST_OF_EPOCH, data=sets / "after", output=tmp_path / "epoch")
    assert epoch.code == 0 and epoch.trace() == truth.trace()
    theirs, ours = final_state(truth.run), final_state(epoch.run)
    assert all(np.array_equal(theirs[name].numpy(), ours[name].numpy()) for name in theirs) and theirs.keys() == ours.keys()

    # Then all rows once, also where it is cut again, and on two ranks.
    read = noting(monkeypatch)
    for last in 9, LAST:
        whole = run_here(*go_on, last, data=sets / "after", output=cut.run)
        assert whole.code == 0, whole.err
        assert ("from sample 40 on" in whole.err) == (last == 9)
    assert [read[p] for p in range(24, 40)] == sample_indices(np.arange(24, 40), BEFORE, 0).tolist()
    assert sorted(read[p] for p in range(40, 40 + AFTER)) == list(range(AFTER))
    saved = checkpoints(cut.run)[0].manifest()["state"]
    assert saved["extents"] == [{"start": 0, "rows": 40}, {"start": 40, "rows": 64}] and saved["step"] == LAST
    two = train(*go_on, LAST, "--output", tmp_path / "two", "--data.path", sets / "after")
    assert [rank.returncode for rank in two] == [0, 0], two[0].stderr
    assert checkpoints(tmp_path / "two")[0].manifest()["state"]["extents"] == saved["extents"]
    for mine, other in zip(trace(cut.run), trace(tmp_path / "two"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_two_ranks_read_what_one_reads(sets: Path, order: str) -> None:
    data = ShardDataset(sets / "after")
    rows = {"seed": 3, "global_batch_size": BATCH, "micro_batch_size": 2, "order": order,
            "extents": [Extent(0, BEFORE), Extent(40, AFTER)]}
    with Loader(data, rank=0, world_size=1, **rows) as one, Loader(data, rank=0, world_size=2, **rows) as first, \
            Loader(data, rank=1, world_size=2, **rows) as second:  # type: ignore[arg-type]
        for step in 4, 5, 12:
            both = np.stack([first.batch(step)["latent"], second.batch(step)["latent"]], axis=1)
            assert np.array_equal(both.reshape(4, 2, 3, 16, 16), one.batch(step)["latent"])
