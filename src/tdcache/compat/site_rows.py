"""What a collector gathers at one hook point: rows within a budget, and how many went by in all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdcache.compat.hook_names import HookSite
from tdcache.errors import CaptureError
from tdcache.hooks import port_at
from tdcache.reducers import Concatenate

__all__ = ["SiteRows"]


class SiteRows:
    """The callback at one hook point, and the rows that it has kept.

    Args:
        site: the hook point.
        max_rows: the most rows that are kept, exactly.
        device: where they are kept.
    """

    def __init__(self, site: HookSite, max_rows: int, device: torch.device | str) -> None:
        self.site = site
        self.kept = Concatenate(max_rows=max_rows)
        self.seen = 0
        """Rows so far, those beyond the budget as well."""
        self._max_rows = max_rows
        self._device = device

    def __repr__(self) -> str:
        return f"{self.kept.rows:,} rows of {self.site.name!r}"

    def __call__(self, *, module: nn.Module, key: Any, **hooked: Any) -> Tensor:
        """Keep the output; before the forward the first tensor of the arguments, positional ones first."""
        port = port_at(self.site.path, "fwd" if "output" in hooked else "fwd_pre")
        self.take(port.read(module, hooked["args"], hooked["output"] if "output" in hooked else hooked["kwargs"]))
        return torch.empty(0)

    def take(self, value: Tensor) -> None:
        """Copy the rows of ``(batch, features)`` or ``(batch, tokens, features)``, within the budget.

        Raises:
            CaptureError: a value of another shape, of which it is not known what its rows are.
        """
        if not 2 <= value.dim() <= 3:
            name, shape = self.site.name, tuple(value.shape)
            more = "put an nn.Flatten behind it and collect that one's output, or " if value.dim() > 3 else ""
            raise CaptureError(
                f"{name!r} gives values of shape {shape}; rows are made of (batch, features) or (batch, tokens, "
                f"features): {more}use tdcache.harvest, which stores each sample's value in its own shape",
                paths=(name,),
            )
        rows = value.detach().flatten(0, -2)
        self.kept.update(rows.to(self._device))
        self.seen += len(rows)

    def clear(self) -> None:
        """Forget all rows, and start counting again."""
        self.kept = Concatenate(max_rows=self._max_rows)
        self.seen = 0
