"""Tests of compiled models: a call inside a graph is seen because the graph breaks there, or the compiler refuses."""

import gc
import sys
import weakref

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from call_models import Attention, Chain, small_llama
from tdcache.function_calls.attach import attach_call
from tdcache.function_calls.roles import attach_attention
from tdcache.function_calls.sites import CallSite
from tdcache.hooks.registrations import MultiHookHandle


def helper(x):
    return x * 3


class Helped(nn.Module):
    def forward(self, x):
        return helper(x) + 1


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).sin()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


KINDS = (
    ("call", Chain, CallSite("inner.layers.1", "gelu"), (2, 8)),
    ("python function", Helped, CallSite("inner", "helper"), (2, 8)),
    ("attention", Attention, CallSite("inner", "pattern"), (2, 5, 32)),
)


def attach(model, site, hook):
    if site.derived:
        return attach_attention(model, site, hook)
    return attach_call(model, site, None, hook)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, where it resumes after a break
@pytest.mark.parametrize("compiled_first", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("kind", "make", "site", "shape"), KINDS, ids=[kind[0] for kind in KINDS])
def test_a_compiled_model_is_read_and_edited_and_compiled_again_after(
    kind, make, site, shape, in_place, compiled_first
):
    model, seen, x = Outer(make()), [], torch.randn(shape)
    expected = model(x)
    if in_place:
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    if compiled_first:
        compiled(x)
    for at in range(1, 4):
        handle = attach(model, site, lambda module, args, kwargs, output: seen.append(output))
        with MultiHookHandle([handle]):
            assert torch.equal(compiled(x), expected)
        assert len(seen) == at
    with MultiHookHandle([attach(model, site, lambda module, args, kwargs, output: output * 0)]):
        assert not torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), expected)
    assert len(seen) == 3


@pytest.mark.parametrize(("kind", "make", "site", "shape"), [KINDS[0], KINDS[2]], ids=["call", "attention"])
def test_a_full_graph_is_refused_rather_than_left_empty(kind, make, site, shape):
    model, seen, x = Outer(make()), [], torch.randn(shape)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    handle = attach(model, site, lambda module, args, kwargs, output: seen.append(output))
    with MultiHookHandle([handle]), pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(x)
    assert seen == []
    compiled(x)


def test_many_blocks_are_read_without_recompiling_them_each():
    model, seen, x = Chain(depth=12), [], torch.randn(2, 8)
    compiled = torch.compile(model, backend="eager")
    expected = model(x)
    handles = [
        attach_call(
            model, CallSite(f"layers.{at}", "gelu"), None, lambda module, args, kwargs, output: seen.append(output)
        )
        for at in range(12)
    ]
    with MultiHookHandle(handles), torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert torch.equal(compiled(x), expected)
    assert len(seen) == 36


class Keep:
    def __init__(self, kept, key):
        self.kept, self.key = kept, key

    def __call__(self, module, args, kwargs, output):
        self.kept[self.key] = output


class Scale:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, module, args, kwargs, output):
        return output * self.factor


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Helped() for _ in range(12))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_python_functions_are_read_and_edited_in_one_full_graph_in_every_block(backend):
    model, x, kept = Stack(), torch.randn(2, 3), {}
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for block in range(4):
            sites = [CallSite(f"layers.{at}", "helper") for at in range(12)]
            reads = [attach_call(model, site, None, Keep(kept, site.path), order=2) for site in sites]
            edit = attach_call(model, sites[5], None, Scale(torch.tensor(float(block))))
            with MultiHookHandle([*reads, edit]):
                for given in (x, x + 1):
                    kept.clear()
                    result = compiled(given)
                    values, value = [], given
                    for at in range(12):
                        value = value * 3 * (block if at == 5 else 1)
                        values.append(value)
                        value = value + 1
                    assert torch.allclose(result, value)
                    assert list(kept) == [site.path for site in sites]
                    assert all(torch.allclose(one, other) for one, other in zip(kept.values(), values, strict=True))
            assert torch.allclose(compiled(x), model(x))
    assert counter.frame_count == 2


def llama_sites(model, paths, factor, kept):
    """Reads of every place, of the rotary embedding, and two edits, one after the other."""
    yield attach_call(model, CallSite(paths[0], "apply_rotary_pos_emb"), None, Keep(kept, "rotary"), order=2)
    yield attach_attention(model, CallSite(paths[0], "q"), Scale(torch.tensor(factor)))
    for path in paths:
        for place in ("q", "k", "v", "scores", "pattern", "z"):
            yield attach_attention(model, CallSite(path, place), Keep(kept, (path, place)), order=2)
    yield attach_attention(model, CallSite(paths[1], "pattern"), Scale(torch.tensor(factor)))


@pytest.mark.filterwarnings("default")
def test_a_llama_is_read_and_edited_in_one_full_graph():
    model, ids, kept = small_llama(num_hidden_layers=12), torch.randint(0, 60, (1, 7)), {}
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    paths = [f"layers.{at}.self_attn" for at in range(2)]
    with torch.no_grad():
        for factor in (2.0, 3.0):
            with MultiHookHandle(llama_sites(model, paths, factor, kept)):
                found = []
                for run in (compiled, model):
                    kept.clear()
                    found.append((run(ids).last_hidden_state, dict(kept)))
            (first, values), (second, others) = found
            assert torch.equal(first, second)
            assert list(values) == list(others)
            assert len(values) == 13
            for key in others.keys() - {"rotary"}:
                assert torch.equal(values[key], others[key])
            assert torch.allclose(values[paths[1], "pattern"].sum(-1), torch.tensor(factor))
            assert torch.equal(values["rotary"][0], others["rotary"][0])
            assert not torch.equal(first, model(ids).last_hidden_state)
            assert torch.equal(compiled(ids).last_hidden_state, model(ids).last_hidden_state)
    assert counter.frame_count == 2


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("use", ["read", "watch"])
def test_a_pattern_that_no_graph_can_give_breaks_it(use):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, use_cache=False
    )
    config._attn_implementation = "eager" if use == "read" else "sdpa"
    model, ids, kept = transformers.LlamaModel(config).eval(), torch.randint(0, 60, (1, 7)), {}
    with torch.set_grad_enabled(use == "watch"):
        expected = model(ids).last_hidden_state
        site = CallSite("layers.1.self_attn", "pattern")
        with MultiHookHandle([attach_attention(model, site, Keep(kept, 0), use=use)]):
            found = torch.compile(model, backend="eager")(ids).last_hidden_state
            assert torch.equal(found, expected)
            assert kept[0].shape == (1, 4, 7, 7)
            if use == "watch":
                (gradient,) = torch.autograd.grad(found.square().sum(), kept[0])
                assert gradient.abs().sum() > 0
            torch._dynamo.reset()
            with pytest.raises(torch._dynamo.exc.Unsupported):
                torch.compile(model, backend="eager", fullgraph=True)(ids)


def test_nothing_of_an_overlay_stays_in_the_process():
    before = set(sys.modules)
    model, kept = Outer(Helped()), {}
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with MultiHookHandle([attach_call(model, CallSite("inner", "helper"), None, Keep(kept, 0))]):
        compiled(torch.randn(2, 3))
    assert not {name for name in set(sys.modules) - before if name.startswith("tdcache")}
    alive = weakref.ref(model.inner)
    del model, compiled
    gc.collect()
    torch._dynamo.reset()
    gc.collect()
    assert alive() is None
