"""
Patching sweep: finding an induction circuit
============================================

A two-layer transformer learns to continue repeated sequences: after "... A B ... A" comes "B". The circuit that does so
is known (Olsson et al. 2022, arXiv:2209.11895): attention in the first layer marks B as following A, and attention in
the second layer, at the last A, finds that mark and copies B. The model is trained here from scratch, and the circuit
is found by patching every site at every position, one at a time.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM

from tdcache import ActivationPatching

# %%
# **Train.** Random sequences, each repeated from a random place on; the loss counts the second time only.
torch.manual_seed(0)
torch.set_num_threads(1)  # more threads do not help a model this small
tokens, heads = 32, 4
config = LlamaConfig(
    num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=64, intermediate_size=64,
    vocab_size=tokens, max_position_embeddings=64, use_cache=False,
)  # fmt: skip
model, steps = LlamaForCausalLM(config), 400
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
for _ in range(steps):
    length, start = int(torch.randint(6, 13, ())), int(torch.randint(0, 4, ()))
    once = torch.rand(64, tokens).argsort(1)[:, : length + start]  # no token comes twice
    ids = torch.cat([once, once[:, start:]], 1)
    logits = model(ids).logits[:, start + length : -1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, start + length + 1 :].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
print(f"loss {loss:.3f}, by chance {np.log(tokens):.2f}")

# %%
# **Two inputs.** Eight tokens, then the first four again, so that the fifth comes next. In the corrupted input the
# first A is replaced by another token, so nothing determines what comes next.
model.eval()
once = torch.rand(128, tokens).argsort(1)[:, :9]
clean = torch.cat([once[:, :8], once[:, :4]], 1)
corrupted = clean.clone()
corrupted[:, 3] = once[:, 8]
answer = clean[:, 4]


def log_probability(data):
    """Of the right token, at the last position."""
    return data["logits"][:, -1].log_softmax(-1).gather(1, data["answer"][:, None]).mean()


# %%
# **Sweep.** Attention and feed-forward of both layers at 12 positions: 48 interventions, stacked along the batch, each
# of which pastes one activation of the clean run into the corrupted one. Then the same for the heads: the output of a
# head is a quarter of the input of ``o_proj``.
data = TensorDict({"ids": clean, "answer": answer, "patched": {"ids": corrupted}}, batch_size=128)


def sweep(pattern, over, **options):
    """The log-probability with one activation patched: one entry per site."""
    patching = ActivationPatching(pattern, sweep=over, metric=log_probability, **options)
    with patching.prepare(model, in_keys={"ids": "input_ids"}, out_keys=["logits"]) as hooked:
        return hooked(data)


by_site = sweep(r"model\.layers\.\d+\.(self_attn|mlp)", "position")
by_head = sweep(r"model\.layers\.\d+\.self_attn\.o_proj", ("position", "head"), direction="fwd_pre", heads=heads)
with torch.no_grad():
    best, worst = (log_probability({"logits": model(each).logits, "answer": answer}) for each in (clean, corrupted))
print(f"log-probability of the right token: clean {best:.2f}, corrupted {worst:.2f}")

# %%
# **Look.** 0 % is the corrupted run, 100 % the clean one.
maps = [((values - worst) / (best - worst)).numpy() for values in (
    torch.stack(list(by_site.values())),  # (sites, positions)
    torch.cat([values.T for values in by_head.values()]),  # (layers x heads, positions)
)]  # fmt: skip
names = [
    [f"{part} {layer}" for layer in range(2) for part in ("attention", "feed-forward")],
    [f"head {layer}.{head}" for layer in range(2) for head in range(heads)],
]
letters = ["t₁", "t₂", "t₃", "A", "B", "t₆", "t₇", "t₈", "t₁", "t₂", "t₃", "A"]

figure, panels = plt.subplots(2, 1, figsize=(8.5, 6.4), layout="constrained", height_ratios=[4, 8], sharex=True)
for panel, values, rows in zip(panels, maps, names, strict=True):
    image = panel.pcolormesh(values, cmap="RdBu_r", vmin=-1, vmax=1, edgecolors="white", linewidth=1.5)
    for (row, column), value in np.ndenumerate(values):
        if abs(value) > 0.1:
            shade = "white" if abs(value) > 0.6 else "black"
            panel.text(
                column + 0.5,
                row + 0.5,
                f"{value:+.0%}".replace("-", "−"),
                ha="center",
                va="center",
                color=shade,
                fontsize=8,
            )
    panel.axhline(len(rows) / 2, color="black", linewidth=1)
    panel.set_yticks(np.arange(len(rows)) + 0.5, rows)
    panel.set(ylim=(len(rows), 0), frame_on=False)
    panel.tick_params(length=0)
panels[1].set_xticks(np.arange(12) + 0.5, letters)
panels[1].set_xlabel("token at which the activation is patched")
bar = figure.colorbar(
    image, ax=panels, aspect=40, label="log-probability restored (0%: corrupted run, 100%: clean run)"
)
bar.set_ticks(
    np.linspace(-1, 1, 9), labels=[f"{tick:+.0%}".replace("-", "−") if tick else "0%" for tick in np.linspace(-1, 1, 9)]
)
bar.outline.set_visible(False)
figure.suptitle(
    "Layer 0 marks B as what follows A; at the last A, layer 1 finds the mark", x=0.02, ha="left", weight="bold"
)
target = Path("patching_sweep.png").resolve()
figure.savefig(target, dpi=120)
print(f"picture: {target}")

# %%
# Attention of layer 0 at B, and attention of layer 1 at the last A, each restore nearly everything; no other place
# restores a third.
known = {(0, 4), (2, 11)}
assert all(maps[0][place] > 0.9 for place in known)
assert all(value < 0.33 for place, value in np.ndenumerate(maps[0]) if place not in known)
