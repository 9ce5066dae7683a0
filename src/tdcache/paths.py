"""Names of modules: joining them, finding the module at one, and the nearest names to a wrong one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from time import monotonic
from typing import Any

import regex
from torch import nn

from tdcache.errors import PathError, listed

__all__ = ["join", "near_misses", "resolve", "resolve_all", "walk", "wrapped"]

# One step of a path: .name  <any name>  [0]  [-1]  ['key']
_STEP = regex.compile(
    r"""\.?(?:(?P<name>[^.\[\]<>]+)|<(?P<quoted>[^>]+)>|\[(?P<index>-?\d+)\]|\[(?P<q>["'])(?P<key>.*?)(?P=q)\])"""
)
_FUZZY_SECONDS = 0.5


def join(*parts: str) -> str:
    """Join the non-empty parts with dots: ``join("encoder", "", "layer")`` is ``"encoder.layer"``."""
    return ".".join(filter(None, parts))


def walk(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Paths and modules below ``model``, as ``named_modules(remove_duplicate=False)`` has them, without the root.

    Three times faster than that method, and a module that contains itself ends the walk there instead of recursing.
    """
    found: list[tuple[str, nn.Module]] = []
    _walk_below(model, "", (model,), found)
    return found


def _walk_below(
    parent: nn.Module, prefix: str, lineage: tuple[nn.Module, ...], found: list[tuple[str, nn.Module]]
) -> None:
    for name, child in parent._modules.items():
        if child is None:
            continue
        path = prefix + name
        if not child._modules:
            found.append((path, child))
        elif child not in lineage:
            found.append((path, child))
            _walk_below(child, path + ".", (*lineage, child), found)


def resolve(root: nn.Module, path: str) -> nn.Module:
    """The module that ``path`` names, below ``root``.

    ``path`` is a name as ``named_modules()`` gives it. Indexing is understood as well: ``"layers[-1]"``,
    ``"blocks['a']"``, and ``"<odd/name>"`` for a name that holds dots or brackets. Nothing is evaluated.

    Raises:
        PathError: no module there; the message names the nearest paths.
    """
    return resolve_all(root, path)[1]


def resolve_all(root: nn.Module, path: Any) -> tuple[str, nn.Module]:
    """Canonical name (``"layers.11"`` for ``"layers[-1]"``) and module of a path, as :func:`resolve` understands it."""
    if not isinstance(path, str):
        got = "the module itself" if isinstance(path, nn.Module) else f"{path!r}"  # a model prints as many lines
        raise PathError(f"a path is a string such as 'layers.0', got {got} ({type(path).__name__})", selector=path)
    module, names, end = root, [], 0
    while end < len(path):
        dotted = _dotted_child(module, path, end)
        if dotted is not None:
            module, end = module._modules[dotted], path.index(dotted, end) + len(dotted)  # type: ignore[assignment]
            names.append(dotted)
            continue
        step = _STEP.match(path, end)
        found = None if step is None else _child(module, step)
        if step is None or found is None:
            raise _no_such_path(root, path)
        name, module = found
        names.append(name)
        end = step.end()
    return join(*names), module


def _dotted_child(module: nn.Module, path: str, start: int) -> str | None:
    """The child whose own name holds dots, as the sites of a splice have, with which the rest of the path begins."""
    rest = path[start:].removeprefix(".")
    names = (name for name, child in module._modules.items() if "." in name and child is not None)
    return next((name for name in names if rest == name or rest.startswith((name + ".", name + "["))), None)


def _child(module: nn.Module, step: regex.Match[str]) -> tuple[str, nn.Module] | None:
    children: dict[str, nn.Module | None] = module._modules
    if step["index"] is not None:
        position = int(step["index"])
        names = list(children)
        if not -len(names) <= position < len(names):
            return None
        name = names[position]
    else:
        name = step["name"] or step["quoted"] or step["key"]
    child = children[name] if name in children else None  # noqa: SIM401  (TorchScript has dicts without get)
    if child is None:  # an attribute that reaches a module elsewhere in the tree, such as HF's base_model
        child = getattr(module, name, None)
        name = next((known for known, each in module.named_modules() if each is child), name)
    return (name, child) if isinstance(child, nn.Module) else None


def _no_such_path(root: nn.Module, path: str) -> PathError:
    if "::" in path:
        return PathError(
            f"path {path!r} names a call inside a forward, and a module is needed here; give the path of one",
            selector=path,
        )
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
    near = near_misses(regex.escape(path), names)
    hint = f"; did you mean {listed(near, 3)}?" if near else "; list the names with tdcache.select(model, '.*')"
    return PathError(
        f"path {path!r} names none of the {len(names)} modules of {type(root).__name__}{hint}",
        selector=path,
        near=near,
    )


def near_misses(pattern: str, names: Sequence[str], limit: int = 3) -> tuple[str, ...]:
    """The names that ``pattern`` nearly matches, by fewest edits (``regex``'s fuzzy matching), best first.

    If there are none, those that end as it does: ``h.0`` and ``model.h.0`` both mean ``transformer.h.0``. Bounded in
    time: at most half a second is spent on either, whatever the pattern.
    """
    edits = max(1, min(4, len(pattern) // 4))
    try:
        fuzzy = regex.compile(f"(?b)(?:{pattern}){{e<={edits}}}")
    except regex.error:
        return ()
    scored = [(edits, -SequenceMatcher(None, pattern, name).ratio(), name) for edits, name in _scores(fuzzy, names)]
    return tuple(name for _, _, name in sorted(scored)[:limit]) or _same_ending(pattern, names)[:limit]


def _same_ending(pattern: str, names: Sequence[str]) -> tuple[str, ...]:
    """The names that ``pattern`` matches once a leading part is added, or its own first part exchanged for one."""
    _, *rest = regex.split(r"\\?\.", pattern, maxsplit=1)
    for tail in (pattern, *(tail for tail in rest if "." in tail)):
        try:
            ending = regex.compile(rf"(?:.+\.)?(?:{tail})")
        except regex.error:  # the first dot stood within a group
            continue
        found = tuple(name for _, name in _scores(ending, names))
        if found:
            return found
    return ()


def _scores(fuzzy: regex.Pattern[str], names: Iterable[str]) -> Iterable[tuple[int, str]]:
    deadline = monotonic() + _FUZZY_SECONDS
    for name in names:
        left = deadline - monotonic()
        try:
            match: Any = fuzzy.fullmatch(name, timeout=max(left, 1e-3))
        except TimeoutError:
            return
        if match is not None:
            yield sum(match.fuzzy_counts), name


_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


def wrapped(model: nn.Module) -> nn.Module | None:
    """The model inside a wrapper of torch's (``torch.compile``, the data-parallel ones); None of any other model."""
    name = _WRAPPERS.get(type(model).__name__)
    return None if name is None else model._modules.get(name)
