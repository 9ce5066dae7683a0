"""Finding one tensor in a structured value, and putting another in its place."""

import dataclasses
import types
from collections import OrderedDict, defaultdict, namedtuple

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdcache.errors import CaptureError, EditError
from tdcache.hooks.values import check_fits, first_tensor, leaves, pick_tensor, replace_tensor

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Answer:
    name: str
    hidden: torch.Tensor
    more: tuple = ()


A, B, C = torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)


def hf_output():
    outputs = pytest.importorskip("transformers.modeling_outputs")
    return outputs.BaseModelOutputWithPast(last_hidden_state=A, hidden_states=(B, C))


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (A, [()]),
        ((A, B), [(0,), (1,)]),
        ([None, A, "text", [B]], [(1,), (3, 0)]),
        (Pair(A, {"k": B}), [(0,), (1, "k")]),
        ({"a": A, "b": (B, C)}, [("a",), ("b", 0), ("b", 1)]),
        (Answer("x", A, (B,)), [("hidden",), ("more", 0)]),
        (TensorDict({"a": A, "n": {"b": B}}), [("a",), ("n", "b")]),
        (hf_output, [("last_hidden_state",), ("hidden_states", 0), ("hidden_states", 1)]),
        ((), []),
        (None, []),
        ("text", []),
        (Answer, []),  # the class itself
    ],
)
def test_every_tensor_of_a_value_is_found_with_the_steps_to_it(value, steps):
    value = value() if value is hf_output else value
    found = list(leaves(value))
    assert [step for step, _ in found] == steps
    for step, tensor in found:
        if step:
            assert pick_tensor(value, step, "path") is tensor
    first = found[0][1] if found else None
    assert first_tensor(value) is first


@pytest.mark.parametrize(
    ("value", "pick", "meant"),
    [
        ((A, B), 1, B),
        ((A, B), -1, B),
        ([A, [B, C]], (1, 1), C),
        ([A, [B, C]], (1, -2), B),
        (Pair(A, B), 1, B),
        ({"a": A, "b": B}, "b", B),
        ({"a": A, "b": B}, 1, B),
        ({7: A, 1: B}, 1, B),
        ({"a": {"b": (A, B)}}, ("a", "b", 1), B),
        (Answer("x", A, (B,)), "hidden", A),
        (Answer("x", A, (B,)), ("more", 0), B),
        (Answer("x", A, (B,)), 1, A),
        ((A, B), lambda value: value[0] + value[1], B),
        (A, lambda value: value, A),
        ((None, A), None, A),
    ],
)
def test_a_pick_is_an_index_a_key_a_path_a_callable_or_the_first(value, pick, meant):
    assert torch.equal(pick_tensor(value, pick, "path"), meant)


def test_a_pick_reaches_into_hugging_face_outputs_by_name_and_by_position():
    value = hf_output()
    assert pick_tensor(value, "last_hidden_state", "path") is A
    assert pick_tensor(value, ("hidden_states", 1), "path") is C
    assert pick_tensor(value, (1, 0), "path") is B  # past_key_values is None, and so is not counted: as value[1]


@pytest.mark.parametrize(
    ("value", "pick"),
    [
        ((A, B), 2),
        ((A, B), -3),
        ((A, B), "a"),
        ({"a": A}, "b"),
        ({"a": A}, 1),
        ((A, B), (1, 0)),
        (A, 0),
        (None, None),
        ("text", None),
        ((), 0),
    ],
)
def test_a_pick_that_finds_nothing_is_an_error_with_the_path(value, pick):
    with pytest.raises(CaptureError) as caught:
        pick_tensor(value, pick, "layers.0")
    assert caught.value.paths == ("layers.0",)


@pytest.mark.parametrize(
    ("value", "pick", "steps"),
    [
        ((A, B), None, (0,)),
        ((A, B), 1, (1,)),
        ((A, B), -1, (1,)),
        ([None, A, [B, "text"]], (2, 0), (2, 0)),
        (Pair(A, (B,)), (1, 0), (1, 0)),
        ({"a": A, "b": {"c": B}}, ("b", "c"), ("b", "c")),
        ({"a": A, "b": B}, 1, ("b",)),
        (OrderedDict(a=A, b=B), "b", ("b",)),
        (types.MappingProxyType({"a": A, "b": B}), "b", ("b",)),
        (Answer("x", A, (B,)), None, ("hidden",)),
        (Answer("x", A, (B,)), ("more", 0), ("more", 0)),
        (TensorDict({"a": A, "n": {"b": B}}), ("n", "b"), ("n", "b")),
        (hf_output, None, ("last_hidden_state",)),
        (hf_output, ("hidden_states", 1), ("hidden_states", 1)),
        (hf_output, (1, 1), ("hidden_states", 1)),
    ],
)
def test_a_replacement_changes_one_tensor_and_nothing_else(value, pick, steps):
    value = value() if value is hf_output else value
    before, new = dict(leaves(value)), torch.full((2,), 9.0)
    after = replace_tensor(value, new, pick=pick, path="path")
    assert type(after) is type(value)
    found = dict(leaves(after))
    assert list(found) == list(before)
    assert found.pop(steps) is new
    assert all(tensor is before[step] for step, tensor in found.items())
    assert all(tensor is before[step] for step, tensor in leaves(value))


def test_a_tensor_is_replaced_by_the_tensor():
    new = torch.ones(2)
    assert replace_tensor(A, new) is new


def test_a_default_dict_keeps_its_default():
    after = replace_tensor(defaultdict(list, a=A), B)
    assert after["a"] is B
    assert after["missing"] == []


def test_a_packed_sequence_keeps_its_other_fields():
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 1), torch.ones(2, 1)])
    after = replace_tensor(packed, torch.zeros(5, 1))
    assert torch.equal(after.data, torch.zeros(5, 1))
    assert torch.equal(after.batch_sizes, packed.batch_sizes)


@pytest.mark.parametrize("old", [None, "text", 3])
def test_what_is_no_tensor_may_be_replaced_by_anything(old):
    assert replace_tensor((A, old), "new", pick=1) == (A, "new")
    assert check_fits("new", old, "path") is None


@pytest.mark.parametrize(
    "new",
    [torch.zeros(3), torch.zeros(2, dtype=torch.float64), torch.zeros(2, device="meta"), None, (A,)],
)
def test_a_replacement_must_have_shape_dtype_and_device_of_what_it_replaces(new):
    for value in (A, (A, B), {"a": A}):
        with pytest.raises(EditError):
            replace_tensor(value, new, path="layers.0")
