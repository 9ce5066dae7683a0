"""Tests that names which are not what they say are refused."""

import pytest
from torch import nn

import families
from naming.planted import lies
from tdcache.named_places import Names
from tdcache.naming import proved, resolve
from tdcache.naming.prove import verdict_of

pytest.importorskip("transformers")

SHORT = {
    "gemma2": {"zeros", "residual_inside", "factor", "another layer", "before its norm or scale"},
    "gptj": {"attn.contribution and mlp.contribution swapped", "attn.q and attn.k swapped", "factor"},
    "bert": {"attn.contribution and mlp.contribution swapped", "factor", "resid_mid is resid_pre"},
    "granite": {"before its norm or scale", "attn.out and mlp.out swapped", "mlp.pre and mlp.post swapped"},
    "t5": {"an encoder's in a decoder"},
    "llama": {"ln1 and ln2 swapped"},
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("family", SHORT)
def test_a_table_that_lies_is_refused(family):
    model = families.build(family)
    table = proved(model, resolve(model))
    planted = [lie for lie in lies(model, table) if lie.kind in SHORT[family]]
    if family == "gemma2":
        planted = planted[:8] + planted[-3:]
    assert {lie.kind for lie in planted} == SHORT[family]
    for lie in planted:
        verdict = verdict_of(lie.model, lie.table)
        assert set(lie.names) <= set(verdict.refused), lie.kind


@pytest.mark.filterwarnings("default")
def test_the_reason_of_a_refusal_names_the_identity_and_the_error():
    model = families.build("gemma2")
    table = proved(model, resolve(model))
    lie = next(lie for lie in lies(model, table) if lie.kind == "factor")
    reason = proved(lie.model, lie.table).refused["blocks.1.attn.contribution"]
    assert reason.startswith("resid_pre + attn.contribution + mlp.contribution == resid_post is off by ")
    assert reason.endswith(" of the largest value")
    early = next(lie for lie in lies(model, table) if lie.kind == "before its norm or scale")
    with pytest.raises(ValueError, match="is refused for Gemma2ForCausalLM: resid_pre"):
        proved(early.model, early.table)["blocks.1.attn.contribution"]


def test_a_name_that_no_identity_reaches_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    table = Names({"blocks.0.ln1": "1.0", "blocks.0.mlp.out": "1.1", "mine": "1"})
    found = proved(model, table)
    assert list(found) == ["mine"]  # a word of the user's own says nothing that could be wrong
    assert found.refused["blocks.0.ln1"].startswith(
        "no identity of the proof reaches it: name what it is computed from"
    )
