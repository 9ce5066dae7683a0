"""``rows=``, ``units=`` and ``heads=`` of a capture: what they keep, beside positions, reducers and calls."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdcache import ActivationCaching, CaptureError, EditError, Last, Mean, Stack, names
from tiny_transformers import gpt2

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


@pytest.fixture
def built():
    model, path = gpt2()
    return model, f"{path}.attn.c_proj", {"input_ids": torch.randint(2, 20, (3, 5)), "attention_mask": MASK}


def kept(built, **options):
    model, path, batch = built
    options = {"directions": ["fwd_pre"], **options}
    with ActivationCaching(path, **options).prepare(model) as hooked:
        hooked(**batch).logits.square().sum().backward()
    return hooked.cache[path]


@pytest.mark.parametrize("direction", ["fwd", "fwd_pre", "bwd", "grad_in"])
@pytest.mark.parametrize(
    ("options", "index"),
    [
        ({"rows": 1}, (1,)),
        ({"rows": -1}, (-1,)),
        ({"rows": [2, 0]}, ([2, 0],)),
        ({"rows": slice(1, None)}, (slice(1, None),)),
        ({"rows": torch.tensor([True, False, True])}, ([0, 2],)),
        ({"units": 3}, (..., 3)),
        ({"units": [3, 1]}, (..., [3, 1])),
        ({"heads": (2, 1)}, (..., slice(4, 8))),
        ({"heads": (4, [3, 1])}, (..., [6, 7, 2, 3])),
        ({"heads": (4, torch.tensor([3, 1]))}, (..., [6, 7, 2, 3])),
        ({"rows": 1, "units": 3}, (1, ..., 3)),
        ({"rows": [0, 2], "heads": (2, 0)}, ([0, 2], ..., slice(0, 4))),
    ],
)
def test_rows_units_and_heads_are_what_indexing_takes(built, direction, options, index):
    whole = kept(built, directions=[direction])
    assert torch.equal(kept(built, directions=[direction], **options), whole[index])


@pytest.mark.parametrize("mask_key", ["auto", None])
def test_they_go_with_positions(built, mask_key):
    whole, options = kept(built), {"mask_key": mask_key}
    at = [4, 3, 4] if mask_key else [4, 4, 4]
    last = torch.stack([whole[row, column] for row, column in enumerate(at)])
    assert torch.equal(kept(built, positions=-1, heads=(2, [1]), **options), last[:, 4:])
    assert torch.equal(kept(built, positions=-1, rows=2, units=0, **options), last[2, 0])
    assert torch.equal(kept(built, positions=[-1], rows=[2, 1], **options), last[[2, 1], None])


def test_statistics_over_the_real_tokens_of_some_rows_and_heads(built):
    whole, options = kept(built), {"reducer": Mean(flatten=2), "positions": slice(None)}
    wanted = torch.cat([whole[1, :4], whole[2]])[:, 4:].mean(0)
    torch.testing.assert_close(kept(built, rows=[1, 2], heads=(2, 1), **options), wanted)  # another order of summing
    torch.testing.assert_close(kept(built, rows=1, heads=(2, 1), **options), whole[1, :4, 4:].mean(0))


class SequenceFirst(nn.Module):
    """A linear map of values (sequence, batch, features)."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 6)

    def forward(self, x):
        return self.part(x)


def test_where_positions_are_axis_0_rows_are_axis_1():
    model, x = SequenceFirst(), torch.randn(5, 3, 4)
    whole = model(x)

    def at(**options):
        with torch.no_grad(), ActivationCaching("part", position_dim=0, **options).prepare(model) as hooked:
            hooked(x)
        return hooked.cache["part"]

    assert torch.equal(at(rows=[2, 0]), whole[:, [2, 0]])
    assert torch.equal(at(rows=1), whole[:, 1])
    assert torch.equal(at(positions=-1, rows=[2, 0]), whole[-1, [2, 0]])
    assert torch.equal(at(positions=[0, -1], rows=2, units=5), whole[[0, -1], 2, 5])


def test_channels_are_units_of_another_axis():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 5, 5)
    with torch.no_grad(), ActivationCaching("0", units=[3, 0], unit_dim=-3).prepare(model) as hooked:
        y = hooked(x)
    assert torch.equal(hooked.cache["0"], y[:, [3, 0]])


def test_at_the_calls_of_an_attention_heads_and_positions_are_axes_of_their_own(built):
    model, path, batch = built
    place = path.replace(".c_proj", "::pattern")

    def at(**options):
        with torch.no_grad(), ActivationCaching(place, **options).prepare(model) as hooked:
            hooked(**batch)
        return hooked.cache[place]

    whole = at()
    assert whole.shape == (3, 2, 5, 5)
    assert torch.equal(at(heads=(2, [1])), whole[:, [1]])
    last = torch.stack([whole[row, :, column] for row, column in enumerate([4, 3, 4])])
    assert torch.equal(at(positions=-1), last)
    assert torch.equal(at(positions=-1, heads=(2, [1]), rows=0), last[0, [1]])


def test_a_part_is_a_copy_that_pins_nothing_and_gathers_over_calls(built):
    value = kept(built, units=slice(2))
    assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True))
    with torch.no_grad(), ActivationCaching("0", units=[0, 1], reducer=Stack()).prepare(model) as hooked:
        for _ in range(2):
            model(torch.randn(3, 4))
    assert hooked.cache["0"].shape == (2, 3, 2)  # not overwritten by the activation
    with torch.no_grad(), ActivationCaching("0", units=[0, 1], reducer=Last()).prepare(model) as hooked:
        model[0](torch.ones(3, 4))
    assert hooked.cache["0"].shape == (3, 2)  # also of a module that is called alone


def test_a_part_with_its_graph():
    model, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(3, 4)
    with ActivationCaching("0", units=2, hold="live").prepare(model) as hooked:
        hooked(x)
    hooked.cache["0"].sum().backward()
    assert torch.equal(model[0].bias.grad, torch.tensor([0.0, 0, 3, 0, 0, 0]))


def test_stacked_sites_keep_the_same_part():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    recipe = ActivationCaching(r"(?P<layer>\d)", stack_by="layer", rows=[0, 2], units=1)
    with torch.no_grad(), recipe.prepare(model) as hooked:
        hooked(x)
        together = next(iter(hooked.cache.values(True, True))).clone()
        for layer in model:
            layer(x)
    assert torch.equal(together, torch.stack([model[0](x), model(x)])[:, [0, 2], 1])
    assert torch.equal(
        next(iter(hooked.cache.values(True, True))), torch.stack([each(x) for each in model])[:, [0, 2], 1]
    )


def test_parts_that_are_not_there_are_refused(built):
    with pytest.raises(EditError, match=r"rows=3 means nothing at '.*c_proj', whose value has 3 along axis 0"):
        kept(built, rows=3)
    with pytest.raises(EditError, match=r"heads=\(3, \.\.\.\) does not divide the 8 units at '.*c_proj'"):
        kept(built, heads=(3, 0))
    with pytest.raises(EditError, match="heads= and units= choose along the same axis; give one of them"):
        ActivationCaching("0", heads=(2, 0), units=3)
    with pytest.raises(EditError, match=r"heads is \(n_heads, which\), such as \(12, \[3, 7\]\), got 2"):
        ActivationCaching("0", heads=2)

    def whole(output, **rest):
        return TensorDict({"all": output})

    model, path, batch = built
    message = r"heads= choose from a tensor, and at '.*c_proj' there is a TensorDict; name one of its"
    with pytest.raises(CaptureError, match=message), ActivationCaching(path, callback=whole, rows=0).prepare(model):
        model(**batch)


def test_at_canonical_names_heads_are_an_axis_of_their_own():
    model, _ = gpt2()
    ids, table = torch.randint(2, 20, (3, 5)), names(model)

    def at(**options):
        with (
            torch.no_grad(),
            ActivationCaching("blocks.0.attn.pattern", names=table, **options).prepare(model) as hooked,
        ):
            hooked(ids)
        return hooked.cache["blocks.0.attn.pattern"]

    assert torch.equal(at(heads=1), at()[:, [1]])
    assert torch.equal(at(heads=[1, 0], positions=-1, rows=2), at()[2, [1, 0], -1])
