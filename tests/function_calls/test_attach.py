"""Tests of hooks around calls: what they see, what they change, and that nothing is left of them."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from call_models import Block, Chain, Net
from model_state import state_of
from tdcache.errors import CaptureError, EditError, PathError, StopForward
from tdcache.function_calls.attach import AtCall, CallsLike, OneCall, attach_call, attach_rules
from tdcache.function_calls.sites import CallPattern, CallSite
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.introspect import function_mode_count


class Seen:
    """An after-hook that keeps what it saw, and a before-hook that keeps the arguments."""

    def __init__(self):
        self.outputs, self.arguments = [], []

    def after(self, module, args, kwargs, output):
        self.outputs.append(output)

    def before(self, module, args, kwargs):
        self.arguments.append((args, kwargs))


def watch(model, site):
    seen = Seen()
    return seen, attach_call(model, CallSite.parse(site), seen.before, seen.after)


def is_plain(model):
    return function_mode_count() == 0 and not any("forward" in module.__dict__ for module in model.modules())


def test_a_hook_sees_the_arguments_and_the_output_of_the_call():
    model, x = Chain(), torch.randn(2, 8)
    up = model.layers[1].up
    kept = []
    up.register_forward_hook(lambda module, args, output: kept.append(output))
    seen, handle = watch(model, "layers.1::gelu")
    with handle_of(handle):
        model(x)
    ((args, kwargs),) = seen.arguments
    assert args[0] is kept[0]
    assert kwargs == {}
    assert torch.equal(seen.outputs[0], F.gelu(kept[0]))


def handle_of(*handles):
    return MultiHookHandle(handles)


def test_outputs_are_those_of_the_model_to_the_bit_while_sites_are_open():
    model, x = Chain(), torch.randn(2, 8)
    expected = model(x)
    handles = [watch(model, f"layers.{at}::{name}")[1] for at in range(3) for name in ("gelu", "add")]
    with handle_of(*handles):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


def test_a_returned_output_replaces_that_of_the_call():
    model, x = Block(), torch.randn(2, 8)
    by_hand = x + model.down(torch.zeros(2, 16))
    site = CallSite("", "gelu")
    with handle_of(attach_call(model, site, None, lambda module, args, kwargs, output: output * 0)):
        assert torch.equal(model(x), by_hand)


def test_returned_arguments_replace_those_of_the_call():
    model, x = Block(), torch.randn(2, 8)
    by_hand = x + x
    with handle_of(attach_call(model, CallSite("", "add"), lambda module, args, kwargs: ((args[0], args[0]), kwargs))):
        assert torch.equal(model(x), by_hand)


def test_hooks_at_one_call_run_by_order():
    model, ran = Block(), []

    def note(name):
        return lambda *_: ran.append(name)

    orders = {"capture": Order.CAPTURE, "edit": Order.EDIT, "first": Order.FIRST, "second edit": Order.EDIT}
    site = CallSite("", "gelu")
    with handle_of(*(attach_call(model, site, None, note(name), order=order) for name, order in orders.items())):
        model(torch.randn(2, 8))
    assert ran == ["first", "edit", "second edit", "capture"]


def test_ordinals_count_the_calls_of_one_function_in_one_forward():
    class Twice(nn.Module):
        def forward(self, x):
            return torch.add(x, 1).relu() + 2

    model, x = Twice(), torch.zeros(2)
    first, one = watch(model, "::add")
    second, two = watch(model, "::add.1")
    with handle_of(one, two):
        model(x)
        model(x)
    assert [each.tolist() for each in first.outputs] == [[1.0, 1.0], [1.0, 1.0]]
    assert [each.tolist() for each in second.outputs] == [[3.0, 3.0], [3.0, 3.0]]


def test_a_name_does_not_depend_on_what_else_is_selected():
    model, x = Chain(), torch.randn(2, 8)
    alone, handle = watch(model, "layers.1::add")
    with handle_of(handle):
        model(x)
    among, handle = watch(model, "layers.1::add")
    others = [watch(model, site)[1] for site in ("layers.0::add", "layers.1::gelu", "layers.1::add.1", "::mul")]
    with handle_of(handle, *others):
        model(x)
    assert torch.equal(alone.outputs[0], among.outputs[0])


def test_calls_in_a_child_belong_to_the_child():
    model = nn.Sequential(Block(), Block())
    seen, handle = watch(model, "::gelu")
    with handle_of(handle):
        model(torch.randn(2, 8))
    assert seen.outputs == []


def test_a_child_that_is_reached_past_its_parent_keeps_its_calls():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Block())

        def forward(self, x):
            return F.gelu(self.inner[0](x))

    model = Outer()
    seen, handle = watch(model, "::gelu")
    with handle_of(handle):
        result = model(torch.randn(2, 8))
    assert len(seen.outputs) == 1
    assert seen.outputs[0] is result


def test_a_module_made_on_the_fly_belongs_to_its_caller():
    class Maker(nn.Module):
        def forward(self, x):
            return nn.Softmax(-1)(x)

    model = Maker()
    seen, handle = watch(model, "::softmax")
    with handle_of(handle):
        model(torch.ones(2))
    assert seen.outputs[0].tolist() == [0.5, 0.5]


def test_what_hooks_call_is_no_call_of_the_module():
    model, x = Block(), torch.randn(2, 8)
    expected = model(x)
    model.register_forward_pre_hook(lambda module, args: [F.gelu(args[0]), None][1])
    model.register_forward_hook(lambda module, args, output: [F.gelu(output), None][1])
    model.up.register_forward_hook(lambda module, args, output: [F.gelu(output), None][1])
    ours = attach_call(model, CallSite("", "add"), None, lambda module, args, kwargs, output: [F.gelu(output), None][1])
    seen, handle = watch(model, "::gelu")
    with handle_of(ours, handle):
        assert torch.equal(model(x), expected)
    assert len(seen.outputs) == 1


def test_a_composite_function_is_one_call():
    model = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 1, 8)
    seen, whole = watch(model, "::multi_head_attention_forward")
    inside, handle = watch(model, "::softmax")
    with handle_of(whole, handle):
        model(x, x, x)
    assert len(seen.outputs) == 1
    assert inside.outputs == []


@pytest.mark.parametrize("kind", ["attention", "layer"])
def test_a_fused_path_is_refused_by_name(kind):
    model = (nn.MultiheadAttention(8, 2) if kind == "attention" else nn.TransformerEncoderLayer(8, 2, 16)).eval()
    x = torch.randn(3, 1, 8)
    _, handle = watch(model, "::relu")
    with handle_of(handle), torch.no_grad(), pytest.raises(CaptureError) as error:
        model(*(x, x, x) if kind == "attention" else (x,))
    assert str(error.value) == (
        f"{type(model).__name__} would run its fused path here, which makes no calls that could be seen; switch it off "
        "with torch.backends.mha.set_fastpath_enabled(False), or select the modules around it"
    )
    assert is_plain(model)


def test_modules_around_a_fused_path_leave_it_on():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), Block()).eval()
    x = torch.randn(3, 1, 8)
    with torch.no_grad():
        expected = model(x)
        seen, handle = watch(model, "1::add")
        with handle_of(handle):
            assert torch.equal(model(x), expected)
    assert len(seen.outputs) == 1


def test_a_residual_sum_in_place_is_a_call():
    model, x = Net(), torch.randn(1, 3, 4, 4)
    expected = model(x)
    seen, handle = watch(model, "::add_")
    with handle_of(handle):
        assert torch.equal(model(x), expected)
    by_hand = model.two(F.relu(model.one(x))) + x
    assert torch.equal(seen.outputs[0], by_hand)
    with handle_of(attach_call(model, CallSite("", "relu", 1), lambda module, args, kwargs: ((x,), {}))):
        assert torch.equal(model(x), F.relu(x))


def test_removing_restores_the_model_exactly():
    model = Chain()
    before = state_of(model)
    handles = [watch(model, f"layers.{at}::{name}")[1] for at in range(3) for name in ("add", "gelu", "mul.3")]
    handles.append(watch(model, "::mul")[1])
    model(torch.randn(2, 8))
    for handle in handles:
        handle.remove()
        handle.remove()
    assert state_of(model) == before
    assert is_plain(model)


def test_a_forward_that_was_there_is_put_back():
    model, x = Block(), torch.randn(2, 8)
    own = model.forward
    calls = []

    def wrapped(*args):
        calls.append(1)
        return own(*args)

    model.forward = wrapped
    seen, handle = watch(model, "::gelu")
    with handle_of(handle):
        model(x)
    assert model.__dict__["forward"] is wrapped
    assert len(calls) == len(seen.outputs) == 1


def test_a_forward_that_was_wrapped_meanwhile_is_left_alone():
    model, x = Block(), torch.randn(2, 8)
    seen, handle = watch(model, "::gelu")
    inner = model.forward
    model.forward = lambda *args: inner(*args)
    wrapper = model.forward
    handle.remove()
    assert model.__dict__["forward"] is wrapper
    model(x)
    assert seen.outputs == []
    again, handle = watch(model, "::gelu")
    with handle_of(handle):
        model(x)
    assert model.__dict__["forward"] is wrapper
    assert len(again.outputs) == 1


def test_half_done_registration_is_undone():
    class Broken:
        def wants(self, name):
            return False

        def needs(self, names, *, tables):
            raise ValueError("no")

    model = Chain()
    good = OneCall(CallSite("", "mul"), AtCall(None, None, 0))
    with pytest.raises(ValueError, match=r"^no$"):
        attach_rules(model, [(model, good), (model.layers[0], Broken())])
    assert is_plain(model)


def test_a_path_that_is_not_there_is_refused():
    with pytest.raises(PathError, match=r"^path 'layer\.0' names none of the"):
        attach_call(Chain(), CallSite("layer.0", "add"))


def raiser(error):
    def raise_it(*_):
        raise error

    return raise_it


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), StopForward("x")], ids=["error", "interrupt", "stop"]
)
@pytest.mark.parametrize("where", ["before", "after", "pre-hook", "hook", "child", "call"])
def test_an_exception_anywhere_leaves_nothing(error, where):
    model, x = Chain(), torch.randn(2, 8)
    expected = model(x)
    before = state_of(model)
    site, block = CallSite("layers.1", "gelu"), model.layers[1]
    handles = [watch(model, f"layers.{at}::add")[1] for at in range(3)]
    if where in ("before", "after"):
        handles.append(attach_call(model, site, **{where: raiser(error)}))
    elif where == "call":
        handles.append(attach_call(model, site, lambda module, args, kwargs: (("no tensor",), {})))
        error = TypeError()
    else:
        target = block.up if where == "child" else block
        register = target.register_forward_hook if where == "hook" else target.register_forward_pre_hook
        handles.append(register(raiser(error)))
    with handle_of(*handles):
        for _ in range(3):
            with pytest.raises(type(error)):
                model(x)
            assert function_mode_count() == 0
    assert state_of(model) == before
    assert torch.equal(model(x), expected)


def test_a_hook_before_a_call_that_returns_something_else_is_refused():
    model = Block()
    with handle_of(attach_call(model, CallSite("", "gelu"), lambda *_: 3)), pytest.raises(EditError) as error:
        model(torch.randn(2, 8))
    assert str(error.value) == "a hook before 'gelu' returns None or (args, kwargs), a tuple and a dict; got int"


def test_threads_have_their_own_forwards():
    model = Chain()
    inputs = [torch.randn(2, 8) for _ in range(4)]
    expected = [model(x) for x in inputs]
    sums, results = {}, {}
    barrier = threading.Barrier(4)

    def keep(module, args, kwargs, output):
        sums.setdefault(threading.current_thread().name, []).append(output)

    def run(at):
        barrier.wait()
        for _ in range(20):
            results[at] = model(inputs[at])

    with handle_of(*(attach_call(model, CallSite(f"layers.{at}", "add"), None, keep) for at in range(3))):
        threads = [threading.Thread(target=run, args=(at,), name=str(at)) for at in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for at in range(4):
        assert torch.equal(results[at], expected[at])
        assert len(sums[str(at)]) == 60
        assert torch.equal(sums[str(at)][-1] * 2, expected[at])


def test_a_mode_of_the_user_keeps_working():
    class Counting(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    class Own(nn.Module):
        def forward(self, x):
            with Counting() as self_made:
                y = F.gelu(x)
            self.made = self_made.names
            return y + F.gelu(y)

    model, x = Own(), torch.randn(2)
    with Counting() as idle:
        expected = model(x)
    seen, handle = watch(model, "::gelu.1")
    with handle_of(handle), Counting() as mode:
        result = model(x)
    assert torch.equal(result, expected)
    assert mode.names == idle.names
    assert model.made == ["gelu"]
    assert len(seen.outputs) == 1


def test_recursion_counts_each_forward_by_itself():
    class Recursive(nn.Module):
        def forward(self, x, depth=2):
            y = torch.add(x, 1)
            return torch.add(self(y, depth - 1), 10) if depth else y

    model = Recursive()
    first, one = watch(model, "::add")
    second, two = watch(model, "::add.1")
    with handle_of(one, two):
        model(torch.zeros(()))
    assert [each.item() for each in first.outputs] == [1, 2, 3]
    assert [each.item() for each in second.outputs] == [13, 23]


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, at the first jvp
def test_transforms_of_torch_func_see_the_edit():
    model, x = Block(), torch.randn(3, 8)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).sum()

    with handle_of(attach_call(model, CallSite("", "gelu"), None, lambda module, args, kwargs, output: output * 0)):
        batched = torch.vmap(model)(x)
        gradient = torch.func.grad(loss)(parameters, x)
        _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert torch.equal(batched, x + model.down.bias)
    assert gradient["up.weight"].abs().sum() == 0
    assert torch.equal(gradient["down.bias"], torch.full((8,), 3.0))
    assert torch.equal(tangent, torch.ones_like(x))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_of_torch_change_nothing(around):
    model, x = Chain(), torch.randn(2, 8)
    with around():
        expected = model(x)
        seen, handle = watch(model, "layers.2::add")
        with handle_of(handle):
            assert torch.equal(model(x), expected)
        assert torch.equal(seen.outputs[0] * 2, expected)


def test_gradients_flow_through_an_edit():
    model, x = Block(), torch.randn(2, 8, requires_grad=True)
    (by_hand,) = torch.autograd.grad((x + 3 * model.down(F.gelu(model.up(model.norm(x))))).sum(), x)
    triple = attach_call(model, CallSite("", "add"), lambda module, args, kwargs: ((args[0], 3 * args[1]), kwargs))
    with handle_of(triple):
        (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(gradient, by_hand, atol=1e-6)  # 3 * down(...) is rounded before the sum either way


class Checkpointed(Block):
    def forward(self, x):
        return x + checkpoint(self.inner, x, use_reentrant=False)

    def inner(self, x):
        return self.down(F.gelu(self.up(self.norm(x))))


def test_a_checkpointed_module_calls_its_hooks_again_in_the_backward_as_forward_hooks_are():
    model, x = Block(), torch.randn(2, 8, requires_grad=True)
    (by_hand,) = torch.autograd.grad((x + model.down(2 * F.gelu(model.up(model.norm(x))))).sum(), x)
    with handle_of(attach_call(model, CallSite("", "gelu"), None, lambda module, args, kwargs, output: 2 * output)):
        (gradient,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).sum(), x)
    assert torch.equal(gradient, by_hand)


def test_code_that_a_module_checkpoints_itself_is_read_once():
    model, x = Checkpointed(), torch.randn(2, 8, requires_grad=True)
    seen, handle = watch(model, "::gelu")
    with handle_of(handle):
        model(x).sum().backward()
    assert len(seen.outputs) == 1


def test_code_that_a_module_checkpoints_itself_is_not_edited():
    model, x = Checkpointed(), torch.randn(2, 8, requires_grad=True)
    edit = attach_call(model, CallSite("", "gelu"), None, lambda module, args, kwargs, output: 2 * output)
    with handle_of(edit), pytest.raises(EditError) as error:
        model(x)
    assert str(error.value) == (
        "'gelu' is called in a part of Checkpointed that checkpoints its own code: the backward would compute it again "
        "without the edit, with wrong gradients; switch checkpointing off, or run without gradients"
    )


def test_a_copy_made_meanwhile_has_no_sites():
    model, x = Chain(), torch.randn(2, 8)
    seen, handle = watch(model, "layers.1::add")
    with handle_of(handle):
        copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        copied.layers[1].down.weight.data.zero_()
        copied.layers[1].down.bias.data.zero_()
    model.layers[1].register_forward_pre_hook(lambda *_: pytest.fail("the copy runs the original"))
    for each in (copied, loaded):
        each(x)
        assert is_plain(each)
    assert seen.outputs == []
    assert torch.equal(copied.layers[1](x), x)


def test_the_signature_of_a_forward_stays_what_it_was():
    model = Block()
    expected = inspect.signature(model.forward)
    _, handle = watch(model, "::add")
    with handle_of(handle):
        assert inspect.signature(model.forward) == expected


def test_a_pattern_means_calls_that_are_not_known_before():
    model, made = Chain(), []

    def make(site):
        made.append(str(site))
        return AtCall(None, None, Order.CAPTURE)

    pattern = CallPattern.parse(r"x::(gelu|add(\.\d)?)")
    rules = [(layer, CallsLike(f"layers.{at}", pattern, make)) for at, layer in enumerate(model.layers)]
    with attach_rules(model, rules):
        model(torch.randn(2, 8))
        model(torch.randn(2, 8))
    assert made == [f"layers.{at}::{name}" for at in range(3) for name in ("gelu", "add")]


def test_a_scope_knows_what_its_module_called():
    model = Chain()
    _, handle = watch(model, "layers.1::softmax")
    with handle_of(handle):
        model(torch.randn(2, 8))
        assert {"gelu", "add"} <= set(model.layers[1].forward.called())
