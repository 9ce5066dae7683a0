"""What a sweep goes over: which trials there are, in which chunks they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.errors import EditError
from tdcache.interventions.regions import Region

__all__ = ["Metric", "SweepOver", "SweepRecipe", "Trial", "check_over", "chunks_of", "trials_at", "windows_of"]

SweepOver = Literal["position", "head"]
Metric = Callable[[TensorDictBase], Any]


class SweepRecipe(Protocol):
    """What a sweep asks of the recipe it belongs to; see :class:`tdcache.ActivationPatching`."""

    direction: Any
    pick: Any
    positions: Any
    units: Any
    position_dim: int
    unit_dim: int
    source: Any
    patch_fn: Any
    patch_key: Any
    metric: Any
    heads: int | None
    chunk: int
    replay: bool
    stack_by: str | None

    def value_at(self, path: str) -> Any:
        """Where the value for one site comes from."""


def check_over(
    sweep: Any, metric: Metric | None, heads: int | None, chunk: int, *, patch_fn: Any, region: Region
) -> tuple[SweepOver, ...] | None:
    """What a sweep goes over beside sites, or None where there is no sweep.

    Raises:
        EditError: options that do not go together.
    """
    if sweep is False or sweep is None:
        return None
    over = () if sweep is True else (sweep,) if isinstance(sweep, str) else tuple(sweep)
    if unknown := [each for each in over if each not in ("position", "head")]:
        raise EditError(f"sweep is True, 'position', 'head' or both of them, got {unknown[0]!r}")
    if not callable(metric):
        raise EditError("a sweep needs metric=, a function of the TensorDict with the patched outputs: data -> scalar")
    if "head" in over and (heads is None or heads < 1):
        raise EditError("a sweep over heads needs heads=, into how many parts the last axis falls")
    if "head" in over and region.units is not None:
        raise EditError("a sweep over heads chooses the units itself; leave units= out")
    if chunk < 1:
        raise EditError(f"chunk is the number of interventions in one forward, 1 or more, got {chunk}")
    return tuple(each for each in ("position", "head") if each in over)


class Trial(NamedTuple):
    """One intervention of a sweep."""

    sites: tuple[str, ...]
    """What is patched together."""
    region: Region
    at: tuple[int, ...]
    """Where in the result for its site."""
    name: str
    """The site that its value is filed under."""


def windows_of(paths: Sequence[str], size: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each site with those that are patched together with it."""
    half = size // 2
    for index, path in enumerate(paths):
        yield path, tuple(paths[max(0, index - half) : index - half + size])


def trials_at(
    recipe: SweepRecipe, over: Sequence[SweepOver], name: str, sites: tuple[str, ...], shape: torch.Size
) -> Iterator[Trial]:
    """The trials of one site (and those patched together with it), whose source's value has ``shape``."""
    positions: Sequence[Any] = [recipe.positions]
    units: Sequence[Any] = [recipe.units]
    if "position" in over:
        positions = _choices(recipe.positions, shape, recipe.position_dim, name)
    if "head" in over:
        units = _head_slices(shape[recipe.unit_dim], recipe.heads or 1, name)
    for at, position in enumerate(positions):
        for head, unit in enumerate(units):
            region = Region(positions=position, units=unit, position_dim=recipe.position_dim, unit_dim=recipe.unit_dim)
            where = {"position": at, "head": head}
            yield Trial(sites, region, tuple(where[each] for each in over), name)


def chunks_of(trials: Sequence[Trial], depths: Sequence[int], size: int) -> Iterator[Sequence[Trial]]:
    """The trials that run in one forward, after one another: ``size`` at most.

    A chunk runs from its shallowest patch on, so one that is a quarter full ends where the next trial lies deeper.
    """
    begin = 0
    for end in range(1, len(trials) + 1):
        full = end - begin == size
        deeper = end < len(trials) and depths[end] > depths[end - 1] and 4 * (end - begin) >= size
        if full or deeper or end == len(trials):
            yield trials[begin:end]
            begin = end


def _choices(positions: Any, shape: torch.Size, dim: int, path: str) -> list[int]:
    if not -len(shape) <= dim < len(shape):
        raise EditError(f"a sweep over positions needs an axis {dim} at {path!r}, whose value has shape {tuple(shape)}")
    every = list(range(shape[dim]))
    if positions is None:
        return every
    if isinstance(positions, slice):
        return every[positions]
    if isinstance(positions, Tensor):
        return _listed(positions, shape[dim], path)
    return [positions] if isinstance(positions, int) else [int(at) for at in positions]


def _listed(positions: Tensor, size: int, path: str) -> list[int]:
    mask = positions.dtype == torch.bool
    if positions.ndim > 1 or (mask and positions.shape != (size,)):
        raise EditError(
            f"a sweep over positions patches the same ones in every row: give positions as a sequence of ints or a "
            f"mask of shape {(size,)} for {path!r}, got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    chosen = positions.nonzero() if mask else positions
    return [int(at) for at in chosen.flatten().tolist()]


def _head_slices(size: int, heads: int, path: str) -> list[slice]:
    if size % heads:
        raise EditError(f"heads={heads} does not divide the {size} features at {path!r}")
    width = size // heads
    return [slice(head * width, (head + 1) * width) for head in range(heads)]
