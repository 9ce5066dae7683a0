"""Tests of the places of an attention call: against torch's kernel, against attention spelled out, and against edits
by hand."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from call_models import Attention
from model_state import state_of
from tdcache.errors import CaptureError, EditError, SelectionError
from tdcache.function_calls.attach import attach_call
from tdcache.function_calls.attention import derive_attention, prove
from tdcache.function_calls.roles import attach_attention
from tdcache.function_calls.sites import CallSite
from tdcache.hooks.registrations import MultiHookHandle, Order

PLACES = ("q", "k", "v", "scores", "pattern", "z")
# Products in another order of summation than the kernel's.
CLOSE = {"atol": 2e-6, "rtol": 0}


def twins(**options):
    """The same weights by the kernel and spelled out, and an input."""
    kernel, spelled = Attention(kernel=True, **options), Attention(kernel=False, **options)
    spelled.load_state_dict(kernel.state_dict())
    return kernel, spelled, torch.randn(2, 5, 32)


def reading(model, places=PLACES, use="read", path=""):
    kept = {}

    def keep(place):
        return lambda module, args, kwargs, value: kept.__setitem__(place, value)

    handles = [attach_attention(model, CallSite(path, place), keep(place), use=use) for place in places]
    return kept, MultiHookHandle(handles)


def edited(model, place, edit, **options):
    return MultiHookHandle(
        [attach_attention(model, CallSite("", place), lambda module, args, kwargs, value: edit(value), **options)]
    )


def masks():
    half = torch.rand(5, 5) > 0.4
    half.fill_diagonal_(True)
    yield "causal", None
    yield "boolean", half
    yield "boolean per head", (torch.rand(2, 4, 5, 5) > 0.4) | torch.eye(5, dtype=torch.bool)
    yield "added", torch.randn(2, 1, 5, 5)
    yield "added minus infinity", torch.zeros(5, 5).masked_fill(~half, -math.inf)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", [name for name, _ in masks()])
def test_the_places_under_the_kernel_are_those_of_attention_spelled_out(name, groups):
    kernel, spelled, x = twins(groups=groups)
    mask = dict(masks())[name]
    expected = kernel(x, mask)
    under, handle = reading(kernel)
    with handle:
        assert torch.equal(kernel(x, mask), expected)
    plain, handle = reading(spelled)
    with handle:
        spelled(x, mask)
    assert torch.allclose(under["pattern"], plain["pattern"], **CLOSE)
    assert torch.allclose(under["z"], plain["z"], **CLOSE)
    assert torch.allclose(under["scores"], plain["scores"], **CLOSE)
    assert torch.equal(under["q"], plain["q"])
    assert torch.equal(under["k"].repeat_interleave(4 // groups, 1), plain["k"])
    assert torch.equal(under["v"].repeat_interleave(4 // groups, 1), plain["v"])


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_an_edit_is_that_of_a_copy_edited_by_hand(kernel, place):
    by_kernel, spelled, x = twins()
    model = by_kernel if kernel else spelled
    q, k, v = (model.split(layer(x), 4) for layer in (model.q, model.k, model.v))
    values = {"q": q, "k": k, "v": v}
    if place in values:
        values[place] = values[place] * 0.5
    scores = values["q"] @ values["k"].transpose(-1, -2) / 8**0.5
    scores = scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
    scores = scores * 0.5 if place == "scores" else scores
    pattern = scores.softmax(-1) * (0.5 if place == "pattern" else 1)
    z = pattern @ values["v"] * (0.5 if place == "z" else 1)
    by_hand = model.out(z.transpose(1, 2).reshape(x.shape))
    with edited(model, place, lambda value: value * 0.5):
        assert torch.allclose(model(x), by_hand, **CLOSE)
    assert not torch.allclose(model(x), by_hand, **CLOSE)


def test_a_head_is_ablated_at_its_pattern():
    kernel, spelled, x = twins()

    def without_head(pattern):
        keep = torch.ones(4, 1, 1)
        keep[2] = 0
        return pattern * keep

    spelled.edit = without_head
    x.requires_grad_()
    (by_hand,) = torch.autograd.grad(spelled(x).square().sum(), x)
    with edited(kernel, "pattern", without_head):
        assert torch.allclose(kernel(x), spelled(x), **CLOSE)
        (gradient,) = torch.autograd.grad(kernel(x).square().sum(), x)
    assert torch.allclose(gradient, by_hand, atol=1e-5, rtol=0)  # gradients of squares, of the order of ten


def test_scores_are_edited_before_the_pattern_is_and_reads_see_the_final_values():
    kernel, _, x = twins()
    kept, read = reading(kernel, ("scores", "pattern", "z"))
    pattern = edited(kernel, "pattern", lambda value: value * 2, order=Order.EDIT)
    scores = edited(kernel, "scores", lambda value: value.masked_fill(value > -math.inf, 0.0))
    handle = MultiHookHandle([pattern, scores])
    with read, handle:
        kernel(x)
    even = torch.ones(5, 5).tril() / torch.arange(1, 6)[:, None]
    assert torch.allclose(kept["pattern"][0, 0], even, **CLOSE)  # registered first, so it reads before the edit
    assert torch.allclose(kept["z"], 2 * even @ kernel.split(kernel.v(x), 4), **CLOSE)


def test_gradients_reach_a_watched_pattern_and_the_output_stays_the_kernels():
    kernel, spelled, x = twins()
    expected = kernel(x)
    kept, handle = reading(kernel, ("pattern", "scores"), use="watch")
    with handle:
        result = kernel(x)
    assert torch.equal(result, expected)
    found = torch.autograd.grad(result.square().sum(), [kept["pattern"], kept["scores"]], retain_graph=True)
    plain, handle = reading(spelled, ("pattern", "scores"))
    with handle:
        loss = spelled(x).square().sum()
    wanted = torch.autograd.grad(loss, [plain["pattern"], plain["scores"]], retain_graph=True)
    for mine, its in zip(found, wanted, strict=True):
        assert torch.allclose(mine, its, atol=1e-5, rtol=0)  # gradients of squares, of the order of ten
    for name, parameter in kernel.named_parameters():
        (mine,) = torch.autograd.grad(result.square().sum(), parameter, retain_graph=True)
        (its,) = torch.autograd.grad(loss, spelled.get_parameter(name), retain_graph=True)
        assert torch.allclose(mine, its, atol=1e-4, rtol=0)  # sums over ten positions of the same


def test_a_pattern_that_is_only_read_has_no_graph():
    kernel, _, x = twins()
    kept, handle = reading(kernel, ("pattern",))
    with handle:
        kernel(x)
    assert not kept["pattern"].requires_grad


def test_a_row_that_is_masked_throughout_is_zero_as_in_the_kernel():
    kernel, _, x = twins()
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[3] = False
    kept, handle = reading(kernel)
    with handle:
        kernel(x, mask)
    assert kept["pattern"][..., 3, :].abs().sum() == 0
    assert torch.allclose(kept["pattern"] @ kept["v"], kept["z"], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    kernel, spelled, x = twins()
    kept, handle = reading(kernel.to(dtype))
    with handle:
        kernel(x.to(dtype))
    plain, handle = reading(spelled.double())
    with handle:
        spelled(x.double())
    # Three significant digits of bfloat16 in q and k, and so in the exponent.
    limit = {torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 3e-2}[dtype]
    assert kept["pattern"].dtype == dtype
    assert torch.allclose(kept["pattern"].double(), plain["pattern"], atol=limit, rtol=0)


def test_autocast_lowers_the_kernel_and_not_the_pattern():
    kernel, _, x = twins()
    kept, handle = reading(kernel)
    with torch.autocast("cpu", torch.bfloat16):
        expected = kernel(x)
        with handle:
            assert torch.equal(kernel(x), expected)
    rows = kept["pattern"].float().sum(-1)
    assert torch.allclose(rows, torch.ones_like(rows), atol=2e-2, rtol=0)  # eight bits per entry of bfloat16


def test_the_derivation_agrees_with_the_kernel_in_every_variant():
    scales, lengths = (None, 0.3), ((5, 5), (3, 7), (1, 6))
    for dtype, groups, scale, (queries, keys) in itertools.product(
        (torch.float32, torch.float64), (4, 2), scales, lengths
    ):
        q = torch.randn(2, 4, queries, 8, dtype=dtype)
        k, v = torch.randn(2, 2, groups, keys, 8, dtype=dtype)
        for mask in (None, torch.rand(queries, keys) > 0.2, torch.randn(2, 1, queries, keys, dtype=dtype)):
            for causal in (False, True) if mask is None else (False,):
                options = {"attn_mask": mask, "is_causal": causal, "scale": scale, "enable_gqa": groups != 4}
                z = F.scaled_dot_product_attention(q, k, v, **options)
                attention = derive_attention((q, k, v), options, where="x")
                pattern = attention.pattern(attention.scores())
                assert prove(attention, pattern, z, where="x")
                assert torch.allclose(attention.z(pattern), z, **CLOSE)


def call_with(**options):
    class Odd(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(**{"query": x, "key": x, "value": x, **options})

    return Odd()


class Marked(torch.Tensor):
    pass


def refusal(model, x):
    _, handle = reading(model, ("pattern",))
    with handle, pytest.raises(CaptureError) as error:
        model(x)
    return str(error.value)


def test_dropout_is_refused():
    assert refusal(call_with(dropout_p=0.1), torch.randn(1, 2, 3, 4)) == (
        "the attention of 'Odd' cannot be derived exactly: the call drops entries at random (dropout_p > 0); call "
        "model.eval() first, or select the function itself"
    )


def test_a_mask_that_is_a_subclass_is_refused():
    mask = torch.zeros(3, 3).as_subclass(Marked)
    assert refusal(call_with(attn_mask=mask), torch.randn(1, 2, 3, 4)) == (
        "the attention of 'Odd' cannot be derived exactly: the mask is a Marked, which may mean more than its values; "
        "use a torch.Tensor, or select the function itself"
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    x = torch.nested.nested_tensor([torch.randn(2, 3, 4)])
    assert refusal(call_with(), x) == (
        "the attention of 'Odd' cannot be derived exactly: q is a nested tensor; pad it to a dense one, or select the "
        "function itself"
    )


def test_a_pattern_that_does_not_give_the_output_is_refused():
    q, k, v = torch.randn(3, 1, 2, 3, 4)
    attention = derive_attention((q, k, v), {}, where="a")
    pattern = attention.pattern(attention.scores())
    with pytest.raises(CaptureError) as error:
        prove(attention, pattern, pattern @ v * 1.01, where="a")
    assert str(error.value) == (
        "the attention of 'a' cannot be derived exactly: pattern @ v differs from what the kernel returned by 9.9e-03; "
        "use eager attention, or select the function itself"
    )


def test_dropout_between_softmax_and_product_is_refused():
    class Dropping(Attention):
        def forward(self, x):
            q = self.split(x, 4)
            return F.dropout((q @ q.transpose(-1, -2)).softmax(-1), 0.5, self.training) @ q

    model, x = Dropping(), torch.randn(2, 5, 32)
    assert refusal(model, x) == (
        "what Dropping at '' mixes its values by is not what its softmax returned (dropout in training, or a step in "
        "between); call model.eval(), or select '::softmax'"
    )
    kept, handle = reading(model.eval(), ("pattern",))
    with handle:
        model(x)
    assert kept["pattern"].shape == (2, 4, 5, 5)


def test_several_products_before_the_softmax_are_refused_where_q_or_k_is_asked_for():
    class Disentangled(Attention):
        def forward(self, x):
            q = self.split(x, 4)
            return (q @ q.transpose(-1, -2) + q @ q.transpose(-1, -2)).softmax(-1) @ q

    model, x = Disentangled(), torch.randn(2, 5, 32)
    _, handle = reading(model, ("q",))
    with handle, pytest.raises(CaptureError) as error:
        model(x)
    assert str(error.value) == (
        "Disentangled at '' makes several products before its softmax, so '::q' cannot be told; select '::matmul' by "
        "its number instead"
    )
    kept, handle = reading(model, ("pattern", "v", "z"))
    with handle:
        model(x)
    assert torch.equal(kept["pattern"] @ kept["v"], kept["z"])


def test_a_replacement_of_another_shape_is_refused():
    kernel, _, x = twins()
    with (
        edited(kernel, "pattern", lambda value: value[:, :1]),
        pytest.raises(EditError, match="'::pattern' does not fit"),
    ):
        kernel(x)


def test_what_is_no_place_of_attention_is_refused():
    with pytest.raises(SelectionError) as error:
        attach_attention(Attention(), CallSite("", "softmax"), print)
    assert str(error.value) == (
        "'::softmax' is no place of an attention call; those are ::q, ::k, ::v, ::scores, ::pattern, ::z"
    )


def test_two_attention_calls_in_one_forward_are_numbered():
    class Both(nn.Module):
        def forward(self, x):
            y = F.scaled_dot_product_attention(x, x, x)
            return F.scaled_dot_product_attention(y, y, y, is_causal=True)

    model, x = Both(), torch.randn(1, 2, 3, 4)
    kept = {}
    handles = [
        attach_attention(model, CallSite("", "pattern", at), lambda m, a, k, value, at=at: kept.__setitem__(at, value))
        for at in (0, 1)
    ]
    with MultiHookHandle(handles):
        model(x)
    assert (kept[0][0, 0] > 0).all()
    assert torch.equal(kept[1][0, 0] > 0, torch.ones(3, 3, dtype=torch.bool).tril())


def test_a_place_and_the_function_itself_can_both_be_edited():
    kernel, _, x = twins()
    whole = attach_call(kernel, CallSite("", "scaled_dot_product_attention"), None, lambda m, a, k, output: output * 2)
    with MultiHookHandle([whole]), edited(kernel, "pattern", lambda value: value * 0.5):
        result = kernel(x)
    assert torch.allclose(result, kernel(x), **CLOSE)


def test_everything_is_restored():
    kernel, _, x = twins()
    before = state_of(kernel)
    _, handle = reading(kernel)
    with handle:
        kernel(x)
    assert state_of(kernel) == before
