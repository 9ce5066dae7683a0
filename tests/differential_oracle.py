"""The oracle of the differential fuzz: hooks written with torch alone, and what a cache must hold by them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from differential_cases import PICKS, Case, doubled_gradient, doubled_input, doubled_output, first_leaf, flat
from tdcache import Concatenate, First, Last, Mean, Stack


class Stopped(Exception):
    pass


def in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


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

    def picked(self, value: Any, *, of_input: bool, grad: bool) -> list[tuple[tuple[str, ...], Tensor]]:
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
        if in_backward():  # the second run of a checkpoint
            return None
        self.serial += 1
        directions, serial = self.case.options["directions"], self.serial
        given = (*args, *kwargs.values())
        if self.case.options.get("callback") is doubled_input:
            self.note(path, "fwd_pre", (), serial, doubled_input(args))
        else:
            for direction in {"fwd_pre", "fwd_pre_kwargs"} & set(directions):
                for steps, tensor in self.picked(given, of_input=True, grad=False):
                    self.note(path, direction, steps, serial, tensor)
        if self.case.options.get("stop_early") and all(each.startswith("fwd_pre") for each in directions):
            self.tick(path)
        if "grad_in" not in directions or not torch.is_grad_enabled():
            return None
        wanted = self.picked(given, of_input=True, grad=True)
        exchange = self.exchange(path, ["grad_in"], serial, wanted)
        return tuple(rebuilt(each, exchange) for each in args), {
            k: rebuilt(each, exchange) for k, each in kwargs.items()
        }

    def on_output(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if in_backward():
            return None
        self.serial += 1
        directions, serial = self.case.options["directions"], self.serial
        callback = self.case.options.get("callback")
        if callback is doubled_output:
            self.note(path, "fwd", (), serial, first_leaf(output) * 2)
        elif callback is None:
            for direction in {"fwd", "fwd_kwargs"} & set(directions):
                for steps, tensor in self.picked(output, of_input=False, grad=False):
                    self.note(path, direction, steps, serial, tensor)
        if self.case.options.get("stop_early") and not all(each.startswith("fwd_pre") for each in directions):
            self.tick(path)
        watched = [each for each in ("bwd", "bwd_pre") if each in directions]
        if not watched or not torch.is_grad_enabled():
            return None
        wanted = flat(output) if callback else self.picked(output, of_input=False, grad=True)
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
