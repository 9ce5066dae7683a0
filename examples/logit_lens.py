"""
Logit lens: where an answer enters the residual stream
======================================================

A two-layer transformer learns to continue repeated sequences: after "... A B ... A" comes "B". Every value of its
residual stream is read as if the model ended there (the logit lens), and each head's part of the answer's logit is read
off exactly, since logits are linear in what was written to the stream. Both are written in canonical names, so that the
same ten lines work on any model; at the end they do on five families.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import tdcache
from tdcache import ActivationCaching, residual
from tdcache.plot import color_bar

# %%
# **Train.** Random sequences, each repeated; the loss counts the second time only.
torch.manual_seed(0)
torch.set_num_threads(1)  # more threads do not help a model this small
tokens, heads, length, steps = 32, 4, 8, 400
config = LlamaConfig(
    num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=heads, hidden_size=64, intermediate_size=64,
    vocab_size=tokens, max_position_embeddings=64, use_cache=False,
)  # fmt: skip
model = LlamaForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.98))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.1)
for _ in range(steps):
    size, start = int(torch.randint(6, 13, ())), int(torch.randint(0, 4, ()))
    once = torch.rand(64, tokens).argsort(1)[:, : size + start]  # no token comes twice
    ids = torch.cat([once, once[:, start:]], 1)
    logits = model(ids).logits[:, start + size : -1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, start + size + 1 :].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
model.eval()
print(f"loss {loss:.3f}, by chance {np.log(tokens):.2f}")

# %%
# **Names.** They are found by the data flow of one forward and proved by arithmetic on another.
table = tdcache.names(model)
print(table)

# %%
# **Decompose.** ``decompose`` returns parts whose sum is the stream after the last block: the embedding, every head,
# every MLP. Their scores sum to the logit, here to the difference between the right next token and another token of the
# sequence.
once = torch.rand(256, tokens).argsort(1)[:, :length]
ids = torch.cat([once, once], 1)
answer, other = ids.roll(-1, 1), ids.roll(-4, 1)

pattern = residual.needed(table, heads=True, mid=True)
with ActivationCaching(pattern, names=table).prepare(model) as hooked, torch.no_grad():
    logits = hooked(ids).logits
lens = residual.logit_lens(hooked.cache, mid=True)
parts = residual.decompose(hooked.cache, heads=True)
scores = residual.logit_attribution(parts, answer, other)

torch.testing.assert_close(lens["blocks.1.resid_post"], logits)
torch.testing.assert_close(parts.total(), hooked.cache["resid_post", -1])
gap = logits.gather(-1, answer[..., None]) - logits.gather(-1, other[..., None])
torch.testing.assert_close(sum(scores.values()), gap.squeeze(-1), rtol=1e-4, atol=1e-4)  # sums of float32

# %%
# **Look.** Means over 256 sequences, at each position but the last, which has no next token.
chance = torch.stack([value.softmax(-1).gather(-1, answer[..., None]).squeeze(-1).mean(0) for value in lens.values()])
added = torch.stack([score.mean(0) for score in scores.values()])
maps = [each[:, :-1].numpy() for each in (chance, added)]
plain = {"resid_pre": "before layer", "resid_mid": "after attention", "resid_post": "after layer"}


def label(key):
    """``head 1.2`` for ``blocks.1.attn.head.2``."""
    words = key.split(".")
    if "head" in words:
        return f"head {words[1]}.{words[-1]}"
    return f"feed-forward {words[1]}" if "mlp" in words else key


readings = [key.split(".") for key in list(lens.keys())]
writers = [label(key) for key in list(scores.keys())]
names = [[f"{plain[role]} {layer}" for _, layer, role in readings], writers]
labels = [f"t{'₁₂₃₄₅₆₇₈'[position % length]}" for position in range(2 * length - 1)]

figure, panels = plt.subplots(2, 1, figsize=(9, 7.4), layout="constrained", height_ratios=[5, 11], sharex=True)
limit = np.abs(maps[1]).max()
styles = [{"cmap": "Blues", "vmin": 0, "vmax": 1}, {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}]
titles = ["Logit lens", "Direct logit attribution"]
for panel, values, rows, style, title in zip(panels, maps, names, styles, titles, strict=True):
    panel.pcolormesh(values, edgecolors="white", linewidth=1.5, **style)
    panel.axvline(length, color="black", linewidth=1)
    panel.set_title(title, loc="left", fontsize=11)
    panel.set_yticks(np.arange(len(rows)) + 0.5, rows)
    panel.set(ylim=(len(rows), 0), frame_on=False)
    panel.tick_params(length=0)
figure.colorbar(panels[0].collections[0], ax=panels[0], aspect=30, label="probability of\nthe right next token")
color_bar(panels[1], limit=limit, label="added to the logit of the right token, minus a wrong token's")
panels[0].set_ylabel("read from the stream")
panels[1].set_ylabel("written to the stream")
panels[1].set_xticks(np.arange(len(labels)) + 0.5, labels)
panels[1].set_xlabel("token; the sequence is repeated from the line on")
title = "The answer enters the stream with the attention of layer 1, and all of its heads write it"
figure.suptitle(title, x=0.02, ha="left", weight="bold")
target = Path("logit_lens.png").resolve()
figure.savefig(target, dpi=120)
print(f"picture: {target}")

# %%
# In the repetition the answer is there after the attention of layer 1 and not before: the heads of layer 1 wrote it.
repeated = [values[:, length:] for values in maps]
assert repeated[0][:3].max() < 0.3
assert repeated[0][3:].min() > 0.7
by_writer = dict(zip(writers, repeated[1].mean(1), strict=True))
assert all(by_writer[f"head 1.{head}"] > 1 for head in range(heads))
assert all(abs(by_writer[f"head 0.{head}"]) < 0.3 for head in range(heads))

# %%
# **Any model.** The same lines, on families whose blocks add to the stream in different ways: Gemma 2 norms what it
# adds and caps its logits, BLOOM adds the stream inside of its sublayers, Mixtral's MLPs are experts.
small = {"vocab_size": tokens, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
families = [
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=tokens, bos_token_id=0, eos_token_id=1)),
    LlamaForCausalLM(LlamaConfig(**small)),
    Gemma2ForCausalLM(Gemma2Config(**small, head_dim=8, final_logit_softcapping=5.0)),
    BloomForCausalLM(BloomConfig(n_layer=2, n_head=4, hidden_size=32, vocab_size=tokens)),
    MixtralForCausalLM(MixtralConfig(**small, num_local_experts=4)),
]
for model in families:
    table = tdcache.names(model.eval())
    pattern = residual.needed(table, heads=True)
    with ActivationCaching(pattern, names=table).prepare(model) as hooked, torch.no_grad():
        logits = hooked(ids[:4]).logits
    lens = residual.logit_lens(hooked.cache)
    parts = residual.decompose(hooked.cache, heads=True)
    scores = residual.logit_attribution(parts, answer[:4])
    found, cap = sum(scores.values()), table.stream().logit_softcap
    right = (found if cap is None else cap * torch.tanh(found / cap)).unsqueeze(-1)
    torch.testing.assert_close(right, logits.gather(-1, answer[:4, :, None]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lens["blocks.1.resid_post"], logits)
    print(f"{type(model).__name__}: {len(scores.keys())} parts of each logit, {table.stream().layouts[0]} blocks")
