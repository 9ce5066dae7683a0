"""``stop_early``: the forward ends once every selected site has fired."""

import pytest
import torch
from tensordict import TensorDict

from tdcache import (
    ActivationCaching,
    CompositeHookingContextFactory,
    DirectionError,
    HookFactory,
    StopForward,
    cache_activations,
)


@pytest.fixture
def ran(model):
    """The paths of the modules that ran to their end, in order."""
    paths = []
    for path, module in model.named_modules():
        module.register_forward_hook(lambda *args, path=path: paths.append(path))
    return paths


def test_later_layers_do_not_run(model, x, ran):
    with ActivationCaching(r"layers\.[01]", stop_early=True).prepare(model) as hooked:
        hooked(x)
    assert ran == ["layers.0", "layers.1"]
    assert sorted(hooked.cache.keys()) == ["layers.0", "layers.1"]


def test_the_values_are_those_of_a_full_forward(model, x):
    with ActivationCaching(r"layers\.[01]").prepare(model) as full:
        full(x)
    with ActivationCaching(r"layers\.[01]", stop_early=True).prepare(model) as hooked:
        hooked(x)
        assert (hooked.cache == full.cache).all()
    assert (hooked.cache == full.cache).all()


def test_a_stopped_call_returns_no_output(model, x):
    data = TensorDict({"input": x})
    with ActivationCaching(r"layers\.0", stop_early=True).prepare(model) as hooked:
        assert hooked(x) is None
        assert hooked(data) is data
    assert list(data.keys()) == ["input"]


def test_a_plain_call_of_the_model_lets_the_stop_through_and_the_next_forward_is_fine(model, x):
    with ActivationCaching(r"layers\.0", stop_early=True).prepare(model) as hooked:
        with pytest.raises(StopForward, match=r"'layers\.0'") as caught:
            model(x)
        assert caught.value.key == "layers.0"
        assert torch.equal(hooked.cache["layers.0"], model.layers[0](x))
        hooked(2 * x)
        assert torch.equal(hooked.cache["layers.0"], model.layers[0](2 * x))
    assert model(x).shape == (5, 2)


def test_the_stop_is_no_exception_that_a_model_could_swallow():
    assert not issubclass(StopForward, Exception)


def test_inputs_alone_stop_before_the_module_runs(model, x, ran):
    with ActivationCaching(r"layers\.1", directions=["fwd_pre"], stop_early=True).prepare(model) as hooked:
        hooked(x)
    assert ran == ["layers.0"]
    assert torch.equal(hooked.cache["layers.1"], torch.nn.functional.gelu(model.layers[0](x)))


def test_every_forward_stops(model, x, ran):
    with ActivationCaching(r"layers\.0", stop_early=True).prepare(model) as hooked:
        for _ in range(3):
            hooked(x)
    assert ran == ["layers.0"] * 3


def test_the_state_of_the_root_is_sane_after_a_stop(model, x):
    with ActivationCaching(r"layers\.0", stop_early=True).prepare(model) as stopped:
        stopped(x)
        with ActivationCaching("head").prepare(model) as other, stopped.hooking_context.paused():
            y = other(x)
            assert torch.equal(other.cache["head"], y)


def test_an_outer_context_keeps_what_it_saw_before_the_stop(model, x):
    with ActivationCaching(r"layers\.\d").prepare(model) as outer:
        with ActivationCaching(r"layers\.1", stop_early=True).prepare(model) as inner:
            inner(x)
        assert sorted(outer.cache.keys()) == ["layers.0", "layers.1"]
        outer(x)
        assert len(outer.cache.keys()) == 3


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre", "grad_in"])
def test_gradients_cannot_be_had_from_a_stopped_forward(direction):
    with pytest.raises(DirectionError, match=f"{direction!r}; leave one of them out"):
        ActivationCaching("head", directions=["fwd", direction], stop_early=True)


def test_a_site_that_never_fires_lets_the_forward_run_to_its_end(model, x):
    with (
        pytest.warns(UserWarning, match="'layers'"),
        ActivationCaching(r"layers|layers\.0", stop_early=True).prepare(model) as hooked,
    ):
        assert hooked(x).shape == (5, 2)


def test_a_block_that_a_plain_call_stops_ends_quietly(model, x, ran):
    with cache_activations(model, r"layers\.0", stop_early=True) as cache:
        model(x)
        raise AssertionError("the stop ends the block")
    assert ran == ["layers.0"]
    assert torch.equal(cache["layers.0"], model.layers[0](x))


@pytest.mark.parametrize("stopping_first", [True, False])
def test_the_stop_of_one_context_passes_through_the_others(model, x, stopping_first):
    stopping, other = ActivationCaching(r"layers\.1", stop_early=True), ActivationCaching(r"layers\.0")
    outer, inner = (stopping, other) if stopping_first else (other, stopping)
    with outer.prepare(model) as first, inner.prepare(model) as second:
        model(x)
    assert sorted((*first.cache.keys(), *second.cache.keys())) == ["layers.0", "layers.1"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_composite_swallows_the_stop_of_a_child(model, x, nested):
    factory = CompositeHookingContextFactory(
        ActivationCaching(r"layers\.1", stop_early=True), ActivationCaching(r"layers\.0")
    )
    if nested:
        factory = CompositeHookingContextFactory(factory, ActivationCaching(r"layers\.2", allow_empty=True))
    with factory.prepare(model) as hooked:
        model(x)
    assert {"layers.0", "layers.1"} == set(hooked.cache.keys())


def test_a_stop_of_somebody_else_is_not_swallowed(model, x):
    hook = HookFactory.make_stopping_hook("layers.0")
    handle = model.layers[0].register_forward_hook(hook)
    with pytest.raises(StopForward, match=r"'layers\.0'"), ActivationCaching("act").prepare(model):
        model(x)
    handle.remove()
