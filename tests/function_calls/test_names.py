"""Tests of the names of functions and of the sites that are made of them."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tdcache.errors import SelectionError
from tdcache.function_calls.names import call_name, is_torch_name
from tdcache.function_calls.sites import CallPattern, CallSite, is_call


class Names(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(call_name(func))
        return func(*args, **(kwargs or {}))


SPELLINGS = [
    ("add", [lambda x: x + 1, lambda x: 1 + x, lambda x: x.add(1), lambda x: torch.add(x, 1)]),
    ("add_", [lambda x: x.add_(1), lambda x: x.__iadd__(1)]),
    ("sub", [lambda x: x - 1, lambda x: 1 - x, lambda x: torch.subtract(x, 1)]),
    ("mul", [lambda x: x * 2, lambda x: 2 * x, lambda x: torch.multiply(x, 2)]),
    ("div", [lambda x: x / 2, lambda x: 2 / x, lambda x: torch.true_divide(x, 2)]),
    ("pow", [lambda x: x**2, lambda x: 2**x, lambda x: x.pow(2)]),
    ("matmul", [lambda x: x @ x, lambda x: x.matmul(x), lambda x: torch.matmul(x, x)]),
    ("softmax", [lambda x: x.softmax(-1), lambda x: F.softmax(x, -1), lambda x: torch.special.softmax(x, -1)]),
    ("relu", [F.relu, torch.relu, torch.Tensor.relu]),
    ("cat", [lambda x: torch.cat([x, x]), lambda x: torch.concat([x, x])]),
    ("getitem", [lambda x: x[0]]),
    ("floor_divide", [lambda x: x // 2, lambda x: 2 // x, lambda x: torch.floor_divide(x, 2)]),
]


@pytest.mark.parametrize(("name", "spellings"), SPELLINGS, ids=[name for name, _ in SPELLINGS])
def test_an_operation_has_one_name_however_it_is_written(name, spellings):
    for spelling in spellings:
        x = torch.ones(2, 2)
        with Names() as mode:
            spelling(x)
        assert mode.seen == [name]


def test_a_property_has_no_name():
    with Names() as mode:
        _ = torch.ones(2).shape
    assert mode.seen[-1] is None


def test_names_of_torch_are_told_from_others():
    assert is_torch_name("softmax")
    assert is_torch_name("getitem")
    assert not is_torch_name("apply_rotary_pos_emb")


@pytest.mark.parametrize("text", ["a.b::softmax", "a.b::softmax.1", "::add", "h.3::q"])
def test_a_site_prints_as_it_was_written(text):
    assert str(CallSite.parse(text)) == text


def test_the_first_call_may_be_numbered():
    assert CallSite.parse("a::add.0") == CallSite("a", "add")


@pytest.mark.parametrize("text", ["a.b", "a::", "a::b.c", "a::b.01", "a::b.-1", ""])
def test_what_names_no_call_is_refused(text):
    with pytest.raises(SelectionError) as error:
        CallSite.parse(text)
    assert str(error.value) == (
        f"{text!r} names no call inside a forward; write 'path::function', or 'path::function.1' for the second call "
        "of it"
    )


def test_a_selector_is_a_pattern_of_modules_and_one_of_names():
    pattern = CallPattern.parse(r".*\.attn::(softmax|matmul\.1)")
    assert pattern.path == r".*\.attn"
    assert [pattern.takes(label) for label in ("softmax", "softmax.1", "matmul", "matmul.1")] == [
        True,
        False,
        False,
        True,
    ]
    assert [pattern.may_take(name) for name in ("softmax", "matmul", "mul")] == [True, True, False]


def test_a_pattern_of_everything_does_not_mean_the_places_of_attention():
    assert CallPattern.parse("a::.*").derived() == ()
    assert CallPattern.parse("a::[qkv]").derived() == ("q", "k", "v")
    assert CallPattern.parse("a::softmax").derived() == ()


def test_a_selector_without_calls_is_refused():
    with pytest.raises(SelectionError) as error:
        CallPattern.parse("layers")
    assert str(error.value) == (
        "selector 'layers' selects no calls; write 'modules::functions', two regular expressions, for instance "
        r"r'.*\.attn::softmax'"
    )


def test_a_selector_that_is_no_regex_is_refused():
    with pytest.raises(SelectionError, match=r"^pattern '\(' is not a valid regex: missing \)"):
        CallPattern.parse("a::(")


def test_calls_are_told_from_paths():
    assert is_call("a::b")
    assert not is_call("a.b")
    assert not is_call(3)
