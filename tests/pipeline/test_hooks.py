"""Sequences of hooks: order, keyword arguments in scope, binding, copies, reprs."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from tdcache.errors import HookSignatureError
from tdcache.pipeline import AtLayers, ConditionalHooks, Hooks, WrapperHooks, grad_hook_wrapper


def double(x):
    return 2 * x


def plus_layer(x, layer):
    return x + layer


def everything(x, *args, **kwargs):
    return [x, args, kwargs]


def test_hooks_are_called_in_the_order_they_were_appended():
    assert Hooks().append(lambda x: x + 1).append(double)(3) == 8
    assert Hooks(double, lambda x: x + 1)(3) == 7


def test_an_empty_sequence_returns_the_very_value():
    x = torch.ones(2)
    assert Hooks().is_empty()
    assert Hooks()(x, 1, layer=2) is x


def test_a_hook_that_returns_none_leaves_the_value():
    seen = []
    assert Hooks(seen.append, double)(3) == 6
    assert seen == [3]


def test_a_sequence_is_itself_a_hook_and_a_sequence():
    inner = Hooks(double)
    hooks = Hooks(inner, double)
    assert hooks(1) == 4
    assert (len(hooks), list(hooks), hooks[0], hooks[:1]) == (2, [inner, double], inner, [inner])


def test_each_hook_gets_the_keyword_arguments_it_names():
    assert Hooks(double, plus_layer).bind(layer=10, kind="mlp")(1) == 12
    assert Hooks(everything).bind(layer=1)(0, "a", kind="mlp") == [0, ("a",), {"kind": "mlp", "layer": 1}]
    assert Hooks(lambda x, *, layer=5: layer)(0) == 5


def test_a_function_without_a_signature_and_a_module_get_no_more_than_they_take():
    linear = nn.Linear(2, 2)
    x = torch.randn(3, 2)
    assert torch.equal(Hooks(torch.relu, linear).bind(layer=1)(x), linear(x.relu()))


def test_a_keyword_that_is_needed_and_missing_is_named():
    with pytest.raises(
        HookSignatureError, match=r"hook plus_layer needs layer=; in scope are 'kind'.*bind it.*\(\?P<layer>"
    ):
        Hooks(plus_layer)(1, kind="mlp")
    with pytest.raises(HookSignatureError, match="in scope are no keyword arguments"):
        Hooks(plus_layer)(1)


def test_something_that_cannot_be_called_is_refused_when_it_is_appended():
    with pytest.raises(HookSignatureError, match=r"a hook is a callable x -> x, got 3 \(int\)"):
        Hooks().append(3)


def test_the_binding_nearest_to_the_hook_counts():
    assert Hooks(plus_layer).bind(layer=1)(0, layer=100) == 1
    outer = Hooks(Hooks(plus_layer).bind(layer=1), plus_layer).bind(layer=10)
    assert outer(0) == 11


def test_binding_a_key_twice_on_one_object_is_an_error_that_binds_nothing():
    hooks = Hooks(plus_layer).bind(layer=1)
    with pytest.raises(ValueError, match=r"Hooks has layer=1 bound already; unbind it first"):
        hooks.bind(kind="mlp", layer=2)
    assert hooks.bound == {"layer": 1}


def test_unbinding_one_key_or_several_and_one_that_is_not_bound():
    hooks = Hooks().bind(layer=1, kind="mlp", row=0)
    assert hooks.unbind("layer").bound == {"kind": "mlp", "row": 0}
    with pytest.raises(ValueError, match=r"cannot unbind 'layer'; bound are \['kind', 'row'\]"):
        hooks.unbind(["kind", "layer"])
    assert hooks.unbind(["kind", "row"]).bound == {}


def test_binding_on_a_conditional_reaches_its_condition():
    assert AtLayers([1, 2], double).bind(layer=2)(3) == 6
    assert AtLayers(1, double).bind(layer=2)(3) == 3
    assert ConditionalHooks(lambda x, layer: layer > 1, double).bind(layer=2)(3) == 6


def test_copies_are_bound_and_appended_to_apart_and_share_the_hooks():
    seen = []
    hooks = Hooks(AtLayers(1, seen.append), double)
    first, second = deepcopy(hooks).bind(layer=0), deepcopy(hooks).bind(layer=1)
    second.append(double)
    second[0].append(double)
    assert (first(3), second(3), hooks.bound, len(hooks), len(hooks[0])) == (6, 24, {}, 2, 1)
    assert seen == [3]
    assert first[1] is second[1] is double
    assert first[0].condition is hooks[0].condition


def test_a_sequence_that_stands_in_two_places_still_does_so_in_a_copy():
    shared = Hooks(double)
    copied = deepcopy(Hooks(shared, shared))
    assert copied[0] is copied[1] is not shared


def test_a_sequence_cannot_hold_itself():
    hooks = Hooks()
    with pytest.raises(ValueError, match="cannot be appended to itself"):
        hooks.append(Hooks(hooks))
    assert hooks.append(deepcopy(hooks))(1) == 1


def test_a_wrapper_gets_the_whole_sequence_as_one_hook_and_is_not_asked_while_it_is_empty():
    def negated(hook):
        return lambda x, **kwargs: -hook(-x, **kwargs)

    hooks = WrapperHooks(negated)
    assert hooks(5) == 5
    assert hooks.append(lambda x: x + 1).append(plus_layer).bind(layer=10)(5) == -(-5 + 1 + 10)


def test_sequences_of_named_functions_can_be_pickled():
    hooks = pickle.loads(
        pickle.dumps(Hooks(AtLayers(1, double), WrapperHooks(grad_hook_wrapper, double)).bind(layer=1))
    )
    x = torch.ones(1, requires_grad=True)
    hooks(x).backward()
    assert x.grad.item() == 4


def test_reprs_of_sequences_are_nested():
    hooks = Hooks(AtLayers(4, Hooks(double).bind(kind="mlp")), torch.relu, WrapperHooks(grad_hook_wrapper, double))
    assert repr(hooks.bind(layer=3)) == (
        "Hooks() [layer=3]\n"
        "    AtLayers(4)\n"
        "        Hooks() [kind='mlp']\n"
        "            double\n"
        "    relu\n"
        "    WrapperHooks(grad_hook_wrapper)\n"
        "        double"
    )
    assert repr(Hooks()) == "Hooks()"
