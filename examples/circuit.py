"""
Finding the induction circuit, and checking every edge of it
============================================================

A two-layer transformer learns to recall: shown a shuffled alphabet and one of its letters again, it must say which
letter came after it. The known solution takes two attention heads, one after the other. EAP-IG scores all edges between
the model's parts from one small batch of gradients; the picture shows which edges it finds, and patching each edge
shows whether the estimates are right.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from tensordict import TensorDict
from torch import nn

from tdcache.attribution import EdgeAttributionPatching
from tdcache.plot import edge_graph

torch.manual_seed(0)
LETTERS, WIDTH, HEADS = 12, 32, 2


class Head(nn.Module):
    """One attention head, from the stream to what it adds to the stream."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH // HEADS) for _ in range(3))
        self.out = nn.Linear(WIDTH // HEADS, WIDTH, bias=False)

    def forward(self, stream):
        x = self.norm(stream)
        attend = nn.functional.scaled_dot_product_attention
        return self.out(attend(self.query(x), self.key(x), self.value(x), is_causal=True))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LETTERS + 1, WIDTH)
        self.layers = nn.ModuleList(nn.ModuleDict({f"head{h}": Head() for h in range(HEADS)}) for _ in range(2))
        self.final, self.unembed = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LETTERS)

    def forward(self, ids):
        stream = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]).expand_as(ids))
        for layer in self.layers:
            stream = stream + sum(head(stream) for head in layer.values())
        return self.unembed(self.final(stream))


def draw(rows):
    """Shuffled letters and one of them again; with it, where that stood."""
    letters = torch.rand(rows, LETTERS).argsort(1)
    at = torch.randint(0, LETTERS - 1, (rows, 1))
    return torch.cat([letters, letters.gather(1, at)], 1), at


# %%
# **Train** until the model recalls.
model = Transformer()
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
for _ in range(800):
    ids, at = draw(96)
    loss = nn.functional.cross_entropy(model(ids)[:, -1], ids.gather(1, at + 1)[:, 0])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
ids, at = draw(64)
answer = ids.gather(1, at + 1)[:, 0]
print(f"recalled: {(model(ids)[:, -1].argmax(1) == answer).float().mean():.0%}")

# %%
# **Score the edges.** In the counterfactual the queried letter is swapped with another one, so that a different letter
# follows it. The target is the difference of their logits.
place = (at + torch.randint(2, LETTERS - 2, at.shape)) % (LETTERS - 1)
other = ids.gather(1, place + 1)[:, 0]
corrupt = ids.scatter(1, at, ids.gather(1, place)).scatter(1, place, ids.gather(1, at))


def difference(td):
    last = td["output"][:, -1]
    return (last.gather(1, answer[:, None]) - last.gather(1, other[:, None]))[:, 0]


writers, readers = r"tokens|positions|layers\.\d\.head\d", r"layers\.\d\.head\d|final"


def from_below(writer, reader):
    """The heads of one layer run side by side and do not read each other."""
    return writer.rpartition(".")[0] != reader.rpartition(".")[0] or reader == "final"


method = EdgeAttributionPatching(
    writers, readers, target=difference, n_steps=8, method="middle", embeddings="tokens", edges=from_below
)
with method.prepare(model) as hooked:
    td = hooked(TensorDict({"input": ids, "corrupt": {"input": corrupt}}, batch_size=[len(ids)]))
scores = {(u, v): value.mean().item() for u, each in td["attr"].items() for v, value in each.items()}

# %%
# **Patch each edge for real**: the reader gets the stream with the writer's part exchanged for the counterfactual one.
parts = {}
for name, batch in (("clean", ids), ("corrupt", corrupt)):
    handles = [
        module.register_forward_hook(lambda module, args, output, key=(name, path): parts.__setitem__(key, output))
        for path, module in model.named_modules()
        if path in {u for u, _ in scores}
    ]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def effect(edges):
    """What patching these edges together adds to the target."""

    def changed(module, args, reader):
        return (args[0] + sum(parts["corrupt", u] - parts["clean", u] for u, v in edges if v == reader),)

    base = difference({"output": model(ids)}).mean().item()
    handles = [
        model.get_submodule(reader).register_forward_pre_hook(lambda m, args, reader=reader: changed(m, args, reader))
        for reader in {v for _, v in edges}
    ]
    patched = difference({"output": model(ids)}).mean().item()
    for handle in handles:
        handle.remove()
    return patched - base


exact = {edge: effect([edge]) for edge in scores}
found, true = torch.tensor([[scores[edge], exact[edge]] for edge in scores]).T
correlation = torch.corrcoef(torch.stack([found, true]))[0, 1].item()
circuit = sorted(scores, key=lambda edge: -abs(scores[edge]))[:4]
print(f"{len(scores)} edges; correlation of EAP-IG with exact patching: {correlation:.3f}")
print(
    "strongest edges:", *(f"  {u} -> {v}: {scores[u, v]:.2f} (exact {exact[u, v]:.2f})" for u, v in circuit), sep="\n"
)

# %%
# **Look.** Blue edges: replacing the clean value by the counterfactual one lowers the logit difference.
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained", width_ratios=[1.25, 1])
order = ["tokens|positions", "layers.0.head0|layers.0.head1", "layers.1.head0|layers.1.head1", "final"]
labels = {f"layers.{i}.head{h}": f"head {i}.{h}" for i in range(2) for h in range(HEADS)} | {"final": "logits"}
threshold = 0.05 * found.abs().max().item()
edge_graph(
    td["attr"].mean(0),
    order=order,
    labels=labels,
    threshold=threshold,
    axes=left,
    label="change of the logit difference",
)
left.set_title("Edges scored by EAP-IG", loc="left")
right.axline((0, 0), slope=1, color="0.8", zorder=0)
right.scatter(true, found, color="tab:blue")
for number, (u, v) in enumerate(circuit):
    text = f"{labels.get(u, u)} → {labels.get(v, v)}"
    offset = (8, -11 if number % 2 else 4)
    right.annotate(text, (exact[u, v], scores[u, v]), textcoords="offset points", xytext=offset, fontsize=9)
right.set(xlabel="change of the logit difference when the edge is patched", ylabel="change estimated by EAP-IG")
right.locator_params(nbins=5)
right.set_title(f"Estimated and exact effects (r = {correlation:.2f})", loc="left")
right.spines[["top", "right"]].set_visible(False)
title = "The induction circuit: one head of the first layer feeds those of the second"
figure.suptitle(title, weight="bold", x=0.02, ha="left")
figure.savefig(Path("circuit.png"), dpi=150)

# %%
# **Check.** The estimate ranks edges as patching does, and the circuit runs through both layers.
assert correlation > 0.9
assert any(u.startswith("layers.0") and v.startswith("layers.1") for u, v in circuit)
