"""Lesson 09's laboratory: units of three kinds on one text, their names, and which are right.

ground = read(model, coder, site, seed=1)                  # latents, neurons, random directions
some = ground.units("latent", 50)                          # with contexts, and what is true
found = [judge(ground, each, counted(each)) for each in some]
table({"latent": found})                                   # reliable and right, …
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from scipy.stats import binomtest

from mi_helpers.layouts import Key
from mi_helpers.lessons.lesson_09.truth import AGREES, Truth, Truths, agreement, facts_of
from mi_helpers.lessons.shared import word_ids
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.examples import STRONG, Context, Examples, Texts, collect
from mi_helpers.saes.explainers import Offline
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.name_run import run_texts
from mi_helpers.saes.naming import RELIABLE
from mi_helpers.saes.rules import Facts, bare, name_of
from mi_helpers.saes.sources import TinyWorldText, open_source

KINDS = ("latent", "neuron", "random direction")
MOST = 8  # tokens in a name
SWAPS = 3  # contexts of a unit in which tokens are swapped
VERDICTS = ("reliable and right", "reliable and wrong", "unreliable")
OFFLINE = Offline()

# ------------------------------------------------------------------------------- what is read


def as_rare_as(values: np.ndarray, others: np.ndarray, rng) -> np.ndarray:
    """Values (tokens, units), each less a threshold, so that each unit is on as rarely as one of
    the others (tokens, units), drawn at random among those that are on at one token in 2,000."""
    share = (others > 0).mean(0)
    share = rng.choice(share[share > 1 / 2_000], values.shape[1])
    cut = [np.quantile(column, 1 - s) for column, s in zip(values.T, share, strict=True)]
    return np.maximum(values - np.array(cut), 0)


@dataclass(frozen=True, eq=False)
class Unit:
    """A latent, a neuron or a random direction, with what is known of it.

    Args:
        kind: one of `KINDS`; number: of the unit among those of its kind.
        examples: its contexts.
        strong: (tokens,), where it fires strongly.
        search: finds what it goes by.
    """

    kind: str
    number: int
    examples: Examples
    strong: np.ndarray = field(repr=False)
    search: Truths = field(repr=False)

    @cached_property
    def truths(self) -> list[Truth]:
        """What it goes by, the best first."""
        return self.search.of(self.strong)

    @property
    def level(self) -> float:
        """From this value on, a firing is strong."""
        return self.examples.level

    @property
    def truth(self) -> Truth | None:
        """What it goes by, where TinyWorld has words for that."""
        return self.truths[0] if self.truths and self.truths[0].known else None


@dataclass(frozen=True, eq=False)
class Ground:
    """Units of three kinds on one text, and what TinyWorld knows of it.

    Args:
        texts: the text; half of it is held out.
        values: {kind: (tokens, units)}.
        truths: the search for what units go by.
        facts: what names may speak of.
    """

    texts: Texts
    values: dict[str, np.ndarray]
    truths: Truths
    facts: Facts = field(repr=False)

    @property
    def held(self) -> np.ndarray:
        """(tokens,), whether each token is held out."""
        return self.texts.half[1]

    @property
    def words(self) -> list[str]:
        """The tokens as names have them, by their number in `facts.word`."""
        return list(self.facts.words)

    def units(self, kind: str, n: int, seed: int = 0) -> list[Unit]:
        """n units of a kind, drawn at random among those that fire in enough texts."""
        order = np.random.default_rng(seed).permutation(self.values[kind].shape[1])
        found: list[Unit] = []
        for begin in range(0, len(order), max(n, 1)):
            found += self.of(kind, order[begin : begin + n].tolist(), n - len(found))
            if len(found) >= n:
                break
        return found

    def of(self, kind: str, numbers: Sequence[int], most: int | None = None) -> list[Unit]:
        """Those of some units that fire in enough texts, in their order."""
        columns = self.values[kind][:, list(numbers)]
        some = [e for e in collect(columns, self.texts) if e.enough][:most]
        found = []
        for each in some:
            strong = columns[:, each.unit] >= each.level
            examples = replace(each, unit=numbers[each.unit])
            found.append(Unit(kind, examples.unit, examples, strong, self.truths))
        return found


@torch.no_grad()
def read(
    model: LanguageModel, coder: SparseCoder, site: Key, seed: int = 1, tokens: int = 24_000
) -> Ground:
    """TinyWorld's text, all families as they come, read by three kinds of units.

    The neurons are those of the MLP in the site's block; the random directions are of the stream at
    the site, less its mean, and as rarely on as latents are.

    Args:
        seed: of the text and of the directions.
    """
    config = HarvestConfig(site, ("post", site[1]), tokens, outlier=1e9)  # no token is left out
    with tempfile.TemporaryDirectory() as folder:
        held = harvest(model, open_source("tinyworld", seed), folder, config, progress=False)
        texts, _ = run_texts(held, model.token_text)
        x, neurons = held.slice(0, held.rows)
        facts = Facts(texts)
        truths = Truths(facts_of(held, model.tokenizer, facts), texts.half[1])
    latents, rng = coder.encode(x).numpy(), np.random.default_rng(seed)
    drawn = (x - x.mean(0)).numpy() @ rng.normal(size=(x.shape[1], neurons.shape[1]))
    values = {"latent": latents, "neuron": neurons.numpy()}
    values["random direction"] = as_rare_as(drawn, latents, rng)
    return Ground(texts, values, truths, facts)


# --------------------------------------------------------------------------------- the names


def around(texts: Texts, place: int, before: int = 8, after: int = 3) -> str:
    """The text around a token, as far as it goes, with the token in [[ ]]."""
    text = texts.text[place]
    low, high = (
        max(place - before, texts.start[text]),
        min(place + after + 1, texts.start[text + 1]),
    )
    words = [texts.vocabulary[i] for i in texts.ids[low:high]]
    words[place - low] = f" [[{words[place - low].strip()}]]"
    return " ".join("".join(words).split())


def shown(context: Context, level: float, before: int = 10, after: int = 4) -> str:
    """A context in one line, as far as some tokens around the one that it is for; tokens at which
    the unit fires strongly are in [[ ]]."""
    low, high = max(context.at - before, 0), context.at + after + 1
    some = Context(context.words[low:high], context.values[low:high])
    return " ".join(some.marked(level).split())


def pairs(contexts: Iterable[Context], level: float) -> list[tuple[list[str], list[bool]]]:
    """Contexts as ([tokens], [whether the unit fires strongly at each])."""
    return [([bare(w) for w in c.words], [v >= level for v in c.values]) for c in contexts]


def from_contexts(describe: Callable, unit: Unit) -> str:
    """The name that a learner's `describe` gives from the contexts that are seen alone: "at: …" or
    "after: …", whichever has the higher F1 there."""
    seen = unit.examples.seen
    contexts = pairs([*seen.top, *seen.random, *seen.near], unit.level)
    shifted = [(["", *row[:-1]], fires) for row, fires in contexts]
    found = []
    for kind, rows in (("at", contexts), ("after", shifted)):
        tokens, score = describe([row for row, _ in rows], [fires for _, fires in rows], MOST)
        found.append((score, name_of([(kind, [token or "start" for token in tokens])])))
    return max(found, key=lambda each: each[0])[1]


def counted(unit: Unit) -> str:
    """The name that counting finds, over the whole half of the text that is seen."""
    return OFFLINE.explain(unit.examples).text


def predicted(name: str, contexts: Iterable[Context]) -> tuple[list, list]:
    """What a name predicts in contexts, 1 where it is true and 0 elsewhere, and what the unit does:
    an array for each context."""
    contexts = list(contexts)
    facts = Facts(Texts.of([c.words for c in contexts], begin=[c.begin for c in contexts]))
    says = np.split(facts.says(name).astype(float), facts.texts.start[1:-1])
    return says, [np.array(c.values) for c in contexts]


def correlation(predicted: Sequence, actual: Sequence) -> float:
    """Pearson's r over all tokens of some contexts; 0 where either is constant."""
    x, y = np.concatenate(predicted).astype(float), np.concatenate(actual).astype(float)
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


@dataclass(frozen=True, eq=False)
class Named:
    """A unit's name, how well it scores, and whether it is right.

    Args:
        score: the simulation's correlation in its highest contexts and random ones, held out.
        natural: the same over all tokens of the texts held out, as they come.
        agrees: see `truth.agreement`.
    """

    unit: Unit
    name: str
    score: float
    natural: float
    agrees: float

    @property
    def right(self) -> bool:
        """Whether the name says what TinyWorld says of the unit."""
        return self.agrees >= AGREES

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        return VERDICTS[(0 if self.right else 1) if self.score >= RELIABLE else 2]


def judge(ground: Ground, unit: Unit, name: str, score: Callable = correlation) -> Named:
    """Score a name on contexts held out, and hold it against what TinyWorld knows.

    Args:
        score: of lists of arrays, predicted and actual, such as a learner's own.
    """
    held = unit.examples.held
    says, late = ground.facts.says(name), ground.held
    values = np.maximum(ground.values[unit.kind][late, unit.number], 0)
    return Named(
        unit,
        name,
        float(score(*predicted(name, [*held.top, *held.random]))),
        correlation([says[late]], [values]),
        agreement(says, unit.truths, late),
    )


def for_the_game(units: Sequence[Unit], n: int = 4) -> dict[int, Unit]:
    """{number: unit} of n latents of different sorts, each the one of its sort that TinyWorld's
    words tell best: the token, the token and the one before, …; any where there are too few."""
    ranked = sorted((u for u in units if u.truth), key=lambda unit: -unit.truth.f1)
    sorts = {frozenset(kind for kind, _ in u.truth.parts): u for u in reversed(ranked)}
    first = sorted(sorts.values(), key=lambda unit: -unit.truth.f1)
    chosen = list(dict.fromkeys([*first, *units]))[:n]
    return {unit.number: unit for unit in sorted(chosen, key=lambda unit: unit.number)}


# --------------------------------------------------------------------------------- topics, swaps


def topic_latents(ground: Ground, n: int) -> list[Unit]:
    """The latents that are best for a topic each, those of the n topics told best, by the F1 of the
    topic on the texts that are seen."""
    values, index = ground.truths.index["about"]
    early, f = ~ground.held, ground.values["latent"]
    strong = f[early] >= STRONG * f[early].max(0).clip(1e-6)
    found = []
    for number, topic in enumerate(values):
        if topic in TinyWorldText().world.topics:
            mask = index[early] == number
            scores = 2 * strong[mask].sum(0) / np.maximum(strong.sum(0) + mask.sum(), 1)
            found.append((float(scores.max()), int(scores.argmax())))
    best = dict.fromkeys(unit for _, unit in sorted(found, reverse=True))
    return ground.of("latent", list(best), n)


def random_words(model: LanguageModel, n: int = 16, seed: int = 0) -> torch.Tensor:
    """n words at random, token ids."""
    words = word_ids(model)
    chosen = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))[:n]
    return words[chosen]


@torch.no_grad()
def kept_after_swaps(
    model: LanguageModel,
    coder: SparseCoder,
    site: Key,
    units: Sequence[Unit],
    swap: Callable,
    others: torch.Tensor,
    backs: Sequence[int],
) -> list[float]:
    """For each of `backs` the share of a latent's value that stays where the token so many places
    before is another: the mean of the units, of `SWAPS` of their highest contexts that are held out
    and begin their text, and of the other tokens. NaN where there is no such context.

    Args:
        swap: such as a learner's `after_swap`.
        others: (others,), token ids.
    """
    means = []
    for back in backs:
        shares = []
        for unit in units:
            whole = [c for c in unit.examples.held.top if not c.begin and c.at >= back][:SWAPS]
            for context in whole:
                ids = model.tokens("".join(context.words))  # BOS comes first
                if ids.shape[1] == len(context.words) + 1:
                    given = (unit.number, ids, context.at + 1, back, others)
                    values = torch.as_tensor(swap(model, coder, site, *given))
                    shares.append(float(values.float().mean()) / context.values[context.at])
        means.append(float(np.mean(shares)) if shares else float("nan"))
    return means


# --------------------------------------------------------------------------------- how often


def interval(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share, by Wilson's score; (0, 1) of nothing."""
    if not n:
        return 0.0, 1.0
    found = binomtest(hits, n).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def share(hits: int, n: int) -> str:
    """A share with its interval, in words."""
    low, high = interval(hits, n)
    return f"{hits / n:.0%} ({low:.0%} to {high:.0%})" if n else "–"


def right_if_reliable(found: Iterable[Named]) -> tuple[int, int]:
    """(right, all) of the names that score 0.7 or more."""
    counts = Counter(each.verdict for each in found)
    return counts[VERDICTS[0]], counts[VERDICTS[0]] + counts[VERDICTS[1]]


def table(found: dict[str, Sequence[Named]]) -> str:
    """The naming table as Markdown: for each kind of unit how many are which."""
    rows = [f"| | {' | '.join(VERDICTS)} | of the reliable, right (95 %) |", "|---" * 5 + "|"]
    for kind, some in found.items():
        counts = Counter(each.verdict for each in some)
        cells = [f"{counts[v] / max(len(some), 1):.0%}" for v in VERDICTS]
        rows.append(f"| {kind} | {' | '.join(cells)} | **{share(*right_if_reliable(some))}** |")
    return "\n".join(rows)
