"""Circuit tracing: which features cause which, on one prompt, every edge accounted for.

    coders = [SparseCoder(...), ...]                    # one transcoder for each layer's MLP
    graph = attribution_graph(model, coders, "the capital of the country of the Colosseum is")
    small = prune(graph)                                # mi_helpers.circuits.graphs
    result = intervene(model, coders, prompt, {"2_57_3": -2})   # mi_helpers.circuits.interventions

The *local replacement model* of a prompt computes what the model computes there, with every MLP
replaced by its transcoder plus an error that makes up the rest, and with attention patterns and the
denominators of all norms kept as they are on this prompt. Between two transcoders it is then
linear, so that a feature's pre-activation is a sum over what embeddings, earlier features and
errors wrote, plus a bias: the summands are the edges of the attribution graph. The final soft-cap
is left out; a logit counts less the mean of all logits, which changes no probability.

What stands in the first position, where it is `<bos>`, is the same in every prompt. As is usual,
its features and errors are no nodes; here what they write is part of the bias of whoever reads it,
so that edges still sum. The embedding of `<bos>` is a node.

After Ameisen and others, "Circuit Tracing: Revealing Computational Graphs in Language Models"
(2025), with transcoders for single layers (Dunefsky and others, 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mi_helpers.circuits.graphs import EMBEDDING, ERROR, FEATURE, LOGIT, Graph, Node, make_graph
from mi_helpers.layouts import ModelError, norm_gain
from mi_helpers.models import LanguageModel

MASS, MOST_LOGITS = 0.95, 10  # logit nodes: the likeliest tokens up to this mass or this number
MOST_NODES = 20_000  # of one graph: its edges are then 1.6 GB, for a moment thrice that
MOST_NUMBERS = 2**24  # in the gradient of one chunk of targets: 64 MB, a few of which exist
READS = ("mlp_in", "normalised")

Coders = Sequence | Mapping[int, nn.Module]
Prompt = str | list | Tensor

# ---------------------------------------------------------------------------------- frozen norms


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its denominator kept: y = (x - mean(x)) · scale · gain + shift, affine in x.

    scale    (pos, 1): one over the root mean square, or over the standard deviation
    gain     (d_model,), 1 + w in Gemma
    shift    (d_model,), or None
    centred  whether the mean is taken away (LayerNorm) or not (RMSNorm)
    """

    scale: Tensor
    gain: Tensor
    shift: Tensor | None
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, x: Tensor) -> FrozenNorm:
        """`norm` as it acts on x (pos, d_model)."""
        centred = isinstance(norm, nn.LayerNorm)
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        x = x.float()
        x = x - x.mean(-1, keepdim=True) if centred else x
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        shift = getattr(norm, "bias", None)
        return cls(
            scale, norm_gain(norm).float(), None if shift is None else shift.float(), centred
        )

    def without_gain(self) -> FrozenNorm:
        """The normalised stream alone: no gain, no shift."""
        return replace(self, gain=torch.ones_like(self.gain), shift=None)

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of x (..., pos, d_model), float32."""
        x = x.float()
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        x = x * self.scale * self.gain
        return x if self.shift is None else x + self.shift

    def backward(self, g: Tensor, at: slice | Tensor = slice(None)) -> Tensor:
        """The gradient of g · norm(x) with respect to x; g (..., positions `at`, d_model)."""
        g = g * self.gain * self.scale[at]
        return g - g.mean(-1, keepdim=True) if self.centred else g


# ------------------------------------------------------------------------------------ transcoders


def reads_of(coder: nn.Module) -> str:
    """What a transcoder reads: "mlp_in", the MLP's own input, or "normalised", the stream after
    the norm's division but before its gain (Gemma Scope's transcoders).

    Its metadata says so: "reads", or a TransformerLens hook name ending in "hook_normalized".
    """
    about = getattr(coder, "metadata", None) or {}
    if "reads" in about:
        return about["reads"]
    return "normalised" if str(about.get("hook_name", "")).endswith("hook_normalized") else "mlp_in"


def check_coders(
    model: LanguageModel, coders: Coders, reads: str | None = None, allow_missing: bool = False
) -> tuple[dict[int, nn.Module], dict[int, str]]:
    """({layer: transcoder without scales}, {layer: what it reads}).

    Raises:
        ModelError: a layer has none, one has the wrong width, or reads something unknown.
    """
    given = dict(coders) if isinstance(coders, Mapping) else dict(enumerate(coders))
    missing = [layer for layer in range(model.n_layers) if given.get(layer) is None]
    outside = [layer for layer in given if layer not in range(model.n_layers)]
    if outside:
        raise ModelError(
            f"There is a transcoder for layer {outside[0]}, but {model.name} has layers 0 to "
            f"{model.n_layers - 1}."
        )
    if missing and not allow_missing:
        raise ModelError(
            f"There is no transcoder for layer {', '.join(map(str, missing))} of {model.name}: "
            "give one for every layer, or pass allow_missing=True, and all that such an MLP writes "
            "is an error node."
        )
    held, read = {}, {}
    for layer in sorted(set(given) - set(missing)):
        coder = given[layer]
        if not getattr(coder, "transcoder", True):
            raise ModelError(
                f"The coder of layer {layer} is an SAE: a circuit needs a transcoder, which reads "
                "the MLP's input and predicts its output."
            )
        shape = coder.W_enc.shape[0], coder.W_dec.shape[1]
        if shape != (model.d_model, model.d_model):
            raise ModelError(
                f"The transcoder of layer {layer} goes from {shape[0]} to {shape[1]} numbers, and "
                f"{model.name}'s MLPs from {model.d_model} to {model.d_model}: it belongs to "
                "another model."
            )
        if coder.W_dec.device != model.device:
            raise ModelError(
                f"The transcoder of layer {layer} is on {coder.W_dec.device} and {model.name} on "
                f"{model.device}: move one with .to(...)."
            )
        held[layer] = _unscaled(coder)
        read[layer] = reads or reads_of(coder)
        if read[layer] not in READS:
            raise ModelError(f"A transcoder reads {' or '.join(READS)}, not {read[layer]!r}.")
    return held, read


def _unscaled(coder: nn.Module) -> nn.Module:
    """The same coder with scales of 1, which it has but while it is trained."""
    scales = [getattr(coder, name, None) for name in ("scale_in", "scale_out")]
    scaled = any(scale is not None and float(scale) != 1.0 for scale in scales)
    return coder.folded() if scaled else coder


@dataclass(frozen=True)
class Active:
    """The features of one layer that are nodes, in the order of position and latent.

    positions, latents (n,); values (n,), their activations; writes (n, d_model), what each adds to
    the stream: its activation times its decoder row.
    """

    positions: Tensor
    latents: Tensor
    values: Tensor
    writes: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def select(self, which: Tensor) -> Active:
        """Those where `which` (n,) is True."""
        return Active(*(x[which] for x in (self.positions, self.latents, self.values, self.writes)))

    def at(self, length: int) -> list[slice]:
        """Which of them stand at each position, as slices."""
        counts = torch.bincount(self.positions, minlength=length).tolist()
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + count)
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


# --------------------------------------------------------------------- the local replacement model


class LocalReplacement:
    """The local replacement model of one prompt: see the module's docstring.

    Args:
        prompt: one text, or its token ids.
        coders: a transcoder for each layer, as a list or {layer: transcoder}; of each are used
            `encode`, W_enc, b_enc, W_dec, b_dec, and W_skip if there is one.
        reads: what they read, one of `READS`, where they do not say so themselves (`reads_of`).
        allow_missing: a layer without one is all error.
        bos_is_bias: what the MLPs write at a first position that holds `<bos>` is bias.

    Attributes:
        ids (pos,), length; first, the first position that has features and errors
        embed         (pos, d_model): what enters block 0, the position's embedding included
        norms         {(part, layer): FrozenNorm}, for "ln1", "ln1_post", "ln2" and "ln_final"
        readers       {layer: FrozenNorm}: from the stream to what the transcoder reads
        patterns      per layer, (n_heads, q_pos, k_pos)
        mlp_out       (n_layers, pos, d_model): what the MLPs write in truth
        inputs        {layer: (pos, d_model)}: what the transcoders read
        features      {layer: Active}
        errors        (n_layers, pos, d_model): mlp_out less what the transcoder writes
        constant      (n_layers, pos, d_model): what is written whatever the input: b_dec, and so on
        attn_constant (n_layers, pos, d_model): what attention writes whatever the stream
        logits        (d_vocab,), the model's at the last position; uncapped, before the soft-cap

    Raises:
        ModelError: several prompts, one longer than the context, or transcoders that do not fit.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        coders: Coders,
        prompt: Prompt,
        reads: str | None = None,
        allow_missing: bool = False,
        bos_is_bias: bool = True,
    ):
        if model.hooked:
            raise ModelError(
                "The replacement model is made from the model as it is: leave the "
                "`with model.hooks(...)` block first."
            )
        ids = model.ids(prompt)
        if ids.shape[0] != 1:
            raise ModelError(f"A graph is of one prompt, not of {ids.shape[0]}.")
        self.model, self.ids, self.length = model, ids[0], ids.shape[1]
        self.coders, self.reads = check_coders(model, coders, reads, allow_missing)
        bos = getattr(model.tokenizer, "bos_token_id", None)
        is_bos = self.length > 1 and bos is not None and int(ids[0, 0]) == bos
        self.first = 1 if bos_is_bias and is_bos else 0
        self._run()
        self._encode()

    # ---- what the model did

    def norm_modules(self) -> Iterator[tuple[tuple[str, int | None], nn.Module]]:
        """((part, layer), module) of every norm on the way; what follows the MLP is in mlp_out."""
        for layer in range(self.model.n_layers):
            for part in ("ln1", "ln1_post", "ln2"):
                module = self.model.part(part, layer)
                if module is not None:
                    yield (part, layer), module
        yield ("ln_final", None), self.model.ln_final

    def _run(self) -> None:
        """One run of the model, from which everything is frozen."""
        model, L = self.model, self.model.n_layers
        self.norms: dict[tuple[str, int | None], FrozenNorm] = {}
        self._middle: dict[int, Tensor] = {}  # {layer: what ln2 reads, (pos, d_model)}
        head = []
        with ExitStack() as undo:
            for key, module in self.norm_modules():

                def freeze(norm, args, key=key) -> None:
                    self.norms[key] = FrozenNorm.of(norm, args[0][0])
                    self._middle |= {key[1]: args[0][0].float()} if key[0] == "ln2" else {}

                undo.callback(module.register_forward_pre_hook(freeze).remove)
            listen = model.lm_head.register_forward_hook(lambda _m, _a, out: head.append(out))
            undo.callback(listen.remove)
            sites = ["pattern", ("resid_pre", 0), "mlp_out"]
            logits, cache = model.run_with_cache(self.ids, sites)
        self.logits, self.uncapped = logits[0, -1].float(), head[0][0, -1].float()
        self.embed = cache["resid_pre", 0][0].float()
        self.patterns = [cache["pattern", i][0].float() for i in range(L)]
        self.mlp_out = cache["mlp_out"][:, 0].float()
        zero = torch.zeros_like(self.embed)
        self.attn_constant = torch.stack([self.attend(i, zero) for i in range(L)])

    def _encode(self) -> None:
        """Features, errors and constants, from what the transcoders read."""
        self.readers, self.inputs, self.features = {}, {}, {}
        self.errors, self.constant = self.mlp_out.clone(), torch.zeros_like(self.mlp_out)
        early = slice(0, self.first)
        for layer, coder in self.coders.items():
            norm = self.norms["ln2", layer]
            reader = norm if self.reads[layer] == "mlp_in" else norm.without_gain()
            x = reader(self._middle[layer])
            active = self.active(layer, coder.encode(x))
            skipped = self.skip(layer, x)
            constant = coder.b_dec.detach().float() + self.skip(layer, reader(x * 0.0))
            written = torch.zeros_like(x).index_add_(0, active.positions, active.writes)
            self.errors[layer] -= written + coder.b_dec.detach().float() + skipped
            self.readers[layer], self.inputs[layer] = reader, x
            self.constant[layer] = constant
            self.constant[layer, early] += written[early]
            self.features[layer] = active.select(active.positions >= self.first)
        self.constant[:, early] += self.errors[:, early]
        self.errors[:, early] = 0.0

    def active(self, layer: int, f: Tensor) -> Active:
        """The features that are not 0 in f (pos, d_latent)."""
        positions, latents = f.nonzero(as_tuple=True)
        values = f[positions, latents].float()
        rows = self.coders[layer].W_dec[latents].detach().float()
        return Active(positions, latents, values, values[:, None] * rows)

    def skip(self, layer: int, x: Tensor) -> Tensor:
        """What a transcoder's skip path makes of its input x (..., d_model)."""
        W = getattr(self.coders.get(layer), "W_skip", None)
        return torch.zeros_like(x) if W is None else x @ W.detach().float().T

    # ---- forward: the frozen model is affine

    def attend(self, layer: int, x: Tensor) -> Tensor:
        """What frozen attention writes, from the stream x (pos, d_model): affine in x."""
        model = self.model
        W_V, W_O = (model.weight(name, layer).float() for name in ("W_V", "W_O"))
        v = torch.einsum("pd,hde->phe", self.norms["ln1", layer](x), W_V)
        b_V, b_O = (getattr(model.part(name, layer), "bias", None) for name in "vo")
        v = v if b_V is None else v + model.split_heads("v", b_V.float())
        v = v.repeat_interleave(model.n_heads // model.n_kv_heads, dim=1)
        z = torch.einsum("hqk,khe->qhe", self.patterns[layer], v)
        out = torch.einsum("qhe,hed->qd", z, W_O)
        out = out if b_O is None else out + b_O.float()
        post = self.norms.get(("ln1_post", layer))
        return out if post is None else post(out)

    def final_stream(self) -> Tensor:
        """The stream after the last block, (pos, d_model), computed by the replacement model alone:
        the model's own, up to rounding."""
        x = self.embed
        for layer in range(self.model.n_layers):
            attention = self.attend(layer, x)
            middle = x if self.model.parallel else x + attention
            x = x + attention + self.constant[layer] + self.errors[layer]
            if layer in self.coders:
                reader, active = self.readers[layer], self.features[layer]
                x = x.index_add(0, active.positions, active.writes)
                x = x + self.skip(layer, reader(middle)) - self.skip(layer, reader(middle * 0.0))
        return x

    # ---- backward: the same maps, transposed

    def attend_backward(self, layer: int, g: Tensor) -> Tensor:
        """The gradient of g · attend(x) with respect to x; g (batch, n, d_model) for the first n
        positions: the rest gets no gradient, as attention looks back."""
        model, n = self.model, g.shape[1]
        W_V, W_O = (model.weight(name, layer).float() for name in ("W_V", "W_O"))
        post = self.norms.get(("ln1_post", layer))
        g = g if post is None else post.backward(g, slice(0, n))
        z = torch.einsum("bqd,hed->hqbe", g, W_O)
        mixed = torch.bmm(self.patterns[layer][:, :n, :n].mT, z.flatten(2)).view_as(z)
        v = mixed.unflatten(0, (model.n_kv_heads, -1)).sum(1)  # (n_kv_heads, n, batch, d_head)
        x = torch.einsum("hkbe,hde->bkd", v, W_V)
        return self.norms["ln1", layer].backward(x, slice(0, n))

    def through_attention(self, layer: int, g: Tensor, bias: Tensor) -> Tensor:
        """g at the stream after a layer's attention, as a gradient at the stream before it; what
        its constants add goes to bias (batch,)."""
        bias += torch.einsum("bpd,pd->b", g, self.attn_constant[layer, : g.shape[1]])
        return g + self.attend_backward(layer, g)

    def through_block(self, layer: int, g: Tensor, bias: Tensor) -> Tensor:
        """g at the stream after a block, as a gradient at the stream before it."""
        bias += torch.einsum("bpd,pd->b", g, self.constant[layer, : g.shape[1]])
        around = self.skip_backward(layer, g)
        if self.model.parallel:
            return self.through_attention(layer, g, bias) + around
        return self.through_attention(layer, g + around, bias)

    def skip_backward(self, layer: int, g: Tensor) -> Tensor | float:
        """The gradient through the transcoder's skip path; 0 without one."""
        W = getattr(self.coders.get(layer), "W_skip", None)
        if W is None:
            return 0.0
        return self.readers[layer].backward(g @ W.detach().float(), slice(0, g.shape[1]))

    # ---- which features are nodes

    def fold(self, most: int, vectors: Tensor, weights: Tensor) -> None:
        """Keep the `most` features that matter most; what the others write is error.

        A feature's rank is its total effect on the logits through all paths, each active feature
        passing its gradient on: Σ_t weights[t] |effect on vectors[t] · ln_final|, vectors
        (targets, d_model). So a graph can be made without its edges being known first.
        """
        if sum(map(len, self.features.values())) <= most:
            return
        scores = self._total_effects(vectors, weights)
        bound = torch.cat(list(scores.values())).topk(most).values[-1]
        for layer, active in self.features.items():
            keep = scores[layer] >= bound
            rest = active.select(~keep)
            self.errors[layer].index_add_(0, rest.positions, rest.writes)
            self.features[layer] = active.select(keep)

    def _total_effects(self, vectors: Tensor, weights: Tensor) -> dict[int, Tensor]:
        """{layer: each feature's weighted absolute effect on the targets, (features,)}."""
        last = torch.full((len(vectors),), self.length - 1, device=vectors.device)
        g, _ = _start(self, self.model.n_layers, last, vectors)
        scores, nothing = {}, torch.zeros(len(vectors), device=vectors.device)
        for layer in reversed(range(self.model.n_layers)):
            inner = torch.zeros_like(g)
            if layer in self.coders:
                active, coder = self.features[layer], self.coders[layer]
                rows = coder.W_enc[:, active.latents].detach().float().T  # (features, d_model)
                total = torch.zeros(len(active), device=g.device)
                for one, weight, into in zip(g, weights, inner, strict=True):
                    effect = (one[active.positions] * active.writes).sum(-1)
                    total += weight * effect.abs()
                    into.index_add_(0, active.positions, (effect / active.values)[:, None] * rows)
                scores[layer] = total
                inner = self.readers[layer].backward(inner)
            if self.model.parallel:
                g = self.through_block(layer, g, nothing) + inner
            else:  # what the features read stands between the attention and the MLP
                g = g + inner + self.skip_backward(layer, g)
                g = self.through_attention(layer, g, nothing)
        return scores


# ----------------------------------------------------------------------------------------- edges


class Columns:
    """Where each source stands among the sources: embeddings, then layer by layer its features and
    its errors."""

    def __init__(self, local: LocalReplacement):
        self.local, self.features, self.errors = local, {}, {}
        end = local.length
        for layer in range(local.model.n_layers):
            count = len(local.features.get(layer, ()))
            self.features[layer] = slice(end, end + count)
            end += count
            self.errors[layer] = slice(end, end + local.length - local.first)
            end = self.errors[layer].stop
        self.count = end
        self.at = {layer: active.at(local.length) for layer, active in local.features.items()}

    def embeddings(self, edges: Tensor, g: Tensor) -> None:
        """Edges from the embeddings, given g (batch, n, d_model) at the stream before block 0."""
        n = g.shape[1]
        edges[:, :n] = torch.einsum("bpd,pd->bp", g, self.local.embed[:n])

    def layer(self, edges: Tensor, g: Tensor, layer: int) -> None:
        """Edges from a layer's features and errors, given g at the stream after its block."""
        local, n = self.local, g.shape[1]
        start = self.features[layer].start
        for position, these in enumerate(self.at.get(layer, ())[:n]):
            if these.start < these.stop:
                where = slice(start + these.start, start + these.stop)
                edges[:, where] = g[:, position] @ local.features[layer].writes[these].T
        first, start = local.first, self.errors[layer].start
        if n > first:
            errors = local.errors[layer, first:n]
            edges[:, start : start + n - first] = torch.einsum("bpd,pd->bp", g[:, first:], errors)


def _start(local: LocalReplacement, layer: int, positions: Tensor, vectors: Tensor):
    """Gradients (batch, n, d_model) at the stream that targets read, and their constants (batch,).

    Target j is vectors[j] · x, x being what the transcoder of `layer` reads at positions[j]; with
    layer = n_layers, the output of the final norm. n is one more than the last position.
    """
    final = layer == local.model.n_layers
    reader = local.norms["ln_final", None] if final else local.readers[layer]
    rows = reader.backward(vectors, positions)
    n = int(positions.max()) + 1
    g = rows.new_zeros(len(rows), n, rows.shape[1])
    g[torch.arange(len(rows), device=g.device), positions] = rows
    bias = rows.new_zeros(len(rows)) if reader.shift is None else vectors @ reader.shift
    return g, bias


@torch.no_grad()
def edges_closed_form(
    local: LocalReplacement, columns: Columns, layer: int, positions: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """Edges into targets (batch, sources), and what biases add to them (batch,).

    Target j is vectors[j] · (what `layer`'s transcoder reads at positions[j]); with
    layer = n_layers, vectors[j] · (the final norm's output). Its gradient walks down the blocks
    through the transposed maps of the frozen model, and meets the sources' vectors on the way.
    """
    g, bias = _start(local, layer, positions, vectors)
    edges = g.new_zeros(len(g), columns.count)
    if layer < local.model.n_layers and not local.model.parallel:
        g = local.through_attention(layer, g, bias)
    for below in reversed(range(layer)):
        columns.layer(edges, g, below)
        g = local.through_block(below, g, bias)
    columns.embeddings(edges, g)
    return edges, bias


def edges_by_backward(
    local: LocalReplacement, columns: Columns, layer: int, positions: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """The same as `edges_closed_form`, by autograd through Hugging Face's own modules.

    Norms, patterns and MLP outputs are replaced by hooks with the frozen ones, and the prompt is
    run once for every target: slower, and an independent check.
    """
    model, L = local.model, local.model.n_layers
    batch = len(positions)
    leaves, seen = {}, {}

    def leaf(key: int, x: Tensor) -> Tensor:
        leaves[key] = x.expand(batch, -1, -1).clone().requires_grad_()
        return leaves[key]

    def frozen(key: tuple) -> Callable:
        def hook(_module, args, _out) -> Tensor:
            part, at = key
            if part == "ln2" and at in local.readers:
                seen[at] = local.readers[at](args[0])
            out = local.norms[key](args[0])
            if part == "ln_final":
                seen[L] = out
            return out.to(args[0].dtype)

        return hook

    def write(below: int) -> Callable:
        def hook(_mlp_out: Tensor) -> Tensor:
            skipped = local.skip(below, local.inputs[below]) if below in local.coders else 0.0
            out = leaf(below, local.mlp_out[below] - skipped)
            return out + local.skip(below, seen[below]) if below in local.coders else out

        return hook

    hooks: dict = {("resid_pre", 0): lambda _x: leaf(-1, local.embed)}
    for below in range(L):
        pattern = local.patterns[below].expand(batch, -1, -1, -1)
        hooks["pattern", below] = lambda _x, pattern=pattern: pattern
        hooks["mlp_out", below] = write(below)
    with ExitStack() as undo, torch.enable_grad(), model.hooks(hooks):
        for key, module in local.norm_modules():
            undo.callback(module.register_forward_hook(frozen(key)).remove)
        model.run_with_cache(local.ids.expand(batch, -1), [], min(layer + 1, L))
        read = seen[layer][torch.arange(batch, device=positions.device), positions]
        values = (read * vectors).sum(-1)
        below = [-1, *range(layer)]
        grads = torch.autograd.grad(values.sum(), [leaves[b] for b in below], allow_unused=True)
    edges = values.new_zeros(batch, columns.count)
    for b, g in zip(below, grads, strict=True):
        if g is not None and b == -1:
            columns.embeddings(edges, g)
        elif g is not None:
            columns.layer(edges, g, b)
    return edges, (values - edges.sum(1)).detach()


METHODS = {"closed form": edges_closed_form, "backward": edges_by_backward}


# ------------------------------------------------------------------------------------- the graph


def pick_logits(
    model: LanguageModel, logits: Tensor, targets: Sequence[str | int] | str | int | None = None
) -> Tensor:
    """The token ids that become logit nodes, the likeliest first; or the named ones, as named.

    Without targets: the likeliest tokens up to a probability of 0.95 in all, 10 at most.

    Raises:
        ModelError: a target is several tokens, or not in the vocabulary, or named twice.
    """
    if targets is None:
        p, order = torch.softmax(logits, -1).topk(min(MOST_LOGITS, len(logits)))
        return order[: int((p.cumsum(0) < MASS).sum()) + 1]
    targets = [targets] if isinstance(targets, str | int) else list(targets)
    ids = [model.to_single_token(t) if isinstance(t, str) else int(t) for t in targets]
    outside = [i for i in ids if not 0 <= i < model.d_vocab]
    if outside or not ids or len(set(ids)) < len(ids):
        raise ModelError(
            f"The targets are the tokens {ids}: name at least one, each once, from 0 to "
            f"{model.d_vocab - 1}."
        )
    return torch.tensor(ids, device=logits.device)


def logit_vectors(model: LanguageModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the final norm's output is multiplied by, for logits less their mean over the
    vocabulary: (targets, d_model), and (targets,) from the unembedding's bias."""
    W, bias = model.lm_head.weight, getattr(model.lm_head, "bias", None)
    mean = sum(part.float().sum(0) for part in W.split(2**14)) / len(W)
    vectors = W[ids].float() - mean
    if bias is None:
        return vectors, torch.zeros(len(ids), device=W.device)
    return vectors, (bias[ids] - bias.mean()).float()


@torch.no_grad()
def attribution_graph(
    model: LanguageModel,
    coders: Coders,
    prompt: Prompt,
    targets: Sequence[str | int] | str | int | None = None,
    *,
    reads: str | None = None,
    max_features: int | None = None,
    allow_missing: bool = False,
    bos_is_bias: bool = True,
    method: str = "closed form",
) -> Graph:
    """The attribution graph of a prompt's next token.

    Nodes are the embeddings, the active features, the errors that are left, and logits. For a
    feature or a logit, value = Σ incoming edges + bias; `graph.edge_error` says how exactly (about
    1e-6 in float32; a model in bfloat16 has its own rounding in there: load it in float32).

    Args:
        coders: a transcoder for each layer, as a list or {layer: transcoder}.
        targets: the tokens whose logits are nodes (text of one token each, or ids); by default the
            likeliest, up to a probability of 0.95 in all, 10 at most.
        reads: "mlp_in" or "normalised", where the transcoders do not say so: see `reads_of`.
        max_features: keep that many, those with the largest effect on the logits; what the others
            write is error (`LocalReplacement.fold`), so edges still sum.
        allow_missing: a layer without a transcoder is all error, instead of a mistake.
        bos_is_bias: see the module's docstring; False makes nodes of the first position, too.
        method: "closed form", or "backward": autograd, slower, to check the other with.

    Raises:
        ModelError: transcoders or targets do not fit; a prompt that is empty or too long; too many
            nodes to hold the edges between them.
    """
    if method not in METHODS:
        raise ModelError(f"The method is one of {', '.join(METHODS)}, not {method!r}.")
    if max_features is not None and max_features < 1:
        raise ModelError(f"max_features is {max_features}: keep 1 feature or more.")
    local = LocalReplacement(model, coders, prompt, reads, allow_missing, bos_is_bias)
    ids = pick_logits(model, local.logits, targets)
    p = torch.softmax(local.logits, -1)[ids]
    vectors, logit_bias = logit_vectors(model, ids)
    if max_features is not None:
        local.fold(max_features, vectors, p)
    columns = Columns(local)
    n = columns.count + len(ids)
    if n > MOST_NODES:
        raise ModelError(
            f"The graph would have {n} nodes and {n * n * 4 / 1e9:.0f} GB of edges: shorten the "
            f"prompt, or pass max_features={MOST_NODES // 3}."
        )
    adjacency, bias = torch.zeros(n, n), torch.zeros(n)
    for rows, *target in _targets(local, columns, vectors):
        edges, constant = METHODS[method](local, columns, *target)
        adjacency[rows, : columns.count] = edges.cpu()
        bias[rows] = constant.cpu()
    for layer, active in local.features.items():
        own = local.coders[layer].b_enc[active.latents]
        bias[columns.features[layer]] += own.detach().float().cpu()
    bias[columns.count :] += logit_bias.cpu()
    value = (local.uncapped - local.uncapped.mean())[ids]
    return make_graph(
        _prompt_text(model, prompt, local.ids),
        _texts(model, local.ids),
        _nodes(local, ids),
        adjacency,
        bias,
        _values(local, value),
        p.cpu(),
        model.n_layers,
        model=model.name,
        target_names=tuple(_texts(model, ids)),
        settings={"features": sum(map(len, local.features.values()))},
    )


def _targets(local: LocalReplacement, columns: Columns, vectors: Tensor):
    """(rows of the adjacency, layer, positions, vectors) of all features and then the logits, in
    chunks whose gradients stay within `MOST_NUMBERS`."""
    model = local.model
    width = max(model.d_model, model.n_heads * model.d_head)
    size = max(1, MOST_NUMBERS // (local.length * width))
    for layer, active in local.features.items():
        start, coder = columns.features[layer].start, local.coders[layer]
        for low in range(0, len(active), size):
            high = min(low + size, len(active))
            rows = coder.W_enc[:, active.latents[low:high]].detach().float().T
            yield slice(start + low, start + high), layer, active.positions[low:high], rows
    last = torch.full((len(vectors),), local.length - 1, device=vectors.device)
    for low in range(0, len(vectors), size):
        high = min(low + size, len(vectors))
        rows = slice(columns.count + low, columns.count + high)
        yield rows, model.n_layers, last[low:high], vectors[low:high]


def _nodes(local: LocalReplacement, ids: Tensor) -> list[Node]:
    """The nodes, in the order of the columns, and then the logits."""
    nodes = [Node(EMBEDDING, -1, i, token) for i, token in enumerate(local.ids.tolist())]
    for layer in range(local.model.n_layers):
        if layer in local.features:
            active = local.features[layer]
            places = zip(active.positions.tolist(), active.latents.tolist(), strict=True)
            nodes += [Node(FEATURE, layer, position, latent) for position, latent in places]
        nodes += [Node(ERROR, layer, position) for position in range(local.first, local.length)]
    last, L = local.length - 1, local.model.n_layers
    return nodes + [Node(LOGIT, L, last, token) for token in ids.tolist()]


def _values(local: LocalReplacement, logits: Tensor) -> Tensor:
    """Each node's value, in the order of the nodes."""
    values = [local.embed.norm(dim=-1)]
    for layer in range(local.model.n_layers):
        if layer in local.features:
            values.append(local.features[layer].values)
        values.append(local.errors[layer, local.first :].norm(dim=-1))
    return torch.cat([*values, logits]).cpu()


def _texts(model: LanguageModel, ids: Tensor) -> list[str]:
    """Each token as text, or its number where the model has no tokenizer."""
    if model.tokenizer is None:
        return [str(i) for i in ids.tolist()]
    return model.str_tokens(ids)


def _prompt_text(model: LanguageModel, prompt: Prompt, ids: Tensor) -> str:
    """The prompt as text."""
    if isinstance(prompt, str):
        return prompt
    start = 1 if model.tokenizer and int(ids[0]) == model.tokenizer.bos_token_id else 0
    return "".join(_texts(model, ids[start:] if len(ids) > start else ids))
