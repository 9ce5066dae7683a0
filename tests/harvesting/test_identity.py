"""What makes two harvests the same computation, and what is asked of a store that is there."""

import collections
import functools
import logging
import re
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torch import nn

from tdcache import harvest
from tdcache.errors import CaptureError, SpecError
from tdcache.harvesting.entry import ActivationDataset
from tdcache.harvesting.identity import identity_of

SCALE = 2.0
max = 2.0  # noqa: A001 - a user's global may have the name of a builtin
LOGGER = logging.getLogger("user")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU())


DATA = [torch.arange(6.0).reshape(2, 3) + batch for batch in range(3)]


def scaled_by(factor):
    return lambda model, batch: model(batch * factor)


def with_default(factor):
    def forward(model, batch, factor=factor):
        return model(batch * factor)

    return forward


def with_keyword(factor):
    def forward(model, batch, *, factor=factor):
        return model(batch * factor)

    return forward


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, model, batch):
        return model(batch * self.factor)

    def method(self, model, batch):
        return model(batch * self.factor)


def by_global(model, batch):
    return model(batch * SCALE)


def fixed(factor, model, batch):
    return model(batch * factor)


def by_tensor(factor):
    weights = torch.tensor([1.0, factor, 1.0])
    return lambda model, batch: model(batch * weights)


def by_shadowed_builtin(model, batch):
    return model(batch * max)


class Helped:
    by = 2.0

    def helper(self, batch):
        return batch * self.by

    def __call__(self, model, batch):
        LOGGER.debug("called")
        return model(self.helper(batch))

    @classmethod
    def of_class(cls, model, batch):
        return model(batch * cls.by)

    @staticmethod
    def static(model, batch):
        return model(batch * Helped.by)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, batch):
        return batch * self.factor


def closing_over(value):
    return lambda model, batch: model(batch, value)


def with_hook(factor):
    module = nn.Identity()
    module.register_forward_hook(lambda module, args, output: output * factor)
    return module


KINDS = {
    "a closure": scaled_by,
    "a default": with_default,
    "a keyword default": with_keyword,
    "an attribute": Scaled,
    "a bound method": lambda factor: Scaled(factor).method,
    "a partial": lambda factor: partial(fixed, factor),
    "a tensor in a closure": by_tensor,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_forwards_that_differ_in_a_value_are_different_computations(tmp_path, make):
    harvest(model(), DATA, tmp_path / "a", select="0", forward=make(2.0))
    with pytest.raises(SpecError, match="forward"):
        harvest(model(), DATA, tmp_path / "a", select="0", forward=make(3.0), recheck=False)
    assert len(harvest(model(), DATA, tmp_path / "a", select="0", forward=make(2.0))) == 6


def test_a_global_that_changed_is_another_computation(tmp_path, monkeypatch):
    harvest(model(), DATA, tmp_path / "a", select="0", forward=by_global)
    monkeypatch.setitem(by_global.__globals__, "SCALE", 3.0)
    with pytest.raises(SpecError, match="forward"):
        harvest(model(), DATA, tmp_path / "a", select="0", forward=by_global, recheck=False)


def test_a_global_with_the_name_of_a_builtin_counts(monkeypatch):
    before = identity_of(by_shadowed_builtin, "forward")
    monkeypatch.setitem(by_shadowed_builtin.__globals__, "max", 3.0)
    assert identity_of(by_shadowed_builtin, "forward") != before


FORMS = {
    "an instance": Helped,
    "a bound method": lambda: Helped().__call__,
    "a class method": lambda: Helped.of_class,
    "a static method": lambda: Helped.static,
    "a partial of a function": lambda: partial(Helped.__call__, Helped()),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_values_and_methods_of_a_class_count(monkeypatch, make):
    before = identity_of(make(), "forward")
    assert identity_of(make(), "forward") == before
    monkeypatch.setattr(Helped, "by", 3.0)
    assert identity_of(make(), "forward") != before


def test_a_method_that_the_called_one_calls_counts(monkeypatch):
    before = identity_of(Helped(), "forward")
    monkeypatch.setattr(Helped, "helper", lambda self, batch: -batch)
    assert identity_of(Helped(), "forward") != before


def test_attributes_of_a_function_count():
    def forward(model, batch):
        return model(batch * forward.factor)

    forward.factor = 2.0
    before = identity_of(forward, "forward")
    forward.factor = 3.0
    assert identity_of(forward, "forward") != before


VALUES = {
    "a module's attribute": Scale,
    "a hook on a module": with_hook,
    "an array": lambda factor: torch.full((3,), factor).numpy(),
    "a pattern": lambda factor: re.compile("long " * 100 + str(factor)),
    "a deque": lambda factor: collections.deque([factor]),
    "a cached function": lambda factor: functools.lru_cache(lambda: factor),
    "a class made in a function": lambda factor: type("Made", (), {"factor": factor, "__module__": __name__}),
}


@pytest.mark.parametrize("make", VALUES.values(), ids=VALUES)
def test_what_can_be_pickled_by_its_values_is_told_apart(make):
    one, other = (identity_of(closing_over(make(factor)), "forward") for factor in (2.0, 3.0))
    assert one == identity_of(closing_over(make(2.0)), "forward")
    assert one != other


def test_a_tokenizer_is_the_same_after_it_was_called():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")

    def tokenizer(words):
        model = tokenizers.models.WordLevel({f"w{each}": each for each in range(words)}, unk_token="w0")
        inner = tokenizers.Tokenizer(model)
        return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w0")

    used, other = tokenizer(5), tokenizer(6)
    before = identity_of(closing_over(used), "collate")
    used(["w1", "w2"], padding="max_length", truncation=True, max_length=4)  # it keeps these settings
    assert identity_of(closing_over(used), "collate") == before
    assert identity_of(closing_over(other), "collate") != before


def test_pick_and_collate_count_as_forward_does():
    def pick_at(at):
        return lambda value: value[at]

    assert identity_of(pick_at(0), "pick") != identity_of(pick_at(1), "pick")
    assert identity_of(pick_at(0), "pick") == identity_of(pick_at(0), "pick")
    assert identity_of((0, "x"), "pick") == [0, "x"]


def test_sets_are_spelled_alike_in_every_process():
    code = (
        "from tdcache.harvesting.identity import identity_of\n"
        "def forward(model, batch):\n    return model(batch) if batch in {'a', 'b', 'c', 'd'} else None\n"
        "print(identity_of(forward, 'forward'))\n"
    )
    run = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, **PATHS}, capture_output=True, text=True
        )
        for seed in ("1", "2")
    ]
    assert len({each.stdout for each in run}) == 1, [each.stderr for each in run]
    assert run[0].stdout.startswith("forward ")


PATHS = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}


def test_what_has_no_spelling_is_refused_by_name_or_named(tmp_path):
    lock = threading.Lock()

    def forward(model, batch):
        with lock:
            return model(batch)

    with pytest.raises(SpecError) as refused:
        harvest(model(), DATA, tmp_path / "a", select="0", forward=forward)
    qualified = forward.__qualname__
    assert str(refused.value) == (
        f"forward= depends on 'lock', which {qualified} closes over (_thread.lock), which cannot be told apart from "
        "another in a later process; name the computation with tag='...', and change the name when it changes"
    )
    assert not (tmp_path / "a").exists()
    harvest(model(), DATA, tmp_path / "a", select="0", forward=forward, tag="locked")
    with pytest.raises(SpecError, match="tag"):
        harvest(model(), DATA, tmp_path / "a", select="0", forward=forward, tag="other")


def test_a_hook_on_the_model_is_noticed_by_computing_rows_again(tmp_path):
    harvest(model(), DATA, tmp_path / "a", select="1")
    hooked = model()
    hooked[0].register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(SpecError) as refused:
        harvest(hooked, DATA, tmp_path / "a", select="1")
    assert str(refused.value).startswith(f"{tmp_path / 'a'} holds other values than this computation gives: at '1' ")
    assert "recheck=False" in str(refused.value)
    assert refused.value.fields == ("values",)
    assert len(harvest(hooked, DATA, tmp_path / "a", select="1", recheck=False)) == 6


def test_a_feature_of_huge_values_does_not_hide_that_the_others_changed(tmp_path):
    def massive(factor):
        found = nn.Sequential(nn.Linear(3, 4, bias=True))
        with torch.no_grad():
            found[0].weight.copy_(torch.eye(4, 3))
            found[0].bias.copy_(torch.tensor([3000.0, 0.0, 0.0, 0.0]))
        found.register_forward_pre_hook(lambda module, args: (args[0] * factor,))
        return found

    harvest(massive(1.0), DATA, tmp_path / "a", select="0")
    with pytest.raises(SpecError, match="holds other values"):
        harvest(massive(1.1), DATA, tmp_path / "a", select="0")
    assert len(harvest(massive(1.0), DATA, tmp_path / "a", select="0")) == 6


def test_rows_of_another_shape_are_refused_at_the_first_batch_that_has_them(tmp_path):
    growing = [torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 5)]
    with pytest.raises(CaptureError) as refused:
        harvest(nn.Sequential(nn.Identity()), growing, tmp_path / "a", select="0", rows="samples", shard_bytes=1)
    assert str(refused.value) == (
        "'0' gives rows of another kind in batch 2 than in the first:\n"
        "  first: shape (3, 4), float32\n"
        "  now:   shape (3, 5), float32\n"
        "rows of one store are alike: pad or resize the inputs to one size, or pick= another value; what was "
        "stored before stays readable"
    )
    assert len(ActivationDataset.open(tmp_path / "a")) == 4
    alike = [*growing[:2], torch.randn(2, 3, 4)]
    assert (
        len(harvest(nn.Sequential(nn.Identity()), alike, tmp_path / "a", select="0", rows="samples", shard_bytes=1))
        == 6
    )
