"""Lesson 07's experiments: transcoders in the place of a model's MLPs, and latents as rules.

coders = transcoders.load_transcoders()           # mi_helpers.saes.transcoders
runs = compare(model, batch, {"transcoder": by_coders(coders)})
runs[ALL_LAYERS, "transcoder"].recovered          # the share of the loss
by_neurons(model, 3, 16, x)                       # the rival: the MLP's own 16 strongest neurons
predicted_tokens(make_pages(model, coders, folder)[0], 0)
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mi_helpers.circuits.replacement import (
    Coders,
    FrozenNorm,
    Replacement,
    by_coder,
    by_layer,
    replaced,
    zeros,
)
from mi_helpers.circuits.rules import token_inputs, top_input_tokens
from mi_helpers.layouts import norm_gain
from mi_helpers.lessons.shared import Batch, family_losses
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder, explained_variance
from mi_helpers.saes.features import collect, context, logit_effects
from mi_helpers.saes.figures import Page
from mi_helpers.saes.harvest import HarvestConfig, harvest_together
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.transcoders import READ, SOURCE, TARGET, Pairs, read_ids

ALL_LAYERS = "all at once"

# ------------------------------------------------------------------------------- faithfulness


def losses(
    model: LanguageModel, batch: Batch, by: Mapping[int, Replacement], source: str = SOURCE
) -> dict[str, float]:
    """{family: loss on its answers in nats} with MLPs replaced; {} leaves the model as it is."""
    with replaced(model, by, source):
        return family_losses(model, batch)


def mean_loss(by_family: Mapping[str, float]) -> float:
    """The mean over the families, each counting the same."""
    return sum(by_family.values()) / len(by_family)


def recovered(clean: float, spliced_in: float, zero: float, least: float = 0.05) -> float:
    """(L_zero - L_spliced) / (L_zero - L_clean): 1 where nothing is lost, 0 where it is no better
    than zeros; NaN where zeros add less than `least` nats, so that there is little to recover."""
    return (zero - spliced_in) / (zero - clean) if zero - clean > least else float("nan")


@dataclass(frozen=True)
class Faithful:
    """{family: loss in nats} of the model as it is, with replacements, and with zeros there."""

    clean: dict[str, float]
    spliced: dict[str, float]
    zero: dict[str, float]

    @property
    def recovered(self) -> float:
        """The share of the loss that is recovered, of the mean over families."""
        return recovered(*(mean_loss(each) for each in (self.clean, self.spliced, self.zero)))

    def by_family(self) -> dict[str, float]:
        """{family: share of the loss that is recovered}; NaN where zeros hardly harm."""
        return {
            name: recovered(self.clean[name], self.spliced[name], self.zero[name])
            for name in self.clean
        }

    @property
    def added(self) -> float:
        """The loss that the replacement adds, in nats, a mean over families."""
        return mean_loss(self.spliced) - mean_loss(self.clean)


def by_coders(coders: Coders) -> dict[int, Replacement]:
    """All MLPs replaced by their transcoders, for `compare`."""
    return {layer: by_coder(coder) for layer, coder in by_layer(coders).items()}


def compare(
    model: LanguageModel, batch: Batch, ways: Mapping[str, Mapping[int, Replacement]]
) -> dict[tuple[str, str], Faithful]:
    """{(part, way): losses} with each layer replaced alone ("layer 3"), and all (`ALL_LAYERS`).

    The model as it is and the zeros are run once for all ways.

    Args:
        ways: {name: {layer: replacement}}.
    """
    clean, zero, found = losses(model, batch, {}), {}, {}
    for way, by in ways.items():
        for part, these in [(f"layer {i}", {i: by[i]}) for i in by] + [(ALL_LAYERS, dict(by))]:
            if part not in zero:
                zero[part] = losses(model, batch, dict.fromkeys(these, zeros))
            found[part, way] = Faithful(clean, losses(model, batch, these), zero[part])
    return found


@torch.no_grad()
def explained(coder: SparseCoder, x: Tensor, y: Tensor) -> float:
    """Explained variance of the target y (rows, d_out) from x (rows, d_in)."""
    return explained_variance(y.float(), coder(x.float()))


@torch.no_grad()
def mean_l0(coder: SparseCoder, x: Tensor) -> float:
    """The mean number of latents that fire at a row of x: with TopK, k or fewer."""
    return float((coder.encode(x.float()) > 0).sum(1).float().mean())


# ---------------------------------------------------------------------------- baselines


@torch.no_grad()
def affine_map(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(W, b) of the best y ≈ x @ W + b, by least squares over rows x (n, d_in), y (n, d_out): as
    much as a skip path could do without any latent."""
    rows = torch.cat([x.float(), torch.ones(len(x), 1)], 1)
    best = torch.linalg.lstsq(rows, y.float()).solution
    return best[:-1], best[-1]


def by_map(W: Tensor, b: Tensor) -> Replacement:
    """An affine map of the MLP's input."""
    return lambda x, y: (x.float() @ W + b).to(x)


@torch.no_grad()
def linear_explained(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Explained variance of the best affine map, fitted on x → y, on other rows."""
    W, b = affine_map(x, y)
    return explained_variance(test_y.float(), test_x.float() @ W + b)


# --------------------------------------------------------------- neurons and latents at equal L0


def strongest(units: Tensor, rows: Tensor, n: int) -> Tensor:
    """What the n units that write most at each token write: (..., d_model).

    Args:
        units: how much each fires, (..., units): neurons, of both signs, or latents.
        rows: what each writes when it fires by 1, (units, d_model).
        n: how many are kept, those with the longest |unit| · row.
    """
    kept = (units.abs() * rows.norm(dim=1)).topk(n, dim=-1).indices
    return torch.zeros_like(units).scatter(-1, kept, units.gather(-1, kept)) @ rows


@torch.no_grad()
def neurons(
    model: LanguageModel, layer: int, x: Tensor
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """An MLP's neurons at x (..., d_model): how much they fire (..., d_mlp), what they write
    (d_mlp, d_model), and the norm after the MLP as it is at x with all of them, a function.

    A norm that is held fixed divides the n strongest neurons by what it divides all of them by.
    """
    seen: list[Tensor] = []
    hook = model.part("w_out", layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    try:
        whole = model.part("mlp", layer)(x.to(model.device, model.dtype)).float()
    finally:
        hook.remove()
    norm = model.part("ln2_post", layer)
    after = (lambda y: y) if norm is None else FrozenNorm.of(norm, whole)
    return seen[0].float(), model.weight("W_out", layer).float(), after


@torch.no_grad()
def by_neurons(model: LanguageModel, layer: int, n: int, x: Tensor) -> Replacement:
    """The n neurons that write most at each token, and the constant that is best on the rows x.

    The rest are silent. (With the rest at their mean this would be no rival: the tokens with the
    largest neurons dominate the mean, and the norm divides the other tokens by much less.)
    """

    def write(x: Tensor) -> tuple[Tensor, Tensor]:
        post, rows, after = neurons(model, layer, x)
        return after(strongest(post, rows, n)), after(post @ rows)

    given, whole = write(x)
    constant = (whole - given).mean(0)
    return lambda x, y: (write(x)[0] + constant).to(y)


@torch.no_grad()
def by_latents(coder: SparseCoder, n: int, x: Tensor, y: Tensor) -> Replacement:
    """The n latents that write most at each token, and the constant that is best on rows x → y."""

    def write(x: Tensor) -> Tensor:
        return strongest(coder.encode(x.float()), coder.W_dec, n)

    constant = (y.float() - write(x)).mean(0)
    return lambda x, y: (write(x) + constant).to(y)


def explained_by(replacement: Replacement, x: Tensor, y: Tensor) -> float:
    """Explained variance of y (rows, d_out) by a replacement that reads x (rows, d_in)."""
    return explained_variance(y.float(), replacement(x.float(), y.float()))


def both_explained(
    model: LanguageModel, coders: Mapping[int, SparseCoder], rows: Pairs, fresh: Pairs, n: int
) -> dict[str, list[float]]:
    """{"latents" or "neurons": explained variance of each layer's output on fresh rows}: by the
    transcoders, and by the n strongest neurons with the constant that is best on rows."""
    shown = {i: by_neurons(model, i, n, x[:2_000]) for i, (x, _) in rows.items()}
    return {
        "latents": [explained(coders[i], *pair) for i, pair in fresh.items()],
        "neurons": [explained_by(shown[i], *pair) for i, pair in fresh.items()],
    }


def rivals(
    model: LanguageModel,
    coders: Mapping[int, SparseCoder],
    rows: Pairs,
    batch: Batch,
    n: int,
) -> dict[str, dict[str, float]]:
    """{kind: {family: nats added}} with the MLPs of these layers replaced by n units at each token:
    "latents" or "neurons".

    Args:
        rows: {layer: (MLP inputs, MLP outputs)}, on which constants are found.
        batch: texts. With few answers a family or two decide: give 40 or more of each.
    """
    few = {i: (x[:2_000], y[:2_000]) for i, (x, y) in rows.items()}  # enough for a constant
    ways = {
        "latents": {i: by_latents(coders[i], n, *pair) for i, pair in few.items()},
        "neurons": {i: by_neurons(model, i, n, x) for i, (x, _) in few.items()},
    }
    clean, added = losses(model, batch, {}), {}
    for kind, by in ways.items():
        after = losses(model, batch, by)
        added[kind] = {name: after[name] - clean[name] for name in clean}
    return added


@torch.no_grad()
def random_features(
    x: Tensor, y: Tensor, latents: int, k: int, seed: int = 0, ridge: float = 1e-4
) -> SparseCoder:
    """A control: a transcoder with a random encoder, and the decoder that is best for it.

    `b_enc` gives all latents the same pre-activation, 0, at the mean input; the decoder is the
    ridge regression of y on the k latents that fire. Such a coder explains as much as so many
    latents can, whatever they read.
    """
    coder = SparseCoder(x.shape[1], latents, y.shape[1], k=k, seed=seed)
    coder.b_enc.copy_(-(x.float().mean(0) @ coder.W_enc))
    f, target = coder.encode(x.float()), y.float()
    coder.b_dec.copy_(target.mean(0))
    centre = f.mean(0)
    gram = f.T @ f - len(f) * torch.outer(centre, centre)
    gram += ridge * gram.diagonal().mean() * torch.eye(latents)
    cross = f.T @ (target - target.mean(0))  # (latents, d_out)
    coder.W_dec.copy_(torch.linalg.solve(gram, cross))
    coder.b_dec -= centre @ coder.W_dec
    return coder


# ---------------------------------------------------------------------------- a latent as a rule


def make_pages(
    model: LanguageModel, coders: Coders, folder: Path, tokens: int = 8_000, seed: int = 8
) -> dict[int, Page]:
    """{layer: a harvest of MLP inputs, and where each latent fires}: what a rule is drawn from."""
    given, source = by_layer(coders), open_source(READ, seed)
    configs = {
        folder / f"layer_{layer}": HarvestConfig((SOURCE, layer), (TARGET, layer), tokens)
        for layer in given
    }
    pairs = zip(
        harvest_together(model, source, configs, progress=False), given.items(), strict=True
    )
    return {layer: Page(held, coder, collect(held, coder), model) for held, (layer, coder) in pairs}


def own_tokens(page: Page, least: int = 10) -> dict[int, tuple[int, float]]:
    """{latent: (the most frequent token of its highest firings, its share of them)}, of the latents
    that fire in `least` different texts."""
    ids = [page.held.shard(i).tokens.numpy() for i in range(len(page.held.sizes))]
    tokens, found = np.concatenate(ids), {}
    for latent, rows in enumerate(page.features.top_row):
        rows = rows[rows >= 0]
        if len(rows) >= least:
            token, count = Counter(tokens[rows].tolist()).most_common(1)[0]
            found[latent] = token, count / len(rows)
    return found


def predicted_tokens(page: Page, layer: int, among: int = 10) -> tuple[float, float]:
    """(share, control): of the latents that fire in ten different texts, the share whose own token
    (`own_tokens`) is among the `among` first that the embedding predicts (`top_input_tokens`); and
    the same with the predictions of other latents."""
    own = own_tokens(page)
    if not own:
        return float("nan"), float("nan")
    first = top_input_tokens(page.model, page.coder, layer, among)[list(own)].numpy()
    token = np.array([token for token, _ in own.values()])[:, None]
    hits, control = ((each == token).any(1).mean() for each in (first, np.roll(first, 1, 0)))
    return float(hits), float(control)


def next_tokens(page: Page, latent: int) -> list[int]:
    """The ids of the tokens that follow the latent's highest firings; a text's end has none."""
    rows = (int(row) for row in page.features.top_row[latent] if row >= 0)
    found = (context(page.held, row, str, around=1) for row in rows)
    return [int(each.tokens[each.at + 1]) for each in found if each.at + 1 < len(each.tokens)]


@torch.no_grad()
def plainest(page: Page, layer: int) -> int:
    """A latent to begin with, whose decoder row raises the words that follow in the text farthest
    above all others. Chosen among the latents that fire on one word only, which the embedding
    predicts first (and, where there are such, makes fire by itself)."""
    own = own_tokens(page)
    first = top_input_tokens(page.model, page.coder, layer, 1)[:, 0].tolist()
    plain = [i for i, (token, share) in own.items() if share > 0.95 and first[i] == token]
    alone = [i for i in plain if token_inputs(page.model, page.coder, layer, i)[own[i][0]] > 0]
    plain = (alone or plain or list(own) or [0])[:200]
    effects = logit_effects(page.model, page.coder.W_dec[plain])
    used = effects[:, page.model.in_text]
    effects = (effects - used.mean(1, keepdim=True)) / used.std(1, keepdim=True)
    after = [next_tokens(page, latent) for latent in plain]
    raised = [
        float(effect[ids].mean()) if ids else -math.inf
        for effect, ids in zip(effects, after, strict=True)
    ]
    return plain[int(np.argmax(raised))]


@torch.no_grad()
def strongest_rules(
    model: LanguageModel, coders: Mapping[int, SparseCoder], ids: Tensor
) -> list[tuple[int, int, float]]:
    """(layer, latent, activation) of the rules that fire at the last token of ids (1, pos), the one
    first that writes most, directly, on the logit of the token that the model says next."""
    logits, cache = model.run_with_cache(ids, ["mlp_in", "resid_final"], pos=-1)
    final = cache["resid_final"][0].float()
    U = model.W_U[:, int(logits[0, -1].argmax())] - model.W_U[:, model.in_text].mean(1)
    along = model.ln_final(final).float() / final * U.float()  # (d_model,)
    found = []
    for layer, coder in coders.items():
        f = coder.encode(cache["mlp_in", layer][0].float())  # (latents,)
        written = f * (coder.W_dec @ along)
        found += [(float(written[i]), layer, int(i), float(f[i])) for i in f.nonzero()[:, 0]]
    return [(layer, latent, value) for _, layer, latent, value in sorted(found, reverse=True)]


# ---------------------------------------------------------------------------- where it misleads


def jumbled(ids: Sequence[list[int]], seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Texts as they are, and each with its tokens after the first in a random order."""
    draw = random.Random(seed)
    return list(ids), [[row[0], *draw.sample(row[1:], len(row) - 1)] for row in ids]


@torch.no_grad()
def cut_off(coder: SparseCoder, x: Tensor) -> float:
    """Of the latents with a positive pre-activation at rows of x, the share that does not fire."""
    wanted = (coder.encode_pre_act(x.float()) > 0).sum()
    return float(1 - (coder.encode(x.float()) > 0).sum() / wanted)


def out_of_place(
    model: LanguageModel, coders: Mapping[int, SparseCoder], ids: Sequence[list[int]]
) -> str:
    """A line for each layer: what is explained on texts, on the same words jumbled, and how many
    latents others cut off."""
    lines = []
    for layer, coder in coders.items():
        ordered, mixed = (read_ids(model, each, [layer])[layer] for each in jumbled(ids))
        two = f"explained {explained(coder, *ordered):.2f}, jumbled {explained(coder, *mixed):.2f}"
        lines.append(f"layer {layer}: {two}; cut off by others {cut_off(coder, ordered[0]):.0%}")
    return "\n".join(lines)


# ------------------------------------------------------------------------ Gemma Scope's convention


@torch.no_grad()
def as_published(
    model: LanguageModel, coder: SparseCoder, layer: int, x: Tensor, folder: Path
) -> Path:
    """Write a transcoder of `mlp_in` as Gemma Scope publishes one.

    Two things change. Its input is the normalised stream *without* the norm's gain, so the gain
    moves into the encoder: W_enc' = gain · W_enc. And it is JumpReLU: instead of the k largest at
    each row, all latents above one threshold fire, k on average over the rows x (rows, d_model). A
    transcoder that is JumpReLU already keeps its thresholds.

    Returns:
        The folder of params.npz.

    Raises:
        ValueError: it has a skip path; Gemma Scope's transcoders have none.
    """
    if coder.skip:
        raise ValueError("Gemma Scope's transcoders have no skip path: give one without.")
    gain = norm_gain(model.part("ln2", layer)).float()
    if coder.activation == "jumprelu":
        l0, threshold = round(mean_l0(coder, x)), coder.threshold.numpy()
    else:
        pre, l0 = coder.encode_pre_act(x.float()), coder.k
        cut = pre.flatten().topk(l0 * len(x)).values[-1].clamp(min=0)
        threshold = np.full(coder.d_latent, float(cut), np.float32)
    place = folder / f"layer_{layer}" / f"width_{coder.d_latent}" / f"average_l0_{l0}"
    place.mkdir(parents=True, exist_ok=True)
    np.savez(
        place / "params.npz",
        W_enc=(gain[:, None] * coder.W_enc).numpy(),
        b_enc=coder.b_enc.numpy(),
        W_dec=coder.W_dec.numpy(),
        b_dec=coder.b_dec.numpy(),
        threshold=threshold,
    )
    return place
