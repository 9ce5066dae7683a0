"""What is read of torch's private state: hook dicts, compiled models, and why a module was not called."""

import warnings

import pytest
import torch
from torch import nn

from tdcache.introspect import (
    has_stale_graph,
    is_compiled,
    is_optimized_module,
    may_be_compiled,
    next_registration,
    post_hooks,
    pre_hooks,
    scripted_ancestor,
    why_not_called,
)


def compiled(model):
    return torch.compile(model, backend="eager")


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch would rather have torch.export used
        return torch.jit.script(model)


def test_hook_dicts_are_those_that_torch_registers_in():
    module = nn.Linear(1, 1)
    after, before = module.register_forward_hook(print), module.register_forward_pre_hook(repr)
    assert dict(post_hooks(module)) == {after.id: print}
    assert dict(pre_hooks(module)) == {before.id: repr}


def test_a_compiled_model_is_told_from_others():
    assert is_optimized_module(compiled(nn.Linear(1, 1)))
    assert not is_optimized_module(nn.Linear(1, 1))
    assert not is_optimized_module(nn.DataParallel(nn.Linear(1, 1)))


def test_a_model_is_compiled_if_a_part_of_it_is():
    in_place, wrapped = (nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1))) for _ in range(2))
    assert not is_compiled(in_place)
    in_place[1].compile(backend="eager")
    wrapped[1] = compiled(wrapped[1])
    assert is_compiled(in_place)
    assert is_compiled(wrapped)


def test_without_any_compilation_nothing_needs_to_be_walked():
    torch._dynamo.reset()
    assert not may_be_compiled(nn.Linear(1, 1))
    model = compiled(nn.Linear(1, 1))
    assert may_be_compiled(nn.Linear(1, 1))  # it may be part of whatever was compiled
    torch._dynamo.reset()
    assert may_be_compiled(model)
    assert not may_be_compiled(nn.Linear(1, 1))


def test_what_is_above_a_place_inside_torchscript_is_found():
    script = scripted(nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.ReLU()))
    model = nn.Sequential(nn.ReLU(), script)
    assert scripted_ancestor(script, "0.0") == ""
    assert scripted_ancestor(model, "1.0.0") == "1"
    assert [scripted_ancestor(model, path) for path in ("", "0", "1", "no.such")] == [None] * 4


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


def test_a_graph_of_a_function_or_of_another_module_counts_for_the_models_in_it():
    torch._dynamo.reset()
    model, linear = Traced(), nn.Linear(1, 1)
    compiled(nn.Sequential(model))(torch.ones(1))
    assert has_stale_graph(model)
    assert not has_stale_graph(linear)
    assert not has_stale_graph(NeverTraced())
    compiled(lambda x: nn.functional.relu(linear(x)))(torch.ones(1))
    assert has_stale_graph(linear)
    torch._dynamo.reset()


class Block(Traced):
    """Another class of its own."""


class OneBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x)


class AlsoOneBlock(OneBlock):
    def forward(self, x):
        return self.block(x) + 1


def test_a_graph_of_a_part_counts_and_one_of_another_model_with_such_a_part_does_not():
    torch._dynamo.reset()
    compiled(OneBlock())(torch.ones(1))
    assert not has_stale_graph(AlsoOneBlock())
    block = Block()
    compiled(lambda x: block(x) + 1)(torch.ones(1))
    assert has_stale_graph(AlsoOneBlock())
    torch._dynamo.reset()


def test_modules_without_a_source_file_are_no_obstacle_to_asking():
    torch._dynamo.reset()
    compiled(Traced())(torch.ones(1))
    assert not has_stale_graph(torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())))
    assert not has_stale_graph(scripted(nn.ReLU()))
    torch._dynamo.reset()


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


def test_a_registration_number_is_given_once():
    number = next_registration()
    assert next_registration() == number + 1
    assert nn.ReLU().register_forward_hook(print).id == number + 2
