"""Some rows of a store: by predicate, by a split of the samples, and everything that can be done with them."""

import pickle

import pytest
import torch

from store.faulty_files import SPEC, unit_columns, write_units
from tdcache.errors import SpecError, StoreError
from tdcache.store import ActivationDataset, StoreWriter, own_column


@pytest.fixture
def dataset(tmp_path):
    write_units(tmp_path / "a.acts")
    return ActivationDataset.open(tmp_path / "a.acts")


def chosen_by_hand(dataset, mask):
    return dataset[...][mask]


def assert_equal(one, other):
    assert sorted(one.keys()) == sorted(other.keys())
    assert all(torch.equal(one[key], other[key]) for key in one.keys())  # noqa: SIM118 - not its rows


def test_rows_that_a_predicate_wants_are_a_dataset_of_their_own(dataset):
    mask = dataset["pos"][...] % 3 == 1
    some = dataset.where(lambda rows: rows["pos"] % 3 == 1)
    wanted = chosen_by_hand(dataset, mask)
    assert len(some) == int(mask.sum()) == 24
    for index in (..., slice(3, 9), slice(None, None, 2), [5, -1], torch.tensor([[0, 2]]), 7):
        assert_equal(some[index], wanted[index])
    assert torch.equal(some["layers.1"][2:4], wanted["layers.1"][2:4])
    assert "chosen rows of complete" in repr(some)
    assert_equal(some.where(lambda rows: rows["seq"] > 5)[...], wanted[wanted["seq"] > 5])
    assert_equal(some.sequence(4), dataset.sequence(4)[torch.tensor([1, 4])])
    assert_equal(pickle.loads(pickle.dumps(some))[...], wanted)


@pytest.mark.parametrize("shuffle", [False, "block", "rows"])
def test_epochs_over_chosen_rows_have_each_of_them_once(dataset, shuffle):
    some = dataset.where(lambda rows: rows["layers.0"][:, 0] > 0, keys=["layers.0"])
    wanted = some[...]
    shares = [some.batches(5, shuffle=shuffle, rank=rank, world=2, block=4) for rank in range(2)]
    found = torch.cat([batch for share in shares for batch in share])
    order = (found["seq"] * 100 + found["pos"]).argsort()
    assert_equal(found[order], wanted)
    loader = torch.utils.data.DataLoader(some.iterable(5, shuffle=shuffle), batch_size=None)
    assert sum(len(batch["seq"]) for batch in loader) == len(some)


def test_chosen_rows_have_statistics_of_their_own(dataset):
    some = dataset.where(lambda rows: rows["seq"] < 2)
    mean = some[...]["layers.1"].double().mean(0)
    torch.testing.assert_close(some.statistics["layers.1"].mean, mean, rtol=1e-6, atol=1e-6)
    train, valid = dataset.split(0.5, 0.5, seed=1)
    statistics = train.statistics
    scaled = valid.normalised("std", statistics=statistics)
    wanted = (valid[...]["layers.1"] - statistics["layers.1"].mean.float()) * (1 / statistics["layers.1"].std).float()
    assert torch.equal(scaled[...]["layers.1"], wanted)


def test_chosen_rows_are_copied_like_a_store(dataset, tmp_path):
    some = dataset.where(lambda rows: rows["pos"] == 0)
    packed = some.repack(tmp_path / "b.acts")
    assert_equal(packed[...], some[...])
    with pytest.raises(SpecError, match="was made otherwise"):
        dataset.where(lambda rows: rows["pos"] == 1).repack(tmp_path / "b.acts")
    some.export(tmp_path / "b.pt")
    assert torch.equal(torch.load(tmp_path / "b.pt", weights_only=True)["layers.1"], some[...]["layers.1"])
    with pytest.raises(StoreError, match=r"a choice of the rows of .* cannot be merged; repack\(\) them first"):
        dataset.merge(some, path=tmp_path / "c.acts")
    with pytest.raises(SpecError, match="rows that were chosen stay the same: refresh the store itself"):
        some.refresh()


def test_a_split_keeps_samples_whole_and_is_pinned_by_its_seed(dataset):
    parts = dataset.split(0.5, 0.25, 0.25, seed=3)
    samples = [set(part["seq"][...].tolist()) for part in parts]
    assert sum(map(len, parts)) == len(dataset)
    assert not (samples[0] & samples[1])
    assert not (samples[0] & samples[2])
    assert not (samples[1] & samples[2])
    assert set.union(*samples) == set(range(12))
    again = dataset.split(0.5, 0.25, 0.25, seed=3)
    assert [set(part["seq"][...].tolist()) for part in again] == samples
    assert [set(part["seq"][...].tolist()) for part in dataset.split(0.5, 0.25, 0.25, seed=4)] != samples


def test_a_sample_stays_in_its_share_when_the_store_grows(tmp_path):
    write_units(tmp_path / "a.acts", [0])
    early = [set(part["seq"][...].tolist()) for part in ActivationDataset.open(tmp_path / "a.acts").split(0.6, 0.4)]
    write_units(tmp_path / "a.acts")
    late = [set(part["seq"][...].tolist()) for part in ActivationDataset.open(tmp_path / "a.acts").split(0.6, 0.4)]
    assert all(one <= other for one, other in zip(early, late, strict=True))


def test_shares_are_as_large_as_asked_for(tmp_path):
    spec = {"sites": {}}
    rows = {"seq": [torch.arange(20_000)], "pos": [torch.zeros(20_000).int()]}
    with StoreWriter(tmp_path / "a.acts", spec) as writer:
        writer.write(0, rows, samples=(0, 20_000), end=True)
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    for seed in range(5):
        train, valid = dataset.split(0.9, 0.1, seed=seed)
        assert abs(len(valid) - 2000) < 5 * 42  # five standard deviations of a binomial draw
        assert len(train) + len(valid) == 20_000


def test_columns_of_the_user_are_read_chosen_and_split_by(tmp_path):
    spec = {**SPEC, "columns": {"doc": {"dtype": "int64", "shape": []}, "span": {"dtype": "int32", "shape": [2]}}}
    docs = torch.arange(24) // 12
    with StoreWriter(tmp_path / "a.acts", spec) as writer:
        for unit in range(3):
            own = {own_column("doc"): [docs + 2 * unit], own_column("span"): [torch.ones(24, 2).int()]}
            writer.write(unit, unit_columns(unit) | own, samples=(4 * unit, 4 * unit + 4), end=unit == 2)
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    assert dataset.row_keys == ("seq", "pos", "tok", "doc", "span")
    assert dataset[30]["doc"] == 2
    assert dataset["span"].shape == (72, 2)
    assert set(dataset.where(lambda rows: rows["doc"] == 3)["seq"][...].tolist()) == {6, 7}
    one, other = dataset.split(0.5, 0.5, by="doc")
    assert not set(one["doc"][...].tolist()) & set(other["doc"][...].tolist())
    packed = dataset.repack(tmp_path / "b.acts", shuffle=True)
    assert sorted(packed["doc"][...].tolist()) == sorted(dataset["doc"][...].tolist())
    dataset.verify()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda ds: ds.split(0.5, 0.6), r"the parts of a split are positive and add up to 1, as in split\(0.9, 0.1\)"),
        (lambda ds: ds.split(), "the parts of a split are positive"),
        (lambda ds: ds.split(1.5, -0.5), "the parts of a split are positive"),
        (lambda ds: ds.split(0.5, 0.5, by="layers.0"), "by a column of whole numbers, one per row; 'layers.0' holds"),
        (lambda ds: ds.where(lambda rows: rows["pos"]), r"one boolean per row, \(72,\) of torch.bool; got \(72,\) of"),
        (lambda ds: ds.where(lambda rows: True), r"one boolean per row, \(72,\) of torch.bool; got \(\) of torch.bool"),
    ],
)
def test_what_is_no_choice_is_refused(dataset, call, text):
    with pytest.raises(ValueError, match=text):
        call(dataset)
