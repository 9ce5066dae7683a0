"""The verbs directly on a hooked module: in force until the handle is removed."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from model_state import state_of
from small_models import by_hand
from tdcache import ActivationCaching, ContextError, DirectionError, HookedModule, HookingContextFactory, PathError


@pytest.fixture
def hooked(model):
    return HookedModule.from_module(model)


def test_a_value_is_set_until_the_handle_is_removed(hooked, model, x):
    before = state_of(model)
    plain, new = model(x), torch.randn(5, 4)
    handle = hooked.set("layers.2", new)
    expected = model.head(model.act(nn.functional.gelu(new)))
    assert torch.equal(hooked(x), expected)
    assert torch.equal(model(x), expected)
    handle.remove()
    handle.remove()
    assert torch.equal(hooked(x), plain)
    assert state_of(model) == before


def test_a_value_is_got_until_the_handle_is_removed(hooked, model, x):
    cache = TensorDict()
    handle, proxy = hooked.get(cache, "layers.1")
    assert proxy.resolve() is None
    for data in (x, x + 1):
        hooked(data)
        (expected,) = by_hand(model, ["layers.1"], lambda data=data: model(data))["layers.1"]
        assert torch.equal(proxy.resolve(), expected)
        assert proxy.resolve() is cache["layers.1_output"]
    handle.remove()
    hooked(x)
    assert torch.equal(proxy.resolve(), expected)


def test_values_are_saved_to_the_cache_of_the_context(model, x):
    with ActivationCaching("layers.0").prepare(model) as hooked:
        handle, proxy = hooked.save("head")
        hooked(x)
        handle.remove()
        assert hooked.cache["head_output"] is proxy.resolve()
    assert torch.equal(proxy.resolve(), model(x))


def test_without_a_context_save_needs_a_cache(hooked, x):
    with pytest.raises(ContextError, match="has no cache"):
        hooked.save("head")
    cache = TensorDict()
    handle, _ = hooked.save("head", cache=cache)
    hooked(x)
    handle.remove()
    assert "head_output" in cache


def test_inputs_and_gradients_have_forms_of_their_own(hooked, model, x):
    cache, leaf = TensorDict(), x.clone().requires_grad_()
    handles = [hooked.set_grad("layers.1", (torch.zeros(5, 4),)), hooked.set_grad_output("head", torch.ones(5, 2))]
    handles += [getattr(hooked, form)(cache, "layers.1")[0] for form in ("get_input", "get_grad", "get_grad_output")]
    handles += [hooked.save_input("head", cache=cache)[0], hooked.save_grad("head", cache=cache)[0]]
    handles += [hooked.save_grad_output("head", cache=cache)[0]]
    hooked(leaf).sum().backward()
    for handle in handles:
        handle.remove()
    assert torch.equal(leaf.grad, torch.zeros(5, 4))
    assert torch.equal(cache["layers.1_grad_input"], torch.zeros(5, 4))
    assert torch.equal(cache["head_grad_output"], torch.ones(5, 2))
    torch.testing.assert_close(cache["head_grad_input"], torch.ones(5, 2) @ model.head.weight)
    assert sorted(cache.keys()) == [
        "head_grad_input", "head_grad_output", "head_input",
        "layers.1_grad_input", "layers.1_grad_output", "layers.1_input",
    ]  # fmt: skip
    handle = hooked.set_input("head", torch.ones(5, 4))
    assert torch.equal(hooked(x), model.head(torch.ones(5, 4)))
    handle.remove()


def test_stop_ends_every_forward_until_it_is_removed(hooked, x):
    handle = hooked.stop("layers.0")
    assert hooked(x) is None
    assert "output" not in hooked(TensorDict({"input": x}))
    handle.remove()
    assert hooked(x).shape == (5, 2)


def test_a_wrong_path_or_direction_is_refused(hooked, model):
    before = state_of(model)
    for call in (
        lambda path, **kw: hooked.get(TensorDict(), path, **kw),
        lambda path, **kw: hooked.set(path, 1.0, **kw),
    ):
        with pytest.raises(PathError, match=r"'module.missing' names none"):
            call("module.missing")
        with pytest.raises(DirectionError, match="unknown direction 'invalid'"):
            call("head", direction="invalid")
    with pytest.raises(PathError):
        hooked.stop("missing")
    assert state_of(model) == before


def test_the_arguments_may_be_given_by_position(hooked, model, x):
    """Their order is that of tdhook 0.1.3."""
    cache = TensorDict()
    handle, _ = hooked.get(cache, "head", "kept", lambda **kwargs: kwargs["output"] * 2, "fwd", False, True)
    edit = hooked.set("head", 3.0, lambda **kwargs: kwargs["output"] * kwargs["value"], "fwd", False, True)
    assert torch.equal(hooked(x), model.head(model.act(nn.functional.gelu(model.layers[2](hidden(model, x))))) * 1.0)
    assert torch.equal(cache["kept"], hooked(x) * 2)
    handle.remove()
    edit.remove()


def hidden(model, x):
    for layer in model.layers[:2]:
        x = nn.functional.gelu(layer(x))
    return x


def test_the_verbs_work_inside_a_context(model, x):
    with HookingContextFactory().prepare(model) as hooked:
        handle = hooked.set("head", torch.zeros(5, 2))
        assert torch.equal(hooked(x), torch.zeros(5, 2))
        handle.remove()
        assert torch.equal(hooked(x), model(x))


def test_a_tensordict_module_is_read_and_written_by_its_own_result(x):
    first = TensorDictModule(nn.Linear(4, 4), in_keys=["x"], out_keys=["h"])
    second = TensorDictModule(nn.Linear(4, 2), in_keys=["h"], out_keys=["y"])
    hooked = HookedModule.from_module(TensorDictSequential(first, second))
    data, new = TensorDict({"x": x}), torch.randn(5, 4)
    with hooked.run(data) as run:
        run.set("module.0", new)
        run.get("module.0")
    assert torch.equal(data["y"], second.module(new))
    assert torch.equal(run.cache["module.0_output"], new)
