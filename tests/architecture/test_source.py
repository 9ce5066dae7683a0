"""What no file of the package may hold, and what only one place of it may do."""

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import pytest

from architecture.source_tree import Source, imports_of, package_sources

LINES_PER_FILE = 400
LINES_PER_FUNCTION = 40

# Over the cap for a reason: {"tdcache.module": "why"}, {"tdcache.module:Class.method": "why"}.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {
    "tdcache.caching:ActivationCaching.__init__": "twenty options, a line each in the signature and in the body",
}

UNFINISHED = re.compile(r"\b(TODO|FIXME)\b")
HOOK_DICT = re.compile(r"_(global_)?(forward|backward|state_dict|load_state_dict)(_pre|_post)?_hooks\w*")
HOOK_CALL = re.compile(r"register_(module_)?(full_)?(forward|backward)(_pre)?_hook")


def forbidden_code(source: Source) -> list[str]:
    """One sentence for each construct that the house rules out everywhere."""
    complaints = [f"line {line}: {what}" for line, what in sorted(_forbidden_nodes(source.tree))]
    lines = enumerate(source.text.splitlines(), start=1)
    complaints += [f"line {number}: unfinished work" for number, line in lines if UNFINISHED.search(line)]
    return [f"{source.module} {each}" for each in complaints]


def _forbidden_nodes(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield node.lineno, f"calls {name}"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="builtins"), attr="eval" | "exec" as name)):
                yield node.lineno, f"calls {name}"
            case ast.ExceptHandler(type=None):
                yield node.lineno, "bare except"
            case ast.Assert():
                yield node.lineno, "assert; raise an error that says what to do"


def long_functions(source: Source) -> dict[str, int]:
    """Lines of each function over the cap, by ``module:qualified.name``; its docstring does not count."""
    lengths = {f"{source.module}:{name}": _length(node) for name, node in _functions(source.tree, "")}
    return {name: length for name, length in lengths.items() if length > LINES_PER_FUNCTION}


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        name = prefix
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}".removeprefix(".")
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, child
        yield from _functions(child, name)


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is None:
        return lines
    return lines - (node.body[0].end_lineno - node.body[0].lineno + 1)


def misplaced_code(source: Source) -> list[str]:
    """One sentence for each thing done outside the one place that is meant to do it."""
    complaints = []
    for node in ast.walk(source.tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else ""
        if not isinstance(name, str):
            continue
        if HOOK_DICT.fullmatch(name) and source.top_level != "introspect":
            complaints.append(f"{source.module}:{node.lineno} reads {name}; only introspect does")
        if HOOK_CALL.fullmatch(name) and source.top_level != "hooks":
            complaints.append(f"{source.module}:{node.lineno} calls {name}; only hooks does")
    distributed = [each for each in imports_of(source) if each.name.startswith("torch.distributed")]
    if source.top_level != "harvesting":
        complaints += [f"{source.module}:{each.line} imports {each.name}; only harvesting does" for each in distributed]
    return complaints


def test_the_package_holds_no_forbidden_code():
    assert [line for source in package_sources() for line in forbidden_code(source)] == []


def test_hooks_are_added_and_read_in_one_place_each():
    assert [line for source in package_sources() for line in misplaced_code(source)] == []


def test_files_over_the_cap_are_those_with_a_reason():
    lengths = {source.module: len(source.text.splitlines()) for source in package_sources()}
    assert {name: length for name, length in lengths.items() if length > LINES_PER_FILE}.keys() == LONG_FILES.keys()
    assert all(LONG_FILES.values())


def class_names(sources: Iterable[Source]) -> Counter[str]:
    """How many classes of the package bear each name, whether with an underscore before it or without."""
    nodes = (node for source in sources for node in ast.walk(source.tree))
    return Counter(node.name.removeprefix("_") for node in nodes if isinstance(node, ast.ClassDef))


def terse_docstrings(source: Source) -> list[str]:
    """The docstrings of three words or fewer, and those that leave it to the reader what is alike."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(source.tree) if isinstance(node, kinds))
    return [text for text in texts if text and (len(text.split()) <= 3 or "likewise" in text.lower())]


def test_a_class_name_means_one_thing_in_the_whole_package():
    assert {name for name, count in class_names(package_sources()).items() if count > 1} == set()


def test_docstrings_are_sentences():
    assert [text for source in package_sources() for text in terse_docstrings(source)] == []


def test_a_name_that_means_two_things_and_a_terse_docstring_are_found():
    text = 'class _Part:\n    """Do it."""\n\n\nclass Part:\n    """The rows of one shard, likewise."""'
    assert class_names([Source("tdcache.cache", text)]) == {"Part": 2}
    assert terse_docstrings(Source("tdcache.cache", text)) == ["Do it.", "The rows of one shard, likewise."]


def test_functions_over_the_cap_are_those_with_a_reason():
    found = [name for source in package_sources() for name in long_functions(source)]
    assert sorted(found) == sorted(LONG_FUNCTIONS)
    assert all(LONG_FUNCTIONS.values())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("x = eval('root.' + path)", "calls eval"),
        ("builtins.exec(code)", "calls exec"),
        ("try:\n    f()\nexcept:\n    pass", "bare except"),
        ("assert x > 0", "assert"),
        ("x = 1  # " + "TODO later", "unfinished work"),
    ],
)
def test_the_check_catches(text, complaint):
    (sentence,) = forbidden_code(Source("tdcache.cache", text))
    assert complaint in sentence


def test_putting_a_model_into_eval_mode_is_no_eval():
    assert forbidden_code(Source("tdcache.cache", "model.eval()")) == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("module._forward_pre_hooks.clear()", "only introspect does"),
        ("getattr(module, '_forward_hooks_with_kwargs')", "only introspect does"),
        ("module.register_full_backward_hook(f)", "only hooks does"),
        ("import torch.distributed as dist", "only harvesting does"),
        ("from torch import distributed", "only harvesting does"),
    ],
)
def test_code_in_the_wrong_place_is_caught(text, complaint):
    (sentence,) = misplaced_code(Source("tdcache.contexts", text))
    assert complaint in sentence


def test_code_in_the_right_place_passes():
    assert misplaced_code(Source("tdcache.introspect", "module._forward_hooks")) == []
    assert misplaced_code(Source("tdcache.hooks", "module.register_forward_hook(f)")) == []
    assert misplaced_code(Source("tdcache.harvesting.loop", "import torch.distributed")) == []
    assert misplaced_code(Source("tdcache.cache", "tensor.register_hook(f)")) == []


def function_of(lines: int) -> Source:
    body = "\n".join(["        x = 1"] * (lines - 1))
    return Source("tdcache.cache", f'class A:\n    def f(self):\n        """One.\n\n        Two.\n        """\n{body}')


def test_a_long_function_is_found_by_its_qualified_name():
    assert long_functions(function_of(LINES_PER_FUNCTION + 1)) == {"tdcache.cache:A.f": LINES_PER_FUNCTION + 1}


def test_a_docstring_does_not_make_a_function_long():
    assert long_functions(function_of(LINES_PER_FUNCTION)) == {}
