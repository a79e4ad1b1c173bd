"""The experiments of lesson 06: what a sparse autoencoder finds, scored against TinyWorld's labels.

    opening_latent(model, coder)                          # the latent that the lesson opens with
    write_on(probabilities, model, "However, the", 16)    # text sampled from given probabilities
    at_a_topics_words(model, coder, latent, "virology", 0.5)   # in lists that are half the topic's
    structure(x)                                          # real rows against their Gaussian twins
    read_grid()                                           # the table of runs in data/sae/grid.csv

Rivals are in `rivals`, names and their scores in `naming`, the same latents elsewhere in
`universality`; what is not of this lesson alone is in `saes`. What ships is made by `grid`.
"""

from __future__ import annotations

import csv
import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mi_helpers.files import DATA
from mi_helpers.layouts import Key
from mi_helpers.lessons.coders import CODER, middle
from mi_helpers.lessons.coders import coder_of as coder_of
from mi_helpers.lessons.lesson_06.rivals import (
    CONCEPTS,
    Ground,
    Judged,
    ground,
    judge,
    tell,
)
from mi_helpers.lessons.shared import MODELS, repeated_tokens, shipped_model
from mi_helpers.models import LanguageModel, read_sites
from mi_helpers.saes.coder import SparseCoder, explained_variance
from mi_helpers.saes.concepts import best_latents
from mi_helpers.saes.features import collect, token_purity
from mi_helpers.saes.files import load_coder
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.report import held_out_texts, spliced_losses
from mi_helpers.saes.similarity import gaussian_like
from mi_helpers.saes.sources import open_source
from mi_helpers.saes.training import TrainConfig, fit, quality
from mi_helpers.steering import Add, steered
from mi_helpers.tinyworld.lexicon import topics

SHIPPED = DATA / "sae"
GRID = SHIPPED / "grid.csv"
K = 8  # of what ships: 32 of 144 numbers would hardly be sparse; the table says what it costs

# --------------------------------------------------------------------------- where in the text


def topic_words(model: LanguageModel, topic: str) -> list[int]:
    """The ids of a topic's nouns, singular and plural, that are one token with their space.

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
def at_a_topics_words(
    model: LanguageModel,
    coder: SparseCoder,
    latent: int,
    topic: str,
    share: float,
    n: int = 200,
    length: int = 24,
    seed: int = 0,
) -> float:
    """A latent's mean value at a topic's words in lists of words that make no sentence.

    Each word of a list is one of `topic_words` with probability `share`, and otherwise any word at
    random. The second half of each list counts, where the model has seen the first.

    Args:
        topic: TinyWorld's name of it.
        n, length: how many lists, and of how many words.

    Raises:
        ValueError: no word of the topic came up; more lists or a higher share are needed.
    """
    ids = repeated_tokens(model, n, length, seed, times=1)
    generator = torch.Generator().manual_seed(seed)
    words = torch.tensor(topic_words(model, topic), device=ids.device)
    chosen = (torch.rand(n, length, generator=generator) < share).to(ids.device)
    drawn = words[torch.randint(len(words), (n, length), generator=generator).to(ids.device)]
    ids[:, -length:] = torch.where(chosen, drawn, ids[:, -length:])
    counts = chosen & (torch.arange(length, device=ids.device) >= length // 2)
    if not counts.any():
        raise ValueError(f"No word of {topic} came up in {n} lists at a share of {share}.")
    (x,) = read_sites(model, ids, [middle(model)])
    value = coder.encode(x.float())[:, -length:, latent]
    return float(value[counts].mean())


# ------------------------------------------------------------------------------- turning one up


OPENING = "chess"  # the topic whose latent the lesson opens with
TURNED = (0.0, 0.5, 1.0, 1.5, 2.0)  # in units of the latent's highest value


def opening_latent(coder: SparseCoder, tokens: Ground) -> int:
    """The latent that the lesson opens with: the one that tells its topic best in some tokens.

    Raises:
        ValueError: the topic does not occur in both halves of the tokens.
    """
    if not tokens.scorable([OPENING]):
        raise ValueError(f"Too little of the text is about {OPENING}: take more documents of it.")
    return best_latents(coder, tokens, [OPENING])[0].unit


def starts(
    model: LanguageModel, n: int = 12, length: int = 24, seed: int = 0, family: str = "prose"
) -> Tensor:
    """The beginnings of n documents of a family, (n, length) token ids, BOS first.

    Shorter documents are left out.
    """
    source, rows, number = open_source(f"tinyworld:{family}", 1_000 + seed), [], 0
    while len(rows) < n:
        ids = model.tokens(source.document(number).text)[0]
        number += 1
        if len(ids) >= length:
            rows.append(ids[:length])
    return torch.stack(rows)


def write_on(
    probabilities: Callable[[Tensor], Tensor],
    model: LanguageModel,
    text: str,
    n: int = 16,
    seed: int = 1,
) -> str:
    """`text` and n tokens more, each drawn from probabilities(ids)[0, -1], of ids (1, pos)."""
    ids, generator = model.tokens(text), torch.Generator().manual_seed(seed)
    for _ in range(n):
        p = torch.as_tensor(probabilities(ids))[0, -1].float().cpu()
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator).to(ids)[None]], 1)
    return model.tokenizer.decode(ids[0], skip_special_tokens=True)


@torch.no_grad()
def turned_up(
    model: LanguageModel, ids: Tensor, site: Key, direction: Tensor, strength: float
) -> Tensor:
    """p(next token), (batch, pos, d_vocab), with strength times the direction, at unit length,
    added to the stream at a site, everywhere but at the first position."""
    with steered(model, site, Add(direction / direction.norm(), strength)):
        return model(ids).float().softmax(-1)


def random_direction(coder: SparseCoder, seed: int = 0) -> Tensor:
    """A random direction in the stream, (d_model,)."""
    return torch.randn(coder.d_in, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------- measures


def of_topics(own: Mapping[str, int]) -> float:
    """The mean of `concepts.own_latents` over the topics, Norwegian left out."""
    return float(np.mean([count for name, count in own.items() if name != "norwegian"]))


@dataclass(frozen=True)
class Plane:
    """log y = constant + width_slope · log width + k_slope · log k, and the R² of its fit."""

    constant: float
    width_slope: float
    k_slope: float
    r_squared: float

    def __call__(self, width, k):
        """y at a width and a k, numbers or arrays."""
        log = self.constant + self.width_slope * np.log(width) + self.k_slope * np.log(k)
        return np.exp(log)


def fit_plane(width, k, y) -> Plane:
    """The least-squares plane of log y over log width and log k; three arrays (n,)."""
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
    """The value of a curve {L0: value} at an L0, interpolated in log L0.

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


def structure(x: Tensor, k: int = 8, steps: int = 150, seed: int = 0) -> dict[str, float]:
    """The explained variance that is due to sparse structure, beyond the covariance.

    Returns:
        {"activations": explained variance of a small SAE of rows x (n, d), "Gaussian": of one of
        Gaussian rows of equal covariance, "principal components": of the k largest, "gap":
        activations less Gaussian}.
    """
    n, d = len(x) * 9 // 10, x.shape[1]
    found = {}
    for name, rows in (("activations", x), ("Gaussian", gaussian_like(x, seed))):
        coder = fit(rows[:n], TrainConfig(4 * d, k, steps=steps, batch=1_024, seed=seed))
        with torch.no_grad():
            found[name] = explained_variance(rows[n:], coder(rows[n:]))
    values = torch.linalg.eigvalsh(torch.cov(x.T))
    found["principal components"] = float(values[-k:].sum() / values.sum())
    return found | {"gap": found["activations"] - found["Gaussian"]}


def stream_rows(model: LanguageModel, tokens: int, seed: int) -> Tensor:
    """The stream at `middle(model)` at so many tokens of TinyWorld, (rows, d_model), float32."""
    with tempfile.TemporaryDirectory() as folder:
        config = HarvestConfig(middle(model), tokens=tokens)
        held = harvest(model, open_source("tinyworld", seed), folder, config, progress=False)
        return held.slice(0, held.rows)[0]


def in_control(kind: str, model: LanguageModel, seed: int = 0) -> dict[str, float]:
    """A brief SAE of a model or of one of its controls, by three measures.

    Args:
        kind: one of `shared.MODELS`.

    Returns:
        {"explained variance" on held-out rows, "token purity" (the share of a latent's strongest
        contexts that have one and the same token, mean of latents), "F1" of the best latents, the
        median over the six concepts}.
    """
    model = MODELS[kind](model, seed)
    with tempfile.TemporaryDirectory() as folder:
        config = HarvestConfig(middle(model), tokens=10_000)
        held = harvest(model, open_source("tinyworld", 8), folder, config, progress=False)
        x = held.slice(0, held.rows)[0]
        coder = fit(x[:-2_000], TrainConfig(8 * model.d_model, K, steps=120, batch=1_024))
        purity = token_purity(collect(held, coder), held.tokens.numpy()).mean()
    tokens = ground(model, middle(model), 2, each=8, others=60, neurons=False)
    best = best_latents(coder, tokens, tokens.scorable(CONCEPTS))
    return {
        "explained variance": quality(coder, x[-2_000:])["explained_variance"],
        "token purity": float(purity),
        "F1": float(np.median([each.f1 for each in best])),
    }


# ------------------------------------------------------------------------- one whole experiment


@dataclass(frozen=True)
class Outcome:
    """One SAE and its measures on held-out rows.

    Args:
        quality: as `training.quality` gives it.
        recovered: the share of the loss recovered, against zeros.
        dead: the share of latents that never fire.
        purity: mean token purity of the latents.
    """

    coder: SparseCoder
    quality: dict[str, float]
    recovered: float
    dead: float
    purity: float


@functools.cache
def experiment(seed: int, kind: str = "trained") -> Outcome:
    """Harvest, train and measure once; text, weights and the rows' order depend on the seed.

    Args:
        kind: of the model whose activations these are, one of `shared.MODELS`.
    """
    model = MODELS[kind](shipped_model(), seed)
    with tempfile.TemporaryDirectory() as folder:
        config = HarvestConfig(middle(model), tokens=100_000)
        source = open_source("tinyworld", 100 + seed)
        held = harvest(model, source, folder, config, progress=False)
        x, n = held.slice(0, held.rows)[0], held.rows - 8_000
        coder = fit(x[:n], TrainConfig(8 * model.d_model, K, steps=400, batch=2_048, seed=seed))
        texts = held_out_texts(held, n, 4_000)
        recovered = spliced_losses(model, held, coder, texts).recovered("zero")
        features = collect(held, coder)
        ids = held.tokens.numpy()
    return Outcome(
        coder,
        quality(coder, x[n:]),
        float("nan") if recovered is None else recovered,
        features.dead,
        float(token_purity(features, ids).mean()),
    )


@dataclass(frozen=True)
class Told:
    """How well the shipped SAE tells the six concepts in a fresh text, beside its rivals.

    Args:
        judged: {kind of unit: `rivals.Judged`}.
        latents: {concept: its best latent}.
        highest: (latents,), the highest value of each in the text.
    """

    coder: SparseCoder
    judged: dict[str, Judged]
    latents: dict[str, int]
    highest: np.ndarray


@functools.cache
@torch.no_grad()
def told(seed: int) -> Told:
    """The shipped SAE judged on the text of a seed; the random directions are the seed's, too."""
    model, coder = shipped_model(), load_coder(CODER)
    tokens = ground(model, middle(model), seed)
    names = tokens.scorable(CONCEPTS)
    return Told(
        coder,
        judge(tell(coder, tokens, names, seed), tokens, names),
        {best.concept: best.unit for best in best_latents(coder, tokens, names)},
        coder.encode(tokens.x).amax(0).numpy(),
    )


# ------------------------------------------------------------------------------ the shipped table


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
