"""The stream as a sum, against formulas written out by hand for each family."""

from dataclasses import replace

import pytest
import regex
import torch

from residual.hand import FAMILIES, TOKENS
from tdcache import residual
from tdcache.errors import CanonicalNameError, ResidualError
from tdcache.named_places import NamedPlace, Names

EXACT = 1e-9  # the sums are of a few float64 numbers of size 1 to 10
FLOAT32_INSIDE = 2e-6  # Gemma2's norms compute in float32 whatever the model's dtype is


def near(found, wanted, tolerance=EXACT):
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("role", ["resid_pre", "resid_mid", "resid_post"])
def test_the_parts_of_every_value_of_the_stream_sum_to_it(case, family, block, role):
    this, of = case(family), f"blocks.{block}.{role}"
    if of in this.table.refused:
        with pytest.raises(CanonicalNameError, match="attention and MLP both read resid_pre"):
            residual.decompose(this.cache, of=of, names=this.table)
        return
    parts = residual.decompose(this.cache, of=of, names=this.table)
    assert parts.of == of
    near(sum(parts.values()), this.cache[of])
    near(parts.total(), this.cache[of])


@pytest.mark.parametrize("family", FAMILIES)
def test_without_of_the_last_value_that_is_kept_is_taken_apart(case, family):
    this = case(family)
    last = [name for name in this.table if name.endswith("resid_post")][-1]
    parts = residual.decompose(this.cache, names=this.table)
    assert parts.of == last
    near(sum(parts.values()), this.cache[last])
    fewer = this.cache.exclude(last)
    assert residual.decompose(fewer, names=this.table).of < last


def test_the_parts_of_gpt2_are_its_embeddings_and_contributions_in_order(case):
    this = case("gpt2")
    parts = residual.decompose(this.cache, of="blocks.1.resid_post", names=this.table)
    assert list(parts.keys()) == [
        "embed", "pos_embed", "blocks.0.attn.contribution", "blocks.0.mlp.contribution", "blocks.1.attn.contribution",
        "blocks.1.mlp.contribution",
    ]  # fmt: skip
    weights = this.model.transformer
    assert torch.equal(parts["embed"], weights.wte.weight[TOKENS])
    assert torch.equal(parts["pos_embed"], weights.wpe.weight[:5].expand(2, 5, 12))
    assert torch.equal(parts["blocks.1.mlp.contribution"], this.cache["blocks.1.mlp.contribution"])


def test_where_embeddings_were_not_kept_their_sum_is_one_part(case):
    this = case("gpt2")
    parts = residual.decompose(this.cache.exclude("pos_embed"), names=this.table)
    assert list(parts.keys())[:2] == ["blocks.0.resid_pre", "blocks.0.attn.contribution"]
    near(sum(parts.values()), this.cache["blocks.2.resid_post"])


def layer_norm_of_a_part(norm, part, whole, *, bias):
    """The formula of a layer norm with the mean and scale of ``whole``."""
    scale = (whole.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    found = norm.weight * (part - part.mean(-1, keepdim=True)) / scale
    return found + norm.bias if bias else found


def test_in_a_post_norm_model_every_part_goes_through_every_norm_of_the_stream(case):
    this = case("bert")
    cache, parts = (
        this.cache,
        {name: this.cache[name].expand(2, 5, 16) for name in ("embed", "pos_embed", "type_embed")},
    )
    norm, whole = this.model.bert.embeddings.LayerNorm, sum(parts.values())
    parts = {key: layer_norm_of_a_part(norm, part, whole, bias=False) for key, part in parts.items()}
    parts["embed_norm.bias"] = norm.bias.expand_as(whole)
    for i, layer in enumerate(this.model.bert.encoder.layer):
        for role, norm, name in (
            ("attn", layer.attention.output.LayerNorm, "ln1"),
            ("mlp", layer.output.LayerNorm, "ln2"),
        ):
            parts[f"blocks.{i}.{role}.contribution"] = cache[f"blocks.{i}.{role}.contribution"]
            whole = sum(parts.values())
            parts = {key: layer_norm_of_a_part(norm, part, whole, bias=False) for key, part in parts.items()}
            parts[f"blocks.{i}.{name}.bias"] = norm.bias.expand_as(whole)
    found = residual.decompose(cache, names=this.table)
    assert list(found.keys()) == list(parts)
    for key, part in parts.items():
        near(found[key], part.detach())


def w_o(this, block):
    """The output projection of a block as ``(in, out)``, and its bias."""
    path = this.table.streams[""].out_projections[block]
    module = this.model.get_submodule(path)
    weight = module.weight.detach()
    return (weight if type(module).__name__ == "Conv1D" else weight.T), module.bias


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gemma2", "granite", "bert")])
def test_heads_are_rows_of_the_output_projection_times_z(case, family):
    this = case(family)
    found = residual.head_results(this.cache, names=this.table)
    blocks = this.table.streams[""].blocks
    heads = this.cache["blocks.0.attn.z"].shape[-2]
    assert len(found.keys()) == blocks * heads
    for block in range(blocks):
        z, (weight, bias) = this.cache[f"blocks.{block}.attn.z"], w_o(this, block)
        size = z.shape[-1]
        for head in range(heads):
            part = z[..., head, :] @ weight[head * size : (head + 1) * size]
            near(found[f"blocks.{block}.attn.head.{head}"], part)
        total = sum(found[f"blocks.{block}.attn.head.{head}"] for head in range(heads))
        near(total + (0 if bias is None else bias.detach()), this.cache[f"blocks.{block}.attn.contribution"])


def test_a_block_without_attention_is_taken_apart_although_its_attention_is_refused(case):
    this = case("gpt2")
    name = "blocks.1.attn.contribution"
    places = {key.replace(name, "blocks.1.mixer.contribution"): place for key, place in this.table.items()}
    cache = this.cache.exclude(name).set("blocks.1.mixer.contribution", this.cache[name])
    why = "no attention call; nearest is 'blocks.1.mixer.contribution'"
    table = Names(places, refused={name: why}, streams=this.table.streams, model=this.model)
    parts = residual.decompose(cache, heads=True, names=table)
    near(sum(parts.values()), this.cache["blocks.2.resid_post"])
    assert "blocks.1.mixer.contribution" in list(parts.keys())
    heads = residual.head_results(cache, names=table)
    assert {key.split(".")[1] for key in heads.keys()} == {"0", "2"}  # noqa: SIM118


def test_rows_and_positions_that_the_model_holds_in_one_axis_are_told_apart(case):
    this = case("gpt2")
    flat, places = this.cache.clone(), dict(this.table)
    for i in range(3):
        for role in ("contribution", "post"):
            name = f"blocks.{i}.mlp.{role}"
            flat[name] = this.cache[name].flatten(0, 1)  # as OPT adds them
            places[name] = replace(places[name], axes=("position", "unit"))
    table = Names(places, streams=this.table.streams, model=this.model)
    parts = residual.decompose(flat, neurons=True, positions=-1, names=table)
    near(sum(parts.values()), this.cache["blocks.2.resid_post"][:, -1])


def test_the_heads_of_granite_are_scaled_as_the_model_scales_them(case):
    this = case("granite")
    found = residual.head_results(this.cache, layers=1, names=this.table)
    weight, _ = w_o(this, 1)
    z = this.cache["blocks.1.attn.z"]
    near(found["blocks.1.attn.head.2"], 0.22 * z[..., 2, :] @ weight[8:12])


def this_head(this, block, head):
    """What one head adds, by the weights of Llama."""
    z, (weight, _) = this.cache[f"blocks.{block}.attn.z"], w_o(this, block)
    return z[..., head, :] @ weight[4 * head : 4 * head + 4]


@pytest.mark.parametrize("positions", [None, -1, slice(2, 4)])
def test_heads_that_are_scaled_unit_by_unit_without_a_module_are_scaled(case, positions):
    this = case("llama")
    scaled, places = this.cache.clone(), dict(this.table)
    scale = torch.linspace(0.1, 2, 16, dtype=torch.float64)
    name = "blocks.1.attn.contribution"
    scaled[name] = scale * this.cache[name]  # as BEiT multiplies by a parameter
    places[name] = NamedPlace(path="model.layers.1::mul")
    table = Names(places, streams=this.table.streams, model=this.model)
    found = residual.head_results(scaled, layers=1, positions=positions, names=table)
    wanted = residual.head_results(this.cache, layers=1, positions=positions, names=this.table)
    for key, part in wanted.items():
        near(found[key], scale * part)
    row = scaled.apply(lambda value: value[:1])
    last = residual.head_results(row, layers=1, positions=-1, names=table)  # one row, told by the other positions
    near(last["blocks.1.attn.head.2"], scale * this_head(this, 1, 2)[:1, -1])
    one = scaled.apply(lambda value: value[:1, :1])
    with pytest.raises(
        ResidualError, match=r"'blocks.1.attn.contribution' is not what 'model.layers.1.self_attn.o_proj'"
    ):
        residual.head_results(one, layers=1, names=table)


def test_the_heads_of_gemma2_go_through_the_norm_after_attention_with_its_scale_frozen(case):
    this = case("gemma2")
    found = residual.head_results(this.cache, layers=[2], names=this.table)
    weight, _ = w_o(this, 2)
    z, norm = this.cache["blocks.2.attn.z"], this.model.model.layers[2].post_attention_layernorm
    whole = z.flatten(-2) @ weight
    scale = (whole.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    for head in range(4):
        part = (1 + norm.weight.detach()) * (z[..., head, :] @ weight[6 * head : 6 * head + 6]) / scale
        near(found[f"blocks.2.attn.head.{head}"], part, FLOAT32_INSIDE)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_heads_neurons_and_biases_sum_to_the_stream(case, family):
    this = case(family)
    parts = residual.decompose(this.cache, heads=True, neurons=True, names=this.table)
    inner = this.cache["blocks.0.mlp.post"].shape[-1]
    assert sum(key.startswith("blocks.0.mlp.neuron.") for key in parts.keys()) == inner  # noqa: SIM118
    biased = "blocks.0.attn.bias" in list(parts.keys())
    assert biased == (w_o(this, 0)[1] is not None)
    near(sum(parts.values()), this.cache[parts.of], FLOAT32_INSIDE if family == "gemma2" else EXACT)


@pytest.mark.parametrize("family", ["gpt2", "llama", "own"])
def test_neurons_are_rows_of_the_down_projection_times_the_activation(case, family):
    this = case(family)
    found = residual.neuron_results(this.cache, layers=1, neurons=[0, 7], names=this.table)
    assert list(found.keys()) == ["blocks.1.mlp.neuron.0", "blocks.1.mlp.neuron.7"]
    module = this.model.get_submodule(this.table.streams[""].down_projections[1])
    row = module.weight[7] if family == "gpt2" else module.weight[:, 7]
    scale = this.model.layers[1].scale.weight if family == "own" else 1
    near(found["blocks.1.mlp.neuron.7"], (this.cache["blocks.1.mlp.post"][..., 7:8] * row * scale).detach())


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "own", "granite"])
def test_onto_gives_products_with_a_direction_without_the_pieces(case, family):
    this = case(family)
    generator = torch.Generator().manual_seed(1)
    for shape in ((), (2, 5)):
        direction = torch.randn(*shape, this.cache["blocks.0.resid_pre"].shape[-1], generator=generator).double()
        for results in (residual.head_results, residual.neuron_results):
            whole = results(this.cache, names=this.table)
            short = results(this.cache, onto=direction, names=this.table)
            assert list(short.keys()) == list(whole.keys())
            for key in whole.keys():  # noqa: SIM118
                near(short[key], (whole[key] * direction).sum(-1))


def test_the_remainder_is_what_the_pieces_leave_of_the_stream(case):
    this = case("llama")
    found = residual.head_results(this.cache, remainder=True, names=this.table)
    near(sum(found.values()), this.cache["blocks.2.resid_post"])
    direction = torch.ones(16, dtype=torch.float64)
    found = residual.neuron_results(this.cache, onto=direction, remainder=True, names=this.table)
    near(sum(found.values()), this.cache["blocks.2.resid_post"].sum(-1))


def test_accumulated_is_the_stream_before_each_block_and_after_the_last(case):
    this = case("gpt2")
    found = residual.accumulated(this.cache, names=this.table)
    assert list(found.keys()) == [f"blocks.{i}.resid_pre" for i in range(3)] + ["blocks.2.resid_post"]
    found = residual.accumulated(this.cache, mid=True, of="blocks.1.resid_mid", names=this.table)
    assert list(found.keys()) == [
        "blocks.0.resid_pre",
        "blocks.0.resid_mid",
        "blocks.1.resid_pre",
        "blocks.1.resid_mid",
    ]
    assert all(torch.equal(value, this.cache[key]) for key, value in found.items())
    found = residual.accumulated(this.cache, mid=True, of="blocks.1.resid_pre", names=this.table)
    assert list(found.keys())[-2:] == ["blocks.0.resid_mid", "blocks.1.resid_pre"]


def test_a_value_before_a_block_is_that_after_the_block_before(case):
    this = case("gpt2")
    fewer = this.cache.exclude("blocks.1.resid_pre", "blocks.2.resid_pre")
    found = residual.accumulated(fewer, names=this.table)
    assert torch.equal(found["blocks.2.resid_pre"], this.cache["blocks.1.resid_post"])


def test_a_role_is_stacked_over_its_blocks(case):
    this = case("llama")
    found = residual.stack_activation(this.cache, "attn.z", names=this.table)
    assert found.shape == (3, 2, 5, 4, 4)
    assert torch.equal(found[2], this.cache["blocks.2.attn.z"])
    some = residual.stack_activation(this.cache, "attn.z", layers=[-1, 0], names=this.table)
    assert torch.equal(some, found[[2, 0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_of_what_is_needed_suffices(case, family):
    this = case(family)
    pattern = residual.needed(this.table, heads=True, neurons=family != "mixtral", mid=family != "neox")
    kept = this.cache.select(*[key for key in this.cache.keys() if regex.fullmatch(pattern, key)])  # noqa: SIM118
    assert len(kept.keys()) < len(this.cache.keys()) or family in ("own", "granite", "gemma2", "mixtral")
    parts = residual.decompose(kept, heads=True, names=this.table)
    near(sum(parts.values()), this.cache[parts.of], FLOAT32_INSIDE if family == "gemma2" else EXACT)
    residual.accumulated(kept, mid=family != "neox", names=this.table)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "neox"])
def test_gradients_flow_to_live_values_and_not_to_parameters(case, family):
    this = case(family)
    z = this.cache["blocks.1.attn.z"].clone().requires_grad_()
    live = this.cache.clone().set("blocks.1.attn.z", z)
    parts = residual.decompose(live, heads=True, names=this.table)
    part = parts["blocks.1.attn.head.1"]
    (grad,) = torch.autograd.grad(part.sum(), z)
    assert bool(grad[..., 1, :].any())
    assert not bool(grad[..., [0, *range(2, z.shape[-2])], :].any())
    assert not parts["blocks.0.attn.head.0"].requires_grad


def test_half_precision_is_summed_in_single(case):
    this = case("llama")
    half = this.cache.to(torch.bfloat16)
    parts = residual.decompose(half, heads=True, names=this.table)
    assert {part.dtype for part in parts.values()} == {torch.float32}
    # bfloat16 has 8 bits: each of seven terms of size 10 may be off by 0.02
    torch.testing.assert_close(parts.total(), this.cache["blocks.2.resid_post"].float(), rtol=0, atol=0.2)


@pytest.mark.parametrize("family", ["gpt2", "neox", "bert"])
@pytest.mark.parametrize("lie", ["zeros", "residual inside", "a factor", "another layer", "swapped"])
def test_contributions_that_are_not_what_was_added_are_refused(case, family, lie):
    this = case(family)
    cache, name = this.cache.clone(), "blocks.1.attn.contribution"
    true = cache[name]
    if lie == "zeros":
        cache[name] = 0 * true
    elif lie == "residual inside":
        cache[name] = true + cache["blocks.1.resid_pre"]
    elif lie == "a factor":
        cache[name] = 1.01 * true
    elif lie == "another layer":
        cache[name] = cache["blocks.2.attn.contribution"]
    else:
        cache[name], cache["blocks.1.mlp.contribution"] = cache["blocks.1.mlp.contribution"], true
    at = "resid_post" if family == "neox" else "resid_mid"
    if (family, lie) == ("neox", "swapped"):  # the sum is the same; the projection tells
        with pytest.raises(ResidualError, match=r"'blocks\.1\.attn\.contribution' is not what"):
            residual.decompose(cache, heads=True, names=this.table)
        return
    with pytest.raises(ResidualError, match=rf"'blocks\.1\.{at}' differs by .* from the sum of what was written"):
        residual.decompose(cache, names=this.table)
