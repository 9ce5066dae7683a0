"""The TensorDict that runs of models with hook points return, which also behaves like the dict of TransformerLens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tdcache.cache.named_cache import FlatCache

__all__ = ["PointCache"]


class PointCache(FlatCache):
    """A TensorDict without batch dimensions that can be used where a dict of activations is expected.

    TransformerLens' ``ActivationCache`` looks shorthands up in its dict before it expands them, ``("q", 0) in cache``,
    and iterates over it for the names. A plain TensorDict refuses the former and, without a batch, the latter. Views,
    copies and results of arithmetic may be plain TensorDicts.

    Example:
        >>> import torch
        >>> cache = PointCache({"blocks.0.attn.hook_q": torch.ones(1)})
        >>> ("q", 0) in cache, list(cache)
        (False, ['blocks.0.attn.hook_q'])
    """

    def __contains__(self, key: Any) -> bool:
        parts = key if isinstance(key, tuple) else (key,)
        return bool(parts) and all(isinstance(part, str) for part in parts) and super().__contains__(key)

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__() if self.batch_dims else iter(list(self.keys()))
