"""Paths: from a name to its module without evaluating anything, and the nearest names to a wrong one."""

from collections import OrderedDict

import pytest
from torch import nn

from tdcache.errors import PathError
from tdcache.paths import join, near_misses, resolve, resolve_all


class Body(nn.Module):
    """Holds lists and dicts of modules, odd names, and attributes that reach modules elsewhere in the tree."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(12))
        self.blocks = nn.ModuleDict({"a": nn.Tanh(), "b/c": nn.GELU(), "it's": nn.SiLU()})
        self.odd = nn.Module()
        self.odd._modules["x.y"] = nn.Sequential(nn.Linear(2, 2))

    @property
    def last(self):
        return self.layers[-1]

    @property
    def itself(self):
        return self


@pytest.fixture
def body():
    return Body()


@pytest.mark.parametrize(
    ("parts", "path"),
    [((), ""), (("", ""), ""), (("encoder",), "encoder"), (("encoder", "", "layer.0"), "encoder.layer.0")],
)
def test_joining_leaves_out_empty_parts(parts, path):
    assert join(*parts) == path


def test_every_name_of_named_modules_resolves_to_its_module(body):
    body.odd = nn.Identity()  # a name with a dot in it cannot be told from two names
    for name, module in body.named_modules(remove_duplicate=False):
        assert resolve_all(body, name) == (name, module)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("", ""),
        (".layers.0", "layers.0"),
        ("layers[0]", "layers.0"),
        ("layers[-1]", "layers.11"),
        ("layers[-1][1]", "layers.11.1"),
        ("layers[10].0", "layers.10.0"),
        ("[0][1].0", "layers.1.0"),
        ("layers.<3>.<0>", "layers.3.0"),
        ("blocks['a']", "blocks.a"),
        ('blocks["a"]', "blocks.a"),
        ("blocks.<b/c>", "blocks.b/c"),
        ('blocks["it\'s"]', "blocks.it's"),
        ("odd.<x.y>[0]", "odd.x.y.0"),
        ("odd['x.y'].0", "odd.x.y.0"),
        ("last", "layers.11"),
        ("last.0", "layers.11.0"),
        ("itself.layers.2", "layers.2"),
    ],
)
def test_indexing_and_quoting_mean_a_canonical_name(body, path, name):
    assert resolve_all(body, path) == (name, dict(body.named_modules())[name])
    assert resolve(body, path) is dict(body.named_modules())[name]


@pytest.mark.parametrize(
    "path",
    [
        "layer.0",
        "layers[12]",
        "layers[-13]",
        "layers[0:2]",
        "layers.0.",
        "layers..0",
        "layers.0.0.weight",
        "layers[",
        "layers]",
        "blocks['a\"]",
        "<layers",
        "layers.__class__",
        "layers.append(0)",
        "__import__('os')",
    ],
)
def test_anything_else_is_refused(body, path):
    with pytest.raises(PathError) as caught:
        resolve(body, path)
    assert caught.value.selector == path


def test_a_path_is_never_evaluated(body):
    body.fired = False
    body.trap = lambda: setattr(body, "fired", True)
    with pytest.raises(PathError):
        resolve(body, "trap()")
    assert body.fired is False


def test_a_removed_child_is_not_found(body):
    body.layers[0]._modules["1"] = None
    with pytest.raises(PathError):
        resolve(body, "layers.0.1")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("layer.0", ("layers.0",)),
        ("encoder.atention", ("encoder.attention",)),
        ("encoder.attention", ("encoder.attention", "decoder.attention")),
        ("zzzzzzzzzzzz", ()),
        (r"layer\.(0|1)", ("layers.0", "layers.1")),
        ("unbalanced(", ()),
        ("", ()),
    ],
)
def test_near_misses_are_the_names_within_a_few_edits_best_first(wrong, near):
    names = ["layers.0", "layers.1", "decoder.attention", "encoder.attention", "embeddings"]
    found = near_misses(wrong, names)
    assert found[: len(near)] == near
    assert bool(found) is bool(near)


def test_near_misses_stop_at_the_limit():
    assert near_misses("layer", [f"layer{at}" for at in range(9)], limit=2) == ("layer0", "layer1")


def test_near_misses_give_up_on_a_pattern_that_backtracks_without_end():
    assert near_misses("(a|aa|a?a)+[!?]+(b|bb)+", ["a" * 60] * 50) == ()


def test_the_error_holds_the_near_names():
    model = nn.Sequential(OrderedDict(encoder=nn.Identity(), decoder=nn.Identity()))
    with pytest.raises(PathError) as caught:
        resolve(model, "encodr")
    assert caught.value.near[0] == "encoder"
