"""no_grad, inference_mode and autocast; and that a capture changes neither outputs nor gradients."""

import pytest
import torch
from torch import nn

from small_models import MLP, Residual, by_hand
from tdcache import ActivationCaching, UnfiredSiteWarning


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("inside", [True, False])
def test_values_are_kept_in_every_grad_mode(model, x, mode, inside):
    paths = ["layers.0", "layers.1", "head"]
    with mode():
        wanted = by_hand(model, paths, lambda: model(x))
    if inside:
        with ActivationCaching(r"layers\.[01]|head").prepare(model) as hooked, mode():
            hooked(x)
    else:
        with mode(), ActivationCaching(r"layers\.[01]|head").prepare(model) as hooked:
            hooked(x)
    for path in paths:
        assert torch.equal(hooked.cache[path], wanted[path][0])
        assert not hooked.cache[path].requires_grad


def test_grad_mode_is_what_it_was(model, x):
    with torch.no_grad(), ActivationCaching("head").prepare(model) as hooked:
        assert not torch.is_grad_enabled()
        assert not hooked(x).requires_grad
    with ActivationCaching("head", directions=["bwd", "grad_in"]).prepare(model) as hooked:
        y = hooked(x)
        assert y.requires_grad
        y.sum().backward()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("direction", ["bwd", "grad_in"])
def test_a_gradient_asked_for_under_no_grad_is_reported_and_harmless(model, x, direction):
    with (
        pytest.warns(UnfiredSiteWarning, match="did not require grad"),
        torch.no_grad(),
        ActivationCaching("head", directions=[direction]).prepare(model) as hooked,
    ):
        y = hooked(x)
    assert torch.equal(y, model(x))


def test_a_forward_without_gradients_between_two_with_them(model, x):
    with ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
        with torch.no_grad():
            y = hooked(2 * x)
        assert torch.equal(hooked.cache["fwd", "head"], y)
        (3 * hooked(x)).sum().backward()
        assert torch.equal(hooked.cache["bwd", "head"], torch.full((5, 2), 3.0))


def test_autocast_values_are_kept_in_their_own_dtype(model, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = by_hand(model, ["head"], lambda: model(x))["head"][0]
        with ActivationCaching("head", directions=["fwd", "bwd"]).prepare(model) as hooked:
            hooked(x).sum().backward()
    assert hooked.cache["fwd", "head"].dtype == hooked.cache["bwd", "head"].dtype == torch.bfloat16
    assert torch.equal(hooked.cache["fwd", "head"], wanted)


def test_autocast_gradients_of_inputs_are_in_the_dtype_of_the_input(model, x):
    with (
        ActivationCaching("layers.0|head", directions=["grad_in"]).prepare(model) as hooked,
        torch.autocast("cpu", torch.bfloat16),
    ):
        hooked(x.requires_grad_()).sum().backward()
    assert hooked.cache["layers.0"].dtype == torch.float32
    assert hooked.cache["head"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make", [MLP, Residual, lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))]
)
@pytest.mark.parametrize("directions", [["fwd"], ["fwd", "fwd_pre", "bwd", "grad_in"]], ids=len)
@pytest.mark.parametrize("hold", ["detached", "live", "snapshot"])
def test_a_capture_leaves_outputs_and_gradients_bit_for_bit(make, directions, hold, x):
    def run(model, forward, x):
        torch.manual_seed(1)  # dropout
        x = x.clone().requires_grad_()
        y = forward(x)
        y.square().sum().backward()
        return [y, x.grad, *[parameter.grad for parameter in model.parameters()], *model.buffers()]

    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model = make()
    wanted = run(plain, plain, x)
    # The in-place ReLU of the residual net overwrites inputs and aliases: only what is safe there is captured.
    pattern = "first|second" if make is Residual else ".*[0-9d]"
    if make is Residual and hold != "snapshot":
        directions = ["bwd", "grad_in"]
    with ActivationCaching(pattern, directions=directions, hold=hold).prepare(model) as hooked:
        found = run(model, hooked, x)
        assert not hooked.cache.is_empty()
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_double_backward_works_through_a_captured_forward(model, x):
    def second_derivative(forward, x):
        x = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(forward(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
        return x.grad

    wanted = second_derivative(model, x)
    with ActivationCaching("head|layers.0", directions=["fwd", "bwd", "grad_in"]).prepare(model) as hooked:
        assert torch.equal(second_derivative(hooked, x), wanted)


def test_functorch_transforms_run_inside_the_block(model, x):
    def loss(x):
        return model(x).square().sum()

    wanted = torch.func.grad(loss)(x)
    with ActivationCaching("head", hold="snapshot").prepare(model):
        assert torch.equal(torch.func.grad(loss)(x), wanted)
