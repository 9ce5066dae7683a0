"""torch.compile: whatever no graph can hold captures and edits as it does eagerly, however the model was compiled."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch._dynamo.utils import counters

from tdcache import (
    Ablation,
    ActivationCaching,
    CompositeHookingContextFactory,
    HookedModule,
    HookingContextFactory,
    MultiHookManager,
    Stack,
    SteeringVectors,
    cache_activations,
)
from tdcache.attribution import GradientXActivation
from tdcache.pipeline import AttachedPipeline
from tdcache.reducers import Mean

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's own, while it traces
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:UserModel is compiled, and runs eagerly:tdcache.TdcacheWarning"),
]


class UserModel(nn.Module):
    """Overwrites the output of a part, and hands a tuple on."""

    def __init__(self):
        super().__init__()
        self.first, self.pair, self.second = nn.Linear(4, 4), Pair(), nn.Linear(4, 2)

    def forward(self, x):
        total, kept = self.pair(self.first(x).relu_())
        return self.second(total + kept)


class Pair(nn.Module):
    def forward(self, x):
        return x * 2, x + 1


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def rows():
    return torch.linspace(-1, 1, 20).reshape(5, 4).requires_grad_()


def compiled(model):
    return torch.compile(model, backend="eager")


class Way:
    """How a model comes to be compiled: ``prepared`` is given to the context, ``called()`` what is called inside it."""

    def __init__(self, model):
        self.model = self.prepared = model
        self.wrapped = None

    def called(self):
        return self.prepared


class Fresh(Way):
    def __init__(self, model):
        super().__init__(model)
        self.prepared = compiled(model)


class InPlace(Way):
    def __init__(self, model):
        super().__init__(model)
        model.compile(backend="eager")


class RunBefore(Fresh):
    def __init__(self, model):
        super().__init__(model)
        self.prepared(rows())


class InFunction(Way):
    def __init__(self, model):
        super().__init__(model)
        self.wrapped = compiled(lambda x: model(x))
        self.wrapped(rows())

    def called(self):
        return self.wrapped


class InTheBlock(Way):
    def called(self):
        return compiled(self.model)


ways = pytest.mark.parametrize("way", [Fresh, InPlace, RunBefore, InFunction, InTheBlock])


def magnitude(module, args, output, key, direction):
    return (output[0] if isinstance(output, tuple) else output).detach().abs()


OPTIONS = {
    "inputs": {"directions": ["fwd_pre"], "hold": "snapshot"},
    "gradients": {"directions": ["bwd"]},
    "gradients of inputs": {"directions": ["grad_in"]},
    "everything": {"directions": ["fwd", "fwd_pre", "bwd", "grad_in"], "hold": "snapshot"},
    "a reducer": {"reducer": Stack(), "hold": "snapshot"},
    "a mean of gradients": {"reducer": Mean(), "directions": ["bwd"]},
    "a callback": {"callback": magnitude},
    "all parts": {"pick": "all", "hold": "snapshot"},
    "half precision": {"dtype": torch.float16},
    "a stop": {"stop_early": True, "hold": "snapshot"},
}


def cached(way, options):
    """What is cached of two forwards, and backwards where there are any."""
    with ActivationCaching("first|pair", **options).prepare(way.prepared) as hooked:
        called = way.called()
        for scale in (1, 2):
            y = called(scale * rows())
            if y is not None:
                y.square().sum().backward()
    return {key: value.detach().clone() for key, value in hooked.cache.items(True, True)}


@pytest.mark.parametrize("way", [Fresh, RunBefore, InTheBlock])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_no_graph_can_hold_is_captured_as_it_is_eagerly(way, options):
    model = UserModel()
    wanted = cached(Way(model), options)
    found = cached(way(model), options)
    assert len(wanted) >= 2
    assert sorted(map(str, found)) == sorted(map(str, wanted))
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key  # the same kernels: the backend only interprets


class Doubled(HookingContextFactory):
    """A user's own recipe: twice the output of a module, and three times its gradient."""

    def _hook_module(self, module):
        manager, place = MultiHookManager("first"), {"relative_path": module.relative_path}
        twice = manager.register_hook(module, lambda path: lambda module, args, output: 2 * output, **place)
        thrice = lambda module, grad_output: (3 * grad_output[0],)  # noqa: E731
        return twice + manager.register_hook(module, lambda path: thrice, direction="bwd_pre", **place)


EDITS = {
    "ablation": Ablation("first"),
    "steering": SteeringVectors("first", torch.ones(4)),
    "a pipeline": AttachedPipeline("first", lambda value: value * 2),
    "a user's recipe": Doubled(),
    "two at once": CompositeHookingContextFactory(Doubled(), ActivationCaching("second")),
}


@ways
@pytest.mark.parametrize("recipe", EDITS.values(), ids=EDITS)
def test_edits_hold_while_the_context_is_open_and_no_longer(way, recipe):
    model = UserModel()

    def seen(way):
        x = rows()
        with recipe.prepare(way.prepared):
            called = way.called()
            edited = called(x)
            edited.sum().backward()
        grad, model.second.weight.grad = model.second.weight.grad, None
        return edited.detach(), grad, called(x).detach()

    wanted = seen(Way(model))
    assert not torch.equal(wanted[0], wanted[2])
    for found, value in zip(seen(way(model)), wanted, strict=True):
        assert torch.equal(found, value)  # the same kernels: the backend only interprets


@pytest.mark.parametrize("way", [Fresh, InPlace, RunBefore])
def test_a_run_and_an_attribution_see_every_place_of_a_compiled_model(way):
    model = UserModel()
    data = TensorDict(input=rows().detach(), batch_size=[5])
    with GradientXActivation("first", target=0, snapshot=True).prepare(model) as hooked:
        wanted = hooked(data.copy())["attr", "first"]
    prepared = way(model).prepared
    with HookedModule.from_module(prepared).run(rows().detach()) as run:
        value = run.get("second")
    assert torch.equal(value.resolve(), model(rows().detach()))
    with GradientXActivation("first", target=0, snapshot=True).prepare(prepared) as hooked:
        assert torch.equal(hooked(data.copy())["attr", "first"], wanted)


def test_with_fullgraph_a_model_compiled_in_the_block_refuses_what_no_graph_can_hold():
    model = UserModel()
    with (
        ActivationCaching("first", directions=["bwd"]).prepare(model),
        pytest.raises(torch._dynamo.exc.Unsupported, match="no graph can hold this hook of tdcache"),
    ):
        torch.compile(model, backend="eager", fullgraph=True)(rows())


@pytest.mark.parametrize(
    "options", [{"directions": ["fwd_pre"]}, {"directions": ["bwd"]}, {"reducer": Stack()}, {"stop_early": True}]
)
def test_a_whole_graph_of_the_prepared_model_is_left_for_what_it_cannot_hold(options):
    model, x = UserModel(), rows()
    with cache_activations(model, "second", **options) as wanted:
        model(x).sum().backward()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with cache_activations(model, "second", **options) as found:
        whole(x).sum().backward()
    assert torch.equal(found["second"], wanted["second"])
    assert not counters["stats"]  # nothing was traced
    assert torch.equal(whole(x), model(x))


def test_a_whole_graph_of_another_model_is_left_alone():
    model, x = UserModel(), rows()
    whole = torch.compile(UserModel(), backend="eager", fullgraph=True)
    with cache_activations(model, "second", reducer=Stack()):
        whole(x)
        model(x)
    assert counters["stats"]["unique_graphs"] == 1
