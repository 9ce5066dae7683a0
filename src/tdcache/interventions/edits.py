"""The hook behind every intervention: at one site it hands part of a value to an edit, and puts back what comes."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from tdcache.hooks.attach import Order
from tdcache.hooks.values import check_fits, output_pick, pick_tensor, replace_in_output, replace_tensor
from tdcache.interventions.regions import Region
from tdcache.interventions.steps import StepClock
from tdcache.modules.inputs import picked_input, steps_to_input
from tdcache.types import Pick

__all__ = ["Edit", "EditTap", "ReadTap"]


class Edit(Protocol):
    """What is done at one site."""

    def __call__(self, part: Tensor, full: Tensor) -> Tensor | None:
        """The new part, or None for no change; ``part`` is the region of ``full``. Neither may be written to."""


class _Tap:
    """What both taps have: a site and the tensor meant there."""

    __slots__ = ("clock", "order", "path", "pick")

    path: str
    pick: Pick
    clock: StepClock | None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"


class EditTap(_Tap):
    """Changes the output or the input of one module."""

    __slots__ = ("edit", "region")

    def __init__(
        self,
        path: str,
        edit: Edit,
        *,
        region: Region,
        pick: Pick = None,
        clock: StepClock | None = None,
        order: int = Order.EDIT,
    ) -> None:
        self.path = path
        self.edit = edit
        self.region = None if region.whole else region
        self.pick = pick
        self.clock = clock
        self.order = order

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.edit!r})"

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Change the output."""
        if self.clock is not None and not self.clock.acts:
            return None
        if isinstance(output, Tensor):
            if self.region is not None:
                return self._edited(output)
            new = self.edit(output, output)
            if new is not None and not _same_kind(new, output):
                check_fits(new, output, self.path)  # says what differs
            return new
        pick = output_pick(module, output, self.pick)
        new = self._edited(pick_tensor(output, pick, self.path))
        if new is None:
            return None
        return replace_in_output(output, new, pick=pick, path=self.path)

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change an argument."""
        if self.clock is not None and not self.clock.acts:
            return None
        new = self._edited(picked_input(self.pick, args, kwargs, self.path))
        if new is None:
            return None
        pick = steps_to_input(self.pick, args, kwargs, self.path)
        return replace_tensor((args, kwargs), new, pick=pick, path=self.path)

    def _edited(self, old: Tensor) -> Tensor | None:
        if self.region is None:
            new = self.edit(old, old)
            if new is not None:
                check_fits(new, old, self.path)
            return new
        part = self.region.take(old, self.path)
        new = self.edit(part, old)
        if new is None:
            return None
        check_fits(new, part, self.path)
        return self.region.put(old, new, self.path)


def _same_kind(new: Any, old: Tensor) -> bool:
    return isinstance(new, Tensor) and new.shape == old.shape and new.dtype == old.dtype and new.device == old.device


class ReadTap(_Tap):
    """Shows the final output or input of one module to a function ``(path, tensor)``."""

    __slots__ = ("read",)

    def __init__(self, path: str, read: Any, *, pick: Pick = None, order: int = Order.CAPTURE) -> None:
        self.path = path
        self.read = read
        self.pick = pick
        self.clock = None
        self.order = order

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Show the output."""
        self.read(self.path, pick_tensor(output, output_pick(module, output, self.pick), self.path))

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show an argument."""
        self.read(self.path, picked_input(self.pick, args, kwargs, self.path))
