"""The tree of errors: what catches what, and the fields they carry."""

import pytest

from tdcache import errors


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (errors.SelectionError, (errors.TdcacheError, ValueError)),
        (errors.PathError, (errors.SelectionError,)),
        (errors.DirectionError, (errors.TdcacheError, ValueError)),
        (errors.HookSignatureError, (errors.TdcacheError, ValueError)),
        (errors.ContextError, (errors.TdcacheError, RuntimeError)),
        (errors.CaptureError, (errors.TdcacheError, RuntimeError)),
        (errors.InplaceModificationError, (errors.CaptureError,)),
        (errors.CacheWriteError, (errors.CaptureError,)),
        (errors.EditError, (errors.TdcacheError, RuntimeError)),
        (errors.ResidualError, (errors.TdcacheError, RuntimeError)),
        (errors.StoreError, (errors.TdcacheError, RuntimeError)),
        (errors.DamagedError, (errors.StoreError,)),
        (errors.SpecError, (errors.StoreError,)),
        (errors.TdcacheWarning, (UserWarning,)),
        (errors.RepeatedCallWarning, (errors.TdcacheWarning,)),
        (errors.UnfiredSiteWarning, (errors.TdcacheWarning,)),
    ],
)
def test_the_tree_is_the_one_in_the_docstring(error, bases):
    assert error.__bases__ == bases
    assert error.__name__ in errors.__doc__


def test_a_stop_is_not_swallowed_by_a_model_that_catches_exceptions():
    assert not issubclass(errors.StopForward, Exception)


def test_errors_carry_what_their_message_is_made_of():
    selection = errors.SelectionError("text", selector="layer.0", near=["layers.0"])
    assert (selection.selector, selection.near) == ("layer.0", ("layers.0",))
    assert errors.CaptureError("text", paths=["a", "b"]).paths == ("a", "b")
    assert errors.StopForward("layers.0").key == "layers.0"


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a"], "'a'"),
        (["a", "b", "c"], "'a', 'b', 'c'"),
        (["a", "b", "c", "d"], "'a', 'b', 'c' and 1 more"),
        ([0, ("a", "b")], "0, ('a', 'b')"),
    ],
)
def test_names_are_quoted_and_cut_after_the_limit(names, text):
    assert errors.listed(names, limit=3) == text
