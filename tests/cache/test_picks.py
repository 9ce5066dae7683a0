"""What ``pick=`` means is one thing in every direction: of outputs, of inputs, and of the gradients of both."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdcache import ActivationCaching, CaptureError

Named = namedtuple("Named", ["left", "right"])


@dataclass
class Record:
    left: torch.Tensor
    right: object


class Twice(nn.Module):
    """Gives what it gets, each tensor times two; other things as they are."""

    def forward(self, *args, **kwargs):
        return double(args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values()))


def double(value):
    if isinstance(value, torch.Tensor):
        return value * 2
    if isinstance(value, TensorDict):
        return value.apply(lambda each: each * 2)
    if isinstance(value, dict):
        return {key: double(each) for key, each in value.items()}
    if isinstance(value, Named):
        return Named(*map(double, value))
    if isinstance(value, list | tuple):
        return type(value)(map(double, value))
    if isinstance(value, Record):
        return Record(double(value.left), double(value.right))
    return value


def total(value):
    """The weighted sum of the tensors, the second counting ten times, the third a hundred times."""
    return sum(10**number * each.sum() for number, each in enumerate(tensors(value)))


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, TensorDict | dict):
        value = list(value.values())
    if isinstance(value, Record):
        value = [value.left, value.right]
    return [each for part in value for each in tensors(part)] if isinstance(value, list | tuple) else []


class Model(nn.Module):
    def __init__(self, make, names=()):
        super().__init__()
        self.site, self.make, self.names = Twice(), make, names

    def forward(self, x):
        made = self.make(x)
        if self.names:
            return total(self.site(**dict(zip(self.names, made, strict=True))))
        return total(self.site(*made))


def three(x):
    return x * 1, x * 10, x * 100


# What a module is called with, what of it is picked, and the number of the tensor that is meant.
CASES = {
    "first": (lambda x: three(x), 0, 0),
    "last": (lambda x: three(x), -1, 2),
    "before the last": (lambda x: three(x), -2, 1),
    "one-step path": (lambda x: three(x), (1,), 1),
    "nested tuple": (lambda x: (x * 1, (x * 10, x * 100)), (1, 1), 2),
    "nested from the end": (lambda x: (x * 1, (x * 10, x * 100)), (-1, -1), 2),
    "list in tuple": (lambda x: (x * 1, [x * 10, x * 100]), (1, 0), 1),
    "dict in tuple": (lambda x: (x * 1, {"a": x * 10, "b": x * 100}), (1, "b"), 2),
    "dict by position": (lambda x: (x * 1, {"a": x * 10, "b": x * 100}), (1, 0), 1),
    "named tuple": (lambda x: (x * 1, Named(x * 10, x * 100)), (1, 1), 2),
    "record": (lambda x: (x * 1, Record(x * 10, x * 100)), (1, "right"), 2),
    "entries": (lambda x: (x * 1, TensorDict({"a": x * 10, "b": x * 100})), (1, "b"), 2),
    "after a number": (lambda x: (3, x * 1, x * 10), 2, 1),
}
# What each direction gives of a tensor that is 1: the module doubles it, and its output has a gradient of 1.
DIRECTIONS = {
    "fwd": 2.0,
    "fwd_kwargs": 2.0,
    "fwd_pre": 1.0,
    "fwd_pre_kwargs": 1.0,
    "bwd": 1.0,
    "bwd_pre": 1.0,
    "grad_in": 2.0,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", [{}, {"hold": "snapshot"}, {"index": ...}])
def test_a_pick_means_the_same_tensor_in_every_direction(case, direction, options):
    make, pick, number = CASES[case]
    with ActivationCaching("site", directions=[direction], pick=pick, **options).prepare(Model(make)) as hooked:
        hooked(torch.ones(1, requires_grad=True)).backward()
    assert hooked.cache["site"].tolist() == [DIRECTIONS[direction] * 10.0**number]


@pytest.mark.parametrize(("pick", "number"), [("b", 1), (1, 1), (-1, 2), (("c",), 2), (0, 0)])
@pytest.mark.parametrize("direction", ["fwd_pre", "grad_in", "fwd_pre_kwargs"])
def test_arguments_given_by_name_are_picked_by_name_or_number(pick, number, direction):
    with ActivationCaching("site", directions=[direction], pick=pick).prepare(Model(three, "abc")) as hooked:
        hooked(torch.ones(1, requires_grad=True)).backward()
    assert hooked.cache["site"].tolist() == [DIRECTIONS[direction] * 10.0**number]


@pytest.mark.parametrize("pick", [3, -4, "x", (0, 0), (0, "x"), (1, 0, 0)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pick_that_finds_nothing_is_one_error(pick, direction):
    recipe = ActivationCaching("site", directions=[direction], pick=pick)
    with pytest.raises(CaptureError, match=r"pick=.* finds nothing at 'site'"), recipe.prepare(Model(three)) as hooked:
        hooked(torch.ones(1, requires_grad=True))


@pytest.mark.parametrize(
    ("make", "pick", "kind"),
    [
        (lambda x: (x, 3), 1, "int"),
        (lambda x: (x, 3), -1, "int"),
        (lambda x: (x, [x, x]), 1, "list"),
        (lambda x: (x, None), 1, "None"),
        (lambda x: (x, {"a": "text"}), (1, "a"), "str"),
        (lambda x: (x, 3), lambda value: value[1], "int"),
    ],
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pick_that_is_no_tensor_is_one_error(make, pick, kind, direction):
    recipe = ActivationCaching("site", directions=[direction], pick=pick)
    with pytest.raises(CaptureError, match=f"gives {kind} at 'site'"), recipe.prepare(Model(make)) as hooked:
        hooked(torch.ones(1, requires_grad=True))


@pytest.mark.parametrize("pick", [1, -1, (1,), lambda value: value[1]])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_pick_of_entries_gives_every_entry(pick, direction):
    def make(x):
        return x * 1, TensorDict({"a": x * 10, "b": x * 100})

    with ActivationCaching("site", directions=[direction], pick=pick).prepare(Model(make)) as hooked:
        hooked(torch.ones(1, requires_grad=True)).backward()
    kept = hooked.cache["site"]
    assert {key: value.item() for key, value in kept.items()} == {
        "a": DIRECTIONS[direction] * 10.0,
        "b": DIRECTIONS[direction] * 100.0,
    }


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_callable_picks_by_what_it_is_shown(direction):
    recipe = ActivationCaching("site", directions=[direction], pick=lambda value: value[1][0])
    with recipe.prepare(Model(lambda x: (x * 1, [x * 10, x * 100]))) as hooked:
        hooked(torch.ones(1, requires_grad=True)).backward()
    assert hooked.cache["site"].tolist() == [DIRECTIONS[direction] * 10.0]
