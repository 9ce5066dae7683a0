"""One forward, taken down: every tensor with its numbers, the function that made it, and the modules it passed.

What a name means is read from this record, not from the names of modules. A tensor is known by its identity and its
version, so that a value that is overwritten later keeps its own place in the record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from tdcache.arguments import call_with
from tdcache.function_calls.names import call_name
from tdcache.hooks.attach import attach
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import leaves
from tdcache.inplace import storage_address
from tdcache.naming.gradients import edge_of

__all__ = ["ForwardTrace", "ModuleRun", "TracedOp", "TracedValue", "trace"]


@dataclass(eq=False, slots=True, repr=False)
class TracedValue:
    """A tensor at one moment of the forward."""

    tensor: Tensor
    """The tensor itself: kept so that its id is not given to another one."""
    data: Tensor
    """A copy of its numbers."""
    edge: GradientEdge | None
    """Where a gradient of it can be asked for or started; None if it has no graph."""
    op: TracedOp | None = None
    """The call that made it; None for parameters, buffers and inputs."""
    outputs: list[tuple[ModuleRun, tuple[int | str, ...]]] = field(default_factory=list)
    """The module calls that returned it, innermost first, with the steps that lead to it in what they returned."""
    inputs: list[tuple[ModuleRun, tuple[int | str, ...]]] = field(default_factory=list)
    """The module calls that were given it."""
    users: list[TracedOp] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(self.data.shape)


@dataclass(eq=False, slots=True, repr=False)
class TracedOp:
    """One call of a torch function."""

    name: str
    path: str
    """The module whose forward made it."""
    call: int
    """Which call of that module."""
    ordinal: int
    """Which call of the function in that forward."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    time: int
    given: tuple[TracedValue, ...] = ()
    made: tuple[TracedValue, ...] = ()
    steps: tuple[tuple[int | str, ...], ...] = ()
    """Of what was returned, the steps that lead to each tensor in it."""


@dataclass(eq=False, slots=True, repr=False)
class ModuleRun:
    """One call of a module."""

    path: str
    module: nn.Module
    ordinal: int
    parent: ModuleRun | None
    begin: int
    end: int = 0
    given: tuple[tuple[tuple[int | str, ...], TracedValue], ...] = ()
    made: tuple[tuple[tuple[int | str, ...], TracedValue], ...] = ()
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        """How many calls it runs inside of."""
        return 0 if self.parent is None else self.parent.depth + 1

    def holds(self, other: ModuleRun) -> bool:
        """Whether ``other`` ran during this call."""
        return self.begin < other.begin and other.end <= self.end


@dataclass(eq=False, slots=True)
class ForwardTrace:
    """What one forward did, in order."""

    model: nn.Module
    ops: list[TracedOp]
    calls: list[ModuleRun]
    result: Any
    given: dict[str, TracedValue]
    """The tensors that the model was called with, by name."""
    made: dict[tuple[int | str, ...], TracedValue]
    """The tensors that it returned."""

    def of_path(self, path: str) -> list[ModuleRun]:
        """The calls of one module."""
        return [call for call in self.calls if call.path == path]


class _TraceRecorder(TorchFunctionMode):
    """Sees every torch function; its hooks tell it which module is running."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[int, int], TracedValue] = {}
        self.aliases: dict[int, list[Tensor]] = {}
        self.ops: list[TracedOp] = []
        self.calls: list[ModuleRun] = []
        self.stack: list[ModuleRun] = []
        self.runs: dict[str, int] = {}
        self.busy = False
        self.time = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = call_name(func)
        if self.busy or (name is None and getattr(func, "__name__", "") != "__get__"):
            return func(*args, **kwargs)
        given = [tensor for _, tensor in leaves((args, kwargs))]
        before = [(tensor, tensor._version) for tensor in given]
        known = {id(tensor): self.value(tensor) for tensor in given}
        made = func(*args, **kwargs)
        changed = [tensor for tensor, version in before if tensor._version != version]
        returned = list(leaves(made))
        outputs = [tensor for _, tensor in returned]
        if outputs or changed:
            self.note(name or "get", _swapped(args, known), _swapped(kwargs, known), tuple(known.values()))
            self.ops[-1].steps = tuple(steps for steps, _ in returned)
            self.produced(self.ops[-1], [*outputs, *changed], [alias for each in changed for alias in self.near(each)])
        return made

    def note(self, name: str, args: Any, kwargs: Any, given: tuple[TracedValue, ...]) -> None:
        top = self.stack[-1] if self.stack else None
        counts = {} if top is None else top.counts
        ordinal = counts.get(name, 0)
        counts[name] = ordinal + 1
        path, call = ("", 0) if top is None else (top.path, top.ordinal)
        op = TracedOp(name, path, call, ordinal, args, kwargs, self.now(), given)
        self.ops.append(op)
        for value in given:
            value.users.append(op)

    def produced(self, op: TracedOp, outputs: list[Tensor], aliases: list[Tensor]) -> None:
        made = []
        for tensor in (*outputs, *aliases):
            if (id(tensor), tensor._version) not in self.values:
                value = self.value(tensor)
                value.op = op
            made.append(self.value(tensor))
        op.made = tuple(made)

    def near(self, tensor: Tensor) -> list[Tensor]:
        """The tensors seen so far that share memory with this one."""
        return self.aliases.get(_memory_of(tensor), [])

    def value(self, tensor: Tensor) -> TracedValue:
        key = (id(tensor), tensor._version)
        found = self.values.get(key)
        if found is None:
            with torch.no_grad():  # nothing writes into parameters
                data = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
            edge = edge_of(tensor)
            found = self.values[key] = TracedValue(tensor, data, edge)
            self.aliases.setdefault(_memory_of(tensor), []).append(tensor)
        return found

    def now(self) -> int:
        self.time += 1
        return self.time

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.busy = True
        ordinal = self.runs.get(path, 0)
        self.runs[path] = ordinal + 1
        call = ModuleRun(path, module, ordinal, self.stack[-1] if self.stack else None, self.now())
        call.given = self.ports((*enumerate(args), *kwargs.items()))
        for steps, value in call.given:
            value.inputs.append((call, steps))
        self.stack.append(call)
        self.calls.append(call)
        self.busy = False

    def leave(self, output: Any) -> None:
        self.busy = True
        call = self.stack.pop()
        call.end = self.now()
        call.made = tuple((steps, self.value(tensor)) for steps, tensor in leaves(output))
        for steps, value in call.made:
            value.outputs.append((call, steps))
        self.busy = False

    def ports(self, parts: Any) -> tuple[tuple[tuple[int | str, ...], TracedValue], ...]:
        found = ((steps, tensor) for name, part in parts for steps, tensor in leaves(part, (name,)))
        return tuple((steps, self.value(tensor)) for steps, tensor in found)


def _memory_of(tensor: Tensor) -> int:
    return storage_address(tensor) or id(tensor)  # a subclass without a storage shares it with no other


def _swapped(value: Any, known: Mapping[int, TracedValue]) -> Any:
    """The arguments with the record's values in place of tensors."""
    if isinstance(value, Tensor):
        return known.get(id(value))
    if isinstance(value, dict):
        return {key: _swapped(part, known) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_swapped(part, known) for part in value)
    return value


@dataclass(frozen=True, slots=True)
class _EnterCall(Transient):
    recorder: _TraceRecorder
    path: str
    order: ClassVar[int] = Order.CAPTURE

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.recorder.enter(self.path, module, args, kwargs)


@dataclass(frozen=True, slots=True)
class _LeaveCall(Transient):
    recorder: _TraceRecorder
    order: ClassVar[int] = Order.CAPTURE

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.recorder.leave(output)


def _hooks(model: nn.Module, recorder: _TraceRecorder) -> Iterator[Any]:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        yield attach(module, _EnterCall(recorder, path), "fwd_pre_kwargs", order=Order.CAPTURE)
        yield attach(module, _LeaveCall(recorder), "fwd", order=Order.CAPTURE)


def trace(model: nn.Module, inputs: Any) -> ForwardTrace:
    """Run ``model`` once, eagerly and with a graph, and take the forward down.

    Args:
        model: called as it is; hooks are put on all its modules and taken off again, also after an exception.
        inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    The record holds a copy of every value of the forward and its whole graph: it is meant for short inputs.
    """
    recorder = _TraceRecorder()
    with (
        MultiHookHandle(list(_hooks(model, recorder))),
        torch.enable_grad(),
        torch.random.fork_rng(devices=[]),
        recorder,
    ):
        result = call_with(model, inputs)
    root = recorder.calls[0]
    given = {".".join(map(str, steps)): value for steps, value in root.given}
    return ForwardTrace(model, recorder.ops, recorder.calls, result, given, dict(root.made))
