"""Read and write sparse coders in the field's own file formats. Nothing is unpickled.

    coder = load_coder("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    coder = load_coder("runs/demo/coder")
    save_coder(coder, "runs/demo/coder")

    SAELens          cfg.json + sae_weights.safetensors, read and written
    Gemma Scope      params.npz: residual, MLP and attention SAEs, transcoders
    Gemma Scope 2    params.safetensors, with names in lower case and perhaps an affine skip path
    sparsify         cfg.json + sae.safetensors
    circuit-tracer   layer_N.safetensors, a transcoder

A source is a local folder, a local file, or a repository of the Hugging Face hub.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mi_helpers.errors import Kind, checked, first_line, reading
from mi_helpers.files import write_atomically, write_json
from mi_helpers.layouts import ModelError
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.hub import (
    CONFIG,
    KNOWN,
    MOST_CONFIG,
    SCOPE2,
    SPARSIFY,
    WEIGHTS,
    from_hub,
)

INFLATED, INFLATION = 64 * 2**20, 20  # most bytes of an archive unpacked, and times its own size
PREFIXES = "matryoshka_widths"  # what SAELens calls them in its own training
LAYOUT = "6.54.12"  # the version of SAELens whose cfg.json is written

# SAELens' `architecture` of an SAE and of a transcoder. It has no TopK transcoder: those two names
# are this project's, and SAELens declines them.
_SAE = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "batchtopk": "jumprelu"}
_TRANSCODER = {
    "relu": ("transcoder", "skip_transcoder"),
    "topk": ("topk_transcoder", "topk_skip_transcoder"),
    "jumprelu": ("jumprelu_transcoder", "jumprelu_skip_transcoder"),
    "batchtopk": ("jumprelu_transcoder", "jumprelu_skip_transcoder"),
}
_ACTIVATION = {
    name: activation
    for activation in ("relu", "topk", "jumprelu")
    for name in (_SAE[activation], *_TRANSCODER[activation])
}
SAE_LENS = {
    "architecture": str,
    "k": (int, None),
    "metadata": (dict, None),
    "apply_b_dec_to_input": bool,
    "rescale_acts_by_decoder_norm": (bool, None),
    "activation_fn_kwargs": (dict, None),
}
SPARSIFY_KINDS = {
    "activation": str,
    "k": int,
    "signed": (bool, None),
    "transcode": (bool, None),
}


# ------------------------------------------------------------------------------------- writing


def save_coder(coder: SparseCoder, folder: Path | str, **metadata) -> Path:
    """Write the folded coder to `folder` in SAELens' layout, each file whole or not at all.

    SAELens reads it, except a TopK transcoder, for which it has no class. A BatchTopK coder is
    written as the JumpReLU coder that it is after training. A Matryoshka coder is the TopK coder
    that it is; its prefixes, for which SAELens has no place, are in the metadata.

    Args:
        metadata: JSON-able facts for cfg.json, such as model_name and hook_name; they are added to
            `coder.metadata`.

    Returns:
        the folder.

    Raises:
        RunError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    folded = coder.folded()
    tensors = {
        name: p.detach().cpu().contiguous() for name, p in folded.named_parameters(recurse=False)
    }
    write_atomically(folder / WEIGHTS, lambda to: save_file(tensors, to))
    write_json(folder / CONFIG, config_of(folded) | {"metadata": _metadata(coder, metadata)})
    return folder


def config_of(coder: SparseCoder) -> dict:
    """What SAELens' cfg.json says about a folded coder, without the metadata."""
    names = _TRANSCODER[coder.activation] if coder.transcoder else (_SAE[coder.activation],) * 2
    config = {
        "architecture": names[coder.skip],
        "d_in": coder.d_in,
        "d_sae": coder.d_latent,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": coder.apply_b_dec_to_input,
        "normalize_activations": "layer_norm" if coder.layer_norm else "none",
        "reshape_activations": "none",
    }
    if coder.transcoder:
        config["d_out"] = coder.d_out
    if coder.activation == "topk":
        config |= {"k": coder.k, "rescale_acts_by_decoder_norm": False}
    return config


def _metadata(coder: SparseCoder, added: dict) -> dict:
    nested = {PREFIXES: list(coder.prefixes)} if coder.prefixes else {}
    return {"sae_lens_version": LAYOUT} | coder.metadata | nested | added


# ------------------------------------------------------------------------------------- reading


def load_coder(
    source: Path | str, folder: str = "", transcoder: bool | None = None, k: int | None = None
) -> SparseCoder:
    """A coder from a local folder or file, or from a repository of the Hugging Face hub.

    Args:
        source: a local path, or a repository such as "google/gemma-scope-2b-pt-res".
        folder: the coder's folder inside `source`, or its file ("layer_3.safetensors").
        transcoder: whether a Gemma Scope file is a transcoder, which the file does not say; None
            looks for the word "transcoder" in the path.
        k: for a circuit-tracer file of TopK, whose k is in its config.yaml and not in the file.

    Returns:
        the coder in float32 on the CPU; `coder.metadata` holds what the file says about it.

    Raises:
        ModelError: something is missing, unreadable or not understood.
    """
    source = str(source)
    name = "/".join(part for part in (source.rstrip("/"), folder.strip("/")) if part)
    path = _local(source, folder) if _is_local(source) else from_hub(source, folder.strip("/"))
    if transcoder is None:
        transcoder = "transcoder" in name.lower()
    with reading(path, ModelError, of=name):
        coder = _reader(path)(path, name, transcoder, k)
    coder.metadata.setdefault("source", path.name if _is_local(source) else name)
    return coder


def _reader(path: Path) -> Callable[[Path, str, bool, int | None], SparseCoder]:
    """The reader of a file, by its name: a function of path, name for errors, transcoder, k."""
    readers = {WEIGHTS: _sae_lens, SPARSIFY: _sparsify, SCOPE2: _gemma_scope_2}
    if path.suffix == ".npz":
        return _gemma_scope
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path.name} is not a file of a known format: give params.npz or a .safetensors file."
        )
    return readers.get(path.name, _circuit_tracer)


def _sae_lens(path: Path, name: str, transcoder: bool, k: int | None) -> SparseCoder:
    config = _modern(_json(path.with_name(CONFIG), name, **SAE_LENS), name)
    tensors = load_file(path)
    architecture = config.get("architecture", "standard")
    if architecture not in _ACTIVATION:
        raise ModelError(
            f"{name} has the architecture {architecture!r}, which is not known here; known are "
            f"{', '.join(_ACTIVATION)}."
        )
    activation = _ACTIVATION[architecture]
    transcoder = architecture.endswith("transcoder")
    _refuse_other_functions(config, activation, transcoder, name)
    if activation == "topk" and config.get("rescale_acts_by_decoder_norm") and "W_dec" in tensors:
        _scale_latents(tensors)
    coder = build(
        tensors,
        name,
        activation=activation,
        k=config.get("k"),
        transcoder=transcoder,
        apply_b_dec_to_input=not transcoder and config.get("apply_b_dec_to_input", True),
        metadata=config.get("metadata"),
        file=path.name,
    )
    coder.layer_norm = config.get("normalize_activations") == "layer_norm"
    return coder


def _refuse_other_functions(config: dict, activation: str, transcoder: bool, name: str) -> None:
    """Raise ModelError where a cfg.json of SAELens has a setting that makes another function of the
    same weights."""
    said = config.get("activation_fn", config.get("activation_fn_str")) or activation
    for key, allowed, why in (
        (
            "normalize_activations",
            ("none", *(() if transcoder else ("layer_norm",))),
            "its activations were divided by numbers that are not in its files: fold them into its "
            "weights in SAELens and save it again",
        ),
        ("reshape_activations", ("none",), "it reads heads side by side"),
        ("finetuning_scaling_factor", (), "its latents are scaled once more"),
        ("use_error_term", (), "its error is added to what it gives"),
    ):
        if config.get(key) not in (None, False, *allowed):
            raise ModelError(f"{name} has {key} = {config[key]!r}, so {why}: not known here.")
    if said not in (activation, "relu" if activation == "jumprelu" else activation):
        raise ModelError(
            f"{name} has the activation {said!r}, and its architecture's is {activation}: only "
            "relu, topk and jumprelu are known here."
        )


def _modern(config: dict, name: str) -> dict:
    """cfg.json as SAELens writes it from version 6 on, where it is older."""
    metadata = checked(config.get("metadata") or {}, f"metadata in {name}'s {CONFIG}", ModelError)
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "")
    if re.match(r"\d+", version) and int(version.split(".")[0][:9]) >= 6:
        return config
    config = dict(config)
    if config.get("activation_fn", config.get("activation_fn_str")) == "topk":
        config["architecture"] = "topk"
        kwargs = checked(config.get("activation_fn_kwargs") or {}, name, ModelError, k=(int, None))
        config["k"] = kwargs.get("k", config.get("k"))
    renamed = {"hook_point": "hook_name"}
    told = {renamed.get(key, key): value for key, value in config.items()}
    wanted = ("model_name", "hook_name", "hook_layer", "context_size", "dataset_path")
    return config | {"metadata": {key: told[key] for key in wanted if key in told}}


def _scale_latents(tensors: dict[str, Tensor]) -> None:
    """Rescale latents by their decoder rows' norm, as `rescale_acts_by_decoder_norm` means."""
    norm = tensors["W_dec"].norm(dim=1)
    tensors["W_dec"] = tensors["W_dec"] / norm[:, None]
    for key in ("W_enc", "b_enc"):
        if key in tensors:
            tensors[key] = tensors[key] * norm


def _sparsify(path: Path, name: str, transcoder: bool, k: int | None) -> SparseCoder:
    config = _json(path.with_name(CONFIG), name, sae=dict, **SPARSIFY_KINDS)
    config = checked(config.get("sae", config), f"{name}'s {CONFIG}", ModelError, **SPARSIFY_KINDS)
    if config.get("activation", "topk") != "topk":
        raise ModelError(
            f"{name} has the activation {config['activation']!r}, and only topk is known here."
        )
    if config.get("signed"):
        raise ModelError(
            f"{name} has signed = true, so its latents fire below 0 too: not known here."
        )
    tensors = load_file(path)
    renamed = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
    tensors = {renamed.get(key, key): value for key, value in tensors.items()}
    _need(tensors, ("W_enc", "W_dec"), name)
    tensors["W_enc"] = tensors["W_enc"].T
    transcoder = bool(config.get("transcode"))
    if "W_skip" in tensors and not transcoder:  # it would subtract b_dec from what W_enc reads
        raise ModelError(
            f"{name} has a W_skip, and its {CONFIG} has no transcode = true: an autoencoder with a "
            "skip path is not known here."
        )
    return build(
        tensors,
        name,
        activation="topk",
        k=config.get("k"),
        transcoder=transcoder,
        apply_b_dec_to_input=not transcoder,
        file=path.name,
    )


def _gemma_scope(path: Path, name: str, transcoder: bool, k: int | None) -> SparseCoder:
    tensors = {_upper(key): value for key, value in _npz(path, name).items()}
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        raise ModelError(f"{name} has a scaling_factor other than 1, which is not known here.")
    metadata = {"reads": "normalised"} if transcoder else None  # the stream without the norm's gain
    return build(
        tensors,
        name,
        activation="jumprelu",
        transcoder=transcoder,
        metadata=metadata,
        file=path.name,
    )


def _gemma_scope_2(path: Path, name: str, transcoder: bool, k: int | None) -> SparseCoder:
    tensors = {_upper(key): value for key, value in load_file(path).items()}
    if "affine_skip_connection" in tensors:
        tensors["W_skip"] = tensors.pop("affine_skip_connection").T
    transcoder = transcoder or "W_skip" in tensors
    return build(tensors, name, activation="jumprelu", transcoder=transcoder, file=path.name)


def _circuit_tracer(path: Path, name: str, transcoder: bool, k: int | None) -> SparseCoder:
    tensors = load_file(path)
    _need(tensors, ("W_enc", "b_enc"), name)
    if "activation_function.threshold" in tensors:
        tensors["threshold"] = tensors.pop("activation_function.threshold").flatten()
    if "k" in tensors:
        k = tensors.pop("k")
        if k.numel() != 1 or k.is_floating_point() or k.is_complex():
            raise ModelError(f"{name} has a k of {tuple(k.shape)} {k.dtype}, not a whole number.")
        k = int(k)
    if tensors["W_enc"].ndim == 2 and tensors["W_enc"].shape[:1] == tensors["b_enc"].shape:
        tensors["W_enc"] = tensors["W_enc"].T
    activation = "jumprelu" if "threshold" in tensors else "topk" if k else "relu"
    return build(tensors, name, activation=activation, k=k, transcoder=True, file=path.name)


def _upper(key: str) -> str:
    """w_enc → W_enc; other names as they are."""
    return "W" + key[1:] if key.startswith("w_") else key


def build(
    tensors: dict[str, Tensor],
    name: str,
    *,
    activation: str,
    k: int | None = None,
    transcoder: bool = False,
    apply_b_dec_to_input: bool = False,
    metadata: dict | None = None,
    file: str = "its file",
) -> SparseCoder:
    """A SparseCoder of these tensors, named and shaped as its parameters are.

    Args:
        file: how an error calls the file that they come from.

    Raises:
        ModelError: a tensor is missing, unknown, of another shape, or holds NaN or infinity; k is
            missing or larger than the dictionary.
    """
    needed = ["W_enc", "b_enc", "W_dec", "b_dec"]
    if activation in ("jumprelu", "batchtopk"):
        needed.append("threshold")
    name = name if name.endswith(file) else f"{name} ({file})"
    _need(tensors, needed, name)
    if tensors["W_enc"].ndim != 2 or tensors["W_dec"].ndim != 2:
        shapes = tuple(tensors["W_enc"].shape), tuple(tensors["W_dec"].shape)
        raise ModelError(
            f"{name} has W_enc {shapes[0]} and W_dec {shapes[1]}, expected two matrices: a coder "
            "of several layers is not known here."
        )
    d_in, d_latent = tensors["W_enc"].shape
    d_out = tensors["W_dec"].shape[1]
    transcoder = transcoder or d_in != d_out
    try:
        with torch.device("meta"):
            coder = SparseCoder(
                d_in,
                d_latent,
                d_out if transcoder else None,
                activation=activation,
                k=k,
                skip="W_skip" in tensors,
                apply_b_dec_to_input=apply_b_dec_to_input and not transcoder,
            )
    except ValueError as error:
        raise ModelError(f"{name} cannot be read: {error}") from None
    for key, parameter in list(coder.named_parameters()):
        setattr(coder, key, _parameter(key, parameter.shape, tensors, name))
    coder.scale_in, coder.scale_out = torch.ones(()), torch.ones(())
    coder.metadata = dict(metadata or {})
    if activation == "topk" and PREFIXES in coder.metadata:
        try:
            coder.nested_(coder.metadata.pop(PREFIXES))
        except (ValueError, TypeError) as error:
            raise ModelError(f"{name} has wrong {PREFIXES}: {first_line(error)}") from None
    return coder


def _parameter(key: str, shape: torch.Size, tensors: dict[str, Tensor], name: str) -> nn.Parameter:
    """The tensor of this key as a float32 parameter; ModelError unless it fits and is finite."""
    if not tensors[key].is_floating_point():
        raise ModelError(f"{name} has {key} in {tensors[key].dtype}, and weights are fractions.")
    tensor = tensors[key].float()
    if tensor.shape != shape:
        raise ModelError(
            f"{name} has {key} of shape {tuple(tensor.shape)}, expected {tuple(shape)}, as W_enc "
            f"is {tuple(tensors['W_enc'].shape)} and W_dec {tuple(tensors['W_dec'].shape)}."
        )
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{name} has NaN or infinity in {key}: its file is damaged.")
    if key == "W_enc":  # one latent's numbers side by side
        tensor = tensor.T.contiguous().T
    return nn.Parameter(tensor)


def _need(tensors: dict, names: tuple[str, ...] | list[str], source: str) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        held = ", ".join(sorted(tensors)) or "nothing"
        raise ModelError(f"{source} lacks {', '.join(missing)}; it holds {held}.")


# --------------------------------------------------------------------------------------- files


def _json(path: Path, name: str, **wanted: Kind) -> dict:
    if not path.is_file():
        raise ModelError(f"{name} lacks {path.name}, which says what its weights mean.")
    with reading(path, ModelError, of=name):
        if path.stat().st_size > MOST_CONFIG:
            raise ValueError(f"{path.stat().st_size:,} bytes of settings")
        found = json.loads(path.read_text("utf-8"))
    return checked(found, f"{name}'s {path.name}", ModelError, **wanted)


def _npz(path: Path, name: str) -> dict[str, Tensor]:
    try:
        _check_npz(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        return {key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}
    except Exception as error:
        raise ModelError(
            f"{name} cannot be read: {path.name} is no plain NumPy archive ({first_line(error)})."
        ) from error


def _check_npz(path: Path) -> None:
    """Compare what an archive declares with what it holds, before any of it is read.

    Raises:
        ValueError: it inflates to far more than weights can, or an array's shape is not its size.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        inflated = sum(entry.file_size for entry in entries)
        if inflated > max(INFLATED, INFLATION * path.stat().st_size):
            raise ValueError(
                f"its {path.stat().st_size:,} bytes would inflate to {inflated:,}, which weights "
                "do not"
            )
        for entry in entries:
            with archive.open(entry) as stream:
                version = np.lib.format.read_magic(stream)
                head = "read_array_header_2_0" if version > (1, 0) else "read_array_header_1_0"
                shape, _, dtype = getattr(np.lib.format, head)(stream)
                declared = stream.tell() + dtype.itemsize * math.prod(shape)
            if dtype.hasobject:
                raise ValueError(f"{entry.filename} holds Python objects, which are never read")
            if declared != entry.file_size:
                raise ValueError(
                    f"{entry.filename} declares the shape {shape} of {dtype}, and has "
                    f"{entry.file_size:,} bytes"
                )


def _is_local(source: str) -> bool:
    return Path(source).expanduser().exists() or source.startswith((".", "/", "~"))


def _local(source: str, folder: str) -> Path:
    """The weights' file of a local coder."""
    place = Path(os.path.expanduser(source)) / folder
    if place.is_file():
        return place
    if not place.is_dir():
        raise ModelError(f"There is no file or folder {place}.")
    for name in KNOWN:
        if (place / name).is_file():
            return place / name
    inside = sorted(p.name + "/" * p.is_dir() for p in place.iterdir())
    layers = [name for name in inside if name.endswith((".safetensors", ".npz"))]
    if len(layers) == 1:
        return place / layers[0]
    held = ", ".join(inside[:6]) + (", …" if len(inside) > 6 else "") or "nothing"
    raise ModelError(
        f"{place} holds no coder ({' or '.join(KNOWN)}) but {held}: name the folder or file."
    )
