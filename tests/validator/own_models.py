"""Models of our own: convolutions, recurrence, TensorDict modules, and shapes that trouble hooks."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn

from model_zoo import Images, Tagger
from validator.subjects import Subject, found


class Perceptron(nn.Module):
    """Linear layers with a GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Tied(nn.Module):
    """A module under two names, of which the second is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.alias = self.body

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.alias(x)))


class Halves(nn.Module):
    """Returns ``(tensor, None)``, as attention without weights does."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.map(x), None


class WithNone(nn.Module):
    """Reads the first of a pair whose second is None."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.head = Halves(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pair(x)[0])


class Encoder(nn.Module):
    """torch's own encoder layers, on the path that hooks can see."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(x)


def tensordict_model() -> nn.Module:
    """Two TensorDict modules in a row."""
    first = TensorDictModule(nn.Linear(4, 6), in_keys=["x"], out_keys=["hidden"])
    return TensorDictSequential(first, TensorDictModule(nn.Linear(6, 2), in_keys=["hidden"], out_keys=["out"]))


def subject(name: str, model: nn.Module, site: str, shape: tuple[int, ...], dim: int = 1) -> Subject:
    """A model of this file on two random inputs."""
    random = torch.Generator().manual_seed(3)
    inputs, other = ({"x": torch.randn(shape, generator=random)} for _ in range(2))
    if isinstance(model, TensorDictSequential):
        inputs, other = ({"tensordict": TensorDict(each, batch_size=shape[:1])} for each in (inputs, other))
    return found(Subject(name=name, model=model.eval(), inputs=inputs, other=other, site=site, dim=dim))


def own_subjects() -> list[Subject]:
    """All models of this file, with fixed weights."""
    torch.manual_seed(0)
    return [
        subject("MLP", Perceptron(), "layers.0", (3, 6)),
        subject("CNN", Images(inplace=False), "conv", (2, 3, 8, 8), 2),
        subject("CNN, ReLU in place", Images(inplace=True), "conv", (2, 3, 8, 8), 2),
        subject("LSTM", Tagger(), "rnn", (2, 5, 4)),
        subject("tied modules", Tied(), "alias", (2, 5, 4)),
        subject("(tensor, None)", WithNone(), "pair", (2, 5, 4)),
        subject("nn.TransformerEncoder", Encoder(), "stack.layers.0", (2, 5, 8)),
        subject("TensorDictSequential", tensordict_model(), "module.0.module", (3, 4)),
    ]
