"""Registering hooks: what each direction is called with and may return, in which order hooks run, and their removal."""

import operator

import pytest
import torch
from torch import nn

from model_state import state_of
from tdcache.errors import DirectionError, HookSignatureError, StopForward
from tdcache.hooks import (
    DIRECTIONS,
    HookFactory,
    MultiHookHandle,
    Order,
    attach,
    attach_outputs,
    bracket,
    direction_row,
    register_hook_to_module,
)


class Scaled(nn.Module):
    """``factor * x + shift``, the factor a keyword argument."""

    def forward(self, x, shift=0.0, *, factor=2.0):
        return factor * x + shift


@pytest.fixture
def module():
    return Scaled()


@pytest.fixture
def x():
    return torch.tensor([[1.0, 2.0]], requires_grad=True)


def recorder(seen, returned=None):
    def hook(*args):
        seen.append(args)
        return returned

    return hook


def test_the_table_has_a_row_for_each_direction_and_positions_that_fit():
    assert {name: (row.params, row.value_index, row.returns_index) for name, row in DIRECTIONS.items()} == {
        "fwd": (("module", "args", "output"), 2, 2),
        "fwd_pre": (("module", "args"), 1, 1),
        "bwd": (("module", "grad_input", "grad_output"), 2, 1),
        "bwd_pre": (("module", "grad_output"), 1, 1),
        "grad_in": (("module", "grad_input", "grad_output"), 1, 1),
        "fwd_kwargs": (("module", "args", "kwargs", "output"), 3, 3),
        "fwd_pre_kwargs": (("module", "args", "kwargs"), 1, 1),
    }
    assert all(direction_row(name) is row for name, row in DIRECTIONS.items())


@pytest.mark.parametrize("direction", ["fwd", "fwd_pre", "fwd_kwargs", "fwd_pre_kwargs"])
def test_a_forward_hook_is_called_with_the_parameters_of_its_row(module, x, direction):
    seen = []
    register_hook_to_module(module, recorder(seen), direction)
    output = module(x, factor=3.0)
    values = {"module": module, "args": (x,), "kwargs": {"factor": 3.0}, "output": output}
    ((*args,),) = seen
    assert args == [values[name] if name != "output" else args[-1] for name in DIRECTIONS[direction].params]
    assert "output" not in DIRECTIONS[direction].params or args[-1] is output


@pytest.mark.parametrize(
    ("direction", "returned"),
    [
        ("fwd", torch.tensor([[7.0, 7.0]])),
        ("fwd_pre", (torch.tensor([[4.0, 4.0]]),)),
        ("fwd_pre", torch.tensor([[4.0, 4.0]])),
        ("fwd_kwargs", torch.tensor([[7.0, 7.0]])),
        ("fwd_pre_kwargs", ((torch.tensor([[4.0, 4.0]]),), {"factor": 5.0})),
    ],
)
def test_what_a_forward_hook_returns_means_what_it_means_in_torch(x, direction, returned):
    ours, theirs = Scaled(), Scaled()
    register_hook_to_module(ours, lambda *args: returned, direction)
    register = theirs.register_forward_hook if direction in ("fwd", "fwd_kwargs") else theirs.register_forward_pre_hook
    register(lambda *args: returned, with_kwargs=direction.endswith("kwargs"))
    assert torch.equal(ours(x, factor=3.0), theirs(x, factor=3.0))
    assert not torch.equal(ours(x, factor=3.0), Scaled()(x, factor=3.0))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_hook_that_returns_nothing_changes_nothing(module, x, direction):
    plain = module(x)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    register_hook_to_module(module, lambda *args: None, direction)
    hooked = module(x)
    (gradient,) = torch.autograd.grad(hooked.sum(), x)
    assert torch.equal(hooked, plain)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_removal_leaves_the_module_as_it_was_and_a_second_one_does_nothing(module, x, direction):
    before = {name: dict(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()}
    seen = []
    handle = register_hook_to_module(module, recorder(seen), direction)
    loss = module(x).sum()
    called = len(seen)
    handle.remove()
    handle.remove()
    loss.backward()  # a hook that already sits on the graph is silent as well
    module(x).sum().backward()
    assert len(seen) == called
    assert {
        name: dict(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()
    } == before


def place(module, kind, log):
    """Register one hook of a kind, which writes its kind to the log."""
    order = {"edit": Order.EDIT, "capture": Order.CAPTURE, "stop": Order.STOP, "first": Order.FIRST}[kind]
    hook = Placed(kind, log, order)
    return attach(module, hook, "fwd", order=order)


class Placed:
    def __init__(self, kind, log, order):
        self.kind, self.log, self.order = kind, log, order

    def __call__(self, module, args, output):
        self.log.append(self.kind)
        return output * 10 if self.kind == "edit" else None


@pytest.mark.parametrize(
    "registered", [("stop", "capture", "edit"), ("capture", "edit", "stop"), ("edit", "stop", "capture")]
)
def test_edits_come_before_captures_and_a_stop_after_both_whatever_the_order_of_registration(module, x, registered):
    log = []
    for kind in registered:
        place(module, kind, log)
    module(x)
    assert log == ["edit", "capture", "stop"]


def test_hooks_of_one_kind_run_in_the_order_they_were_registered(module, x):
    log = []
    for kind in ("capture", "edit", "capture", "edit"):
        attach(module, Placed(f"{kind}{len(log)}", log, Order[kind.upper()]), order=Order[kind.upper()])
    module(x)
    assert log == ["edit0", "edit0", "capture0", "capture0"]


def test_prepend_puts_a_hook_before_everything_that_is_there(module, x):
    log = []
    module.register_forward_hook(lambda *args: log.append("foreign"))
    place(module, "edit", log)
    place(module, "first", log)
    place(module, "capture", log)
    module(x)
    assert log == ["first", "foreign", "edit", "capture"]


def test_foreign_hooks_keep_their_places(module, x):
    log = []
    place(module, "capture", log)
    foreign = [module.register_forward_hook(lambda *args, at=at: log.append(at)) for at in range(2)]
    place(module, "edit", log)
    module(x)
    assert [entry for entry in log if isinstance(entry, int)] == [0, 1]
    assert log.index("edit") < log.index("capture")
    assert [handle.id in module._forward_hooks for handle in foreign] == [True, True]


def test_a_capture_of_the_input_sees_the_edited_input(module, x):
    cache = {}
    register_hook_to_module(module, HookFactory.make_caching_hook("x", cache, direction="fwd_pre"), "fwd_pre")
    register_hook_to_module(module, HookFactory.make_setting_hook(torch.zeros(1, 2), direction="fwd_pre"), "fwd_pre")
    assert torch.equal(module(x), torch.zeros(1, 2))
    assert torch.equal(cache["x"], torch.zeros(1, 2))


def test_a_stop_ends_the_forward_after_the_captures_of_its_site(module, x):
    cache = {}
    register_hook_to_module(module, HookFactory.make_stopping_hook("here"))
    register_hook_to_module(module, HookFactory.make_caching_hook("y", cache))
    model = nn.Sequential(module, nn.Linear(99, 1))  # the second module would fail
    with pytest.raises(StopForward) as caught:
        model(x)
    assert caught.value.key == "here"
    assert torch.equal(cache["y"], 2 * x)


def test_many_outputs_hooked_at_once_behave_as_hooks_attached_one_by_one(x):
    model, log = nn.Sequential(Scaled(), Scaled()), []
    model.append(model[0])  # under two names, with a hook for each
    before = state_of(model)
    model[1].register_forward_hook(lambda *args: log.append("foreign"))
    stop = attach(model[1], Placed("stop", log, Order.STOP), order=Order.STOP)
    handle = MultiHookHandle([stop])
    hooks = [Placed(f"capture{at}", log, Order.CAPTURE) for at in range(3)]
    attach_outputs(zip(model, hooks, strict=True), handle, Order.CAPTURE)
    attach_outputs([(model[1], Placed("front", log, Order.FIRST))], handle, Order.FIRST)
    attach_outputs([(model[1], Placed("edit", log, Order.EDIT))], handle, Order.EDIT)
    model(x)
    twice = ["capture0", "capture2"]
    assert log == [*twice, "front", "foreign", "edit", "capture1", "stop", *twice]
    handle.remove()
    model[1]._forward_hooks.popitem()  # the foreign one, which is all that is left
    assert state_of(model) == before


def test_a_bracket_closes_also_when_the_forward_raises(module, x):
    log, handle = [], MultiHookHandle()
    bracket(module, lambda *args: log.append("begin"), lambda *args: log.append("end"), handle)
    with handle, pytest.raises(TypeError):
        module(x, nonsense=1)
    module(x)
    assert log == ["begin", "end"]


@pytest.mark.parametrize(
    ("direction", "hook"),
    [
        ("fwd", lambda module, args: None),
        ("fwd", lambda module, args, output, more: None),
        ("fwd_pre", lambda module, args, output: None),
        ("bwd", lambda module, grad_output: None),
        ("bwd_pre", lambda module, grad_input, grad_output: None),
        ("fwd_kwargs", lambda module, args, output: None),
        ("fwd", lambda module, args, *, output: None),
        ("fwd", None),
    ],
)
def test_a_hook_that_could_not_be_called_is_refused(module, direction, hook):
    with pytest.raises(HookSignatureError):
        register_hook_to_module(module, hook, direction)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    "hook",
    [
        lambda *args: None,
        lambda module, args, output, more=None: None,
        lambda module, *rest: None,
        lambda module, args, output, **more: None,
        operator.itemgetter(0).__class__,  # a class, whose signature cannot always be read
    ],
)
def test_a_hook_that_can_be_called_is_accepted(module, hook):
    register_hook_to_module(module, hook, "fwd").remove()


@pytest.mark.parametrize("direction", ["forward", "", None, ("fwd",)])
def test_an_unknown_direction_is_refused(module, direction):
    with pytest.raises(DirectionError):
        register_hook_to_module(module, lambda *args: None, direction)


class Recorded:
    """A registration that notes its removal, and may fail at it."""

    def __init__(self, log, name, error=None):
        self.log, self.name, self.error = log, name, error

    def remove(self):
        self.log.append(self.name)
        if self.error is not None:
            raise self.error


def test_registrations_are_undone_last_first_and_once():
    log = []
    handle = MultiHookHandle([Recorded(log, "a"), Recorded(log, "b")])
    handle.add(Recorded(log, "c"))
    assert len(handle) == 3
    handle.remove()
    handle.remove()
    assert log == ["c", "b", "a"]
    assert len(handle) == 0


def test_a_failing_removal_does_not_keep_the_others_from_being_removed_and_the_first_failure_is_raised():
    log = []
    broken = [Recorded(log, "b", KeyError("first")), Recorded(log, "c", ValueError("second"))]
    handle = MultiHookHandle([Recorded(log, "a"), *reversed(broken), Recorded(log, "d")])
    with pytest.raises(KeyError, match="first"):
        handle.remove()
    assert log == ["d", "b", "c", "a"]


def test_a_handle_is_removed_at_the_end_of_its_block_also_when_the_block_raises():
    log = []
    with pytest.raises(ZeroDivisionError), MultiHookHandle([Recorded(log, "a")]) as handle:
        1 / (len(handle) - 1)
    assert log == ["a"]


def test_two_handles_add_up_to_one_over_both():
    log = []
    left, right = MultiHookHandle([Recorded(log, "a")]), MultiHookHandle([Recorded(log, "b")])
    both = left + right
    assert (len(both), len(left), len(right)) == (2, 1, 1)
    both.remove()
    assert log == ["b", "a"]
