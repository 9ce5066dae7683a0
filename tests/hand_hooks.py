"""The oracle of the test matrix: hand-written hooks, one site at a time, which know nothing of the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo import Family

Edit = Callable[[Tensor], Tensor]


def parts(value: Any) -> dict[Any, Tensor]:
    """The float tensors of a value by how they are picked; None for a value that is one itself."""
    if isinstance(value, Tensor):
        return {None: value} if value.is_floating_point() else {}
    found = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple | list) else ()
    return {key: part for key, part in found if isinstance(part, Tensor) and part.is_floating_point()}


def with_part(value: Any, pick: Any, new: Tensor) -> Any:
    """The value with another tensor at ``pick``."""
    if pick is None:
        return new
    if isinstance(value, Mapping):
        return type(value)({**value, pick: new})
    return type(value)(new if at == pick else part for at, part in enumerate(value))


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where the first tensor among a call's arguments is, its number or its name; None if it holds integers."""
    named = [*enumerate(args), *kwargs.items()]
    key, part = next(((key, part) for key, part in named if isinstance(part, Tensor)), (None, None))
    return key if part is not None and part.is_floating_point() else None


def edit_input(args: tuple[Any, ...], kwargs: dict[str, Any], edit: Edit) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments whose first float tensor went through ``edit``."""
    key = first_argument(args, kwargs)
    if isinstance(key, int):
        return (*args[:key], edit(args[key]), *args[key + 1 :]), kwargs
    return args, {**kwargs, key: edit(kwargs[key])}


def logits(output: Any) -> Tensor:
    """What a family's models return, or the first of it."""
    return next(iter(parts(output).values()))


@dataclass(frozen=True)
class Site:
    """A module that runs once, the tensors it returns, and whether its first float argument can be told."""

    path: str
    module: nn.Module
    picks: tuple[Any, ...]
    reads: bool


def sites(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Site]:
    """Every module below the root that runs once and returns a float tensor, or a tuple or mapping of some."""
    calls: dict[str, list[Site]] = {}
    handles = []
    for path, module in model.named_modules():

        def note(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            reads = first_argument(args, kwargs) is not None
            calls.setdefault(path, []).append(Site(path, module, tuple(parts(output)), reads))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return [found[0] for path, found in calls.items() if path and len(found) == 1 and found[0].picks]


@contextmanager
def edited(model: nn.Module, path: str, edit: Edit, *, pick: Any = None, inputs: bool = False) -> Iterator[None]:
    """One plain hook at a path, which puts ``edit(tensor)`` in the tensor's place."""
    module = model.get_submodule(path)
    if inputs:
        handle = module.register_forward_pre_hook(
            lambda module, args, kwargs: edit_input(args, kwargs, edit), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(
            lambda module, args, output: with_part(output, pick, edit(parts(output)[pick]))
        )
    try:
        yield
    finally:
        handle.remove()


def run(family: Family, site: Site | None = None, edit: Any = None, *, batch: Any = None, **where: Any) -> Tensor:
    """The logits without gradients, edited at one site if one is given."""
    model, batch = family.model, family.batch if batch is None else batch
    with torch.no_grad():
        if site is None:
            return logits(model(**batch))
        with edited(model, site.path, edit, **where):
            return logits(model(**batch))


def value(family: Family, site: Site, **where: Any) -> Tensor:
    """What is at one side of one site."""
    kept = []
    run(family, site, lambda tensor: kept.append(tensor.clone()) or tensor, **where)
    return kept[0]


def gradient(family: Family, site: Site, score: Edit, *, pick: Any = None, inputs: bool = False) -> Tensor | None:
    """The gradient of ``score(logits)`` by what is at one side of one site; None where there is none.

    Of what a module reads or hands on it is that of this use alone. Of what a module makes (an attention pattern,
    which it returns beside the output) all uses count, its own included.
    """
    kept: list[Tensor] = []

    def watch(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            tensor = tensor.view_as(tensor)
            tensor.register_hook(kept.append)
            return tensor.clone()  # which later modules may overwrite
        return tensor

    def on_output(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        made = parts(output)[pick]
        if any(made is given for given in (*args, *kwargs.values())):
            return with_part(output, pick, watch(made))
        if made.requires_grad:
            made.register_hook(kept.append)
        return output

    if inputs:
        with edited(family.model, site.path, watch, inputs=True):
            total = score(logits(family.model(**family.batch))).sum()
    else:
        handle = site.module.register_forward_hook(on_output, with_kwargs=True)
        total = score(logits(family.model(**family.batch))).sum()
        handle.remove()
    total.backward()
    return kept[0] if kept else None
