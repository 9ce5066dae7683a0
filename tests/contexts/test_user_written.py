"""Recipes that users write: as they were written for tdhook 0.1.3, with only the import renamed, and newer ones."""

import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from model_state import state_of
from tdcache import (
    CacheProxy,
    CompositeHookingContextFactory,
    ContextError,
    HookDirection,
    HookedModule,
    HookFactory,
    HookingContext,
    HookingContextFactory,
    HookingContextWithCache,
    MultiHookHandle,
    MultiHookManager,
)


class RootHook(HookingContextFactory):
    """One hook at the root, as a tdhook test has it."""

    def __init__(self, hook, direction="fwd"):
        super().__init__()
        self._hook = hook
        self._direction = direction

    def _hook_module(self, module):
        return MultiHookHandle([module.register_submodule_hook("", self._hook, direction=self._direction)])


class OldCaching(HookingContextFactory):
    """The body of tdhook's own ActivationCaching, line for line."""

    _hooking_context_class = HookingContextWithCache

    def __init__(self, key_pattern, cache=None, clear_cache=True, directions=None, callback=None):
        super().__init__()
        self._hooking_context_kwargs["cache"] = cache
        self._hooking_context_kwargs["clear_cache"] = clear_cache
        self._hook_manager = MultiHookManager(key_pattern)
        self._directions = directions or ["fwd"]
        self._callback = callback

    def _hook_module(self, module):
        cache = module.hooking_context.cache

        def hook_factory(name: str, direction: HookDirection):
            nonlocal self, cache
            key = (direction, name) if len(self._directions) > 1 else name
            return HookFactory.make_caching_hook(key, cache, direction=direction, callback=self._callback)

        handles = []
        for direction in self._directions:
            handles.append(  # noqa: PERF401  as it was written
                self._hook_manager.register_hook(
                    module,
                    (lambda name: hook_factory(name, direction)),  # noqa: B023
                    direction=direction,
                    relative_path=module.relative_path,
                )
            )
        return MultiHookHandle(handles)


class Replacing(HookingContextFactory):
    """Prepares another module and restores the first, as tdhook's own methods do."""

    def __init__(self):
        super().__init__()
        self.events = []

    def _prepare_module(self, module, in_keys, out_keys, extra_relative_path):
        self.events.append(("prepare", list(in_keys), list(out_keys), extra_relative_path))
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return module

    def _restore_module(self, module, in_keys, out_keys, extra_relative_path):
        self.events.append(("restore", list(in_keys), list(out_keys), extra_relative_path))
        for parameter in module.parameters():
            parameter.requires_grad_(True)
        return module


def test_a_hook_at_the_root_replaces_the_output(model, x):
    plain = model(x)
    wanted = plain + 1
    with RootHook(lambda module, args, output: output + 1).prepare(model) as hooked:
        assert isinstance(hooked, HookedModule)
        assert torch.equal(hooked(x), wanted)
        assert torch.equal(hooked(TensorDict({"input": x}, batch_size=5))["output"], wanted)
    assert torch.equal(model(x), plain)


def test_a_hook_at_the_root_of_a_tensordict_module_sees_tensordicts(model, x):
    seen = []
    module = TensorDictModule(model, in_keys=["x"], out_keys=["y"])
    with RootHook(lambda module, args, output: seen.append(type(output))).prepare(module) as hooked:
        hooked(TensorDict({"x": x}, batch_size=5))
    assert seen == [TensorDict]


def test_the_old_caching_recipe_runs_as_it_was_written(model, x):
    with OldCaching(r"layers\.\d").prepare(model) as hooked:
        y = hooked(TensorDict({"input": x}, batch_size=5))["output"]
    assert torch.equal(y, model(x))
    assert sorted(hooked.cache.keys()) == ["layers.0", "layers.1", "layers.2"]
    assert torch.equal(hooked.cache["layers.0"], model.layers[0](x))


def test_the_old_caching_recipe_writes_to_a_given_cache_and_clears_it(model, x):
    cache = TensorDict({"old": torch.zeros(1)})
    with OldCaching("head", cache=cache).prepare(model) as hooked:
        y = hooked(x)
        assert hooked.hooking_context.cache is cache
    assert list(cache.keys()) == ["head"]
    assert torch.equal(cache["head"], y)
    with OldCaching("act", cache=cache, clear_cache=False).prepare(model) as hooked:
        hooked(x)
    assert sorted(cache.keys()) == ["act", "head"]
    hooked.hooking_context.clear()
    assert cache.is_empty()


def test_the_old_caching_recipe_gets_gradients_with_a_callback(model, x):
    callback = lambda **named: named.get("output", named.get("grad_output", (None,))[0])  # noqa: E731
    with OldCaching("head", directions=["fwd", "bwd"], callback=callback).prepare(model) as hooked:
        y = hooked(x)
        y.sum().backward()
    assert torch.equal(hooked.cache["fwd", "head"], y)
    assert torch.equal(hooked.cache["bwd", "head"], torch.ones(5, 2))


def test_prepare_without_a_context_and_restore(model, x):
    plain = model(x)
    hooked = RootHook(lambda module, args, output: output + 1).prepare(model, return_context=False)
    assert torch.equal(hooked(x), plain + 1)
    hooked.restore()
    assert torch.equal(model(x), plain)


def test_a_module_is_prepared_on_entering_and_restored_on_leaving(model, x):
    factory = Replacing()
    with factory.prepare(model, in_keys=["a"], out_keys=["b"]) as hooked:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert "b" in hooked(TensorDict({"a": x}))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert factory.events == [("prepare", ["a"], ["b"], "module"), ("restore", ["a"], ["b"], "module")]


def test_disable_hooks_and_disable_as_a_tdhook_script_uses_them(model, x):
    plain = model(x)
    factory = RootHook(lambda module, args, output: output + 1)
    with factory.prepare(model) as hooked:
        with hooked.hooking_context.disable_hooks():
            assert torch.equal(hooked(x), plain)
        with hooked.hooking_context.disable() as own:
            assert own is model
            assert torch.equal(own(x), plain)
        assert torch.equal(hooked(x), plain + 1)


@pytest.mark.parametrize("installed_by", ["tdcache", "torch"])
def test_a_recipe_may_return_the_handle_of_its_one_hook(model, x, installed_by):
    def one_more(module, args, output):
        return output + 1

    class One(HookingContextFactory):
        def _hook_module(self, module):
            if installed_by == "torch":
                return module.model.register_forward_hook(one_more)
            return module.register_submodule_hook("", one_more)

    plain, before = model(x), state_of(model)
    with CompositeHookingContextFactory(One(), One()).prepare(model) as hooked:
        with hooked.disable_context() as own:
            assert torch.equal(own(x), plain)
        with hooked.paused():
            assert torch.equal(hooked(x), plain)
        assert torch.equal(hooked(x), plain + 1 + 1)
    assert state_of(model) == before


def test_a_recipe_that_returns_no_handle_is_told_what_to_return(model):
    class Forgetful(HookingContextFactory):
        def _hook_module(self, module):
            return None

    with (
        pytest.raises(
            ContextError,
            match=r"^Forgetful\._hook_module returned None, which cannot remove its hooks: return a "
            r"MultiHookHandle, or the handle of the one hook",
        ),
        Forgetful().prepare(model),
    ):
        pass


def test_disable_restores_the_module_and_prepares_it_again(model):
    factory = Replacing()
    with factory.prepare(model) as hooked:
        with hooked.disable_context():
            assert all(parameter.requires_grad for parameter in model.parameters())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [event[0] for event in factory.events] == ["prepare", "restore", "prepare", "restore"]


def test_a_context_class_of_ones_own_is_used(model, x):
    class Counting(HookingContext):
        entered = 0

        def __enter__(self):
            type(self).entered += 1
            return super().__enter__()

    class Counted(HookingContextFactory):
        _hooking_context_class = Counting

    with Counted().prepare(model) as hooked:
        hooked(x)
    assert Counting.entered == 1


def test_a_hooked_module_class_of_ones_own_is_used_with_its_arguments(model, x):
    class Named(HookedModule):
        def __init__(self, *args, label, **kwargs):
            super().__init__(*args, **kwargs)
            self.label = label

    class Naming(HookingContextFactory):
        _hooked_module_class = Named

        def __init__(self):
            super().__init__()
            self._hooked_module_kwargs["label"] = "mine"

    with Naming().prepare(model) as hooked:
        assert hooked.label == "mine"
        assert hooked(x).shape == (5, 2)


def test_a_recipe_that_does_not_call_super_init_works(model, x):
    class Careless(HookingContextFactory):
        def __init__(self):
            pass

        def _hook_module(self, module):
            return MultiHookHandle([module.register_submodule_hook("head", lambda module, args, output: 2 * output)])

    wanted = 2 * model(x)
    with Careless().prepare(model) as hooked:
        assert torch.equal(hooked(x), wanted)


def test_a_recipe_without_a_cache_has_none(model):
    with (
        RootHook(lambda module, args, output: None).prepare(model) as hooked,
        pytest.raises(ContextError, match="has no cache"),
    ):
        hooked.cache  # noqa: B018


def test_a_recipe_may_pass_one_sites_value_to_another(model, x):
    class Copying(HookingContextFactory):
        _hooking_context_class = HookingContextWithCache

        def _hook_module(self, module):
            cache = module.hooking_context.cache
            save = HookFactory.make_caching_hook("saved", cache)
            load = HookFactory.make_setting_hook(CacheProxy("saved", cache))
            return MultiHookHandle(
                [module.register_submodule_hook("layers.0", save), module.register_submodule_hook("layers.1", load)]
            )

    with Copying().prepare(model) as hooked:
        hooked(x)
        seen = []
        model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
        hooked(x)
    assert torch.equal(seen[0], model.layers[0](x))


def test_a_recipe_may_stop_the_forward(model, x):
    class Stopping(HookingContextFactory):
        def _hook_module(self, module):
            return MultiHookHandle(
                [module.register_submodule_hook("layers.0", HookFactory.make_stopping_hook("layers.0"))]
            )

    ran = []
    model.layers[1].register_forward_hook(lambda *args: ran.append(1))
    with Stopping().prepare(model) as hooked:
        assert hooked(x) is None
    assert ran == []


class Frozen(HookingContextFactory):
    """A recipe that changes the model while it is open, and puts back exactly what was there."""

    def _prepare_module(self, module, in_keys, out_keys, extra_relative_path):
        self._before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        module.requires_grad_(False)
        return module

    def _restore_module(self, module, in_keys, out_keys, extra_relative_path):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(self._before[name])
        return module


def test_recipes_of_users_compose(model, x):
    model.layers[0].requires_grad_(False)
    before = state_of(model)
    with CompositeHookingContextFactory(
        Frozen(), OldCaching("head"), RootHook(lambda module, args, output: -output)
    ).prepare(model) as hooked:
        y = hooked(x)
        assert not y.requires_grad
    assert torch.equal(hooked.cache["head"], -y)
    assert state_of(model) == before


def test_a_users_recipe_survives_pickling(model, x):
    factory = pickle.loads(pickle.dumps(OldCaching("head")))
    with factory.prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["head"], y)


def test_keys_a_tensordict_module_does_not_have_are_refused(model):
    module = TensorDictModule(model, in_keys=["x"], out_keys=["y"])
    with pytest.raises(ContextError, match=r"in_keys=\['z'\].*has \['x'\]"):
        Replacing().prepare(module, in_keys=["z"])
    with pytest.raises(ContextError, match=r"out_keys=\['z'\].*has \['y'\]"):
        Replacing().prepare(module, out_keys=["z"])


class OnlyRestores(HookingContextFactory):
    def __init__(self):
        super().__init__()
        self.restored = []

    def _restore_module(self, module, in_keys, out_keys, extra_relative_path):
        self.restored.append(module)
        return module


def test_a_recipe_that_only_restores_is_asked_once_on_leaving(model, x):
    factory = OnlyRestores()
    with factory.prepare(model) as hooked:
        called = hooked.td_module
        assert factory.restored == []
    assert len(factory.restored) == 1
    assert factory.restored[0] is called
