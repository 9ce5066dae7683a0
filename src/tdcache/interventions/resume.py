"""Resumes a forward after a cached site, without running the layers before it.

That is right only for a model that passes each layer's output to the next layer and uses it nowhere else. Every other
use is detected, because a skipped layer returns a tensor subclass that refuses computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdcache.contexts import HookingContext, HookingContextFactory
from tdcache.errors import EditError
from tdcache.hooks import InputPort, MultiHookHandle, Order
from tdcache.hooks.port import own_entries
from tdcache.hooks.replaced_forward import replace_forward
from tdcache.hooks.values import first_tensor, is_entries
from tdcache.interventions.base import entry_of
from tdcache.interventions.edit_tap import EditTap, attach_taps
from tdcache.interventions.resume_check import check_once
from tdcache.modules import HookedModule
from tdcache.named_places import Names
from tdcache.paths import resolve, resolve_all
from tdcache.place_modules import is_module_output, refuse_at_names
from tdcache.regions import Region

__all__ = ["ResumeFrom", "Skipped", "resume_from"]


class Skipped(torch.Tensor):
    """The placeholder for the output of a layer that did not run: it can be passed on, but not computed with."""

    path: str
    like: Tensor

    @classmethod
    def of(cls, path: str, like: Tensor) -> Skipped:
        """The placeholder for the output of the module at ``path``, with the shape, dtype and device of ``like``."""
        made = torch.empty(0).as_subclass(cls)
        made.path, made.like = path, like
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Skipped({self.path!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Allow metadata, refuse everything else."""
        mine = next(arg for arg in _flat(args, kwargs or {}) if isinstance(arg, Skipped))
        if func is torch.Tensor.__getitem__ and not isinstance(args[1], tuple):
            return mine  # the model takes the first entry of a tuple
        if getattr(func, "__name__", "") == "__get__" and func.__self__ in _ANSWERED:
            return func(mine.like)
        path = mine.path
        raise EditError(
            f"the model is not sequential at {path!r}: {getattr(func, '__name__', func)} uses its "
            "output, which resuming "
            "left out, elsewhere than in the next layer; resume from a site after that, or run the "
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
    """Replaces a layer's forward."""

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
    """Replaces the placeholder that reaches the next layer by the value."""

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
    """Runs only the layers after a given one, from a value that was cached there (and possibly changed since).

    The layer must be a member of a ``ModuleList`` or ``Sequential``. Modules before the list (embeddings, masks) run,
    its members up to the layer do not, and the next one gets the value. It is an error if the model uses the output of
    a skipped layer elsewhere than in the next layer, or if a layer passes more than its output to later ones; the first
    use in a model checks the latter with one complete forward. Skipped layers do not fill a key-value cache, so call
    the model itself, not ``generate()``.

    Args:
        path: the layer to resume after.
        source: the value: a tensor, or a cache by path; for a TensorDict module that writes several entries, a
            TensorDict of them under its path.
        names: the canonical names of the model, ``tdcache.names(model)``; ``path`` is then the name of a
            layer's output, such as ``"blocks.3.resid_post"``.

    Raises:
        PathError: no such path.
        CanonicalNameError: no such name.
        EditError: the layer is not a member of a list, or is the last one of a ``ModuleList``; when the model runs, the
            value does not fit the inputs, or the model is not sequential there.

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

    def __init__(
        self, path: str, source: Tensor | TensorDictBase | Mapping[str, Tensor], *, names: Names | None = None
    ) -> None:
        super().__init__()
        refuse_at_names(names, ())
        self.names = names
        self.path = path
        self.source = source

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def _value_at(self, path: str) -> Any:
        if isinstance(self.source, Mapping | TensorDictBase):
            return entry_of(self.source, path, "fwd", "source=")
        return self.source

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        model = module.model if self.names is None else self.names.root_in(module.model)
        path, _ = resolve_all(model, self._layer_path())
        value = self._value_at(path if self.names is None else self.path)
        parent_path, _, name = path.rpartition(".")
        parent = resolve(model, parent_path)
        if not isinstance(parent, nn.ModuleList | nn.Sequential) or not path:
            raise EditError(
                f"{path!r} is no member of a ModuleList or Sequential but of {type(parent).__name__}, "
                "so it is not known "
                "what runs before it; resume from a layer of a list"
            )
        names = [name for name, _ in parent.named_children()]
        done = {f"{parent_path}.{name}" if parent_path else name for name in names[: names.index(name) + 1]}
        skipped = {each: resolve(model, each) for each in sorted(done)}
        handle = MultiHookHandle()
        with handle.installing():
            if all(isinstance(each, TensorDictModuleBase) for each in skipped.values()):
                stubs: dict[str, Callable[..., Any]] = {
                    each: _SkipEntries(each, skipped[each], value if each == path else None) for each in skipped
                }
            else:
                stubs = self._stand_ins(handle, parent, path, value, skipped)
            replaced = [replace_forward(skipped[each], stub) for each, stub in stubs.items()]
            for each in replaced:
                handle.add(each)
            check_once(module.model, path, skipped, replaced, handle)
        return handle

    def _layer_path(self) -> str:
        """The path of the layer to resume after."""
        if self.names is None:
            return self.path
        place = self.names[self.path]
        if not is_module_output(place):
            raise EditError(
                f"{self.path!r} is the {place.where}, and a model can be resumed from what a layer returns; give "
                "the name of that, such as 'blocks.3.resid_post'"
            )
        return place.path

    @staticmethod
    def _stand_ins(
        handle: MultiHookHandle, parent: nn.Module, path: str, value: Any, skipped: Mapping[str, nn.Module]
    ) -> dict[str, Callable[..., Any]]:
        """The replacements for the forwards of skipped layers, and the edit that inserts the value."""
        if not isinstance(value, Tensor):
            raise EditError(f"the value for {path!r} is a tensor, got {type(value).__name__}")
        stubs: dict[str, Callable[..., Any]] = {each: _Skip(each, value) for each in skipped}
        if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
            stubs[path] = _GiveValue(_Skip(path, value))
            return stubs
        parent_path, _, name = path.rpartition(".")
        children = dict(parent.named_children())
        names = list(children)
        if name == names[-1]:
            before = f"{parent_path}.{names[-2]}" if len(names) > 1 else "a Sequential"
            raise EditError(
                f"{path!r} is the last of {parent_path!r}, and what follows a ModuleList is not known; resume from "
                f"{before!r}"
            )
        after = names[names.index(name) + 1]
        enter = _Enter(f"{parent_path}.{after}", path, value)
        tap = EditTap(InputPort(enter.path), enter, region=Region(), order=Order.FIRST)
        attach_taps(children[after], handle, tap)
        return stubs


class _GiveValue:
    """Replaces the last skipped layer of a Sequential: returns the value itself."""

    def __init__(self, skip: _Skip) -> None:
        self.skip = skip

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.skip(*args, **kwargs)
        return self.skip.value.clone()


class _SkipEntries:
    """Replaces the forward of a TensorDict module: writes the value, if it is the last one skipped."""

    def __init__(self, path: str, module: nn.Module, value: Any) -> None:
        self.path = path
        self.keys = own_entries(module, "out_keys")
        self.value = value

    def __call__(self, data: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        for key in self.keys:  # entries of an earlier run are not this run's
            if data.get(key, None) is not None:
                data.del_(key)
        if self.value is None:
            return data
        given = self.value if is_entries(self.value) else {self.keys[0]: self.value}
        for key in self.keys:
            value = given.get(key)
            if value is None:
                raise EditError(
                    f"{self.path!r} writes {self.keys!r}, and source= has no {key!r}: give a TensorDict of all of them"
                )
            data.set(key, value.clone())
        return data


@contextmanager
def resume_from(
    model: nn.Module,
    path: str,
    source: Tensor | TensorDictBase | Mapping[str, Tensor],
    *,
    names: Names | None = None,
) -> Iterator[HookedModule]:
    """:class:`ResumeFrom` in one line: ``with ...: y = model(x)`` inside runs the layers after ``path`` only."""
    with ResumeFrom(path, source, names=names).prepare(model) as hooked:
        yield hooked
