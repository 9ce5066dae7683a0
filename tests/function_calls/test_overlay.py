"""Tests of Python functions that a forward looks up by name."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import silu

from tdcache.errors import CaptureError
from tdcache.function_calls.attach import attach_call
from tdcache.function_calls.overlay import global_functions
from tdcache.function_calls.record import calls
from tdcache.function_calls.roles import attach_attention
from tdcache.function_calls.sites import CallSite
from tdcache.hooks.registrations import MultiHookHandle
from tdcache.introspect import function_mode_count

FACTOR = 3


def inner(x):
    return x * FACTOR


def outer(x):
    return inner(x) + 1


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Plain(nn.Module):
    def forward(self, x):
        return outer(x) + inner(x)


class Decorated(nn.Module):
    @decorated
    @decorated
    def forward(self, x, *, twice=False):
        y = inner(x)
        return [inner(each) for each in (y, y)][-1] if twice else y


class Softmaxing(nn.Module):
    def forward(self, x):
        return softmax(x)


def softmax(x):
    return F.softmax(x, dim=-1)


def watch(model, site):
    seen = []
    return seen, attach_call(
        model, CallSite.parse(site), None, lambda module, args, kwargs, output: seen.append(output)
    )


def test_a_python_function_is_seen_under_its_name_also_in_a_helper():
    model, x = Plain(), torch.ones(2)
    first, one = watch(model, "::inner")
    second, two = watch(model, "::inner.1")
    whole, three = watch(model, "::outer")
    with MultiHookHandle([one, two, three]):
        result = model(x)
    assert [each[0].tolist() for each in (first, second, whole)] == [[3.0, 3.0], [3.0, 3.0], [4.0, 4.0]]
    assert result.tolist() == [7.0, 7.0]


def test_a_python_function_is_seen_without_a_mode():
    model, on = Plain(), []
    handle = attach_call(model, CallSite("", "inner"), None, lambda *_: on.append(function_mode_count()))
    counted = []
    with MultiHookHandle([handle]):
        model.register_forward_hook(lambda *_: counted.append(function_mode_count()))
        model(torch.ones(2))
    assert on == counted == [0]


def test_an_edit_of_a_python_function():
    model, x = Plain(), torch.ones(2)
    handle = attach_call(model, CallSite("", "inner"), lambda module, args, kwargs: ((args[0] * 2,), kwargs))
    with MultiHookHandle([handle]):
        assert model(x).tolist() == [10.0, 10.0]  # (2 * 3 + 1) + 3
    assert model(x).tolist() == [7.0, 7.0]


def test_decorators_are_seen_through():
    model, x = Decorated(), torch.ones(2)
    seen, handle = watch(model, "::inner.1")
    with MultiHookHandle([handle]):
        assert model(x, twice=True).tolist() == [9.0, 9.0]
        assert model(x).tolist() == [3.0, 3.0]
    assert [each.tolist() for each in seen] == [[9.0, 9.0]]


def test_globals_are_looked_up_when_they_are_needed(monkeypatch):
    model, x = Plain(), torch.ones(2)
    seen, handle = watch(model, "::outer")
    with MultiHookHandle([handle]):
        monkeypatch.setitem(globals(), "FACTOR", 5)
        assert model(x).tolist() == [11.0, 11.0]
    assert seen[0].tolist() == [6.0, 6.0]


def test_the_functions_of_the_file_stay_what_they_are():
    before = dict(globals())
    model = Plain()
    _, handle = watch(model, "::inner")
    with MultiHookHandle([handle]):
        model(torch.ones(2))
        assert all(globals()[name] is value for name, value in before.items())
        assert Plain()(torch.ones(2)).tolist() == [7.0, 7.0]


def test_another_model_of_the_class_sees_nothing():
    model, other = Plain(), Plain()
    seen, handle = watch(model, "::inner")
    with MultiHookHandle([handle]):
        other(torch.ones(2))
    assert seen == []


def test_a_name_of_torch_and_of_the_file_is_counted_the_same_whatever_is_selected():
    model, x = Softmaxing(), torch.ones(2)
    second, handle = watch(model, "::softmax.1")
    with MultiHookHandle([handle]):
        model(x)
    assert len(second) == 1
    assert calls(model, "", x).sites == ("::softmax", "::softmax.1")


def test_an_exception_in_a_python_function_leaves_nothing():
    model, x = Plain(), torch.ones(2)

    def fail(*_):
        raise ValueError("x")

    handle = attach_call(model, CallSite("", "inner"), fail)
    _, mode = watch(model, "::add")
    with MultiHookHandle([handle, mode]), pytest.raises(ValueError, match=r"^x$"):
        model(x)
    assert function_mode_count() == 0
    assert "forward" not in model.__dict__


def test_a_function_of_torch_that_was_imported_by_name_counts_once():
    model, x = Importing(), torch.ones(2)
    assert calls(model, "", x).sites == ("::silu", "::silu.1")


class Importing(nn.Module):
    def forward(self, x):
        return silu(silu(x))


class Assigning(nn.Module):
    def forward(self, x):
        global FACTOR
        FACTOR = 3
        return inner(x)


def test_a_forward_that_assigns_to_its_globals_is_not_overlaid():
    assert global_functions(Assigning.forward) == {}
    assert global_functions(F.gelu) == {}


class Table(dict):
    """As transformers' table of attention functions."""

    def get_interface(self, name, default):
        return self.get(name, default)


def flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling * kwargs.get("secret", 1)
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    z = torch.einsum("bhqk,bhkd->bhqd", torch.exp(scores.masked_fill(~causal, -torch.inf).log_softmax(-1)), value)
    return z.transpose(1, 2).contiguous(), None


TABLE = Table(flash=flash)


class Registered(nn.Module):
    is_causal = True

    def forward(self, x, **kwargs):
        function = TABLE.get_interface("flash", outer)
        return function(self, x, x, x, None, scaling=0.5, **kwargs)[0]


def test_the_places_of_a_registered_function_are_derived_from_its_arguments():
    model, x = Registered(), torch.randn(2, 3, 4, 8)
    expected, kept = model(x), {}
    handles = [
        attach_attention(model, CallSite("", place), lambda m, a, k, value, place=place: kept.__setitem__(place, value))
        for place in ("q", "k", "v", "scores", "pattern", "z")
    ]
    seen, whole = watch(model, "::flash")
    with MultiHookHandle([*handles, whole]):
        assert torch.equal(model(x), expected)
    scores = (x @ x.transpose(-1, -2) * 0.5).masked_fill(~torch.ones(4, 4, dtype=torch.bool).tril(), -torch.inf)
    # Products in another order of summation.
    assert torch.allclose(kept["pattern"], scores.softmax(-1), atol=2e-6, rtol=0)
    assert torch.equal(kept["z"], expected.transpose(1, 2))
    assert kept["q"] is kept["k"] is kept["v"] is x
    assert seen[0][0] is not None


def test_the_pattern_of_a_registered_function_is_edited():
    model, x = Registered(), torch.randn(2, 3, 4, 8)
    handle = attach_attention(model, CallSite("", "pattern"), lambda m, a, k, value: value * 0)
    with MultiHookHandle([handle]):
        assert model(x).abs().sum() == 0


def test_a_registered_function_that_does_something_else_is_refused():
    model, x = Registered(), torch.randn(2, 3, 4, 8)
    handle = attach_attention(model, CallSite("", "pattern"), lambda *_: None)
    with (
        MultiHookHandle([handle]),
        pytest.raises(CaptureError, match="pattern @ v differs from what the kernel returned"),
    ):
        model(x, secret=2)


def test_a_mask_of_another_form_is_refused():
    class Padded(nn.Module):
        def forward(self, x):
            return TABLE.get_interface("flash", outer)(self, x, x, x, torch.ones(2, 4), scaling=1.0)[0]

    model = Padded()
    handle = attach_attention(model, CallSite("", "pattern"), lambda *_: None)
    with MultiHookHandle([handle]), pytest.raises(CaptureError) as error:
        model(torch.randn(2, 3, 4, 8))
    assert str(error.value) == (
        "the attention of 'Padded' cannot be derived exactly: its mask has 2 dimensions, and scores have 4; use eager "
        "attention, or select the function itself"
    )
