"""Tests of the table of calls."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from call_models import Attention, Block, Chain
from model_state import state_of
from tdcache.errors import SelectionError
from tdcache.function_calls import record
from tdcache.function_calls.record import calls, record_calls
from tdcache.function_calls.sites import CallPattern
from tdcache.selection import select


def test_a_table_names_the_calls_with_shapes_and_source():
    model, x = Chain(), torch.randn(2, 8)
    table = calls(model, "layers.1", x)
    assert [(str(row.site), row.count, row.given, row.returned, row.source) for row in table] == [
        ("layers.1::gelu", 1, ((2, 16),), ((2, 16),), "y = F.gelu(self.up(y))"),
        ("layers.1::add", 1, ((2, 8), (2, 8)), ((2, 8),), "return x + y"),
    ]
    lines = str(record.select(model, r"layers\.1::.*", x)).splitlines()
    assert lines[0].split() == ["place", "count", "arguments", "result", "source"]
    assert lines[1].split()[:4] == ["layers.1::gelu", "1", "2x16", "2x16"]


def test_the_source_is_shown_with_the_names_beside_it():
    text = calls(Chain(), "layers.1", torch.randn(2, 8)).annotated().splitlines()
    assert text[0].strip() == "def forward(self, x):"
    assert text[2].split("# ")[1] == "::gelu"
    assert text[4].split("# ")[1] == "::add"
    assert text[3].strip() == "y = self.down(y)"


def test_a_notebook_shows_the_source_escaped():
    table = calls(Chain(), "layers.1", torch.randn(2, 8))
    shown = table._repr_html_()
    assert shown.startswith("<div><p>2 calls in one forward</p><table>")
    assert '<td style="text-align:left">layers.1::gelu</td>' in shown
    assert "<pre>    def forward(self, x):" in shown
    assert "y = F.gelu(self.up(y))" in shown


def test_the_calls_of_one_module_print_as_its_source_and_many_as_a_table():
    shown = str(calls(Chain(), "layers.1", torch.randn(2, 8)))
    assert shown == calls(Chain(), "layers.1", torch.randn(2, 8)).annotated()
    assert shown.splitlines()[2].split("# ")[1] == "::gelu"
    assert str(record.select(Chain(), r"layers\.1::.*", torch.randn(2, 8))).startswith("place ")
    attention = str(calls(Attention(), "", torch.randn(1, 3, 32))).splitlines()
    assert attention[-1] == "(root) makes one attention call: ::q ::k ::v ::scores ::pattern ::z"


def test_a_class_without_a_file_is_shown_by_its_names():
    namespace = {"nn": nn, "torch": torch}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return torch.relu(x) + 1", namespace)  # noqa: S102
    shown = str(calls(namespace["Made"](), "", torch.ones(2)))
    assert shown == "# the source of Made.forward is not at hand\n# in helpers: ::relu ::add"


@pytest.mark.parametrize("kernel", [True, False])
def test_attention_is_announced_with_its_places(kernel):
    model = Attention(kernel=kernel)
    table = calls(model, "", torch.randn(1, 3, 32))
    assert table.attention == {"": 1}
    assert table.sites[-6:] == ("::q", "::k", "::v", "::scores", "::pattern", "::z")
    assert str(table).splitlines()[-1] == "(root) makes one attention call: ::q ::k ::v ::scores ::pattern ::z"


def test_a_module_that_is_called_twice_counts_twice():
    class Twice(Chain):
        def forward(self, x):
            return self.layers[0](self.layers[0](x))

    table = calls(Twice(), "layers.0", torch.randn(2, 8))
    assert [(row.site.label, row.count) for row in table] == [("gelu", 2), ("add", 2)]


def test_many_modules_by_a_pattern():
    model, x = Chain(), torch.randn(2, 8)
    pattern = CallPattern.parse(r"layers\.[01]::add")
    table = record_calls(model, list(select(model, pattern.path)), pattern, x)
    assert table.sites == ("layers.0::add", "layers.1::add")


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "tensordict"])
def test_inputs_come_in_four_forms(form):
    x = torch.randn(2, 8)
    model = TensorDictModule(Block(), in_keys=["x"], out_keys=["y"]) if form == "tensordict" else Chain()
    inputs = {"tensor": x, "tuple": (x,), "mapping": {"x": x}, "tensordict": TensorDict(x=x)}[form]
    path = "module" if form == "tensordict" else "layers.0"
    assert [row.site.label for row in calls(model, path, inputs)] == ["gelu", "add"]


def test_looking_changes_nothing():
    model, x = Chain(), torch.randn(2, 8)
    before, random = state_of(model), torch.get_rng_state()
    calls(model, "layers.1", x)
    assert state_of(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_a_module_that_is_not_there_is_refused():
    with pytest.raises(SelectionError, match="matches none of"):
        calls(Chain(), "layer.1", torch.randn(2, 8))


def test_a_pattern_that_no_call_matches_is_an_error_that_names_those_there_are():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(SelectionError) as raised:
        record.select(model, "0::rellu", torch.zeros(1))
    said = "'0::rellu' matches none of the calls of 1 modules in this forward; they call 'relu'"
    assert str(raised.value) == said
    assert raised.value.near == ("relu",)
    assert record.select(model, "0::rellu", torch.zeros(1), allow_empty=True).sites == ()
