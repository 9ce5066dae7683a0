"""Calling a plain module with a TensorDict: how entries become arguments and results become entries."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdcache import ActivationCaching, ContextError
from tdcache.modules import ModelCall

Point = namedtuple("Point", ["left", "right"])


@dataclass
class Record:
    left: Tensor
    right: Tensor


class Sum(nn.Module):
    """Adds its two arguments, with a scale that must be given by keyword, and returns what it is told to."""

    def __init__(self, returns=lambda left, right: left + right):
        super().__init__()
        self.inner = nn.Identity()
        self.returns = returns

    def forward(self, left, right, *, scale=1.0):
        return self.returns(self.inner(left) * scale, right * scale)


@pytest.fixture
def data():
    return TensorDict({"a": torch.tensor([1.0]), "b": torch.tensor([2.0]), "s": torch.tensor([10.0])})


def test_in_keys_are_positional_arguments_in_order(data):
    call = ModelCall(Sum(returns=lambda left, right: left - right), ["a", "b"], ["out"])
    assert torch.equal(call(data)["out"], torch.tensor([-1.0]))


def test_a_mapping_of_in_keys_names_keyword_arguments(data):
    call = ModelCall(Sum(returns=lambda left, right: left - right), {"b": "left", "a": "right", "s": "scale"}, ["out"])
    assert torch.equal(call(data)["out"], torch.tensor([10.0]))


def test_nested_entries_are_read_and_written():
    data = TensorDict({"in": {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])}})
    call = ModelCall(Sum(), [("in", "a"), ("in", "b")], [("out", "sum")])
    assert torch.equal(call(data)["out", "sum"], torch.tensor([3.0]))


def test_other_keyword_arguments_go_to_the_model(data):
    with ActivationCaching("inner").prepare(Sum(), in_keys=["a", "b"]) as hooked:
        assert torch.equal(hooked(data, scale=2.0)["output"], torch.tensor([6.0]))


def test_keyword_arguments_reach_the_model_unchanged():
    model = Sum()
    left, right = torch.tensor([1.0]), torch.tensor([2.0])
    with ActivationCaching("inner").prepare(model) as hooked:
        assert torch.equal(hooked(left, right=right, scale=3.0), torch.tensor([9.0]))
        assert torch.equal(hooked(left=left, right=right), torch.tensor([3.0]))
    assert torch.equal(hooked.cache["inner"], left)


def test_an_argument_may_have_any_name():
    class Named(nn.Module):
        def forward(self, *, data, module, args):
            return data + module + args

    one = torch.ones(1)
    with ActivationCaching("x", allow_empty=True).prepare(Named()) as hooked:
        assert torch.equal(hooked(data=one, module=one, args=one), 3 * one)


@pytest.mark.parametrize(
    "returns",
    [lambda left, right: (left, right), lambda left, right: [left, right], Point, Record],
    ids=["tuple", "list", "namedtuple", "dataclass"],
)
def test_results_are_taken_in_order(data, returns):
    found = ModelCall(Sum(returns=returns), ["a", "b"], ["first", "second"])(data)
    assert (found["first"], found["second"]) == (1.0, 2.0)


@pytest.mark.parametrize(
    "returns", [lambda left, right: {"left": left, "right": right}, Record], ids=["dict", "dataclass"]
)
def test_results_are_taken_by_name_where_names_agree(data, returns):
    found = ModelCall(Sum(returns=returns), ["a", "b"], ["right"])(data)
    assert found["right"] == 2.0


def test_an_underscore_skips_a_result(data):
    found = ModelCall(Sum(returns=lambda left, right: (left, right)), ["a", "b"], ["_", "second"])(data)
    assert found["second"] == 2.0
    assert sorted(found.keys()) == ["a", "b", "s", "second"]


def test_a_nested_result_gives_its_first_tensor(data):
    found = ModelCall(Sum(returns=lambda left, right: (left, (right, left))), ["a", "b"], ["_", "second"])(data)
    assert found["second"] == 2.0


def test_a_result_that_is_not_there_is_an_error_that_names_what_is(data):
    call = ModelCall(Sum(returns=lambda left, right: {"left": left}), ["a", "b"], ["left", "more"])
    with pytest.raises(ContextError, match=r"returned dict with \['left'\], nothing to write to out_key 'more'"):
        call(data)


def test_a_missing_input_names_what_is_there(data):
    with pytest.raises(KeyError, match=r"no entry 'c' for the model's input; it has \['a', 'b', 's'\]"):
        ModelCall(Sum(), ["a", "c"])(data)


def test_a_single_key_may_be_given_as_a_string(data):
    call = ModelCall(nn.Identity(), "a", "out")
    assert (call.in_keys, call.out_keys) == (["a"], ["out"])
    assert call(data)["out"] == 1.0
