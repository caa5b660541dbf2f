import numpy as np
import pytest
import torch

from largescale.randomness import Draws, host_draws, step_draws, stream_seed

CPU = torch.device("cpu")


def draws(step: int = 3, seed: int = 0, n: int = 12, posterior: bool = True) -> Draws:
    return step_draws(seed, step, n, (2, 4, 4), dropout_prob=0.3, posterior=posterior, device=CPU, augment=3)


def test_a_function_of_seed_and_step() -> None:
    torch.manual_seed(1)
    first = draws()
    torch.rand(100)
    assert first.augment is not None
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(draws()).values(), strict=True))
    for other in (draws(step=4), draws(seed=1)):
        assert not torch.equal(first.noise, other.noise) and not torch.equal(first.v, other.v)


def test_not_of_the_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first = draws(n=4096)
        torch.set_num_threads(1)
        assert torch.equal(first.noise, draws(n=4096).noise)
    finally:
        torch.set_num_threads(threads)


def test_streams_are_separate() -> None:
    """Leaving one kind of draw out shifts no other; no two kinds are alike."""
    with_posterior, without = draws(), draws(posterior=False)
    assert without.posterior is None
    assert torch.equal(with_posterior.noise, without.noise) and torch.equal(with_posterior.dropout, without.dropout)
    assert not torch.equal(with_posterior.noise, with_posterior.posterior)
    assert not torch.isin(with_posterior.augment, with_posterior.v).any()


def test_rows_of_all_ranks_are_the_global_batch() -> None:
    whole = draws()
    for world_size in (1, 2, 3, 4):
        layout = torch.arange(12).view(-1, world_size, 12 // world_size)
        parts = [whole.rows(layout[0, rank]) for rank in range(world_size)]
        assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
        assert torch.equal(torch.cat([part.v for part in parts]), whole.v)
        assert torch.equal(torch.cat([part.augment for part in parts]), whole.augment)


def test_distributions() -> None:
    many = draws(n=200_000)
    assert many.v.dtype == torch.float64 and many.v.min() > 0 and many.v.max() < 1
    assert abs(many.v.mean() - 0.5) < 0.005 and abs(many.v.std() - 12**-0.5) < 0.005
    assert abs(many.noise.mean()) < 0.002 and abs(many.noise.std() - 1) < 0.002
    assert abs(many.dropout.double().mean() - 0.3) < 0.01


def test_what_the_loader_draws() -> None:
    flip, caption = host_draws(0, 3, 200_000)
    assert abs(flip.mean() - 0.5) < 0.005 and abs(caption.mean() - 0.5) < 0.005 and 0 <= caption.min() <= caption.max() < 1
    assert np.array_equal(flip, host_draws(0, 3, 200_000)[0]) and abs(np.corrcoef(flip, caption)[0, 1]) < 0.01
    for other in (host_draws(0, 4, 200_000), host_draws(1, 3, 200_000)):
        assert not np.array_equal(flip, other[0]) and not np.array_equal(caption, other[1])


def test_no_two_steps_share_a_seed() -> None:
    """torch's CPU generator reads the low 32 bits."""
    for stream in ("noise", "dropout"):
        low = {stream_seed(7, stream, step) % 2**32 for step in range(200_000)}
        assert len(low) == 200_000
    a, b = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.rand(3, generator=a), torch.rand(3, generator=b)), "the reason no longer holds"


def test_the_interval_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """A zero, which torch.rand gives once in 2**53 draws, would be an infinite SNR."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **settings: torch.zeros(*shape, dtype=settings["dtype"]))
    assert (draws().v > 0).all()
