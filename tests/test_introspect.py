"""What is read of torch's private state: hook dicts, compiled models, and why a module was not called."""

import pytest
import torch
from torch import nn

from tdcache.introspect import (
    compiled_modules,
    has_stale_graph,
    is_optimized_module,
    post_hooks,
    pre_hooks,
    why_not_called,
)


def compiled(model):
    return torch.compile(model, backend="eager")


def test_hook_dicts_are_those_that_torch_registers_in():
    module = nn.Linear(1, 1)
    after, before = module.register_forward_hook(print), module.register_forward_pre_hook(repr)
    assert dict(post_hooks(module)) == {after.id: print}
    assert dict(pre_hooks(module)) == {before.id: repr}


def test_a_compiled_model_is_told_from_others():
    assert is_optimized_module(compiled(nn.Linear(1, 1)))
    assert not is_optimized_module(nn.Linear(1, 1))
    assert not is_optimized_module(nn.DataParallel(nn.Linear(1, 1)))


def test_modules_compiled_in_place_are_found():
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    assert compiled_modules(model) == []
    model[1].compile(backend="eager")
    assert compiled_modules(model) == [model[1]]


class Traced(nn.Module):
    """A class of its own, so that no other test has traced it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) + 1


class NeverTraced(Traced):
    def forward(self, x):
        return x


def test_a_graph_is_stale_once_it_was_traced_whoever_of_the_class_was_traced():
    torch._dynamo.reset()
    model = Traced()
    wrapped = compiled(model)
    assert not has_stale_graph(wrapped)
    wrapped(torch.ones(1))
    assert has_stale_graph(wrapped)
    assert has_stale_graph(model)
    assert has_stale_graph(Traced())
    assert not has_stale_graph(NeverTraced())
    torch._dynamo.reset()
    assert not has_stale_graph(wrapped)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("encoder", None),
        ("encoder.layers", "ModuleList 'encoder.layers' is a container that is never called; select its members"),
        ("encoder.layers.0", "the fused fast path of TransformerEncoder 'encoder' calls no submodules in eval mode"),
        (
            "encoder.layers.0.linear1",
            "the fused fast path of TransformerEncoderLayer 'encoder.layers.0' calls no submodules",
        ),
        (
            "encoder.layers.0.self_attn.out_proj",
            "nn.MultiheadAttention 'encoder.layers.0.self_attn' uses the weights of",
        ),
        ("heads", "ModuleDict 'heads' is a container that is never called; select its members"),
        ("heads.a", None),
        ("encoder.nothing", None),
    ],
)
def test_the_known_reasons_why_a_module_is_not_called(path, reason):
    layer = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1), "heads": nn.ModuleDict({"a": nn.Identity()})})
    found = why_not_called(model, path)
    assert found is None if reason is None else found.startswith(reason)


def test_the_reason_given_for_the_projections_of_attention_is_true():
    attention = nn.MultiheadAttention(4, 2)
    attention.out_proj.register_forward_hook(lambda *args: pytest.fail("called"))
    attention(*[torch.ones(1, 2, 4)] * 3)
