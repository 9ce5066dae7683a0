"""Named groups of the pattern, and ``stack_by``: one dense tensor over the layers."""

import pytest
import torch
from torch import nn

from tdcache import ActivationCaching, CaptureError, Stack, select


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.mlp(torch.tanh(self.attn(x)))


@pytest.fixture
def model():
    return nn.Sequential(*[Block(4) for _ in range(11)])


@pytest.fixture
def x():
    return torch.randn(5, 4)


PATTERN = r"(?P<layer>\d+)\.(?P<kind>attn|mlp)"


def separately(model, x, **options):
    with ActivationCaching(PATTERN, **options).prepare(model) as hooked:
        hooked(x)
    return hooked.cache


def test_the_named_groups_are_kept_per_site(model):
    site = select(model, PATTERN)[-1]
    assert (site.path, dict(site.groups)) == ("10.mlp", {"layer": "10", "kind": "mlp"})


def test_sites_that_differ_only_in_the_group_become_one_tensor_in_numeric_order(model, x):
    with ActivationCaching(PATTERN, stack_by="layer").prepare(model) as hooked:
        hooked(x)
    apart = separately(model, x)
    assert sorted(hooked.cache.keys()) == ["attn", "mlp"]
    for kind in ("attn", "mlp"):
        assert torch.equal(hooked.cache[kind], torch.stack([apart[f"{layer}.{kind}"] for layer in range(11)]))


def test_without_another_group_the_key_is_the_path_with_a_star(model, x):
    with ActivationCaching(r"(?P<layer>\d+)\.attn", stack_by="layer").prepare(model) as hooked:
        hooked(x)
    assert list(hooked.cache.keys()) == ["*.attn"]
    assert hooked.cache["*.attn"].shape == (11, 5, 4)


def test_a_group_that_is_a_word_is_stacked_in_the_order_of_words(model, x):
    with ActivationCaching(PATTERN, stack_by="kind").prepare(model) as hooked:
        hooked(x)
    apart = separately(model, x)
    assert torch.equal(hooked.cache["3"], torch.stack([apart["3.attn"], apart["3.mlp"]]))


def test_stacking_goes_with_reducers(model, x):
    with ActivationCaching(PATTERN, stack_by="layer", reducer=Stack()).prepare(model) as hooked:
        hooked(x)
        hooked(2 * x)
    assert hooked.cache["attn"].shape == (11, 2, 5, 4)
    assert torch.equal(
        hooked.cache["attn"][:, 1], torch.stack([separately(model, 2 * x)[f"{i}.attn"] for i in range(11)])
    )


def test_stacking_goes_with_gradients(model, x):
    with ActivationCaching(PATTERN, stack_by="layer", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    with ActivationCaching(PATTERN, directions=["bwd"]).prepare(model) as apart:
        apart(x).sum().backward()
    wanted = torch.stack([apart.cache[f"{layer}.attn"] for layer in range(11)])
    assert torch.equal(hooked.cache["bwd", "attn"], wanted)


def test_a_pattern_without_the_group_is_an_error_that_names_those_there(model):
    with (
        pytest.raises(CaptureError, match=r"\(\?P<block>\.\.\.\).*only 'kind', 'layer'") as caught,
        ActivationCaching(PATTERN, stack_by="block").prepare(model),
    ):
        pass
    assert caught.value.paths[:2] == ("0.attn", "0.mlp")


def test_sites_of_different_shape_cannot_be_stacked(x):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with (
        ActivationCaching(r"(?P<layer>\d)", stack_by="layer").prepare(model) as hooked,
        pytest.raises(CaptureError, match=r"'0' \(5, 3\), '1' \(5, 2\)"),
    ):
        hooked(x)


def test_a_site_that_saw_nothing_cannot_be_stacked(x):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            return self.layers[0](x)

    with (
        pytest.raises(CaptureError, match=r"'layers\.1' saw no value") as caught,
        ActivationCaching(r"layers\.(?P<layer>\d)", stack_by="layer").prepare(Skipping()) as hooked,
    ):
        hooked(x)
    assert caught.value.paths == ("layers.1",)
