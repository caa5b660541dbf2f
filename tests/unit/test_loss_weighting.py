"""Weightings against their papers' formulas, for what each objective predicts."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from largescale.config.schema import NoiseConfig
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.loss_weighting import make_weighting, weighted
from largescale.diffusion.objective import Losses
from largescale.errors import ConfigError
from largescale.noise_schedule import alphas_cumprod, make_betas


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


SNR = column(1e-12, 1e-4, 0.3, 1.0, 4.999, 5.0, 5.001, 7.0, 1e4, 1e12)
SIGMA = SNR.rsqrt()                                                      # EDM's noise level, for data of unit variance
U = 1 / (1 + SNR.sqrt())                                                 # the linear flow's: SNR = ((1 - u) / u) ** 2
X_START_WEIGHTS = {
    "noise": SNR,
    "velocity": U**-2,
    "edm": (SIGMA**2 + 0.25) / (0.5 * SIGMA) ** 2,
}


def weight(config: NoiseConfig, x_start_weight: Tensor, snr: Tensor = SNR) -> np.ndarray:
    result = make_weighting(config)(snr.log(), x_start_weight)
    assert result.dtype == torch.float32 and result.shape == snr.shape and torch.isfinite(result).all()
    return result.double().numpy()


@pytest.mark.parametrize("predicts", X_START_WEIGHTS)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weighs_the_error_of_x_start(predicts: str, gamma: float) -> None:
    """mse = x_start_weight |x_start error|^2, and min(SNR, gamma) |x_start error|^2 is wanted."""
    got = weight(NoiseConfig(weighting="min_snr", min_snr_gamma=gamma), X_START_WEIGHTS[predicts])
    want = [min(snr, gamma) for snr in SNR.tolist()]
    np.testing.assert_allclose(got * X_START_WEIGHTS[predicts].numpy(), want, rtol=3e-6)


def test_min_snr_of_noise_prediction_is_the_papers() -> None:
    """min(SNR, gamma) / SNR: below gamma exactly the usual loss."""
    got = weight(NoiseConfig(weighting="min_snr"), SNR)
    np.testing.assert_allclose(got, [1, 1, 1, 1, 1, 1, 5 / 5.001, 5 / 7, 5e-4, 5e-12], rtol=1e-6)
    # and by min(SNR, gamma) / (SNR + 1) for the v of progressive distillation, whose mse is SNR + 1 times that of x_start
    got = weight(NoiseConfig(weighting="min_snr"), SNR + 1)
    np.testing.assert_allclose(got, [min(s, 5) / (s + 1) for s in SNR.tolist()], rtol=1e-6)


def test_min_snr_of_the_objective_in_use() -> None:
    betas = make_betas("cosine", 1000)
    diffusion, t = GaussianDiffusion(betas, learn_sigma=False), torch.arange(1000)
    alpha_bar = alphas_cumprod(betas)
    snr = alpha_bar / (1 - alpha_bar)
    got = make_weighting(NoiseConfig(weighting="min_snr"))(diffusion.log_snr(t), diffusion.x_start_weight(t))
    np.testing.assert_allclose(got.numpy(), np.minimum(snr, 5) / snr, rtol=1e-6)


@pytest.mark.parametrize("k, gamma", [(1.0, 1.0), (1.0, 0.5), (0.1, 2.0), (0.0, 1.0), (3.0, 0.0)])
def test_p2_is_the_papers(k: float, gamma: float) -> None:
    for x_start_weight in X_START_WEIGHTS.values():                       # of which it knows nothing
        got = weight(NoiseConfig(weighting="p2", p2_k=k, p2_gamma=gamma), x_start_weight)
        np.testing.assert_allclose(got, [1 / (k + snr) ** gamma for snr in SNR.tolist()], rtol=1e-6)


def test_none_leaves_the_loss_bitwise() -> None:
    generator = torch.Generator().manual_seed(0)
    mse, vb = torch.rand(2, 1000, generator=generator) * 10 ** torch.randint(-6, 3, (2, 1000), generator=generator)
    losses = Losses(mse + vb, mse, vb)
    ones = make_weighting(NoiseConfig())(torch.linspace(-30, 30, 1000).double(), torch.full((1000,), 7.0).double())
    assert ones.dtype == torch.float32 and torch.equal(ones, torch.ones(1000))
    assert torch.equal(weighted(losses, ones, torch.ones(1000)).loss, losses.loss)


def test_a_weight_is_of_the_mse_and_importance_of_the_whole() -> None:
    losses = Losses(torch.tensor([9.0]), torch.tensor([2.0]), torch.tensor([7.0]))
    assert weighted(losses, torch.tensor([0.5]), torch.tensor([3.0])).loss.tolist() == [3 * (0.5 * 2 + 7)]


@pytest.mark.parametrize("config, named", [
    (NoiseConfig(weighting="min_snr", min_snr_gamma=0.0), "min_snr_gamma=0.0.*--noise.min-snr-gamma"),
    (NoiseConfig(weighting="min_snr", min_snr_gamma=math.nan), "min_snr_gamma=nan"),
    (NoiseConfig(weighting="p2", p2_k=-1.0), "p2_k=-1.0.*--noise.p2-k"),
    (NoiseConfig(weighting="p2", p2_gamma=math.inf), "p2_gamma=inf.*--noise.p2-gamma"),
    (NoiseConfig(weighting="snr"), "snr.*choose one of none"),  # type: ignore[arg-type]
])
def test_bad_settings(config: NoiseConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_weighting(config)
