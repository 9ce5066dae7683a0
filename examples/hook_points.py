"""
Hook points: copying a word takes two attention steps
======================================================

A small transformer is written with hook points at its queries, keys, values and attention patterns, in its MLPs and
along its residual stream, as users of TransformerLens do, and trained for a few seconds to continue repeated strings
of letters. For a new word that occurs twice, ``run_with_cache`` returns every attention pattern. Hooks on the patterns
then remove the attention to one relative position at a time, which shows what copying needs: the previous letter in
the first layer, and the letter after the last occurrence in the second.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from tdcache.points import HookedRootModule, HookPoint, list_hooks

torch.manual_seed(0)
LETTERS, LENGTH, WIDTH, HEADS, LAYERS = 26, 26, 64, 4, 2

# %%
# **A model with hook points.** A ``HookPoint`` returns what it is given, and gives it a name.


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.near = nn.Parameter(torch.zeros(HEADS, LENGTH))  # what each head adds by distance
        self.hook_q, self.hook_k, self.hook_v, self.hook_z, self.hook_pattern = (HookPoint() for _ in range(5))

    def forward(self, x):  # (batch, letters, width)
        q = self.hook_q(self.query(x).unflatten(-1, (HEADS, -1)))
        k = self.hook_k(self.key(x).unflatten(-1, (HEADS, -1)))
        v = self.hook_v(self.value(x).unflatten(-1, (HEADS, -1)))
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5 + 10 * self.near[:, distance.clamp(min=0)]
        pattern = self.hook_pattern(scores.masked_fill(distance < 0, float("-inf")).softmax(-1))
        return self.out(self.hook_z(torch.einsum("bhqk,bkhd->bqhd", pattern, v)).flatten(-2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.norm1, self.norm2 = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.hook_resid_pre, self.hook_resid_mid, self.hook_resid_post = HookPoint(), HookPoint(), HookPoint()
        self.hook_mlp_pre, self.hook_mlp_post = HookPoint(), HookPoint()

    def forward(self, x):
        x = self.hook_resid_pre(x)
        x = self.hook_resid_mid(x + self.attn(self.norm1(x)))
        hidden = self.hook_mlp_post(F.gelu(self.hook_mlp_pre(self.up(self.norm2(x)))))
        return self.hook_resid_post(x + self.down(hidden))


class Transformer(HookedRootModule):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(LETTERS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.unembed = nn.Linear(WIDTH, LETTERS)
        self.setup()

    def forward(self, letters):
        x = self.embed(letters)
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)


model = Transformer()
print(f"{len(model.hook_dict)} hook points: {', '.join(list(model.hook_dict)[:10])}, ...")

# %%
# **Train.** Random strings that repeat after 7 to 13 letters; the model learns to continue them.


def repeated(count):
    period = torch.randint(7, 14, (count, 1))
    letters = torch.randint(LETTERS, (count, LENGTH)).gather(1, torch.arange(LENGTH) % period)
    return letters, period, torch.arange(LENGTH - 1) >= period  # from here on the next letter is determined


steps = 350
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
for _ in range(steps):
    letters, _, known = repeated(64)
    loss = F.cross_entropy(model(letters)[:, :-1][known], letters[:, 1:][known])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()

# %%
# **Cache.** One forward on a repeated word keeps every attention pattern; the regex must match the whole name.
word = "blacksmith"
letters = torch.tensor([[ord(letter) - ord("a") for letter in 2 * word]])
_, cache = model.run_with_cache(letters, names_filter=r"blocks\.\d\.attn\.hook_pattern", remove_batch_dim=True)
patterns = torch.stack([cache[f"blocks.{layer}.attn.hook_pattern"] for layer in range(LAYERS)])  # layer, head, to, from

again = torch.arange(len(word), 2 * len(word))  # the second time
looks_back = patterns[0][:, again, again - 1].mean(-1)  # of each head in the first layer, at the letter before
looks_after = patterns[1][:, again, again - len(word) + 1].mean(-1)  # in the second, at what came next the first time

# %%
# **Edit.** Which positions are needed? A hook on the patterns of one layer removes all attention to one relative
# position and rescales the rest to sum to one. It edits the tensor in place, which affects this run only.
test, period, known = repeated(256)


class Blindfold:
    def __init__(self, place):
        self.place = place  # for every letter, the one that cannot be seen

    def __call__(self, pattern, hook):  # (batch, heads, to, from)
        pattern.scatter_(-1, self.place[:, None, :, None].expand(-1, HEADS, -1, -1), 0)
        pattern /= pattern.sum(-1, keepdim=True).clamp(min=1e-6)


def accuracy(layer=None, place=None):
    hooks = [] if layer is None else [(f"blocks.{layer}.attn.hook_pattern", Blindfold(place))]
    with torch.no_grad():
        right = model.run_with_hooks(test, fwd_hooks=hooks)[:, :-1].argmax(-1) == test[:, 1:]
    return right[known].float().mean().item()


at = torch.arange(LENGTH)
whole = accuracy()
back = [0, 1, 2, 3, 4]  # letters before the current one
after = [-1, 0, 1, 2, 3]  # letters after the last occurrence of the current one
needed = [
    [accuracy(0, (at - step).clamp(min=0).expand(len(test), -1)) for step in back],
    [accuracy(1, (at - period + step).clamp(min=0)) for step in after],
]
print(f"accuracy {whole:.2f}; with the letter before out of sight {needed[0][1]:.2f}")
print(list_hooks(model))

# %%
# **Look.** All heads on the word, one row per query, and the accuracy without each position. The heads of the first
# layer attend to the previous letter, so the second layer can find the letter that followed the current one the last
# time.
figure, panels = plt.subplots(
    LAYERS, HEADS + 1, figsize=(16, 7.2), layout="constrained", width_ratios=[1] * HEADS + [0.85]
)
names = list(2 * word)
rings = [(np.arange(1, len(names)), np.arange(len(names) - 1)), (again, again - len(word) + 1)]  # to, from
for layer, head in np.ndindex(LAYERS, HEADS):
    panel = panels[layer, head]
    image = panel.imshow(patterns[layer, head], cmap="Blues", vmin=0, vmax=1)
    panel.plot(rings[layer][1], rings[layer][0], "s", ms=8.5, mfc="none", mec="#d1495b", mew=1)
    panel.set_xticks(range(len(names)), names, fontsize=8)
    panel.set_yticks(range(len(names)), names if head == 0 else [], fontsize=8)
    panel.tick_params(length=0)
    panel.set_frame_on(False)
    share = (looks_back, looks_after)[layer][head]
    panel.set_title(f"layer {layer}, head {head}: {share:.0%} on red", fontsize=10, loc="left")
    if layer == LAYERS - 1:
        panel.set_xlabel("attended letter (key)")
panels[0, 0].set_ylabel("query; red: 1 before", fontsize=11)
panels[1, 0].set_ylabel("query; red: 1 after its last occurrence", fontsize=11)
bar = figure.colorbar(image, ax=panels[:, :HEADS], aspect=40, label="attention weight", location="right", pad=0.01)
bar.outline.set_visible(False)

labels = (
    ["the letter itself", "1 before", "2 before", "3 before", "4 before"],
    ["1 before the last occurrence", "the last occurrence", "1 after it", "2 after it", "3 after it"],
)
for layer, panel in enumerate(panels[:, -1]):
    critical = int(np.argmin(needed[layer]))
    colors = ["#d1495b" if step == critical else "#9fb8cc" for step in range(5)]
    panel.barh(range(5), needed[layer], color=colors, height=0.65)
    for step, value in enumerate(needed[layer]):
        panel.text(1.02, step, f"{value:.2f}", va="center", fontsize=9)
    panel.set_yticks(range(5), labels[layer], fontsize=9)
    panel.tick_params(length=0)
    panel.set(xlim=(0, 1.18), ylim=(4.6, -0.6), xticks=[])
    panel.set_title(f"accuracy without attention to\n(unrestricted: {whole:.2f})", fontsize=10, loc="left")
    panel.spines[["top", "right", "bottom"]].set_visible(False)
title = "Copying a word takes two steps: layer 0 attends to the previous letter, layer 1 to what came next last time"
figure.suptitle(title, x=0.01, ha="left", fontsize=14, weight="bold")
target = Path("hook_points.png").resolve()
figure.savefig(target, dpi=110)
print(f"picture: {target}")

assert whole > 0.85
assert needed[0][1] < 0.5 < min(needed[0][:1] + needed[0][2:])
assert needed[1][2] < 0.5 < min(needed[1][:2] + needed[1][3:])
