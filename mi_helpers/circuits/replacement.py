"""The local replacement model: a prompt's run of the model, with transcoders for its MLPs.

    coders = [SparseCoder(...), ...]                     # one transcoder for each layer's MLP
    local = LocalReplacement(model, coders, "the capital of the country of the Colosseum is")
    local.features[2].values, local.errors[2]            # layer 2's features, and what they miss
    with replaced(model, {2: by_coder(coders[2])}):      # another thing: no errors, nothing frozen
        model(prompt)

The *local replacement model* of a prompt computes what the model computes there. Every MLP is
replaced by its transcoder plus an error that makes up the difference; attention patterns and the
denominators of all norms stay as they are on this prompt. Between two transcoders it is then
linear: a feature's pre-activation is a sum over what embeddings, earlier features and errors wrote,
plus a bias. The summands are the edges of the attribution graph (`mi_helpers.circuits.edges`). The
final soft-cap is left out.

The first position, where it holds `<bos>`, is the same in every prompt. As is usual, its features
and errors are no nodes; here what they write is part of the bias of the nodes that read it, so that
edges still sum. The embedding of `<bos>` is a node.

Sources: Ameisen et al. 2025, "Circuit Tracing: Revealing Computational Graphs in Language Models";
Dunefsky et al. 2024 for transcoders of single layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mi_helpers.attribution import frozen_scale
from mi_helpers.layouts import ModelError, norm_gain
from mi_helpers.models import LanguageModel
from mi_helpers.saes.report import predict, spliced
from mi_helpers.saes.transcoders import reads_of

READS = ("mlp_in", "normalised")

Prompt = str | list | Tensor
Replacement = Callable[[Tensor, Tensor], Tensor]  # (MLP input, MLP output) -> what is passed on

# ---------------------------------------------------------------------------------- frozen norms


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with a constant denominator: y = (x - mean(x)) · scale · gain + shift, affine in x.

    scale    (pos, 1): one over the root mean square, or over the standard deviation
    gain     (d_model,): 1 + w in Gemma
    shift    (d_model,), or None
    centred  whether the mean is subtracted (LayerNorm) or not (RMSNorm)
    """

    scale: Tensor
    gain: Tensor
    shift: Tensor | None
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, x: Tensor) -> FrozenNorm:
        """`norm` as it acts on x (pos, d_model)."""
        scale, centred = frozen_scale(norm, x.float())
        shift = getattr(norm, "bias", None)
        gain = norm_gain(norm).float()
        return cls(scale, gain, None if shift is None else shift.float(), centred)

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


@dataclass(frozen=True)
class Transcoders:
    """A model's transcoders, with what they do not say themselves.

    coders         one for each layer, as a list or {layer: transcoder}
    reads          what they read, one of `READS`; None where they say so (`reads_of`)
    allow_missing  True: a layer without one is all error; False: that is a mistake
    """

    coders: Sequence | Mapping[int, nn.Module]
    reads: str | None = None
    allow_missing: bool = False


Coders = Sequence | Mapping[int, nn.Module] | Transcoders


def by_layer(coders: Coders) -> dict[int, nn.Module]:
    """{layer: transcoder}; a None in a list is left out."""
    coders = coders.coders if isinstance(coders, Transcoders) else coders
    pairs = coders.items() if isinstance(coders, Mapping) else enumerate(coders)
    return {layer: coder for layer, coder in pairs if coder is not None}


def check_coders(
    model: LanguageModel, coders: Coders
) -> tuple[dict[int, nn.Module], dict[int, str]]:
    """({layer: transcoder without scales}, {layer: what it reads}).

    Raises:
        ModelError: a layer has none, one has the wrong width, or reads something unknown.
    """
    given = by_layer(coders)
    options = coders if isinstance(coders, Transcoders) else Transcoders(coders)
    if outside := [layer for layer in given if layer not in range(model.n_layers)]:
        raise ModelError(
            f"There is a transcoder for layer {outside[0]}, but {model.name} has layers 0 to "
            f"{model.n_layers - 1}."
        )
    missing = [layer for layer in range(model.n_layers) if layer not in given]
    if missing and not options.allow_missing:
        raise ModelError(
            f"There is no transcoder for layer {', '.join(map(str, missing))} of {model.name}: "
            "give one for every layer, or pass Transcoders(coders, allow_missing=True), and all "
            "that such an MLP writes is an error node."
        )
    held = {layer: _checked_coder(model, given[layer], layer) for layer in sorted(given)}
    reads = {layer: options.reads or reads_of(given[layer]) for layer in held}
    if unknown := set(reads.values()) - set(READS):
        raise ModelError(f"A transcoder reads {' or '.join(READS)}, not {unknown.pop()!r}.")
    return held, reads


def _checked_coder(model: LanguageModel, coder: nn.Module, layer: int) -> nn.Module:
    """The transcoder with scales of 1 (others it has only while it is trained), if it fits."""
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
    scales = [getattr(coder, name, None) for name in ("scale_in", "scale_out")]
    scaled = any(scale is not None and float(scale) != 1.0 for scale in scales)
    return coder.folded() if scaled else coder


@dataclass(frozen=True)
class Active:
    """The features of one layer that are nodes, ordered by position and latent.

    positions, latents (n,); values (n,), their activations; writes (n, d_model), what each adds to
    the stream: its activation times its decoder row.
    """

    positions: Tensor
    latents: Tensor
    values: Tensor
    writes: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def select(self, keep: Tensor) -> Active:
        """Those where keep (n,) is True."""
        return Active(*(x[keep] for x in (self.positions, self.latents, self.values, self.writes)))

    def at(self, length: int) -> list[slice]:
        """The slice of them at each of `length` positions."""
        counts = torch.bincount(self.positions, minlength=length)
        ends = [0, *counts.cumsum(0).tolist()]
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


# --------------------------------------------------------------------- the local replacement model


class LocalReplacement:
    """The local replacement model of one prompt: see the module's docstring.

    Args:
        prompt: one text, or its token ids.
        coders: a transcoder for each layer: a list, {layer: transcoder} or `Transcoders`. Used are
            `encode`, W_enc, b_enc, W_dec, b_dec, and W_skip where there is one.
        bos_is_bias: whether what the MLPs write at a first position that holds `<bos>` is bias.

    Attributes:
        ids (pos,), length; first, the first position that has features and errors
        embed         (pos, d_model): what enters block 0, the position's embedding included
        norms         {(part, layer): FrozenNorm}, for "ln1", "ln1_post", "ln2" and "ln_final"
        readers       {layer: FrozenNorm}: from the stream to what the transcoder reads
        patterns      per layer, (n_heads, q_pos, k_pos)
        mlp_out       (n_layers, pos, d_model): what the model's own MLPs write
        inputs        {layer: (pos, d_model)}: what the transcoders read
        features      {layer: Active}
        errors        (n_layers, pos, d_model): mlp_out less what the transcoder writes
        constant      (n_layers, pos, d_model): written whatever the input: b_dec, and so on
        attn_constant (n_layers, pos, d_model): written by attention whatever the stream
        logits        (d_vocab,), the model's at the last position; uncapped, before the soft-cap

    Raises:
        ModelError: several prompts, one longer than the context, or transcoders that do not fit.
    """

    @torch.no_grad()
    def __init__(
        self, model: LanguageModel, coders: Coders, prompt: Prompt, bos_is_bias: bool = True
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
        self.coders, self.reads = check_coders(model, coders)
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
            x, b_dec = reader(self._middle[layer]), coder.b_dec.detach().float()
            active = self.active(layer, coder.encode(x))
            written = torch.zeros_like(x).index_add_(0, active.positions, active.writes)
            self.errors[layer] -= written + b_dec + self.skip(layer, x)
            self.readers[layer], self.inputs[layer] = reader, x
            self.constant[layer] = b_dec + self.skip(layer, reader(x * 0.0))
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

    def target_gradients(
        self, layer: int, positions: Tensor, vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients (batch, n, d_model) at the stream that targets read; constants (batch,).

        Target j is vectors[j] · x, where x is what the transcoder of `layer` reads at positions[j];
        with layer = n_layers, x is the final norm's output. n is the last position plus one.
        """
        final = layer == self.model.n_layers
        reader = self.norms["ln_final", None] if final else self.readers[layer]
        rows = reader.backward(vectors, positions)
        g = rows.new_zeros(len(rows), int(positions.max()) + 1, rows.shape[1])
        g[torch.arange(len(rows), device=g.device), positions] = rows
        bias = rows.new_zeros(len(rows)) if reader.shift is None else vectors @ reader.shift
        return g, bias

    # ---- which features are nodes

    def fold(self, most: int, vectors: Tensor, weights: Tensor) -> None:
        """Keep the `most` features with the largest effect; what the others write becomes error.

        A feature's effect is Σ_t weights[t] |effect on vectors[t] · ln_final| over all paths, where
        each active feature passes its gradient on; vectors (targets, d_model), weights (targets,).
        No edge has to be known for it.
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
        g, _ = self.target_gradients(self.model.n_layers, last, vectors)
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


# ------------------------------------------------------------------------------------ replaced runs


@contextmanager
def replaced(
    model: LanguageModel, by: Mapping[int, Replacement], source: str = "mlp_in"
) -> Iterator[LanguageModel]:
    """In this context the MLPs of some layers are replaced, at all positions but the first.

    Args:
        by: {layer: function of (source, MLP output), both (batch, pos, d_model)}.
        source: the site that the functions read: "mlp_in", or "ln2_normalized" for the stream
            without the norm's gain.
    """
    with ExitStack() as stack:
        for layer, replacement in by.items():
            stack.enter_context(spliced(model, (source, layer), ("mlp_out", layer), replacement))
        yield model


def zeros(x: Tensor, y: Tensor) -> Tensor:
    """The replacement that knows nothing: the MLP writes nothing."""
    return torch.zeros_like(y)


def by_coder(coder: nn.Module) -> Replacement:
    """A transcoder's prediction instead of the MLP's output."""
    return lambda x, y: predict(coder, x)


def without_latents(coder: nn.Module) -> Replacement:
    """A transcoder none of whose latents fires: its bias, and its skip path."""
    return lambda x, y: coder.decode(x.new_zeros(*x.shape[:-1], coder.d_latent), x)
