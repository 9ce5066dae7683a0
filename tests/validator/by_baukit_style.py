"""Classes in the style of baukit, which is on no package index: one object per layer, entered and left."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from validator.subjects import Subject, score


class Trace:
    """Retains the output of one layer, and hands on what ``edit`` makes of it."""

    def __init__(
        self, subject: Subject, layer: str, *, pick: int | None = None, edit: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.output: Tensor | None = None
        self._subject, self._pick, self._edit = subject, pick, edit
        self._handle = dict(subject.model.named_modules(remove_duplicate=False))[layer].register_forward_hook(self._run)

    def _run(self, module: Any, args: Any, output: Any) -> Any:
        if self._edit is not None:
            output = self._subject.with_part(output, self._edit(self._subject.part(output)))
        self.output = self._subject.part(output, self._pick)
        if self.output.requires_grad:
            self.output.retain_grad()
            if self._pick is None:
                return self._subject.with_part(output, self.output.clone())  # what later modules may overwrite
        return output

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()


def read(subject: Subject, layer: str, *, other: bool = False, pick: int | None = None) -> Tensor:
    with torch.no_grad(), Trace(subject, layer, pick=pick) as trace:
        subject.call(other=other)
    return trace.output


def edited(subject: Subject, edit: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad(), Trace(subject, subject.site, edit=edit):
        return subject.logits()


def cache(subject: Subject) -> Tensor:
    return read(subject, subject.site)


def gradient(subject: Subject) -> Tensor:
    with Trace(subject, subject.site) as trace:
        score(subject.logits()).sum().backward()
    return trace.output.grad


def patch(subject: Subject) -> Tensor:
    source = read(subject, subject.site, other=True)
    return edited(subject, lambda value: subject.pasted(value, source))


def ablate(subject: Subject) -> Tensor:
    return edited(subject, torch.zeros_like)


def pattern(subject: Subject) -> Tensor:
    return read(subject, subject.attention, pick=1)


def lens(subject: Subject) -> Tensor:
    return subject.read_out([read(subject, block) for block in subject.blocks])
