"""Frozen norms against slow twins whose scale is detached, and what is no norm."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from attribution.nets import ConvNet
from tdcache import AttributionError
from tdcache.attribution import DirectLogitAttribution, FreezeNorm, GradientXActivation, Saliency, attnlrp, relp
from tdcache.norms import NormForm, is_norm

F64 = torch.float64
WIDTH = 12


def hugging_face(family, name):
    module = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, name)


MAKERS = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH),
    "LayerNorm without weights": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "LayerNorm without bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "LayerNorm of an odd width": lambda: nn.LayerNorm(7),
    "LayerNorm of two axes": lambda: nn.LayerNorm((3, 4)),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "RMSNorm without weights": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
    "Llama": lambda: hugging_face("llama", "LlamaRMSNorm")(WIDTH),
    "Gemma": lambda: hugging_face("gemma", "GemmaRMSNorm")(WIDTH),
    "Gemma2": lambda: hugging_face("gemma2", "Gemma2RMSNorm")(WIDTH),
    "Gemma3": lambda: hugging_face("gemma3", "Gemma3RMSNorm")(WIDTH),
    "Qwen3Next": lambda: hugging_face("qwen3_next", "Qwen3NextRMSNorm")(WIDTH),
    "T5": lambda: hugging_face("t5", "T5LayerNorm")(WIDTH),
    "Nemotron": lambda: hugging_face("nemotron", "NemotronLayerNorm1P")(WIDTH),
    "Olmo": lambda: hugging_face("olmo", "OlmoLayerNorm")(WIDTH),
}
RMS = ("RMSNorm", "RMSNorm without weights", "Llama", "Gemma", "Gemma2", "Gemma3", "Qwen3Next", "T5")
ONE_MORE = ("Gemma", "Gemma2", "Gemma3", "Qwen3Next", "Nemotron")


def norm(name):
    module = MAKERS[name]()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def epsilon(module, x):
    given = [getattr(module, key, None) for key in ("eps", "variance_epsilon")]
    return next((each for each in given if each is not None), 1e-5 if "Olmo" in type(module).__name__ else None) or (
        torch.finfo(x.dtype).eps
    )


def twin(name, module, x):
    """The norm's formula with a scale that is held constant."""
    axes = (-2, -1) if name.endswith("two axes") else (-1,)
    moved = x if name in RMS else x - x.mean(axes, keepdim=True)
    scale = (moved.square().mean(axes, keepdim=True) + epsilon(module, x)).sqrt().detach()
    weight = getattr(module, "weight", None)
    weight = torch.ones_like(x[0]) if weight is None else weight.detach().to(x) + (name in ONE_MORE)
    bias = getattr(module, "bias", None)
    return moved / scale * weight + (0 if bias is None else bias.detach().to(x))


def sample(name, dtype=F64):
    shape = (3, 4) if name.endswith("two axes") else (7,) if name.endswith("odd width") else (WIDTH,)
    return (3 * torch.randn(4, 5, *shape, dtype=F64) + 1).to(dtype)


def frozen(module, x, seed, modifier):
    """Gradient and output with the norm frozen."""
    at = x.clone().requires_grad_()
    with modifier.prepare(nn.Sequential(module)) as hooked:
        out = hooked(TensorDict({"input": at}, batch_size=[len(x)]))["output"]
    return torch.autograd.grad(out, at, seed)[0], out.detach()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("modifier", [FreezeNorm(), FreezeNorm("0"), relp(attention="0")[0]], ids=["all", "0", "relp"])
def test_a_frozen_norm_has_the_gradient_of_its_formula_with_the_scale_held_constant(name, modifier):
    module, x = norm(name).double(), sample(name)
    seed = torch.randn_like(x)
    grad, out = frozen(module, x, seed, modifier)
    assert torch.equal(out, module(x).detach())
    at = x.clone().requires_grad_()
    value = twin(name, module, at)
    # Llama's relatives compute in float32 inside of float64.
    torch.testing.assert_close(out, value.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(value, at, seed)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MAKERS)
def test_a_norm_is_frozen_in_lower_precision_too(name, dtype):
    module, x = norm(name).to(dtype), sample(name, dtype)
    seed = torch.randn_like(x)
    grad, out = frozen(module, x, seed, FreezeNorm())
    assert torch.equal(out, module(x).detach())
    assert grad.dtype == dtype
    at = x.double().requires_grad_()
    wanted = torch.autograd.grad(twin(name, module, at), at, seed.double())[0]
    # The effective weight, the output and the gradient are rounded to the dtype once each; sums of 12 add up.
    close = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(grad.double(), wanted, rtol=close, atol=close * wanted.abs().max().item())


@pytest.mark.parametrize("name", ["LayerNorm", "Llama", "Gemma"])
def test_rows_of_zeros_have_the_scale_of_eps(name):
    module, x = norm(name).double(), sample(name)
    x[0] = 0
    seed = torch.randn_like(x)
    at = x.clone().requires_grad_()
    wanted = torch.autograd.grad(twin(name, module, at), at, seed)[0]
    torch.testing.assert_close(frozen(module, x, seed, FreezeNorm())[0], wanted, rtol=1e-3, atol=1e-5)


def test_frozen_norms_are_differentiable_once_more():
    module, x = norm("LayerNorm").double(), sample("LayerNorm")[:2, 0]
    model = nn.Sequential(module, nn.Linear(WIDTH, 1).double())
    at = x.clone().requires_grad_()
    with Saliency(absolute=False, modifiers=[FreezeNorm()], create_graph=True).prepare(model) as hooked:
        score = hooked(TensorDict({"input": at}, batch_size=[2]))["attr", "input"]

    def by_hand(value):
        scale = torch.rsqrt(value.var(-1, keepdim=True, unbiased=False) + module.eps)
        weighted = model[1].weight * module.weight * scale
        return weighted - weighted.mean(-1, keepdim=True)

    wanted = torch.autograd.grad(by_hand(at).square().sum(), at)[0]
    torch.testing.assert_close(torch.autograd.grad(score.square().sum(), at)[0], wanted, rtol=1e-8, atol=1e-10)


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_a_norm_of_the_channels_of_images_is_found():
    module, x = ChannelsFirst(6).double(), torch.randn(2, 6, 5, 5, dtype=F64)
    nn.init.normal_(module.weight)
    seed = torch.randn_like(x)
    at = x.clone().requires_grad_()
    moved = at - at.mean(1, keepdim=True)
    value = moved / (moved.square().mean(1, keepdim=True) + module.eps).sqrt().detach() * module.weight.view(6, 1, 1)
    wanted = torch.autograd.grad(value, at, seed)[0]
    torch.testing.assert_close(frozen(module, x, seed, FreezeNorm())[0], wanted, rtol=1e-8, atol=1e-9)


def test_a_group_norm_of_one_group_over_features_is_a_layer_norm():
    module, x, seed = nn.GroupNorm(1, WIDTH).double(), *torch.randn(2, 3, WIDTH, dtype=F64)
    alike = nn.LayerNorm(WIDTH).double()
    for one in (module, alike):
        one.weight.data = torch.linspace(-1, 2, WIDTH, dtype=F64)
    found, wanted = (frozen(one, x, seed, FreezeNorm("0"))[0] for one in (module, alike))
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


class Named(nn.Module):
    """A module whose name says that it is a norm."""

    def __init__(self, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(WIDTH)), function

    def forward(self, x):
        return self.function(x, self.weight)


class GatedRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = SimpleNamespace(norm=lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        self.weight, self.gate = nn.Parameter(torch.ones(WIDTH)), None

    def forward(self, x):
        out = self.inner.norm(x) * self.weight
        return out if self.gate is None else out * self.gate


NO_NORMS = {
    "linear": (nn.Linear(WIDTH, WIDTH), "one number per feature"),
    "batch norm": (nn.BatchNorm1d(WIDTH), "keeps statistics of its batches"),
    "batch norm in eval mode": (nn.BatchNorm1d(WIDTH).eval(), "keeps statistics of its batches"),
    "groups": (nn.GroupNorm(3, WIDTH), "would differ from it by"),
    "scale": (Named(lambda x, weight: x * weight), "would differ from it by"),
    "maximum": (Named(lambda x, weight: x / x.abs().amax(-1, keepdim=True) * weight), "would differ from it by"),
    "failing": (Named(lambda x, weight: x.item()), "it raised RuntimeError at a probe"),
    "two outputs": (Named(lambda x, weight: (x, x)), "does not return one tensor"),
    "container": (nn.Sequential(nn.LayerNorm(WIDTH)), "no submodules"),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_no_norm_is_refused_by_name_with_what_was_tried(name):
    module, why = NO_NORMS[name]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(AttributionError, match=rf"'0' is a {type(module).__name__}, .*{why}.* no scale to freeze"):
        frozen(module, torch.randn(3, WIDTH), torch.ones(3, WIDTH), FreezeNorm("0"))
    assert not is_norm("0", module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_norm_whose_output_something_else_changed_is_refused():
    module = GatedRMSNorm()
    assert is_norm("0", module)
    module.gate = None
    x = torch.randn(3, WIDTH)
    form = NormForm.of(module, "0", x)
    with pytest.raises(AttributionError, match="no multiple of weight"):
        form.inverse_scale(module, "0", x, module(x) * torch.rand(WIDTH))


def test_a_module_of_unknown_width_is_refused_when_its_input_is_seen():
    class L1Norm(nn.Module):
        def forward(self, x):
            return x / x.abs().sum(-1, keepdim=True) if x.ndim < 3 else x

    x = torch.randn(2, 3, WIDTH)
    with pytest.raises(AttributionError, match="over axes"):
        frozen(L1Norm(), x, x, FreezeNorm())


def test_a_single_number_has_no_scale():
    with pytest.raises(AttributionError, match="a single number has no scale"):
        NormForm.of(nn.LayerNorm(1), "0", torch.randn(2, 1))
    with pytest.raises(AttributionError, match=r"no axis of its input \(2, 5\) fits its parameters"):
        NormForm.of(nn.LayerNorm(4), "0", torch.randn(2, 5))


def test_only_norms_are_found_in_a_net():
    net = nn.ModuleList([ConvNet(), nn.BatchNorm2d(3), nn.PReLU(), nn.Embedding(3, 4), nn.Softmax(-1), nn.LSTM(3, 4)])
    assert not [path for path, module in net.named_modules() if is_norm(path, module)]
    assert is_norm("", nn.RMSNorm(WIDTH, elementwise_affine=False))


def tiny(family, config, model, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
    }  # fmt: skip
    found = getattr(transformers, model)(getattr(transformers, config)(**sizes, **options)).eval()
    for name, parameter in found.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter)
    return found


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ("LlamaConfig", "LlamaForCausalLM"),
        ("GemmaConfig", "GemmaForCausalLM"),
        ("NemotronConfig", "NemotronForCausalLM"),
    ],
)
def test_writers_and_the_norms_own_bias_are_the_logit(config, model):
    lm = tiny("", config, model, attn_implementation="eager")
    ids = torch.randint(1, 17, (2, 5))
    block = r"model\.layers\.\d+\.(self_attn|mlp)"
    method = DirectLogitAttribution(
        rf"model\.embed_tokens|{block}",
        norm=r"model\.norm",
        target=lambda td: td["logits"][:, -1, 3],
    )
    with method.prepare(lm, in_keys=["input_ids"], out_keys=["logits"]) as hooked:
        td = hooked(TensorDict({"input_ids": ids}, batch_size=[2]))
    bias = getattr(lm.model.norm, "bias", None)
    wanted = 0.0 if bias is None else (lm.lm_head.weight[3] @ bias).item()
    # What the norm adds whatever the stream is, and nothing else: up to rounding of logits of size 1 to 10.
    torch.testing.assert_close(td["attr", "bias"], torch.full((2,), wanted), rtol=1e-4, atol=2e-4)
    value = lm(ids).logits[:, -1, 3].detach()
    assert (value - wanted).abs().min() > 1e-2
    written = sum(score.sum(-1) for key, score in td["attr"].items() if key != "bias")
    torch.testing.assert_close(written + td["attr", "bias"], value, rtol=1e-4, atol=2e-4)
    assert td["gap", "bias"].abs().max() < 2e-4


def test_attnlrp_and_relp_take_a_gemma_whole():
    lm = tiny("", "GemmaConfig", "GemmaForCausalLM", attn_implementation="eager").double()
    ids = torch.randint(1, 17, (2, 5))
    for modifiers in (
        relp(attention=r".*\.(q|k)_proj"),
        attnlrp(query_key=r".*\.(q|k)_proj", value=r".*\.v_proj"),
    ):
        method = GradientXActivation(
            r"model\.norm|model\.layers\.1", target=lambda td: td["logits"][:, -1, 3], modifiers=modifiers
        )
        with method.prepare(lm, in_keys=["input_ids"], out_keys=["logits"]) as hooked:
            attr = hooked(TensorDict({"input_ids": ids}, batch_size=[2]))["attr"]
        # An RMSNorm with its scale frozen is linear, so that gradient times activation is the same on both sides.
        before, after = (attr[key].sum((1, 2)) for key in ("model.layers.1", "model.norm"))
        torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-6)


def test_what_a_softcap_bends_is_a_gap_and_no_bias():
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Linear(4, WIDTH), norm("RMSNorm"), nn.Linear(WIDTH, 3)

        def forward(self, x):
            return 2 * torch.tanh(self.head(self.norm(self.embed(x))) / 2)

    model, x = Capped().double(), torch.randn(5, 4, dtype=F64)
    nn.init.normal_(model.head.weight)
    with DirectLogitAttribution("embed", norm="norm", target=1).prepare(model) as hooked:
        td = hooked(TensorDict({"input": x}, batch_size=[5]))
    bias = (2 * torch.tanh(model.head.bias[1] / 2)).detach()
    torch.testing.assert_close(td["attr", "bias"], bias.expand(5))
    off = td["attr", "embed"] + bias - model(x)[:, 1].detach()
    torch.testing.assert_close(td["gap", "bias"], off, rtol=1e-9, atol=1e-12)
    assert off.abs().max() > 1e-3
