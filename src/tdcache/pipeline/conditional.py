"""Hooks that apply under a condition: to the whole value, to a part of it, or not at all.

A hook that checks its layer or slices its positions itself cannot be combined with one that does not; here the
condition is separate from what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import SelectionError
from tdcache.hooks.values import check_fits
from tdcache.inplace import eager_version_of, untouched
from tdcache.pipeline.conditions import Calls, Layers, Positions, Rows, as_condition, checked
from tdcache.pipeline.hooks import Hook, Hooks, run

__all__ = ["AtCalls", "AtLayers", "AtPositions", "AtRows", "ConditionalHooks"]


class ConditionalHooks(Hooks):
    """A sequence of hooks that is called if, or where, a condition holds.

    If the condition returns a mask (over batch rows, over positions), the hooks get a copy of that part of the value,
    and their result is written back; the rest of the value does not change. A part that is not rectangular, as for
    ``Rows(0) | Positions(1)``, has shape ``(marked, *rest)``.

    Args:
        condition: a :class:`~tdcache.pipeline.conditions.Condition`, or any predicate of the value and of the keyword
            arguments in scope that it names; it returns a bool, or a boolean mask over the value's leading dimensions.
            If its only positional parameter has the name of such a keyword, as in ``lambda layer: layer == 3``, it gets
            that keyword.
        *hooks: the first hooks.

    Example:
        >>> hooks = ConditionalHooks(Rows(0) & Positions(-1), lambda part: 0 * part)
        >>> hooks(torch.ones(2, 2))
        tensor([[1., 0.],
                [1., 1.]])
    """

    def __init__(self, condition: Callable[..., Any], *hooks: Hook) -> None:
        self.condition = as_condition(condition)
        super().__init__(*hooks)

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Evaluate the condition, with the bound keyword arguments in scope, and run the hooks accordingly.

        Raises:
            SelectionError: the mask does not fit the value.
            EditError: the result of the hooks does not fit the part.
        """
        scope = self._in_scope(kwargs)
        answer = checked(self.condition(x, *args, **scope), self.condition)
        if isinstance(answer, Tensor):
            return self._run_on_part(x, answer, args, scope)
        return run(self._calls, x, args, scope) if answer else x

    def _run_on_part(self, x: Tensor, mask: Tensor, args: tuple[Any, ...], scope: dict[str, Any]) -> Tensor:
        where = _index_of(x, mask)
        if where is None:
            return x
        part = x[where]
        version = eager_version_of(part)
        new = run(self._calls, part, args, scope)
        if untouched(part, new, version):
            return x
        check_fits(new, part, scope.get("path") or self.title())
        result = x.clone()
        result[where] = new
        return result

    def title(self) -> str:
        """The first line of the repr."""
        condition = repr(self.condition)
        shown = condition.removeprefix(type(self.condition).__name__)
        return f"{type(self).__name__}({condition})" if type(self) is ConditionalHooks else type(self).__name__ + shown


def _index_of(x: Tensor, mask: Tensor) -> Any:
    """The index of the marked part of ``x``: a vector per dimension if it is a rectangle, otherwise the mask."""
    dims = mask.dim()
    try:
        full = mask.to(x.device).expand(x.shape[:dims])
    except RuntimeError:
        full = None
    if full is None or dims > x.dim():
        raise SelectionError(
            f"a mask of shape {tuple(mask.shape)} does not fit the leading dimensions of a value of shape "
            f"{tuple(x.shape)}"
        )
    marked = [full.any(tuple(each for each in range(dims) if each != dim)) if dims > 1 else full for dim in range(dims)]
    if not marked[0].any():
        return None
    rectangle = torch.ones_like(full)
    for dim, each in enumerate(marked):
        rectangle = rectangle & each.reshape((-1,) + (1,) * (dims - dim - 1))
    if not torch.equal(rectangle, full):
        return full
    vectors = [each.nonzero().flatten() for each in marked]
    return tuple(vector.reshape((-1,) + (1,) * (dims - dim - 1)) for dim, vector in enumerate(vectors))


def _several(given: Any) -> tuple[Any, ...]:
    return tuple(given) if isinstance(given, Iterable) else (given,)


class AtLayers(ConditionalHooks):
    """Hooks in some layers only, according to the keyword ``layer``: ``AtLayers(3)``, ``AtLayers([3, 4])``."""

    def __init__(self, layers: int | Iterable[int], *hooks: Hook) -> None:
        super().__init__(Layers(*_several(layers)), *hooks)


class AtCalls(ConditionalHooks):
    """Hooks in some calls of a module that runs several times per forward: the keyword ``call``, counted from 0."""

    def __init__(self, calls: int | Iterable[int], *hooks: Hook) -> None:
        super().__init__(Calls(*_several(calls)), *hooks)


class AtRows(ConditionalHooks):
    """Hooks on some rows of the batch only; they get ``(rows, ...)``."""

    def __init__(self, rows: int | slice | Iterable[int], *hooks: Hook) -> None:
        super().__init__(Rows(*_several(rows)), *hooks)


class AtPositions(ConditionalHooks):
    """Hooks on some positions of the sequence only; they get ``(batch, positions, ...)``."""

    def __init__(self, positions: int | slice | Iterable[int], *hooks: Hook, dim: int = 1) -> None:
        super().__init__(Positions(*_several(positions), dim=dim), *hooks)
