"""Tensors inside structured values: finds the picked one and replaces it.

A module returns or receives a tensor, or tensors in tuples, lists, mappings, dataclasses and Hugging Face
``ModelOutput``s. ``pick`` names one tensor of such a value: an index, a key or attribute, a path of these, a callable,
or ``None`` for the first tensor in order. If each caller interpreted ``pick`` itself, a capture and an edit with the
same pick could mean different tensors.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, TypeGuard

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torch import Tensor

from tdcache.errors import CaptureError, EditError
from tdcache.types import Pick

__all__ = [
    "check_dense",
    "check_fits",
    "children",
    "describe",
    "exchanged",
    "first_tensor",
    "is_entries",
    "leaves",
    "pick_tensor",
    "replace_tensor",
    "tensor_only",
    "with_parts",
]

Step = int | str


def is_entries(value: Any) -> TypeGuard[TensorDictBase]:
    """Whether ``value`` holds tensors under keys, as a TensorDict or a tensorclass does.

    The check is against an abstract class and slow, so it is skipped for plain tensors.
    """
    return type(value) is not Tensor and is_tensor_collection(value)


def children(value: Any) -> Iterator[tuple[Step, Any]]:
    """The named parts of a structured value; nothing for a leaf."""
    if isinstance(value, Mapping) or is_entries(value):
        yield from value.items()
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield field.name, getattr(value, field.name)


def leaves(value: Any, above: tuple[Step, ...] = ()) -> Iterator[tuple[tuple[Step, ...], Tensor]]:
    """Every tensor of a value with the steps that lead to it, in order."""
    if isinstance(value, Tensor):
        yield above, value
        return
    for step, child in children(value):
        yield from leaves(child, (*above, step))


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor of a value, or None."""
    if isinstance(value, Tensor):
        return value
    return next((tensor for _, tensor in leaves(value)), None)


def pick_tensor(value: Any, pick: Pick, path: str) -> Any:
    """The tensor that ``pick`` selects in ``value`` (for a callable, whatever it returns).

    Raises:
        CaptureError: there is nothing at ``pick``; the message names ``path``, the type and the parts.
    """
    if pick is None:
        found = first_tensor(value)
        if found is None:
            raise CaptureError(
                f"the value at {path!r} is {describe(value)} and holds no tensor; say what to keep with pick= "
                "(an index, a key or a callable), or select another module",
                paths=(path,),
            )
        return found
    if callable(pick):
        return pick(value)
    found = value
    for step in pick if isinstance(pick, tuple) else (pick,):
        found = _step_into(found, step, path, pick)
    return found


def _step_into(value: Any, step: Step, path: str, pick: Pick) -> Any:
    named = dict(children(value))
    # Negative indices and positions in a mapping (HF outputs allow output[0]) are valid steps too.
    if step not in named and isinstance(step, int) and -len(named) <= step < len(named):
        return list(named.values())[step]
    if step not in named:
        raise CaptureError(
            f"pick={pick!r} finds nothing at {path!r}: the value is {describe(value)}; use one of {list(named)!r}"
            if named
            else f"pick={pick!r} finds nothing at {path!r}: the value is {describe(value)}, which has no parts",
            paths=(path,),
        )
    return named[step]


def tensor_only(picked: Any, pick: Pick, path: str) -> Any:
    """``picked`` itself if it is a tensor or holds tensors under keys.

    Raises:
        CaptureError: it is something else.
    """
    if isinstance(picked, Tensor) or is_entries(picked):
        return picked
    missing = f"leave pick= out for the first tensor; attention weights are '{path}::pattern', whatever kernel runs"
    raise CaptureError(
        f"pick={pick!r} gives None at {path!r}, which was not computed; {missing}"
        if picked is None
        else f"pick={pick!r} gives {type(picked).__name__} at {path!r}; a cache holds tensors (or TensorDicts of them)",
        paths=(path,),
    )


def replace_tensor(value: Any, new: Any, *, pick: Pick = None, path: str = "") -> Any:
    """A copy of ``value`` with the picked tensor replaced by ``new``; ``value`` itself is not changed.

    Raises:
        EditError: ``new`` differs in shape, dtype or device from the tensor it replaces, or there is none to replace.
    """
    if isinstance(value, Tensor) and pick is None:
        check_fits(new, value, path)
        return new
    if callable(pick):
        raise EditError(f"a callable pick= cannot say where to put the new value at {path!r}; use an index or a key")
    steps = _steps_to(value, pick, path)
    return _rebuild(value, steps, new, path)


def _steps_to(value: Any, pick: Pick, path: str) -> tuple[Step, ...]:
    if pick is not None:
        return pick if isinstance(pick, tuple) else (pick,)  # type: ignore[return-value]  # a callable was refused
    for steps, _ in leaves(value):
        return steps
    raise EditError(f"the value at {path!r} is {describe(value)} and holds no tensor to replace; say which with pick=")


def _rebuild(value: Any, steps: tuple[Step, ...], new: Any, path: str) -> Any:
    if not steps:
        check_fits(new, value, path)
        return new
    step, rest = steps[0], steps[1:]
    inner = _rebuild(_step_into(value, step, path, steps), rest, new, path)
    if isinstance(step, int) and not isinstance(value, tuple | list):
        step = list(dict(children(value)))[step]
    return with_parts(value, {step: inner})


def with_parts(value: Any, parts: Mapping[Step, Any]) -> Any:
    """A copy of the structured ``value`` with some of its parts replaced."""
    if isinstance(value, tuple | list):
        items = list(value)
        for at, part in parts.items():
            items[at] = part  # type: ignore[index]  # the steps of a sequence are integers
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if is_entries(value):
        entries = value.copy()
        for name, part in parts.items():
            entries.set(str(name), part)
        return entries
    if dataclasses.is_dataclass(value) and not isinstance(value, type):  # HF outputs are mappings as well
        return dataclasses.replace(value, **{str(name): part for name, part in parts.items()})
    if not isinstance(value, MutableMapping):
        return type(value)({**value, **parts})
    copied = copy.copy(value)
    for name, part in parts.items():
        copied[name] = part
    return copied


def exchanged(value: Any, new: Iterator[Tensor | None]) -> Any:
    """``value`` with each tensor replaced by the next of ``new``, unless that is None; rebuilt only if needed."""
    if isinstance(value, Tensor):
        other = next(new)
        return value if other is None else other
    parts = {step: (child, exchanged(child, new)) for step, child in children(value)}
    changed = {step: after for step, (before, after) in parts.items() if after is not before}
    return with_parts(value, changed) if changed else value


def check_dense(value: Any, path: str) -> None:
    """Refuse a nested tensor where its axes matter: torch computes almost nothing with it.

    In inference, ``nn.TransformerEncoder`` makes one of a batch with padding.

    Raises:
        CaptureError: the message names ``path`` and the remedy.
    """
    if type(value) is Tensor and value.is_nested and value.layout is torch.strided:
        raise CaptureError(
            f"the value at {path!r} is a nested tensor, whose rows differ in length, so that it has no axes to edit, "
            "reduce or choose from; build nn.TransformerEncoder with enable_nested_tensor=False, or call it with "
            "gradients enabled (a capture without positions=, rows=, units=, heads= or reducer= keeps it as it is)",
            paths=(path,),
        )


def check_fits(new: Any, old: Any, path: str) -> None:
    """Refuse a replacement tensor whose shape, dtype or device differs from the tensor it replaces.

    Raises:
        CaptureError: the old tensor is nested.
        EditError: the message shows both signatures.
    """
    if not isinstance(old, Tensor):
        return
    check_dense(old, path)
    if not isinstance(new, Tensor):
        raise EditError(f"the value at {path!r} is a tensor; it cannot be replaced by {describe(new)}")
    if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
        raise EditError(
            f"the replacement at {path!r} does not fit:\n"
            f"  there: {_signature(old)}\n  given: {_signature(new)}\n"
            "reshape, expand or cast it first, e.g. value.expand_as(output).to(output)"
        )


def _signature(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def describe(value: Any) -> str:
    """The type of a value and of its parts, for messages."""
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of ({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__ if not isinstance(value, torch.Tensor) else f"Tensor{tuple(value.shape)}"
