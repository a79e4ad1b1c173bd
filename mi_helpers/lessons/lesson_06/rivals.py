"""Six concepts told by one unit: latents against the strongest rivals, on text of all families.

    tokens = ground(model, site, seed=1)          # activations, neurons of every block below, truth
    told = tell(coder, tokens, CONCEPTS)          # {rival: what it says of the second half}
    table = judge(told, tokens, CONCEPTS)         # F1 with intervals

Whatever is chosen, a unit, a threshold, a direction, is chosen on the first half of the tokens and
judged on the second. Intervals are from documents drawn anew, as tokens of one text go together.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mi_helpers.layouts import Key
from mi_helpers.models import LanguageModel, read_sites
from mi_helpers.probes import fit_probe
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.concepts import both_signs, random_directions
from mi_helpers.saes.features import firings
from mi_helpers.saes.labels import LabelledTokens, subject
from mi_helpers.saes.scores import Firings, score_units
from mi_helpers.saes.sources import TinyWorldText

CONCEPTS = {  # TinyWorld's name of each concept that the reference run found
    "virology": "virology",
    "london": "London landmarks",
    "courts": "sentencing",
    "norwegian": "Norwegian",
    "quantum": "quantum physics",
    "aircraft": "aircraft designators",
}
KINDS = (
    "SAE latent",
    "neuron of a block below",
    "random direction",
    "difference of means",
    "logistic probe",
    "always fires",
)


@dataclass(frozen=True)
class Ground(LabelledTokens):
    """`LabelledTokens` with the document of each token, (n,).

    `neurons` are those of the MLPs of the site's block and of every block below it.
    """

    document: np.ndarray


def texts(each: int, others: int, seed: int, names: Sequence[str] = tuple(CONCEPTS)) -> list:
    """`each` documents about every one of the named subjects, and `others` as they come, mixed.

    Raises:
        ValueError: TinyWorld has no such subject.
    """
    world, found = TinyWorldText().world, []
    for name in names:
        if name in world.families:
            stream = world.documents(seed, name)
        elif name in world.topics:
            prose = world.documents(seed, "prose")
            stream = (d for d in prose if d.latents["topic"] == name)
        else:
            raise ValueError(f"TinyWorld has no topic and no family {name!r}.")
        found += [next(stream) for _ in range(each)]
    mixed = world.documents(seed + 10_000)
    found += [next(mixed) for _ in range(others)]
    random.Random(seed).shuffle(found)
    return found


def read_texts(
    model: LanguageModel, texts: Sequence[str], sites: Sequence[Key], most: int = 4_096
) -> Iterator[tuple[int, list[int], list[torch.Tensor]]]:
    """(number, ids without BOS, [activations (tokens, width) at each site]) of each text.

    Args:
        most: tokens that are run at once. Texts of more than the context are cut.
    """
    bos = model.tokenizer.bos_token_id
    lead = [] if bos is None else [bos]
    rows = [model.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    rows = [lead + ids[: model.n_ctx - len(lead)] for ids in rows]
    size = max(1, most // max(map(len, rows)))
    for begin in range(0, len(rows), size):
        batch = rows[begin : begin + size]
        with torch.no_grad():
            found = read_sites(model, model.pad(batch), list(sites))
        for i, ids in enumerate(batch):
            here = [x[i, len(lead) : len(ids)].float().cpu() for x in found]
            yield begin + i, ids[len(lead) :], here


def ground(
    model: LanguageModel,
    site: Key,
    seed: int = 1,
    each: int = 10,
    others: int = 300,
    neurons: bool = True,
    names: Sequence[str] = tuple(CONCEPTS),
) -> Ground:
    """Fresh text of every family with TinyWorld's truth at each token.

    A token of prose counts where a reader who knows the generator is at least 90 % sure of the
    topic; facts and verdicts, which name what topics name too, do not count.

    Args:
        site: (name, layer).
        each, others: documents of each concept, and documents of all families as they come.
        neurons: False leaves them out, where nobody asks for them.
        names: of the concepts, topics or families.
    """
    documents = texts(each, others, seed, names)
    sites = [site, *(("post", layer) for layer in range(site[1] + 1) if neurons)]
    source, parts = TinyWorldText(), []
    for number, ids, (x, *rest) in read_texts(model, [d.text for d in documents], sites):
        said = subject(model.tokenizer, source, documents[number])[: len(ids)]
        known = [i for i, name in enumerate(said) if name is not None]
        below = torch.cat(rest, 1) if rest else x[:, :0]
        names = [said[i] for i in known]
        parts.append(
            (x[known], below[known], names, [ids[i] for i in known], [number] * len(known))
        )
    x, below, said, ids, document = zip(*parts, strict=True)
    said = np.array([name for row in said for name in row])
    found = tuple(sorted(set(said.tolist())))
    return Ground(
        torch.cat(x),
        torch.cat(below),
        said[:, None] == np.array(found),
        found,
        np.array([i for row in ids for i in row]),
        np.array([i for row in document for i in row]),
    )


# ------------------------------------------------------------------------------- what each says


def promising(values: np.ndarray, truth: np.ndarray, most: int = 20) -> np.ndarray:
    """The units that may be best for a concept, judged by their F1 at a few thresholds: (found,).

    On the first half alone. Thousands of neurons are not sorted for each concept, only these.

    Args:
        values: (rows, units), of any sign.
        truth: (rows, concepts).
        most: units per concept.
    """
    half, n_units = len(values) // 2, values.shape[1]
    early, y = values[:half], truth[:half].T.astype(np.float32)
    keep = np.unique((half * np.geomspace(0.003, 0.5, 12)).astype(int).clip(1))
    best = np.zeros((len(y), n_units))
    for cut in np.partition(early, half - keep, axis=0)[half - keep]:  # (units,)
        fires = (early >= cut).astype(np.float32)
        f1 = 2 * (y @ fires) / (fires.sum(0) + y.sum(1, keepdims=True))
        best = np.maximum(best, f1)
    return np.unique(np.argsort(-best, axis=1)[:, :most])


def said_by_best(
    units: Firings | np.ndarray, truth: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """What the best unit of each concept says of the second half, (rows, concepts), booleans.

    Args:
        units: firings of latents, or values (rows, units).
    """
    if not isinstance(units, Firings):
        units = units[:, promising(units, truth)]
    half, columns = len(truth) // 2, []
    for best in score_units(units, truth, names).best():
        if isinstance(units, Firings):
            value = np.zeros(len(truth), np.float32)
            own = units.latent == best.unit
            value[units.row[own]] = units.value[own]
        else:
            value = units[:, best.unit]
        columns.append(value[half:] >= best.threshold)
    return np.stack(columns, 1)


def tell(
    coder: SparseCoder, tokens: Ground, names: Sequence[str], seed: int = 0
) -> dict[str, np.ndarray]:
    """{kind: (rows of the second half, concepts)}: where each kind of unit says the concept is.

    "difference of means" and "logistic probe" are directions made for each concept, from the
    labels of the first half; the other units were there before, and only one of them is chosen.

    Args:
        names: of concepts that occur in both halves.
        seed: of the random directions, of which there are as many as latents.
    """
    half, x = len(tokens.x) // 2, tokens.x.numpy()
    truth = tokens.truth[:, [tokens.names.index(name) for name in names]]
    units = {
        "SAE latent": firings(coder, tokens.x),
        "neuron of a block below": both_signs(tokens.neurons),
        "random direction": random_directions(tokens.x, coder.d_latent, seed),
    }
    said = {kind: said_by_best(values, truth, names) for kind, values in units.items()}
    made = {"difference of means": [], "logistic probe": []}
    for name, y in zip(names, truth.T, strict=True):
        direction = x[:half][y[:half]].mean(0) - x[:half][~y[:half]].mean(0)
        ways = {
            "difference of means": x @ direction,
            "logistic probe": fit_probe(x[:half], y[:half]).decision_function(x),
        }
        for kind, values in ways.items():
            made[kind].append(said_by_best(values[:, None], y[:, None], [name])[:, 0])
    said |= {kind: np.stack(columns, 1) for kind, columns in made.items()}
    return said | {"always fires": np.ones_like(said["SAE latent"])}


# ------------------------------------------------------------------------------------ judged


@dataclass(frozen=True)
class Judged:
    """F1 of one kind of unit: of each concept, their median, and intervals of 95 %.

    Args:
        f1: {concept: F1}.
        median, low, high: of the six F1, and its interval.
        behind: the interval of the SAE latents' median less this one's, on the same documents.
    """

    f1: dict[str, float]
    median: float
    low: float
    high: float
    behind: tuple[float, float]


def judge(
    told: Mapping[str, np.ndarray],
    tokens: Ground,
    names: Sequence[str],
    draws: int = 400,
    seed: int = 0,
) -> dict[str, Judged]:
    """{kind: `Judged`}, on the second half of the tokens.

    An interval is what 95 % of `draws` draws give, of as many documents with replacement.
    """
    half = len(tokens.x) // 2
    truth = tokens.truth[half:, [tokens.names.index(name) for name in names]]
    _, document = np.unique(tokens.document[half:], return_inverse=True)
    n = document.max() + 1
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    weights = np.concatenate([np.ones((1, n), int), weights])  # the documents themselves first

    def by_document(flags: np.ndarray) -> np.ndarray:
        sums = np.zeros((n, flags.shape[1]))
        np.add.at(sums, document, flags)
        return weights @ sums  # (1 + draws, concepts)

    positives = by_document(truth)
    f1 = {
        kind: 2 * by_document(said & truth) / np.maximum(by_document(said) + positives, 1)
        for kind, said in told.items()
    }
    medians = {kind: np.median(values, 1) for kind, values in f1.items()}
    first = medians[next(iter(told))]
    return {
        kind: Judged(
            dict(zip(names, map(float, values[0]), strict=True)),
            float(medians[kind][0]),
            *interval(medians[kind][1:]),
            interval((first - medians[kind])[1:]),
        )
        for kind, values in f1.items()
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of some values."""
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def table(judged: Mapping[str, Judged], titles: Mapping[str, str]) -> str:
    """The judged kinds as Markdown: a row for each, a column for each concept."""
    names = list(next(iter(judged.values())).f1)
    head = ["one unit, or", *(titles[name] for name in names), "median (95 %)", "SAE leads by"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for number, (kind, found) in enumerate(judged.items()):
        cells = [kind, *(f"{found.f1[name]:.2f}" for name in names)]
        cells += [f"**{found.median:.2f}** ({found.low:.2f} to {found.high:.2f})"]
        cells += ["{:+.2f} to {:+.2f}".format(*found.behind) if number else ""]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
