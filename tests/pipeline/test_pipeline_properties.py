"""Properties over random pipelines, masks and autoencoders."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.written_out import sparse_pair
from tdcache.pipeline import AutoencoderHooks, ConditionalHooks, FwdBwdHooks, Hooks, Positions, Rows, When

FUNCTIONS = (torch.sin, torch.neg, lambda x: 2 * x, lambda x: x + 1, lambda x: None, lambda x: x * x)
indices = st.lists(st.sampled_from(range(len(FUNCTIONS))), max_size=5)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


def composed(chosen, x):
    for index in chosen:
        new = FUNCTIONS[index](x)
        x = x if new is None else new
    return x


@given(st.lists(indices, max_size=4))
def test_sequences_of_sequences_are_the_composition_of_their_hooks(groups):
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)
    nested = Hooks(*(Hooks(*(FUNCTIONS[index] for index in group)) for group in groups))
    assert torch.equal(nested(x), composed([index for group in groups for index in group], x))


@given(indices, indices, indices)
def test_a_place_composes_fwd_and_fwd2_and_sends_the_gradient_through_bwd_in_order(first, back, second):
    place = FwdBwdHooks()
    for part, chosen in (("fwd", first), ("bwd", back), ("fwd2", second)):
        for index in chosen:
            place.at(part).append(FUNCTIONS[index])
    x = torch.linspace(-1, 1, 5, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad((place(x) * 3).sum(), x)

    inner = composed(first, x)
    middle = inner.detach().requires_grad_()
    (grad,) = torch.autograd.grad((composed(second, middle) * 3).sum(), middle)
    (want,) = torch.autograd.grad(inner, x, composed(back, grad))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@given(sizes, st.data())
def test_a_mask_of_any_shape_edits_what_it_marks_and_shows_the_hooks_no_more(size, data):
    rows, positions, width = size
    marked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows * positions, max_size=rows * positions)))
    mask, x, seen = marked.view(rows, positions), torch.randn(size), []
    got = ConditionalHooks(When(lambda x: mask), seen.append, lambda part: part + 10)(x)
    assert torch.equal(got, torch.where(mask[..., None], x + 10, x))
    assert sum(part.numel() for part in seen) == mask.sum() * width


@given(sizes, st.data())
def test_rows_and_positions_combine_as_sets_do(size, data):
    rows, positions, _ = size
    row = data.draw(st.lists(st.integers(-rows, rows - 1), max_size=3))
    position = data.draw(st.lists(st.integers(-positions, positions - 1), max_size=3))
    x = torch.randn(size)
    in_row, in_position = torch.zeros(rows, 1, dtype=torch.bool), torch.zeros(1, positions, dtype=torch.bool)
    in_row[row], in_position[:, position] = True, True
    for condition, mask in (
        (Rows(*row) & Positions(*position), in_row & in_position),
        (Rows(*row) | Positions(*position), in_row | in_position),
        (~Rows(*row) | ~Positions(*position), ~(in_row & in_position)),
    ):
        want = torch.where(mask.expand(rows, positions)[..., None], -x, x)
        assert torch.equal(ConditionalHooks(condition, torch.neg)(x), want)


@settings(max_examples=50)
@given(st.integers(1, 8), st.integers(1, 20), st.floats(1e-4, 1e4), st.integers(0, 100))
def test_the_error_term_makes_any_pair_an_identity_and_any_edit_the_decoded_change(width, latents, scale, seed):
    torch.manual_seed(seed)
    encode, decode, _, down = sparse_pair(width, latents)
    x = (scale * torch.randn(3, width, dtype=torch.float64)).requires_grad_()
    g = torch.randn_like(x)
    hooks = AutoencoderHooks(encode, decode, add_error=True)
    y = hooks(x)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], g)
    shift = torch.randn(3, latents, dtype=torch.float64)
    hooks.latents.append_fwd(lambda z: z + shift)
    size = x.detach().abs().max() + (encode(x) @ down).detach().abs().max() + 1
    torch.testing.assert_close((hooks(x) - x).detach() / size, (shift @ down) / size, atol=1e-10, rtol=0)
