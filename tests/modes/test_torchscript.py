"""TorchScript and torch.fx: hooks are called where Python calls a module, and nowhere else."""

import pytest
import torch
from torch import nn

from small_models import UserModel
from tdcache import ActivationCaching, ContextError, HookedModule, SteeringVectors, cache_activations

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


def traced(model):
    return torch.jit.trace(model, torch.ones(2, 4))


scripted = pytest.mark.parametrize("script", [torch.jit.script, traced])


@pytest.fixture
def x():
    return torch.randn(3, 4, requires_grad=True)


@scripted
def test_a_script_module_is_captured_in_every_direction_as_a_whole(script, x):
    model = UserModel()
    module = script(model)
    with ActivationCaching("", directions=["fwd", "fwd_pre", "bwd", "grad_in"]).prepare(module) as hooked:
        y = module(x)
        y.sum().backward()
    assert torch.equal(hooked.cache["fwd", ""], y)
    assert torch.equal(hooked.cache["fwd_pre", ""], x)
    assert torch.equal(hooked.cache["bwd", ""], torch.ones(3, 2))
    assert torch.equal(hooked.cache["grad_in", ""], x.grad)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@scripted
def test_a_script_module_in_a_model_is_captured_and_edited(script, x):
    model = nn.Sequential(script(UserModel()), nn.ReLU())
    inner = model[0](x)
    with SteeringVectors("0", torch.ones(2)).prepare(model), cache_activations(model, "0|1") as cache:
        model(x)
    assert torch.equal(cache["0"], inner + 1)
    assert torch.equal(cache["1"], torch.relu(inner + 1))


@scripted
@pytest.mark.parametrize(("wrap", "inside", "whole"), [(nn.Identity, "first", ""), (nn.Sequential, "0.first", "0")])
def test_a_place_inside_a_script_module_is_refused(script, wrap, inside, whole, x):
    module = script(UserModel())
    model = module if wrap is nn.Identity else wrap(module)
    refused = pytest.raises(ContextError, match=f"'{inside}' is inside the TorchScript module '{whole}'")
    with refused, ActivationCaching(inside).prepare(model):
        pass
    with refused, SteeringVectors(inside, torch.ones(4)).prepare(model):
        pass
    with refused, HookedModule.from_module(model).run(x) as run:
        run.get(inside)
    assert not model._forward_hooks


def test_a_graph_module_is_captured_before_and_after_something_was_compiled(x):
    model = torch.fx.symbolic_trace(UserModel())
    for _ in range(2):
        with cache_activations(model, "first|second") as cache:
            y = model(x)
        assert torch.equal(cache["first"], model.first(x))
        assert torch.equal(cache["second"], y)
        torch.compile(nn.Sequential(nn.ReLU()), backend="eager")(x)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_a_compiled_graph_module_is_captured(x):
    model = torch.fx.symbolic_trace(UserModel())
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        with cache_activations(compiled, "first|second") as cache:
            y = compiled(x)
        assert torch.equal(cache["first"], model.first(x))
        assert torch.equal(cache["second"], y)
    torch._dynamo.reset()
