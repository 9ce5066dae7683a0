"""What a hook needs to know about the current forward: the step, the real tokens, and the number of a module's call.

None of these can be seen from the module that an edit or a capture is on. They follow from the arguments of the model's
own forward, which hooks on the model receive.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tdcache.arguments import forward_names, named_arguments
from tdcache.errors import EditError, SelectionError
from tdcache.hooks import MultiHookHandle, Order, attach, bracket
from tdcache.hooks.transient import Transient
from tdcache.introspect import in_backward
from tdcache.regions import Region
from tdcache.sequences import Sequences
from tdcache.steps import Clock, Steps
from tdcache.tokens import Tokens

__all__ = ["CallOptions", "CurrentCall", "InSteps", "among"]


class CallOptions(Protocol):
    """What is asked of the forward under way."""

    @property
    def positions(self) -> Any:
        """Which tokens; None if it does not matter which are real."""

    @property
    def steps(self) -> Steps:
        """In which forwards of ``generate()``."""

    @property
    def calls(self) -> Any:
        """In which calls of a module within one forward."""

    @property
    def mask_key(self) -> Any:
        """Which argument says what is padding."""


@dataclass(frozen=True, slots=True)
class InSteps:
    """The options of something that acts in some forwards, whatever the positions and the call of a module."""

    steps: Steps
    positions: None = None
    calls: None = None
    mask_key: Any = None


class CurrentCall:
    """The forward of one model that is under way, as far as ``options`` ask for it.

    Args:
        model: the user's own.
        options: those of the intervention, the capture or the verb.

    Attributes:
        further: arguments beside those of the call among which the mask may be.
        wants_tokens: whether :meth:`tokens_at` or :meth:`region_at` will be asked.
    """

    def __init__(self, model: nn.Module, options: CallOptions) -> None:
        self.options = options
        self.further: Mapping[Any, Any] = {}
        self.wants_tokens = options.positions is not None
        self.clock = Clock(model)
        self._model = model
        self._running: list[tuple[str, dict[Any, Any]]] = []
        self._sequences: Sequences | None = None
        self._latest: Sequences | None = None
        self._regions: dict[Any, Region | None] = {}
        self._calls: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.clock!r})"

    def attach(self, handle: MultiHookHandle) -> None:
        """Listen to the model, and to the modules in it that receive a cache."""
        listening = {"": self._model} | self.clock.receivers
        for path, module in listening.items():
            ears = _Ears(self, path, forward_names(module))
            handle.add(attach(module, ears.on_call, "fwd_pre_kwargs", order=Order.FIRST))
            bracket(module, ears.begin, ears.end, handle)

    def begin(self, path: str, names: tuple[str, ...], args: Any, kwargs: Mapping[str, Any]) -> None:
        """A forward of the model, or of a module that receives its cache, begins."""
        if not self._running:
            self._calls.clear()
            self._forget()
        receives = path in self.clock.receivers
        if receives and self.options.steps is not None:
            self.clock.begin(path, args, kwargs)
        alone = path in self.clock.encoders  # within another forward, the mask may be among the arguments of that
        outermost = receives and not any(alone or each in self.clock.receivers for each, _ in self._running)
        self._running.append((path, named_arguments(names, args, kwargs)))
        if outermost and self.wants_tokens:  # now, for soon the cache holds what is being fed
            self._forget()
            self._sequences = self._sequences_of(self._running[-1][1])

    def end(self, path: str) -> None:
        """It has ended, or was left by an exception."""
        while self._running and self._running.pop()[0] != path:
            pass
        self.clock.end(path)
        if not self._running:
            self._forget()

    def forget(self) -> None:
        """Drop what is known of the latest forward."""
        self._latest = None

    @property
    def is_outermost(self) -> bool:
        """Whether the forward of one receiver of the cache is under way, and of no other around it."""
        return sum(path in self.clock.receivers for path, _ in self._running) == 1

    def _forget(self) -> None:
        self._latest, self._sequences = self._sequences or self._latest, None
        self._regions.clear()

    def _sequences_of(self, arguments: Mapping[Any, Any]) -> Sequences:
        return Sequences({**self.further, **arguments}, mask_key=self.options.mask_key)

    def is_due(self, path: str) -> bool:
        """Whether something at the site acts in this step and in this call of the module; asked once a call."""
        due = self.clock.acts(self.options.steps, path)
        if self.options.calls is None:
            return due
        if in_backward():
            raise EditError(
                f"activation checkpointing runs {path!r} again in the backward, where calls= cannot be counted; switch "
                "checkpointing off, or leave calls= out"
            )
        number = self._calls[path]
        self._calls[path] += 1
        return due and among(number, self.options.calls)

    def region_at(self, path: str, value: Tensor, region: Region) -> Region | None:
        """The columns that the region's positions are in this call; None if it has none of them.

        Raises:
            SelectionError: a row has too few tokens, the mask is not one of this value, or the value does not have the
                rows of the call.
        """
        if region.rows is None and region.positions is None:
            return region
        if value.ndim:
            fed = self.sequences_now()
            if fed is not None:
                fed.check_rows(path, value, region.row_axis(value))
        if region.positions is None or value.ndim < 2:
            return region
        batch, length = value.shape[region.row_axis(value)], value.shape[region.position_dim % value.ndim]
        key = (path, batch, length, id(region))
        if key not in self._regions:
            self._regions[key] = self._columns(path, batch, length, value.device, region)
        return self._regions[key]

    def sequences_now(self) -> Sequences | None:
        """What is fed by the forward under way, or in a backward by the latest; None outside of these."""
        if self._sequences is None and self._running:
            self._sequences = self._sequences_of(self._running[0][1])
        if self._sequences is not None:
            return self._sequences
        if in_backward() and self._latest is not None:  # a checkpoint runs the module again, or a gradient arrives
            return self._latest
        return Sequences({}, mask_key=None) if self.options.mask_key is None else None

    def tokens_at(self, path: str, batch: int, length: int, device: torch.device | None) -> Tokens | None:
        """The real tokens of a value; None where each of its columns is one, numbered from 0.

        Raises:
            SelectionError: no forward is under way, or its mask is not one of this value.
        """
        sequences = self.sequences_now()
        if sequences is None:
            raise SelectionError(
                f"positions= counts the tokens of a call of the model, and {path!r} ran outside of one; call the model "
                "itself, or count columns with mask_key=None",
                selector=path,
            )
        if all(each.mask is None and each.past == 0 and not each.ids for each in sequences.fed):
            return None
        tokens = sequences.at(path, batch=batch, length=length, device=device)
        plain = tokens.before is not None and not bool(tokens.before.any()) and bool(tokens.real.all())
        return None if plain and tokens.sequence is None else tokens

    def _columns(
        self, path: str, batch: int, length: int, device: torch.device | None, region: Region
    ) -> Region | None:
        positions = region.positions
        if isinstance(positions, Tensor) and positions.dtype == torch.bool:
            return region  # these are columns already
        tokens = self.tokens_at(path, batch, length, device)
        if tokens is None:
            return region
        chosen = tokens.select(positions)
        if not bool(chosen.any()):
            return None
        counts = chosen.sum(1)
        numbers = not isinstance(positions, slice)
        if numbers and int(counts.min()) == int(counts.max()) == _count(positions):
            chosen = tokens.columns(positions)
        return dataclasses.replace(region, positions=chosen)


class _Ears(Transient):
    """The hooks on one module that tell a :class:`CurrentCall` when its forward begins and ends."""

    order = Order.FIRST

    def __init__(self, call: CurrentCall, path: str, names: tuple[str, ...]) -> None:
        self.call = call
        self.path = path
        self.names = names

    def on_call(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note that a forward begins, with its arguments."""
        self.call.begin(self.path, self.names, args, kwargs)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Do nothing: the arguments are needed, which the hook of a bracket is not given."""

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Note that the forward is over."""
        self.call.end(self.path)


def _count(positions: Any) -> int:
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return int(positions.shape[1])
    return 1 if isinstance(positions, int) else len(positions)


def among(number: int, calls: Any) -> bool:
    """Whether the call with this number is selected."""
    if isinstance(calls, slice):
        return number in range(calls.start or 0, calls.stop if calls.stop is not None else number + 1, calls.step or 1)
    return number == calls if isinstance(calls, int) else number in calls
