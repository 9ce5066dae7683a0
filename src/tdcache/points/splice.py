"""Hook points for models that were written without any."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn

from tdcache.errors import CaptureError, ContextError, PathError
from tdcache.hooks import Order, attach
from tdcache.hooks.values import first_tensor, leaves, pick_tensor, replace_tensor
from tdcache.introspect import has_stale_graph
from tdcache.paths import join, resolve_all
from tdcache.points.hook_point import HookPoint
from tdcache.types import Pick, Removable

__all__ = ["PointShelf", "SpliceTap", "SplicedPoint", "insert_hook_point"]


class PointShelf(nn.Module):
    """Holds hook points whose names lead through no module of the model, such as ``"blocks.0.hook_mlp_out"``."""


class SpliceTap:
    """Sends the value after (or before) a module through a hook point."""

    __slots__ = ("before", "path", "pick", "point")

    order = Order.EDIT

    def __init__(self, path: str, point: HookPoint, pick: Pick, *, before: bool) -> None:
        self.path = path
        self.point = point
        self.pick = pick
        self.before = before

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.point.name!r} {'before' if self.before else 'after'} {self.path!r})"

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Send the output through."""
        return self._through(output)

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Send an argument through: of those that a module is called with, positional ones come first."""
        if isinstance(self.pick, str):
            named = self._through(kwargs)
            return None if named is None else (args, named)
        changed = self._through((args, kwargs) if self.pick is None else args)
        if changed is None:
            return None
        return changed if self.pick is None else (changed, kwargs)

    def _through(self, value: Any) -> Any:
        if isinstance(value, Tensor) and self.pick is None:
            changed = self.point(value)
            return None if changed is value else changed
        tensor = pick_tensor(value, self.pick, self.path)
        if first_tensor(tensor) is None:
            raise CaptureError(
                f"pick={self.pick!r} gives {type(tensor).__name__} at {self.path!r}, but the hook point "
                f"{self.point.name!r} takes a tensor",
                paths=(self.path,),
            )
        changed = self.point(tensor)
        if changed is tensor:
            return None
        steps = self.pick if self.pick is not None else next(steps for steps, each in leaves(value) if each is tensor)
        return replace_tensor(value, changed, pick=steps, path=self.path)


class SplicedPoint:
    """A hook point that :func:`insert_hook_point` put into a model; also a context that takes it out at its end."""

    def __init__(self, model: nn.Module, name: str, point: HookPoint) -> None:
        self.name = name
        self.point = point
        self._model: nn.Module | None = model
        self._handle: Removable | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}{'' if self._model is not None else ', removed'})"

    def install(self, module: nn.Module, tap: SpliceTap) -> None:
        """Shelve the point, and send values through it."""
        if self._model is None:
            return
        parents = _shelves(self._model, self.name, make=True)
        parents[-1].add_module(self.name.rpartition(".")[2], self.point)
        try:
            if tap.before:
                self._handle = attach(module, tap.on_input, "fwd_pre_kwargs", order=tap.order)
            else:
                self._handle = attach(module, tap.on_output, "fwd", order=tap.order)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the point out, with its hooks, and the shelves that held nothing else; a second call does nothing."""
        model, self._model = self._model, None
        if self._handle is not None:
            self._handle.remove()
        if model is None:
            return
        parts = self.name.split(".")
        parents = _shelves(model, self.name, make=False)
        delattr(parents[-1], parts[-1])
        for part, parent, shelf in reversed(list(zip(parts, parents, parents[1:], strict=False))):
            if not isinstance(shelf, PointShelf) or any(True for _ in shelf.children()):
                break
            delattr(parent, part)

    def __enter__(self) -> HookPoint:
        return self.point

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def insert_hook_point(
    model: nn.Module, path: str, name: str, *, before: bool = False, pick: Pick = None
) -> SplicedPoint:
    """Put a hook point after a module of an existing model, or before it; ``remove()`` takes it out again.

    The point is a submodule of the model under ``name``, so that everything that goes by paths finds it; it has no
    parameters, so the keys of the state dict do not change. The module itself, and its class, stay as they are.

    Args:
        model: any model.
        path: the module whose output (or input) goes through the point.
        name: the point's own path. Where it leads through no module (``"blocks.0.hook_mlp_out"`` in a model that has no
            ``blocks``), empty ones are made.
        before: the input instead of the output.
        pick: which tensor of a structured value: an index, a key, a path of these, or the first. Of an input, an index
            counts positional arguments, and a string names a keyword argument.

    Raises:
        PathError: no module at ``path``; a ``name`` that is taken, or would make the point a step of a container.
        ContextError: the model was compiled and traced, so that the point would be skipped.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with insert_hook_point(model, "0", "0.hook_pre") as point:
        ...     handle = point.add_hook(lambda tensor, hook: torch.ones_like(tensor))
        ...     model(torch.zeros(1, 2))
        tensor([[1., 1.]])
    """
    path, module = resolve_all(model, path)
    if type(module).forward is nn.Module.forward:  # a ModuleList, or another that has none
        raise PathError(f"{path!r} is a {type(module).__name__}, which is never called; choose one of its members")
    if has_stale_graph(model):
        raise ContextError(
            f"{type(model).__name__} was traced by torch.compile, and its graph skips a hook point that is put in now; "
            "put it in before the first call, or call torch._dynamo.reset()"
        )
    _check_name(model, name, path)
    point = HookPoint()
    point.name = name
    point.train(model.training)
    spliced = SplicedPoint(model, name, point)
    spliced.install(module, SpliceTap(path, point, pick, before=before))
    return spliced


def _check_name(model: nn.Module, name: str, path: str) -> None:
    if not all(str(name).split(".")):
        raise PathError(f"a hook point's name is a path such as 'blocks.0.hook_mlp_out', got {name!r}", selector=name)
    *above, last = name.split(".")
    holder, first_new = model, last
    for at, part in enumerate(above):
        if part not in holder._modules and hasattr(holder, part):
            raise PathError(f"the name {name!r} leads through {'.'.join(above[: at + 1])!r}, which is no module")
        found = holder._modules.get(part)
        if found is None:
            first_new = part
            break
        holder = found
    if isinstance(holder, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise PathError(
            f"the name {name!r} would make {first_new!r} a member of a {type(holder).__name__}, which runs its "
            f"members; choose a name that leads elsewhere, for instance {join(path, last)!r}"
        )
    if first_new == last and hasattr(holder, last):
        raise PathError(f"the name {name!r} is taken in {type(model).__name__}; choose another", selector=name)


def _shelves(model: nn.Module, name: str, *, make: bool) -> list[nn.Module]:
    """The modules that ``name`` leads through, the model first."""
    through = [model]
    for part in name.split(".")[:-1]:
        if make and part not in through[-1]._modules:
            shelf = PointShelf()
            shelf.train(through[-1].training)
            through[-1].add_module(part, shelf)
        through.append(through[-1].get_submodule(part))
    return through
