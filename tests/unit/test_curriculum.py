import ast
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from largescale.config.derived import cluster_edges
from largescale.config.schema import Config, CurriculumConfig, DiffusionConfig
from largescale.curriculum import (
    Curriculum,
    FixedPacing,
    NoPacing,
    PatiencePacing,
    snr_clusters,
    stage,
    uniform_clusters,
)
from largescale.errors import CheckpointError, ConfigError
from largescale.noise_schedule import log_snr, make_betas

ROOT = Path(__file__).parents[2]


def test_a_loss_that_does_not_fall_ends_a_stage_by_chance() -> None:
    """The lowest of k losses stays so up to the m-th with probability k / m, from which the mean follows, whatever the noise."""
    patience = 20
    # f[m]: the m-th loss is the lowest so far, and the stage still lasts.
    f = np.zeros(60 * patience)
    f[1] = 1
    for m in range(2, len(f)):
        k = np.arange(max(1, m - patience - 1), m)
        f[m] = (f[k] * k).sum() / (m * (m - 1))
    k = np.arange(1, len(f))
    ends = f[1:] * k / (k + patience + 1)
    expected = (ends * (k + patience + 1)).sum() / ends.sum()
    pacing, rng, lengths = PatiencePacing(patience), np.random.default_rng(0), []
    for _ in range(2000):
        state, length = pacing.start(1), 0
        while state.index:
            state, length = pacing.advance(state, float(rng.normal())), length + 1
        lengths.append(length)
    assert ends.sum() > 0.99 and 1.75 < expected / patience < 2
    assert np.mean(lengths) == pytest.approx(expected, rel=0.03)


def transcription(losses: list[float], n: int, tau_max: int) -> list[int]:
    """Algorithms 1 and 2 of arXiv:2403.10348, line by line: the curriculum index after each loss."""
    index, best, tau, indices = n, math.inf, 0, []
    for loss in losses:
        if index > 0:                    # Algorithm 2: while the curriculum lasts
            improved = loss < best
            if improved:                 # Algorithm 1
                tau = 0
            elif tau + 1 > tau_max:
                tau = 0
                index = index - 1
                best = math.inf          # Algorithm 2: a new stage starts without a best loss
            else:
                tau = tau + 1
            if improved:
                best = loss
        indices.append(index)
    return indices


@pytest.mark.parametrize("seed", range(60))
def test_pacing_is_the_papers(seed: int) -> None:
    random = np.random.default_rng(seed)
    n, tau_max = int(random.integers(1, 6)), int(random.integers(0, 5))
    # Rounded, so that ties occur: a loss equal to the best is no improvement.
    losses = [float(x) for x in np.round(random.random(200) * random.choice([1, 3]) + np.linspace(1, 0, 200), 1)]
    curriculum = Curriculum(uniform_clusters(n), PatiencePacing(tau_max))
    indices = []
    for loss in losses:
        before = curriculum.index
        assert curriculum.observe(loss) == (curriculum.index < before)
        indices.append(curriculum.index)
    assert indices == transcription(losses, n, tau_max)
    changes = [(i + 1, index) for i, index in enumerate(indices) if index != ([n, *indices][i])]
    assert curriculum.transitions == changes


@pytest.mark.parametrize("tau_max", [0, 1, 200])
def test_a_stage_ends_at_the_observation_after_tau_max(tau_max: int) -> None:
    curriculum = Curriculum(uniform_clusters(3), PatiencePacing(tau_max))
    assert not curriculum.observe(1.0)
    for _ in range(tau_max):
        assert not curriculum.observe(1.0)
    assert curriculum.observe(1.0) and curriculum.index == 2
    assert curriculum.state.best_loss == math.inf and curriculum.state.patience_count == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("smoothing, memory", [(0.3, 1), (0.9, 10), (0.98, 50)])
def test_smoothed_losses_in_place_of_the_papers(smoothing: float, memory: int, seed: int) -> None:
    """The same algorithm on the weighted mean of the stage's losses, written out, once it is as long as its memory."""
    random = np.random.default_rng(seed)
    losses = (1 + 0.3 * random.standard_normal(400) + np.exp(-np.arange(400) / 30)).tolist()
    curriculum = Curriculum(uniform_clusters(4), PatiencePacing(6, smoothing))
    first, best, tau, changes = 0, math.inf, 0, []
    for i, loss in enumerate(losses):
        stage_ended = curriculum.observe(loss)
        weights = smoothing ** np.arange(i - first, -1, -1)
        average = float(weights @ losses[first : i + 1] / weights.sum())
        if i - first + 1 >= memory:
            best, tau = (average, 0) if average < best else (best, tau + 1)
        if tau > 6:
            first, best, tau = i + 1, math.inf, 0
            changes.append(i + 1)
        assert stage_ended == (first == i + 1)
        if curriculum.index == 0:
            break
        assert (curriculum.state.average, curriculum.state.best_loss) == (pytest.approx(None if stage_ended else average), pytest.approx(best))
    assert curriculum.index == 0 and [at for at, _ in curriculum.transitions] == changes


def test_a_smoothed_loss_of_chance_ends_no_stage() -> None:
    """A loss that falls by a quarter of its noise in the time of the patience: the paper's rule ends stages, the smoothed one none."""
    losses = 1 - np.arange(2000) / 4000 + 0.2 * np.random.default_rng(0).standard_normal(2000)
    ended = [sum(map(Curriculum(uniform_clusters(20), PatiencePacing(200, smoothing)).observe, losses.tolist())) for smoothing in (0.0, 0.99)]
    assert ended[0] >= 2 and ended[1] == 0


def test_a_smoothed_loss_is_saved() -> None:
    """Constant losses count as no improvement, whatever rounding does; a state of before there was an average is read."""
    constant = Curriculum(uniform_clusters(2), PatiencePacing(5, 0.97))
    assert constant.pacing.shortest_stage == 32 + 7
    assert [constant.observe(0.1) for _ in range(78)] == [i in (38, 77) for i in range(78)]
    losses = (1 + np.random.default_rng(1).random(60)).tolist()
    truth, again, older = (Curriculum(uniform_clusters(3), PatiencePacing(4, 0.9)) for _ in range(3))
    for loss in losses[:9]:
        truth.observe(loss)
    saved = json.loads(json.dumps(truth.state_dict(), allow_nan=False))
    again.load_state_dict(saved)
    assert again.state == truth.state and truth.state.average is not None
    del saved["pacing"]["average"]
    older.load_state_dict(saved)
    assert older.state == replace(truth.state, average=None)
    for loss in losses[9:]:
        for each in (truth, again, older):
            each.observe(loss)
    assert again.state_dict() == truth.state_dict() and len(truth.transitions) > 1
    with pytest.raises(ConfigError, match=r"loss_smoothing=1 must be in \[0, 1\)"):
        PatiencePacing(4, 1)


def test_stages_and_the_end() -> None:
    """Stage n is the union of the n easiest clusters; index 1 covers everything, and so does 0."""
    curriculum = Curriculum(uniform_clusters(4), PatiencePacing(0))
    lowest = [curriculum.lowest]
    while curriculum.index > 0:
        lowest += [curriculum.lowest] if curriculum.observe(1.0) else []
    assert lowest == [0.75, 0.5, 0.25, 0.0, 0.0]
    for loss in (5.0, 0.1, 5.0):
        assert not curriculum.observe(loss)
    assert curriculum.index == 0 and curriculum.lowest == 0.0


def test_the_number_of_a_stage() -> None:
    assert [stage(index, 4) for index in (4, 3, 1, 0)] == ["stage 1 of 4", "stage 2 of 4", "stage 4 of 4", "complete"]


def test_fixed_pacing_ignores_the_loss() -> None:
    curriculum = Curriculum(uniform_clusters(3), FixedPacing(4))
    assert [curriculum.observe(loss) for loss in np.linspace(1, 0, 13)] == [i in (3, 7, 11) for i in range(13)]
    assert curriculum.index == 0


def test_no_pacing_is_vanilla() -> None:
    curriculum = Curriculum(uniform_clusters(20), NoPacing())
    assert curriculum.lowest == 0.0 and not curriculum.observe(1.0) and curriculum.index == 0


# (order, stages) -> active clusters (first, last) of stages 1 .. 4, and when all are through
ACTIVE = {
    ("easy_first", "accumulating"): [(4, 4), (3, 4), (2, 4), (1, 4), (1, 4)],
    ("hard_first", "accumulating"): [(1, 1), (1, 2), (1, 3), (1, 4), (1, 4)],
    ("easy_first", "separate"): [(4, 4), (3, 3), (2, 2), (1, 1), (1, 4)],
    ("hard_first", "separate"): [(1, 1), (2, 2), (3, 3), (4, 4), (1, 4)],
}
EDGES = (0.0, 0.1, 0.3, 0.6, 1.0)


@pytest.mark.parametrize("order, stages", ACTIVE)
@pytest.mark.parametrize("pacing", [PatiencePacing(0), FixedPacing(2)])
def test_which_clusters_are_active(order, stages, pacing) -> None:
    curriculum = Curriculum(EDGES, pacing, order=order, stages=stages)
    active, indices = [curriculum.active], [curriculum.index]
    for _ in range(30):
        assert curriculum.lowest == curriculum.active[0]
        if curriculum.observe(1.0):
            active.append(curriculum.active)
            indices.append(curriculum.index)
    assert indices == [4, 3, 2, 1, 0]
    assert active == [(EDGES[first - 1], EDGES[last]) for first, last in ACTIVE[order, stages]]
    assert Curriculum(EDGES, NoPacing(), order=order, stages=stages).active == (0.0, 1.0)


def test_one_cluster_alone() -> None:
    for k in range(1, 5):
        curriculum = Curriculum(EDGES, NoPacing(), only_cluster=k)
        for _ in range(3):
            assert curriculum.active == (EDGES[k - 1], EDGES[k]) and not curriculum.observe(1.0)
    for pacing in (PatiencePacing(9), FixedPacing(9)):
        with pytest.raises(ConfigError, match="only_cluster=2 stays.*--curriculum.pacing none"):
            Curriculum(EDGES, pacing, only_cluster=2)


@pytest.mark.parametrize("wrong, named", [
    ({"order": "random"}, "'random'; choose easy_first or hard_first"),
    ({"stages": "both"}, "'both'; choose accumulating or separate"),
    ({"only_cluster": 5}, "only_cluster=5 must be one of the clusters 1..4, or 0"),
    ({"only_cluster": -1}, "only_cluster=-1"),
])
def test_settings_that_are_none(wrong, named) -> None:
    with pytest.raises(ConfigError, match=named):
        Curriculum(EDGES, NoPacing(), **wrong)


@pytest.mark.parametrize("other, named", [
    ({"order": "hard_first"}, "has order=easy_first, the saved state has order=hard_first.*--curriculum.order hard_first"),
    ({"stages": "separate"}, "has stages=accumulating, the saved state has stages=separate.*--curriculum.stages separate"),
    ({"only_cluster": 3}, "has only_cluster=0, the saved state has only_cluster=3.*--curriculum.only-cluster 3"),
])
def test_state_of_another_order_is_refused(other, named) -> None:
    saved = Curriculum(EDGES, NoPacing(), **other).state_dict()
    mine = Curriculum(EDGES, NoPacing())
    with pytest.raises(CheckpointError, match=named):
        mine.load_state_dict(saved)
    Curriculum(EDGES, NoPacing(), **other).load_state_dict(json.loads(json.dumps(saved)))


def test_a_state_saved_before_there_were_orders_is_the_papers() -> None:
    first = Curriculum(EDGES, PatiencePacing(1))
    for _ in range(4):
        first.observe(1.0)
    old = first.state_dict()
    for key in ("order", "stages", "only_cluster"):
        del old[key]
    again = Curriculum(EDGES, PatiencePacing(1))
    again.load_state_dict(old)
    assert again.state_dict() == first.state_dict() and again.index == 3
    with pytest.raises(CheckpointError, match="saved state has order=easy_first"):
        Curriculum(EDGES, PatiencePacing(1), order="hard_first").load_state_dict(old)


def test_state_survives_json_and_refuses_other_clusters() -> None:
    first, again = (Curriculum(uniform_clusters(5), PatiencePacing(2)) for _ in range(2))
    losses = list(np.random.default_rng(1).random(40))
    for loss in losses[:20]:
        first.observe(loss)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for loss in losses[20:]:
        assert first.observe(loss) == again.observe(loss)
    assert first.state_dict() == again.state_dict()
    with pytest.raises(CheckpointError, match="has 4 clusters.*saved state has 5"):
        Curriculum(uniform_clusters(4), PatiencePacing(2)).load_state_dict(first.state_dict())


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_refused(loss: float) -> None:
    curriculum = Curriculum(uniform_clusters(2), PatiencePacing(1))
    before = curriculum.state_dict()
    with pytest.raises(ValueError, match="finite"):
        curriculum.observe(loss)
    assert curriculum.state_dict() == before


def test_uniform_clusters() -> None:
    assert uniform_clusters(4) == (0.0, 0.25, 0.5, 0.75, 1.0)
    with pytest.raises(ConfigError, match="n_clusters=0"):
        uniform_clusters(0)


def test_snr_clusters_match_the_reference_schedule() -> None:
    linear, cosine = (log_snr(make_betas(name, 1000)) for name in ("linear", "cosine"))
    assert snr_clusters(20, cosine, cosine) == uniform_clusters(20)
    edges = snr_clusters(20, linear, cosine)
    for uniform, edge in list(zip(uniform_clusters(20), edges, strict=True))[1:-1]:
        t, reference = round(edge * 1000), cosine[round(uniform * 1000)]
        assert linear[t] <= reference < linear[t - 1]
    with pytest.raises(ConfigError, match="n_clusters=1000 leaves a cluster without"):
        snr_clusters(1000, linear, cosine)


@pytest.mark.parametrize("own, reference, timesteps, asked", [
    ("linear", "cosine", 1000, 1000), ("linear", "cosine", 1000, 400), ("linear", "cosine", 100, 250),
    ("cosine", "linear", 1000, 300), ("linear", "linear", 50, 70),
])
def test_where_snr_clusters_come_out_empty_the_most_that_work_are_named(own, reference, timesteps, asked) -> None:
    mine, other = (log_snr(make_betas(name, timesteps)) for name in (own, reference))

    def empty_cluster(n: int) -> bool:
        """By hand: a cluster's timesteps are those whose SNR lies between two of the reference's."""
        marks = [other[min(round(i / n * timesteps), timesteps - 1)] for i in range(1, n)]
        counts = np.histogram(-mine, np.array([-math.inf, *(-np.array(marks)), math.inf]))[0]
        return n > timesteps or 0 in counts

    with pytest.raises(ConfigError, match=rf"n_clusters={asked} leaves.*--curriculum.clusters uniform") as error:
        snr_clusters(asked, mine, other)
    most = int(re.search(r"use at most N=(\d+), or", str(error.value))[1])
    assert 1 < most < asked
    assert len(snr_clusters(most, mine, other)) == most + 1
    for n in range(most, asked + 1):
        assert empty_cluster(n) == (n > most), n


def test_the_config_chooses_clusters() -> None:
    linear = DiffusionConfig(schedule="linear")
    by_snr = Config("x", diffusion=linear, curriculum=CurriculumConfig(clusters="snr"))
    uniform = Config("x", diffusion=linear)
    assert cluster_edges(by_snr) != cluster_edges(uniform) == uniform_clusters(20)


@pytest.mark.parametrize("edges", [(0.0,), (0.0, 0.5), (0.1, 1.0), (0.0, 0.5, 0.5, 1.0)])
def test_edges_must_rise_from_0_to_1(edges: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="rise from 0 to 1"):
        Curriculum(edges, NoPacing())


def test_the_readmes_three_lines() -> None:
    """The curriculum in somebody else's loop, as the README shows it: the code there runs, and trains by the curriculum."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ast.parse(code)
    scope: dict[str, object] = {}
    exec(code, scope)
    curriculum = scope["curriculum"]
    assert isinstance(curriculum, Curriculum)
    assert curriculum.index < curriculum.n_clusters and curriculum.observations > 0


def test_the_package_imports_nothing_and_its_lower_layers_no_torch() -> None:
    code = ("import sys; before = {*sys.modules}; import largescale; assert {*sys.modules} - before == {'largescale'}\n"
            "import largescale.config.schema, largescale.config.presets, largescale.config.deepspeed, largescale.curriculum\n"
            "import largescale.checkpoint.files, largescale.monitoring.telemetry; assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
