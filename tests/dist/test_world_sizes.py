"""A run goes on, on any number of ranks, from the checkpoint of any other: its state to the bit, its losses to rounding.

Every pair among 1, 2, 3 and 4 ranks, and 3 to 8, on real DeepSpeed; 64 ranks too, where slow tests are asked for.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from largescale.checkpoint.files import CheckpointDir, checkpoints, flat_state, named_weights
from largescale.engine.deepspeed_engine import Engine
from largescale.engine.deepspeed_patches import ALIGNMENT
from largescale.engine.optimizer import carrying_ema
from largescale.errors import CheckpointError
from tests.conftest import QUIET, Train, ds_json, trace
from tests.ranks import ranks_of

CUT, STEPS, BATCH, NUMEL = 7, 13, 24, 32_451
# The number of parameters is odd: `debug` has 51,168, which no number of ranks up to 8 pads. Stages end after a fixed
# number of steps, or rounding could move a transition, and with it every draw after it.
ARGS = ("--train.steps", STEPS, "--train.global-batch-size", BATCH, "--model.depth", 1, "--model.mlp-ratio", 4.1,
        "--curriculum.pacing", "fixed", "--curriculum.interval", 4,
        "--checkpoint.every", CUT, "--checkpoint.keep-last", 100, "--telemetry.log-every", 1)
TRANSITIONS = [[4, 4], [8, 3], [12, 2]]
MICRO = {1: 6, 2: 6, 3: 4, 4: 6, 8: 3}  # so there are 4, 2, 2, 1 and 1 accumulation steps
PADDING = {n: -NUMEL % (ALIGNMENT["cpu"] * n) for n in (1, 2, 3, 4, 8)}
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
WORLDS = (1, 2, 3, 4)

# Precision, saved by, continued by, with its losses? fp16 is here for its loss scale: four pairs go on.
PAIRS = [(p, m, n, p != "fp16" or n == m % 4 + 1) for p in TOLERANCE for m in WORLDS for n in WORLDS]
PAIRS += [("fp32", 3, 8, True), ("fp16", 4, 8, False)]
CONTINUED = [(p, m, n) for p, m, n, go_on in PAIRS if go_on]

# A fault in 3 -> 2 ranks, and what of the state it is seen in.
FAULTS = {
    "moved by one": {*KINDS}, "all of rank 0": {*KINDS, "padding"}, "padding": {"padding"}, "exp_avg": {"exp_avg"},
    "exp_avg_sq": {"exp_avg_sq"}, "ema": {"ema"}, "adam_step": {"adam_step"}, "loss scale": {"scaler"},
    "skipped steps": {"skipped_steps"}, "curriculum": {"curriculum"}, "weights": {"weights are the masters"},
}
# And those that are to be seen in what follows.
SEEN_LATER = [("fp32", "exp_avg"), ("bf16", "exp_avg"), ("fp32", "curriculum"), ("fp32", "data position"), ("fp32", "draws")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, blobs: Path) -> Path:
    """Where all runs are, see pairs.py."""
    folder = tmp_path_factory.mktemp("world_sizes")
    for precision in TOLERANCE:
        # A loss scale that overflows at the start, and doubles soon enough to overflow again.
        ds_json(precision, folder, initial_scale_power=24, loss_scale_window=3)

    def run(precision: str, m: int, n: int, cut: int = CUT, fault: str = "", go_on: bool = False) -> Run:
        return a_run(name(precision, m, n, cut, fault), n, f"{precision}_{m}", cut, precision, fault=fault, go_on=go_on)

    truths = [a_run(f"{p}_{m}", m, None, CUT, p) for p in TOLERANCE for m in WORLDS]
    pairs = [run(p, m, n, go_on=go_on) for p, m, n, go_on in PAIRS]
    pairs += [run("fp32", m, n, cut=0) for m, n in itertools.permutations(WORLDS, 2)]
    pairs += [run("fp16", 3, 2, fault=fault) for fault in FAULTS]
    pairs += [run(precision, 3, 2, fault=fault, go_on=True) for precision, fault in SEEN_LATER]
    train(folder, blobs, MICRO, truths, pairs)
    return folder


Run = dict[str, Any]


def a_run(name: str, ranks: int, source: str | None, cut: int, precision: str = "fp32", *, fault: str = "",
          go_on: bool = True) -> Run:
    return {"name": name, "ranks": ranks, "precision": precision, "source": source, "cut": cut, "fault": fault, "go_on": go_on}


def train(folder: Path, blobs: Path, micro: dict[int, int], *phases: list[Run], args: tuple[Any, ...] = ()) -> None:
    plan = {"args": ["debug", "--data.path", str(blobs), *QUIET, *ARGS, *args], "micro": micro, "phases": phases}
    (folder / "plan.json").write_text(json.dumps(plan))
    (done,) = ranks_of("tests/dist/pairs.py", folder / "plan.json", ranks=1, timeout_s=6000)
    assert done.returncode == 0, done.stderr[-8000:]


def name(precision: str, m: int, n: int, cut: int = CUT, fault: str = "") -> str:
    return "_".join(map(str, filter(None, (precision, m, "to", n, cut != CUT and f"at_{cut}", fault.replace(" ", "_")))))


# ---- the state


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def state_differences(loaded: dict[str, Any], saved: dict[str, Any], checkpoint: CheckpointDir) -> set[str]:
    """What is not bitwise the same: in the ranks' memory as loaded, in that of those that saved it, and in the files."""
    kinds = KINDS if checkpoint.step else KINDS[:1]
    assert loaded["whole"].keys() == saved["whole"].keys() == set(kinds)
    found = set()
    files = {kind: torch.cat(list(flat_state(checkpoint, kind, 0, checkpoint.manifest()["world_size"]))) for kind in kinds}
    for kind in kinds:
        whole = bits(loaded["whole"][kind])
        if not all(torch.equal(whole[:NUMEL], bits(other[kind])[:NUMEL]) for other in (saved["whole"], files)):
            found.add(kind)
        if whole[NUMEL:].any():
            found.add("padding")
    for kind in {"master", "ema"} & set(kinds):  # by name, as sampling and export read them
        named = named_weights(checkpoint, kind)
        of_loaded = loaded["whole"][kind][:NUMEL].split([named[key].numel() for key in loaded["shapes"]])
        if not all(torch.equal(bits(named[key].flatten()), bits(w)) for key, w in zip(loaded["shapes"], of_loaded, strict=True)):
            found.add(kind)
    for rank in loaded["ranks"]:  # every one of them
        found |= {key for key, value in rank.items() if value != saved["ranks"][0][key]}
    return found


def memory(folder: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / f"{run}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("precision", TOLERANCE)
def test_truth(precision: str, folder: Path) -> None:
    """What the pairs are compared with is what it is meant to be, on each number of ranks."""
    for m in WORLDS:
        saved, checkpoint = memory(folder, f"{precision}_{m}"), CheckpointDir.at(folder / f"{precision}_{m}", CUT)
        assert sum(torch.Size(shape).numel() for shape in saved["shapes"].values()) == NUMEL
        assert len(saved["ranks"]) == checkpoint.manifest()["world_size"] == m
        assert {kind: whole.numel() - NUMEL for kind, whole in saved["whole"].items()} == dict.fromkeys(KINDS, PADDING[m])
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(saved["whole"].values(), 2))
        first = saved["ranks"][0]
        assert first["weights are the masters"] and first["step"] == first["adam_step"] == CUT
        assert first["curriculum"]["transitions"] == TRANSITIONS[:1] and first["curriculum"]["pacing"]["observations"] == 3
        assert (first["skipped_steps"] > 3 and first["scaler"]["cur_iter"] > CUT) == (precision == "fp16")
        final = checkpoints(folder / f"{precision}_{m}")[0].manifest()["state"]
        assert final["step"] == STEPS and final["curriculum"]["transitions"] == TRANSITIONS
        assert (final["skipped_steps"] > first["skipped_steps"]) == (precision == "fp16")


@pytest.mark.parametrize(("precision", "m", "n", "cut"), [
    *((p, m, n, CUT) for p, m, n, _ in PAIRS), *(("fp32", m, n, 0) for m, n in itertools.permutations(WORLDS, 2)),
])
def test_state(precision: str, m: int, n: int, cut: int, folder: Path) -> None:
    """fp32 masters, both moments, EMA, the weights of the model, Adam's count, loss scale, curriculum and counters."""
    loaded = memory(folder, name(precision, m, n, cut))
    assert len(loaded["ranks"]) == n and loaded["whole"]["master"].numel() == NUMEL + PADDING[n]
    checkpoint = CheckpointDir.at(folder / f"{precision}_{m}", cut)
    if cut:
        saved = memory(folder, f"{precision}_{m}")
    else:
        model = named_weights(checkpoint)  # the files are all there is of it: no step is taken yet
        master = torch.cat([model[key].flatten() for key in loaded["shapes"]])
        start = {key: checkpoint.manifest()["state"].get(key) for key in loaded["ranks"][0]}
        start |= {"adam_step": None, "weights are the masters": True, "scaler": loaded["ranks"][0]["scaler"]}
        saved = {"whole": {"master": master}, "ranks": [start]}
    assert state_differences(loaded, saved, checkpoint) == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_negative_control_of_the_state(fault: str, folder: Path) -> None:
    loaded, saved = memory(folder, name("fp16", 3, 2, fault=fault)), memory(folder, "fp16_3")
    assert state_differences(loaded, saved, CheckpointDir.at(folder / "fp16_3", CUT)) == FAULTS[fault]


# ---- what follows


def rows_of(folder: Path, run: str) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = json.loads((folder / f"{run}.json").read_text())
    return rows


def run_differences(folder: Path, run: str, truth: str, cut: int = CUT, steps: int = STEPS) -> tuple[set[str], float]:
    """What is not as it was in the run that was never cut: (of what must be equal, largest of the relative differences
    of the losses)."""
    found = set()
    then, expected = trace(folder / run), trace(folder / truth)
    assert [row["step"] for row in then] == [row["step"] for row in expected] == list(range(1, steps + 1))
    if any(a["curriculum/index"] != b["curriculum/index"] for a, b in zip(then, expected, strict=True)):
        found.add("curriculum index")
    rows = rows_of(folder, truth)
    if rows_of(folder, run) != {str(step): rows[str(step)] for step in range(cut, steps)}:
        found.add("inputs and draws")
    return found, max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(then[cut:], expected[cut:], strict=True))


def test_inputs_and_draws_depend_on_the_step_alone(folder: Path) -> None:
    """x_start, t, noise and y of every row of every step: the same whatever the number of ranks, and the precision."""
    expected = rows_of(folder, "fp32_1")
    assert [*map(int, expected)] == list(range(STEPS))
    assert len(set(itertools.chain(*expected.values()))) == STEPS * BATCH  # no two are alike, so a hash tells something
    for precision, m in itertools.product(TOLERANCE, WORLDS):
        assert rows_of(folder, f"{precision}_{m}") == expected


@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_steps_that_follow(precision: str, folder: Path) -> None:
    pairs = [(m, n) for p, m, n in CONTINUED if p == precision]
    found = {(m, n): run_differences(folder, name(precision, m, n), f"{precision}_{m}") for m, n in pairs}
    assert {pair: differ for pair, (differ, _) in found.items() if differ} == {}
    worst = max(found, key=lambda pair: found[pair][1])
    print(f"{precision}: largest relative difference of {STEPS - CUT} losses, {len(pairs)} pairs: "
          f"{found[worst][1]:.1e} from {worst[0]} to {worst[1]} ranks")
    assert 0 < found[worst][1] < TOLERANCE[precision]
    for n in {n for m, n in pairs if m == n}:
        assert trace(folder / name(precision, n, n)) == trace(folder / f"{precision}_{n}")  # as they were: to the bit


@pytest.mark.parametrize(("precision", "fault"), SEEN_LATER)
def test_negative_control_of_what_follows(precision: str, fault: str, folder: Path) -> None:
    found, worst = run_differences(folder, name(precision, 3, 2, fault=fault), f"{precision}_3")
    assert worst > TOLERANCE[precision]
    assert ("curriculum index" in found) == (fault == "curriculum")
    assert ("inputs and draws" in found) == (fault != "exp_avg")


# ---- many ranks


def partition_size(numel: int, n: int, alignment: int = ALIGNMENT["cpu"]) -> int:
    """Of each of n ranks: the whole is rounded up to a multiple."""
    return -(-numel // (alignment * n)) * alignment


class OneOf(Engine):
    """The engine of one of n ranks, on what loading asks of DeepSpeed."""

    def __init__(self, rank: int, n: int, numel: int):
        master = torch.full((partition_size(numel, n),), torch.nan)
        self._rank, self._zero = rank, SimpleNamespace(
            single_partition_of_fp32_groups=[master], bit16_groups=[[torch.empty(numel)]], loss_scaler=SimpleNamespace(),
            optimizer=carrying_ema(torch.optim.AdamW)([master], ema_decay=0.9),
        )

    @property
    def state(self) -> dict[str, Any]:
        return {"master": self._master, **self._zero.optimizer.state[self._master], "scaler": vars(self._zero.loss_scaler)}


def sharded(whole: Tensor, n: int, padding: float | None, alignment: int = ALIGNMENT["cpu"]) -> Iterator[Tensor]:
    """The parts of n ranks, in order: with their padding, as DeepSpeed saves moments, or without, as it saves masters."""
    for part in torch.arange(n * partition_size(len(whole), n, alignment)).view(n, -1):
        inside = whole[part[part < len(whole)]]
        yield inside if padding is None else torch.cat([inside, inside.new_full((len(part) - len(inside),), padding)])


@pytest.mark.parametrize("alignment", ALIGNMENT.values(), ids=ALIGNMENT)
@pytest.mark.parametrize("numel", [1, 2, 7, 64, 129, 1000, 1023])
def test_every_element_lands_once(numel: int, alignment: int) -> None:
    """Fewer parameters than ranks, too: then some hold nothing but padding. What was padding is not read. Also of a
    checkpoint that GPUs wrote, whose parts are padded to more."""
    whole = torch.arange(1, numel + 1).float()
    for m, n, padding in itertools.product((1, 2, 3, 4, 8, 64), (1, 2, 3, 4, 8, 64), (None, torch.nan)):
        pieces = list(sharded(whole, m, padding, alignment))
        assert sum(map(len, pieces)) == (numel if padding is None else m * partition_size(numel, m, alignment))
        ranks = [OneOf(rank, n, numel) for rank in range(n)]
        for engine in ranks:
            engine._fill(engine._master, iter(pieces))
        joined = torch.cat([engine._master for engine in ranks])
        assert torch.equal(joined[:numel], whole) and not joined[numel:].any(), (m, n)


def test_parts_that_are_padded_as_on_gpus(train: Train, tmp_path: Path) -> None:
    """Three ranks whose parts start at multiples of 64 bytes train as others do, and two ranks without that continue."""
    args = ("--train.steps", CUT, *ARGS[2:], "--train.ds-config", ds_json("bf16", tmp_path), "--train.micro-batch-size", 4)
    plain, padded = (train(*args, "--output", tmp_path / name, ranks=3, driver=driver)
                     for name, driver in (("plain", ()), ("padded", ("--alignment", ALIGNMENT["cuda"]))))
    assert [done.returncode for done in (*plain, *padded)] == [0] * 6, padded[0].stderr
    losses = [[row["loss"] for row in trace(tmp_path / name)] for name in ("plain", "padded")]
    norms = [[row["optimizer/grad_norm"] for row in trace(tmp_path / name)] for name in ("plain", "padded")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and norms[1] == pytest.approx(norms[0], rel=1e-6)
    parts = [[len(checkpoints(tmp_path / name)[0].optimizer_state(rank)["base_optimizer_state"]["state"][0]["exp_avg"])
              for rank in range(3)] for name in ("plain", "padded")]
    assert parts == [[partition_size(NUMEL, 3, a)] * 3 for a in (ALIGNMENT["cpu"], ALIGNMENT["cuda"])]
    done = train(*args, "--output", tmp_path / "padded", "--train.steps", CUT + 2, ranks=2)
    assert done[0].returncode == 0, done[0].stderr
    assert [row["step"] for row in trace(tmp_path / "padded")] == list(range(1, CUT + 3))


def test_a_state_that_is_too_short() -> None:
    """What a file that is left out held is not taken for zeros."""
    pieces = list(sharded(torch.ones(1000), 4, padding=None))
    with pytest.raises(CheckpointError, match="the saved state has 750 of the model's 1000 parameters"):
        OneOf(0, 2, 1000)._fill(torch.zeros(500), pieces[:3])


def loaded_on(n: int, checkpoint: CheckpointDir, m: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """A checkpoint of m ranks on n: (each rank's state, their parts joined)."""
    ranks = [OneOf(rank, n, NUMEL) for rank in range(n)]
    for engine in ranks:
        engine.load(checkpoint, m)
    states = [engine.state for engine in ranks]
    return states, {kind: torch.cat([state[kind] for state in states]) for kind in KINDS}


def saved_by(n: int, whole: dict[str, Tensor], like: dict[str, Any], path: Path) -> CheckpointDir:
    """The files of n ranks' optimizers, all that `Engine.load` reads of them; `like`: of any one rank."""
    path.mkdir()
    parts = {kind: list(sharded(whole[kind][:NUMEL], n, padding=None if kind == "master" else 0)) for kind in KINDS}
    for rank in range(n):
        state = {**like["base_optimizer_state"]["state"][0], **{kind: parts[kind][rank].clone() for kind in KINDS[1:]}}
        saved = {**like, "single_partition_of_fp32_groups": [parts["master"][rank].clone()],
                 "base_optimizer_state": {**like["base_optimizer_state"], "state": {0: state}}}
        torch.save({"optimizer_state_dict": saved}, path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return CheckpointDir(path, CUT)


def test_sharded_as_deepspeed_does(folder: Path) -> None:
    """So what `saved_by` writes for 64 ranks is what they would have written."""
    for m in (*WORLDS, 8):
        newest = checkpoints(folder / (f"fp16_{m}" if m < 8 else name("fp32", 3, 8)))[0]
        for kind in KINDS:
            pieces = list(flat_state(newest, kind, 0, m))
            ours = list(sharded(torch.cat(pieces)[:NUMEL], m, padding=None if kind == "master" else 0))
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(pieces, ours, strict=True))


@pytest.mark.parametrize(("n", "then"), [(64, 1), (64, 8), (8, 64)])
def test_many_ranks(n: int, then: int, folder: Path, tmp_path: Path) -> None:
    """From 3 ranks' files to n ranks, and from theirs to others: every rank's part, count and loss scale."""
    saved, checkpoint = memory(folder, "fp16_3"), CheckpointDir.at(folder / "fp16_3", CUT)
    states, whole = loaded_on(n, checkpoint, 3)
    others, again = loaded_on(then, saved_by(n, whole, checkpoint.optimizer_state(0), tmp_path / "saved"), n)
    for kind, found in itertools.product(KINDS, (whole, again)):
        assert torch.equal(bits(found[kind][:NUMEL]), bits(saved["whole"][kind][:NUMEL])) and not found[kind][NUMEL:].any()
    scaler = saved["ranks"][0]["scaler"]
    moving = {key: scaler[key] for key in ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")}
    assert all(state["step"] == CUT and state["scaler"] == moving for state in states + others)


@pytest.mark.slow
def test_64_ranks(tmp_path: Path, blobs: Path) -> None:
    """4 ranks, then 64, then 2, of real DeepSpeed: a minute on 2 cores, and 10 GB."""
    ds_json("fp32", tmp_path)
    args = ("--train.steps", 12, "--train.global-batch-size", 64, "--checkpoint.every", 1)
    first, then, last = a_run("on4", 4, None, 5), a_run("on64", 64, "on4", 5), a_run("on2", 2, "on64", 8)
    train(tmp_path, blobs, {4: 4, 64: 1, 2: 4}, [first], [then], [last], args=args)
    saved, loaded, again = (memory(tmp_path, run) for run in ("on4", "on64", "on2"))
    assert len(loaded["ranks"]) == 64 and loaded["whole"]["ema"].numel() == NUMEL + 61
    assert state_differences(loaded, saved, CheckpointDir.at(tmp_path / "on4", 5)) == set()
    assert state_differences(again, again, CheckpointDir.at(tmp_path / "on64", 8)) == set()
    for run, cut in (("on64", 5), ("on2", 8)):
        differ, worst = run_differences(tmp_path, run, "on4", cut, steps=12)
        print(f"{run}: largest relative difference of the losses {worst:.1e}")
        assert not differ and worst < TOLERANCE["fp32"]
