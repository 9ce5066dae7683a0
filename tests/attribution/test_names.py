"""Attribution at canonical names gives what it gives at the paths behind them."""

import pytest
import torch
from tensordict import TensorDict

from attribution.nets import Counter
from named_model import HEADS, LAYERS, Transformer, ids, table
from tdcache import AttributionError, CanonicalNameError, DirectionError, NamedPlace, Names
from tdcache.attribution import (
    AttentionRollout,
    AttributionPatching,
    DirectLogitAttribution,
    EdgeAttributionPatching,
    GradientXActivation,
    LogitLens,
    QKAttributionPatching,
    StopGradient,
    Unit,
    attention_rollout,
)
from tdcache.named_streams import ResidualStream


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
    with pytest.raises(
        AttributionError, match=r"^the blocks of Transformer norm or scale the stream between additions"
    ):
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


def test_queries_and_keys_are_patched_by_name_whatever_turns_them():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    path = "model.layers.0.self_attn"
    axes = ("batch", "head", "query", "unit")
    places = {role: NamedPlace(path=f"{path}::{role}", axes=axes) for role in ("q", "k", "pattern")}
    names = Names(places, model=model)
    method = QKAttributionPatching("q", "k", "pattern", target=lambda data: data["logits"][:, -1, 3], names=names)
    inputs = {"input": torch.tensor([[2, 3, 4]])}
    data = TensorDict({**inputs, "corrupt": TensorDict({"input": torch.tensor([[2, 5, 4]])}, batch_size=[1])}, [1])
    with method.prepare(model, out_keys=["logits"]) as hooked:
        found = hooked(data)["attr"]
    assert found["q"].shape == (1, 3, 4)
    assert found["k"].shape == (1, 3, 2)
    assert found["q"][:, 0].eq(0).all()  # one key is all that the first query sees
    with pytest.raises(TypeError, match=r"^QKAttributionPatching takes heads=, the number of query heads, or names="):
        QKAttributionPatching("q", "k", "pattern")


def test_a_unit_of_a_name_is_a_target(model, names):
    unit = Unit("blocks.1.mlp.post", (-1, 2))
    found = scores(GradientXActivation("blocks.0.resid_post", target=unit, names=names), model)
    plain = scores(GradientXActivation(r"blocks\.0", target=Unit("blocks.1.mlp.1", (-1, 2))), model)
    assert torch.equal(found["attr", "blocks.0.resid_post"], plain["attr", "blocks.0"])


def test_rows_are_told_apart_at_names_so_that_points_share_a_forward(model, names, monkeypatch):
    corrupt = {"corrupt": TensorDict({"input": torch.flip(ids(), dims=[1])}, batch_size=[2])}
    every = r"blocks\.\d\.(attn\.(z|pattern)|mlp\.contribution)"
    method = AttributionPatching(every, target=right, names=names, modifiers=[StopGradient("embed", names=names)])
    expected = scores(AttributionPatching(every, target=right, names=names), model, **corrupt)
    counter = Counter(model, monkeypatch)
    found = scores(method, model, **corrupt)
    assert counter.counts == (1, 1)  # the axes of rows are known from the call before
    for key in expected["attr"].keys():  # noqa: SIM118
        torch.testing.assert_close(found["attr", key], expected["attr", key])


def test_gaps_are_known_at_names(model, names):
    td = scores(DirectLogitAttribution(names=names, target=right), model)
    # Float32 sums of 30 products of numbers below 2.
    torch.testing.assert_close(td["gap", "bias"], torch.zeros(2), rtol=0, atol=1e-5)
