"""Names of hand-written models whose blocks are no modules, and of streams that are more than a sum."""

import copy

import pytest
import torch
from torch import nn

import tdcache
from tdcache import ActivationCaching, residual

WIDTH, LAYERS = 8, 3
TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])


class Attention(nn.Module):
    """A norm, and attention of two heads."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out((q @ k.transpose(-1, -2) / 2).softmax(-1).matmul(v).transpose(1, 2).flatten(2))


def feed_forward():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + x


class Model(nn.Module):
    """Embedding, layers, norm, logits; how layers are kept and run is the subclass's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(9, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 9)
        self.fill()

    def forward(self, ids):
        return self.head(self.norm(self.run(self.embed(ids))))


class InOrder(Model):
    """Layers that run one after the other."""

    def __init__(self, *layers):
        super().__init__()
        self.run = nn.Sequential(*layers)

    def fill(self):
        pass


class Pairs(Model):
    """A list of pairs."""

    def fill(self):
        self.layers = nn.ModuleList(nn.ModuleList([Attention(), feed_forward()]) for _ in range(LAYERS))

    def run(self, x):
        for attention, mlp in self.layers:
            x = attention(x) + x
            x = mlp(x) + x
        return x


class NamedPairs(Model):
    """A list of dictionaries."""

    def fill(self):
        parts = ({"attention": Attention(), "mlp": feed_forward()} for _ in range(LAYERS))
        self.layers = nn.ModuleList(map(nn.ModuleDict, parts))

    def run(self, x):
        for layer in self.layers:
            x = x + layer["attention"](x)
            x = x + layer["mlp"](x)
        return x


class ResidualPairs(Model):
    """A list of pairs that add by themselves."""

    def fill(self):
        pairs = ([Residual(Attention()), Residual(feed_forward())] for _ in range(LAYERS))
        self.layers = nn.ModuleList(map(nn.ModuleList, pairs))

    def run(self, x):
        for attention, mlp in self.layers:
            x = mlp(attention(x))
        return x


class Lists(Model):
    """A list for each kind of sublayer."""

    def fill(self):
        self.attentions = nn.ModuleList(Attention() for _ in range(LAYERS))
        self.mlps = nn.ModuleList(feed_forward() for _ in range(LAYERS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(LAYERS))

    def run(self, x):
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + attention(x)
            x = x + mlp(x)
        return x


class PostNormLists(Lists):
    """The same, with a norm of the stream at the end of each block."""

    def run(self, x):
        for attention, mlp, norm in zip(self.attentions, self.mlps, self.norms, strict=True):
            x = x + attention(x)
            x = norm(x + mlp(x))
        return x


@pytest.mark.parametrize("kind", [Pairs, NamedPairs, ResidualPairs, Lists, PostNormLists])
def test_blocks_that_are_no_modules_are_found_proved_and_taken_apart(kind):
    model = kind()
    table = tdcache.names(model, TOKENS)
    assert table.stream().blocks == LAYERS
    for at in range(LAYERS):
        roles = ("resid_pre", "resid_mid", "attn.pattern", "attn.contribution", "mlp.pre", "mlp.contribution")
        assert {f"blocks.{at}.{role}" for role in roles} <= set(table)
    assert any("+ attn.contribution + mlp.contribution" in each.identity for each in table.proof.identities)
    double = copy.deepcopy(model).double()
    pattern = residual.needed(table, heads=True)
    with ActivationCaching(pattern, names=table).prepare(double) as hooked, torch.no_grad():
        logits = double(TOKENS)
    parts = residual.decompose(hooked.cache, heads=True)
    torch.testing.assert_close(parts.total(), hooked.cache["resid_post", -1], rtol=0, atol=1e-9)
    scores = residual.logit_attribution(parts, 3)
    torch.testing.assert_close(sum(scores.values()), logits[..., 3], rtol=0, atol=1e-9)


def test_a_flat_list_of_sublayers_has_a_block_for_each():
    pairs = ((Residual(Attention()), Residual(feed_forward())) for _ in range(LAYERS))
    model = InOrder(*(part for pair in pairs for part in pair))
    table = tdcache.names(model, TOKENS)
    assert table.stream().blocks == 2 * LAYERS
    assert table["blocks.2.attn.contribution"].path == "run.2.inner"
    assert table["blocks.3.mlp.contribution"].path == "run.3.inner"


def test_blocks_in_lists_of_lists_stay_blocks():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.mlp = Attention(), feed_forward()

        def forward(self, x):
            x = x + self.attention(x)
            return x + self.mlp(x)

    class Groups(Model):
        def fill(self):
            self.groups = nn.ModuleList(nn.ModuleList([Block(), Block()]) for _ in range(2))

        def run(self, x):
            for group in self.groups:
                for block in group:
                    x = block(x)
            return x

    table = tdcache.names(Groups(), TOKENS)
    assert [stream.blocks for stream in table.streams.values()] == [2, 2]
    assert any(place.path == "groups.1.0.mlp" for place in table.values())


class Weighted(nn.Module):
    """A block that multiplies the stream by a parameter, and adds another, between its sums."""

    def __init__(self):
        super().__init__()
        self.attention, self.mlp = Attention(), feed_forward()
        self.weight, self.shift = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        x = self.weight * x + self.attention(x)
        return 0.5 * (x + self.mlp(x)) + self.shift


def test_a_stream_that_is_weighted_between_its_sums_is_proved_and_taken_apart():
    model = InOrder(*(Weighted() for _ in range(LAYERS)))
    table = tdcache.names(model, TOKENS)
    changes = table.stream().changes[1]
    assert [each.kind for each in changes] == ["scale", "add", "add", "scale", "add"]
    assert (changes[0].path, changes[3].factor, changes[4].path) == ("run.1.weight", 0.5, "run.1.shift")
    identity = "0.5 * (weight * (resid_pre) + attn.contribution + mlp.contribution) + shift == resid_post"
    assert identity in str(table.proof)
    double = copy.deepcopy(model).double()
    with ActivationCaching(residual.needed(table), names=table).prepare(double) as hooked, torch.no_grad():
        double(TOKENS)
    parts = residual.decompose(hooked.cache)
    torch.testing.assert_close(parts.total(), hooked.cache["resid_post", -1], rtol=0, atol=1e-9)
    assert "run.1.shift" in list(parts.keys())
