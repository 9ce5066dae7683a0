"""Statistics beside the rows: what they are, that they are merged, and that reading can normalise by them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from store.faulty_files import SPEC, contents, unit_columns, write_units
from tdcache.errors import SpecError, StoreError
from tdcache.store import ActivationDataset, StoreWriter, site_column
from tdcache.store.dtypes import count_lost
from tdcache.store.layout import StorePaths
from tdcache.store.statistics import SiteStatistics

INF = math.inf


def assert_statistics_of(found, rows):
    rows = rows.double()
    assert found.rows == len(rows)
    # float32 sums of at most 2^15 values each
    torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.variance, rows.var(0, unbiased=False), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.std, rows.std(0, unbiased=False), rtol=1e-4, atol=1e-6)
    assert found.norm_scale == pytest.approx(math.sqrt(rows[0].numel() / float(rows.square().sum() / len(rows))), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_statistics_are_those_of_the_rows(dtype):
    rows = (torch.randn(3000, 3, 5, generator=torch.Generator().manual_seed(0)) * 2 + 3).to(dtype)
    assert_statistics_of(SiteStatistics.of([rows]), rows.double())


def test_a_large_mean_costs_no_digits_of_the_variance():
    rows = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)) + 10_000
    found = SiteStatistics.of([rows])
    torch.testing.assert_close(found.variance, rows.double().var(0, unbiased=False), rtol=1e-5, atol=0)


def test_squares_beyond_float32_are_taken_in_float64():
    rows = torch.tensor([[1e30], [3e30]])
    assert SiteStatistics.of([rows]).variance.item() == pytest.approx(1e60, 1e-6)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 2000))
def test_where_pieces_begin_changes_no_bit_and_merging_only_rounding(lengths, width):
    rows = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(0))
    pieces = rows.split(lengths)
    whole = SiteStatistics.of([rows])
    assert torch.equal(SiteStatistics.of(pieces).packed(), whole.packed())
    merged = SiteStatistics.of(pieces[:1])
    for piece in pieces[1:]:
        merged = merged.merged(SiteStatistics.of([piece]))
    assert merged.rows == whole.rows
    torch.testing.assert_close(merged.packed(), whole.packed(), rtol=1e-4, atol=1e-5)  # sums of float32, merged


def test_threads_change_no_bit():
    rows, threads = torch.randn(4000, 100), torch.get_num_threads()
    found = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(SiteStatistics.of([rows]).packed())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_a_feature_that_is_infinite_somewhere_has_no_statistics_and_the_others_have():
    rows = torch.tensor([[1.0, INF], [3.0, 1.0]])
    found = SiteStatistics.of([rows])
    assert found.mean[0] == 2
    assert found.variance[0] == 1
    assert bool(found.variance[1].isnan())


@pytest.mark.parametrize(
    ("dtype", "over", "under"),
    [
        (torch.float8_e4m3fn, 4, 1),
        (torch.float8_e5m2, 1, 1),
        (torch.float16, 1, 1),
        (torch.bfloat16, 0, 0),
        (torch.float64, 0, 0),
    ],
)
def test_fault_infinities_that_become_numbers_and_numbers_that_become_zero_are_counted(dtype, over, under):
    rows = torch.tensor([INF, -INF, math.nan, 500.0, 1e5, 1e-9, 1.0, 0.0])
    found = count_lost(rows, dtype)
    assert ((0, 0) if found is None else tuple(map(int, found))) == (over, under)


def test_a_store_has_the_statistics_of_all_its_rows_in_its_index(tmp_path):
    write_units(tmp_path / "a.acts")
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    for key, found in dataset.statistics.items():
        assert_statistics_of(found, dataset[key][...])
    contract, shards = dataset._contract, dataset.shards
    assert StorePaths(dataset.path).read_statistics(contract, shards).keys() == dataset.statistics.keys()
    from_index = {key: each.packed() for key, each in dataset.statistics.items()}
    (dataset.path / "index.json").unlink()
    assert StorePaths(dataset.path).read_statistics(contract, shards) is None
    for key, found in ActivationDataset.open(dataset.path).statistics.items():  # from the shards
        assert torch.equal(found.packed(), from_index[key])


def test_statistics_grow_with_the_store_and_an_index_of_fewer_shards_is_not_believed(tmp_path):
    folder = tmp_path / "a.acts"
    write_units(folder, [0])
    early = (folder / "index.json").read_bytes()
    write_units(folder)
    (folder / "index.json").write_bytes(early)
    assert ActivationDataset.open(folder).statistics["layers.0"].rows == 72
    write_units(folder)
    whole = contents(folder)
    write_units(tmp_path / "b.acts")
    assert contents(tmp_path / "b.acts") == whole


def test_losses_are_counted_per_shard_and_in_all(tmp_path):
    with StoreWriter(tmp_path / "a.acts", SPEC) as writer:
        for unit in range(2):
            lost = {"overflow": {"layers.0": unit + 1}, "underflow": {"layers.1": 5}}
            writer.write(unit, unit_columns(unit), samples=(4 * unit, 4 * unit + 4), end=unit == 1, **lost)
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    found = {key: (each.overflow, each.underflow) for key, each in dataset.statistics.items()}
    assert found == {"layers.0": (3, 0), "layers.1": (0, 10)}
    merged = dataset.merge(dataset, path=tmp_path / "b.acts")
    assert merged.statistics["layers.1"].underflow == 20


def test_sites_of_whole_numbers_have_none(tmp_path):
    spec = {"sites": {"ids": {"dtype": "int32", "shape": []}}}
    rows = {"seq": [torch.arange(3)], "pos": [torch.zeros(3).int()], site_column("ids"): [torch.ones(3).int()]}
    with StoreWriter(tmp_path / "a.acts", spec) as writer:
        writer.write(0, rows, samples=(0, 3), end=True)
    assert ActivationDataset.open(tmp_path / "a.acts").statistics == {}


@pytest.mark.parametrize("shuffle", [False, "block", "rows"])
def test_normalised_rows_have_mean_zero_and_variance_one_however_they_are_read(tmp_path, shuffle):
    write_units(tmp_path / "a.acts")
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    normal = dataset.normalised("std")
    for rows in (normal[...], torch.cat(list(normal.batches(10, shuffle=shuffle)))):
        for key in dataset.keys:
            values = rows[key]
            assert (values.dtype, normal.describe(key)[0]) == (torch.float32, torch.float32)
            # means and variances of some seventy float32 values
            torch.testing.assert_close(values.mean(0), torch.zeros_like(values[0]), rtol=0, atol=1e-5)
            torch.testing.assert_close(values.var(0, unbiased=False), torch.ones_like(values[0]), rtol=1e-4, atol=0)
    assert torch.equal(normal[7]["layers.1"], normal[...]["layers.1"][7])
    assert torch.equal(normal["layers.1"][[3, 1]], normal[...]["layers.1"][[3, 1]])


def test_normalised_by_norm_keeps_directions(tmp_path):
    write_units(tmp_path / "a.acts")
    dataset = ActivationDataset.open(tmp_path / "a.acts").select("layers.0")
    rows = dataset.normalised()[...]["layers.0"]
    assert float(rows.square().sum(1).mean()) == pytest.approx(8, 1e-5)
    ratio = rows / dataset[...]["layers.0"].float()
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio[0, 0].item()), rtol=1e-6, atol=0)


def test_normalised_rows_can_be_repacked_and_are_not_taken_for_the_others(tmp_path):
    write_units(tmp_path / "a.acts")
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    normal = dataset.normalised("std")
    packed = normal.repack(tmp_path / "b.acts")
    assert torch.equal(packed[...]["layers.0"], normal[...]["layers.0"])
    with pytest.raises(SpecError, match="was made otherwise"):
        dataset.repack(tmp_path / "b.acts")
    assert normal.batches(4).state_dict() != dataset.batches(4).state_dict()
    with pytest.raises(StoreError, match=r"or scaled ones, cannot be merged; repack\(\) them first"):
        normal.merge(dataset, path=tmp_path / "c.acts")


def test_rows_without_finite_statistics_are_not_normalised(tmp_path):
    spec = {"sites": {"a": {"dtype": "float32", "shape": [2]}}}
    rows = {
        "seq": [torch.arange(2)],
        "pos": [torch.zeros(2).int()],
        site_column("a"): [torch.tensor([[INF, 1], [0, 1]])],
    }
    with StoreWriter(tmp_path / "a.acts", spec) as writer:
        writer.write(0, rows, samples=(0, 2), end=True)
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    for by in ("std", "norm"):
        with pytest.raises(StoreError, match=r"site 'a' has no finite statistics to normalise by: .* give statistics="):
            dataset.normalised(by)
    given_ones = SiteStatistics(2, torch.zeros(2).double(), torch.tensor([2.0, 8.0]).double())
    found = dataset.normalised("std", statistics={"a": given_ones})
    assert found[1]["a"].tolist() == [0, 0.5]
    with pytest.raises(ValueError, match="rows are normalised by 'std' or by 'norm', got 'max'"):
        dataset.normalised("max")
