import pickle

import pytest
from torch import nn

from tdcache import CanonicalNameError, NamedPlace, Names, SelectionError
from tdcache.named_places import ResidualStream
from tdcache.named_proof import Proof, ProvedIdentity

PATTERN = "blocks.{}.attn.pattern"
MID = "attention and MLP read the same value; nearest is 'blocks.{}.resid_pre'"


def table(layers=3, **options):
    places = {"embed": "wte", "final_norm": NamedPlace(path="ln_f", note="LayerNorm")}
    for layer in range(layers):
        axes = ("batch", "head", "query", "key")
        places[PATTERN.format(layer)] = NamedPlace(path=f"h.{layer}.attn::pattern", axes=axes)
        places[f"blocks.{layer}.resid_pre"] = NamedPlace(path=f"h.{layer}", side="fwd_pre", pick=0)
    return Names(places, refused={f"blocks.{layer}.resid_mid": MID.format(layer) for layer in range(layers)}, **options)


def test_a_table_maps_names_to_places_that_carry_their_name():
    names = table()
    assert names["embed"] == NamedPlace(name="embed", path="wte")
    assert names["blocks.2.resid_pre"].where == "input of h.2[0]"
    assert list(names)[:2] == ["embed", "final_norm"]
    assert len(names) == 8
    assert "embed" in names
    assert "blocks.0.resid_mid" not in names
    assert names.get("nothing") is None
    assert names.get("embed") is names["embed"]


def test_an_unknown_name_is_refused_with_the_nearest_ones():
    with pytest.raises(CanonicalNameError) as caught:
        table()["blocks.1.attn.patern"]
    assert caught.value.args[0] == (
        "'blocks.1.attn.patern' is none of the 8 names of this model; did you mean 'blocks.1.attn.pattern', "
        "'blocks.0.attn.pattern', 'blocks.2.attn.pattern'?"
    )
    assert caught.value.near[0] == "blocks.1.attn.pattern"
    assert isinstance(caught.value, SelectionError)
    with pytest.raises(KeyError, match=r"^3 is none of the 8 names of this model; print\(table\) shows the names that"):
        table()[3]


def test_a_refused_name_is_refused_with_its_reason():
    with pytest.raises(CanonicalNameError) as caught:
        table(model=nn.Linear(1, 1))["blocks.1.resid_mid"]
    assert caught.value.args[0] == (
        "'blocks.1.resid_mid' is refused for Linear: attention and MLP read the same value; nearest is "
        "'blocks.1.resid_pre'"
    )
    assert caught.value.reason == MID.format(1)


def test_a_printed_table_has_one_row_for_what_differs_only_in_the_block():
    assert str(table()).split("\n") == [
        "8 names of a model (not proved)",
        "name                        place                   axes                     note",
        "embed                       wte",
        "final_norm                  ln_f                                             LayerNorm",
        "blocks.{0..2}.attn.pattern  h.{0..2}.attn::pattern  batch, head, query, key",
        "blocks.{0..2}.resid_pre     input of h.{0..2}[0]",
        "refused:",
        "  blocks.{0..2}.resid_mid: attention and MLP read the same value; nearest is 'blocks.{0..2}.resid_pre'",
    ]


def test_a_printed_row_says_calls_heads_and_which_blocks():
    shared = {
        f"blocks.{layer}.attn.z": NamedPlace(path="layer.attn", call=layer, heads=(4, 2), side="fwd_pre")
        for layer in (0, 2, 3)
    }
    assert "blocks.{0,2,3}.attn.z  input of layer.attn, call {0,2,3}, 4 heads" in str(Names(shared))
    assert "blocks.3.attn.z  input of layer.attn, call 3, 4 heads" in str(
        Names({"blocks.3.attn.z": shared["blocks.3.attn.z"]})
    )


def test_the_table_in_a_notebook_is_escaped_html():
    shown = Names(
        {"embed": NamedPlace(path="wte", note="a < b")}, refused={"blocks.0.resid_mid": "x > y"}
    )._repr_html_()
    assert '<td style="text-align:left">embed</td>' in shown
    assert "a &lt; b" in shown
    assert "blocks.0.resid_mid: x &gt; y</p>" in shown


def test_a_proof_is_printed_with_its_errors():
    proof = Proof(
        inputs="ids (2, 7)",
        dtype="float64",
        identities=(
            ProvedIdentity(identity="pre + attn + mlp == post", names=("a", "b"), error=3e-16, tolerance=1e-9),
        ),
        skipped=("blocks.0.attn.q",),
    )
    assert str(proof).split("\n") == [
        "checked on ids (2, 7) in float64",
        "identity                  largest error  allowed  names",
        "pre + attn + mlp == post  3.0e-16        1e-09    2",
        "skipped: blocks.0.attn.q",
    ]
    assert str(table(proof=proof)).startswith("8 names of a model (1 identities proved)")


def test_a_table_holds_its_model_weakly_and_pickles_without_it():
    model = nn.Linear(1, 1)
    names = table(model=model, style="transformer_lens", streams={"": ResidualStream(layouts=("parallel",) * 3)})
    assert names.model is model
    copy = pickle.loads(pickle.dumps(names))
    assert copy.model is None
    assert copy == names
    assert hash(copy) == hash(names)
    assert (copy.model_name, copy.style, copy.streams[""].blocks) == ("Linear", "transformer_lens", 3)
    assert copy.refused == names.refused
    del model
    assert names.model is None
    assert names != table(2)
    assert names != "names"


def test_a_table_and_what_it_says_of_refusals_cannot_be_written():
    with pytest.raises(TypeError):
        table().refused["embed"] = ""
    with pytest.raises(TypeError):
        table()["embed"] = "wte"


def test_a_stream_is_asked_for_by_its_prefix():
    names = table(
        streams={"encoder.": ResidualStream(prefix="encoder."), "decoder.": ResidualStream(prefix="decoder.")}
    )
    assert names.stream("decoder.").prefix == "decoder."
    with pytest.raises(
        CanonicalNameError, match=r"^this model has no residual stream with prefix ''; its prefixes are"
    ):
        names.stream()
    with pytest.raises(CanonicalNameError, match=r"its prefixes are none: its blocks are not known"):
        table().stream()


def test_what_is_no_place_is_refused():
    with pytest.raises(SelectionError, match=r"^'embed' stands for 3 \(int\); a name stands for a path such as"):
        Names({"embed": 3})
    with pytest.raises(SelectionError, match=r"^the side of 'x' is 'fwd' .* or 'fwd_pre' \(what is given\), got 'bwd'"):
        NamedPlace(path="x", side="bwd")
