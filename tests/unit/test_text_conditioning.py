"""DiT with captions: what reaches the output and what must not, start, precision, cost and the null caption."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_dit import TINY, assert_within, rnd, with_formula_weights
from torch.utils.flop_counter import FlopCounterMode

from largescale.condition import Captions, concat, drop, select, to_device
from largescale.diffusion.guidance import ClassifierFreeGuidance
from largescale.errors import ConfigError
from largescale.models.dit import DiT, flops_per_image

L, WIDTH, POOLED = 5, 24, 12
TEXT = TINY | {"num_classes": 0, "max_caption_tokens": L, "caption_width": WIDTH, "caption_pooled_width": POOLED}
N = 4
X, T = rnd("x", N, 4, 8, 8), torch.tensor([17, 999, 17, 500])
LENGTH = torch.tensor([5, 1, 3, 2])
Y = Captions(rnd("tokens", N, L, WIDTH), LENGTH, rnd("pooled", N, POOLED), torch.zeros(N, dtype=torch.bool))
PADDING = torch.arange(L) >= LENGTH[:, None]


@pytest.fixture(params=["encoded", "learned"])
def model(request):
    model = with_formula_weights(DiT(**TEXT, null_caption=request.param))
    if request.param == "encoded":
        model.y_embedder.set_null_caption(rnd("null", 2, WIDTH), rnd("null pooled", POOLED))
    return model


def changed(model, y, other):
    """Which rows of the output differ, (N,) bool."""
    return (model(X, T, y) != model(X, T, other)).flatten(1).any(1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [3.0, float("inf"), float("nan")])
def test_padding_has_no_influence_and_each_token_has(model, dtype, value):
    model = model.to(dtype)
    assert not changed(model, Y, Y._replace(tokens=Y.tokens.masked_fill(PADDING[..., None], value))).any()
    for i in range(L):
        other = Y.tokens.clone()
        other[:, i] *= torch.linspace(0, 1, WIDTH)
        assert torch.equal(changed(model, Y, Y._replace(tokens=other)), ~PADDING[:, i])
    assert changed(model, Y, Y._replace(pooled=rnd("other", N, POOLED))).all()
    assert torch.equal(changed(model, Y, Y._replace(length=LENGTH.clamp(max=2))), LENGTH > 2)


@torch.no_grad()
def test_a_longer_model_says_the_same_of_the_same_captions(model):
    """Also the mask, not only the zeros in the padding, keeps it out."""
    longer = DiT(**TEXT | {"max_caption_tokens": 9})
    state = model.state_dict() | {name: F.pad(model.state_dict()[name], pad) for name, pad in
                                  {"y_embedder.null_tokens": (0, 0, 0, 4), "y_embedder.null_mask": (0, 4)}.items()}
    longer.load_state_dict(state)
    y = drop(Y, torch.tensor([True, False, False, False]), 0)
    padded = y._replace(tokens=F.pad(y.tokens, (0, 0, 0, 4), value=7.0))
    assert_within(longer(X, T, padded), model(X, T, y), 1e-6)


@torch.no_grad()
def test_rows_do_not_depend_on_their_neighbours(model):
    y = drop(Y, torch.tensor([False, False, True, False]), 0)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(X[order], T[order], select(y, order)), model(X, T, y)[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(X[1:3], T[1:3], select(y, slice(1, 3))), model(X, T, y)[1:3], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_dropped_caption_is_replaced_by_the_null_one(model):
    everything, nothing = torch.ones(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool)
    other = Captions(rnd("others", N, L, WIDTH), LENGTH.flip(0), rnd("other", N, POOLED), everything)
    assert torch.equal(model(X, T, drop(Y, everything, 0)), model(X, T, other))
    assert not changed(model, Y, drop(Y, nothing, 0)).any()
    some = torch.tensor([True, False, False, True])
    assert torch.equal(changed(model, Y, drop(Y, some, 0)), some)
    assert torch.equal(drop(drop(Y, some, 0), ~some, 0).null, everything)

    null, n = model.y_embedder, int(model.y_embedder.null_mask.sum())    # said as a caption, it is the same
    assert n == (L if null.null_tokens.requires_grad else 2)
    spelled = Captions(null.null_tokens.expand(N, -1, -1), torch.full((N,), n), null.null_pooled.expand(N, -1), nothing)
    assert torch.equal(model(X, T, spelled), model(X, T, other))


def test_the_null_caption_travels_with_the_weights_and_does_not_train_unless_learned():
    torch.manual_seed(0)
    encoded, learned = (DiT(**TEXT, null_caption=kind) for kind in ("encoded", "learned"))
    names = ["y_embedder.null_tokens", "y_embedder.null_pooled", "y_embedder.null_mask"]
    trains = [[dict(m.named_parameters())[name].requires_grad for name in names] for m in (encoded, learned)]
    assert trains == [[False, False, False], [True, True, False]]
    assert learned.y_embedder.null_mask.all() and learned.y_embedder.null_tokens.std().item() == pytest.approx(0.02, rel=0.2)
    assert encoded.y_embedder.null_mask.tolist() == [1, 0, 0, 0, 0] and not encoded.y_embedder.null_tokens.any()
    assert encoded(X, T, drop(Y, T > 0, 0)).isfinite().all()

    encoded.y_embedder.set_null_caption(torch.ones(L, WIDTH), torch.ones(POOLED))
    encoded.y_embedder.set_null_caption(rnd("null", 2, WIDTH), rnd("null pooled", POOLED).half())
    again = DiT(**TEXT)
    again.load_state_dict(encoded.state_dict())
    assert again.y_embedder.null_mask.tolist() == [1, 1, 0, 0, 0]
    assert torch.equal(again.y_embedder.null_tokens[:2], rnd("null", 2, WIDTH)) and not again.y_embedder.null_tokens[2:].any()
    assert torch.equal(again.y_embedder.null_pooled, rnd("null pooled", POOLED).half().float())

    with pytest.raises(ConfigError, match="null_caption=learned is not set from data"):
        learned.y_embedder.set_null_caption(rnd("null", 2, WIDTH), rnd("null pooled", POOLED))
    for n, width, pooled in ((L + 1, WIDTH, POOLED), (0, WIDTH, POOLED), (2, WIDTH + 1, POOLED), (2, WIDTH, POOLED + 1)):
        with pytest.raises(ConfigError, match=rf"up to \(5, 24\) and pooled \(12,\), got \({n}, {width}\) and \({pooled},\)"):
            encoded.y_embedder.set_null_caption(torch.ones(n, width), torch.ones(pooled))


@torch.no_grad()
def test_the_scale_of_the_encoder_does_not_matter(model):
    scaled = Y._replace(tokens=Y.tokens * 64 + 8, pooled=Y.pooled * 64 - 8)
    assert_within(model(X, T, scaled), model(X, T, Y), 1e-4)


def test_starts_as_the_identity_and_everything_trains_after_a_few_steps():
    torch.manual_seed(0)
    model = DiT(**TEXT, null_caption="learned")
    for name, p in model.named_parameters():
        zero = name.endswith("bias") or any(part in name for part in ("adaLN_modulation", "cross_attn.proj", "final_layer"))
        assert zero == (not p.any()), name
        if name.endswith(("token_proj.weight", "cross_attn.q.weight", "cross_attn.kv.weight")):
            bound = (6 / (p.shape[0] + p.shape[1])) ** 0.5
            assert 0.95 * bound < p.abs().max() <= bound, name
        elif name.startswith(("y_embedder.mlp", "y_embedder.null_tokens")) and not zero:
            assert p.std().item() == pytest.approx(0.02, rel=0.2), name
    seen = []
    model.blocks[1].register_forward_hook(lambda block, inputs, output: seen.append(torch.equal(inputs[0], output)))
    assert not model(X, T, Y).any() and seen == [True]

    y = drop(Y, torch.tensor([True, False, False, False]), 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    reached = []
    for _ in range(5):  # from the zero projections inwards
        optimizer.zero_grad()
        (model(X, T, y) - rnd("target", N, 8, 8, 8)).square().mean().backward()
        reached.append({name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        optimizer.step()
    assert "blocks.0.cross_attn.proj.weight" not in reached[0] and "y_embedder.token_proj.weight" not in reached[0]
    assert reached[-1] == {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_weights(model, dtype, tolerance):
    half = copy.deepcopy(model).to(dtype)
    seen = {}
    for name, module in half.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i, o)))
    y = drop(Y, torch.tensor([True, False, False, False]), 0)
    out = half(X, T, y)
    assert out.isfinite().all()
    assert_within(out, model(X, T, y), tolerance)
    for name in ("cross_attn.q", "cross_attn.kv", "cross_attn.proj", "attn.qkv"):
        assert seen[f"blocks.1.{name}"][1].dtype == dtype, name
    for name in ("y_embedder.mlp.0", "y_embedder.mlp", "blocks.0"):
        assert seen[name][1].dtype == torch.float32, name
    pooled, tokens, mask = seen["y_embedder"][1]
    assert (pooled.dtype, tokens.dtype, mask.dtype) == (torch.float32, dtype, torch.bool)
    normed = F.layer_norm(Y.tokens, (WIDTH,), eps=1e-6).masked_fill(PADDING[..., None], 0)  # rounded once, after the norm
    assert torch.equal(seen["y_embedder.token_proj"][0][0][1:], normed.to(dtype)[1:])
    in_half = Y._replace(tokens=Y.tokens.half(), pooled=Y.pooled.half())
    assert torch.equal(half(X, T, in_half), half(X, T, Y._replace(tokens=in_half.tokens.float(), pooled=in_half.pooled.float())))

    x_in = seen["blocks.1"][0][0]                                        # the residual stream is never rounded
    _, _, gate_attn, _, _, gate_mlp = seen["blocks.1.adaLN_modulation"][1].float()[:, None].chunk(6, -1)
    x = x_in + gate_attn * seen["blocks.1.attn"][1].float()
    assert torch.equal(seen["blocks.1.cross_attn"][0][0], F.layer_norm(x, (64,), eps=1e-6).to(dtype))
    x = x + seen["blocks.1.cross_attn"][1].float()
    assert torch.equal(seen["blocks.1"][1], x + gate_mlp * seen["blocks.1.mlp"][1].float())


@torch.no_grad()
def test_guidance_is_between_the_caption_and_the_null_one(model):
    guided = ClassifierFreeGuidance(model, 3.0, null_label=0)(X, T, Y)
    cond, uncond = model(X, T, Y), model(X, T, drop(Y, torch.ones(N, dtype=torch.bool), 0))
    assert not torch.equal(cond, uncond)
    assert_within(guided[:, :4], (uncond + 3 * (cond - uncond))[:, :4], 1e-5)
    assert_within(guided[:, 4:], cond[:, 4:], 1e-5)
    assert torch.equal(ClassifierFreeGuidance(model, 1.0, null_label=0)(X, T, Y), cond)


def test_drop_joined_take_and_moved():
    y, some = torch.tensor([3, 4, 5, 6]), torch.tensor([True, False, True, False])
    assert drop(y, some, 10).tolist() == [10, 4, 10, 6] and y.tolist() == [3, 4, 5, 6]
    assert concat(y, y + 1).tolist() == [3, 4, 5, 6, 4, 5, 6, 7] and select(y, slice(1, 3)).tolist() == [4, 5]
    both = concat(Y, drop(Y, some, 10))
    assert both.null.tolist() == [False] * 4 + some.tolist() and not Y.null.any()
    for one, two, part in zip(Y[:3], both[:3], select(both, some.nonzero().squeeze(1))[:3], strict=True):
        assert torch.equal(two, torch.cat([one, one])) and torch.equal(part, one[[0, 2]])
    meta = torch.device("meta")
    assert to_device(y, meta).device == meta and {part.device for part in to_device(Y, meta)} == {meta}


@pytest.mark.parametrize("size", [TEXT, TEXT | {"max_caption_tokens": 77, "patch_size": 4, "depth": 3},
                                  {"patch_size": 2, "hidden_size": 384, "depth": 12, "num_heads": 6, "num_classes": 0,
                                   "max_caption_tokens": 77}])
def test_flops_match_torchs_count(size):
    with torch.device("meta"):
        model = DiT(**size)
        (length, width), pooled = model.y_embedder.null_tokens.shape, len(model.y_embedder.null_pooled)
        n = torch.empty(3, dtype=torch.int64)
        y = Captions(torch.empty(3, length, width), n, torch.empty(3, pooled), n > 0)
        x = torch.empty(3, 4, model.input_size, model.input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, n, y)
    assert 3 * flops_per_image(model) == counter.get_total_flops()


@pytest.mark.parametrize("y, message", [
    (torch.tensor([1, 2, 3, 4]), "takes captions and was given labels; choose data with captions, or set max_caption_tokens=0"),
    (Y._replace(tokens=Y.tokens[:, :4]), r"takes captions \(N, 5, 24\) and pooled \(N, 12\), got \(4, 4, 24\) and \(4, 12\); set"),
    (Y._replace(tokens=Y.tokens[..., :9]), r"got \(4, 5, 9\)"),
    (Y._replace(pooled=Y.pooled[:, :9]), r"got \(4, 5, 24\) and \(4, 9\)"),
])
def test_other_conditions_are_refused(model, y, message):
    with pytest.raises(ConfigError, match=message):
        model(X, T, y)


def test_captions_are_refused_by_a_model_with_labels():
    with pytest.raises(ConfigError, match="takes labels and was given captions; choose data with labels"):
        DiT(**TINY)(X, T, Y)
