"""Sparse dictionaries: formulas by a loop in float64, files of three layouts, and files that must be refused."""

import json
import math

import pytest
import torch

from tdcache import Splice
from tdcache.errors import DamagedError, StoreError
from tdcache.pipeline import Dictionary, DictionaryConfig, load_dictionary, save_dictionary
from tdcache.store.safetensors import read_tensors, write_tensors

D, N = 4, 7
KINDS = {
    "relu": DictionaryConfig(),
    "relu, not centred": DictionaryConfig(center=False),
    "topk": DictionaryConfig(architecture="topk", k=3),
    "topk of more than there are": DictionaryConfig(architecture="topk", k=20),
    "jumprelu": DictionaryConfig(architecture="jumprelu"),
    "gated": DictionaryConfig(architecture="gated", center=False),
}


def tensors_of(architecture, dtype=torch.float64):
    names = {
        "relu": ["b_enc"],
        "topk": ["b_enc"],
        "jumprelu": ["b_enc", "threshold"],
        "gated": ["b_gate", "r_mag", "b_mag"],
    }[architecture]
    tensors = {name: torch.randn(N, dtype=dtype) for name in names}
    if architecture == "jumprelu":
        tensors["threshold"] = tensors["threshold"].abs()
    return tensors | {
        "W_enc": torch.randn(D, N, dtype=dtype),
        "W_dec": torch.randn(N, D, dtype=dtype),
        "b_dec": torch.randn(D, dtype=dtype),
    }


def latents_by_hand(tensors, config, x):
    """Latents of one vector, number by number."""
    t = {name: tensor.tolist() for name, tensor in tensors.items()}
    v = [value - b * config.center for value, b in zip(x.tolist(), t["b_dec"], strict=True)]
    products = [sum(v[d] * t["W_enc"][d][n] for d in range(D)) for n in range(N)]
    if config.architecture == "gated":
        return [
            max(p * math.exp(t["r_mag"][n]) + t["b_mag"][n], 0) * (p + t["b_gate"][n] > 0)
            for n, p in enumerate(products)
        ]
    before = [p + t["b_enc"][n] for n, p in enumerate(products)]
    if config.architecture == "jumprelu":
        return [max(p, 0) * (p > t["threshold"][n]) for n, p in enumerate(before)]
    best = sorted(range(N), key=lambda n: -before[n])[: config.k]
    return [max(p, 0) * (n in best) for n, p in enumerate(before)]


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_latents_and_reconstructions_are_the_formulas_number_by_number(config):
    tensors = tensors_of(config.architecture)
    dictionary, x = Dictionary(tensors, config), torch.randn(2, 5, D, dtype=torch.float64)
    latents = dictionary.encode(x)
    assert latents.shape == (2, 5, N)
    for row, position in ((0, 0), (0, 4), (1, 2)):
        want = torch.tensor(latents_by_hand(tensors, config, x[row, position]), dtype=torch.float64)
        torch.testing.assert_close(latents[row, position].detach(), want, atol=1e-12, rtol=0)
    torch.testing.assert_close(dictionary(x), latents @ tensors["W_dec"] + tensors["b_dec"])


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
def test_a_dictionary_comes_back_from_its_folder_as_it_was(config, tmp_path):
    made = Dictionary(tensors_of(config.architecture, torch.float32), config)
    save_dictionary(made, tmp_path / "new" / "folder")
    found = load_dictionary(str(tmp_path / "new" / "folder"))
    assert found.config == config
    assert found.state_dict().keys() == made.state_dict().keys()
    for name, tensor in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    x = torch.randn(3, D)
    assert torch.equal(found(x), made(x))


def written(folder, settings, tensors, config="cfg.json", weights="sae_weights.safetensors"):
    (folder / config).write_text(settings if isinstance(settings, str) else json.dumps(settings))
    if tensors is not None:
        write_tensors(tensors, folder / weights)
    return folder


def test_files_of_the_reference_implementation_are_read(tmp_path):
    from safetensors.torch import save_file

    tensors = tensors_of("jumprelu", torch.bfloat16)
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text('{"architecture": "jumprelu", "apply_b_dec_to_input": false, "d_in": 4}')
    found = load_dictionary(tmp_path)
    assert found.config == DictionaryConfig(architecture="jumprelu", center=False)
    assert torch.equal(found.threshold, tensors["threshold"])


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({}, DictionaryConfig()),
        ({"architecture": "standard", "normalize_activations": "none", "meta": {}}, DictionaryConfig()),
        ({"activation_fn_str": "relu", "finetuning_scaling_factor": False}, DictionaryConfig()),
        ({"architecture": "standard", "activation_fn": "topk", "activation_fn_kwargs": {"k": 2}}, KINDS["topk"]),
        ({"architecture": "topk", "activation_fn_str": "topk", "k": 3, "apply_b_dec_to_input": False}, KINDS["topk"]),
    ],
)
def test_settings_of_another_library_mean_the_same_here(settings, config, tmp_path):
    found = load_dictionary(written(tmp_path, settings, tensors_of("relu")))
    assert found.config.architecture == config.architecture
    assert found.config.k == (settings.get("k") or (settings.get("activation_fn_kwargs") or {}).get("k"))
    assert found.config.center == settings.get("apply_b_dec_to_input", True)


def test_the_layout_with_a_linear_encoder_is_read(tmp_path):
    tensors = tensors_of("topk")
    other = {"encoder.weight": tensors["W_enc"].T, "encoder.bias": tensors["b_enc"]}
    other |= {name: tensors[name] for name in ("W_dec", "b_dec")}
    settings = {"activation": "topk", "k": 3, "expansion_factor": 2, "transcode": True, "signed": False, "d_in": D}
    found = load_dictionary(written(tmp_path, settings, other, "config.json", "sae.safetensors"))
    assert found.config == DictionaryConfig(architecture="topk", k=3, center=False, transcodes=True)
    assert torch.equal(found.W_enc, tensors["W_enc"])


def test_an_older_file_of_the_layout_with_a_linear_encoder_names_no_activation(tmp_path):
    tensors = {name: each.clone() for name, each in tensors_of("topk").items()}
    want = Dictionary(tensors, DictionaryConfig(architecture="topk", k=3))
    theirs = {"encoder.weight": tensors["W_enc"].mT.contiguous(), "encoder.bias": tensors["b_enc"]}
    theirs |= {name: tensors[name] for name in ("W_dec", "b_dec")}
    settings = {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": 3, "signed": False, "d_in": D}
    written(tmp_path, settings, theirs, weights="sae.safetensors")
    found = load_dictionary(tmp_path)
    x = torch.randn(5, D, dtype=torch.float64)
    assert found.config == want.config
    assert torch.equal(found(x), want(x))


def test_a_file_of_statistics_beside_the_weights_is_no_trouble(tmp_path):
    written(tmp_path, {}, tensors_of("relu"))
    write_tensors({"sparsity": torch.ones(N)}, tmp_path / "sparsity.safetensors")
    assert load_dictionary(tmp_path).config == DictionaryConfig()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            {"architecture": "matryoshka"},
            "architecture is one of 'relu', 'topk', 'jumprelu', 'gated', got 'matryoshka'",
        ),
        ({"architecture": ["relu"]}, r"got \['relu'\]"),
        ({"activation": "groupmax"}, "got 'groupmax'"),
        ({"activation_fn": "tanh-relu"}, "got 'tanh-relu'"),
        (
            {"architecture": "jumprelu", "activation_fn": "tanh-relu"},
            "'tanh-relu', which is not implemented for 'jumprelu'",
        ),
        (
            {"normalize_activations": "covariance_whitening"},
            "made with normalize_activations='covariance_whitening', which is not implemented",
        ),
        ({"normalize_activations": True}, "made with normalize_activations=True, which is not implemented"),
        ({"normalize_activations": "expected_average_only_in"}, "tells the factor; give norm_scaling_factor="),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_by_decoder_norm is for 'topk'"),
        ({"skip_connection": True}, "made with skip_connection=True and lacks 'W_skip'"),
        ({"finetuning_scaling_factor": True}, "made with finetuning_scaling_factor=True, which is not implemented"),
        ({"architecture": "transcoder", "apply_b_dec_to_input": True}, "a transcoder subtracts no decoder's bias"),
        ({"architecture": "topk"}, "k is a number from 1 for 'topk'"),
        ({"architecture": "topk", "k": 0}, "k is a number from 1"),
        ({"architecture": "standard", "k": 3}, "k is a number from 1 for 'topk', and None for all others; got"),
        ({"architecture": "topk", "k": "3"}, "k is a number from 1"),
        ({"architecture": "topk", "activation_fn_kwargs": [3]}, "k is a number from 1"),
        ("[1]", "is no JSON config: a list instead of an object"),
        ("{", "is no JSON config"),
        ("[" * 100_000, "is no JSON config"),
        (" " * (1 << 24) + "{}", "longer than 16777216 bytes"),
    ],
    ids=lambda each: str(each)[:40],
)
def test_a_config_that_cannot_be_carried_out_is_refused(settings, complaint, tmp_path):
    with pytest.raises(StoreError, match=complaint) as failure:
        load_dictionary(written(tmp_path, settings, tensors_of("relu")))
    assert failure.value.path in (tmp_path, tmp_path / "cfg.json")


def without(name, tensors):
    return {each: tensor for each, tensor in tensors.items() if each != name}


@pytest.mark.parametrize(
    ("architecture", "change", "complaint"),
    [
        ("relu", lambda t: without("W_dec", t), "this one lacks 'W_dec'"),
        ("jumprelu", lambda t: without("threshold", t), "lacks 'threshold'"),
        ("relu", lambda t: t | {"scaling_factor": torch.ones(N)}, "does not use 'scaling_factor'"),
        (
            "relu",
            lambda t: t | {"b_enc": torch.ones(N - 1)},
            r"'b_enc' of a dictionary has shape \(6,\), expected \(7\)",
        ),
        (
            "relu",
            lambda t: t | {"W_dec": t["W_dec"].T},
            r"'W_dec' of a dictionary has shape \(4, 7\), expected \(7, 4\)",
        ),
        ("relu", lambda t: t | {"W_enc": torch.ones(3)}, r"'W_enc' of a dictionary has shape \(3,\)"),
        ("relu", lambda t: t | {"W_enc": torch.ones(())}, r"'W_enc' of a dictionary has shape \(\)"),
        ("gated", lambda t: t | {"r_mag": torch.ones(N, dtype=torch.long)}, "is torch.int64, expected floating point"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_made_and_loaded(architecture, change, complaint, tmp_path):
    tensors = change(tensors_of(architecture))
    with pytest.raises(ValueError, match=complaint):
        Dictionary(tensors, DictionaryConfig(architecture=architecture))
    with pytest.raises(StoreError, match=complaint):
        load_dictionary(written(tmp_path, {"architecture": architecture}, tensors))


def test_a_k_for_something_else_is_refused():
    with pytest.raises(ValueError, match="k is a number from 1 for 'topk', and None for all others"):
        DictionaryConfig(k=3)


def test_missing_doubled_and_damaged_files_are_named(tmp_path):
    with pytest.raises(StoreError, match=r"holds one cfg\.json or config\.json; in .* there is none"):
        load_dictionary(tmp_path)
    written(tmp_path, {}, None)
    with pytest.raises(StoreError, match=r"holds one \*\.safetensors; in .* there is none"):
        load_dictionary(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DamagedError):
        load_dictionary(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"there is 'a\.safetensors', 'b\.safetensors'"):
        load_dictionary(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoreError, match=r"there is 'cfg\.json', 'config\.json'"):
        load_dictionary(tmp_path)


def test_values_of_another_dtype_are_cast_there_and_back_in_a_splice():
    dictionary = Dictionary(tensors_of("topk", torch.float32), KINDS["topk"])
    model = torch.nn.Linear(3, D).to(torch.bfloat16)
    x = torch.randn(5, 3, dtype=torch.bfloat16)
    want = model(x)
    with Splice("", dictionary).prepare(model):
        assert torch.equal(model(x), want)
    with Splice("", dictionary, add_error=False).prepare(model):
        assert torch.equal(model(x), dictionary(want.float()).to(torch.bfloat16))


def test_gradients_pass_the_chosen_latents_only():
    tensors = tensors_of("topk")
    dictionary, x = Dictionary(tensors, KINDS["topk"]), torch.randn(D, dtype=torch.float64, requires_grad=True)
    dictionary.encode(x).sum().backward()
    chosen = dictionary.encode(x).detach() > 0
    torch.testing.assert_close(x.grad, tensors["W_enc"][:, chosen].sum(1))


def test_the_repr_has_sizes_and_settings():
    dictionary = Dictionary(tensors_of("topk"), KINDS["topk"])
    assert repr(dictionary) == "Dictionary(d_in=4, latents=7, DictionaryConfig(architecture='topk', k=3))"


def test_what_is_written_is_what_the_reference_implementation_reads(tmp_path):
    from safetensors.torch import load_file

    made = Dictionary(tensors_of("gated"), KINDS["gated"])
    save_dictionary(made, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "gated"
    found = load_file(tmp_path / "sae_weights.safetensors")
    assert found.keys() == read_tensors(tmp_path / "sae_weights.safetensors").keys() == made.state_dict().keys()
    assert torch.equal(found["r_mag"], made.r_mag)
