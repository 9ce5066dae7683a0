"""Harvests of canonical names: sites are called by their names, and another meaning is another store."""

import pytest
import torch

from named_model import HEADS, Transformer, ids, places, table
from tdcache import ActivationBuffer, ActivationCaching, NamedPlace, Names, SpecError, harvest


def test_rows_are_those_of_the_values_at_the_names(tmp_path):
    model = Transformer().eval()
    names = table(model)
    select = r"blocks\.1\.(attn\.z|resid_mid)"
    store = harvest(model, [{"input": ids()}], tmp_path, select=select, names=names, drop=None, rows="tokens")
    with ActivationCaching(select, names=names).prepare(model) as hooked:
        model(ids())
    assert sorted(store.spec["sites"]) == ["blocks.1.attn.z", "blocks.1.resid_mid"]
    rows = store[:]
    assert torch.equal(rows["blocks.1.attn.z"], hooked.cache["attn.z", 1].reshape(10, HEADS, 4))
    assert torch.equal(rows["blocks.1.resid_mid"], hooked.cache["resid_mid", 1].reshape(10, 8))
    other = Names({**places(), "blocks.1.resid_mid": NamedPlace(path="blocks.1")}, model=model)
    with pytest.raises(SpecError, match="names"):
        harvest(model, [{"input": ids()}], tmp_path, select=select, names=other, drop=None, rows="tokens")


def test_a_buffer_takes_names():
    model = Transformer().eval()
    data = [{"input": ids()}]
    buffer = ActivationBuffer(
        model, data, select="blocks.1.resid_mid", names=table(model), rows=10, batch_size=10, per="tokens", drop=None
    )
    (batch,) = buffer
    with ActivationCaching("blocks.1.resid_mid", names=table(model)).prepare(model) as hooked:
        model(ids())
    whole = hooked.cache["resid_mid", 1].reshape(10, 8)
    assert torch.equal(batch["blocks.1.resid_mid"].sort(0).values, whole.sort(0).values)
