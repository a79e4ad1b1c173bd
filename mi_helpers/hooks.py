"""A model's parts, weights and named sites: Hugging Face's own modules, and hooks on them.

The modules are unmodified, and their attention is eager. A site holds what the model itself
computes: nothing is folded or centred.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import repeat_kv

from mi_helpers.arguments import shown, whole
from mi_helpers.layouts import (
    NO_LAYER,
    OUTSIDE_BLOCKS,
    SITES,
    Family,
    Hook,
    Key,
    ModelError,
    in_out,
    layout_of,
    nearest,
)


class Cache(Mapping):
    """Activations by site: `cache["z", 3]`, `cache["embed"]`, or, stacked over the cached layers,
    `cache["z"]` of shape (n_layers, batch, pos, ...). A negative layer counts from the end.

    Args:
        n_layers: how many layers the model has.
        store: {(name, layer): activation}, layer None for the sites outside the blocks.
    """

    def __init__(self, n_layers: int, store: dict[Key, Tensor]):
        self.n_layers, self._store = n_layers, store

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
# implementation is `EAGER`: the family's own eager function, then the hooks on what it returned; or
# what `replaced_attention` has for a module, which is called with that function first.
EAGER = "mi_eager"
_pattern_hooks: dict[nn.Module, list[Callable[[Tensor], Tensor | None]]] = {}
replaced_attention: dict[nn.Module, Callable] = {}


def _attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if instead := replaced_attention.get(module):
        return instead(eager, module, query, key, value, attention_mask, **kwargs)
    z, pattern = eager(module, query, key, value, attention_mask, **kwargs)
    for hook in list(_pattern_hooks.get(module, ())):
        changed = hook(pattern)
        if changed is not None:
            pattern = changed  # (batch, n_heads, q_pos, k_pos)
            values = repeat_kv(value, query.shape[1] // value.shape[1])
            z = torch.matmul(pattern, values).transpose(1, 2).contiguous()
    return z, pattern


AttentionInterface.register(EAGER, _attention)
AttentionMaskInterface.register(EAGER, eager_mask)


class _Skip(nn.Module):
    """Stands in for a block that is not run: passes the stream on."""

    def forward(self, resid: Tensor, *args, **kwargs) -> Tensor:
        return resid


def _stacked(name: str) -> property:
    return property(
        lambda model: torch.stack([model.weight(name, i) for i in range(model.n_layers)]),
        doc=f"{name} of every layer, (n_layers, ...): a copy of what `weight` gives.",
    )


class HookedModel:
    """A Hugging Face causal language model as parts, weights and named sites: no text yet.

    Attributes:
        hf, config, tokenizer: the model, its configuration, its tokenizer (None: token ids only).
        name: how figures and errors call it.
        family, layout: its `model_type`, and that family's entry in `FAMILIES`.
        decoder, blocks, ln_final, lm_head: Hugging Face's own modules.
        n_layers, d_model, n_heads, n_kv_heads, d_head, d_mlp, d_vocab, n_ctx: its sizes.
        softcap: the cap on the logits, or None.
        parallel: whether attention and MLP read the same stream (GPT-NeoX).
    """

    def __init__(self, hf: nn.Module, tokenizer=None, name: str | None = None):
        config = hf.config
        self.hf, self.tokenizer, self.config = hf, tokenizer, config
        self.family: str = config.model_type
        self.name: str = name or config.name_or_path or self.family
        self.layout = layout_of(self.family, self.name)
        hf.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
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
        self.d_mlp: int = in_out(self.part("w_out", 0)).shape[0]
        self.d_vocab, _ = self.W_E.shape
        self.n_ctx: int = config.max_position_embeddings
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.parallel: bool = bool(getattr(config, "use_parallel_residual", False))
        self._n_hooks = 0

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name}: {self.n_layers} layers, d_model {self.d_model}, "
            f"{self.n_heads} heads ({self.n_kv_heads} key-value) of {self.d_head}, "
            f"d_mlp {self.d_mlp}, d_vocab {self.d_vocab})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.hf.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in."""
        return self.hf.dtype

    @property
    def hooked(self) -> bool:
        """Whether `hooks` is changing or watching the model now."""
        return self._n_hooks > 0

    @property
    def n_parameters(self) -> int:
        """Parameters, a tied embedding counted once."""
        return sum(p.numel() for p in self.hf.parameters())

    def part(self, name: str, layer: int | None = None) -> nn.Module | None:
        """The module that `Family` calls `name` ("ln1_post", "o"); None where the family has none.

        Raises:
            ModelError: no such part, or a layer that is missing or out of range.
        """
        parts = set(Family.__dataclass_fields__) - {"decoder", "fused"}
        if not isinstance(name, str) or name not in parts:
            raise ModelError(
                f"There is no part {name!r}; parts: {', '.join(sorted(parts))}."
                f"{nearest(name, parts)}"
            )
        path = getattr(self.layout, name)
        if path is None:
            return None
        if name in OUTSIDE_BLOCKS:
            return self.decoder.get_submodule(path)
        return self.blocks[self.layer_index(name, layer)].get_submodule(path)

    # ---- weights, as the model stores them (no norm folded in)

    @property
    def W_E(self) -> Tensor:
        """Embedding rows (d_vocab, d_model), without Gemma's factor of sqrt(d_model)."""
        return self.part("embed").weight

    @property
    def W_U(self) -> Tensor:
        """Unembedding (d_model, d_vocab): logits = softcap(ln_final(resid) @ W_U)."""
        return self.lm_head.weight.T

    def weight(self, name: str, layer: int) -> Tensor:
        """One layer's W_Q, W_K, W_V (heads, d_model, d_head), W_O (n_heads, d_head, d_model),
        W_in, W_gate (d_model, d_mlp) or W_out (d_mlp, d_model), as a view of the parameter.

        Raises:
            ModelError: no such weight, or W_gate of a model whose MLP has no gate.
        """
        parts = {f"W_{n}": n.lower() for n in "QKVO"}
        parts |= {"W_in": "w_in", "W_gate": "w_gate", "W_out": "w_out"}
        if not isinstance(name, str) or name not in parts:
            raise ModelError(
                f"There is no weight {name!r}; weights: {', '.join(parts)}.{nearest(name, parts)}"
            )
        module = self.part(parts[name], layer)
        if module is None:
            raise ModelError(f"{self.name} has no {name}: its MLP is not gated.")
        matrix = in_out(module)
        if name in ("W_Q", "W_K", "W_V"):
            return self.split_heads(parts[name], matrix).transpose(0, 1)  # (heads, d_model, d_head)
        return matrix.unflatten(0, (self.n_heads, self.d_head)) if name == "W_O" else matrix

    W_Q, W_K, W_V, W_O = (_stacked(name) for name in ("W_Q", "W_K", "W_V", "W_O"))
    W_in, W_gate, W_out = (_stacked(name) for name in ("W_in", "W_gate", "W_out"))

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
        if not isinstance(fns, Mapping):
            raise ModelError(f"fns is {shown(fns)}: expected {{site: function}}.")
        chosen = []
        for key, fn in fns.items():
            if not callable(fn):
                raise ModelError(f"The hook at {key!r} is a {type(fn).__name__}, not a function.")
            chosen += [(k, lambda x, fn=fn: fn(x.clone())) for k in self.site_keys([key])]
        with ExitStack() as undo:
            self._n_hooks += 1
            undo.callback(lambda: setattr(self, "_n_hooks", self._n_hooks - 1))
            for key, fn in chosen:
                undo.callback(self.add_hook(key, fn))
            yield self

    def _run(
        self,
        ids: Tensor | None = None,
        resid: Tensor | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        """Hugging Face's own forward, in which blocks other than start to stop - 1 are passed over.

        So masks, positions and rotary embeddings are always the ones that Hugging Face builds.

        Returns:
            logits, or the stream after block stop - 1 if `stop` is given.
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

    def use_attention(self, implementation: str) -> str:
        """Switch to an attention function that transformers' `AttentionInterface` has.

        Returns:
            The name of the one before.
        """
        former = self.config._attn_implementation
        self.config._attn_implementation = implementation
        return former

    # ---- sites

    def layer_index(self, name: str, layer: int | None) -> int:
        """A layer counted from the first; `name` is what needs it, for the error.

        Raises:
            ModelError: no layer was given, or one out of range.
        """
        try:
            return whole("layer", layer, -self.n_layers, self.n_layers - 1) % self.n_layers
        except ModelError:
            raise ModelError(
                f"{name!r} needs a layer from 0 to {self.n_layers - 1}, not {shown(layer)}: "
                f"{self.name} has {self.n_layers} layers."
            ) from None

    def _boundary(self, layer: int) -> int:
        try:
            return whole("layer", layer, 0, self.n_layers)
        except ModelError:
            raise ModelError(
                f"Layer {shown(layer)} is out of range: {self.name} can start or stop at 0 to "
                f"{self.n_layers}."
            ) from None

    def site_keys(self, sites: Iterable[str | Key], stop: int | None = None) -> list[Key]:
        """Names and (name, layer) pairs as checked keys, a bare name standing for every layer.

        Args:
            stop: how many blocks are run; None means all.

        Raises:
            ModelError: an unknown site, a layer out of range, or one that is not reached.
        """
        stop = self.n_layers if stop is None else stop
        keys: dict[Key, None] = {}
        for site in sites:
            if not isinstance(site, str) and not (
                isinstance(site, tuple | list) and len(site) == 2
            ):
                raise ModelError(f"A site is {shown(site)}: expected a name, or (name, layer).")
            name, layer = (site, None) if isinstance(site, str) else site
            self.check_site(name)
            if name in NO_LAYER:
                if layer is not None:
                    raise ModelError(f"{name!r} belongs to no layer: ask for {name!r} alone.")
                if name == "resid_final" and stop < self.n_layers:
                    raise ModelError(f"'resid_final' is not reached: the run stops at {stop}.")
                keys[name, None] = None
            elif layer is None:
                keys |= dict.fromkeys((name, i) for i in range(stop))
            else:
                layer = self.layer_index(name, layer)
                if layer >= stop:
                    raise ModelError(f"{(name, layer)} is not reached: the run stops at {stop}.")
                keys[name, layer] = None
        return list(keys)

    def check_site(self, name: str) -> None:
        """Refuse a site that does not exist, or that this model does not have.

        Raises:
            ModelError: it says which sites there are, or why this model lacks it.
        """
        if not isinstance(name, str) or name not in SITES:
            known = ", ".join(SITES)
            raise ModelError(f"There is no site {name!r}; sites: {known}.{nearest(name, SITES)}")
        if name == "resid_mid" and self.parallel:
            raise ModelError(
                f"{self.name} has no resid_mid: its attention and MLP read the same stream in "
                "parallel, so there is no stream between them."
            )
        if name == "pos_embed" and self.layout.pos_embed is None:
            raise ModelError(f"{self.name} has no pos_embed: its positions are rotary.")
        if name == "pattern" and getattr(self.config, "reorder_and_upcast_attn", False):
            raise ModelError(f"{self.name} upcasts its attention, which pattern hooks do not know.")

    def split_heads(self, name: str, full: Tensor) -> Tensor:
        """The site's shape, as a view of the tensor in the model: q, k, v and z by head.

        Args:
            full: (..., width) as the module holds it.

        Returns:
            (..., heads, d_head) for q, k, v and z; `full` itself for every other site.

        Raises:
            ModelError: another width than the module's.
        """
        heads = {"k": self.n_kv_heads, "v": self.n_kv_heads}.get(name, self.n_heads)
        width = heads * self.d_head * (1 if name == "z" or not self.layout.fused else 3)
        if name in ("q", "k", "v", "z") and full.shape[-1] != width:
            raise ModelError(
                f"full has shape {tuple(full.shape)}: expected (..., {width}) for {name!r}."
            )
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
        seen = self.split_heads(key[0], full)
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
        self.split_heads(key[0], full).copy_(new)
        return full

    def add_hook(self, key: Key, fn: Hook) -> Callable[[], None]:
        """Set one hook on a checked key, and return the function that takes it away.

        Unlike under `hooks`, `fn` gets the activation itself, not a copy, and the model does not
        count as `hooked`.
        """
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
        self.use_attention(EAGER)

        def remove() -> None:
            _pattern_hooks[module].remove(apply)
            if not _pattern_hooks[module]:
                del _pattern_hooks[module]
            if not any(self.part("attn", i) in _pattern_hooks for i in range(self.n_layers)):
                self.use_attention("eager")

        return remove
