"""Batches for a stock ``DataLoader``: the epochs of a store, dealt to the loader's workers as they are to ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from tdcache.store.batches import Batches, EpochOrder
from tdcache.store.reader import StoreReader
from tdcache.store.transport import SentBatch, empty_to_send

__all__ = ["RowIterable"]


@dataclass(eq=False)
class RowIterable(IterableDataset[dict[str, Tensor]]):
    """Whole batches, for ``DataLoader(ds.iterable(1024), batch_size=None)``, with workers or without.

    A batch is a dict of tensors by column: the loader's own conversion takes a TensorDict apart along its rows.

    Made by :meth:`ActivationDataset.iterable`, which has the arguments. Every row comes exactly once per epoch, over
    all ranks and workers. The order is pinned by ``seed``, the epoch, and the number of ranks and workers. Each ``for``
    in one process is the rest of an epoch, or the next one; in workers it is a whole one, because what they had made
    ahead of a loop that was left is lost. A loader whose workers do not persist starts them from this object as it is,
    so say which epoch is next: ``iterable.set_epoch(number)``, as for a ``DistributedSampler``.
    """

    dataset: StoreReader
    order: EpochOrder
    epoch: int = 0
    _batches: Batches | None = field(default=None, init=False, repr=False)
    _share: tuple[int, int] = field(default=(0, 0), init=False, repr=False)
    _state: Mapping[str, Any] | None = field(default=None, init=False, repr=False)
    _resumed: bool = field(default=False, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None}  # another process has another share

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        batches = self._current()
        if get_worker_info() is not None and not self._resumed:
            batches.position = 0  # of an epoch that was broken off, some batches were made and never received
        self._resumed = False
        pack = dict if get_worker_info() is None else SentBatch
        for rows in batches:
            yield pack(rows.to_dict())
        self.epoch = batches.epoch

    def set_epoch(self, epoch: int) -> None:
        """Begin the next ``for`` at the beginning of an epoch, whose number pins its order."""
        self.epoch, self._state, self._resumed = epoch, None, False
        if self._batches is not None:
            self._batches.epoch, self._batches.position = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """Where this process, rank or worker, is; ``torchdata``'s ``StatefulDataLoader`` asks after each batch."""
        return self._current().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was, in a process that has the same share.

        Raises:
            SpecError: from the next ``for``, where the state is of another store, order or share.
        """
        self.epoch, self._state, self._resumed = int(state["epoch"]), dict(state), True
        if self._batches is not None:
            self._batches = None

    def _empty_to_send(self, rows: int) -> dict[str, Tensor]:
        described = {key: self.dataset.describe(key) for key in self.dataset.columns}
        return empty_to_send({key: (dtype, (rows, *shape)) for key, (dtype, shape) in described.items()})

    def _current(self) -> Batches:
        info = get_worker_info()
        count, number = (1, 0) if info is None else (info.num_workers, info.id)
        if self._share != (count, number):  # a fork begins with its parent's
            self._batches = None
        if self._batches is None:
            self._share = count, number
            self._batches = Batches(self.dataset, self.order.within(number, count))
            self._batches.epoch = self.epoch
            if info is not None:
                self._batches.empty = self._empty_to_send
        if self._state is not None:
            self._batches.load_state_dict(self._state)
            self._state = None
        return self._batches
