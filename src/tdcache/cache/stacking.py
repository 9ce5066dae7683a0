"""Stacks the entries of sites that differ only in named groups of the pattern, with one axis per group (``stack_by=``).

Stacking by hand needs the sites in numeric order (``layers.10`` after ``layers.2``) and notices a missing layer only by
its shape; here either is settled before the first forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from tdcache.errors import CaptureError, listed
from tdcache.hooks.values import check_dense
from tdcache.selection import Groups, Site
from tdcache.types import CacheKey

__all__ = ["GrowingStackBy", "StackBy"]


class StackBy:
    r"""Joins the entries of sites that differ only in named groups into one dense tensor, one leading axis per group.

    Sites are joined if their paths agree once the groups are replaced by ``*``. The key of a joined entry consists of
    the values of the remaining named groups, joined by dots, or is that path if there are none. Along an axis stand the
    values of its group that occur among the sites: numbers in numeric order, then words in alphabetical order.

    Args:
        group: the name of the group, for instance ``"layer"``, or several names, one axis each, in this order.
        sites: the selected sites.

    Raises:
        CaptureError: a site lacks a group, different paths would share one key, or the sites do not fill the axes.

    Example:
        >>> from torch import nn
        >>> from tdcache import select
        >>> model = nn.ModuleList(nn.ModuleDict({"attn": nn.ReLU(), "mlp": nn.ReLU()}) for _ in range(2))
        >>> StackBy("layer", select(model, r"(?P<layer>\d)\.(attn|mlp)")).members
        {'*.attn': ['0.attn', '1.attn'], '*.mlp': ['0.mlp', '1.mlp']}
    """

    def __init__(self, group: str | Sequence[str], sites: Sequence[Site]) -> None:
        self.group = group
        self._names = (group,) if isinstance(group, str) else tuple(group)
        if not self._names or len(set(self._names)) < len(self._names):
            raise CaptureError(f"stack_by={group!r} names no group, or one twice; give each group one axis")
        for name in self._names:
            self._check_present(name, sites)
        self.members: dict[str, list[str]] = {}
        """The paths of each joined entry, by key, in the order of the axes (the last one fastest)."""
        self.axes: dict[str, tuple[list[str], ...]] = {}
        """The values of the groups along the axes of each joined entry, by key."""
        for key, alike in self._by_key(sites).items():
            self.axes[key], self.members[key] = self._fill(key, alike)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.group!r}, {list(self.members)!r})"

    def complete(self, entries: Mapping[CacheKey, object]) -> bool:
        """Whether every site has an entry."""
        return all(path in entries for paths in self.members.values() for path in paths)

    def __call__(self, entries: Mapping[CacheKey, Tensor]) -> dict[CacheKey, Tensor]:
        """The joined entries, each of shape ``(*groups, *shape)``.

        Args:
            entries: the value of every site, by path.

        Raises:
            CaptureError: a site has no entry, or sites of one entry differ in shape or device.
        """
        joined: dict[CacheKey, Tensor] = {}
        for key, paths in self.members.items():
            self._check_entries(key, paths, entries)
            stacked = torch.stack([entries[path] for path in paths])
            sizes = tuple(len(axis) for axis in self.axes[key])
            joined[key] = stacked if len(sizes) == 1 else stacked.unflatten(0, sizes)
        return joined

    def _check_present(self, name: str, sites: Sequence[Site]) -> None:
        without = [site.path for site in sites if site.groups.get(name) is None]
        if without:
            there = sorted({name for site in sites for name in site.groups})
            raise CaptureError(
                f"stack_by={self.group!r} needs a named group (?P<{name}>...) in the pattern; "
                f"{listed(without)} have {f'only {listed(there)}' if there else 'no named groups'}",
                paths=without,
            )

    def _by_key(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        """The sites of each joined entry; sites whose paths differ outside the groups are never joined."""
        alike: dict[str, list[Site]] = {}
        keys: dict[str, str] = {}
        for site in sites:
            common, key = self._common(site)
            alike.setdefault(common, []).append(site)
            keys[common] = key
        sharing: dict[str, list[str]] = {}
        for common, key in keys.items():
            sharing.setdefault(key, []).append(common)
        for key, commons in sharing.items():
            if len(commons) > 1:
                raise CaptureError(
                    f"stack_by={self.group!r} would give {listed(commons)} one key, {key!r}: these paths differ "
                    "outside the named groups; name the part that differs too, as in (?P<part>encoder|decoder), or "
                    "write the other groups as (?:...), so that the whole path is the key",
                    paths=[site.path for common in commons for site in alike[common]],
                )
        return {keys[common]: found for common, found in alike.items()}

    def _common(self, site: Site) -> tuple[str, str]:
        """The path with ``*`` in place of the groups, and the key of the joined entry."""
        if not isinstance(site.groups, Groups):
            raise CaptureError(
                f"stack_by={self.group!r} needs to know where in {site.path!r} its groups stand, and got them as "
                f"{type(site.groups).__name__}; take the sites from select(model, pattern)",
                paths=(site.path,),
            )
        spans = [site.groups.spans[name] for name in self._names]
        parts = [*site.path, ""]
        for start, end in sorted(spans, key=lambda span: span[1] - span[0]):  # inner groups before outer ones
            if start == end:
                parts[start] = "*" + parts[start]
            else:
                parts[start:end] = ["*", *[""] * (end - start - 1)]
        others = [
            "".join(parts[start:end])
            for start, end in site.groups.spans.values()
            if start < end and not any(first <= start and end <= last for first, last in spans)
        ]
        common = "".join(parts)
        return common, ".".join(others) if others else common

    def _fill(self, key: str, alike: list[Site]) -> tuple[tuple[list[str], ...], list[str]]:
        """The axes of one joined entry, and the paths that fill them."""
        axes = tuple(sorted({site.groups[name] for site in alike}, key=_axis_order) for name in self._names)
        paths: dict[tuple[str, ...], str] = {}
        for site in alike:
            at = tuple(site.groups[name] for name in self._names)
            if at in paths:
                raise CaptureError(
                    f"stack_by={self.group!r} cannot stack {key!r}: {paths[at]!r} and {site.path!r} are both "
                    f"{self._spell(at)}; name the part of the path that tells them apart",
                    paths=(paths[at], site.path),
                )
            paths[at] = site.path
        missing = [at for at in product(*axes) if at not in paths]
        if missing:
            raise CaptureError(
                f"stack_by={self.group!r} cannot stack {key!r}: {len(paths)} sites do not fill the axes "
                f"{' x '.join(str(len(axis)) for axis in axes)}, there is none for "
                f"{' or '.join(map(self._spell, missing[:5]))}; select sites that do, or stack by one group",
                paths=tuple(paths.values()),
            )
        return axes, [paths[at] for at in product(*axes)]

    def _spell(self, at: tuple[str, ...]) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in zip(self._names, at, strict=True))

    def _check_entries(self, key: str, paths: list[str], entries: Mapping[CacheKey, Tensor]) -> None:
        missing = [path for path in paths if path not in entries]
        if missing:
            raise CaptureError(
                f"stack_by={self.group!r} cannot stack {key!r}: {listed(missing)} saw no value in this forward; "
                "select only what runs, or leave stack_by= out",
                paths=missing,
            )
        for path in paths:
            check_dense(entries[path], path)
        if len({tuple(entries[path].shape) for path in paths}) > 1:
            differing = ", ".join(f"{path!r} {tuple(entries[path].shape)}" for path in paths[:5])
            raise CaptureError(
                f"stack_by={self.group!r} cannot stack {key!r}: the sites differ in shape, {differing}; "
                "use index= or callback=",
                paths=paths,
            )
        if len({entries[path].device for path in paths}) > 1:
            differing = ", ".join(f"{path!r} {entries[path].device}" for path in paths[:5])
            raise CaptureError(
                f"stack_by={self.group!r} cannot stack {key!r}: the sites are on several devices, {differing}; "
                "bring their values to one with device=",
                paths=paths,
            )


class GrowingStackBy(StackBy):
    """Joins the entries of sites that are discovered one by one; the axes cover the sites known so far.

    Args:
        group: see :class:`StackBy`.
        sites: the sites that are known.
        owners: sites with the groups of those still to be discovered.
    """

    def __init__(self, group: str | Sequence[str], sites: Sequence[Site], owners: Sequence[Site]) -> None:
        super().__init__(group, ())
        self._sites = list(sites)
        self._stale = True
        for name in self._names:
            self._check_present(name, [*sites, *owners])

    def add(self, site: Site) -> None:
        """Add a site that was discovered."""
        if all(site.path != known.path for known in self._sites):
            self._sites.append(site)
            self._stale = True

    def _settle(self) -> None:
        if self._stale:
            found = StackBy(self.group, self._sites)
            self.members, self.axes, self._stale = found.members, found.axes, False

    def complete(self, entries: Mapping[CacheKey, object]) -> bool:
        """Whether every site known so far has an entry."""
        self._settle()
        return super().complete(entries)

    def __call__(self, entries: Mapping[CacheKey, Tensor]) -> dict[CacheKey, Tensor]:
        """The joined entries over the sites known so far."""
        self._settle()
        return super().__call__(entries)


def _axis_order(value: str) -> tuple[int, int, str]:
    return (0, int(value), value) if value.isdecimal() else (1, 0, value)
