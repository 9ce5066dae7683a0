"""What ``import tdcache`` alone gives: subpackages when they are asked for, and a hint for what is elsewhere."""

import subprocess
import sys
from importlib import import_module

import pytest

import tdcache
from tdcache import attribution, points
from tdcache.public_names import PACKAGES


def test_subpackages_are_loaded_when_they_are_asked_for_and_not_before():
    packages = ["attribution", "harvesting", "interventions", "pipeline", "points", "store"]
    code = (
        "import sys, tdcache\n"
        "print([name for name in ('tdcache.attribution', 'tdcache.harvesting') if name in sys.modules])\n"
        f"print([getattr(tdcache, package).__name__ for package in {packages}])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[]", str([f"tdcache.{package}" for package in packages])]


def test_a_name_of_a_subpackage_says_where_it_is():
    with pytest.raises(AttributeError) as raised:
        tdcache.IntegratedGradients  # noqa: B018
    assert str(raised.value) == "module 'tdcache' has no attribute 'IntegratedGradients'; it is in tdcache.attribution"


def test_a_near_miss_is_named():
    with pytest.raises(AttributeError, match=r"'ActivationCashing'; did you mean 'ActivationCaching', in tdcache\?$"):
        tdcache.ActivationCashing  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'xyzzy'$"):
        tdcache.xyzzy  # noqa: B018


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_of_another_package_says_where_it_is(package):
    with pytest.raises(AttributeError, match=r"has no attribute 'ActivationCaching'; it is in tdcache$"):
        import_module(f"tdcache.{package}").ActivationCaching  # noqa: B018


def test_a_near_miss_in_another_package_is_named():
    for module in (tdcache, attribution, points):
        with pytest.raises(AttributeError, match=r"; did you mean 'IntegratedGradients', in tdcache.attribution\?$"):
            module.IntegratedGradient  # noqa: B018


def test_dir_lists_what_there_is():
    assert {"ActivationCaching", "attribution", "harvest", "points"} <= set(dir(tdcache))
