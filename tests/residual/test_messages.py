"""What is refused, and the words it is refused with."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdcache import residual
from tdcache.errors import CanonicalNameError, ResidualError, SelectionError
from tdcache.named_places import Names
from tdcache.named_streams import ResidualStream
from tdcache.residual.linear import LinearMap, NormStep, run


def test_a_cache_that_does_not_know_its_names_is_refused(case):
    with pytest.raises(
        ResidualError, match=r"this TensorDict does not say which model its names belong to; pass names="
    ):
        residual.decompose(case("gpt2").cache)


def test_an_entry_that_was_not_kept_is_named(case):
    this = case("gpt2")
    cache = this.cache.exclude("blocks.1.mlp.contribution")
    with pytest.raises(ResidualError) as caught:
        residual.decompose(cache, names=this.table)
    assert str(caught.value) == (
        "the cache lacks 'blocks.1.mlp.contribution'; keep what is needed: "
        "ActivationCaching(residual.needed(table), names=table)"
    )
    assert caught.value.names == ("blocks.1.mlp.contribution",)
    with pytest.raises(ResidualError, match=r"the cache lacks 'blocks\.1\.attn\.z'"):
        residual.head_results(this.cache.exclude("blocks.1.attn.z"), names=this.table)
    with pytest.raises(ResidualError, match=r"the cache lacks 'embed'; keep what is needed"):
        residual.decompose(this.cache.exclude("blocks.0.resid_pre", "embed"), names=this.table)
    with pytest.raises(ResidualError, match=r"keeps no 'blocks.0.resid_post', nor that of another block"):
        residual.decompose(this.cache.select("embed"), names=this.table)
    with pytest.raises(ResidualError, match=r"the cache lacks 'blocks.0.attn.z', 'blocks.1.attn.z', 'blocks.2.attn.z'"):
        residual.stack_activation(this.cache.select("embed"), "attn.z", names=this.table)


def test_what_the_model_does_not_have_is_refused_by_its_names(case):
    this = case("neox")
    with pytest.raises(
        CanonicalNameError, match=r"attention and MLP both read resid_pre; nearest is 'blocks.0.resid_pre'"
    ):
        residual.accumulated(this.cache, mid=True, names=this.table)
    this = case("mixtral")
    with pytest.raises(CanonicalNameError, match=r"'blocks.0.mlp.post' is none of the"):
        residual.neuron_results(this.cache, names=this.table)
    this = case("bert")
    for function in (residual.logit_lens, lambda cache, names: residual.token_directions(names, 3)):
        with pytest.raises(
            CanonicalNameError, match=r"a dense layer and an activation stand between the stream and the"
        ):
            function(this.cache, names=this.table)
    with pytest.raises(CanonicalNameError, match=r"'final_norm' is refused"):
        residual.apply_norm(residual.decompose(this.cache, names=this.table))
    with pytest.raises(CanonicalNameError, match=r"no residual stream with prefix 'decoder.'"):
        residual.decompose(this.cache, names=this.table, prefix="decoder.")


def test_a_refused_contribution_refuses_the_decomposition(case):
    this = case("gpt2")
    places = {key: place for key, place in this.table.items() if key != "blocks.1.mlp.contribution"}
    why = "two modules add to the stream there"
    table = Names(places, refused={"blocks.1.mlp.contribution": why}, streams=this.table.streams, model=this.model)
    with pytest.raises(CanonicalNameError, match=rf"'blocks.1.mlp.contribution' is refused for GPT2LMHeadModel: {why}"):
        residual.decompose(this.cache, names=table)
    with pytest.raises(CanonicalNameError, match=why):
        residual.decompose(this.cache.exclude("blocks.1.resid_post"), of="blocks.2.resid_post", names=table)
    assert residual.decompose(this.cache, of="blocks.0.resid_post", names=table).of == "blocks.0.resid_post"


@pytest.mark.parametrize("of", ["embed", "blocks.9.resid_post", "blocks.0.attn.z", "resid_post"])
def test_of_is_a_value_of_the_stream(case, of):
    this = case("gpt2")
    with pytest.raises(
        SelectionError, match=r"is no value of a stream of 3 blocks; it is such as 'blocks.2.resid_post'"
    ):
        residual.decompose(this.cache, of=of, names=this.table)


def test_layers_are_blocks_of_the_model(case):
    this = case("gpt2")
    with pytest.raises(SelectionError, match=r"layers=3 is none of 3 blocks"):
        residual.head_results(this.cache, layers=[0, 3], names=this.table)
    with pytest.raises(SelectionError, match=r"layers= and neurons= mean no piece"):
        residual.neuron_results(this.cache, neurons=[], names=this.table)


def test_an_entry_that_is_no_tensor_is_refused(case):
    this = case("gpt2")
    cache = this.cache.clone().set("blocks.0.attn.contribution", TensorDict({"a": torch.ones(1)}))
    with pytest.raises(ResidualError, match=r"'blocks.0.attn.contribution' is a TensorDict, not one tensor"):
        residual.decompose(cache, names=this.table)
    with pytest.raises(ResidualError, match=r"parts are tensors by name, at least one; got \{\}"):
        residual.Parts().stacked()


def test_a_value_without_an_axis_of_heads_is_refused(case):
    this = case("gpt2")
    cache = this.cache.clone().set("blocks.0.attn.z", this.cache["blocks.0.attn.z"].flatten(-2))
    with pytest.raises(
        ResidualError, match=r"'blocks.0.attn.z' is \(2, 5, 12\), with axes .*'head' and 'unit' are needed"
    ):
        residual.head_results(cache, layers=0, names=this.table)


def test_heads_that_do_not_make_the_contribution_are_refused(case):
    this = case("gpt2")
    cache = this.cache.clone()
    cache["blocks.1.attn.z"] = cache["blocks.2.attn.z"]
    with pytest.raises(
        ResidualError, match=r"'blocks.1.attn.contribution' is not what 'transformer.h.1.attn.c_proj' makes"
    ):
        residual.head_results(cache, names=this.table)
    cache["blocks.1.attn.z"] = cache["blocks.1.attn.z"][:1]
    with pytest.raises(
        ResidualError, match=r"'blocks.1.attn.contribution' is not what 'transformer.h.1.attn.c_proj' makes"
    ):
        residual.head_results(cache, names=this.table)
    stream = ResidualStream(layouts=("pre-norm",) * 3)
    table = Names(dict(this.table), streams={"": stream}, model=this.model)
    with pytest.raises(
        ResidualError, match=r"the table names no projection from heads to 'blocks.0.attn.contribution'"
    ):
        residual.head_results(this.cache, names=table)


def test_a_model_that_is_gone_is_said_to_be(case):
    this = case("gpt2")
    table = Names(dict(this.table), streams=this.table.streams)
    with pytest.raises(ResidualError, match=r"the names no longer know their model, which they hold weakly"):
        residual.logit_lens(this.cache, names=table)


def test_a_norm_that_is_none_cannot_be_frozen(case):
    this = case("gpt2")
    parts = residual.decompose(this.cache, names=this.table)
    with pytest.raises(
        ResidualError, match=r"the scale of the norm 'transformer.h.0.mlp' cannot be frozen: .* is a GPT2MLP"
    ):
        residual.apply_norm(parts, norm="transformer.h.0.mlp")
    two = nn.LayerNorm((3, 4))
    with pytest.raises(ResidualError, match=r"the norm 'two' works on axes \(-2, -1\), not on the units of the stream"):
        NormStep.of(two, "two", torch.randn(2, 3, 4))


def test_a_scale_needs_the_whole_value(case):
    this = case("gpt2")
    some = TensorDict({"embed": this.cache["embed"]})
    with pytest.raises(
        ResidualError, match=r"the scale of a norm is that of the whole value, which this stack does not"
    ):
        residual.apply_norm(some, names=this.table)
    with pytest.raises(
        ResidualError, match=r"'embed' is \(2, 12\), and the value whose scale is frozen is \(2, 5, 12\); for"
    ):
        residual.apply_norm(some.apply(lambda value: value[:, -1]), this.cache, names=this.table)
    parts = residual.decompose(this.cache, names=this.table)
    with pytest.raises(
        ResidualError, match=r"'blocks.1.ln2' as it is kept is not the norm of the value whose scale was to"
    ):
        residual.apply_norm(parts, this.cache, norm="blocks.1.ln2")


def test_a_stack_that_may_have_gone_through_the_norm_is_asked_about(case):
    this = case("gpt2")
    plain = TensorDict({"embed": this.cache["embed"]})
    with pytest.raises(
        ResidualError, match=r"a TensorDict does not say whether the final norm was applied to it; pass"
    ):
        residual.logit_attribution(plain, 3, cache=this.cache, names=this.table)


@pytest.mark.parametrize("tokens", [20, -1, torch.tensor([0.5]), torch.tensor([True, False])])
def test_tokens_are_numbers_of_the_vocabulary(case, tokens):
    this = case("gpt2")
    parts = residual.decompose(this.cache, names=this.table)
    with pytest.raises(ResidualError, match=r"tokens are integers from 0 to 19, got"):
        residual.logit_attribution(parts, tokens)


def test_tokens_fit_the_rows(case):
    this = case("gpt2")
    parts = residual.decompose(this.cache, names=this.table)
    with pytest.raises(
        ResidualError, match=r"tokens of shape \(3,\) do not fit 'embed', which is \(2, 5, 12\): give one token"
    ):
        residual.logit_attribution(parts, torch.tensor([1, 2, 3]))
    with pytest.raises(ResidualError, match=r"tokens of shape \(3,\) do not fit the logits of 'blocks.0.resid_pre'"):
        residual.logit_lens(this.cache, tokens=torch.tensor([1, 2, 3]), names=this.table)


class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return (x @ self.weight.T) ** 2


class Odd(nn.Module):
    def forward(self, x):
        return x if x.ndim > 5 else ()


def test_a_module_that_is_not_affine_is_no_projection():
    with pytest.raises(
        ResidualError, match=r"'path' is a Squared that cannot be taken as x @ weight \+ bias: it differs by"
    ):
        LinearMap.of(Squared(), "path", 4)
    with pytest.raises(ResidualError, match=r"it raised RuntimeError at a probe"):
        LinearMap.of(Squared(), "path", 5)
    with pytest.raises(ResidualError, match=r"it returned \(10, 1\) for \(2, 5\)"):
        LinearMap.of(Column(), "path", 5)
    with pytest.raises(ResidualError, match=r"Odd returned no tensor"):
        run(Odd(), torch.ones(1))


class Column(nn.Module):
    def forward(self, x):
        return x.reshape(-1, 1)


def test_an_unembedding_of_unknown_width_is_refused_for_directions_alone(case):
    this = case("gpt2")
    model = nn.Sequential(Squared())
    table = Names({"unembed": "0"}, streams={"": ResidualStream(unembed="0")}, model=model)
    with pytest.raises(
        ResidualError, match=r"'0' is a Squared that does not say in in_features how wide the stream is"
    ):
        residual.token_directions(table, 1)
    assert this.table["embed"].path


def test_a_lens_is_fitted_to_something(case):
    this = case("gpt2")
    with pytest.raises(ResidualError, match=r"fitted to at least one cache in at least one step, got 0 and 250"):
        residual.tuned_lens([], names=this.table)
    lens = residual.tuned_lens(this.cache, steps=1, names=this.table)
    with pytest.raises(
        ResidualError, match=r"this lens has no translator for 'blocks.0.resid_mid'; it has blocks.0.resid_pre,"
    ):
        lens.translate("blocks.0.resid_mid", this.cache["blocks.0.resid_mid"])
