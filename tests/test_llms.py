"""The page for coding agents names what there is: every import exists, every error is there, every page is a file."""

from importlib import import_module
from pathlib import Path

import regex

import tdcache
from tdcache import errors

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "docs" / "llms.txt").read_text(encoding="utf-8")


def named(text):
    """The dotted names of the package in a text."""
    return sorted(set(regex.findall(r"\btdcache\.[A-Za-z_][\w.]*\w", text)))


def missing(names):
    """Those that neither the package nor its public subpackages have."""
    absent = []
    for name in names:
        home, _, last = name.rpartition(".")
        if last not in import_module(home).__all__:
            absent.append(name)
    return absent


def test_every_name_of_the_page_is_public():
    assert len(named(TEXT)) > 30
    assert missing(named(TEXT)) == []


def test_a_name_that_is_not_there_is_found():
    assert missing(named("use `tdcache.select` or `tdcache.attribution.Magic`.")) == ["tdcache.attribution.Magic"]


def test_every_public_error_has_a_line_and_nothing_else_has():
    section = TEXT.partition("## Error to fix")[2].partition("## Pages")[0]
    listed = regex.findall(r"^- (\w+): ", section, regex.MULTILINE)
    public = {name for name in errors.__all__ if isinstance(getattr(errors, name), type)}
    assert sorted(public) == listed
    assert public <= set(tdcache.__all__)


def test_every_page_of_the_page_is_a_file():
    pages = regex.findall(r"docs/[\w/]+\.md", TEXT.replace("docs/errors/NAME.md", ""))
    assert len(pages) > 8
    assert [page for page in pages if not (REPOSITORY / page).is_file()] == []
