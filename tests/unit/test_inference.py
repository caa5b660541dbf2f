"""A prepared model says what the model says; in half precision the sensitive parts are bitwise float32."""

import copy

import pytest
import torch
from test_dit import TINY, assert_within, rnd, with_formula_weights
from test_text_conditioning import POOLED, TEXT, WIDTH, L
from torch import nn

from largescale.condition import Captions, select
from largescale.errors import ConfigError
from largescale.models.dit import DiT
from largescale.models.embedders import LinearFp32
from largescale.models.inference import (
    CPU_ROWS,
    Gelu,
    Linear,
    Packed,
    compile_pays,
    has_compiler,
    packs,
    prepare,
)

CPU = torch.device("cpu")
N = CPU_ROWS + 3                                        # a whole part and a piece
X, T, LABELS = rnd("x", N, 4, 8, 8), torch.arange(N) * 90, torch.arange(N)
CAPTIONS = Captions(rnd("tokens", N, L, WIDTH), 1 + torch.arange(N) % L, rnd("pooled", N, POOLED), T % 4 == 0)
CASES = {"labels": (TINY | {"num_classes": N}, LABELS), "captions": (TEXT, CAPTIONS)}
LARGE = ("attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.kv", "cross_attn.proj", "mlp.fc1", "mlp.fc2",
         "adaLN_modulation.1", "token_proj")            # cast to half precision; all else is not
compiles = pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")


@pytest.fixture(params=CASES)
def case(request):
    return make_case(request.param)


def make_case(name, **changes):
    size, y = CASES[name]
    model = with_formula_weights(DiT(**size | changes))
    if name == "captions":
        model.y_embedder.set_null_caption(rnd("null", 2, WIDTH), rnd("null pooled", POOLED))
    return model, y


@torch.no_grad()
def test_fp32_is_the_models_answer_and_the_model_stays_as_it_is(case):
    model, y = case
    model.train()
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model, device=CPU, precision="fp32", compile=False)
    for n in (1, CPU_ROWS, N):
        assert_within(prepared(X[:n], T[:n], select(y, slice(n))), model(X[:n], T[:n], select(y, slice(n))), 1e-5)
    bf16 = prepare(model, device=CPU, precision="bf16", compile=False)
    bf16.run.pos_embed.zero_()
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not prepared.run.training and not any(p.requires_grad for p in prepared.parameters())


@torch.no_grad()
@pytest.mark.parametrize("precision, dtype, near, far", [("bf16", torch.bfloat16, 2e-2, 1e-5), ("fp16", torch.float16, 2e-3, 1e-6)])
def test_half_precision_keeps_the_sensitive_parts(case, precision, dtype, near, far):
    model, y = case
    prepared = prepare(model, device=CPU, precision=precision, compile=False)
    assert prepared.run.compute_type == dtype
    given = dict(model.named_parameters())
    for name, ours in prepared.run.named_parameters():
        large = name.rpartition(".")[0].endswith(LARGE)
        assert ours.dtype == (dtype if large else torch.float32), name
        assert large or torch.equal(ours, given.pop(name)), name
    assert all(name.rpartition(".")[0].endswith(LARGE) for name in given)
    for module in prepared.run.modules():
        assert not isinstance(module, Packed) or module.weight.dtype == module.bias.dtype == dtype
    seen = {}
    for name, module in prepared.run.named_modules():
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    out, right = prepared(X[:CPU_ROWS], T[:CPU_ROWS], select(y, slice(CPU_ROWS))), model(X, T, y)[:CPU_ROWS]
    assert_within(out, right, near)
    assert not torch.allclose(out, right, rtol=0, atol=far * right.abs().max().item())  # it was not fp32 all along
    for name in ("x_embedder", "t_embedder", "blocks.0", "blocks.1", "final_layer"):
        assert seen[name].dtype == torch.float32, name
    assert torch.equal(seen["t_embedder"], model.t_embedder(T[:CPU_ROWS]))      # 7 and 8 would be one in bf16
    assert torch.equal(seen["x_embedder"], model.x_embedder(X[:CPU_ROWS]))
    assert seen["blocks.1.attn.qkv"].dtype == dtype
    assert {type(m) for name, m in model.named_modules() if name.endswith(("mlp.0", "mlp.2", "final_layer.linear"))} == {LinearFp32}


@torch.no_grad()
def test_what_is_swapped_for_the_compiler_is_the_same_function():
    x = torch.linspace(-12, 12, 10001)
    torch.testing.assert_close(Gelu()(x), nn.functional.gelu(x, approximate="tanh"), rtol=1e-5, atol=1e-6)
    linear = nn.Linear(24, 40)
    swapped = copy.deepcopy(linear)
    swapped.__class__ = Linear
    torch.testing.assert_close(swapped(rnd("x", 3, 5, 24)), linear(rnd("x", 3, 5, 24)))


@torch.no_grad()
def test_where_onednn_cannot_pack_the_model_is_the_same(case, monkeypatch):
    model, y = case
    packed = prepare(model, device=CPU, precision="fp32", compile=False)
    monkeypatch.setattr("largescale.models.inference.packs", lambda precision: False)
    plain = prepare(model, device=CPU, precision="fp32", compile=False)
    counts = [sum(isinstance(module, Packed) for module in m.modules()) for m in (packed, plain)]
    assert counts == [packs("fp32") * (14 if isinstance(y, Captions) else 8), 0]
    assert_within(packed(X, T, y), plain(X, T, y), 1e-5)


@compiles
@torch.inference_mode()
@pytest.mark.parametrize("name, precision, tolerance", [("labels", "fp32", 1e-5), ("captions", "bf16", 2e-2)])
def test_compiled_says_the_same_with_one_graph_for_all_batch_sizes(name, precision, tolerance, tmp_path, monkeypatch):
    model, y = make_case(name, depth=1)
    monkeypatch.chdir(empty := tmp_path.parent)
    before, torch_flags = set(empty.iterdir()), torch.get_float32_matmul_precision()
    torch.compiler.reset()
    prepared = prepare(model, device=CPU, precision=precision, compile=True)
    whole = prepared(X, T, y)
    assert_within(whole, model(X, T, y), tolerance)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (1, 2, CPU_ROWS, N):
            assert torch.equal(prepared(X[:n], T[:n], select(y, slice(n))), whole[:n])
    assert set(empty.iterdir()) == before and torch.get_float32_matmul_precision() == torch_flags


@compiles
@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_wrong_inputs_are_named_also_when_compiled(name):
    model, y = make_case(name, depth=1)
    torch.compiler.reset()
    prepared = prepare(model, device=CPU, precision="fp32", compile=True)
    with pytest.raises(ConfigError, match="was given (captions|labels)"):
        prepared(X, T, LABELS if isinstance(y, Captions) else CAPTIONS)
    with pytest.raises(ConfigError, match=r"takes \(N, 4, 8, 8\)"):
        prepared(X[..., :4], T, y)


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model = DiT(**TINY)
    assert not has_compiler() and not compile_pays(model, device=CPU, precision="fp32", evaluations=10**12)
    with pytest.raises(ConfigError, match=r"C\+\+ compiler.*--compile off"):
        prepare(model, device=CPU, precision="fp32", compile=True)


@compiles
@torch.no_grad()
def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    (broken := tmp_path / "g++").write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(broken)))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    prepared = prepare(with_formula_weights(DiT(**TINY)), device=CPU, precision="fp32", compile=True)
    with pytest.raises(ConfigError, match=r"torch\.compile failed.*--compile off"):
        prepared(X, T, LABELS % 10)


@compiles
def test_compiling_pays_for_much_work(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.device("meta"):
        small, large = DiT(patch_size=2, hidden_size=384, depth=12, num_heads=6), DiT(patch_size=2, hidden_size=1024, depth=24, num_heads=16)

    def pays(model, images, precision="fp32", device=CPU):
        return compile_pays(model, device=device, precision=precision, evaluations=images * 100)  # 50 steps, guided

    assert not pays(small, 8) and not pays(small, 200) and pays(small, 200, "bf16") and pays(small, 500) and pays(large, 32)
    cuda = torch.device("cuda")
    assert not pays(large, 32, device=cuda) and pays(large, 50_000, device=cuda)
