"""Tests of compiled models: a call inside a graph is seen because the graph breaks there, or the compiler refuses."""

import pytest
import torch
from torch import nn

from call_models import Attention, Chain
from tdcache.calls.attach import attach_call
from tdcache.calls.roles import attach_attention
from tdcache.calls.sites import CallSite
from tdcache.hooks.attach import MultiHookHandle


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


@pytest.mark.parametrize(("kind", "make", "site", "shape"), KINDS, ids=[kind[0] for kind in KINDS])
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
