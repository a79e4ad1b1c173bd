"""What a harvest is of, its plan: the text, the model, the sites and the settings.

    plan = origin_of(model, source) | settings_of(config)
    difference(plan, other)                # "the setting context = 12, not 10"; "" for none

Whatever the numbers of a harvest depend on is in its plan, by content where that can be: checksums
over the text's files, over all weights, the configuration and the tokenizer. Where the text's
folder and the model's lie is not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mi_helpers.files import RunError, checksum, read_sealed, seal, sweep, write_sealed
from mi_helpers.layouts import Key
from mi_helpers.models import LanguageModel
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.processes import Processes
from mi_helpers.saes.sources import Source

PLAN = "plan.json"
HERE = ("transformers_version", "architectures", "dtype", "attn_implementation", "use_cache")
CHECKSUMS = {
    "model weights": "other weights of the model",
    "model config": "another configuration of the model",
    "model tokenizer": "another tokenizer",
    "text sha256": "another text of that name",
}


@dataclass(frozen=True)
class HarvestConfig:
    """Which activations are harvested, and of how much text.

    Args:
        site: (name, layer) of `models.SITES`, or ("ln2_normalized", layer): the MLP's input without
            the norm's gain, which Gemma Scope's transcoders read.
        target: the site that a transcoder predicts; None for an SAE.
        tokens: of text, BOS not counted.
        context: longest piece of text that the model reads at once, BOS included.
        shard_tokens: tokens per shard, which is the most that a kill costs.
        batch_tokens: tokens per run of the model, padding included.
        outlier: positions whose norm is above this times their shard's median are left out.
    """

    site: Key
    target: Key | None = None
    tokens: int = 200_000
    context: int = 128
    shard_tokens: int = 8_192
    batch_tokens: int = 4_096
    outlier: float = 10.0

    @property
    def sites(self) -> list[Key]:
        """The site, and the target where there is one."""
        return [self.site] if self.target is None else [self.site, self.target]


# ------------------------------------------------------------------------- what it depends on


def model_identity(model: LanguageModel) -> dict:
    """What a model's activations on text depend on: its name, its shape, and checksums over all its
    weights, over its configuration and over its tokenizer."""
    stored = model.hf.state_dict().keys()  # not the frequencies that follow from the configuration
    weights = dict(model.hf.named_parameters())
    weights |= {name: b for name, b in model.hf.named_buffers() if name in stored}
    config = model.config.to_diff_dict()
    config = {k: str(v) for k, v in config.items() if k[0] != "_" and k not in HERE}
    return {
        "name": model.name,
        "family": model.family,
        "dtype": str(model.dtype).removeprefix("torch."),
        "n_layers": model.n_layers,
        "d_model": model.d_model,
        "weights": checksum(weights),
        "config": seal(config),
        "tokenizer": tokenizer_identity(model.tokenizer),
    }


def tokenizer_identity(tokenizer) -> str:
    """A checksum over all that a tokenizer does, but for how it was last called."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = {"vocab": tokenizer.get_vocab()} if backend is None else json.loads(backend.to_str())
    called = {"truncation": None, "padding": None}
    return seal(rules | called | {"bos": tokenizer.bos_token_id})


def check_model(held: Activations, model: LanguageModel) -> None:
    """Check that a harvest is of this model, wherever the model lies and whatever it is called.

    Raises:
        RunError: it is of another one, or of other weights.
    """
    of, here = held.manifest["model"], model_identity(model)
    found = difference({"model": of | {"name": ""}}, {"model": here | {"name": ""}})
    if found:
        what = found if of["name"] == here["name"] else f"the model {of['name']}"
        raise RunError(
            f"The harvest in {held.folder} was made with {what}, not with {here['name']} as it is "
            "now: choose that model, or harvest into a new folder."
        )


def compared(plan: dict) -> dict:
    """A plan without the names of its model and of its files' folder, which may have moved."""
    elsewhere = {"model": True, "text": "files" in plan.get("text", {})}
    named = {key: plan[key] for key, apart in elsewhere.items() if apart and key in plan}
    return plan | {
        key: {k: v for k, v in value.items() if k != "name"} for key, value in named.items()
    }


def difference(before: dict, now: dict, inside: str = "") -> str:
    """The first thing in which two plans differ: "the setting context = 12, not 10"; or ""."""
    for key in sorted(before.keys() | now.keys()):
        old, new, name = before.get(key), now.get(key), f"{inside}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            if found := difference(old, new, f"{name} "):
                return found
        elif old != new:
            if name in CHECKSUMS:
                return CHECKSUMS[name]
            if inside == "text files ":
                state = "without" if old is None else "with" if new is None else "with another"
                return f"a text {state} {key}"
            return f"the setting {name} = {old}, not {new}"
    return ""


def origin_of(model: LanguageModel, source: Source) -> dict:
    """What all harvests of a text by a model have in common in their plans."""
    return {"model": model_identity(model), "text": source.identity()}


def settings_of(config: HarvestConfig) -> dict:
    """The settings of a harvest, as in its plan.json."""
    return {
        "source": list(config.site),
        "target": list(config.target) if config.target else None,
        "tokens": config.tokens,
        "context": config.context,
        "shard_tokens": config.shard_tokens,
        "batch_tokens": config.batch_tokens,
        "outlier": config.outlier,
    }


def keep_plan(folder: Path, plan: dict, processes: Processes) -> dict:
    """Write what this folder is a harvest of, or check that it is the same as before.

    A plan of which no shard was made binds nobody.

    Returns:
        the plan that the folder keeps.

    Raises:
        RunError: the folder holds another harvest.
    """
    check_plan(folder, plan)
    processes.wait()
    if processes.first:
        if not (folder / PLAN).exists() or not any(folder.glob("shard-*.safetensors")):
            write_sealed(folder / PLAN, plan)
        sweep(folder, PLAN)
    processes.wait()
    return read_sealed(folder / PLAN)


def check_plan(folder: Path, plan: dict) -> None:
    """Check that a folder holds no other harvest than this one, in the keys that `plan` has.

    Raises:
        RunError: it does, and in what it differs.
    """
    if not (folder / PLAN).exists() or not any(folder.glob("shard-*.safetensors")):
        return
    before, now = read_sealed(folder / PLAN), as_json(plan)
    before = {key: value for key, value in before.items() if key in now}
    if found := difference(compared(before), compared(now)):
        raise RunError(
            f"{folder} holds a harvest with {found}. Choose a new folder, or the same settings to "
            "go on with it."
        )


def as_json(value: dict) -> dict:
    """A value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))
