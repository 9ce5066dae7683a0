"""Thousands of shards: a row costs a look at its own shard, and the number of open files and maps has a bound."""

import resource
from pathlib import Path

import pytest
import torch

from tdcache.store import ActivationDataset, StoreWriter, site_column
from tdcache.store import shard as shard_module
from tdcache.store.files import Files
from tdcache.store.regular import open_regular
from tdcache.store.shuffle import shuffled_rows

SHARDS, ROWS = 1000, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "a.acts"
    write_many(folder, SHARDS)
    return folder


def write_many(folder, count, files=None):
    with StoreWriter(folder, {"sites": {"a": {"dtype": "int64", "shape": [2]}}}, files=files) as writer:
        for unit in range(count):
            first = unit * ROWS
            numbers = torch.arange(first, first + ROWS)
            columns = {
                site_column("a"): [torch.stack([numbers, -numbers], 1)],
                "seq": [numbers],
                "pos": [torch.zeros(ROWS).int()],
            }
            writer.write(unit, columns, samples=(first, first + ROWS), end=unit == count - 1)


@pytest.fixture
def opened(monkeypatch):
    """The shards that were opened."""
    found = []

    def counted(path, **options):
        found.append(path)
        return open_regular(path, **options)

    monkeypatch.setattr(shard_module, "open_regular", counted)
    return found


def test_a_store_is_opened_without_opening_its_shards(folder, opened):
    dataset = ActivationDataset.open(folder)
    assert (len(dataset), len(dataset.shards), dataset.complete, dataset.sequences) == (40_000, SHARDS, True, 40_000)
    assert dataset.nbytes == 40_000 * (16 + 8 + 4)
    assert opened == []


def test_a_row_opens_its_own_shard_alone(folder, opened):
    dataset = ActivationDataset.open(folder)
    assert dataset[31_415]["a"].tolist() == [31_415, -31_415]
    assert opened == [dataset.shards[31_415 // ROWS].path]
    opened.clear()
    rows = dataset[[39_999, 3, 39_998, 3]]
    assert rows["seq"].tolist() == [39_999, 3, 39_998, 3]
    assert opened == [dataset.shards[0].path, dataset.shards[-1].path]
    opened.clear()
    assert dataset[45:50]["seq"].tolist() == [45, 46, 47, 48, 49]
    assert opened == [dataset.shards[1].path]


def test_any_gather_is_what_it_is_on_a_tensor(folder):
    dataset = ActivationDataset.open(folder)
    numbers = torch.randint(0, 40_000, (5000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(dataset[numbers]["a"][:, 0], numbers)
    assert torch.equal(dataset["a"][::-3][:, 0], torch.arange(40_000)[::3].flip(0) - 40_000 % 3 + 1)


def test_maps_and_open_files_have_a_bound(folder):
    dataset = ActivationDataset.open(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        for shard in dataset.shards[:600]:
            shard.column("seq")
        many = torch.arange(600 * ROWS).reshape(600, ROWS).repeat(1, 2).reshape(-1)  # eighty rows a shard: by its map
        assert torch.equal(dataset[many]["seq"], many)
        assert len(list(dataset.batches(1000, shuffle="rows"))) == 40
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count(str(folder)) <= 64


def test_a_shuffle_writes_each_row_a_bounded_number_of_times_to_a_bounded_number_of_files(
    folder, tmp_path, monkeypatch
):
    written, open_now, most = [], set(), []
    create, close, write = Files.create, Files.close, Files.write

    def counted_create(files, path):
        descriptor = create(files, path)
        open_now.add(descriptor)
        most.append(len(open_now))
        return descriptor

    monkeypatch.setattr(Files, "create", counted_create)
    monkeypatch.setattr(Files, "close", lambda files, each: (open_now.discard(each), close(files, each)))
    monkeypatch.setattr(
        Files, "write", lambda files, each, data, at: (written.append(data.nbytes), write(files, each, data, at))
    )
    dataset = ActivationDataset.open(folder)
    (tmp_path / "bins").mkdir()
    found = list(shuffled_rows(dataset, seed=1, scratch=tmp_path / "bins", memory=28 * 100))
    seq = torch.cat([rows["seq"] for rows in found])
    assert torch.equal(seq.sort().values, torch.arange(40_000))
    assert torch.equal(torch.cat([rows["a"] for rows in found])[:, 0], seq)
    assert max(map(len, found)) <= 100
    assert max(most) <= 128
    # 800 bins of fifty rows are 128 bins of some 312, each dealt again; once more where chance made one large.
    assert sum(written) / dataset.nbytes == pytest.approx(2.0, abs=0.2)
    assert list((tmp_path / "bins").iterdir()) == []


def test_the_order_of_a_shuffle_is_pinned_by_its_seed_and_mixes_over_all_shards(folder, tmp_path):
    dataset = ActivationDataset.open(folder)
    orders = []
    for number, seed in enumerate((3, 3, 4)):
        (tmp_path / str(number)).mkdir()
        rows = shuffled_rows(dataset, seed=seed, scratch=tmp_path / str(number), memory=28 * 4000)
        orders.append(torch.cat([each["seq"] for each in rows]))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    same_shard = (orders[0][1:] // ROWS == orders[0][:-1] // ROWS).float().mean()
    assert float(same_shard) < 10 / SHARDS  # by chance 1 / SHARDS
    places = torch.empty(40_000)
    places[orders[0]] = torch.arange(40_000.0)
    # The mean place of a tenth of the rows: 4000 draws of a uniform variable, whose mean has deviation 183.
    assert all(abs(float(part.mean()) - 20_000) < 5 * 183 for part in places.split(4000))


def test_repack_takes_a_store_of_many_shards(folder, tmp_path):
    mixed = ActivationDataset.open(folder).repack(tmp_path / "b.acts", shuffle=True, shard_bytes=1 << 16)
    assert len(mixed.shards) == -(-40_000 // ((1 << 16) // 28))
    assert torch.equal(mixed["seq"][...].sort().values, torch.arange(40_000))
    assert list((tmp_path / "b.acts" / ".tmp").iterdir()) == []


def test_a_shuffle_has_every_order_equally_often(tmp_path):
    write_many(tmp_path / "a.acts", 1)
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    firsts = torch.zeros(ROWS)
    for seed in range(200):
        (tmp_path / str(seed)).mkdir()
        rows = list(shuffled_rows(dataset, seed=seed, scratch=tmp_path / str(seed), memory=1))  # by bins of some rows
        firsts[int(rows[0]["seq"][0])] += 1
    # 200 draws of 40 rows, five each: chi-squared with 39 degrees of freedom is below 80 but once in ten thousand.
    assert float(((firsts - 5) ** 2 / 5).sum()) < 80


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_rows_of_every_kind_come_whole_out_of_a_shuffle(tmp_path, rows):
    dtypes = {"eight": torch.float8_e4m3fn, "half": torch.bfloat16, "whole": torch.int64, "truth": torch.bool}
    shapes = {"eight": (3,), "half": (5,), "whole": (2, 2), "truth": (), "none": (0,)}
    dtypes["none"] = torch.float32
    values = {key: (torch.rand(rows, *shapes[key]) * 9).to(dtypes[key]) for key in dtypes}
    sites = {key: {"dtype": str(each.dtype)[6:], "shape": list(shapes[key])} for key, each in values.items()}
    columns = {site_column(key): [each] for key, each in values.items()}
    columns |= {"seq": [torch.arange(rows)], "pos": [torch.zeros(rows).int()]}
    with StoreWriter(tmp_path / "a.acts", {"sites": sites}) as writer:
        writer.write(0, columns, samples=(0, rows), end=True)
    for size in (1, 10_000):
        mixed = ActivationDataset.open(tmp_path / "a.acts").repack(
            tmp_path / f"{size}.acts", shuffle=True, shard_bytes=size
        )[...]
        order = mixed["seq"].argsort()
        for key, each in values.items():
            assert torch.equal(mixed[key].float()[order], each.float())
