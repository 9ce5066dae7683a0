"""The base class of recipes: every method of this library, and of its users, is a subclass.

A subclass says which hooks to register and what to prepare. Entering, undoing, error handling, composing and calling
conventions are the same for all of them, and are not overridden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast, overload

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdcache.contexts.context import HookingContext
from tdcache.errors import ContextError
from tdcache.hooks.registrations import MultiHookHandle
from tdcache.modules.hooked import HookedModule
from tdcache.named_places import Names
from tdcache.options import InitSignature, option_names, refuse_unknown
from tdcache.paths import join
from tdcache.types import CacheKey

__all__ = ["HookingContextFactory"]

InKeys = Sequence[CacheKey] | Mapping[CacheKey, str] | None
OutKeys = Sequence[CacheKey] | None


class HookingContextFactory:
    r"""A recipe that can be bound to any model; it holds configuration and no reference to a model.

    To write your own, override :meth:`_hook_module` and, if the method needs it, :meth:`_prepare_module` with
    :meth:`_restore_module`, or :meth:`_run_module`. Class attributes choose the classes of the context and of the
    hooked module.

    Example:
        >>> import torch
        >>> from tdcache import HookingContextFactory, MultiHookManager
        >>> class AddOne(HookingContextFactory):
        ...     def _hook_module(self, module):
        ...         manager = MultiHookManager(r"linear\d")
        ...         hook = lambda module, args, output: output + 1
        ...         return manager.register_hook(module, lambda path: hook, relative_path=module.relative_path)
    """

    _hooked_module_class: type[HookedModule] = HookedModule
    _hooking_context_class: ClassVar[type[HookingContext]] = HookingContext
    # Defaults for subclasses that do not call super().__init__(); instances get their own.
    _hooking_context_kwargs: Mapping[str, Any] = {}
    _hooked_module_kwargs: Mapping[str, Any] = {}

    names: Names | None = None
    """The table of canonical names that selectors refer to; None if they refer to module paths."""

    _overrides_run: ClassVar[bool] = False
    _overrides_spawn: ClassVar[bool] = False
    _overrides_prepare: ClassVar[bool] = False

    __signature__: ClassVar[Any] = InitSignature()

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuse misspelt options by name, before any constructor runs."""
        known = option_names(cast(Any, cls)) if options else None
        if known is not None:
            refuse_unknown(cls.__name__, options, known)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._overrides_run = cls._run_module is not HookingContextFactory._run_module
        cls._overrides_spawn = cls._spawn_hooked_module is not HookingContextFactory._spawn_hooked_module
        base = (HookingContextFactory._prepare_module, HookingContextFactory._restore_module)
        cls._overrides_prepare = (cls._prepare_module, cls._restore_module) != base

    @property
    def runs_module(self) -> bool:
        """Whether :meth:`_run_module` carries out calls, so that they need a TensorDict."""
        return self._overrides_run

    @property
    def prepares_module(self) -> bool:
        """Whether :meth:`_prepare_module` does something, which :meth:`_restore_module` undoes."""
        return self._overrides_prepare

    @property
    def fits_graph(self) -> bool:
        """Whether ``torch.compile`` may make the hooks part of a graph; if not, a compiled model runs eagerly."""
        return False

    def fits_graph_of(self, model: nn.Module) -> bool:
        """:attr:`fits_graph`, where it depends on the model as well."""
        return self.fits_graph

    @property
    def hooks_calls_only(self) -> bool:
        """Whether all sites are function calls: ``torch.compile`` notices hooks there, and not those on modules."""
        return False

    @property
    def hooked_module_class(self) -> type[HookedModule]:
        """The class of the hooked module that the context yields."""
        return self._hooked_module_class

    @property
    def hooked_module_kwargs(self) -> Mapping[str, Any]:
        """The keyword arguments for :attr:`hooked_module_class`."""
        return self._hooked_module_kwargs

    @property
    def spawns(self) -> bool:
        """Whether :meth:`_spawn_hooked_module` is overridden."""
        return self._overrides_spawn

    def __init__(self) -> None:
        self._hooking_context_kwargs: dict[str, Any] = {}
        self._hooked_module_kwargs: dict[str, Any] = {}

    @overload
    def prepare(
        self,
        module: nn.Module,
        in_keys: InKeys = None,
        out_keys: OutKeys = None,
        *,
        return_context: Literal[True] = True,
    ) -> HookingContext: ...
    @overload
    def prepare(
        self, module: nn.Module, in_keys: InKeys = None, out_keys: OutKeys = None, *, return_context: Literal[False]
    ) -> HookedModule: ...
    def prepare(
        self, module: nn.Module, in_keys: InKeys = None, out_keys: OutKeys = None, *, return_context: bool = True
    ) -> HookingContext | HookedModule:
        """Bind the recipe to a model.

        Args:
            module: any ``nn.Module``; also a TensorDict module, or a hooked module of another open context.
            in_keys: the TensorDict entries passed to a plain module, ``["input"]`` by default; a mapping names keyword
                arguments.
            out_keys: where its results are written, ``["output"]`` by default.
            return_context: with False, enter at once and return the hooked module; its ``restore()`` exits.

        Raises:
            ContextError: ``module`` is not an ``nn.Module``, or is a TensorDict module without these keys.
        """
        if not isinstance(module, nn.Module):
            raise ContextError(f"prepare() takes an nn.Module, got {type(module).__name__}")
        if isinstance(module, TensorDictModuleBase):
            _check_keys(module, in_keys, out_keys)
        context = self._hooking_context_class(self, module, in_keys, out_keys, **self._hooking_context_kwargs)
        return context if return_context else context.open()

    if not TYPE_CHECKING:  # type checkers refuse `with factory` by themselves

        def __enter__(self) -> None:
            raise ContextError(
                f"a recipe is bound to a model first: `with {type(self).__name__}(...).prepare(model) as hooked:`"
            )

        def __exit__(self, *error: object) -> None: ...

    def _prepare_module(
        self, module: TensorDictModuleBase, in_keys: list[CacheKey], out_keys: list[CacheKey], extra_relative_path: str
    ) -> TensorDictModuleBase:
        """The module to call instead of ``module``; undone by :meth:`_restore_module`."""
        return module

    def _restore_module(
        self, module: TensorDictModuleBase, in_keys: list[CacheKey], out_keys: list[CacheKey], extra_relative_path: str
    ) -> TensorDictModuleBase:
        """Undo what :meth:`_prepare_module` did to ``module``."""
        return module

    def _spawn_hooked_module(
        self, prep_module: TensorDictModuleBase, hooking_context: HookingContext, extra_relative_path: str
    ) -> HookedModule:
        """The hooked module that the context yields."""
        kwargs = dict(self._hooked_module_kwargs)
        relative_path = kwargs.pop("relative_path", "td_module")
        if extra_relative_path:
            relative_path = join(relative_path, extra_relative_path)
        return self._hooked_module_class(
            prep_module, hooking_context=hooking_context, relative_path=relative_path, **kwargs
        )

    def _hook_module(self, module: HookedModule) -> MultiHookHandle:
        """Register the hooks, either all of them or none, and return the handle that removes them.

        The handle of a single hook, one of tdcache's or of torch's, may be returned as it is.
        """
        return MultiHookHandle()

    def _run_module(
        self, module: HookedModule, data: TensorDictBase, forward: Callable[[TensorDictBase], TensorDictBase]
    ) -> TensorDictBase:
        """Carry out ``hooked(data)``; ``forward`` runs the model once. Override it to run the model several times."""
        return forward(data)


def _check_keys(module: TensorDictModuleBase, in_keys: InKeys, out_keys: OutKeys) -> None:
    for name, wanted, there in (("in_keys", in_keys, module.in_keys), ("out_keys", out_keys, module.out_keys)):
        unknown = [key for key in wanted or () if key not in there]
        if unknown:
            raise ContextError(
                f"{name}={list(wanted or ())!r}: the TensorDict module has {there!r}, but not {unknown!r}"
            )
