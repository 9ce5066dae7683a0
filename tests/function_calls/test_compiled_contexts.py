"""Tests of contexts on compiled models: sites at function calls are captured and edited inside the graph."""

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from call_models import small_llama
from tdcache import (
    Ablation,
    ActivationCaching,
    ActivationPatching,
    SteeringVectors,
    TdcacheWarning,
    UnfiredSiteWarning,
)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).sin()


IN_GRAPH = [r"layers\.\d\.self_attn::(q|k|v|pattern|z)", r"layers\.\d\.self_attn::apply_rotary_pos_emb"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_context_captures_calls_inside_one_full_graph(backend):
    model, ids = small_llama(), torch.arange(7)[None]
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        with ActivationCaching(IN_GRAPH, hold="snapshot").prepare(model) as hooked:
            expected = hooked(ids).last_hidden_state
        values = hooked.cache
        with ActivationCaching(IN_GRAPH).prepare(compiled) as hooked:
            for _ in range(2):
                found = hooked(ids).last_hidden_state
        assert counter.frame_count == 1
        assert torch.equal(found, expected)
        assert set(hooked.cache.keys()) == set(values.keys())
        assert len(values.keys()) == 18
        for key, value in values.items():
            assert torch.equal(hooked.cache[key], value)
        assert torch.equal(compiled(ids).last_hidden_state, expected)
        made = counter.frame_count
        for _ in range(2):
            with ActivationCaching(IN_GRAPH).prepare(model) as hooked:
                compiled(ids)
                found = compiled(ids + 1)
            assert set(hooked.cache.keys()) == set(values.keys())
            with ActivationCaching(IN_GRAPH, hold="snapshot").prepare(model) as eager:
                assert torch.equal(found.last_hidden_state, model(ids + 1).last_hidden_state)
            assert all(torch.equal(hooked.cache[key], value) for key, value in eager.cache.items())
        assert counter.frame_count == made


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "selector", [r"layers\.\d\.mlp::mul", r"layers\.\d\.self_attn::.*", r"layers\.\d\.self_attn::softmax"]
)
def test_a_context_runs_eagerly_where_no_graph_can_show_the_calls(selector):
    kind = "eager" if "softmax" in selector else "sdpa"
    model, ids = small_llama(attn_implementation=kind), torch.arange(7)[None]
    compiled = torch.compile(model, backend="eager")
    with ActivationCaching(selector).prepare(model) as hooked, torch.no_grad():
        expected = hooked(ids).last_hidden_state
    with pytest.warns(TdcacheWarning, match="is compiled, and runs eagerly while this context is open"):
        context = ActivationCaching(selector).prepare(compiled).open()
    with torch.no_grad():
        assert torch.equal(context(ids).last_hidden_state, expected)
    context.restore()
    assert len(context.cache.keys()) >= 3
    for key, value in hooked.cache.items():
        assert torch.equal(context.cache[key], value)


def rotated(q, k, shift=0.0):
    return q + q.flip(-1) * 0.1 + shift, k - k.flip(-1) * 0.1


def gated(gate, up):
    return torch.nn.functional.silu(gate) * up


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        q, k = rotated(x, x, shift=0.5)
        return x + self.down(gated(self.gate(q), self.up(k)))


def stacked():
    torch.manual_seed(0)
    return nn.Sequential(Outer(Gated()), Outer(Gated()))


SITES = r"blocks\.\d\.inner::gated"
EDITS = {
    "zero": lambda at: Ablation(SITES),
    "units": lambda at: Ablation(SITES, units=[at, at + 3]),
    "mean": lambda at: Ablation(SITES, "mean", torch.full((16,), float(at))),
    "project": lambda at: Ablation(SITES, "project", torch.eye(16)[at : at + 2]),
    "arguments": lambda at: Ablation(SITES, direction="fwd_pre", rows=[0]),
    "steer": lambda at: SteeringVectors(SITES, torch.full((16,), at + 1.0), coefficient=3.0),
    "patch": lambda at: ActivationPatching(
        SITES, source={f"blocks.{layer}.inner::gated": torch.full((2, 16), at + 1.0) for layer in "01"}
    ),
}


class Root(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = stacked()

    def forward(self, x):
        return self.blocks(x)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", EDITS)
def test_an_intervention_at_calls_edits_inside_the_graph_in_every_block(kind):
    model, x = Root(), torch.randn(2, 8)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager" if kind == "patch" else "eager")
    compiled, frames = torch.compile(model, backend=counter, fullgraph=True), []
    with torch.no_grad():
        plain = compiled(x)
        for at in range(3):
            with EDITS[kind](at).prepare(model):
                edited = compiled(x)
                assert torch.equal(compiled(x), edited)
                assert torch.allclose(edited, model(x), atol=1e-6)  # one order of operations, fused or not
            assert not torch.allclose(edited, plain, atol=1e-3)
            assert torch.equal(compiled(x), plain)
            frames.append(counter.frame_count)
    assert frames[0] == frames[-1]


@pytest.mark.parametrize("kind", ["zero", "patch"])
def test_gradients_flow_through_an_edit_inside_a_graph(kind):
    model, x = stacked()[0], torch.randn(2, 8, requires_grad=True)
    compiled, at = torch.compile(model, backend="aot_eager", fullgraph=True), r"inner::gated"
    source = {at: torch.ones(2, 16)}
    recipe = Ablation(at, units=[1, 4]) if kind == "zero" else ActivationPatching(at, units=[1, 4], source=source)
    plain = torch.autograd.grad(compiled(x).sum(), x)[0]
    with recipe.prepare(model):
        (found,) = torch.autograd.grad(compiled(x).sum(), x)
        (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize(
    "options",
    [{"pick": 1}, {"directions": ["fwd_pre"], "pick": "k"}, {"directions": ["fwd_pre"]}],
    ids=["of a tuple", "by a name", "the first argument"],
)
def test_picked_results_and_arguments_are_captured_inside_the_graph_in_every_block(options):
    model, x = Root(), torch.randn(2, 8)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    site = r"blocks\.\d\.inner::rotated"
    with torch.no_grad():
        compiled(x)
        for at in range(3):
            with ActivationCaching(site, **options).prepare(model) as hooked:
                compiled(x + at)
            with ActivationCaching(site, hold="snapshot", **options).prepare(model) as eager:
                model(x + at)
            assert set(hooked.cache.keys()) == {"blocks.0.inner::rotated", "blocks.1.inner::rotated"}
            for key, value in eager.cache.items():
                assert torch.allclose(hooked.cache[key], value, atol=1e-6)
    assert counter.frame_count == 2


def test_a_call_that_a_graph_does_not_make_is_reported_where_it_would_be_edited():
    model, x = Root(), torch.randn(2, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    context = Ablation(r"blocks\.\d\.inner::gated\.1").prepare(model).open()
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    with pytest.warns(UnfiredSiteWarning, match="means a call that none of its 2 modules made"):
        context.restore()


def test_a_model_inside_a_compiled_function_is_captured_in_every_block():
    model, x = Root(), torch.randn(2, 8)
    step = torch.compile(lambda value: model(value) * 2, backend="eager", fullgraph=True)
    with torch.no_grad():
        for at in range(3):
            with ActivationCaching(r"blocks\.\d\.inner::gated").prepare(model) as hooked:
                step(x + at)
            with ActivationCaching(r"blocks\.\d\.inner::gated").prepare(model) as eager:
                model(x + at)
            for key, value in eager.cache.items():
                assert torch.equal(hooked.cache[key], value)


def test_calls_of_the_compiled_model_itself_are_part_of_its_graph():
    model, x = Gated(), torch.randn(2, 8)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled, made = torch.compile(model, backend=counter, fullgraph=True), []
    with torch.no_grad():
        for at in range(3):
            with (
                Ablation("::gated", units=[at]).prepare(compiled),
                ActivationCaching("::gated").prepare(model) as hooked,
            ):
                assert torch.equal(compiled(x), model(x))
                assert torch.equal(compiled(x + at), model(x + at))
                compiled(x)
            assert hooked.cache["::gated"][:, at].count_nonzero() == 0
            assert hooked.cache["::gated"].count_nonzero() == 30
            made.append(counter.frame_count)
        assert not torch.equal(compiled(x)[0], model.down.bias)
    assert made == [1, 1, 1]
