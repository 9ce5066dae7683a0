"""torchlens: a trace of every operation, asked by the paths of modules."""

from __future__ import annotations

from typing import Any

import torchlens
from torch import Tensor
from torchlens.options import CaptureOptions

from validator.subjects import Subject, copied, score


def trace(subject: Subject, *, other: bool = False, **options: Any) -> Any:
    inputs = copied(subject.other if other else subject.inputs)
    if len(inputs) == 1 and "input_ids" not in inputs and "pixel_values" not in inputs:
        return torchlens.trace(subject.model, list(inputs.values()), **options)  # it binds one input by position
    return torchlens.trace(subject.model, [], inputs, **options)


def output_of(log: Any) -> Any:
    """The record of the first tensor that the model returned."""
    return log[log.output_layers[0]]


def read(subject: Subject, path: str, *, other: bool = False) -> Tensor:
    return trace(subject, other=other)[path].out.detach()


def cache(subject: Subject) -> Tensor:
    return read(subject, subject.site)


def gradient(subject: Subject) -> Tensor:
    log = trace(subject, capture=CaptureOptions(save_grads=True))
    log.log_backward(score(output_of(log).out).sum())
    return log[subject.site].grad


def edited(subject: Subject, change: Any) -> Tensor:
    log = trace(subject, intervene=torchlens.when(torchlens.module(subject.site), change))
    return output_of(log).out.detach()


def patch(subject: Subject) -> Tensor:
    value, source = read(subject, subject.site), read(subject, subject.site, other=True)
    return edited(subject, torchlens.swap_with(subject.pasted(value, source)))


def ablate(subject: Subject) -> Tensor:
    return edited(subject, torchlens.zero_ablate())


def pattern(subject: Subject) -> Tensor:
    """The softmax in the attention module, which is where this library's names lead."""
    log = trace(subject)
    softmax = [op for op in log.layer_list if op.func_name == "softmax" and subject.attention in str(op.modules)]
    return softmax[0].out.detach()


def lens(subject: Subject) -> Tensor:
    log = trace(subject)
    return subject.read_out([log[block].out.detach() for block in subject.blocks])
