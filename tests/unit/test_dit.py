"""DiT against facebookresearch/DiT's numbers (tests/reference/README.md), its names, start, precision and cost."""

import copy
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from largescale.diffusion.guidance import ClassifierFreeGuidance
from largescale.errors import ConfigError
from largescale.models.dit import DiT, flops_per_image
from largescale.models.embedders import sinusoid

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "dit_forward.npz")
SIZES = {
    "DiT_S_2": {"patch_size": 2, "hidden_size": 384, "depth": 12, "num_heads": 6},
    "DiT_B_4": {"patch_size": 4, "hidden_size": 768, "depth": 12, "num_heads": 12},
}
TINY = {"input_size": 8, "patch_size": 2, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10}


def rnd(name, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@torch.no_grad()
def with_formula_weights(model):
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(rnd(name, *parameter.shape) * 0.02)
    return model


X, T, Y = rnd("x", 4, 4, 32, 32), torch.tensor([0, 250, 500, 999]), torch.tensor([207, 388, 972, 1000])


@pytest.fixture(scope="module", params=SIZES)
def named_model(request):
    return request.param, with_formula_weights(DiT(**SIZES[request.param]))


def assert_within(ours, reference, tolerance):
    assert ours.dtype == torch.float32 and ours.shape == reference.shape
    assert ((ours - reference).abs().max() / reference.abs().max()).item() < tolerance


@torch.no_grad()
def test_forward_matches_dit(named_model):
    name, model = named_model
    assert_within(model(X, T, Y), torch.from_numpy(REFERENCE[f"{name}_out"]), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cfg_scale", ["1.5", "2.0", "4.0"])
def test_guided_forward_matches_dit(named_model, cfg_scale):
    name, model = named_model
    guided = ClassifierFreeGuidance(model, float(cfg_scale), null_label=1000, channels=3)
    out = guided(X[:2], torch.tensor([250, 250]), torch.tensor([207, 388]))
    assert_within(out, torch.from_numpy(REFERENCE[f"{name}_cfg{cfg_scale}"])[:2], 1e-5)


def test_parameter_counts(named_model):
    name, model = named_model
    assert sum(p.numel() for p in model.parameters()) == REFERENCE[f"{name}_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == REFERENCE[f"{name}_params_trainable"]


def released_shapes(d=384, depth=12, patch=2, channels=4, tokens=256, rows=1001):
    """Names and shapes of a released DiT checkpoint."""
    shapes = {"pos_embed": (1, tokens, d), "x_embedder.proj.weight": (d, channels, patch, patch),
              "x_embedder.proj.bias": (d,), "t_embedder.mlp.0.weight": (d, 256), "t_embedder.mlp.0.bias": (d,),
              "t_embedder.mlp.2.weight": (d, d), "t_embedder.mlp.2.bias": (d,),
              "y_embedder.embedding_table.weight": (rows, d)}
    for i in range(depth):
        for name, (outputs, inputs) in {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d),
                                        "mlp.fc2": (d, 4 * d), "adaLN_modulation.1": (6 * d, d)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": (outputs, inputs), f"blocks.{i}.{name}.bias": (outputs,)}
    for name, outputs in {"linear": patch * patch * 2 * channels, "adaLN_modulation.1": 2 * d}.items():
        shapes |= {f"final_layer.{name}.weight": (outputs, d), f"final_layer.{name}.bias": (outputs,)}
    return shapes


@torch.no_grad()
def test_released_checkpoints_load_strictly():
    state = {name: rnd(name, *shape) * 0.02 for name, shape in released_shapes().items()}
    model = DiT(**SIZES["DiT_S_2"])
    state["pos_embed"] = model.pos_embed.clone()
    model.load_state_dict(state, strict=True)
    assert_within(model(X[:1], T[:1], Y[:1]), torch.from_numpy(REFERENCE["DiT_S_2_out"][:1]), 1e-5)
    with pytest.raises(RuntimeError, match="blocks.11.attn.qkv.bias"):
        del state["blocks.11.attn.qkv.bias"]
        model.load_state_dict(state, strict=True)


def test_starts_as_adaln_zero_and_from_the_global_seed_only():
    def start(seed):
        torch.manual_seed(seed)
        return DiT(**TINY)

    first, again, other = (dict(start(seed).named_parameters()) for seed in (0, 0, 1))
    for name, p in first.items():
        assert torch.equal(p, again[name])
        zero = name.endswith("bias") or "adaLN_modulation" in name or name.startswith("final_layer")
        assert zero == (not p.any()), name
        assert zero or torch.equal(p, other[name]) == (name == "pos_embed"), name
        if name.startswith(("t_embedder", "y_embedder")) and not zero:
            assert p.std().item() == pytest.approx(0.02, rel=0.1)
        elif name != "pos_embed" and not zero:
            bound = (6 / (p.shape[0] + p[0].numel())) ** 0.5             # xavier_uniform
            assert 0.95 * bound < p.abs().max() <= bound, name
    with torch.no_grad():
        assert not start(0)(rnd("x", 2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 10])).any()


def test_every_trainable_parameter_gets_a_gradient():
    model = with_formula_weights(DiT(**TINY))
    model(rnd("x", 2, 4, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 10])).square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name == "pos_embed"), name
        assert p.grad is None or p.grad.any(), name


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_weights(dtype, tolerance):
    """Which arithmetic stays float32, seen from the outside and at each place that must keep it."""
    reference = with_formula_weights(DiT(**TINY))
    half = copy.deepcopy(reference).to(dtype)
    seen = {}
    for name, module in half.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i, o)))
    x, t, y = rnd("x", 2, 4, 8, 8), torch.tensor([17, 999]), torch.tensor([0, 10])
    out = half(x, t, y)
    assert out.isfinite().all()
    assert_within(out, reference(x, t, y), tolerance)

    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
        assert seen[f"blocks.1.{name}"][1].dtype == dtype, name
    assert seen["final_layer.adaLN_modulation.1"][1].dtype == dtype
    for name in ("x_embedder", "t_embedder.mlp.0", "t_embedder", "y_embedder", "blocks.0", "final_layer.linear"):
        assert seen[name][1].dtype == torch.float32, name

    first, last = half.t_embedder.mlp[0], half.t_embedder.mlp[2]         # exactly as with upcast weights
    embedded = F.silu(F.linear(sinusoid(t, 256), first.weight.float(), first.bias.float()))
    assert torch.equal(seen["t_embedder"][1], F.linear(embedded, last.weight.float(), last.bias.float()))

    block, (x_in, *_) = half.blocks[1], seen["blocks.1"][0]              # rounded once, after the modulation
    shift, scale, gate_attn, _, _, gate_mlp = seen["blocks.1.adaLN_modulation"][1].float()[:, None].chunk(6, -1)
    modulated = F.layer_norm(x_in, (64,), eps=1e-6) * (1 + scale) + shift
    assert torch.equal(seen["blocks.1.attn"][0][0], modulated.to(dtype))
    residual = x_in + gate_attn * seen["blocks.1.attn"][1].float()
    assert torch.equal(seen["blocks.1"][1], residual + gate_mlp * seen["blocks.1.mlp"][1].float())
    assert block.attn.qkv.weight.dtype == dtype
    assert torch.equal(seen["final_layer.linear"][1], F.linear(
        seen["final_layer.linear"][0][0], half.final_layer.linear.weight.float(), half.final_layer.linear.bias.float()))
    assert seen["final_layer.linear"][0][0].dtype == torch.float32


def test_frequencies_of_timesteps():
    """1 first; the last is 1 / 10000 in diffusers, and the one before the end of that series in DiT's code."""
    t = torch.tensor([0.0, 1.0, 1000.0])
    for shift, last in ((0, 1e-4 ** (127 / 128)), (1, 1e-4)):
        frequencies = torch.tensor([1.0, 1e-4 ** (1 / (128 - shift)), last], dtype=torch.float64)
        found = sinusoid(t, 256, shift)[:, [0, 1, 127, 128, 129, 255]]
        angles = t.double()[:, None] * frequencies
        assert_within(found, torch.cat([angles.cos(), angles.sin()], dim=1).float(), 2e-4)


@torch.no_grad()
def test_inputs_of_any_float_type_and_models_without_learned_variance_or_null_label():
    model = with_formula_weights(DiT(**TINY, learn_sigma=False, class_dropout_prob=0.0))
    assert model.y_embedder.embedding_table.num_embeddings == 10 and model.out_channels == 4
    x, t, y = rnd("x", 2, 4, 8, 8).bfloat16(), torch.tensor([0, 999]), torch.tensor([0, 9])
    assert model(x, t, y).shape == (2, 4, 8, 8)
    assert torch.equal(model(x, t, y), model(x.float(), t, y)) and torch.equal(model(x, t, y), model(x.double(), t, y))
    with pytest.raises(IndexError):
        model(x, t, torch.tensor([0, 10]))


@torch.no_grad()
def test_without_labels_the_condition_is_ignored():
    model = with_formula_weights(DiT(**TINY | {"num_classes": 0}))
    assert model.y_embedder is None and not [name for name in model.state_dict() if name.startswith("y_embedder")]
    x, t, y = rnd("x", 2, 4, 8, 8), torch.tensor([17, 999]), torch.tensor([0, 10])
    assert torch.equal(model(x, t, y), model(x, t, y + 1))
    labelled = with_formula_weights(DiT(**TINY))
    labelled.y_embedder.embedding_table.weight.zero_()
    assert torch.equal(model(x, t, y), labelled(x, t, y))


@pytest.mark.parametrize("size", [TINY, SIZES["DiT_S_2"], TINY | {"num_classes": 0},
                                  TINY | {"patch_size": 4, "mlp_ratio": 3.0, "learn_sigma": False}])
def test_flops_match_torchs_count(size):
    with torch.device("meta"):
        model = DiT(**size)
        x = torch.empty(3, 4, model.input_size, model.input_size)
        t, y = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, y)
    assert flops_per_image(model) == pytest.approx(counter.get_total_flops() / 3, rel=0.01)


@pytest.mark.parametrize("hidden_size, depth, num_heads, gflop",
                         [(384, 12, 6, 36.3), (768, 12, 12, 138), (1024, 24, 16, 484), (1152, 28, 16, 712)])
def test_training_cost_is_the_published_one(hidden_size, depth, num_heads, gflop):
    with torch.device("meta"):
        model = DiT(patch_size=2, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
    assert 3 * flops_per_image(model) / 1e9 == pytest.approx(gflop, rel=0.01)


@pytest.mark.parametrize("change, message", [
    ({"num_heads": 5}, "hidden_size=64 is not a multiple of num_heads=5"),
    ({"hidden_size": 66, "num_heads": 3}, "hidden_size=66"),
    ({"patch_size": 3}, "input_size=8 is not a multiple of patch_size=3; try input_size 6"),
    ({"class_dropout_prob": 1.0}, "class_dropout_prob=1.0"),
    ({"max_caption_tokens": 5}, "num_classes=10 and max_caption_tokens=5 exclude each other; set one of them to 0"),
])
def test_bad_sizes_are_named_with_a_remedy(change, message):
    with pytest.raises(ConfigError, match=message):
        DiT(**TINY | change)


def test_images_of_another_size_are_refused():
    with pytest.raises(ConfigError, match=r"takes \(N, 4, 8, 8\), got \(1, 4, 16, 16\)"):
        DiT(**TINY)(torch.zeros(1, 4, 16, 16), torch.tensor([0]), torch.tensor([0]))
