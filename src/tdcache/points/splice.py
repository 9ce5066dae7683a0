"""Inserts hook points into models that were written without any.

Changing the model's code or class would change its state dict or its ``forward``; a point inserted here has no
parameters, and is called by a hook.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn

from tdcache.errors import ContextError, PathError
from tdcache.hooks import InputPort, MultiHookHandle, Order, Port, attach_ports, port_at
from tdcache.introspect import has_stale_graph
from tdcache.paths import join, resolve_all
from tdcache.points.hook_point import HookPoint
from tdcache.types import Pick

__all__ = ["PointShelf", "SpliceTap", "SplicedPoint", "insert_hook_point"]


class PointShelf(nn.Module):
    """Holds hook points with names such as ``"blocks.0.hook_mlp_out"`` in a model that has no such parent module."""


class SpliceTap:
    """Passes the value at a port through a hook point."""

    __slots__ = ("point", "port")

    order = Order.EDIT

    def __init__(self, port: Port, point: HookPoint) -> None:
        self.port = port
        self.point = point

    def __repr__(self) -> str:
        side = "before" if isinstance(self.port, InputPort) else "after"
        return f"{type(self).__name__}({self.point.name!r} {side} {self.port.path!r})"

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> Any:
        """Pass the value through the hook point."""
        value = self.port.read(module, args, rest)
        changed = self.point(value)
        return None if changed is value else self.port.write(module, args, rest, changed)


class _Shelved:
    """A hook point registered in a model under its name; ``remove()`` also removes shelves that become empty."""

    def __init__(self, model: nn.Module, name: str, point: HookPoint) -> None:
        self.parts = name.split(".")
        self.through = [model]
        for part in self.parts[:-1]:
            if part not in self.through[-1]._modules:
                shelf = PointShelf()
                shelf.train(self.through[-1].training)
                self.through[-1].add_module(part, shelf)
            self.through.append(self.through[-1].get_submodule(part))
        self.through[-1].add_module(self.parts[-1], point)

    def remove(self) -> None:
        """Remove the hook point from the model, and shelves that become empty."""
        for part, holder in zip(reversed(self.parts), reversed(self.through), strict=True):
            delattr(holder, part)
            if not isinstance(holder, PointShelf) or any(True for _ in holder.children()):
                break


class SplicedPoint:
    """A hook point that :func:`insert_hook_point` inserted; also a context manager that removes it at its end."""

    def __init__(self, name: str, point: HookPoint, handle: MultiHookHandle) -> None:
        self.name = name
        self.point = point
        self._handle = handle

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}{'' if len(self._handle) else ', removed'})"

    def remove(self) -> None:
        """Remove the point with its hooks; a second call does nothing."""
        self._handle.remove()

    def __enter__(self) -> HookPoint:
        return self.point

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def insert_hook_point(
    model: nn.Module, path: str, name: str, *, before: bool = False, pick: Pick = None
) -> SplicedPoint:
    """Insert a hook point after (or before) a module of an existing model, until ``remove()`` is called.

    The point becomes a submodule of the model under ``name``, so that everything that works by path finds it; it has no
    parameters, so the keys of the state dict do not change. The module itself and its class do not change.

    Args:
        model: any model.
        path: the module whose output (or input) goes through the point.
        name: the path of the point. Missing parents (``blocks`` for ``"blocks.0.hook_mlp_out"``) are created as empty
            modules.
        before: use the input instead of the output.
        pick: which tensor of a structured value: see :class:`~tdcache.hooks.OutputPort` and
            :class:`~tdcache.hooks.InputPort`. By default the first; for a TensorDict module, its own entry.

    Raises:
        CaptureError: in the forward, there is no tensor, or ``pick`` finds none.
        EditError: in the forward, the result of a hook does not fit.
        PathError: no module at ``path``; ``name`` is taken, or would add the point to a container that runs its
            members.
        ContextError: the model is compiled and has been traced, so that the point would be skipped.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with insert_hook_point(model, "0", "0.hook_pre") as point:
        ...     handle = point.add_hook(lambda tensor, hook: torch.ones_like(tensor))
        ...     model(torch.zeros(1, 2))
        tensor([[1., 1.]])
    """
    path, module = resolve_all(model, path)
    if type(module).forward is nn.Module.forward:  # a ModuleList or another container without a forward
        raise PathError(f"{path!r} is a {type(module).__name__}, which is never called; choose one of its members")
    if has_stale_graph(model):
        raise ContextError(
            f"{type(model).__name__} was traced by torch.compile, and its graph skips a hook point that is put in now; "
            "put it in before the first call, or call torch._dynamo.reset()"
        )
    _check_name(model, name, path)
    point = HookPoint()
    point.name = name
    point.train(model.training)
    tap, handle = SpliceTap(port_at(path, "fwd_pre" if before else "fwd", pick), point), MultiHookHandle()
    with handle.installing():
        handle.add(_Shelved(model, name, point))
        attach_ports([(module, tap)], tap.port.direction, handle, tap.order)
    return SplicedPoint(name, point, handle)


def _check_name(model: nn.Module, name: str, path: str) -> None:
    if not all(str(name).split(".")):
        raise PathError(f"a hook point's name is a path such as 'blocks.0.hook_mlp_out', got {name!r}", selector=name)
    *above, last = name.split(".")
    holder, first_new = model, last
    for at, part in enumerate(above):
        if part not in holder._modules and hasattr(holder, part):
            raise PathError(f"the name {name!r} leads through {'.'.join(above[: at + 1])!r}, which is no module")
        found = holder._modules.get(part)
        if found is None:
            first_new = part
            break
        holder = found
    if isinstance(holder, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise PathError(
            f"the name {name!r} would make {first_new!r} a member of a {type(holder).__name__}, which runs its "
            f"members; choose a name that leads elsewhere, for instance {join(path, last)!r}"
        )
    if first_new == last and hasattr(holder, last):
        raise PathError(f"the name {name!r} is taken in {type(model).__name__}; choose another", selector=name)
