"""One hook point: hooks, their order, what they return, what removes them."""

import copy
import gc
import pickle
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from model_state import state_of
from tdcache import DirectionError, EditError, HookSignatureError, InplaceModificationError
from tdcache.points import HookPoint, LensHandle, Reshape


def add(amount, tensor, hook):
    return tensor + amount


def doubled(tensor, hook):
    return 2 * tensor


@pytest.fixture
def point():
    return HookPoint()


@pytest.fixture
def x():
    return torch.arange(6.0).reshape(2, 3)


def test_without_hooks_it_passes_on_the_very_object(point, x):
    assert point(x) is x
    assert point("anything") == "anything"


def test_without_hooks_its_forward_is_that_of_an_identity(point):
    assert point.forward.__code__.co_code == nn.Identity().forward.__code__.co_code
    assert not any(point.__dict__[name] for name in point.__dict__ if name.endswith("_hooks"))


def test_a_hook_is_called_with_the_tensor_and_the_point_by_keyword(point, x):
    calls = []
    point.add_hook(lambda tensor, **rest: calls.append((tensor, rest)))
    point(x)
    ((tensor, rest),) = calls
    assert tensor is x
    assert rest == {"hook": point}


def test_what_a_hook_returns_takes_the_place_and_none_leaves_it(point, x):
    point.add_hook(lambda tensor, hook: None)
    assert point(x) is x
    point.add_hook(lambda tensor, hook: tensor.sum())  # of any shape
    assert point(x) == x.sum()


def test_an_in_place_edit_takes_effect(point, x):
    def erase(tensor, hook):
        tensor[0] = 0

    point.add_hook(erase)
    assert torch.equal(point(x.clone()), torch.tensor([[0.0, 0, 0], [3, 4, 5]]))


def test_hooks_run_in_the_order_they_were_added_and_prepended_ones_first(point):
    seen = []
    for name, prepend in [("b", False), ("c", False), ("a", True), ("0", True)]:
        point.add_hook(lambda tensor, hook, name=name: seen.append(name), prepend=prepend)
    point(torch.ones(1))
    assert seen == ["0", "a", "b", "c"]
    assert len(point.fwd_hooks) == 4


def test_the_list_of_handles_is_in_the_order_of_the_calls(point):
    first, second, front = point.add_hook(doubled), point.add_hook(doubled), point.add_hook(doubled, prepend=True)
    assert point.fwd_hooks == [front, first, second]


def test_all_parameters_can_be_positional_in_the_original_order(point):
    handle = point.add_hook(doubled, "bwd", True, 3, True, ["other"])
    assert point.bwd_hooks == [handle]
    assert (handle.is_permanent, handle.context_level, handle.user_hook) == (True, 3, doubled)
    assert LensHandle(handle.hook, True, 3, doubled).hook is handle.hook


def test_the_handle_removes_the_hook_and_the_point_forgets_it(point, x):
    kept, handle = point.add_hook(partial(add, 1)), point.add_hook(partial(add, 10))
    handle.hook.remove()
    handle.hook.remove()
    assert torch.equal(point(x), x + 1)
    assert point.fwd_hooks == [kept]


# Gradients


def grad_of(point, x):
    x = x.clone().requires_grad_()
    (7 * point(x)).sum().backward()
    return x.grad


def test_a_gradient_hook_sees_the_gradient_of_what_comes_out(point, x):
    seen = []
    point.add_hook(lambda grad, hook: seen.append((grad, hook)), dir="bwd")
    assert torch.equal(grad_of(point, x), torch.full((2, 3), 7.0))
    assert torch.equal(seen[0][0], torch.full((2, 3), 7.0))
    assert seen[0][1] is point


@pytest.mark.parametrize("wrap", [lambda grad: grad, lambda grad: (grad,)], ids=["bare", "tuple"])
def test_what_a_gradient_hook_returns_flows_on(point, x, wrap):
    point.add_hook(lambda grad, hook: wrap(grad * 2), dir="bwd")
    point.add_hook(lambda grad, hook: grad + 1, dir="bwd")
    assert torch.equal(grad_of(point, x), torch.full((2, 3), 15.0))


def test_gradient_hooks_run_in_the_order_they_were_added_and_prepended_ones_first(point, x):
    point.add_hook(lambda grad, hook: grad + 1, dir="bwd")
    point.add_hook(lambda grad, hook: grad * 2, dir="bwd", prepend=True)
    assert torch.equal(grad_of(point, x), torch.full((2, 3), 15.0))


def test_a_gradient_hook_sees_one_branch_of_a_tensor_that_goes_several_ways(x):
    left, right, seen = HookPoint(), HookPoint(), {}
    left.add_hook(lambda grad, hook: seen.setdefault("left", grad), dir="bwd")
    right.add_hook(lambda grad, hook: seen.setdefault("right", grad), dir="bwd")
    x = x.requires_grad_() * 1
    (2 * left(x) + 3 * right(x) + 5 * x).sum().backward()
    assert (seen["left"].unique(), seen["right"].unique()) == (torch.tensor([2.0]), torch.tensor([3.0]))


def test_an_in_place_edit_of_a_gradient_changes_no_other_branch(x):
    left, right, seen = HookPoint(), HookPoint(), {}

    def erase(grad, hook):
        grad.zero_()

    left.add_hook(erase, dir="bwd")
    right.add_hook(lambda grad, hook: seen.setdefault("right", grad), dir="bwd")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (left(a) + right(b)).sum().backward()  # autograd hands one tensor to both
    assert a.grad.count_nonzero() == 0
    assert torch.equal(seen["right"], torch.ones(2, 3))


def test_an_in_place_operation_behind_a_gradient_hook_is_no_error(point, x):
    seen = []
    point.add_hook(lambda grad, hook: seen.append(grad), dir="bwd")
    y = x.requires_grad_() * 1
    point(y).relu_().sum().backward()
    assert torch.equal(seen[0], (x > 0).float())


def test_a_gradient_hook_keeps_no_graph_alive(point):
    point.add_hook(doubled, dir="bwd")
    y = torch.ones(3, requires_grad=True) * 1
    alive = weakref.ref(y)
    gc.disable()  # what only a collection would find must not be there
    try:
        point(y).sum().backward()
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_a_view_that_is_changed_in_place_behind_a_gradient_hook_is_an_error(point, x):
    point.name = "hook_view"
    point.add_hook(doubled, dir="bwd")
    y = x.requires_grad_() * 1
    with pytest.raises(
        InplaceModificationError, match="'hook_view' passes its input on, and that was changed in place"
    ):
        point(y[0]).relu_().sum().backward()


def test_several_gradient_hooks_survive_an_in_place_operation_behind_them(point, x):
    seen = []
    for number in range(3):
        point.add_hook(lambda grad, hook, number=number: seen.append(number) or grad * 2, dir="bwd")
    y = x.requires_grad_() * 1
    point(y).relu_().sum().backward()
    assert seen == [0, 1, 2]
    assert torch.equal(x.grad, 8 * (x > 0).float())


def test_a_removed_gradient_hook_does_not_fire_in_a_later_backward(point, x):
    handle = point.add_hook(lambda grad, hook: grad * 100, dir="bwd")
    x = x.requires_grad_()
    y = point(x).sum()
    handle.hook.remove()
    y.backward()
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_without_grad_a_gradient_hook_is_no_obstacle(point, x):
    point.add_hook(doubled, dir="bwd")
    assert torch.equal(point(x), x)
    with torch.no_grad():
        assert torch.equal(point(nn.Parameter(x)), x)
    with torch.inference_mode():
        assert torch.equal(point(x + 1), x + 1)


# Scale


def test_backward_scale_scales_the_gradient_itself(point, x):
    seen = []
    point.add_hook(lambda grad, hook: seen.append(grad), dir="bwd")
    point.backward_scale = 0.5
    assert torch.equal(grad_of(point, x), torch.full((2, 3), 7.0))  # looking changes nothing
    assert type(seen[0]) is torch.Tensor
    assert torch.equal(seen[0], torch.full((2, 3), 3.5))
    assert torch.equal(seen[0].sum(0), torch.full((3,), 7.0))  # any sum, not only the one over everything


def test_a_returned_gradient_is_in_the_scale_that_the_hook_sees(point, x):
    point.backward_scale = 4.0
    handle = point.add_hook(lambda grad, hook: grad, dir="bwd")
    assert torch.equal(grad_of(point, x), torch.full((2, 3), 7.0))
    handle.hook.remove()
    point.add_hook(lambda grad, hook: torch.full_like(grad, 8.0), dir="bwd")
    assert torch.equal(grad_of(point, x), torch.full((2, 3), 2.0))


def test_a_gradient_returned_under_a_scale_of_zero_is_an_error(point, x):
    point.backward_scale = 0
    point.add_hook(lambda grad, hook: grad, dir="bwd")
    with pytest.raises(EditError, match="backward_scale=0"):
        grad_of(point, x)


# Reshaping


class Heads:
    def convert(self, value):
        return value.unflatten(-1, (3, 1))

    def revert(self, value):
        return value.flatten(-2)


@pytest.mark.parametrize(
    "conversion",
    [Heads(), Reshape(Heads().convert, Heads().revert), (Heads().convert, Heads().revert)],
    ids=["object", "Reshape", "pair"],
)
def test_a_conversion_shows_hooks_another_layout_and_brings_edits_back(point, x, conversion):
    shapes = []
    point.enable_reshape(conversion)
    point.add_hook(lambda tensor, hook: shapes.append(tensor.shape))
    assert point(x) is x
    point.add_hook(lambda tensor, hook: tensor * 2)
    point.add_hook(lambda grad, hook: shapes.append(grad.shape) or grad * 10, dir="bwd")
    assert torch.equal(grad_of(point, x), torch.full((2, 3), 140.0))
    assert torch.equal(point(x), 2 * x)
    assert set(shapes) == {(2, 3, 1)}
    point.enable_reshape(None)
    shapes.clear()
    point(x)
    assert shapes == [(2, 3)]


def test_an_in_place_edit_survives_a_conversion_that_copies(point, x):
    def erase(tensor, hook):
        tensor.zero_()

    point.enable_reshape((lambda value: value.t().contiguous(), lambda value: value.t()))
    point.add_hook(erase)
    assert point(x).count_nonzero() == 0
    assert x.count_nonzero() == 5  # the model's own tensor is as it was


def test_something_that_is_no_conversion_is_refused(point):
    with pytest.raises(HookSignatureError, match=r"convert\(value\) and revert\(value\)"):
        point.enable_reshape(torch.flatten)


# Aliases


def test_a_hook_is_called_once_per_alias_each_time_on_what_came_before(point, x):
    seen = []

    def hook(tensor, hook):
        seen.append((hook.name, hook.layer(), hook.ctx is point.ctx))
        return tensor + 1

    point.add_hook(hook, alias_names=["blocks.1.old", "blocks.2.older"])
    assert torch.equal(point(x), x + 2)
    assert seen == [("blocks.1.old", 1, True), ("blocks.2.older", 2, True)]


def test_an_edit_under_several_aliases_survives_when_the_last_returns_none(point, x):
    point.add_hook(lambda tensor, hook: tensor + 1 if hook.name == "first" else None, alias_names=["first", "last"])
    assert torch.equal(point(x), x + 1)


def test_an_empty_list_of_aliases_still_calls_the_hook(point, x):
    point.add_hook(doubled, alias_names=[])
    assert torch.equal(point(x), 2 * x)


# Which hooks are here, and which go


@pytest.fixture
def full(point):
    """One temporary and one permanent hook a direction and level."""
    for direction in ("fwd", "bwd"):
        for level in (None, 1, 2):
            for permanent in (False, True):
                point.add_hook(doubled, direction, is_permanent=permanent, level=level)
    return point


def census(point):
    return [
        (direction, handle.is_permanent, handle.context_level)
        for direction in ("fwd", "bwd")
        for handle in point.handles(direction)
    ]


@pytest.mark.parametrize("direction", ["fwd", "bwd", "both"])
@pytest.mark.parametrize("including_permanent", [False, True])
@pytest.mark.parametrize("level", [None, 1, 3])
def test_removal_takes_what_its_arguments_mean_and_nothing_else(full, direction, including_permanent, level):
    def meant(which, permanent, at):
        return direction in (which, "both") and (including_permanent or not permanent) and level in (None, at)

    before = census(full)
    assert full.has_hooks(direction, including_permanent, level) == any(meant(*each) for each in before)
    full.remove_hooks(direction, including_permanent, level)
    assert census(full) == [each for each in before if not meant(*each)]
    assert not full.has_hooks(direction, including_permanent, level)
    assert len(full._forward_hooks) == len(census(full))


def test_removal_of_permanent_hooks_respects_the_level(point, x):
    point.add_hook(partial(add, 1), is_permanent=True, level=1)
    point.add_hook(partial(add, 10), is_permanent=True, level=2)
    point.remove_hooks(including_permanent=True, level=1)
    assert torch.equal(point(x), x + 10)


def test_removal_means_forward_hooks_unless_told_otherwise(full):
    full.remove_hooks()
    assert {which for which, permanent, _ in census(full) if not permanent} == {"bwd"}


def test_a_permanent_hook_stays(point, x):
    point.add_perma_hook(doubled)
    point.remove_hooks("both")
    assert torch.equal(point(x), 2 * x)
    point.remove_hooks("both", including_permanent=True)
    assert point(x) is x


@pytest.mark.parametrize("call", ["has_hooks", "remove_hooks"])
def test_an_unknown_direction_is_refused_before_anything_happens(full, call):
    before = census(full)
    with pytest.raises(DirectionError, match="'fwd', 'bwd' or 'both', got 'forward'"):
        getattr(full, call)("forward")
    assert census(full) == before


def test_a_hook_cannot_be_added_to_both_directions(point):
    before = state_of(point)
    with pytest.raises(DirectionError, match="'fwd' or 'bwd', got dir='both'"):
        point.add_hook(doubled, "both")
    assert state_of(point) == before


@pytest.mark.parametrize("hook", [lambda tensor: None, lambda tensor, point: None, 3])
def test_a_hook_that_cannot_be_called_is_refused_when_it_is_added(point, hook):
    before = state_of(point)
    with pytest.raises(HookSignatureError, match="hook"):
        point.add_hook(hook)
    assert state_of(point) == before


def test_a_foreign_hook_stays_and_hides_nothing(point, x):
    seen = []
    early = point.register_forward_hook(lambda module, args, output: output + 1)
    point.add_hook(lambda tensor, hook: seen.append(tensor))
    point.register_forward_hook(lambda module, args, output: output * 10, prepend=True)
    assert torch.equal(point(x), 10 * x + 1)
    assert torch.equal(seen[0], 10 * x + 1)
    point.remove_hooks("both", including_permanent=True)
    assert torch.equal(point(x), 10 * x + 1)
    early.remove()
    assert torch.equal(point(x), 10 * x)


# The rest


def test_the_scratch_space_is_replaced_so_that_what_was_taken_out_stays(point):
    point.ctx["k"] = 1
    taken = point.ctx
    point.clear_context()
    assert (point.ctx, taken) == ({}, {"k": 1})


@pytest.mark.parametrize(("name", "layer"), [("blocks.3.attn.hook_z", 3), ("transformer.h.11.hook", 11), ("0.hook", 0)])
def test_the_layer_is_read_from_the_name(point, name, layer):
    point.name = name
    assert point.layer() == layer


def test_a_name_without_a_layer_is_a_value_error(point):
    with pytest.raises(ValueError, match=r"no name yet.*setup\(\)"):
        point.layer()
    point.name = "hook_embed"
    with pytest.raises(ValueError, match="'hook_embed' is a layer number"):
        point.layer()


def test_the_repr_shows_name_and_hooks(point):
    assert repr(point) == "HookPoint()"
    point.name = "blocks.0.hook_z"
    point.add_hook(doubled)
    point.add_hook(doubled)
    point.add_hook(doubled, dir="bwd")
    assert repr(point) == "HookPoint(name='blocks.0.hook_z', 2 fwd, 1 bwd)"


def test_a_copy_has_hooks_of_its_own(point, x):
    seen = []
    point.add_hook(lambda tensor, hook: seen.append(hook))
    point.add_hook(doubled, dir="bwd")
    twin = copy.deepcopy(point)
    twin(x)
    assert seen == [twin]
    assert torch.equal(grad_of(twin, x), torch.full((2, 3), 14.0))
    twin.remove_hooks("both")
    seen.clear()
    point(x)
    assert seen == [point]
    assert len(point.bwd_hooks) == 1


def test_a_point_with_hooks_can_be_pickled(point, x):
    point.add_hook(doubled)
    again = pickle.loads(pickle.dumps(point))
    assert torch.equal(again(x), 2 * x)
    again.remove_hooks()
    assert again(x) is x


def test_a_hook_whose_repr_is_costly_is_never_spelled_out(point):
    class Large:
        def __repr__(self):
            raise AssertionError("asked for its repr")

    handle = point.add_hook(partial(add, Large()))
    assert "partial(add" in repr(point._forward_hooks[next(iter(point._forward_hooks))].__self__)
    handle.hook.remove()


def test_a_tuple_passes_as_a_whole(point, x):
    seen = []
    point.add_hook(lambda value, hook: seen.append(value))
    point.add_hook(lambda value, hook: (value[0] + 1, value[1]))
    first, second = point((x, x))
    assert torch.equal(first, x + 1)
    assert second is x
    assert seen[0][0] is x


def test_the_gradients_of_a_tuple_come_as_a_tuple(point, x):
    point.add_hook(lambda grads, hook: (grads[0] * 2, grads[1]), dir="bwd")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    left, right = point((a, b))
    (left + right).sum().backward()
    assert (a.grad.unique(), b.grad.unique()) == (torch.tensor([2.0]), torch.tensor([1.0]))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch, at a graph break
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_hooks_that_are_there_before_compiling_are_called(direction, x):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 3), HookPoint(), nn.ReLU())
    expected, twin = grad_of(model, x), copy.deepcopy(model)
    model[1].add_hook(doubled, direction)
    twin[1].register_forward_hook(
        (lambda module, args, output: 2 * output)
        if direction == "fwd"
        else (lambda module, args, output: output.register_hook(lambda grad: 2 * grad) and None)
    )
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(grad_of(compiled, x), grad_of(twin, x))
    assert not torch.allclose(grad_of(compiled, x), expected)
    torch._dynamo.reset()
