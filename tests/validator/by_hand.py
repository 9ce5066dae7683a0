"""Hooks of torch, written by hand for each request: what all others are compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from validator.subjects import Subject, score

Edit = Callable[[Tensor], Tensor]


def read(subject: Subject, paths: Sequence[str], *, pick: int | None = None, other: bool = False) -> list[Tensor]:
    """Copies of what the modules return, in the order of the paths."""
    kept: dict[str, Tensor] = {}
    handles = []
    for path in paths:

        def keep(module: Any, args: Any, output: Any, path: str = path) -> None:
            kept[path] = subject.part(output, pick).detach().clone()

        handles.append(subject.model.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        subject.logits(other=other)
    for handle in handles:
        handle.remove()
    return [kept[path] for path in paths]


def edited(subject: Subject, edit: Edit) -> Tensor:
    """The logits with ``edit(value)`` in the place of the site's value."""

    def replace(module: Any, args: Any, output: Any) -> Any:
        return subject.with_part(output, edit(subject.part(output)))

    handle = subject.model.get_submodule(subject.site).register_forward_hook(replace)
    with torch.no_grad():
        logits = subject.logits()
    handle.remove()
    return logits


def cache(subject: Subject) -> Tensor:
    """The site's value."""
    return read(subject, [subject.site])[0]


def gradient(subject: Subject) -> Tensor:
    """The gradient of the score by the site's value."""
    kept: list[Tensor] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        subject.part(output).register_hook(kept.append)

    handle = subject.model.get_submodule(subject.site).register_forward_hook(watch)
    score(subject.logits()).sum().backward()
    handle.remove()
    return kept[0]


def patch(subject: Subject) -> Tensor:
    """The logits with one position of the site's value from the other input."""
    source = read(subject, [subject.site], other=True)[0]
    return edited(subject, lambda value: subject.pasted(value, source))


def ablate(subject: Subject) -> Tensor:
    """The logits with zeros for the site's value."""
    return edited(subject, torch.zeros_like)


def pattern(subject: Subject) -> Tensor:
    """The first attention pattern, ``(batch, heads, queries, keys)``."""
    return read(subject, [subject.attention], pick=1)[0]


def lens(subject: Subject) -> Tensor:
    """What each block would say if it were the last."""
    return subject.read_out(read(subject, subject.blocks))
