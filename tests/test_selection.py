"""Selection: what each kind of selector means, in which order, under which names, and what if nothing matches."""

import re
from collections import OrderedDict

import pytest
import regex
import torch
from torch import nn

from tdcache.errors import SelectionError
from tdcache.selection import AnyOf, IsInstance, PathPattern, Where, as_matcher, select, walk


def block():
    return nn.Sequential(OrderedDict(attn=nn.Linear(2, 2), act=nn.ReLU(), mlp=nn.Linear(2, 2, bias=False)))


def compiled(model):
    return torch.compile(model, backend="eager")  # only the wrapper: nothing is compiled before the first call


@pytest.fixture
def model():
    """``embed``, then ``layers.0`` to ``layers.10``, each with ``attn``, ``act`` and ``mlp``."""
    return nn.Sequential(OrderedDict(embed=nn.Embedding(5, 2), layers=nn.ModuleList(block() for _ in range(11))))


def test_a_pattern_must_cover_the_whole_path(model):
    assert select(model, r"layers\.1").paths == ("layers.1",)
    assert select(model, r"layers\.1\.\w+").paths == ("layers.1.attn", "layers.1.act", "layers.1.mlp")


@pytest.mark.parametrize(
    ("match", "pattern", "count"),
    [("full", r"layers\.1", 1), ("prefix", r"layers\.1", 8), ("search", r"1\.(attn|mlp)", 2), ("search", r"^attn", 0)],
)
def test_match_says_how_much_of_the_path_the_pattern_covers(model, match, pattern, count):
    assert len(select(model, pattern, match=match, allow_empty=True)) == count


def test_sites_come_in_the_order_of_named_modules_whatever_the_order_of_the_selectors(model):
    selection = select(model, [r"layers\.2\.mlp", r"layers\.2\.attn", "embed"])
    assert selection.paths == ("embed", "layers.2.attn", "layers.2.mlp")


def test_a_class_selects_its_instances_and_those_of_its_subclasses(model):
    model.embed = nn.LazyLinear(2)
    assert select(model, nn.Embedding, allow_empty=True).paths == ()
    assert select(model, nn.LazyLinear).paths == ("embed",)
    assert len(select(model, nn.Linear)) == 1 + 2 * 11


def test_a_predicate_sees_path_and_module_and_never_the_root(model):
    seen = []

    def narrow(path, module):
        seen.append(path)
        return path.endswith("0.mlp") and module.bias is None

    assert select(model, narrow).paths == ("layers.0.mlp", "layers.10.mlp")
    assert seen == [name for name, _ in model.named_modules() if name]


def test_a_sequence_is_a_union_without_repetition(model):
    union = [nn.Embedding, r"layers\.0\.attn", [re.compile(r"layers\.0\.a.*")], lambda path, module: path == "embed"]
    assert select(model, union).paths == ("embed", "layers.0.attn", "layers.0.act")


@pytest.mark.parametrize("union", [["embed", "layer.0"], ["embed", ["layer.0"]], ("layer.0", nn.Linear)])
def test_a_string_in_a_sequence_that_matches_nothing_is_an_error(model, union):
    with pytest.raises(SelectionError, match=r"pattern 'layer\.0' matches none of the \d+ modules"):
        select(model, union)
    assert len(select(model, union, allow_empty=True)) > 0


def test_a_class_or_a_predicate_in_a_sequence_may_match_nothing(model):
    union = ["embed", nn.Conv2d, lambda path, module: False]
    assert select(model, union).paths == ("embed",)


def test_the_groups_of_a_union_are_those_of_the_first_member_that_matches(model):
    first, second = r"layers\.(?P<layer>0)\.attn", r"layers\.(?P<at>\d+)\.attn"
    selection = select(model, [first, second])
    assert [site.groups for site in selection[:2]] == [{"layer": "0"}, {"at": "1"}]


@pytest.mark.parametrize(
    ("selector", "kind"),
    [
        ("a", PathPattern),
        (re.compile("a"), PathPattern),
        (regex.compile("a"), PathPattern),
        (nn.Linear, IsInstance),
        (lambda path, module: True, Where),
        (("a", nn.Linear), AnyOf),
        ([], AnyOf),
    ],
)
def test_each_kind_of_selector_has_its_matcher(selector, kind):
    assert isinstance(as_matcher(selector), kind)


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        (re.compile("LAYERS.0.ATTN", re.IGNORECASE), ("layers.0.attn",)),
        (re.compile("layers .0. attn  # the first", re.VERBOSE), ("layers.0.attn",)),
        (re.compile(r"(?i)Embed"), ("embed",)),
        (regex.compile("EMBED", regex.IGNORECASE), ("embed",)),
        (regex.compile(r"[a-z--[f-z]]mbed", regex.VERSION1), ("embed",)),
        (regex.compile(r"(?:embd){e<=1}", regex.BESTMATCH), ("embed",)),
    ],
)
def test_a_compiled_pattern_keeps_its_flags(model, pattern, paths):
    assert select(model, pattern).paths == paths


def test_a_pattern_compiled_for_ascii_stays_so():
    model = nn.Sequential(OrderedDict(größe=nn.Identity(), width=nn.Identity()))
    assert select(model, re.compile(r"\w+", re.ASCII)).paths == ("width",)
    assert select(model, re.compile(r"\w+")).paths == ("größe", "width")


def test_the_root_is_selected_only_by_an_explicit_empty_string(model):
    assert select(model, "")[0] == ("", model, {})
    assert select(model, ["embed", ""]).paths == ("", "embed")
    for selector in (".*", re.compile(""), type(model), lambda path, module: True):
        assert "" not in select(model, selector, match="search").paths


@pytest.mark.parametrize("match", ["full", "prefix", "search"])
def test_the_empty_string_means_the_root_alone_in_every_mode(model, match):
    assert select(model, "", match=match).paths == ("",)
    assert select(model, ["", "embed"], match=match).paths == ("", "embed")


def test_a_shared_module_answers_to_each_of_its_names(model):
    model.layers[3].mlp = model.layers[0].attn
    selection = select(model, lambda path, module: module is model.layers[0].attn)
    assert selection.paths == ("layers.0.attn", "layers.3.mlp")
    assert selection[0].module is selection[1].module


def test_a_module_that_contains_itself_ends_the_walk_there():
    model = nn.Sequential(OrderedDict(a=nn.Sequential(OrderedDict(b=nn.Identity()))))
    model.a.add_module("up", model)
    model.a.add_module("again", model.a)
    assert [path for path, _ in walk(model)] == ["a", "a.b"]


def test_removed_children_are_passed_over():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    model._modules["0"] = None
    assert select(model, ".*").paths == ("1",)


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, lambda model: compiled(nn.DataParallel(model))])
def test_names_of_the_wrapped_model_are_understood(model, wrap):
    selection = select(wrap(model), r"layers\.\d+\.attn")
    assert len(selection) == 11
    assert selection[0] == ("layers.0.attn", model.layers[0].attn, {})


def test_names_with_the_wrapper_in_them_come_first(model):
    assert select(nn.DataParallel(model), r".*embed").paths == ("module.embed",)


def test_named_groups_are_kept_per_site(model):
    selection = select(model, r"layers\.(?P<layer>\d+)\.((?P<kind>attn|mlp)|act)")
    assert dict(selection[0].groups) == {"layer": "0", "kind": "attn"}
    assert dict(selection[-2].groups) == {"layer": "10", "kind": None}


def test_a_selection_is_a_sequence_of_sites(model):
    selection = select(model, r"layers\.\d\.attn")
    assert [site.path for site in selection] == list(selection.paths)
    assert selection[-1].path == "layers.9.attn"
    assert [path for path, _, _ in selection[2:4]] == ["layers.2.attn", "layers.3.attn"]
    assert selection[1] in selection


def test_a_selection_prints_as_a_table():
    model = nn.Sequential(OrderedDict(first=nn.Linear(30, 40), second=nn.ReLU()))
    assert repr(select(model, "first|second")).splitlines() == [
        "2 sites of Sequential selected by 'first|second'",
        "path    class   parameters",
        "first   Linear       1,240",
        "second  ReLU             0",
    ]


def test_named_groups_have_a_column_and_the_root_a_name():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    assert repr(select(model, ["", r"(?P<layer>\d)|(?P<kind>\w)"])).splitlines()[1:] == [
        "path    class       parameters  groups",
        "(root)  Sequential           9",
        "0       Linear               9  layer=0",
        "1       ReLU                 0  layer=1",
    ]


def test_the_table_runs_nothing(model):
    model.register_forward_pre_hook(lambda module, args: pytest.fail("the model ran"))
    assert "layers.10.mlp" in str(select(model, ".*"))


def test_an_empty_selection_is_allowed_where_asked_for(model):
    selection = select(model, "nothing", allow_empty=True)
    assert len(selection) == 0
    assert repr(selection).startswith("0 sites of Sequential")


@pytest.mark.parametrize(
    ("selector", "near"),
    [
        ("layer.0.attn", ("layers.0.attn",)),
        (r"layers\.0\.atn", ("layers.0.attn",)),
        (re.compile("embedd"), ("embed",)),
        (["embedd", r"layers\.0\.mpl"], ("embed", "layers.0.mlp")),
        (nn.Conv2d, ()),
        (lambda path, module: False, ()),
    ],
)
def test_no_match_is_an_error_that_holds_the_near_names(model, selector, near):
    with pytest.raises(SelectionError) as caught:
        select(model, selector)
    assert set(near) <= set(caught.value.near)
    assert caught.value.selector is selector


@pytest.mark.parametrize(
    "pattern", [r"(a|aa)+[!?]", r"(\w|\w\w)+[!?]", r"(?:a|a)*[!?]", r"(a+)(?1)*[!?]", "(a|aa)" * 30 + "[!?]"]
)
def test_a_pattern_that_backtracks_without_end_is_given_up(monkeypatch, pattern):
    monkeypatch.setattr("tdcache.selection._MATCH_SECONDS", 0.05)
    model = nn.Sequential(OrderedDict([("a" * 60, nn.Identity())]))
    with pytest.raises(SelectionError, match="backtracks"):
        select(model, pattern)


def test_ordinary_patterns_carry_no_time_limit():
    for pattern in (
        r"layers\.\d+\.attn",
        r"encoder\.layer\.\d+\.(attention|output)",
        r".*mlp.*",
        r"h\.[0-4]\.(?:attn|mlp|ln_1|ln_2)",
    ):
        finder = as_matcher(pattern).finder()
        assert finder == as_matcher(pattern).pattern.fullmatch


def test_matchers_and_patterns_can_be_asked_one_path_at_a_time(model):
    assert as_matcher(r"(?P<at>\d)")("3", model) == {"at": "3"}
    assert as_matcher(r"\d")("3", model) == {}
    assert as_matcher(r"\d")("x", model) is None
    assert as_matcher(["x", r"(?P<at>\d)"])("3", model) == {"at": "3"}
    assert as_matcher([])("3", model) is None
