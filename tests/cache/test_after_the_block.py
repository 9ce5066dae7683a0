"""What is kept after the block is what was seen, and what is not kept is gone, without the garbage collector."""

import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from stable_ids import stable_id
from tdcache import ActivationCaching, Concatenate, First, Mean, Stack
from tdcache.cache.ownership import held_tensors


class HandsOn(nn.Module):
    """Returns what is not its own: a parameter, a buffer, the input, a view of each."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("buffer", torch.ones(4))

    def forward(self, x):
        given = {"weight": self.weight, "buffer": self.buffer, "input": x, "own": x * 1}[self.what.split()[0]]
        return given.view(2, 2) if "view" in self.what else given


class Holder(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.site, self.flat = HandsOn(what), nn.Flatten(0)

    def forward(self, x):
        y = self.site(x)
        return y, self.flat(x)


def the_output(output, **others):
    return output


def the_output_under_a_key(output, **others):
    return TensorDict({"a": output})


WHATS = ["weight", "buffer", "input", "own", "weight view", "buffer view", "input view", "own view"]
GRID = {
    "plain": {},
    "nested": {"use_nested_keys": True},
    "index": {"index": ...},
    "dtype": {"dtype": torch.float32},
    "parts": {"pick": "all"},
    "callback": {"callback": the_output},
    "callback with keys": {"callback": the_output_under_a_key},
    "first": {"reducer": First()},
    "stack": {"reducer": Stack()},
    "concatenate": {"reducer": Concatenate()},
    "input": {"directions": ["fwd_pre"]},
    "pair": {"directions": ["fwd", "bwd"]},
}
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def write_to_everything(model, x, y):
    """What an optimiser, a data loader that reuses its buffers, and a careless user do."""
    with torch.no_grad(), torch.inference_mode():
        for tensor in (*model.parameters(), *model.buffers(), x, *y):
            tensor.add_(100)


@pytest.mark.filterwarnings("ignore::tdcache.UnfiredSiteWarning")
@pytest.mark.parametrize("what", WHATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", GRID)
@pytest.mark.parametrize("leaf", [False, True])
def test_nothing_that_is_written_after_the_block_changes_what_is_kept(what, mode, options, leaf):
    model, x = Holder(what), torch.ones(4, requires_grad=leaf)
    with MODES[mode](), ActivationCaching("site|flat", **GRID[options]).prepare(model) as hooked:
        y = hooked(x)
    kept = hooked.cache
    leaves = list(kept.values(include_nested=True, leaves_only=True))
    assert leaves
    write_to_everything(model, x, y)
    assert all((each == 1).all() for each in leaves)


@pytest.mark.parametrize("what", ["own", "input", "weight"])
@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_stacks_of_unequal_shapes_are_copies_as_well(what, mode):
    model, x = Holder(what), torch.ones(4)
    outputs = []
    with MODES[mode](), ActivationCaching("site", reducer=Stack()).prepare(model) as hooked:
        for given in (x, x[:3], x[:2]):
            outputs.extend(hooked(given))
    write_to_everything(model, x, outputs)
    kept = hooked.cache["site"]
    assert all((each == 1).all() for each in (kept.values() if what != "weight" else [kept]))


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre", "grad_in"])
@pytest.mark.parametrize("options", [{}, {"pick": "all"}, {"reducer": Stack()}, {"reducer": First()}, {"index": ...}])
@pytest.mark.parametrize("site", [nn.Identity, nn.Flatten, lambda: nn.Unflatten(0, (2, 2))])
def test_gradients_do_not_follow_what_later_backwards_accumulate(direction, options, site):
    model, x = nn.Sequential(site()), torch.ones(4, 1, requires_grad=True)
    with ActivationCaching("0", directions=[direction], **options).prepare(model) as hooked:
        y = hooked(x)
        y.backward(torch.ones_like(y), retain_graph=True)
        kept = hooked.cache["0"]
        kept = kept if isinstance(kept, torch.Tensor) else kept["0"]
    x.grad.add_(5)
    y.backward(torch.ones_like(y))
    assert (kept == 1).all()


@pytest.mark.parametrize("direction", ["bwd", "bwd_pre", "grad_in"])
@pytest.mark.parametrize("reducer", [None, Stack(), First(), Concatenate(), Mean()])
def test_gradients_that_accumulate_inside_the_block_are_no_error(direction, reducer):
    model, x = nn.Sequential(nn.Identity()), torch.ones(4, requires_grad=True)
    with ActivationCaching("0", directions=[direction], reducer=reducer).prepare(model) as hooked:
        for _ in range(3):
            hooked(x).sum().backward()
    assert x.grad.tolist() == [3.0] * 4
    assert (hooked.cache["0"] == 1).all()


@contextmanager
def no_collector():
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Block(nn.Module):
    """A leaf handed on, a layer, a view, a tuple, an input in place of its own."""

    def __init__(self):
        super().__init__()
        self.same, self.layer, self.flat, self.pair = nn.Identity(), nn.Linear(4, 4), nn.Flatten(0), Pair()
        self.seen = []

    def forward(self, x):
        for module in (self.same, self.layer, self.flat):
            x = module(x)
            self.seen.append(weakref.ref(x))
        one, other = self.pair(x, scale=torch.ones(1))
        self.seen.extend([weakref.ref(one), weakref.ref(other)])
        return one + other


class Pair(nn.Module):
    def forward(self, x, *, scale):
        return x * scale, x


def a_callback(module, key, direction, **values):
    return torch.zeros(1)


LIFETIMES = [
    {},
    {"hold": "live"},
    {"hold": "snapshot"},
    {"pick": "all"},
    {"pick": "all", "hold": "live"},
    {"index": 0},
    {"index": 0, "hold": "live"},
    {"reducer": Stack()},
    {"reducer": First()},
    {"reducer": Mean(), "hold": "live"},
    {"reducer": Stack(), "hold": "live"},
    {"callback": a_callback},
    {"prepend": True},
    {"use_nested_keys": True, "hold": "live"},
    {"clear_cache": False},
    {"clear_cache": False, "reducer": Stack()},
]
DIRECTIONS = [
    ["fwd"],
    ["fwd_pre"],
    ["bwd"],
    ["bwd_pre"],
    ["grad_in"],
    ["fwd", "bwd"],
    ["fwd", "fwd_pre", "bwd", "grad_in"],
]


@pytest.mark.filterwarnings("ignore::tdcache.TdcacheWarning")
@pytest.mark.parametrize("options", LIFETIMES, ids=stable_id)
@pytest.mark.parametrize("directions", DIRECTIONS, ids=str)
@pytest.mark.parametrize("backward", ["none", "inside", "twice", "after", "graph"])
def test_everything_dies_with_its_last_reference(options, directions, backward):
    model = Block()
    with no_collector():
        x = torch.ones(2, 4, requires_grad=True) * 1
        context = ActivationCaching("same|layer|flat|pair", directions=directions, **options).prepare(model)
        with context as hooked:
            y = hooked(x)
            if backward in ("inside", "twice"):
                y.sum().backward(retain_graph=True)
            if backward == "twice":
                y.sum().backward()
            if backward == "graph":
                (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
                del grad
            alive = [weakref.ref(hooked), weakref.ref(context), weakref.ref(hooked.hooking_context.recorder)]
        if backward == "after":
            y.sum().backward()
        cached = hooked.cache.values(include_nested=True, leaves_only=True)
        alive += [weakref.ref(x), weakref.ref(y), *model.seen, *map(weakref.ref, cached)]
        del x, y, hooked, context, cached
        assert [each() for each in alive if each() is not None] == []


@pytest.mark.parametrize("directions", DIRECTIONS, ids=str)
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("options", [{}, {"hold": "live"}, {"callback": a_callback}], ids=stable_id)
def test_a_forward_that_ended_early_keeps_nothing(directions, stop, options):
    class Boom(Exception):
        pass

    class Raises(nn.Module):
        def forward(self, x):
            x = x * 1
            if not stop:
                raise Boom
            return x

    if stop and set(directions) & {"bwd", "bwd_pre", "grad_in"}:
        directions = ["fwd", "fwd_pre"]  # a gradient excludes stop_early; another context stops the forward
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), Raises()))
    stopper = ActivationCaching("0.0", stop_early=True).prepare(model) if stop else nullcontext()
    watcher = ActivationCaching(".*0|0.1", directions=directions, **options, allow_empty=True).prepare(model)
    with no_collector():
        x = torch.ones(2, 4, requires_grad=True) * 1
        dies = weakref.ref(x)
        with nullcontext() if stop else pytest.raises(Boom), watcher as hooked, stopper:
            hooked(x)
        del x, hooked
        watcher.cache.clear()
        # What an exception's traceback holds is the interpreter's; it is gone with the block above.
        assert dies() is None


@pytest.mark.parametrize("direction", ["fwd", "fwd_pre", "bwd", "grad_in"])
def test_first_lets_every_later_value_go(direction):
    model, seen = nn.Sequential(nn.Linear(4, 4)), []
    with no_collector(), ActivationCaching("0", directions=[direction], reducer=First()).prepare(model) as hooked:
        for number in range(3):
            x = torch.full((2, 4), float(number), requires_grad=True) * 1
            y = hooked(x)
            if direction in ("bwd", "grad_in"):
                grad = torch.ones_like(y)
                y.backward(grad)
                seen.append(weakref.ref(grad))
                del grad
            else:
                seen.append(weakref.ref(y if direction == "fwd" else x))
            del x, y
        assert [each() for each in seen[1:]] == [None, None]


def test_the_tensors_of_a_model_are_its_parameters_and_buffers_at_any_depth():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Sequential(nn.BatchNorm1d(2)))
    model[1].append(model[0])  # under a second name
    model.register_module("none", None)
    wanted = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert {id(tensor) for tensor in held_tensors(model)} == wanted
