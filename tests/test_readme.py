"""Every Python block of the README and of docs/ runs, in order, in one namespace per file; so does the quickstart.

A recipe is pasted without the rest of its page, so each section of that page runs alone.
"""

import runpy
from importlib import import_module
from pathlib import Path

import pytest
import regex
import torch

import tdcache
from tdcache import errors, points
from tdcache.public_names import PACKAGES

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    REPOSITORY / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "docs" / "errors").glob("*.md")),
]
RECIPES = REPOSITORY / "docs" / "recipes.md"
# A block may stand in a list or an admonition: its indentation is taken off every line.
FENCE = regex.compile(r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```$", regex.MULTILINE | regex.DOTALL)


def blocks_of(text):
    """The Python blocks of a page, each behind as many empty lines as bring it to its line number in the page."""
    return [
        "\n" * (text.count("\n", 0, block.start()) + 1) + regex.sub(f"(?m)^{block['indent']}", "", block["code"])
        for block in FENCE.finditer(text)
    ]


def pages_with_blocks():
    return [page for page in PAGES if page != RECIPES and blocks_of(page.read_text(encoding="utf-8"))]


def recipes():
    """Each section of the page of recipes by its title."""
    return dict(regex.findall(r"^## (.+)\n((?s:.*?))(?=^## |\Z)", RECIPES.read_text(encoding="utf-8"), regex.MULTILINE))


def run_page(path, text=None):
    """Run the blocks of a page, or of a part of it; what they define lives until it ends. Gives their number."""
    namespace = {"__name__": "__main__"}
    blocks = blocks_of(path.read_text(encoding="utf-8") if text is None else text)
    for block in blocks:
        exec(compile(block, str(path), "exec"), namespace)  # noqa: S102 - the project's own pages
    return len(blocks)


@pytest.mark.parametrize("page", pages_with_blocks(), ids=lambda page: page.name)
def test_every_block_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # blocks write files
    assert run_page(page) > 0


@pytest.mark.parametrize("title", recipes())
def test_a_recipe_runs_alone(title, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_page(RECIPES, recipes()[title]) == 1


def test_the_page_of_recipes_links_to_each():
    page = RECIPES.read_text(encoding="utf-8")
    anchors = {regex.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in recipes()}
    assert set(regex.findall(r"\]\(#([\w-]+)\)", page)) == anchors
    assert len(anchors) == 16  # the title of the page, its index entry and the README say sixteen


def test_the_pages_that_promise_executed_blocks_have_some():
    promised = {"README.md", "guide.md", "harvest.md", "index.md", "migrating.md", "own_context.md"}
    assert promised <= {page.name for page in pages_with_blocks()}


def test_a_block_that_fails_reports_its_line_in_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\n```\n\n  ```python\n  assert x == 2\n  ```\n", encoding="utf-8")
    with pytest.raises(AssertionError) as failure:
        run_page(page)
    assert failure.traceback[-1].lineno == 7  # counted from 0


def test_the_readme_names_the_two_commands():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for session in ("demo", "tests"):
        assert f"python -m pip install nox && python -m nox -s {session}" in readme


def test_the_api_page_names_every_public_name():
    page = (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8")
    documented = regex.findall(r"\.\. auto(?:class|data|exception|function):: (\w+)", page)
    assert sorted(documented) == sorted(tdcache.__all__)


def test_every_error_and_warning_has_a_page_of_its_own():
    pages = {path.stem for path in (REPOSITORY / "docs" / "errors").glob("*.md")} - {"index"}
    assert pages == {name for name in errors.__all__ if name[0].isupper()}


def test_a_traceback_names_the_page():
    with pytest.raises(errors.SelectionError) as raised:
        tdcache.select(torch.nn.Sequential(torch.nn.ReLU()), "nothing")
    assert raised.value.__notes__ == ["what it means, with wrong and right code: docs/errors/SelectionError.md"]


def test_a_users_own_error_names_the_page_of_the_class_it_derives_from():
    class Mine(errors.CaptureError):
        pass

    assert "docs/errors/CaptureError.md" in Mine("no").__notes__[0]


REFERENCE = sorted(path for path in (REPOSITORY / "docs" / "reference").glob("*.md") if path.stem != "index")


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_a_page_of_the_reference_leaves_out_only_what_another_describes(page):
    text = page.read_text(encoding="utf-8")
    package = import_module(f"tdcache.{page.stem}")
    assert f".. automodule:: tdcache.{page.stem}\n   :members:\n" in text  # which goes by __all__
    own = regex.search(rf"automodule:: tdcache\.{page.stem}\n(?:   :.*\n)*", text)[0]
    left_out = {name for names in regex.findall(r":exclude-members: (.*)", own) for name in names.split(", ")}
    elsewhere = {*tdcache.__all__, *(points.__all__ if page.stem == "compat" else ())}
    assert left_out == set(package.__all__) & elsewhere


def test_the_reference_has_a_page_for_every_subpackage():
    pages = {page.stem for page in REFERENCE}
    assert set(PACKAGES) <= pages
    index = (REPOSITORY / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    assert pages <= set(index.splitlines())


def test_the_architecture_page_names_every_file():
    page = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = REPOSITORY / "src" / "tdcache"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert set(regex.findall(r"^\| `([\w/]+\.py)` \|", page, regex.MULTILINE)) == files


def test_the_quickstart_writes_its_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(REPOSITORY / "examples" / "quickstart.py"), run_name="__main__")
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "12 sites of BertModel" in capsys.readouterr().out
