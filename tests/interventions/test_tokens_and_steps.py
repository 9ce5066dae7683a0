"""Positions of real tokens and steps of generation, as docs/positions.md has them, against plain hooks."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from interventions.hand import edited, values
from tdcache import (
    Ablation,
    ActivationAddition,
    ActivationCaching,
    ActivationPatching,
    CausalTracing,
    ContextError,
    EditError,
    PathPatching,
    SelectionError,
    SteeringVectors,
    cache_activations,
)
from tdcache.reducers import Stack
from tiny_transformers import bert, gpt2, llama


@pytest.fixture(params=[gpt2, llama, bert])
def built(request):
    return request.param()


MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])


def at(columns):
    """An edit that zeroes some columns of each row."""

    def edit(value):
        new = value.clone()
        for row, chosen in enumerate(columns):
            new[row, chosen] = 0
        return new

    return edit


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        (0, [[2], [0], [0]]),
        (-1, [[4], [3], [4]]),
        ([0, -1], [[2, 4], [0, 3], [0, 4]]),
        (slice(-2, None), [[3, 4], [2, 3], [3, 4]]),
        (slice(3, None), [[], [3], [3, 4]]),
        (torch.tensor([[1], [2], [4]]), [[3], [2], [4]]),
        (MASK.bool(), [[2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 3, 4]]),
    ],
)
def test_positions_count_real_tokens_on_either_side_of_the_padding(built, positions, columns):
    model, path = built
    ids = torch.randint(2, 20, (3, 5))
    with torch.no_grad(), edited(model, path, at(columns)):
        expected = model(ids, attention_mask=MASK)[0]
    with torch.no_grad(), Ablation(path, positions=positions).prepare(model):
        assert torch.equal(model(ids, attention_mask=MASK)[0], expected)


def test_without_a_mask_positions_are_columns(built):
    model, path = built
    ids = torch.randint(2, 20, (3, 5))
    for options, call in (({}, {}), ({"mask_key": None}, {"attention_mask": MASK})):
        with torch.no_grad(), edited(model, path, at([[4]] * 3)):
            expected = model(ids, **call)[0]
        with torch.no_grad(), Ablation(path, positions=-1, **options).prepare(model):
            assert torch.equal(model(ids, **call)[0], expected)


def test_a_row_with_too_few_tokens_is_an_error(built):
    model, path = built
    if "encoder" not in path:
        pytest.skip("a model with a cache may be given more tokens later")
    with (
        Ablation(path, positions=4).prepare(model),
        pytest.raises(SelectionError, match=r"need 5 real tokens, but rows 0, 1 .* have \[3, 4\]"),
    ):
        model(torch.randint(2, 20, (3, 5)), attention_mask=MASK)


def test_a_mask_that_is_not_there_is_an_error(built):
    model, path = built
    with (
        Ablation(path, positions=-1, mask_key="atention_mask").prepare(model),
        pytest.raises(SelectionError, match="atention"),
    ):
        model(torch.randint(2, 20, (3, 5)), attention_mask=MASK)


@pytest.mark.parametrize(
    ("own", "mask", "positions", "into"),
    [({}, MASK, -1, [4, 3, 4]), ({"mask": MASK.flip(1)}, MASK.flip(1), [-1], [2, 4, 4])],
    ids=["one mask for both runs", "two runs with masks of their own"],
)
def test_the_last_real_token_is_patched_from_the_columns_it_is_in(built, own, mask, positions, into):
    model, path = built
    first, second = torch.randint(2, 20, (2, 3, 5))
    data = TensorDict({"ids": first, "mask": MASK, "patched": {"ids": second, **own}})
    recipe = ActivationPatching(path, positions=positions)
    with recipe.prepare(model, {"ids": "input_ids", "mask": "attention_mask"}, ["out"]) as hooked, torch.no_grad():
        found = hooked(data)["patched", "out"]
    source = values(model, [path], lambda: model(first, attention_mask=MASK))[path]

    def paste(value):
        new = value.clone()
        new[range(3), into] = source[range(3), [4, 3, 4]]
        return new

    with torch.no_grad(), edited(model, path, paste):
        assert torch.equal(found, model(second, attention_mask=mask)[0])


def test_a_sweep_goes_over_real_tokens_where_positions_are_given(built):
    model, path = built
    first, second = torch.randint(2, 20, (2, 3, 5))
    model = model.double()
    data = TensorDict({"ids": first, "mask": MASK, "patched": {"ids": second}})
    recipe = ActivationPatching(
        path, positions=[0, -1], sweep="position", metric=lambda data: data["out"].square().sum(), chunk=2
    )
    with recipe.prepare(model, {"ids": "input_ids", "mask": "attention_mask"}, ["out"]) as hooked:
        found = hooked(data)[path]
    source = values(model, [path], lambda: model(first, attention_mask=MASK))[path]
    for at_result, columns in enumerate(([2, 0, 0], [4, 3, 4])):

        def paste(value, columns=columns):
            new = value.clone()
            new[range(3), columns] = source[range(3), columns]
            return new

        with torch.no_grad(), edited(model, path, paste):
            expected = model(second, attention_mask=MASK)[0].square().sum()
        torch.testing.assert_close(found[at_result], expected, rtol=1e-6, atol=0)  # Llama's norm is in float32


def test_a_path_sends_the_same_token_between_runs_that_are_padded_unlike():
    model, path = gpt2()
    (first, second), other = torch.randint(2, 20, (2, 3, 5)), MASK.flip(1)
    data = TensorDict({"ids": first, "mask": MASK, "patched": {"ids": second, "mask": other}})
    recipe = PathPatching(path, r"transformer\.h\.1", freeze=r"transformer\.wpe", positions=-1)
    with recipe.prepare(model, {"ids": "input_ids", "mask": "attention_mask"}, ["out"]) as hooked, torch.no_grad():
        found = hooked(data)["patched", "out"]
    source = values(model, [path], lambda: model(first, attention_mask=MASK))[path]

    def paste(value):
        new = value.clone()
        new[range(3), [2, 4, 4]] = source[range(3), [4, 3, 4]]
        return new

    with torch.no_grad(), edited(model, path, paste):  # there is no other way from one layer to the next
        torch.testing.assert_close(found, model(second, attention_mask=other)[0])


def test_a_sweep_between_runs_that_are_padded_unlike_is_refused():
    model, path = gpt2()
    data = TensorDict({"ids": torch.randint(2, 20, (3, 5)), "mask": MASK})
    data["patched"] = TensorDict({"ids": torch.randint(2, 20, (3, 5)), "mask": MASK.flip(1)})
    recipe = ActivationPatching(path, positions=[-1], sweep=True, metric=lambda data: data["out"].sum())
    with (
        recipe.prepare(model, {"ids": "input_ids", "mask": "attention_mask"}, ["out"]) as hooked,
        pytest.raises(EditError, match=r"positions=\[-1\] are other columns in the source run than in the patched one"),
    ):
        hooked(data)


@pytest.mark.parametrize("pool", ["tokens", "last"])
def test_an_addition_leaves_padding_out_by_itself(built, pool):
    model, path = built
    ids, other = torch.randint(2, 20, (2, 3, 5))
    sides = {"positive": {"ids": ids, "mask": MASK}, "negative": {"ids": other, "mask": MASK}}
    recipe = ActivationAddition(path, pool=pool)
    with recipe.prepare(model, {"ids": "input_ids", "mask": "attention_mask"}, ["out"]) as hooked, torch.no_grad():
        found = hooked(TensorDict(sides))["steer", path]
    one, two = (values(model, [path], lambda ids=ids: model(ids, attention_mask=MASK))[path] for ids in (ids, other))
    if pool == "tokens":
        expected = one[MASK.bool()].mean(0) - two[MASK.bool()].mean(0)
    else:
        expected = (one - two)[range(3), [4, 3, 4]].mean(0)
    torch.testing.assert_close(found, expected)


def test_a_misspelt_mask_of_an_addition_is_an_error():
    model = nn.Sequential(nn.Linear(4, 4))
    side = TensorDict({"input": torch.randn(2, 3, 4), "mask": torch.ones(2, 3)})
    with ActivationAddition("0", mask_key="maks").prepare(model) as hooked, pytest.raises(SelectionError, match="maks"):
        hooked(TensorDict({"positive": side, "negative": side}))


def test_the_subject_of_a_trace_is_its_real_tokens():
    model, _ = gpt2()
    ids, seen = torch.randint(2, 20, (3, 5)), []
    model.transformer.wte.register_forward_hook(lambda *args: None)
    recipe = CausalTracing(
        r"transformer\.h\.1", r"transformer\.wte", subject=0, metric=lambda data: data["out"].sum(), samples=1, chunk=1,
        replay=False,
    )  # fmt: skip
    model.transformer.drop.register_forward_hook(lambda module, args, output: seen.append(args[0].clone()))
    with recipe.prepare(model, {"ids": "input_ids", "mask": "attention_mask"}, ["out"]) as hooked:
        hooked(TensorDict({"ids": ids, "mask": MASK}))
    noised = (seen[1] - seen[0]).abs().sum(-1) > 0
    assert noised.nonzero().tolist() == [[0, 2], [1, 0], [2, 0]]


def test_in_generation_a_position_is_the_same_token_in_every_step():
    for model, path in (gpt2(), llama()):
        ids = torch.randint(2, 20, (3, 5))
        caching = ActivationCaching(path, reducer=Stack(), index=(slice(None), slice(-1, None)))
        with Ablation(path, positions=6).prepare(model), caching.prepare(model) as hooked:
            model.generate(
                ids, attention_mask=MASK, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0
            )
        zeroed = [[not bool(row.any()) for row in step] for step in hooked.cache[path]]
        # The rows have 3, 4 and 5 tokens in the prompt, so token 6 comes in steps 4, 3 and 2.
        assert [[step for step in range(6) if zeroed[step][row]] for row in range(3)] == [[4], [3], [2]]


class Wrapper(nn.Module):
    """What generates through an inner model, as an adapter does."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.inner.generate(*args, **kwargs)


@pytest.mark.parametrize(("steps", "expected"), [("prefill", [0]), ("decode", [1, 2, 3])])
def test_the_clock_is_on_the_model_that_receives_the_cache(steps, expected):
    for inner, path in (gpt2(), llama()):
        model = Wrapper(inner)
        caching = ActivationCaching(f"inner.{path}", reducer=Stack(), index=(slice(None), -1))
        with Ablation(f"inner.{path}", steps=steps).prepare(model), caching.prepare(model) as hooked:
            model.generate(
                torch.randint(2, 20, (2, 5)), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0
            )
        zeroed = [not bool(value.any()) for value in hooked.cache[f"inner.{path}"]]
        assert [step for step in range(4) if zeroed[step]] == expected


def test_a_site_outside_of_every_forward_that_tells_the_step_is_an_error():
    model, path = gpt2()
    with (
        Ablation(rf"{path}\.mlp", steps="prefill").prepare(model),
        pytest.raises(ContextError, match="fired outside of every forward that tells the step"),
    ):
        model.get_submodule(path).mlp(torch.zeros(1, 2, 8))


def test_resampling_by_a_mask_is_refused_and_by_numbers_exchanges_rows():
    model, x = nn.Sequential(nn.Identity()), torch.arange(12.0).reshape(3, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]).bool()
    with (
        Ablation("0", "resample", positions=mask).prepare(model),
        pytest.raises(EditError, match=r"values would move between the positions of one row.*\(batch, k\)"),
    ):
        model(x)
    chosen = torch.tensor([[0], [1], [3]])
    with Ablation("0", "resample", positions=chosen).prepare(model):
        found = model(x)
    moved = found[range(3), [0, 1, 3], 0].tolist()
    assert sorted(moved) == [0, 5, 11]
    assert all(one != other for one, other in zip(moved, [0, 5, 11], strict=True))


@pytest.mark.parametrize("make", [gpt2, llama])
def test_attention_weights_that_nothing_reads_are_no_silent_edit(make):
    model, path = make()
    model.set_attn_implementation("eager")
    attention = f"{path}.{'attn' if make is gpt2 else 'self_attn'}"
    ids = torch.randint(2, 20, (2, 5))
    with torch.no_grad(), Ablation(attention, pick=1).prepare(model):
        with pytest.warns(UserWarning, match=rf"nothing reads the edited value that pick=1 means at '{attention}'"):
            model(ids)
        model(ids)  # once: further warnings are errors here
    with torch.no_grad(), Ablation(attention, pick=1).prepare(model):
        weights = model(ids, output_attentions=True).attentions[0]  # what is handed out is read by the user
    assert not weights.any()


def test_a_picked_value_that_is_read_is_no_reason_to_warn():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.split = nn.LSTM(4, 4, batch_first=True)

        def forward(self, x):
            output, (hidden, _) = self.split(x)
            return output[:, -1] + hidden[0]

    model, x = Pair(), torch.randn(2, 3, 4)
    with Ablation("split", pick=(1, 0)).prepare(model):
        found = model(x)
    assert torch.equal(found, model.split(x)[0][:, -1])


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [(nn.Conv2d(3, 6, 1), (4, 3, 6, 6), -3), (nn.Conv1d(3, 6, 1), (4, 3, 6), -2), (nn.BatchNorm2d(6), (4, 6, 6, 6), -3),
     (nn.AvgPool2d(1), (6, 6, 6), -3)],
)  # fmt: skip
def test_a_vector_for_the_channels_of_a_map_is_not_added_along_its_width(module, shape, axis):
    model, vector = nn.Sequential(module.eval()), torch.randn(6)
    x = torch.randn(shape)
    with (
        SteeringVectors("0", vector).prepare(model),
        pytest.raises(EditError, match=rf"added along the last axis at '0', but the channels.*give unit_dim={axis}"),
    ):
        model(x)
    with SteeringVectors("0", vector, unit_dim=axis).prepare(model):
        found = model(x)
    assert torch.equal(found, model[0](x) + vector.reshape(-1, *(1,) * (-1 - axis)))


def test_a_vector_that_two_axes_could_take_is_said():
    model, vector, x = nn.Sequential(nn.Identity()), torch.randn(6), torch.randn(4, 6, 6)
    with (
        SteeringVectors("0", vector).prepare(model),
        pytest.warns(UserWarning, match=r"6 numbers is added along the last axis at '0', and axis -2 of \(4, 6, 6\)"),
    ):
        found = model(x)
    assert torch.equal(found, x + vector)
    for given, options, expected in ((vector[None], {}, x + vector), (vector, {"unit_dim": -2}, x + vector[:, None])):
        with SteeringVectors("0", given, **options).prepare(model):
            assert torch.equal(model(x), expected)


def test_a_normalised_vector_of_features_is_added_as_ever():
    model, x = nn.Sequential(nn.BatchNorm1d(6).eval()), torch.randn(4, 6)
    expected = model(x) + 1
    with SteeringVectors("0", torch.ones(6)).prepare(model):
        assert torch.equal(model(x), expected)


def test_a_slice_of_padded_rows_takes_as_many_positions_of_the_source():
    model, path = gpt2()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0]])
    batch = {"input_ids": torch.randint(2, 20, (3, 5)), "attention_mask": mask}
    source, columns = torch.randn(3, 7, 8), torch.tensor([[1, 5], [0, 6], [2, 3]])
    first = {name: each[:2] for name, each in batch.items()}
    options = {"positions": slice(-2, None), "source_positions": columns[:2]}
    recipe = ActivationPatching(path, {path: source[:2]}, **options)
    with recipe.prepare(model), cache_activations(model, path) as cache:
        model(**first)
    for row, places in enumerate([[3, 4], [2, 3]]):
        assert torch.equal(cache[path][row, places], source[row, columns[row]])
    uneven = ActivationPatching(path, {path: source}, positions=slice(-2, None), source_positions=columns)
    with pytest.raises(EditError, match=r"the replacement at .* does not fit"), uneven.prepare(model):
        model(**batch)
