"""EDM's augmentations: images against mirrored, turned and shifted ones and a closed form, labels against their formula."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from largescale.data.augment import AUGMENT_DIM, AUGMENT_NORMALS, AUGMENT_UNIFORMS, augment
from largescale.errors import ConfigError

P = 0.12
OFF, ON = 0.999, 0.001
X = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def draws(*, x_flip=OFF, y_flip=OFF, scale=None, angle=None, stretch=None, axis=None, move=None):
    """What makes these things be done to one image: angles in radians, the others in standard deviations."""
    def turn(a):
        return (OFF, 0.5) if a is None else (ON, a / (2 * math.pi) + 0.5)

    uniform = [x_flip, y_flip, OFF if scale is None else ON, *turn(angle), OFF if stretch is None else ON, *turn(axis),
               OFF if move is None else ON]
    normal = [scale or 0.0, stretch or 0.0, *(move or (0.0, 0.0))]
    return torch.tensor([uniform], dtype=torch.float64), torch.tensor([normal], dtype=torch.float64)


def random_draws(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, AUGMENT_UNIFORMS, generator=generator, dtype=torch.float64),
            torch.randn(n, AUGMENT_NORMALS, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("flips, axes", [({}, []), ({"x_flip": ON}, [3]), ({"y_flip": ON}, [2]),
                                         ({"x_flip": ON, "y_flip": ON}, [2, 3])])
def test_flips_are_exact(flips, axes):
    out, labels = augment(X, *draws(**flips), P)
    assert torch.equal(out, X.flip(axes))
    assert labels.tolist() == [[float(3 in axes), float(2 in axes), *[0.0] * 7]]


def test_flips_of_their_own_probabilities():
    """An x-flip with 1/2 whatever p is, a y-flip with p / 2; nothing where augmentation is off."""
    for value, x_flip, y_flip in [(0.499, 1, 0), (0.501, 0, 0), (0.061, 1, 0), (0.059, 1, 1)]:
        assert augment(X, *draws(x_flip=value, y_flip=value), P)[1][0, :2].tolist() == [x_flip, y_flip]
    everything = draws(x_flip=ON, y_flip=ON, scale=1.0, angle=1.0, stretch=1.0, axis=1.0, move=(1.0, 1.0))
    out, labels = augment(X, *everything, 0.0)
    assert torch.equal(out, X) and labels.shape == (1, AUGMENT_DIM) and not labels.any()
    assert augment(X, *everything, P)[1].all()


@pytest.mark.parametrize("turns", [1, 2, -1])
def test_quarter_turns(turns):
    x = X[..., :12]
    out, labels = augment(x, *draws(angle=turns * math.pi / 2), P)
    torch.testing.assert_close(out, torch.rot90(x, turns, (2, 3)), atol=1e-5, rtol=0)
    expected = [math.cos(turns * math.pi / 2) - 1, math.sin(turns * math.pi / 2)]
    np.testing.assert_allclose(labels[0], [0, 0, 0, *expected, 0, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("right, down", [(3, 0), (0, 2), (-1, -4), (5, 3)])
def test_moves_by_whole_pixels(right, down):
    """Mirrored about the middle of the last pixels beyond the edge."""
    move = right / (0.125 * 16), down / (0.125 * 12)
    out, labels = augment(X, *draws(move=move), P)
    around = F.pad(X, (6, 6, 6, 6), mode="reflect")
    torch.testing.assert_close(out, around[:, :, 6 - down:18 - down, 6 - right:22 - right], atol=1e-5, rtol=0)
    inside = (..., slice(5, -5), slice(5, -5))
    torch.testing.assert_close(out[inside], X.roll((down, right), (2, 3))[inside], atol=1e-5, rtol=0)
    np.testing.assert_allclose(labels[0], [0] * 7 + [*move])


def picture(x, y, width, height):
    """Smooth, unlike any of its mirror images, and continued beyond its edge by mirroring; (x, y) from the centre."""
    a, b = np.pi * (x / (width - 1) + 0.5), np.pi * (y / (height - 1) + 0.5)
    return (np.cos(a) + 0.5 * np.cos(2 * b) + np.cos(b) * (0.6 + 0.4 * np.cos(2 * a))) / 2.5


CASES = {
    "scaled up": {"scale": 2.5}, "scaled down": {"scale": -2.0}, "turned": {"angle": 0.7}, "turned far": {"angle": -2.6},
    "stretched along x": {"stretch": 2.0}, "along another axis": {"stretch": -2.0, "axis": 0.6},
    "moved by parts of a pixel": {"move": (0.77, -0.31)}, "turned and moved": {"angle": 1.1, "move": (1.5, 0.5)},
    "stretched and turned": {"angle": 0.8, "stretch": 3.0},
    "everything": {"x_flip": ON, "y_flip": ON, "scale": 1.2, "angle": 0.9, "stretch": 1.7, "axis": -0.5, "move": (1.0, -0.8)},
}


def reached(x, y, width, height, scale=0.0, angle=0.0, stretch=0.0, axis=0.0, move=(0.0, 0.0), x_flip=OFF, y_flip=OFF):
    """Where the pixel that ends up at (x, y) was: the inverse of what is done to an image one after the other, flipped,
    scaled, turned (counterclockwise, y pointing down), stretched along an axis, moved."""
    def rotation(a):
        return np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])

    done = np.diag([1 - 2.0 * (x_flip == ON), 1 - 2.0 * (y_flip == ON)])
    done = 2 ** (0.2 * scale) * done
    done = rotation(angle) @ done
    done = rotation(axis) @ np.diag([2 ** (0.2 * stretch), 2 ** (-0.2 * stretch)]) @ rotation(-axis) @ done
    points = np.stack([x - 0.125 * width * move[0], y - 0.125 * height * move[1]])
    return np.einsum("ij,jhw->ihw", np.linalg.inv(done), points)


@pytest.mark.parametrize("case", CASES)
def test_geometry_by_closed_form(case):
    """On a picture that is known between its pixels and beyond its edge."""
    height, width = 40, 56
    y, x = np.mgrid[:height, :width] - np.array([(height - 1) / 2, (width - 1) / 2])[:, None, None]
    image = torch.from_numpy(picture(x, y, width, height)).float()[None, None]
    out, labels = augment(image, *draws(**CASES[case]), P)
    expected = picture(*reached(x, y, width, height, **CASES[case]), width, height)
    error = np.abs(out[0, 0].numpy() - expected)
    assert error.max() < 0.005, error.max()
    assert np.abs(out - image).max() > 0.1                                # something was done

    c = {"scale": 0.0, "angle": 0.0, "stretch": 0.0, "axis": 0.0, "move": (0.0, 0.0)} | CASES[case]
    np.testing.assert_allclose(labels[0], [
        float("x_flip" in c), float("y_flip" in c), c["scale"], math.cos(c["angle"]) - 1, math.sin(c["angle"]),
        c["stretch"] * math.cos(c["axis"]), c["stretch"] * math.sin(c["axis"]), *c["move"]], rtol=1e-6, atol=1e-7)


def test_fine_detail_is_kept():
    """Stripes of four pixels, moved by half a pixel, where bilinear interpolation loses 29 %."""
    x = torch.arange(32) - 15.5
    stripes = torch.cos(math.pi / 2 * x).expand(1, 1, 32, 32)
    out, _ = augment(stripes, *draws(move=(0.5 / 4, 0.0)), P)
    expected = torch.cos(math.pi / 2 * (x - 0.5)).expand(1, 1, 32, 32)
    assert 0.01 < (out - expected)[..., 4:-4].abs().max() < 0.05


def test_a_row_depends_on_its_own_numbers_only():
    x, (uniform, normal) = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)), random_draws(64)
    before = x.clone()
    out, labels = augment(x, uniform, normal, 0.5)
    assert torch.equal(x, before) and out.dtype == labels.dtype == torch.float32
    again = augment(x, uniform, normal, 0.5)
    assert torch.equal(out, again[0]) and torch.equal(labels, again[1])
    for rows in (slice(3, 4), slice(10, 31), torch.randperm(64)):
        some, told = augment(x[rows], uniform[rows], normal[rows], 0.5)
        assert torch.equal(some, out[rows]) and torch.equal(told, labels[rows])
    with_another = uniform.clone()
    with_another[5] = 1 - with_another[5]
    other, _ = augment(x, with_another, normal, 0.5)
    assert [i for i in range(64) if not torch.equal(other[i], out[i])] == [5]


def test_images_and_numbers_of_any_float_type():
    uniform, normal = random_draws(64)
    x = X.expand(64, -1, -1, -1)
    out, labels = augment(x, uniform, normal, 0.5)
    out32, labels32 = augment(x, uniform.float(), normal.float(), 0.5)
    torch.testing.assert_close(labels32, labels, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out32, out, rtol=0, atol=1e-4)
    half = augment(x.half(), uniform, normal, 0.5)[0]
    assert half.dtype == torch.float32 and torch.equal(half, augment(x.half().float(), uniform, normal, 0.5)[0])


def test_each_number_has_one_meaning():
    """With everything done, another value of one number changes its own labels and no others."""
    uniform, normal = draws(x_flip=ON, y_flip=ON, scale=0.5, angle=0.4, stretch=0.8, axis=0.9, move=(0.7, -0.6))
    _, labels = augment(X, uniform, normal, P)
    meaning = {0: {0}, 1: {1}, 2: {2}, 3: {3, 4}, 4: {3, 4}, 5: {5, 6}, 6: {5, 6}, 7: {5, 6}, 8: {7, 8}}
    for kind, numbers, told in (("uniform", uniform, meaning), ("normal", normal, {0: {2}, 1: {5, 6}, 2: {7}, 3: {8}})):
        assert told.keys() == set(range(numbers.shape[1]))
        for i, expected in told.items():
            changed = numbers.clone()
            changed[:, i] = 0.65
            given = (changed, normal) if kind == "uniform" else (uniform, changed)
            _, found = augment(X, *given, P)
            where = set((found != labels)[0].nonzero()[:, 0].tolist())
            assert where == expected, (kind, i)


@pytest.mark.parametrize("p", [0.12, 0.5, 1.0])
def test_shares_and_spread(p):
    """How often each thing is done, that these are independent, and how far it goes."""
    n = 40_000
    _, labels = augment(torch.zeros(n, 1, 2, 2), *random_draws(n, seed=2), p)
    labels = labels.double()
    done = {"x": labels[:, 0], "y": labels[:, 1], "scale": labels[:, 2], "turn": labels[:, 4],
            "stretch": labels[:, 5], "move": labels[:, 7]}
    done = {name: (values != 0).double() for name, values in done.items()}
    shares = {name: {"x": 0.5, "y": p / 2}.get(name, p) for name in done}
    for name, share in shares.items():
        assert done[name].mean().item() == pytest.approx(share, abs=4.5 * (share * (1 - share) / n) ** 0.5), name
        for other in shares.keys() - {name}:
            both = share * shares[other]
            assert (done[name] * done[other]).mean().item() == pytest.approx(both, abs=4.5 * (both * (1 - both) / n) ** 0.5)
    turned, stretched, moved = (done[name] > 0 for name in ("turn", "stretch", "move"))
    assert (labels[stretched, 6] != 0).double().mean().item() == pytest.approx(0.5, abs=4.5 * (0.25 / (p * n)) ** 0.5)
    angle = torch.atan2(labels[turned, 4], labels[turned, 3] + 1)         # uniform in (-pi, pi)
    assert angle.mean().item() == pytest.approx(0, abs=4.5 * math.pi / (3 * p * n) ** 0.5)
    assert angle.var().item() == pytest.approx(math.pi**2 / 3, rel=0.05)
    lengths = labels[:, 5:7].square().sum(1)[stretched]
    for squares in (labels[done["scale"] > 0, 2].square(), lengths, labels[moved, 7].square(), labels[moved, 8].square()):
        assert squares.mean().item() == pytest.approx(1, abs=4.5 * (2 / (p * n)) ** 0.5)
    assert (labels[:, 7] != 0).equal(labels[:, 8] != 0)                   # in both directions at once


@pytest.mark.parametrize("x, uniform, normal, p, message", [
    (X[0], *draws(), P, r"got \(3, 12, 16\)"),
    (X, torch.zeros(1, 8), torch.zeros(1, 4), P, r"with \(N, 9\) uniform and \(N, 4\) normal numbers, .* \(1, 8\)"),
    (X, torch.zeros(1, 9), torch.zeros(1, 9), P, r"\(1, 9\) and \(1, 9\); draw AUGMENT_UNIFORMS and AUGMENT_NORMALS"),
    (X.expand(2, -1, -1, -1), *draws(), P, r"got \(2, 3, 12, 16\), \(1, 9\)"),
    (X, *draws(), 1.2, "augment=1.2 is not a probability"),
    (X, *draws(), -0.1, "augment=-0.1"),
    (X, *draws(), math.nan, "augment=nan"),
])
def test_bad_input_is_named_with_a_remedy(x, uniform, normal, p, message):
    with pytest.raises(ConfigError, match=message):
        augment(x, uniform, normal, p)
