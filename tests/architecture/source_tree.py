"""The package's source as syntax trees, for the tests that hold it to the house rules."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = "tdcache"


@dataclass(frozen=True)
class Source:
    """One file: its dotted module name, whether it is a package's ``__init__``, and its text."""

    module: str
    text: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.module)

    @property
    def top_level(self) -> str:
        """``"store"`` for ``tdcache.store.files``; ``""`` for the package itself."""
        return self.module.removeprefix(PACKAGE).removeprefix(".").partition(".")[0]


@dataclass(frozen=True)
class Import:
    """One imported name: ``a.b`` for ``import a.b``, ``a.b.c`` for ``from a.b import c``."""

    name: str
    line: int
    at_run_time: bool
    """False under ``if TYPE_CHECKING:``."""
    when_loaded: bool
    """False inside a function, where the import waits for the call."""


def package_sources() -> list[Source]:
    """Every file of the package, in the order of their paths."""
    root = REPOSITORY / "src"
    return [_read(path, root) for path in sorted((root / PACKAGE).rglob("*.py"))]


def _read(path: Path, root: Path) -> Source:
    parts = path.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    return Source(".".join(parts[:-1] if is_package else parts), path.read_text(encoding="utf-8"), is_package)


def imports_of(source: Source) -> list[Import]:
    """Every import in the file, relative ones resolved, literal ``import_module`` calls included."""
    return list(_walk(source.tree, source, at_run_time=True, when_loaded=True))


def _walk(node: ast.AST, source: Source, *, at_run_time: bool, when_loaded: bool) -> Iterator[Import]:
    for name in _names(node, source):
        yield Import(name, node.lineno, at_run_time, when_loaded)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        when_loaded = False
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                typing_only = field == "body" and isinstance(node, ast.If) and _is_type_checking(node.test)
                yield from _walk(child, source, at_run_time=at_run_time and not typing_only, when_loaded=when_loaded)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def _names(node: ast.AST, source: Source) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(names=names):
            base = _absolute(node, source)
            yield from (f"{base}.{alias.name}" for alias in names)
        case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
            match node.args:
                case [ast.Constant(value=str(name)), *_]:
                    yield name


def _absolute(node: ast.ImportFrom, source: Source) -> str:
    if not node.level:
        return node.module or ""
    parts = source.module.split(".")
    kept = len(parts) - node.level + source.is_package
    return ".".join([*parts[:kept], *([node.module] if node.module else [])])
