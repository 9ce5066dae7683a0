"""Attention spelled out in other words than matmul: its places are those of the same attention by torch's kernel."""

import pytest
import torch
from torch import nn

from tdcache import Ablation, ActivationCaching, EditError

PLACES = r"attn::(q|k|v|scores|pattern|z)"


def heads_first(q, k, v):
    scores = torch.einsum("b h i d, b h j d -> b h i j", q * 8**-0.5, k)
    return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v)


def any_leading_axes(q, k, v):
    scores = torch.einsum("... i d, ... j d -> ... i j", [q * 8**-0.5, k])
    return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


def positions_first(q, k, v):
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    pattern = (torch.einsum("blhd,bshd->bhls", q, k) * 8**-0.5).softmax(-1)
    return torch.einsum("bhls,bshd->blhd", pattern, v).transpose(1, 2)


def operands_exchanged(q, k, v):
    scores = torch.einsum("bhjd,bhid->bhij", k, q * 8**-0.5)
    return torch.einsum("bhjd,bhij->bhid", v, scores.softmax(-1))


def beside_a_table_of_positions(q, k, v):
    bias = torch.einsum("bhld,lrd->bhlr", q, torch.zeros(5, 5, 8))
    scores = q @ k.mT * 8**-0.5 + bias
    return scores.softmax(-1) @ v


def merged_heads(q, k, v):
    q, k, v = (each.flatten(0, 1) for each in (q, k, v))
    pattern = (q @ k.mT * 8**-0.5).softmax(-1)
    return (pattern @ v).unflatten(0, (2, 4))


class Attention(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend = attend
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, attend):
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(attend)

    def forward(self, x):
        return self.attn(x)


def kernel(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def places(model, x):
    with ActivationCaching(PLACES, directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).square().sum().backward()
    return hooked.cache


SPELLED = (heads_first, any_leading_axes, positions_first, operands_exchanged, beside_a_table_of_positions)


@pytest.mark.parametrize("attend", SPELLED)
def test_products_by_einsum_have_the_places_of_the_kernel(attend):
    x = torch.randn(2, 5, 32, requires_grad=True)
    found, expected = places(Model(attend), x), places(Model(kernel), x)
    for direction in ("fwd", "bwd"):
        assert set(found[direction].keys()) == set(expected[direction].keys())
        for key, value in expected[direction].items():
            scaled = 8**0.5 if key.endswith("::q") and attend in SPELLED[:2] + SPELLED[3:4] else 1.0
            factor = scaled if direction == "fwd" else 1 / scaled
            assert found[direction, key].shape == value.shape
            assert torch.allclose(found[direction, key] * factor, value, atol=2e-5)  # float32, in another order


@pytest.mark.parametrize("attend", SPELLED)
@pytest.mark.parametrize("place", ["q", "k", "v", "scores", "pattern", "z"])
def test_an_edit_at_products_by_einsum_is_that_at_the_kernel(attend, place):
    x = torch.randn(2, 5, 32)
    results = []
    for model in (Model(attend), Model(kernel)):
        with Ablation(f"attn::{place}", heads=(4, [1])).prepare(model) as hooked, torch.no_grad():
            results.append(hooked(x))
            without_attention = model.attn.out(torch.zeros(2, 5, 32))
    assert torch.allclose(*results, atol=1e-5)
    for other in (model(x), without_attention):  # one head is edited, and only one
        assert not torch.allclose(results[0], other, atol=1e-3)


def test_heads_that_are_merged_with_the_rows_are_refused_where_one_of_them_is_meant():
    model, x = Model(merged_heads), torch.randn(2, 5, 32)
    expected = (
        r"heads=\(4, \.\.\.\) is not the number of heads at 'attn::pattern', whose value has 8: shape \(8, 5, 5\)"
    )
    with pytest.raises(EditError, match=expected), Ablation("attn::pattern", heads=(4, [1])).prepare(model) as hooked:
        hooked(x)
    with Ablation("attn::pattern", heads=(8, [1, 5])).prepare(model), torch.no_grad():
        merged = model(x)
    kernels = Model(kernel)
    with Ablation("attn::pattern", heads=(4, [1])).prepare(kernels), torch.no_grad():
        assert torch.allclose(kernels(x), merged, atol=1e-5)
