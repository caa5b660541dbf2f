"""Classifier-free guidance on a model whose answer depends on the label only; on DiT itself, see test_dit.py."""

import pytest
import torch

from largescale.diffusion.guidance import ClassifierFreeGuidance
from largescale.errors import ConfigError

X, T, Y, NULL = torch.zeros(2, 4, 3, 3), torch.tensor([5, 9]), torch.tensor([1, 2]), 10


class LabelModel:
    """Output = the label plus a thousandth of t, in every one of `channels` channels."""

    def __init__(self, channels):
        self.channels, self.batches = channels, []

    def __call__(self, x_t, t, y):
        self.batches.append((len(x_t), t.tolist(), y.tolist()))
        return (y + t / 1000)[:, None, None, None].expand(-1, self.channels, *x_t.shape[2:])


@pytest.mark.parametrize("model_channels", [4, 8])
@pytest.mark.parametrize("guided", [None, 3, 4, 1])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5, 4.0])
def test_guides_the_image_channels_and_leaves_the_others_conditional(model_channels, guided, cfg_scale):
    model = LabelModel(model_channels)
    out = ClassifierFreeGuidance(model, cfg_scale, NULL, guided)(X, T, Y)
    assert out.shape == (2, model_channels, 3, 3)
    assert model.batches == [(4, [5, 9, 5, 9], [1, 2, NULL, NULL])]      # one doubled batch
    cond = Y + T / 1000
    uncond = NULL + T / 1000
    k = 4 if guided is None else guided
    torch.testing.assert_close(out[:, :k, 0, 0], (uncond + cfg_scale * (cond - uncond))[:, None].expand(-1, k))
    torch.testing.assert_close(out[:, k:, 0, 0], cond[:, None].expand(-1, model_channels - k))


def test_scale_one_evaluates_the_conditional_half_only():
    model = LabelModel(8)
    out = ClassifierFreeGuidance(model, 1.0, NULL)(X, T, Y)
    assert model.batches == [(2, [5, 9], [1, 2])]
    assert torch.equal(out, LabelModel(8)(X, T, Y))


def test_more_guided_channels_than_the_image_has_never_reach_the_variance():
    out = ClassifierFreeGuidance(LabelModel(8), 2.0, NULL, channels=6)(X, T, Y)
    torch.testing.assert_close(out[:, 4:, 0, 0], (Y + T / 1000)[:, None].expand(-1, 4))


@pytest.mark.parametrize("cfg_scale, channels, message", [
    (-0.5, None, "cfg_scale=-0.5"), (float("nan"), None, "cfg_scale=nan"), (1.5, 0, "channels=0"),
])
def test_bad_values_are_named_with_a_remedy(cfg_scale, channels, message):
    with pytest.raises(ConfigError, match=message):
        ClassifierFreeGuidance(LabelModel(8), cfg_scale, NULL, channels)
