"""A small transformer written out, its canonical names by hand, and what passes each of them by plain hooks."""

import torch
from torch import nn

from tdcache import NamedPlace, Names
from tdcache.named_streams import ResidualStream

WIDTH, HEADS, LAYERS, WORDS = 8, 2, 3, 11
STREAM = ("batch", "position", "unit")
HEADED = ("batch", "head", "query", "unit")
SQUARE = ("batch", "head", "query", "key")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        pattern = torch.softmax(q @ k.transpose(-1, -2) / 2, -1)
        z = (pattern @ v).transpose(1, 2).flatten(-2)
        return self.out(z), pattern


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x, *, scale=1.0):
        mid = x + self.attn(self.ln1(x))[0]
        return torch.add(mid, self.mlp(self.ln2(mid)))


class Transformer(nn.Module):
    """``shared`` runs one block three times."""

    def __init__(self, *, shared=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(1 if shared else LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)
        self.shared = shared

    def forward(self, input):  # noqa: A002  the name that a TensorDict's entry has
        x = self.embed(input)
        for block in list(self.blocks) * (LAYERS if self.shared else 1):
            x = block(x)
        return self.head(self.norm(x))


def ids(rows=2, positions=5):
    return torch.randint(0, WORDS, (rows, positions), generator=torch.Generator().manual_seed(3))


def places(*, shared=False):
    found = {"embed": NamedPlace(path="embed", axes=STREAM)}
    for layer in range(LAYERS):
        block, path = f"blocks.{layer}", f"blocks.{0 if shared else layer}"
        call = layer if shared else None
        found |= {
            f"{block}.resid_pre": NamedPlace(path=path, side="fwd_pre", axes=STREAM, call=call),
            f"{block}.resid_mid": NamedPlace(path=f"{path}::add", axes=STREAM, call=call),
            f"{block}.resid_post": NamedPlace(path=path, axes=STREAM, call=call),
            f"{block}.attn.q": NamedPlace(path=f"{path}.attn::q", axes=HEADED, call=call),
            f"{block}.attn.pattern": NamedPlace(path=f"{path}.attn", pick=1, axes=SQUARE, call=call),
            f"{block}.attn.z": NamedPlace(
                path=f"{path}.attn.out",
                side="fwd_pre",
                heads=(HEADS, 2),
                axes=("batch", "position", "head", "unit"),
                call=call,
            ),
            f"{block}.attn.contribution": NamedPlace(path=f"{path}.attn", axes=STREAM, call=call),
            f"{block}.mlp.post": NamedPlace(path=f"{path}.mlp.1", axes=STREAM, call=call),
            f"{block}.mlp.contribution": NamedPlace(path=f"{path}.mlp", axes=STREAM, call=call),
        }
    return {
        **found,
        "final_norm": NamedPlace(path="norm", axes=STREAM),
        "unembed": NamedPlace(path="head", axes=STREAM),
    }


def table(model, **options):
    stream = ResidualStream(layouts=("pre-norm",) * LAYERS, embeddings=("embed",), final_norm="norm", unembed="head")
    refused = {"blocks.0.attn.v": "it is not told from the keys; nearest: blocks.0.attn.z"}
    named = places(shared=model.shared)
    return Names(named, refused=refused, streams={"": stream}, model=model, **options)
