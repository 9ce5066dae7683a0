"""captum. Of an edited run it returns the difference of scores, from which the score follows."""

from __future__ import annotations

from typing import Any

import torch
from captum.attr import LayerActivation, LayerFeatureAblation, LayerGradientXActivation
from torch import Tensor

from validator.subjects import POSITION, NotOfferedError, Score, Subject, copied, first_tensor, score


def call_of(subject: Subject, inputs: dict[str, Any]) -> tuple[Any, Tensor, tuple[Any, ...]]:
    """A function of positional tensors that returns the score, its first argument, and the others."""
    names, values = list(inputs), list(copied(inputs).values())
    if not isinstance(values[0], Tensor):
        raise NotOfferedError("its inputs are tensors; this model takes a TensorDict")

    def forward(*tensors: Tensor) -> Tensor:
        return score(first_tensor(subject.model(**dict(zip(names, tensors, strict=False)))))

    return forward, values[0], tuple(values[1:])


def read(subject: Subject, path: str, *, pick: int | None = None, other: bool = False) -> Tensor:
    forward, first, rest = call_of(subject, subject.other if other else subject.inputs)
    layer = subject.model.get_submodule(path)
    with torch.no_grad():
        found = LayerActivation(forward, layer).attribute(first, additional_forward_args=rest or None)
    return subject.part(found, pick)


def edited(subject: Subject, baselines: Tensor | int, mask: Tensor) -> Score:
    """The score with the baselines where the mask is 1, from the difference that the ablation makes."""
    if subject.pick is not None:
        raise NotOfferedError("ablating one tensor of a tuple")
    forward, first, rest = call_of(subject, subject.inputs)
    with torch.no_grad():
        before = forward(first, *rest)
        ablation = LayerFeatureAblation(forward, subject.model.get_submodule(subject.site))
        differences = ablation.attribute(
            first, layer_baselines=baselines, additional_forward_args=rest or None, layer_mask=mask
        )
    chosen = differences[mask.expand_as(differences) == 1].reshape(len(before), -1)
    return Score(values=before - chosen[:, 0])


def cache(subject: Subject) -> Tensor:
    return read(subject, subject.site)


def gradient(subject: Subject) -> Tensor:
    forward, first, rest = call_of(subject, subject.inputs)
    layer = subject.model.get_submodule(subject.site)
    gradients = LayerGradientXActivation(forward, layer, multiply_by_inputs=False)
    return subject.part(gradients.attribute(first, additional_forward_args=rest or None))


def patch(subject: Subject) -> Score:
    source = read(subject, subject.site, other=True)
    mask = torch.zeros_like(source[:1], dtype=torch.long)
    mask.select(subject.dim, POSITION).fill_(1)
    return edited(subject, source, mask)


def ablate(subject: Subject) -> Score:
    value = read(subject, subject.site)
    return edited(subject, 0, torch.ones_like(value[:1], dtype=torch.long))


def pattern(subject: Subject) -> Tensor:
    return read(subject, subject.attention, pick=1)


def lens(subject: Subject) -> Tensor:
    return subject.read_out([read(subject, block) for block in subject.blocks])
