"""Pausing and disabling: hooks are muted in place, and what recipes did to the model is undone and done again."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleWrapper
from torch import nn

from small_models import MLP
from tdcache import (
    ActivationCaching,
    CompositeHookingContextFactory,
    HookedModule,
    HookFactory,
    HookingContextFactory,
    MultiHookManager,
)
from user_recipes import TwoRuns


class Edit(HookingContextFactory):
    """Changes the output of the first module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def _hook_module(self, module):
        hook = HookFactory.make_setting_hook(None, callback=lambda output, **rest: self.function(output))
        return MultiHookManager("0").register_hook(module, lambda path: hook, relative_path=module.relative_path)


class OtherHead(HookingContextFactory):
    """Exchanges a module for the length of the context."""

    def _prepare_module(self, module, in_keys, out_keys, extra_relative_path):
        self.model = next(each for each in module.modules() if isinstance(each, MLP))
        self.head, self.model.head = self.model.head, nn.Identity()
        return module

    def _restore_module(self, module, in_keys, out_keys, extra_relative_path):
        self.model.head = self.head
        return module


@pytest.mark.parametrize("how", ["paused", "disable_context"])
def test_a_pause_keeps_the_order_of_edits(how):
    model = nn.Sequential(nn.Identity())
    x = torch.tensor([3.0])
    with Edit(lambda value: value + 1).prepare(model) as first, Edit(lambda value: value * 2).prepare(model):
        assert model(x).item() == 8
        with getattr(first, how)():
            assert model(x).item() == 6
        assert model(x).item() == 8


def test_nested_contexts_can_be_paused_one_in_the_other():
    model = nn.Sequential(nn.Identity())
    x = torch.tensor([3.0])
    with Edit(lambda value: value + 1).prepare(model) as first, Edit(lambda value: value * 2).prepare(model) as second:
        with second.paused(), first.paused():
            assert model(x).item() == 3
        assert model(x).item() == 8


def test_a_composite_can_be_paused_through_its_hooked_module():
    model = nn.Sequential(nn.Identity())
    x = torch.tensor([3.0])
    factory = CompositeHookingContextFactory(
        Edit(lambda value: value + 1), Edit(lambda value: value * 2), ActivationCaching("0")
    )
    with factory.prepare(model) as hooked:
        with hooked.paused():
            assert hooked(x).item() == 3
            assert hooked.cache.is_empty()
        assert hooked(x).item() == 8
        assert hooked.cache["0"].item() == 8


def test_a_composite_runs_the_model_its_way_after_it_was_disabled():
    model, x = MLP(), torch.randn(2, 4)
    factory = CompositeHookingContextFactory(TwoRuns(), ActivationCaching("head"))
    with factory.prepare(model) as hooked:
        before = hooked(TensorDict({"input": x}))["output"]
        with hooked.disable_context() as plain:
            assert plain is model
            assert torch.equal(plain(x), model(x))
        assert torch.equal(hooked(TensorDict({"input": x}))["output"], before)
    assert torch.equal(before, 2 * model(x))


def test_disabling_a_composite_undoes_what_children_prepared():
    model = MLP()
    head = model.head
    with CompositeHookingContextFactory(OtherHead(), ActivationCaching("act")).prepare(model) as hooked:
        assert model.head is not head
        with hooked.disable_context():
            assert model.head is head
        assert model.head is not head
    assert model.head is head


class Counting(HookedModule):
    """A user's hooked module."""

    def count(self):
        return 42


class Labelled(HookedModule):
    """Another one, with an argument."""

    def __init__(self, *args, label, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__["label"] = label


class WithClass(HookingContextFactory):
    _hooked_module_class = Counting


class WithArguments(HookingContextFactory):
    _hooked_module_class = Labelled

    def __init__(self):
        super().__init__()
        self._hooked_module_kwargs["label"] = "mine"


class WithSpawn(HookingContextFactory):
    def _spawn_hooked_module(self, prep_module, hooking_context, extra_relative_path):
        hooked = super()._spawn_hooked_module(prep_module, hooking_context, extra_relative_path)
        hooked.__dict__["spawned"] = True
        return hooked


@pytest.mark.parametrize("nested", [False, True])
def test_a_composite_yields_what_its_children_would(nested):
    factories = WithClass(), WithSpawn(), WithArguments(), ActivationCaching("head")
    factory = CompositeHookingContextFactory(*factories)
    if nested:
        factory = CompositeHookingContextFactory(factory, ActivationCaching("act"))
    model = MLP()
    with factory.prepare(model) as hooked:
        assert isinstance(hooked, Counting)
        assert isinstance(hooked, Labelled)
        assert hooked.count() == 42
        assert hooked.label == "mine"
        assert hooked.spawned
        y = hooked(torch.ones(1, 4))
    assert torch.equal(hooked.cache["head"], y)


def test_a_hooked_module_that_is_called_in_its_own_way_is_called_in_a_composite():
    class Halving(TensorDictModuleWrapper):
        def forward(self, *args):
            return self.td_module(*args) / 2

    class Wrapped(HookingContextFactory):
        def _spawn_hooked_module(self, prep_module, hooking_context, extra_relative_path):
            path = f"td_module.{extra_relative_path}"
            return super()._spawn_hooked_module(Halving(prep_module), hooking_context, path)

    model, x = MLP(), torch.ones(1, 4)
    with CompositeHookingContextFactory(Wrapped(), ActivationCaching("head")).prepare(model) as hooked:
        assert torch.equal(hooked(x), model(x) / 2)
        assert hooked.model is model
