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
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2Config
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils import logging as hf_logging
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_peft_available

from mi_helpers.files import DATA, is_beside, read_json, read_shapes
from mi_helpers.layouts import FAMILIES, ModelError, layout_of
from mi_helpers.models import LanguageModel

SHIPPED = {  # name → folder
    "tiny-gemma": DATA / "tiny_gemma",
    "tiny-gemma-twin": DATA / "tiny_gemma_twin",
    "stranger": DATA / "stranger",
}


def load_model(
    name_or_path: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """Load a model that ships (SHIPPED), a local folder or a model of the Hugging Face hub.

    Args:
        name_or_path: None means the environment variable MI_MODEL, else "tiny-gemma".
        dtype: None means float32 for the models that ship, else the one that the weights have.
        device: None means the CPU.

    Raises:
        ModelError: what is missing (folder, weights, licence, network, family), in one sentence.
    """
    name = str(name_or_path or os.environ.get("MI_MODEL") or "tiny-gemma")
    source = str(SHIPPED[name]) if name in SHIPPED else os.path.expanduser(name)
    local = name in SHIPPED or os.path.isdir(source) or name.startswith((".", "/", "~"))
    if local:
        check_folder(name, Path(source))
    bars = hf_logging.is_progress_bar_enabled()
    if local:  # a second or two: no bar in a committed notebook
        hf_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        layout_of(config.model_type, name)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        check_names(name, source, config)
        if local:
            check_size(name, Path(source), config)
        hf, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            source,
            dtype=dtype or (torch.float32 if name in SHIPPED else "auto"),
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, hub.EntryNotFoundError, SafetensorError) as error:
        raise ModelError(why_not_loaded(name, error)) from None
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    if info["missing_keys"]:
        raise ModelError(f"{name} lacks weights: {sorted(info['missing_keys'])[:3]} are not there.")
    return LanguageModel(hf if device is None else hf.to(device), tokenizer, name)


def check_folder(name: str, folder: Path) -> None:
    """Refuse a folder that lacks what a model's folder has.

    Raises:
        ModelError: it is absent, or has no configuration, no safetensors or no tokenizer.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{name} is not at {folder}: "
            + ("`make model` trains it." if name in SHIPPED else "there is no such folder.")
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
        found = read_json(Path(index))
        weights = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(weights, dict):
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
    shapes = [s for file in folder.glob("*.safetensors") for s in read_shapes(file).values()]
    held = sum(math.prod(shape) for shape in shapes)
    asked = config.num_hidden_layers
    if asked <= len(shapes):  # else not even the modules can be made
        with torch.device("meta"):
            hf = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        asked = hf.num_parameters()
        if asked <= 2 * held:
            return
    raise ModelError(
        f"{name} holds {len(shapes)} weights of {held:,} numbers in all, and its config.json asks "
        f"for {asked:,} {'layers' if config.num_hidden_layers > len(shapes) else 'numbers'}: "
        "they do not belong together."
    )


def why_not_loaded(name: str, error: BaseException) -> str:
    """One sentence for what the hub or transformers raised, or for its cause."""
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
    first = str(error).strip().splitlines() or [type(error).__name__]
    return f"{name} could not be loaded: {first[0].rstrip('.:')}."


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
