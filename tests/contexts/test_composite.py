"""Several recipes as one context: side by side, clashing, with caches of their own, and with recipes of users."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleWrapper

from model_state import state_of
from tdcache import (
    ActivationCaching,
    CacheWriteError,
    CompositeHookingContextFactory,
    ContextError,
    HookFactory,
    HookingContextFactory,
    HookingContextWithCache,
    MultiHookManager,
    SelectionError,
    Stack,
    UnfiredSiteWarning,
)
from user_recipes import TwoRuns


class Doubling(HookingContextFactory):
    """A user's recipe that edits."""

    def _hook_module(self, module):
        hook = HookFactory.make_setting_hook(None, callback=lambda output, **rest: 2 * output)
        return MultiHookManager("head").register_hook(module, lambda path: hook, relative_path=module.relative_path)


class Norms(HookingContextFactory):
    """A user's recipe with a cache."""

    _hooking_context_class = HookingContextWithCache

    def _hook_module(self, module):
        cache = module.hooking_context.cache

        def norm(path):
            return HookFactory.make_caching_hook(("norms", path), cache, callback=lambda output, **rest: output.norm())

        return MultiHookManager(r"layers\.\d").register_hook(module, norm, relative_path=module.relative_path)


class Calls(TensorDictModuleWrapper):
    """What a user's recipe may put around the module."""

    count = 0

    def forward(self, *args, **kwargs):
        self.count += 1
        return self.td_module(*args, **kwargs)


def test_the_caches_of_the_children_are_side_by_side_in_one(model, x):
    factory = CompositeHookingContextFactory(ActivationCaching("head"), ActivationCaching(r"layers\.\d"))
    with factory.prepare(model) as hooked:
        y = hooked(x)
    assert sorted(hooked.cache.keys()) == ["head", "layers.0", "layers.1", "layers.2"]
    assert torch.equal(hooked.cache["head"], y)


def test_children_with_other_directions_share_one_cache(model, x):
    factory = CompositeHookingContextFactory(
        ActivationCaching("head", use_nested_keys=True),
        ActivationCaching("head", directions=["bwd"], use_nested_keys=True),
    )
    with factory.prepare(model) as hooked:
        y = hooked(x)
        y.sum().backward()
    assert torch.equal(hooked.cache["fwd", "head"], y)
    assert torch.equal(hooked.cache["bwd", "head"], torch.ones(5, 2))


@pytest.mark.parametrize("plain_calls", [True, False])
def test_stale_entries_and_second_forwards_are_each_childs_own(model, x, plain_calls):
    factory = CompositeHookingContextFactory(ActivationCaching("head"), ActivationCaching("act", reducer=Stack()))
    with factory.prepare(model) as hooked:
        for scale in (1, 2):
            y = (model if plain_calls else hooked)(scale * x)
            assert torch.equal(hooked.cache["head"], y)
    assert hooked.cache["act"].shape == (2, 5, 4)


def test_two_children_that_cache_one_site_clash(model):
    before = state_of(model)
    factory = CompositeHookingContextFactory(ActivationCaching("head"), ActivationCaching(r"head|layers\.0"))
    with pytest.raises(CacheWriteError, match="children 0 and 1 of the composite both cache 'head'") as caught:
        factory.prepare(model).__enter__()
    assert caught.value.paths == ("head",)
    assert state_of(model) == before


def test_a_child_with_a_cache_of_its_own_keeps_it(model, x):
    own = TensorDict()
    factory = CompositeHookingContextFactory(
        ActivationCaching("head"), ActivationCaching("head", cache=own, reducer=Stack())
    )
    with factory.prepare(model) as hooked:
        hooked(x)
        hooked(x)
        assert [tuple(cache["head"].shape) for cache in hooked.hooking_context.caches] == [(5, 2), (2, 5, 2)]
    assert hooked.cache["head"].shape == (5, 2)
    assert own["head"].shape == (2, 5, 2)


@pytest.mark.parametrize("edit_first", [True, False])
def test_an_edit_comes_before_a_capture_whatever_their_order(model, x, edit_first):
    wanted = 2 * model(x)
    pair = (Doubling(), ActivationCaching("head"))
    with CompositeHookingContextFactory(*(pair if edit_first else pair[::-1])).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(y, wanted)
    assert torch.equal(hooked.cache["head"], wanted)


def test_a_users_recipe_with_a_cache_composes(model, x):
    with CompositeHookingContextFactory(ActivationCaching(r"layers\.\d"), Norms()).prepare(model) as hooked:
        hooked(x)
    for path in ("layers.0", "layers.1", "layers.2"):
        assert torch.equal(hooked.cache["norms", path], hooked.cache[path].norm())


@pytest.mark.parametrize("position", [0, 1])
def test_a_recipe_that_runs_the_model_twice_composes(model, x, position):
    factories = [ActivationCaching("head", reducer=Stack())]
    factories.insert(position, TwoRuns())
    with CompositeHookingContextFactory(*factories).prepare(model) as hooked:
        out = hooked(TensorDict({"input": x}))
    assert torch.equal(out["output"], 2 * model(x))
    assert hooked.cache["head"].shape == (2, 5, 2)


def test_a_recipe_that_runs_the_model_itself_wants_a_tensordict(model, x):
    with (
        CompositeHookingContextFactory(TwoRuns()).prepare(model) as hooked,
        pytest.raises(ContextError, match="needs a TensorDict"),
    ):
        hooked(x)


def test_a_recipe_that_wraps_the_module_composes(model, x):
    class Wrapping(HookingContextFactory):
        def _prepare_module(self, module, in_keys, out_keys, extra_relative_path):
            self.wrapper = Calls(module)
            return self.wrapper

        def _spawn_hooked_module(self, prep_module, hooking_context, extra_relative_path):
            return super()._spawn_hooked_module(prep_module, hooking_context, f"td_module.{extra_relative_path}")

    wrapping = Wrapping()
    with CompositeHookingContextFactory(ActivationCaching("head"), wrapping).prepare(model) as hooked:
        y = hooked(x)
        assert hooked.model is model
    assert wrapping.wrapper.count == 1
    assert torch.equal(hooked.cache["head"], y)


def test_composites_nest(model, x):
    inner = CompositeHookingContextFactory(ActivationCaching("head"), Doubling())
    with CompositeHookingContextFactory(inner, ActivationCaching("act")).prepare(model) as hooked:
        y = hooked(x)
    assert sorted(hooked.cache.keys()) == ["act", "head"]
    assert torch.equal(hooked.cache["head"], y)


def test_a_composite_restores_the_model_and_can_be_entered_again(model, x):
    before = state_of(model)
    context = CompositeHookingContextFactory(Doubling(), ActivationCaching("head", directions=["fwd", "bwd"])).prepare(
        model
    )
    for _ in range(2):
        with context as hooked:
            hooked(x).sum().backward()
        assert sorted(context.cache.keys()) == ["bwd", "fwd"]
        model.zero_grad()
        assert state_of(model) == before


def test_a_composite_whose_second_child_fails_leaves_no_hook(model):
    before = state_of(model)
    with (
        pytest.raises(SelectionError),
        CompositeHookingContextFactory(Doubling(), ActivationCaching("nowhere")).prepare(model),
    ):
        pass
    assert state_of(model) == before


def test_pausing_a_composite_pauses_every_child(model, x):
    plain = model(x)
    with CompositeHookingContextFactory(Doubling(), ActivationCaching("head")).prepare(model) as hooked:
        with hooked.hooking_context.paused():
            assert torch.equal(hooked(x), plain)
            assert hooked.cache.is_empty()
        assert torch.equal(hooked(x), 2 * plain)
        assert torch.equal(hooked.cache["head"], 2 * plain)


def test_clearing_a_composite_clears_every_child(model, x):
    factory = CompositeHookingContextFactory(ActivationCaching("head"), ActivationCaching("act", reducer=Stack()))
    with factory.prepare(model) as hooked:
        hooked(x)
        hooked.hooking_context.clear()
        assert hooked.cache.is_empty()
        hooked(x)
    assert hooked.cache["act"].shape == (1, 5, 4)


def test_the_report_of_unfired_sites_comes_from_the_child_that_has_them(model, x):
    with (
        pytest.warns(UnfiredSiteWarning, match="'layers'; ModuleList"),
        CompositeHookingContextFactory(ActivationCaching("head"), ActivationCaching("layers")).prepare(model) as hooked,
    ):
        hooked(x)


def test_only_factories_can_be_composed():
    with pytest.raises(ContextError, match=r"made of factories such as ActivationCaching\(\.\.\.\), got 'head'"):
        CompositeHookingContextFactory("head")


def test_a_composite_shows_its_children():
    composite = CompositeHookingContextFactory(ActivationCaching("a"), ActivationCaching("b"))
    assert repr(composite) == (
        "CompositeHookingContextFactory("
        "ActivationCaching('a', directions=['fwd']), ActivationCaching('b', directions=['fwd']))"
    )
