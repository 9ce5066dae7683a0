"""Interventions in a directory: data comes back, functions are asked for, damaged files are refused."""

import inspect
import json

import pytest
import regex
import torch
from tensordict import TensorDict
from torch import nn

from small_models import MLP
from stable_ids import stable_id
from tdcache import (
    Ablation,
    ActivationAddition,
    ActivationPatching,
    CausalTracing,
    HookedModule,
    Intervention,
    PathPatching,
    ResumeFrom,
    SteeringVectors,
    cache_activations,
    load_intervention,
    save_intervention,
)
from tdcache.errors import DamagedError, StoreError
from tdcache.store.files import Files


def metric(data):
    return data["output"].sum()


CASES = [
    SteeringVectors(r"layers\.\d", torch.randn(4), coefficient=2.5),
    SteeringVectors(["layers.0", "head"], {"layers.0": torch.randn(4), "head": torch.randn(2)}, match="prefix"),
    SteeringVectors("head", torch.randn(2).bfloat16(), units=slice(0, 2), positions=None),
    Ablation("layers.1", "project", torch.randn(2, 4), center=torch.randn(4)),
    Ablation("layers.1", "resample", TensorDict({"layers.1": torch.randn(9, 4)}), seed=5, units=[0, 3]),
    ActivationPatching("layers.1", source=TensorDict({"layers.1": torch.randn(5, 4)}), units=torch.tensor([1])),
    ActivationPatching("layers.1", source=TensorDict({"fwd": TensorDict({"layers.1": torch.randn(5, 4)})})),
]


@pytest.mark.parametrize("intervention", CASES, ids=stable_id)
def test_what_is_loaded_does_the_same_to_another_copy_of_the_model(intervention, model, x, tmp_path):
    save_intervention(intervention, tmp_path / "saved")
    loaded = load_intervention(tmp_path / "saved")
    other = MLP()
    other.load_state_dict(model.state_dict())
    assert type(loaded) is type(intervention)
    with intervention.prepare(model) as hooked:
        expected = hooked(x)
    with loaded.prepare(other) as hooked:
        assert torch.equal(hooked(x), expected)
    assert not torch.equal(expected, model(x))


def test_every_kind_comes_back_with_its_arguments(tmp_path):
    kinds = [
        (ActivationAddition("0", coefficient=0.5, pool="last", mask_key="mask", steps="decode"), {}),
        (PathPatching("a", "out", freeze=["a", "b"], units=slice(4, 8), direction="fwd_pre"), {}),
        (CausalTracing("h", "wte", subject=[1, 2], metric=metric, window=3, sweep=True), {"metric": metric}),
        (ActivationPatching("h", sweep=("position", "head"), heads=2, metric=metric, chunk=3), {"metric": metric}),
        (SteeringVectors("h", steer_fn=metric), {"steer_fn": metric}),
        (ResumeFrom("0", torch.ones(2)), {}),
    ]
    for number, (intervention, functions) in enumerate(kinds):
        save_intervention(intervention, tmp_path / str(number))
        loaded = load_intervention(tmp_path / str(number), **functions)
        for name in inspect.signature(type(intervention)).parameters:
            there, here = getattr(loaded, name), getattr(intervention, name)
            assert type(there) is type(here), name
            assert torch.equal(there, here) if isinstance(here, torch.Tensor) else there == here, name


def test_lists_and_tuples_stay_what_they_are(tmp_path):
    save_intervention(SteeringVectors(["a", "b"], torch.ones(3), pick=(0, 1)), tmp_path)
    loaded = load_intervention(tmp_path)
    assert loaded.pick == (0, 1)
    assert loaded.selector == ["a", "b"]


def test_files_that_were_written_before_there_were_tuples_are_read(tmp_path):
    save_intervention(SteeringVectors(("a", "b"), torch.ones(3)), tmp_path)
    edit(tmp_path, lambda config: config["arguments"].update(selector={"list": ["a", "b"]}))
    assert load_intervention(tmp_path).selector == ["a", "b"]


def test_the_files_are_json_and_safetensors(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    vectors = {"layers.0": torch.randn(4), "head": torch.randn(2)}
    save_intervention(SteeringVectors(["layers.0", "head"], vectors), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["intervention.json", "tensors.safetensors"]
    config = json.loads((tmp_path / "intervention.json").read_text())
    assert config["kind"] == "SteeringVectors"
    stored = load_file(tmp_path / "tensors.safetensors")
    assert torch.equal(stored["vectors/head"], vectors["head"])


def test_a_cache_of_a_model_is_saved_as_it_is(model, x, tmp_path):
    with cache_activations(model, r"layers\.\d") as cache:
        model(x)
    save_intervention(ActivationPatching(r"layers\.\d", source=cache), tmp_path)
    with load_intervention(tmp_path).prepare(model) as hooked:
        assert torch.equal(hooked(torch.randn(5, 4)), model.head(model.act(nn.functional.gelu(cache["layers.2"]))))


def test_functions_have_to_be_given_again(tmp_path):
    save_intervention(SteeringVectors("h", steer_fn=metric), tmp_path)
    with pytest.raises(StoreError, match="without its functions: give 'steer_fn' to load_intervention, got none"):
        load_intervention(tmp_path)
    with pytest.raises(StoreError, match="got 'patch_fn'"):
        load_intervention(tmp_path, patch_fn=metric)


class OfOnesOwn(Intervention):
    pass


def test_what_is_no_data_is_refused_with_the_remedy(model, x, tmp_path):
    with HookedModule.from_module(model).run(x) as run:
        proxy = run.get("head")
    for intervention, message in (
        (Ablation(regex.compile("head")), "compiled pattern; use its text"),
        (Ablation(nn.Linear), "selector can be saved as a regex"),
        (Ablation(lambda path, module: True), "selector can be saved as a regex"),
        (ActivationPatching("head", source=proxy), "resolve the proxy of a run first"),
        (OfOnesOwn("head"), "could not be loaded again"),
    ):
        with pytest.raises(StoreError, match=message):
            save_intervention(intervention, tmp_path / "none")


def edit(folder, change):
    file = folder / "intervention.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "intervention.json").unlink(), "is missing; is .* the directory of an intervention"),
        (lambda folder: (folder / "tensors.safetensors").unlink(), "tensors.safetensors is missing"),
        (lambda folder: (folder / "intervention.json").write_text("{"), "is no valid JSON"),
        (lambda folder: (folder / "intervention.json").write_text("[" * 100_000), "is no valid JSON"),
        (lambda folder: (folder / "intervention.json").write_text("[]"), "does not describe an intervention"),
        (
            lambda folder: edit(folder, lambda config: config.update(kind="os.system")),
            "does not describe an intervention",
        ),
        (lambda folder: edit(folder, lambda config: config.update(kind=["x"])), "does not describe an intervention"),
        (lambda folder: edit(folder, lambda config: config.update(format=99)), "is of format 99"),
        (
            lambda folder: edit(folder, lambda config: config.update(tensors="../other")),
            r"names '\.\./other' as its tensors, not 'tensors\.safetensors'",
        ),
        (lambda folder: edit(folder, lambda config: config["arguments"].update(other=1)), "has no argument 'other'"),
        (
            lambda folder: edit(folder, lambda config: config["arguments"].update(vectors={"tensor": "gone"})),
            "does not fit its tensors",
        ),
        (
            lambda folder: edit(folder, lambda config: config["arguments"].update(vectors={"tensor": []})),
            "does not fit its tensors",
        ),
        (
            lambda folder: edit(folder, lambda config: config["arguments"].update(vectors={"code": "1"})),
            "unknown kind of value",
        ),
        (lambda folder: edit(folder, lambda config: config["arguments"].update(vectors=[1])), "holds a bare list"),
        (lambda folder: (folder / "tensors.safetensors").write_bytes(b"\x08"), "tensors.safetensors"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    save_intervention(SteeringVectors("h", torch.ones(3)), tmp_path)
    damage(tmp_path)
    with pytest.raises(DamagedError, match=message):
        load_intervention(tmp_path)


@pytest.mark.parametrize("failing", ["create", "write", "sync", "replace"])
@pytest.mark.parametrize("which", ["tensors", "intervention.json"])
def test_an_intervention_that_could_not_be_saved_leaves_the_one_that_was_there(tmp_path, monkeypatch, failing, which):
    (tmp_path / "notes.txt").write_text("mine")
    save_intervention(SteeringVectors("old", torch.ones(3)), tmp_path)
    method, passed = getattr(Files, failing), iter([] if which == "tensors" else [True, *[True] * (failing == "write")])

    def refuse(files, *args):
        if next(passed, False):  # the tensors are written first: a header and one tensor
            return method(files, *args)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Files, failing, refuse)
        with pytest.raises(StoreError, match="could not be written: No space left on device; what was there before"):
            save_intervention(SteeringVectors("new", torch.zeros(4)), tmp_path)
    found = load_intervention(tmp_path)
    assert found.selector == "old"
    assert torch.equal(found.vectors, torch.ones(3))
    save_intervention(SteeringVectors("new", torch.zeros(4)), tmp_path)
    assert load_intervention(tmp_path).selector == "new"
    assert sum(path.suffix == ".safetensors" for path in tmp_path.iterdir()) == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_intervention_is_saved_over_itself_again_and_again(tmp_path):
    for number in range(4):
        save_intervention(SteeringVectors("h", torch.full((2,), float(number))), tmp_path)
        assert torch.equal(load_intervention(tmp_path).vectors, torch.full((2,), float(number)))
        assert len(list(tmp_path.iterdir())) == 2


def test_every_option_comes_back(tmp_path):
    given = {
        "positions": slice(-2, None), "heads": (4, [1, 3]), "rows": torch.tensor([True, False]), "calls": [0, 2],
        "direction": "fwd_pre", "pick": (1, 0), "steps": "decode", "mask_key": "~pad", "match": "search",
        "position_dim": 2, "unit_dim": -2,
    }  # fmt: skip
    save_intervention(Ablation("0", **given), tmp_path)
    found = load_intervention(tmp_path)
    assert torch.equal(found.rows, given.pop("rows"))
    assert {name: getattr(found, name) for name in given} == given
