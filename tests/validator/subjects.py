"""What is asked about: a model, two inputs, and the places in it, found with hooks of torch alone.

Neither tdcache nor a peer may choose the places: each would choose those that it reaches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

POSITION = 2


class NotOfferedError(Exception):
    """The library has no way of its own to ask for this."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a library that returns scores, not logits, makes of a request: one number per row, ``(batch,)``."""

    values: Tensor


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in evaluation mode and what is asked about it.

    Attributes:
        name: as the page shows it.
        model: nobody calls it but a copy of it.
        inputs: keyword arguments of its forward.
        other: a second input of the same shapes, from which a position is pasted.
        site: the path of the module that is read, patched and ablated.
        pick: which element of the site's output is meant, None where it returns one tensor.
        dim: the axis of the site's value along which one position is pasted.
        length: the size of that axis.
        width: the size of the last axis of the site's value.
        attention: the path of a module that returns ``(output, pattern)``, or None.
        blocks: the paths of the stack, for the logit lens; empty where there is none.
        readout: the paths of the final norm, where there is one, and of the head.
    """

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    other: Mapping[str, Any]
    site: str
    pick: int | None = None
    dim: int = 1
    length: int = 0
    width: int = 0
    attention: str | None = None
    blocks: tuple[str, ...] = ()
    readout: tuple[str, ...] = ()

    def fresh(self) -> Subject:
        """The same with a copy of the model, which a library may do with as it likes."""
        return replace(self, model=copy.deepcopy(self.model))

    def call(self, *, other: bool = False) -> Any:
        """What the model returns; the arguments are copies, for a model may write to them."""
        return self.model(**copied(self.other if other else self.inputs))

    def logits(self, *, other: bool = False) -> Tensor:
        """The first tensor of what the model returns."""
        return first_tensor(self.call(other=other))

    def part(self, output: Any, pick: int | None = None) -> Tensor:
        """The tensor of the site's output."""
        pick = self.pick if pick is None else pick
        return output if pick is None else output[pick]

    def with_part(self, output: Any, new: Tensor) -> Any:
        """The site's output with another tensor in it."""
        if self.pick is None:
            return new
        return type(output)(new if at == self.pick else part for at, part in enumerate(output))

    def pasted(self, value: Tensor, source: Tensor) -> Tensor:
        """The value with one position of the source."""
        value = value.clone()
        value.select(self.dim, POSITION).copy_(source.select(self.dim, POSITION))
        return value

    def read_out(self, values: Sequence[Tensor]) -> Tensor:
        """The logits if the model ended after each of the values, ``(blocks, batch, seq, vocab)``."""
        modules = nn.Sequential(*(self.model.get_submodule(path) for path in self.readout))
        with torch.no_grad():
            return torch.stack([modules(value) for value in values])


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with copies of all that can be written to."""
    return {name: value.clone() if hasattr(value, "clone") else value for name, value in inputs.items()}


def first_tensor(output: Any) -> Tensor:
    """A tensor, or the first one in a tuple or mapping."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "batch_size"):  # a TensorDict, which holds its inputs too
        return output["out"]
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))


def score(logits: Tensor) -> Tensor:
    """One number per row, ``(batch,)``: a random weighted sum, so that no gradient cancels."""
    weights = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(1))
    return (logits * weights).flatten(1).sum(1)


def found(subject: Subject) -> Subject:
    """The subject with its pick, its attention and its way from the stack to the logits, as one forward shows them."""
    outputs: dict[str, Any] = {}
    readers: list[tuple[Tensor, str]] = []
    handles = []
    for path, module in subject.model.named_modules(remove_duplicate=False):

        def note(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            outputs[path] = output
            if args and isinstance(args[0], Tensor):
                readers.append((args[0], path))

        handles.append(module.register_forward_hook(note))
    with torch.no_grad():
        logits = subject.logits()
    for handle in handles:
        handle.remove()
    pick = 0 if isinstance(outputs[subject.site], tuple) else None
    inside = [path for path in outputs if path.startswith(subject.site + ".") and _is_pattern(outputs[path])]
    subject = replace(subject, pick=pick, attention=inside[0] if inside else None)
    shape = subject.part(outputs[subject.site]).shape
    subject = replace(subject, length=shape[subject.dim], width=shape[-1])
    return _with_readout(subject, outputs, readers, logits)


def _is_pattern(output: Any) -> bool:
    if not isinstance(output, tuple) or len(output) < 2 or not isinstance(output[1], Tensor) or output[1].ndim != 4:
        return False
    rows = output[1].sum(-1)
    return torch.allclose(rows, torch.ones_like(rows), atol=1e-5)


def _with_readout(
    subject: Subject, outputs: dict[str, Any], readers: list[tuple[Tensor, str]], logits: Tensor
) -> Subject:
    """The blocks and the readout where head(norm(last block)) is what the model returns; as it was otherwise."""
    stack = subject.site.rpartition(".")[0]
    blocks = tuple(path for path in outputs if path.rpartition(".")[0] == stack and path.rpartition(".")[2].isdigit())
    head = getattr(subject.model, "get_output_embeddings", lambda: None)()
    if head is None or len(blocks) < 2:
        return subject
    blocks = tuple(sorted(blocks, key=lambda path: int(path.rpartition(".")[2])))
    last = subject.part(outputs[blocks[-1]])
    norm = next((path for value, path in readers if value is last and not path.startswith(f"{stack}.")), None)
    named = next((path for path, module in subject.model.named_modules() if module is head), None)
    if norm is None or named is None or outputs[norm].shape[-1] not in (last.shape[-1], logits.shape[-1]):
        return subject
    whole = replace(subject, blocks=blocks, readout=(named,) if norm == named else (norm, named))
    lens = whole.read_out([last])[0]
    same = lens.shape == logits.shape and torch.allclose(lens, logits, atol=1e-5)
    return whole if same else subject
