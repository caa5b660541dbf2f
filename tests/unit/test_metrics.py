"""The mathematics of scoring: against torch-fidelity, scipy, closed forms."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from eval.scoring.metrics import (
    FrechetReference,
    bias_note,
    class_score,
    clip_score,
    frechet_distance,
    frechet_jackknife,
    kernel_distance,
)
from eval.scoring.moments import GroupedMoments, Moments
from eval.scoring.precision_recall import Balls, precision_recall
from largescale.errors import ConfigError, DataError
from tests.unit.random_features import features


def moments(x: Tensor) -> Moments:
    result = Moments(x.shape[1])
    result.add(x)
    return result


def grouped(x: Tensor, groups: int = 10, batch: int = 64) -> GroupedMoments:
    result = GroupedMoments(x.shape[1], groups)
    for numbers in torch.arange(len(x)).split(batch):
        result.add(x[numbers], numbers)
    return result


# Moments


@pytest.mark.parametrize("batch", [1, 7, 500])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_numpys(batch: int, offset: float) -> None:
    x = np.random.default_rng(0).standard_normal((500, 12)) + offset
    streamed = Moments(12)
    for part in torch.from_numpy(x).split(batch):
        streamed.add(part)
    exact = x - offset                                      # exact: the offset is a whole number of the last digit
    assert streamed.count == 500
    np.testing.assert_allclose(streamed.mean - offset, exact.mean(0), rtol=0, atol=2e-11)
    np.testing.assert_allclose(streamed.cov, np.cov(exact, rowvar=False), rtol=0, atol=1e-11)


def test_moments_when_batches_differ_from_each_other() -> None:
    x = np.concatenate([np.random.default_rng(i).standard_normal((20, 3)) + 100 * i for i in range(5)])
    streamed = Moments(3)
    for part in torch.from_numpy(x).split(20):
        streamed.add(part)
    np.testing.assert_allclose(streamed.cov, np.cov(x, rowvar=False), rtol=1e-13)


def test_nothing_holds_the_graph_of_a_network() -> None:
    m = moments(features(10, 3, 0).requires_grad_())
    assert not m.cov.requires_grad and not m.mean.requires_grad


def test_half_precision_features_are_summed_in_float64() -> None:
    x = features(3000, 4, 0, shift=3).half()
    np.testing.assert_allclose(moments(x).cov, np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)


def test_merged_moments_are_those_of_all() -> None:
    x = features(100, 5, 0, shift=2)
    a, b = moments(x[:30]), moments(x[30:])
    both = a + b
    assert (both.count, a.count, b.count) == (100, 30, 70)
    torch.testing.assert_close(both.cov, moments(x).cov, rtol=1e-12, atol=0)
    torch.testing.assert_close(both.mean, moments(x).mean, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close((Moments(5) + b + Moments(5)).cov, b.cov, rtol=0, atol=0)


def test_singular_up_to_as_many_samples_as_features() -> None:
    for n in (8, 9):
        m = moments(features(n, 8, 0))
        assert m.singular == (n <= 8) == (np.linalg.matrix_rank(m.cov.numpy()) < 8)


def test_groups_depend_on_numbers_alone() -> None:
    x = features(103, 6, 0)
    whole = grouped(x, batch=103)
    for i, group in enumerate(whole.groups):
        torch.testing.assert_close(group.cov, moments(x[i::10]).cov, rtol=1e-12, atol=1e-15)
    ranks = [GroupedMoments(6) for _ in range(3)]
    for number in np.random.default_rng(0).permutation(103):
        ranks[number % 3].add(x[number][None], [number])
    merged = GroupedMoments.from_state(ranks[0].state())    # as gathered
    for rank in ranks[1:]:
        merged.merge(GroupedMoments.from_state(rank.state()))
    for mine, theirs in zip([*merged.groups, merged.total()], [*whole.groups, whole.total()], strict=True):
        assert mine.count == theirs.count
        torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mine.cov, theirs.cov, rtol=1e-12, atol=1e-14)
    left = whole.without(3)
    rest = moments(x[torch.arange(103) % 10 != 3])
    assert left.count == rest.count
    torch.testing.assert_close(left.cov, rest.cov, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole.total().cov, moments(x).cov, rtol=1e-12, atol=1e-14)


def test_a_restored_state_is_a_copy() -> None:
    x = grouped(features(20, 3, 0), groups=2)
    state = x.state()
    before = {key: value.copy() for key, value in state.items()}
    GroupedMoments.from_state(state).add(features(4, 3, 1), torch.arange(4))
    x.add(features(4, 3, 1), torch.arange(4))
    assert all((state[key] == before[key]).all() for key in state)


# Frechet distance


def textbook(m1: Tensor, s1: Tensor, m2: Tensor, s2: Tensor) -> float:
    linalg = pytest.importorskip("scipy.linalg")
    root = linalg.sqrtm((s1 @ s2).numpy())
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * np.trace(root).real)


@pytest.mark.parametrize(("dim", "n"), [(3, 50), (64, 1000), (64, 66), (192, 400), (192, 150)])
def test_distance_is_the_textbooks_and_torch_fidelitys(dim: int, n: int) -> None:
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    a, b = features(n, dim, 0), features(n + 20, dim, 1, 1.2, 0.1)
    m1, m2 = moments(a), moments(b)
    value = frechet_distance(m1.mean, m1.cov, m2.mean, m2.cov)
    assert value == pytest.approx(textbook(m1.mean, m1.cov, m2.mean, m2.cov), rel=1e-6)
    theirs = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(x.double()) for x in (a, b)), False)
    assert value == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert value == pytest.approx(frechet_distance(m2.mean.numpy(), m2.cov.numpy(), m1.mean, m1.cov), rel=1e-6)


def test_distance_between_known_gaussians() -> None:
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((6, 6)))[0]        # covariances that commute: sum of (sqrt(a) - sqrt(b))^2
    a, b = rng.uniform(0, 4, 6), rng.uniform(0, 4, 6)
    a[0] = b[1] = 0
    shift = rng.standard_normal(6)
    value = frechet_distance(shift, q * a @ q.T, np.zeros(6), q * b @ q.T)
    assert value == pytest.approx(shift @ shift + np.square(np.sqrt(a) - np.sqrt(b)).sum(), rel=1e-7)
    s1, s2 = np.diag([1.0, 4.0]), np.array([[2.0, 1.0], [1.0, 3.0]])    # 2 x 2: (Tr sqrt(M))^2 = Tr M + 2 sqrt(det M)
    product = math.sqrt((s1 @ s2).trace() + 2 * math.sqrt(np.linalg.det(s1 @ s2)))
    assert frechet_distance(np.zeros(2), s1, np.zeros(2), s2) == pytest.approx(10 - 2 * product, rel=1e-12)


@pytest.mark.parametrize("n", [20, 1000])
def test_distance_to_itself_is_0(n: int) -> None:
    m = moments(features(n, 64, 0))
    assert 0 <= frechet_distance(m.mean, m.cov, m.mean, m.cov) < 1e-6


def test_a_float32_file_will_do_as_reference() -> None:
    m, other = moments(features(40, 64, 0)), moments(features(500, 64, 1))
    stored = FrechetReference(m.mean.float().numpy(), m.cov.float().numpy())
    assert stored.distance(other.mean, other.cov) == pytest.approx(
        frechet_distance(m.mean, m.cov, other.mean, other.cov), rel=1e-4)


def test_jackknife_is_the_one_written_out() -> None:
    x, real = features(95, 4, 0), moments(features(500, 4, 1))
    reference = FrechetReference(real.mean, real.cov)

    def distance(rows: Tensor) -> float:
        return frechet_distance(real.mean, real.cov, rows.mean(0), np.cov(rows.double().numpy(), rowvar=False))

    left = [distance(x[torch.arange(95) % 10 != g].double()) for g in range(10)]
    result = frechet_jackknife(reference, grouped(x))
    assert result.value == pytest.approx(distance(x.double()), rel=1e-9)
    assert result.standard_error == pytest.approx(3 * np.std(left), rel=1e-6)       # sqrt(9 / 10 * 10)
    assert result.extrapolated == pytest.approx(10 * result.value - 9 * np.mean(left), rel=1e-6)
    assert not result.singular and frechet_jackknife(reference, grouped(x[:40], groups=2)).singular is False
    wide = moments(features(50, 40, 1))
    assert frechet_jackknife(FrechetReference(wide.mean, wide.cov), grouped(features(40, 40, 0), groups=2)).singular


def test_jackknife_knows_its_error_and_bias() -> None:
    dim, n, repeats = 6, 300, 60
    reference = FrechetReference(np.zeros(dim), np.eye(dim))
    truth = dim * 0.2 ** 2                                  # the samples' standard deviation is 1.2
    draws = np.random.default_rng(0).standard_normal((repeats, n, dim)) * 1.2
    results = [frechet_jackknife(reference, grouped(torch.from_numpy(x), batch=n)) for x in draws]
    values = np.array([r.value for r in results])
    assert np.mean([r.standard_error for r in results]) == pytest.approx(values.std(), rel=0.3)
    noise = values.std() / math.sqrt(repeats)
    assert values.mean() > truth + 6 * noise                # biased upwards
    assert abs(np.mean([r.extrapolated for r in results]) - truth) < 4 * noise


# KID, class score, CLIP score


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_kernel_distance_is_torch_fidelitys(dtype: torch.dtype, tolerance: float) -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    a, b = features(150, 24, 0, 1.3).to(dtype), features(130, 24, 1).to(dtype)
    theirs = kid.kid_features_to_metric(a, b, kid_subsets=20, kid_subset_size=100, rng_seed=7, verbose=False, kid_kernel="poly",
                                        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    ours = kernel_distance(a, b, subsets=20, subset_size=100, seed=7)
    assert ours.mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=0, abs=tolerance)
    assert ours.std == pytest.approx(theirs["kernel_inception_distance_std"], rel=0, abs=tolerance)


def test_kernels_are_summed_in_float64() -> None:
    a, b = features(40, 24, 0, 1.3).half(), features(40, 24, 1).half()
    assert kernel_distance(a, b, 3, 30) == kernel_distance(a.double(), b.double(), 3, 30)


def test_kernel_distance_defaults_are_torch_fidelitys() -> None:
    defaults = pytest.importorskip("torch_fidelity.defaults").DEFAULTS
    bound = kernel_distance.__defaults__, class_score.__defaults__, precision_recall.__defaults__
    assert bound[0] == (defaults["kid_subsets"], defaults["kid_subset_size"], defaults["rng_seed"])
    assert bound[1][:2] == (defaults["isc_splits"], defaults["rng_seed"])
    assert bound[2] == (defaults["prc_neighborhood"],)


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    rng = np.random.default_rng(0)
    parts = [kernel_distance(*(torch.from_numpy(rng.standard_normal((20, 3))) for _ in range(2)), 1, 20).mean for _ in range(400)]
    assert abs(np.mean(parts)) < 4 * np.std(parts) / 20
    assert min(parts) < 0
    x, y = torch.zeros(5, 2), torch.ones(5, 2)              # k(x, x) = 1, k(y, y) = 8, k(x, y) = 1
    assert kernel_distance(x, y, 3, 5).mean == pytest.approx(7)


@pytest.mark.parametrize(("n", "splits"), [(500, 10), (503, 7), (30, 1)])
@pytest.mark.parametrize("seed", [None, 2020, 5])
def test_class_score_is_torch_fidelitys(n: int, splits: int, seed: int | None) -> None:
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 4 * features(n, 20, 0)
    theirs = isc.isc_features_to_metric(logits, splits, seed is not None, seed or 0)
    for ours in (class_score(logits, splits, seed), class_score(logits.double().softmax(1), splits, seed, probabilities=True)):
        assert ours.mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
        assert ours.std == pytest.approx(theirs["inception_score_std"], rel=1e-8, abs=1e-12)


def test_class_score_at_its_ends() -> None:
    sure = torch.eye(10).repeat(20, 1)                      # each class as often, and zeros in the logarithm
    assert class_score(sure, 1, probabilities=True).mean == pytest.approx(10)
    assert class_score(1e4 * sure, 1).mean == pytest.approx(10)
    assert class_score(torch.ones(200, 10), 10) == pytest.approx(class_score(1e4 * torch.eye(10)[[3] * 50], 10))
    assert class_score(torch.ones(200, 10)).mean == pytest.approx(1)
    assert class_score(1e4 * sure[:20], splits=20).mean == pytest.approx(1)     # a split of one sample


def test_clip_score() -> None:
    images = torch.tensor([[1.0, 0], [1, 1], [1, 0], [0, 3]])
    texts = torch.tensor([[2.0, 0], [5, 0], [-1, 0], [0, 1]])
    scores = np.array([100, 100 / math.sqrt(2), 0, 100])    # a contrary text counts as 0, not as -100
    result = clip_score(images.half(), texts)
    assert result.value == pytest.approx(scores.mean())
    assert result.standard_error == pytest.approx(scores.std(ddof=1) / 2)


# What a reader is told


def test_bias_note() -> None:
    for n in (1, 2000, 2048):
        assert "singular" in (bias_note(n, 2048) or "") and f"{n:,}" in (bias_note(n, 2048) or "")
    for n in (2049, 10_000, 49_999):
        note = bias_note(n, 2048) or ""
        assert "singular" not in note and "biased upwards" in note and f"{n:,} samples" in note
    assert bias_note(50_000, 2048) is None
    assert "singular" in (bias_note(50_000, 50_000) or "")


X, NAN = features(20, 3, 0), features(20, 3, 0)
NAN[7, 1] = torch.nan
EYE, ZERO = np.eye(2), np.zeros(2)


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda: Moments(3).add(NAN), DataError, "of 1 samples are not finite, first of sample 7; look at"),
    (lambda: Moments(3).add(torch.full((2, 3), torch.inf)), DataError, "of 2 samples are not finite, first of sample 0; look at"),
    (lambda: Moments(3).add(X[0]), DataError, r"shape \(3,\), not \(N, D\); flatten"),
    (lambda: Moments(4).add(X), DataError, "3 features a sample against 4; take both"),
    (lambda: Moments(4).merge(moments(X)), DataError, "3 features a sample against 4; take both"),
    (lambda: moments(X[:1]).cov, DataError, "covariance of 1 samples; give 2"),
    (lambda: GroupedMoments(3, 1), ConfigError, "groups=1 .* give 2 or more"),
    (lambda: GroupedMoments(3).add(X, torch.arange(5)), DataError, "5 numbers for 20 samples; give one each"),
    (lambda: GroupedMoments(3, 5).merge(GroupedMoments(3)), DataError, "10 groups cannot join 5; use"),
    (lambda: GroupedMoments.from_state({**grouped(X).state(), "count": np.ones(3)}), DataError, r"shapes \(\(3,\), .*; give what"),
    (lambda: frechet_distance(ZERO, np.eye(3), ZERO, EYE), DataError, r"\(2,\) and covariance \(3, 3\); give"),
    (lambda: frechet_distance(ZERO, EYE, np.zeros(3), np.eye(3)), DataError, "3 features a sample against 2; take"),
    (lambda: frechet_distance(ZERO, EYE, ZERO, EYE * np.nan), DataError, "not finite; compute"),
    (lambda: frechet_distance(ZERO, EYE, ZERO + np.inf, EYE), DataError, "not finite; compute"),
    (lambda: frechet_distance(ZERO, EYE, ZERO, np.array([[1, 1], [0, 1]])), DataError, "differs from its transpose by 1; give"),
    (lambda: frechet_distance(ZERO, -EYE, ZERO, EYE), DataError, "eigenvalue -1; give"),
    (lambda: frechet_jackknife(FrechetReference(np.zeros(3), np.eye(3)), grouped(X[:9])), DataError, "groups of 0 to 1 samples; number 10"),
    (lambda: frechet_jackknife(FrechetReference(np.zeros(3), np.eye(3)), gappy()), DataError, "groups of 2 to 10 samples; number 2"),
    (lambda: kernel_distance(X, X[:19], 2, 20), ConfigError, "subset_size=20 of 20 samples and 19 reference ones; try subset_size=19"),
    (lambda: kernel_distance(X, X, 2, 1), ConfigError, "subset_size=1; give"),
    (lambda: kernel_distance(X, X, 0, 5), ConfigError, "subsets=0 .*; give"),
    (lambda: kernel_distance(X, X[:, :2], 1, 5), DataError, "3 features a sample against 2; take"),
    (lambda: kernel_distance(X, NAN, 1, 5), DataError, "reference features of 1 samples are not finite"),
    (lambda: class_score(X[:5]), ConfigError, "splits=10 of 5 samples; try splits=1"),
    (lambda: class_score(X, splits=0), ConfigError, "splits=0"),
    (lambda: class_score(NAN), DataError, "outputs of 1 samples are not finite"),
    (lambda: class_score(X, probabilities=True), DataError, "miss 1 by .*; give those of a softmax"),
    (lambda: class_score(torch.tensor([[1.5, -0.5]]), 1, probabilities=True), DataError, "from -0.5 up .*; give those of a softmax"),
    (lambda: clip_score(X, X[:5]), DataError, r"\(20, 3\) and text features \(5, 3\); give one text"),
    (lambda: clip_score(X, 0 * X), DataError, "of pair 0 have length 0; look"),
    (lambda: clip_score(X[:1], X[:1]), DataError, "of 1 samples; give 2"),
    (lambda: clip_score(X, NAN), DataError, "text features of 1 samples are not finite"),
    (lambda: precision_recall(X[:3], X), ConfigError, "k=3 neighbours of each of 3 samples; give 4"),
    (lambda: precision_recall(X, X, k=0), ConfigError, "k=0 .*; give k=1 or more"),
    (lambda: precision_recall(X, X[:, :2]), DataError, "3 features a sample against 2; take"),
    (lambda: precision_recall(NAN, X), DataError, "samples of 1 samples are not finite"),
    (lambda: precision_recall(X, torch.full((5, 1), 9e153, dtype=torch.float64)), DataError, "too much to square"),
    (lambda: precision_recall(X, X.double() * 1e200), DataError, "reference features reach .*e.200, too much to square; scale"),
    (lambda: precision_recall(X, Balls(X, k=2)), ConfigError, "k=3 for balls of k=3 and k=2; use one k"),
    (lambda: precision_recall(Balls(X, k=2), Balls(X, k=2)), ConfigError, "k=3 for balls of k=2 and k=2; use one k"),
])
def test_errors_name_the_value_and_the_remedy(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def gappy() -> GroupedMoments:
    result = GroupedMoments(3, 2)
    result.add(X[:12], [0, 1, 2, 3, *range(4, 20, 2)])
    return result


def test_a_bad_batch_leaves_the_groups_as_they_were() -> None:
    result = grouped(X, groups=4)
    before = result.state()
    with pytest.raises(DataError):
        result.add(NAN, torch.arange(20))
    assert all((value == before[key]).all() for key, value in result.state().items())
