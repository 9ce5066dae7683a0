"""Rows for training without a disk: a buffer that a model fills, batch by batch, while another is trained from it.

Dictionaries are trained on rows in random order, and the rows of one forward resemble each other. So a buffer holds the
rows of many forwards, hands out mixed batches until half of it is gone, and is filled again. Which rows those are is
decided by the code that harvests to files: over an epoch they are exactly those of :func:`tdcache.harvest`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdcache.errors import SelectionError, SpecError
from tdcache.harvesting.ahead import made_ahead
from tdcache.harvesting.capture import Losses
from tdcache.harvesting.options import HarvestOptions
from tdcache.harvesting.plan import row_bytes
from tdcache.harvesting.recheck import check_like, refuse_overflow
from tdcache.harvesting.request import Request
from tdcache.harvesting.row_rule import BatchRows
from tdcache.harvesting.source import SourceBatch, Visit
from tdcache.harvesting.workers import Share
from tdcache.options import as_device
from tdcache.store.batches import generator_of
from tdcache.store.dtypes import DTYPES
from tdcache.store.rows import pick_rows, put_rows
from tdcache.store.spec import differing, spec_id
from tdcache.store.statistics import SiteStatistics
from tdcache.types import Selector

__all__ = ["ActivationBuffer"]


@dataclass(frozen=True, slots=True)
class _Piece:
    """The kept rows of one forward."""

    taken: int
    """The number of the batch after this one."""
    seen: int
    """Rows of all ranks up to here, where there is a limit."""
    rows: dict[str, Tensor]
    """By column."""
    lost: Losses


class ActivationBuffer:
    """Mixed batches of a model's activations; each ``for`` is the rest of an epoch, each epoch has another order.

    A batch is a TensorDict of ``(batch_size, *features)`` by site, with ``"seq"``, ``"pos"`` and ``"tok"`` as in an
    :class:`ActivationDataset`; it is the reader's own memory. Every row of the data comes exactly once per epoch, in an
    order that ``seed``, ``rows`` and the data pin down. While a ``for`` runs, forwards run on a thread of their own,
    the model is in eval mode and hooked; it is as it was when the loop ends.

    Args:
        model: any module; the one that is trained from the rows is another.
        data: as for :func:`tdcache.harvest`.
        select: which modules.
        rows: how many rows are mixed at a time, and held in memory.
        batch_size: rows per batch; the last of an epoch may be smaller.
        seed: of the order.
        per: ``"tokens"`` or ``"samples"``, what a row is; ``rows=`` of :func:`tdcache.harvest`.
        samples: samples per forward, where ``data`` is a dataset; ``batch_size=`` of :func:`tdcache.harvest`.
        overflow: ``"raise"`` refuses values that ``dtype`` cannot hold; ``"count"`` counts them in :attr:`statistics`.
        ahead: how many forwards may be ahead of what the buffer has taken; 0 runs them in between, on no thread.
        held_on: the device where rows are kept.
        rank: which share of the forwards is run here; by default torchrun's.
        world: how many shares there are.
        **options: as for :func:`tdcache.harvest`: ``match``, ``direction``, ``pick``, ``dtype``, ``drop``,
            ``positions``, ``max_rows``, ``max_bytes``, ``collate``, ``forward``, ``device``, ``columns``, ``in_keys``,
            ``names``.

    Raises:
        SelectionError: nothing selected, nothing in the data, or sizes below 1.
        CaptureError: as for :func:`tdcache.harvest`; from an iterator, where it is found in a later batch.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        >>> buffer = ActivationBuffer(model, torch.randn(100, 4), select="1", rows=64, batch_size=16, seed=0)
        >>> [len(batch["1"]) for batch in buffer]
        [16, 16, 16, 16, 16, 16, 4]
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        select: Selector,
        rows: int,
        batch_size: int,
        seed: int = 0,
        per: Any = None,
        samples: int = 32,
        overflow: str = "raise",
        ahead: int = 2,
        held_on: torch.device | str = "cpu",
        rank: int | None = None,
        world: int | None = None,
        **options: Any,
    ) -> None:
        if not 1 <= batch_size <= rows:
            raise SelectionError(f"a buffer needs 1 <= batch_size <= rows, got {batch_size=}, {rows=}", selector=rows)
        own = {"select": select, "rows": per, "batch_size": samples, "overflow": overflow, "held_on": held_on}
        self._request = Request.of(model, data, ".", HarvestOptions.of("ActivationBuffer", own | options))
        self._data, self._ahead = data, ahead
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._device = as_device(held_on)
        self._share = Share.of(model, rank, world)
        self.spec, _ = self._request.settled(self._share, new=True)
        """What the rows are, of which model, and how; the spec of a store of them."""
        self.epoch = 0
        """The number of the epoch that runs, or ran last."""
        self._failed = False
        self._statistics: dict[str, SiteStatistics] = {}
        self._steps: Iterator[tuple[SourceBatch, BatchRows, int]] | None = None
        self._begin(0)

    def __repr__(self) -> str:
        sites = ", ".join(map(repr, self.spec["sites"]))
        return f"ActivationBuffer({sites}: {self.rows:,} rows, batches of {self.batch_size}, epoch {self.epoch})"

    def _begin(self, epoch: int) -> None:
        """The state at the beginning of an epoch."""
        self.epoch, self._refills, self._ended = epoch, 0, False
        self._taken = self._seen = self._made = self._made_seen = 0
        self._memory: dict[str, Tensor] = {}
        self._order, self._position = torch.empty(0, dtype=torch.int64, device=self._device), 0
        self._filled = 0  # of the free places, where a refill was interrupted
        self._pending: dict[str, Tensor] = {}
        self._ready: deque[_Piece] = deque()

    def _renew(self) -> None:
        """Go through the data from its beginning again."""
        if self._steps is None:
            return
        if isinstance(self._data, Iterator):
            raise SelectionError(
                f"the data is an iterator ({type(self._data).__name__}), which can be gone through once; give a "
                "loader, a dataset or a list for several epochs, or make a new buffer over a new iterator"
            )
        asked = self._request
        self._request, self._steps = Request.of(asked.capture.model, self._data, ".", asked.options), None

    @property
    def statistics(self) -> dict[str, SiteStatistics]:
        """Mean, variance and losses of each site over the rows that the first epoch has taken so far."""
        return dict(self._statistics)

    def __iter__(self) -> Iterator[TensorDict]:
        if self._failed:  # the batch that failed comes again
            self._renew()
            self._failed = False
        if self._ended and not self._left:  # a state from after the last batch: that epoch is over
            self._renew()
            self._begin(self.epoch + 1)
        with closing(self._pieces()) as pieces:
            while True:
                if not self._ended and (2 * self._left <= self.rows or self._left < self.batch_size):
                    self._refill(pieces)
                if not self._left:
                    break
                places = self._order[self._position : self._position + self.batch_size]
                self._position += len(places)
                found = {key: pick_rows(column, places) for key, column in self._memory.items()}
                yield TensorDict(found, batch_size=[len(places)])

    @property
    def _left(self) -> int:
        return self._order.numel() - self._position

    def _refill(self, pieces: Iterator[_Piece]) -> None:
        """Fill up, and mix all: what is left in its order, then what is new, so that the places do not matter.

        Where a forward fails, what was filled stays so, and the next call goes on with it.
        """
        free = self._free()
        while self._filled < free.numel() and not self._ended:
            piece = None if self._pending else next(pieces, None)
            if piece is not None:
                self._taken, self._seen, self._pending = piece.taken, piece.seen, piece.rows
            self._ended = not self._pending
            self._filled += self._put(free[self._filled :]) if self._pending else 0
        logical = torch.cat([self._order[self._position :], free[: self._filled]])
        drawn = torch.randperm(logical.numel(), generator=generator_of(self.seed, self.epoch, self._refills))
        self._order, self._position, self._filled = logical[drawn.to(self._device)], 0, 0
        self._refills += 1

    def _free(self) -> Tensor:
        """The places without a row that is still to come."""
        unused = torch.ones(self.rows, dtype=torch.bool, device=self._device)
        unused[self._order[self._position :]] = False
        return unused.nonzero().squeeze(1)

    def _put(self, places: Tensor) -> int:
        """Move pending rows to free places; gives how many."""
        count = min(places.numel(), len(self._pending["seq"]))
        for key, rows in self._pending.items():
            if key not in self._memory:
                shape = (self.rows, *rows.shape[1:])
                self._memory[key] = torch.empty(shape, dtype=rows.dtype, device=self._device)
            put_rows(self._memory[key], places[:count], rows[:count])
        rest = {key: rows[count:] for key, rows in self._pending.items()}
        self._pending = rest if len(rest["seq"]) else {}
        return count

    def _pieces(self) -> Generator[_Piece]:
        with closing(made_ahead(self._forwards, waiting=self._ahead, ready=self._ready)) as pieces:
            for piece in pieces:
                if self.epoch == 0:
                    self._measure(piece)
                yield piece

    def _forwards(self) -> Generator[_Piece]:
        """The rows of each forward while the model is hooked, on whichever thread asks for them."""
        if self._steps is None:
            self._steps = self._walk(self._made, self._made_seen)
        self._failed = True
        capture = self._request.capture
        with capture.open() as hooked:
            for step, rows, seen in self._steps:
                values = capture.run(hooked, step.batch, rows)
                lost = capture.losses()
                check_like(values, self.spec["sites"], step.number)
                if self._request.options.overflow == "raise":
                    refuse_overflow(lost, capture.taker.dtype, step.number)
                own = self._request.columns(step.batch, rows, self.spec.get("columns"))
                beside = rows.columns() | {name.removeprefix("col/"): value for name, value in own.items()}
                piece = dict(values) | {name: value.to(self._device) for name, value in beside.items()}
                self._made, self._made_seen = step.number + 1, seen
                if len(rows):
                    self._failed = False
                    yield _Piece(self._made, seen, piece, lost)
                    self._failed = True
        self._failed = False

    def _measure(self, piece: _Piece) -> None:
        for path in self.spec["sites"]:
            if piece.rows[path].is_floating_point():
                found = SiteStatistics.of([piece.rows[path]])
                found = found.with_losses(piece.lost.overflow.get(path, 0), piece.lost.underflow.get(path, 0))
                before = self._statistics.get(path)
                self._statistics[path] = found if before is None else before.merged(found)

    def _walk(self, taken: int, seen: int) -> Iterator[tuple[SourceBatch, BatchRows, int]]:
        """This rank's batches from number ``taken`` on, the rows kept of each, and how many there are so far."""
        sizes = {path: (DTYPES[each["dtype"]].itemsize, each["shape"]) for path, each in self.spec["sites"].items()}
        limit = self._request.budget.limit(row_bytes(sizes, self.spec["tokens"]))
        rule = self._request.row_rule(self.spec)

        def visit(number: int) -> Visit:
            if number < taken:
                return "skip"
            return "run" if self._share.has(number) else ("skip" if limit is None else "count")

        for step in self._request.source.walk(1, visit):
            rows = rule(step.batch, first=step.first)
            if limit is not None:
                rows = rows.first(max(0, limit - seen))
            seen += len(rows)
            if step.visit == "run":
                yield step, rows, seen
            if limit is not None and seen >= limit:
                return

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is, with the rows that the buffer holds: what was handed out does not come again.

        It is as large as those rows; tensors, numbers and strings only, for ``torch.load(..., weights_only=True)``.
        """
        places, filled = self._order[self._position :], self._free()[: self._filled]
        held = {key: pick_rows(column, places) for key, column in self._memory.items()}
        pending = {key: rows.clone() for key, rows in self._pending.items()}
        if self._filled:
            new = {key: pick_rows(column, filled) for key, column in self._memory.items()}
            pending = {key: torch.cat([rows, *([pending[key]] if pending else [])]) for key, rows in new.items()}
        counts = {"epoch": self.epoch, "taken": self._taken, "seen": self._seen, "refills": self._refills}
        statistics = {
            path: [each.rows, each.packed(), each.overflow, each.underflow] for path, each in self._statistics.items()
        }
        return {
            **counts,
            "ended": self._ended,
            "held": held,
            "pending": pending,
            "statistics": statistics,
            "identity": self._identity(),
        }

    def _identity(self) -> dict[str, Any]:
        share = {"rank": self._share.rank, "world": self._share.world}
        return {
            "spec": spec_id(self.spec),
            "rows": self.rows,
            "batch_size": self.batch_size,
            "seed": self.seed,
            **share,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was; the data is entered after the forwards whose rows the state holds.

        Raises:
            SpecError: it is of other rows, another order or another share; the fields are named.
            SelectionError: the data is an iterator, and this buffer has begun with it.
        """
        fields = differing(state["identity"], self._identity())
        if fields:
            raise SpecError(f"the state is of another buffer: they differ in {', '.join(fields)}", fields=fields)
        self._renew()
        self._begin(state["epoch"])
        self._taken, self._seen, self._refills = state["taken"], state["seen"], state["refills"]
        self._made, self._made_seen, self._ended = self._taken, self._seen, state["ended"]
        self._pending = {key: rows.to(self._device) for key, rows in state["pending"].items()}
        for key, rows in state["held"].items():
            self._memory[key] = torch.empty((self.rows, *rows.shape[1:]), dtype=rows.dtype, device=self._device)
            self._memory[key][: len(rows)] = rows.to(self._device)
            self._order = torch.arange(len(rows), device=self._device)
        self._statistics = {
            path: SiteStatistics.unpacked(rows, packed).with_losses(over, under)
            for path, (rows, packed, over, under) in state["statistics"].items()
        }
