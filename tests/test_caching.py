"""ActivationCaching: what a user types, and what lands in the cache."""

import copy
import gc
import inspect
import pickle
import re
import weakref

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from small_models import MLP, assert_same, by_hand
from tdcache import (
    ActivationCaching,
    HookingContextFactory,
    Stack,
    cache_activations,
)
from tdcache.caching import CachingOptions

LAYERS = ["layers.0", "layers.1", "layers.2"]
ONE_LAYER = r"layers\.\d+"


def test_the_positional_order_of_the_arguments_is_fixed():
    parameters = inspect.signature(ActivationCaching).parameters
    positional = [name for name, each in parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    keyword_only = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY]
    assert positional == [
        "key_pattern",
        "relative",
        "cache",
        "callback",
        "directions",
        "use_nested_keys",
        "clear_cache",
    ]
    assert set(keyword_only) >= {"match", "pick", "index", "hold", "dtype", "device", "reducer"}
    assert set(keyword_only) >= {"batch_dims", "stack_by", "stop_early", "allow_empty", "prepend"}


def test_one_regex_keeps_the_output_of_every_module_it_matches(model, x):
    with ActivationCaching(ONE_LAYER).prepare(model) as hooked:
        hooked(x)
    wanted = by_hand(model, LAYERS, lambda: model(x))
    assert_same(dict(hooked.cache.items()), {path: values[0] for path, values in wanted.items()})


def test_the_cache_is_a_tensordict_without_batch_size(model, x):
    with ActivationCaching(ONE_LAYER).prepare(model) as hooked:
        hooked(x)
    assert isinstance(hooked.cache, TensorDict)
    assert hooked.cache.batch_size == torch.Size([])


def test_one_direction_is_keyed_by_path_and_several_by_direction_and_path(model, x):
    with (
        ActivationCaching(ONE_LAYER).prepare(model) as flat,
        ActivationCaching(ONE_LAYER, directions=["fwd", "fwd_pre"]).prepare(model) as nested,
    ):
        model(x)
    assert sorted(flat.cache.keys()) == LAYERS
    assert sorted(nested.cache.keys()) == ["fwd", "fwd_pre"]
    assert sorted(nested.cache["fwd"].keys()) == LAYERS


def test_nested_keys_can_be_asked_for_with_one_direction(model, x):
    with ActivationCaching("head", use_nested_keys=True).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["fwd", "head"], y)


def test_a_dotted_path_is_one_key_and_a_parent_is_kept_beside_its_children(x):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2))
    with ActivationCaching(r"0(\.\d)?", use_nested_keys=True).prepare(model) as hooked:
        hooked(x)
    assert sorted(hooked.cache["fwd"].keys()) == ["0", "0.0", "0.1"]
    assert torch.equal(hooked.cache["fwd", "0"], hooked.cache["fwd", "0.1"])


def test_the_pattern_matches_the_whole_path(x):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(11)])
    with ActivationCaching("1").prepare(model) as hooked:
        hooked(x)
    assert list(hooked.cache.keys()) == ["1"]


@pytest.mark.parametrize(("match", "paths"), [("full", ["1"]), ("prefix", ["1", "10"]), ("search", ["1", "10"])])
def test_match_says_how_much_of_the_path_is_covered(x, match, paths):
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(11)])
    with ActivationCaching("1", match=match).prepare(model) as hooked:
        hooked(x)
    assert sorted(hooked.cache.keys()) == paths


@pytest.mark.parametrize(
    "selector",
    [re.compile(ONE_LAYER), lambda path, module: path in LAYERS, LAYERS, [r"layers\.0", re.compile(r"layers\.[12]")]],
    ids=["compiled", "predicate", "paths", "union"],
)
def test_every_kind_of_selector_is_taken(model, x, selector):
    with ActivationCaching(selector).prepare(model) as hooked:
        hooked(x)
    assert sorted(hooked.cache.keys()) == LAYERS


def test_a_module_class_selects_its_instances(model, x):
    with ActivationCaching(nn.Linear).prepare(model) as hooked:
        hooked(x)
    assert sorted(hooked.cache.keys()) == ["head", *LAYERS]


def test_the_root_is_selected_by_the_empty_pattern(model, x):
    with ActivationCaching("").prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache[""], y)


def test_the_pattern_can_be_set_between_two_uses(model, x):
    factory = ActivationCaching("head")
    context = factory.prepare(model)
    with context as hooked:
        hooked(x)
    factory.key_pattern = r"layers\.1"
    with context as hooked:
        hooked(x)
        assert list(hooked.cache.keys()) == ["layers.1"]
    with factory.prepare(model) as hooked:
        hooked(x)
    assert list(hooked.cache.keys()) == ["layers.1"]
    assert factory.key_pattern == r"layers\.1"


def test_not_relative_matches_and_keys_below_the_hooked_module(model, x):
    with ActivationCaching(r".*layers\.0", relative=False).prepare(model) as hooked:
        hooked(x)
        (key,) = hooked.cache.keys()
        assert key == f"{hooked.relative_path}.layers.0"
        assert dict(hooked.named_modules())[key] is model.layers[0]


def test_allow_empty_selects_nothing_without_an_error(model, x):
    with ActivationCaching("nowhere", allow_empty=True).prepare(model) as hooked:
        y = hooked(x)
    assert hooked.cache.is_empty()
    assert torch.equal(y, model(x))


def test_the_one_liner_yields_the_cache_itself(model, x):
    with cache_activations(model, ONE_LAYER, directions=["fwd", "bwd"]) as cache:
        model(x).sum().backward()
        wanted = by_hand(model, LAYERS, lambda: model(x))
        assert isinstance(cache, TensorDict)
    assert_same(dict(cache["fwd"].items()), {path: values[-1] for path, values in wanted.items()})


def test_the_one_liner_has_what_a_reducer_gathered_after_the_block(model, x):
    with cache_activations(model, "head", reducer=Stack()) as cache:
        ys = [model(x), model(2 * x)]
    assert torch.equal(cache["head"], torch.stack(ys))


# Recipes


def test_a_recipe_is_a_factory_and_holds_nothing_of_a_model(model, x):
    factory = ActivationCaching(ONE_LAYER)
    before = {name: id(value) for name, value in vars(factory).items()}
    with factory.prepare(model) as hooked:
        hooked(x)
    assert isinstance(factory, HookingContextFactory)
    assert {name: id(value) for name, value in vars(factory).items()} == before


def test_a_recipe_is_reusable_over_models(x):
    factory = ActivationCaching("head", directions=["fwd", "bwd"])
    for model in (MLP(), MLP(depth=2)):
        with factory.prepare(model) as hooked:
            y = hooked(x)
            y.sum().backward()
        assert torch.equal(hooked.cache["fwd", "head"], y)


def test_a_recipe_keeps_no_model_alive(x):
    factory, model = ActivationCaching("head", reducer=Stack()), MLP()
    context = factory.prepare(model)
    for _ in range(2):
        with context as hooked:
            hooked(x)
    gone = weakref.ref(model)
    del model, context, hooked
    gc.collect()
    assert gone() is None
    assert repr(factory) == "ActivationCaching('head', directions=['fwd'])"


def test_one_recipe_may_be_open_on_two_models_at_once(x):
    factory, models = ActivationCaching("head"), (MLP(), MLP())
    with factory.prepare(models[0]) as one, factory.prepare(models[1]) as two:
        ys = one(x), two(x)
    assert torch.equal(one.cache["head"], ys[0])
    assert torch.equal(two.cache["head"], ys[1])


@pytest.mark.parametrize(
    "duplicate", [lambda factory: pickle.loads(pickle.dumps(factory)), copy.deepcopy], ids=["pickle", "copy"]
)
def test_a_recipe_survives_pickling(model, x, duplicate):
    factory = ActivationCaching(
        ["head", re.compile(ONE_LAYER), nn.GELU],
        directions=["fwd"],
        index=(slice(None), 0),
        reducer=Stack(),
        dtype=torch.float64,
    )
    again = duplicate(factory)
    assert repr(again) == repr(factory)
    with factory.prepare(model) as one, again.prepare(model) as two:
        model(x)
    assert sorted(two.cache.keys()) == ["act", "head", *LAYERS]
    assert_same(dict(two.cache.items()), dict(one.cache.items()))


def test_a_recipe_shows_what_it_is():
    assert (
        repr(ActivationCaching(r"a\d", directions=["fwd", "bwd"]))
        == r"ActivationCaching('a\\d', directions=['fwd', 'bwd'])"
    )


def test_a_repeated_direction_counts_once(model, x):
    with ActivationCaching("head", directions=["fwd", "fwd"]).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["head"], y)


def test_the_options_of_cache_activations_are_those_of_the_recipe():
    parameters = inspect.signature(ActivationCaching.__init__).parameters
    assert set(CachingOptions.__annotations__) == set(parameters) - {"self", "key_pattern"}
    spelled = {name: each.__forward_arg__ for name, each in CachingOptions.__annotations__.items()}
    assert spelled == {name: parameters[name].annotation for name in spelled}
