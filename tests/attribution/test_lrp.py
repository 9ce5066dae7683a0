"""Relevance propagation beside slow twins written from the papers, and beside zennit where it is installed."""

import sys
from types import ModuleType

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from attribution.nets import ConvNet, Transformer
from model_state import state_of
from rounding import assert_same_but_rounding
from stable_ids import stable_id
from tdcache import AttributionError, HookingContextFactory, TdcacheWarning, attribution
from tdcache import CompositeHookingContextFactory as Together
from tdcache.attribution import (
    LRP,
    AlphaBeta,
    AttributionPatching,
    Epsilon,
    Flat,
    FreezeNorm,
    Gamma,
    GradDrop,
    GradientXActivation,
    GuidedReLU,
    Pass,
    RelevanceRules,
    Saliency,
    ScaleGradient,
    StopGradient,
    WSquare,
    ZPlus,
    attnlrp,
    epsilon_gamma,
    epsilon_plus,
    epsilon_plus_flat,
    relp,
)


def run(factory, model, data, rows=None):
    data = data if isinstance(data, dict) else {"input": data}
    with factory.prepare(model) as hooked:
        return hooked(TensorDict(data, batch_size=[len(data["input"])] if rows is None else rows))


# The twins: one loop over outputs, one over inputs.


def share(rule, x, w, b, relevance):
    """``R_j = sum_k q_jk R_k``, unit by unit, for one row."""
    out = torch.zeros_like(x)
    for k in range(len(w)):
        z = x * w[k]
        if isinstance(rule, Flat):
            q = torch.ones_like(x) / (len(x) + rule.eps)
        elif isinstance(rule, WSquare):
            q = w[k] ** 2 / ((w[k] ** 2).sum() + rule.eps)
        elif isinstance(rule, ZPlus):
            q = z.clamp(min=0) / (z.clamp(min=0).sum() + b[k].clamp(min=0) + rule.eps)
        elif isinstance(rule, AlphaBeta):
            high, low = z.clamp(min=0), z.clamp(max=0)
            up, down = high.sum() + b[k].clamp(min=0), low.sum() + b[k].clamp(max=0)
            q = rule.alpha * high / (up + rule.eps) - rule.beta * low / (
                down - rule.eps if down < 0 else down + rule.eps
            )
        elif isinstance(rule, Gamma):
            sign = 1 if z.sum() + b[k] > 0 else -1
            favour = lambda v, sign=sign: v + rule.gamma * (v * sign).clamp(min=0) * sign  # noqa: E731
            z = favour(z)
            total = z.sum() + favour(b[k])
            q = z / (total + rule.eps * (1 if total >= 0 else -1))
        else:
            total = z.sum() + b[k]
            q = z / (total + (rule.eps if total >= 0 else -rule.eps))
        out += q * relevance[k]
    return out


RULES = [Epsilon(0.0), Epsilon(0.25), Gamma(0.25), AlphaBeta(2.0, 1.0), ZPlus(), Flat(), WSquare()]


def net(bias=True, width=6):
    model = nn.Sequential(
        nn.Linear(5, width, bias=bias), nn.ReLU(), nn.Linear(width, 4, bias=bias), nn.ReLU(), nn.Linear(4, 3, bias=bias)
    )
    return model.double()


@pytest.mark.parametrize("rule", RULES, ids=stable_id)
@pytest.mark.parametrize("bias", [True, False])
def test_every_rule_equals_the_loop_of_its_formula(rule, bias):
    model, x = net(bias), torch.randn(4, 5, dtype=torch.float64)
    td = run(Together(LRP(target=1, rules=rule), LRP("1|3", target=1, rules=rule, name="layers")), model, x)
    for row in range(4):
        values = [x[row]]
        for module in model:
            values.append(module(values[-1]).detach())
        relevance = torch.zeros(3, dtype=torch.float64)
        relevance[1] = values[-1][1]
        for at in (4, 2, 0):
            module = model[at]
            b = module.bias.detach() if bias else torch.zeros(len(module.weight), dtype=torch.float64)
            relevance = share(rule, values[at], module.weight.detach(), b, relevance)
            score = td["attr", "input"] if at == 0 else td["attr", "layers", str(at - 1)]
            torch.testing.assert_close(score[row], relevance, rtol=1e-9, atol=1e-12)


def test_a_net_without_biases_conserves_relevance_at_every_layer():
    model, x = ConvNet(bias=False).double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    sites = "c1|r1|c2|r2|pool|flat"
    td = run(Together(LRP(target=2, rules=Epsilon(0.0)), LRP(sites, target=2, rules=Epsilon(0.0), name="l")), model, x)
    value = td["output"][:, 2]
    for score in (td["attr", "input"], *td["attr", "l"].values()):
        torch.testing.assert_close(score.flatten(1).sum(1), value, rtol=1e-9, atol=1e-12)


def test_what_is_missing_is_the_share_of_the_biases():
    model, x = net(), torch.randn(4, 5, dtype=torch.float64)
    td = run(
        Together(LRP(target=0, rules=Epsilon(0.0)), LRP("0|2|4", target=0, rules=Epsilon(0.0), name="l")), model, x
    )
    leak = td["output"][:, 0] - td["attr", "input"].sum(1)
    share_of = torch.zeros(4, dtype=torch.float64)
    for at in (0, 2, 4):
        z = model[: at + 1](x).detach()
        share_of += (model[at].bias.detach() / z * td["attr", "l", str(at)]).sum(1)
    torch.testing.assert_close(leak, share_of, rtol=1e-9, atol=1e-12)


def folded(model):
    """The same net with the batch norms folded into the linear modules, by hand."""
    out, modules = [], list(model)
    for module, after in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            continue
        if isinstance(after, nn.BatchNorm2d | nn.BatchNorm1d):
            module = (
                nn.utils.fusion.fuse_conv_bn_eval(module, after)
                if isinstance(module, nn.Conv2d)
                else nn.utils.fusion.fuse_linear_bn_eval(module, after)
            )
        out.append(module)
    return nn.Sequential(*out)


def normed():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(),
        nn.Linear(144, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2),
    ).double()  # fmt: skip
    for module in model:
        if hasattr(module, "running_mean"):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.mark.parametrize("rules", [Epsilon(0.1), Gamma(), ZPlus(), AlphaBeta(), epsilon_plus(), epsilon_plus_flat("0")])
def test_batch_norms_count_as_part_of_the_module_before_and_nothing_of_the_model_is_changed(rules):
    model, x = normed(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    before = state_of(model)
    td = run(LRP(target=1, rules=rules), model, x)
    assert state_of(model) == before
    wanted = run(LRP(target=1, rules=rules), folded(model), x)
    torch.testing.assert_close(td["attr", "input"], wanted["attr", "input"], rtol=1e-8, atol=1e-12)


def test_rules_of_one_method_do_not_touch_the_rows_of_another():
    model, x = ConvNet(inplace=True).double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    names = {"a": Epsilon(0.25), "b": Gamma(), "c": epsilon_plus(), "d": ((r"c\d", WSquare()), (nn.Linear, Epsilon()))}
    methods = [LRP(target=0, rules=rule, name=name) for name, rule in names.items()]
    td = run(Together(*methods, GradientXActivation("c1", target=0, name="plain")), model, x)
    for method in methods:
        torch.testing.assert_close(
            td["attr", method.name]["input"], run(method, model, x)["attr", method.name]["input"]
        )
    plain = run(GradientXActivation("c1", target=0), model, x)
    assert_same_but_rounding(td["attr", "plain", "c1"], plain["attr", "c1"])  # rows of a larger batch


def test_a_rule_with_weights_at_a_module_without_is_refused_by_name():
    with pytest.raises(AttributionError, match=r"ZPlus\(eps=1e-06\) needs a linear module, and '1' is a ReLU"):
        run(LRP(target=0, rules=((nn.ReLU, ZPlus()), (nn.Linear, None))), net(), torch.randn(2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="alpha - beta = 1, got alpha=2, beta=3"):
        AlphaBeta(2, 3)


# Transformers.


def last(index):
    return lambda td: td["output"][:, -1, index]


def without_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model.double()


def test_relp_conserves_relevance_at_the_embeddings_without_biases():
    model, ids = without_biases(Transformer()), torch.arange(10).reshape(2, 5)
    sites = GradientXActivation("embed", target=last(3), modifiers=relp(attention=r".*\.attn\.(q|k)"))
    score = run(sites, model, ids)["attr", "embed"]
    by_hand = relp_by_hand(model, ids, 3)
    torch.testing.assert_close(score, by_hand["embed"], rtol=1e-9, atol=1e-12)
    value = last(3)({"output": model(ids)}).detach()
    torch.testing.assert_close(score.sum((1, 2)) + by_hand["position"], value, rtol=1e-9, atol=1e-10)


def relp_by_hand(model, ids, index):
    """The same net rewritten with detached scales and patterns and a linearised GELU."""

    def norm(ln, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (x.var(-1, keepdim=True, unbiased=False) + ln.eps).sqrt().detach() * ln.weight + ln.bias

    embed = model.embed(ids).detach().requires_grad_()
    position = model.position(torch.arange(ids.shape[1])).expand_as(embed).detach().clone().requires_grad_()
    x = embed + position
    for block in model.blocks:
        attn, h = block.attn, norm(block.ln1, x)
        q, k, v = (each(h).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for each in (attn.q, attn.k, attn.v))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        pattern = logits.masked_fill(mask, -torch.inf).softmax(-1).detach()
        x = x + attn.o((pattern @ v).transpose(1, 2).flatten(2))
        up = block.mlp[0](norm(block.ln2, x))
        x = x + block.mlp[2](up * (block.mlp[1](up) / up).detach())
    value = model.unembed(norm(model.ln_f, x))[:, -1, index]
    grads = torch.autograd.grad(value.sum(), [embed, position])
    return {"embed": (grads[0] * embed).detach(), "position": (grads[1] * position).sum((1, 2)).detach()}


def test_attnlrp_conserves_relevance_up_to_what_the_softmax_absorbs():
    model, ids = without_biases(Transformer(layers=1)), torch.arange(5).reshape(1, 5)
    modifiers = attnlrp(query_key=r".*\.attn\.(q|k)", value=r".*\.attn\.v")
    sites = r"blocks\.0\.attn\.(q|k|v|o|pattern)"
    td = run(GradientXActivation(sites, target=last(1), modifiers=modifiers), model, {"input": ids})
    attr = {key.rpartition(".")[2]: value.sum() for key, value in td["attr"].items()}
    # Of what leaves the product of pattern and values, each gets half; gradient hooks act behind the tap on v.
    torch.testing.assert_close(attr["pattern"], attr["o"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(attr["v"], attr["o"] / 2, rtol=1e-9, atol=1e-12)


def test_a_frozen_norm_equals_a_detached_scale():
    model, x = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1)).double(), torch.randn(3, 6, dtype=torch.float64)
    nn.init.normal_(model[0].weight)
    found = run(Saliency(absolute=False, modifiers=[FreezeNorm()]), model, x)["attr", "input"]
    at = x.clone().requires_grad_()
    scale = (at.var(-1, keepdim=True, unbiased=False) + model[0].eps).sqrt().detach()
    value = model[1]((at - at.mean(-1, keepdim=True)) / scale * model[0].weight + model[0].bias)
    torch.testing.assert_close(found, torch.autograd.grad(value.sum(), at)[0], rtol=1e-10, atol=1e-12)


def test_a_frozen_norm_in_a_composite_means_every_method_and_leaves_with_it():
    model, x = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 1)).double(), torch.randn(3, 6, dtype=torch.float64)
    before = state_of(model)
    wanted = run(Saliency(absolute=False, modifiers=[FreezeNorm()]), model, x)["attr", "input"]
    found = run(Together(FreezeNorm(), Saliency(absolute=False)), model, x)["attr", "input"]
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, run(Saliency(absolute=False), model, x)["attr", "input"])
    assert state_of(model) == before
    with pytest.raises(AttributionError, match="no scale to freeze"), FreezeNorm("1").prepare(model):
        pass
    assert state_of(model) == before


def test_every_public_modifier_is_a_factory():
    public = [getattr(attribution, name) for name in attribution.__all__]
    modifiers = {each for each in public if isinstance(each, type) and hasattr(each, "install")}
    assert {FreezeNorm, GradDrop, GuidedReLU, RelevanceRules, ScaleGradient, StopGradient} <= modifiers
    assert all(issubclass(each, HookingContextFactory) and hasattr(each, "prepare") for each in modifiers)


def test_rms_norms_are_frozen_too():
    model, x = nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 1)).double(), torch.randn(3, 6, dtype=torch.float64)
    nn.init.normal_(model[0].weight)
    found = run(Saliency(absolute=False, modifiers=[FreezeNorm(nn.RMSNorm)]), model, x)["attr", "input"]
    at = x.clone().requires_grad_()
    eps = torch.finfo(torch.float64).eps
    value = model[1](at * torch.rsqrt((at**2).mean(-1, keepdim=True) + eps).detach() * model[0].weight)
    torch.testing.assert_close(found, torch.autograd.grad(value.sum(), at)[0], rtol=1e-10, atol=1e-12)


def test_relp_helps_patching_scores_where_gradients_through_norms_mislead():
    model, ids = Transformer().double(), torch.arange(10).reshape(2, 5)
    data = {"input": ids, "corrupt": {"input": (ids + 3) % 11}}
    plain = run(AttributionPatching(r"blocks\.0\.mlp", target=last(1), reduce=(-1, -2)), model, data)
    ruled = run(
        AttributionPatching(r"blocks\.0\.mlp", target=last(1), reduce=(-1, -2), modifiers=relp(attention=r".*\.(q|k)")),
        model,
        data,
    )
    assert not torch.allclose(plain["attr", "blocks.0.mlp"], ruled["attr", "blocks.0.mlp"])


def test_stopped_queries_and_keys_equal_a_detached_pattern():
    model, ids = Transformer().double(), torch.arange(10).reshape(2, 5)
    by_inputs = run(
        GradientXActivation("embed", target=last(1), modifiers=[StopGradient(r".*\.(q|k)")]), model, {"input": ids}
    )
    by_pattern = run(
        GradientXActivation("embed", target=last(1), modifiers=[StopGradient(r".*\.pattern")]), model, {"input": ids}
    )
    torch.testing.assert_close(by_inputs["attr", "embed"], by_pattern["attr", "embed"])


# zennit


@pytest.fixture
def zennit(monkeypatch):
    if "torchvision" not in sys.modules:  # zennit imports it for models that are not needed here
        for name in (
            "torchvision",
            "torchvision.models",
            "torchvision.models.resnet",
            "torchvision.ops",
            "torchvision.ops.misc",
        ):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["torchvision.models.resnet"].Bottleneck = type("Bottleneck", (), {})
        sys.modules["torchvision.models.resnet"].BasicBlock = type("BasicBlock", (), {})
        sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    pytest.importorskip("zennit.rules")
    import zennit.composites
    import zennit.rules

    return zennit


@pytest.mark.parametrize("ours", [Epsilon(0.25), Gamma(0.25), AlphaBeta(), ZPlus(), Flat(), WSquare()], ids=stable_id)
def test_rules_equal_those_of_zennit(zennit, ours):
    rules = zennit.rules
    theirs = {
        Epsilon: lambda: rules.Epsilon(0.25), Gamma: lambda: rules.Gamma(0.25),
        AlphaBeta: lambda: rules.AlphaBeta(2, 1),
        ZPlus: rules.ZPlus, Flat: rules.Flat, WSquare: lambda: rules.WSquare(zero_params="bias"),
    }[type(ours)]  # fmt: skip
    model, x = ConvNet().double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    pairs = [(nn.ReLU, rules.Pass()), (nn.Conv2d, theirs()), (nn.Linear, rules.Epsilon(1e-6))]
    composite = zennit.composites.LayerMapComposite(layer_map=[*pairs, (nn.AvgPool2d, rules.Norm())])
    at = x.clone().requires_grad_()
    with composite.context(model) as changed:
        out = changed(at)
        seed = torch.zeros_like(out)
        seed[:, 1] = out[:, 1].detach()  # the target's value
        (wanted,) = torch.autograd.grad(out, at, seed)
    td = run(LRP(target=1, rules=((nn.ReLU, Pass()), (nn.Conv2d, ours), (nn.Linear, Epsilon(1e-6)))), model, x)
    torch.testing.assert_close(td["attr", "input"], wanted, rtol=1e-5, atol=1e-6)


def test_epsilon_gamma_is_a_map_of_its_parts():
    model, x = ConvNet().double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    one = run(LRP(target=1, rules=epsilon_gamma(0.5)), model, x)
    two = run(LRP(target=1, rules=((nn.Conv2d, Gamma(0.5)), (nn.Linear, Epsilon()))), model, x)
    torch.testing.assert_close(one["attr", "input"], two["attr", "input"])


# Precision, single images, modules without a rule


ALL_RULES = [Epsilon(0.0), Epsilon(0.25), Gamma(), AlphaBeta(), ZPlus(), Flat(), WSquare()]


@pytest.mark.parametrize(("dtype", "close"), [(torch.bfloat16, 0.03), (torch.float16, 0.006)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rule", ALL_RULES, ids=stable_id)
def test_rules_work_in_half_precision(rule, dtype, close):
    model, x = ConvNet().to(dtype), torch.randn(3, 1, 8, 8).to(dtype)
    found = run(LRP(target=1, rules=rule), model, x)["attr", "input"]
    wanted = run(LRP(target=1, rules=rule), model.double(), x.double())["attr", "input"]
    # Three layers whose outputs and gradients are rounded to 8 or 11 bits: some units in the last place.
    assert ((found - wanted).norm() / wanted.norm()).item() < close


@pytest.mark.parametrize("rule", [*ALL_RULES[:1], *ALL_RULES[2:]], ids=stable_id)
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_convolution_of_one_image_without_a_batch_axis_equals_a_batch_of_one(rule, kind):
    layers = [kind(2, 3, 3), nn.ReLU(), kind(3, 2, 3)]
    one, many = nn.Sequential(*layers, nn.Flatten(0)).double(), nn.Sequential(*layers, nn.Flatten()).double()
    x = torch.randn(2, 7, 7, dtype=torch.float64)
    with LRP(target=lambda td: td["output"][1], rules=rule).prepare(one) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=[]))["attr", "input"]
    torch.testing.assert_close(found, run(LRP(target=1, rules=rule), many, x[None])["attr", "input"][0])


def test_what_a_module_without_a_rule_loses_is_reported_as_a_gap():
    class Squared(nn.Module):
        def forward(self, x):
            return x**2

    x = torch.randn(3, 4, dtype=torch.float64)
    layers = [nn.Linear(4, 5, bias=False), Squared(), nn.Linear(5, 2, bias=False)]
    model = nn.Sequential(*layers).double()
    with pytest.warns(TdcacheWarning, match=r"LRP has no rule for '1 \(Squared\)': .*td\['gap', ...\] says how much"):
        td = run(LRP(target=1, rules=Epsilon(0.0)), model, x)
    value = model(x)[:, 1].detach()
    torch.testing.assert_close(td["gap", "input"], td["attr", "input"].sum(1) - value)
    torch.testing.assert_close(td["gap", "input"], value)  # the derivative of a square passes twice the value on
    meant = ((Squared, None), (nn.Linear, Epsilon(0.0)))  # no warning
    sites = run(LRP("[01]", target=1, rules=meant), model, x)
    torch.testing.assert_close(sites["gap", "0"], value)
    torch.testing.assert_close(sites["gap", "1"], torch.zeros_like(value))
    ruled = run(LRP(target=1, rules=((Squared, Pass()), (nn.Linear, Epsilon(0.0)))), model, x)
    torch.testing.assert_close(ruled["gap", "input"], torch.zeros_like(value))


def test_a_module_with_parameters_beside_its_submodules_needs_a_rule_too():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixed = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x):
            return self.mixed(x, x, x)[0].sum(1)

    with pytest.warns(TdcacheWarning, match=r"LRP has no rule for 'mixed \(MultiheadAttention\)': "):
        td = run(LRP(target=1), Attention().eval(), torch.randn(3, 5, 4))
    assert td["gap", "input"].abs().max() > 1e-3
