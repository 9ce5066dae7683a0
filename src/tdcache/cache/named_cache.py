"""The cache of a context with canonical names: a TensorDict that also takes a role and a layer as a key.

A name such as ``blocks.5.attn.pattern`` is one string key. Without this class, code that loops over layers would have
to format such strings, and code written for TransformerLens' ``cache["pattern", 5]`` would not run.
"""

from __future__ import annotations

from typing import Any

import regex
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdcache.errors import CanonicalNameError, listed
from tdcache.named_places import Names

__all__ = ["FlatCache", "NamedCache", "new_node"]


class FlatCache(TensorDict):
    """Base of the TensorDict subclasses used as caches: ``update`` is as fast as that of a plain TensorDict.

    TensorDict writes a dict of plain tensors into its own instances at once, but into those of a subclass key by key,
    which takes ten times as long and is done after every forward.
    """

    def update(self, input_dict_or_td: Any = None, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Write entries as :meth:`tensordict.TensorDict.update` does."""
        given = input_dict_or_td
        plain = type(given) is dict and {*map(type, given.values())} == {Tensor} and {*map(type, given)} == {str}
        special = self.is_locked or self.batch_dims or self.device is not None or hasattr(self, "_consolidated")
        if args or kwargs or special or not plain or torch.compiler.is_compiling():
            return super().update(given, *args, **kwargs)
        self._tensordict.update(given)
        return self


class NamedCache(FlatCache):
    """A TensorDict keyed by canonical names, together with the table that they come from.

    In addition to the keys of any TensorDict, ``cache["resid_post", 5]`` and ``cache["attn.pattern", -1]`` are the
    entries of a role in one block; negative numbers count from the last one. ``cache["pattern", 5, "attn"]`` means the
    same in TransformerLens' order. The prefix of a stack precedes the role: ``cache["encoder.resid_post", 0]``. If the
    cache has several directions, the direction comes first: ``cache["bwd", "resid_post", 5]``. Copies and parts of the
    cache keep the table; results of arithmetic do not, and have plain keys only.

    Example:
        >>> import torch
        >>> cache = NamedCache.of(Names({"blocks.0.resid_post": "h.0", "blocks.1.resid_post": "h.1"}))
        >>> cache["blocks.1.resid_post"] = torch.ones(2)
        >>> cache["resid_post", -1]
        tensor([1., 1.])
    """

    table: Names | None = None
    """The table of names that key the entries. (``names`` is taken: a TensorDict's dimension names.)"""

    @classmethod
    def of(cls, table: Names, **options: Any) -> NamedCache:
        """An empty cache for the names of ``table``; options are those of a TensorDict."""
        cache = cls({}, **{"batch_size": [], **options})
        cache.table = table
        return cache

    def __getitem__(self, index: Any) -> Any:
        """The entry of a name or of a role and a layer; any other index is handled by TensorDict."""
        return self._carried(super().__getitem__(self._spelled(index)))

    def get(self, key: Any, *args: Any, **kwargs: Any) -> Any:
        """The entry of a key, which may be a role and a layer; the default if there is no such entry."""
        try:
            key = self._spelled(key)
        except CanonicalNameError:
            if args or "default" in kwargs:
                return args[0] if args else kwargs["default"]
            raise
        return super().get(key, *args, **kwargs)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """A copy that keeps the table."""
        return self._carried(super().clone(*args, **kwargs))

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The cache on another device or in another dtype, with the table."""
        return self._carried(super().to(*args, **kwargs))

    def detach(self) -> Any:
        """The cache with detached entries and the table."""
        return self._carried(super().detach())

    def select(self, *keys: Any, **kwargs: Any) -> Any:
        """The entries of the given keys, with the table."""
        return self._carried(super().select(*keys, **kwargs))

    def exclude(self, *keys: Any, **kwargs: Any) -> Any:
        """All entries except those of the given keys, with the table."""
        return self._carried(super().exclude(*keys, **kwargs))

    def _carried(self, found: Any) -> Any:
        if type(found) is NamedCache and found.table is None:
            found.table = self.table
        return found

    def name_of(self, role: str, layer: int, part: str = "") -> str:
        """The name of a role in one block: ``("resid_post", 5)`` or, in TransformerLens' order, ``("q", 5, "attn")``.

        Raises:
            CanonicalNameError: the table has no such name; the message says what is near, or why it is refused.
        """
        table = Names({key: key for key in _names_in(self)}) if self.table is None else self.table
        return table.in_block(f"{part}.{role}" if part else role, layer)

    def _spelled(self, index: Any) -> Any:
        """``index`` with a role and a layer replaced by their canonical name; any other index unchanged."""
        if type(index) is not tuple:
            return index
        at = next((at for at, part in enumerate(index) if type(part) is int), 0)
        before, after = index[:at], index[at + 1 :]
        if not at or not all(isinstance(part, str) for part in (*before, *after)) or len(after) > 1:
            return index
        name = self.name_of(before[-1], index[at], *after)
        key = (*before[:-1], name)
        node: Any = self if at == 1 else super().get(before[:-1], None)
        there = [] if node is None else list(map(str, node.keys()))
        if name not in there:
            stacked = regex.sub(r"(?<=blocks\.)\d+", "*", name)
            told = (
                f"; stack_by= put the blocks along the first axis of {stacked!r}, in order of their numbers among "
                f"those that the pattern matched: cache[{stacked!r}][{index[at]}] if it matched all"
            )
            raise CanonicalNameError(
                f"{name!r} is not kept in this cache, which keeps {listed(there) or 'nothing'}"
                f"{told if stacked in there else ''}",
                selector=name,
                near=tuple(there[:3]),
            )
        return key


def _names_in(cache: TensorDictBase) -> list[str]:
    """The names among the keys, including those inside the nodes of directions."""
    keys = cache.keys(include_nested=True, leaves_only=True)
    return list(dict.fromkeys(key if isinstance(key, str) else key[-1] for key in keys))


def new_node(cache: TensorDictBase, batch_size: Any = ()) -> TensorDict:
    """An empty TensorDict for one direction of ``cache``, of the same kind."""
    options: dict[str, Any] = {"batch_size": batch_size, "device": cache.device}
    if type(cache) is TensorDict or not isinstance(cache, NamedCache) or cache.table is None:
        return TensorDict(**options)
    return NamedCache.of(cache.table, **options)
