"""What inference of ``nn.TransformerEncoder`` hands on where rows are padded: nested tensors, which have no axes."""

import pytest
import torch
from torch import nn

from tdcache import (
    Ablation,
    ActivationPatching,
    HookedModule,
    SteeringVectors,
    cache_activations,
)
from tdcache.errors import CaptureError, StoreError
from tdcache.harvesting import save_activations
from tdcache.reducers import Mean, Stack

# torch warns that its own fast path is a prototype.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
REMEDY = (
    r"the value at 'layers\.0' is a nested tensor, whose rows differ in length, so that it has no axes to edit, "
    r"reduce or choose from; build nn\.TransformerEncoder with enable_nested_tensor=False, or call it with gradients "
)
X, PADDING = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([[3], [5], [4]])
VECTOR = torch.ones(8)


def encoder(**options):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, **options).eval()


def run(model, context):
    with torch.no_grad(), context as opened:
        model(X, src_key_padding_mask=PADDING)
    return opened


@pytest.mark.parametrize("options", [{}, {"hold": "snapshot"}, {"directions": ["fwd_pre"]}, {"pick": "all"}])
def test_a_capture_keeps_a_nested_tensor_as_it_is(options):
    model = encoder()
    cache = run(model, cache_activations(model, r"layers\.1", **options))
    assert cache["layers.1"].is_nested
    assert [len(row) for row in cache["layers.1"].unbind()] == [3, 5, 4]


@pytest.mark.parametrize(
    "options",
    [
        {"reducer": Mean(flatten=2)},
        {"reducer": Stack()},
        {"positions": -1},
        {"rows": 0},
        {"units": [0]},
        {"heads": (2, 1)},
    ],
    ids=repr,
)
def test_a_capture_that_needs_axes_names_the_remedy(options):
    model = encoder()
    with pytest.raises(CaptureError, match=REMEDY):
        run(model, cache_activations(model, r"layers\.0", **options))


def test_stacking_of_sites_names_the_remedy():
    model = encoder()
    with pytest.raises(CaptureError, match=REMEDY):
        run(model, cache_activations(model, r"layers\.(?P<layer>\d)", stack_by="layer"))


@pytest.mark.parametrize(
    "recipe",
    [
        Ablation(r"layers\.0"),
        Ablation(r"layers\.0", "resample"),
        Ablation(r"layers\.0", rows=0),
        SteeringVectors(r"layers\.0", VECTOR),
        SteeringVectors(r"layers\.0", VECTOR, positions=-1),
        ActivationPatching(r"layers\.0", {"layers.0": X}),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_an_edit_names_the_remedy(recipe):
    model = encoder()
    with pytest.raises(CaptureError, match=REMEDY):
        run(model, recipe.prepare(model))


@pytest.mark.parametrize(
    "declare",
    [
        lambda run: run.get("layers.0", positions=-1),
        lambda run: run.get("layers.0", reducer=Stack()),
        lambda run: run.set("layers.0", X),
        lambda run: run.set("layers.0", X[:, 0], positions=0),
        lambda run: run.set("layers.0", callback=lambda output, **rest: output * 2),
    ],
)
def test_a_run_names_the_remedy(declare):
    hooked = HookedModule.from_module(encoder())
    with (
        pytest.raises(CaptureError, match=REMEDY),
        torch.no_grad(),
        hooked.run({"src": X, "src_key_padding_mask": PADDING}) as opened,
    ):
        declare(opened)


def test_a_file_of_activations_refuses_them(tmp_path):
    model = encoder()
    cache = run(model, cache_activations(model, r"layers\.1"))
    with pytest.raises(
        StoreError, match=r"dense tensors with values, and 'layers\.1' is a nested tensor; give it as a"
    ):
        save_activations(cache, tmp_path / "x.pt")


def test_the_remedies_work():
    model = encoder(enable_nested_tensor=False)
    with torch.no_grad(), cache_activations(model, r"layers\.0", positions=-1) as without:
        model(X, src_key_padding_mask=PADDING)
    model = encoder()
    with cache_activations(model, r"layers\.0", positions=-1) as with_gradients:
        model(X, src_key_padding_mask=PADDING)
    assert without["layers.0"].shape == with_gradients["layers.0"].shape == (3, 8)
