"""What the errors of selection, paths, hooks and reducers say: what is wrong, and what to type instead."""

import operator
from collections import OrderedDict

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdcache.errors import SelectionError, StopForward
from tdcache.hooks import CacheProxy, HookFactory, MultiHookHandle, MultiHookManager, register_hook_to_module
from tdcache.hooks.values import pick_tensor, replace_tensor
from tdcache.paths import resolve
from tdcache.reducers import Concatenate, Last, Mean, TopK
from tdcache.selection import select

MODEL = nn.Sequential(OrderedDict(encoder=nn.Linear(2, 2), decoder=nn.Linear(2, 2)))
A, B = torch.zeros(2), torch.zeros(2)


def named_hook(module, args):
    """A hook with the parameters of another direction."""


def in_place_input():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    register_hook_to_module(model[1], lambda *args: None, "grad_in", path="act")
    model(torch.ones(1, 2))


def overwritten_later():
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.ReLU(inplace=True))
    register_hook_to_module(model[1], lambda *args: None, "bwd", path="keep")
    model(torch.ones(1, 2)).sum().backward()


def too_many_gradients():
    model = nn.Linear(2, 2)
    register_hook_to_module(model, lambda module, grads: (*grads, *grads), "bwd_pre")
    model(torch.ones(1, 2)).sum().backward()


def forgotten_cache():
    CacheProxy("key", TensorDict()).resolve()


def fed(reducer, *values):
    for value in values:
        reducer.update(value)


def nothing(*args, **named):
    return None


MESSAGES = {
    "a pattern matches nothing, and names are near": (
        lambda: select(MODEL, "encodr"),
        "pattern 'encodr' matches none of the 2 modules of Sequential; did you mean 'encoder'? "
        "(patterns match the whole path; match='search' finds them anywhere in it)",
    ),
    "a pattern matches nothing, and no name is near": (
        lambda: select(MODEL, "conv", match="search"),
        "pattern 'conv' matches none of the 2 modules of Sequential; the paths are 'encoder', 'decoder'",
    ),
    "a selector that is no pattern matches nothing": (
        lambda: select(MODEL, nn.ReLU),
        "selector <class 'torch.nn.modules.activation.ReLU'> matches none of the 2 modules of Sequential; "
        "the paths are 'encoder', 'decoder'",
    ),
    "a model without modules": (
        lambda: select(nn.Linear(1, 1), ".*", match="search"),
        "pattern '.*' matches none of the 0 modules of Linear",
    ),
    "no regex": (lambda: select(MODEL, "enc("), "pattern 'enc(' is not a valid regex: missing ) at position 4"),
    "no selector": (
        lambda: select(MODEL, 3),
        "a selector is a regex string, a compiled pattern, a module class, a predicate (path, module) -> bool, "
        "or a sequence of these; got 3 (int)",
    ),
    "a class that is no module's": (lambda: select(MODEL, int), "got <class 'int'> (type)"),
    "a module instead of its path": (
        lambda: select(MODEL, MODEL.encoder),
        "got the module Linear itself: write its path or its class; factories get the model from "
        "prepare(), functions before the pattern",
    ),
    "bytes": (lambda: select(MODEL, b"encoder"), "got b'encoder' (bytes)"),
    "no way to match": (
        lambda: select(MODEL, "a", match="whole"),
        "match is 'full', 'prefix' or 'search', got 'whole'",
    ),
    "no such path, and names are near": (
        lambda: resolve(MODEL, "encodr"),
        "path 'encodr' names none of the 2 modules of Sequential; did you mean 'encoder'?",
    ),
    "no such path, and no name is near": (
        lambda: resolve(MODEL, "layers[0]"),
        "path 'layers[0]' names none of the 2 modules of Sequential; list the names with tdcache.select(model, '.*')",
    ),
    "no path": (lambda: resolve(MODEL, 0), "a path is a string such as 'layers.0', got 0 (int)"),
    "no direction": (
        lambda: register_hook_to_module(MODEL, print, "forward"),
        "unknown direction 'forward'; use one of 'fwd', 'bwd', 'fwd_pre', 'bwd_pre', 'grad_in', "
        "'fwd_kwargs', 'fwd_pre_kwargs'",
    ),
    "a hook with the wrong parameters": (
        lambda: register_hook_to_module(MODEL, named_hook, "fwd"),
        "a hook of direction 'fwd' is called as hook(module, args, output), but 'named_hook' takes (module, args)",
    ),
    "no hook": (lambda: register_hook_to_module(MODEL, 3, "fwd"), "a hook is a callable (module, args, output), got 3"),
    "a callback without keywords": (
        lambda: HookFactory.make_reading_hook(callback=lambda module, /, **named: None),
        "a callback is called with keyword arguments only; it cannot have positional-only parameters",
    ),
    "a callback with the wrong parameters": (
        lambda: HookFactory.make_setting_hook(None, callback=lambda module, output, direction: None),
        "the callback lacks the parameters 'args', 'value'; it is called with module=, args=, output=, value=, "
        "direction= (take **kwargs for those you do not need)",
    ),
    "a cache that is gone": (
        forgotten_cache,
        "the cache that was to hold 'key' no longer exists; keep a reference to it",
    ),
    "a value that is no tensor, for a cache": (
        lambda: HookFactory.make_caching_hook("key", TensorDict())(None, (), "text"),
        "a cache holds tensors and TensorDicts; the value for 'key' is str: return a tensor from callback=",
    ),
    "a value of another type": (
        lambda: HookFactory.make_setting_hook([A])(None, (), (A,)),
        "the output of type tuple cannot be replaced by list; return the same type, a tensor for the first tensor "
        "in it, or None for no change",
    ),
    "a stop": (
        lambda: HookFactory.make_stopping_hook("layers.0")(None, (), A),
        "the forward was stopped at 'layers.0'",
    ),
    "modules match, and the class filters drop them": (
        lambda: MultiHookManager("encoder", classes_to_skip=(nn.Linear,)).register_hook(MODEL, nothing),
        "selector 'encoder' matches 1 modules of Sequential, but none of them passes "
        "classes_to_hook=(<class 'torch.nn.modules.module.Module'>,), "
        "classes_to_skip=(<class 'torch.nn.modules.linear.Linear'>,)",
    ),
    "a handle and something else": (
        lambda: operator.add(MultiHookHandle(), []),
        "a MultiHookHandle can be added to another, not to list",
    ),
    "a module that changes its input in place": (
        in_place_input,
        "'act' changes its input in place, so the gradient of that input cannot be told from the gradient of its "
        "output; capture direction 'bwd' of the module that produces it instead",
    ),
    "an input that is passed on and changed in place": (
        overwritten_later,
        "the input of 'keep' was changed in place after the module took a view of it, so the gradient there cannot be "
        "told; capture direction 'bwd' of the module that produces it instead",
    ),
    "too many gradients": (
        too_many_gradients,
        "a gradient hook must return 1 gradients (or None for no change), got 2",
    ),
    "no tensor in a value": (
        lambda: pick_tensor((None, "text"), None, "encoder"),
        "the value at 'encoder' is tuple of (NoneType, str) and holds no tensor; say what to keep with pick= "
        "(an index, a key or a callable), or select another module",
    ),
    "a pick that finds nothing": (
        lambda: pick_tensor({"hidden": A, "cache": None}, "hiden", "encoder"),
        "pick='hiden' finds nothing at 'encoder': the value is dict; use one of ['hidden', 'cache']",
    ),
    "a pick in a value without parts": (
        lambda: pick_tensor(A, 0, "encoder"),
        "pick=0 finds nothing at 'encoder': the value is Tensor(2,), which has no parts",
    ),
    "a callable pick for a replacement": (
        lambda: replace_tensor((A, B), A, pick=len, path="encoder"),
        "a callable pick= cannot say where to put the new value at 'encoder'; use an index or a key",
    ),
    "no tensor to replace": (
        lambda: replace_tensor([None], A, path="encoder"),
        "the value at 'encoder' is list of (NoneType) and holds no tensor to replace; say which with pick=",
    ),
    "a tensor replaced by something else": (
        lambda: replace_tensor((A, B), (A,), path="encoder"),
        "the value at 'encoder' is a tensor; it cannot be replaced by tuple of (Tensor)",
    ),
    "a replacement that does not fit": (
        lambda: replace_tensor(A, torch.zeros(3, dtype=torch.int64), path="encoder"),
        "the replacement at 'encoder' does not fit:\n"
        "  there: shape (2,), torch.float32, cpu\n"
        "  given: shape (3,), torch.int64, cpu\n"
        "reshape, expand or cast it first, e.g. value.expand_as(output).to(output)",
    ),
    "reducers that do not merge": (
        lambda: TopK(3).merge(TopK(4)),
        "TopK(k=3, dim=0, largest=True, flatten=None) can be merged with a reducer of the same kind and configuration, "
        "not with TopK(k=4, dim=0, largest=True, flatten=None)",
    ),
    "nothing to compute": (lambda: Last().compute(), "Last() saw no value; run a forward that reaches its site first"),
    "a negative budget": (lambda: Concatenate(max_rows=-1), "max_rows is a number of rows, got -1"),
    "rows of another shape": (
        lambda: fed(Concatenate(), torch.ones(2, 3), torch.ones(2, 4)),
        "values of different shape cannot be concatenated along dim 0: rows of (3,) so far, now (4,); choose another "
        "dim, flatten= the varying dimensions into rows, or use Stack()",
    ),
    "rows of another dtype": (
        lambda: fed(Concatenate(), torch.ones(2, 3), torch.ones(2, 3).half()),
        "values of different dtype cannot be concatenated: torch.float32 so far, now torch.float16; "
        "give one dtype= to the caching context",
    ),
    "means of another shape": (
        lambda: fed(Mean(), torch.ones(2, 3), torch.ones(2, 4)),
        "Mean(dim=0, flatten=None) saw values that reduce to (3,) and now to (4,); let dim= cover every "
        "dimension that varies, e.g. dim=(0, 1) for (batch, seq, d)",
    ),
    "best rows of another shape": (
        lambda: fed(TopK(1), torch.ones(2, 3), torch.ones(2, 4)),
        "TopK(k=1, dim=0, largest=True, flatten=None) saw rows of (3,) and now of (4,); choose another "
        "dim, or bring the values to one shape with index= or callback=",
    ),
    "no best rows": (lambda: TopK(0), "k is at least 1, got 0"),
}


@pytest.mark.parametrize(("wrong", "text"), MESSAGES.values(), ids=MESSAGES)
def test_an_error_says(wrong, text):
    with pytest.raises((Exception, StopForward)) as caught:
        wrong()
    message = str(caught.value)
    assert message.endswith(text) if text.startswith("got ") else message == text


def test_a_pattern_that_backtracks_without_end_is_told_the_remedy(monkeypatch):
    monkeypatch.setattr("tdcache.selection._MATCH_SECONDS", 0.05)
    with pytest.raises(SelectionError) as caught:
        select(nn.Sequential(OrderedDict([("a" * 50, nn.Identity())])), "(a|aa)+[!?]")
    assert str(caught.value) == (
        f"pattern '(a|aa)+[!?]' backtracks for more than 0.05 s on path '{'a' * 50}'; "
        "make the repeated group possessive or atomic, e.g. '(?>...)+' for '(...)+'"
    )
