"""Modules that do not run: skipping, replacing, and putting back in any order."""

import itertools

import pytest
import torch
from torch import nn

from model_state import state_of
from tdcache import cache_activations, resume_from
from tdcache.hooks.replaced_forward import replace_forward, skip_module


def test_a_skipped_module_does_not_run_and_its_hooks_do():
    model, x, calls = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4), []
    model[0].register_forward_hook(lambda module, args, output: calls.append(output))
    value = torch.randn(2, 4)
    before = state_of(model)
    handle = skip_module(model[0], value)
    with cache_activations(model, "0") as cache:
        assert torch.equal(model(x), value.relu())
    assert torch.equal(cache["0"], value)
    assert calls == [value]
    handle.remove()
    handle.remove()
    assert state_of(model) == before


def test_the_value_may_be_a_proxy_or_a_function_of_the_arguments():
    class Proxy:
        def resolve(self):
            return torch.ones(2, 4)

    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    for value, expected in ((Proxy(), torch.ones(2, 4)), (lambda given: given * 2, x * 2)):
        handle = skip_module(model[0], value)
        assert torch.equal(model(x), expected)
        handle.remove()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("own", [False, True])
def test_replacements_are_removed_in_any_order(order, own):
    module = nn.Linear(1, 1)
    if own:
        module.forward = lambda: "own"  # as accelerate leaves it
    else:
        type(module)  # the class's own forward comes back
    before = state_of(module)
    handles = [replace_forward(module, lambda at=at: at) for at in range(3)]
    there = [0, 1, 2]
    for at in order:
        assert module() == max(there)
        handles[at].remove()
        there.remove(at)
    assert state_of(module) == before


def test_a_muted_replacement_lets_the_module_run():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    plain = model(x)
    handle = replace_forward(model[0], lambda value: value)
    skipped = model(x)
    handle.mute()
    assert torch.equal(model(x), plain)
    handle.unmute()
    assert torch.equal(model(x), skipped)
    handle.remove()


def test_pausing_a_resumed_model_runs_all_of_it():
    from tdcache import ResumeFrom

    model, x, value = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4), torch.randn(2, 4)
    plain = model(x)
    context = ResumeFrom("0", value).prepare(model)
    with context:
        resumed = model(x)
        with context.paused():
            assert torch.equal(model(x), plain)
        assert torch.equal(model(x), resumed)


def test_two_resumed_contexts_are_left_in_either_order():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    before, plain = state_of(model), model(x)
    one, two = resume_from(model, "0", x), resume_from(model, "1", x)
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(model(x), model[2](x))
    two.__exit__(None, None, None)
    assert state_of(model) == before
    assert torch.equal(model(x), plain)
