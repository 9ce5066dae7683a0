"""A differential fuzz: random models, random options, against hooks that are written here with torch alone.

Each case makes three models of one recipe. One is captured by tdcache. One is watched by hooks of this file: they copy
every value, and send it through an identity whose backward copies the gradient, so that no alias, no in-place operation
and no option can get in the way. One runs bare, and says what the outputs and the ``.grad`` of the leaves must be.

Run ``python tests/differential.py --cases 10000 --seed 0``; a case that fails is printed with its recipe, and
``--only NUMBER`` runs it alone.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdcache import ActivationCaching, Concatenate, First, InplaceModificationError, Last, Mean, Stack, TdcacheWarning

WIDTH = 3
GRADIENTS = ("bwd", "bwd_pre", "grad_in")
OUTPUTS = ("fwd", "fwd_kwargs", "bwd", "bwd_pre")


class Part(nn.Module):
    """Has children in a list."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(children)


class Chain(Part):
    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Residual(Part):
    def forward(self, x):
        return x + self.parts[0](x)


class TwoCalls(Part):
    def forward(self, x):
        return self.parts[0](x) + 2 * self.parts[0](x * 0.5)


class Nested(Part):
    def forward(self, x):
        return self.parts[0](self.parts[0](x))


class Idle(Part):
    """Never calls its children."""

    def forward(self, x):
        return x * 1


class EveryOther(Part):
    """Calls its child in the first forward, the third, and so on."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__(*children)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.parts[0](x) if self.calls % 2 else x * 3


class WithoutGraph(Part):
    def forward(self, x):
        with torch.no_grad():
            y = self.parts[0](x)
        return x + y


class Own(nn.Module):
    """Hands its own parameter on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, WIDTH))

    def forward(self, x):
        return self.weight


class AddsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = Own()

    def forward(self, x):
        return x + self.own(x)


class Split(nn.Module):
    def forward(self, x):
        return x * 2, (x * 3, 7)


class Join(nn.Module):
    def forward(self, left, *, right):
        return left + right[0]


class Through(nn.Module):
    """Through a tuple and a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.split, self.join = Split(), Join()

    def forward(self, x):
        left, right = self.split(x)
        return self.join(left, right=right)


class Gives(nn.Module):
    """Hands a keyword argument on, beside what it computes."""

    def forward(self, x, *, state):
        return {"x": x * state, "state": state}


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gives = Gives()

    def forward(self, x):
        state = x * 2
        given = self.gives(x, state=state)
        return given["x"] + 0.5 * given["state"] + 3 * state


class Appends(nn.Module):
    """Writes into the list it is given."""

    def forward(self, x, states):
        states.append(states[0] + x)
        return x * 2


class Collects(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.appends = Appends()

    def forward(self, x):
        states = [x * 3]
        y = self.appends(x, states)
        return y + states[-1]


class Entries(nn.Module):
    """A TensorDict module in the middle of a plain one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = TensorDictModule(inner, in_keys=["x"], out_keys=["y"])

    def forward(self, x):
        return self.inner(TensorDict({"x": x * 2}))["y"]


class Transposed(nn.Module):
    def forward(self, x):
        return x.t()


class Views(nn.Module):
    """Through a view of what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.there, self.back = Transposed(), Transposed()

    def forward(self, x):
        return self.back(self.there(x)) * 2


class ChangesView(nn.Module):
    """Writes into a view that a module returned."""

    def __init__(self) -> None:
        super().__init__()
        self.view = Transposed()

    def forward(self, x):
        view = self.view(x * 2)
        view.mul_(3)
        return view.t() + 1


def linear() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH)


LEAVES = {
    "linear": linear,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
    "wrapped identity": lambda: nn.Sequential(nn.Identity()),
    "in place": lambda: nn.Sequential(linear(), nn.ReLU(inplace=True)),
    "own": AddsOwn,
    "through": Through,
    "keeps": Keeps,
    "collects": Collects,
    "entries": lambda: Entries(linear()),
    "views": Views,
    "changes view": ChangesView,
}
NODES = {
    "chain": Chain,
    "sequential": nn.Sequential,
    "residual": Residual,
    "two calls": TwoCalls,
    "nested": Nested,
    "idle": Idle,
    "every other": EveryOther,
    "without graph": WithoutGraph,
}
CHANGES_IN_PLACE = ("in place", "changes view")


def random_tree(rng: random.Random, depth: int = 2) -> Any:
    """A recipe of a module: the name of a leaf, or a tuple of the name of a node and its children."""
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(sorted(LEAVES))
    kind = rng.choice(sorted(NODES))
    count = rng.randint(1, 3) if kind in ("chain", "sequential") else 1
    return (kind, *(random_tree(rng, depth - 1) for _ in range(count)))


def build(tree: Any) -> nn.Module:
    """The module of a recipe."""
    return LEAVES[tree]() if isinstance(tree, str) else NODES[tree[0]](*map(build, tree[1:]))


def model_of(tree: Any) -> nn.Module:
    """The model of a recipe; its parameters are the same each time."""
    model = Chain(linear(), build(tree)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) - 0.4)
    return model


@dataclass
class Case:
    """One case: a model, options, and what is done in the block."""

    tree: Any
    paths: list[str]
    options: dict[str, Any]
    script: list[tuple[Any, ...]]
    leaf: bool

    @property
    def changes_in_place(self) -> bool:
        return any(repr(name) in repr(self.tree) for name in CHANGES_IN_PLACE)


def flat(value: Any, above: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of a value, with the steps to it, in order."""
    if isinstance(value, Tensor):
        return [(above, value)]
    if isinstance(value, TensorDictBase | dict):
        items = list(value.items())
    elif isinstance(value, list | tuple):
        items = list(enumerate(value))
    else:
        items = []
    return [each for step, child in items for each in flat(child, (*above, str(step)))]


def first_leaf(value: Any) -> Tensor:
    return flat(value)[0][1]


def last_leaf(value: Any) -> Tensor:
    return flat(value)[-1][1]


PICKS = {"none": None, "all": "all", "first leaf": first_leaf, "last leaf": last_leaf, "one": 0, "last": -1}


def doubled_output(output, **others):
    return first_leaf(output).detach() * 2


def doubled_input(args, **others):
    return first_leaf(args).detach() * 2


def doubled_gradient(grad_output, **others):
    return next(grad for grad in grad_output if grad is not None) * 2


CALLBACKS = {"fwd": doubled_output, "fwd_pre": doubled_input, "bwd_pre": doubled_gradient}
REDUCERS = [None, None, Last(), First(), Stack(), Concatenate(), Mean()]


def random_options(rng: random.Random, model: nn.Module, paths: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Some paths, and options that go with them."""
    directions = rng.sample([*OUTPUTS, "fwd_pre", "fwd_pre_kwargs", "grad_in"], rng.randint(1, 3))
    chosen = rng.sample(paths, rng.randint(1, min(4, len(paths))))
    options: dict[str, Any] = {
        "directions": directions,
        "pick": rng.choice(["none", "none", "none", "all", "first leaf", "last leaf", "one", "last"]),
        "hold": rng.choice(["detached", "detached", "snapshot", "live"]),
        "index": rng.choice([None, None, None, 0, slice(0, 1), (..., 0)]),
        "dtype": rng.choice([None, None, None, torch.float32]),
        "reducer": rng.choice(REDUCERS),
        "prepend": rng.random() < 0.2,
        "use_nested_keys": rng.random() < 0.5,
        "cache": rng.random() < 0.2,
    }
    if options["pick"] in ("one", "last"):
        several = [path for path in paths if isinstance(model.get_submodule(path), Split | Gives | Appends)]
        options["directions"] = [each for each in directions if each in OUTPUTS]
        chosen = [path for path in several if not isinstance(model.get_submodule(path), Appends)]
        if options["pick"] == "last":  # the last part of what Split gives is no tensor
            chosen = [path for path in chosen if isinstance(model.get_submodule(path), Gives)]
        if not (chosen and options["directions"]):
            return random_options(rng, model, paths)
    if rng.random() < 0.15:
        direction = rng.choice(sorted(CALLBACKS))
        options.update(directions=[direction], callback=CALLBACKS[direction], pick="none")
    if rng.random() < 0.2 and not set(options["directions"]) & set(GRADIENTS):
        options["stop_early"] = True
    if rng.random() < 0.2 and options["reducer"] is None and options["index"] is None and "callback" not in options:
        options["batch_dims"] = 0  # sites differ in shape where views are; see the stacked cases for more
    return chosen, options


def random_script(rng: random.Random, gradients: bool) -> list[tuple[Any, ...]]:
    """What is done in the block: forwards, backwards in any order, readings."""
    script: list[tuple[Any, ...]] = []
    open_losses: list[int] = []
    for number in range(rng.randint(1, 3)):
        graph = rng.random() < (0.85 if gradients else 0.4)
        script.append(("forward", number, graph))
        if graph:
            open_losses.append(number)
        while open_losses and rng.random() < 0.5:
            loss = rng.choice(open_losses)
            again = rng.random() < 0.3
            script.append(("backward", loss, again, rng.choice([1.0, 2.0]), rng.random() < 0.2))
            if not again:
                open_losses.remove(loss)
        if rng.random() < 0.3:
            script.append(("read",))
    rng.shuffle(open_losses)
    script.extend(("backward", loss, False, 1.0, False) for loss in open_losses)
    return script


def random_case(seed: str) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    if rng.random() < 0.1:
        return stacked_case(rng)
    tree = random_tree(rng, rng.choice([1, 2, 3]))
    model = model_of(tree)
    paths = [path for path, module in model.named_modules() if path and not isinstance(module, nn.ModuleList)]
    chosen, options = random_options(rng, model, paths)
    return Case(
        tree, chosen, options, random_script(rng, bool(set(options["directions"]) & set(GRADIENTS))), rng.random() < 0.5
    )


def stacked_case(rng: random.Random) -> Case:
    """A row of layers that become one entry."""
    count = rng.randint(2, 12)
    tree = ("chain", *[rng.choice(["linear", "tanh", "views", "through"]) for _ in range(count)])
    directions = rng.sample(["fwd", "fwd_pre", "bwd", "bwd_pre"], rng.randint(1, 2))
    options = {
        "directions": directions,
        "pick": "none",
        "hold": rng.choice(["detached", "snapshot"]),
        "index": rng.choice([None, 0]),
        "reducer": rng.choice([None, Stack(), Mean()]),
        "stack_by": "layer",
        "use_nested_keys": rng.random() < 0.5,
        "batch_dims": 0,
    }
    script = [("forward", 0, True), ("backward", 0, False, 1.0, False)]
    if rng.random() < 0.5:
        script += [("forward", 1, True), ("backward", 1, False, 2.0, False)]
    return Case(tree, [f"parts.1.parts.{number}" for number in range(count)], options, script, rng.random() < 0.5)


class Stopped(Exception):
    pass


@dataclass
class Event:
    """One value that one call of one site gave."""

    path: str
    direction: str
    steps: tuple[str, ...]
    forward: int
    serial: int
    value: Tensor
    backward: int = 0
    part: int = 0


class Recorded(torch.autograd.Function):
    """A copy whose backward tells its gradient."""

    @staticmethod
    def forward(ctx, tensor, tell):
        ctx.tell = tell
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.tell(grad.detach().clone())
        return grad, None


@dataclass
class Oracle:
    """The hooks that everything is held against."""

    case: Case
    model: nn.Module
    events: list[Event] = field(default_factory=list)
    forward: int = 0
    serial: int = 0
    backward: int = 0
    waiting: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for path in self.case.paths:
            module = self.model.get_submodule(path)
            module.register_forward_pre_hook(lambda m, a, k, path=path: self.on_input(path, m, a, k), with_kwargs=True)
            module.register_forward_hook(
                lambda m, a, k, o, path=path: self.on_output(path, m, a, k, o), with_kwargs=True
            )

    def begin(self) -> None:
        self.forward += 1
        self.waiting = set(self.case.paths)

    def note(self, path: str, direction: str, steps: tuple[str, ...], serial: int, value: Tensor) -> None:
        self.events.append(Event(path, direction, steps, self.forward, serial, value.detach().clone()))

    def picked(
        self, module: nn.Module, value: Any, *, of_input: bool, grad: bool
    ) -> list[tuple[tuple[str, ...], Tensor]]:
        """The tensors that are meant, each with the steps of its entry."""
        pick = PICKS[self.case.options["pick"]]
        parts = flat(value)
        if pick == "all":
            return parts
        if callable(pick):
            return [((), pick(value))]
        if pick is not None:
            items = list(value.values()) if isinstance(value, dict) else list(value)
            return [((), items[pick])]
        entries = value[0] if of_input and value else value
        if isinstance(entries, TensorDictBase):
            return [((), entries["x" if of_input else "y"])]
        if grad and of_input:
            parts = [part for part in parts if part[1].requires_grad]
        return [((), tensor) for _, tensor in parts[:1]]

    def on_input(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.serial += 1
        directions, serial = self.case.options["directions"], self.serial
        given = (*args, *kwargs.values())
        if self.case.options.get("callback") is doubled_input:
            self.note(path, "fwd_pre", (), serial, first_leaf(args) * 2)
        else:
            for direction in {"fwd_pre", "fwd_pre_kwargs"} & set(directions):
                for steps, tensor in self.picked(module, given, of_input=True, grad=False):
                    self.note(path, direction, steps, serial, tensor)
        if self.case.options.get("stop_early") and all(each.startswith("fwd_pre") for each in directions):
            self.tick(path)
        if "grad_in" not in directions or not torch.is_grad_enabled():
            return None
        wanted = self.picked(module, given, of_input=True, grad=True)
        exchange = self.exchange(path, ["grad_in"], serial, wanted)
        return tuple(rebuilt(each, exchange) for each in args), {
            k: rebuilt(each, exchange) for k, each in kwargs.items()
        }

    def on_output(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        self.serial += 1
        directions, serial = self.case.options["directions"], self.serial
        callback = self.case.options.get("callback")
        if callback is doubled_output:
            self.note(path, "fwd", (), serial, first_leaf(output) * 2)
        elif callback is None:
            for direction in {"fwd", "fwd_kwargs"} & set(directions):
                for steps, tensor in self.picked(module, output, of_input=False, grad=False):
                    self.note(path, direction, steps, serial, tensor)
        if self.case.options.get("stop_early") and not all(each.startswith("fwd_pre") for each in directions):
            self.tick(path)
        watched = [each for each in ("bwd", "bwd_pre") if each in directions]
        if not watched or not torch.is_grad_enabled():
            return None
        wanted = flat(output) if callback else self.picked(module, output, of_input=False, grad=True)
        exchange = self.exchange(path, watched, serial, wanted)
        return rebuilt(output, exchange)

    def exchange(
        self, path: str, directions: list[str], serial: int, wanted: list[tuple[tuple[str, ...], Tensor]]
    ) -> dict[int, list[Tensor]]:
        """What takes the place of each tensor, by its identity; the same tensor twice has two."""
        number = self.forward
        made: dict[int, list[Tensor]] = {}
        for part, (steps, tensor) in enumerate(wanted):
            if not tensor.requires_grad:
                continue

            def tell(grad, steps=steps, part=part):
                for direction in directions:
                    self.events.append(Event(path, direction, steps, number, serial, grad, self.backward, part))

            made.setdefault(id(tensor), []).append(Recorded.apply(tensor, tell))
        return made

    def tick(self, path: str) -> None:
        self.waiting.discard(path)
        if not self.waiting:
            raise Stopped


def rebuilt(value: Any, exchange: dict[int, list[Tensor]]) -> Any:
    """The value with tensors exchanged; lists and TensorDicts are the caller's and are written into."""
    if isinstance(value, Tensor):
        new = exchange.get(id(value))
        return value if not new else new.pop(0) if len(new) > 1 else new[0]
    if isinstance(value, TensorDictBase):
        for key, each in list(value.items()):
            value.set(key, rebuilt(each, exchange))
        return value
    if isinstance(value, list):
        value[:] = [rebuilt(each, exchange) for each in value]
        return value
    if isinstance(value, tuple):
        return tuple(rebuilt(each, exchange) for each in value)
    if isinstance(value, dict):
        return {key: rebuilt(each, exchange) for key, each in value.items()}
    return value


def expected(oracle: Oracle) -> dict[tuple[str, ...], Tensor | list[Tensor]]:
    """What the cache must hold, by key."""
    case, result = oracle.case, {}
    reducer = case.options["reducer"]
    nested = case.options["use_nested_keys"] or len(case.options["directions"]) > 1
    by_key: dict[tuple[str, ...], list[Event]] = {}
    for event in oracle.events if case.options.get("callback") is not doubled_gradient else first_parts(oracle.events):
        by_key.setdefault((event.direction, event.path, *event.steps), []).append(event)
    for key, events in by_key.items():
        if reducer is None or isinstance(reducer, Last):
            events = [each for each in events if each.forward == oracle.forward]
            newest = max((each.serial for each in events), default=0)
            events = [each for each in events if each.serial == newest][-1:]
        events.sort(key=lambda each: each.serial)
        if events:
            values = [kept(each.value, case) for each in events]
            result[key if nested else key[1:]] = reduced(values, reducer)
    return stacked(result, case, nested)


def first_parts(events: list[Event]) -> list[Event]:
    """What a callback makes of the gradients of one call: here that of the first part which has one."""
    by_call: dict[Any, list[Event]] = {}
    for event in events:
        by_call.setdefault((event.path, event.serial, event.backward), []).append(event)
    firsts = [min(each, key=lambda event: event.part) for each in by_call.values()]
    return [replace(event, steps=()) for event in firsts]


def kept(value: Tensor, case: Case) -> Tensor:
    if case.options.get("callback") is doubled_gradient:
        value = value * 2
    if case.options["index"] is not None:
        value = value[case.options["index"]]
    return value.to(case.options.get("dtype") or value.dtype)


def reduced(values: list[Tensor], reducer: Any) -> Any:
    if isinstance(reducer, First):
        return values[0]
    if isinstance(reducer, Stack):
        return torch.stack(values)
    if isinstance(reducer, Concatenate):
        return torch.cat(values)
    if isinstance(reducer, Mean):
        return torch.cat(values).mean(0)
    return values[-1]


def stacked(result: dict[Any, Any], case: Case, nested: bool) -> dict[Any, Any]:
    if "stack_by" not in case.options:
        return result
    grouped: dict[Any, list[tuple[int, Tensor]]] = {}
    for key, value in result.items():
        *front, path = key
        grouped.setdefault((*front, "parts.1.parts.*"), []).append((int(path.rpartition(".")[2]), value))
    return {
        key: torch.stack([value for _, value in sorted(each, key=lambda one: one[0])]) for key, each in grouped.items()
    }


def data(number: int, leaf: bool) -> Tensor:
    """The input of one forward."""
    x = torch.linspace(-2, 2, WIDTH * 2, dtype=torch.float64).reshape(2, WIDTH) + number / 3
    return x.requires_grad_(leaf)


def weighted(output: Tensor, scale: float) -> Tensor:
    return scale * (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).sum()


class Runner:
    """Carries out a script on one model."""

    def __init__(self, case: Case, forward: Any, oracle: Oracle | None = None) -> None:
        self.case, self.forward, self.oracle = case, forward, oracle
        self.outputs: dict[int, Any] = {}
        self.inputs: dict[int, Tensor] = {}

    def run(self) -> None:
        for step, *rest in self.case.script:
            getattr(self, f"do_{step}")(*rest)

    def do_forward(self, number: int, graph: bool) -> None:
        if self.oracle is not None:
            self.oracle.begin()
        x = self.inputs[number] = data(number, self.case.leaf)
        with torch.set_grad_enabled(graph):
            try:
                self.outputs[number] = self.forward(x)
            except Stopped:
                self.outputs[number] = None

    def do_backward(self, number: int, again: bool, scale: float, functional: bool) -> None:
        if self.oracle is not None:
            self.oracle.backward += 1
        output = self.outputs[number]
        if output is None or not output.requires_grad:
            return
        if functional and self.case.leaf:
            torch.autograd.grad(weighted(output, scale), self.inputs[number], retain_graph=again)
        else:
            weighted(output, scale).backward(retain_graph=again)

    def do_read(self) -> None:
        """The caller compares."""


class Mismatch(AssertionError):
    pass


def check_cache(cache: TensorDictBase, oracle: Oracle, when: str) -> None:
    """Hold a cache against the oracle."""
    wanted = expected(oracle)
    found = {
        key if isinstance(key, tuple) else (key,): value
        for key, value in cache.items(include_nested=True, leaves_only=True)
    }
    if set(found) != set(wanted):
        raise Mismatch(f"{when}: entries {sorted(found)} instead of {sorted(wanted)}")
    for key, value in wanted.items():
        check_same(found[key].detach(), value, f"{when}: {key}")


def check_same(found: Tensor, wanted: Tensor, what: str) -> None:
    # A capture may change the order in which autograd adds gradients: some units in the last place of each number.
    tolerance = 1e-10 if found.dtype == torch.float64 else 1e-5
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise Mismatch(f"{what}: {found.dtype} {tuple(found.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}")
    if not torch.allclose(found, wanted, rtol=tolerance, atol=tolerance):
        raise Mismatch(f"{what}: {found.tolist()} instead of {wanted.tolist()}")


def run_case(case: Case) -> str:
    """Run one case; says ``"same"``, or ``"refused"`` where an in-place operation was named as the obstacle.

    Raises:
        Mismatch: tdcache gave something else than the hooks of this file.
    """
    plain_model, model = model_of(case.tree), model_of(case.tree)
    plain = Runner(case, plain_model)
    plain.run()
    oracle = Oracle(case, model_of(case.tree))
    watched = Runner(case, oracle.model, oracle)
    try:
        cache = capture(case, model, plain, plain_model, oracle, watched)
    except InplaceModificationError:
        if not case.changes_in_place:
            raise
        return "refused"
    return "same" if cache is not None else "empty"


def recipe(case: Case) -> ActivationCaching:
    options = {**case.options, "pick": PICKS[case.options["pick"]]}
    options["cache"] = TensorDict() if options.pop("cache", False) else None
    pattern: Any = [re.compile(re.escape(path)) for path in case.paths]
    if "stack_by" in options:
        pattern = r"parts\.1\.parts\.(?P<layer>\d+)"
    return ActivationCaching(pattern, **options)


def capture(
    case: Case, model: nn.Module, plain: Runner, plain_model: nn.Module, oracle: Oracle, watched: Runner
) -> TensorDictBase | None:
    """Run a case in a block, step by step beside the oracle, and compare wherever the script reads."""
    context = recipe(case).prepare(model)
    with context as hooked:
        captured = Runner(case, hooked)
        for step in case.script:
            for runner in (watched, captured):
                getattr(runner, f"do_{step[0]}")(*step[1:])
            if step[0] == "read":
                check_cache(hooked.cache, oracle, "in the block")
    if not case.options.get("stop_early"):
        check_users(captured, plain, model, plain_model)
    if case.options["hold"] == "live":
        check_cache(hooked.cache, oracle, "after the block")
        return hooked.cache
    with torch.no_grad():
        outputs = [each for each in captured.outputs.values() if isinstance(each, Tensor)]
        grads = [each.grad for each in (*model.parameters(), *captured.inputs.values()) if each.grad is not None]
        for tensor in (*model.parameters(), *captured.inputs.values(), *outputs, *grads):
            tensor.add_(100)
    check_cache(hooked.cache, oracle, "after everything was overwritten")
    return hooked.cache


def check_users(captured: Runner, plain: Runner, model: nn.Module, plain_model: nn.Module) -> None:
    """The outputs and every ``.grad`` are those of a model without hooks."""
    for number, output in plain.outputs.items():
        check_same(captured.outputs[number].detach(), output.detach(), f"output {number}")
    pairs = [(name, mine, plain_model.get_parameter(name)) for name, mine in model.named_parameters()]
    pairs += [(f"input {number}", captured.inputs[number], x) for number, x in plain.inputs.items()]
    for name, mine, theirs in pairs:
        if (mine.grad is None) != (theirs.grad is None):
            raise Mismatch(f".grad of {name}: {mine.grad} instead of {theirs.grad}")
        if mine.grad is not None:
            check_same(mine.grad, theirs.grad, f".grad of {name}")


def fuzz(cases: range, seed: int) -> tuple[Counter[str], list[str]]:
    """Run cases; gives how they ended, and what failed, each with its recipe."""
    ended: Counter[str] = Counter()
    failures = []
    for number in cases:
        case = random_case(f"{seed}-{number}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TdcacheWarning)
            try:
                ended[run_case(case)] += 1
            except Exception as error:  # any error at all is a finding
                ended["failed"] += 1
                failures.append(f"case {number} of seed {seed}: {type(error).__name__}: {error}\n  {case}")
    return ended, failures


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=None, help="run this case alone, with its traceback")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only is not None:
        case = random_case(f"{arguments.seed}-{arguments.only}")
        print(case)
        print(run_case(case))
        return 0
    start = time.monotonic()
    ended, failures = fuzz(range(arguments.cases), arguments.seed)
    print("\n".join(failures[:20]))
    print(f"{arguments.cases} cases in {time.monotonic() - start:.0f} s: {dict(ended)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
