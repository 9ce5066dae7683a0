"""nnsight. A traced block cannot return: what it saved is returned after it."""

from __future__ import annotations

import nnsight
import torch
from torch import Tensor

from validator.subjects import POSITION, Subject, copied, first_tensor, score


def read(subject: Subject, path: str, *, pick: int | None = None, other: bool = False) -> Tensor:
    model = nnsight.NNsight(subject.model)
    inputs = copied(subject.other if other else subject.inputs)
    pick = subject.pick if pick is None else pick
    place = model.get(path)
    with torch.no_grad(), model.trace(**inputs):
        output = place.output
        value = (output if pick is None else output[pick]).save()
    return value  # noqa: RET504 - bound in a traced block


def cache(subject: Subject) -> Tensor:
    return read(subject, subject.site)


def gradient(subject: Subject) -> Tensor:
    model = nnsight.NNsight(subject.model)
    place, pick = model.get(subject.site), subject.pick
    with model.trace(**copied(subject.inputs)):
        output = place.output
        value = output if pick is None else output[pick]
        total = score(first_tensor(model.output)).sum()
        with total.backward():
            found = value.grad.save()
    return found


def patch(subject: Subject) -> Tensor:
    source = read(subject, subject.site, other=True)
    model = nnsight.NNsight(subject.model)
    place, pick = model.get(subject.site), subject.pick
    index = (slice(None),) * subject.dim + (POSITION,)
    with torch.no_grad(), model.trace(**copied(subject.inputs)):
        output = place.output
        value = output if pick is None else output[pick]
        value[index] = source[index]
        logits = first_tensor(model.output).save()
    return logits  # noqa: RET504 - bound in a traced block


def ablate(subject: Subject) -> Tensor:
    model = nnsight.NNsight(subject.model)
    place, pick = model.get(subject.site), subject.pick
    with torch.no_grad(), model.trace(**copied(subject.inputs)):
        output = place.output
        value = output if pick is None else output[pick]
        value[:] = 0
        logits = first_tensor(model.output).save()
    return logits  # noqa: RET504 - bound in a traced block


def pattern(subject: Subject) -> Tensor:
    return read(subject, subject.attention, pick=1)


def lens(subject: Subject) -> Tensor:
    model = nnsight.NNsight(subject.model)
    pick, kept = subject.pick, []
    modules = [model.get(path) for path in subject.readout]
    places = [model.get(path) for path in subject.blocks]
    with torch.no_grad(), model.trace(**copied(subject.inputs)):
        for place in places:
            output = place.output
            value = output if pick is None else output[pick]
            for module in modules:
                value = module(value)
            kept.append(value.save())
    return torch.stack(kept)
