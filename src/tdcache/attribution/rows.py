"""Along which axis of a tensor the rows of a batch lie.

A site's tensor need not have its rows in front (sequence-first layouts), nor have any (position embeddings), and
lengths that happen to agree say nothing. So the model runs once on a batch of another size: the axis that grew holds
the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdcache.attribution.place import Place
from tdcache.errors import CaptureError, listed
from tdcache.hooks import MultiHookHandle, Order, Port, attach, port_at
from tdcache.hooks.transient import Transient
from tdcache.selection import walk
from tdcache.types import HookDirection

__all__ = ["RowAxes", "UnstackableError"]

_Key = Place | tuple[Any, ...]


class UnstackableError(CaptureError):
    """A tensor's rows cannot be told apart; points then run one after the other."""


@dataclass(frozen=True, eq=False, slots=True)
class RowAxes:
    """The shapes at every site in a forward of ``rows`` rows; those of another forward tell where its rows are."""

    rows: int
    shapes: dict[_Key, list[torch.Size]] = field(default_factory=dict)

    def at(self, key: _Key, shape: torch.Size, total: int, where: str) -> int | None:
        """The axis that holds the ``total`` rows of a tensor; None if all rows share it.

        Raises:
            UnstackableError: no axis grows with the rows, as where heads are folded into it, or several do.
        """
        found = {_grown(known, shape, self.rows, total) for known in self.shapes.get(key, ())} - {_UNLIKE}
        if len(found) == 1:
            axis = found.pop()
            return None if axis == _NO_ROWS else axis
        raise UnstackableError(
            f"the value at {where!r} has shape {tuple(shape)} in a forward of {total} rows, and "
            f"{listed([str(tuple(known)) for known in self.shapes.get(key, ())]) or 'none'} in one of {self.rows}, so "
            "its rows cannot be told apart; call with a TensorDict of batch_size=[], which runs points one after the "
            "other",
            paths=(where,),
        )

    def note(self, key: _Key, tensor: Any) -> None:
        """Keep the shape of a tensor."""
        if isinstance(tensor, Tensor):
            self.shapes.setdefault(key, []).append(tensor.shape)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        forward: Callable[[TensorDictBase], Any],
        data: TensorDictBase,
        places: Mapping[Place, nn.Module],
        total: int,
    ) -> RowAxes:
        """Run the model on a few copies of the first row, unless that was done before for inputs of these shapes.

        Args:
            model: the user's model.
            forward: runs it once.
            data: the user's rows.
            places: the places whose axes are wanted beside those of all modules, with what is hooked for them.
            total: the number of rows that are to be told apart.

        Raises:
            UnstackableError: the model does not take another number of rows.
        """
        known = _PROBED.setdefault(model, {})
        modules = [model, *(module for _, module in walk(model))]
        rows = 3 if 2 in (total, len(data)) else 2
        shapes = [(key, value.shape[1:]) for key, value in data.items(include_nested=True, leaves_only=True)]
        signature = (rows, tuple(map(id, modules)), model.training, *sorted(shapes, key=repr))
        found = known.get(signature)
        if found is not None and all(place in found.shapes for place in places):
            return found
        if found is None:
            known.clear()  # one batch size and length at a time
        found = known[signature] = cls(rows)
        with _probing(found, modules, places), torch.no_grad(), _same_random_state(data):
            try:
                forward(TensorDict.cat([data[:1]] * rows))
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                known.clear()
                raise UnstackableError(
                    f"the model does not take {rows} rows ({error}); it was called with {len(data)}, and runs points "
                    "one after the other with a TensorDict of batch_size=[]"
                ) from error
        return found


_PROBED: WeakKeyDictionary[nn.Module, dict[Any, RowAxes]] = WeakKeyDictionary()
_NO_ROWS, _UNLIKE = -1, -2


def _grown(known: torch.Size, shape: torch.Size, rows: int, total: int) -> int:
    if len(known) != len(shape):
        return _UNLIKE
    grown = [axis for axis, (one, other) in enumerate(zip(known, shape, strict=True)) if one != other]
    if not grown:
        return _NO_ROWS
    return grown[0] if len(grown) == 1 and (known[grown[0]], shape[grown[0]]) == (rows, total) else _UNLIKE


def _probing(axes: RowAxes, modules: Iterable[nn.Module], places: Mapping[Place, nn.Module]) -> MultiHookHandle:
    handle = MultiHookHandle()
    with handle.installing():
        for module in dict.fromkeys(modules):
            for direction in _DIRECTIONS.values():
                noting = _NotingAll(axes, port_at("", direction))
                handle.add(attach(module, noting.on_call, direction, order=Order.STOP))
        for place, module in places.items():
            handle.add(attach(module, _NotingOne(axes, place).on_call, _DIRECTIONS[place.kind], order=Order.STOP))
    return handle


_DIRECTIONS: Mapping[str, HookDirection] = {"out": "fwd", "in": "fwd_pre_kwargs"}


@dataclass(frozen=True, slots=True)
class _NotingAll(Transient):
    """Notes the shape of every tensor at one side of a module."""

    axes: RowAxes
    port: Port
    order: int = Order.STOP

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> None:
        for steps, tensor in self.port.parts(module, args, rest):
            self.axes.note((self.port.direction, id(module), steps), tensor)


@dataclass(frozen=True, slots=True)
class _NotingOne(Transient):
    """Notes the shape of the value at one place, which need not be a module's."""

    axes: RowAxes
    place: Place
    order: int = Order.STOP

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> None:
        self.axes.note(self.place, self.place.port.read(module, args, rest))


def _same_random_state(data: TensorDictBase) -> Any:
    devices = {value.device for value in data.values(include_nested=True, leaves_only=True)}
    return torch.random.fork_rng(devices=[each.index or 0 for each in devices if each and each.type == "cuda"])
