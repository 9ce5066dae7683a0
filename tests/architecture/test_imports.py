"""The package loads its three dependencies and the standard library; anything else waits until it is asked for."""

import json
import re
import subprocess
import sys
import tomllib

import pytest

from architecture.source_tree import PACKAGE, REPOSITORY, Source, imports_of, package_sources

REQUIRED = frozenset({"regex", "tensordict", "torch"})

# Imported inside functions or under TYPE_CHECKING only: numpy comes with torch and tensordict, the others are extras.
OPTIONAL = frozenset({"datasets", "fsspec", "isal", "matplotlib", "numpy", "ray", "tqdm", "transformers"})

HEAVY = frozenset({"captum", "datasets", "fsspec", "matplotlib", "ray", "scipy", "sklearn", "tqdm", "transformers"})


def foreign_imports(source: Source) -> list[str]:
    """One sentence for each import of the file that its users may not have, or should not wait for."""
    sentences = []
    for each in imports_of(source):
        package = each.name.partition(".")[0]
        if package in sys.stdlib_module_names | REQUIRED | {PACKAGE}:
            continue
        if package not in OPTIONAL:
            sentences.append(f"{source.module}:{each.line} imports {package}, which is on no allow-list")
        elif each.at_run_time and each.when_loaded:
            sentences.append(f"{source.module}:{each.line} imports {package} when loaded; move it into the function")
    return sentences


def test_the_package_imports_only_what_it_declares():
    assert [line for source in package_sources() for line in foreign_imports(source)] == []


def test_the_allow_list_is_the_one_in_pyproject():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.split(r"[<>=!~ \[]", each)[0] for each in project["dependencies"]} == REQUIRED


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import pandas", "pandas, which is on no allow-list"),
        ("def late():\n    from pandas import DataFrame", "pandas, which is on no allow-list"),
        ("if TYPE_CHECKING:\n    import pandas", "pandas, which is on no allow-list"),
        ("import matplotlib.pyplot as plt", "matplotlib when loaded"),
        ("try:\n    import numpy\nexcept ImportError:\n    numpy = None", "numpy when loaded"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import numpy", "numpy when loaded"),
        ("class Plot:\n    from matplotlib import pyplot", "matplotlib when loaded"),
    ],
)
def test_the_check_catches(text, complaint):
    (sentence,) = foreign_imports(Source("tdcache.plot", text))
    assert complaint in sentence


@pytest.mark.parametrize(
    "text",
    [
        "import json, torch.nn\nfrom tensordict import TensorDict\nimport regex",
        "def draw():\n    import matplotlib.pyplot",
        "if TYPE_CHECKING:\n    import numpy",
        "from .errors import SelectionError",
    ],
)
def test_the_check_lets_pass(text):
    assert foreign_imports(Source("tdcache.plot", text)) == []


def modules_loaded_by(statement: str) -> set[str]:
    """Top-level packages in ``sys.modules`` after the statement has run in a fresh interpreter."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy_beyond_its_dependencies():
    before = modules_loaded_by("import " + ", ".join(sorted(REQUIRED)))
    assert (modules_loaded_by(f"import {PACKAGE}") - before) & HEAVY == set()


def test_a_heavy_import_would_be_noticed():
    assert "tqdm" in modules_loaded_by("import tqdm") & HEAVY
