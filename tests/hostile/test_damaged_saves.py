"""Folders of activations that are cut or forged are refused, and left as they are; saving holds no second copy."""

import json
import os

import numpy as np
import pytest
import torch

from tdcache.errors import DamagedError, StoreError
from tdcache.harvesting import load_activations, save_activations


@pytest.fixture
def folder(tmp_path):
    return save_activations({"a.b": torch.ones(100, 4), "none": torch.empty(0, 3)}, tmp_path / "a.memmap")


@pytest.mark.parametrize("size", [0, 1, 800, 1599])
def test_a_cut_file_of_a_folder_is_named_and_left_as_it_is(folder, size):
    os.truncate(folder / "a.b.memmap", size)
    with pytest.raises(DamagedError, match=rf"a.b.memmap has {size} bytes where meta.json says 1600") as failure:
        load_activations(folder)
    assert failure.value.path == folder / "a.b.memmap"
    assert (folder / "a.b.memmap").stat().st_size == size


def test_a_missing_file_of_a_folder_is_named_and_not_made(folder):
    (folder / "a.b.memmap").unlink()
    with pytest.raises(DamagedError, match=r"a.b.memmap has 0 bytes"):
        load_activations(folder)
    assert not (folder / "a.b.memmap").exists()


@pytest.mark.parametrize(
    "forge",
    [
        lambda said: [],
        lambda said: {**said, "_type": "<class 'tensordict.tensorclass.NonTensorData'>"},
        lambda said: {**said, "a.b": {"type": "TensorDict"}},
        lambda said: {**said, "a.b": {**said["a.b"], "dtype": "torch.load"}},
        lambda said: {**said, "a.b": {**said["a.b"], "shape": "100"}},
        lambda said: {name: each for name, each in said.items() if name != "_type"},
    ],
)
def test_a_forged_description_of_a_folder_is_refused(folder, forge):
    (folder / "meta.json").write_text(json.dumps(forge(json.loads((folder / "meta.json").read_text()))))
    with pytest.raises(DamagedError, match=r"a.memmap is no folder of activations: "):
        load_activations(folder)


def test_a_description_that_leads_out_of_its_folder_or_is_none_is_refused(folder):
    said = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**said, "../secret": said["a.b"]}))
    with pytest.raises(StoreError, match="cannot be the name of a file"):
        load_activations(folder)
    (folder / "meta.json").write_bytes(b"{")
    with pytest.raises(DamagedError, match=r"a.memmap is no folder of activations: .*JSONDecodeError"):
        load_activations(folder)


def test_a_pt_file_copies_only_what_is_a_part_of_other_memory(tmp_path, monkeypatch):
    big, copied = torch.arange(1000.0), []
    acts = {"part": big[:2], "whole": torch.ones(50), "many": torch.ones(1).expand(4), "one": big, "same": big}
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor: copied.append(tensor.shape) or clone(tensor))
    target = save_activations(acts, tmp_path / "a.pt")
    assert [tuple(shape) for shape in copied] == [(2,), (4,), (1000,), (1000,)]
    found = load_activations(target)
    assert all(torch.equal(found[name], value) for name, value in acts.items())
    assert len({value.untyped_storage().data_ptr() for value in found.values()}) == 5


def test_a_npz_file_holds_one_converted_tensor_at_a_time(tmp_path, monkeypatch):
    alive, most = [], []
    write = np.lib.format.write_array
    change = torch.Tensor.float

    def counted(tensor):
        alive.append(change(tensor))
        return alive[-1]

    def emptied(file, array, **options):
        most.append(len(alive))
        alive.clear()
        write(file, array, **options)

    monkeypatch.setattr(torch.Tensor, "float", counted)
    monkeypatch.setattr(np.lib.format, "write_array", emptied)
    acts = {str(number): torch.full((3,), float(number)).bfloat16() for number in range(4)}
    target = save_activations(acts, tmp_path / "a.npz")
    assert max(most) == 1
    assert all(torch.equal(load_activations(target)[name], value) for name, value in acts.items())


@pytest.mark.parametrize("name", ["a\0b", "half of a pair: \ud800"])
def test_a_name_that_a_format_would_change_is_refused(tmp_path, name):
    with pytest.raises(StoreError, match=r"cannot be a name in an archive; save to \.safetensors, or give it another"):
        save_activations({name: torch.ones(2)}, tmp_path / "x.npz")
    with pytest.raises(StoreError, match="cannot be the name of a file"):
        save_activations({name: torch.ones(2)}, tmp_path / "x.memmap")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.eye(2).to_sparse(), r"of torch\.sparse_coo on cpu"),
        (torch.zeros(2, device="meta"), r"of torch\.strided on meta"),
        ([1.0], "list"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pt", ".memmap"])
def test_what_is_no_dense_tensor_is_refused_and_the_old_file_stays(tmp_path, suffix, value, kind):
    target = save_activations({"a": torch.ones(2)}, tmp_path / f"x{suffix}")
    with pytest.raises(
        StoreError, match=rf"hold dense tensors with values, and 'b' is {kind}; give it as a"
    ) as failure:
        save_activations({"a": torch.zeros(2), "b": value}, target)
    assert failure.value.path == target
    assert torch.equal(load_activations(target)["a"], torch.ones(2))
