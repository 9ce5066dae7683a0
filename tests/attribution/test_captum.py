"""The same numbers as captum, where it is installed: on a CNN, with and without in-place ReLUs, and on BERT."""

import warnings

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from attribution.nets import ConvNet
from rounding import assert_same_but_rounding
from tdcache import CompositeHookingContextFactory as Together
from tdcache.attribution import (
    Conductance,
    DeepLift,
    GradCAM,
    GradientXActivation,
    GuidedBackpropagation,
    InputXGradient,
    IntegratedGradients,
    InternalInfluence,
    Saliency,
)

attr = pytest.importorskip("captum.attr")
pytestmark = pytest.mark.filterwarnings("ignore")  # captum's own
SITES = ("c1", "r1", "c2", "r2", "pool", "head")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
N = 20


def explained(inplace):
    model, x, start = ConvNet(inplace).eval(), torch.randn(5, 1, 8, 8), 0.1 * torch.randn(5, 1, 8, 8)
    stack = Together(
        Saliency(target=1, name="saliency"),
        InputXGradient(target=1, name="ixg"),
        GradientXActivation("|".join(SITES), target=1, name="gxa"),
        GradCAM("c2", target=1, name="cam"),
        GuidedBackpropagation(target=1, name="guided"),
        IntegratedGradients(target=1, name="ig", n_steps=N),
        IntegratedGradients("c2", target=1, name="layer ig", n_steps=N),
        Conductance("c2", target=1, name="conductance", n_steps=N),
        InternalInfluence("c2", target=1, name="influence", n_steps=N),
        DeepLift(target=1, name="deeplift"),
    )
    with stack.prepare(model) as hooked:
        td = hooked(TensorDict({"input": x, "baseline": {"input": start}}, batch_size=[5]))
    plain = ConvNet().eval()
    plain.load_state_dict(model.state_dict())
    return td["attr"], plain, x, start


@pytest.mark.parametrize("inplace", [False, True])
def test_gradient_methods_equal_captum(inplace):
    scores, model, x, _ = explained(inplace)  # as rows of one batch that holds all methods
    for site in SITES:
        wanted = attr.LayerGradientXActivation(model, getattr(model, site)).attribute(x, target=1)
        assert_same_but_rounding(scores["gxa", site], wanted)
    assert_same_but_rounding(scores["cam", "c2"], attr.LayerGradCam(model, model.c2).attribute(x, target=1))
    for name, kind in (("saliency", attr.Saliency), ("ixg", attr.InputXGradient), ("guided", attr.GuidedBackprop)):
        assert_same_but_rounding(scores[name, "input"], kind(model).attribute(x.clone(), target=1))


@pytest.mark.parametrize("inplace", [False, True])
def test_path_methods_equal_captum(inplace):
    scores, model, x, start = explained(inplace)
    for key, method in {
        ("ig", "input"): attr.IntegratedGradients(model),
        ("layer ig", "c2"): attr.LayerIntegratedGradients(model, model.c2),
        ("conductance", "c2"): attr.LayerConductance(model, model.c2),
        ("influence", "c2"): attr.InternalInfluence(model, model.c2),
    }.items():
        wanted = method.attribute(x, start, target=1, n_steps=N).float().detach()
        torch.testing.assert_close(scores[key], wanted, **CLOSE)
    wanted = attr.DeepLift(model).attribute(x, start, target=1).detach()
    torch.testing.assert_close(scores["deeplift", "input"], wanted, **CLOSE)


class Classifier(nn.Module):
    """BERT of two layers and a head, its ids the only input."""

    def __init__(self):
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        self.bert, self.head = BertModel(config).eval(), nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.bert(ids).last_hidden_state[:, 0])


def test_embeddings_and_layers_of_bert_equal_captum():
    model, ids = Classifier(), torch.randint(1, 30, (3, 6))
    words, layers = model.bert.embeddings.word_embeddings, model.bert.encoder.layer
    start = torch.zeros_like(ids)
    pattern = r"bert\.embeddings\.word_embeddings"
    stack = Together(
        IntegratedGradients(pattern, target=2, n_steps=N, name="ig"),
        GradientXActivation(r"bert\.encoder\.layer\.\d", target=2, name="gxa"),
    )
    with stack.prepare(model) as hooked:
        td = hooked(TensorDict({"input": ids, "baseline": {"input": start}}, batch_size=[3]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = attr.LayerIntegratedGradients(model, words).attribute(ids, start, target=2, n_steps=N)
        torch.testing.assert_close(
            td["attr", "ig", "bert.embeddings.word_embeddings"], wanted.float().detach(), **CLOSE
        )
        for at, layer in enumerate(layers):
            wanted = attr.LayerGradientXActivation(model, layer).attribute(ids, target=2)
            wanted = wanted[0] if isinstance(wanted, tuple) else wanted
            torch.testing.assert_close(td["attr", "gxa", f"bert.encoder.layer.{at}"], wanted.detach(), **CLOSE)


def deeplift(model, x, start, target):
    with DeepLift(target=target).prepare(model) as hooked:
        return hooked(TensorDict({"input": x, "baseline": {"input": start}}, batch_size=[len(x)]))["attr", "input"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("BasicModel_MultiLayer", (3,)),
        ("LinearMaxPoolLinearModel", (4,)),
        ("BasicModel_MaxPool_ReLU", (1, 6)),
        ("BasicModel_ConvNet", (1, 10, 10)),
        ("BasicModel_ConvNet_MaxPool1d", (1, 10)),
        ("BasicModel_ConvNet_MaxPool3d", (1, 10, 10, 10)),
    ],
)
def test_deeplift_equals_captum_through_max_pools(name, shape):
    models = pytest.importorskip("captum.testing.helpers.basic_models")
    # In double precision: a multiplier is a quotient of differences, and small ones multiply the rounding.
    model, x = getattr(models, name)().eval().double(), torch.randn(4, *shape, dtype=torch.float64)
    start = torch.zeros_like(x)
    for layer in (getattr(model, "conv1", None), getattr(model, "conv2", None)):
        if layer is not None:  # a reference's maximum is never the larger one, where captum's pools miss the difference
            nn.init.zeros_(layer.bias)
    if hasattr(model, "softmax"):
        model.softmax = nn.Identity()  # captum centres the multipliers of a softmax, so that they miss it too
    wanted = attr.DeepLift(model).attribute(x, start, target=0).detach()
    torch.testing.assert_close(deeplift(model, x, start, 0), wanted, **CLOSE)
    assert wanted.abs().max() > 0


def test_deeplift_of_two_inputs_equals_captum():
    models = pytest.importorskip("captum.testing.helpers.basic_models")
    model, one, two = models.ReLULinearModel(), torch.randn(4, 3), torch.randn(4, 3)
    with DeepLift(target=0).prepare(model, ["x1", "x2"]) as hooked:
        td = hooked(TensorDict({"x1": one, "x2": two}, batch_size=[4]))
    for key, wanted in zip(("x1", "x2"), attr.DeepLift(model).attribute((one, two), target=0), strict=True):
        torch.testing.assert_close(td["attr", key], wanted.detach(), **CLOSE)
