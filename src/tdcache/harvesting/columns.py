"""What users store beside the rows: labels, offsets, numbers of documents, one per sample or one per token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import CaptureError, SelectionError, listed
from tdcache.harvesting.identity import identity_of
from tdcache.harvesting.row_rule import BatchRows
from tdcache.harvesting.sizes import dtype_name
from tdcache.store.writer import ROW_COLUMNS, own_column

__all__ = ["OwnColumns"]


@dataclass(frozen=True, slots=True)
class OwnColumns:
    """The user's columns of each batch.

    Args:
        sources: by name, a key or index of the batch, or ``function(batch)``.
    """

    sources: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, columns: Sequence[str] | Mapping[str, Any] | None, paths: Sequence[str]) -> OwnColumns:
        """From an option: names that are keys of the batches, or a mapping.

        Raises:
            SelectionError: a name that is taken.
        """
        sources = columns if isinstance(columns, Mapping) else {name: name for name in columns or ()}
        taken = [name for name in sources if name in ROW_COLUMNS or name in paths]
        if taken:
            raise SelectionError(
                f"no column can be called {taken[0]!r}: a site or a row's own column has that name; give a mapping, "
                "columns={'another name': key}",
                selector=taken[0],
            )
        return cls(dict(sources))

    def identity(self, tag: str | None) -> dict[str, Any]:
        """Where the columns come from, as JSON."""
        return {name: identity_of(source, "columns", tag) for name, source in sorted(self.sources.items())}

    def describe(self, batch: Any, rows: BatchRows) -> dict[str, Any]:
        """Dtype and shape of each column as the spec has them."""
        taken = self(batch, rows)
        return {
            name: {"dtype": dtype_name(value.dtype), "shape": list(value.shape[1:])}
            for name, value in zip(self.sources, taken.values(), strict=True)
        }

    def __call__(
        self, batch: Any, rows: BatchRows, described: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor]:
        """The columns of the kept rows of a batch, by their names in a shard.

        A value that begins with ``(batch, tokens)`` gives each token its own, one that begins with ``(batch,)`` gives
        all tokens of a sample the same.

        Raises:
            CaptureError: a value is not there, no tensor, or has other rows than the batch; or it has another shape or
                dtype than ``described`` says.
        """
        found = {}
        for name, source in self.sources.items():
            value = _rows_of(_value(batch, name, source), rows, name)
            if described is not None:
                here = {"dtype": dtype_name(value.dtype), "shape": list(value.shape[1:])}
                if here != described[name]:
                    raise CaptureError(f"column {name!r} is {here} in this batch, and {described[name]} in the first")
            found[own_column(name)] = value
        return found


def _value(batch: Any, name: str, source: Any) -> Tensor:
    try:
        value = source(batch) if callable(source) else batch[source]
    except (KeyError, IndexError, TypeError) as error:
        keys = listed(list(map(str, batch))) if isinstance(batch, Mapping) else type(batch).__name__
        raise CaptureError(
            f"column {name!r} comes from {source!r}, which the batch has not ({keys}): {error}"
        ) from error
    try:
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CaptureError(
            f"column {name!r} holds {type(value).__name__}, no numbers ({error}); store a number for each text, and "
            "keep the texts elsewhere"
        ) from error


def _rows_of(value: Tensor, rows: BatchRows, name: str) -> Tensor:
    grid = rows.grid
    chosen = torch.arange(math.prod(grid)) if rows.chosen is None else rows.chosen
    if len(grid) > 1 and tuple(value.shape[:2]) == grid:
        return value.flatten(0, 1)[chosen]
    if value.shape[:1] == grid[:1]:
        return value[chosen // (math.prod(grid) // max(1, grid[0]))]
    raise CaptureError(
        f"column {name!r} has values of shape {tuple(value.shape)}, and the batch has rows along {grid}; give one per "
        "sample or one per token"
    )
