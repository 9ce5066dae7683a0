"""
Which strokes make a digit? Four methods in one pass
====================================================

A small convolutional net learns scikit-learn's handwritten digits in a few seconds. Integrated gradients, Grad-CAM,
guided backpropagation and layer-wise relevance propagation then explain the same predictions: combined in one
composite, they share one forward and one backward.
"""

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from tensordict import TensorDict
from torch import nn

from tdcache import CompositeHookingContextFactory as Together
from tdcache.attribution import LRP, GradCAM, GuidedBackpropagation, IntegratedGradients, epsilon_plus
from tdcache.plot import image_maps

torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)

# %%
# **Train.** Batch norms and in-place ReLUs are there on purpose, since attribution must handle both.
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
    nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
    nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(12):
    for rows in torch.randperm(1400).split(64):
        loss = nn.functional.cross_entropy(model(images[train][rows]), labels[train][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
model.eval()
accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
print(f"accuracy on unseen digits: {accuracy:.1%}")

# %%
# **Explain.** The target of each row is its own label. One call returns all scores, and by how much they miss the
# target.
chosen = torch.tensor([int((labels[test] == digit).nonzero()[0]) for digit in (0, 3, 4, 7)])
x, y = images[test][chosen], labels[test][chosen]
methods = Together(
    IntegratedGradients(target=y, n_steps=128, name="integrated gradients"),
    LRP(target=y, rules=epsilon_plus(), name="LRP, epsilon-plus"),
    GuidedBackpropagation(target=y, name="guided backprop"),
    GradCAM("8", target=y, relu=True, name="Grad-CAM"),
)
with methods.prepare(model) as hooked:
    td = hooked(TensorDict({"input": x}, batch_size=[len(x)]))
scores = {name: next(iter(td["attr", name].values())) for name in td["attr"].keys()}  # noqa: SIM118

gap = td["gap", "integrated gradients", "input"].abs().max()
print(f"integrated gradients sum to f(x) - f(0) within {gap:.1e}")

# %%
# **Look.** Red pixels raise the logit of the digit, blue ones lower it.
order = ["integrated gradients", "LRP, epsilon-plus", "guided backprop", "Grad-CAM"]
figure = image_maps(
    x,
    {name: scores[name] for name in order},
    titles=[f"digit {digit}" for digit in y],
    label="score, relative to the largest in its map",
)
figure.suptitle("Four explanations of one net, from one forward and one backward", weight="bold")
figure.savefig(Path("attribution_cnn.png"), dpi=150)

# %%
# **Check.** Do the scores point at what the net uses? Deleting the eight pixels that integrated gradients rank highest
# must cost more of the logit than deleting eight at random.
best = scores["integrated gradients"].flatten(1).topk(8).indices


def logit_without(pixels):
    return model(x.flatten(1).scatter(1, pixels, 0.0).view_as(x)).gather(1, y[:, None]).mean().item()


full = model(x).gather(1, y[:, None]).mean().item()
chance = sum(logit_without(torch.stack([torch.randperm(64)[:8] for _ in y])) for _ in range(20)) / 20
print(f"logit {full:.1f}; without the best eight pixels {logit_without(best):.1f}, without eight others {chance:.1f}")
assert gap < 0.02 * full
assert logit_without(best) < chance - 2
