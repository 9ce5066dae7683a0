"""Batches between the processes of a loader: whole, as plain dicts, through memory that is used again."""

import copy
import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tdcache.errors import StoreError
from tdcache.store import transport
from tdcache.store.transport import SentBatch

needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="anonymous memory with a name is Linux's")


def columns(seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(6, 4, generator=generator)
    return {
        "a": values.bfloat16(),
        "b": values.to(torch.float8_e4m3fn),
        "c": values[:, 0] > 0,
        "seq": torch.arange(6) + seed,
        "none": torch.empty(0, 3),
    }


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[key].dtype == expected[key].dtype and torch.equal(found[key].float(), expected[key].float())
        for key in found
    )


class Sent(IterableDataset):
    """Batches of one worker, and how many pieces of memory it has by then."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        for number in range(self.count):
            pieces = 0 if get_worker_info() is None else len(transport._memory().pieces)
            yield SentBatch(columns(number) | {"pieces": torch.tensor([pieces])})


@needs_memfd
def test_a_worker_sends_whole_batches_through_memory_that_it_uses_again():
    pieces = []
    for number, batch in enumerate(DataLoader(Sent(40), batch_size=None, num_workers=1, prefetch_factor=3)):
        pieces.append(int(batch.pop("pieces")))
        assert type(batch) is dict
        assert same(batch, columns(number))
    assert 1 <= max(pieces) <= 4  # three under way, and the one that is being written


@needs_memfd
def test_what_was_received_is_memory_of_its_own():
    first = pickle.loads(pickle.dumps(SentBatch(columns(0))))
    second = pickle.loads(pickle.dumps(SentBatch(columns(1))))
    assert len(transport._memory().pieces) == 1
    assert same(first, columns(0))
    assert same(second, columns(1))


@needs_memfd
def test_a_batch_that_nobody_received_keeps_its_memory():
    one, other = pickle.dumps(SentBatch(columns(0))), pickle.dumps(SentBatch(columns(1)))
    assert same(pickle.loads(other), columns(1))
    assert same(pickle.loads(one), columns(0))


def test_a_users_collate_sees_a_dict_of_tensors():
    loader = DataLoader(Sent(2), batch_size=None, num_workers=1, collate_fn=lambda batch: batch["seq"] * 2)
    assert [batch.tolist() for batch in loader] == [[2 * each for each in range(n, n + 6)] for n in range(2)]
    assert same(copy.copy(SentBatch(columns())), columns())
    assert type(copy.copy(SentBatch(columns()))) is SentBatch


@needs_memfd
def test_a_worker_that_is_gone_is_said_to_be():
    rebuild, (name, layout) = SentBatch(columns()).__reduce__()
    piece = int(name.rpartition("/")[2])
    transport._memory().pieces.remove(piece)
    os.close(piece)
    with pytest.raises(StoreError, match="a worker of the loader ended before its batch was received"):
        rebuild(name, layout)


def test_without_such_memory_torch_sends_the_tensors(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert SentBatch(columns()).__reduce__()[0] is dict
    for number, batch in enumerate(DataLoader(Sent(2), batch_size=None, num_workers=1)):
        del batch["pieces"]
        assert same(batch, columns(number))


def test_other_values_than_plain_tensors_are_sent_as_torch_sends_them():
    assert SentBatch(a=torch.nn.Parameter(torch.ones(2))).__reduce__()[0] is dict
