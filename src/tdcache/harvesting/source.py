"""Data as numbered batches of numbered samples, from a place one chooses."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tdcache.errors import SelectionError, StoreError
from tdcache.harvesting.row_rule import batch_length
from tdcache.hooks.values import leaves

__all__ = ["Source", "SourceBatch", "Visit", "length_of"]

Visit = Literal["skip", "count", "run"]
"""What happens to a unit: not looked at, its rows counted, or run."""


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """One batch of the data, with its numbers and what is to happen to it."""

    unit: int
    number: int
    first: int
    """The number of its first sample."""
    batch: Any
    visit: Visit
    ends_unit: bool
    ends_data: bool


class Source:
    """The batches of ``data`` in an order that never changes.

    Args:
        data: a ``DataLoader`` that does not shuffle, a dataset of samples (of any library; a tensor, an array or a
            TensorDict is one of its rows; an ``IterableDataset`` yields samples), or any iterable of batches, as a list
            of them. ``DataLoader(data, batch_size=None)`` says of any of these that it holds batches. Loaders and
            map-style datasets are entered at any batch; other iterables from their beginning. NumPy's arrays become
            tensors.
        batch_size: samples per batch, of a dataset.
        collate: makes a batch of samples, of a dataset.

    Raises:
        StoreError: the order of the data is random, or belongs to a distributed sampler.
        SelectionError: from the first batch, items of an iterable that may be samples as well as batches.
    """

    def __init__(self, data: Any, *, batch_size: int = 32, collate: Callable[[list[Any]], Any] | None = None) -> None:
        if isinstance(data, TensorDictBase):
            data, collate = _TensorDictRows(data), collate or torch.stack
        if hasattr(data, "__array__") and not isinstance(data, Tensor):
            data = torch.as_tensor(data)
        if hasattr(data, "with_format") and _has_no_format(data):  # its lists would be collated column by column
            data = data.with_format("torch")
        self._says_batches = isinstance(data, DataLoader)
        if _holds_samples(data):
            self._says_batches = True
            data = DataLoader(data, batch_size=batch_size, collate_fn=collate)
        if isinstance(data, DataLoader):
            _refuse_shuffled(data)
        self._data = data
        self._loader = data if isinstance(data, DataLoader) and _enters_anywhere(data) else None
        self._walked: Iterator[Any] | None = None
        self._first: list[Any] | None = None
        """The first batch, once it was read; it is read once, because it may be another one the next time."""
        self.batches: int | None = length_of(data)
        """How many there are, where that is known."""

    def first(self) -> Any:
        """The first batch; None where there is none."""
        if self._first is None:
            if self._loader is None:
                self._walked = iter(self._data)
                self._first = list(itertools.islice(self._walked, 1))
            else:
                self._first = list(self._restricted([0] if self.batches else []))
            self._first = [_as_tensors(batch) for batch in self._first]
            if self._first and not self._says_batches:
                _refuse_samples(self._first[0])
        return self._first[0] if self._first else None

    def fingerprint(self) -> str:
        """A hash of the first batch: enough to notice other data."""
        digest = hashlib.sha256()
        for text in _texts(self.first()):
            digest.update(f"{len(text)} {text};".encode())
        for steps, tensor in leaves(self.first()):
            digest.update(f"{steps} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(_some_bytes(tensor))
        return digest.hexdigest()

    def walk(self, per_unit: int, visit: Callable[[int], Visit]) -> Iterator[SourceBatch]:
        """The batches of the units that are not skipped, in order.

        Args:
            per_unit: batches per unit.
            visit: what happens to a unit; asked once for each, in order.
        """
        if self._loader is not None:
            yield from self._jump(per_unit, visit)
        else:
            yield from self._go_through(per_unit, visit)

    def _jump(self, per_unit: int, visit: Callable[[int], Visit]) -> Iterator[SourceBatch]:
        count, size = self.batches or 0, self._loader.batch_size if self._loader is not None else 0
        visits = {unit: visit(unit) for unit in range(-(-count // per_unit))}
        numbers = [number for number in range(count) if visits[number // per_unit] != "skip"]
        read = self._first if self._first and numbers[:1] == [0] else []
        self._first = None
        batches = itertools.chain(read, self._restricted(numbers[len(read) :]))
        for number, batch in zip(numbers, batches, strict=True):
            unit, last = number // per_unit, number == count - 1
            ends = last or number % per_unit == per_unit - 1
            yield SourceBatch(unit, number, number * (size or 1), _as_tensors(batch), visits[unit], ends, last)

    def _restricted(self, numbers: list[int]) -> Iterable[Any]:
        """The batches with these numbers, loaded as the user's own loader would."""
        loader = self._loader
        if loader is None or loader.batch_size is None:
            raise StoreError("only a loader with batches of one size can be entered anywhere")
        workers = min(loader.num_workers, len(numbers))
        if len(numbers) == 1 and loader.worker_init_fn is None:
            workers = 0  # a process for one batch would cost more than the batch
        beside: dict[str, Any] = {}
        if workers:
            beside = {
                "multiprocessing_context": loader.multiprocessing_context,
                "prefetch_factor": loader.prefetch_factor,
                "timeout": loader.timeout,
            }
        return DataLoader(
            loader.dataset,
            batch_sampler=_Indices(numbers, loader.batch_size, len(loader.dataset)),  # type: ignore[arg-type]
            collate_fn=loader.collate_fn,
            num_workers=workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            **beside,
        )

    def _go_through(self, per_unit: int, visit: Callable[[int], Visit]) -> Iterator[SourceBatch]:
        self.first()
        walked = itertools.chain(self._first or (), () if self._walked is None else self._walked)
        self._first = None
        first, current, kind = 0, -1, "skip"
        for number, (item, last) in enumerate(_with_last(walked)):
            unit = number // per_unit
            if unit != current:
                current, kind = unit, visit(unit)
            batch = _as_tensors(item)
            if kind != "skip":
                ends = last or number % per_unit == per_unit - 1
                yield SourceBatch(unit, number, first, batch, kind, ends, last)  # type: ignore[arg-type]
            first += batch_length(batch)


@dataclass(frozen=True, slots=True)
class _Indices:
    """The samples of some batches, worked out one batch at a time."""

    numbers: Sequence[int]
    size: int
    length: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        for number in self.numbers:
            yield list(range(number * self.size, min((number + 1) * self.size, self.length)))


class _TensorDictRows(Dataset[Any]):
    """The rows of a TensorDict, one by one: what its own ``__getitems__`` gives is no list of samples."""

    def __init__(self, rows: TensorDictBase) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        return self.rows[number]


def _holds_samples(data: Any) -> bool:
    """Whether data are samples, and not batches."""
    if isinstance(data, Dataset):
        return True
    numbered = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    return numbered and not isinstance(data, Sequence | Mapping | Iterator)


def _has_no_format(data: Any) -> bool:
    """Whether a dataset of Hugging Face gives Python's own lists and numbers."""
    told: Any = getattr(data, "format", None)
    if isinstance(data, IterableDataset):  # those have no ``format``
        return getattr(data, "_formatting", data) is None
    return isinstance(told, Mapping) and told.get("type") is None


def _as_tensors(batch: Any) -> Any:
    """The same batch with tensors for NumPy's arrays."""
    if isinstance(batch, Tensor | TensorDictBase | str):
        return batch
    if isinstance(batch, Mapping):
        return {name: _as_tensors(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [_as_tensors(each) for each in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    is_numbers = hasattr(batch, "__array__") and getattr(getattr(batch, "dtype", None), "kind", "O") in "biufc"
    return torch.as_tensor(batch) if is_numbers else batch


def _texts(value: Any) -> Iterator[str]:
    """The strings of a batch, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | tuple | list) and not isinstance(value, TensorDictBase):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(each)


def _refuse_samples(item: Any) -> None:
    """Refuse an item of an iterable that is as likely one sample as a batch.

    Raises:
        SelectionError: it names both readings, and how to say which is meant.
    """
    tensors = [tensor for _, tensor in leaves(item)]
    most = max((tensor.dim() for tensor in tensors), default=2)
    if most > 1:
        return
    shape = next(tuple(tensor.shape) for tensor in tensors if tensor.dim() == most)
    size = shape[0] if shape else 1
    raise SelectionError(
        f"the first item of the data is a tensor of shape {shape}, which is one sample of {size} features or a batch "
        f"of {size} samples of one number each; for samples give DataLoader(data, batch_size=32) or torch.stack(data), "
        "for batches DataLoader(data, batch_size=None)",
        selector=shape,
    )


def _with_last(items: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """Each item, and whether it is the last one."""
    iterator = iter(items)
    for held in iterator:
        item = held
        for following in iterator:
            yield item, False
            item = following
        yield item, True


def length_of(data: Any) -> int | None:
    """How many items there are, where that is known."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a loader over an iterable dataset has the method, and raises in it
        return None


def _enters_anywhere(loader: DataLoader[Any]) -> bool:
    return (
        not isinstance(loader.dataset, IterableDataset)
        and loader.batch_size is not None
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) is SequentialSampler
    )


def _refuse_shuffled(loader: DataLoader[Any]) -> None:
    samplers = (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    drawn = [type(each).__name__ for each in samplers if isinstance(each, _RANDOM)]
    if drawn:
        raise StoreError(
            f"the loader draws its samples with {drawn[0]}, so that they have no fixed number and a harvest could not "
            "be resumed; give it shuffle=False: ActivationDataset.batches(shuffle='block') mixes rows when they are "
            "read"
        )
    if any(isinstance(each, DistributedSampler) for each in samplers):
        raise StoreError(
            "the loader has a DistributedSampler, which gives every rank other samples; leave it out: harvest deals "
            "units to the ranks itself"
        )


_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def _some_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat[: 1 << 20].numpy().tobytes()
