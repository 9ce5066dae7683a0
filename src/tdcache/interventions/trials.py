"""What a sweep goes over: which trials there are, in which chunks they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.errors import EditError
from tdcache.interventions.options import EditOptions
from tdcache.regions import Heads, Region

__all__ = ["Metric", "SweepOver", "SweepRecipe", "Trial", "check_over", "chunks_of", "trials_at", "windows_of"]

SweepOver = Literal["position", "head"]
Metric = Callable[[TensorDictBase], Any]


class SweepRecipe(Protocol):
    """What a sweep asks of the recipe it belongs to; see :class:`tdcache.ActivationPatching`."""

    source: Any
    patch_fn: Any
    patch_key: Any
    metric: Any
    options: EditOptions
    chunk: int
    replay: bool
    stack_by: str | None

    def region_at(self, path: str) -> Region:
        """The part of the value at one site that is meant."""

    def value_at(self, path: str) -> Any:
        """Where the value for one site comes from."""


def check_over(
    sweep: Any, metric: Metric | None, heads: Any, chunk: int, *, region: Region, named: bool = False
) -> tuple[SweepOver, ...] | None:
    """What a sweep goes over beside sites, or None where there is no sweep.

    ``named``: whether canonical names are swept, whose values may have an axis of heads.

    Raises:
        EditError: options that do not go together.
    """
    if sweep is False or sweep is None:
        if isinstance(heads, int) and not named:
            raise EditError(f"heads={heads} is for sweep='head'; to patch some heads, give heads=(n_heads, which)")
        return None
    over = () if sweep is True else (sweep,) if isinstance(sweep, str) else tuple(sweep)
    if unknown := [each for each in over if each not in ("position", "head")]:
        raise EditError(f"sweep is True, 'position', 'head' or both of them, got {unknown[0]!r}")
    if not callable(metric):
        raise EditError("a sweep needs metric=, a function of the TensorDict with the patched outputs: data -> scalar")
    if "head" in over and not named and (heads is None or (isinstance(heads, int) and heads < 1)):
        raise EditError("a sweep over heads needs heads=, into how many parts the last axis falls")
    if "head" not in over and isinstance(heads, int) and not named:
        raise EditError(f"heads={heads} is for sweep='head'; to patch some heads, give heads=(n_heads, which)")
    if "head" in over and region.units is not None:
        raise EditError("a sweep over heads chooses the units itself; leave units= out")
    if chunk < 1:
        raise EditError(f"chunk is the number of interventions in one forward, 1 or more, got {chunk}")
    if chunk > 1 and region.position_dim == 0:
        raise EditError(
            f"position_dim=0 says that axis 0 is no batch, and chunk={chunk} stacks interventions along it; give "
            "chunk=1"
        )
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
    recipe: SweepRecipe, over: Sequence[SweepOver], name: str, sites: tuple[str, ...], shape: torch.Size, whole: Region
) -> Iterator[Trial]:
    """The trials of one site (and those patched together with it), whose source's value has ``shape``.

    ``whole`` is the region that the recipe means there, with positions as columns.
    """
    positions: Sequence[Any] = [whole.positions]
    heads: Sequence[Any] = [whole.heads]
    if "position" in over:
        positions = _choices(positions[0], shape, whole.position_dim, name)
    if "head" in over:
        heads = _each_head(_counted(recipe.options.heads, shape, whole.head_dim, name))
    for at, position in enumerate(positions):
        for head, which in enumerate(heads):
            region = replace(whole, positions=position, heads=which)
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


def _choices(positions: Any, shape: torch.Size, dim: int, path: str) -> list[Any]:
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


def _listed(positions: Tensor, size: int, path: str) -> list[Any]:
    mask = positions.dtype == torch.bool
    if positions.ndim == 2 and not mask:  # of each row its own
        return [positions[:, at : at + 1] for at in range(positions.shape[1])]
    if positions.ndim > 1 or (mask and positions.shape != (size,)):
        raise EditError(
            f"a sweep over positions patches as many in every row: give positions as a sequence of ints, a tensor "
            f"(batch, k), or a mask of shape {(size,)} for {path!r}, got {positions.dtype} of shape "
            f"{tuple(positions.shape)}"
        )
    chosen = positions.nonzero() if mask else positions
    return [int(at) for at in chosen.flatten().tolist()]


def _counted(heads: Any, shape: torch.Size, dim: int | None, path: str) -> Heads:
    """The number of heads, and which of them are swept; ``dim`` is their own axis, where they have one."""
    if isinstance(heads, int):
        return heads, slice(heads)
    if isinstance(heads, tuple) and len(heads) == 2:
        return heads
    if dim is None:
        raise EditError(
            f"a sweep over heads needs heads=, into how many parts the units of {path!r} fall; or a name whose "
            "value has an axis of heads"
        )
    return shape[dim], slice(None) if heads is None else heads


def _each_head(heads: Heads) -> list[Heads]:
    """Each head that is swept, alone."""
    count, which = heads
    chosen = range(count)[which] if isinstance(which, slice) else which
    if isinstance(chosen, int | Tensor):
        chosen = torch.as_tensor(chosen).reshape(-1).tolist()
    listed: Any = chosen
    return [(count, int(head)) for head in listed]
