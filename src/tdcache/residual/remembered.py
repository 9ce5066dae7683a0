"""Remembers what was found of kept values, until they or the modules that they were held against change.

A cache is read many times. Checking a sum costs as much as taking it apart, and its verdict holds for as long as no
tensor behind it was written to; without this file each call would check again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

__all__ = ["once"]

T = TypeVar("T")
_FOUND: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""By module and first value, both weakly held, so that a finding dies with either: key to state and finding."""
_OWN_OF_MODULES = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, str, type(None))


def once(
    make: Callable[[], T],
    *,
    key: Hashable,
    owner: nn.Module,
    values: Sequence[object],
    modules: Iterable[nn.Module] = (),
) -> T:
    """What ``make()`` returns; called again only after one of the values or modules changed.

    A tensor has changed if it is another object or was written to in place (its ``_version``), a module if its forward,
    a plain attribute, a parameter or a buffer has. Where that cannot be told (a module with attributes of other types,
    a tensor of inference mode), nothing is remembered. An exception is not remembered.

    Args:
        make: what finds it; it does not write to the values.
        key: tells findings of the same values apart.
        owner: the module with which the finding is dropped.
        values: the values it depends on, at least one; the finding is also dropped with the first.
        modules: the modules it depends on.
    """
    state = _state(values, modules)
    if state is None:
        return make()
    slots = _FOUND.setdefault(owner, WeakIdKeyDictionary()).setdefault(values[0], {})
    known = slots.get(key)
    if known is not None and known[0] == state:
        found: T = known[1]
        return found
    made = make()
    slots[key] = (state, made)
    return made


def _state(values: Iterable[object], modules: Iterable[nn.Module]) -> tuple[object, ...] | None:
    """What tells whether anything changed; None where that cannot be told."""
    found: list[object] = []
    tensors = list(values)
    for module in modules:
        for each in module.modules():
            plain = {name: value for name, value in vars(each).items() if name not in _OWN_OF_MODULES}
            if not all(map(_is_plain, plain.values())):
                return None
            found += [WeakIdRef(each), type(each).forward, each.training, tuple(plain.items())]
            tensors += [*each.parameters(recurse=False), *each.buffers(recurse=False)]
    for value in tensors:
        if type(value) not in (Tensor, nn.Parameter) or value.is_inference():  # type: ignore[attr-defined]
            return None
        found += [WeakIdRef(value), value._version]  # type: ignore[attr-defined]
    return tuple(found) if tensors else None


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))
