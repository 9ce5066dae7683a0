"""The binding of a recipe to one model, for the length of a ``with`` block.

Everything that a recipe does to a model is undone here, whatever happened in between: a failure half way through the
entry, an exception in the body or in a hook, other contexts opened on the same model in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Protocol

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn

from tdcache.errors import ContextError, StopForward
from tdcache.function_calls.sites import split_selector
from tdcache.function_calls.stand_in import select_sites
from tdcache.hooks.compiled import refuse_scripted, running_eagerly
from tdcache.hooks.opened import begin_opening, closed
from tdcache.hooks.registrations import MultiHookHandle
from tdcache.hooks.threads import Fence, RunningThread, fencing
from tdcache.introspect import may_be_compiled
from tdcache.modules.call import ModelCall, holds_entries
from tdcache.modules.hooked import HookedModule
from tdcache.named_places import Names
from tdcache.place_modules import named_selection
from tdcache.selection import Matcher, Selection, as_matcher, depends_on_names_only, select_matching, walk
from tdcache.tables import html_note, html_table
from tdcache.types import CacheKey, Match, Selector

__all__ = ["HookingContext", "Recipe"]

Keys = list[CacheKey]


class Recipe(Protocol):
    """The part of a factory that its context uses."""

    @property
    def names(self) -> Names | None:
        """The table of canonical names that selectors refer to; None if they refer to module paths."""

    @property
    def runs_module(self) -> bool:
        """Whether calls are carried out by :meth:`_run_module`."""

    def fits_graph_of(self, model: nn.Module) -> bool:
        """Whether the hooks may become part of a compiled graph of the model."""

    @property
    def hooks_calls_only(self) -> bool:
        """Whether all sites are function calls, where graphs notice hooks."""

    @property
    def prepares_module(self) -> bool:
        """Whether :meth:`_prepare_module` does something, which :meth:`_restore_module` undoes."""

    def _prepare_module(
        self, module: TensorDictModuleBase, in_keys: Keys, out_keys: Keys, extra_relative_path: str
    ) -> TensorDictModuleBase: ...

    def _restore_module(
        self, module: TensorDictModuleBase, in_keys: Keys, out_keys: Keys, extra_relative_path: str
    ) -> TensorDictModuleBase: ...

    def _spawn_hooked_module(
        self, prep_module: TensorDictModuleBase, hooking_context: HookingContext, extra_relative_path: str
    ) -> HookedModule: ...

    def _hook_module(self, module: HookedModule) -> MultiHookHandle: ...

    def _run_module(
        self, module: HookedModule, data: TensorDictBase, forward: Callable[[TensorDictBase], TensorDictBase]
    ) -> TensorDictBase: ...


class HookingContext:
    """A recipe bound to one model. Entering installs all hooks or none; exiting restores the model exactly.

    It can be entered again after it has exited, but not inside itself. Several contexts may be open on one model and
    exit in any order; each removes only its own hooks.

    Args:
        factory: the recipe.
        module: the model.
        in_keys: see :meth:`HookingContextFactory.prepare`.
        out_keys: see :meth:`HookingContextFactory.prepare`.
    """

    def __init__(
        self,
        factory: Recipe,
        module: nn.Module,
        in_keys: Sequence[CacheKey] | Mapping[CacheKey, str] | None = None,
        out_keys: Sequence[CacheKey] | None = None,
    ) -> None:
        self.factory: Any = factory
        if isinstance(module, HookedModule):
            self._module: TensorDictModuleBase = module
            self._extra_relative_path = module.relative_path
            self.model = module.model
        elif isinstance(module, ModelCall):
            self._module, self._extra_relative_path, self.model = module, "module", module.module
        elif isinstance(module, TensorDictModuleBase):
            self._module, self._extra_relative_path, self.model = module, "", module
        else:
            self._module, self._extra_relative_path, self.model = ModelCall(module, in_keys, out_keys), "module", module
        self._wrapped = self._module
        """The module that the recipe prepares: the user's, or in a composite the hooked module of a child."""
        self._in_keys, self._out_keys = list(self._module.in_keys), list(self._module.out_keys)
        self._in_context = False
        self._paused = False
        self._managed = True
        self._remembered: dict[Hashable, tuple[list[tuple[str, nn.Module]], Selection]] = {}
        """What was selected at earlier entries, and among which modules."""
        self._selected: list[Selection] = []
        """The sites of the last entry, for display."""
        self._hooked_module: HookedModule | None = None
        self._handle: MultiHookHandle | None = None
        self._undo: ExitStack | None = None
        self.thread: RunningThread | None = None
        """The thread that opened the context, whose forwards its hooks act in; None while it is closed."""
        self.fence: Fence | None = None
        self.is_child = False
        """Whether it belongs to a composite."""
        self.names: Names | None = factory.names
        """The table of canonical names that selectors and keys refer to; None if they are module paths."""

    def __repr__(self) -> str:
        state = "open" if self._in_context else "closed"
        return f"<{state} {type(self).__name__} of {self.factory!r} on {type(self.model).__name__}>"

    def _repr_html_(self) -> str:
        if not self.selected_sites:
            return html_note(f"{self!r}; its sites are selected when it is entered")
        rows = [(path or "(root)", kind) for path, kind in self.selected_sites.items()]
        return html_table(f"{self!r}: {len(rows)} sites", ("path", "class"), rows)

    @property
    def selected_sites(self) -> dict[str, str]:
        """The paths selected when the context was last entered, with the classes of their modules."""
        return {site.path: type(site.module).__name__ for selection in self._selected for site in selection}

    def __enter__(self) -> HookedModule:
        return self._enter()

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse the call: it is the hooked module, which ``with`` yields, that is called.

        Raises:
            ContextError: always.
        """
        raise ContextError("a context is entered, not called: `with context as hooked: hooked(...)`")

    def open(self) -> HookedModule:
        """Enter without a ``with`` block; the hooked module's ``restore()`` exits."""
        hooked = self._enter()
        self._managed = False
        return hooked

    def _enter(self) -> HookedModule:
        if self._in_context:
            raise ContextError(
                "this context is open already; it can be entered again after it was left, not inside itself: "
                "prepare a second one for nesting"
            )
        self._selected = []
        try:
            self._wrapped = working = self._enter_inner()
            extra = working.relative_path if isinstance(working, HookedModule) else self._extra_relative_path
            keys: tuple[Any, ...] = (self._in_keys, self._out_keys, extra)
            prepared = working
            if self.factory.prepares_module:
                prepared = self.factory._prepare_module(working, *keys)
                self._to_undo().callback(self.factory._restore_module, prepared, *keys)
            if may_be_compiled(self.model):
                noticed = self.factory.hooks_calls_only
                tell = not self.runs_module
                eagerly = running_eagerly(self.model, fits_graph=self._fits_graph, noticed=noticed, tell=tell)
                self._to_undo().enter_context(eagerly)
            hooked: HookedModule = self.factory._spawn_hooked_module(prepared, self, extra)
            self._hooked_module = hooked
            self._in_context = self._managed = True
            self._handle = self._hook(hooked)
        except BaseException as error:
            self._leave(error)
            raise
        return hooked

    def _enter_inner(self) -> TensorDictModuleBase:
        """Enter what is wrapped by the hooked module, and return it."""
        return self._module

    def _to_undo(self) -> ExitStack:
        """The stack of callbacks that undo everything but the hooks, run at exit after the hooks are removed."""
        if self._undo is None:
            self._undo = ExitStack()
        return self._undo

    @property
    def _fits_graph(self) -> bool:
        """Whether the hooks may become part of a compiled graph."""
        fits: bool = self.factory.fits_graph_of(self.model)
        return fits

    def _hook(self, hooked: HookedModule) -> MultiHookHandle:
        """Install the recipe's hooks, all or none."""
        begin_opening(self)
        with fencing(self.fence):
            hooks: Any = self.factory._hook_module(hooked)
        if isinstance(hooks, MultiHookHandle):
            return hooks
        if not hasattr(hooks, "remove"):
            raise ContextError(
                f"{type(self.factory).__name__}._hook_module returned {hooks!r}, which cannot remove its hooks: return "
                "a MultiHookHandle, or the handle of the one hook"
            )
        return MultiHookHandle([hooks])

    @property
    def handle(self) -> MultiHookHandle:
        """The registrations of the hooks."""
        if self._handle is None:
            self._handle = MultiHookHandle()
        return self._handle

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        own_stop = isinstance(error, StopForward) and self._asked_for(error)
        if own_stop:
            error = None
        try:
            try:
                self._leave(error)  # the model is restored before anything is reported
            finally:
                self._finish(error)
        except BaseException as failure:
            if error is None:
                raise
            error.add_note(f"while leaving the context: {type(failure).__name__}: {failure}")
        return own_stop

    def _asked_for(self, stop: StopForward) -> bool:
        """Whether this context is the one that stopped the forward."""
        return False

    def _leave(self, error: BaseException | None) -> None:
        undo, self._undo = self._undo, None
        try:
            if undo is None:  # the usual case
                if self._handle is not None:
                    self._handle.remove()
            else:
                with undo:
                    self.handle.remove()
                    if error is not None:
                        undo.__exit__(type(error), error, error.__traceback__)
        finally:
            closed(self)  # not before: until its hooks are removed, another thread is to be fenced off from them
            self._in_context = False
            self._hooked_module = None

    def _finish(self, error: BaseException | None) -> None:
        """Report problems once the model is restored; ``error`` is the exception of the body, or None."""

    def restore(self) -> None:
        """Exit a context that was entered by ``prepare(..., return_context=False)`` or :meth:`open`."""
        self._needed()
        if self._managed:
            raise ContextError("this context belongs to a with block, which leaves it at its end")
        self.__exit__(None, None, None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Mute the hooks inside a block: each keeps its position, and captured values stay in the cache."""
        self._needed()
        if self._paused:
            raise ContextError("this context is paused already")
        self._paused = True
        self._set_taking(False)
        try:
            with self.handle.muted():
                yield
        finally:
            self._paused = False
            self._set_taking(self._in_context)

    def disable_hooks(self) -> Any:
        """The same as :meth:`paused`."""
        return self.paused()

    def _set_taking(self, taking: bool) -> None:
        """Set whether values that still arrive, such as gradients, are recorded."""

    @contextmanager
    def disable(self) -> Iterator[nn.Module]:
        """Undo everything inside a block; yields the user's own model."""
        with self.paused(), self._module_restored():
            yield self.model

    @contextmanager
    def _module_restored(self) -> Iterator[None]:
        """Inside a block, undo what the recipe did to the module."""
        keys = (self._in_keys, self._out_keys, self._extra_relative_path)
        hooked = self._needed()
        self.factory._restore_module(hooked.td_module, *keys)
        try:
            yield
        finally:
            hooked.td_module = self.factory._prepare_module(self._wrapped, *keys)

    def select(
        self,
        selector: Selector,
        *,
        match: Match = "full",
        allow_empty: bool = False,
        root: nn.Module | None = None,
        matcher: Matcher | None = None,
    ) -> Selection:
        """The sites that a selector matches; reused from the last entry if neither it nor the modules have changed.

        Args:
            selector: see :class:`tdcache.ActivationCaching`.
            match: how patterns are compared with paths.
            allow_empty: accept a selector that matches nothing.
            root: the module that paths are relative to; the user's own model by default.
            matcher: the compiled selector, if the caller has it.

        If the context has canonical names, ``selector`` refers to these: see :mod:`tdcache.place_modules`.

        Raises:
            ContextError: a site is inside a TorchScript module.
        """
        if self.names is not None:
            options: Any = {"match": match, "allow_empty": allow_empty, "matcher": matcher}
            self._selected.append(named_selection(self.model, self.names, selector, **options))
            return self._selected[-1]
        root = self.model if root is None else root
        if matcher is None and split_selector(selector)[1]:  # a matcher is one of modules
            find, shown = partial(self.select, root=root), len(self._selected)
            found = select_sites(root, selector, match=match, allow_empty=allow_empty, find=find)
            self._selected[shown:] = [found]  # the calls, and not the modules that make them
            return found
        tree = walk(root)
        key = (selector, match, id(root)) if type(selector) is str or isinstance(selector, Hashable) else None
        remembered = self._remembered.get(key)
        if remembered is not None and remembered[0] == tree:
            self._selected.append(remembered[1])
            return remembered[1]
        matcher = as_matcher(selector, match) if matcher is None else matcher
        selection = select_matching(root, matcher, selector, match=match, allow_empty=allow_empty, tree=tree)
        refuse_scripted(root, tuple(zip(selection.paths, selection.modules, strict=True)))
        self._selected.append(selection)
        if key is not None and depends_on_names_only(matcher):
            self._remembered[key] = (tree, selection)
        return selection

    def call(self, module: HookedModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Carry out a call of the hooked module."""
        if args and holds_entries(args[0]):
            forward = self.runner(lambda data: module.call_model(data, *args[1:], **kwargs))
            return forward(args[0])
        if self.factory.runs_module:
            raise ContextError(
                f"{self.factory!r} needs a TensorDict: call hooked(TensorDict({{...}})) with the entries "
                f"{self._in_keys!r}"
            )
        return module.call_model(*args, **kwargs)

    @property
    def runs_module(self) -> bool:
        """Whether the recipe carries out calls itself."""
        runs: bool = self.factory.runs_module
        return runs

    def runner(self, forward: Callable[[TensorDictBase], TensorDictBase]) -> Callable[[TensorDictBase], TensorDictBase]:
        """``forward`` wrapped by the recipe."""
        if not self.factory.runs_module:
            return forward
        return lambda data: self.factory._run_module(self._needed(), data, forward)

    def _needed(self) -> HookedModule:
        if not self._in_context or self._hooked_module is None:
            raise ContextError("this context is closed; enter it first: with context as hooked: ...")
        return self._hooked_module
