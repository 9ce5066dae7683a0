"""pyvene. Its places are paths with ``.output``; it reads the first tensor of a tuple."""

from __future__ import annotations

from typing import Any

import pyvene
import regex
import torch
from torch import Tensor

from validator.subjects import POSITION, NotOfferedError, Subject, copied, first_tensor


def component(path: str) -> str:
    """``transformer.h.0`` as pyvene writes it: ``transformer.h[0].output``."""
    return regex.sub(r"\.(\d+)", r"[\1]", path) + ".output"


def wrapped(subject: Subject, paths: tuple[str, ...], interventions: list[Any]) -> Any:
    """The model with an intervention at each path."""
    places = [
        pyvene.RepresentationConfig(component=component(path), intervention=each)
        for path, each in zip(paths, interventions, strict=True)
    ]
    return pyvene.IntervenableModel(pyvene.IntervenableConfig(places), subject.model)


def collected(subject: Subject, paths: tuple[str, ...]) -> list[Tensor]:
    if subject.dim != 1:
        raise NotOfferedError("positions along another axis than 1")
    size = subject.length * subject.width  # its positions and units stand in one axis
    model = wrapped(subject, paths, [pyvene.CollectIntervention(embed_dim=size) for _ in paths])
    rows = len(next(iter(subject.inputs.values())))
    everywhere = [[list(range(subject.length))] * rows] * len(paths)
    with torch.no_grad():
        return model(copied(subject.inputs), unit_locations={"base": everywhere})[0][1]


def cache(subject: Subject) -> Tensor:
    return collected(subject, (subject.site,))[0]


def gradient(subject: Subject) -> Tensor:
    raise NotOfferedError("gradients of activations")


def patch(subject: Subject) -> Tensor:
    if subject.dim != 1:
        raise NotOfferedError("positions along another axis than 1")
    model = wrapped(subject, (subject.site,), [pyvene.VanillaIntervention(embed_dim=subject.width)])
    rows = len(next(iter(subject.inputs.values())))
    at = [[[POSITION]] * rows]
    with torch.no_grad():
        _, output = model(copied(subject.inputs), [copied(subject.other)], {"sources->base": (at, at)})
    return first_tensor(output)


def ablate(subject: Subject) -> Tensor:
    model = wrapped(subject, (subject.site,), [pyvene.ZeroIntervention(embed_dim=subject.width)])
    with torch.no_grad():
        return first_tensor(model(copied(subject.inputs))[1])


def pattern(subject: Subject) -> Tensor:
    raise NotOfferedError("the second tensor of a tuple")


def lens(subject: Subject) -> Tensor:
    return subject.read_out(collected(subject, subject.blocks))
