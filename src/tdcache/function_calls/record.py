"""What a forward calls: the names that can be selected, before anything is hooked."""

from __future__ import annotations

import html
import inspect
import linecache
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, overload

import regex
import torch
from torch import nn

from tdcache.arguments import call_with
from tdcache.errors import SelectionError, listed
from tdcache.function_calls.attach import CallsLike, attach_rules
from tdcache.function_calls.attention_calls import PRODUCTS, SDPA, SOFTMAX, progress, role_of
from tdcache.function_calls.handlers import Call
from tdcache.function_calls.names import DERIVED
from tdcache.function_calls.overlay import INTERFACE
from tdcache.function_calls.places import nearest_calls
from tdcache.function_calls.sites import CallPattern, CallSite, is_call
from tdcache.hooks.registrations import Order
from tdcache.hooks.values import leaves
from tdcache.named_places import Names
from tdcache.named_selection import select_names
from tdcache.selection import Selection, Site, as_matcher
from tdcache.selection import select as select_modules
from tdcache.tables import html_note, html_table, text_table
from tdcache.types import Match, Selector

__all__ = ["CallRow", "CallSelection", "CallSource", "CallTable", "calls", "record_calls", "select"]

_HEAD = ("place", "count", "arguments", "result", "source")
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


@dataclass(slots=True)
class CallRow:
    """One call as one forward made it."""

    site: CallSite
    count: int = 0
    """How often: more than once where the module itself ran more than once."""
    given: tuple[tuple[int, ...], ...] = ()
    """The shapes of the tensors among the arguments, of the latest call."""
    returned: tuple[tuple[int, ...], ...] = ()
    """The shapes of the tensors in the result, of the latest call."""
    file: str = ""
    line: int = 0

    @property
    def source(self) -> str:
        """The text of the line that makes the call."""
        return linecache.getline(self.file, self.line).strip()


@dataclass(frozen=True, slots=True, repr=False)
class CallTable(Sequence[CallRow]):
    """The calls of one forward, in the order in which they were first made; printed as a table."""

    rows: tuple[CallRow, ...]
    attention: Mapping[str, int]
    """By path: how many attention calls the module makes in a forward, so that ``::q`` to ``::z`` can be selected."""
    modules: Mapping[str, nn.Module] = field(repr=False)
    places: tuple[str, ...] = DERIVED
    """The places of attention calls that are shown."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def sites(self) -> tuple[str, ...]:
        """The names to select by, derived places of attention after the functions."""
        derived = (
            str(CallSite(path, name, at))
            for path, n in self.attention.items()
            for at in range(n)
            for name in self.places
        )
        return (*(str(row.site) for row in self.rows), *derived)

    def __str__(self) -> str:
        return "\n".join((*text_table(_HEAD, self._cells()), *self._derived()))

    __repr__ = __str__

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (str(row.site), str(row.count), _spell(row.given), _spell(row.returned), f"{row.line}: {row.source}")
            for row in self.rows
        ]

    def _derived(self) -> list[str]:
        return [
            f"{path or '(root)'} makes {'one attention call' if n == 1 else f'{n} attention calls'}: "
            f"{' '.join('::' + name for name in self.places)}"
            for path, n in self.attention.items()
            if self.places
        ]

    def annotated(self) -> str:
        """The source of each module's forward with the names of the calls beside the lines."""
        return "\n\n".join("\n".join(self._beside(path, module)) for path, module in self.modules.items())

    def _beside(self, path: str, module: nn.Module) -> Iterator[str]:
        function = inspect.unwrap(type(module).forward)
        try:
            file = inspect.getsourcefile(function) or ""
            lines, start = inspect.getsourcelines(function)
        except (OSError, TypeError):  # a class that was made without a file
            file, lines, start = "", [f"# the source of {type(module).__name__}.forward is not at hand\n"], 0
        names: dict[int, list[str]] = {}
        for row in self.rows:
            if row.site.path == path and row.file == file:
                names.setdefault(row.line, []).append(f"::{row.site.label}")
        width = min(max(len(line.rstrip()) for line in lines), 100)
        for number, line in enumerate(lines, start):
            beside = "  # " + " ".join(names.pop(number)) if number in names else ""
            yield f"{line.rstrip().ljust(width) if beside else line.rstrip()}{beside}"
        elsewhere = [name for at in sorted(names) for name in names[at]]
        elsewhere += [f"::{row.site.label}" for row in self.rows if row.site.path == path and row.file != file]
        if elsewhere:
            yield "# in helpers: " + " ".join(elsewhere)

    def _repr_html_(self) -> str:
        notes = "".join(map(html_note, self._derived()))
        source = f"<pre>{html.escape(self.annotated())}</pre>"
        return html_table(f"{len(self.rows)} calls in one forward", _HEAD, self._cells()) + notes + source


class CallSource(CallTable):
    """The calls of one module, printed as the source of its forward with the names beside the lines."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join((self.annotated(), *self._derived()))

    __repr__ = __str__


def _spell(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("x".join(map(str, shape)) or "()" for shape in shapes)


@dataclass(slots=True)
class _Note:
    """Takes down one call."""

    row: CallRow
    attention: dict[str, int]
    order: int = Order.CAPTURE
    stage: ClassVar[int] = 0

    def before(self, call: Call) -> None:
        """Take down what goes in."""
        if self.row.site.name in (SDPA, SOFTMAX) or self.row.site.name in PRODUCTS:
            role_of(call)
        self.row.given = _shapes((call.args, call.kwargs))

    def after(self, call: Call) -> None:
        """Take down what comes out, and from where it was called."""
        self.row.count += 1
        self.row.returned = _shapes(call.output)
        frame = _caller(call.frame)
        if frame is not None:
            self.row.file, self.row.line = frame.f_code.co_filename, frame.f_lineno
        if "role" in call.notes:
            progress(call).made(call, role_of(call))
            if progress(call).attentions:
                self.attention[self.row.site.path] = progress(call).attentions


def _shapes(value: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for _, tensor in leaves(value))


def _caller(frame: FrameType | None) -> FrameType | None:
    """The nearest frame that is neither torch's nor ours."""
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    return frame


class _CallRecorder:
    def __init__(self) -> None:
        self.rows: list[CallRow] = []
        self.attention: dict[str, int] = {}

    def note(self, site: CallSite) -> _Note | None:
        if site.name == INTERFACE:
            return None
        row = CallRow(site)
        self.rows.append(row)
        return _Note(row, self.attention)


def record_calls(model: nn.Module, sites: Sequence[Site], inside: CallPattern, inputs: Any) -> CallTable:
    """Run one forward without gradients and take down the calls of the modules at ``sites`` that ``inside`` takes.

    Args:
        model: what is called.
        sites: the modules, as :func:`tdcache.selection.select` gives them.
        inside: which of their calls.
        inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or a TensorDict.
    """
    recorder = _CallRecorder()
    seen = CallPattern.parse("::.*") if inside.attention() else inside
    handle = attach_rules(model, [(site.module, CallsLike(site.path, seen, recorder.note)) for site in sites])
    with handle, torch.no_grad(), torch.random.fork_rng(devices=[]):
        call_with(model, inputs)
    rows = tuple(row for row in recorder.rows if row.count and inside.takes(row.site.label))
    places = DERIVED if inside.everything else inside.derived()
    return CallTable(rows, recorder.attention, {site.path: site.module for site in sites}, places)


class CallSelection(Selection):
    """The modules that a selector of calls speaks of; which calls it means shows once a forward has run."""

    __slots__ = ()

    def __repr__(self) -> str:
        return (
            f"{super().__repr__()}\n"
            f"Which of their calls {self.selector!r} means is known once a forward has run: "
            "select(model, pattern, inputs) runs one and shows them"
        )


@overload
def select(
    model: nn.Module,
    selector: Selector,
    inputs: None = None,
    *,
    match: Match = "full",
    allow_empty: bool = False,
    names: Names | None = None,
) -> Selection: ...
@overload
def select(
    model: nn.Module,
    selector: Selector,
    inputs: Any,
    *,
    match: Match = "full",
    allow_empty: bool = False,
    names: Names | None = None,
) -> CallTable: ...
def select(
    model: nn.Module,
    selector: Selector,
    inputs: Any = None,
    *,
    match: Match = "full",
    allow_empty: bool = False,
    names: Names | None = None,
) -> Selection | CallTable:
    r"""The sites of ``model`` that ``selector`` means, to be printed; nothing stays hooked.

    A module that is registered under several names is a site under each of them. The root is selected only by an
    explicit ``""``. Where ``model`` is a wrapper of torch's (``torch.compile``, ``DistributedDataParallel``,
    ``DataParallel``) and no full name matches, the names below the wrapped model are tried.

    Args:
        model: any ``nn.Module``.
        selector: a regex on the path, a compiled pattern, a module class, a predicate ``(path, module) -> bool``, or
            a sequence of these (their union). Or ``"A::B"``: of the modules whose path A matches, the calls inside
            their forwards whose name B matches.
        inputs: for calls: what to run the model on, once and without gradients, to see which there are: a tensor, a
            tuple of arguments, a mapping of keyword arguments, or a TensorDict.
        match: ``"full"`` (the pattern covers the whole path), ``"prefix"`` or ``"search"``.
        allow_empty: return an empty selection where nothing matches.
        names: the canonical names of the model, ``tdcache.names(model)``; the selector then means these. A site's path
            is its name, and its module the one at the place.

    Raises:
        SelectionError: no module, or with ``inputs`` no call, matches (the nearest names are in the message), the
            selector is not one, or its pattern backtracks for more than a second; ``inputs`` for a selector of modules.
        CanonicalNameError: the names are those of another model, or a pattern means only refused ones.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> select(model, r"\d+").paths
        ('0', '1')
        >>> select(model, r"1::.*", torch.zeros(1, 2)).sites
        ('1::relu',)
    """
    if names is not None or not isinstance(selector, str) or not is_call(selector):
        if names is not None and inputs is None:
            matcher, root = as_matcher(selector, match), names.root_in(model)
            return select_names(names, root, matcher, selector, match=match, allow_empty=allow_empty)
        if inputs is None:
            return select_modules(model, selector, match=match, allow_empty=allow_empty)
        raise SelectionError(
            f"inputs= are for seeing the calls inside forwards, and {selector!r} selects modules; write "
            r"'modules::functions', for instance r'.*\.attn::.*', or leave them out",
            selector=selector,
        )
    pattern = CallPattern.parse(selector)
    sites = list(select_modules(model, pattern.path, match=match, allow_empty=allow_empty))
    if inputs is None:
        return CallSelection(sites, selector=selector, model_name=type(model).__name__)
    table = record_calls(model, sites, pattern, inputs)
    if not (table.sites or allow_empty):
        raise _no_such_call(record_calls(model, sites, CallPattern.parse("::.*"), inputs), selector)
    return table


def _no_such_call(there: CallTable, selector: str) -> SelectionError:
    """The error for a selector that matches none of the calls in ``there``, all those of its modules."""
    names = list(dict.fromkeys(row.site.label for row in there.rows))
    near = tuple(nearest_calls(selector, names))
    calls = f"they call {listed(near, 8)}" if near else "they call none that has a name"
    return SelectionError(
        f"{selector!r} matches none of the calls of {len(there.modules)} modules in this forward; {calls}",
        selector=selector,
        near=near,
    )


def calls(model: nn.Module, path: str, inputs: Any) -> CallSource:
    """The calls that the forward of one module makes in one forward of ``model``: what can be selected inside it.

    Args:
        model: what is called with ``inputs``, without gradients.
        path: the module's name in ``named_modules()``; ``""`` for ``model`` itself.
        inputs: a tensor, a tuple of arguments, a mapping of keyword arguments, or a TensorDict.

    Returns:
        The calls, printed as the forward's source with the names beside the lines, as HTML in a notebook.

    Raises:
        SelectionError: ``model`` has no such module.

    Example:
        >>> layer = nn.TransformerDecoderLayer(8, 2, dim_feedforward=4)
        >>> calls(layer, "", (torch.zeros(3, 1, 8), torch.zeros(3, 1, 8))).sites
        ('::add', '::add.1', '::relu', '::add.2')
    """
    sites = select_modules(model, regex.escape(path) if path else "")
    table = record_calls(model, list(sites), CallPattern.parse("::.*"), inputs)
    return CallSource(table.rows, table.attention, table.modules, table.places)
