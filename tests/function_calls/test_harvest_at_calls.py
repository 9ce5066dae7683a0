"""Harvests at calls inside forwards: the rows of a plain hook on an eager twin."""

import pytest
import torch

from harvesting.harvest_data import Padded, Tokens, batches_of, encoder
from tdcache import ActivationBuffer, ActivationCaching, harvest
from tdcache.errors import SelectionError

HEADS, WIDTH = 2, 8
SELF = r"encoder\.layer\.\d\.attention\.self"


def values_of(model, batch):
    """Queries, mixtures and patterns of each layer, spelled out, by path."""
    found, handles = {}, []
    for layer in range(2):
        own = model.get_submodule(f"encoder.layer.{layer}.attention.self")

        def note(module, args, kwargs, output, layer=layer):
            hidden = args[0] if args else kwargs["hidden_states"]
            q, k, v = (
                each(hidden).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
                for each in (module.query, module.key, module.value)
            )
            scores = q @ k.transpose(-1, -2) / WIDTH**0.5
            real = batch["attention_mask"][:, None, None].bool()
            pattern = scores.masked_fill(~real, float("-inf")).softmax(-1)
            found[f"encoder.layer.{layer}.attention.self"] = {"q": q, "pattern": pattern, "z": pattern @ v}

        handles.append(own.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def rows_by_hand(model, batches, place):
    rows = {f"encoder.layer.{layer}.attention.self::{place}": [] for layer in range(2)}
    for batch in batches:
        for path, values in values_of(model, batch).items():
            by_token = values[place].transpose(1, 2)
            rows[f"{path}::{place}"].append(by_token[batch["attention_mask"].bool()])
    return {path: torch.cat(each) for path, each in rows.items()}


@pytest.mark.parametrize("place", ["q", "z"])
def test_rows_of_tokens_hold_every_head(tmp_path, place):
    model, data = encoder(), batches_of(Tokens(), 4, Padded("left"))
    store = harvest(model, data, tmp_path / "a.acts", select=rf"{SELF}::{place}")
    expected = rows_by_hand(model, data, place)
    assert set(expected) <= set(store.spec["sites"])
    for path, rows in expected.items():
        assert store.describe(path)[1] == (HEADS, WIDTH)
        # The kernel sums in another order than the twin.
        torch.testing.assert_close(store[...][path], rows, rtol=1e-4, atol=1e-6)


def test_rows_of_samples_hold_whole_patterns(tmp_path):
    model, data = encoder(), batches_of(Tokens(8, longest=2), 4, Padded("left"))
    store = harvest(model, data, tmp_path / "a.acts", select=rf"{SELF}::pattern", rows="samples")
    expected = torch.cat([values_of(model, batch)["encoder.layer.0.attention.self"]["pattern"] for batch in data])
    found = store[...]["encoder.layer.0.attention.self::pattern"]
    # The kernel's softmax is in another order; a row that is masked throughout is zero, and is left out here.
    told = ~expected.isnan().any(-1, keepdim=True)
    torch.testing.assert_close(found * told, expected.nan_to_num() * told, rtol=1e-4, atol=1e-6)


def test_a_function_by_name_and_modules_lie_in_one_store(tmp_path):
    model, data = encoder(), batches_of(Tokens(), 4, Padded("left"))
    select = [r"encoder\.layer\.0\.output::add", r"encoder\.layer\.0\.output\.dense"]
    store = harvest(model, data, tmp_path / "a.acts", select=select)
    with ActivationCaching(select, hold="snapshot").prepare(model) as hooked, torch.no_grad():
        hooked(**data[0])
    real = data[0]["attention_mask"].bool()
    for path in ("encoder.layer.0.output::add", "encoder.layer.0.output.dense"):
        assert torch.equal(store[: int(real.sum())][path], hooked.cache[path][real])


def test_a_buffer_has_the_rows_of_a_harvest_at_calls(tmp_path):
    model, data = encoder(), batches_of(Tokens(), 4, Padded("left"))
    select = [rf"{SELF}::(q|z)", r"encoder\.layer\.1\.intermediate"]
    store = harvest(model, data, tmp_path / "a.acts", select=select)[...]
    rows = torch.cat(list(ActivationBuffer(model, data, select=select, rows=30, batch_size=7)))
    rows = rows[(rows["seq"] * 1000 + rows["pos"]).argsort()]
    assert sorted(rows.keys()) == sorted(store.keys())
    for key in rows.keys():  # noqa: SIM118 - iterating a TensorDict iterates its rows
        assert torch.equal(rows[key], store[key])


def test_a_pattern_of_names_is_refused_in_a_harvest(tmp_path):
    with pytest.raises(SelectionError, match="here they must be known before"):
        harvest(encoder(), batches_of(Tokens(), 4, Padded("left")), tmp_path / "a.acts", select=rf"{SELF}::scaled.*")
