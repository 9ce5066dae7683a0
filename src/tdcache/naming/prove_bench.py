"""What the identities are checked on, and how a check is written down."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tdcache.errors import TdcacheError
from tdcache.function_calls import is_call
from tdcache.named_places import NamedPlace
from tdcache.named_proof import deviation
from tdcache.named_roles import block_name
from tdcache.named_streams import ResidualStream, StreamChange
from tdcache.naming.prove_values import Readings
from tdcache.paths import resolve

__all__ = ["Applied", "IdentityCheck", "ProofBench", "apply_module"]

EXACT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""What sums may deviate by, relative to the largest value: a few additions in another order."""
FLOAT32_INSIDE = {**EXACT, torch.float64: 3e-6}
"""The same where a float64 model is seen to compute in float32 inside: norms, softmax, a recurrent state."""


@dataclass(frozen=True, slots=True)
class IdentityCheck:
    """One identity in one place.

    Attributes:
        identity: what should hold.
        names: the names that it speaks of.
        error: by how much it does not.
        tolerance: what is allowed.
        refuses: the names that are wrong if it does not hold; by default those of ``names`` that no identity
            binds.
        reason: what to say then; by default the identity and the error.
        binds: the names that it binds to the stream, so that another identity that fails is not their fault.
    """

    identity: str
    names: tuple[str, ...]
    error: float
    tolerance: float
    refuses: tuple[str, ...] = ()
    reason: str = ""
    binds: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance (a NaN is not)."""
        return self.error <= self.tolerance

    def why(self) -> str:
        """Why the names are refused."""
        if self.reason:
            return self.reason
        if self.tolerance == 0:
            return f"it does not hold that {self.identity}"
        return f"{self.identity} is off by {self.error:.1e} of the largest value"


Applied: TypeAlias = tuple[nn.Module | None, Tensor]
"""A module, and what it was given."""


@dataclass(slots=True, eq=False)
class ProofBench:
    """A model, what is known of its streams, and the values of its places.

    Attributes:
        model: the copy that the values are of.
        places: the table that is checked.
        streams: what it says about each stream.
        readings: the values.
        dtype: of the model.
        checks: what was found so far.
    """

    model: nn.Module
    places: dict[str, NamedPlace]
    streams: dict[str, ResidualStream]
    readings: Readings
    dtype: torch.dtype
    checks: list[IdentityCheck] = field(default_factory=list)

    def has(self, *names: str) -> bool:
        """Whether there is a value for each of these names."""
        return all(name in self.readings for name in names)

    def __getitem__(self, name: str) -> Tensor:
        return self.readings[name]

    def allowed(self, error: float, through: Iterable[Tensor] = (), by: Iterable[Applied] = ()) -> float:
        """What an error may come to.

        What float32 gives is enough only where it is seen that numbers passed through float32: a value equals its own
        rounding, or a module makes the same of what it is given and of that rounded.

        Args:
            error: the error that was found.
            through: the values that the identity holds against each other.
            by: the modules on the way, each with what it was given.
        """
        exact = EXACT[self.dtype]
        if error <= exact or not (any(map(_is_float32, through)) or any(map(_rounds, by))):
            return exact
        return FLOAT32_INSIDE[self.dtype]

    def equal(
        self,
        identity: str,
        names: Sequence[str],
        made: Tensor,
        seen: Tensor,
        *,
        through: Iterable[Tensor] | None = None,
        by: Iterable[Applied] = (),
        coarse: Tensor | None = None,
        binds: bool = False,
    ) -> None:
        """Check that two values agree.

        Args:
            identity: what should hold.
            names: the names that it speaks of.
            made: what the identity gives.
            seen: what was kept.
            through: see :meth:`allowed`; by default what was kept.
            by: see :meth:`allowed`.
            coarse: what the identity gives if its operands are rounded to float32: that it is then exact shows as well
                that they are.
            binds: whether the identity binds its names to the stream.
        """
        error = deviation(made, seen)
        allowed = self.allowed(error, (seen,) if through is None else through, by)
        if error > allowed and coarse is not None and deviation(coarse, seen) <= allowed:
            allowed = FLOAT32_INSIDE[self.dtype]
        self.checks.append(IdentityCheck(identity, tuple(names), error, allowed, binds=tuple(names) if binds else ()))

    def bound(self, identity: str, names: Sequence[str], made: Tensor, seen: Tensor, **options: Any) -> None:
        """Check that two values agree, as :meth:`equal` does, in an identity that binds its names to the stream."""
        self.equal(identity, names, made, seen, binds=True, **options)

    def true(self, identity: str, names: Sequence[str], holds: bool, reason: str = "", **options: Any) -> None:
        """Check something that holds or does not, such as where a gradient goes."""
        self.checks.append(IdentityCheck(identity, tuple(names), 0.0 if holds else 1.0, 0.0, reason=reason, **options))

    def module(self, name: str) -> nn.Module | None:
        """The module whose output a name stands for; None if it stands for a call."""
        place = self.places.get(name)
        return None if place is None or is_call(place.path) else self.module_at(place.path)

    def module_at(self, path: str | None) -> nn.Module | None:
        """The module of a path, or None."""
        if path is None:
            return None
        try:
            return resolve(self.model, path)
        except TdcacheError:
            return None

    def blocks(self) -> Iterator[tuple[str, str, int, str]]:
        """Each block that has names: its stream's prefix, what its names begin with, its number, and its layout."""
        for prefix, at in sorted({(each.prefix, each.number) for each in map(block_name, self.places) if each}):
            stream = self.streams.get(prefix)
            layout = stream.layouts[at] if stream is not None and at < stream.blocks else ""
            yield prefix, f"{prefix}blocks.{at}.", at, layout

    def changes(self, prefix: str, number: int) -> tuple[StreamChange, ...]:
        """What happens to the stream in one block; the usual, where the table does not know the stream."""
        stream = self.streams.get(prefix) or ResidualStream(prefix=prefix)
        return stream.changes_in(number, self.places)

    def labels(self, head: str, part: str) -> list[str]:
        """The sublayers of a block that have ``part``: ``["attn", "cross_attn", "mlp"]``, in the order they run."""
        order = {"attn": 0, "mixer": 0, "cross_attn": 1, "mlp": 2}
        found = [
            name[len(head) : -len(part) - 1]
            for name in self.places
            if name.startswith(head) and name.endswith("." + part) and name.count(".", len(head)) == 1
        ]
        return sorted(found, key=lambda label: (order.get(label.rstrip("0123456789"), 3), label))


def _is_float32(value: Tensor) -> bool:
    """Whether a value of a float64 model holds nothing that float32 does not."""
    return value.dtype is torch.float32 or (value.dtype is torch.float64 and bool((value == value.float()).all()))


def _rounds(applied: Applied) -> bool:
    """Whether a module computes in float32: it makes the same of a value and of that value rounded to float32."""
    module, value = applied
    if value.dtype is not torch.float64 or _is_float32(value):
        return False
    whole, rounded = apply_module(module, value), apply_module(module, value.float().double())
    return whole is not None and rounded is not None and torch.equal(whole, rounded)


def apply_module(module: nn.Module | None, value: Tensor) -> Tensor | None:
    """What a module makes of a value; None where there is none, or it cannot be called with the value alone."""
    if module is None:
        return None
    try:
        with torch.no_grad():
            made = module(value)
    except (RuntimeError, TypeError, ValueError):
        return None
    found = made[0] if isinstance(made, tuple) else made
    return found if isinstance(found, Tensor) else None
