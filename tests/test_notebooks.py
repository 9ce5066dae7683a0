"""What a notebook shows of the library's objects: tables, escaped, and never a whole model."""

from html.parser import HTMLParser

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from small_models import MLP
from tdcache import Ablation, ActivationCaching, CompositeHookingContextFactory, HookedModule, Step, select
from tdcache.points import list_hooks
from tdcache.tables import html_table, shorten


class Cells(HTMLParser):
    """The texts of the cells, row by row, and that of the paragraphs."""

    def __init__(self, html):
        super().__init__()
        self.rows, self.notes, self.open = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.notes if self.open[-1] == "p" else self.rows[-1]).append(data)


@pytest.fixture
def model():
    return MLP()


def test_a_selection_is_a_table(model):
    shown = Cells(select(model, r"layers\.(?P<at>[01])")._repr_html_())
    assert shown.notes == ["2 sites of MLP selected by 'layers\\\\.(?P<at>[01])'"]
    assert [row[0] for row in shown.rows] == ["path", "layers.0", "layers.1"]
    assert shown.rows[0] == ["path", "class", "parameters", "groups"]
    assert shown.rows[1][3] == "at=0"


def test_a_context_shows_whether_it_is_open_and_its_sites(model):
    context = ActivationCaching(r"layers\.[01]", directions=["fwd", "bwd"]).prepare(model)
    before = Cells(context._repr_html_())
    assert before.rows == []
    assert before.notes[0].startswith("<closed HookingContextWithCache of ActivationCaching(")
    assert before.notes[0].endswith("its sites are selected when it is entered")
    for _ in range(2):
        with context:
            inside = Cells(context._repr_html_())
        assert [row[0] for row in inside.rows] == ["path", "layers.0", "layers.1"]
        assert inside.notes[0].startswith("<open ")
        assert "directions=['fwd', 'bwd']" in inside.notes[0]


def test_a_composite_shows_the_sites_of_its_children(model):
    factory = CompositeHookingContextFactory(ActivationCaching(r"layers\.0"), Ablation(r"layers\.1"))
    with factory.prepare(model) as hooked:
        shown = Cells(hooked.hooking_context._repr_html_())
    assert [row[0] for row in shown.rows] == ["path", "layers.0", "layers.1"]


def test_a_hooked_module_shows_its_keys_and_its_context_and_not_the_model(model):
    with ActivationCaching(r"layers\.0").prepare(model) as hooked:
        shown = Cells(hooked._repr_html_())
    assert shown.notes[0] == "HookedModule of MLP: reads ['input'], writes ['output']"
    assert [row[0] for row in shown.rows] == ["path", "layers.0"]
    assert "in_features" not in hooked._repr_html_()
    assert Cells(HookedModule.from_module(model)._repr_html_()).notes == shown.notes[:1]


def test_the_hooks_of_a_model_are_a_table(model):
    assert Cells(list_hooks(model)._repr_html_()).notes == ["no hooks on MLP"]
    with Ablation(r"layers\.0").prepare(model):
        shown = Cells(list_hooks(model)._repr_html_())
    assert ["layers.0", "fwd"] in [row[:2] for row in shown.rows]


def test_a_step_names_its_phase():
    shown = Cells(Step(forward=1, decoded=1, past=4, fed=1)._repr_html_())
    assert (shown.notes, shown.rows[1]) == (["Step (decode)"], ["1", "1", "4", "1"])
    assert Cells(Step(0, 0, 0, 4)._repr_html_()).notes == ["Step (prefill)"]


def test_names_are_escaped():
    model = nn.ModuleDict({"<b>": nn.Linear(1, 1)})
    html = select(model, lambda path, module: True)._repr_html_()
    assert "<b>" not in html
    assert Cells(html).rows[1][0] == "<b>"


def test_rows_past_the_limit_are_counted():
    shown = Cells(html_table("t", ("n",), [[str(n)] for n in range(7)], limit=5))
    assert shown.rows[-1] == ["and 2 more"]
    assert len(shown.rows) == 7


def test_a_long_repr_is_cut():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "abc..."


def test_a_capture_through_a_shown_context_is_unchanged(model):
    x = torch.randn(2, 4)
    with ActivationCaching(r"layers\.0").prepare(model) as hooked:
        hooked._repr_html_()
        hooked(TensorDict(input=x, batch_size=[2]))
    assert torch.equal(hooked.cache["layers.0"], model.layers[0](x))
