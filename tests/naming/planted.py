"""Tables that lie, made from one that does not: every one of them has to be refused.

Where a lie is about a value (zeros, the residual inside, a factor of 1.01), a module is put into the model that returns
the wrong value, and the name stands for that module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from tdcache.named_places import NamedPlace, Names
from tdcache.paths import resolve


@dataclass(frozen=True)
class Lie:
    """What is wrong, the names that are, and the model and table to be checked."""

    kind: str
    names: tuple[str, ...]
    model: nn.Module
    table: Names


class Liar(nn.Module):
    """Returns a wrong value when it is shown the right one."""

    def __init__(self, change: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.change = change
        self.stream = None

    def extra_repr(self):
        return self.change.__name__  # verdicts are kept by what a model prints

    def forward(self, value):
        return self.change(value, self.stream)

    def at_block(self, module, args, kwargs):
        given = args[0] if args else kwargs["hidden_states"]
        self.stream = given.detach()

    def at_output(self, module, args, output):
        self(output[0] if isinstance(output, tuple) else output)


def zeros(value, stream):
    return value * 0


def residual_inside(value, stream):
    return value + stream.reshape(value.shape)


def factor(value, stream):
    return value * 1.01


def a_ten_millionth(value, stream):
    return value + 1e-7 * stream.reshape(value.shape)


def lies(model: nn.Module, table: Names) -> Iterator[Lie]:
    """Every lie that the table leaves room for, about its last block."""
    for prefix, stream in table.streams.items():
        head = f"{prefix}blocks.{stream.blocks - 1}."
        for change in (zeros, residual_inside, factor, a_ten_millionth):
            for part in ("attn.contribution", "mlp.contribution"):
                yield from _wrong_value(model, table, head + part, head, change)
        if stream.blocks > 1:
            yield from _other_layer(model, table, head, f"{prefix}blocks.0.")
        yield from _swapped(model, table, head)
        yield from _too_early(model, table, head)
        yield from _middle(model, table, head)
    yield from _other_stack(model, table)


def with_places(table: Names, places: dict[str, NamedPlace]) -> Names:
    """The table with other places for some of its names."""
    return Names({**table, **places}, refused=table.refused, streams=table.streams)


def _wrong_value(model, table, name, head, change) -> Iterator[Lie]:
    place, block = table.get(name), table.get(head + "resid_pre")
    if (
        place is None
        or block is None
        or block.side != "fwd_pre"
        or "::" in place.path
        or place.call is not None
        or place.side == "fwd_pre"
    ):
        return
    liar, twin = Liar(change), copy.deepcopy(model)
    twin.add_module("liar", liar)
    resolve(twin, block.path).register_forward_pre_hook(liar.at_block, with_kwargs=True)
    resolve(twin, place.path).register_forward_hook(liar.at_output)
    wrong = with_places(table, {name: replace(place, path="liar", pick=None)})
    yield Lie(change.__name__, (name,), twin, wrong)


def _other_layer(model, table, head, first) -> Iterator[Lie]:
    for name in table:
        other = table.get(first + name.removeprefix(head))
        if name.startswith(head) and other is not None:
            yield Lie("another layer", (name,), model, with_places(table, {name: other}))


def _swapped(model, table, head) -> Iterator[Lie]:
    pairs = [("attn.contribution", "mlp.contribution"), ("attn.out", "mlp.out"), ("attn.q", "attn.k")]
    pairs += [("attn.k", "attn.v"), ("mlp.pre", "mlp.post"), ("ln1", "ln2"), ("attn.scores", "attn.pattern")]
    for one, other in pairs:
        names = (head + one, head + other)
        if all(name in table for name in names) and table[names[0]].where != table[names[1]].where:
            wrong = {names[0]: table[names[1]], names[1]: table[names[0]]}
            yield Lie(f"{one} and {other} swapped", names, model, with_places(table, wrong))


def _too_early(model, table, head) -> Iterator[Lie]:
    for part in ("attn", "mlp"):
        end, out = f"{head}{part}.contribution", f"{head}{part}.out"
        if end in table and out in table and table[end].where != table[out].where:
            yield Lie("before its norm or scale", (end,), model, with_places(table, {end: table[out]}))


def _middle(model, table, head) -> Iterator[Lie]:
    if head + "resid_mid" in table:
        for part in ("resid_pre", "resid_post"):
            wrong = with_places(table, {head + "resid_mid": table[head + part]})
            yield Lie(f"resid_mid is {part}", (head + "resid_mid",), model, wrong)


def _other_stack(model, table) -> Iterator[Lie]:
    for part in ("attn.pattern", "attn.z", "attn.contribution"):
        one, other = f"decoder.blocks.0.{part}", f"encoder.blocks.0.{part}"
        if one in table and other in table:
            yield Lie("an encoder's in a decoder", (one,), model, with_places(table, {one: table[other]}))
