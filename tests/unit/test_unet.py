"""DDPM++ against NVlabs/edm's numbers (tests/reference/README.md), its names, start, precision, dropout and cost."""

import copy
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from largescale.condition import Captions
from largescale.errors import ConfigError
from largescale.models.unet import DDPMpp, flops_per_image, from_edm

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "edm.npz")
CIFAR10 = {"input_size": 32, "in_channels": 3, "num_classes": 10, "augment_dim": 9}
FFHQ64 = {"input_size": 64, "in_channels": 3, "num_classes": 0, "augment_dim": 9, "channel_mult": (1, 2, 2, 2)}
TINY = {"input_size": 8, "in_channels": 2, "num_classes": 5, "model_channels": 16, "channel_mult": (1, 2),
        "num_blocks": 1, "attn_resolutions": (4,), "augment_dim": 9}


def rnd(name, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@torch.no_grad()
def with_formula_weights(model, scale=0.02):
    for name, parameter in model.named_parameters():
        parameter.copy_(rnd(f"model.{name}", *parameter.shape) * scale)
    return model


def tiny(**change):
    """Weights large enough for every part to count."""
    return with_formula_weights(DDPMpp(**TINY | change), 0.2).eval()


X, T, Y, AUGMENTED = rnd("x", 3, 2, 8, 8), torch.tensor([-1.5, 0.2, 1.0]), torch.tensor([0, 4, 5]), rnd("augment", 3, 9)


def denoised(model, x, sigma, y):
    """EDM's preconditioning, arXiv:2206.00364, table 1, sigma_data = 0.5, and the raw output."""
    s = sigma[:, None, None, None]
    c_skip, c_out, c_in = 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25).sqrt(), 1 / (s**2 + 0.25).sqrt()
    raw = model(c_in * x, sigma.log() / 4, y)
    return c_skip * x + c_out * raw, raw


@pytest.fixture(scope="module")
def cifar10():
    return with_formula_weights(DDPMpp(**CIFAR10)).eval()


def test_names_and_shapes_are_edms(cifar10):
    assert [f"model.{name} {tuple(p.shape)}" for name, p in cifar10.named_parameters()] == REFERENCE["names"].tolist()
    assert sum(p.numel() for p in cifar10.parameters()) == REFERENCE["ddpmpp_params"] == 55_735_299
    assert cifar10.state_dict().keys() == dict(cifar10.named_parameters()).keys()


@torch.no_grad()
def test_output_matches_edm(cifar10):
    sigma, reference = torch.from_numpy(REFERENCE["sigma"]), torch.from_numpy(REFERENCE["ddpmpp_out"])
    ours, raw = denoised(cifar10, rnd("image", 4, 3, 32, 32), sigma, torch.tensor([0, 3, 7, 9]))
    assert raw.dtype == torch.float32 and sigma.max() == 80
    error, scale = (ours - reference).abs().amax((1, 2, 3)), reference.abs().amax((1, 2, 3))
    assert (error / scale).max() < 3e-6                                  # each row by itself: they differ in scale
    assert raw[3].abs().max() > 0.9 * scale[3] / 0.5                     # at sigma 80 the output is the network's


def test_the_other_published_size():
    """61.8 M parameters, as EDM's network for FFHQ at 64 x 64 has."""
    with torch.device("meta"):
        model = DDPMpp(**FFHQ64)
    assert sum(p.numel() for p in model.parameters()) == 61_805_571
    attending = [name for name, part in (*model.enc.items(), *model.dec.items()) if hasattr(part, "qkv")]
    assert attending == ["16x16_block0", "16x16_block1", "16x16_block2", "16x16_block3", "8x8_in0", "16x16_block4"]


@torch.no_grad()
def test_four_levels():
    model = DDPMpp(**FFHQ64 | {"model_channels": 16, "num_blocks": 1})
    out = with_formula_weights(model, 0.2)(rnd("faces", 2, 3, 64, 64), T[:2], Y[:2])
    assert out.shape == (2, 3, 64, 64) and out.isfinite().all() and out.std() > 0.01
    assert [n for n in model.enc if "block" not in n] == ["64x64_conv", "32x32_down", "16x16_down", "8x8_down"]


@torch.no_grad()
def test_released_weights_load():
    model = tiny()
    released = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name in ("enc.4x4_down.conv0", "enc.4x4_down.skip", "dec.8x8_up.conv0", "dec.8x8_up.skip"):
        released[f"model.{name}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    again = DDPMpp(**TINY).eval()
    again.load_state_dict(from_edm(released), strict=True)
    assert torch.equal(again(X, T, Y, AUGMENTED), model(X, T, Y, AUGMENTED))
    with pytest.raises(RuntimeError, match=r"dec.8x8_aux_conv.bias"):
        del released["model.dec.8x8_aux_conv.bias"]
        again.load_state_dict(from_edm(released), strict=True)


def test_starts_as_edm_and_from_the_global_seed_only():
    def start(seed):
        torch.manual_seed(seed)
        return DDPMpp(**TINY | {"model_channels": 64})

    first, again, other = (dict(start(seed).named_parameters()) for seed in (0, 0, 1))
    for name, p in first.items():
        assert torch.equal(p, again[name])
        if p.ndim == 1:
            assert (p == float("norm" in name and name.endswith("weight"))).all(), name
            continue
        assert not torch.equal(p, other[name])
        area = p[0, 0].numel()
        bound = (6 / (area * (p.shape[0] + p.shape[1]))) ** 0.5         # xavier_uniform
        if any(part in name for part in ("conv1.", "proj.", "aux_conv.")):
            bound *= 1e-5
        elif "qkv." in name:
            bound *= 0.2**0.5
        assert 0.97 * bound < p.abs().max() <= bound, name


def test_every_parameter_gets_a_gradient():
    model = tiny()
    model(X, T, Y, AUGMENTED).square().mean().backward()
    assert not [name for name, p in model.named_parameters() if not p.grad.any()]
    model.zero_grad()
    model(X, T, Y).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["map_augment.weight"]


def block_by_formula(w, name, x, emb, encoded):
    """One block in float64, resampled by EDM's filter [1, 1] as convolutions. `w`: the model's weights by name."""
    def conv(part, h):
        weight = w[f"{name}.{part}.weight"]
        return F.conv2d(h, weight, w[f"{name}.{part}.bias"], padding=weight.shape[-1] // 2)

    def normed(part, h):
        groups = h.unflatten(1, (h.shape[1] // 4, 4))                    # 32 groups or fewer, of 4 channels
        mean, var = groups.mean((2, 3, 4), keepdim=True), groups.var((2, 3, 4), keepdim=True, unbiased=False)
        h = ((groups - mean) / (var + 1e-6).sqrt()).flatten(1, 2)
        return h * w[f"{name}.{part}.weight"][:, None, None] + w[f"{name}.{part}.bias"][:, None, None]

    def resampled(h):
        box = torch.ones(h.shape[1], 1, 2, 2, dtype=h.dtype)
        if "down" in name:
            return F.conv2d(h, box / 4, stride=2, groups=len(box))
        return F.conv_transpose2d(h, box, stride=2, groups=len(box)) if "up" in name else h

    if encoded is not None:
        x = torch.cat([x, encoded], dim=1)
    h = normed("norm0", x)
    h = conv("conv0", resampled(h * h.sigmoid()))
    h = normed("norm1", h + (emb @ w[f"{name}.affine.weight"].T + w[f"{name}.affine.bias"])[:, :, None, None])
    h = conv("conv1", h * h.sigmoid())
    h = (h + (conv("skip", resampled(x)) if f"{name}.skip.weight" in w else x)) / 2**0.5
    if f"{name}.qkv.weight" in w:
        q, k, v = (conv("qkv", normed("norm2", h))[:, i::3].flatten(2) for i in range(3))      # (N, C, T)
        weights = (torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(q.shape[1])).softmax(2)
        h = (h + conv("proj", torch.einsum("nqk,nck->ncq", weights, v).view_as(h))) / 2**0.5
    return h


@torch.no_grad()
def test_network_by_its_formula():
    """Where EDM's numbers, made with small weights, hardly depend on what the lower levels compute."""
    model = tiny(channel_mult=(1, 2, 3), attn_resolutions=(4, 2), num_blocks=2, model_channels=8)
    w = {name: p.double() for name, p in model.named_parameters()}
    emb = model.embedding(T, Y, AUGMENTED).double()
    x = F.conv2d(X.double(), w["enc.8x8_conv.weight"], w["enc.8x8_conv.bias"], padding=1)
    encoded = [x]
    for name in [name for name in model.enc if "conv" not in name]:
        encoded.append(x := block_by_formula(w, f"enc.{name}", x, emb, None))
    for name in [name for name in model.dec if "aux" not in name]:
        x = block_by_formula(w, f"dec.{name}", x, emb, encoded.pop() if "block" in name else None)
    x = F.group_norm(x, 2, w["dec.8x8_aux_norm.weight"], w["dec.8x8_aux_norm.bias"], 1e-6)
    x = F.conv2d(F.silu(x), w["dec.8x8_aux_conv.weight"], w["dec.8x8_aux_conv.bias"], padding=1)
    assert not encoded and (model(X, T, Y, AUGMENTED) - x).abs().max() < 1e-5 * x.abs().max()


@torch.no_grad()
def test_embedding_by_its_formula():
    model = tiny(model_channels=12)
    weights = {name: p.double().numpy() for name, p in model.named_parameters()}
    angles = T.double().numpy()[:, None] * 10000.0 ** -(np.arange(6) / 5)
    emb = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    emb += np.eye(6, 5)[Y] * 5**0.5 @ weights["map_label.weight"].T + weights["map_label.bias"]
    emb += AUGMENTED.double().numpy() @ weights["map_augment.weight"].T
    for layer in ("map_layer0", "map_layer1"):
        emb = emb @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"]
        emb = emb / (1 + np.exp(-emb))
    assert np.abs(model.embedding(T, Y, AUGMENTED).numpy() - emb).max() < 1e-5 * np.abs(emb).max()


@torch.no_grad()
def test_the_null_label_is_the_zero_vector():
    model, blind = tiny(), tiny()
    blind.map_label.weight.zero_()
    null = torch.full((3,), 5)
    assert torch.equal(model(X, T, null), blind(X, T, Y))
    assert all(not torch.equal(model(X, T, null)[i], model(X, T, null - 5 + i)[i]) for i in range(3))
    for y in (-1, 6):
        with pytest.raises(IndexError):
            model(X, T, null * 0 + y)


@torch.no_grad()
def test_without_classes_labels_are_ignored():
    model = tiny(num_classes=0)
    assert "map_label.weight" not in model.state_dict()
    assert torch.equal(model(X, T, Y), model(X, T, Y * 0 + 99))
    labelled = tiny()
    labelled.map_label.weight.zero_()
    labelled.map_label.bias.zero_()
    assert torch.equal(model(X, T, Y), labelled(X, T, Y))


@torch.no_grad()
def test_augment_labels_of_images_as_they_are():
    model = tiny()
    plain = model(X, T, Y)
    torch.testing.assert_close(model(X, T, Y, torch.zeros(3, 9)), plain)
    for i in range(9):
        assert (model(X, T, Y, torch.eye(9)[[i] * 3]) - plain).abs().max() > 1e-3
    assert torch.equal(tiny(augment_dim=0)(X, T, Y), plain)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
def test_half_precision_weights(dtype, tolerance):
    """Which arithmetic stays float32, seen from the outside and at each place that must keep it."""
    reference = tiny()
    half = copy.deepcopy(reference).to(dtype)
    assert (half.compute_type, reference.compute_type) == (dtype, torch.float32)
    seen = {}
    for name, module in half.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i, o)))
    out, expected = half(X, T, Y, AUGMENTED), reference(X, T, Y, AUGMENTED)
    assert out.dtype == torch.float32 and 1e-5 < (out - expected).abs().max() / expected.abs().max() < tolerance

    for block in ("enc.8x8_block0", "enc.4x4_down", "enc.4x4_block0", "dec.4x4_in0", "dec.8x8_up", "dec.8x8_block1"):
        for part in ("norm0", "conv0", "norm1", "conv1"):
            assert seen[f"{block}.{part}"][1].dtype == dtype, (block, part)
        assert seen[block][1].dtype == dtype and seen[f"{block}.affine"][1].dtype == torch.float32
    assert seen["dec.4x4_in0.qkv"][1].dtype == dtype

    raised = copy.deepcopy(half).float()                                 # exactly as with the same weights in float32
    assert torch.equal(half.embedding(T, Y, AUGMENTED), raised.embedding(T, Y, AUGMENTED))
    assert torch.equal(seen["enc.8x8_conv"][1], raised.enc["8x8_conv"](X))
    x_last = seen["dec.8x8_block1"][1].float()
    assert torch.equal(out, raised.dec["8x8_aux_conv"](F.silu(raised.dec["8x8_aux_norm"](x_last))))


@torch.no_grad()
def test_inputs_of_any_float_type():
    model, x = tiny(), X.bfloat16()
    assert torch.equal(model(x, T, Y), model(x.float(), T, Y)) and torch.equal(model(x.double(), T, Y), model(x, T, Y))
    assert torch.equal(model(X, T.double(), Y, AUGMENTED.double()), model(X, T, Y, AUGMENTED))


def test_dropout_is_seeded_and_of_the_share_asked_for():
    model = tiny(dropout=0.3).train()
    seen = []
    model.enc["8x8_block0"].conv1.register_forward_hook(lambda m, i, o: seen.append(i[0]))

    def run(seed):
        torch.manual_seed(seed)
        return model(X, T, Y)

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.3, abs=4 * (0.21 / seen[0].numel()) ** 0.5)
    assert torch.equal(model.eval()(X, T, Y), model(X, T, Y))
    kept = seen[0] != 0
    torch.testing.assert_close(seen[0][kept], seen[3][kept] / 0.7)
    assert torch.equal(tiny(dropout=0.0).train()(X, T, Y), model(X, T, Y))


def gradients(model):
    torch.manual_seed(0)
    model(X, T, Y, AUGMENTED).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_blocks_computed_again_give_the_same_gradient():
    """Dropout is drawn again as it was."""
    plain, again = tiny(dropout=0.3).train(), tiny(dropout=0.3).train()
    again.checkpoint_blocks = True
    calls = []
    for block in again.blocks:
        block.register_forward_pre_hook(lambda m, i: calls.append(m))
    expected, found = gradients(plain), gradients(again)
    assert len(calls) == 2 * len(again.blocks) == 2 * 10
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(not torch.equal(g, expected[name]) for name, g in gradients(tiny(dropout=0.2).train()).items())
    with torch.no_grad():
        again(X, T, Y)
    assert len(calls) == 3 * 10 and again.state_dict().keys() == plain.state_dict().keys()


def test_blocks_computed_again_keep_their_inputs_only():
    def kept(model):
        sizes = {}
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(X[:1], T[:1], Y[:1])
        assert out.requires_grad
        return sum(sizes.values())

    def more(checkpoint_blocks):
        """For one block more in each of the encoder's two levels and the decoder's."""
        models = [tiny(num_blocks=n) for n in (1, 2)]
        for model in models:
            model.checkpoint_blocks = checkpoint_blocks
        return kept(models[1]) - kept(models[0])

    outputs = 4 * (64 * 16 + 16 * 32)                                    # float32, pixels, channels
    assert more(True) == 2 * outputs and more(False) > 10 * outputs


def test_compiles_whole():
    """As torch.compile traces it, blocks computed again too; that its kernels round elsewhere is not asked here."""
    torch._dynamo.reset()
    plain, traced = tiny(dropout=0.0).train(), tiny(dropout=0.0).train()
    traced.checkpoint_blocks = True
    traced.compile(backend="aot_eager", fullgraph=True)
    expected, found = gradients(plain), gradients(traced)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [CIFAR10, FFHQ64, TINY, TINY | {"num_classes": 0, "augment_dim": 0, "num_blocks": 3}])
def test_flops_match_torchs_count(size):
    with torch.device("meta"):
        model = DDPMpp(**size)
        x = torch.empty(3, model.in_channels, model.input_size, model.input_size)
        t, y, augment = torch.empty(3), torch.empty(3, dtype=torch.int64), torch.empty(3, model.augment_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y, augment if model.augment_dim else None)
    assert 3 * flops_per_image(model) == counter.get_total_flops()


@pytest.mark.parametrize("change, message", [
    ({"attn_resolutions": (16,)}, r"attn_resolutions has 16, .* choose among \[8, 4\]"),
    ({"input_size": 9, "attn_resolutions": ()}, "input_size=9 cannot be halved 1 times, .* try input_size 8"),
    ({"input_size": 10, "channel_mult": (1, 1, 1), "attn_resolutions": ()}, "input_size=10 .* try input_size 8, or"),
    ({"model_channels": 18}, "model_channels=18 is not a multiple of 4"),
    ({"model_channels": 100}, "group norm of 200 channels cannot have 32 groups"),
    ({"model_channels": 84, "channel_mult": (1, 1)}, "group norm of 168 channels"),  # the decoder's joined input
    ({"channel_mult": ()}, r"channel_mult=\(\)"),
    ({"channel_mult": (1, 0)}, r"channel_mult=\(1, 0\)"),
    ({"num_blocks": 0}, "num_blocks=0"),
    ({"dropout": 1.0}, r"dropout=1.0 is not in \[0, 1\)"),
    ({"augment_dim": -9}, "augment_dim=-9 is negative"),
    ({"num_classes": -1}, "num_classes=-1 is negative"),
])
def test_bad_sizes_are_named_with_a_remedy(change, message):
    with pytest.raises(ConfigError, match=message):
        DDPMpp(**TINY | change)


CAPTIONS = Captions(torch.zeros(3, 5, 8), torch.ones(3).long(), torch.zeros(3, 6), torch.zeros(3) > 0)


@pytest.mark.parametrize("change, arguments, message", [
    ({}, (X[:, :, :4], T, Y), r"takes \(N, 2, 8, 8\), got \(3, 2, 4, 8\); set input_size and in_channels"),
    ({}, (X[:, :1], T, Y), r"got \(3, 1, 8, 8\)"),
    ({}, (X, T, CAPTIONS), "was given captions; choose data with labels"),
    ({"num_classes": 0}, (X, T, CAPTIONS), "was given captions"),
    ({"augment_dim": 0}, (X, T, Y, AUGMENTED), r"takes augment labels \(3, 0\), got \(3, 9\); set augment_dim"),
    ({}, (X, T, Y, AUGMENTED[:, :6]), r"takes augment labels \(3, 9\), got \(3, 6\)"),
    ({}, (X, T, Y, AUGMENTED[:1]), r"takes augment labels \(3, 9\), got \(1, 9\)"),
])
def test_bad_inputs_are_named_with_a_remedy(change, arguments, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**change)(*arguments)
