"""Where each model family keeps its parts (`FAMILIES`), and the names of the sites (`SITES`).

A *site* is a named place in a model, and has the name that TransformerLens gives it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mi_helpers.errors import Refused

Key = tuple[str, int | None]  # a site: (name, layer), layer None for the sites outside the blocks
Hook = Callable[[Tensor], Tensor | None]  # activation -> what the model goes on with


class ModelError(Refused):
    """What was given, what was expected, what to do: in one sentence."""


def nearest(name: str, known: Iterable[str]) -> str:
    """What an error ends with: the one of `known` that is most like `name`, or "" if none is."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


# ------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """Where one family keeps its parts; the defaults are Llama's."""

    decoder: str = "model"  # inside the Hugging Face model
    embed: str = "embed_tokens"  # inside the decoder, down to ln_final
    pos_embed: str | None = None
    rotary: str | None = "rotary_emb"
    blocks: str = "layers"
    ln_final: str = "norm"
    block: str = ""  # inside each block, from here on
    ln1: str = "input_layernorm"
    attn: str = "self_attn"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    q_norm: str | None = None
    k_norm: str | None = None
    o: str = "self_attn.o_proj"
    ln1_post: str | None = None
    attn_out: str = "self_attn.o_proj"  # the module whose output is added to the stream
    ln2: str = "post_attention_layernorm"
    mlp: str = "mlp"
    w_gate: str | None = "mlp.gate_proj"
    w_in: str = "mlp.up_proj"
    w_out: str = "mlp.down_proj"
    ln2_post: str | None = None
    mlp_out: str = "mlp"  # the module whose output is added to the stream
    fused: str | None = None  # q, k and v in one matrix: as "thirds", or "by head"


_QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_GEMMA2 = Family(
    ln1_post="post_attention_layernorm",
    attn_out="post_attention_layernorm",
    ln2="pre_feedforward_layernorm",
    ln2_post="post_feedforward_layernorm",
    mlp_out="post_feedforward_layernorm",
)
_GPT2 = Family(
    decoder="transformer",
    embed="wte",
    pos_embed="wpe",
    rotary=None,
    blocks="h",
    ln_final="ln_f",
    ln1="ln_1",
    attn="attn",
    **dict.fromkeys("qkv", "attn.c_attn"),
    o="attn.c_proj",
    attn_out="attn.resid_dropout",
    ln2="ln_2",
    w_gate=None,
    w_in="mlp.c_fc",
    w_out="mlp.c_proj",
    fused="thirds",
)
_GPT_NEOX = Family(
    decoder="gpt_neox",
    embed="embed_in",
    ln_final="final_layer_norm",
    attn="attention",
    **dict.fromkeys("qkv", "attention.query_key_value"),
    o="attention.dense",
    attn_out="post_attention_dropout",
    w_gate=None,
    w_in="mlp.dense_h_to_4h",
    w_out="mlp.dense_4h_to_h",
    mlp_out="post_mlp_dropout",
    fused="by head",
)
FAMILIES: dict[str, Family] = {  # by the configuration's model_type
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, **_QK_NORM),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(**_QK_NORM),
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
}
OUTSIDE_BLOCKS = {"embed", "pos_embed", "rotary", "blocks", "ln_final"}  # parts outside the blocks


def layout_of(family: str, name: str) -> Family:
    """The family's entry in `FAMILIES`; `name` is what the error calls the model.

    Raises:
        ModelError: the family is not in the table.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            f"{name} is of the family {family!r}, which is not in the table; known families: "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[family]


def in_out(module: nn.Module) -> Tensor:
    """A linear map's weight as (in, out), whichever way round it is stored."""
    return module.weight if isinstance(module, Conv1D) else module.weight.T


def norm_gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies by after normalising, (d_model,): 1 + w in Gemma's RMSNorm, else w."""
    return 1.0 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm gives before its gain (and bias): RMSNorm x / √(mean x² + ε), or LayerNorm."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    plain = F.layer_norm if isinstance(norm, nn.LayerNorm) else F.rms_norm
    return plain(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


# ---------------------------------------------------------------------------------------- sites


@dataclass(frozen=True)
class Site:
    """A named place: the input, the output or the attention pattern of one part.

    Attributes:
        part: a field of `Family`.
        side: "in", "out" or "pattern".
        shape: its axes, by name.
        about: what it holds.
    """

    part: str
    side: str
    shape: str
    about: str


_STREAM = "batch pos d_model"
_QUERIES = "batch pos n_heads d_head"
_KEYS = "batch pos n_kv_heads d_head"
SITES: dict[str, Site] = {
    "embed": Site("embed", "out", _STREAM, "token embedding as the stream gets it (Gemma: scaled)"),
    "pos_embed": Site("pos_embed", "out", "1 pos d_model", "position embedding (GPT-2 only)"),
    "resid_pre": Site("block", "in", _STREAM, "the stream as it enters the block"),
    "q": Site("q", "out", _QUERIES, "queries, before q-norm and rotary"),
    "k": Site("k", "out", _KEYS, "keys, before k-norm and rotary"),
    "v": Site("v", "out", _KEYS, "values"),
    "pattern": Site("attn", "pattern", "batch n_heads q_pos k_pos", "attention probabilities"),
    "z": Site("o", "in", _QUERIES, "per head, the values mixed by the pattern: what W_O reads"),
    "attn_out": Site("attn_out", "out", _STREAM, "what attention adds to the stream"),
    "resid_mid": Site("ln2", "in", _STREAM, "the stream between attention and MLP"),
    "mlp_in": Site("mlp", "in", _STREAM, "the MLP's input, after its norm and gain"),
    "post": Site("w_out", "in", "batch pos d_mlp", "the MLP's neurons: what W_out reads"),
    "mlp_out": Site("mlp_out", "out", _STREAM, "what the MLP adds to the stream"),
    "resid_post": Site("block", "out", _STREAM, "the stream as it leaves the block"),
    "resid_final": Site("block", "out", _STREAM, "the last resid_post, before the final norm"),
}
NO_LAYER = {"embed", "pos_embed", "resid_final"}  # the sites outside the blocks
NORMALIZED = "ln2_normalized"  # the MLP's input before its norm's gain: no site of the table


def hook_name(site: Key) -> str | None:
    """What TransformerLens calls a site, for a coder's file; None where it has no such hook."""
    name, layer = site
    inside = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "z": "attn.hook_z"}
    inside |= {"post": "mlp.hook_post", NORMALIZED: "ln2.hook_normalized"}
    inside |= {n: f"hook_{n}" for n in ("resid_pre", "resid_mid", "resid_post")}
    inside |= {n: f"hook_{n}" for n in ("attn_out", "mlp_out")}
    if layer is None:
        return "hook_embed" if name == "embed" else None
    return f"blocks.{layer}.{inside[name]}" if name in inside else None
