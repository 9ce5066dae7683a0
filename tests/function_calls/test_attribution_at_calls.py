"""Attribution at calls inside forwards: every method gives there what it gives at modules of the twin model."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from call_twins import Add, Gelu, Masked, Net, Softmax, data, inputs, pair, twin_name, twin_selector
from tdcache import Ablation
from tdcache.attribution import (
    LRP,
    ActivationMaximisation,
    AttentionRollout,
    AttributionPatching,
    Conductance,
    DeepLift,
    EdgeAttributionPatching,
    Epsilon,
    GradientXActivation,
    IntegratedGradients,
    InternalInfluence,
    LogitLens,
    QKAttributionPatching,
    Saliency,
    ScaleGradient,
    SmoothGrad,
    StopGradient,
    Unit,
)
from tdcache.attribution.deeplift import RESCALED, Rescale
from tdcache.errors import AttributionError, SelectionError, UnfiredSiteWarning

ROWS = 3


def target(out):
    return out["output"][:, -1, 0]


def corrupt(rows=ROWS):
    return TensorDict({"input": inputs(rows, seed=2)}, batch_size=[rows])


PLACES = [r"layers\.\d\.attn::(q|v|z)", r"layers\.\d\.attn::pattern", r"layers\.\d::(gelu|add\.1)"]
RULES = [(nn.Linear, Epsilon(1e-3)), ((Gelu, Add, Softmax, Masked), None)]
METHODS = {
    "gradient x activation": lambda site: GradientXActivation(site, target=target),
    "attribution patching": lambda site: AttributionPatching(site, target=target),
    "integrated gradients at sites": lambda site: IntegratedGradients(site, target=target, n_steps=4),
    "internal influence": lambda site: InternalInfluence(site, target=target, n_steps=4),
    "conductance": lambda site: Conductance(site, target=target, n_steps=4),
    "relevance": lambda site: LRP(site, rules=RULES, target=target),
    "summed": lambda site: GradientXActivation(site, target=target, reduce=-1),
}


def scores_of(factory, model, batch=None):
    with factory.prepare(model) as hooked:
        return dict(hooked(data() if batch is None else batch)["attr"].items())


def named(scores):
    return {twin_name(key): value for key, value in scores.items()}


def assert_same(mine, its):
    assert mine.keys() == its.keys()
    for key, value in mine.items():
        if not isinstance(value, torch.Tensor):  # edges: scores by writer, then by reader
            assert_same(named(dict(value.items())), dict(its[key].items()))
            continue
        # The kernel sums in another order than the twin, which spells attention out.
        torch.testing.assert_close(value, its[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("site", PLACES)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_gives_at_calls_what_it_gives_at_modules(method, site):
    model, twin = pair()
    batch = data(corrupt=corrupt())
    mine = scores_of(METHODS[method](site), model, batch.copy())
    its = scores_of(METHODS[method](twin_selector(site)), twin, batch.copy())
    assert all(value.any() for value in mine.values())
    assert_same(named(mine), its)


OTHERS = {
    "attention rollout": lambda at: AttentionRollout(at(r"layers\.\d\.attn::pattern"), pick=None),
    "rollout with gradients": lambda at: AttentionRollout(
        at(r"layers\.\d\.attn::pattern"), pick=None, gradient=True, target=target
    ),
    "queries and keys": lambda at: QKAttributionPatching(
        at(r"layers\.\d\.attn::q", heads=False),
        at(r"layers\.\d\.attn::k", heads=False),
        at(r"layers\.\d\.attn::pattern"),
        heads=2,
        mask="causal",
        target=target,
    ),
    "deep lift": lambda at: DeepLift(target=target, rule=Rescale([*RESCALED, at(r"layers\.\d::gelu")])),
    "edges": lambda at: EdgeAttributionPatching(at(r"layers\.\d::add"), at(r"layers\.\d::add\.1"), target=target),
    "gradients stopped": lambda at: Saliency(target=target, modifiers=[StopGradient(at(r"layers\.\d\.attn::pattern"))]),
    "gradients scaled": lambda at: Saliency(target=target, modifiers=[ScaleGradient(at(r"layers\.\d::gelu"), 0.5)]),
    "a unit": lambda at: Saliency(target=Unit(at("layers.1::gelu", path=True), (-1, 3))),
    "smoothed": lambda at: SmoothGrad(target=Unit(at("layers.1.attn::z", path=True), (0, -1, 3)), n_samples=3),
    "logit lens": lambda at: LogitLens(at(r"layers\.\d::add\.1"), norm=None, unembed="head"),
}


def at_calls(text, *, path=False, heads=True):
    return text


def at_modules(text, *, path=False, heads=True):
    if not heads:  # the twin's modules give (batch, heads, ...), and the method wants positions before them
        return twin_selector(text) + "_flat"
    return twin_name(text) if path else twin_selector(text)


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_take_calls_too(name):
    model, twin = pair()
    batch = data(corrupt=corrupt())
    torch.manual_seed(3)
    mine = scores_of(OTHERS[name](at_calls), model, batch.copy())
    torch.manual_seed(3)
    its = scores_of(OTHERS[name](at_modules), twin, batch.copy())
    assert_same(named(mine), {key.removesuffix("_flat"): value for key, value in its.items()})


def test_methods_that_are_open_together_share_a_pass_at_calls():
    model, _ = pair()
    several = [
        GradientXActivation(r"layers\.0::gelu", target=target),
        AttributionPatching(r"layers\.0.attn::z", target=target, name="patched"),
    ]
    together, alone = data(corrupt=corrupt()), {}
    with several[0].prepare(model) as outer, several[1].prepare(outer) as hooked:
        found = dict(hooked(together)["attr"].items(include_nested=True, leaves_only=True))
    for factory in several:
        with factory.prepare(model) as hooked:
            alone |= dict(hooked(data(corrupt=corrupt()))["attr"].items(include_nested=True, leaves_only=True))
    assert found.keys() == alone.keys()
    for key, value in alone.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)  # one pass stacks more rows than the other


def test_attribution_sees_an_edit_at_a_call():
    model, twin = pair()
    with Ablation(r"layers\.0\.attn::pattern", heads=(2, [1])).prepare(model) as outer:
        mine = scores_of(GradientXActivation(r"layers\.\d::gelu", target=target), outer)
    twin.layers[0].attn.pattern.register_forward_hook(
        lambda module, args, out: out * torch.tensor([1.0, 0.0])[:, None, None]
    )
    its = scores_of(GradientXActivation(r"layers\.\d\.gelu", target=target), twin)
    assert_same(named(mine), its)


def test_activation_maximisation_of_a_unit_at_a_call():
    model, twin = pair()
    found = []
    for each, path in ((model, "layers.1::gelu"), (twin, "layers.1.gelu")):
        method = ActivationMaximisation(target=Unit(path, (-1, 3)), n_steps=3)
        with method.prepare(each) as hooked:
            found.append(hooked(data()))
    mine, its = (dict(each.items(include_nested=True, leaves_only=True)) for each in found)
    assert mine.keys() == its.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, its[key], rtol=1e-4, atol=1e-6)  # the kernel sums in another order


def test_methods_whose_rules_are_for_kinds_of_modules_refuse_calls():
    with pytest.raises(SelectionError, match="only modules can be selected here"):
        LRP(rules=[(r"layers\.0::gelu", None)], target=target)


def test_names_of_calls_that_are_patterns_are_refused_where_they_must_be_known_before():
    with pytest.raises(SelectionError, match=r"is known only when the model runs, and here they must be known before"):
        GradientXActivation(r"layers\.0::ge.*", target=target)


def test_a_call_that_is_not_made_is_an_error_that_names_it():
    with (
        pytest.warns(UnfiredSiteWarning, match="layers.0 calls 'gelu', 'add'"),
        pytest.raises(AttributionError, match=r"'layers\.0::relu' did not run in the forward"),
    ):
        scores_of(GradientXActivation(r"layers\.0::relu", target=target), Net())
