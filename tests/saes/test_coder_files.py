"""The field's file formats, laid out here by hand as their libraries lay them out."""

import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from strangers import make_sparsify
from test_coders import KINDS, inputs, random_coder

from mi_helpers import files as durable
from mi_helpers.files import RunError, read_json, write_json
from mi_helpers.layouts import ModelError
from mi_helpers.saes import hub as coder_hub
from mi_helpers.saes.coder import ACTIVATIONS, SparseCoder
from mi_helpers.saes.files import load_coder, save_coder

X = inputs(40)


def parts(d_in=6, d_latent=20, d_out=6, seed=0) -> dict[str, torch.Tensor]:
    """Random tensors, named and shaped as SAELens and Gemma Scope 1 have them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "W_enc": (d_in, d_latent),
        "b_enc": (d_latent,),
        "W_dec": (d_latent, d_out),
        "b_dec": (d_out,),
        "threshold": (d_latent,),
        "W_skip": (d_out, d_in),
    }
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    tensors["threshold"] = tensors["threshold"].abs()
    return tensors


def jump(p, x=X, skip=False):
    """A JumpReLU coder that does not subtract b_dec, in one line."""
    pre = x @ p["W_enc"] + p["b_enc"]
    f = pre.relu() * (pre > p["threshold"])
    return f @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if skip else 0)


def topk(p, k, x=X, subtract=True, skip=False):
    pre = (x - p["b_dec"] * subtract) @ p["W_enc"] + p["b_enc"]
    top = pre.topk(k)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    return f @ p["W_dec"] + p["b_dec"] + (x @ p["W_skip"].T if skip else 0)


def without(p, *names):
    return {name: tensor for name, tensor in p.items() if name not in names}


def contiguous(p):
    return {name: tensor.contiguous() for name, tensor in p.items()}


def same(coder, expected):
    assert torch.allclose(coder(X), expected, atol=1e-4)
    return coder


# ------------------------------------------------------------------------ SAELens' layout


@pytest.mark.parametrize(("activation", "d_out", "skip"), KINDS)
def test_what_is_saved_is_what_is_loaded(tmp_path, activation, d_out, skip):
    coder = random_coder(activation, d_out, skip)
    coder.scale_in.fill_(0.5)
    coder.scale_out.fill_(0.5 if d_out is None else 4.0)
    again = load_coder(save_coder(coder, tmp_path / "coder", hook_name="blocks.3.hook_resid_post"))
    assert torch.allclose(again(X), coder(X), atol=1e-5)
    assert again.scale_in == again.scale_out == 1
    assert (again.transcoder, again.skip) == (coder.transcoder, coder.skip)
    assert again.activation == ("jumprelu" if activation == "batchtopk" else activation)
    assert again.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert sorted(p.name for p in (tmp_path / "coder").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_saving_twice_gives_the_same_bytes(tmp_path):
    coder = random_coder()
    save_coder(coder, tmp_path / "a")
    save_coder(load_coder(tmp_path / "a"), tmp_path / "b")
    for name in ("sae_weights.safetensors",):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("activation", "d_out", "skip", "architecture"),
    [
        ("relu", None, False, "standard"),
        ("topk", None, False, "topk"),
        ("jumprelu", None, False, "jumprelu"),
        ("batchtopk", None, False, "jumprelu"),
        ("relu", 6, False, "transcoder"),
        ("relu", 6, True, "skip_transcoder"),
        ("jumprelu", 4, False, "jumprelu_transcoder"),
        ("jumprelu", 4, True, "jumprelu_skip_transcoder"),
        ("topk", 4, True, "topk_skip_transcoder"),
    ],
)
def test_the_layout_is_saelens(tmp_path, activation, d_out, skip, architecture):
    """Names, shapes and settings as SAELens 6.54.12 has them."""
    save_coder(random_coder(activation, d_out, skip), tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    assert config["architecture"] == architecture
    assert (config["d_in"], config["d_sae"]) == (6, 20)
    assert config["apply_b_dec_to_input"] is (d_out is None)
    assert config["normalize_activations"] == "none"
    assert int(config["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert config.get("d_out") == d_out
    assert config.get("k") == (3 if activation == "topk" else None)
    expected = {"W_enc": (6, 20), "b_enc": (20,), "W_dec": (20, d_out or 6), "b_dec": (d_out or 6,)}
    if activation in ("jumprelu", "batchtopk"):
        expected["threshold"] = (20,)
    if skip:
        expected["W_skip"] = (d_out, 6)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected


def sae_lens_folder(folder: Path, tensors, **config) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(contiguous(tensors), folder / "sae_weights.safetensors")
    base = {"d_in": 6, "d_sae": 20, "dtype": "float32", "metadata": {"sae_lens_version": "6.54.12"}}
    (folder / "cfg.json").write_text(json.dumps(base | config))
    return folder


def test_a_saelens_topk_sae_whose_latents_are_scaled_by_decoder_norms(tmp_path):
    """SAELens selects by pre · ‖W_dec row‖ and divides by the norm again when it decodes."""
    p = without(parts(), "threshold", "W_skip")
    norm = p["W_dec"].norm(dim=1)
    pre = ((X - p["b_dec"]) @ p["W_enc"] + p["b_enc"]) * norm
    top = pre.topk(4)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    settings = {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}
    coder = load_coder(sae_lens_folder(tmp_path, p, apply_b_dec_to_input=True, **settings))
    same(coder, (f / norm) @ p["W_dec"] + p["b_dec"])
    assert torch.allclose(coder.encode(X), f, atol=1e-5)


def test_an_old_saelens_file(tmp_path):
    """Before version 6: no version, activation_fn_str, hook_point."""
    p = without(parts(), "threshold", "W_skip")
    folder = sae_lens_folder(
        tmp_path,
        p,
        metadata={},
        activation_fn_str="topk",
        activation_fn_kwargs={"k": 5},
        hook_point="blocks.8.hook_resid_pre",
        model_name="gpt2-small",
    )
    coder = same(load_coder(folder), topk(p, 5))
    assert coder.metadata["hook_name"] == "blocks.8.hook_resid_pre"
    assert coder.metadata["model_name"] == "gpt2-small"


def test_half_precision_is_read_as_float32(tmp_path):
    p = {name: t.bfloat16() for name, t in without(parts(), "W_skip").items()}
    settings = {"architecture": "jumprelu", "apply_b_dec_to_input": False}
    coder = load_coder(sae_lens_folder(tmp_path, p, **settings))
    assert coder.W_enc.dtype == torch.float32
    same(coder, jump({name: t.float() for name, t in p.items()}))


# ------------------------------------------------------- Gemma Scope, sparsify, circuit-tracer


@pytest.mark.parametrize("folder", ["layer_12/width_16k/average_l0_82", "transcoder/layer_3"])
def test_gemma_scopes_params_npz(tmp_path, folder):
    """Residual, MLP, attention SAEs and transcoders are laid out alike; b_dec is not subtracted."""
    p = without(parts(), "W_skip")
    (tmp_path / folder).mkdir(parents=True)
    np.savez(tmp_path / folder / "params.npz", **{name: t.numpy() for name, t in p.items()})
    coder = same(load_coder(tmp_path, folder), jump(p))
    assert coder.activation == "jumprelu" and not coder.apply_b_dec_to_input
    assert coder.transcoder is folder.startswith("transcoder")
    assert load_coder(tmp_path / folder / "params.npz", transcoder=True).transcoder
    indices, values = coder.encode_sparse(X)
    assert torch.allclose(coder.decode_sparse(indices, values), jump(p), atol=1e-4)


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2s_safetensors(tmp_path, affine):
    """Names in lower case; the affine skip path is stored (d_in, d_out)."""
    p = parts(d_out=5)
    renamed = {name.replace("W", "w"): t for name, t in without(p, "W_skip").items()}
    if affine:
        renamed["affine_skip_connection"] = p["W_skip"].T
    folder = tmp_path / "transcoder" / "layer_13_width_16k_l0_small"
    folder.mkdir(parents=True)
    save_file(contiguous(renamed), folder / "params.safetensors")
    assert same(load_coder(folder), jump(p, skip=affine)).skip is affine


def test_gemma_scope_2s_cross_layer_transcoders_are_declined(tmp_path):
    p = {name.replace("W", "w"): t for name, t in without(parts(), "W_skip").items()}
    p["w_dec"] = p["w_dec"][:, None].expand(20, 3, 6)
    save_file(contiguous(p), tmp_path / "params.safetensors")
    with pytest.raises(ModelError, match="several layers is not known"):
        load_coder(tmp_path)


@pytest.mark.parametrize("kind", ["SAE", "transcoder", "skip"])
def test_sparsifys_files(tmp_path, kind):
    p = parts()
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"]}
    tensors |= {"W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    if kind == "skip":
        tensors["W_skip"] = p["W_skip"]
    save_file(contiguous(tensors), tmp_path / "sae.safetensors")
    config = {"d_in": 6, "num_latents": 20, "k": 4, "activation": "topk"}
    config |= {"transcode": kind != "SAE", "skip_connection": kind == "skip"}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    expected = topk(p, 4, subtract=kind == "SAE", skip=kind == "skip")
    assert same(load_coder(tmp_path), expected).transcoder is (kind != "SAE")


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "topk, k given", "skip"])
def test_circuit_tracers_files(tmp_path, kind):
    """Both matrices are (d_latent, d_model)."""
    p = parts()
    tensors = {"W_enc": p["W_enc"].T, "b_enc": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    expected = jump(p | {"threshold": torch.zeros(20)}, skip=kind == "skip")
    if kind == "jumprelu":
        tensors["activation_function.threshold"] = p["threshold"]
        expected = jump(p)
    if kind.startswith("topk"):
        expected = topk(p, 4, subtract=False)
    if kind == "topk":
        tensors["k"] = torch.tensor(4)
    if kind == "skip":
        tensors["W_skip"] = p["W_skip"]
    save_file(contiguous(tensors), tmp_path / "layer_3.safetensors")
    given = {"k": 4} if kind == "topk, k given" else {}
    same(load_coder(tmp_path / "layer_3.safetensors", **given), expected)
    assert same(load_coder(tmp_path, "layer_3.safetensors", **given), expected).transcoder


# ------------------------------------------------------------------------------- bad files


def npz(folder: Path, **changes) -> Path:
    p = {name: t.numpy() for name, t in without(parts(), "W_skip").items()} | changes
    np.savez(folder / "params.npz", **{name: a for name, a in p.items() if a is not None})
    return folder


def nan(shape):
    return np.full(shape, np.nan, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": None}, "lacks threshold; it holds W_dec, W_enc, b_dec, b_enc"),
        ({"b_enc": np.zeros(19, "f4")}, r"b_enc of shape \(19,\), expected \(20,\)"),
        ({"W_dec": np.zeros((6, 20), "f4")}, r"W_dec of shape \(6, 20\), expected \(20, 20\)"),
        ({"W_dec": nan((20, 6))}, "NaN or infinity in W_dec: its file is damaged"),
        ({"scaling_factor": np.full(20, 2.0, "f4")}, "scaling_factor other than 1"),
    ],
)
def test_a_params_npz_that_cannot_be(tmp_path, changes, words):
    with pytest.raises(ModelError, match=words):
        load_coder(npz(tmp_path, **changes))


def test_nothing_is_unpickled(tmp_path):
    """An object array would run code when it is read; the sentence says that it was not."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.savez(tmp_path / "params.npz", W_enc=np.array([Trap()], dtype=object))
    with pytest.raises(ModelError, match="is no plain NumPy archive"):
        load_coder(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "flipped"])
def test_an_unreadable_npz(tmp_path, damage):
    path = npz(tmp_path) / "params.npz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200:260] = bytes(60)
    contents = {"truncated": whole[:900], "text": b"not found", "empty": b"", "flipped": flipped}
    path.write_bytes(bytes(contents[damage]))
    with pytest.raises(ModelError, match="params.npz is no plain NumPy archive"):
        load_coder(tmp_path)
    assert not zipfile.is_zipfile(path) or damage == "flipped"


def test_a_truncated_safetensors(tmp_path):
    save_coder(random_coder(), tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="sae_weights.safetensors is truncated or damaged"):
        load_coder(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architecture": "gated"}, "architecture 'gated', which is not known here; known are"),
        ({"architecture": "topk", "k": 21}, "k is 21, and the dictionary has 20 latents"),
        ({"architecture": "topk"}, "topk needs k"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
        (
            {"architecture": "transcoder", "normalize_activations": "layer_norm"},
            "'layer_norm', so its activations were divided",
        ),
        ({"architecture": "matryoshka_batchtopk"}, "'matryoshka_batchtopk', which is not known"),
        (
            {"architecture": "standard", "finetuning_scaling_factor": True},
            "finetuning_scaling_factor = True, so its latents are scaled",
        ),
    ],
)
def test_a_saelens_folder_that_cannot_be_read(tmp_path, config, words):
    with pytest.raises(ModelError, match=words):
        load_coder(sae_lens_folder(tmp_path, without(parts(), "threshold", "W_skip"), **config))


def test_a_folder_without_its_config(tmp_path):
    save_coder(random_coder(), tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ModelError, match="its cfg.json is damaged: it is not JSON"):
        load_coder(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(ModelError, match="lacks cfg.json"):
        load_coder(tmp_path)


def test_other_sparsify_activations_are_declined(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "sae.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"activation": "groupmax"}))
    with pytest.raises(ModelError, match="'groupmax', and only topk is known here"):
        load_coder(tmp_path)


def test_a_place_without_a_coder(tmp_path):
    with pytest.raises(ModelError, match="no file or folder"):
        load_coder(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="but nothing: name the folder or file"):
        load_coder(tmp_path)
    for layer in range(3):
        save_coder(random_coder(), tmp_path / f"layer_{layer}")
    with pytest.raises(ModelError, match="but layer_0/, layer_1/, layer_2/: name the folder"):
        load_coder(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="weights.pt is not a file of a known format"):
        load_coder(tmp_path / "weights.pt")


# ------------------------------------------------------------------------------- writing


def test_a_failed_save_leaves_the_old_coder(tmp_path, monkeypatch):
    first, second = random_coder(seed=0), random_coder(seed=1)
    save_coder(first, tmp_path)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable, "flush", full)
    with pytest.raises(RunError, match="disk is full"):
        save_coder(second, tmp_path)
    assert torch.equal(load_coder(tmp_path).W_dec, first.W_dec)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


# ------------------------------------------------------------------------------- the hub


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub of local folders; what is not there raises what the hub raises."""
    asked, sizes = [], {}

    def error(kind, text):
        response = type("Response", (), {"headers": {}, "status_code": 404, "request": None})()
        return kind(text, response=response)

    def download(repo, file, dry_run=False):
        if not dry_run:
            asked.append(file)
        if not (tmp_path / repo).is_dir():
            raise error(hub.RepositoryNotFoundError, "404")
        path = tmp_path / repo / file
        if not path.is_file():
            raise error(hub.RemoteEntryNotFoundError, "404")
        if dry_run:
            return SimpleNamespace(file_size=sizes.get(path.name, path.stat().st_size))
        return str(path)

    monkeypatch.setattr(coder_hub, "hf_hub_download", download)
    monkeypatch.setattr(coder_hub, "try_to_load_from_cache", lambda repo, file: None)
    return SimpleNamespace(root=tmp_path, asked=asked, sizes=sizes)


def test_a_coder_of_the_hub(fake_hub):
    root = fake_hub.root
    folder = root / "google/gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54"
    folder.mkdir(parents=True)
    npz(folder)
    coder = load_coder("google/gemma-scope-2b-pt-transcoders", "layer_3/width_16k/average_l0_54")
    assert coder.transcoder
    assert coder.metadata["source"].startswith("google/gemma-scope-2b-pt-transcoders/layer_3")
    tensors = without(parts(), "threshold", "W_skip")
    tensors["W_enc"] = tensors["W_enc"].T
    (root / "someone/transcoders").mkdir(parents=True)
    save_file(contiguous(tensors), root / "someone/transcoders/layer_0.safetensors")
    assert load_coder("someone/transcoders", "layer_0.safetensors").activation == "relu"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_saelens_coder_of_the_hub_gets_its_config(fake_hub, activation):
    root, asked = fake_hub.root, fake_hub.asked
    save_coder(random_coder(activation), root / "someone/saes/layer_3")
    load_coder("someone/saes", "layer_3")
    assert asked == ["layer_3/sae_weights.safetensors", "layer_3/cfg.json"]


def test_what_the_hub_lacks(fake_hub):
    root = fake_hub.root
    (root / "someone/saes").mkdir(parents=True)
    with pytest.raises(ModelError, match="someone/saes has no coder in layer_9"):
        load_coder("someone/saes", "layer_9")
    with pytest.raises(ModelError, match="no repository 'no/such'"):
        load_coder("no/such", "layer_9")


@pytest.mark.parametrize(
    ("file", "size", "words"),
    [
        ("cfg.json", 10**9, "someone/saes has a cfg.json of 1,000,000,000 bytes, and at most"),
        ("sae_weights.safetensors", 10**15, "The download of .* needs 1000000.0 GB of disk"),
    ],
)
def test_what_is_too_large_is_not_downloaded(fake_hub, file, size, words):
    save_coder(random_coder("topk"), fake_hub.root / "someone/saes/layer_3")
    fake_hub.sizes[file] = size
    with pytest.raises((ModelError, RunError), match=words):
        load_coder("someone/saes", "layer_3")
    assert f"layer_3/{file}" not in fake_hub.asked


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.LocalEntryNotFoundError("offline"), "huggingface.co cannot be reached"),
        (hub.OfflineModeIsEnabled("offline"), "huggingface.co cannot be reached"),
        (ConnectionError("no route"), "huggingface.co cannot be reached"),
        (hub.HFValidationError("bad name"), "no repository"),
        (OSError(28, "No space left on device"), "could not be loaded: .*No space left"),
    ],
)
def test_every_way_in_which_the_hub_fails_is_one_sentence(monkeypatch, error, words):
    def fail(repo, file, dry_run=False):
        raise error

    monkeypatch.setattr(coder_hub, "hf_hub_download", fail)
    monkeypatch.setattr(coder_hub, "try_to_load_from_cache", lambda repo, file: None)
    with pytest.raises(ModelError, match=words) as caught:
        load_coder("someone/saes", "layer_0")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------- settings that make another function


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"signed": True}, "signed = true, so its latents fire below 0 too"),
        ({"activation": "groupmax"}, "the activation 'groupmax'"),
        ({"k": "three"}, 'k is "three" in .*cfg.json, and a whole number is expected'),
        ({"transcode": "yes"}, 'transcode is "yes" in .*cfg.json, and true or false or null'),
    ],
)
def test_a_setting_of_sparsify_that_changes_the_function_is_refused(tmp_path, setting, words):
    make_sparsify(tmp_path)
    write_json(tmp_path / "cfg.json", read_json(tmp_path / "cfg.json") | setting)
    with pytest.raises(ModelError, match=words):
        load_coder(tmp_path)


def test_a_skip_path_of_sparsify_is_a_transcoders(tmp_path):
    make_sparsify(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors") | {"W_skip": torch.ones(6, 6)}
    save_file(tensors, tmp_path / "sae.safetensors")
    with pytest.raises(ModelError, match="has a W_skip, and its cfg.json has no transcode = true"):
        load_coder(tmp_path)
    write_json(tmp_path / "cfg.json", read_json(tmp_path / "cfg.json") | {"transcode": True})
    coder = load_coder(tmp_path)
    assert coder.transcoder and coder.skip and not coder.apply_b_dec_to_input


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"activation_fn": "tanh-relu"}, "the activation 'tanh-relu', and its architecture's is"),
        ({"activation_fn_str": "tanh-relu"}, "the activation 'tanh-relu'"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations = "),
        ({"reshape_activations": "hook_z"}, "reshape_activations = 'hook_z', so it reads heads"),
        ({"use_error_term": True}, "use_error_term = True"),
    ],
)
def test_a_setting_of_saelens_that_changes_the_function_is_refused(tmp_path, setting, words):
    save_coder(SparseCoder(6, 12, activation="relu"), tmp_path)
    write_json(tmp_path / "cfg.json", read_json(tmp_path / "cfg.json") | setting)
    with pytest.raises(ModelError, match=words):
        load_coder(tmp_path)


def test_a_saelens_coder_with_layer_norm_is_read_and_written(tmp_path):
    p = without(parts(), "threshold", "W_skip")
    settings = {"architecture": "topk", "k": 4, "normalize_activations": "layer_norm"}
    coder = load_coder(sae_lens_folder(tmp_path, p, apply_b_dec_to_input=True, **settings))
    mean, std = X.mean(1, keepdim=True), X.std(1, keepdim=True)
    same(coder, topk(p, 4, (X - mean) / (std + 1e-5)) * std + mean)
    again = load_coder(save_coder(coder, tmp_path / "again"))
    assert again.layer_norm and torch.equal(again(X), coder(X))
    assert read_json(tmp_path / "again/cfg.json")["normalize_activations"] == "layer_norm"


def test_a_matryoshka_coder_is_written_as_the_topk_coder_that_it_is(tmp_path):
    coder = random_coder().nested_((5, 12))
    again = load_coder(save_coder(coder, tmp_path, hook_name="here"))
    assert again.prefixes == (5, 12, 20) and torch.allclose(again(X), coder(X), atol=1e-5)
    save_coder(again, tmp_path / "b")
    for folder in (tmp_path, tmp_path / "b"):
        config = read_json(folder / "cfg.json")
        assert config["architecture"] == "topk"
        assert config["metadata"]["matryoshka_widths"] == [5, 12, 20]
    for wrong in ([5, 3], "5", [[5]], {"a": 1}):
        config["metadata"]["matryoshka_widths"] = wrong
        write_json(tmp_path / "cfg.json", config)
        with pytest.raises(ModelError, match="has wrong matryoshka_widths"):
            load_coder(tmp_path)
