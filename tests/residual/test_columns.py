"""Positions of kept values: columns, or real tokens where a mask is given."""

import pytest
import torch

from residual.test_decomposition import near
from tdcache import residual
from tdcache.errors import ResidualError, SelectionError

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        (-1, [[4], [4]]),
        (0, [[0], [0]]),
        ([0, -1], [[0, 4], [0, 4]]),
        (slice(1, 3), [[1, 2], [1, 2]]),
        (torch.tensor([[0, 3], [4, 1]]), [[0, 3], [4, 1]]),
        (torch.tensor([[True, False, True, False, False], [False, True, True, False, False]]), [[0, 2], [1, 2]]),
    ],
)
def test_positions_are_columns_without_a_mask(case, positions, columns):
    this = case("gpt2")
    check(this, positions, None, columns)


@pytest.mark.parametrize(
    ("positions", "columns"),
    [
        (-1, [[4], [3]]),
        (0, [[2], [0]]),
        ([1, -2], [[3, 3], [1, 2]]),
        (slice(0, 2), [[2, 3], [0, 1]]),
        (torch.tensor([[0, 1], [3, 0]]), [[2, 3], [3, 0]]),
    ],
)
def test_positions_count_real_tokens_with_a_mask(case, positions, columns):
    check(case("gpt2"), positions, MASK, columns)


def check(this, positions, mask, columns):
    """Every function gives the columns that plain indexing gives."""
    rows, columns = torch.arange(2)[:, None], torch.tensor(columns)
    squeeze = (lambda value: value[:, 0]) if isinstance(positions, int) else (lambda value: value)
    wanted = {key: squeeze(value[rows, columns]) for key, value in this.cache.items() if len(value) == 2}
    options = {"positions": positions, "mask": mask, "names": this.table}
    parts = residual.decompose(this.cache, heads=True, **options)
    near(sum(parts.values()), wanted["blocks.2.resid_post"])
    every = residual.decompose(this.cache, heads=True, names=this.table)
    for key, part in parts.items():
        near(part, squeeze(every[key][rows, columns]))
    for key, value in residual.accumulated(this.cache, **options).items():
        assert torch.equal(value, wanted[key])
    heads = residual.head_results(this.cache, layers=1, **options)
    near(heads["blocks.1.attn.head.1"], parts["blocks.1.attn.head.1"])
    neurons = residual.neuron_results(this.cache, layers=1, neurons=[3], **options)
    assert neurons["blocks.1.mlp.neuron.3"].shape == parts["embed"].shape
    normed = residual.apply_norm(residual.Parts({"embed": parts["embed"]}), this.cache, **options)
    near(normed["embed"], residual.apply_norm(parts)["embed"])
    lens = residual.logit_lens(this.cache, **options)
    near(lens["blocks.2.resid_post"], squeeze(this.logits[rows, columns]))


def test_rows_without_such_a_position_are_refused(case):
    this = case("gpt2")
    with pytest.raises(SelectionError, match="need 4 real tokens, but rows 0"):
        residual.decompose(this.cache, positions=3, mask=MASK, names=this.table)
    with pytest.raises(
        ResidualError, match=r"positions=slice\(0, 4, None\) mean \[3, 4\] columns of the rows; ask for"
    ):
        residual.decompose(this.cache, positions=slice(0, 4), mask=MASK, names=this.table)
    with pytest.raises(ResidualError, match=r"the mask is \(2, 4\) and 'embed' is \(2, 5, 12\)"):
        residual.decompose(this.cache, positions=0, mask=MASK[:, :4], names=this.table)
    flat = this.cache.exclude("embed").apply(lambda value: value.flatten(0, 1))
    with pytest.raises(
        ResidualError, match=r"positions= selects columns of values .*'blocks.0.resid_pre' is \(10, 12\)"
    ):
        residual.decompose(flat, positions=0, names=this.table)


def test_values_of_another_layout_are_taken_apart_whole(case):
    this = case("gpt2")
    flat = this.cache.exclude("embed").apply(lambda value: value.flatten(0, 1))
    parts = residual.decompose(flat, neurons=True, names=this.table)
    near(sum(parts.values()), this.cache["blocks.2.resid_post"].flatten(0, 1))
