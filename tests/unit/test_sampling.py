"""Sample i is a function of (seed, i) alone; and the pictures and sheets made of samples."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from largescale.data.images import balanced_labels, grid, titled, to_uint8
from largescale.diffusion.gaussian import GaussianDiffusion
from largescale.diffusion.sampling import SamplingConfig, draw_samples
from largescale.errors import ConfigError
from largescale.models.dit import DiT
from largescale.noise_schedule import make_betas

CPU, N, CLASSES, SHAPE = torch.device("cpu"), 12, 10, (4, 8, 8)
DIFFUSION = GaussianDiffusion(make_betas("linear", 1000), learn_sigma=True)
LABELS = balanced_labels(N, CLASSES)
DDPM = SamplingConfig("ddpm", steps=4, cfg_scale=2.0, clip_denoised=True)
DDIM = SamplingConfig("ddim", steps=4, cfg_scale=2.0, clip_denoised=True)


@pytest.fixture(scope="module")
def model() -> DiT:
    """With weights that let every input count: DiT starts as a function that is 0 everywhere."""
    model = DiT(input_size=8, in_channels=4, patch_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=CLASSES)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model.eval()


def condition(index: Sequence[int]) -> Tensor:
    return torch.tensor([LABELS[i] for i in index])


def draw(model: nn.Module, config: SamplingConfig, index: list[int], batch_size: int = 4) -> Tensor:
    return draw_samples(
        model, DIFFUSION, config, index=index,
        condition=condition, shape=SHAPE, num_classes=CLASSES, batch_size=batch_size, device=CPU,
    )  # fmt: skip


@pytest.mark.parametrize("config", [DDPM, DDIM])
def test_ranks_draw_what_one_process_draws(model: DiT, config: SamplingConfig) -> None:
    whole = draw(model, config, list(range(N)))
    assert len({tuple(x.flatten().tolist()) for x in whole}) == N
    for rank in range(3):                               # batches of 4 everywhere: bitwise
        assert torch.equal(draw(model, config, list(range(N))[rank::3]), whole[rank::3])


@pytest.mark.parametrize("config", [DDPM, DDIM])
@pytest.mark.parametrize("batch_size", [1, 5, 50])
def test_the_batch_changes_the_rounding_only(model: DiT, config: SamplingConfig, batch_size: int) -> None:
    whole = draw(model, config, list(range(N)))         # the first step enlarges rounding by 1 / sqrt(alpha_bar_T), 157
    torch.testing.assert_close(draw(model, config, list(range(N)), batch_size), whole, rtol=0, atol=1e-4)


def test_order_is_the_callers(model: DiT) -> None:
    index = [7, 2, 11, 0]
    assert torch.equal(draw(model, DDPM, index), draw(model, DDPM, index[::-1]).flip(0))


@pytest.mark.parametrize("change", [
    {"seed": 1}, {"cfg_scale": 1.5}, {"cfg_channels": 3}, {"steps": 5}, {"clip_denoised": False}, {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 0.5},
])
def test_every_setting_counts(model: DiT, change: dict[str, Any]) -> None:
    index = list(range(4))
    changed = replace(DDPM, **change)
    base = replace(DDPM, sampler="ddim") if "eta" in change else DDPM
    assert (draw(model, base, index) - draw(model, changed, index)).abs().amax(dim=(1, 2, 3)).min() > 0.01


def test_progress_counts_samples_and_nothing_is_something(model: DiT) -> None:
    told: list[float] = []
    for index in (range(5), range(0)):
        x = draw_samples(model, DIFFUSION, DDIM, index=index, condition=condition, shape=SHAPE,
                         num_classes=CLASSES, batch_size=2, device=CPU, progress=told.append)
        assert x.shape == (len(index), *SHAPE)
    assert told == [0.5] * 8 + [0.25] * 4               # images of work, four evaluations each


class Counting(nn.Module):
    """The model, and how many images each of its evaluations saw."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.seen: list[int] = []
        self.labels: set[int] = set()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.seen.append(len(x))
        self.labels |= set(y.tolist())
        output: Tensor = self.model(x, t, y)
        return output


@pytest.mark.parametrize("cfg_scale, images, labels", [(1.0, 4, {0, 1, 2, 3}), (2.0, 8, {0, 1, 2, 3, CLASSES})])
def test_scale_one_evaluates_the_conditional_half_only(
    model: DiT, cfg_scale: float, images: int, labels: set[int]
) -> None:
    counting = Counting(model)
    draw(counting, SamplingConfig("ddim", 3, cfg_scale), list(range(4)))
    assert (counting.seen, counting.labels) == ([images] * 3, labels)


@pytest.mark.parametrize("label", [-1, CLASSES])        # CLASSES is the null label
def test_a_label_outside_the_classes(model: DiT, label: int) -> None:
    with pytest.raises(ConfigError, match=rf"label {label} lies outside the model's classes 0\.\.9"):
        draw_samples(model, DIFFUSION, DDPM, index=[0, 1],
                     condition=lambda _: torch.tensor([3, label]), shape=SHAPE, num_classes=CLASSES, batch_size=2, device=CPU)


def test_a_negative_scale(model: DiT) -> None:
    with pytest.raises(ConfigError, match=r"cfg_scale=-1\.0 must be 0 or more"):
        draw(model, SamplingConfig("ddpm", 4, -1.0), [0])


def test_to_uint8() -> None:
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 1 / 255]).view(1, 1, 2, 3)
    grey = to_uint8(x)
    assert grey.shape == (1, 2, 3, 3) and grey.dtype == np.uint8
    assert grey[0, ..., 0].ravel().tolist() == [0, 0, 128, 255, 255, 128]
    assert (grey == grey[..., :1]).all()
    colours = torch.stack([torch.full((2, 2), v) for v in (-1.0, 0.2, 1.0, 0.5)])[None]
    assert to_uint8(colours[:, :3])[0, 0, 0].tolist() == to_uint8(colours)[0, 0, 0].tolist() == [0, 153, 255]
    assert to_uint8(torch.empty(0, 1, 4, 4)).shape == (0, 4, 4, 3)


def test_every_grey_value_survives_the_way_there_and_back() -> None:
    values = torch.arange(256.0)
    assert to_uint8((values / 127.5 - 1).view(1, 1, 16, 16))[..., 0].ravel().tolist() == values.tolist()


def test_grid_runs_row_by_row() -> None:
    images = np.stack([np.full((2, 3, 3), 100 + i, np.uint8) for i in range(5)])
    sheet = grid(images, columns=3, scale=2, pad=1)
    assert sheet.shape == (2 * (4 + 1) + 1, 3 * (6 + 1) + 1, 3)
    for i in range(5):
        top, left = 1 + i // 3 * 5, 1 + i % 3 * 7
        assert (sheet[top : top + 4, left : left + 6] == 100 + i).all()
    assert (sheet[sheet < 100] == 32).all() and (sheet >= 100).sum() == 5 * 4 * 6 * 3  # the rest is frame


def test_labels_are_balanced_to_one() -> None:
    assert list(balanced_labels(12, 10)) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_titles_stand_below_their_images() -> None:
    images = np.full((3, 16, 16, 3), 200, np.uint8)
    sheet = titled(images, ["a", "a very long title that is wrapped and cut", ""], columns=2, scale=4)
    assert sheet.shape == (2 * (64 + 38 + 2) + 2, 2 * 66 + 2, 3)
    below = [sheet[top + 64 : top + 102, left : left + 64] for top, left in ((2, 2), (2, 68), (106, 2))]
    ink = [int((strip > 100).any(axis=2).sum()) for strip in below]
    assert 0 == ink[2] < ink[0] < ink[1] and (below[1][-14:] > 100).any()  # down to the third line
    assert (titled(images[:1], ["São"], 1, 4) == titled(images[:1], ["Sao"], 1, 4)).all()
