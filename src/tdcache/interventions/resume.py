"""Resuming a forward behind a cached site: the layers in front of it do not run again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.contexts import HookingContext, HookingContextFactory
from tdcache.errors import EditError
from tdcache.hooks import InputPort, MultiHookHandle, Order, attach
from tdcache.hooks.values import first_tensor
from tdcache.interventions.base import entry_of
from tdcache.interventions.edits import EditTap
from tdcache.interventions.regions import Region
from tdcache.interventions.replay import instead_of_forward
from tdcache.modules import HookedModule
from tdcache.paths import resolve, resolve_all

__all__ = ["ResumeFrom", "Skipped", "resume_from"]


class Skipped(torch.Tensor):
    """Stands for the output of a layer that did not run. Passing it on is fine, computing with it an error."""

    path: str
    like: Tensor

    @classmethod
    def of(cls, path: str, like: Tensor) -> Skipped:
        """The stand-in for the output of the module at ``path``; answers for shape, dtype and device as ``like``."""
        made = torch.empty(0).as_subclass(cls)
        made.path, made.like = path, like
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Skipped({self.path!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer what can be answered, refuse the rest."""
        mine = next(arg for arg in _flat(args, kwargs or {}) if isinstance(arg, Skipped))
        if func is torch.Tensor.__getitem__ and not isinstance(args[1], tuple):
            return mine  # of a block that returns a tuple, the model takes the first entry
        if getattr(func, "__name__", "") == "__get__" and func.__self__ in _ANSWERED:
            return func(mine.like)
        path = mine.path
        raise EditError(
            f"the model is not sequential at {path!r}: {getattr(func, '__name__', func)} uses its "
            "output, which resuming "
            "left out, elsewhere than in the next layer; resume from a site behind that, or run the "
            "model from its start"
        )


_ANSWERED = (torch.Tensor.shape, torch.Tensor.dtype, torch.Tensor.device, torch.Tensor.ndim, torch.Tensor.requires_grad)


def _flat(args: Any, kwargs: Mapping[str, Any]) -> Iterator[Any]:
    for arg in (*args, *kwargs.values()):
        if isinstance(arg, tuple | list):
            yield from _flat(arg, {})
        else:
            yield arg


class _Skip:
    """In place of a layer's forward."""

    def __init__(self, path: str, value: Tensor) -> None:
        self.path = path
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        came = first_tensor((args, kwargs))
        if isinstance(came, Tensor) and not isinstance(came, Skipped):
            same = 2 if came.ndim == 3 else 1
            if came.shape[:same] != self.value.shape[:same]:
                raise EditError(
                    f"resuming with a value of shape {tuple(self.value.shape)}, but the input that "
                    f"comes to {self.path!r} has "
                    f"shape {tuple(came.shape)}: call the model with as many rows and positions as the value has"
                )
        return Skipped.of(self.path, self.value)


class _Enter:
    """Puts the value in place of the stand-in that reaches the next layer."""

    def __init__(self, path: str, after: str, value: Tensor) -> None:
        self.path = path
        self.after = after
        self.value = value

    def __call__(self, part: Tensor, full: Tensor) -> Tensor:
        if not isinstance(full, Skipped) or full.path != self.after:
            raise EditError(
                f"the model is not sequential at {self.after!r}: the first tensor that comes to the next layer, "
                f"{self.path!r}, is not its output; run the model from its start"
            )
        return self.value.clone()


class ResumeFrom(HookingContextFactory):
    """Runs only what comes behind one layer, from a value that was cached there (and perhaps changed since).

    The layer is a member of a ``ModuleList`` or ``Sequential``. What stands in front of the list (embeddings, masks)
    runs, its members up to the layer do not, and the next one gets the value. That a model passes each member's output
    on to the next member and uses it nowhere else is watched while it runs: otherwise it is an error. Layers that were
    left out do not fill a key-value cache, so call the model itself, not ``generate()``.

    Args:
        path: the layer whose output is given.
        source: the value: a tensor, or a cache by path.

    Raises:
        PathError: no such path.
        EditError: the layer is no member of a list, or the last one of a ``ModuleList``; when the model runs, a value
            that does not fit the inputs, or a model that is not sequential there.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> x = torch.randn(4, 2)
        >>> with ResumeFrom("0", model[0](x)).prepare(model) as hooked:
        ...     y = hooked(x)
        >>> torch.equal(y, model(x))
        True
    """

    _hooking_context_class: ClassVar[type[HookingContext]] = HookingContext

    def __init__(self, path: str, source: Tensor | TensorDictBase | Mapping[str, Tensor]) -> None:
        super().__init__()
        self.path = path
        self.source = source

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        path, layer = resolve_all(module.model, self.path)
        value = self.source if isinstance(self.source, Tensor) else entry_of(self.source, path, "fwd", "source=")
        parent_path, _, name = path.rpartition(".")
        parent = resolve(module.model, parent_path)
        if not isinstance(parent, nn.ModuleList | nn.Sequential) or not path:
            raise EditError(
                f"{path!r} is no member of a ModuleList or Sequential but of {type(parent).__name__}, "
                "so it is not known "
                "what runs before it; resume from a layer of a list"
            )
        children = dict(parent.named_children())
        names = list(children)
        prefix = f"{parent_path}." if parent_path else ""
        done = names[: names.index(name) + 1]
        handle = MultiHookHandle()
        if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
            stubs: dict[nn.Module, Callable[..., Any]] = {children[each]: _Skip(prefix + each, value) for each in done}
            stubs[layer] = _Give(_Skip(path, value))
        else:
            if name == names[-1]:
                raise EditError(
                    f"{path!r} is the last of {parent_path!r}, and what follows a ModuleList is not known; resume from "
                    f"{prefix + names[-2] if len(names) > 1 else 'a Sequential'!r}"
                )
            after = names[len(done)]
            enter = _Enter(prefix + after, path, value)
            tap = EditTap(InputPort(enter.path), enter, region=Region(), order=Order.FIRST)
            handle.add(attach(children[after], tap.on_call, InputPort.direction, order=Order.FIRST))
            stubs = {children[each]: _Skip(prefix + each, value) for each in done}
        handle.add(_Entered(stubs))
        return handle


class _Give:
    """In place of the last layer that is left out of a Sequential: gives the value itself."""

    def __init__(self, skip: _Skip) -> None:
        self.skip = skip

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.skip(*args, **kwargs)
        return self.skip.value.clone()


class _Entered:
    """Stubs that are in place until this is removed."""

    def __init__(self, stubs: Mapping[nn.Module, Callable[..., Any]]) -> None:
        self._context: Any = instead_of_forward(stubs)
        self._context.__enter__()

    def remove(self) -> None:
        """Put the modules' own forwards back; a second call does nothing."""
        context, self._context = self._context, None
        if context is not None:
            context.__exit__(None, None, None)


@contextmanager
def resume_from(
    model: nn.Module, path: str, source: Tensor | TensorDictBase | Mapping[str, Tensor]
) -> Iterator[HookedModule]:
    """:class:`ResumeFrom` in one line: ``with ...: y = model(x)`` inside runs the layers behind ``path`` only."""
    with ResumeFrom(path, source).prepare(model) as hooked:
        yield hooked
