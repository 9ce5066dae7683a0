"""The hook of every intervention: passes part of a value to an edit, and writes the result back.

Edits see tensors only. Containers, regions, positions and the question whether the edit acts in this call are handled
here once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from tdcache.current_call import CurrentCall
from tdcache.hooks.attach import attach
from tdcache.hooks.port import Port
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import check_dense, check_fits
from tdcache.regions import Region

__all__ = ["Edit", "EditTap", "ReadTap", "RegionEdit", "attach_taps"]


class Edit(Protocol):
    """Computes the new value at one site."""

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        """The new part, or None for no change; ``part`` is the region of ``full``. Do not write to either."""


class RegionEdit(Protocol):
    """An edit that takes the same region of other tensors, and so needs the region of this call."""

    def edit_region(self, part: Tensor, full: Tensor, region: Region) -> Tensor | None:
        """The new part, or None for no change; ``region.take(full)`` is ``part``."""


class EditTap(Transient):
    """Changes the output or the input of one module.

    Args:
        port: the value to change.
        edit: computes the new value.
        region: the part to change.
        call: tells, for the current forward, whether the edit acts and which columns the region's positions are.
        order: its position among the hooks of its module.
    """

    __slots__ = ("by_region", "call", "edit", "order", "path", "plain", "port", "region")

    def __init__(
        self,
        port: Port,
        edit: Edit | RegionEdit,
        *,
        region: Region,
        call: CurrentCall | None = None,
        order: int = Order.EDIT,
    ) -> None:
        self.port = port
        self.path = port.path
        self.edit: Any = edit
        self.by_region = hasattr(edit, "edit_region")
        self.region = region
        self.call = call
        self.plain = call is None and region.whole and not self.by_region
        self.order = order

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.edit!r})"

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> Any:
        """Return the edited value in its container."""
        if self.call is not None and not self.call.is_due(self.path):
            return None
        old = self.port.read(module, args, rest)
        check_dense(old, self.path)
        new = self.edit(old, old) if self.plain else self._edited(old)
        return None if new is None else self.port.write(module, args, rest, new)

    def _edited(self, old: Tensor) -> Tensor | None:
        region = self.region if self.call is None else self.call.region_at(self.path, old, self.region)
        if region is None:  # this forward feeds none of its positions
            return None
        part = old if region.whole else region.take(old, self.path)
        new: Tensor | None = self.edit.edit_region(part, old, region) if self.by_region else self.edit(part, old)
        if new is None or region.whole:
            return new
        check_fits(new, part, self.path)
        return region.put(old, new, self.path)


class ReadTap(Transient):
    """Calls a function ``(path, tensor)`` with the final value at one port."""

    __slots__ = ("order", "port", "read")
    use = "read"  # of a value that is derived from an attention call

    def __init__(self, port: Port, read: Callable[[str, Tensor], None], *, order: int = Order.CAPTURE) -> None:
        self.port = port
        self.read = read
        self.order = order

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.port.path!r})"

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> None:
        """Call the reader with the value."""
        self.read(self.port.path, self.port.read(module, args, rest))


def attach_taps(module: nn.Module, handle: MultiHookHandle, *taps: EditTap | ReadTap) -> None:
    """Attach taps to one module, each at its port and in its order."""
    for tap in taps:
        handle.add(attach(module, tap.on_call, tap.port.direction, order=tap.order))
