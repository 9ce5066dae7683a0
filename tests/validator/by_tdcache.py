"""tdcache. What is kept is copied, as by the hooks; by default a value that the model then overwrites is refused."""

from __future__ import annotations

import regex
import torch
from torch import Tensor

from tdcache import Ablation, ActivationPatching, cache_activations
from validator.subjects import POSITION, Subject, score


def path_pattern(path: str) -> str:
    """The selector of one path."""
    return regex.escape(path)


def cache(subject: Subject) -> Tensor:
    with cache_activations(subject.model, path_pattern(subject.site), hold="snapshot") as kept, torch.no_grad():
        subject.call()
    return kept[subject.site]


def gradient(subject: Subject) -> Tensor:
    with cache_activations(subject.model, path_pattern(subject.site), directions=["bwd"]) as kept:
        score(subject.logits()).sum().backward()
    return kept[subject.site]


def patch(subject: Subject) -> Tensor:
    with cache_activations(subject.model, path_pattern(subject.site), hold="snapshot") as source, torch.no_grad():
        subject.call(other=True)
    patching = ActivationPatching(
        path_pattern(subject.site), source=source, positions=[POSITION], position_dim=subject.dim, mask_key=None
    )
    with patching.prepare(subject.model), torch.no_grad():
        return subject.logits()


def ablate(subject: Subject) -> Tensor:
    with Ablation(path_pattern(subject.site)).prepare(subject.model), torch.no_grad():
        return subject.logits()


def pattern(subject: Subject) -> Tensor:
    with cache_activations(subject.model, f"{path_pattern(subject.attention)}::pattern") as kept, torch.no_grad():
        subject.call()
    return kept[f"{subject.attention}::pattern"]


def lens(subject: Subject) -> Tensor:
    with cache_activations(subject.model, [path_pattern(path) for path in subject.blocks]) as kept, torch.no_grad():
        subject.call()
    return subject.read_out([kept[path] for path in subject.blocks])
