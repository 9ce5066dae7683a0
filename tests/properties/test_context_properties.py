"""Over random module trees: contexts restore the model exactly, and capturing changes nothing that is computed."""

import warnings
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from model_state import state_of
from properties.context_strategies import batch, models, recipes
from properties.strategies import module_trees
from tdcache import (
    ActivationCaching,
    CompositeHookingContextFactory,
    First,
    HookDirection,
    Stack,
    TdcacheWarning,
    select,
)

examples = settings(max_examples=60)


class Boom(Exception):
    pass


@pytest.fixture(autouse=True)
def quiet():
    """Repeated calls and unfired sites are the rule in random trees; their warnings are tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TdcacheWarning)
        yield


def run(forward, x):
    """One training step's worth of outputs and gradients, in a list; dropout is the same every time."""
    torch.manual_seed(0)
    y = forward(x)
    if y.requires_grad:
        y.square().sum().backward()
    return y


def boom(*args, **kwargs):
    raise Boom


def reset(model):
    for parameter in model.parameters():
        parameter.grad = None


@examples
@given(models(), recipes())
def test_entering_and_leaving_restores_the_model(model, recipe):
    before = state_of(model)
    context = recipe.prepare(model)
    for _ in range(2):
        with context:
            pass
        assert state_of(model) == before


@examples
@given(module_trees(), st.lists(st.sampled_from(get_args(HookDirection)), min_size=1, unique=True), st.booleans())
def test_every_direction_is_undone_on_any_tree(model, directions, prepend):
    before = state_of(model)
    recipe = ActivationCaching(lambda path, module: True, directions=directions, allow_empty=True, prepend=prepend)
    with recipe.prepare(model) as hooked:
        hooked_count = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
        assert hooked_count >= len(hooked.hooking_context.recorder.channels)
    assert state_of(model) == before


@examples
@given(models(), recipes())
def test_a_step_in_a_context_leaves_nothing_behind(model, recipe):
    plain = run_and_state(model, model)
    with recipe.prepare(model) as hooked:
        run(hooked, batch())
    reset(model)
    # What running alone does to the model (batch norm's statistics) it does here too; nothing else may differ.
    assert hooks_and_flags(state_of(model)) == hooks_and_flags(plain)


def run_and_state(model, forward):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(forward, batch())
    reset(model)
    state = state_of(model)
    model.load_state_dict(before)
    return state


def hooks_and_flags(state):
    return {name: value for name, value in state.items() if name != "modules"}, [
        {key: value for key, value in attributes.items() if "buffers" not in key}
        for attributes in state["modules"].values()
    ]


@examples
@given(models(), recipes(), st.sampled_from(["body", "callback", "forward", "hook"]), st.booleans())
def test_whatever_raises_the_model_is_restored_and_the_error_is_seen(model, recipe, where, entered_before):
    model.eval()  # batch norm's statistics are the model's own doing
    context = recipe.prepare(model)
    if where == "callback":
        context = ActivationCaching(".*", callback=boom).prepare(model)
    if entered_before:
        with context:
            pass
    before = state_of(model)
    with pytest.raises(Boom), context as hooked, failing(model.parts[1], where):
        boom() if where == "body" else hooked(batch())
    reset(model)
    assert state_of(model) == before


@contextmanager
def failing(module, where):
    """Make a module fail in its forward, or in a hook beside ours."""
    if where == "forward":
        module.forward = boom
        try:
            yield
        finally:
            del module.forward
    elif where == "hook":
        with module.register_forward_hook(boom):
            yield
    else:
        yield


@examples
@given(models(), recipes())
def test_a_capture_changes_no_output_and_no_gradient(model, recipe):
    def step(forward):
        x = batch().requires_grad_()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        y = run(forward, x)
        found = [
            y,
            x.grad,
            *[parameter.grad for parameter in model.parameters()],
            *[each.clone() for each in model.buffers()],
        ]
        reset(model)
        model.load_state_dict(before)
        return found

    wanted = step(model)
    with recipe.prepare(model) as hooked:
        found = step(hooked)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@examples
@given(models(), recipes(reducer=None))
def test_a_backward_after_exit_writes_nothing(model, recipe):
    with recipe.prepare(model) as hooked:
        y = hooked(batch().requires_grad_())
    keys, kept = list(hooked.cache.keys(True, True)), hooked.cache.clone()
    y.square().sum().backward()
    assert list(hooked.cache.keys(True, True)) == keys
    for key in keys:
        assert torch.equal(hooked.cache[key], kept[key])


@examples
@given(models())
def test_stack_holds_what_plain_hooks_see(model):
    sites = select(model, lambda path, module: True)
    seen = {site.path: [] for site in sites}
    handles = [
        site.module.register_forward_hook(
            lambda module, args, output, path=site.path: seen[path].append(first(output).clone())
        )
        for site in sites
    ]
    model.eval()
    with torch.no_grad():
        model(batch())
        for handle in handles:
            handle.remove()
        with ActivationCaching(".*", reducer=Stack(), hold="snapshot").prepare(model) as hooked:
            hooked(batch())
    assert sorted(hooked.cache.keys()) == sorted(path for path, values in seen.items() if values)
    for path, values in seen.items():
        if values:
            assert torch.equal(hooked.cache[path], torch.stack(values))


def first(output):
    return output[0] if isinstance(output, tuple) else output


@examples
@given(models(in_place=False))
def test_aliases_hold_the_same_as_snapshots_where_nothing_is_in_place(model):
    model.eval()
    with (
        ActivationCaching(".*", use_nested_keys=True, directions=["fwd", "bwd"]).prepare(model) as alias,
        ActivationCaching(".*", use_nested_keys=True, directions=["fwd", "bwd"], hold="snapshot").prepare(
            model
        ) as copy,
    ):
        run(model, batch().requires_grad_())
    keys = sorted(map(str, alias.cache.keys(True, True)))
    assert keys == sorted(map(str, copy.cache.keys(True, True)))
    for key, value in alias.cache.items(True, True):
        assert torch.equal(value, copy.cache[key])


@examples
@given(models(), st.permutations(range(3)), st.lists(recipes(gradients=False), min_size=3, max_size=3))
def test_contexts_may_be_left_in_any_order(model, order, chosen):
    model.eval()
    before = state_of(model)
    contexts = [recipe.prepare(model) for recipe in chosen]
    for context in contexts:
        context.__enter__()
    for number in order:
        with torch.no_grad():
            model(batch())
        contexts[number].__exit__(None, None, None)
    assert state_of(model) == before


@examples
@given(models(), recipes(reducer=First()), recipes(reducer=First()))
def test_a_composite_holds_what_its_parts_hold_alone(model, one, other):
    model.eval()
    alone = []
    for recipe in (one, other):
        with recipe.prepare(model) as hooked:
            run(hooked, batch().requires_grad_())
        alone.append(hooked.cache)
    before = state_of(model)
    composite = CompositeHookingContextFactory(with_own_cache(one), with_own_cache(other))
    with composite.prepare(model) as hooked:
        run(hooked, batch().requires_grad_())
        caches = hooked.hooking_context.caches
    reset(model)
    for cache, wanted in zip(caches, alone, strict=True):
        assert sorted(map(str, cache.keys(True, True))) == sorted(map(str, wanted.keys(True, True)))
        assert all(torch.equal(cache[key], value) for key, value in wanted.items(True, True))
    assert hooks_and_flags(state_of(model)) == hooks_and_flags(before)


def with_own_cache(recipe):
    recipe._hooking_context_kwargs["cache"] = TensorDict()
    return recipe
