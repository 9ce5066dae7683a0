"""The in-memory layer: the call forms that are in use elsewhere, and none of the faults known of them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harvesting.harvest_data import Counting, Padded, Tokens, batches_of, encoder, gpt2, llama
from model_state import state_of
from rounding import assert_same_but_rounding
from small_models import MLP, Split
from tdcache.errors import CaptureError, ContextError, DamagedError, SelectionError, StoreError
from tdcache.harvesting import (
    ActivationCollector,
    ActivationStore,
    Layout,
    collect_activations_from_dataloader,
    extract_representations,
    load_activations,
    resolve_hook_points,
    save_activations,
)


def test_a_store_keeps_the_latest_activations_while_it_is_enabled():
    model, x = MLP(), torch.randn(3, 4)
    store = ActivationStore(model, layers=["layers.0", "head"])
    assert (store.enabled, store.activations, store.get("head")) == (False, {}, None)
    store.enable()
    store.enable()  # a second time does nothing
    out = model(x)
    assert store.layer_names == ["layers.0", "head"]
    assert torch.equal(store.get("layers.0"), model.layers[0](x))
    assert torch.equal(store.activations["head"], out)
    assert not store.get("head").requires_grad
    assert store.get("elsewhere") is None
    model(x + 1)
    assert not torch.equal(store.get("head"), out)
    store.clear()
    assert store.activations == {}
    model(x)
    assert torch.equal(store.get("head"), out)
    store.disable()
    store.disable()
    assert torch.equal(store.get("head"), out)


def test_a_store_leaves_no_hook_and_is_a_context_manager():
    model = MLP()
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), ActivationStore(model, ["head"]) as store:
        raise ZeroDivisionError
    assert not store.enabled
    with ActivationStore(model) as store:  # every module by default
        model(torch.ones(2, 4))
    assert set(store.activations) == {"layers.0", "layers.1", "layers.2", "act", "head"}
    assert state_of(model) == before


def test_fault_a_failed_enable_leaks_no_hook():
    model = MLP()
    before = state_of(model)
    store = ActivationStore(model, ["layers.0", "nope"])
    for _ in range(2):
        with pytest.raises(SelectionError, match="pattern 'nope' matches none of"):
            store.enable()
        assert not store.enabled
    with pytest.raises(SelectionError, match="nope"):
        extract_representations(model, TensorDataset(torch.ones(2, 4)), ["layers.0", "nope"], "cpu")
    assert state_of(model) == before


def test_fault_values_are_no_aliases_that_a_later_in_place_operation_changes():
    model, x = Counting(), torch.randn(8, 4)
    expected = model.first(x).detach()
    assert (expected < 0).any()
    with ActivationStore(model, ["first"]) as store:
        model(x)
    assert torch.equal(store.get("first"), expected)
    assert torch.equal(extract_representations(model, TensorDataset(x), ["first"], "cpu")["first"], expected)
    assert torch.equal(collect_activations_from_dataloader(model, [x], ["first"], verbose=False)["first"], expected)


def test_fault_duplicate_names_are_one_and_dots_are_no_wildcards():
    model = MLP()
    store = ActivationStore(model, ["layers.0", "layers.0"])
    with store:
        model(torch.ones(1, 4))
    assert list(store.activations) == ["layers.0"]


def test_fault_outputs_in_mappings_tuples_and_lists_are_captured():
    for kind in (dict, tuple, list):
        model = nn.Sequential(Split(kind, 4))
        found = extract_representations(model, TensorDataset(torch.ones(3, 4)), ["0"], "cpu")
        assert torch.equal(found["0"], model[0].left(torch.ones(3, 4)))


def test_fault_train_and_eval_flags_of_single_modules_come_back():
    model = MLP().train()
    model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    extract_representations(model, TensorDataset(torch.ones(3, 4)), ["head"], "cpu")
    collect_activations_from_dataloader(model, [torch.ones(3, 4)], ["head"], verbose=False)
    assert [module.training for module in model.modules()] == flags


def test_extracted_representations_are_those_of_one_forward_over_everything():
    model, x = MLP(), torch.randn(10, 4)
    for size in (1, 3, 10, 64):
        found = extract_representations(
            model, TensorDataset(x, torch.arange(10)), r"layers\.\d", "cpu", batch_size=size
        )
        assert list(found) == ["layers.0", "layers.1", "layers.2"]
        assert_same_but_rounding(found["layers.0"], model.layers[0](x))
    limited = extract_representations(model, TensorDataset(x), ["head"], "cpu", 4, max_samples=6)
    assert limited["head"].shape == (6, 2)


def test_extraction_runs_no_batch_beyond_the_samples_and_refuses_what_gives_nothing():
    model = Counting()
    extract_representations(model, TensorDataset(torch.ones(20, 4)), ["first"], "cpu", 4, max_samples=8)
    assert model.calls == 2
    with pytest.raises(SelectionError, match="max_samples is at least 1, got 0"):
        extract_representations(model, TensorDataset(torch.ones(2, 4)), ["first"], "cpu", max_samples=0)
    with pytest.raises(SelectionError, match="the dataset holds no sample"):
        extract_representations(model, TensorDataset(torch.ones(0, 4)), ["first"], "cpu")


def test_extraction_from_a_language_model_with_batches_in_mappings():
    model = encoder()
    data = [{"input_ids": torch.arange(3, 9)} for _ in range(5)]
    found = extract_representations(model, data, ["encoder.layer.1"], "cpu", batch_size=2)
    assert found["encoder.layer.1"].shape == (5, 6, 16)


ACTS = {
    "blocks.10.hook_resid_post": torch.randn(3, 4).bfloat16(),
    "a/b": torch.arange(6).view(2, 3),
    "small": torch.randn(4).to(torch.float8_e5m2),
    "half": torch.randn(2, 2).half(),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".memmap"])
def test_fault_names_and_dtypes_survive_saving_and_loading(tmp_path, suffix):
    refused = {"a/b", "small"} if suffix == ".memmap" else set()
    acts = {name: value for name, value in ACTS.items() if name not in refused}
    for name in sorted(refused):
        with pytest.raises(StoreError, match=name):
            save_activations({name: ACTS[name]}, tmp_path / "refused.memmap")
    target = save_activations(acts, tmp_path / "deep" / f"acts{suffix}")
    found = load_activations(target)
    assert found.keys() == acts.keys()
    for name, value in acts.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].float(), value.float())


def test_fault_saving_never_replaces_a_part_of_the_name(tmp_path):
    save_activations({"a": torch.ones(1)}, tmp_path / "acts.step50")
    save_activations({"a": torch.zeros(1)}, tmp_path / "acts.step60")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["acts.step50.npz", "acts.step60.npz"]
    assert load_activations(tmp_path / "acts.step50")["a"] == 1


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".memmap"])
def test_any_name_can_be_saved_and_a_collector_takes_every_suffix(tmp_path, suffix):
    acts = {"file": torch.ones(2), "allow_pickle": torch.zeros(1), "kwds": torch.arange(3)}
    found = load_activations(save_activations(acts, tmp_path / f"names{suffix}"))
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in acts.items()
    }
    collector = ActivationCollector(MLP(), "head")
    with collector:
        collector.model(torch.ones(2, 4))
    assert collector.save_activations(tmp_path / f"x{suffix}") == tmp_path / f"x{suffix}"
    assert torch.equal(
        collector.load_activations(tmp_path / f"x{suffix}")["head"], load_activations(tmp_path / f"x{suffix}")["head"]
    )


def test_loading_executes_nothing_and_names_what_is_damaged(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([object()], dtype=object))
    torch.save({"a": nn.Linear(2, 2)}, tmp_path / "a.pt")
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 4)
    for suffix in (".npz", ".pt", ".safetensors"):
        with pytest.raises(DamagedError, match=rf"a\{suffix}"):
            load_activations(tmp_path / f"a{suffix}")
    with pytest.raises(StoreError, match="is no file of activations; they end in"):
        load_activations(tmp_path / "b.csv")


def test_a_collector_joins_tokens_to_rows_within_an_exact_budget():
    model, x = MLP(), torch.randn(5, 3, 4)
    with ActivationCollector(model, [r"layers\.\d", "head"], max_activations=11) as collector:
        for batch in x.split(2):
            model(batch)
    assert collector.counts == {"layers.0": 11, "layers.1": 11, "layers.2": 11, "head": 11}
    assert collector.full
    wanted = model.layers[0](x).flatten(0, 1)[:11]
    assert_same_but_rounding(collector.get_activations("layers.0")["layers.0"], wanted)  # from batches of 2
    assert set(collector.get_activations()) == set(collector.counts)
    collector.clear()
    assert collector.rows == 0
    with collector:
        model(x[0])
    assert torch.equal(collector.get_activations("head")["head"], model(x[0]))
    with pytest.raises(SelectionError, match="there is no hook point 'tail'"):
        collector.get_activations("tail")


def test_a_collector_leaves_no_hook_and_is_not_open_twice():
    model = MLP()
    before = state_of(model)
    with ActivationCollector(model, "head") as collector, pytest.raises(ContextError, match="is open already"):
        collector.__enter__()
    with pytest.raises(CaptureError, match="saw no value"):
        collector.get_activations("head")
    with pytest.raises(SelectionError, match="max_activations is at least 1"):
        ActivationCollector(model, "head", 0)
    assert state_of(model) == before


def test_fault_a_budget_never_misaligns_the_rows_of_two_hook_points():
    class Twice(MLP):
        def forward(self, x):
            return self.head(self.layers[0](self.layers[0](x)))

    with (
        pytest.warns(UserWarning, match="ran more than once"),
        pytest.raises(CaptureError, match="saw different numbers of rows"),
        ActivationCollector(model := Twice(), ["layers.0", "head"]),
    ):
        model(torch.ones(2, 4))


@pytest.mark.parametrize(
    "batches",
    [
        [torch.arange(3, 15).view(2, 6)] * 3,
        [(torch.arange(3, 15).view(2, 6), torch.zeros(2))] * 3,
        [{"input_ids": torch.arange(3, 15).view(2, 6), "text": "no tensor"}] * 3,
    ],
    ids=["tensors", "tuples", "mappings"],
)
def test_collecting_from_a_loader_takes_batches_of_every_kind_and_stops_when_the_budget_is_met(batches, capsys):
    model = encoder()
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = collect_activations_from_dataloader(
        model, batches, ["encoder.layer.1"], max_activations=20, device="cpu", save_path=None, verbose=True
    )
    handle.remove()
    assert len(calls) == 2
    assert found["encoder.layer.1"].shape == (20, 16)
    assert "row" in capsys.readouterr().err


def test_a_model_that_needs_two_inputs_gets_the_first_two_of_a_tuple():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x, scale):
            return self.head(x * scale)

    model, x = Two(), torch.randn(6, 4)
    batches = [(part, torch.full((2, 1), 3.0), torch.zeros(2)) for part in x.split(2)]
    found = collect_activations_from_dataloader(model, batches, "head", verbose=False)
    assert_same_but_rounding(found["head"], model.head(x * 3))  # from batches of 2


def test_a_layer_that_is_not_there_is_called_so():
    model = MLP()
    for call in (ActivationStore(model, ["head", "tail"]).enable, lambda: extract_representations(model, [1], "hea")):
        with pytest.raises(SelectionError, match=r"layer '(tail|hea)' not found: pattern '(tail|hea)' matches none"):
            call()


def test_collecting_writes_a_file_that_the_collector_reads_again(tmp_path):
    model = gpt2()
    loader = DataLoader(torch.arange(3, 27).view(4, 6), batch_size=2)
    names = ["blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"]
    found = collect_activations_from_dataloader(model, loader, names, 1000, "cpu", tmp_path, False)
    assert [path.name for path in tmp_path.iterdir()] == ["activations.safetensors"]
    again = ActivationCollector.load_activations(tmp_path)
    assert list(again) == list(found)
    assert all(torch.equal(again[name], found[name]) and len(found[name]) == 24 for name in names)
    assert list(ActivationCollector.load_activations(tmp_path, names[:1])) == names[:1]
    with pytest.raises(SelectionError, match=r"has no hook point 'head'; there are 'blocks\.1\.hook_resid_p"):
        ActivationCollector.load_activations(tmp_path, ["head"])
    with pytest.raises(SelectionError, match="the data holds no batch"):
        collect_activations_from_dataloader(model, [], names, verbose=False)
    with pytest.raises(SelectionError, match="say where: give a path"):
        ActivationCollector(model, names).save_activations()


@pytest.mark.parametrize(
    ("make", "block", "attn", "mlp"),
    [
        (gpt2, "h.{}", "attn", "mlp"),
        (llama, "layers.{}", "self_attn", "mlp"),
        (encoder, "encoder.layer.{}", "attention.output.dense", "output.dense"),
        (lambda: Nano(), "transformer.h.{}", "attn", "mlp"),
    ],
    ids=["gpt2", "llama", "bert", "nanochat"],
)
def test_transformerlens_names_mean_the_right_module_and_side(make, block, attn, mlp):
    model = make()
    for prefix, wrapped in (("", model), ("inner.", nn.ModuleDict({"inner": model}))):
        base = prefix + block.format(1)
        for name, expected in {
            "hook_resid_pre": (base, "fwd_pre"),
            "hook_resid_post": (base, "fwd"),
            "hook_attn_out": (f"{base}.{attn}", "fwd"),
            "attn": (f"{base}.{attn}", "fwd"),
            "hook_mlp_out": (f"{base}.{mlp}", "fwd"),
            "mlp": (f"{base}.{mlp}", "fwd"),
        }.items():
            (site,) = resolve_hook_points(wrapped, f"blocks.1.{name}")
            assert (site.path, site.direction) == expected
            assert site.name == f"blocks.1.{name}"


class Nano(nn.Module):
    """The module tree of nanochat."""

    def __init__(self):
        super().__init__()
        block = {"attn": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)}
        blocks = nn.ModuleList(nn.ModuleDict(block) for _ in range(2))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(3, 2), "h": blocks})


def test_resid_pre_is_the_input_of_the_block_and_not_its_output():
    model, ids = gpt2(), torch.arange(3, 9).view(1, 6)
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"]
    found = collect_activations_from_dataloader(model, [ids], names, verbose=False)
    assert torch.equal(found[names[0]], found[names[1]])
    assert not torch.equal(found[names[1]], found[names[2]])


def test_names_of_other_layouts_are_refused_or_given_by_the_user():
    model = MLP()
    with pytest.raises(SelectionError, match=r"'blocks.0.mlp' needs a model of a known layout \('gpt2', .*MLP is not"):
        resolve_hook_points(model, "blocks.0.mlp")
    with pytest.raises(SelectionError, match="layout is one of"):
        resolve_hook_points(model, "blocks.0.mlp", layout="t5")
    with pytest.raises(SelectionError, match=r"means 'h.7', which GPT2Model does not have"):
        resolve_hook_points(gpt2(), "blocks.7.hook_resid_pre")
    with pytest.raises(SelectionError, match="no hook point was given"):
        resolve_hook_points(model, [])
    own = Layout("transformer.h.{layer}", "mlp", "attn")
    (site,) = resolve_hook_points(Nano(), "blocks.1.attn", layout=own)
    assert site.path == "transformer.h.1.mlp"
    assert [site.path for site in resolve_hook_points(model, [r"layers\.\d", "head"])][-1] == "head"
    assert len(batches_of(Tokens(), 4, Padded())) == 6


def test_the_collectors_and_files_have_their_earlier_import_paths_too():
    from tdcache import compat
    from tdcache.harvesting import memory, saved

    assert {getattr(memory, name) is getattr(compat, name) for name in memory.__all__} == {True}
    assert saved.save_activations is compat.save_activations
    assert saved.load_activations is compat.load_activations
