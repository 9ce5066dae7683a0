"""An open reader reads the store that it opened, or says that it is no longer there; unlike stores are not joined."""

import os
import shutil

import pytest
import torch

from store.faulty_files import SPEC, unit_columns, write_units
from tdcache.errors import DamagedError, SpecError, StoreError
from tdcache.store import ActivationDataset, StoreWriter


@pytest.fixture
def folder(tmp_path):
    write_units(tmp_path / "a.acts")
    return tmp_path / "a.acts"


def write_others(folder, spec=SPEC):
    """A store of the same sites, shapes and number of rows, with other values."""
    with StoreWriter(folder, spec) as writer:
        for unit in range(3):
            columns = unit_columns(unit + 10)
            columns["seq"] = unit_columns(unit)["seq"]
            writer.write(unit, columns, samples=(4 * unit, 4 * unit + 4), end=unit == 2)


READS = {
    "a row": lambda ds: ds[30],
    "rows": lambda ds: ds[list(range(72)) * 2],
    "a slice": lambda ds: ds[20:60],
    "batches": lambda ds: list(ds.batches(7, shuffle="block")),
    "a map": lambda ds: ds.shards[1].column("seq"),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("spec", [SPEC, {**SPEC, "model": {"fingerprint": "another"}}], ids=["same", "other"])
def test_an_open_reader_notices_that_its_folder_is_another_store(folder, tmp_path, read, warm, spec):
    dataset = ActivationDataset.open(folder)
    if warm:
        READS[read](dataset)
    write_others(tmp_path / "b.acts", spec)
    shutil.rmtree(folder)
    (tmp_path / "b.acts").rename(folder)
    with pytest.raises(StoreError, match=r"is not the shard that was known: .* open it again|belongs to spec"):
        READS[read](dataset)
    if spec is SPEC:
        assert READS[read](ActivationDataset.open(folder)) is not None
    else:
        for call in (dataset.refresh, dataset.verify):
            with pytest.raises(SpecError, match="holds another store than the one that was opened; open it again"):
                call()


def test_a_copy_of_the_same_store_in_its_place_is_the_same_store(folder, tmp_path):
    dataset = ActivationDataset.open(folder, check=True)
    before = dataset[...]
    shutil.copytree(folder, tmp_path / "b.acts")
    shutil.rmtree(folder)
    (tmp_path / "b.acts").rename(folder)
    assert bool((dataset[...] == before).all())


def test_a_shard_that_another_file_replaced_is_checked_again(folder):
    dataset = ActivationDataset.open(folder, check=True)
    assert len(dataset[...]) == 72
    path = dataset.shards[1].path
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.with_suffix(".new").write_bytes(raw)
    path.with_suffix(".new").replace(path)
    with pytest.raises(DamagedError, match=r"u00000001.safetensors: block 0 of column"):
        dataset[...]


def test_a_shard_that_is_cut_after_it_was_mapped_is_an_error_and_no_signal(folder):
    dataset = ActivationDataset.open(folder)
    many = list(range(24, 48)) * 2
    dataset[many]  # by the map
    with dataset.shards[1].path.open("r+b") as file:
        file.truncate(4096)
    for read in (lambda: dataset[many], lambda: dataset[30], lambda: dataset[20:30]):
        with pytest.raises(DamagedError, match=r"u00000001.safetensors: the file ends at byte 4096; it is truncated"):
            read()


def test_selecting_sites_keeps_to_the_rows_that_were_there(tmp_path):
    write_units(tmp_path / "a.acts", [0])
    dataset = ActivationDataset.open(tmp_path / "a.acts")
    write_units(tmp_path / "a.acts", [1, 2])
    assert len(dataset.select("layers.1")) == 24
    assert dataset.select("layers.1").keys == ("layers.1",)
    with pytest.raises(KeyError, match=r"has no site 'layers.7'"):
        dataset.select("layers.7")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", {"class": "GPT2Model", "fingerprint": "b" * 64}),
        ("forward", "another"),
        ("pick", 1),
        ("direction", "fwd_pre"),
        ("rows", "samples"),
    ],
)
def test_stores_of_another_model_or_of_other_values_are_not_joined(tmp_path, field, value):
    base = {**SPEC, "model": {"class": "GPT2Model", "fingerprint": "a" * 64}, "rows": "tokens"}
    for name, spec in (("a", base), ("b", {**base, field: value}), ("c", {**base, "data": {"batches": 7}})):
        write_others(tmp_path / f"{name}.acts", spec)
    one, other, more = (ActivationDataset.open(tmp_path / f"{name}.acts") for name in "abc")
    wanted = "model.fingerprint" if field == "model" else field
    with pytest.raises(SpecError, match=rf"b.acts cannot follow .*a.acts: they differ in {wanted}"):
        one.merge(other)
    assert len(one.merge(more)) == 144


def test_a_store_whose_folder_cannot_be_read_says_so(folder, monkeypatch):
    opened = os.open

    def refuse(path, *args, **options):
        if str(path).endswith("spec.json"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DamagedError, match=r"spec.json cannot be opened as a regular file: Permission denied"):
        ActivationDataset.open(folder)


def test_a_disk_that_cannot_read_a_shard_is_an_error_with_its_name(folder, monkeypatch):
    def refuse(*args):
        raise OSError(5, "Input/output error")

    dataset = ActivationDataset.open(folder)
    dataset[0]
    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(DamagedError, match=r"u00000000.safetensors cannot be read at byte \d+: Input/output error"):
        dataset[0]


def test_columns_become_arrays_at_once(folder):
    np = pytest.importorskip("numpy")
    dataset = ActivationDataset.open(folder)
    assert np.array_equal(np.asarray(dataset["layers.1"]), dataset["layers.1"][...].numpy())
    assert np.asarray(dataset["layers.0"]).dtype == np.float32  # bfloat16, which NumPy does not have
    assert np.array_equal(np.asarray(dataset["layers.0"]), dataset["layers.0"][...].float().numpy())
    assert np.asarray(dataset["layers.1"], dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="NumPy's array is always a copy; leave out copy="):
        np.asarray(dataset["layers.1"], copy=False)
    assert torch.equal(torch.as_tensor(np.asarray(dataset["seq"])), dataset["seq"][...])
