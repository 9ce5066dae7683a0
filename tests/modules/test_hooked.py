"""The callable that a context yields, and hooks of one's own on it."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from tdcache import ActivationCaching, ContextError, HookedModule, HookSignatureError, PathError, TdcacheWarning


def test_a_tensordict_in_gives_the_same_tensordict_out(model, x):
    data = TensorDict({"input": x, "other": x}, batch_size=5)
    with ActivationCaching("head").prepare(model) as hooked:
        assert hooked(data) is data
    assert torch.equal(data["output"], model(x))
    assert sorted(data.keys()) == ["input", "other", "output"]


def test_tensors_in_give_the_models_own_result(model, x):
    with ActivationCaching("head").prepare(model) as hooked:
        y = hooked(x)
    assert type(y) is torch.Tensor
    assert torch.equal(y, model(x))


def test_in_keys_and_out_keys_name_the_entries(model, x):
    with ActivationCaching("head").prepare(model, in_keys=["x"], out_keys=["y"]) as hooked:
        assert (hooked.in_keys, hooked.out_keys) == (["x"], ["y"])
        assert torch.equal(hooked(TensorDict({"x": x}))["y"], model(x))


def test_the_relative_path_leads_from_the_hooked_module_to_the_model(model):
    with ActivationCaching("head").prepare(model) as hooked:
        assert hooked.get_submodule(hooked.relative_path) is model
        assert hooked.model is model


def test_the_relative_path_of_a_tensordict_module(model, x):
    module = TensorDictModule(model, in_keys=["x"], out_keys=["y"])
    with ActivationCaching("module.head").prepare(module) as hooked:
        assert hooked.relative_path == "td_module"
        assert hooked.model is module
        y = hooked(TensorDict({"x": x}))["y"]
    assert torch.equal(hooked.cache["module.head"], y)


def test_a_hooked_module_without_a_context_runs_and_takes_hooks(model, x):
    plain = model(x)
    hooked = HookedModule.from_module(model, in_keys=["x"], out_keys=["y"])
    handle = hooked.register_submodule_hook("head", lambda module, args, output: output + 1)
    assert torch.equal(hooked(TensorDict({"x": x}))["y"], plain + 1)
    handle.remove()
    assert torch.equal(hooked(x), plain)
    with pytest.raises(ContextError, match="has no cache"):
        hooked.cache  # noqa: B018
    with pytest.raises(ContextError, match="has no context"):
        hooked.restore()


def test_a_tensordict_module_is_taken_as_it_is(model):
    module = TensorDictModule(model, in_keys=["x"], out_keys=["y"])
    hooked = HookedModule.from_module(module)
    assert hooked.model is module
    assert hooked.in_keys == ["x"]


@pytest.mark.parametrize("key", ["layers.1", "layers[1]", "layers[-2]"])
def test_a_hook_is_registered_by_path(model, x, key):
    seen = []
    with ActivationCaching("head").prepare(model) as hooked:
        handle = hooked.register_submodule_hook(key, lambda module, args, output: seen.append(module))
        hooked(x)
        handle.remove()
        hooked(x)
    assert seen == [model.layers[1]]


def test_a_path_relative_to_the_wrapper(model, x):
    seen = []
    hooked = HookedModule.from_module(model)
    hooked.register_submodule_hook("td_module.module.head", lambda *args: seen.append(args[0]), relative=False)
    hooked(x)
    assert seen == [model.head]


def test_a_hook_in_front_of_those_there(model, x):
    seen = []
    hooked = HookedModule.from_module(model)
    for name, prepend in (("second", False), ("third", False), ("first", True)):
        hooked.register_submodule_hook("head", lambda *args, name=name: seen.append(name), prepend=prepend)
    hooked(x)
    assert seen == ["first", "second", "third"]


def test_a_wrong_path_names_the_near_ones(model):
    hooked = HookedModule.from_module(model)
    with pytest.raises(PathError, match=r"'layer.0' names none.*did you mean 'layers.0'"):
        hooked.register_submodule_hook("layer.0", lambda module, args, output: None)


def test_a_hook_with_the_wrong_parameters_is_refused_when_it_is_registered(model):
    hooked = HookedModule.from_module(model)
    with pytest.raises(HookSignatureError, match=r"called as hook\(module, args, output\).*takes \(module, args\)"):
        hooked.register_submodule_hook("head", lambda module, args: None)
    assert not model.head._forward_hooks


def test_a_hook_on_a_container_says_that_it_is_never_called(model):
    hooked = HookedModule.from_module(model)
    with pytest.warns(TdcacheWarning, match="'layers' is a ModuleList, which is never called"):
        hooked.register_submodule_hook("layers", lambda module, args, output: None)


def test_wrapping_does_not_touch_the_models_own_names(model):
    before = dict(model.named_modules())
    with ActivationCaching("head").prepare(model):
        assert dict(model.named_modules()) == before


def test_the_hooked_module_shows_its_keys(model):
    with ActivationCaching("head").prepare(model, in_keys=["x"]) as hooked:
        assert "in_keys=['x']" in repr(hooked)
        assert repr(hooked).startswith("HookedModule(")


@pytest.mark.parametrize("name", ["paused", "disable_hooks"])
def test_a_hooked_module_pauses_its_context(name):
    model = nn.Sequential(nn.Linear(2, 2))
    with ActivationCaching("0").prepare(model) as hooked:
        hooked(torch.ones(1, 2))
        kept = hooked.cache["0"].clone()
        with getattr(hooked, name)():
            hooked(torch.zeros(1, 2))
        assert torch.equal(hooked.cache["0"], kept)
        hooked(torch.zeros(1, 2))
        assert torch.equal(hooked.cache["0"], model[0].bias[None])


def test_what_the_wrapper_does_not_have_is_the_models():
    class Speaks(nn.Linear):
        def generate(self, x):
            return self(x)

    model = nn.Sequential(Speaks(2, 2))
    model.generate = model[0].generate
    with ActivationCaching("0").prepare(model) as hooked:
        y = hooked.generate(torch.ones(1, 2))
        assert torch.equal(hooked.cache["0"], y)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            hooked.nothing  # noqa: B018


def test_no_hook_is_added_through_a_closed_context():
    model = nn.Sequential(nn.Linear(2, 2))
    with ActivationCaching("0").prepare(model) as hooked:
        hooked(torch.ones(1, 2))
    for add in (lambda: hooked.set("0", 0), lambda: hooked.stop("0")):
        with pytest.raises(ContextError, match="closed"):
            add()
    assert not model[0]._forward_hooks
