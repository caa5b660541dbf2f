"""The function of DiT's `diffusion`, for a rehearsal."""

from collections.abc import Callable

from torch import Tensor

from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.noise_schedule import make_betas


class Diffusion:
    """Noise prediction with the linear schedule."""

    num_timesteps = 1000

    def __init__(self) -> None:
        self._ours = GaussianDiffusion(make_betas("linear", self.num_timesteps), learn_sigma=True)

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Tensor],
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of each image, under DiT's names."""
        noise = x.new_empty(x.shape).normal_() if noise is None else noise
        losses = self._ours.training_losses(model, x, t, noise, model_kwargs["y"])
        return {"loss": losses.loss, "mse": losses.mse}


def create_diffusion(timestep_respacing: str) -> Diffusion:
    """All timesteps, whatever is asked for."""
    return Diffusion()
