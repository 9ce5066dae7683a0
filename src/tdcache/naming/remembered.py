"""Tables made before, by the class, configuration and code of their model: names are found and proved once for each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from tdcache.introspect import module_hooks
from tdcache.modules.call import BLANK_MODULE
from tdcache.named_places import Names
from tdcache.tables import without_addresses

__all__ = ["remembered"]

_KEPT = 64
_EMPTY = CellType()
_tables: dict[str, Names] = {}


def remembered(model: nn.Module, asked: tuple[Any, ...], make: Callable[[], Names]) -> Names:
    """The table that ``make`` gives, or gave for a model of the same class, configuration and code.

    Args:
        model: the model that the table is to be of.
        asked: what else a table depends on: the kind of inputs, the style, what is proved.
        make: makes the table.
    """
    key = hashlib.sha256(repr((_parts_of(model), _plain(asked))).encode()).hexdigest()
    if key not in _tables:
        table = make()
        while len(_tables) >= _KEPT:
            _tables.pop(next(iter(_tables)))
        _tables[key] = table
    return _tables[key].replaced(model=model)


def _parts_of(model: nn.Module) -> tuple[Any, ...]:
    """What names depend on in a model: classes with their code, configuration, settings, shapes."""
    modules = dict(model.named_modules())
    kinds = {type(module) for module in modules.values()}
    code = sorted(repr(_code_of_class(kind)) for kind in kinds)  # a class that is defined anew is another one
    settings = [(path, _settings(module)) for path, module in modules.items()]
    shapes = [(name, tuple(each.shape), _constant(each)) for name, each in model.named_parameters()]
    return type(model).__module__, str(getattr(model, "config", None)), str(model), code, settings, shapes


def _constant(parameter: nn.Parameter) -> float | None:
    """The one number that a parameter holds all over, as a fresh model's may; None where it holds several."""
    flat = parameter.detach().flatten()[:1000]
    return float(flat[0]) if len(flat) and bool((flat == flat[0]).all()) else None


def _settings(module: nn.Module) -> list[Any]:
    """What a module keeps beside its parameters and children, and its hooks."""
    own = [(name, _plain(each)) for name, each in vars(module).items() if name not in BLANK_MODULE]
    return [*own, *(_plain(each.hook) for each in module_hooks(module))]


def _code_of_class(kind: type[nn.Module]) -> list[Any]:
    own = [each for each in kind.__mro__ if each not in nn.Module.__mro__]
    functions = [(name, _plain(each)) for base in own for name, each in vars(base).items()]
    return [kind.__qualname__, *(each for each in functions if isinstance(each[1], tuple))]


def _plain(value: Any) -> Any:
    """A value without the addresses and numbers that its repr may hold."""
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), str(value.dtype)
    if isinstance(value, Mapping):
        return [(name, _plain(each)) for name, each in value.items()]
    if isinstance(value, tuple | list):
        return tuple(map(_plain, value))
    if isinstance(value, CodeType):
        return value.co_code, value.co_names, value.co_varnames, tuple(map(_plain, value.co_consts))
    if isinstance(value, FunctionType):
        held = [cell.cell_contents for cell in value.__closure__ or () if cell != _EMPTY]
        return _plain(value.__code__), [each for each in held if isinstance(each, bool | int | float | str)]
    return value if value is None or isinstance(value, bool | int | float) else without_addresses(repr(value))
