"""Entering, leaving, nesting, pausing: what a context does to a model, and what it never does."""

import warnings

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from model_state import state_of
from small_models import by_hand
from stable_ids import stable_id
from tdcache import (
    ActivationCaching,
    ContextError,
    HookFactory,
    HookingContext,
    HookingContextFactory,
    HookingContextWithCache,
    MultiHookHandle,
    MultiHookManager,
    Stack,
)


class Scaling(HookingContextFactory):
    """Multiplies the output of every matching module."""

    def __init__(self, pattern, by, prepend=False):
        super().__init__()
        self.pattern, self.by, self.prepend = pattern, by, prepend

    def _hook_module(self, module):
        hook = HookFactory.make_setting_hook(None, callback=lambda output, **rest: self.by * output)
        manager = MultiHookManager(self.pattern)
        return manager.register_hook(
            module, lambda path: hook, prepend=self.prepend, relative_path=module.relative_path
        )


# One context


def test_prepare_gives_a_context_and_with_a_hooked_module(model, x):
    context = ActivationCaching("head").prepare(model)
    assert isinstance(context, HookingContextWithCache)
    assert isinstance(context, HookingContext)
    with context as hooked:
        assert hooked.hooking_context is context
        assert hooked.model is model


def test_preparing_alone_touches_nothing(model):
    before = state_of(model)
    ActivationCaching(".*").prepare(model)
    assert state_of(model) == before


def test_every_way_of_calling_captures(model, x):
    with ActivationCaching("head").prepare(model) as hooked:
        for call in (lambda x: hooked(x), lambda x: model(x), lambda x: hooked(TensorDict({"input": x}))["output"]):
            x = x + 1
            y = call(x)
            assert torch.equal(hooked.cache["head"], y)


def test_the_cache_stays_readable_after_the_block(model, x):
    context = ActivationCaching("head").prepare(model)
    with context as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["head"], y)
    assert torch.equal(context.cache["head"], y)


def test_a_context_can_be_entered_again_after_it_was_left(model, x):
    context = ActivationCaching("head").prepare(model)
    for _ in range(3):
        x = x + 1
        with context as hooked:
            y = hooked(x)
            assert len(model.head._forward_hooks) == 1
        assert torch.equal(context.cache["head"], y)
        assert len(model.head._forward_hooks) == 0


def test_entering_again_starts_with_an_empty_cache(model, x):
    context = ActivationCaching("head").prepare(model)
    with context as hooked:
        hooked(x)
    with context as hooked:
        assert hooked.cache.is_empty()


def test_entering_again_after_the_model_changed_selects_anew(x):
    model = nn.Sequential(nn.Linear(4, 4))
    context = ActivationCaching(r"\d").prepare(model)
    with context as hooked:
        hooked(x)
    model.append(nn.Linear(4, 4))
    with context as hooked:
        hooked(x)
    assert sorted(context.cache.keys()) == ["0", "1"]
    model[0] = nn.Linear(4, 4)
    with context as hooked:
        hooked(x)
    assert torch.equal(context.cache["0"], model[0](x))


def test_entering_inside_itself_is_an_error_and_leaves_the_open_one_alone(model, x):
    context = ActivationCaching("head").prepare(model)
    with context as hooked:
        with pytest.raises(ContextError, match="not inside itself"):
            context.__enter__()
        y = hooked(x)
        assert torch.equal(hooked.cache["head"], y)
    assert not model.head._forward_hooks


def test_a_hooked_module_cannot_be_called_after_exit(model, x):
    with ActivationCaching("head").prepare(model) as hooked:
        pass
    with pytest.raises(ContextError, match="closed"):
        hooked(x)
    with pytest.raises(ContextError, match="closed"), hooked.hooking_context.paused():
        pass


def test_a_backward_after_exit_writes_nothing(model, x):
    with ActivationCaching("head|layers.0", directions=["fwd", "bwd", "grad_in"]).prepare(model) as hooked:
        y = hooked(x.requires_grad_())
        y.sum().backward(retain_graph=True)
    before = hooked.cache.clone()
    model.zero_grad()
    (3 * y).sum().backward()
    assert (hooked.cache == before).all()


def test_a_backward_of_a_closed_context_writes_nothing_into_a_later_entry(model, x):
    context = ActivationCaching("head", directions=["bwd"]).prepare(model)
    with context as hooked, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = hooked(x)
        hooked.hooking_context.clear()
        hooked(x).sum().backward()
    with context as hooked:
        y.sum().backward()
        assert hooked.cache.is_empty()


def test_preparing_something_that_is_no_module_is_an_error():
    with pytest.raises(ContextError, match=r"takes an nn\.Module, got function"):
        ActivationCaching("head").prepare(lambda x: x)


def test_a_context_shows_its_state(model):
    context = ActivationCaching("head").prepare(model)
    assert repr(context) == "<closed HookingContextWithCache of ActivationCaching('head', directions=['fwd']) on MLP>"
    with context:
        assert repr(context).startswith("<open ")


def test_without_a_with_block_restore_leaves(model, x):
    before = state_of(model)
    hooked = ActivationCaching("head").prepare(model, return_context=False)
    y = hooked(x)
    hooked.restore()
    assert torch.equal(hooked.cache["head"], y)
    assert state_of(model) == before
    with pytest.raises(ContextError, match="closed"):
        hooked.restore()


def test_restore_inside_a_with_block_is_an_error(model):
    with (
        ActivationCaching("head").prepare(model) as hooked,
        pytest.raises(ContextError, match="belongs to a with block"),
    ):
        hooked.restore()


# Several contexts on one model


def test_two_contexts_both_take_part_in_one_forward(model, x):
    with ActivationCaching("head").prepare(model) as one, ActivationCaching(r"layers\.\d|head").prepare(model) as two:
        y = model(x)
    assert torch.equal(one.cache["head"], y)
    assert torch.equal(two.cache["head"], y)
    assert len(two.cache.keys()) == 4


def test_two_contexts_of_one_recipe_are_independent(model, x):
    factory = ActivationCaching("head", reducer=Stack())
    with factory.prepare(model) as one:
        model(x)
        with factory.prepare(model) as two:
            model(x)
        model(x)
    assert one.cache["head"].shape[0] == 3
    assert two.cache["head"].shape[0] == 1


def test_a_hooked_module_can_be_prepared_again(model, x):
    with ActivationCaching("head").prepare(model) as outer, ActivationCaching(r"layers\.0").prepare(outer) as inner:
        y = inner(x)
        assert inner.model is model
    assert torch.equal(outer.cache["head"], y)
    assert list(inner.cache.keys()) == ["layers.0"]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (1, 2, 0)], ids=stable_id)
def test_contexts_may_be_left_in_any_order_and_remove_only_their_own_hooks(model, x, order):
    before = state_of(model)
    contexts = [ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) for _ in range(3)]
    for context in contexts:
        context.__enter__()
    still_open = set(range(3))
    for number in order:
        x = x + 1
        y = model(x)
        y.sum().backward()
        for index in still_open:
            assert torch.equal(contexts[index].cache["fwd", "head"], y)
        contexts[number].__exit__(None, None, None)
        still_open.discard(number)
    model.zero_grad()
    assert state_of(model) == before


def test_foreign_hooks_stay_where_they_are(model, x):
    calls = []
    model.head.register_forward_hook(lambda *args: calls.append("first"))
    model.head.register_forward_hook(lambda *args, **kwargs: calls.append("second"), with_kwargs=True, always_call=True)
    model.head.register_forward_pre_hook(lambda *args: calls.append("before"))
    before = state_of(model)
    with ActivationCaching("head", directions=["fwd", "fwd_pre", "bwd", "grad_in"]).prepare(model) as hooked:
        hooked(x.requires_grad_()).sum().backward()
    model.zero_grad()
    assert calls == ["before", "first", "second"]
    assert state_of(model) == before


def test_a_hook_added_inside_the_block_survives_it(model, x):
    calls = []
    with ActivationCaching("head").prepare(model) as hooked:
        model.head.register_forward_hook(lambda *args: calls.append("kept"))
        hooked(x)
    model(x)
    assert calls == ["kept", "kept"]


# Edits and captures


@pytest.mark.parametrize("capture_first", [True, False])
def test_edits_come_before_captures_whatever_the_order_of_entering(model, x, capture_first):
    capture, edit = ActivationCaching("layers.1"), Scaling("layers.1", 2.0)
    raw = by_hand(model, ["layers.1"], lambda: model(x))["layers.1"][0]
    first, second = (capture, edit) if capture_first else (edit, capture)
    with first.prepare(model) as one, second.prepare(model) as two:
        model(x)
    cache = (one if capture_first else two).cache
    assert torch.equal(cache["layers.1"], 2 * raw)


@pytest.mark.parametrize("capture_first", [True, False])
def test_prepend_captures_the_value_before_edits(model, x, capture_first):
    capture, edit = ActivationCaching("layers.1", prepend=True), Scaling("layers.1", 2.0)
    raw = by_hand(model, ["layers.1"], lambda: model(x))["layers.1"][0]
    first, second = (capture, edit) if capture_first else (edit, capture)
    with first.prepare(model) as one, second.prepare(model) as two:
        model(x)
    cache = (one if capture_first else two).cache
    assert torch.equal(cache["layers.1"], raw)


@pytest.mark.parametrize("capture_first", [True, False])
def test_edits_of_inputs_come_before_captures_of_inputs(model, x, capture_first):
    class Shift(HookingContextFactory):
        def _hook_module(self, module):
            hook = HookFactory.make_setting_hook(
                None, callback=lambda args, **rest: (args[0] + 1,), direction="fwd_pre"
            )
            return MultiHookHandle([module.register_submodule_hook("head", hook, direction="fwd_pre")])

    capture = ActivationCaching("head", directions=["fwd_pre"])
    first, second = (capture, Shift()) if capture_first else (Shift(), capture)
    with capture.prepare(model) as plain:
        model(x)
    with first.prepare(model) as one, second.prepare(model) as two:
        model(x)
    assert torch.equal((one if capture_first else two).cache["head"], plain.cache["head"] + 1)


@pytest.mark.parametrize("capture_first", [True, False])
def test_edits_of_gradients_come_before_captures_of_gradients(model, x, capture_first):
    class ScaleGradient(HookingContextFactory):
        def _hook_module(self, module):
            hook = lambda module, grad_output: (3 * grad_output[0],)  # noqa: E731
            return MultiHookHandle([module.register_submodule_hook("head", hook, direction="bwd_pre")])

    capture = ActivationCaching("head", directions=["bwd"])
    first, second = (capture, ScaleGradient()) if capture_first else (ScaleGradient(), capture)
    with first.prepare(model) as one, second.prepare(model) as two:
        model(x).sum().backward()
    assert torch.equal((one if capture_first else two).cache["head"], torch.full((5, 2), 3.0))
    assert torch.equal(model.head.bias.grad, torch.full((2,), 15.0))


def test_captures_at_the_final_value_share_memory_with_what_flows_on(model, x):
    with Scaling("head", 2.0).prepare(model), ActivationCaching("head").prepare(model) as hooked:
        y = hooked(x)
        assert hooked.cache["head"].data_ptr() == y.data_ptr()
    y.data.zero_()  # what is kept after the block is what was seen
    assert hooked.cache["head"].any()


# Suspending


@pytest.mark.parametrize("name", ["paused", "disable_hooks"])
def test_hooks_can_be_suspended_and_resumed(model, x, name):
    with ActivationCaching("head").prepare(model) as hooked:
        first = hooked(x)
        with getattr(hooked.hooking_context, name)():
            hooked(2 * x)
            assert torch.equal(hooked.cache["head"], first)
        third = hooked(3 * x)
        assert torch.equal(hooked.cache["head"], third)


def test_the_hooked_module_suspends_as_well(model, x):
    with ActivationCaching("head").prepare(model) as hooked:
        with hooked.paused():
            hooked(x)
            assert hooked.cache.is_empty()
        hooked(x)
        with hooked.disable_context() as own:
            assert own is model


def test_a_backward_while_paused_writes_nothing(model, x):
    with ActivationCaching("head", directions=["bwd"]).prepare(model) as hooked:
        y = hooked(x)
        with hooked.hooking_context.paused():
            y.sum().backward(retain_graph=True)
            assert hooked.cache.is_empty()
        hooked(x).sum().backward()


def test_a_reducer_goes_on_after_a_pause(model, x):
    with ActivationCaching("head", reducer=Stack()).prepare(model) as hooked:
        hooked(x)
        with hooked.hooking_context.paused():
            hooked(x)
        hooked(x)
    assert hooked.cache["head"].shape == (2, 5, 2)


def test_pausing_twice_is_an_error(model):
    with (
        ActivationCaching("head").prepare(model) as hooked,
        hooked.hooking_context.paused(),
        pytest.raises(ContextError, match="paused already"),
        hooked.hooking_context.paused(),
    ):
        pass


def test_an_exception_in_a_pause_resumes(model, x):
    with ActivationCaching("head").prepare(model) as hooked:
        with pytest.raises(KeyError), hooked.hooking_context.paused():
            raise KeyError
        y = hooked(x)
        assert torch.equal(hooked.cache["head"], y)


def test_leaving_while_paused_restores_the_model(model):
    before = state_of(model)
    context = ActivationCaching("head").prepare(model)
    context.__enter__()
    pause = context.paused()
    pause.__enter__()
    context.__exit__(None, None, None)
    pause.__exit__(None, None, None)
    assert state_of(model) == before
