"""Calls a plain module with a TensorDict.

A context makes one of these whenever it is entered, so making one must cost less than registering the hooks. Results
with named parts (dicts, dataclasses, Hugging Face outputs) are matched to ``out_keys`` by name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdcache.errors import ContextError
from tdcache.hooks.values import children, first_tensor
from tdcache.types import CacheKey

__all__ = ["BLANK_MODULE", "ModelCall", "entries_of", "holds_entries", "init_module"]


def init_module(module: nn.Module) -> None:
    """``nn.Module.__init__(module)`` at a third of the cost, with the same state in the same order."""
    state = module.__dict__
    state.update(BLANK_MODULE)
    for name, kind in _CONTAINERS:
        state[name] = kind()


BLANK_MODULE = vars(nn.Module())
"""The attributes of a new module."""
_CONTAINERS = [(name, type(value)) for name, value in BLANK_MODULE.items() if type(value) in (dict, OrderedDict, set)]
"""The attributes that each module needs its own instance of, and the type of each."""


def holds_entries(value: Any) -> TypeGuard[TensorDictBase]:
    """Whether ``value`` is a TensorDict; the check against an abstract class is slow and skipped for plain tensors."""
    return type(value) is not Tensor and isinstance(value, TensorDictBase)


def entries_of(data: Any) -> TensorDictBase:
    """The TensorDict inside a tensorclass; what is written to it appears in the tensorclass."""
    entries: TensorDictBase = data._tensordict  # noqa: SLF001  (to_tensordict() would copy)
    return entries


class ModelCall(TensorDictModuleBase):
    """Reads a module's arguments from a TensorDict and writes its results back to it.

    Args:
        module: any module.
        in_keys: the entries passed as positional arguments, in order; or a mapping of entries to the names of keyword
            arguments, as in ``TensorDictModule``.
        out_keys: where results are written. Entries of a mapping-like result (a dict, a Hugging Face ``ModelOutput``, a
            dataclass) are matched by name if the names agree; otherwise results are taken in order. ``"_"`` skips one.
    """

    module: nn.Module
    reads: list[CacheKey]
    keywords: tuple[str, ...] | None
    writes: list[CacheKey]

    def __init__(
        self,
        module: nn.Module,
        in_keys: Sequence[CacheKey] | Mapping[CacheKey, str] | None = None,
        out_keys: Sequence[CacheKey] | None = None,
    ) -> None:
        init_module(self)
        self._modules["module"] = module
        given = ["input"] if in_keys is None else [in_keys] if isinstance(in_keys, str) else in_keys
        keywords = None if in_keys is None or not isinstance(given, Mapping) else tuple(given.values())
        writes = [out_keys] if isinstance(out_keys, str) else list(out_keys or ["output"])
        self.__dict__.update(reads=list(given), keywords=keywords, writes=writes)  # nn.Module.__setattr__ is slow

    @property
    def in_keys(self) -> list[CacheKey]:
        """The entries that are read."""
        return self.reads

    @in_keys.setter
    def in_keys(self, keys: Sequence[CacheKey]) -> None:
        self.__dict__["reads"] = list(keys)

    @property
    def out_keys(self) -> list[CacheKey]:
        """The entries that are written."""
        return self.writes

    @out_keys.setter
    def out_keys(self, keys: Sequence[CacheKey]) -> None:
        self.__dict__["writes"] = list(keys)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A TensorDict in, the same TensorDict out; other arguments are passed to the module unchanged."""
        if len(args) != 1 or not isinstance(args[0], TensorDictBase):
            return self.module(*args, **kwargs)
        data = args[0]
        values = [self._read(data, key) for key in self.in_keys]
        if self.keywords is None:
            result = self.module(*values, **kwargs)
        else:
            result = self.module(**dict(zip(self.keywords, values, strict=True)), **kwargs)
        for key, value in self._named(result):
            data.set(key, value)
        return data

    @staticmethod
    def _read(data: TensorDictBase, key: CacheKey) -> Any:
        value = data.get(key, None)
        if value is None:
            there = list(data.keys(include_nested=True, leaves_only=True))
            raise KeyError(
                f"the TensorDict has no entry {key!r} for the model's input; it has {there!r}: choose with in_keys="
            )
        return value

    def _named(self, result: Any) -> list[tuple[CacheKey, Any]]:
        if isinstance(result, Tensor | TensorDictBase):
            results: list[Any] = [result]
            named: dict[Any, Any] = {}
        else:
            named = dict(children(result))
            results = list(named.values())
        found = []
        for position, key in enumerate(self.out_keys):
            if key == "_":
                continue
            value = named[key] if key in named else results[position] if position < len(results) else None
            value = value if isinstance(value, Tensor | TensorDictBase) else first_tensor(value)
            if value is None:
                raise ContextError(
                    f"the model returned {type(result).__name__} with {list(named)!r}, nothing to write to out_key "
                    f"{key!r}; choose with out_keys="
                )
            found.append((key, value))
        return found
