"""Gradient hooks against torch's own full backward hooks, and in the places where those fail."""

import dataclasses
import gc
import weakref
from collections import OrderedDict
from contextlib import contextmanager

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import reference
from tdcache.errors import InplaceModificationError
from tdcache.hooks import HookFactory, register_hook_to_module, values


class TwoByTwo(nn.Module):
    """Two tensors in, two out; the second output does not depend on the second input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(9.0).reshape(3, 3) / 9)

    def forward(self, a, b):
        return a @ self.weight * b, a.sin()


class Returning(nn.Module):
    """Returns what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def seen_by(module, direction, call):
    """The arguments after the module with which a hook of the direction is called."""
    seen = []
    handle = register_hook_to_module(module, lambda module, *grads: seen.append(reference.copied(grads)), direction)
    try:
        call()
    finally:
        handle.remove()
    return seen


@contextmanager
def registered(module, hook, direction):
    handle = register_hook_to_module(module, hook, direction)
    try:
        yield
    finally:
        handle.remove()


def same(one, other):
    """Whether two nested tuples of tensors and None are bit for bit the same."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return (
        torch.equal(one, other) if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) else one is other
    )


def linear_call():
    module = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    return module, lambda: (module(x).sin().sum() + x.sum()).backward()


def first_layer_call():
    module = nn.Linear(3, 3)
    return module, lambda: module(torch.ones(2, 3)).sin().sum().backward()


def both_outputs_call():
    module = TwoByTwo()
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    return module, lambda: sum(output.sin().sum() for output in module(a, b)).backward()


def one_output_call():
    module = TwoByTwo()
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    return module, lambda: module(a, b)[0].sin().sum().backward()


def same_tensor_twice_call():
    module = TwoByTwo()
    a = torch.randn(2, 3, requires_grad=True)
    return module, lambda: module(a, a)[0].sin().sum().backward()


def called_twice_call():
    module = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    return module, lambda: module(module(x).sin()).sum().backward()


def passed_on_call():
    model = nn.Sequential(
        OrderedDict(a=nn.Linear(3, 3), keep=nn.Dropout(0.5))
    ).eval()  # hands its input on in eval mode
    x = torch.randn(2, 3, requires_grad=True)

    def call():
        hidden = model.a(x)
        (3 * model.keep(hidden) + hidden).sum().backward()

    return model.keep, call


CALLS = [
    linear_call,
    first_layer_call,
    both_outputs_call,
    one_output_call,
    same_tensor_twice_call,
    called_twice_call,
    passed_on_call,
]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # what torch says where no input needs a gradient
@pytest.mark.parametrize("direction", ["bwd", "grad_in"])
@pytest.mark.parametrize("make", CALLS)
def test_both_gradients_are_those_of_torchs_full_backward_hook(make, direction):
    module, call = make()
    expected = reference.full_backward(module, call)
    assert same(tuple(seen_by(module, direction, call)), tuple(expected))
    assert expected


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("make", CALLS)
def test_the_gradient_of_the_output_is_that_of_torchs_full_backward_pre_hook(make):
    module, call = make()
    expected = []
    handle = module.register_full_backward_pre_hook(lambda module, grads: expected.append((reference.copied(grads),)))
    call()
    handle.remove()
    assert same(tuple(seen_by(module, "bwd_pre", call)), tuple(expected))
    assert expected


@pytest.mark.parametrize(
    ("direction", "edit"),
    [
        ("bwd", lambda module, grad_input, grad_output: (grad_input[0] * 3,)),
        ("bwd", lambda module, grad_input, grad_output: (grad_output[0] @ torch.ones(3, 3),)),
        ("bwd_pre", lambda module, grad_output: (grad_output[0] * 3,)),
    ],
)
def test_an_edit_changes_the_gradients_upstream_as_it_does_in_torch(direction, edit):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Tanh())
    x = torch.randn(2, 3)

    def gradients():
        return torch.autograd.grad(model(x).sum(), [*model.parameters()])

    plain = gradients()
    with registered(model[1], edit, direction):
        ours = gradients()
    register_theirs = (
        model[1].register_full_backward_hook if direction == "bwd" else model[1].register_full_backward_pre_hook
    )
    handle = register_theirs(edit)
    theirs = gradients()
    handle.remove()
    assert same(ours, theirs)
    assert not torch.equal(ours[0], plain[0])


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre", "grad_in"])
def test_a_bare_tensor_is_taken_for_the_only_gradient(direction):
    module, x = nn.Linear(3, 3), torch.ones(1, 3, requires_grad=True)
    with registered(module, lambda *args: torch.full((1, 3), 2.0), direction):
        (bare,) = torch.autograd.grad(module(x).sum(), x)
    with registered(module, lambda *args: (torch.full((1, 3), 2.0),), direction):
        (wrapped,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(bare, wrapped)


def test_an_input_that_needs_no_gradient_has_none():
    """torch makes one up for it: a gradient of zeros, or one that nobody asked for."""
    module, a, b = TwoByTwo(), torch.randn(2, 3), torch.randn(2, 3, requires_grad=True)
    call = lambda: module(a, b)[0].sin().sum().backward()  # noqa: E731
    (((_, expected), _),) = reference.full_backward(module, call)
    (((first, second), _),) = seen_by(module, "bwd", call)
    assert first is None
    assert torch.equal(second, expected)


def test_an_edit_of_several_gradients_reaches_each_input():
    module = TwoByTwo()
    a, b = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    with registered(module, lambda module, grad_input, grad_output: (grad_input[0] * 2, None), "bwd"):
        edited = torch.autograd.grad(module(a, b)[0].sum(), [a, b], allow_unused=True)
    plain = torch.autograd.grad(module(a, b)[0].sum(), [a, b])
    assert torch.equal(edited[0], plain[0] * 2)
    assert edited[1] is None


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre", "grad_in"])
def test_none_for_the_only_gradient_ends_it_there(direction):
    module, x = nn.Linear(3, 3), torch.ones(1, 3, requires_grad=True)
    with registered(module, lambda *args: (None,), direction):
        module(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros(1, 3))


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre", "grad_in"])
def test_an_in_place_operation_after_the_module_does_not_matter(direction):
    """torch's full backward hook raises here; the expected gradient is that of the same model without in-place ReLU."""
    inplace = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 1))
    plain = nn.Sequential(inplace[0], nn.ReLU(), inplace[2])
    x = torch.randn(4, 3, requires_grad=True)
    expected = seen_by(plain[0], direction, lambda: plain(x).sum().backward())
    assert same(tuple(seen_by(inplace[0], direction, lambda: inplace(x).sum().backward())), tuple(expected))
    assert expected


def test_an_in_place_operation_after_a_module_that_passes_its_input_on_does_not_matter():
    inplace = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.ReLU(inplace=True))
    plain = nn.Sequential(inplace[0], nn.Identity(), nn.ReLU())
    x = torch.randn(4, 3)
    ((_, expected),) = reference.full_backward(plain[1], lambda: plain(x).sum().backward())
    assert same(tuple(seen_by(inplace[1], "bwd_pre", lambda: inplace(x).sum().backward())), ((expected,),))


@pytest.mark.parametrize("direction", ["bwd", "grad_in"])
def test_an_input_that_is_passed_on_and_then_overwritten_is_an_error_rather_than_silence(direction):
    model = nn.Sequential(nn.Linear(3, 3), nn.Identity(), nn.ReLU(inplace=True))
    register_hook_to_module(model[1], lambda *args: None, direction, path="1")
    loss = model(torch.ones(1, 3)).sum()
    with pytest.raises(InplaceModificationError) as caught:
        loss.backward()
    assert caught.value.paths == ("1",)


def test_a_module_that_changes_its_input_in_place_is_refused_for_the_gradient_of_its_input():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    register_hook_to_module(model[1], lambda *args: None, "grad_in", path="act")
    with pytest.raises(InplaceModificationError) as caught:
        model(torch.ones(1, 3))
    assert caught.value.paths == ("act",)


def test_the_gradient_of_an_in_place_modules_output_is_seen():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 1, bias=False))
    x = torch.randn(2, 3)
    ((grads,),) = seen_by(model[1], "bwd_pre", lambda: model(x).sum().backward())
    assert torch.equal(grads[0], model[2].weight.expand(2, 3))


@dataclasses.dataclass
class Answer:
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize(
    "container",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, {"deep": (b,)}],
        lambda a, b: {"a": a, "b": b},
        lambda a, b: OrderedDict(a=a, b=b),
        lambda a, b: Answer(a, b),
        lambda a, b: (Answer(a, None), None, b),
        lambda a, b: TensorDict({"a": a, "b": b}),
    ],
)
def test_the_gradients_of_every_tensor_of_a_structured_output_are_seen(container):
    module = Returning(lambda x: container(2 * x, 3 * x))
    x = torch.ones(2, requires_grad=True)

    def call():
        leaves = [tensor for _, tensor in values.leaves(module(x))]
        (5 * leaves[0] + 7 * leaves[1]).sum().backward()

    assert same(tuple(seen_by(module, "bwd_pre", call)), (((torch.full((2,), 5.0), torch.full((2,), 7.0)),),))
    assert torch.equal(x.grad, torch.full((2,), 31.0))


@pytest.mark.parametrize(
    "container", [lambda a, b: {"a": a, "b": b}, lambda a, b: Answer(a, b), lambda a, b: [(a,), b]]
)
def test_the_gradients_of_every_tensor_of_a_structured_input_are_seen_positional_ones_first(container):
    module = Returning(
        lambda first, *, value: sum((at + 2) * each for at, (_, each) in enumerate(values.leaves(value))) * first
    )
    first, a, b = (torch.ones(2, requires_grad=True) for _ in range(3))
    ((grad_input, grad_output),) = seen_by(module, "bwd", lambda: module(first, value=container(a, b)).sum().backward())
    assert same(grad_input, (torch.full((2,), 5.0), torch.full((2,), 2.0), torch.full((2,), 3.0)))
    assert same(grad_output, (torch.ones(2),))


def test_a_module_goes_on_writing_into_the_tensordict_it_was_given():
    def forward(td):
        td["y"] = td["x"] * 2
        return td

    module, td = Returning(forward), TensorDict({"x": torch.ones(2, requires_grad=True)})
    with registered(module, lambda *args: None, "grad_in"):
        module(td)
    assert torch.equal(td["y"], torch.full((2,), 2.0))


def test_integers_and_outputs_without_a_graph_are_left_alone():
    embedding = nn.Embedding(4, 3)
    ((grad_input, grad_output),) = seen_by(embedding, "bwd", lambda: embedding(torch.tensor([1, 2])).sum().backward())
    assert grad_input == (None,)
    assert same(grad_output, (torch.ones(2, 3),))
    with torch.no_grad():
        assert seen_by(embedding, "bwd", lambda: embedding(torch.tensor([1, 2]))) == []


def test_nothing_stays_on_a_leaf_that_a_module_hands_on():
    parameter = nn.Parameter(torch.ones(2))
    module = Returning(lambda: parameter)
    seen = []
    with registered(module, lambda module, grads: seen.append(grads), "bwd_pre"):
        for _ in range(3):
            module().sum().backward()
    assert len(seen) == 3
    assert not parameter._backward_hooks


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre", "grad_in"])
def test_a_hook_can_ask_for_the_gradient_of_the_gradient(direction):
    module, x = Returning(lambda x: x**3), torch.tensor([2.0], requires_grad=True)
    with registered(module, lambda *args: None, direction):
        (first,) = torch.autograd.grad(module(x), x, create_graph=True)
        (second,) = torch.autograd.grad(first, x)
    assert (first.item(), second.item()) == (12.0, 12.0)


@pytest.mark.parametrize("direction", ["bwd_pre", "grad_in"])
@pytest.mark.parametrize("edit_first", [True, False])
def test_edits_of_gradients_come_before_captures_whatever_the_order_of_registration(direction, edit_first):
    module, x, cache = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True), {}
    edit = HookFactory.make_setting_hook(torch.full((1, 2), 7.0), direction=direction)
    capture = HookFactory.make_caching_hook("grad", cache, direction=direction)
    for hook in (edit, capture) if edit_first else (capture, edit):
        register_hook_to_module(module, hook, direction)
    module(x).sum().backward()
    assert torch.equal(cache["grad"], torch.full((1, 2), 7.0))


@pytest.mark.parametrize("direction", ["bwd_pre", "grad_in"])
def test_edits_of_gradients_run_in_the_order_they_were_registered(direction):
    module, x = Returning(lambda x: x * 1), torch.ones(2, requires_grad=True)
    register_hook_to_module(module, lambda *args: args[1][0] + 1, direction)
    register_hook_to_module(module, lambda *args: args[1][0] * 10, direction)
    register_hook_to_module(module, lambda *args: args[1][0] - 100, direction, prepend=True)
    module(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), ((1.0 - 100) + 1) * 10))


def test_hooks_of_a_parent_and_its_child_each_see_their_own_gradient():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Returning(lambda x: 2 * x)

        def forward(self, x):
            return self.child(x) + x

    parent, x, seen = Skip(), torch.ones(1, requires_grad=True), {}
    for name, module in (("parent", parent), ("child", parent.child)):
        for _ in range(2):  # two hooks on one module share the alias of its input
            register_hook_to_module(
                module,
                lambda module, grad_input, grad_output, name=name: seen.update({name: grad_input[0].item()}),
                "bwd",
            )
    parent(x).sum().backward()
    assert seen == {"parent": 3.0, "child": 2.0}


def test_a_module_that_calls_itself_has_a_gradient_for_each_call():
    class Recursive(nn.Module):
        def forward(self, x, depth=2):
            return x * 2 if depth == 0 else self(x, depth - 1) + x

    module, x = Recursive(), torch.ones(1, requires_grad=True)
    for direction in ("grad_in", "bwd"):
        seen = seen_by(module, direction, lambda: module(x).sum().backward())
        assert [grad_input[0].item() for grad_input, _ in seen] == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre", "grad_in"])
def test_no_graph_is_kept_alive_by_a_hook(direction):
    module, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)
    gc.disable()  # freed by reference counts alone
    try:
        with registered(module, lambda *args: None, direction):
            output = module(x)
            node = weakref.ref(output)
            output.sum().backward()
            del output
            assert node() is None
    finally:
        gc.enable()


def test_a_hook_that_raises_in_the_backward_shows_its_own_error():
    module, x = nn.Linear(2, 2), torch.ones(1, 2, requires_grad=True)

    def broken(module, grads):
        raise ZeroDivisionError("in the hook")

    register_hook_to_module(module, broken, "bwd_pre")
    with pytest.raises(ZeroDivisionError, match="in the hook"):
        module(x).sum().backward()


def test_a_forward_that_raised_leaves_the_gradients_of_the_next_one_right():
    def forward(x):
        return x * 2 if x.sum() > 0 else 1 / 0

    module, x, seen = Returning(forward), torch.ones(1, requires_grad=True), []
    with registered(module, lambda module, grad_input, grad_output: seen.append(grad_input[0].item()), "grad_in"):
        with pytest.raises(ZeroDivisionError):
            module(-x)
        module(x).sum().backward()
    assert seen == [2.0]
