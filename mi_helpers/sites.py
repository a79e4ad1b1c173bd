"""What a coder reads and predicts: a site as one vector per token, whatever the model.

    (x,) = read_sites(model, ids, [("z", 3)])             # (batch, pos, n_heads * d_head)

Every site of `models.SITES` with a vector per token, and one more, `NORMALIZED`: the stream before
the MLP after its norm but without the norm's gain, which Gemma Scope's transcoders read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_helpers.models import SITES, Key, LanguageModel, ModelError

NORMALIZED = "ln2_normalized"  # TransformerLens' ln2.hook_normalized


def width(model: LanguageModel, site: Key) -> int:
    """How many numbers a site has per token, heads side by side.

    Raises:
        ModelError: no such site or layer, or one that does not hold a vector per token.
    """
    name, layer = site
    if name == NORMALIZED:
        model._expand([("mlp_in", layer)])
        return model.d_model
    if layer is None and name in SITES and name not in ("embed", "resid_final"):
        raise ModelError(f"{name!r} needs a layer from 0 to {model.n_layers - 1}.")
    model._expand([site])
    sizes = {
        "d_model": model.d_model,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "d_head": model.d_head,
        "d_mlp": model.d_mlp,
    }
    axes = SITES[name].shape.split()
    if axes[:2] != ["batch", "pos"]:
        raise ModelError(f"{name!r} holds no vector per token ({SITES[name].shape}).")
    total = 1
    for axis in axes[2:]:
        total *= sizes[axis]
    return total


def checked(model: LanguageModel, site: Key) -> Key:
    """A site that exists, its layer counted from the first."""
    width(model, site)
    return site[0], None if site[1] is None else site[1] % model.n_layers


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm gives before its gain (and bias): RMSNorm x / √(mean x² + ε), or LayerNorm."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    plain = F.layer_norm if isinstance(norm, nn.LayerNorm) else F.rms_norm
    return plain(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def behind(model: LanguageModel, site: Key) -> tuple[Key, Callable[[Tensor], Tensor]]:
    """(the model's own site, function of it) that a harvested site is.

    "ln2_normalized" is the stream before the MLP, normalised, without the gain: the input of Gemma
    Scope's transcoders. All others are the model's sites with the heads side by side.
    """
    name, layer = site
    if name == NORMALIZED:
        norm = model.part("ln2", layer)
        stream = "resid_pre" if model.parallel else "resid_mid"
        return (stream, layer), lambda x: normalize(norm, x)
    if name == "resid_pre" and layer:
        site = ("resid_post", layer - 1)  # the same tensor, one block earlier
    return site, lambda x: x.flatten(2)


@torch.no_grad()
def read_sites(model: LanguageModel, ids: Tensor, sites: list[Key]) -> list[Tensor]:
    """Each site's activations, (batch, pos, width), from one run up to the last of them."""
    found = [behind(model, site) for site in sites]
    ends = {"embed": 0, "resid_final": model.n_layers}
    stop = max(ends[key[0]] if key[1] is None else key[1] % model.n_layers + 1 for key, _ in found)
    _, cache = model.run_with_cache(ids, [key for key, _ in found], stop_at_layer=stop)
    return [of(cache[key]) for key, of in found]


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
