"""Models to work with: loaded, with random weights, or a shape without weights.

model = load_model()                  # tiny-gemma, or what MI_MODEL names
blank = untrained(model)              # the same shape with random weights
large = empty_gemma2_2b()             # Gemma 2 2B's shapes on the meta device
"""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import torch
from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2Config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_peft_available

from mi_helpers.arguments import one_of, resolve_device
from mi_helpers.errors import first_line, reading
from mi_helpers.files import (
    DATA,
    MOST_JSON,
    RunError,
    is_beside,
    need_space,
    read_json,
    read_shapes,
)
from mi_helpers.layouts import FAMILIES, ModelError, layout_of
from mi_helpers.models import LanguageModel

COUNTS = (  # of config.json, from which lists are made
    *("num_hidden_layers", "n_layer", "num_attention_heads", "n_head", "num_key_value_heads"),
    *("head_dim", "hidden_size", "n_embd", "intermediate_size", "n_inner", "vocab_size"),
    *("num_labels", "n_positions", "max_position_embeddings", "sliding_window"),
)
MOST = 2**24
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
SHIPPED = {  # name → folder
    "tiny-gemma": DATA / "tiny_gemma",
    "tiny-gemma-twin": DATA / "tiny_gemma_twin",
    "stranger": DATA / "stranger",
}
MADE_BY = {
    "tiny-gemma": "make model",
    "tiny-gemma-twin": "python -m mi_helpers train-model --name tiny-gemma-twin",
    "stranger": "python -m mi_helpers train-stranger",
}


def load_model(
    name_or_path: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """Load a model that ships (SHIPPED), a local folder or a model of the Hugging Face hub.

    Args:
        name_or_path: None means the environment variable MI_MODEL, else "tiny-gemma".
        dtype: float32, float64, bfloat16 or float16, by name or as torch's own; None and "auto"
            mean float32 for the models that ship, else the one that the weights are stored in.
        device: as `resolve_device` takes it; None means the environment variable MI_DEVICE, else
            the CPU.

    Raises:
        ModelError: what is missing (folder, weights, licence, network, family), in one sentence.
    """
    where = resolve_device(device)
    one_of("dtype", str(dtype or "auto").removeprefix("torch."), DTYPES)
    name = str(name_or_path or os.environ.get("MI_MODEL") or "tiny-gemma")
    source, local = place_of(name)
    if dtype in (None, "auto"):
        dtype = torch.float32 if name in SHIPPED else "auto"
    bars = hf_logging.is_progress_bar_enabled()
    if local:  # a second or two: no bar in a committed notebook
        check_folder(name, Path(source))
        hf_logging.disable_progress_bar()
    try:
        config = configuration(name)
        tokenizer = load_tokenizer(name)
        with telling(name, "weights"):
            check_names(name, source, config)
            if local:
                check_size(name, Path(source), config)
            hf, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
                source,
                dtype=torch.float32
                if name in SHIPPED and dtype in (None, "auto")
                else dtype or "auto",
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # to say which they are
                output_loading_info=True,
            )
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    check_loaded(name, info)
    with telling(name, "config.json"):
        model = LanguageModel(hf.to(where), tokenizer, name)
        with torch.no_grad():
            model.forward([[0]])
    return model


def load_tokenizer(name: str):
    """The tokenizer of a model, by the name that `load_model` takes; no weights are read.

    Raises:
        ModelError: what is missing, in one sentence.
    """
    with telling(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(place_of(name)[0], trust_remote_code=False)
        tokenizer.decode(tokenizer.encode("a", add_special_tokens=False))
    return tokenizer


def place_of(name: str) -> tuple[str, bool]:
    """(where transformers finds a model, whether that is a folder of this machine)."""
    if name in SHIPPED:
        return str(SHIPPED[name]), True
    source = os.path.expanduser(name)
    return source, os.path.isdir(source) or name.startswith((".", "/", "~"))


def telling(name: str, part: str):
    """A context in which whatever is raised becomes a `ModelError` about this part of a model."""
    return reading(part, ModelError, tell=lambda error: why_not_loaded(name, error, part))


def configuration(name: str):
    """A model's configuration, once its config.json is found to be what it should be.

    Raises:
        ModelError: it is missing, damaged, of an unknown family, or counts what no model has.
    """
    source, local = place_of(name)
    with telling(name, "config.json"):
        if not local:
            check_download(source)
        file = cached_file(source, "config.json")
        found = read_json(Path(file), model_type=str, **dict.fromkeys(COUNTS, (int, None)))
        family = found.get("model_type", "")
        if family not in FAMILIES and "auto_map" in found:
            raise ModelError(why_not_loaded(name, ValueError("trust_remote_code")))
        layout_of(family, name)
        for key in COUNTS:
            if not 0 <= (found.get(key) or 0) <= MOST:
                what = "layers" if "layer" in key else key
                raise ModelError(
                    f"{name} asks for {found[key]:,} {what} in its config.json: 0 to {MOST:,} are "
                    "plausible."
                )
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def check_download(repo: str) -> None:
    """Compare what a repository of the hub has with what is plausible and with the disk's room,
    before anything is downloaded. Nothing is asked once the weights are here, or off line.

    Raises:
        ModelError: a file of settings is larger than any, or the disk has less room.
    """
    held = (try_to_load_from_cache(repo, f) for f in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if is_offline_mode() or any(isinstance(path, str) for path in held):
        return
    files = HfApi().model_info(repo, files_metadata=True).siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files}
    for file, size in sizes.items():
        if file.endswith(".json") and size > MOST_JSON:
            raise ModelError(
                f"{repo} has a {file} of {size:,} bytes, and at most {MOST_JSON:,} are read."
            )
    weights = sum(s for f, s in sizes.items() if f.endswith(".safetensors") and "/" not in f)
    need_space(Path(hub_constants.HF_HUB_CACHE), weights, f"The download of {repo}")


def check_loaded(name: str, info: dict) -> None:
    """Refuse a model of which weights were missing, or of other shapes than its configuration says.

    Raises:
        ModelError: which ones.
    """
    if info["missing_keys"]:
        raise ModelError(f"{name} lacks weights: {sorted(info['missing_keys'])[:3]} are not there.")
    for key, held, wanted in sorted(info["mismatched_keys"])[:1]:
        raise ModelError(
            f"{name} has {key} of shape {tuple(held)}, and its config.json makes it "
            f"{tuple(wanted)}: they do not belong together."
        )


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that lacks what a model's folder has.

    Raises:
        ModelError: it is absent, or has no configuration, no safetensors or no tokenizer.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{name} is not at {folder}: "
            + (f"`{MADE_BY[name]}` trains it." if name in SHIPPED else "there is no such folder.")
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model's folder.")
    if not any(folder.glob("*.safetensors")):
        pickled = any(folder.glob("*.bin"))
        raise ModelError(
            f"{folder} has "
            + ("only .bin weights, which are never unpickled here" if pickled else "no weights")
            + ": put model.safetensors there."
        )
    if not any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ModelError(f"{folder} has no tokenizer: put tokenizer.json there.")
    for file in folder.glob("*.json"):
        if file.is_file() and file.stat().st_size > MOST_JSON:
            raise ModelError(
                f"{file} has {file.stat().st_size:,} bytes, and at most {MOST_JSON:,} are read."
            )


def check_names(name: str, source: str, config) -> None:
    """Refuse a model whose files name weights other than safetensors files beside them.

    transformers would read whatever is named, and unpickle what is no safetensors file.

    Raises:
        ModelError: the name, and the file that gives it.
    """

    def there(file: str) -> str | None:
        return cached_file(
            source,
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    if is_peft_available() and there("adapter_config.json"):
        raise ModelError(
            f"{name} has an adapter_config.json, which may name another model: merge the adapter "
            "into the model's own weights, or delete it."
        )
    own = getattr(config, "transformers_weights", None)
    named = [] if own is None else [("config.json", own)]
    if index := there(SAFE_WEIGHTS_INDEX_NAME):
        weights = read_json(Path(index), weight_map=dict).get("weight_map")
        if weights is None:
            raise ModelError(f"{name} has a {SAFE_WEIGHTS_INDEX_NAME} without a weight_map.")
        named += [(SAFE_WEIGHTS_INDEX_NAME, f) for f in weights.values() if not is_beside(f)]
    for file, weights in named[:1]:
        raise ModelError(
            f"{name} names the weights {weights!r} in its {file}: only .safetensors files in the "
            f"folder of {file} are read, so put them there under a plain name."
        )


def check_size(name: str, folder: Path, config) -> None:
    """Refuse a folder whose configuration asks for far more than its files hold.

    What is missing would be made up, in memory, before it is found to be missing.

    Raises:
        ModelError: how many parameters there are, and how many it asks for.
    """
    try:
        shapes = [s for file in folder.glob("*.safetensors") for s in read_shapes(file).values()]
    except RunError as error:
        raise ModelError(f"{name} could not be loaded: {error}") from None
    held = sum(math.prod(shape) for shape in shapes)
    asked = config.num_hidden_layers
    if asked <= len(shapes):  # else not even the modules can be made
        with telling(name, "config.json"), torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        asked = hf.num_parameters()
        if asked <= 2 * held:
            return
    raise ModelError(
        f"{name} holds {len(shapes)} weights of {held:,} numbers in all, and its config.json asks "
        f"for {asked:,} {'layers' if config.num_hidden_layers > len(shapes) else 'numbers'}: "
        "they do not belong together."
    )


def why_not_loaded(name: str, error: BaseException, part: str = "") -> str:
    """One sentence for what the hub or transformers raised while a part was read, or its cause."""
    chain, e = [], error
    while e is not None and e not in chain:
        chain.append(e)
        e = e.__cause__ or e.__context__

    def any_of(*kinds: type) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if any_of(hub.GatedRepoError):
        return (
            f"{name} is gated: accept its licence at https://huggingface.co/{name}, then run "
            "`hf auth login`; or leave MI_MODEL unset to use tiny-gemma."
        )
    if any_of(hub.RepositoryNotFoundError, hub.HFValidationError):
        return f"There is no model {name!r} on huggingface.co, and no folder of that name."
    if any_of(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled, ConnectionError):
        return (
            f"{name} is not on this machine and huggingface.co cannot be reached: connect to the "
            "network, give a local folder, or leave MI_MODEL unset to use tiny-gemma."
        )
    if any("trust_remote_code" in str(e) for e in chain):
        return (
            f"{name} needs program code of its own, and the code of a model's folder is never run "
            f"here: choose a model of a known family ({', '.join(FAMILIES)})."
        )
    said = f"in its {part}: {first_line(error)}" if part else first_line(error)
    return f"{name} could not be loaded: {said}."


# ----------------------------------------------------------------- random weights, and none


def untrained(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """A model of the same shape, dtype and tokenizer with random weights: a negative control."""
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), attn_implementation="eager", trust_remote_code=False
        )
    empty = LanguageModel(hf, model.tokenizer, f"{model.name} (untrained)")
    return materialize(empty, model.dtype, seed, model.device)


def empty_gemma2_2b() -> LanguageModel:
    """Gemma 2 2B's architecture on the meta device: every shape, no weights, no tokenizer.

    The numbers are those of google/gemma-2-2b's config.json: 2,614,341,888 parameters.
    """
    config = Gemma2Config(
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        query_pre_attn_scalar=256,
        max_position_embeddings=8192,
        sliding_window=4096,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        rms_norm_eps=1e-6,
        bos_token_id=2,
    )
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=False
        )
    return LanguageModel(hf, None, "google/gemma-2-2b (empty)")


def materialize(
    model: LanguageModel,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Give a model on the meta device random weights, in place, where only the shape matters.

    Buffers that no checkpoint holds (rotary frequencies in float32, Gemma's embedding scale) get
    their true values. A tied embedding stays tied.

    Raises:
        ModelError: the model has weights already.
    """
    hf = model.hf
    if model.device.type != "meta":
        raise ModelError(f"{model.name} has weights already: materialize is for a meta model.")
    for parameter in hf.parameters():
        parameter.data = parameter.data.to(dtype)
    hf.to_empty(device=device)
    hf.tie_weights()  # pyright: ignore[reportCallIssue]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf.initialize_weights()  # pyright: ignore[reportCallIssue]
    return LanguageModel(hf, model.tokenizer, model.name)
