"""``HookCollection``: named places in a model, each with its hooks; ``FwdBwdHooks``: the sequences of one place.

A tree of places can be made, listed and filled before there is a model, and bound per layer; a model's forward only
calls it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from tdcache.errors import PathError, listed
from tdcache.paths import near_misses
from tdcache.pipeline.gradients import grad_hook_wrapper
from tdcache.pipeline.hooks import Hook, HookNode, Hooks, WrapperHooks

__all__ = ["FwdBwdHooks", "HookCollection", "PlacePart"]

PlacePart = Literal["fwd", "bwd", "fwd2"]
"""The sequences of one place, in the order they are called."""


class HookCollection(HookNode):
    """Named children, either sequences of hooks or collections; available as attributes and in ``all_hooks``.

    A hand-written forward calls the children: ``x = hooks.mlp.post_act(x)``. For a model with layers, give each layer
    its own ``deepcopy(hooks).bind(layer=number)``: copies have their own structure and bindings, and share the hooks.

    Example:
        >>> hooks = HookCollection().add_subhooks("post_act", FwdBwdHooks())
        >>> hooks.append_to_path("post_act.fwd", lambda x: 2 * x).post_act(3)
        6
    """

    def __init__(self) -> None:
        super().__init__()
        self._children: dict[str, HookNode] = {}

    @property
    def all_hooks(self) -> Mapping[str, HookNode]:
        """The children by name, in the order they were added; a live read-only view."""
        return MappingProxyType(self._children)

    def add_subhooks(self, name: str | int, subhooks: HookNode) -> Self:
        """Add a child; returns this collection.

        Args:
            name: of the child. A number becomes the name ``"3"``. Names that are not identifiers are reached by their
                path or through ``all_hooks``.
            subhooks: the child.

        Raises:
            ValueError: the name is empty, in use, private or has a dot, or the child is not a sequence or collection.
        """
        name = str(name)
        taken = name in self._children or hasattr(type(self), name)
        if taken or not name or name.startswith("_") or "." in name:
            raise ValueError(
                f"{name!r} cannot name a child of {type(self).__name__}: it is "
                f"{'in use' if taken else 'empty, private, or a path, whose parts are joined by dots'}"
            )
        if not isinstance(subhooks, HookNode):
            raise ValueError(f"child {name!r} must be Hooks or a HookCollection, got {subhooks!r}")
        self._children[name] = subhooks
        if self.bound:
            subhooks.inherit(self.bound)
        return self

    def __getattr__(self, name: str) -> Any:
        children = (
            {} if name.startswith("_") else self._children
        )  # copy and pickle look up private names before there are children
        if name not in children:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}; its children are {listed(list(children), 20)}"
            )
        return children[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._children]

    def paths(self) -> tuple[str, ...]:
        """The dotted names of all sequences below, in order."""
        return tuple(path for path, _ in self._sequences())

    def at(self, path: str) -> HookNode:
        """The sequence or collection with this dotted name.

        Raises:
            PathError: there is no such name; the message lists the nearest ones.
        """
        node: HookNode = self
        for name in path.split("."):
            below = node._children if isinstance(node, HookCollection) else {}  # noqa: SLF001 - of the same class
            if name not in below:
                raise self._no_such_path(path)
            node = below[name]
        return node

    def _no_such_path(self, path: str) -> PathError:
        names = self.paths()
        near = near_misses(path, names) or tuple(name for name in names if name.startswith(path))[:3]
        hint = f"did you mean {listed(near, 3)}?" if near else f"there are {listed(names, 20)}"
        return PathError(f"{path!r} names no hooks of {type(self).__name__}; {hint}", selector=path, near=near)

    def append_to_path(self, path: str, hook: Hook) -> Self:
        """Append a hook to the sequence with this dotted name, such as ``"resid.torso.post_mlp.fwd"``; returns this.

        Raises:
            PathError: there is no such name, or it is a collection.
        """
        node = self.at(path)
        if not isinstance(node, Hooks):
            below = [f"{path}.{name}" for name in node.paths()] if isinstance(node, HookCollection) else []
            raise PathError(
                f"{path!r} is a {type(node).__name__}; append to one of {listed(below)}", selector=path, near=below
            )
        node.append(hook)
        return self

    def append_all(self, hook: Hook, *, part: PlacePart = "fwd") -> Self:
        """Append a hook at every place below, once each; returns this collection.

        Args:
            hook: the hook.
            part: which sequence of places that have three.
        """
        for sequence in {id(each): each for each in self.targets(part)}.values():
            sequence.append(hook)
        return self

    def targets(self, part: str) -> Iterator[Hooks]:
        """One sequence per place below."""
        for child in self._children.values():
            yield from child.targets(part)

    def is_empty(self) -> bool:
        """Whether no sequence below holds a hook."""
        return all(child.is_empty() for child in self._children.values())

    def _pass_scope_on(self) -> None:
        scope = self.bound
        for child in self._children.values():
            child.inherit(scope)

    def _separate(self, memo: dict[int, Any]) -> None:
        super()._separate(memo)
        self._children = {name: copy.deepcopy(child, memo) for name, child in self._children.items()}

    def _sequences(self, above: str = "") -> Iterator[tuple[str, Hooks]]:
        for name, child in self._children.items():
            if isinstance(child, Hooks):
                yield above + name, child
            elif isinstance(child, HookCollection):
                yield from child._sequences(f"{above}{name}.")  # noqa: SLF001 - of the same class

    def _lines_below(self) -> Iterator[str]:
        for path, sequence in self._sequences():
            if not sequence.is_empty():
                yield path
                yield from sequence.lines()[1:]


class FwdBwdHooks(HookCollection):
    """The hooks of one place: ``fwd`` on the value, then ``bwd`` on its gradient, then ``fwd2`` on the value again.

    Gradients are those of the value after the edits of ``fwd`` and before those of ``fwd2``. The hooks of each sequence
    run in the order in which they were appended, in the backward as well: a save sees the effect of an ablation that
    was appended before it. If ``bwd`` holds a hook, a value that does not require grad is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.add_subhooks("fwd", Hooks())
        self.add_subhooks("bwd", WrapperHooks(grad_hook_wrapper))
        self.add_subhooks("fwd2", Hooks())

    def append_fwd(self, hook: Hook) -> Self:
        """Append to ``fwd``; returns this."""
        self.fwd.append(hook)
        return self

    def append_bwd(self, hook: Hook) -> Self:
        """Append a hook on the gradient; returns this."""
        self.bwd.append(hook)
        return self

    def append_fwd2(self, hook: Hook) -> Self:
        """Append to ``fwd2``; returns this."""
        self.fwd2.append(hook)
        return self

    def __call__(self, x: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Pass ``x`` through the three sequences."""
        for sequence in self._children.values():
            if not sequence.is_empty():
                x = sequence(x, *args, **kwargs)  # type: ignore[operator]  # the three are Hooks
        return x

    def targets(self, part: str) -> Iterator[Hooks]:
        """The sequence that ``part`` names.

        Raises:
            ValueError: ``part`` is not one of the three.
        """
        if part not in self._children:
            raise ValueError(f"part is one of {', '.join(map(repr, self._children))}, got {part!r}")
        yield self._children[part]  # type: ignore[misc]  # the three are Hooks
