"""A report of the hooks on a model: where, in which order, and whose they are.

Wrong results after an interrupted experiment are often due to a hook that was left behind; torch has no public way to
list hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

from torch import nn

from tdcache.hooks.attach import UserHook
from tdcache.hooks.gradient_hooks import GradInputHook, GradOutputHook
from tdcache.hooks.registrations import MutedHook
from tdcache.introspect import HookEntry, global_hooks, module_hooks
from tdcache.points.hook_point import PointHook, hook_name
from tdcache.selection import walk
from tdcache.tables import html_note, html_table, text_table

__all__ = ["HookReport", "HookRow", "list_hooks"]

OURS, FOREIGN = "tdcache", "foreign"
EVERYWHERE = "(every module)"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookRow:
    """One row of the report: the place of a hook, its owner, and its name."""

    path: str
    """The module, ``""`` for the root, or ``"(every module)"`` for one of torch's global hooks."""
    kind: str
    """When it is called: ``"fwd_pre"``, ``"fwd"``, ``"bwd_pre"`` or ``"bwd"``."""
    position: int
    """Its position among the module's hooks of this kind, in the order of calls."""
    owner: str
    """``"tdcache"`` or ``"foreign"``."""
    name: str
    """For this library's hooks, their repr and the user's function if there is one; otherwise the function or class."""
    permanent: bool
    """Whether it was added to a hook point as a permanent one."""
    hook: Any
    """The hook itself."""


class HookReport(Sequence[HookRow]):
    """The hooks of one model, printed as a table; ``ours`` and ``foreign`` split it in two."""

    def __init__(self, rows: Sequence[HookRow], model_name: str) -> None:
        self._rows = tuple(rows)
        self.model_name = model_name

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> HookRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[HookRow]: ...
    def __getitem__(self, index: int | slice) -> HookRow | Sequence[HookRow]:
        return self._rows[index]

    def __iter__(self) -> Iterator[HookRow]:
        return iter(self._rows)

    @property
    def ours(self) -> HookReport:
        """The hooks that this library registered, including users' hooks at hook points."""
        return HookReport([row for row in self if row.owner == OURS], self.model_name)

    @property
    def foreign(self) -> HookReport:
        """The hooks that other code registered."""
        return HookReport([row for row in self if row.owner == FOREIGN], self.model_name)

    def __repr__(self) -> str:
        return "\n".join([self._title, *text_table(_HEAD, self._cells())]) if self else self._title

    def _repr_html_(self) -> str:
        return html_table(self._title, _HEAD, self._cells()) if self else html_note(self._title)

    @property
    def _title(self) -> str:
        count = {0: "no hooks", 1: "1 hook"}.get(len(self), f"{len(self)} hooks")
        return f"{count} on {self.model_name}"

    def _cells(self) -> list[Sequence[str]]:
        return [
            (r.path or "(root)", r.kind, str(r.position), r.owner, r.name, "permanent" if r.permanent else "")
            for r in self
        ]


_HEAD = ("path", "kind", "#", "owner", "hook", "")


def list_hooks(model: nn.Module) -> HookReport:
    """Every forward and backward hook on a model, by module and, within a module, in the order of calls.

    This library's gradient hooks are forward hooks for torch and are listed as such; their name tells what they are,
    and whether they are muted because their context is paused. If a module has several names, the first is used.

    Example:
        >>> from torch import nn
        >>> from tdcache.points import HookPoint
        >>> model = nn.Sequential(nn.Linear(2, 2), HookPoint())
        >>> def double(tensor, hook): return 2 * tensor
        >>> handle = model[1].add_perma_hook(double)
        >>> [(row.path, row.kind, row.name, row.permanent) for row in list_hooks(model)]
        [('1', 'fwd', 'double', True)]
    """
    rows = [_row(EVERYWHERE, entry) for entry in global_hooks()]
    seen: set[int] = set()
    for path, module in [("", model), *walk(model)]:
        if id(module) not in seen:
            seen.add(id(module))
            rows += [_row(path, entry) for entry in module_hooks(module)]
    return HookReport(rows, type(model).__name__)


def _row(path: str, entry: HookEntry) -> HookRow:
    owner, name, permanent = _described(entry.hook)
    return HookRow(
        path=path,
        kind=entry.kind,
        position=entry.position,
        owner=owner,
        name=name,
        permanent=permanent,
        hook=entry.hook,
    )


def _described(hook: Any) -> tuple[str, str, bool]:
    """Owner, name, and permanence."""
    holder = getattr(hook, "__self__", hook)
    if isinstance(holder, MutedHook):
        owner, name, permanent = _described(holder.hook)
        return owner, f"{name} (muted)", permanent
    if isinstance(holder, GradOutputHook | GradInputHook):  # wraps a hook on gradients
        _, name, permanent = _described(holder.hook)
        return OURS, f"{name} (on the gradient)", permanent
    if isinstance(holder, PointHook):
        return OURS, repr(holder.hook) if _is_ours(holder.hook) else hook_name(holder.hook), holder.permanent
    if isinstance(holder, UserHook):
        return OURS, hook_name(holder.hook), False
    return (OURS, repr(holder), False) if _is_ours(holder) else (FOREIGN, hook_name(hook), False)


def _is_ours(hook: Any) -> bool:
    return type(hook).__module__.partition(".")[0] == "tdcache"
