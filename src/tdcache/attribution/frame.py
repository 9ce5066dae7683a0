"""What a method at work has in hand: the inputs, their baselines and counterfactuals, and ready-made points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdcache.attribution.place import Place
from tdcache.attribution.point import Ask, Between, Modifies, Point, View, expanded, wide
from tdcache.attribution.runner import Runner
from tdcache.attribution.targets import Target, TargetLike, as_targets
from tdcache.errors import AttributionError, listed
from tdcache.selection import Selection
from tdcache.types import CacheKey

__all__ = ["Baseline", "Frame", "InputPath", "Method", "nothing"]

Baseline = Tensor | float | int | Mapping[Any, Any] | Callable[[Tensor], Tensor] | None


def nothing(view: View) -> None:
    """A sink for what is only to be run."""


class Method(Protocol):
    """What a frame asks of the method that it belongs to."""

    target: TargetLike
    modifiers: tuple[Modifies, ...]
    inputs: Any
    """The keys of the inputs that are explained; None for all."""
    allow_unused: bool

    def places(self, role: str, paths: list[str]) -> list[Place]:
        """The places of the modules that a role selected."""


class Frame:
    """One method's part of a pass.

    Args:
        runner: the pass.
        data: the user's TensorDict.
        method: the recipe.
        selections: its sites by role.
        base: the user's rows.
    """

    def __init__(
        self,
        runner: Runner,
        data: TensorDictBase,
        method: Method,
        selections: Mapping[str, Selection],
        *,
        base: Point,
    ) -> None:
        self.runner = runner
        self.data = data
        self.model = runner.model
        self.method = method
        self.modifiers: tuple[Modifies, ...] = method.modifiers
        targets = as_targets(method.target, runner.out_keys)
        self.targets: dict[str | None, Target] = {n: runner.targets.setdefault(t, t) for n, t in targets.items()}
        """The targets by name."""
        self._selections = selections
        self.base = base if not self.modifiers else self.point("base")

    def sites(self, role: str = "sites") -> list[Place]:
        """The places of a role."""
        return self.method.places(role, list(dict.fromkeys(self._selections[role].paths)))

    def subjects(self) -> list[Place]:
        """The sites; without a selector the inputs."""
        return self.sites() if "sites" in self._selections else self.explained()

    def inputs(self) -> dict[CacheKey, Tensor]:
        """The floating-point inputs of the model, or those of them that ``inputs=`` names.

        Raises:
            AttributionError: ``inputs=`` names another.
        """
        keys = self.method.inputs
        if keys is not None:
            self._refuse_unknown("inputs=", keys)
        found: dict[CacheKey, Tensor] = {}
        for key in self.runner.in_keys:
            tensor = self.data.get(key) if keys is None or key in keys else None
            if tensor is not None and tensor.is_floating_point():
                found[key] = tensor
        return found

    def explained(self) -> list[Place]:
        """The inputs that can be explained.

        Raises:
            AttributionError: all inputs are integers.
        """
        keys = list(self.inputs())
        if not keys:
            raise AttributionError(
                f"the inputs {self.runner.in_keys!r} are integers and have no gradient; explain the embeddings, "
                "with a site method such as GradientXActivation(r'.*embeddings'), IntegratedGradients(r'.*wte')"
            )
        return [Place("key", key) for key in keys]

    def point(self, label: Any, **fields: Any) -> Point:
        """A point with the method's modifiers; points of equal labels and modifiers are shared by all methods."""
        modifiers = (*self.modifiers, *fields.pop("modifiers", ()))
        return Point(label=(label, modifiers) if modifiers else label, modifiers=modifiers, **fields)

    def counterfactual(self, *, required: bool = True) -> Point:
        """The rows of the ``"corrupt"`` entries, in place of the inputs of the same name.

        Raises:
            AttributionError: there are none, or they do not fit.
        """
        given = self._given("corrupt")
        if required and not given:
            raise AttributionError(
                f"this method compares with a counterfactual input, and the TensorDict has none; set "
                f"data['corrupt', {self.runner.in_keys[0]!r}]"
            )
        return self.point("corrupt", inputs=given)

    def _given(self, node: str) -> dict[CacheKey, Tensor]:
        given: dict[CacheKey, Tensor] = {}
        there = self.data.get(node, None)
        if isinstance(there, Tensor):
            raise AttributionError(
                f"data[{node!r}] is a tensor; say of which input, data[{node!r}, {self.runner.in_keys[0]!r}]"
            )
        if there is None:
            self._refuse_misspelt(node)
        else:
            self._refuse_unknown(node, there.keys(include_nested=True, leaves_only=True))
        for key in self.runner.in_keys:
            value = self.data.get((node, key) if isinstance(key, str) else (node, *key), None)
            if value is not None:
                given[key] = _fitted(value, self.data.get(key), node, key)
        return given

    def _refuse_misspelt(self, node: str) -> None:
        """Refuse ``data["baselines", ...]``: what it holds would count as not given, and so as zeros."""
        read = {key[0] for key in (*self.runner.in_keys, *self.runner.out_keys) if isinstance(key, tuple)}
        nodes = [key for key, value in self.data.items() if isinstance(value, TensorDictBase) and key not in read]
        for key in get_close_matches(node, nodes, n=1, cutoff=0.75):
            raise AttributionError(
                f"the TensorDict has entries {key!r} and none {node!r}; did you mean data[{node!r}, "
                f"{self.runner.in_keys[0]!r}]? Give the entries another name if they are none of {node!r}"
            )

    def _refuse_unknown(self, node: str, keys: Iterable[Any]) -> None:
        """Refuse entries that name nothing: the input they are meant for would be compared with zeros."""
        names = {key: ".".join(key) if isinstance(key, tuple) else str(key) for key in self.runner.in_keys}
        for key in keys:
            if key in names or (isinstance(key, str | tuple) and self.data.get(key, None) is not None):
                continue
            near = get_close_matches(".".join(key) if isinstance(key, tuple) else str(key), names.values())
            hint = f"did you mean {listed(near)}?" if near else f"the inputs are {listed(list(names.values()))}"
            raise AttributionError(f"the {node} has an entry {key!r}, and the model has no input of that name; {hint}")

    def baselines(self, baseline: Baseline) -> dict[CacheKey, Tensor]:
        """The baseline of every input that has one: given in the TensorDict, as an argument, or zeros.

        Raises:
            AttributionError: one of another shape.
        """
        held = () if self.method.inputs is None else set(self.runner.in_keys) - set(self.method.inputs)
        found = {key: value for key, value in self._given("baseline").items() if key not in held}
        if isinstance(baseline, Mapping):
            self._refuse_unknown("baseline", baseline)
        for key, tensor in self.inputs().items():
            if key in found:
                continue
            value = baseline.get(key, 0.0) if isinstance(baseline, Mapping) else baseline
            found[key] = _fitted(0.0 if value is None else value, tensor, "baseline", key)
        return found

    def along(self, start: Mapping[CacheKey, Tensor], node: float, tag: Any) -> Point:
        """The point ``start + node * (input - start)`` of the straight path to the inputs."""
        high = {key: self.data.get(key) for key in start}
        integers = next((key for key, value in high.items() if not value.is_floating_point()), None)
        if integers is not None:
            raise AttributionError(
                f"the input {integers!r} is of integers, between which there is no path; give a site instead, such as "
                "the embeddings"
            )
        return self.point(("path", node, tag, tuple(start)), inputs=Between(start, high, node))

    def path(self, baseline: Baseline) -> InputPath:
        """The straight path from the baseline to the inputs; methods of equal baselines share its points."""
        shared = baseline is None or isinstance(baseline, int | float)
        return InputPath(self, self.baselines(baseline), ("given", baseline) if shared else id(baseline))

    def completeness_gap(self, parts: Mapping[Place, Tensor], wanted: Tensor) -> Tensor:
        """By how much the sum of each row's scores misses ``wanted``.

        NaN where the rows of a score cannot be told; of a TensorDict without a batch size, the sum of all rows.
        """
        wanted = wide(wanted)
        if not self.data.batch_dims:
            return torch.stack([part.sum() for part in parts.values()]).sum() - wanted.sum()
        total = torch.zeros_like(wanted)
        for place, part in parts.items():
            axis = self.runner.row_axis(place, part)
            own = None if axis is None else part.movedim(axis, 0)
            known = own is not None and own.shape[: wanted.ndim] == wanted.shape
            total = total + (own.reshape(*wanted.shape, -1).sum(-1) if known and own is not None else torch.nan)
        return total - wanted

    def ask(self, point: Point, sink: Callable[[View], None], target: Target | None = None, **fields: Any) -> Ask:
        """An ask; see :class:`Ask`."""
        fields.setdefault("unused", self.method.allow_unused)
        return Ask(point=point, sink=sink, target=target, **fields)


@dataclass(frozen=True, slots=True)
class InputPath:
    """Points between a baseline and the inputs."""

    frame: Frame
    start: Mapping[CacheKey, Tensor]
    tag: Any

    def __call__(self, node: float) -> Point:
        """The point at ``node``, 0 being the baseline."""
        return self.frame.along(self.start, node, self.tag)


def _fitted(value: Any, like: Tensor, node: str, key: CacheKey) -> Tensor:
    if callable(value) and not isinstance(value, Tensor):
        value = value(like)
    if not isinstance(value, Tensor):
        return torch.full_like(like, value)
    found = expanded(value.to(like), like)
    if found is None:
        raise AttributionError(
            f"the {node} of {key!r} has shape {tuple(value.shape)}, the input {tuple(like.shape)}; give one of that "
            "shape, or one that expands to it"
        )
    return found
