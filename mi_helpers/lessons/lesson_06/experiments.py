"""The science of lesson 06: what a sparse autoencoder finds, scored against TinyWorld's labels.

    ground = make_ground(model, tokens=20_000, seed=1)      # activations, neurons and labels
    coder = fit(x, latents=1_152, k=32)                     # a TopK SAE of rows x (n, d_model)
    scores = concept_scores(coder, ground)                  # best latent, neuron, direction

`python -m mi_helpers make-sae` (`main`) makes what ships in data/sae: a coder of tiny-gemma's
middle layer, and a table of smaller runs over widths, sparsities, activations and seeds.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mi_helpers.files import DATA
from mi_helpers.heads import repeated_tokens
from mi_helpers.layouts import Key
from mi_helpers.lessons.lesson_06.image_coding import gaussian_like
from mi_helpers.loading import load_model, untrained
from mi_helpers.models import LanguageModel, read_sites
from mi_helpers.saes import files as coder_files
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.coder import SparseCoder, explained_variance
from mi_helpers.saes.features import Features, collect, fires
from mi_helpers.saes.harvest import harvest
from mi_helpers.saes.labels import token_labels
from mi_helpers.saes.products import Products
from mi_helpers.saes.report import held_out_texts, predict, spliced, spliced_losses
from mi_helpers.saes.scores import Best, Firings, score_units
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.step import SparseStep
from mi_helpers.saes.training import Recipe, learning_rate, quality
from mi_helpers.tinyworld.lexicon import topics

CONCEPTS = {  # TinyWorld's name of each concept that the reference run found
    "virology": "virology",
    "london": "London landmarks",
    "courts": "sentencing",
    "norwegian": "Norwegian",
    "quantum": "quantum physics",
    "aircraft": "aircraft designators",
}
READ, SCORED = "tinyworld", "tinyworld:prose,norwegian"  # text to train on, and to score on
SHIPPED = DATA / "sae"
CODER, GRID = SHIPPED / "tiny_gemma", SHIPPED / "grid.csv"
STRONG = 0.25  # of a latent's highest activation: from there on a firing counts as strong
SAME = 0.7  # cosine above which two latents count as one and the same
ALONE = Products(("float32",), "highest")  # on any machine the same choice
WIDTHS, KS = (1, 2, 4, 8, 16), (2, 4, 8, 16, 32)  # in units of d_model; latents per token
K = 8  # of what ships: 32 of 144 numbers would hardly be sparse; the table says what it costs


def middle(model: LanguageModel) -> Key:
    """The site of this lesson: the stream after the middle block, which is 3 of tiny-gemma's 6, and
    12 of Gemma 2 2B's 26, as in the reference run."""
    return "resid_post", min(model.n_layers // 2, 12)


# ------------------------------------------------------------------------------------- training


@torch.no_grad()
def fit(
    x: Tensor,
    latents: int,
    k: int = 32,
    *,
    target: Tensor | None = None,
    skip: bool = False,
    steps: int = 300,
    batch: int = 2_048,
    activation: str = "topk",
    sparsity: float = 0.0,
    seed: int = 0,
    watch: Callable[[int, dict], None] | None = None,
) -> SparseCoder:
    """An SAE of rows x (n, d) that are in memory: `training.train` without its files.

    With a target (n, d_out) it is a transcoder: that line is the only difference.

    Args:
        skip: whether a transcoder has an affine path around its latents.
        batch: rows per step, drawn at random, each step anew.
        activation, sparsity: "topk" with k; or "relu" with the coefficient of its L1 penalty.
        watch: called with the step's number and its metrics.

    Raises:
        ValueError: k larger than the dictionary, NaN in x, a target of another length.
    """
    k_or_none = k if activation in ("topk", "batchtopk") else None
    y = x if target is None else target
    if len(y) != len(x):
        raise ValueError(f"There are {len(x)} rows of input and {len(y)} of target.")
    d_out = None if target is None else y.shape[1]
    coder = SparseCoder(
        x.shape[1], latents, d_out, activation=activation, k=k_or_none, skip=skip, seed=seed
    )
    coder.initialise(x[:8_192], y[:8_192])
    dead_after = min(100_000, steps * batch // 4)
    step = SparseStep(
        coder, dead_after_tokens=dead_after, sparsity_coefficient=sparsity, products=ALONE
    )
    recipe = Recipe(latents, steps=steps, batch=batch)
    generator = torch.Generator().manual_seed(seed)
    for number in range(steps):
        step.lr = learning_rate(number, recipe)
        rows = torch.randint(len(x), (batch,), generator=generator)
        metrics = step(x[rows], None if target is None else y[rows])
        if watch is not None:
            watch(number, metrics)
    return coder.folded()


def rows_of(held: Activations, most: int | None = None) -> Tensor:
    """The first `most` rows of a harvest (all without it), float32, in memory."""
    return held.slice(0, min(held.rows, most or held.rows))[0]


# ----------------------------------------------------------------------------------- the ground


@dataclass(frozen=True)
class Ground:
    """Held-out text to score units on, its n tokens in the order of the text.

    x        (n, d_model): the stream at `middle(model)`
    neurons  (n, d_mlp): the MLP's neurons in the same block
    truth    (n, concepts): whether the token belongs to a text about the concept
    names    of the concepts, TinyWorld's
    tokens   (n,) token ids
    """

    x: Tensor
    neurons: Tensor
    truth: np.ndarray
    names: tuple[str, ...]
    tokens: np.ndarray

    def only(self, names: Sequence[str]) -> Ground:
        """The same tokens with these concepts alone."""
        columns = [self.names.index(name) for name in names]
        return Ground(self.x, self.neurons, self.truth[:, columns], tuple(names), self.tokens)

    def scorable(self, names: Sequence[str] = tuple(CONCEPTS)) -> list[str]:
        """Those of the names that occur in both halves of the text, as a score needs."""
        half = len(self.truth) // 2
        both = self.truth[:half].any(0) & self.truth[half:].any(0)
        return [name for name in names if name in self.names and both[self.names.index(name)]]


def make_ground(
    model: LanguageModel, tokens: int = 20_000, seed: int = 1, text: str = SCORED
) -> Ground:
    """Harvest `tokens` tokens of labelled text and keep those whose label is known.

    A token of prose is labelled where a reader who knows the generator is at least 90 % sure of the
    topic from what stands before it; Norwegian is labelled throughout.
    """
    site = middle(model)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(text, seed)
        held = harvest(
            model, source, folder, site, ("post", site[1]), tokens=tokens, progress=False
        )
        labels = token_labels(held, model.tokenizer)
        x, neurons = held.slice(0, held.rows)
        ids = np.concatenate([held.shard(i).tokens.numpy() for i in range(len(held.sizes))])
    truth, names = labels.table()
    known = labels.known
    return Ground(x[known], neurons[known], truth, names, ids[known])


def firings_of(coder: SparseCoder, x: Tensor) -> Firings:
    """Every firing of a coder on rows x (n, d_in)."""
    row, latent, value = fires(coder, x)
    return Firings(row, latent, value, len(x), coder.d_latent)


def both_signs(units: Tensor) -> np.ndarray:
    """Each unit and its negative, (n, 2 units): a neuron may mean something when it is low."""
    return torch.cat([units, -units], 1).numpy()


def random_directions(x: Tensor, n: int, seed: int = 0) -> np.ndarray:
    """Rows x (rows, d), less their mean, along n random directions: (rows, n)."""
    generator = torch.Generator().manual_seed(seed)
    return ((x - x.mean(0)) @ torch.randn(x.shape[1], n, generator=generator)).numpy()


def concept_scores(
    coder: SparseCoder, ground: Ground, names: Sequence[str] = tuple(CONCEPTS), seed: int = 0
) -> dict[str, list[Best]]:
    """Each concept's best latent, best neuron and best of as many random directions as latents.

    Unit and threshold are chosen on the first half of the text, and scored on the second.
    """
    ground = ground.only(names)
    units = {
        "latent": firings_of(coder, ground.x),
        "neuron": both_signs(ground.neurons),
        "random direction": random_directions(ground.x, coder.d_latent, seed),
    }
    return {
        kind: score_units(each, ground.truth, ground.names).best() for kind, each in units.items()
    }


def best_latents(coder: SparseCoder, ground: Ground, names: Sequence[str] | None = None):
    """Each concept's best latent, as `concept_scores`, without the controls."""
    ground = ground if names is None else ground.only(names)
    return score_units(firings_of(coder, ground.x), ground.truth, ground.names).best()


def strong(firings: Firings, share: float = STRONG) -> Firings:
    """Only the firings at `share` or more of what the latent reaches in the first half of the rows.

    The weakest firings say little: with 8 of 1,152 latents on at every token, some have to be on
    wherever nothing fits.
    """
    early = firings.row < firings.n_rows // 2
    highest = np.full(firings.n_latents, np.inf)
    latents = np.unique(firings.latent[early])
    reached = np.zeros(firings.n_latents)
    np.maximum.at(reached, firings.latent[early], firings.value[early])
    highest[latents] = reached[latents]
    keep = firings.value >= share * highest[firings.latent]
    return Firings(
        firings.row[keep],
        firings.latent[keep],
        firings.value[keep],
        firings.n_rows,
        firings.n_latents,
    )


def union_f1(firings: Firings, truth: np.ndarray, precision: float = 0.5) -> np.ndarray:
    """F1 of 'any of the concept's latents fires' on the second half of the rows, (concepts,).

    The concept's latents are those of whose firings on the first half more than `precision` are at
    its tokens: where a concept is split over many latents, together they may tell it.
    """
    half, found = firings.n_rows // 2, []
    early = firings.row < half
    fired = np.bincount(firings.latent[early], minlength=firings.n_latents)
    for concept in truth.T:
        own = early & concept[firings.row]
        hits = np.bincount(firings.latent[own], minlength=firings.n_latents)
        chosen = hits > precision * np.maximum(fired, 1)
        fires_at = np.zeros(firings.n_rows, dtype=bool)
        fires_at[firings.row[chosen[firings.latent]]] = True
        said, true = fires_at[half:], concept[half:]
        found.append(2 * (said & true).sum() / max(said.sum() + true.sum(), 1))
    return np.array(found)


# --------------------------------------------------------------------------- where in the text


def topic_words(model: LanguageModel, topic: str) -> list[int]:
    """The ids of a topic's nouns, both numbers, of those that are one token with their space.

    Raises:
        ValueError: TinyWorld has no such topic, or none of its nouns is one token.
    """
    nouns = {each.key: each.noun for each in topics()}
    if topic not in nouns:
        raise ValueError(f"TinyWorld has no topic {topic!r}; it has {', '.join(nouns)}.")
    encode = model.tokenizer.encode
    rows = [encode(f" {word}", add_special_tokens=False) for pair in nouns[topic] for word in pair]
    found = sorted({row[0] for row in rows if len(row) == 1})
    if not found:
        raise ValueError(f"No noun of {topic} is one token of {model.name}.")
    return found


@torch.no_grad()
def around_a_word(
    model: LanguageModel,
    coder: SparseCoder,
    latent: int,
    topic: str,
    n: int = 32,
    length: int = 24,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """A latent's mean value around a topic's word in lists of random words.

    Each of the n lists has one of `topic_words` at a random place and is written twice in a row. At
    the first writing nothing tells what comes next; at the second, the first does.

    Returns:
        {"first time" or "second time": {place: mean value of the latent at `middle(model)`}}
    """
    ids = repeated_tokens(model, n, length, seed)
    generator = torch.Generator().manual_seed(seed)
    words = torch.tensor(topic_words(model, topic))
    drawn = words[torch.randint(len(words), (n,), generator=generator)]
    place = torch.randint(1, length - 1, (n,), generator=generator)
    row, start = torch.arange(n), ids.shape[1] - 2 * length
    at = {"first time": start + place, "second time": start + length + place}
    for each in at.values():
        ids[row, each] = drawn
    (x,) = read_sites(model, ids, [middle(model)])
    value = coder.encode(x.float())[..., latent]
    places = {"the word before": -1, "the word of the topic": 0, "the word after": 1}
    return {
        time: {name: float(value[row, each + by].mean()) for name, by in places.items()}
        for time, each in at.items()
    }


# ------------------------------------------------------------------------ splitting and sharing


def latents_of(
    firings: Firings, truth: np.ndarray, precision: float = 0.8, recall: float = 0.02
) -> np.ndarray:
    """How many latents belong to each concept, (concepts,): those that fire at more than `recall`
    of its tokens, and of whose firings more than `precision` are its own."""
    fired = np.bincount(firings.latent, minlength=firings.n_latents)
    counts = []
    for concept in truth.T:
        hits = np.bincount(
            firings.latent, weights=concept[firings.row], minlength=firings.n_latents
        )
        belongs = (hits > precision * fired) & (hits > recall * concept.sum())
        counts.append(int(belongs.sum()))
    return np.array(counts)


def own_latents(coder: SparseCoder, ground: Ground) -> dict[str, int]:
    """{concept: how many latents of its own it has}, by strong firings (`strong`, `latents_of`)."""
    found = latents_of(strong(firings_of(coder, ground.x)), ground.truth)
    return dict(zip(ground.names, found.tolist(), strict=True))


def of_topics(own: Mapping[str, int]) -> float:
    """The mean of `own_latents` over the topics, Norwegian left out."""
    return float(np.mean([count for name, count in own.items() if name != "norwegian"]))


def matched_cosines(rows: Tensor, others: Tensor) -> np.ndarray:
    """Cosines of the best one-to-one matching of rows (n, d) with other rows (m, d), m ≥ n: (n,).

    The matching with the largest sum of cosines (the Hungarian algorithm), as in Paulo and Belrose
    2025.
    """
    cosines = (F.normalize(rows, dim=1) @ F.normalize(others, dim=1).T).numpy()
    row, column = linear_sum_assignment(-cosines)
    return cosines[row, column]


def shared(rows: Tensor, others: Tensor, same: float = SAME) -> float:
    """The share of rows whose match in `others` has a cosine above `same`."""
    return float((matched_cosines(rows, others) > same).mean())


def random_like(rows: Tensor, seed: int = 0) -> Tensor:
    """As many random directions as rows (n, d), with the rows' mean and covariance: the control of
    `shared`, which gives chance its fair share of the directions that all rows prefer."""
    return F.normalize(gaussian_like(rows, seed), dim=1)


def alive(coder: SparseCoder, x: Tensor) -> np.ndarray:
    """Whether each latent fires anywhere in rows x, (latents,)."""
    return np.bincount(fires(coder, x)[1], minlength=coder.d_latent) > 0


# -------------------------------------------------------------------------------------- measures


def shrinkage(x: Tensor, x_hat: Tensor) -> float:
    """The length of x along its reconstruction: Σ x̂ · (x̂ - x̄) / Σ x · (x̂ - x̄), after centring.

    1 where the reconstruction cannot be bettered by a factor; below 1 where it is too short, as an
    L1 penalty makes it (Rajamanoharan and others 2024, "Improving Dictionary Learning with Gated
    Sparse Autoencoders", relative reconstruction bias).
    """
    centre = x.mean(0)
    x, x_hat = x - centre, x_hat - centre
    return float((x_hat * x_hat).sum() / (x * x_hat).sum())


def token_purity(features: Features, tokens: np.ndarray, least: int = 10) -> np.ndarray:
    """Of the highest firings of each latent, the share at that token which is commonest among them;
    of the latents with `least` or more of them.

    tokens (rows,): the token of each row of the harvest that the features are of
    """
    rows = [top[top >= 0] for top in features.top_row]
    counts = [np.unique(tokens[top], return_counts=True)[1] for top in rows if len(top) >= least]
    return np.array([count.max() / count.sum() for count in counts])


@dataclass(frozen=True)
class Plane:
    """log y = constant + width_slope · log width + k_slope · log k, and how well it fits (R²)."""

    constant: float
    width_slope: float
    k_slope: float
    r_squared: float

    def __call__(self, width, k):
        """y at a width and a k, numbers or arrays."""
        log = self.constant + self.width_slope * np.log(width) + self.k_slope * np.log(k)
        return np.exp(log)


def fit_plane(width, k, y) -> Plane:
    """The plane through log y over log width and log k, by least squares."""
    width, k, y = (np.log(np.asarray(each, dtype=float)) for each in (width, k, y))
    columns = np.stack([np.ones_like(width), width, k], 1)
    found, *_ = np.linalg.lstsq(columns, y, rcond=None)
    left = ((y - columns @ found) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return Plane(*(float(each) for each in found), float(1 - left))


def width_slope(rows: Sequence[dict], k: int) -> float:
    """The slope of log nMSE over log width, of the table's TopK runs at one k."""
    runs = select(rows, activation="topk", k=k, seed=0)
    width, error = (np.log([row[name] for row in runs]) for name in ("width", "nmse"))
    return float(np.polyfit(width, error, 1)[0])


def at_equal_l0(l0: float, curve: Mapping[float, float]) -> float:
    """The value of a curve {L0: value} at an L0, between its points along log L0.

    Raises:
        ValueError: the L0 lies beyond the curve's ends.
    """
    places = sorted(curve)
    if not places[0] <= l0 <= places[-1]:
        raise ValueError(
            f"The curve goes from L0 {places[0]:.1f} to {places[-1]:.1f}, not to {l0:.1f}: train "
            "more coders."
        )
    return float(np.interp(np.log(l0), np.log(places), [curve[place] for place in places]))


# ------------------------------------------------------------------------- one whole experiment


@dataclass(frozen=True)
class Outcome:
    """One SAE: its quality on held-out rows, and its best latents, neurons and directions."""

    coder: SparseCoder
    quality: dict[str, float]
    recovered: float
    dead: float
    scores: dict[str, list[Best]]
    purity: float

    def f1(self, kind: str = "latent") -> dict[str, float]:
        """{concept: F1 of its best unit of this kind}."""
        return {best.concept: best.f1 for best in self.scores[kind]}


def only_words(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """A model of the same shape that knows its words and nothing else: random weights, but the
    trained embedding."""
    blank = untrained(model, seed)
    with torch.no_grad():
        blank.part("embed").weight.copy_(model.part("embed").weight)
    return blank


MODELS: dict[str, Callable[[LanguageModel, int], LanguageModel]] = {
    "trained": lambda model, seed: model,
    "random weights": untrained,
    "trained embedding only": only_words,
}


@functools.cache
def experiment(seed: int, kind: str = "trained") -> Outcome:
    """Harvest, train and score once, with text, weights and order of the rows from the seed.

    kind  of the model whose activations these are, one of `MODELS`: tiny-gemma, or a control
    """
    model = MODELS[kind](load_model("tiny-gemma"), seed)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(READ, 100 + seed)
        held = harvest(model, source, folder, middle(model), tokens=100_000, progress=False)
        x, n = rows_of(held), held.rows - 8_000
        coder = fit(x[:n], 8 * model.d_model, K, steps=400, seed=seed)
        texts = held_out_texts(held, n, 4_000)
        recovered = spliced_losses(model, held, coder, texts).recovered("zero")
        features = collect(held, coder)
        ids = np.concatenate([held.shard(i).tokens.numpy() for i in range(len(held.sizes))])
    ground = make_ground(model, 20_000, 200 + seed)
    return Outcome(
        coder,
        quality(coder, x[n:]),
        float("nan") if recovered is None else recovered,
        features.dead,
        concept_scores(coder, ground, ground.scorable(), seed),
        float(token_purity(features, ids).mean()),
    )


# ------------------------------------------------------------------------------ the shipped table


COLUMNS = (
    "activation",
    "width",
    "k",
    "sparsity",
    "seed",
    "explained_variance",
    "nmse",
    "l0",
    "dead",
    "loss_recovered",
    "shrinkage",
    "f1",
    "latents_per_topic",
    "shared",
)


@dataclass(frozen=True)
class Bench:
    """What every run of the table is trained and measured on.

    x, test  rows to train on, and held-out rows
    held     the harvest of both; texts: held-out texts, as token ids
    ground   labelled text; model: what they are the activations of
    clean, zero  the model's loss on the texts, and with zeros at the site
    """

    model: LanguageModel
    held: Activations
    x: Tensor
    test: Tensor
    texts: list[list[int]]
    ground: Ground
    clean: float
    zero: float

    @classmethod
    def make(cls, model: LanguageModel, held: Activations, tokens: int = 16_000) -> Bench:
        n = held.rows - min(8_192, held.rows // 10)
        x, texts = rows_of(held), held_out_texts(held, n, 3_000)
        clean = loss_with(model, held, texts, lambda x, _: x)
        zero = loss_with(model, held, texts, lambda x, _: torch.zeros_like(x))
        ground = make_ground(model, tokens, seed=1)
        return cls(model, held, x[:n], x[n:], texts, ground, clean, zero)

    def row(self, coder: SparseCoder, **settings) -> dict:
        """A row of the table: `settings`, and what the coder is worth."""
        with torch.no_grad():
            predicted = coder.decode_sparse(*coder.encode_sparse(self.test), self.test)
        firings = firings_of(coder, self.ground.x)
        six = self.ground.only(self.ground.scorable())
        best = score_units(firings, six.truth, six.names).best()
        spliced_in = loss_with(self.model, self.held, self.texts, lambda x, _: predict(coder, x))
        measured = quality(coder, self.test)
        return settings | {
            "explained_variance": measured["explained_variance"],
            "nmse": measured["nmse"],
            "l0": measured["l0"],
            "dead": 1 - float(alive(coder, self.x[:50_000]).mean()),
            "loss_recovered": (self.zero - spliced_in) / (self.zero - self.clean),
            "shrinkage": shrinkage(self.test, predicted),
            "f1": float(np.median([each.f1 for each in best])),
            "latents_per_topic": float(latents_of(strong(firings), self.ground.truth).mean()),
            "shared": "",
        }


@torch.no_grad()
def loss_with(
    model: LanguageModel,
    held: Activations,
    texts: list[list[int]],
    replace: Callable[[Tensor, Tensor], Tensor],
) -> float:
    """The model's loss per token on texts (ids without BOS) with `replace(x, x)` at the harvest's
    site, as `report.spliced_losses`, for one replacement."""
    longest, total = max(len(ids) for ids in texts), 0.0
    bos = model.tokenizer.bos_token_id
    ids = model.pad([[bos, *row] for row in texts])
    inside = torch.arange(longest) < torch.tensor([len(row) for row in texts])[:, None]
    with spliced(model, held.source, held.target, replace):
        for part, mask in zip(ids.split(16), inside.split(16), strict=True):
            total += float((model.loss(part).cpu() * mask).sum())
    return total / float(inside.sum())


def make_grid(
    bench: Bench,
    widths: Sequence[int] = WIDTHS,
    ks: Sequence[int] = KS,
    penalties: Sequence[float] = (0.02, 0.04, 0.08, 0.14, 0.22),
    steps: int = 400,
    say: Callable[[str], None] = print,
) -> list[dict]:
    """The table: TopK over widths and ks; a second seed of each width at k = K (or the largest k),
    to see what the two share; ReLU with an L1 penalty at the third width."""
    d, rows, seen = bench.x.shape[1], [], {}
    again = K if K in ks else max(ks)
    plan = [("topk", w, k, 0.0, 0) for w in widths for k in ks]
    plan += [("topk", w, again, 0.0, 1) for w in widths]
    plan += [("relu", widths[min(2, len(widths) - 1)], 0, penalty, 0) for penalty in penalties]
    for activation, width, k, sparsity, seed in plan:
        coder = fit(
            bench.x,
            width * d,
            k,
            steps=steps,
            batch=1_024,
            activation=activation,
            sparsity=sparsity,
            seed=seed,
        )
        row = bench.row(
            coder, activation=activation, width=width * d, k=k, sparsity=sparsity, seed=seed
        )
        if (activation, k) == ("topk", again):
            first = seen.setdefault(width, coder)
            if first is not coder:
                row["shared"] = shared(first.W_dec.detach(), coder.W_dec.detach())
        rows.append(row)
        say(
            f"{activation:5} {width * d:5} latents, k {k:2}: explained variance "
            f"{row['explained_variance']:.3f}, L0 {row['l0']:.1f}, F1 {row['f1']:.2f}"
        )
    return rows


def write_grid(rows: Sequence[Mapping], path: Path = GRID) -> Path:
    """The table as a CSV, numbers to four digits, written whole or not at all."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            cells = (row[name] for name in COLUMNS)
            writer.writerow([f"{c:.4g}" if isinstance(c, float) else c for c in cells])
    os.replace(temporary, path)
    return path


@functools.cache
def read_grid(path: Path = GRID) -> list[dict]:
    """The rows of the table, numbers as numbers; a blank is None.

    Raises:
        ValueError: the file is missing.
    """
    if not path.is_file():
        raise ValueError(
            f"{path.name} is not in {path.parent.name}: python -m mi_helpers make-sae makes it."
        )
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    whole = ("width", "k", "seed")
    return [
        {
            name: cell
            if name == "activation"
            else None
            if cell == ""
            else (int if name in whole else float)(cell)
            for name, cell in row.items()
        }
        for row in rows
    ]


def select(rows: Sequence[dict], **wanted) -> list[dict]:
    """The rows that have all these values: `select(rows, activation="topk", seed=0)`."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


# ------------------------------------------------------------------------------------ the command


def make_sae(
    model: LanguageModel,
    folder: Path = SHIPPED,
    *,
    tokens: int = 250_000,
    steps: int = 1_000,
    grid_steps: int = 400,
    grid: Mapping | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Make data/sae: `tiny_gemma/` (cfg.json, sae_weights.safetensors) and grid.csv.

    The same model and the same machine give the same files.
    """
    start, site = time.monotonic(), middle(model)
    with tempfile.TemporaryDirectory() as scratch:
        source = open_source(READ, 0)
        held = harvest(model, source, scratch, site, tokens=tokens, progress=False)
        say(f"harvested {held.rows:,} rows in {time.monotonic() - start:.0f} s")
        bench = Bench.make(model, held, tokens=min(16_000, tokens))
        width = 8 * model.d_model
        coder = fit(bench.x, width, K, steps=steps, batch=4_096, seed=0)
        row = bench.row(coder, activation="topk", width=width, k=K, sparsity=0.0, seed=0)
        coder_files.save(
            coder,
            folder / CODER.name,
            model_name=model.name,
            hook_name=f"blocks.{site[1]}.hook_{site[0]}",
            dataset=READ,
            training_tokens=steps * 4_096,
            prepend_bos=True,
        )
        say(
            f"{CODER.name}: {width} latents, k {K}, explained variance "
            f"{row['explained_variance']:.3f}, loss recovered {row['loss_recovered']:.3f}, "
            f"dead {row['dead']:.1%}, F1 of the six concepts {row['f1']:.2f}, "
            f"{time.monotonic() - start:.0f} s"
        )
        rows = make_grid(bench, steps=grid_steps, say=say, **(grid or {}))
    write_grid(rows, folder / GRID.name)
    say(f"done after {time.monotonic() - start:.0f} s")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def main(argv: list[str]) -> int:
    """`python -m mi_helpers make-sae [--folder data/sae]`."""
    parser = argparse.ArgumentParser(prog="python -m mi_helpers make-sae", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="where to put it")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    for path in make_sae(load_model("tiny-gemma"), options.folder):
        print(f"{path.relative_to(options.folder)}: {path.stat().st_size:,} bytes")
    print("Now write the checksums of data/: python -m mi_helpers manifest --write")
    return 0


def structure(x: Tensor, k: int = 8, steps: int = 150, seed: int = 0) -> dict[str, float]:
    """Explained variance of equal SAEs on rows x, and on Gaussian rows of equal covariance; of the
    k largest principal components; and the gap between the first two."""
    n, d = len(x) * 9 // 10, x.shape[1]
    found = {}
    for name, rows in (("activations", x), ("Gaussian", gaussian_like(x, seed))):
        coder = fit(rows[:n], 4 * d, k, steps=steps, batch=1_024, seed=seed)
        with torch.no_grad():
            found[name] = explained_variance(rows[n:], coder(rows[n:]))
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    found["principal components"] = float(values[-k:].sum() / values.sum())
    return found | {"gap": found["activations"] - found["Gaussian"]}
