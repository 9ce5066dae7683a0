"""Not computing again what is known: members of a chain of modules give recorded outputs in place of running.

Only hooks that return cannot keep a module from running, so its ``forward`` is exchanged on the instance while a block
lasts, and put back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tdcache.errors import EditError
from tdcache.hooks import MultiHookHandle, Order, attach
from tdcache.hooks.values import children, leaves, with_parts
from tdcache.selection import walk

__all__ = ["Recording", "chain_members", "expanded", "instead_of_forward"]


@contextmanager
def instead_of_forward(stubs: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Call a stub in place of each module's ``forward``; its hooks run as ever."""
    before = {module: module.__dict__.get("forward", _MISSING) for module in stubs}
    try:
        for module, stub in stubs.items():
            module.__dict__["forward"] = stub
        yield
    finally:
        for module, forward in before.items():
            if forward is _MISSING:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


_MISSING = object()


def chain_members(model: nn.Module) -> dict[str, nn.Module]:
    """The members of the outermost ``ModuleList``s and ``Sequential``s of a model: its layers."""
    found: dict[str, nn.Module] = {}
    candidates = [("", model), *walk(model)]
    for path, module in candidates:
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside:
            prefix = f"{path}." if path else ""
            found.update({f"{prefix}{name}": child for name, child in module.named_children()})
    return found


class Recording:
    """The raw outputs of chain members in one forward, before any edit, and what ran before what.

    Members that are called twice in the forward, or that are in the model under several names, are left out.
    """

    order = Order.FIRST

    def __init__(self, model: nn.Module) -> None:
        members = chain_members(model)
        modules = list(members.values())
        self.members = {path: module for path, module in members.items() if modules.count(module) == 1}
        self.outputs: dict[str, Any] = {}
        self.usable = True
        """Whether leaving members out gives the same: not where one of them writes into its own input."""
        self.before: dict[str, tuple[str, ...]] = {}
        """For each site: the members that were through when it first fired."""
        self._repeated: set[str] = set()

    def attach(self) -> MultiHookHandle:
        """Record from now on, until the handle is removed."""
        handle = MultiHookHandle()
        for path, module in self.members.items():
            tap = _MemberTap(self, path)
            handle.add(attach(module, tap.on_input, "fwd_pre_kwargs", order=Order.FIRST))
            handle.add(attach(module, tap.on_output, "fwd", order=Order.FIRST))
        return handle

    def take(self, path: str, output: Any) -> None:
        """A member is through; its output is copied, for what comes next may write into it."""
        if path in self.outputs:
            self._repeated.add(path)
        parts = {step: tensor.clone() for step, tensor in leaves(output)}
        self.outputs[path] = _rebuilt(output, parts)

    def reached(self, path: str) -> None:
        """A site fires."""
        self.before.setdefault(path, tuple(self.outputs))

    def done_before(self, paths: tuple[str, ...]) -> tuple[str, ...]:
        """The members that need not run again when something changes first at one of ``paths``."""
        if not self.usable or not all(path in self.before for path in paths):
            return ()
        common = min((self.before[path] for path in paths), key=len)
        return tuple(path for path in common if path not in self._repeated)

    def stubs(self, skipped: tuple[str, ...], blocks: int, rows: int) -> dict[nn.Module, Callable[..., Any]]:
        """What stands in for the skipped members when ``blocks`` copies of the batch of ``rows`` run at once."""
        return {self.members[path]: _Replay(self.outputs[path], blocks, rows) for path in skipped}


class _MemberTap:
    order = Order.FIRST

    def __init__(self, recording: Recording, path: str) -> None:
        self.recording = recording
        self.path = path

        self.inputs: list[tuple[Tensor, int]] = []

    def on_input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [tensor for _, tensor in leaves((args, kwargs))]
        if any(tensor.is_inference() for tensor in tensors):  # these have no version that would tell of a write
            self.recording.usable = False
        else:
            self.inputs = [(tensor, tensor._version) for tensor in tensors]

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        inputs, self.inputs = self.inputs, []
        if any(tensor._version != version for tensor, version in inputs):
            self.recording.usable = False
        self.recording.take(self.path, output)


class _Replay:
    """Gives a recorded output, as often along the batch as there are blocks."""

    def __init__(self, output: Any, blocks: int, rows: int) -> None:
        self.output = output
        self.blocks = blocks
        self.rows = rows

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parts = {step: expanded(tensor, self.blocks, self.rows) for step, tensor in leaves(self.output)}
        return _rebuilt(self.output, parts)


def expanded(tensor: Tensor, blocks: int, rows: int) -> Tensor:
    """A copy of ``tensor``, repeated ``blocks`` times along a first axis of size ``rows``; others are only copied."""
    if blocks == 1 or tensor.ndim == 0 or tensor.shape[0] != rows:
        return tensor.clone()
    return tensor.repeat(blocks, *(1,) * (tensor.ndim - 1))


def _rebuilt(value: Any, parts: Mapping[tuple[int | str, ...], Tensor], above: tuple[int | str, ...] = ()) -> Any:
    """``value`` with its tensors exchanged for ``parts``."""
    if isinstance(value, Tensor):
        return parts[above]
    if not any(steps[: len(above)] == above for steps in parts):
        return value
    inner = {step: _rebuilt(child, parts, (*above, step)) for step, child in children(value)}
    if not inner:
        return value
    try:
        return with_parts(value, inner)
    except (TypeError, ValueError) as error:
        raise EditError(f"a value of type {type(value).__name__} cannot be rebuilt for a replay: {error}") from error
