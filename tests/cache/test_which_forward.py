"""Which forward and which call a gradient belongs to: one rule for every gradient direction, and for callbacks."""

import pytest
import torch
from torch import nn

from tdcache import ActivationCaching, First, Mean, RepeatedCallWarning, Stack


class Scale(nn.Module):
    def forward(self, x):
        return x * 1


class Steps(nn.Module):
    """Calls one module several times; the factors after the calls make each call's gradient another."""

    def __init__(self, factors=(2.0,)):
        super().__init__()
        self.site, self.factors = Scale(), factors

    def forward(self, x, factor=1.0):
        return sum(each * factor * self.site(x) for each in self.factors)


def kept_gradient(key, direction, module, grad_output, grad_input=None):
    return grad_output[0] * 1


WAYS = {
    "bwd": {"directions": ["bwd"]},
    "bwd_pre": {"directions": ["bwd_pre"]},
    "grad_in": {"directions": ["grad_in"]},
    "fwd and bwd": {"directions": ["fwd", "bwd"]},
    "all three": {"directions": ["bwd", "bwd_pre", "grad_in"]},
    "callback on bwd": {"directions": ["bwd"], "callback": kept_gradient},
    "callback on bwd_pre": {"directions": ["bwd_pre"], "callback": kept_gradient},
    "callback on grad_in": {"directions": ["grad_in"], "callback": kept_gradient},
    "every part": {"directions": ["bwd"], "pick": 0},
    "a slice": {"directions": ["grad_in"], "index": slice(None)},
}
ways = pytest.mark.parametrize("way", WAYS)


def gradients(hooked, way):
    """What is kept in each gradient direction, as numbers."""
    directions = [each for each in WAYS[way]["directions"] if each != "fwd"]
    return [hooked.cache[each, "site"].reshape(-1).tolist() for each in directions]


def recipe(way, **options):
    options = {**WAYS[way], **options}
    if options.get("pick") == 0 and "grad_in" not in options["directions"]:
        options["pick"] = lambda value: value
    return ActivationCaching("site", use_nested_keys=True, **options)


def ones():
    return torch.ones(1, requires_grad=True)


@ways
def test_one_backward_through_two_forwards_keeps_the_gradient_of_the_latest(way):
    with recipe(way).prepare(Steps()) as hooked:
        loss = hooked(ones(), factor=1.0) + hooked(ones(), factor=10.0)
        loss.backward()
    assert all(each == [20.0] for each in gradients(hooked, way))


@ways
def test_a_late_backward_of_an_earlier_forward_is_dropped(way):
    with recipe(way).prepare(Steps()) as hooked:
        old, new = hooked(ones(), factor=1.0), hooked(ones(), factor=10.0)
        new.backward()
        old.backward()
    assert all(each == [20.0] for each in gradients(hooked, way))


@ways
@pytest.mark.filterwarnings("ignore::tdcache.UnfiredSiteWarning")
def test_the_backward_of_an_earlier_forward_alone_brings_nothing(way):
    with recipe(way).prepare(Steps()) as hooked:
        old = hooked(ones(), factor=1.0)
        with torch.no_grad():
            hooked(ones(), factor=10.0)
        old.backward()
    node = WAYS[way]["directions"][-1]
    assert list(hooked.cache[node].keys()) == []


@ways
def test_of_several_calls_the_gradient_of_the_last_is_kept(way):
    with pytest.warns(RepeatedCallWarning), recipe(way).prepare(Steps((2.0, 3.0, 5.0))) as hooked:
        hooked(ones()).backward()
    assert all(each == [5.0] for each in gradients(hooked, way))


@ways
@pytest.mark.parametrize("late", [False, True])
def test_stack_has_the_gradients_in_the_order_of_forwards_and_calls(way, late):
    with recipe(way, reducer=Stack()).prepare(Steps((2.0, 3.0))) as hooked:
        first, second = hooked(ones(), factor=1.0), hooked(ones(), factor=10.0)
        if late:
            second.backward()
            first.backward()
        else:
            (first + second).backward()
    assert all(each == [2.0, 3.0, 20.0, 30.0] for each in gradients(hooked, way))


@ways
def test_reading_the_cache_in_between_changes_no_order(way):
    with recipe(way, reducer=Stack()).prepare(Steps((2.0, 3.0))) as hooked:
        first, second = hooked(ones(), factor=1.0), hooked(ones(), factor=10.0)
        second.backward()
        assert all(each == [20.0, 30.0] for each in gradients(hooked, way))
        first.backward()
    assert all(each == [2.0, 3.0, 20.0, 30.0] for each in gradients(hooked, way))


@ways
@pytest.mark.parametrize("read", [False, True])
def test_first_keeps_the_gradient_of_the_first_call_of_the_first_forward(way, read):
    with recipe(way, reducer=First()).prepare(Steps((2.0, 3.0))) as hooked:
        first, second = hooked(ones(), factor=1.0), hooked(ones(), factor=10.0)
        second.backward()
        if read:
            assert all(each == [20.0] for each in gradients(hooked, way))
        first.backward()
    assert all(each == [2.0] for each in gradients(hooked, way))


@ways
def test_a_mean_takes_every_gradient(way):
    with recipe(way, reducer=Mean()).prepare(Steps((2.0, 3.0))) as hooked:
        first, second = hooked(ones(), factor=1.0), hooked(ones(), factor=10.0)
        second.backward()
        first.backward()
    assert all(each == [13.75] for each in gradients(hooked, way))


@ways
def test_a_second_backward_of_the_same_forward_replaces_the_first(way):
    with recipe(way).prepare(Steps()) as hooked:
        y = hooked(ones())
        y.backward(retain_graph=True)
        (10 * y).backward()
    assert all(each == [20.0] for each in gradients(hooked, way))


@ways
def test_stack_has_every_backward_of_a_call_in_the_order_they_came(way):
    with recipe(way, reducer=Stack()).prepare(Steps((2.0, 3.0))) as hooked:
        y = hooked(ones())
        y.backward(retain_graph=True)
        (10 * y).backward()
    assert all(each == [2.0, 20.0, 3.0, 30.0] for each in gradients(hooked, way))


class Square(nn.Module):
    def forward(self, x):
        return x * x


class Penalty(nn.Module):
    def __init__(self):
        super().__init__()
        self.site = Square()

    def forward(self, x, factor=1.0):
        return self.site(x) * factor


@ways
@pytest.mark.parametrize("options", [{}, {"reducer": Stack()}, {"hold": "live"}, {"hold": "snapshot"}])
def test_a_gradient_of_which_a_graph_is_made_is_kept_like_any_other(way, options):
    with recipe(way, **options).prepare(Penalty()) as hooked:
        x = torch.full((1,), 3.0, requires_grad=True)
        (grad,) = torch.autograd.grad(hooked(x, factor=2.0), x, create_graph=True)
        kept = gradients(hooked, way)
        held = [hooked.cache[each, "site"] for each in WAYS[way]["directions"] if each != "fwd"]
    is_input = {"grad_in": 12.0}
    for direction, values in zip([each for each in WAYS[way]["directions"] if each != "fwd"], kept, strict=True):
        assert values == [2.0 if "callback" in WAYS[way] else is_input.get(direction, 2.0)]
    if options.get("hold") != "live":
        assert not any(each.requires_grad for each in held)
    grad.backward()
    assert x.grad.tolist() == [4.0]


class CallsItself(nn.Module):
    """A module whose innermost call comes first to its output."""

    def forward(self, x, depth):
        return 2 * (self(x, depth - 1) if depth else x * 1)


class Recursive(nn.Module):
    def __init__(self):
        super().__init__()
        self.site = CallsItself()

    def forward(self, x):
        return self.site(x, 2)


@pytest.mark.parametrize("way", ["bwd", "bwd_pre", "fwd and bwd", "callback on bwd_pre", "every part"])
def test_calls_of_a_module_that_calls_itself_are_in_the_order_they_returned(way):
    with recipe(way, reducer=Stack()).prepare(Recursive()) as hooked:
        hooked(ones()).backward()
    assert all(each == [4.0, 2.0, 1.0] for each in gradients(hooked, way))
