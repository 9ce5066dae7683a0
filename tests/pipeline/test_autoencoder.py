"""The autoencoder as hooks: the truth table, the identities in float64, edits at each place, two layers."""

from copy import deepcopy

import pytest
import torch

from pipeline.written_out import Save, Written, sparse_pair
from tdcache.errors import EditError, HookSignatureError
from tdcache.pipeline import AtLayers, AtRows, Autoencoder, AutoencoderHooks, TransformerHooks
from tdcache.pipeline.autoencoder import as_autoencoder

WIDTH, LATENTS = 6, 15
EXACT = {"atol": 1e-10, "rtol": 0}  # float64 sums of some ten terms of order one


@pytest.fixture
def pair():
    return sparse_pair(WIDTH, LATENTS)


@pytest.fixture
def x():
    return torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)


def ablated(latents):
    edited = latents.clone()
    edited[..., 4] = 0
    return edited


def ablate_in_place(latents):
    latents[..., 4] = 0
    return latents


@pytest.mark.parametrize("ablate", [ablated, ablate_in_place], ids=["a copy", "in place"])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("edited", [True, False])
@pytest.mark.parametrize("add_error", [True, False])
def test_ablating_a_latent_with_and_without_the_error_term(pair, x, add_error, edited, graph, ablate):
    encode, decode, *_ = pair
    hooks = AutoencoderHooks(encode, decode, add_error=add_error)
    if edited:
        hooks.latents.append_fwd(ablate)
    with torch.set_grad_enabled(graph):
        got = hooks(x).detach()
    plain, kept = decode(encode(x)).detach(), decode(ablated(encode(x))).detach()
    want = {
        (False, False): plain,
        (False, True): kept,
        (True, False): x.detach(),
        (True, True): x.detach() + kept - plain,
    }[add_error, edited]
    torch.testing.assert_close(got, want, **EXACT)
    if add_error and not edited:
        assert got.view(torch.int64).equal(x.detach().view(torch.int64))  # to the last bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_identity_is_exact_to_the_last_bit_in_value_and_gradient(dtype):
    encode, decode, *_ = sparse_pair(WIDTH, LATENTS, dtype)
    x = (1e3 * torch.randn(50, WIDTH)).to(dtype)
    x[0, 0] = -0.0
    x.requires_grad_()
    seed = torch.randn(50, WIDTH).to(dtype)
    y = AutoencoderHooks(encode, decode, add_error=True)(x)
    y.backward(seed)
    assert torch.equal(y, x)
    assert torch.equal(torch.signbit(y), torch.signbit(x))
    assert torch.equal(x.grad, seed)


def test_latents_get_the_decoder_transpose_of_the_output_gradient(pair, x):
    encode, decode, _, down = pair
    seed = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    for add_error in (True, False):
        latents, reconstruction, error = Save(), Save(), Save()
        hooks = AutoencoderHooks(encode, decode, add_error=add_error)
        hooks.latents.append_bwd(latents)
        hooks.reconstruction.append_bwd(reconstruction)
        if add_error:
            hooks.error.append_bwd(error)
        hooks(x).backward(seed)
        torch.testing.assert_close(latents.seen[None], seed @ down.T, **EXACT)
        torch.testing.assert_close(reconstruction.seen[None], seed, **EXACT)
        if add_error:
            torch.testing.assert_close(error.seen[None], seed, **EXACT)


def test_without_the_error_term_the_gradient_is_that_of_the_reconstruction(pair, x):
    encode, decode, *_ = pair
    AutoencoderHooks(encode, decode)(x).pow(2).sum().backward()
    (want,) = torch.autograd.grad(decode(encode(x)).pow(2).sum(), x)
    torch.testing.assert_close(x.grad, want, **EXACT)


@pytest.mark.parametrize("place", ["latents", "reconstruction", "error"])
def test_gradients_of_edited_values_equal_the_formula_with_a_detached_copy_of_nothing(pair, x, place):
    encode, decode, *_ = pair
    edit = lambda value: 2 * value.sin()  # noqa: E731
    hooks = AutoencoderHooks(encode, decode, add_error=True)
    getattr(hooks, place).append_fwd(edit)
    y = hooks(x)
    z = encode(x)
    r, e = decode(edit(z) if place == "latents" else z), x - decode(z)
    want = (edit(r) if place == "reconstruction" else r) + (edit(e) if place == "error" else e)
    torch.testing.assert_close(y, want, **EXACT)
    seed = torch.randn_like(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, seed)[0], torch.autograd.grad(want, x, seed)[0], **EXACT)


def test_the_places_carry_latents_reconstruction_and_error(pair, x):
    encode, decode, *_ = pair
    for add_error in (True, False):
        hooks = AutoencoderHooks(encode, decode, add_error=add_error)
        seen = {name: Save() for name in ("latents", "reconstruction", "error")}
        for name, save in seen.items():
            getattr(hooks, name).append_fwd(save)
        hooks(x)
        assert torch.equal(seen["latents"].seen[None], encode(x))
        assert torch.equal(seen["reconstruction"].seen[None], decode(encode(x)))
        assert torch.equal(seen["error"].seen[None], x - decode(encode(x)))


def test_a_batch_equals_its_rows_one_by_one(pair, x):
    encode, decode, *_ = pair

    def gradient(rows, value):
        value = value.detach().requires_grad_()
        hooks = AutoencoderHooks(encode, decode, add_error=True)
        for row in rows:
            hooks.latents.append_fwd(AtRows(row if len(rows) > 1 else 0, lambda z, row=row: z * (row + 2)))
        y = hooks(value)
        y.pow(2).sum().backward()
        return y.detach(), value.grad

    together = gradient([0, 1], x)
    for row in (0, 1):
        alone = gradient([row], x[row : row + 1])
        for one, all_rows in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_rows[row], **EXACT)


def test_a_basis_that_gives_views_of_its_input_is_safe_from_edits_in_place(x):
    for add_error in (True, False):
        hooks = AutoencoderHooks(lambda x: x.view(2, 3, 2, 3), lambda z: z.reshape(2, 3, 6), add_error=add_error)
        hooks.latents.append_fwd(lambda z: z.zero_())
        with torch.no_grad():
            before = x.clone()
            assert not hooks(x).any()
            assert torch.equal(x, before)


def test_dictionaries_at_two_layers_with_gradients_through_both():
    model, ids = Written().double(), torch.randint(11, (2, 5))
    pairs = {layer: sparse_pair(12, 20) for layer in (0, 2)}
    grads, latents = {}, {}
    hooks = TransformerHooks()
    for layer, (encode, decode, *_) in pairs.items():
        inner = AutoencoderHooks(encode, decode, add_error=True)
        inner.latents.append_fwd(lambda z, layer: latents.update({layer: z}))
        inner.latents.append_bwd(lambda grad, layer: grads.update({layer: grad}))
        hooks.append_to_path("mlp.post_act.fwd", AtLayers(layer, inner))
    want = model(ids)
    assert torch.equal(model(ids, hooks), want)
    assert list(latents) == [0, 2]
    latents[2][..., 0].sum().backward(retain_graph=True)  # from a latent of the upper to those of the lower
    assert list(grads) == [0]
    moved = 1e-6 * torch.randn_like(latents[0])
    predicted = (grads[0] * moved).sum().item()
    before = latents[2][..., 0].sum().item()
    pushed = deepcopy(hooks)
    pushed.mlp.post_act.fwd[0][0].latents.append_fwd(lambda z: z + moved)
    model(ids, pushed)
    assert abs(latents[2][..., 0].sum().item() - before - predicted) < 1e-3 * abs(predicted)  # second-order terms


def test_the_latents_lead_back_to_the_model():
    for add_error in (True, False):
        model, ids, live = Written(), torch.randint(11, (2, 5)), []
        encode, decode, *_ = sparse_pair(12, 20, torch.float32)
        inner = AutoencoderHooks(encode, decode, add_error=add_error)
        inner.latents.append_fwd(live.append)
        model(ids, TransformerHooks().append_to_path("mlp.post_act.fwd", AtLayers(1, inner)))
        live[0][:, 0].sum().backward()
        assert model.blocks[0].up.weight.grad.any()
        assert model.blocks[2].up.weight.grad is None


def test_an_error_that_is_edited_and_not_added_is_refused(pair, x):
    encode, decode, *_ = pair
    for edit in (lambda e: 0 * e, lambda e: e.zero_()):
        hooks = AutoencoderHooks(encode, decode)
        hooks.error.append_fwd(edit)
        with pytest.raises(EditError, match="no part of the output; use add_error=True"):
            hooks(x.detach())


def test_encoders_and_decoders_that_do_not_fit_are_named(x):
    def pair_of(x):
        return x, x

    with pytest.raises(EditError, match=r"encode\(\) must return a tensor of latents, got tuple from pair_of"):
        AutoencoderHooks(pair_of, lambda z: z)(x)
    with pytest.raises(
        EditError, match=r"of shape \(2, 3, 6\), got shape \(2, 3, 5\) from latents of shape \(2, 3, 6\)"
    ):
        AutoencoderHooks(lambda x: x, lambda z: z[..., :5])(x)
    with pytest.raises(EditError, match="got list from latents"):
        AutoencoderHooks(lambda x: x, lambda z: [z], add_error=True)(x)


def test_the_output_keeps_its_dtype(x):
    encode, decode, *_ = sparse_pair(WIDTH, LATENTS, torch.float32)
    for add_error in (True, False):
        hooks = AutoencoderHooks(lambda x: encode(x.float()), decode, add_error=add_error)
        assert hooks(x).dtype == torch.float64


def test_anything_with_encode_and_decode_is_an_autoencoder():
    both = Autoencoder(torch.relu, torch.neg)
    assert as_autoencoder(both) is both
    assert as_autoencoder((torch.relu, torch.neg)) == as_autoencoder([torch.relu, torch.neg]) == both
    for wrong in (torch.relu, (1, 2), "ab"):
        with pytest.raises(
            HookSignatureError, match=r"an object with encode\(\) and decode\(\), or a pair of functions"
        ):
            as_autoencoder(wrong)


def test_an_autoencoder_is_never_empty_and_shows_its_pair():
    hooks = AutoencoderHooks(torch.relu, torch.neg)
    assert not hooks.is_empty()
    assert hooks.latents.is_empty()
    assert repr(hooks) == "AutoencoderHooks(encode=relu, decode=neg, add_error=False)"
