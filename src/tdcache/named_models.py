"""Which model a table of names was made for, and whether it may be used for another one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import nn

from tdcache.paths import walk, wrapped

__all__ = ["root_among", "structure_of"]


def root_among(
    model: nn.Module, own: nn.Module | None, made_for: tuple[str, str], paths: Iterable[str]
) -> nn.Module | None:
    """The module that the paths of a table are relative to, where ``model`` is to be hooked; None if it has none.

    Args:
        model: what is to be hooked.
        own: the model that the table was made for, if it is still there.
        made_for: its class and structure.
        paths: what the table asks for, where nothing is known of its model.
    """
    if own is model or (own is not None and (_holds(model, own) or _holds(own, model))):
        return own
    _, structure = made_for
    wanted = set(paths)
    inner: nn.Module | None = model
    while inner is not None:
        if structure and structure == structure_of(inner):
            return inner
        if not structure and wanted <= {"", *(path for path, _ in walk(inner))}:
            return inner
        inner = wrapped(inner)
    return None


def _holds(model: nn.Module, other: nn.Module) -> bool:
    return any(module is other for module in model.modules())


def structure_of(model: nn.Module) -> str:
    """What two models must share to use one table: paths, classes, parameter shapes, numbers of heads."""
    lines = [type(model).__qualname__]
    for path, module in walk(model):
        shapes = [tuple(each.shape) for each in module.parameters(recurse=False)]
        lines.append(f"{path} {type(module).__qualname__} {shapes}")
    config = getattr(getattr(model, "config", None), "__dict__", {})
    lines += [f"{key}={config[key]}" for key in sorted(config) if "head" in key and isinstance(config[key], int)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
