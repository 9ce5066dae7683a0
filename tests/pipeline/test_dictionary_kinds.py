"""Normalised dictionaries, transcoders, crosscoders: formulas vector by vector in float64, and their files."""

import json
import math
import statistics

import numpy as np
import pytest
import torch
from torch import nn

from tdcache import Splice
from tdcache.errors import StoreError
from tdcache.pipeline import Dictionary, DictionaryConfig, load_dictionary, save_dictionary
from tdcache.store.safetensors import write_tensors

D, N, OUT = 4, 7, 3


def weights(d_in=D, d_out=D, **more):
    torch.manual_seed(0)
    shapes = {"W_enc": (d_in, N), "b_enc": (N,), "W_dec": (N, d_out), "b_dec": (d_out,)} | more
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def by_hand(tensors, x, *, config, factor=1.0):
    """Latents and output of one vector: lists of numbers, one formula after the other."""
    t = {name: each.tolist() for name, each in tensors.items()}
    seen, shift, scale = [factor * value for value in x], 0.0, 1.0
    if config.normalize == "layer_norm":
        shift, scale = statistics.fmean(x), statistics.stdev(x)
        seen = [(value - shift) / (scale + 1e-5) for value in x]
    elif config.normalize == "constant_norm_rescale":
        scale = math.sqrt(sum(value**2 for value in x) / len(x))
        seen = [value / scale for value in x]
    if config.center:
        seen = [value - bias for value, bias in zip(seen, t["b_dec"], strict=True)]
    before = [sum(v * t["W_enc"][d][n] for d, v in enumerate(seen)) + t["b_enc"][n] for n in range(N)]
    norms = [math.sqrt(sum(value**2 for value in row)) if config.rescale_by_decoder_norm else 1.0 for row in t["W_dec"]]
    before = [value * norm for value, norm in zip(before, norms, strict=True)]
    best = sorted(range(N), key=lambda n: -before[n])[: config.k or N]
    least = t.get("threshold", [0.0] * N)
    latents = [max(value, 0.0) * (n in best and value > least[n]) for n, value in enumerate(before)]
    out = [sum(latents[n] / norms[n] * t["W_dec"][n][d] for n in range(N)) + bias for d, bias in enumerate(t["b_dec"])]
    if not config.transcodes:
        out = [(value * scale + shift) / factor for value in out]
    if "W_skip" in t:
        out = [
            value + sum(w * v for w, v in zip(row, x, strict=True)) for value, row in zip(out, t["W_skip"], strict=True)
        ]
    return latents, out


PLAIN = DictionaryConfig()
TRANSCODER = DictionaryConfig(center=False, transcodes=True)
KINDS = {
    "layer norm": (DictionaryConfig(normalize="layer_norm"), weights()),
    "layer norm, topk": (DictionaryConfig(normalize="layer_norm", architecture="topk", k=2), weights()),
    "constant norm": (DictionaryConfig(normalize="constant_norm_rescale"), weights()),
    "constant norm, not centred": (DictionaryConfig(normalize="constant_norm_rescale", center=False), weights()),
    "decoder norms": (DictionaryConfig(architecture="topk", k=3, rescale_by_decoder_norm=True), weights()),
    "transcoder": (TRANSCODER, weights(d_out=OUT)),
    "skip transcoder": (TRANSCODER, weights(d_out=OUT, W_skip=(OUT, D))),
    "normalised transcoder": (
        DictionaryConfig(center=False, transcodes=True, normalize="layer_norm"), weights(d_out=OUT),
    ),
    "jumprelu skip transcoder": (
        DictionaryConfig(architecture="jumprelu", center=False, transcodes=True),
        weights(d_out=OUT, W_skip=(OUT, D), threshold=(N,)),
    ),
    "topk with a skip connection": (DictionaryConfig(architecture="topk", k=3), weights(W_skip=(D, D))),
}  # fmt: skip
# Sums of some ten products in float64, in two orders.
CLOSE = {"atol": 1e-12, "rtol": 1e-12}


def assert_by_hand(dictionary, tensors, config, **options):
    x = torch.randn(2, 5, D, dtype=torch.float64)
    latents, out = dictionary.encode(x), dictionary(x)
    assert (latents.shape, out.shape) == ((2, 5, N), (2, 5, tensors["b_dec"].shape[0]))
    for at in ((0, 0), (0, 4), (1, 2)):
        want = by_hand(tensors, x[at].tolist(), config=config, **options)
        torch.testing.assert_close(latents[at].tolist(), want[0], **CLOSE)
        torch.testing.assert_close(out[at].tolist(), want[1], **CLOSE)


@pytest.mark.parametrize(("config", "tensors"), KINDS.values(), ids=KINDS)
def test_latents_and_outputs_are_the_formulas_number_by_number(config, tensors):
    assert_by_hand(Dictionary(tensors, config), tensors, config)


@pytest.mark.parametrize(("config", "tensors"), KINDS.values(), ids=KINDS)
def test_a_dictionary_comes_back_from_its_folder_as_it_was(config, tensors, tmp_path):
    made = Dictionary(tensors, config)
    save_dictionary(made, tmp_path)
    found, x = load_dictionary(tmp_path), torch.randn(3, D, dtype=torch.float64)
    assert found.config == config
    assert torch.equal(found(x), made(x))


def folder_with(path, settings, tensors, config="cfg.json"):
    (path / config).write_text(json.dumps(settings))
    write_tensors(tensors, path / "sae_weights.safetensors")
    return path


def test_the_topk_of_the_reference_training_is_read(tmp_path):
    config, tensors = KINDS["decoder norms"]
    settings = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True, "normalize_activations": "none"}
    found = load_dictionary(folder_with(tmp_path, settings, tensors))
    assert found.config == config
    assert_by_hand(found, tensors, config)


@pytest.mark.parametrize("off", [False, None, "none"])
def test_normalisation_that_is_off_is_none(off, tmp_path):
    found = load_dictionary(folder_with(tmp_path, {"normalize_activations": off}, weights()))
    assert found.config == PLAIN


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("transcoder", "transcoder"),
        ("skip_transcoder", "skip transcoder"),
        ("jumprelu_skip_transcoder", "jumprelu skip transcoder"),
    ],
)
def test_transcoders_are_read_by_their_names(architecture, kind, tmp_path):
    config, tensors = KINDS[kind]
    settings = {"architecture": architecture, "d_in": D, "d_out": OUT, "apply_b_dec_to_input": False}
    found = load_dictionary(folder_with(tmp_path, settings, tensors))
    assert found.config == config
    assert_by_hand(found, tensors, config)


def test_a_skip_connection_of_the_layout_with_a_linear_encoder_is_read(tmp_path):
    tensors = weights(W_skip=(D, D))
    other = {"encoder.weight": tensors["W_enc"].T, "encoder.bias": tensors["b_enc"]}
    other |= {name: tensors[name] for name in ("W_dec", "b_dec", "W_skip")}
    settings = {"activation": "topk", "k": 3, "transcode": True, "skip_connection": True}
    found = load_dictionary(folder_with(tmp_path, settings, other))
    assert_by_hand(found, tensors, DictionaryConfig(architecture="topk", k=3, center=False, transcodes=True))


@pytest.mark.parametrize("saved", [True, False], ids=["saved beside", "given"])
def test_an_average_norm_becomes_part_of_the_weights(saved, tmp_path):
    tensors, factor = weights(), 0.25
    folder_with(tmp_path, {"normalize_activations": "expected_average_only_in"}, tensors)
    if saved:
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    found = load_dictionary(tmp_path, **({} if saved else {"norm_scaling_factor": factor}))
    assert_by_hand(found, tensors, PLAIN, factor=factor)


def test_a_factor_for_something_else_is_refused(tmp_path):
    folder_with(tmp_path, {"normalize_activations": "layer_norm"}, weights())
    with pytest.raises(
        StoreError, match=r"norm_scaling_factor=2 is for normalize_activations='expected_average_only_in'"
    ):
        load_dictionary(tmp_path, norm_scaling_factor=2)


def test_an_archive_of_arrays_is_a_jumprelu_dictionary(tmp_path):
    tensors = weights(threshold=(N,))
    np.savez(tmp_path / "params.npz", **{name: each.numpy() for name, each in tensors.items()})
    found = load_dictionary(tmp_path)
    assert found.config == DictionaryConfig(architecture="jumprelu", center=False)
    assert_by_hand(found, tensors, found.config)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_damaged_archive_is_named(content, tmp_path):
    (tmp_path / "params.npz").write_bytes(content)
    with pytest.raises(StoreError, match=r"params\.npz is no archive of arrays"):
        load_dictionary(tmp_path)


def test_an_archive_of_objects_is_not_unpickled(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.array([print], dtype=object))
    with pytest.raises(StoreError, match=r"params\.npz is no archive of arrays: Object arrays cannot be loaded"):
        load_dictionary(tmp_path)


def test_a_crosscoder_shares_its_latents_among_layers(tmp_path):
    torch.manual_seed(0)
    shapes = {"W_enc": (2, D, N), "b_enc": (N,), "W_dec": (N, 2, D), "b_dec": (2, D)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    made, x = Dictionary(tensors, DictionaryConfig(center=False)), torch.randn(5, 2, D, dtype=torch.float64)
    latents = (sum(x[:, layer] @ tensors["W_enc"][layer] for layer in range(2)) + tensors["b_enc"]).relu()
    torch.testing.assert_close(made.encode(x).detach(), latents, **CLOSE)
    for layer in range(2):
        want = latents @ tensors["W_dec"][:, layer] + tensors["b_dec"][layer]
        torch.testing.assert_close(made(x)[:, layer].detach(), want, **CLOSE)
    save_dictionary(made, tmp_path)
    assert torch.equal(load_dictionary(tmp_path)(x), made(x))
    folder_with(tmp_path, {"d_in": D, "dict_size": N}, tensors)  # others' files do not say whether they centre
    assert load_dictionary(tmp_path).config == made.config
    assert repr(made) == (
        "Dictionary(layers=2, d_in=4, latents=7, DictionaryConfig(architecture='relu', center=False))"
    )


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"normalize": "batch_norm"}, r"normalize is one of 'none', 'layer_norm', 'constant_norm_rescale', got 'batch"),
        ({"rescale_by_decoder_norm": True}, r"rescale_by_decoder_norm is for 'topk', got DictionaryConfig\("),
        ({"transcodes": True}, r"a transcoder subtracts no decoder's bias from its input: center=False, got"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        DictionaryConfig(**options)


def test_a_skip_connection_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"tensor 'W_skip' of a dictionary has shape \(4, 3\), expected \(3, 4\)"):
        Dictionary(weights(d_out=OUT, W_skip=(D, OUT)), TRANSCODER)


def test_decoding_alone_says_when_it_needs_the_input():
    dictionary = Dictionary(*reversed(KINDS["layer norm"]))
    with pytest.raises(ValueError, match=r"output depends on its input .*: decode with decode\(latents, source\), or"):
        dictionary.decode(torch.zeros(N))


@pytest.mark.parametrize("kind", ["layer norm", "constant norm", "decoder norms", "topk with a skip connection"])
def test_a_splice_decodes_with_the_value_it_encoded(kind):
    config, tensors = KINDS[kind]
    dictionary, model = Dictionary(tensors, config), nn.Linear(D, D, dtype=torch.float64)
    x = torch.randn(3, D, dtype=torch.float64)
    plain = model(x)
    with Splice("", dictionary).prepare(model):
        assert torch.equal(model(x), plain)
    with Splice("", dictionary, add_error=False).prepare(model):
        torch.testing.assert_close(model(x), dictionary(plain), **CLOSE)
