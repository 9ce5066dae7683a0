"""A store in a stock loader: every row once over ranks and workers, and where an epoch was broken off it goes on."""

from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader, get_worker_info

from store.faulty_files import identities, write_units
from tdcache.errors import SpecError
from tdcache.store import ActivationDataset, StoreWriter

OPTIONS = {"shuffle": "block", "seed": 2, "block": 5, "pool": 10}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("iterable") / "a.acts"
    write_units(folder)
    return ActivationDataset.open(folder)


def all_of(dataset):
    return sorted(identities([dataset[...]]))


@pytest.mark.parametrize("shuffle", [False, "block", "rows"])
def test_without_workers_it_is_what_batches_gives(dataset, shuffle):
    options = {**OPTIONS, "shuffle": shuffle}
    loader = DataLoader(dataset.iterable(7, **options), batch_size=None)
    batches = dataset.batches(7, **options)
    for _ in range(2):  # each epoch has another order
        for found, expected in zip(loader, batches, strict=True):
            assert type(found) is dict
            assert found.keys() == set(expected.keys())
            assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_every_row_comes_once_over_all_ranks_and_workers(dataset, workers, world):
    seen = []
    for rank in range(world):
        iterable = dataset.iterable(7, rank=rank, world=world, **OPTIONS)
        seen += identities(DataLoader(iterable, batch_size=None, num_workers=workers))
    assert sorted(seen) == all_of(dataset)


def test_the_columns_of_a_worker_are_those_of_the_store(dataset):
    loader = DataLoader(dataset.iterable(72), batch_size=None, num_workers=1)
    (batch,) = loader
    assert all(torch.equal(batch[key], dataset[...][key]) for key in dataset.columns)
    assert {key: batch[key].dtype for key in batch} == {key: dataset[key].dtype for key in dataset.columns}


def test_the_epoch_is_said_where_workers_do_not_persist(dataset):
    iterable = dataset.iterable(7, **OPTIONS)
    loader = DataLoader(iterable, batch_size=None, num_workers=1)
    first, again = identities(loader), identities(loader)
    iterable.set_epoch(1)
    assert first == again != identities(loader)
    plain = dataset.iterable(7, **OPTIONS)
    plain.set_epoch(1)
    assert identities(plain) == identities(loader)


def test_workers_share_the_rows_also_where_the_parent_has_read_some_before(dataset):
    iterable = dataset.iterable(7, **OPTIONS)
    next(iter(iterable))
    iterable.set_epoch(0)
    assert sorted(identities(DataLoader(iterable, batch_size=None, num_workers=2))) == all_of(dataset)
    assert sorted(identities(iterable)) == all_of(dataset)


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_an_epoch_that_was_broken_off_goes_on(dataset, stop):
    whole = identities(dataset.iterable(7, **OPTIONS))
    first, second = dataset.iterable(7, **OPTIONS), dataset.iterable(7, **OPTIONS)
    seen = identities(islice(first, stop))
    second.load_state_dict(first.state_dict())
    assert seen + identities(second) == whole
    assert second.epoch == 1


class _ResumedInAWorker(torch.utils.data.IterableDataset):
    """As ``StatefulDataLoader`` has it: each worker saves and loads the state of its own share."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        first, second = (self.dataset.iterable(7, **OPTIONS) for _ in range(2))
        yield from islice(first, 2)
        state = first.state_dict()
        assert (state["rank"], state["world"]) == (get_worker_info().id, 2)
        second.load_state_dict(state)
        yield from second


def test_the_state_of_a_worker_is_that_of_its_share(dataset):
    loader = DataLoader(_ResumedInAWorker(dataset), batch_size=None, num_workers=2)
    assert sorted(identities(loader)) == all_of(dataset)


def test_a_state_of_another_share_is_refused(dataset):
    iterable = dataset.iterable(7, **OPTIONS)
    iterable.load_state_dict(dataset.iterable(7, rank=1, world=2, **OPTIONS).state_dict())
    with pytest.raises(SpecError, match="the state is of other batches: rank 1 there, 0 here, world 2 there, 1 here"):
        next(iter(iterable))


def test_what_cannot_be_is_refused_before_there_are_workers(dataset):
    with pytest.raises(ValueError, match="shuffle is False, 'block' or 'rows', got 'all'"):
        dataset.iterable(7, shuffle="all")


def neighbours(dataset, **options):
    """How often the next row is one of the same shard."""
    shards = torch.cat([batch["seq"] for batch in dataset.batches(100, **options)]) // 1000
    return float((shards[1:] == shards[:-1]).float().mean())


def test_a_larger_pool_mixes_better(tmp_path):
    with StoreWriter(tmp_path / "a.acts", {"sites": {}}) as writer:  # 20 shards of 1000 rows
        for unit in range(20):
            first = unit * 1000
            columns = {"seq": [torch.arange(first, first + 1000)], "pos": [torch.zeros(1000).int()]}
            writer.write(unit, columns, samples=(first, first + 1000), end=unit == 19)
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    found = {pool: neighbours(dataset, shuffle="block", block=100, pool=pool * 100) for pool in (1, 4, 16, 64)}
    # A pool of p blocks: the same block 1 time in p, and another one of its shard as often as by chance (9 of 199).
    for pool, share in found.items():
        assert share == pytest.approx(1 / pool + (1 - 1 / pool) * 9 / 199, abs=0.05)
    assert neighbours(dataset, shuffle="rows") == pytest.approx(1 / 20, abs=0.01)


def test_a_loop_that_was_left_loses_no_row_of_the_next_one_in_workers_that_persist(dataset):
    loader = DataLoader(dataset.iterable(7, **OPTIONS), batch_size=None, num_workers=2, persistent_workers=True)
    assert len(list(islice(loader, 2))) == 2
    for _ in range(2):
        assert sorted(identities(loader)) == all_of(dataset)
