"""Interventions at canonical names give what they give at the paths behind them."""

import pytest
import torch
from tensordict import TensorDict

from named_model import HEADS, LAYERS, Transformer, ids, table
from tdcache import (
    Ablation,
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    CanonicalNameError,
    CausalTracing,
    DirectionError,
    EditError,
    PathPatching,
    ResumeFrom,
    SteeringVectors,
    load_intervention,
    resume_from,
    save_intervention,
)


def others():
    return torch.flip(ids(), dims=[1])


def two_inputs():
    return TensorDict({"input": ids(), "patched": {"input": others()}})


def metric(data):
    return data["output"][:, -1, 0].sum()


def run(factory, model, data):
    with factory.prepare(model) as hooked:
        return hooked(data)


@pytest.fixture(scope="module")
def model():
    return Transformer().eval()


@pytest.fixture(scope="module")
def names(model):
    return table(model)


@pytest.fixture(scope="module")
def clean(model, names):
    with ActivationCaching(".*", names=names).prepare(model) as hooked:
        model(ids())
    return hooked.cache


def same(model, one, other, data=None):
    data = others() if data is None else data
    first = run(one, model, data.clone())
    second = run(other, model, data.clone())
    if isinstance(first, TensorDict):
        first, second = first["patched", "output"], second["patched", "output"]
    return torch.equal(first, second) and not torch.equal(first, model(others()))


def test_a_cache_by_names_is_patched_in(model, names, clean):
    by_name = ActivationPatching(r"blocks\.1\.(attn\.z|mlp\.contribution)", clean, names=names)
    paths = {"blocks.1.mlp": clean["mlp.contribution", 1]}
    inputs = {"blocks.1.attn.out": clean["attn.z", 1].flatten(-2)}
    with (
        ActivationPatching(r"blocks\.1\.mlp", paths).prepare(model),
        ActivationPatching(r"blocks\.1\.attn\.out", inputs, direction="fwd_pre").prepare(model),
    ):
        expected = model(others())
    assert torch.equal(run(by_name, model, others()), expected)


def test_heads_of_a_second_input_are_patched_in(model, names):
    by_name = ActivationPatching("blocks.1.attn.z", heads=[1], positions=-1, names=names)
    by_path = ActivationPatching(r"blocks\.1\.attn\.out", direction="fwd_pre", heads=(HEADS, [1]), positions=-1)
    assert same(model, by_name, by_path, two_inputs())


def test_a_sweep_over_heads_takes_their_number_from_the_value(model, names):
    options = {"sweep": ("position", "head"), "metric": metric, "stack_by": "layer"}
    by_name = ActivationPatching(r"blocks\.(?P<layer>\d)\.attn\.z", names=names, **options)
    by_path = ActivationPatching(r"blocks\.(?P<layer>\d)\.attn\.out", direction="fwd_pre", heads=HEADS, **options)
    found = run(by_name, model, two_inputs())["blocks.*.attn.z"]
    assert found.shape == (LAYERS, 5, HEADS)
    assert torch.equal(found, run(by_path, model, two_inputs())["blocks.*.attn.out"])
    some = ActivationPatching("blocks.1.attn.z", names=names, heads=[1], sweep="head", metric=metric)
    assert run(some, model, two_inputs())["blocks.1.attn.z"].shape == (1,)
    with pytest.raises(
        EditError, match=r"^a sweep over heads needs heads=, into how many parts the units of 'blocks.1.resid"
    ):
        run(ActivationPatching("blocks.1.resid_mid", names=names, sweep="head", metric=metric), model, two_inputs())


def test_steering_and_addition_are_along_the_units_of_a_name(model, names):
    vector = torch.linspace(-1, 1, 8)
    assert same(
        model, SteeringVectors("blocks.1.resid_post", vector, names=names), SteeringVectors(r"blocks\.1", vector)
    )
    data = TensorDict({"input": ids(), "positive": {"input": ids()}, "negative": {"input": others()}})
    by_name = run(ActivationAddition("blocks.1.resid_post", pool="last", names=names), model, data.clone())
    by_path = run(ActivationAddition(r"blocks\.1", pool="last"), model, data.clone())
    assert torch.equal(by_name["output"], by_path["output"])
    assert torch.equal(by_name["steer", "blocks.1.resid_post"], by_path["steer", "blocks.1"])


def test_a_path_is_patched_between_names(model, names):
    by_name = PathPatching(
        "blocks.0.mlp.contribution",
        "blocks.2.mlp.contribution",
        freeze=r"blocks\.\d\.(attn|mlp)\.contribution",
        names=names,
    )
    by_path = PathPatching(
        r"blocks\.0\.mlp", r"blocks\.2\.mlp", freeze=r"blocks\.\d\.(attn|mlp)", receiver_direction="fwd"
    )
    assert same(model, by_name, by_path, two_inputs())


def test_causal_tracing_names_its_embedding(model, names):
    options = {"subject": [1, 2], "metric": metric, "samples": 2, "stack_by": "layer", "window": 2}
    by_name = CausalTracing(r"blocks\.(?P<layer>\d)\.resid_post", "embed", names=names, **options)
    by_path = CausalTracing(r"blocks\.(?P<layer>\d)", "embed", **options)
    data = TensorDict({"input": ids()})
    found, expected = run(by_name, model, data), run(by_path, model, data)
    assert torch.equal(found["corrupted"], expected["corrupted"])
    assert torch.equal(found["restored", "blocks.*.resid_post"], expected["restored", "blocks.*"])


def test_a_model_is_resumed_from_a_name(model, names, clean):
    with resume_from(model, "blocks.1.resid_post", clean, names=names) as hooked:
        assert torch.equal(hooked(ids()), model.head(clean["final_norm"]))
    with pytest.raises(
        EditError, match=r"^'blocks.1.resid_mid' is the blocks.1::add, and a model can be resumed from what a"
    ):
        ResumeFrom("blocks.1.resid_mid", clean, names=names).prepare(model).open()
    with pytest.raises(CanonicalNameError):
        ResumeFrom("blocks.9.resid_post", clean, names=names).prepare(model).open()


def test_an_intervention_is_saved_without_its_names(model, names, tmp_path):
    ablation = Ablation("blocks.1.attn.z", heads=[1], names=names)
    save_intervention(ablation, tmp_path)
    again = load_intervention(tmp_path, names=names)
    assert torch.equal(run(again, model, ids()), run(ablation, model, ids()))


def test_a_name_has_no_input(names):
    with pytest.raises(DirectionError, match="a canonical name is one value"):
        Ablation("blocks.0.attn.z", direction="fwd_pre", names=names)
