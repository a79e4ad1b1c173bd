"""The lesion lab: silence a head, an attention block or an MLP, and see which skills fail.

    lab = LesionLab(model)
    lab.before()                                  # {family: loss on its answers, nats per token}
    lab.after("head", layer=3, head=1, mode="mean")

A lesion acts on every position but the first. There stands `<bos>`, the same in all documents, so
that its mean and its resample would be itself; for a fair comparison zero leaves it alone, too.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld.tokenizer import offsets
from mi_helpers.tinyworld.world import World

SITE = {"head": "z", "attn": "attn_out", "mlp": "mlp_out"}  # what a lesion of each kind replaces
MODES = ("zero", "mean", "resample")
Part = tuple[str, int, int | None]  # kind, layer, head

# ---------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class Batch:
    """Documents as one right-padded batch, and the tokens of them that are scored.

    ids (n, length), lengths (n,); scored token j is ids[rows[j], positions[j]] and belongs to
    names[family[j]].
    """

    ids: Tensor
    lengths: Tensor
    rows: Tensor
    positions: Tensor
    family: Tensor
    names: tuple[str, ...]

    def inside(self) -> Tensor:
        """(n, length), True at the tokens after the first and before the padding."""
        places = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (places > 0) & (places < self.lengths[:, None])


def make_batch(
    model: LanguageModel,
    answers: int = 16,
    seed: int = 20_000,
    families: tuple[str, ...] | None = None,
    longest: int = 24,
) -> Batch:
    """TinyWorld documents of each family, until `answers` tokens or more of it are scored.

    Scored are the first tokens of the answers (of the pronouns in "pronoun"); in families without
    answers (prose, Norwegian), whose documents are cut to size, all tokens. No document has more
    than `longest` tokens, and of each family there are `answers / 4` documents or more.

    Raises:
        ValueError: an unknown family; a family whose documents are nearly all too long.
    """
    world, rows, scored = World(), [], []
    names = tuple(families or world.families)
    for index, name in enumerate(names):
        start, first = len(scored), len(rows)
        for document in itertools.islice(world.documents(seed, name), 100 * answers):
            ids = model.tokens(document.text)[0].tolist()
            places = answer_positions(model, document)
            if len(ids) > longest and places:
                continue
            ids = ids[:longest]
            scored += [(len(rows), place, index) for place in places or range(1, len(ids))]
            rows.append(ids)
            if len(scored) - start >= answers and 4 * (len(rows) - first) >= answers:
                break
        else:
            raise ValueError(f"Too few documents of {name!r} have {longest} tokens: allow more.")
    where = torch.tensor(scored).T.to(model.device)
    lengths = torch.tensor([len(row) for row in rows])
    return Batch(model.pad(rows), lengths.to(model.device), *where, names)


def answer_positions(model: LanguageModel, document) -> list[int]:
    """Where in `model.tokens(document.text)` each answer (or pronoun) begins."""
    spans = document.find("answer") or document.find("pronoun")
    ids, ranges = offsets(model.tokenizer, document.text)
    before = model.tokens(document.text).shape[1] - len(ids)  # 1 with <bos>, else 0
    return [before + int(np.searchsorted(ranges[:, 0], span.start)) for span in spans]


# ------------------------------------------------------------------------------------ lesions


def lesion(
    model: LanguageModel,
    kind: str,
    layer: int,
    head: int | None = None,
    mode: str = "zero",
    reference: Tensor | None = None,
    seed: int = 0,
) -> dict:
    """Hooks that silence one part of the model, for `model.hooks`.

    A head's z, an attention block's attn_out or an MLP's mlp_out becomes, at each position after
    the first,
        zero      0
        mean      the mean of `reference`
        resample  a row of `reference`, drawn anew for each document and position

    Args:
        kind: "head", "attn" or "mlp".
        head: which head; None for the other kinds.
        reference: the site's activations at tokens of other documents, (tokens, ...) with z as
            (tokens, n_heads, d_head); see `reference_activations`.

    Raises:
        ValueError: no such part or mode, or a reference that is missing or of another shape.
    """
    _check_part(model, kind, layer, head)
    if mode not in MODES:
        raise ValueError(f"There is no mode {mode!r}: choose one of {', '.join(MODES)}.")
    if mode != "zero":
        _check_reference(model, kind, mode, reference)
        rows = reference[:, head] if kind == "head" else reference
        mean = rows.float().mean(0)

    def hook(x: Tensor) -> Tensor:
        at = x[:, 1:, head] if kind == "head" else x[:, 1:]  # (batch, pos - 1, width): a view
        if mode == "zero":
            at.zero_()
        elif mode == "mean":
            at.copy_(mean.expand_as(at))
        else:
            rng = torch.Generator().manual_seed(seed)
            at.copy_(rows[torch.randint(len(rows), at.shape[:2], generator=rng).to(rows.device)])
        return x

    return {(SITE[kind], layer): hook}


def _check_part(model: LanguageModel, kind: str, layer: int, head: int | None) -> None:
    if kind not in SITE:
        raise ValueError(f"There is no kind of part {kind!r}: choose one of {', '.join(SITE)}.")
    if not 0 <= layer < model.n_layers:
        raise ValueError(f"{model.name} has layers 0 to {model.n_layers - 1}, not {layer}.")
    if kind == "head" and (head is None or not 0 <= head < model.n_heads):
        raise ValueError(f"{model.name} has heads 0 to {model.n_heads - 1}, not {head}.")
    if kind != "head" and head is not None:
        raise ValueError(f"A lesion of kind {kind!r} takes no head, and was given head {head}.")


def _check_reference(model: LanguageModel, kind: str, mode: str, reference: Tensor | None) -> None:
    width = (model.n_heads, model.d_head) if kind == "head" else (model.d_model,)
    if reference is None:
        raise ValueError(f"Mode {mode!r} needs a reference: activations of other documents.")
    if tuple(reference.shape[1:]) != width or len(reference) == 0:
        raise ValueError(
            f"The reference for {SITE[kind]!r} has shape {tuple(reference.shape)}, expected "
            f"(tokens, {', '.join(map(str, width))})."
        )


def reference_activations(model: LanguageModel, batch: Batch, sites=None) -> dict:
    """{(site, layer): (tokens, ...)} at the tokens of `batch`, without `<bos>` and padding."""
    sites = tuple(SITE.values()) if sites is None else sites
    _, cache = model.run_with_cache(batch.ids, sites, stop_at_layer=model.n_layers)
    return {key: cache[key][batch.inside()] for key in cache}


def last_answer(model: LanguageModel, document, hooks: Mapping | None = None) -> tuple:
    """(text before the last answer, the answer, what the model says there under `hooks`)."""
    span = (document.find("answer") or document.find("pronoun"))[-1]
    prompt, truth = document.text[: span.start].rstrip(), document.text[span.start : span.end]
    n = len(model.str_tokens(f"{prompt} {truth}")) - len(model.str_tokens(prompt))
    with model.hooks(hooks or {}):
        return prompt, truth, model.generate(prompt, n)[len(prompt) :].strip()


# ------------------------------------------------------------------------------------- losses


@torch.no_grad()
def family_losses(model: LanguageModel, batch: Batch, hooks: Mapping | None = None) -> dict:
    """{family: mean -log p(scored token | what stands before it)}, in nats, under `hooks`."""
    with model.hooks(hooks or {}):
        _, cache = model.run_with_cache(batch.ids, "resid_final", stop_at_layer=model.n_layers)
    return _losses(model, batch, cache["resid_final"])


def _losses(model: LanguageModel, batch: Batch, final: Tensor) -> dict[str, float]:
    """The same from the last stream, (n, length, d_model): only scored tokens are unembedded."""
    logits = model.unembed(final[batch.rows, batch.positions - 1]).float()
    losses = F.cross_entropy(logits, batch.ids[batch.rows, batch.positions], reduction="none")
    return {
        name: losses[batch.family == index].mean().item() for index, name in enumerate(batch.names)
    }


class LesionLab:
    """Lesions of one model, on one batch of documents; every answer is computed once.

    A lesion in layer L starts from the stream that enters layer L, which is kept from the intact
    run, so that only the layers from L on are run.

    Args:
        batch: what the losses are measured on; by default `make_batch(model)`.
        reference: the other documents, whose activations the means and resamples are taken from.
    """

    def __init__(
        self, model: LanguageModel, batch: Batch | None = None, reference: Batch | None = None
    ):
        self.model = model
        self.batch = make_batch(model) if batch is None else batch
        other = make_batch(model, answers=8, seed=30_000) if reference is None else reference
        self.reference = reference_activations(model, other)
        sites = ("resid_pre", "resid_final")
        _, self.clean = model.run_with_cache(self.batch.ids, sites, stop_at_layer=model.n_layers)
        self._known: dict[tuple, dict[str, float]] = {}

    def parts(self, layers=None) -> list[Part]:
        """(kind, layer, head) of every head and every MLP, of all layers or of some."""
        layers = range(self.model.n_layers) if layers is None else layers
        heads = range(self.model.n_heads)
        return [
            part for i in layers for part in (*(("head", i, h) for h in heads), ("mlp", i, None))
        ]

    def before(self) -> dict[str, float]:
        """{family: loss} of the intact model, in nats per scored token."""
        if () not in self._known:
            self._known[()] = _losses(self.model, self.batch, self.clean["resid_final"])
        return dict(self._known[()])

    def hooks(self, kind: str, layer: int, head: int | None = None, mode: str = "mean") -> dict:
        """The lesion's hooks, with this lab's reference."""
        return lesion(
            self.model, kind, layer, head, mode, self.reference.get((SITE.get(kind), layer))
        )

    def after(
        self, kind: str, layer: int, head: int | None = None, mode: str = "mean"
    ) -> dict[str, float]:
        """{family: loss} with one part silenced; ValueError as `lesion` raises it."""
        hooks = self.hooks(kind, layer, head, mode)
        return self._run((kind, layer, head, mode), layer, hooks)

    def noise(
        self, kind: str, layer: int, head: int | None = None, mode: str = "mean", seed: int = 0
    ) -> dict[str, float]:
        """The control: {family: loss} when the stream is pushed as far as the lesion pushes it,
        at every token, but in a random direction."""
        site = "mlp_out" if kind == "mlp" else "attn_out"
        change = self._written(site, layer, self.hooks(kind, layer, head, mode))
        change -= self._written(site, layer, {})  # (n, length, d_model)
        rng = torch.Generator().manual_seed(seed)
        push = F.normalize(torch.randn(change.shape, generator=rng).to(change), dim=-1)
        push *= change.norm(dim=-1, keepdim=True)
        key = (kind, layer, head, mode, "noise", seed)
        return self._run(key, layer, {(site, layer): lambda x: x + push})

    def damage(self, parts: list[Part], mode: str = "mean") -> Tensor:
        """(parts, families): loss after less loss before, in nats."""
        before = torch.tensor(list(self.before().values()))
        after = [list(self.after(*part, mode=mode).values()) for part in parts]
        return torch.tensor(after) - before

    @torch.no_grad()
    def _run(self, key: tuple, layer: int, hooks: Mapping) -> dict[str, float]:
        if key not in self._known:
            with self.model.hooks(hooks):
                final = self.model.run_from_layer(
                    self.clean["resid_pre", layer], layer, stop_at_layer=self.model.n_layers
                )
            self._known[key] = _losses(self.model, self.batch, final)
        return dict(self._known[key])

    @torch.no_grad()
    def _written(self, site: str, layer: int, hooks: Mapping) -> Tensor:
        """What a layer's attention or MLP adds to the stream, (n, length, d_model)."""
        seen: list[Tensor] = []
        with self.model.hooks(hooks), self.model.hooks({(site, layer): seen.append}):
            self.model.run_from_layer(self.clean["resid_pre", layer], layer, layer + 1)
        return seen[0]


def strongest_dissociation(damage: Tensor) -> tuple[int, int, int, int]:
    """The two parts and two skills (i, a, j, b) for which this is largest, both factors positive:

        (damage[i, a] - damage[i, b]) · (damage[j, b] - damage[j, a])

    So the lesion of i takes a and spares b, that of j takes b and spares a: Teuber's (1955) double
    dissociation. damage (parts, skills); what harms all skills alike scores nothing.
    """
    gap = damage[:, :, None] - damage[:, None, :]  # (parts, skills, skills)
    best = gap.amax(0).clamp(min=0)
    strength = best * best.T  # (skills, skills)
    a, b = divmod(int(strength.argmax()), strength.shape[1])
    return int(gap[:, a, b].argmax()), a, int(gap[:, b, a].argmax()), b


def part_name(part: Part) -> str:
    """("head", 3, 1) -> "L3 head 1", ("mlp", 3, None) -> "L3 MLP"."""
    kind, layer, head = part
    return f"L{layer} " + {"head": f"head {head}", "attn": "attention", "mlp": "MLP"}[kind]


# -------------------------------------------------------------------------------- for the ledger


def stream_sum_error(seed: int) -> float:
    """max |embed + Σ attn_out + Σ mlp_out - resid_final| / max |resid_final|, on one document.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "Residual
    Stream as a Communication Channel": the final stream is the sum of all that was written.
    """
    model = load_model()
    text = World().document(seed, "prose").text
    _, cache = model.run_with_cache(text, ["embed", "attn_out", "mlp_out", "resid_final"])
    parts = cache["embed"] + cache["attn_out"].sum(0) + cache["mlp_out"].sum(0)
    final = cache["resid_final"]
    return float((parts - final).abs().max() / final.abs().max())
