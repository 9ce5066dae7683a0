"""Every intervention leaves the model as it was, whatever happened, and goes with every other."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from interventions.hand import edited, pasted
from model_state import state_of
from small_models import MLP
from tdcache import (
    Ablation,
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    CausalTracing,
    CompositeHookingContextFactory,
    ContextError,
    EditError,
    Intervention,
    PathPatching,
    Region,
    ResumeFrom,
    SteeringVectors,
)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def total(data):
    return data["output"].sum()


RECIPES = {
    "patching": ActivationPatching(r"layers\.\d"),
    "patching from a cache": ActivationPatching("layers.1", source=TensorDict({"layers.1": torch.ones(3, 4)})),
    "sweep": ActivationPatching(r"layers\.\d", sweep="head", heads=2, metric=total),
    "steering": SteeringVectors(r"layers\.\d", torch.ones(4)),
    "steering later": SteeringVectors(r"layers\.[12]", torch.ones(4)),
    "addition": ActivationAddition(r"layers\.\d"),
    "ablation": Ablation("head", units=0),
    "path patching": PathPatching("layers.0", "head", freeze=r"layers\.\d"),
    "causal tracing": CausalTracing(r"layers\.\d", "embed", subject=0, metric=total, sweep=True, samples=2),
    "resuming": ResumeFrom("layers.0", torch.ones(3, 4)),
}


def inputs():
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    names = ("patched", "positive", "negative")
    return TensorDict({"input": x, **{name: {"input": x + at} for at, name in enumerate(names, 1)}})


@pytest.fixture
def model():
    return Chain()


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_is_left_as_it_was(name, model):
    before, plain = state_of(model), model(inputs()["input"])
    context = RECIPES[name].prepare(model)
    for _ in range(2):  # a context is entered again after it was left
        with context as hooked:
            hooked(inputs())
        assert state_of(model) == before
    assert torch.equal(model(inputs()["input"]), plain)


@pytest.mark.parametrize("name", RECIPES)
def test_the_model_is_left_as_it_was_when_a_module_of_it_raises(name, model):
    def fails(module, args, output):
        raise ZeroDivisionError("in the model")

    handle = model.head.register_forward_hook(fails)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError, match="in the model"), RECIPES[name].prepare(model) as hooked:
        hooked(inputs())
    assert state_of(model) == before
    handle.remove()


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_serves_several_models(name):
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        with RECIPES[name].prepare(Chain()) as hooked:
            found.append(hooked(inputs()))
    assert found[0].keys() == found[1].keys()
    assert all(
        torch.equal(one, other)
        for one, other in zip(found[0].values(True, True), found[1].values(True, True), strict=True)
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_pickled(name, model):
    loaded = pickle.loads(pickle.dumps(RECIPES[name]))
    with RECIPES[name].prepare(model) as hooked:
        expected = hooked(inputs())
    with loaded.prepare(model) as hooked:
        found = hooked(inputs())
    for key, value in expected.items(True, True):
        assert torch.equal(found[key], value)


@pytest.mark.parametrize(
    ("one", "other"),
    list(itertools.permutations(["steering later", "ablation", "patching from a cache", "resuming"], 2)),
)
def test_recipes_nest_and_compose_alike(one, other, model):
    before = state_of(model)
    with RECIPES[one].prepare(model), RECIPES[other].prepare(model):
        nested = model(inputs()["input"])
    with CompositeHookingContextFactory(RECIPES[one], RECIPES[other]).prepare(model) as hooked:
        assert torch.equal(hooked(inputs()["input"]), nested)
    assert state_of(model) == before


def test_an_edit_of_a_layer_that_resuming_leaves_out_is_an_error(model):
    with (
        RECIPES["resuming"].prepare(model),
        RECIPES["steering"].prepare(model) as hooked,
        pytest.raises(EditError, match="add uses its output, which resuming left out"),
    ):
        hooked(inputs()["input"])


def test_contexts_may_be_left_in_any_order(model):
    x, before = inputs()["input"], state_of(model)
    contexts = [RECIPES[name].prepare(model) for name in ("steering", "ablation")]
    for context in contexts:
        context.__enter__()
    contexts[0].__exit__(None, None, None)
    with_the_second = model(x)
    contexts[1].__exit__(None, None, None)
    assert state_of(model) == before
    with RECIPES["ablation"].prepare(model):
        assert torch.equal(model(x), with_the_second)


@pytest.mark.parametrize("name", ["patching", "addition", "path patching"])
def test_a_caching_context_takes_part_in_the_runs_of_a_method(name, model):
    composite = CompositeHookingContextFactory(ActivationCaching("head"), RECIPES[name])
    data = inputs()
    with composite.prepare(model) as hooked:
        result = hooked(data)
        cached = hooked.cache["head"]
    last = result["patched", "output"] if name != "addition" else result["output"]
    assert torch.equal(cached, last.detach())  # the last of the runs


def test_steering_and_patching_by_a_second_input_compose(model):
    composite = CompositeHookingContextFactory(RECIPES["steering"], ActivationPatching("layers.2"))
    with composite.prepare(model) as hooked:
        data = hooked(inputs())
    assert torch.equal(data["output"], data["patched", "output"])
    with RECIPES["steering"].prepare(model):
        assert torch.equal(data["output"], model(inputs()["input"]))


def test_two_edits_of_one_site_happen_in_the_order_they_were_entered(model):
    double = SteeringVectors("head", steer_fn=lambda module_key, output: output * 2)
    plus_one = SteeringVectors("head", torch.ones(2))
    x = inputs()["input"]
    plain = model(x)
    with double.prepare(model), plus_one.prepare(model):
        assert torch.equal(model(x), plain * 2 + 1)
    with plus_one.prepare(model), double.prepare(model):
        assert torch.equal(model(x), (plain + 1) * 2)


def test_a_method_of_ones_own_says_what_it_does_at_a_site(model):
    class Double(Intervention):
        def edit_at(self, site, context):
            return lambda part, full: part * 2

    x = inputs()["input"]
    with Double("head", units=0).prepare(model) as hooked:
        found = hooked(x)
    with edited(model, "head", lambda output: pasted(output, output * 2, (..., 0))):
        assert torch.equal(found, model(x))
    with (
        pytest.raises(NotImplementedError, match="does not say what it does at 'head'"),
        Intervention("head").prepare(model),
    ):
        pass


def test_a_closed_context_is_not_called(model):
    with RECIPES["sweep"].prepare(model) as hooked:
        pass
    with pytest.raises(ContextError, match="is closed"):
        hooked(inputs())


def test_weak_models_go_away_with_their_context():
    import gc
    import weakref

    for recipe in RECIPES.values():
        model = Chain()
        seen = weakref.ref(model)
        with recipe.prepare(model) as hooked:
            hooked(inputs())
        del model, hooked
        gc.collect()
        assert seen() is None, recipe


along = st.one_of(
    st.none(),
    st.integers(-3, 2),
    st.slices(3).filter(lambda index: len(range(*index.indices(3)))),
    st.lists(st.integers(-3, 2), min_size=1, max_size=3, unique_by=lambda at: at % 3),
)


def as_indices(index, size):
    every = torch.arange(size)
    return every if index is None else every[[index]] if isinstance(index, int) else every[index]


@given(positions=along, units=along)
def test_what_a_region_takes_and_puts_is_the_outer_product_of_its_indices(positions, units):
    if any(isinstance(each, slice) and (each.step or 1) < 0 for each in (positions, units)):
        return  # torch has no negative steps
    region, tensor = Region(positions=positions, units=units), torch.arange(18.0).reshape(2, 3, 3)
    rows, columns = as_indices(positions, 3), as_indices(units, 3)
    expected = tensor[:, rows][:, :, columns]
    part = region.take(tensor, "here")
    assert torch.equal(part, expected)
    made = region.put(tensor, part + 100, "here")
    by_hand = tensor.clone()
    by_hand[:, rows[:, None], columns[None]] += 100
    assert torch.equal(made, by_hand)
    assert torch.equal(tensor, torch.arange(18.0).reshape(2, 3, 3))


def test_mlps_take_part_too():
    model, x = MLP(), inputs()["input"]
    with SteeringVectors(nn.Linear, torch.zeros(1)).prepare(model) as hooked:
        assert torch.equal(hooked(x), model(x))
