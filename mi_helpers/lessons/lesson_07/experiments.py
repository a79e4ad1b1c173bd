"""The science of lesson 07: transcoders, which stand for a model's MLPs latent by latent.

    coders = load_transcoders()                       # one for each MLP of tiny-gemma
    held = read_mlps(model, 20_000, seed=1)           # {layer: (MLP inputs, MLP outputs)}
    x, y = held[3]
    coder = sae_lab.fit(x, 1_152, 16, target=y)       # with target=None it would be an SAE of x

`python -m mi_helpers make-transcoders` (`main`) makes what ships in data/transcoders: for each
layer one TopK transcoder without and one with a skip path, in SAELens' layout.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mi_helpers.ablation import Batch, family_losses, make_batch
from mi_helpers.circuits.replacement import (
    Coders,
    Columns,
    FrozenNorm,
    LocalReplacement,
    edges_closed_form,
    reads_of,
)
from mi_helpers.files import DATA
from mi_helpers.layouts import NORMALIZED, norm_gain
from mi_helpers.lessons.lesson_06.experiments import READ, fit
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel, read_sites
from mi_helpers.saes import files as coder_files
from mi_helpers.saes.coder import SparseCoder, explained_variance
from mi_helpers.saes.features import collect, context, extremes, logit_effects
from mi_helpers.saes.figures import Page
from mi_helpers.saes.harvest import batches, harvest
from mi_helpers.saes.report import predict, spliced
from mi_helpers.saes.sources import open_source

SHIPPED = DATA / "transcoders"
KINDS = {"plain": False, "skip": True}  # name of the folder: whether there is a skip path
WIDTH, K = 8, 16  # latents in units of d_model, and how many of them fire per token
SOURCE, TARGET = "mlp_in", "mlp_out"
SCOPE = "google/gemma-scope-2b-pt-transcoders"  # published, of Gemma 2 2B
SCOPE_L0 = (76, 65, 49, 54, 88, 87, 95, 70, 52, 72, 88, 5, 6, 8, 8, 8, 10, 12, 13, 12, 11, 13, 15)
SCOPE_L0 += (25, 37, 41)  # the lowest L0 of each layer's files: note the drop after layer 10

TOGETHER = "all at once"
MOST_NUMBERS = 2**27  # of latents by tokens that are computed at once

Pairs = dict[int, tuple[Tensor, Tensor]]

# ------------------------------------------------------------------------------- rows to train on


def text_ids(
    model: LanguageModel, tokens: int, seed: int, text: str = READ, context: int = 128
) -> list[list[int]]:
    """Token ids, `<bos>` first, of texts until there are `tokens` tokens after the `<bos>`es."""
    ids, total = [], 0
    for each in open_source(text, seed).texts():
        row = model.tokenizer.encode(
            each, add_special_tokens=False
        )  # maybe longer than the context
        ids.append([model.tokenizer.bos_token_id, *row][: min(context, model.n_ctx)])
        total += len(ids[-1]) - 1
        if total >= tokens:
            break
    return ids


def read_mlps(
    model: LanguageModel,
    tokens: int,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    text: str = READ,
    source: str = SOURCE,
    target: str = TARGET,
) -> Pairs:
    """{layer: (x, y)}: what each MLP reads and what it adds to the stream, by token.

    Both are (rows, d_model) in bfloat16, rows in one order for all layers, `<bos>` left out. All
    layers are read in one run of the model, in memory; `harvest` does it for one layer, on disk.

    Args:
        source: "mlp_in", or "ln2_normalized" for what Gemma Scope's transcoders read.
    """
    return read_ids(model, text_ids(model, tokens, seed, text), layers, seed, source, target)


@torch.no_grad()
def read_ids(
    model: LanguageModel,
    ids: Sequence[Sequence[int]],
    layers: Sequence[int] | None = None,
    seed: int = 0,
    source: str = SOURCE,
    target: str = TARGET,
) -> Pairs:
    """`read_mlps` of these texts, token ids with `<bos>` first; the seed is the rows' order."""
    layers = range(model.n_layers) if layers is None else layers
    sites = [(name, layer) for layer in layers for name in (source, target)]
    found: list[list[Tensor]] = [[] for _ in sites]
    for batch in batches([len(row) for row in ids], 4_096):
        longest = max(len(ids[i]) for i in batch)
        padded = torch.tensor([list(ids[i]) + [0] * (longest - len(ids[i])) for i in batch])
        inside = torch.arange(longest) < torch.tensor([len(ids[i]) for i in batch])[:, None]
        inside[:, 0] = False
        for held, values in zip(found, read_sites(model, padded, sites), strict=True):
            held.append(values.cpu()[inside].bfloat16())
    rows = [torch.cat(held) for held in found]
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(seed))
    rows = [each[order] for each in rows]  # texts came by length
    return dict(zip(layers, zip(rows[::2], rows[1::2], strict=True), strict=True))


# ------------------------------------------------------------------------------- faithfulness


Replacement = Callable[[Tensor, Tensor], Tensor]  # (MLP input, MLP output) -> what is passed on


def zeros(x: Tensor, y: Tensor) -> Tensor:
    """The replacement that knows nothing: the MLP writes nothing."""
    return torch.zeros_like(y)


def by_coder(coder: SparseCoder) -> Replacement:
    """A transcoder's prediction instead of the MLP's output."""
    return lambda x, y: predict(coder, x)


def by_sae(coder: SparseCoder) -> Replacement:
    """An SAE's reconstruction of the MLP's output."""
    return lambda x, y: predict(coder, y)


def knock_out(coder: SparseCoder) -> Replacement:
    """What is left of a transcoder when no latent fires: its bias, and its skip path."""

    def left(x: Tensor, y: Tensor) -> Tensor:
        return coder.decode(x.new_zeros(*x.shape[:-1], coder.d_latent), x)

    return left


@contextmanager
def replaced(
    model: LanguageModel, by: Mapping[int, Replacement], source: str = SOURCE
) -> Iterator[LanguageModel]:
    """While it lasts, the MLPs of these layers are replaced, at all positions but the first."""
    with ExitStack() as stack:
        for layer, replacement in by.items():
            stack.enter_context(spliced(model, (source, layer), (TARGET, layer), replacement))
        yield model


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
    than zeros; NaN where zeros do less harm than `least` nats, so that there is little to win."""
    return (zero - spliced_in) / (zero - clean) if zero - clean > least else float("nan")


@dataclass(frozen=True)
class Faithful:
    """{family: loss in nats} of the model as it is, with replacements, and with zeros there."""

    clean: dict[str, float]
    spliced: dict[str, float]
    zero: dict[str, float]

    @property
    def recovered(self) -> float:
        """The share of the loss that comes back, of the mean over families."""
        return recovered(*(mean_loss(each) for each in (self.clean, self.spliced, self.zero)))

    def by_family(self) -> dict[str, float]:
        """{family: share that comes back}; NaN where zeros hardly harm."""
        return {
            name: recovered(self.clean[name], self.spliced[name], self.zero[name])
            for name in self.clean
        }

    @property
    def added(self) -> float:
        """The loss that the replacement adds, in nats, mean over families."""
        return mean_loss(self.spliced) - mean_loss(self.clean)


def faithful(
    model: LanguageModel,
    batch: Batch,
    by: Mapping[int, Replacement],
    source: str = SOURCE,
    clean: dict[str, float] | None = None,
) -> Faithful:
    """How well the model works with these MLPs replaced, beside zeros at the same places."""
    clean = losses(model, batch, {}) if clean is None else clean
    return Faithful(
        clean, losses(model, batch, by, source), losses(model, batch, dict.fromkeys(by, zeros))
    )


def as_layers(coders: Coders) -> dict[int, SparseCoder]:
    """{layer: transcoder} of a list with one for each layer, or of such a mapping."""
    return dict(coders) if isinstance(coders, Mapping) else dict(enumerate(coders))


def every(coders: Coders) -> dict[int, Replacement]:
    """All MLPs replaced by their transcoders, for `faithful`."""
    return {layer: by_coder(coder) for layer, coder in as_layers(coders).items()}


def compare(
    model: LanguageModel, batch: Batch, ways: Mapping[str, Mapping[int, Replacement]]
) -> dict[tuple[str, str], Faithful]:
    """{(where, way): `faithful`} for ways {name: {layer: replacement}}: each layer alone
    ("layer 3"), and all of a way's layers together (`TOGETHER`).

    The model as it is and the zeros are run once for all ways.
    """
    clean, zero, found = losses(model, batch, {}), {}, {}
    for way, by in ways.items():
        for where, these in [(f"layer {i}", {i: by[i]}) for i in by] + [(TOGETHER, dict(by))]:
            if where not in zero:
                zero[where] = losses(model, batch, dict.fromkeys(these, zeros))
            found[where, way] = Faithful(clean, losses(model, batch, these), zero[where])
    return found


@torch.no_grad()
def explained(coder: SparseCoder, x: Tensor, y: Tensor) -> float:
    """Explained variance of the target y (rows, d_out) from x (rows, d_in)."""
    return explained_variance(y.float(), coder(x.float()))


@torch.no_grad()
def mean_l0(coder: SparseCoder, x: Tensor) -> float:
    """How many latents fire per row of x: with TopK k at most, fewer where fewer are positive."""
    return float((coder.encode(x.float()) > 0).sum(1).float().mean())


# ---------------------------------------------------------------------------- baselines


@torch.no_grad()
def affine_map(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(W, b) of the best y ≈ x @ W + b, by least squares over rows x (n, d_in), y (n, d_out): what
    a skip path could do without any latent."""
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


@torch.no_grad()
def neurons_explained(
    model: LanguageModel, layer: int, x: Tensor, numbers: Sequence[int]
) -> dict[int, float]:
    """{n: explained variance of the MLP's output by n of its own neurons at each row of x}.

    At each row the n neurons count that write most; the others are silent. The norm after the MLP
    keeps the scale that it has with all of them, and the best constant is added, as a transcoder
    has one (`b_dec`). To leave the others at their mean would be no rival: the rows with the
    largest neurons make the mean, and the norm divides the other rows by much less.
    """
    seen: list[Tensor] = []
    hook = model.part("w_out", layer).register_forward_pre_hook(lambda _, args: seen.append(args))
    x = x.to(model.device, model.dtype)
    whole = model.part("mlp", layer)(x).float()
    hook.remove()
    post, W = seen[0][0].float(), model.weight("W_out", layer).float()  # (rows, d_mlp)
    norm = model.part("ln2_post", layer)
    after = (lambda y: y) if norm is None else FrozenNorm.of(norm, whole)
    order = (post.abs() * W.norm(dim=1)).argsort(1, descending=True)
    target, found = after(whole), {}
    for n in numbers:
        kept = torch.zeros_like(post).scatter(1, order[:, :n], post.gather(1, order[:, :n]))
        given = after(kept @ W)
        found[n] = explained_variance(target, given + (target - given).mean(0))
    return found


@torch.no_grad()
def random_features(
    x: Tensor, y: Tensor, latents: int, k: int, seed: int = 0, ridge: float = 1e-4
) -> SparseCoder:
    """A transcoder whose encoder is left random, with the decoder that is best for it.

    The directions that are read are random, and biased so that the mean input fires none of them
    more than another; the decoder is the ridge regression of y on the k latents that fire. What
    such a coder explains is owed to their number, not to what they read.
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
    """{layer: what a rule is drawn from}: a harvest of MLP inputs, and where each latent fires."""
    pages = {}
    for layer, coder in as_layers(coders).items():
        held = harvest(
            model,
            open_source(READ, seed),
            folder / f"layer_{layer}",
            (SOURCE, layer),
            (TARGET, layer),
            tokens=tokens,
            progress=False,
        )
        pages[layer] = Page(held, coder, collect(held, coder), model)
    return pages


@torch.no_grad()
def token_reading(model: LanguageModel, coder: SparseCoder, layer: int) -> Tensor:
    """What each latent would read if the stream held a token's embedding alone, (d_vocab, latents).

    norm(W_E) @ W_enc + b_enc, with the norm in front of the layer's MLP: the direct path from the
    embedding to the encoder. A norm takes no notice of the embedding's scale.
    """
    x = model.part("ln2", layer)(model.W_E).float()
    return x @ coder.W_enc + coder.b_enc


@torch.no_grad()
def first_words(model: LanguageModel, coder: SparseCoder, layer: int, among: int = 10) -> Tensor:
    """The tokens in use that each latent reads most in `token_reading`, (latents, among), the first
    first; some latents at a time, as the whole table of a large model has no room."""
    ids = model.in_use.nonzero()[:, 0]
    x = model.part("ln2", layer)(model.W_E[ids]).float()
    columns = coder.W_enc.split(max(1, MOST_NUMBERS // len(x)), dim=1)
    return torch.cat([ids[(x @ each).topk(among, dim=0).indices.T] for each in columns]).cpu()


@torch.no_grad()
def reading_of(model: LanguageModel, coder: SparseCoder, layer: int, latent: int) -> Tensor:
    """`token_reading` of one latent, (d_vocab,)."""
    latent = int(coder.check_latents([latent]))
    x = model.part("ln2", layer)(model.W_E).float()
    return x @ coder.W_enc[:, latent] + coder.b_enc[latent]


def top_tokens(model: LanguageModel, values: Tensor, n: int = 8) -> list[tuple[str, float]]:
    """[(token, value)] of the n highest of values (d_vocab,), among the tokens in use."""
    top, _ = extremes(model, values, n)
    name = model.tokenizer.decode
    return [(name([int(i)]), float(v)) for v, i in zip(*top, strict=True)]


def own_tokens(page: Page, least: int = 10) -> dict[int, tuple[int, float]]:
    """{latent: (the token on which its highest firings fall most often, the share of them there)}
    of the latents that fire in `least` different texts."""
    ids = [page.held.shard(i).tokens.numpy() for i in range(len(page.held.sizes))]
    tokens, found = np.concatenate(ids), {}
    for latent, rows in enumerate(page.features.top_row):
        rows = rows[rows >= 0]
        if len(rows) >= least:
            token, count = Counter(tokens[rows].tolist()).most_common(1)[0]
            found[latent] = token, count / len(rows)
    return found


def foretold(page: Page, layer: int, among: int = 10) -> tuple[float, float]:
    """(share, control): of the latents that fire in ten different texts, the share whose own token
    (`own_tokens`) is among the first `among` that the embedding gives (`first_words`); and the same
    with predictions exchanged between latents."""
    own = own_tokens(page)
    if not own:
        return float("nan"), float("nan")
    first = first_words(page.model, page.coder, layer, among)[list(own)].numpy()
    token = np.array([token for token, _ in own.values()])[:, None]
    hits, control = ((each == token).any(1).mean() for each in (first, np.roll(first, 1, 0)))
    return float(hits), float(control)


def next_tokens(page: Page, latent: int) -> list[int]:
    """The ids of the tokens that come next where the latent fires most; a text's end has none."""
    rows = (int(row) for row in page.features.top_row[latent] if row >= 0)
    found = (context(page.held, row, str, around=1) for row in rows)
    return [int(each.tokens[each.at + 1]) for each in found if each.at + 1 < len(each.tokens)]


@torch.no_grad()
def plainest(page: Page, layer: int) -> int:
    """A latent to begin with: of those that fire on one word only, which the embedding foretells
    first (and, if there are such, suffices for), the one whose decoder row raises the words that
    come next in the text farthest above the others."""
    own = own_tokens(page)
    first = first_words(page.model, page.coder, layer, 1)[:, 0].tolist()
    plain = [i for i, (token, share) in own.items() if share > 0.95 and first[i] == token]
    alone = [i for i in plain if reading_of(page.model, page.coder, layer, i)[own[i][0]] > 0]
    plain = (alone or plain or list(own) or [0])[:200]
    effects = logit_effects(page.model, page.coder.W_dec[plain])
    used = effects[:, page.model.in_use]
    effects = (effects - used.mean(1, keepdim=True)) / used.std(1, keepdim=True)
    after = [next_tokens(page, latent) for latent in plain]
    raised = [
        float(effect[ids].mean()) if ids else -math.inf
        for effect, ids in zip(effects, after, strict=True)
    ]
    return plain[int(np.argmax(raised))]


@dataclass(frozen=True)
class Written:
    """What happens to the logits when single latents stop writing, and what was foretold.

    Each is a correlation over the tokens in use (`LanguageModel.in_use`), (firings,):

    own    with what the latent's decoder row foretells, through the unembedding
    other  with what the row of another latent foretells, one that fired in another text
    """

    own: np.ndarray
    other: np.ndarray


@torch.no_grad()
def written(
    model: LanguageModel,
    coder: SparseCoder,
    layer: int,
    ids: Sequence[Sequence[int]],
    seed: int = 0,
) -> Written:
    """Silence one firing per text, let the model go on, and compare the change of the logits at
    that place with the direct effect of the decoder row (`features.logit_effects`).

    Args:
        ids: token ids of two texts or more, `<bos>` first; each is one firing. The place is drawn
            at random, and so is the latent, among those that fire there.
    """
    rng = np.random.default_rng(seed)
    foretold, happened = [], []
    for row in ids:
        tokens = torch.tensor([list(row)])
        sites = [(SOURCE, layer), ("resid_post", layer)]
        _, cache = model.run_with_cache(tokens, sites, stop_at_layer=layer + 1)
        place = int(rng.integers(1, len(row)))
        index, value = coder.encode_sparse(cache[SOURCE, layer][0, place : place + 1].float())
        on = np.flatnonzero(value[0].cpu().numpy() > 0)
        if not len(on):
            continue
        pick = int(rng.choice(on))
        push = value[0, pick] * coder.W_dec[index[0, pick]]  # (d_model,)
        stream = cache["resid_post", layer].repeat(2, 1, 1)
        stream[1, place] -= push.to(stream)
        final = model.run_from_layer(stream, layer + 1, stop_at_layer=model.n_layers)
        before, after = model.unembed(final[:, place], softcap=False).float()
        happened.append((before - after)[model.in_use].cpu())
        foretold.append(logit_effects(model, push[None])[0, model.in_use].cpu())
    own = [_correlation(a, b) for a, b in zip(foretold, happened, strict=True)]
    turned = foretold[1:] + foretold[:1]
    other = [_correlation(a, b) for a, b in zip(turned, happened, strict=True)]
    return Written(np.array(own), np.array(other))


def _correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over all entries."""
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


# ---------------------------------------------------------------------------- virtual weights


@torch.no_grad()
def virtual_weights(
    model: LanguageModel, below: SparseCoder, above: SparseCoder, layer_above: int
) -> Tensor:
    """W_dec of one layer's latents, times the gain of the reader's norm, times W_enc of another's:
    (latents below, latents above), whatever the text is.

    What a latent's firing by 1 adds to another's pre-activation at the same position along the
    stream, but for the norm's denominator: the input-invariant part of Dunefsky and others 2024.
    """
    reads = reads_of(above)
    gain = norm_gain(model.part("ln2", layer_above)).float() if reads == SOURCE else 1.0
    return (below.W_dec * gain) @ above.W_enc


@dataclass(frozen=True)
class ActivePairs:
    """Pairs of features that fire on a text, the earlier layer first; all arrays (pairs,).

    virtual  the virtual weight times the earlier feature's activation
    edge     what it adds to the later one's pre-activation, through attention as well, with
             attention patterns and norms as they are on this text
    even     the same with every head attending evenly to all tokens so far: weights, no pattern
    gap      positions from the earlier to the later one
    """

    virtual: np.ndarray
    edge: np.ndarray
    even: np.ndarray
    gap: np.ndarray

    def correlation(self, same_position: bool = True, of: str = "virtual") -> float:
        """Of virtual weights (or of="even") and edges, over pairs at one position or at two."""
        chosen = (self.gap == 0) == same_position
        return float(np.corrcoef(getattr(self, of)[chosen], self.edge[chosen])[0, 1])

    def across(self) -> float:
        """The share of Σ |edge| between different positions, which only attention can carry."""
        return float(np.abs(self.edge[self.gap > 0]).sum() / np.abs(self.edge).sum())


@torch.no_grad()
def active_pairs(model: LanguageModel, coders: Coders, prompts: Sequence[str]) -> ActivePairs:
    """Virtual weights beside the true edges (`circuits`) of all pairs of features that fire on
    these prompts."""
    found: list[list[np.ndarray]] = [[], [], [], []]
    layers = as_layers(coders)
    table = {
        (i, j): virtual_weights(model, layers[i], layers[j], j).numpy()
        for j in layers
        for i in layers
        if i < j
    }
    for prompt in prompts:
        local = LocalReplacement(model, layers, prompt, allow_missing=True)
        edge = feature_edges(local)
        local.patterns = [evenly(pattern) for pattern in local.patterns]
        even = feature_edges(local)
        at = list(local.features.items())
        layer = np.concatenate([np.full(len(active), i) for i, active in at])
        place, latent, value = (
            torch.cat([getattr(active, name) for _, active in at]).cpu().numpy()
            for name in ("positions", "latents", "values")
        )
        for (below, above), weights in table.items():
            source, goal = np.flatnonzero(layer == below), np.flatnonzero(layer == above)
            gap = place[goal][:, None] - place[source]
            virtual = weights[latent[source]][:, latent[goal]].T * value[source]
            here = np.ix_(goal, source)
            for held, each in zip(found, (virtual, edge[here], even[here], gap), strict=True):
                held.append(each[gap >= 0])
    return ActivePairs(*(np.concatenate(each) for each in found))


@torch.no_grad()
def feature_edges(local: LocalReplacement) -> np.ndarray:
    """What each feature adds to each one's pre-activation, (reading features, writing features)."""
    columns = Columns(local)
    features = torch.cat([torch.arange(s.start, s.stop) for s in columns.features.values()])
    rows = []
    for layer, active in local.features.items():
        if len(active):
            vectors = local.coders[layer].W_enc[:, active.latents].float().T
            edges, _ = edges_closed_form(local, columns, layer, active.positions, vectors)
            rows.append(edges.cpu()[:, features])
    return torch.cat(rows).numpy()


def evenly(pattern: Tensor) -> Tensor:
    """Attention (heads, query, key) that is spread evenly over all tokens up to the query."""
    seen = torch.ones_like(pattern).tril()
    return seen / seen.sum(-1, keepdim=True)


@torch.no_grad()
def together(
    below: SparseCoder,
    above: SparseCoder,
    x_below: Tensor,
    x_above: Tensor,
    weights: Tensor,
    n=1_000,
) -> float:
    """Of the n pairs of latents with the largest |virtual weight|, the share that ever fires at one
    token of rows x (the same tokens in both): the others are interference that no text shows."""
    fired = [
        torch.zeros(len(x), coder.d_latent).scatter_(1, *_on(coder, x))
        for coder, x in ((below, x_below), (above, x_above))
    ]
    both = fired[0].T @ fired[1]  # (latents below, latents above): tokens at which both fire
    top = weights.abs().flatten().topk(n).indices
    return float((both.flatten()[top] > 0).float().mean())


def _on(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """(latents, 1 where they fire, else 0), (rows, k) both."""
    index, value = coder.encode_sparse(x.float())
    return index, (value > 0).float()


# ------------------------------------------------------------------------ Gemma Scope's convention


@torch.no_grad()
def as_published(
    model: LanguageModel, coder: SparseCoder, layer: int, x: Tensor, folder: Path
) -> Path:
    """Write a transcoder of `mlp_in` as Gemma Scope publishes one; the folder of params.npz.

    Two things change. Its input is the normalised stream *without* the norm's gain, so the gain
    moves into the encoder: W_enc' = gain · W_enc. And it is JumpReLU, so the k largest of each row
    become all above one threshold, which the rows x (rows, d_model) exceed k times on average; one
    that is JumpReLU already keeps its thresholds.

    Raises:
        ValueError: a skip path, which Gemma Scope's transcoders have not.
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


@torch.no_grad()
def of_mlp_in(model: LanguageModel, coder: SparseCoder, layer: int) -> SparseCoder:
    """A published transcoder as one of `mlp_in`: the way back from `as_published`.

    One that reads the normalised stream without the gain gets W_enc / gain; another stays as it is.
    """
    if reads_of(coder) == SOURCE:
        return coder
    new, gain = copy.deepcopy(coder), norm_gain(model.part("ln2", layer)).float()
    new.W_enc /= gain[:, None]
    new.metadata = {**coder.metadata, "reads": SOURCE}
    return new


# ---------------------------------------------------------------------------- the shipped set


def load_transcoders(skip: bool = False, folder: Path = SHIPPED) -> list[SparseCoder]:
    """The shipped transcoders, one for each layer, in order.

    Each reads `mlp_in` (after the norm, its gain included) and predicts `mlp_out` (after the
    post-norm), as `coder.metadata` says: "reads", "target", "layer".

    Raises:
        ValueError: they are not there.
    """
    place = folder / ("skip" if skip else "plain")
    layers = sorted(place.glob("layer_*"), key=lambda path: int(path.name.split("_")[1]))
    if not layers:
        raise ValueError(
            f"There are no transcoders in {folder.name}/{place.name}: "
            "python -m mi_helpers make-transcoders makes them."
        )
    return [coder_files.load(path) for path in layers]


def coders_for(
    model: LanguageModel, layers: Sequence[int], rows: Pairs | None = None
) -> dict[int, SparseCoder]:
    """{layer: transcoder without skip path}: tiny-gemma's are shipped, Gemma 2 2B's are Gemma
    Scope's, and for any other model small ones are trained on rows, as `read_mlps` gives them."""
    if model.name == "tiny-gemma":
        shipped = load_transcoders()
        return {layer: shipped[layer] for layer in layers}
    if "gemma-2-2b" in model.name:
        return gemma_scope(model, layers)
    rows = read_mlps(model, 20_000, layers=layers) if rows is None else rows
    return {i: fit(rows[i][0], 4 * model.d_model, K, target=rows[i][1], steps=200) for i in layers}


def gemma_scope(model: LanguageModel, layers: Sequence[int]) -> dict[int, SparseCoder]:
    """{layer: Gemma Scope's transcoder of Gemma 2 2B}, the sparsest of 16,384 latents, reading
    `mlp_in`. Each is 302 MB to download, once, and as much memory."""
    path = "layer_{}/width_16k/average_l0_{}"
    return {
        i: of_mlp_in(model, coder_files.load(SCOPE, path.format(i, SCOPE_L0[i])), i) for i in layers
    }


def save_transcoder(coder: SparseCoder, folder: Path, layer: int, model: LanguageModel, **more):
    """Write one transcoder, in half precision, with what it reads and predicts."""
    return coder_files.save(
        coder.folded().half(),
        folder / ("skip" if coder.skip else "plain") / f"layer_{layer}",
        model_name=model.name,
        layer=layer,
        reads=SOURCE,
        target=TARGET,
        hook_name_out=f"blocks.{layer}.hook_mlp_out",
        dataset=READ,
        prepend_bos=True,
        **more,
    )


def make_transcoders(
    model: LanguageModel,
    folder: Path = SHIPPED,
    *,
    tokens: int = 150_000,
    steps: int = 2_400,
    batch: int = 1_024,
    kinds: Sequence[str] = tuple(KINDS),
    rows: Pairs | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Make data/transcoders: `plain/layer_N` and `skip/layer_N`, cfg.json and weights in each.

    The same model and the same machine give the same files.

    Args:
        rows: to train on, as `read_mlps` gives them; by default they are read anew.
    """
    start = time.monotonic()
    rows = read_mlps(model, tokens) if rows is None else rows
    say(f"read {len(next(iter(rows.values()))[0]):,} rows in {time.monotonic() - start:.0f} s")
    for kind in kinds:
        for layer, (x, y) in rows.items():
            coder = fit(
                x, WIDTH * model.d_model, K, target=y, skip=KINDS[kind], steps=steps, batch=batch
            )
            save_transcoder(coder, folder, layer, model, training_tokens=steps * batch)
            say(f"{kind}, layer {layer}: {time.monotonic() - start:.0f} s")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main(argv: list[str]) -> int:
    """`python -m mi_helpers make-transcoders [--folder data/transcoders]`."""
    parser = argparse.ArgumentParser(
        prog="python -m mi_helpers make-transcoders", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where to put them")
    options = parser.parse_args(argv)
    made = make_transcoders(load_model("tiny-gemma"), options.folder)
    print(f"{len(made)} files, {sum(path.stat().st_size for path in made) / 2**20:.1f} MiB")
    print("Now write the checksums of data/: python -m mi_helpers manifest --write")
    return 0


# --------------------------------------------------------------------------- rows of the ledger


@functools.cache
def shipped(seed: int) -> dict[tuple[str, str], Faithful]:
    """`compare` of the shipped transcoders, on text of the seed."""
    model = load_model("tiny-gemma")
    batch = make_batch(model, seed=40_000 + 1_000 * seed)
    return compare(model, batch, {"transcoder": every(load_transcoders())})


def together_with(seed: int, by: Mapping[int, Replacement]) -> Faithful:
    """All MLPs replaced in another way, on the text of `shipped`."""
    model, known = load_model("tiny-gemma"), shipped(seed)[TOGETHER, "transcoder"]
    batch = make_batch(model, seed=40_000 + 1_000 * seed)
    return Faithful(known.clean, losses(model, batch, by), known.zero)


def one_by_one(seed: int) -> list[float]:
    """Nats that each transcoder adds alone."""
    return [each.added for (where, _), each in shipped(seed).items() if where != TOGETHER]


def most_added(seed: int) -> float:
    """Nats per answer that one transcoder adds, in the layer where it is most."""
    return max(one_by_one(seed))


def all_layers(seed: int) -> float:
    """Loss recovered with all MLPs replaced at once."""
    return shipped(seed)[TOGETHER, "transcoder"].recovered


def all_layers_skip(seed: int) -> float:
    """Loss recovered with all MLPs replaced by transcoders with a skip path."""
    return together_with(seed, every(load_transcoders(skip=True))).recovered


def biases_alone(seed: int) -> float:
    """The control of `all_layers`: the same transcoders with no latent firing."""
    coders = load_transcoders()
    return together_with(seed, {i: knock_out(coder) for i, coder in enumerate(coders)}).recovered


def compounding(seed: int) -> float:
    """Nats added by all transcoders at once, less the sum of what each adds alone."""
    return shipped(seed)[TOGETHER, "transcoder"].added - sum(one_by_one(seed))


@dataclass(frozen=True)
class SmallFit:
    """Explained variance, on fresh text, of what the MLP of the middle layer writes.

    By a small transcoder, its control that learned from shuffled outputs, the best affine map,
    random features, and the small transcoder in Gemma Scope's layout, read as it wants and turned
    back to read `mlp_in`.
    """

    transcoder: float
    shuffled: float
    affine: float
    random: float
    published: float
    turned_back: float


@functools.cache
def small_fit(seed: int) -> SmallFit:
    """Train and compare once; text and training from the seed."""
    model = load_model("tiny-gemma")
    layer = model.n_layers // 2
    x, y = read_mlps(model, 16_000, 500 + seed, [layer])[layer]
    test = read_mlps(model, 3_000, 600 + seed, [layer])[layer]
    bare = read_mlps(model, 3_000, 600 + seed, [layer], source=NORMALIZED)[layer][0]
    mixed = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]
    width = 4 * model.d_model
    coder, control = (
        fit(x, width, K, target=each, steps=150, batch=512, seed=seed) for each in (y, mixed)
    )
    with tempfile.TemporaryDirectory() as folder:
        place = as_published(model, coder, layer, x, Path(folder) / "transcoders")
        loaded = coder_files.load(place)
    return SmallFit(
        explained(coder, *test),
        explained(control, *test),
        linear_explained(x, y, *test),
        explained(random_features(x, y, width, K, seed), *test),
        explained(loaded, bare, test[1]),
        explained(of_mlp_in(model, loaded, layer), *test),
    )


def explained_small(seed: int) -> float:
    """Explained variance of a small transcoder."""
    return small_fit(seed).transcoder


def explained_shuffled(seed: int) -> float:
    """The control of `explained_small`: shuffled outputs."""
    return small_fit(seed).shuffled


def above_affine(seed: int) -> float:
    """Explained variance of a small transcoder, less that of the best affine map."""
    return small_fit(seed).transcoder - small_fit(seed).affine


def above_random(seed: int) -> float:
    """Explained variance of a small transcoder, less that of random features."""
    return small_fit(seed).transcoder - small_fit(seed).random


def above_neurons(seed: int) -> float:
    """Explained variance of the shipped transcoders, less that of as many of the MLP's own neurons,
    in the layer where it is least."""
    model = load_model("tiny-gemma")
    coders, rows = load_transcoders(), read_mlps(model, 3_000, 600 + seed)
    return min(
        explained(coders[i], x, y) - neurons_explained(model, i, x, [K])[K]
        for i, (x, y) in rows.items()
    )


def layouts_differ(seed: int) -> float:
    """Explained variance of a transcoder in Gemma Scope's layout, reading the stream without the
    norm's gain, less that of the same one turned back to `mlp_in`."""
    return small_fit(seed).published - small_fit(seed).turned_back


def cost_of_jumprelu(seed: int) -> float:
    """Explained variance with TopK, less that in Gemma Scope's layout, which is JumpReLU."""
    return small_fit(seed).transcoder - small_fit(seed).published


@functools.cache
def rules_foretold(seed: int) -> list[tuple[float, float]]:
    """`foretold` of the shipped transcoders, (share, control) by layer, on text of the seed."""
    model = load_model("tiny-gemma")
    with tempfile.TemporaryDirectory() as folder:
        pages = make_pages(model, load_transcoders(), Path(folder), 8_000, seed=800 + seed)
        return [foretold(page, layer) for layer, page in pages.items()]


def foretold_first(seed: int) -> float:
    """Share of latents whose word the embedding foretells, first layer."""
    return rules_foretold(seed)[0][0]


def foretold_last(seed: int) -> float:
    """The same in the last layer."""
    return rules_foretold(seed)[-1][0]


def foretold_exchanged(seed: int) -> float:
    """The control of `foretold_first`: predictions of other latents."""
    return rules_foretold(seed)[0][1]


@functools.cache
def written_at(seed: int, layer: int) -> Written:
    """`written` for 160 firings of a layer's shipped transcoder."""
    model = load_model("tiny-gemma")
    ids = [each for each in text_ids(model, 6_000, 900 + seed) if len(each) > 3][:160]
    return written(model, load_transcoders()[layer], layer, ids, seed)


def written_last(seed: int) -> float:
    """Correlation of foretold and true change of the logits, last layer, median over firings."""
    return float(np.median(written_at(seed, load_model("tiny-gemma").n_layers - 1).own))


def written_first(seed: int) -> float:
    """The same in the first layer."""
    return float(np.median(written_at(seed, 0).own))


def written_exchanged(seed: int) -> float:
    """The control of `written_last`: predictions of other latents."""
    return float(np.median(written_at(seed, load_model("tiny-gemma").n_layers - 1).other))


@functools.cache
def shipped_pairs(seed: int) -> ActivePairs:
    """`active_pairs` of three prompts of the seed."""
    model = load_model("tiny-gemma")
    texts = [model.tokenizer.decode(ids[1:13]) for ids in text_ids(model, 400, 700 + seed)[:3]]
    return active_pairs(model, load_transcoders(), texts)


def virtual_correlation(seed: int) -> float:
    """Correlation of virtual weight and true edge, pairs of features at one position."""
    return shipped_pairs(seed).correlation()


def virtual_correlation_across(seed: int) -> float:
    """Correlation of virtual weight and true edge, pairs of features at different positions."""
    return shipped_pairs(seed).correlation(same_position=False)


def even_correlation_across(seed: int) -> float:
    """The same of all weights, the heads' too, with attention spread evenly."""
    return shipped_pairs(seed).correlation(same_position=False, of="even")
