"""Attribution at canonical names gives what it gives at the paths behind them."""

import pytest
import torch
from tensordict import TensorDict

from named_model import HEADS, LAYERS, Transformer, ids, table
from tdcache import AttributionError, CanonicalNameError, DirectionError, Names
from tdcache.attribution import (
    AttentionRollout,
    AttributionPatching,
    DirectLogitAttribution,
    EdgeAttributionPatching,
    GradientXActivation,
    LogitLens,
    StopGradient,
    attention_rollout,
)
from tdcache.named_places import ResidualStream


def right(data):
    return data["output"][:, -1, 3] - data["output"][:, -1, 4]


@pytest.fixture(scope="module")
def model():
    return Transformer().eval()


@pytest.fixture(scope="module")
def names(model):
    return table(model)


def scores(factory, model, **entries):
    with factory.prepare(model) as hooked:
        return hooked(TensorDict({"input": ids(), **entries}, batch_size=[2]))


def test_scores_are_keyed_by_names_and_those_of_the_paths(model, names):
    by_name = scores(GradientXActivation(r"blocks\.\d\.(attn\.z|resid_post)", target=right, names=names), model)
    by_path = scores(GradientXActivation(r"blocks\.\d", target=right), model)
    inputs = scores(GradientXActivation(r".*attn\.out", direction="fwd_pre", target=right), model)
    for layer in range(LAYERS):
        assert torch.equal(by_name["attr", f"blocks.{layer}.resid_post"], by_path["attr", f"blocks.{layer}"])
        z = by_name["attr", f"blocks.{layer}.attn.z"]
        assert z.shape == (2, 5, HEADS, 4)
        assert torch.equal(z.flatten(-2), inputs["attr", f"blocks.{layer}.attn.out"])
    assert torch.equal(by_name["output"], model(ids()))


def test_patching_and_its_edges_are_between_names(model, names):
    corrupt = {"corrupt": TensorDict({"input": torch.flip(ids(), dims=[1])}, batch_size=[2])}
    drop = r"blocks\.(?P<layer>\d)\.(attn|mlp)\.contribution"
    by_name = AttributionPatching(r"blocks\.\d\.mlp\.contribution", target=right, drop=drop, names=names)
    by_path = AttributionPatching(r"blocks\.\d\.mlp", target=right, drop=r"blocks\.(?P<layer>\d)\.(attn|mlp)")
    found, expected = scores(by_name, model, **corrupt), scores(by_path, model, **corrupt)
    for layer in range(LAYERS):
        key = f"blocks.{layer}.mlp"
        assert torch.equal(found["attr", f"{key}.contribution"], expected["attr", key])
    writers, readers = r"blocks\.\d\.(attn|mlp)\.contribution", "final_norm"
    edges = scores(EdgeAttributionPatching(writers, readers, target=right, names=names), model, **corrupt)
    plain = EdgeAttributionPatching(r"blocks\.\d\.(attn|mlp)", "norm", target=right)
    expected = scores(plain, model, **corrupt)
    assert torch.equal(
        edges["attr", "blocks.1.attn.contribution", "final_norm"], expected["attr", "blocks.1.attn", "norm"]
    )


def test_the_logit_lens_needs_the_names_alone(model, names):
    found = scores(LogitLens(names=names), model)
    assert [key for key in found["attr"].keys()] == names.in_blocks("resid_post")  # noqa: SIM118, C416  a TensorDict
    assert torch.equal(found["attr", "blocks.2.resid_post"], model(ids()))
    capped = ResidualStream(layouts=("",), final_norm="norm", unembed="head", logit_scale=2.0, logit_softcap=3.0)
    some = Names({"blocks.0.resid_post": "blocks.2"}, streams={"": capped}, model=model)
    expected = 3 * torch.tanh(2 * model(ids()) / 3)
    assert torch.equal(scores(LogitLens(names=some), model)["attr", "blocks.0.resid_post"], expected)
    given = LogitLens("blocks.1.resid_post", norm="final_norm", unembed="unembed", names=names)
    assert torch.equal(scores(given, model)["attr", "blocks.1.resid_post"], found["attr", "blocks.1.resid_post"])
    with pytest.raises(TypeError, match=r"^LogitLens takes a selector, norm= and unembed=, or names=tdcache.names"):
        LogitLens("blocks")
    with pytest.raises(CanonicalNameError, match=r"^'unembed' is none of the 1 names"):
        scores(LogitLens("x", names=Names({"x": "blocks.0"}, model=model)), model)


def test_direct_logit_attribution_sums_to_the_target_with_the_names_alone(model, names):
    found = scores(DirectLogitAttribution(names=names, target=right), model)
    parts = found["attr"].exclude("bias")
    assert len(parts.keys()) == 1 + 2 * LAYERS
    total = sum(part.sum(1) for part in parts.values()) + found["attr", "bias"]
    assert torch.allclose(total, right({"output": model(ids())}), atol=1e-5)  # sums of seven parts in float32
    stream = ResidualStream(layouts=("post-norm",), final_norm="norm", unembed="head")
    normed = Names({"final_norm": "norm"}, streams={"": stream}, model=model)
    with pytest.raises(AttributionError, match=r"^the blocks of Transformer norm the stream after each addition"):
        DirectLogitAttribution(names=normed, target=right)
    with pytest.raises(TypeError, match=r"^DirectLogitAttribution takes writers and norm=, or names=tdcache.names"):
        DirectLogitAttribution("blocks", target=right)


def test_rollout_needs_the_names_alone(model, names):
    found = scores(AttentionRollout(names=names), model)["attr", "rollout"]
    patterns = []
    x = model.embed(ids())
    for block in model.blocks:
        patterns.append(block.attn(block.ln1(x))[1])
        x = block(x)
    assert torch.equal(found, attention_rollout(patterns))
    with pytest.raises(TypeError, match=r"^AttentionRollout takes a selector, or names=tdcache.names"):
        AttentionRollout()
    with pytest.raises(
        CanonicalNameError, match=r"has several stacks of blocks, 'a.', 'b.'; say which with a selector"
    ):
        Names({}, streams={"a.": ResidualStream(), "b.": ResidualStream()}).in_blocks("attn.pattern")


def test_a_modifier_takes_names(model, names):
    stopped = StopGradient(r"blocks\.2\.attn\.pattern", names=names)
    wanted = "blocks.2.attn.q"
    method = GradientXActivation(wanted, target=right, modifiers=[stopped], names=names, allow_unused=True)
    assert not scores(method, model)["attr", wanted].any()
    assert scores(GradientXActivation(wanted, target=right, names=names), model)["attr", wanted].any()


def test_attribution_of_inputs_of_names_is_refused(names):
    with pytest.raises(DirectionError, match="a canonical name is one value"):
        GradientXActivation("embed", direction="fwd_pre", target=right, names=names)
