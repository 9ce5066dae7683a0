"""Reading rows: any index, single columns, sequences, loaders, batches that see every row once, other formats."""

import pickle
import sys
import threading
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.utils.data import DataLoader

from stable_ids import stable_id
from store.faulty_files import contents, identities, unit_columns, write_units
from tdcache.errors import CaptureError, DamagedError, SpecError, StoreError
from tdcache.store import ActivationDataset

ROWS = 72


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("read") / "a.acts"
    write_units(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return ActivationDataset.open(folder)


def whole():
    """All rows of the store, from what was written."""
    columns = [unit_columns(unit) for unit in range(3)]
    return {
        name.removeprefix("act/"): torch.cat([part for each in columns for part in each[name]]) for name in columns[0]
    }


INDICES = [
    0,
    -1,
    torch.tensor(5),
    np.int64(7),
    slice(None),
    slice(20, 50),
    slice(60, 10, -7),
    slice(5, 5),
    ...,
    [],
    [3, 70, 3, -1],
    range(0, 72, 11),
    torch.tensor([[1, 2], [71, -72]]),
    np.array([[9], [25]]),
    torch.arange(72) % 5 == 0,
    (np.arange(72) > 70),
    [True] + [False] * 71,
]


@pytest.mark.parametrize("index", INDICES, ids=stable_id)
def test_any_index_gives_what_it_gives_on_tensors(dataset, index):
    rows = dataset[index]
    plain = index
    if isinstance(index, slice) and (index.step or 1) < 0:
        plain = list(range(72))[index]
    if isinstance(index, range):
        plain = list(index)
    if isinstance(index, list) and not index:
        plain = slice(0, 0)
    for name, values in whole().items():
        expected = values[plain]
        assert torch.equal(rows[name], expected)
    assert rows.batch_size == rows["seq"].shape


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (72, "row 72 is out of range; there are 72 rows"),
        ([0, -73], "row -73 is out of range"),
        ([0.5], "an index holds integers or booleans"),
        (torch.ones(3, dtype=torch.bool), r"a mask has one boolean per row, \(72,\); got \(3,\)"),
    ],
)
def test_what_is_no_index_is_refused(dataset, index, text):
    with pytest.raises(IndexError, match=text):
        dataset[index]


def test_a_column_is_read_when_it_is_indexed(dataset):
    column = dataset["layers.1"]
    assert (len(column), column.shape, column.dtype, column.nbytes) == (72, (72, 2, 3), torch.float32, 72 * 24)
    assert torch.equal(column[[70, 2]], whole()["layers.1"][[70, 2]])
    assert torch.equal(torch.stack(list(column)), whole()["layers.1"])
    assert repr(column) == "Column('layers.1', shape=(72, 2, 3), dtype=torch.float32)"
    assert torch.equal(dataset["tok"][:4], whole()["tok"][:4])
    with pytest.raises(KeyError, match=r"has no site 'layers.2'; did you mean 'layers"):
        dataset["layers.2"]


def test_a_sequence_is_the_rows_of_one_sample(dataset):
    for number in (0, 5, 11):
        rows = dataset.sequence(number)
        assert rows["seq"].tolist() == [number] * 6
        assert rows["pos"].tolist() == list(range(6))
        assert torch.equal(rows["layers.0"], whole()["layers.0"][6 * number : 6 * number + 6])
    with pytest.raises(IndexError, match="sample 12 is out of range; there are 12"):
        dataset.sequence(12)


def test_some_sites_can_be_read_alone(dataset):
    chosen = dataset.select("layers.1")
    assert chosen.keys == ("layers.1",)
    assert set(chosen[0].keys()) == {"layers.1", "seq", "pos", "tok"}
    assert chosen.nbytes < dataset.nbytes


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("own", [True, False])
def test_a_stock_loader_reads_a_batch_at_a_time(dataset, workers, own, monkeypatch):
    options = {"collate_fn": dataset.collate} if own else {}
    batches = list(DataLoader(dataset, batch_size=10, num_workers=workers, **options))
    assert torch.equal(torch.cat([batch["layers.0"] for batch in batches]), whole()["layers.0"])
    assert isinstance(batches[0], TensorDict)


def test_a_dataset_travels_to_another_process_without_its_rows(dataset):
    dataset[0]
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000
    assert torch.equal(pickle.loads(sent)[3]["layers.0"], dataset[3]["layers.0"])


@given(
    size=st.integers(1, 80),
    world=st.integers(1, 5),
    block=st.integers(1, 40),
    pool=st.integers(1, 100),
    seed=st.integers(0, 3),
    shuffle=st.sampled_from([False, "block", "rows"]),
)
def test_every_row_is_seen_exactly_once_by_exactly_one_rank(dataset, size, world, block, pool, seed, shuffle):
    options = {"shuffle": shuffle, "seed": seed, "world": world, "block": block, "pool": pool}
    shares = [dataset.batches(size, rank=rank, **options) for rank in range(world)]
    seen = [identities(share) for share in shares]
    assert sorted(each for one in seen for each in one) == identities([dataset[...]])
    assert all(len(batch) == size for share in shares for batch in list(share)[:-1])


@given(stop=st.integers(0, 9), size=st.integers(3, 20), shuffle=st.sampled_from([False, "block", "rows"]))
def test_an_interrupted_epoch_goes_on_where_it_was(dataset, stop, size, shuffle):
    def fresh():
        return dataset.batches(size, shuffle=shuffle, seed=4, block=7, pool=20)

    whole_run = identities(fresh())
    first = fresh()
    begun = identities(islice(first, stop))
    second = fresh()
    second.load_state_dict(first.state_dict())
    is_over = first.epoch == 1 or first.position == ROWS
    assert begun + ([] if is_over else identities(second)) == whole_run


def test_rows_are_mixed_and_every_epoch_is_another_one_and_repeatable(dataset):
    batches = dataset.batches(72, shuffle="block", seed=1, block=6)
    first, second = identities(batches), identities(batches)
    ordered = identities([dataset[...]])
    assert first != second != ordered != first
    neighbours = sum(abs(one - other) == 1 for one, other in pairwise(first))
    assert neighbours < 12  # 60 of 71 in order; about 1.7 by chance
    assert identities(dataset.batches(72, shuffle="block", seed=1, block=6)) == first
    assert identities(dataset.batches(72, shuffle="block", seed=2, block=6)) != first


def test_a_block_has_a_bound_in_rows_and_a_pool_in_blocks(dataset):
    batches = dataset.batches(4, shuffle="block")
    assert (batches.block, batches.pool) == (1024, 64 * 1024)  # of 24 bytes each
    assert dataset.batches(4, block=100).pool == 6400
    assert len(dataset.batches(5)) == 15


@pytest.mark.parametrize("shuffle", [False, "block", "rows"])
def test_a_batch_is_memory_of_its_own(dataset, shuffle):
    batches = dataset.batches(10, shuffle=shuffle, seed=2, block=6, pool=18)
    kept = [(batch, batch.clone()) for batch in batches]
    assert all(bool((one == other).all()) for one, other in kept)  # memory that is read into again is not handed out
    for batch in batches:
        assert all(value.untyped_storage().nbytes() == value.nbytes for value in batch.values())


@pytest.mark.parametrize("shuffle", [False, "block"])
def test_a_shard_that_is_cut_while_it_is_open_is_an_error_where_it_is_read(tmp_path, shuffle):
    folder = tmp_path / "a.acts"
    write_units(folder)
    dataset = ActivationDataset.open(folder)
    path = dataset.shards[2].path
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    before = threading.active_count()
    with pytest.raises(DamagedError, match=r"u00000002.safetensors: the file ends at byte \d+; it is truncated"):
        list(dataset.batches(9, shuffle=shuffle, block=6, pool=12))
    assert threading.active_count() == before
    with pytest.raises(DamagedError, match="it is truncated"):
        dataset[:]


def test_an_epoch_that_is_broken_off_leaves_no_thread(dataset):
    before = threading.active_count()
    for _ in dataset.batches(4, shuffle="block", block=6, pool=12):
        break
    assert threading.active_count() == before


def test_a_state_of_other_batches_is_refused(dataset):
    state = dataset.batches(4, seed=1).state_dict()
    with pytest.raises(SpecError, match="the state is of other batches: seed 1 there, 2 here"):
        dataset.batches(4, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match="shuffle is False, 'block' or 'rows', got 'all'"):
        dataset.batches(4, shuffle="all")
    with pytest.raises(ValueError, match="size >= 1 and 0 <= rank < world, got size=0, rank=0, world=1"):
        dataset.batches(0)


def test_export_to_numpy(dataset, tmp_path):
    target = dataset.export(tmp_path / "a.npz", "npz")
    with np.load(target, allow_pickle=False) as archive:
        assert sorted(archive.files) == sorted(whole())
        for name, values in whole().items():
            kept = values.float() if values.dtype == torch.bfloat16 else values
            assert np.array_equal(archive[name], kept.numpy())
            assert archive[name].dtype == kept.numpy().dtype


def test_export_to_torch_and_to_a_memory_mapped_tensordict(dataset, tmp_path):
    loaded = torch.load(dataset.export(tmp_path / "a.pt", "pt"), weights_only=True)
    mapped = TensorDict.load_memmap(dataset.export(tmp_path / "a", "memmap"))
    assert mapped.batch_size == (72,)
    for name, values in whole().items():
        assert torch.equal(loaded[name], values)
        assert torch.equal(mapped[name], values)
        assert mapped[name].dtype == values.dtype


def test_what_a_memory_mapped_tensordict_would_not_read_again_is_refused(dataset, tmp_path):
    eights = dataset.repack(tmp_path / "b.acts", dtype=torch.float8_e4m3fn, keys=["layers.1"])
    with pytest.raises(
        StoreError, match=r"'layers.1' of torch.float8_e4m3fn cannot be read again from a memory-mapped"
    ):
        eights.export(tmp_path / "c", "memmap")
    with np.load(eights.export(tmp_path / "c.npz", "npz")) as archive:
        assert np.array_equal(archive["layers.1"], whole()["layers.1"].to(torch.float8_e4m3fn).float().numpy())


def test_export_to_hugging_face(dataset, tmp_path):
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_from_disk(str(dataset.export(tmp_path / "a", "hf"))).with_format("torch")
    for name, values in whole().items():
        kept = values.float() if values.dtype == torch.bfloat16 else values
        assert torch.equal(loaded[:][name].to(kept.dtype), kept)


def test_export_in_the_layout_of_the_hub(dataset, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("tdcache.store.arrow._CHUNK_BYTES", 600)
    folder = dataset.export(tmp_path / "a", "parquet")
    names = sorted(path.name for path in (folder / "data").iterdir())
    assert names == [f"train-{number:05d}-of-{len(names):05d}.parquet" for number in range(len(names))]
    assert len(names) > 1
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache")).with_format("torch")
    for name, values in whole().items():
        kept = values.float() if values.dtype == torch.bfloat16 else values
        assert torch.equal(loaded[:][name].to(kept.dtype), kept)
    card = (folder / "README.md").read_text()
    assert (
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*.parquet\n---" in card
    )


def test_an_export_is_whole_or_not_there(dataset, tmp_path, monkeypatch):
    (tmp_path / "a.npz").write_text("mine")
    with pytest.raises(StoreError, match="is there already; export to another path"):
        dataset.export(tmp_path / "a.npz", "npz")
    with pytest.raises(ValueError, match="export knows 'npz', 'pt', 'memmap', 'hf', 'arrow', 'parquet', got 'csv'"):
        dataset.export(tmp_path / "b", "csv")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(StoreError, match=r"b.pt could not be written: no space; what was there before is whole"):
        dataset.export(tmp_path / "b.pt", "pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def fail(tensors, file):
    file.write(b"half")
    raise OSError("no space")


def test_repack_keeps_every_row_and_what_it_knows_of_itself(dataset, tmp_path):
    mixed = dataset.repack(tmp_path / "b.acts", shuffle=True, seed=3, shard_bytes=1000)
    mixed.verify()
    assert len(mixed.shards) > 3
    assert identities([mixed[...]]) != identities([dataset[...]])
    order = torch.tensor(identities([mixed[...]])).argsort()
    for name, values in whole().items():
        assert torch.equal(mixed[...][name][order], values)
    assert sorted(mixed.sequence(7)["pos"].tolist()) == list(range(6))
    again = dataset.repack(tmp_path / "c.acts", shuffle=True, seed=3, shard_bytes=1000)
    assert contents(tmp_path / "c.acts") == contents(tmp_path / "b.acts")
    assert identities([dataset.repack(tmp_path / "d.acts", shuffle=True, seed=4)[...]]) != identities([again[...]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.acts", "c.acts", "d.acts"]


def test_repack_to_fewer_sites_and_another_dtype(dataset, tmp_path):
    narrow = dataset.repack(tmp_path / "b.acts", keys=["layers.1"], dtype=torch.float16)
    assert narrow.keys == ("layers.1",)
    assert torch.equal(narrow["layers.1"][...], whole()["layers.1"].half())
    assert torch.equal(narrow.sequence(4)["pos"], torch.arange(6).int())
    big = write_units(tmp_path / "c.acts", [], last=0)
    columns = unit_columns(0)
    columns["act/layers.1"][0] = columns["act/layers.1"][0] + 1e6
    big.write(0, columns, samples=(0, 4), end=True)
    with pytest.raises(CaptureError, match=r"42 values at 'layers.1' cannot be held by torch.float16"):
        ActivationDataset.open(tmp_path / "c.acts").repack(tmp_path / "d.acts", dtype=torch.float16)


def test_merge_numbers_the_samples_on(dataset, tmp_path):
    other = dataset.repack(tmp_path / "b.acts")
    both = ActivationDataset.merge(dataset, other, path=tmp_path / "c.acts")
    both.verify()
    assert (len(both), both.sequences) == (144, 24)
    assert torch.equal(both["seq"][72:], whole()["seq"] + 12)
    assert torch.equal(both.sequence(15)["layers.0"], dataset.sequence(3)["layers.0"])
    narrow = dataset.repack(tmp_path / "d.acts", dtype=torch.float16)
    with pytest.raises(SpecError, match=r"cannot follow .*: they differ in sites.layers.0.dtype, sites.layers.1.dtype"):
        ActivationDataset.merge(dataset, narrow, path=tmp_path / "e.acts")
    with pytest.raises(SpecError, match=r"c.acts was made otherwise than is asked for now:\n  merged"):
        ActivationDataset.merge(dataset, path=tmp_path / "c.acts")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="is there already; write to another folder"):
        ActivationDataset.merge(dataset, other, path=tmp_path / "notes")
    write_units(tmp_path / "f.acts", [0])
    with pytest.raises(StoreError, match="is unfinished; run its harvest to the end first"):
        ActivationDataset.open(tmp_path / "f.acts").repack(tmp_path / "g.acts")
    assert len(dataset) == ROWS


def test_an_empty_store_is_an_empty_dataset(tmp_path):
    write_units(tmp_path / "a.acts", [])
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    assert (len(dataset), dataset.complete, dataset.sequences) == (0, False, 0)
    assert dataset[...]["layers.1"].shape == (0, 2, 3)
    assert dataset[[]].batch_size == (0,)
    assert list(dataset.batches(4, shuffle="block")) == []
    dataset.verify()
    assert "unfinished" in repr(dataset)


def test_merge_is_a_method_that_leaves_out_none_and_writes_beside_the_first(dataset, tmp_path):
    one, other = dataset.repack(tmp_path / "one.acts"), dataset.repack(tmp_path / "other.acts")
    both = one.merge(other)
    assert both.path == tmp_path / "one-merged.acts"
    assert torch.equal(both["layers.0"][...], torch.cat([whole()["layers.0"]] * 2))
    assert len(one.merge(other, other, path=tmp_path / "three.acts")) == 3 * ROWS
    assert one.repack(shuffle=True).path == tmp_path / "one-shuffled.acts"
    assert one.repack(keys=["layers.1"]).path == tmp_path / "one-repacked.acts"
    before = contents(both.path)
    assert len(one.merge(other)) == 2 * ROWS  # again: there already
    assert contents(both.path) == before


@pytest.mark.parametrize(
    "index", [None, ["0", "1"], ("0", 3), {"a": 1}, object()], ids=lambda index: type(index).__name__
)
def test_what_is_no_index_is_an_index_error(dataset, index):
    with pytest.raises(IndexError, match="an index is an integer, a slice"):
        dataset[index]
    with pytest.raises(IndexError, match="an index is an integer, a slice"):
        dataset["layers.0"][index]


def test_export_takes_the_format_from_the_suffix(dataset, tmp_path):
    with np.load(dataset.export(tmp_path / "a.npz")) as archive:
        assert sorted(archive.files) == sorted(whole())
    loaded = torch.load(dataset.export(tmp_path / "a.pt"), weights_only=True)
    assert loaded.keys() == whole().keys()
    with pytest.raises(ValueError, match=r"export knows .*'parquet', got None"):
        dataset.export(tmp_path / "a")


def test_arrow_is_another_name_for_hugging_face(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for kind in ("hf", "arrow"):
        with pytest.raises(StoreError, match="exporting to Hugging Face datasets needs them"):
            dataset.export(tmp_path / "a", kind)
