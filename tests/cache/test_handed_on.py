"""Modules that compute nothing: what they hand on is an input or a parameter, which others use as well."""

import warnings
from types import MethodType

import pytest
import torch
from torch import nn

from tdcache import ActivationCaching, InplaceModificationError

PAIRS = [["bwd"], ["fwd", "bwd"]]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        hidden = self.linear(x)
        return 3 * self.drop(hidden) + hidden


class Returned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(3.0))

    def forward(self):
        return self.weight


class UsesReturned(nn.Module):
    def __init__(self):
        super().__init__()
        self.source = Returned()

    def forward(self, x):
        return x * self.source()


@pytest.mark.parametrize("directions", PAIRS, ids="+".join)
def test_the_gradient_of_an_input_that_is_handed_on_is_the_modules_own(directions):
    model = Residual().eval()
    with ActivationCaching("drop|linear", directions=directions, use_nested_keys=True).prepare(model) as hooked:
        hooked(torch.ones(2, 3)).sum().backward()
    assert torch.equal(hooked.cache["bwd", "drop"], torch.full((2, 3), 3.0))
    assert torch.equal(hooked.cache["bwd", "linear"], torch.full((2, 3), 4.0))


@pytest.mark.parametrize("directions", PAIRS, ids="+".join)
@pytest.mark.parametrize("pick", [None, "all"])
def test_a_parameter_that_is_handed_on_keeps_no_hook(directions, pick):
    model = UsesReturned()
    with ActivationCaching("source", directions=directions, use_nested_keys=True, pick=pick).prepare(model) as hooked:
        hooked(torch.tensor([1.0, 2.0, 4.0])).sum().backward()
    assert torch.equal(hooked.cache["bwd", "source"], torch.tensor([1.0, 2.0, 4.0]))
    assert torch.equal(model.source.weight.grad, torch.tensor([1.0, 2.0, 4.0]))
    assert not model.source.weight._backward_hooks


@pytest.mark.parametrize("directions", PAIRS, ids="+".join)
def test_a_second_backward_leaves_the_kept_gradient_of_a_parameter_alone(directions):
    model = UsesReturned()
    with ActivationCaching("source", directions=directions, use_nested_keys=True).prepare(model) as hooked:
        output = hooked(torch.tensor([1.0, 2.0, 4.0])).sum()
        output.backward(retain_graph=True)
    output.backward()
    assert torch.equal(model.source.weight.grad, torch.tensor([2.0, 4.0, 8.0]))
    assert torch.equal(hooked.cache["bwd", "source"], torch.tensor([1.0, 2.0, 4.0]))


class HandsOnByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.second = Second()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        hidden = self.linear(x)
        return 2 * self.drop(input=hidden) + 3 * self.second(x, hidden) + hidden


class Second(nn.Module):
    def forward(self, first, second):
        return second


@pytest.mark.parametrize("directions", PAIRS, ids="+".join)
def test_an_input_is_handed_on_from_any_place(directions):
    model = HandsOnByName().eval()
    with ActivationCaching("drop|second", directions=directions, use_nested_keys=True).prepare(model) as hooked:
        hooked(torch.ones(2, 3)).sum().backward()
    assert torch.equal(hooked.cache["bwd", "drop"], torch.full((2, 3), 2.0))
    assert torch.equal(hooked.cache["bwd", "second"], torch.full((2, 3), 3.0))


class HandsOn(nn.Module):
    """Layers that make their output, hand it on, give several, are called twice, and are followed by in-place work."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.made, self.again, self.deaf = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.same, self.pair, self.relu = nn.Identity(), Halves(), nn.ReLU(inplace=True)

    def forward(self, x):
        with torch.no_grad():
            self.deaf(x)
        left, right = self.pair(self.relu(self.made(x)))
        return self.same(self.again(torch.tanh(self.again(left * right))))


class Halves(nn.Module):
    def forward(self, x):
        return x * 2, x * 3


@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_alone_are_those_that_come_with_the_outputs(backwards):
    model, x = HandsOn(), torch.randn(5, 4)
    found = []
    for directions, hold in ((["bwd"], "detached"), (["fwd", "bwd"], "snapshot")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the second call, and the one without a graph
            with ActivationCaching(".+", directions=directions, hold=hold).prepare(model) as hooked:
                for _ in range(2):
                    y = hooked(x)
                    for _ in range(backwards):
                        y.square().sum().backward(retain_graph=True)
                    grads = hooked.cache if len(directions) == 1 else hooked.cache["bwd"]
                    found.append(dict(grads.items()))
    assert set(found[0]) == {"made", "again", "same", "pair", "relu"}
    for other in found[1:]:
        assert set(other) == set(found[0])
        assert all(torch.equal(other[path], grad) for path, grad in found[0].items())


class UsedThenChanged(nn.Module):
    """Uses what its part made of the input, changes that in place, and perhaps uses it again."""

    def __init__(self, part, change, again):
        super().__init__()
        self.part, self.change, self.again = part, change, again

    def forward(self, x):
        x = x * 1
        y = self.part(x)
        before = (2 * y).sum()
        self.change(x, y)
        return before + (5 * y).sum() if self.again else before


class Viewed(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.view = view

    def forward(self, x):
        return self.view(x)


VIEWS = {"same": lambda x: x, "flat": lambda x: x.view(-1), "rows": lambda x: x[:1], "turned": torch.t}
CHANGES = {
    "the output": lambda x, y: y.mul_(3),
    "a view of it": lambda x, y: y[..., :1].mul_(3),
    "what it is a view of": lambda x, y: x.mul_(3),
}


@pytest.mark.parametrize("hold", ["detached", "snapshot"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("direction", ["bwd", "grad_in"])
def test_a_handed_out_view_that_is_used_and_then_changed_in_place_is_refused(direction, view, change, hold):
    model = UsedThenChanged(Viewed(view), change, again=True)
    x = torch.ones(2, 3, requires_grad=True)
    with (
        pytest.raises(InplaceModificationError, match=r"'part'.* in place after") as caught,
        ActivationCaching("part", directions=[direction], hold=hold).prepare(model),
    ):
        model(x).backward()
    assert caught.value.paths == ("part",)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_module_that_computes_its_output_has_the_gradient_of_its_input_whatever_is_changed_later(change):
    model = UsedThenChanged(Viewed(lambda x: x + 1), change, again=True)
    with ActivationCaching("part", directions=["grad_in"]).prepare(model) as hooked:
        model(torch.ones(2, 3, requires_grad=True)).backward()
    third = 17.0 if change is CHANGES["the output"] else 7.0
    first = 7.0 if change is CHANGES["what it is a view of"] else 17.0
    assert torch.equal(hooked.cache["part"], torch.tensor([[first, third, third]] * 2))


def test_every_part_of_an_output_that_holds_one_tensor_twice_has_its_gradient():
    model = nn.Sequential(
        Viewed(lambda x: (x, 2 * x, x)), Viewed(lambda parts: (parts[0] + parts[1] + 3 * parts[2]).sum())
    )
    with ActivationCaching("0", directions=["bwd"], pick="all").prepare(model) as hooked:
        model(torch.ones(2, 3, requires_grad=True) * 1).backward()
    gradients = {key[1]: value.unique().tolist() for key, value in hooked.cache.items(True, True)}
    assert gradients == {"0": [4.0], "1": [1.0], "2": [4.0]}  # of the one tensor, wherever it is


class SkipsByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.part = nn.Linear(3, 3)
        self.skips = False

    def forward(self, x):
        hidden = self.first(x)
        named = {"skip": hidden} if self.skips else {}
        return (2 * self.part(x, **named) + 3 * hidden).sum()


@pytest.mark.parametrize("directions", PAIRS, ids=["bwd", "pair"])
def test_a_forward_that_is_replaced_inside_the_block_may_hand_on_what_it_gets_by_name(directions):
    model, x = SkipsByName(), torch.ones(2, 3)
    with ActivationCaching("part", directions=directions, use_nested_keys=True).prepare(model) as hooked:
        model(x).backward()
        model.part.forward = MethodType(lambda self, x, skip: skip, model.part)
        model.skips = True
        model(x).backward()
        gradient = hooked.cache["bwd", "part"].clone()
    assert torch.equal(gradient, torch.full((2, 3), 2.0))  # through the module, not the 5 of the tensor


class Attends(nn.Module):
    """Self-attention, which gets one tensor three times."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("pick", [None, 0])
def test_the_gradient_of_an_input_that_is_given_several_times_is_that_of_the_first_which_is_what_an_edit_changes(pick):
    model, x = Attends(), torch.randn(2, 3, 4)
    query = x.clone().requires_grad_()
    model.attention(query, x, x, need_weights=False)[0].square().sum().backward()
    with ActivationCaching("attention", directions=["grad_in"], pick=pick).prepare(model) as hooked:
        hooked(x.clone().requires_grad_()).square().sum().backward()
    torch.testing.assert_close(hooked.cache["attention"], query.grad, rtol=1e-5, atol=1e-6)  # other projections in one


class HandsOnAndUses(nn.Module):
    """Hands a tensor on, changes it in place where it was handed to, and may use the tensor in another way as well."""

    def __init__(self, forward):
        super().__init__()
        self.first, self.same, self.relu = nn.Linear(3, 3), nn.Identity(), nn.ReLU(inplace=True)
        self.run = forward

    def forward(self, x):
        return self.run(self, self.first(x))


def used_before(model, hidden):
    elsewhere = 5 * hidden
    return 3 * model.relu(model.same(hidden)) + elsewhere


def used_between(model, hidden):
    handed = model.same(hidden)
    elsewhere = 5 * hidden
    return 3 * model.relu(handed) + elsewhere


def used_instead(model, hidden):
    elsewhere = 5 * hidden
    model.relu(model.same(hidden))
    return elsewhere


@pytest.mark.parametrize("directions", PAIRS, ids="+".join)
@pytest.mark.parametrize("uses", [used_before, used_between, used_instead])
def test_what_is_handed_on_then_changed_in_place_and_used_elsewhere_is_refused(uses, directions):
    model = HandsOnAndUses(uses)
    message = "'same' passes its input on, and that was changed in place afterwards, .* capture direction 'bwd' of the"
    with (
        pytest.raises(InplaceModificationError, match=message) as caught,
        ActivationCaching("same", directions=directions, use_nested_keys=True, hold="snapshot").prepare(
            model
        ) as hooked,
    ):
        hooked(torch.ones(2, 3)).sum().backward()
    assert caught.value.paths == ("same",)


def in_the_usual_chain(model, hidden):
    return 3 * model.relu(model.same(hidden))


def in_part(model, hidden):
    handed = model.same(hidden)
    model.relu(handed[:1])
    return 3 * handed


def in_two_branches_of_which_one_is_not_asked(model, hidden):
    model.elsewhere = 5 * hidden
    return 3 * model.relu(model.same(hidden))


@pytest.mark.parametrize("directions", PAIRS, ids="+".join)
@pytest.mark.parametrize("uses", [in_the_usual_chain, in_part, in_two_branches_of_which_one_is_not_asked])
def test_what_is_handed_on_and_then_changed_in_place_has_its_gradient_where_nothing_else_uses_it(uses, directions):
    model, x = HandsOnAndUses(uses), torch.randn(2, 3)
    with ActivationCaching("first|same", directions=directions, use_nested_keys=True, hold="snapshot").prepare(
        model
    ) as hooked:
        hooked(x).sum().backward()
    wanted = 3 * (model.first(x) > 0).float()
    if uses is in_part:
        wanted[1:] = 3
    assert torch.equal(hooked.cache["bwd", "same"], wanted)
    assert torch.equal(hooked.cache["bwd", "first"], wanted)
