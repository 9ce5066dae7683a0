"""Names and their parts: the block and the role in a name, and the name of a role and a layer in any spelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import regex

from tdcache.errors import CanonicalNameError, listed

__all__ = ["BlockName", "block_name", "name_in_block", "names_in_blocks"]

_BLOCK = regex.compile(r"(?P<prefix>.*?)blocks\.(?P<number>\d+)\.(?P<role>.+)")


class BlockName(NamedTuple):
    """The parts of a name that belongs to a block."""

    prefix: str
    """Of the stack, with its dot: ``"encoder."``; empty where there is one stack."""
    number: int
    role: str


def block_name(name: str) -> BlockName | None:
    """The parts of a name; None for one that belongs to no block.

    >>> block_name("encoder.blocks.3.attn.q")
    BlockName(prefix='encoder.', number=3, role='attn.q')
    """
    found = _BLOCK.fullmatch(name)
    return None if found is None else BlockName(found["prefix"], int(found["number"]), found["role"])


class _NamesByRole(Protocol):
    model_name: str
    refused: Mapping[str, str]
    streams: Mapping[str, Any]

    def __iter__(self) -> Iterator[str]: ...
    def __contains__(self, name: object) -> bool: ...
    def __getitem__(self, name: str) -> Any: ...
    def spelled(self, name: str) -> str:
        """A canonical name as the table spells it."""

    def error(self, name: object) -> CanonicalNameError:
        """What is raised for a name that is not there."""


def name_in_block(names: _NamesByRole, role: str, layer: int) -> str:
    """The name of a role in one block; see :meth:`tdcache.Names.in_block`."""
    numbers: dict[str, int] = {}
    for name in (*names, *names.refused):
        parsed = block_name(name)
        if parsed is not None:
            numbers[parsed.prefix] = max(numbers.get(parsed.prefix, 0), parsed.number + 1)
    prefix = next((each for each in sorted(numbers, key=len, reverse=True) if role.startswith(each)), "")
    count = numbers.get(prefix, 0)
    if not -count <= layer < count:
        raise CanonicalNameError(
            f"({role!r}, {layer}) means nothing in {names.model_name or 'this model'}, which has {count} blocks",
            selector=role,
        )
    block, role = f"{prefix}blocks.{layer % count}.", role.removeprefix(prefix)
    if block + role in names or block + role in names.refused:
        return str(names[block + role].name)
    spelled = {name: name.removeprefix(block).replace("hook_", "") for name in names if name.startswith(block)}
    near = [name for name, part in spelled.items() if part == role] or [
        name for name, part in spelled.items() if part.endswith(f".{role}")
    ]
    if len(near) == 1:
        return near[0]
    if near:
        raise CanonicalNameError(
            f"({role!r}, {layer}) may be {listed(near)}; give the whole name", selector=role, near=tuple(near)
        )
    raise names.error(block + role)


def names_in_blocks(names: _NamesByRole, roles: Sequence[str], prefix: str | None) -> list[str]:
    """The names of some roles in all blocks of one stack; see :meth:`tdcache.Names.in_blocks`."""
    if prefix is None:
        if len(names.streams) > 1:
            raise CanonicalNameError(
                f"{names.model_name or 'this model'} has several stacks of blocks, {listed(tuple(names.streams))}; "
                "say which with a selector",
                selector=roles[0],
                near=tuple(names.streams),
            )
        prefix = next(iter(names.streams), "")
    blocks = names.streams[prefix].blocks if prefix in names.streams else 0
    wanted = (f"{prefix}blocks.{at}.{role}" for at in range(blocks) for role in roles)
    found = [names.spelled(name) for name in wanted if names.spelled(name) in names]
    if not found:
        raise names.error(names.spelled(f"{prefix}blocks.0.{roles[0]}"))
    return found
