"""Batches between the processes of a loader: whole, as plain dicts, through memory that is used again."""

import copy
import os
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tdcache.errors import StoreError
from tdcache.store import transport
from tdcache.store.transport import SentBatch, empty_to_send

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


@pytest.fixture
def through_memory(monkeypatch):
    """Have columns of every size sent through shared memory."""
    monkeypatch.setattr(transport, "_SMALL", 1)
    monkeypatch.setattr(transport, "_own", [])


def passed(batch):
    return pickle.loads(pickle.dumps(SentBatch(batch)))


@needs_memfd
def test_a_worker_sends_whole_batches_through_memory_that_it_uses_again(through_memory):
    pieces = []
    for number, batch in enumerate(DataLoader(Sent(40), batch_size=None, num_workers=1, prefetch_factor=3)):
        pieces.append(int(batch.pop("pieces")))
        assert type(batch) is dict
        assert same(batch, columns(number))
    assert 1 <= max(pieces) <= 5  # three under way, the one that is kept, and the one that is being written


@needs_memfd
def test_what_is_kept_stays_and_its_memory_is_used_again_once_the_last_tensor_in_it_is_dropped(through_memory):
    first, second = passed(columns(0)), passed(columns(1))
    assert same(first, columns(0))
    assert same(second, columns(1))
    kept = first["a"][2:3]
    del first
    assert same(passed(columns(2)), columns(2))
    assert len(transport._memory().pieces) == 3
    assert torch.equal(kept, columns(0)["a"][2:3])
    del kept
    assert same(passed(columns(3)), columns(3))
    assert len(transport._memory().pieces) == 3


@needs_memfd
def test_rows_that_are_written_where_they_are_sent_from_are_not_copied(through_memory):
    expected = columns(4)
    found = empty_to_send({key: (each.dtype, tuple(each.shape)) for key, each in expected.items()})
    for key, each in expected.items():
        found[key].copy_(each)
    sent = pickle.dumps(SentBatch(found))
    assert len(transport._memory().pieces) == 1
    again = pickle.dumps(SentBatch(found))  # to another receiver, who drops it at another time
    assert len(transport._memory().pieces) == 2
    del found
    assert same(pickle.loads(sent), expected)
    assert same(pickle.loads(again), expected)


@needs_memfd
def test_memory_that_was_never_sent_is_free_when_its_tensors_are_dropped(through_memory):
    layout = {"a": (torch.float32, (6, 4))}
    for _ in range(3):
        empty_to_send(layout)
    assert len(transport._memory().pieces) == 1


@needs_memfd
def test_columns_that_overlap_or_have_other_strides_arrive_as_they_are(through_memory):
    whole = empty_to_send({"a": (torch.float32, (6, 4))})["a"].copy_(torch.arange(24.0).reshape(6, 4))
    batch = {"a": whole, "again": whole, "turned": whole.T, "some": whole[:, :2]}
    assert same(passed(batch), batch)


@needs_memfd
def test_receivers_that_keep_all_batches_get_copies_after_the_first(through_memory):
    kept = [passed(columns(number)) for number in range(40)]
    assert all(same(each, columns(number)) for number, each in enumerate(kept))
    assert len(transport._memory().pieces) <= transport._MOST + 1


@needs_memfd
def test_small_columns_are_sent_in_the_message_so_that_labels_do_not_keep_rows(monkeypatch):
    monkeypatch.setattr(transport, "_own", [])
    found = passed({"rows": torch.ones(1 << 14), "seq": torch.arange(6), "none": torch.empty(0, 3)})
    (piece,) = transport._memory().pieces.values()
    seq = found.pop("seq")
    assert piece.memory[0] == 1
    del found
    assert piece.memory[0] == 0
    assert seq.tolist() == list(range(6))


@needs_memfd
def test_a_fork_that_drops_a_batch_does_not_give_its_memory_back(through_memory):
    memory = bytearray(b"\1")
    transport._let_go(memory, os.getpid() + 1)
    assert memory == b"\1"
    transport._let_go(memory, os.getpid())
    assert memory == b"\0"


@needs_memfd
def test_a_batch_that_nobody_received_keeps_its_memory(through_memory):
    one, other = pickle.dumps(SentBatch(columns(0))), pickle.dumps(SentBatch(columns(1)))
    assert same(pickle.loads(other), columns(1))
    assert same(pickle.loads(one), columns(0))


def test_a_users_collate_sees_a_dict_of_tensors():
    loader = DataLoader(Sent(2), batch_size=None, num_workers=1, collate_fn=lambda batch: batch["seq"] * 2)
    assert [batch.tolist() for batch in loader] == [[2 * each for each in range(n, n + 6)] for n in range(2)]
    assert same(copy.copy(SentBatch(columns())), columns())
    assert type(copy.copy(SentBatch(columns()))) is SentBatch


@needs_memfd
def test_a_worker_that_is_gone_is_said_to_be(through_memory):
    sent = pickle.dumps(SentBatch(columns()))
    for piece in transport._memory().pieces.values():
        os.close(piece.descriptor)
    with pytest.raises(StoreError, match="a worker of the loader ended before its batch was received"):
        pickle.loads(sent)


def test_without_such_memory_torch_sends_the_tensors(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert SentBatch(columns()).__reduce__()[0] is dict
    for number, batch in enumerate(DataLoader(Sent(2), batch_size=None, num_workers=1)):
        del batch["pieces"]
        assert same(batch, columns(number))


def test_other_values_than_plain_tensors_are_sent_as_torch_sends_them():
    assert SentBatch(a=torch.nn.Parameter(torch.ones(2))).__reduce__()[0] is dict
