"""What a stranger may have put into a folder: no loader runs it, waits for it, follows it, or believes its sizes."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, TensorDict

from store.faulty_files import write_units
from tdcache.errors import DamagedError, StoreError
from tdcache.harvesting import load_activations, save_activations
from tdcache.interventions import SteeringVectors, load_intervention, save_intervention
from tdcache.store import ActivationDataset
from tdcache.store.safetensors import read_tensors, write_tensors
from tdcache.store.spec import canonical, spec_id


class Runs:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path):
    """A pickle, and a path that exists once it was run."""
    return pickle.dumps(Runs(tmp_path / "it ran")), tmp_path / "it ran"


@pytest.fixture
def folder(tmp_path):
    return save_activations({"a.b": torch.ones(100, 4), "none": torch.empty(0, 3)}, tmp_path / "a.memmap")


def meta(folder, change):
    said = json.loads((folder / "meta.json").read_text())
    change(said)
    (folder / "meta.json").write_text(json.dumps(said))


# Folders of activations.


@pytest.mark.parametrize("kind", ["NonTensorData", "TensorDict", "<class 'tensordict.tensorclass.NonTensorData'>"])
def test_an_entry_that_is_no_tensor_is_refused_and_its_pickle_is_not_run(folder, trap, kind):
    payload, ran = trap
    (folder / "b").mkdir()
    (folder / "b" / "other.pickle").write_bytes(payload)
    said = {"_type": kind, "_is_non_tensor": True, "data": None, "batch_size": [], "device": "None"}
    (folder / "b" / "meta.json").write_text(json.dumps(said))
    meta(folder, lambda meta: meta.update(b={"type": kind}))
    with pytest.raises(DamagedError, match="is no folder of activations: ValueError: 'b' is no plain tensor"):
        load_activations(folder)
    assert not ran.exists()


def test_a_folder_with_an_object_of_tensordict_itself_is_refused(tmp_path):
    TensorDict({"a": torch.ones(2), "b": NonTensorData("text")}, batch_size=[]).memmap(str(tmp_path / "a.memmap"))
    with pytest.raises(DamagedError, match="'b' is no plain tensor"):
        load_activations(tmp_path / "a.memmap")


META_FORGERIES = {
    "a nested tensor": lambda said: said["a.b"].update(is_nested=True),
    "an unknown field": lambda said: said["a.b"].update(path="/etc/passwd"),
    "no dtype": lambda said: said["a.b"].pop("dtype"),
    "a function of torch": lambda said: said["a.b"].update(dtype="torch.load"),
    "a module": lambda said: said["a.b"].update(dtype="hub"),
    "a dtype that is a number": lambda said: said["a.b"].update(dtype=3),
    "a quantised dtype": lambda said: said["a.b"].update(dtype="torch.qint8"),
    "a shape of text": lambda said: said["a.b"].update(shape="12"),
    "a negative shape": lambda said: said["a.b"].update(shape=[-1, -400]),
    "a fraction": lambda said: said["a.b"].update(shape=[100.0, 4]),
    "truth": lambda said: said["a.b"].update(shape=[True, 4]),
    "too many dimensions": lambda said: said["a.b"].update(shape=[1] * 100),
    "an overflow": lambda said: said["a.b"].update(shape=[1 << 40, 1 << 40]),
    "an overflow of nothing": lambda said: said["none"].update(shape=[0, 1 << 40, 1 << 40]),
    "a list": lambda said: said.update({"a.b": [1]}),
    "nothing": lambda said: said.update({"a.b": None}),
    "no type": lambda said: said.pop("_type"),
    "another type": lambda said: said.update(_type="<class 'os.system'>"),
}


@pytest.mark.parametrize("what", META_FORGERIES)
def test_a_forged_description_of_a_folder_is_refused(folder, what):
    meta(folder, META_FORGERIES[what])
    with pytest.raises(DamagedError, match=r"a.memmap is no folder of activations: "):
        load_activations(folder)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "..", "", "a/b", "a\\b", "nul\0", "~root", "C:x"])
def test_a_name_that_leads_out_of_a_folder_is_refused(folder, name):
    meta(folder, lambda said: said.update({name: said["a.b"]}))
    with pytest.raises(StoreError, match="cannot be the name of a file"):
        load_activations(folder)


def link_out(path, target):
    path.unlink()
    path.symlink_to(target)


def fifo(path, target):
    path.unlink()
    os.mkfifo(path)  # opened as a file is, it would keep the reader waiting for ever


def directory(path, target):
    path.unlink()
    path.mkdir()


IMPOSTORS = {"a link": link_out, "a pipe": fifo, "a folder": directory}


@pytest.mark.parametrize("impostor", IMPOSTORS)
@pytest.mark.parametrize("name", ["meta.json", "a.b.memmap"])
def test_what_is_no_regular_file_of_a_folder_is_not_read(folder, tmp_path, impostor, name):
    secret = tmp_path / "secret"
    secret.write_bytes((folder / name).read_bytes())
    IMPOSTORS[impostor](folder / name, secret)
    with pytest.raises(DamagedError, match=r"cannot be opened as a regular file|is no regular file"):
        load_activations(folder)


@pytest.mark.parametrize("impostor", ["a pipe", "a folder"])
@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_not_waited_for(tmp_path, suffix, impostor):
    target = save_activations({"a": torch.ones(2)}, tmp_path / f"a{suffix}")
    IMPOSTORS[impostor](target, None)
    with pytest.raises(DamagedError, match="is no regular file"):
        load_activations(target)


def test_a_file_that_the_user_names_may_be_a_link(tmp_path):
    target = save_activations({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").symlink_to(target)
    assert torch.equal(load_activations(tmp_path / "b.safetensors")["a"], torch.ones(2))


def test_a_loaded_map_does_not_write_to_its_file(folder):
    load_activations(folder)["a.b"].fill_(7)
    assert torch.equal(load_activations(folder)["a.b"], torch.ones(100, 4))


def test_a_description_of_a_hundred_megabytes_is_not_read(folder):
    with (folder / "meta.json").open("r+b") as file:
        file.truncate(100_000_000)  # a hole, which takes no space
    with pytest.raises(DamagedError, match=r"meta.json has 100000000 bytes, more than the \d+ it may have"):
        load_activations(folder)


# Single files.


def test_a_pt_file_with_a_pickle_is_refused_and_not_run(tmp_path, trap):
    torch.save({"a": Runs(trap[1])}, tmp_path / "a.pt")
    with pytest.raises(DamagedError, match=r"a.pt cannot be read"):
        load_activations(tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(trap[0])
    with pytest.raises(DamagedError, match=r"b.pt cannot be read"):
        load_activations(tmp_path / "b.pt")
    assert not trap[1].exists()


@pytest.mark.parametrize("held", [[torch.ones(2)], {"a": 1}, {"a": {"b": torch.ones(2)}}, {1: torch.ones(2)}, 3])
def test_a_pt_file_of_something_else_is_refused(tmp_path, held):
    torch.save(held, tmp_path / "a.pt")
    with pytest.raises(DamagedError, match="it holds something else than a dict of tensors"):
        load_activations(tmp_path / "a.pt")


def zipped(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def npy(array, **options):
    file = io.BytesIO()
    np.lib.format.write_array(file, array, **options)
    return file.getvalue()


@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_a_bomb_of_compressed_zeros_is_refused(tmp_path, suffix):
    zipped(tmp_path / f"a{suffix}", {"a.npy": npy(np.zeros(1_000_000))}, zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedError, match=r"'a.npy' is compressed, which save_activations never does"):
        load_activations(tmp_path / f"a{suffix}")


NPY_FORGERIES = {
    "a pickle": lambda trap: npy(np.array([Runs(trap)], dtype=object), allow_pickle=True),
    "a shape of terabytes": lambda trap: npy(np.zeros(3)).replace(b"(3,), ", b"(1<<40,)"[:5] + b" ")[:80],
    "more than there is": lambda trap: npy(np.zeros(3)).replace(b"(3,)", b"(9,)"),
    "less than there is": lambda trap: npy(np.zeros(3)).replace(b"(3,)", b"(1,)"),
    "a negative shape": lambda trap: npy(np.zeros(3)).replace(b"(3,)", b"(-3)"),
    "text": lambda trap: npy(np.array(["a", "b"])),
    "no array": lambda trap: b"no array at all",
    "nothing": lambda trap: b"",
    "a record": lambda trap: npy(np.zeros(3, dtype=[("a", "f4"), ("b", "i4")])),
    "another version": lambda trap: b"\x93NUMPY\x09\x09" + npy(np.zeros(3))[8:],
    "code in the header": lambda trap: npy(np.zeros(3)).replace(b"(3,)", b"ex()"),
}


@pytest.mark.parametrize("what", NPY_FORGERIES)
def test_a_forged_array_is_refused_and_nothing_is_run(tmp_path, trap, what):
    zipped(tmp_path / "a.npz", {"a.npy": NPY_FORGERIES[what](trap[1])})
    with pytest.raises(DamagedError, match=r"a.npz cannot be read"):
        load_activations(tmp_path / "a.npz")
    assert not trap[1].exists()


@pytest.mark.parametrize("lost", ['{"a": "load"}', '{"a": ["x"]}', "[1]", "{", '{"a": "hub.load"}'])
def test_the_names_of_dtypes_in_an_archive_are_dtypes(tmp_path, lost):
    zipped(tmp_path / "a.npz", {"a.npy": npy(np.zeros(3)), "__dtypes__.npy": npy(np.array(lost))})
    with pytest.raises(DamagedError, match=r"a.npz cannot be read"):
        load_activations(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "shape", [[0, 1 << 40, 1 << 40], [0] + [1] * 100, [0, 1 << 62], [0, 10**30]], ids=["huge", "deep", "wide", "long"]
)
def test_a_tensor_of_nothing_has_a_shape_that_torch_can_describe(tmp_path, shape):
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(DamagedError, match="which is no tensor"):
        read_tensors(tmp_path / "a.safetensors")


# Stores.


@pytest.fixture
def store(tmp_path):
    write_units(tmp_path / "a.acts")
    return tmp_path / "a.acts"


@pytest.mark.parametrize("impostor", IMPOSTORS)
@pytest.mark.parametrize("name", ["spec.json", "index.json", "shards/000/u00000001.safetensors"])
def test_what_is_no_regular_file_of_a_store_is_not_read(store, tmp_path, impostor, name):
    secret = tmp_path / "secret"
    secret.write_bytes((store / name).read_bytes())
    IMPOSTORS[impostor](store / name, secret)
    if name == "index.json":  # it only repeats what the shards say
        assert len(ActivationDataset.open(store)[...]) == 72
    with pytest.raises(
        StoreError, match=r"cannot be opened as a regular file|is no regular file|is not what was written"
    ):
        ActivationDataset.open(store).verify()


@pytest.mark.parametrize("name", ["shards", ".tmp"])
def test_a_folder_of_a_store_that_is_a_link_is_refused(store, tmp_path, name):
    (store / name).rename(tmp_path / "moved")
    (store / name).symlink_to(tmp_path / "moved")
    with pytest.raises(StoreError, match=f"{name} is no folder of the store's own"):
        ActivationDataset.open(store)


def test_a_linked_folder_of_shards_is_not_read(store, tmp_path):
    (store / "shards" / "000").rename(tmp_path / "moved")
    (store / "shards" / "000").symlink_to(tmp_path / "moved")
    assert len(ActivationDataset.open(store)) == 0


def forge_spec(store, change):
    """Change a spec, with an id and a checksum that fit."""
    document = json.loads((store / "spec.json").read_bytes())
    change(document["spec"])
    document["id"] = spec_id(document["spec"])
    document.pop("crc32")
    document["crc32"] = f"{zlib.crc32(canonical(document)):08x}"
    (store / "spec.json").write_bytes(json.dumps(document, sort_keys=True, indent=1).encode() + b"\n")


SPEC_FORGERIES = {
    "a function of torch": lambda spec: spec["sites"]["layers.0"].update(dtype="load"),
    "a dotted name": lambda spec: spec["sites"]["layers.0"].update(dtype="hub.load"),
    "a dtype that is a list": lambda spec: spec["sites"]["layers.0"].update(dtype=["float32"]),
    "no dtype": lambda spec: spec["sites"]["layers.0"].pop("dtype"),
    "no shape": lambda spec: spec["sites"]["layers.0"].pop("shape"),
    "a shape of text": lambda spec: spec["sites"]["layers.0"].update(shape="8"),
    "a negative shape": lambda spec: spec["sites"]["layers.0"].update(shape=[-8]),
    "a huge shape": lambda spec: spec["sites"]["layers.0"].update(shape=[1 << 50]),
    "a huge shape of nothing": lambda spec: spec["sites"]["layers.0"].update(shape=[0, 1 << 62]),
    "too many dimensions": lambda spec: spec["sites"]["layers.0"].update(shape=[1] * 99),
    "a site that is a number": lambda spec: spec["sites"].update(a=3),
    "sites that are a list": lambda spec: spec.update(sites=[]),
    "no sites": lambda spec: spec.pop("sites"),
    "nesting": lambda spec: spec.update(deep=json.loads("[" * 200 + "]" * 200)),
}


@pytest.mark.parametrize("what", SPEC_FORGERIES)
def test_a_forged_spec_is_refused(store, what):
    forge_spec(store, SPEC_FORGERIES[what])
    with pytest.raises(DamagedError, match=r"spec.json is not what was written"):
        ActivationDataset.open(store)


@pytest.mark.parametrize(
    "raw", [b"", b"null", b"[]", b"3", b'"spec"', b"{}", b"\xff", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000]
)
@pytest.mark.parametrize("name", ["spec.json", "index.json"])
def test_documents_that_are_none_are_refused(store, name, raw):
    (store / name).write_bytes(raw)
    with pytest.raises(DamagedError, match=f"{name} is not what was written"):
        ActivationDataset.open(store).verify()


def test_a_spec_of_a_hundred_megabytes_is_not_read(store):
    with (store / "spec.json").open("r+b") as file:
        file.truncate(100_000_000)
    with pytest.raises(DamagedError, match=r"spec.json has 100000000 bytes, more than the"):
        ActivationDataset.open(store)


ROWS_FORGERIES = {
    "text": "row",
    "too short": [1, 2],
    "negative": [1, -24, 4, 8, False, True, 10, "00000000"],
    "a fraction": [1, 24.0, 4, 8, False, True, 10, "00000000"],
    "no truth": [1, 24, 4, 8, 0, True, 10, "00000000"],
}


@pytest.mark.parametrize("what", ROWS_FORGERIES)
def test_a_forged_row_of_an_index_is_not_believed(store, what):
    document = json.loads((store / "index.json").read_bytes())
    document["shards"][1] = ROWS_FORGERIES[what]
    document.pop("crc32")
    document["crc32"] = f"{zlib.crc32(canonical(document)):08x}"
    (store / "index.json").write_bytes(canonical(document) + b"\n")
    assert len(ActivationDataset.open(store)[...]) == 72
    with pytest.raises(DamagedError, match=r"index.json is not what was written"):
        ActivationDataset.open(store).verify()


# Interventions.


@pytest.fixture
def steering(tmp_path):
    save_intervention(SteeringVectors("h", torch.ones(3)), tmp_path / "steering")
    return tmp_path / "steering"


@pytest.mark.parametrize("impostor", IMPOSTORS)
@pytest.mark.parametrize("name", ["intervention.json", "tensors.safetensors"])
def test_what_is_no_regular_file_of_an_intervention_is_not_read(steering, tmp_path, impostor, name):
    secret = tmp_path / "secret"
    secret.write_bytes((steering / name).read_bytes())
    IMPOSTORS[impostor](steering / name, secret)
    with pytest.raises(DamagedError, match=r"cannot be opened as a regular file|is no regular file"):
        load_intervention(steering)


INTERVENTION_FORGERIES = {
    "tensors elsewhere": lambda said: said.update(tensors="../secret.safetensors"),
    "tensors by an absolute path": lambda said: said.update(tensors="/etc/passwd"),
    "tensors that are a list": lambda said: said.update(tensors=[]),
    "a selector that is a number": lambda said: said["arguments"].update(selector=3),
    "no selector": lambda said: said["arguments"].pop("selector"),
    "a pattern without an end": lambda said: said["arguments"].update(selector="("),
    "a slice of text": lambda said: said["arguments"].update(selector={"slice": "abcd"}),
    "two kinds at once": lambda said: said["arguments"].update(selector={"slice": [], "list": []}),
    "an unknown argument": lambda said: said["arguments"].update({"__class__": 1}),
    "arguments that are a list": lambda said: said.update(arguments=[]),
    "functions that are a number": lambda said: said.update(give_again=3),
    "deep nesting": lambda said: said["arguments"].update(vectors=json.loads('{"list":[' * 40 + "]}" * 40)),
}


@pytest.mark.parametrize("what", INTERVENTION_FORGERIES)
def test_a_forged_intervention_is_refused_by_the_name_of_its_file(steering, what):
    said = json.loads((steering / "intervention.json").read_text())
    INTERVENTION_FORGERIES[what](said)
    (steering / "intervention.json").write_text(json.dumps(said))
    with pytest.raises(DamagedError, match=r"intervention.json"):
        load_intervention(steering)


def test_an_intervention_with_another_ones_tensors_is_refused(steering):
    write_tensors({"other": torch.ones(3)}, steering / "tensors.safetensors")
    with pytest.raises(DamagedError, match="does not fit its tensors"):
        load_intervention(steering)
