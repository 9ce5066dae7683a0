"""An epoch hands out each of its rows once, whatever happens to the store, or to the loop, while it runs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from store.faulty_files import identities, unit_columns, write_units
from tdcache.errors import ContextError, DamagedError
from tdcache.store import ActivationDataset, StoreWriter

KINDS = [False, "block", "rows"]
OPTIONS = {"block": 5, "pool": 10, "seed": 2}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("epochs") / "a.acts"
    write_units(folder)
    return ActivationDataset.open(folder)


@pytest.mark.parametrize("shuffle", KINDS)
@pytest.mark.parametrize("broken_off", [False, True])
def test_an_epoch_keeps_to_the_rows_it_began_with_when_the_store_grows(tmp_path, shuffle, broken_off):
    write_units(tmp_path / "a.acts", [1, 2])
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    promised = identities(dataset.batches(7, shuffle=shuffle, **OPTIONS))
    batches = dataset.batches(7, shuffle=shuffle, **OPTIONS)
    iterator = iter(batches)
    seen = identities([next(iterator)])
    write_units(tmp_path / "a.acts", [0])  # lies before the others
    assert len(dataset.refresh()) == 72
    assert len(batches) == 7
    seen += identities(batches if broken_off else iterator)
    assert seen == promised
    assert len(batches) == 11
    assert sorted(identities(batches)) == identities([dataset[...]])


@pytest.mark.parametrize("shuffle", KINDS)
def test_rows_that_could_not_be_read_come_when_they_can(tmp_path, shuffle):
    write_units(tmp_path / "a.acts")
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    wanted = identities(dataset.batches(7, shuffle=shuffle, **OPTIONS))
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    path = dataset.shards[1].path
    path.rename(path.with_suffix(".away"))
    batches, seen = dataset.batches(7, shuffle=shuffle, **OPTIONS), []
    with pytest.raises(DamagedError, match=r"u00000001.safetensors: the shard is missing"):
        seen.extend(identities([batch]) for batch in batches)
    seen = [each for one in seen for each in one]
    assert batches.position == len(seen) < 72
    path.with_suffix(".away").rename(path)
    assert seen + identities(batches) == wanted


@pytest.mark.parametrize("shuffle", KINDS)
def test_an_iterator_says_so_when_another_one_went_on(dataset, shuffle):
    batches = dataset.batches(10, shuffle=shuffle)
    outer = iter(batches)
    next(outer)
    inner = list(batches)
    assert sum(map(len, inner)) == 62
    with pytest.raises(
        ContextError, match=r"at row 10 of epoch 0, and they are at row 0 of epoch 1: .* one `for` at a"
    ):
        next(outer)
    with pytest.raises(ContextError, match="make a second"):
        list(zip(batches, batches, strict=True))


@pytest.mark.parametrize("shuffle", KINDS)
def test_a_state_from_behind_the_last_batch_goes_on_with_the_next_epoch(dataset, shuffle):
    first = dataset.batches(24, shuffle=shuffle, **OPTIONS)
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = first.state_dict()
    list(iterator)
    second = dataset.batches(24, shuffle=shuffle, **OPTIONS)
    second.load_state_dict(state)
    assert identities(second) == identities(first)
    assert second.epoch == first.epoch == 2


@given(rank=st.integers(0, 30), shuffle=st.sampled_from(KINDS))
def test_a_rank_without_rows_has_empty_epochs_that_end(dataset, rank, shuffle):
    batches = dataset.batches(4, shuffle=shuffle, block=30, rank=rank, world=100)
    assert [len(list(batches)) for _ in range(3)] == [len(batches)] * 3
    assert (batches.epoch, batches.position) == (3, 0)


def test_one_wide_site_bounds_the_memory_of_a_narrow_one(tmp_path):
    spec = {"sites": {key: {"dtype": "float32", "shape": [size]} for key, size in (("wide", 4096), ("narrow", 1))}}
    columns = {key: unit_columns(0)[key] for key in ("seq", "pos", "tok")}
    columns |= {"act/wide": [torch.ones(24, 4096)], "act/narrow": [torch.ones(24, 1)]}
    with StoreWriter(tmp_path / "a.acts", spec) as writer:
        writer.write(0, columns, samples=(0, 4), end=True)
    assert ActivationDataset.open(tmp_path / "a.acts").batches(4).block == 32  # of 16 KiB: half a mebibyte


@pytest.mark.parametrize("how", ["gone", "cut"])
@pytest.mark.parametrize(
    "read", [lambda ds: ds[[1, 30]], lambda ds: ds[:], lambda ds: list(ds.batches(9)), lambda ds: ds.sequence(5)]
)
def test_a_shard_that_is_lost_under_an_open_dataset_is_damage_and_has_its_name(tmp_path, how, read):
    write_units(tmp_path / "a.acts")
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    path = dataset.shards[1].path
    if how == "gone":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 1)
    with pytest.raises(DamagedError, match=r"u00000001.safetensors.*(missing|truncated)") as failure:
        read(dataset)
    assert failure.value.path == path
