"""Precision and recall: against torch-fidelity and brute force."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from eval.scoring import precision_recall as precision_recall_module
from eval.scoring.precision_recall import Balls, precision_recall, squared_distance
from tests.unit.random_features import features


def brute_force(samples: Tensor, reference: Tensor, k: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Of each sample whether it is in the reference's balls, and the other way round: all pairs, directly, in float64."""
    a, b = samples.double().numpy(), reference.double().numpy()

    def distances(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.stack([np.square(row - y).sum(1) for row in x])

    radius_a, radius_b = (np.sort(distances(x, x), axis=1)[:, k] for x in (a, b))     # 0 is the sample itself
    return (distances(a, b) <= radius_b).any(1), (distances(b, a) <= radius_a).any(1)


def with_copies(seed: int) -> tuple[Tensor, Tensor]:
    a, b = features(60, 5, seed), features(50, 5, seed + 1)
    a[10:20], a[20:22], a[30:33] = b[:10], a[40], b[11]     # across the sets, and 2, 3 and 8 of one within a set
    b[20:28], b[30:32], b[33] = b[28], b[32], a[0]
    return a, b


SETS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "smooth": lambda s: (features(70, 8, s, 0.9, 0.1), features(60, 8, s + 1)),
    "wide": lambda s: (features(40, 100, s), features(45, 100, s + 1)),
    "copies": with_copies,
    "line": lambda s: (features(60, 1, s).mul(20).round(), features(60, 1, s + 1).mul(20).round()),
    "grid": lambda s: (features(50, 3, s).mul(3).round(), features(60, 3, s + 1).mul(3).round()),
    "binary": lambda s: (features(60, 12, s).gt(0).float(), features(50, 12, s + 1).gt(0).float()),
    "same": lambda s: (features(60, 7, s), features(60, 7, s)),
    "shuffled": lambda s: (features(60, 7, s), features(60, 7, s).flip(0)),
    "all one": lambda s: (torch.ones(20, 3), torch.ones(10, 3)),
    "all one against others": lambda s: (torch.ones(20, 3), features(30, 3, s)),
    "far from 0": lambda s: (features(60, 5, s) + 1e6, features(60, 5, s + 1) + 1e6),
    "one far off": lambda s: (torch.cat([features(40, 4, s), torch.full((1, 4), 1e12)]), features(40, 4, s + 1)),
    "all digits": lambda s: (features(60, 5, s).double() + torch.rand(60, 5, dtype=torch.float64), features(60, 5, s + 1).double()),
}


@pytest.mark.parametrize("chunk", [700, 2 ** 24])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("name", SETS)
def test_balls_are_those_of_brute_force(name: str, k: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_recall_module, "CHUNK", chunk)
    for seed in (0, 10):
        samples, reference = SETS[name](seed)
        inside, covered = brute_force(samples, reference, k)
        balls_s, balls_r = Balls(samples, k), Balls(reference, k)
        assert (balls_r.contain(balls_s.points).numpy() == inside).all()
        assert (balls_s.contain(balls_r.points).numpy() == covered).all()
        radii = np.sort(np.stack([np.square(r - samples.double().numpy()).sum(1) for r in samples.double().numpy()]), 1)[:, k]
        np.testing.assert_allclose(balls_s.squared_radii, radii, rtol=1e-13)
        result = precision_recall(samples, reference, k)
        assert (result.precision.value, result.recall.value) == (inside.mean(), covered.mean())


@pytest.mark.parametrize("name", SETS)
def test_any_product_within_the_bound_will_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding seldom goes to the bound; here every product is off by nearly all of a far wider one."""
    e, exact = 0.02, precision_recall_module._lower_bounds
    rng = torch.Generator().manual_seed(0)

    def off(a: Tensor, points: precision_recall_module.Points, lowered: Tensor) -> Tensor:
        squared_radii = (points.norms * (1 - e) - lowered) / (1 + e)
        room = e * (a.square().sum(1, keepdim=True) + points.norms + squared_radii)
        return exact(a, points, lowered) + 0.999 * room * (2 * torch.randint(0, 2, room.shape, generator=rng) - 1)

    monkeypatch.setattr(precision_recall_module, "_relative_error", lambda dim: e)
    monkeypatch.setattr(precision_recall_module, "_lower_bounds", off)
    for seed in range(0, 60, 10):
        samples, reference = SETS[name](seed)
        inside, covered = brute_force(samples, reference, 3)
        assert (Balls(reference).contain(precision_recall_module.Points(samples, "samples")).numpy() == inside).all()
        assert (Balls(samples).contain(precision_recall_module.Points(reference, "reference")).numpy() == covered).all()


def test_the_product_alone_would_miss_ties() -> None:
    """The negative control of the above: the edge of a ball is its own k-th neighbour, which rounding moves to either side."""
    x, _ = SETS["same"](0)
    points, radii = x.double(), Balls(x).squared_radii
    norms = points.square().sum(1)
    product = norms[:, None] + norms - 2 * points @ points.T
    direct = torch.stack([squared_distance(row.expand_as(points), points) for row in points])
    assert ((product <= radii) != (direct <= radii)).any()


def test_the_bound_holds_and_is_tight() -> None:
    """Products are within the bound of the direct sum, and the bound is small enough to leave almost nothing open."""
    for dim, offset in itertools.product((1, 7, 300), (0.0, 1e3)):
        x = features(60, dim, 0).double() + offset
        norms = x.square().sum(1)
        sizes = norms[:, None] + norms
        direct = torch.stack([squared_distance(row.expand_as(x), x) for row in x])
        off = ((sizes - 2 * x @ x.T - direct).abs() / sizes).max()
        assert off < precision_recall_module._relative_error(dim) / 2 < 2e-12


def test_distances_do_not_depend_on_how_many_are_taken() -> None:
    a, b = features(300, 37, 0).double(), features(300, 37, 1).double()
    raise_on_all_ranks = squared_distance(a, b)
    assert torch.equal(raise_on_all_ranks, torch.cat([squared_distance(a[i:i + 1], b[i:i + 1]) for i in range(300)]))
    assert torch.equal(raise_on_all_ranks, squared_distance(b, a))
    np.testing.assert_allclose(raise_on_all_ranks, (a - b).square().sum(1), rtol=1e-14)


def test_precision_recall_are_torch_fidelitys() -> None:
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    a, b = features(400, 16, 0, 0.8), features(300, 16, 1)
    theirs = prc.prc_features_to_metric(a, b, prc_neighborhood=3, prc_batch_size=100, save_cpu_ram=False, verbose=False)
    ours = precision_recall(a, b)
    assert ours.precision.value == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours.recall.value == pytest.approx(theirs["recall"], abs=1e-6)
    p = ours.precision.value
    assert 0.5 < p < 1 and ours.recall.value < p            # narrower samples: precise, and not covering
    assert ours.precision.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 400))
    kept = Balls(b)
    assert precision_recall(a, kept) == precision_recall(Balls(a), kept) == ours


def test_precision_recall_at_their_ends() -> None:
    x = features(50, 6, 0)
    same, apart = precision_recall(x, x), precision_recall(x, x + 100)
    assert (same.precision.value, same.recall.value) == (1, 1)
    assert (apart.precision.value, apart.recall.value) == (0, 0)
