"""Sphinx configuration; the build is strict, offline, and executes every file of examples/."""

from importlib import import_module
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.util import logging

project = "tdcache"
author = "tdcache contributors"
copyright = "2026, tdcache contributors"  # noqa: A001 - Sphinx's name
version = release = installed_version("tdcache")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "auto_examples/**.ipynb", "auto_examples/**.py.md5"]

html_theme = "furo"
html_title = f"tdcache {release}"
html_show_sourcelink = False
html_extra_path = ["llms.txt"]  # where coding agents look: beside the index

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # an Attributes section would otherwise document each dataclass field a second time

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"\.py$",  # every example is executed, not only plot_*.py
    "backreferences_dir": None,
    "remove_config_comments": True,
    "show_memory": False,
    "run_stale_examples": True,  # an example that did not change may still be broken by a change in src/
    "show_signature": False,
}


def every_public_name_is_documented(app, env):
    """Warn, which fails a strict build, of each name in a package's ``__all__`` that no page describes."""
    described = {name.rpartition(".")[2] for name in env.domaindata["py"]["objects"]}
    for page in ("tdcache", *sorted(path.stem for path in Path(app.srcdir, "reference").glob("*.md"))):
        name = page if page == "tdcache" else f"tdcache.{page}"
        for missing in [] if page == "index" else sorted(set(import_module(name).__all__) - described):
            logging.getLogger(__name__).warning("%s.%s is on no page of the reference", name, missing)


def setup(app):
    """Hold the reference against the package when every page has been read."""
    app.connect("env-check-consistency", every_public_name_is_documented)
