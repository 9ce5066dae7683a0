"""Graphs of ``torch.compile`` rest while hooks are there that they would skip, whoever made them."""

from contextlib import ExitStack

import pytest
import torch
from torch import nn

from tdcache import ContextError, TdcacheWarning
from tdcache.hooks.compiled import refuse_scripted, running_eagerly


class Doubled(nn.Module):
    """A class of its own, so that no other test has traced it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) * 2


def wrapped(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def inside_a_function(model):
    return torch.compile(lambda x: model(x) + 0, backend="eager")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [wrapped, in_place, inside_a_function])
def test_late_hooks_are_called_inside_the_block_and_the_graph_is_used_again_after_it(compiled):
    inner = Doubled()
    called, seen = compiled(inner), []
    attributes = [dict(module.__dict__) for module in inner.modules()]
    called(torch.ones(1))
    handle = inner.inner.register_forward_hook(lambda *args: seen.append(True))
    called(torch.ones(1))
    assert seen == []  # what this is for: the graph has no hook in it
    with running_eagerly(inner):
        assert called(torch.ones(1)).item() == 2
    assert seen == [True]
    called(torch.ones(1))
    assert seen == [True]
    handle.remove()
    assert [dict(module.__dict__) for module in inner.modules()] == attributes


def stance():
    return torch._dynamo.eval_frame._stance.stance


def test_blocks_may_be_left_in_any_order():
    model = wrapped(Doubled())
    first, second = ExitStack(), ExitStack()
    first.enter_context(running_eagerly(model))
    second.enter_context(running_eagerly(model))
    first.close()
    assert stance() == "force_eager"
    second.close()
    assert stance() == "default"


def test_the_stance_that_was_there_comes_back_when_the_block_raises():
    model = wrapped(Doubled())
    with torch.compiler.set_stance("eager_on_recompile"):
        with pytest.raises(KeyError), running_eagerly(model):
            raise KeyError
        assert stance() == "eager_on_recompile"
    assert stance() == "default"


def test_models_that_no_graph_has_to_do_with_change_nothing():
    unrelated = wrapped(nn.Tanh())
    unrelated(torch.ones(1))
    with running_eagerly(Doubled()):
        assert stance() == "default"


@pytest.mark.parametrize("fits", [True, False])
def test_a_model_that_was_not_traced_yet_runs_eagerly_if_its_hooks_fit_no_graph(fits):
    with running_eagerly(wrapped(Doubled()), fits_graph=fits):
        assert stance() == ("default" if fits else "force_eager")


def test_a_compiled_model_that_will_not_be_traced_is_told_of_once():
    model = wrapped(Doubled())
    told = pytest.warns(TdcacheWarning, match="Doubled is compiled, and runs eagerly while this context is open")
    with told, running_eagerly(model, tell=True):
        pass
    with running_eagerly(model, tell=True):  # strict warnings: none the second time
        pass


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_places_inside_torchscript_are_refused():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.ReLU())))
    refuse_scripted(model, [("", model), ("0", model[0])])
    with pytest.raises(ContextError, match=r"'0\.0' is inside the TorchScript module '0', .*; hook '0' itself, or the"):
        refuse_scripted(model, [("0", model[0]), ("0.0", model.get_submodule("0.0"))])
