"""The TensorDict that runs of models with hook points give, which also answers what TransformerLens asks of a dict."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tensordict import TensorDict

__all__ = ["PointCache"]


class PointCache(TensorDict):
    """A TensorDict without batch dimensions that can stand where a dict of activations is expected.

    TransformerLens' ``ActivationCache`` asks its dict for shorthands before it spells them out, ``("q", 0) in cache``,
    and iterates over it for the names. A plain TensorDict refuses the one and, without a batch, the other. Views,
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
