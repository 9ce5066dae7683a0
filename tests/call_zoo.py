"""Places inside the attention of every family of ``transformers`` that builds here, held against an eager twin.

``python tests/call_zoo.py`` goes through all of them and lists, with the reason, those that do not build and those that
do not agree; ``nox -s call_zoo`` does so. ``tests/function_calls/test_zoo.py`` goes through some.
"""

import argparse
import contextlib
import copy
import functools
import random
import signal
import sys
import warnings
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode, resolve_name

import families
from model_state import state_of
from tdcache import ActivationCaching, ActivationPatching, CaptureError, select
from tdcache.introspect import function_mode_count
from tdcache.reducers import Stack

ALL = r".*::(q|k|v|scores|pattern|z)"
SECONDS = 60
OTHERWISE = {
    "led": "returns the patterns of its windows in another layout",
    "recurrent_gemma": "keeps the state of its recurrence on itself",
}
"""Families that cannot be compared in this way, and why."""


def run(model, inputs, **options):
    """The floating-point tensors of the result."""
    torch.manual_seed(0)
    result = model(**inputs, **options)
    return [value for value in result.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def built(name, kind):
    """A model with that attention, or, where the family has none of the kind, None."""
    try:
        return families.build(name, attn_implementation=kind)
    except ValueError as error:
        if "attention implementation" in str(error) or "does not support" in str(error):
            return None
        raise


def eager_twin(name, model):
    """A model that shares nothing with it, its configuration included, and computes its attention step by step."""
    twin = built(name, "eager")
    if twin is None:
        twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    return twin


class _Softmax:
    """In place of one of torch's softmaxes; those that it calls itself are not seen."""

    inside = False

    def __init__(self, own, change):
        self.own, self.change = own, change

    def __get__(self, tensor, kind=None):
        return self if tensor is None else functools.partial(self, tensor)

    def __call__(self, *args, **kwargs):
        if _Softmax.inside:
            return self.own(*args, **kwargs)
        _Softmax.inside = True
        try:
            found = self.own(*args, **kwargs)
        finally:
            _Softmax.inside = False
        new = self.change(found)
        return found if new is None else new


@contextlib.contextmanager
def softmaxes(change):
    """Pass what every softmax returns through ``change``: the edit by hand."""
    with contextlib.ExitStack() as stack:
        for holder in (torch.nn.functional, torch, torch.Tensor):
            stack.enter_context(mock.patch.object(holder, "softmax", _Softmax(holder.softmax, change)))
        yield


class Matching:
    """Finds the last softmax that returns the pattern looked for, in one forward; changes and keeps it in another."""

    def __init__(self, pattern):
        self.pattern, self.factor = pattern, None
        self.calls, self.at, self.seen = 0, None, None

    def __call__(self, found):
        self.calls += 1
        if self.factor is not None:
            if self.calls != self.at:
                return None
            self.seen = found
            return found * self.factor
        cut = found.detach()[..., : self.pattern.shape[-1]]
        if cut.numel() == self.pattern.numel() and (cut.reshape(self.pattern.shape) - self.pattern).abs().max() <= 2e-6:
            self.at = self.calls
        return None

    def again(self, factor):
        """Count anew, and change the softmax that was found."""
        self.calls, self.factor = 0, factor
        return self


def loss(tensors):
    return sum((each.float() ** 2).mean() for each in tensors)


def check_patterns(name, model, inputs, twin):
    """Outputs to the bit, and the patterns that the twin returns; gives those captured, by path."""
    before = state_of(model)
    with torch.no_grad():
        plain = run(model, inputs)
        with ActivationCaching(ALL, reducer=Stack()).prepare(model) as hooked:
            torch.manual_seed(0)
            result = hooked(**inputs)
        opened = [value for value in result.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
        torch.manual_seed(0)
        told = twin(**inputs, output_attentions=True) if "output_attentions" in _parameters(twin) else {}
    assert len(opened) == len(plain)
    for one, other in zip(opened, plain, strict=True):
        assert torch.equal(one, other) or torch.equal(one.nan_to_num(), other.nan_to_num()), "outputs differ"
    assert state_of(model) == before, "the model is not what it was"
    patterns = {path: value for path, value in hooked.cache.items() if path.endswith("::pattern")}
    every = [pattern for value in patterns.values() for pattern in value]
    keys = [key for key in told if key.endswith("attentions")]
    wanted = [value for key in keys for value in told.get(key) or () if isinstance(value, torch.Tensor)]
    compared = 0
    for value in wanted:
        alike = [mine.reshape(value.shape) for mine in every if mine.numel() == value.numel()]
        compared += bool(alike)
        gap = min((float((value - mine).abs().max()) for mine in alike), default=0.0)  # none: of another layout
        assert gap <= 2e-6, f"a pattern of the eager twin differs by {gap:.1e} from all that were captured"
    return patterns, compared


def _parameters(model):
    code = type(model).forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    names = code.__code__.co_varnames[: code.__code__.co_argcount + code.__code__.co_kwonlyargcount]
    return (*names, "output_attentions") if code.__code__.co_flags & 8 else names


def check_edit(name, model, inputs, twin, path, pattern):
    """Half the pattern: what the model gives then is what the twin gives with its softmax halved by hand."""
    with ActivationPatching(path.replace(".", r"\."), {path: pattern * 0.5}).prepare(model) as hooked, torch.no_grad():
        torch.manual_seed(0)
        result = hooked(**inputs)
    mine = [value for value in result.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    by_hand = Matching(pattern)
    with softmaxes(by_hand), torch.no_grad():
        run(twin, inputs)
    if by_hand.at is None:
        return False
    with softmaxes(by_hand.again(0.5)), torch.no_grad():
        its = run(twin, inputs)
    for one, other in zip(mine, its, strict=True):
        # Two kernels: sums in another order, through what comes after.
        limit = 1e-4 * max(1.0, float(other.nan_to_num().abs().max()))
        assert torch.allclose(one, other, rtol=1e-3, atol=limit, equal_nan=True), "an edit differs from that by hand"
    return True


def check_gradient(name, model, inputs, twin, path, pattern):
    """The gradient at the pattern is autograd's, of the twin's softmax."""
    with ActivationCaching(path.replace(".", r"\."), directions=["bwd"]).prepare(model) as hooked:
        torch.manual_seed(0)
        result = hooked(**inputs)
        found = [value for value in result.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
        loss(found).backward()
    model.zero_grad()
    by_hand = Matching(pattern)
    with softmaxes(by_hand), torch.no_grad():
        run(twin, inputs)
    if by_hand.at is None:
        return False
    with softmaxes(by_hand.again(1.0)):
        its = run(twin, inputs)
    (expected,) = torch.autograd.grad(loss(its), by_hand.seen)
    expected = expected[..., : pattern.shape[-1]].reshape(pattern.shape)
    mine = hooked.cache[path]
    seen = (pattern != 0) & ~expected.isnan()  # under a mask the kernel has no gradient
    gap = ((mine - expected) * seen).abs().max()
    assert gap <= 1e-3 * expected[seen].abs().max() + 1e-7, f"the gradient differs by {float(gap):.1e}"
    return True


class RaiseAt(TorchFunctionMode):
    """Raises at the call of this number, wherever it is made."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.number -= 1
        if self.number == 0:
            raise ZeroDivisionError(resolve_name(func))
        return func(*args, **(kwargs or {}))


def check_restored(model, inputs, times):
    """After an exception at a call chosen at random nothing stays, on the model or in the thread."""
    chosen, before, modules = random.Random(0), state_of(model), set(sys.modules)
    with torch.no_grad():
        plain = run(model, inputs)
        for _ in range(times):
            context = ActivationCaching([ALL, r".*::add"], hold="snapshot").prepare(model)
            with contextlib.suppress(ZeroDivisionError), context as hooked, RaiseAt(chosen.randrange(1, 300)):
                hooked(**inputs)
            assert function_mode_count() == 0, "a mode stays on"
        again = run(model, inputs)
    for one, other in zip(again, plain, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), "outputs differ"
    assert state_of(model) == before, "the model is not what it was"
    assert {name for name in set(sys.modules) - modules if "overlay" in name} == set(), "an overlay stays"


def check(name, kind, *, raises=1):
    """All of it for one family; gives a line about what could be compared, or None where there is no such model."""
    model = built(name, kind)
    if model is None:
        return None
    inputs = families.inputs_for(model)
    with torch.no_grad():
        table = select(model, ALL, inputs)
    if not table.attention:
        return "no attention"
    twin = eager_twin(name, model)
    with torch.no_grad():
        pairs = list(zip(run(model, inputs), run(twin, inputs), strict=True))
    if not all(torch.allclose(one, other, rtol=1e-2, atol=1e-3, equal_nan=True) for one, other in pairs):
        return "the eager twin computes something else"
    patterns, compared = check_patterns(name, model, inputs, twin)
    said = f"{len(patterns)} patterns, {compared} compared"
    path, stacked = list(patterns.items())[-1]
    pattern = stacked[-1]
    alone = len(stacked) == 1 and table.attention.get(path.partition("::")[0]) == 1
    if alone and not pattern.isnan().any():
        said += ", edit" * check_edit(name, model, inputs, twin, path, pattern)
        said += ", gradient" * check_gradient(name, model, inputs, twin, path, pattern)
    check_restored(model, inputs, raises)
    return said


def _too_long(*_):
    raise TimeoutError(f"took more than {SECONDS} s")


def main():
    """Go through the families; the number of those that build and do not agree is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="families; all by default")
    parser.add_argument("--raises", type=int, default=4, help="exceptions per family and kind of attention")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    families.transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, _too_long)
    agreed, refused, differ, unbuilt = [], {}, {}, {}
    for name in options.names or sorted(families.FAMILIES):
        try:
            signal.alarm(SECONDS)
            model = built(name, "sdpa") or built(name, "eager")
            with torch.no_grad():
                run(model, families.inputs_for(model))
        except Exception as error:  # noqa: BLE001 - whatever a family raises is the reason that is listed
            unbuilt[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
            continue
        finally:
            signal.alarm(0)
        for kind in ("sdpa", "eager"):
            try:
                signal.alarm(SECONDS)
                said = check(name, kind, raises=options.raises)
                if said is not None:
                    agreed.append((name, kind, said))
            except CaptureError as error:
                refused[name, kind] = str(error)
            except Exception as error:  # noqa: BLE001 - as above
                found = refused if name in OTHERWISE else differ
                found[name, kind] = OTHERWISE.get(name, f"{type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
    for line in agreed:
        print(*line, sep="  ")
    for title, found in (
        ("do not build", unbuilt),
        ("refused by name, or of another kind", refused),
        ("differ", differ),
    ):
        print(f"\n{len(found)} {title}")
        for key, reason in found.items():
            print(f"  {key}: {reason}")
    print(f"\n{len({name for name, _, _ in agreed})} families agree")
    return len(differ)


if __name__ == "__main__":
    sys.exit(main())
