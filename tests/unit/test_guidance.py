"""Classifier-free guidance on a model whose answer depends on the label only; on DiT itself, see test_dit.py."""

import pytest
import torch

from largescale.diffusion.guidance import ClassifierFreeGuidance
from largescale.errors import ConfigError

X, T, Y, NULL = torch.zeros(2, 4, 3, 3), torch.tensor([5, 9]), torch.tensor([1, 2]), 10
COND, UNCOND = (2, [5, 9], [1, 2]), (2, [5, 9], [NULL, NULL])
BOTH = (4, [5, 9, 5, 9], [1, 2, NULL, NULL])


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
    cond = Y + T / 1000
    uncond = NULL + T / 1000
    k = 4 if guided is None else guided
    torch.testing.assert_close(out[:, :k, 0, 0], (uncond + cfg_scale * (cond - uncond))[:, None].expand(-1, k))
    torch.testing.assert_close(out[:, k:, 0, 0], cond[:, None].expand(-1, model_channels - k))
    if cfg_scale or k < 4:
        assert model.batches == [BOTH]                                   # one doubled batch
    else:                                                                # the conditional half for a variance only
        assert model.batches == ([UNCOND] if model_channels == 4 else [UNCOND, COND])


def test_scale_one_evaluates_the_conditional_half_only():
    model = LabelModel(8)
    out = ClassifierFreeGuidance(model, 1.0, NULL)(X, T, Y)
    assert model.batches == [COND]
    assert torch.equal(out, LabelModel(8)(X, T, Y))


def test_more_guided_channels_than_the_image_has_never_reach_the_variance():
    for cfg_scale in (2.0, 0.0):
        out = ClassifierFreeGuidance(LabelModel(8), cfg_scale, NULL, channels=6)(X, T, Y)
        torch.testing.assert_close(out[:, 4:, 0, 0], (Y + T / 1000)[:, None].expand(-1, 4))


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("interval, u, guided", [
    ((0.0, 1.0), 0.0005, True), ((0.0, 1.0), 0.9995, True),
    ((0.25, 0.75), 0.25, True), ((0.25, 0.75), 0.75, True), ((0.25, 0.75), 0.5, True),
    ((0.25, 0.75), 0.24999, False), ((0.25, 0.75), 0.75001, False),
])
def test_guides_in_the_interval_and_asks_the_conditional_model_outside(cfg_scale, interval, u, guided):
    model, everywhere = LabelModel(4), LabelModel(4)
    out = ClassifierFreeGuidance(model, cfg_scale, NULL, interval=interval).at(u)(X, T, Y)
    if guided:
        assert torch.equal(out, ClassifierFreeGuidance(everywhere, cfg_scale, NULL)(X, T, Y))
        assert model.batches == everywhere.batches
    else:
        assert torch.equal(out, LabelModel(4)(X, T, Y)) and model.batches == [COND]


def test_a_call_guides_whatever_the_interval():
    model = LabelModel(4)
    out = ClassifierFreeGuidance(model, 2.0, NULL, interval=(0.9, 1.0))(X, T, Y)
    assert torch.equal(out, ClassifierFreeGuidance(LabelModel(4), 2.0, NULL)(X, T, Y)) and model.batches == [BOTH]


@pytest.mark.parametrize("cfg_scale, channels, message", [
    (-0.5, None, "cfg_scale=-0.5"), (float("nan"), None, "cfg_scale=nan"), (1.5, 0, "channels=0"),
])
def test_bad_values_are_named_with_a_remedy(cfg_scale, channels, message):
    with pytest.raises(ConfigError, match=message):
        ClassifierFreeGuidance(LabelModel(8), cfg_scale, NULL, channels)


@pytest.mark.parametrize("lowest, highest", [
    (0.5, 0.5), (0.6, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.0), (0.0, float("nan")),
])
def test_a_bad_interval_is_named_with_a_remedy(lowest, highest):
    with pytest.raises(ConfigError, match=rf"interval=\({lowest}, {highest}\) must rise .* use \(0, 1\)"):
        ClassifierFreeGuidance(LabelModel(8), 1.5, NULL, interval=(lowest, highest))
