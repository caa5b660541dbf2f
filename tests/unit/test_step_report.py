import pytest
import torch

from largescale.diffusion.loss_weighting import OptimisedLosses
from largescale.distributed.step_report import RankStatus, StepAccumulator, read_report

EDGES = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)


def losses(*values: float) -> OptimisedLosses:
    loss = torch.tensor(values)
    return OptimisedLosses(loss, loss * 0.75, loss * 0.25)


def vector(rank: int, stop: bool = False, writing: bool = False, *micro: tuple[OptimisedLosses, list[float]]) -> torch.Tensor:
    accumulator = StepAccumulator(EDGES, rank, 2)
    for each, u in micro:
        accumulator.add(each, torch.tensor(u, dtype=torch.float64), torch.ones(len(u)), torch.arange(len(u)))
    return accumulator.vector(RankStatus(stop=stop, writing=writing))


def test_means_and_clusters_over_ranks_and_micro_steps() -> None:
    summed = vector(0, False, False, (losses(1, 2), [0.1, 0.25]), (losses(3, 4), [0.3, 0.9]))
    summed += vector(1, False, False, (losses(5, 6), [0.5, 0.2499]), (losses(7, 8), [0.6, 0.999]))
    report = read_report(summed.tolist(), 3)
    assert (report.loss, report.mse, report.vb) == (4.5, 4.5 * 0.75, 4.5 * 0.25)
    assert report.cluster_count == [2, 2, 4]     # an edge belongs to the cluster above it
    assert report.cluster_loss == [1 + 6, 2 + 3, 4 + 5 + 7 + 8]
    assert (report.stop, report.writing, report.non_finite) == (False, False, [])


@pytest.mark.parametrize("rank", [0, 1])
def test_one_ranks_word_is_enough(rank: int) -> None:
    def both(**of_one: bool) -> torch.Tensor:
        other = vector(1 - rank, False, False, (losses(1), [0.1]))
        return vector(rank, of_one.get("stop", False), of_one.get("writing", False), (losses(1), [0.1])) + other

    assert read_report(both(stop=True).tolist(), 3).stop and not read_report(both(stop=True).tolist(), 3).writing
    assert read_report(both(writing=True).tolist(), 3).writing and not read_report(both(writing=True).tolist(), 3).stop


def test_what_only_one_rank_knows() -> None:
    """Each in its rank's place, where a sum would say only that it was somebody."""
    accumulators = [StepAccumulator(EDGES, rank, 3) for rank in range(3)]
    for rank, accumulator in enumerate(accumulators):
        accumulator.add(losses(1, rank), torch.tensor([0.1, 0.6], dtype=torch.float64), torch.ones(2), torch.arange(2))
    vectors = [a.vector(RankStatus(cannot_write=r == 2), cannot_read=r == 1) for r, a in enumerate(accumulators)]
    report = read_report(torch.stack(vectors).sum(0).tolist(), 3)
    assert (report.cannot_write, report.cannot_read, report.non_finite) == ([2], [1], [])
    assert report.rank_loss == [0.5, 1.0, 1.5] and report.loss == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_rank(bad: float) -> None:
    summed = vector(0, False, False, (losses(1), [0.1])) + vector(1, False, False, (losses(bad), [0.1]))
    summed += vector(0, False, False, (losses(1, bad), [0.1, 0.3]))
    report = read_report(summed.tolist(), 3)
    assert report.non_finite == [0, 1] and report.non_finite_clusters == [1, 2]


def test_resampling_changes_no_mean_and_rows_are_told_without_it() -> None:
    """u is drawn three times as often in the lower half, and its losses count a third: all means are those of uniform
    draws, and the rows of two ranks stand in the batch's order."""
    u = torch.tensor([0.05, 0.15, 0.25 - 1e-9, 0.6], dtype=torch.float64)
    importance = torch.tensor([2 / 3, 2 / 3, 2 / 3, 2.0])
    raw = torch.tensor([9.0, 9.0, 9.0, 1.0])
    summed = None
    for rank, rows in enumerate(([2, 3], [0, 1])):
        accumulator = StepAccumulator(EDGES, rank, 2, n_rows=4, n_bins=10)
        mine = torch.tensor(rows)
        accumulator.add(OptimisedLosses((importance * raw)[mine], raw[mine] * 0.75, raw[mine] * 0.25), u[mine], importance[mine], mine)
        vector = accumulator.vector(RankStatus())
        summed = vector if summed is None else summed + vector
    assert summed is not None
    report = read_report(summed.tolist(), 3, n_rows=4)
    assert report.loss == pytest.approx((9 + 1) / 2) and report.mse + report.vb == pytest.approx(report.loss)
    assert [a / b for a, b in zip(report.cluster_loss[::2], report.cluster_count[::2], strict=True)] == pytest.approx([9, 1])
    assert report.row_bin == [0, 1, 2, 6] and report.row_loss == pytest.approx([9, 9, 9, 1])
