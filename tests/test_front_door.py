"""What ``import tdcache`` alone gives: subpackages when they are asked for, and a hint for what is elsewhere."""

import subprocess
import sys

import pytest

import tdcache


@pytest.mark.parametrize("package", ["attribution", "harvesting", "interventions", "pipeline", "points", "store"])
def test_a_subpackage_is_loaded_when_it_is_asked_for(package):
    code = f"import tdcache; print(tdcache.{package}.__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == f"tdcache.{package}\n", run.stderr


def test_the_import_alone_loads_no_method_that_was_not_asked_for():
    later = ("tdcache.attribution", "tdcache.harvesting")
    code = f"import sys, tdcache; print([name for name in {later} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_a_name_of_a_subpackage_says_where_it_is():
    with pytest.raises(AttributeError) as raised:
        tdcache.IntegratedGradients  # noqa: B018
    assert str(raised.value) == "module 'tdcache' has no attribute 'IntegratedGradients'; it is in tdcache.attribution"


def test_a_near_miss_is_named():
    with pytest.raises(AttributeError, match=r"no attribute 'ActivationCashing'; did you mean 'ActivationCaching'\?"):
        tdcache.ActivationCashing  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzy'$"):
        tdcache.xyzzy  # noqa: B018


def test_dir_lists_what_there_is():
    assert {"ActivationCaching", "attribution", "harvest", "points"} <= set(dir(tdcache))
