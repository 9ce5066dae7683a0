"""What makes two harvests the same computation: their options as JSON, equal in every process that means the same.

A store is continued, or handed out again, where its spec agrees with what is asked for. So a function in an option must
come out differently as soon as it computes something else: its code counts, and so do its defaults and attributes,
what it closes over, the globals that it looks up, and the class and attributes of an object that is called. Other
objects are spelled by what they pickle to. What cannot be pickled (a lock, a generator, a connection) is refused,
unless the user names the computation with ``tag=``.
"""

from __future__ import annotations

import copyreg
import dis
import enum
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.errors import SpecError
from tdcache.introspect import module_hooks
from tdcache.modules.call import BLANK_MODULE
from tdcache.named_places import NamedPlace
from tdcache.tables import without_addresses

__all__ = ["identity_of", "spelled_place", "spelled_positions"]

_DEEPEST = 8  # functions that call functions: what is below changes with what is above, or is a library's


def spelled_positions(value: slice | tuple[int, ...] | None) -> Any:
    """The ``positions`` of a row rule as JSON."""
    if isinstance(value, slice):
        return ":".join("" if each is None else str(each) for each in (value.start, value.stop, value.step))
    return None if value is None else list(value)


def identity_of(value: Any, option: str, tag: str | None = None) -> Any:
    """An option that may be a function, as JSON: plain values as they are, everything else as a name and a hash.

    Args:
        value: the option's value.
        option: its name, for messages.
        tag: what the user calls the computation; it stands for everything that has no spelling.

    Raises:
        SpecError: part of the value cannot be spelled the same way in every process; the message names the part.
    """
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, tuple | list) and all(isinstance(each, str | int) for each in value):
        return list(value)
    digest = hashlib.sha256()
    try:
        for piece in _Speller().spell(value, option):
            digest.update(piece.encode())
            digest.update(b"\0")
    except _NoSpellingError as error:
        if tag is not None:
            return f"{_name_of(value)} tag={tag}"
        raise SpecError(
            f"{option}= depends on {error.what}, which cannot be told apart from another in a later process; name the "
            f"computation with tag='...', and change the name when it changes",
            fields=(option,),
        ) from None
    return f"{_name_of(value)} {digest.hexdigest()[:16]}"


def _name_of(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__qualname__))


class _NoSpellingError(Exception):
    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class _Speller:
    """Turns a value into pieces of text; each object once, so that circles end."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._held: list[Any] = []

    def spell(self, value: Any, where: str, depth: int = 0) -> Iterator[str]:
        """The pieces of ``value``, which is found at ``where``."""
        if value is None or value is Ellipsis or isinstance(value, bool | int | float | complex | str | bytes):
            yield f"{type(value).__name__} {value!r}"
            return
        if id(value) in self._seen:
            yield f"again {self._seen[id(value)]}"
            return
        self._seen[id(value)] = len(self._seen)
        self._held.append(value)  # an identity is one only as long as the object lives
        yield from self._of_kind(value, where, depth)

    def _of_kind(self, value: Any, where: str, depth: int) -> Iterator[str]:
        for kinds, spell in self._kinds():
            if isinstance(value, kinds):
                yield type(value).__qualname__
                yield from spell(value, where, depth)
                return
        yield from self._pickled(value, where, depth)

    def _kinds(self) -> tuple[tuple[Any, Callable[[Any, str, int], Iterator[str]]], ...]:
        return (
            (partial, self._partial),
            (MethodType, self._method),
            (FunctionType, self._function),
            (type, self._class),
            (BuiltinFunctionType | ModuleType, self._named),
            (enum.Enum | torch.dtype | torch.device | torch.layout | PurePath | range | slice, self._by_repr),
            (Tensor, self._tensor),
            (nn.Module, self._module),
            (Mapping, self._mapping),
            (tuple | list, self._sequence),
            (set | frozenset, self._set),
            (CodeType, self._code),
        )

    def _partial(self, value: Any, where: str, depth: int) -> Iterator[str]:
        yield from self.spell(value.func, where, depth)
        yield from self.spell(value.args, where, depth)
        yield from self._mapping(value.keywords, where, depth)

    def _method(self, value: Any, where: str, depth: int) -> Iterator[str]:
        yield from self.spell(value.__func__, where, depth)
        yield from self.spell(value.__self__, f"{where}.__self__", depth)

    def _function(self, value: Any, where: str, depth: int) -> Iterator[str]:
        yield value.__qualname__
        if depth > _DEEPEST or _is_of_library(value):
            yield str(value.__module__)
            return
        yield from self._code(value.__code__, where, depth)
        yield from self._mapping(vars(value), f"an attribute of {value.__qualname__}", depth)
        yield from self.spell(value.__defaults__, f"a default of {value.__qualname__}", depth)
        yield from self._mapping(value.__kwdefaults__ or {}, f"a default of {value.__qualname__}", depth)
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield name
            yield from self.spell(_content(cell), f"{name!r}, which {value.__qualname__} closes over", depth + 1)
        for name in sorted(_globals_of(value.__code__)):
            if name in value.__globals__:
                yield name
                yield from self.spell(
                    value.__globals__[name], f"the global {name!r} of {value.__qualname__}", depth + 1
                )

    def _code(self, code: Any, where: str, depth: int) -> Iterator[str]:
        yield code.co_code.hex()
        yield " ".join(code.co_names)
        for constant in code.co_consts:
            yield from self.spell(constant, where, depth)

    def _class(self, value: Any, where: str, depth: int) -> Iterator[str]:
        """Its name and, of the user's own, the functions and values in its body and in those of its bases."""
        yield f"{value.__module__}.{value.__qualname__}"
        if depth > _DEEPEST or _is_of_library(value):
            return
        for name, item in sorted(vars(value).items()):
            own = getattr(item, "__func__", getattr(item, "fget", item))
            is_function = isinstance(own, FunctionType)
            if is_function and own.__code__.co_filename == "<string>":
                continue  # written by dataclasses, whose fields are values of the body
            if is_function or not (name.startswith("_abc_") or _is_dunder(name) or hasattr(type(own), "__get__")):
                yield name
                yield from self.spell(own, f"{value.__qualname__}.{name}", depth + 1)
        yield from self.spell(value.__bases__, where, depth)

    def _pickled(self, value: Any, where: str, depth: int) -> Iterator[str]:
        """Its class and state, as pickle would save them."""
        if type(value).__module__ == "tokenizers":
            yield from self._tokenizer(value)
            return
        try:
            reduce: Any = copyreg.dispatch_table.get(type(value))
            found = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception:  # noqa: BLE001 - whatever a class says instead of what it holds
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            raise _NoSpellingError(f"{where} ({kind})") from None
        if isinstance(found, str):  # it pickles to its name, as a function behind functools.lru_cache does
            yield found
            yield from self.spell(getattr(value, "__wrapped__", None), where, depth + 1)
            return
        make, arguments, state, items, pairs = (*found, None, None, None)[:5]
        yield from self.spell(make, where, depth + 1)
        yield from self._sequence(arguments, where, depth + 1)
        yield from self._state(state, where, depth)
        yield from self._sequence(list(items or ()), where, depth)
        yield from self._mapping(dict(pairs or ()), where, depth)

    def _tokenizer(self, value: Any) -> Iterator[str]:
        # Each call of a transformers tokenizer sets padding and truncation anew; the caller's code says how.
        told = json.loads(value.to_str())
        yield json.dumps({name: item for name, item in told.items() if name not in ("padding", "truncation")})

    def _state(self, state: Any, where: str, depth: int) -> Iterator[str]:
        if isinstance(state, tuple) and len(state) == 2:  # of a class with slots: its __dict__, and theirs
            yield from self._mapping({**(state[0] or {}), **(state[1] or {})}, where, depth)
        elif isinstance(state, dict):
            yield from self._mapping(state, where, depth)
        else:
            yield from self.spell(state, where, depth)

    def _named(self, value: Any, where: str, depth: int) -> Iterator[str]:
        yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
        yield str(getattr(value, "__version__", ""))
        owner = getattr(value, "__self__", None)  # the object of a bound builtin, such as a tensor's method
        if owner is not None and not isinstance(owner, ModuleType):
            yield from self.spell(owner, f"{where}.__self__", depth)

    def _by_repr(self, value: Any, where: str, depth: int) -> Iterator[str]:
        yield repr(value)

    def _tensor(self, value: Any, where: str, depth: int) -> Iterator[str]:
        yield f"{value.dtype} {tuple(value.shape)}"
        if value.device.type != "meta":
            flat = value.detach().cpu().contiguous().reshape(-1)
            yield hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest()

    def _module(self, value: Any, where: str, depth: int) -> Iterator[str]:
        yield without_addresses(repr(value))
        for path, each in value.named_modules():
            yield path
            yield from self.spell(type(each), where, depth + 1)
            for entry in module_hooks(each):
                yield entry.kind
                yield from self.spell(entry.hook, f"a hook on {where}", depth + 1)
            if not _is_of_library(type(each)):
                own = {name: item for name, item in vars(each).items() if name not in BLANK_MODULE}
                yield from self._mapping(own, where, depth)
        for name, tensor in sorted(value.state_dict().items()):
            yield name
            if isinstance(tensor, Tensor):
                yield from self._tensor(tensor, where, depth)

    def _mapping(self, value: Mapping[Any, Any], where: str, depth: int) -> Iterator[str]:
        yield str(len(value))
        for key, item in value.items():
            yield from self.spell(key, where, depth)
            yield from self.spell(item, f"{where}[{key!r}]" if isinstance(key, int) else f"{where}.{key}", depth + 1)

    def _sequence(self, value: Any, where: str, depth: int) -> Iterator[str]:
        yield str(len(value))
        for item in value:
            yield from self.spell(item, where, depth)

    def _set(self, value: Any, where: str, depth: int) -> Iterator[str]:
        # The order of a set differs between processes.
        yield from sorted(" ".join(_Speller().spell(item, where, depth)) for item in value)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None


def _globals_of(code: CodeType) -> set[str]:
    """The names that a function looks up in its globals, those of the functions inside it included."""
    inner = (_globals_of(each) for each in code.co_consts if isinstance(each, CodeType))
    looked_up = (each.argval for each in dis.get_instructions(code) if each.opname in _LOOKS_UP)
    return set(looked_up).union(*inner)


_LOOKS_UP = frozenset({"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"})
_LIBRARIES = frozenset({"torch", "tensordict", "transformers", "numpy", "tdcache"}) | sys.stdlib_module_names


def _is_of_library(value: Any) -> bool:
    """Whether a function or class is a library's: its name says what it does."""
    return str(value.__module__).partition(".")[0] in _LIBRARIES - {"__main__"}


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def spelled_place(place: NamedPlace) -> dict[str, Any]:
    """What a place means, in JSON's types: one store or file can tell by it whether another means the same."""
    said = {name: getattr(place, name) for name in ("path", "side", "pick", "call", "heads", "order")}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in said.items() if value is not None
    }
