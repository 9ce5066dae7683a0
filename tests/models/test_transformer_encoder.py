"""nn.TransformerEncoder in eval mode, where torch has a fused path that calls no submodules."""

import pytest
import torch
from torch import nn

from small_models import by_hand
from tdcache import ActivationCaching, UnfiredSiteWarning


@pytest.fixture
def model():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8)


def test_the_layers_are_kept_in_eval_mode(model, x):
    with ActivationCaching(r"layers\.\d+").prepare(model) as hooked, torch.no_grad():
        y = hooked(x)
    assert torch.equal(hooked.cache["layers.1"], y)


@pytest.mark.parametrize("training", [True, False])
def test_submodules_of_the_layers_are_kept(model, x, training):
    for module in model.modules():
        module.p = 0.0 if isinstance(module, nn.Dropout) else getattr(module, "p", None)
    model.train(training)
    paths = [
        f"layers.{layer}.{name}" for layer in (0, 1) for name in ("linear1", "linear2", "norm1", "norm2", "self_attn")
    ]
    with (
        ActivationCaching(r"layers\.\d+\.(linear.|norm.|self_attn)").prepare(model) as hooked,
        torch.set_grad_enabled(training),
    ):
        hooked(x)
    assert sorted(hooked.cache.keys()) == sorted(paths)
    assert hooked.cache["layers.0.linear1"].shape == (2, 3, 16)
    assert torch.equal(hooked.cache["layers.0.linear1"], model.layers[0].linear1(hooked.cache["layers.0.norm1"]))


def test_the_values_agree_with_the_fused_path(model, x):
    with torch.no_grad():
        fused = model(x)
        with ActivationCaching(r"layers\.1\.norm2").prepare(model) as hooked:
            hooked(x)
    # The fused kernel and the module calls add in another order: single precision rounding of values around one.
    torch.testing.assert_close(hooked.cache["layers.1.norm2"], fused, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_padding_mask_does_not_lose_the_sites(model, x):
    mask = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad(), ActivationCaching(r"layers\.\d+\.linear1").prepare(model) as hooked:
        model(x, src_key_padding_mask=mask)
    assert sorted(hooked.cache.keys()) == ["layers.0.linear1", "layers.1.linear1"]


class FusedLayer(nn.TransformerEncoderLayer):
    """Stands for a fused kernel: computes without calling a submodule, whatever hooks are there."""

    def forward(self, src, **rest):
        return torch.nn.functional.layer_norm(src, (8,), self.norm1.weight, self.norm1.bias)


def test_what_the_fused_path_skips_is_reported_by_name_with_the_way_out(x):
    model = nn.Sequential(FusedLayer(8, 2, 16, batch_first=True)).eval()
    with (
        pytest.warns(UnfiredSiteWarning, match=r"'0\.linear1'") as caught,
        ActivationCaching(r"0|0\.linear1").prepare(model) as hooked,
    ):
        hooked(x)
    assert list(hooked.cache.keys()) == ["0"]
    assert (
        "the fused fast path of FusedLayer '0' calls no submodules in eval mode; switch it off with "
        "torch.backends.mha.set_fastpath_enabled(False), or call model.train()"
    ) in str(caught[0].message)


def test_gradients_of_the_encoder_are_kept(model, x):
    with ActivationCaching(r"layers\.\d+", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    assert torch.equal(hooked.cache["bwd", "layers.1"], torch.ones(2, 3, 8))
    assert hooked.cache["bwd", "layers.0"].shape == (2, 3, 8)


def test_multihead_attention_gives_its_output_and_by_pick_its_weights(x):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    wanted, weights = model["attention"](x, x, x)
    with ActivationCaching("attention", pick="all").prepare(model) as hooked:
        model["attention"](x, x, x)
        assert torch.equal(hooked.cache["attention", "0"], wanted)
        assert torch.equal(hooked.cache["attention", "1"], weights)


def test_by_hand_and_by_context_agree_on_the_fused_path_being_left(model, x):
    with torch.no_grad():
        wanted = by_hand(model, ["layers.0.linear1"], lambda: model(x))["layers.0.linear1"]
        with ActivationCaching(r"layers\.0\.linear1").prepare(model) as hooked:
            hooked(x)
    assert torch.equal(hooked.cache["layers.0.linear1"], wanted[0])
