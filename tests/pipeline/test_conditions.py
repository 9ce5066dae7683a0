"""Conditions by layer, call, row, position and predicate, and hooks under them."""

import itertools

import pytest
import torch

from stable_ids import stable_id
from tdcache.errors import EditError, HookSignatureError, SelectionError
from tdcache.pipeline import (
    AtCalls,
    AtLayers,
    AtPositions,
    AtRows,
    Calls,
    ConditionalHooks,
    Hooks,
    Keyword,
    Layers,
    Part,
    Positions,
    Rows,
    When,
    grad_hook_wrapper,
)
from tdcache.pipeline.conditions import Condition


def zero(x):
    return 0 * x


def long(x):
    return len(x) > 1


@pytest.fixture
def x():
    return torch.randn(3, 4, 5)


def by_hand(x, chosen):
    """``x`` with zeros where ``chosen(row, position)`` says, by a loop."""
    want = x.clone()
    for row, position in itertools.product(range(x.shape[0]), range(x.shape[1])):
        if chosen(row, position):
            want[row, position] = 0
    return want


def test_layers_calls_and_other_keywords():
    assert [AtLayers(1, zero)(3, layer=layer) for layer in range(3)] == [3, 0, 3]
    assert [AtLayers([0, 2], zero)(3, layer=layer) for layer in range(3)] == [0, 3, 0]
    assert [AtCalls(range(2), zero)(3, call=call) for call in range(3)] == [0, 0, 3]
    hooks = ConditionalHooks(Keyword("kind", "mlp", "attn"), zero)
    assert [hooks(3, kind=kind) for kind in ("mlp", "attn", "norm")] == [0, 0, 3]


def test_a_keyword_that_is_not_in_scope_is_an_error_with_the_remedy():
    with pytest.raises(
        HookSignatureError, match=r"Layers\(1\) needs layer=; in scope are 'call'.*\(\?P<layer>\.\.\.\)"
    ):
        AtLayers(1, zero)(3, call=1)
    with pytest.raises(HookSignatureError, match="call is not known where a checkpoint recomputes"):
        AtCalls(1, zero)(3, call=None)


@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        (Rows(1), lambda row, position: row == 1),
        (Rows(0, -1), lambda row, position: row in (0, 2)),
        (Rows(slice(1, None)), lambda row, position: row >= 1),
        (Positions(-1), lambda row, position: position == 3),
        (Positions(slice(0, 2), 3), lambda row, position: position in (0, 1, 3)),
        (Part(1, 2), lambda row, position: position == 2),
        (Rows(1) & Positions(0, 2), lambda row, position: row == 1 and position in (0, 2)),
        (Rows(1) | Positions(0), lambda row, position: row == 1 or position == 0),
        (~Rows(1), lambda row, position: row != 1),
        (~(Rows(1) & Positions(2)), lambda row, position: not (row == 1 and position == 2)),
        (Layers(3) & Rows(1), lambda row, position: row == 1),
        (Layers(4) & Rows(1), lambda row, position: False),
        (Layers(4) | Rows(1), lambda row, position: row == 1),
        (Layers(3) | Rows(1), lambda row, position: True),
        (~Layers(3) | ~Layers(4), lambda row, position: True),
        (Rows(0) & Layers(3) & (lambda x, layer: layer == 3), lambda row, position: row == 0),
        (Rows(0) & Rows(1), lambda row, position: False),
        (When(lambda x: x.new_tensor([True, False, True]).bool()), lambda row, position: row != 1),
        (When(lambda x, layer: layer == 3), lambda row, position: True),
    ],
    ids=stable_id,
)
def test_an_edit_changes_what_the_condition_means_and_nothing_else(x, condition, chosen):
    before = x.clone()
    got = ConditionalHooks(condition, zero)(x, layer=3)
    assert torch.equal(got, by_hand(x, chosen))
    assert torch.equal(x, before)


def test_hooks_under_rows_and_positions_see_that_part_only(x):
    seen = []
    AtRows([2, 0], seen.append)(x)
    AtPositions(-1, seen.append)(x)
    ConditionalHooks(Rows(1) & Positions(slice(0, 2)), seen.append)(x)
    ConditionalHooks(Rows(0) | Positions(1), seen.append)(x)
    assert torch.equal(seen[0], x[[0, 2]])
    assert torch.equal(seen[1], x[:, -1:])
    assert torch.equal(seen[2], x[1:2, :2])
    assert torch.equal(seen[3], torch.cat([x[0], x[1:, 1]]))


def test_hooks_that_only_look_at_a_part_give_the_very_value_back(x):
    assert AtRows(1, lambda part: None)(x) is x
    assert AtPositions(1, lambda part: part)(x) is x


def test_an_edit_in_place_of_a_part_is_put_back_and_leaves_the_original(x):
    def fill(part):
        part[..., 0] = 9

    before = x.clone()
    got = AtRows(1, fill)(x)
    assert torch.equal(x, before)
    assert (got[1, :, 0] == 9).all()
    assert torch.equal(got[[0, 2]], x[[0, 2]])


def test_gradient_hooks_on_a_row_see_its_gradient_and_edits_stay_in_it(x):
    seen = []

    def triple(grad):
        seen.append(grad)
        return 3 * grad

    x.requires_grad_()
    AtRows(1, grad_hook_wrapper(triple))(x).pow(2).sum().backward()
    (grad,) = seen
    assert torch.equal(grad, 2 * x[1:2].detach())
    assert torch.equal(x.grad, 2 * x.detach() * torch.tensor([1.0, 3.0, 1.0]).view(3, 1, 1))


def test_a_batch_with_conditions_by_row_equals_its_rows_one_by_one(x):
    hooks = Hooks(AtRows(0, lambda part: part * 2), AtRows([1], torch.sin, lambda part: part + 1))
    alone = [x[:1] * 2, x[1:2].sin() + 1, x[2:]]
    assert torch.equal(hooks(x), torch.cat(alone))


def test_positions_along_another_dimension(x):
    got = AtPositions([1], zero, dim=2)(x)
    want = x.clone()
    want[:, :, 1] = 0
    assert torch.equal(got, want)


def test_an_index_out_of_range_is_an_error_not_silence(x):
    with pytest.raises(
        SelectionError, match=r"Rows\(3\): 3 is out of range for dimension 0 of a value of shape \(3, 4, 5\)"
    ):
        AtRows(3, zero)(x)
    with pytest.raises(SelectionError, match=r"Positions\(1\) is about dimension 1; the value has shape \(3,\)"):
        AtPositions(1, zero)(torch.ones(3))


def test_a_mask_that_does_not_fit_is_an_error(x):
    for mask in (torch.ones(2, dtype=torch.bool), torch.ones(3, 4, 5, 1, dtype=torch.bool)):
        with pytest.raises(
            SelectionError, match=r"a mask of shape .* does not fit the leading dimensions .* \(3, 4, 5\)"
        ):
            ConditionalHooks(When(lambda x, mask=mask: mask), zero)(x)


def test_an_answer_that_is_neither_yes_nor_no_is_an_error(x):
    with pytest.raises(HookSignatureError, match="returned None; return True, False or a boolean mask"):
        ConditionalHooks(lambda x: None, zero)(x)
    with pytest.raises(HookSignatureError, match=r"returned a torch\.float32 tensor"):
        ConditionalHooks(When(lambda x: torch.ones(3)), zero)(x)


def test_answers_of_numpy_and_scalar_tensors_count(x):
    numpy = pytest.importorskip("numpy")
    assert ConditionalHooks(lambda x: numpy.True_, zero)(3) == 0
    assert ConditionalHooks(lambda x: torch.tensor(False), zero)(3) == 3


def test_what_a_condition_of_ones_own_answers_is_not_lost_among_others(x):
    numpy = pytest.importorskip("numpy")

    class Own(Condition):
        def __init__(self, answer):
            self.answer = answer

        def __call__(self, x, /, *args, **kwargs):
            return self.answer

    no, yes = Own(numpy.False_), Own(numpy.True_)
    assert ConditionalHooks(Own(True) & no & Own(True), zero)(3) == 3
    assert ConditionalHooks(Own(False) | yes | Own(False), zero)(3) == 0


def test_what_hooks_make_of_a_part_must_fit_it(x):
    with pytest.raises(EditError, match=r"the replacement at 'AtRows\(1\)' does not fit"):
        AtRows(1, lambda part: part[..., :2])(x)


def test_after_a_no_the_rest_is_not_asked(x):
    asked = []
    condition = Layers(4) & When(lambda x: asked.append(1))
    assert ConditionalHooks(condition, zero)(x, layer=3) is x
    assert ConditionalHooks(Layers(3) | When(lambda x: asked.append(1)), zero)(3, layer=3) == 0
    assert asked == []


@pytest.mark.parametrize(
    ("hooks", "text"),
    [
        (AtLayers(3), "AtLayers(3)"),
        (AtLayers([3, 4]), "AtLayers(3, 4)"),
        (AtCalls(0), "AtCalls(0)"),
        (AtRows(slice(1, 3)), "AtRows(slice(1, 3, None))"),
        (AtPositions(-1), "AtPositions(-1)"),
        (AtPositions(-1, dim=2), "AtPositions(-1, dim=2)"),
        (
            ConditionalHooks(Layers(1) & ~(Rows(0) | Positions(1))),
            "ConditionalHooks(Layers(1) & ~(Rows(0) | Positions(1)))",
        ),
        (ConditionalHooks(Calls(1) & When(long)), "ConditionalHooks(Calls(1) & When(long))"),
        (ConditionalHooks(long), "ConditionalHooks(When(long))"),
        (ConditionalHooks(Keyword("kind", "mlp")), "ConditionalHooks(Keyword('kind', 'mlp'))"),
        (ConditionalHooks(Part(2, 1)), "ConditionalHooks(Part(2, 1))"),
    ],
)
def test_reprs_read_as_they_are_written(hooks, text):
    assert repr(hooks) == text


def test_a_predicate_of_one_keyword_gets_that_keyword(x):
    hooks = ConditionalHooks(lambda layer: layer == 3, zero)
    assert torch.equal(hooks(x, layer=3), 0 * x)
    assert torch.equal(hooks(x, layer=2), x)
    both = ConditionalHooks(lambda layer, *, call: layer == call, zero)
    assert torch.equal(both(x, layer=3, call=3), 0 * x)
    assert torch.equal(both(x, layer=3, call=2), x)
    assert torch.equal(ConditionalHooks(lambda value: value.dim() == x.dim(), zero)(x, layer=3), 0 * x)
