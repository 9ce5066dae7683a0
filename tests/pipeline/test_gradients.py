"""Gradient taps: reading, replacing, stopping; their order; and where no gradient can come."""

import pytest
import torch
from torch import nn

from pipeline.written_out import Save, Written
from tdcache.errors import CaptureError, EditError, HookSignatureError
from tdcache.pipeline import (
    FwdBwdHooks,
    GradientHook,
    Hooks,
    TransformerHooks,
    WrapperHooks,
    grad_hook_wrapper,
    stop_gradient,
)


@pytest.fixture
def x():
    return torch.randn(3, 4, requires_grad=True)


def ablate(grad):
    return 0 * grad


def test_the_value_goes_through_and_the_gradient_is_read(x):
    seen = []
    y = grad_hook_wrapper(seen.append)(x)
    assert torch.equal(y, x)
    (y**2).sum().backward()
    assert torch.equal(seen[0], 2 * x.detach())
    assert torch.equal(x.grad, seen[0])


def test_what_the_hook_returns_goes_on(x):
    (grad_hook_wrapper(lambda grad: grad + 1)(x) ** 2).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach() + 1)


def test_the_gradient_is_that_of_what_comes_after_and_of_nothing_else(x):
    seen = []
    inner = x * 1
    y = grad_hook_wrapper(seen.append)(inner)
    (3 * y + 5 * inner).sum().backward()
    assert torch.equal(seen[0], torch.full((3, 4), 3.0))
    assert torch.equal(x.grad, torch.full((3, 4), 8.0))


def test_backward_hooks_fire_in_the_order_they_were_appended(x):
    before, after = [], []
    place = FwdBwdHooks().append_bwd(before.append).append_bwd(ablate).append_bwd(after.append)
    (place(x) ** 2).sum().backward()
    assert torch.equal(before[0], 2 * x.detach())
    assert not after[0].any()
    assert not x.grad.any()


def test_forward_hooks_fire_in_the_order_they_were_appended(x):
    before, after = [], []
    FwdBwdHooks().append_fwd(before.append).append_fwd(lambda x: 0 * x).append_fwd(after.append)(x)
    assert torch.equal(before[0], x)
    assert not after[0].any()


def test_hooks_that_are_wrapped_one_by_one_stand_where_they_were_put(x):
    after = []
    Hooks(grad_hook_wrapper(after.append), grad_hook_wrapper(ablate))(x).sum().backward()
    assert not after[0].any()  # in the backward the later one comes first


def test_gradients_are_those_after_the_edits_of_fwd_and_before_those_of_fwd2(x):
    seen = []
    place = FwdBwdHooks().append_fwd(lambda x: 3 * x).append_bwd(seen.append).append_fwd2(lambda x: x**2)
    y = place(x)
    assert torch.equal(y, (3 * x) ** 2)
    y.sum().backward()
    torch.testing.assert_close(seen[0], 2 * 3 * x.detach())
    torch.testing.assert_close(x.grad, 3 * seen[0])


def test_a_hook_may_write_into_its_gradient_and_keep_it(x):
    kept = []

    def write(grad):
        grad[0] = 0
        kept.append(grad)

    total = x * 1
    (grad_hook_wrapper(write)(total) + total).sum().backward()
    x.grad.add_(7)
    assert torch.equal(kept[0][1:], torch.ones(2, 4))
    assert not kept[0][0].any()
    assert torch.equal(x.grad, torch.full((3, 4), 9.0))  # it returned None, so nothing was replaced


def test_the_keyword_arguments_are_those_of_the_forward(x):
    seen = []
    place = FwdBwdHooks().append_bwd(lambda grad, layer: seen.append(layer)).bind(layer=3)
    y = place(x)
    place.unbind("layer").bind(layer=4)
    y.sum().backward()
    assert seen == [3]


def test_a_hook_appended_after_the_forward_is_not_called_by_its_backward(x):
    seen = []
    place = FwdBwdHooks().append_bwd(lambda grad: None)
    y = place(x)
    place.append_bwd(seen.append)
    y.sum().backward()
    assert seen == []


def test_a_module_that_writes_in_place_after_the_tap_is_no_trouble(x):
    seen = []
    y = nn.ReLU(inplace=True)(grad_hook_wrapper(seen.append)(x * 2))
    y.sum().backward()
    assert torch.equal(seen[0], (x > 0).float())


def test_second_derivatives_pass_through_an_edit(x):
    y = (grad_hook_wrapper(lambda grad: 2 * grad)(x) ** 3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    torch.testing.assert_close(first, 6 * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    # The tap doubles once in the first derivative, and once more on the way through the graph of it.
    torch.testing.assert_close(second, 24 * x.detach())


def test_every_backward_through_the_graph_calls_the_hook(x):
    seen = []
    y = grad_hook_wrapper(seen.append)(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["no_grad", "frozen", "integer", "inference", "no tensor"])
def test_a_gradient_hook_where_no_gradient_can_come_is_an_error(kind):
    value = {"frozen": torch.ones(2), "integer": torch.ones(2, dtype=torch.long), "no tensor": 3}.get(
        kind, torch.ones(2, requires_grad=True)
    )
    reason = {
        "frozen": r"the value, torch.float32 of shape \(2,\), does not require grad",
        "integer": "the value, torch.int64",
        "no tensor": "the value is int, no tensor",
    }.get(kind, "the forward runs without grad")
    guard = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(kind, torch.enable_grad)
    place = FwdBwdHooks().append_bwd(ablate)
    with guard(), pytest.raises(CaptureError, match=f"gradient hook ablate.* would never be called: {reason}"):
        place(value)


def test_the_path_in_scope_is_in_the_error():
    with pytest.raises(CaptureError, match=r"at 'layers\.0' would never be called") as failure:
        GradientHook(ablate)(torch.ones(2), path="layers.0")
    assert failure.value.paths == ("layers.0",)


def test_without_gradient_hooks_a_value_needs_no_gradient():
    x = torch.ones(2)
    assert FwdBwdHooks()(x) is x
    assert WrapperHooks(grad_hook_wrapper)(x) is x


def test_a_gradient_of_another_shape_is_an_error(x):
    with pytest.raises(EditError, match=r"the gradient hook <lambda>' does not fit"):
        grad_hook_wrapper(lambda grad: grad[0])(x).sum().backward()


def test_what_cannot_be_called_is_no_gradient_hook():
    with pytest.raises(HookSignatureError, match="a hook is a callable"):
        grad_hook_wrapper(None)


def test_a_stop_lets_the_value_through_and_no_gradient(x):
    y = Hooks(stop_gradient)(x * 2)
    assert torch.equal(y, 2 * x)
    assert not y.requires_grad
    (y * x).sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_stopping_the_scale_of_a_normalisation_gives_the_gradient_of_a_linear_map():
    model, ids = Written(layers=1), torch.randint(11, (2, 5))
    saved = Save()
    hooks = TransformerHooks().append_to_path("resid.ln_f.scale.fwd", stop_gradient)
    hooks.append_to_path("resid.ln_f.post_mean_subtraction.bwd", saved)
    scale = Save()
    hooks.append_to_path("resid.ln_f.scale.fwd", scale)
    model(ids, hooks).sum().backward()
    want = model.head.weight.sum(0).expand(2, 5, 8) / scale.seen[None]
    torch.testing.assert_close(saved.seen[None], want.detach())


def test_backward_from_any_scalar_inside():
    model, ids = Written(), torch.randint(11, (2, 5))
    live, grads = {}, Save()

    def keep(x, layer):
        live[layer] = x

    hooks = TransformerHooks().append_to_path("mlp.post_act.fwd", keep).append_to_path("mlp.post_act.bwd", grads)
    model(ids, hooks)
    live[1][..., 3].sum().backward()
    assert list(grads.seen) == [0]  # of the layers above nothing depends on that neuron, and its own tap comes after it
    assert model.blocks[0].up.weight.grad.any()
    assert model.blocks[2].up.weight.grad is None


def test_a_zero_loss_with_a_gradient_put_in_by_a_hook_is_a_backward_from_inside():
    model, ids = Written(), torch.randint(11, (2, 5))
    seed = torch.zeros(2, 5, 12)
    seed[..., 3] = 1
    hooks = TransformerHooks()
    hooks.mlp.post_act.append_bwd(lambda grad, layer: seed if layer == 1 else None)
    (model(ids, hooks).sum() * 0).backward()
    got = {name: each.grad.clone() for name, each in model.named_parameters() if name.startswith("blocks.0")}
    model.zero_grad()
    live = {}
    model(ids, TransformerHooks().append_to_path("mlp.post_act.fwd", lambda x, layer: live.update({layer: x})))
    live[1][..., 3].sum().backward()
    for name, grad in got.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad)


def test_the_repr_names_the_hook():
    assert repr(grad_hook_wrapper(ablate)) == "GradientHook(ablate)"
