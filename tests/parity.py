"""Cached and patched activations against Hugging Face's own outputs, bit for bit."""

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import repeat_kv

from mi_helpers.hooks import Cache
from mi_helpers.layouts import SITES
from mi_helpers.models import LanguageModel


@torch.no_grad()
def parity_report(model: LanguageModel, tokens: Tensor | None = None) -> dict[str, dict]:
    """Largest absolute differences {site: {"cached": ..., "patched": ...}}: all should be 0.

    cached: the cached activation against Hugging Face's own outputs (hidden_states, attentions,
        logits), or, where it returns none, against its modules run by hand on other sites.
    patched: the logits when each layer's activation is replaced by itself, against the plain run.
    """
    if tokens is None:
        rng = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.d_vocab, (2, min(model.n_ctx, 12)), generator=rng)
    ids = model.ids(tokens)
    hf = model.hf(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
    absent = {"resid_mid"} if model.parallel else set()
    absent |= {"pos_embed"} if model.layout.pos_embed is None else set()
    sites = [s for s in SITES if s not in absent]
    logits, cache = model.run_with_cache(ids, sites)
    expected = {("resid_final", None): cache["resid_post", -1]}
    for layer in range(model.n_layers):
        expected |= {(s, layer): x for s, x in _by_hand(model, cache, hf, layer).items()}
    expected["embed", None] = model.part("embed")(ids)
    if model.layout.pos_embed:
        expected["pos_embed", None] = model.part("pos_embed")(
            torch.arange(ids.shape[1], device=ids.device)[None]
        )

    def gap(a: Tensor, b: Tensor) -> float:
        return (a - b).abs().max().item()

    final = model.ln_final(cache["resid_final"])
    report = {"logits": {"cached": max(gap(logits, hf.logits), gap(final, hf.hidden_states[-1]))}}
    for site in sites:
        held = [key for key in cache if key[0] == site]
        with model.hooks({site if k[1] is None else k: lambda _, k=k: cache[k] for k in held}):
            patched = gap(model.forward(ids), hf.logits)
        cached = max(gap(cache[k], expected[k]) for k in held)
        report[site] = {"cached": cached, "patched": patched}
    again = [model.run_from_layer(cache["resid_pre", i], i) for i in range(model.n_layers)]
    report["run_from_layer"] = {"patched": max(gap(x, hf.logits) for x in again)}
    return report


def _by_hand(model: LanguageModel, cache: Cache, hf, layer: int) -> dict[str, Tensor]:
    """What each site of a layer should hold, from Hugging Face's outputs and modules alone."""
    part = {n: model.part(n, layer) for n in ("ln1", "q", "k", "v", "o", "ln2", "mlp", "w_out")}
    post = [model.part(n, layer) or nn.Identity() for n in ("ln1_post", "ln2_post")]
    pre, pattern = hf.hidden_states[layer], hf.attentions[layer]
    heads = {s: model.split_heads(s, part[s](part["ln1"](pre))) for s in "qkv"}
    values = repeat_kv(heads["v"].transpose(1, 2), model.n_heads // model.n_kv_heads)
    z = torch.matmul(pattern, values).transpose(1, 2)  # (batch, pos, n_heads, d_head)
    attn_out = post[0](part["o"](z.flatten(-2)))
    mid = pre + attn_out
    mlp_in = part["ln2"](pre if model.parallel else mid)
    neurons = []
    hook = part["w_out"].register_forward_pre_hook(lambda _, args: neurons.append(args[0]))
    mlp_out = post[1](part["mlp"](mlp_in))
    hook.remove()
    after = mlp_out + attn_out + pre if model.parallel else mid + mlp_out
    if layer + 1 < model.n_layers:
        after = hf.hidden_states[layer + 1]
    return heads | {
        "resid_pre": pre,
        "pattern": pattern,
        "z": z,
        "attn_out": attn_out,
        "resid_mid": mid,
        "mlp_in": mlp_in,
        "post": neurons[0],
        "mlp_out": mlp_out,
        "resid_post": after,
    }
