"""Named groups of the pattern, and ``stack_by``: one dense tensor over the layers."""

import pickle

import pytest
import torch
from torch import nn

import reference
from tdcache import ActivationCaching, CaptureError, Stack, select
from tdcache.cache import StackBy
from tdcache.selection import Site


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.mlp(torch.tanh(self.attn(x)))


@pytest.fixture
def model():
    return nn.Sequential(*[Block(4) for _ in range(11)])


PATTERN = r"(?P<layer>\d+)\.(?P<kind>attn|mlp)"


def separately(model, x, **options):
    with ActivationCaching(PATTERN, **options).prepare(model) as hooked:
        hooked(x)
    return hooked.cache


def test_the_named_groups_are_kept_per_site(model):
    site = select(model, PATTERN)[-1]
    assert (site.path, dict(site.groups)) == ("10.mlp", {"layer": "10", "kind": "mlp"})


def test_sites_that_differ_only_in_the_group_become_one_tensor_in_numeric_order(model, x):
    with ActivationCaching(PATTERN, stack_by="layer").prepare(model) as hooked:
        hooked(x)
    apart = separately(model, x)
    assert sorted(hooked.cache.keys()) == ["attn", "mlp"]
    for kind in ("attn", "mlp"):
        assert torch.equal(hooked.cache[kind], torch.stack([apart[f"{layer}.{kind}"] for layer in range(11)]))


def test_without_another_group_the_key_is_the_path_with_a_star(model, x):
    with ActivationCaching(r"(?P<layer>\d+)\.attn", stack_by="layer").prepare(model) as hooked:
        hooked(x)
    assert list(hooked.cache.keys()) == ["*.attn"]
    assert hooked.cache["*.attn"].shape == (11, 5, 4)


def test_a_group_that_is_a_word_is_stacked_in_the_order_of_words(model, x):
    with ActivationCaching(PATTERN, stack_by="kind").prepare(model) as hooked:
        hooked(x)
    apart = separately(model, x)
    assert torch.equal(hooked.cache["3"], torch.stack([apart["3.attn"], apart["3.mlp"]]))


def test_stacking_goes_with_reducers(model, x):
    with ActivationCaching(PATTERN, stack_by="layer", reducer=Stack()).prepare(model) as hooked:
        hooked(x)
        hooked(2 * x)
    assert hooked.cache["attn"].shape == (11, 2, 5, 4)
    assert torch.equal(
        hooked.cache["attn"][:, 1], torch.stack([separately(model, 2 * x)[f"{i}.attn"] for i in range(11)])
    )


def test_stacking_goes_with_gradients(model, x):
    with ActivationCaching(PATTERN, stack_by="layer", directions=["fwd", "bwd"]).prepare(model) as hooked:
        hooked(x).sum().backward()
    with ActivationCaching(PATTERN, directions=["bwd"]).prepare(model) as apart:
        apart(x).sum().backward()
    wanted = torch.stack([apart.cache[f"{layer}.attn"] for layer in range(11)])
    assert torch.equal(hooked.cache["bwd", "attn"], wanted)


def test_a_pattern_without_the_group_is_an_error_that_names_those_there(model):
    with (
        pytest.raises(CaptureError, match=r"\(\?P<block>\.\.\.\).*only 'kind', 'layer'") as caught,
        ActivationCaching(PATTERN, stack_by="block").prepare(model),
    ):
        pass
    assert caught.value.paths[:2] == ("0.attn", "0.mlp")


def test_sites_of_different_shape_cannot_be_stacked(x):
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with (
        ActivationCaching(r"(?P<layer>\d)", stack_by="layer").prepare(model) as hooked,
        pytest.raises(CaptureError, match=r"'0' \(5, 3\), '1' \(5, 2\)"),
    ):
        hooked(x)


def test_a_site_that_saw_nothing_cannot_be_stacked(x):
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            return self.layers[0](x)

    with (
        pytest.raises(CaptureError, match=r"'layers\.1' saw no value") as caught,
        ActivationCaching(r"layers\.(?P<layer>\d)", stack_by="layer").prepare(Skipping()) as hooked,
    ):
        hooked(x)
    assert caught.value.paths == ("layers.1",)


class Tree(nn.Module):
    """Linear layers under given paths, called in the order in which they are given."""

    def __init__(self, *paths):
        super().__init__()
        self.paths = paths
        for path in paths:
            *parents, name = path.split(".")
            module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module._modules[parent]
            module.add_module(name, nn.Linear(2, 2))

    def forward(self, x):
        for path in self.paths:
            x = self.get_submodule(path)(x)
        return x


def both(model, pattern, stack_by):
    """What is stacked in one forward, and the same entries one by one."""
    x = torch.randn(3, 2)
    with (
        ActivationCaching(pattern, stack_by=stack_by).prepare(model) as hooked,
        ActivationCaching(pattern).prepare(model) as apart,
    ):
        model(x)
    return dict(hooked.cache.items()), dict(apart.cache.items())


def test_a_part_of_the_path_that_looks_like_the_group_stays_apart():
    model = Tree(*(f"stages.{stage}.{layer}" for stage in range(2) for layer in range(2)))
    together, apart = both(model, r"stages\.\d\.(?P<layer>\d)", "layer")
    assert sorted(together) == ["stages.0.*", "stages.1.*"]
    for stage in range(2):
        wanted = torch.stack([apart[f"stages.{stage}.{layer}"] for layer in range(2)])
        assert torch.equal(together[f"stages.{stage}.*"], wanted)


def test_a_group_within_a_name_is_replaced_where_it_stands():
    together, apart = both(Tree("h1", "h2", "h10"), r"h(?P<layer>\d+)", "layer")
    assert list(together) == ["h*"]
    assert torch.equal(together["h*"], torch.stack([apart["h1"], apart["h2"], apart["h10"]]))


def test_a_group_around_the_stacked_one_shows_a_star_in_its_place():
    together, apart = both(Tree("0.attn", "1.attn"), r"(?P<block>(?P<layer>\d)\.attn)", "layer")
    assert list(together) == ["*.attn"]
    assert together["*.attn"].shape == (2, 3, 2)
    assert torch.equal(together["*.attn"][1], apart["1.attn"])


def test_a_group_inside_the_stacked_one_goes_with_it():
    together, _ = both(Tree("h0", "h1"), r"(?P<layer>h(?P<number>\d))", "layer")
    assert list(together) == ["*"]


def test_a_group_may_be_empty():
    together, apart = both(Tree("h", "h1"), r"h(?P<layer>\d?)", "layer")
    assert list(together) == ["h*"]
    assert torch.equal(together["h*"], torch.stack([apart["h1"], apart["h"]]))  # numbers before words


EXPERTS = [
    f"layers.{layer}.experts.{expert}.{part}" for layer in (0, 1) for expert in (0, 2, 10) for part in ("up", "down")
]
EXPERT = r"layers\.(?P<layer>\d+)\.experts\.(?P<expert>\d+)\.(?P<part>\w+)"


@pytest.mark.parametrize("names", [("layer", "expert"), ("expert", "layer"), ("part", "expert", "layer")])
def test_several_groups_become_several_axes_in_the_order_given(names):
    together, apart = both(Tree(*EXPERTS), EXPERT, names)
    wanted = reference.stacked(apart, EXPERT, names)
    if "part" in names:
        assert together.keys() == wanted.keys() == {"layers.*.experts.*.*"}
    else:
        assert together.keys() == {"up", "down"}
        wanted = {common.rsplit(".", 1)[1]: value for common, value in wanted.items()}
    for key, value in wanted.items():
        assert torch.equal(together[key], value)


def test_the_values_along_the_axes_can_be_read():
    stack = StackBy(["layer", "expert"], select(Tree(*EXPERTS), EXPERT))
    assert stack.axes["up"] == (["0", "1"], ["0", "2", "10"])
    assert stack.members["up"][:2] == ["layers.0.experts.0.up", "layers.0.experts.2.up"]
    assert repr(stack) == "StackBy(['layer', 'expert'], ['up', 'down'])"


def refused(pattern, stack_by, *paths):
    with pytest.raises(CaptureError) as caught:
        StackBy(stack_by, select(Tree(*paths), pattern))
    return str(caught.value)


def test_different_paths_do_not_share_a_key():
    paths = [f"{side}.{layer}.attn" for side in ("encoder", "decoder") for layer in range(2)]
    assert refused(r"(?:encoder|decoder)\.(?P<layer>\d)\.(?P<kind>attn)", "layer", *paths) == (
        "stack_by='layer' would give 'encoder.*.attn', 'decoder.*.attn' one key, 'attn': these paths differ outside "
        "the named groups; name the part that differs too, as in (?P<part>encoder|decoder), or write the other groups "
        "as (?:...), so that the whole path is the key"
    )
    together, _ = both(Tree(*paths), r"(?:encoder|decoder)\.(?P<layer>\d)\.(?:attn)", "layer")
    assert sorted(together) == ["decoder.*.attn", "encoder.*.attn"]


def test_a_missing_combination_is_named():
    message = refused(r"(?P<layer>\d)\.(?P<expert>\d)", ("layer", "expert"), "0.0", "0.1", "1.0")
    assert message == (
        "stack_by=('layer', 'expert') cannot stack '*.*': 3 sites do not fill the axes 2 x 2, there is none for "
        "layer='1', expert='1'; select sites that do, or stack by one group"
    )


def test_two_sites_in_one_place_are_named():
    patterns = [r"(?P<layer>0)\.(?P<expert>1)", r"(?P<expert>1)\.(?P<layer>0)"]
    assert refused(patterns, ("layer", "expert"), "0.1", "1.0") == (
        "stack_by=('layer', 'expert') cannot stack '*.*': '0.1' and '1.0' are both layer='0', expert='1'; "
        "name the part of the path that tells them apart"
    )


@pytest.mark.parametrize("names", [(), ("layer", "layer")])
def test_each_group_gets_one_axis(names):
    assert refused(r"(?P<layer>\d)", names, "0") == (
        f"stack_by={names!r} names no group, or one twice; give each group one axis"
    )


def test_sites_without_a_place_for_their_groups_are_refused():
    with pytest.raises(CaptureError) as caught:
        StackBy("layer", [Site("0", nn.ReLU(), {"layer": "0"})])
    assert str(caught.value) == (
        "stack_by='layer' needs to know where in '0' its groups stand, and got them as dict; "
        "take the sites from select(model, pattern)"
    )


def test_values_on_several_devices_are_refused():
    stack = StackBy("layer", select(Tree("0", "1"), r"(?P<layer>\d)"))
    with pytest.raises(CaptureError) as caught:
        stack({"0": torch.ones(2), "1": torch.ones(2, device="meta")})
    assert str(caught.value) == (
        "stack_by='layer' cannot stack '*': the sites are on several devices, '0' cpu, '1' meta; "
        "bring their values to one with device="
    )


def test_groups_keep_their_places_through_a_pickle():
    groups = select(Tree("0.up"), r"(?P<layer>\d)\.(?P<part>up)(?P<rest>x)?")[0].groups
    again = pickle.loads(pickle.dumps(groups))
    assert again == groups == {"layer": "0", "part": "up", "rest": None}
    assert again.spans == groups.spans == {"layer": (0, 1), "part": (2, 4), "rest": (-1, -1)}
    assert repr(groups) == "{'layer': '0', 'part': 'up', 'rest': None}"
