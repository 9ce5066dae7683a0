"""The hook behind every intervention: at one site it hands part of a value to an edit, and puts back what comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from tdcache.hooks.attach import Order
from tdcache.hooks.port import Port
from tdcache.hooks.values import check_fits
from tdcache.interventions.regions import Region
from tdcache.interventions.steps import StepClock

__all__ = ["Edit", "EditTap", "ReadTap"]


class Edit(Protocol):
    """What is done at one site."""

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        """The new part, or None for no change; ``part`` is the region of ``full``. Neither may be written to."""


class EditTap:
    """Changes the output or the input of one module."""

    __slots__ = ("clock", "edit", "order", "path", "port", "region")

    def __init__(
        self, port: Port, edit: Edit, *, region: Region, clock: StepClock | None = None, order: int = Order.EDIT
    ) -> None:
        self.port = port
        self.path = port.path
        self.edit = edit
        self.region = None if region.whole else region
        self.clock = clock
        self.order = order

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.edit!r})"

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> Any:
        """Change the value."""
        if self.clock is not None and not self.clock.acts:
            return None
        old = self.port.read(module, args, rest)
        new = self._edited(old)
        return None if new is None else self.port.write(module, args, rest, new)

    def _edited(self, old: Tensor) -> Tensor | None:
        if self.region is None:
            return self.edit(old, old)
        part = self.region.take(old, self.path)
        new = self.edit(part, old)
        if new is None:
            return None
        check_fits(new, part, self.path)
        return self.region.put(old, new, self.path)


class ReadTap:
    """Shows the final value at one port to a function ``(path, tensor)``."""

    __slots__ = ("order", "port", "read")

    def __init__(self, port: Port, read: Callable[[str, Tensor], None], *, order: int = Order.CAPTURE) -> None:
        self.port = port
        self.read = read
        self.order = order

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.port.path!r})"

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> None:
        """Show the value."""
        self.read(self.port.path, self.port.read(module, args, rest))
