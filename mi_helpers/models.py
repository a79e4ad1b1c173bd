"""One interface to a language model of any family: load it, look inside, change it, run on.

    model = load_model()                                      # tiny-gemma, or what MI_MODEL names
    logits, cache = model.run_with_cache("The Eiffel Tower is in", ["resid_post", ("z", 3)])
    cache["resid_post", 3]                                    # (batch, pos, d_model)
    with model.hooks({("z", 3): lambda z: z * 0}):            # ablate layer 3's heads
        ablated = model.forward("The Eiffel Tower is in")

The modules are Hugging Face's own, unmodified and with eager attention. A *site* is a named place
in them (`SITES`), called what TransformerLens calls it, and always what the model really computes:
nothing is folded or centred. One table (`FAMILIES`) says where each family keeps its parts.
"""

from __future__ import annotations

import difflib
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import errors as hub
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import repeat_kv
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

DATA = Path(__file__).resolve().parent.parent / "data"
UNSEEN = 0.99  # cosine with the padding token's column of W_U, from which `in_use` says no
DEFAULT_SITES = ("embed", "attn_out", "mlp_out", "resid_post")


class ModelError(ValueError):
    """What was given, what was expected, what to do: in one sentence."""


# ------------------------------------------------------------------------------- families, sites


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
_WHOLE_MODEL = {"embed", "pos_embed", "rotary", "blocks", "ln_final"}  # parts outside the blocks


@dataclass(frozen=True)
class Site:
    """A named place: the input ("in"), output ("out") or attention pattern of one part."""

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
_NO_LAYER = {"embed", "pos_embed", "resid_final"}

Key = tuple[str, int | None]
Hook = Callable[[Tensor], Tensor | None]


class Cache(Mapping):
    """Activations by site: `cache["z", 3]`, `cache["embed"]`, or, stacked over the cached layers,
    `cache["z"]` of shape (n_layers, batch, pos, ...). A negative layer counts from the end."""

    def __init__(self, n_layers: int):
        self.n_layers = n_layers
        self._store: dict[Key, Tensor] = {}

    def __getitem__(self, key: str | Key) -> Tensor:
        name, layer = (key, None) if isinstance(key, str) else key
        if layer is not None:
            layer = layer % self.n_layers if -self.n_layers <= layer < self.n_layers else layer
        if (name, layer) in self._store:
            return self._store[name, layer]
        stack = [self._store[k] for k in sorted(k for k in self._store if k[0] == name)]
        if layer is not None or not stack:
            held = ", ".join(sorted({k[0] for k in self._store})) or "nothing"
            raise ModelError(f"The cache has no {key!r}; it holds {held}: ask for it in `sites`.")
        return torch.stack(stack)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, key: object) -> bool:
        try:
            self[key]
        except (ModelError, TypeError, ValueError):
            return False
        return True


# ----------------------------------------------------------------------- the attention pattern

# A pattern can only be changed inside attention. While a pattern hook is on, the model's attention
# implementation is `_EAGER`: the family's own eager function, then the hooks on what it returned.
_EAGER = "mi_eager"
_pattern_hooks: dict[nn.Module, list[Callable[[Tensor], Tensor | None]]] = {}


def _attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    eager = sys.modules[type(module).__module__].eager_attention_forward
    z, pattern = eager(module, query, key, value, attention_mask, **kwargs)
    for hook in list(_pattern_hooks.get(module, ())):
        changed = hook(pattern)
        if changed is not None:
            pattern = changed  # (batch, n_heads, q_pos, k_pos)
            values = repeat_kv(value, query.shape[1] // value.shape[1])
            z = torch.matmul(pattern, values).transpose(1, 2).contiguous()
    return z, pattern


AttentionInterface.register(_EAGER, _attention)
AttentionMaskInterface.register(_EAGER, eager_mask)


class _Skip(nn.Module):
    """Stands in for a block that is not run: passes the stream on."""

    def forward(self, resid: Tensor, *args, **kwargs) -> Tensor:
        return resid


# -------------------------------------------------------------------------------- the model


def _stacked(name: str) -> property:
    return property(
        lambda model: torch.stack([model.weight(name, i) for i in range(model.n_layers)]),
        doc=f"{name} of every layer, (n_layers, ...): a copy of what `weight` gives.",
    )


class LanguageModel:
    """A Hugging Face causal language model with named sites.

    Args:
        hf: the model, of a family in `FAMILIES`; it is put into eval mode with eager attention and
            its parameters' gradients are turned off (activations can still be differentiated).
        tokenizer: its tokenizer, or None where only token ids will be used.
        name: how it is called in figures and errors.

    Raises:
        ModelError: the family is not in the table.
    """

    def __init__(self, hf: nn.Module, tokenizer=None, name: str | None = None):
        config = hf.config
        self.hf, self.tokenizer, self.config = hf, tokenizer, config
        self.family: str = config.model_type
        self.name: str = name or config.name_or_path or self.family
        self.layout = _layout(self.family, self.name)
        hf.set_attn_implementation("eager")
        hf.eval().requires_grad_(False)
        self.decoder: nn.Module = hf.get_submodule(self.layout.decoder)
        self.blocks: nn.ModuleList = self.decoder.get_submodule(self.layout.blocks)
        self.ln_final: nn.Module = self.part("ln_final")
        self.lm_head: nn.Module = hf.lm_head
        self.n_layers: int = len(self.blocks)
        self.d_model: int = config.hidden_size
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.d_mlp: int = _in_out(self.part("w_out", 0)).shape[0]
        self.d_vocab, _ = self.W_E.shape
        self.n_ctx: int = config.max_position_embeddings
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.parallel: bool = bool(getattr(config, "use_parallel_residual", False))
        self._n_hooks = 0

    def __repr__(self) -> str:
        return (
            f"LanguageModel({self.name}: {self.n_layers} layers, d_model {self.d_model}, "
            f"{self.n_heads} heads ({self.n_kv_heads} key-value) of {self.d_head}, "
            f"d_mlp {self.d_mlp}, d_vocab {self.d_vocab})"
        )

    @property
    def device(self) -> torch.device:
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def n_parameters(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(p.numel() for p in self.hf.parameters())

    def part(self, name: str, layer: int | None = None) -> nn.Module | None:
        """The module that `Family` calls `name` ("ln1_post", "o"), or None where there is none."""
        parts = set(Family.__dataclass_fields__) - {"decoder", "fused"}
        if name not in parts:
            raise ModelError(f"There is no part {name!r}.{_nearest(name, parts)}")
        path = getattr(self.layout, name)
        if path is None:
            return None
        if name in _WHOLE_MODEL:
            return self.decoder.get_submodule(path)
        return self.blocks[self._layer(name, layer)].get_submodule(path)

    # ---- weights, as the model stores them (no norm folded in)

    @property
    def W_E(self) -> Tensor:
        """Embedding rows (d_vocab, d_model), without Gemma's factor of sqrt(d_model)."""
        return self.part("embed").weight

    @property
    def W_U(self) -> Tensor:
        """Unembedding (d_model, d_vocab): logits = softcap(ln_final(resid) @ W_U)."""
        return self.lm_head.weight.T

    @cached_property
    def in_use(self) -> Tensor:
        """Which tokens of the vocabulary training has ever shown the model, (d_vocab,), bool.

        Tokens that no text contains get all but the same gradient in every step, and end with one
        and the same column of W_U: those whose column has a cosine of `UNSEEN` or more with that of
        the padding token (of <unk>, if there is none) are taken for such. In tiny-gemma they are
        numbers, symbols and pieces of letters. A model without either has all of them in use.

        Source: Land and Bartolo 2024, Fishing for Magikarp: the cosine of an unembedding row with
        those of tokens known to be unused.
        """
        names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
        bos, eos, *unused = (getattr(self.tokenizer, name, None) for name in names)
        for token in unused:
            if token not in (None, bos, eos):
                columns = F.normalize(self.W_U.detach().float(), dim=0)
                used = columns.T @ columns[:, token] < UNSEEN
                used[token] = False
                return used
        return torch.ones(self.d_vocab, dtype=torch.bool, device=self.device)

    def weight(self, name: str, layer: int) -> Tensor:
        """One layer's W_Q, W_K, W_V (heads, d_model, d_head), W_O (n_heads, d_head, d_model),
        W_in, W_gate (d_model, d_mlp) or W_out (d_mlp, d_model), as a view of the parameter.

        Raises:
            ModelError: no such weight, or W_gate of a model whose MLP has no gate.
        """
        parts = {f"W_{n}": n.lower() for n in "QKVO"}
        parts |= {"W_in": "w_in", "W_gate": "w_gate", "W_out": "w_out"}
        if name not in parts:
            raise ModelError(f"There is no weight {name!r}.{_nearest(name, parts)}")
        module = self.part(parts[name], layer)
        if module is None:
            raise ModelError(f"{self.name} has no {name}: its MLP is not gated.")
        matrix = _in_out(module)
        if name in ("W_Q", "W_K", "W_V"):
            return self._view(parts[name], matrix).transpose(0, 1)  # (heads, d_model, d_head)
        return matrix.unflatten(0, (self.n_heads, self.d_head)) if name == "W_O" else matrix

    W_Q, W_K, W_V, W_O = (_stacked(name) for name in ("W_Q", "W_K", "W_V", "W_O"))
    W_in, W_gate, W_out = (_stacked(name) for name in ("W_in", "W_gate", "W_out"))

    # ---- text and tokens

    def _tokenizer(self):
        if self.tokenizer is None:
            raise ModelError(f"{self.name} was given no tokenizer: pass token ids instead of text.")
        return self.tokenizer

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer().encode(text, add_special_tokens=False)
        if not ids:
            raise ModelError(f"The text {text!r} is empty: give at least one word.")
        return ids

    def tokens(self, text: str | list[str], prepend_bos: bool = True, pad: bool = False) -> Tensor:
        """Text, or a list of texts, as token ids (batch, pos), int64, on the model's device.

        The tokenizer's BOS is put first if it has one. With `pad`, shorter texts are padded on the
        right, which changes nothing before the padding, as attention is causal; leave the padded
        positions out of what you average.

        Raises:
            ModelError: empty text, texts of unequal length without `pad`, longer than the context.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ModelError("The list of texts is empty: give at least one text.")
        rows = [self._encode(t) for t in texts]
        bos = self.tokenizer.bos_token_id
        if prepend_bos and bos is not None:
            rows = [row if row[0] == bos else [bos, *row] for row in rows]
        lengths = [len(row) for row in rows]
        if len(set(lengths)) > 1 and not pad:
            raise ModelError(
                f"The texts have {min(lengths)} to {max(lengths)} tokens: choose texts of equal "
                "length, so that positions line up, or pass pad=True."
            )
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        filler = next(i for i in ids if i is not None)
        rows = [row + [filler] * (max(lengths) - len(row)) for row in rows]
        return self._ids(torch.tensor(rows))

    def str_tokens(self, text: str | list[int] | Tensor) -> list[str]:
        """Each token of one text (BOS included), or of one row of ids, as a string."""
        ids = self._ids(text)
        if ids.shape[0] != 1:
            raise ModelError(f"str_tokens takes one text at a time, not {ids.shape[0]}.")
        tokenizer = self._tokenizer()
        return [tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids[0].tolist()]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token, such as " Paris" (mind the leading space).

        Raises:
            ModelError: it is several tokens, or not in the vocabulary.
        """
        ids = self._encode(text)
        if len(ids) > 1:
            pieces = [self.tokenizer.decode([i]) for i in ids]
            raise ModelError(
                f"{text!r} is {len(ids)} tokens, {pieces}: choose a word that is one token, and "
                "mind the leading space."
            )
        if ids[0] == self.tokenizer.unk_token_id and text != self.tokenizer.unk_token:
            raise ModelError(f"{text!r} is not in {self.name}'s vocabulary: mind the spaces.")
        return ids[0]

    def _ids(self, tokens: str | list | Tensor) -> Tensor:
        """Text or ids as checked ids (batch, pos)."""
        first = tokens[0] if isinstance(tokens, list) and tokens else tokens
        if isinstance(first, str):
            return self.tokens(tokens)
        ids = torch.as_tensor(tokens)
        ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point() or ids.is_complex():
            raise ModelError(
                f"Token ids are integers of shape (batch, pos), with at least one token; "
                f"these are {ids.dtype} of shape {tuple(ids.shape)}."
            )
        if ids.shape[1] > self.n_ctx:
            raise ModelError(
                f"The text has {ids.shape[1]} tokens, more than {self.name}'s context of "
                f"{self.n_ctx}: shorten it."
            )
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= self.d_vocab:
            raise ModelError(
                f"Token id {low if low < 0 else high} is out of range: {self.name} has ids 0 to "
                f"{self.d_vocab - 1}."
            )
        return ids.to(self.device, torch.int64)

    # ---- running

    def forward(self, tokens: str | list | Tensor) -> Tensor:
        """Logits (batch, pos, d_vocab), after the final soft-cap: what Hugging Face returns."""
        return self._run(ids=self._ids(tokens))

    __call__ = forward

    def run_with_cache(
        self,
        tokens: str | list | Tensor,
        sites: Iterable[str | Key] | str | None = None,
        stop_at_layer: int | None = None,
        pos: int | slice | list[int] | None = None,
    ) -> tuple[Tensor | None, Cache]:
        """Run, and keep the activations at `sites`.

        Args:
            sites: names ("resid_post": every layer) or (name, layer); None means `DEFAULT_SITES`.
            stop_at_layer: run blocks 0 to stop_at_layer - 1 only, and no unembedding.
            pos: keep these positions only (query positions of a pattern); an int drops the axis.

        Returns:
            logits (batch, pos, d_vocab), or None if the run was stopped; the cache.

        Raises:
            ModelError: unknown site, layer or position out of range or not reached.
        """
        ids = self._ids(tokens)
        stop = self.n_layers if stop_at_layer is None else self._boundary(stop_at_layer)
        single = isinstance(sites, str) or (
            isinstance(sites, tuple) and len(sites) == 2 and hasattr(sites[1], "__index__")
        )
        keys = self._expand(DEFAULT_SITES if sites is None else [sites] if single else sites, stop)
        pos = _positions(pos, ids.shape[1])
        cache = Cache(self.n_layers)

        def keep(key: Key) -> Hook:
            def hook(x: Tensor) -> None:
                at = () if pos is None else (slice(None),) * (2 if key[0] == "pattern" else 1)
                cache._store[key] = x if pos is None else x[(*at, pos)].clone()

            return hook

        with ExitStack() as undo:
            for key in keys:
                undo.callback(self._register(key, keep(key)))
            logits = self._run(ids=ids, stop=None if stop_at_layer is None else stop)
        return (logits if stop_at_layer is None else None), cache

    @contextmanager
    def hooks(self, fns: Mapping[str | Key, Hook]):
        """While the context lasts, pass each site's activation through its function.

        Args:
            fns: {("z", 3): fn, "embed": fn, "mlp_out": fn for every layer}. `fn(activation)` gets a
                copy, and returns what the model goes on with (same shape), or None to only look.
                Contexts nest; hooks on one site run in the order in which they were set.

        Raises:
            ModelError: unknown site, layer out of range; in the run: a return of the wrong shape.
        """
        chosen = []
        for key, fn in fns.items():
            if not callable(fn):
                raise ModelError(f"The hook at {key!r} is a {type(fn).__name__}, not a function.")
            chosen += [(k, lambda x, fn=fn: fn(x.clone())) for k in self._expand([key])]
        with ExitStack() as undo:
            self._n_hooks += 1
            undo.callback(lambda: setattr(self, "_n_hooks", self._n_hooks - 1))
            for key, fn in chosen:
                undo.callback(self._register(key, fn))
            yield self

    def run_from_layer(self, resid: Tensor, layer: int, stop_at_layer: int | None = None) -> Tensor:
        """Go on from `resid`, the stream as it enters block `layer` (its resid_pre).

        Positions count from 0, so `resid` (batch, pos, d_model) holds whole sequences; the batch
        may be any size. Hooks at `layer` and after it apply.

        Returns:
            logits (batch, pos, d_vocab); with `stop_at_layer`, the stream entering that block.
        """
        start = self._boundary(layer)
        stop = None if stop_at_layer is None else self._boundary(stop_at_layer)
        if stop is not None and stop < start:
            raise ModelError(f"Cannot stop at layer {stop} when starting from layer {start}.")
        if resid.ndim != 3 or resid.shape[-1] != self.d_model or 0 in resid.shape:
            raise ModelError(
                f"resid has shape {tuple(resid.shape)}, expected (batch, pos, {self.d_model})."
            )
        return self._run(resid=resid.to(self.device, self.dtype), start=start, stop=stop)

    def unembed(self, resid: Tensor, softcap: bool = True) -> Tensor:
        """softcap(lm_head(ln_final(resid))), (..., d_model) -> (..., d_vocab): the logit lens.

        With softcap=False the logits are linear in the normed stream, as direct logit attribution
        needs.
        """
        logits = self.lm_head(self.ln_final(resid))
        if not softcap or self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    def loss(self, tokens: str | list | Tensor) -> Tensor:
        """-log p(next token) at every position but the last, (batch, pos - 1), in nats."""
        ids = self._ids(tokens)
        if ids.shape[1] < 2:
            raise ModelError("A loss needs at least two tokens: one to read, one to predict.")
        logits = self.forward(ids)[:, :-1].float()
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    @torch.no_grad()
    def generate(self, text: str, n: int, temperature: float = 0.0, seed: int | None = None) -> str:
        """`text` and up to n further tokens: the likeliest, or sampled at `temperature`.

        Under `hooks` the whole text is run anew for each token, so that a hook always sees it all;
        otherwise keys and values are reused.
        """
        ids, past = self.tokens(text), None
        if ids.shape[0] != 1:
            raise ModelError("generate takes one text at a time.")
        if ids.shape[1] + n > self.n_ctx:
            raise ModelError(
                f"{ids.shape[1]} tokens and {n} new ones exceed the context of {self.n_ctx}."
            )
        rng = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        for _ in range(n):
            if self._n_hooks:
                logits = self.forward(ids)[0, -1]
            else:
                new = ids if past is None else ids[:, -1:]
                out = self.hf(input_ids=new, past_key_values=past, use_cache=True)
                past, logits = out.past_key_values, out.logits[0, -1]
            if temperature == 0:
                token = logits.argmax()
            else:
                p = torch.softmax(logits.float() / temperature, -1)
                token = torch.multinomial(p, 1, generator=rng)[0]
            ids = torch.cat([ids, token.reshape(1, 1)], 1)
            if token.item() == self.tokenizer.eos_token_id:
                break
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)

    def _run(
        self,
        ids: Tensor | None = None,
        resid: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Hugging Face's own forward, with blocks other than start..stop-1 passing the stream on.

        So masks, positions and rotary embeddings are always the ones Hugging Face builds.
        Returns logits, or the stream after block stop-1 if `stop` is given.
        """
        if self.device.type == "meta":
            raise ModelError(f"{self.name} has no weights to run with: call materialize(model).")
        last = self.n_layers if stop is None else stop
        skipped = {i: self.blocks[i] for i in range(self.n_layers) if not start <= i < last}
        inputs = {"input_ids": ids} if resid is None else {"inputs_embeds": resid}
        reached = []
        with ExitStack() as undo:
            for i, block in skipped.items():
                undo.callback(self.blocks.__setitem__, i, block)
                self.blocks[i] = _Skip()
            if resid is not None:
                entry = self.blocks[min(start, self.n_layers - 1)].register_forward_pre_hook(
                    lambda _, args: (resid, *args[1:]), prepend=True
                )
                undo.callback(entry.remove)
            if stop is None:
                return self.hf(**inputs, use_cache=False).logits
            end = self.ln_final.register_forward_pre_hook(lambda _, args: reached.append(args[0]))
            undo.callback(end.remove)
            self.decoder(**inputs, use_cache=False)
        return reached[0]

    # ---- sites

    def _layer(self, name: str, layer: int | None) -> int:
        if layer is None or not -self.n_layers <= layer < self.n_layers:
            raise ModelError(
                f"{name!r} needs a layer from 0 to {self.n_layers - 1}, not {layer}: {self.name} "
                f"has {self.n_layers} layers."
            )
        return layer % self.n_layers

    def _boundary(self, layer: int) -> int:
        if not 0 <= layer <= self.n_layers:
            raise ModelError(
                f"Layer {layer} is out of range: {self.name} can start or stop at 0 to "
                f"{self.n_layers}."
            )
        return layer

    def _expand(self, sites: Iterable[str | Key], stop: int | None = None) -> list[Key]:
        """Names and (name, layer) pairs as checked keys, a bare name standing for every layer."""
        stop = self.n_layers if stop is None else stop
        keys: dict[Key, None] = {}
        for site in sites:
            name, layer = (site, None) if isinstance(site, str) else site
            self._check_site(name)
            if name in _NO_LAYER:
                if layer is not None:
                    raise ModelError(f"{name!r} belongs to no layer: ask for {name!r} alone.")
                if name == "resid_final" and stop < self.n_layers:
                    raise ModelError(f"'resid_final' is not reached: the run stops at {stop}.")
                keys[name, None] = None
            elif layer is None:
                keys |= dict.fromkeys((name, i) for i in range(stop))
            else:
                layer = self._layer(name, layer)
                if layer >= stop:
                    raise ModelError(f"{(name, layer)} is not reached: the run stops at {stop}.")
                keys[name, layer] = None
        return list(keys)

    def _check_site(self, name: str) -> None:
        if name not in SITES:
            known = ", ".join(SITES)
            raise ModelError(f"There is no site {name!r}; sites: {known}.{_nearest(name, SITES)}")
        if name == "resid_mid" and self.parallel:
            raise ModelError(
                f"{self.name} has no resid_mid: its attention and MLP read the same stream in "
                "parallel, so there is no stream between them."
            )
        if name == "pos_embed" and self.layout.pos_embed is None:
            raise ModelError(f"{self.name} has no pos_embed: its positions are rotary.")
        if name == "pattern" and getattr(self.config, "reorder_and_upcast_attn", False):
            raise ModelError(f"{self.name} upcasts its attention, which pattern hooks do not know.")

    def _view(self, name: str, full: Tensor) -> Tensor:
        """The site's shape, as a view of the tensor in the model: q, k, v and z by head."""
        if name == "z":
            return full.unflatten(-1, (self.n_heads, self.d_head))
        if name not in ("q", "k", "v"):
            return full
        if self.layout.fused == "thirds":
            return full.unflatten(-1, (3, self.n_heads, self.d_head))[..., "qkv".index(name), :, :]
        if self.layout.fused == "by head":
            return full.unflatten(-1, (self.n_heads, 3, self.d_head))[..., "qkv".index(name), :]
        return full.unflatten(-1, (-1, self.d_head))

    def _apply(self, key: Key, fn: Hook, full: Tensor) -> Tensor | None:
        """fn on the site's view of `full`: the tensor to go on with, or None for the same one."""
        seen = self._view(key[0], full)
        new = fn(seen)
        if new is None:
            return None
        if not isinstance(new, Tensor) or new.shape != seen.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ModelError(
                f"The hook at {key} returned {got}, expected {tuple(seen.shape)} "
                f"({SITES[key[0]].shape}), or None to change nothing."
            )
        new = new.to(seen)
        if key[0] == "resid_mid":  # the norm and the residual branch read this very tensor
            full.copy_(new)
            return None
        if new.numel() == full.numel():
            return new.reshape(full.shape)
        full = full.clone()
        self._view(key[0], full).copy_(new)
        return full

    def _register(self, key: Key, fn: Hook) -> Callable[[], None]:
        """Set one hook; the function returned takes it away."""
        name, layer = key
        site = SITES[name]
        module = self.part(site.part, -1 if name == "resid_final" else layer)

        def apply(full: Tensor) -> Tensor | None:
            return self._apply(key, fn, full)

        def before(_, args):
            new = apply(args[0])
            return None if new is None else (new, *args[1:])

        if site.side == "in":
            return module.register_forward_pre_hook(before).remove
        if site.side == "out":
            return module.register_forward_hook(lambda _, args, out: apply(out)).remove
        _pattern_hooks.setdefault(module, []).append(apply)
        self.config._attn_implementation = _EAGER

        def remove() -> None:
            _pattern_hooks[module].remove(apply)
            if not _pattern_hooks[module]:
                del _pattern_hooks[module]
            if not any(self.part("attn", i) in _pattern_hooks for i in range(self.n_layers)):
                self.config._attn_implementation = "eager"

        return remove


# ------------------------------------------------------------------------------- small helpers


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _layout(family: str, name: str) -> Family:
    if family not in FAMILIES:
        raise ModelError(
            f"{name} is of the family {family!r}, which is not in the table; known families: "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[family]


def _in_out(module: nn.Module) -> Tensor:
    """A linear map's weight as (in, out), whichever way round it is stored."""
    return module.weight if isinstance(module, Conv1D) else module.weight.T


def _positions(pos, length: int):
    if pos is None or isinstance(pos, slice):
        return pos
    single = hasattr(pos, "__index__") and not getattr(pos, "ndim", 0)
    chosen = [operator.index(p) for p in ([pos] if single else pos)]
    wrong = [p for p in chosen if not -length <= p < length]
    if wrong:
        raise ModelError(f"Position {wrong[0]} is out of range: the text has {length} tokens.")
    return chosen[0] if single else chosen


def norm_gain(norm: nn.Module) -> Tensor:
    """What a norm multiplies by after normalising, (d_model,): 1 + w in Gemma's RMSNorm, else w."""
    return 1.0 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight


# ------------------------------------------------------------------------------------ loading


def load_model(
    name_or_path: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> LanguageModel:
    """Load "tiny-gemma", a local folder or a model of the Hugging Face hub.

    Args:
        name_or_path: None means the environment variable MI_MODEL, else "tiny-gemma".
        dtype: None means the one that the weights are stored in.
        device: None means the CPU.

    Raises:
        ModelError: what is missing (folder, weights, licence, network, family), in one sentence.
    """
    name = str(name_or_path or os.environ.get("MI_MODEL") or "tiny-gemma")
    source = str(DATA / "tiny_gemma") if name == "tiny-gemma" else os.path.expanduser(name)
    local = name == "tiny-gemma" or os.path.isdir(source) or name.startswith((".", "/", "~"))
    if local:
        _check_folder(name, Path(source))
    bars = hf_logging.is_progress_bar_enabled()
    if local:  # a second or two: no bar in a committed notebook
        hf_logging.disable_progress_bar()
    try:
        _layout(AutoConfig.from_pretrained(source).model_type, name)
        tokenizer = AutoTokenizer.from_pretrained(source)
        hf, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or "auto",
            attn_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except (OSError, ValueError, RuntimeError, hub.EntryNotFoundError, SafetensorError) as error:
        raise ModelError(_why(name, error)) from None
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    if info["missing_keys"]:
        raise ModelError(f"{name} lacks weights: {sorted(info['missing_keys'])[:3]} are not there.")
    return LanguageModel(hf if device is None else hf.to(device), tokenizer, name)


def _check_folder(name: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"{name} is not at {folder}: "
            + ("`make model` trains it." if name == "tiny-gemma" else "there is no such folder.")
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


def _why(name: str, error: BaseException) -> str:
    """One sentence for whatever the hub or transformers raised, causes included."""
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
    first = str(error).strip().splitlines() or [type(error).__name__]
    return f"{name} could not be loaded: {first[0].rstrip('.:')}."
