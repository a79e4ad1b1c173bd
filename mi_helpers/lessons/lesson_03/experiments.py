"""Lesson 03's experiments: pairs of prompts, gates, two-head paths, and the pronoun skew.

    pairs = fact_pairs(model, 24, seed=0)
    effect = activation_patch(model, pairs.clean, pairs.corrupted, "resid_pre", pairs.metric(model))

The engine is `mi_helpers.patching`. Here are the prompts, what is measured over many of them, and
the rows of the ledger.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from mi_helpers.ablation import Batch, LesionLab, family_losses, make_batch
from mi_helpers.layouts import Key, ModelError
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.patching import (
    LogitDiff,
    activation_patch,
    attribution_patch,
    normalised_logit_diff,
    path_patch,
)
from mi_helpers.probes import mean_difference, midpoint, project_out
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.copying import vocabulary
from mi_helpers.tinyworld.world import World

# ------------------------------------------------------------------------------------------ gates


def gate_and(wires: Tensor) -> Tensor:
    """ReLU(Σ wires - (n - 1)), (..., n) -> (...,): 1 where all n wires are 1, else 0."""
    return torch.relu(wires.sum(-1) - (wires.shape[-1] - 1))


def gate_or(wires: Tensor) -> Tensor:
    """ReLU(Σ wires) - ReLU(Σ wires - 1), (..., n) -> (...,): 1 where any wire is 1, else 0."""
    total = wires.sum(-1)
    return torch.relu(total) - torch.relu(total - 1)


def gate_effects(gate: Callable[[Tensor], Tensor], n: int = 2, wire: int = 0) -> dict[str, float]:
    """How much one wire of a gate does, asked both ways; clean: all wires 1, corrupted: all 0.

    denoise  output with this wire 1 and the others 0
    noise    1 - output with this wire 0 and the others 1
    """
    if n < 2 or not 0 <= wire < n:
        raise ValueError(f"Wire {wire} of {n} is no choice: a gate has two wires or more, from 0.")
    one = torch.eye(n)[wire]
    return {"denoise": float(gate(one)), "noise": 1 - float(gate(1 - one))}


# -------------------------------------------------------------------------------- pairs of prompts


@dataclass(frozen=True)
class Pairs:
    """n pairs of prompts, all of one token count, so that their positions line up.

    clean, corrupted (n, pos) token ids; answer, wrong: the ids that complete them; texts: both
    prompts of each pair.
    """

    clean: Tensor
    corrupted: Tensor
    answer: list[int]
    wrong: list[int]
    texts: list[tuple[str, str]]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> Pairs:
        """The i-th pair alone."""
        return Pairs(
            self.clean[[i]], self.corrupted[[i]], [self.answer[i]], [self.wrong[i]], [self.texts[i]]
        )

    @property
    def subject(self) -> list[int]:
        """The positions at which clean and corrupted differ, in any pair."""
        return (self.clean != self.corrupted).any(0).nonzero()[:, 0].tolist()

    def columns(self, model: LanguageModel, name: str = "name") -> list[str]:
        """A label per position: the word that stands there in all prompts, or `name`."""
        words = model.str_tokens(self.clean[0])
        return [name if i in self.subject else word.strip() for i, word in enumerate(words)]

    def metric(self, model: LanguageModel) -> LogitDiff:
        """The normalised logit difference of the mean over all pairs."""
        return normalised_logit_diff(model, self.clean, self.corrupted, self.answer, self.wrong)


def make_pairs(
    model: LanguageModel, texts: Sequence[tuple[str, str]], answers: Sequence[tuple[str, str]]
) -> Pairs:
    """Pairs of texts, each with the words (one token, mind the space) that complete them.

    Raises:
        ModelError: the texts' token counts differ, or an answer is not one token.
    """
    answer, wrong = ([model.to_single_token(pair[i]) for pair in answers] for i in (0, 1))
    ids = model.tokens([text for pair in texts for text in pair])  # clean, corrupted, clean, …
    return Pairs(ids[::2], ids[1::2], answer, wrong, list(texts))


CITY = "The {} is in the city of"
CITY_PHRASES = (CITY, "The city of the {} is", "People say that the {} is in the city of")


def _is_token(model: LanguageModel, text: str) -> bool:
    """Whether a text is one token that the model knows."""
    try:
        model.to_single_token(text)
    except ModelError:
        return False
    return True


@lru_cache(maxsize=8)
def _aligned(model: LanguageModel, phrase: str = CITY) -> tuple[lexicon.Landmark, ...]:
    """Landmarks with the commonest token count of all whose city is one token."""
    by_count: dict[int, list] = {}
    for place in lexicon.landmarks():
        if _is_token(model, f" {place.city}"):
            count = model.tokens(phrase.format(place.name)).shape[1]
            by_count.setdefault(count, []).append(place)
    return tuple(max(by_count.values(), key=len)) if by_count else ()


def as_long_as(model: LanguageModel, name: str, city: str) -> lexicon.Landmark:
    """A landmark in another city whose name has as many tokens as this one's: of `city`, if there
    is one.

    Raises:
        ValueError: no such landmark as `name`, or none that is as long.
    """
    known = {place.name: place for place in lexicon.landmarks()}
    if name not in known:
        raise ValueError(f"TinyWorld has no landmark {name!r}: see data/facts/landmarks.csv.")
    count = model.tokens(CITY.format(name)).shape[1]
    fitting = [
        place
        for place in known.values()
        if place.city != known[name].city
        and model.tokens(CITY.format(place.name)).shape[1] == count
        and _is_token(model, f" {place.city}")
    ]
    if not fitting:
        raise ValueError(f"No other landmark's name has as many tokens as {name!r}.")
    return next((place for place in fitting if place.city == city), fitting[0])


def fact_pairs(
    model: LanguageModel, n: int, seed: int, phrase: str = CITY, same_city: bool = False
) -> Pairs:
    """n pairs of landmarks in different cities, whose names have as many tokens.

    With `same_city`, the control: two landmarks of one city, and as the wrong answer another city.

    Raises:
        ValueError: the model's tokenizer leaves fewer than two landmarks to choose from.
    """
    places, rng = _aligned(model, phrase), random.Random(seed)
    cities = sorted({place.city for place in places})
    if len(cities) < 2:
        raise ValueError(f"{model.name} has too few landmarks of one token count for pairs.")
    chosen: list[tuple] = []
    while len(chosen) < n:
        clean, corrupted = rng.sample(places, 2)
        if (clean.city == corrupted.city) == same_city:
            chosen.append((clean, corrupted))
    texts = [(phrase.format(a.name), phrase.format(b.name)) for a, b in chosen]
    wrong = [
        rng.choice([city for city in cities if city != b.city]) if same_city else b.city
        for _, b in chosen
    ]
    return make_pairs(
        model, texts, [(f" {a.city}", f" {w}") for (a, _), w in zip(chosen, wrong, strict=True)]
    )


def swap_pairs(model: LanguageModel, n: int, seed: int, length: int = 8) -> Pairs:
    """Random words, then the same again up to word j; in the corrupted prompt, words j and k of the
    first time have changed places, so that another word follows the last one's first occurrence.

        clean:      a b c D e f G h | a b c D -> e        (j = 3, k = 6 of length 8)
        corrupted:  a b c G e f D h | a b c D -> h

    All tokens that could be answers stand where they stood: only *what precedes them* differs.
    """
    j, k = (length - 1) // 2, length - 2
    if length < 6:
        raise ValueError(f"Sequences of {length} words are too short to swap two: give 6 or more.")
    words = [word for word in vocabulary() if _is_token(model, f" {word}")]
    rng, texts, answers = random.Random(seed), [], []
    for _ in range(n):
        first = rng.sample(words, length)
        swapped = list(first)
        swapped[j], swapped[k] = first[k], first[j]
        again = first[: j + 1]
        texts.append(tuple(" " + " ".join(half + again) for half in (first, swapped)))
        answers.append((f" {first[j + 1]}", f" {first[k + 1]}"))
    return make_pairs(model, texts, answers)


# ------------------------------------------------------------------------------ over many pairs


def in_units_of(pairs: Pairs, model: LanguageModel, gap: float, base: Tensor) -> LogitDiff:
    """A metric for prompts that agree: 0 on the prompts `base`, 1 when the logit difference has
    grown by `gap`, which ordinary pairs have between their two runs."""
    raw = LogitDiff(torch.tensor(pairs.answer), torch.tensor(pairs.wrong))
    with torch.no_grad():
        at = float(raw.raw(model.forward(base)[:, -1]))
    return replace(raw, clean=at + gap, corrupted=at)


def true_and_guess(
    model: LanguageModel, pairs: Pairs, site: str, mode: str = "denoise"
) -> tuple[np.ndarray, np.ndarray]:
    """Every patch's effect and what attribution patching says of it, pair by pair, (n, cells).

    Cells are layers × positions (for "z": × heads) from the first position that differs; before it
    both are zero. The effect is the change of the metric by the patch.
    """
    start = pairs.subject[0]
    found: tuple[list, list] = ([], [])
    for one in (pairs[i] for i in range(len(pairs))):
        metric = one.metric(model)
        before = 0.0 if mode == "denoise" else 1.0
        over = "heads x positions" if site == "z" else "positions"
        for method, kept in zip((activation_patch, attribution_patch), found, strict=True):
            effect = method(model, one.clean, one.corrupted, site, metric, mode, over=over)
            kept.append((effect[..., start:].cpu().numpy() - before).ravel())
    return np.array(found[0]), np.array(found[1])


@torch.no_grad()
def along(
    model: LanguageModel, pair: Pairs, site: str, layer: int, position: int, shares: Sequence[float]
) -> np.ndarray:
    """The metric when one activation of the corrupted run is moved towards the clean run's,
    (shares,), as a = a_corrupted + share · (a_clean - a_corrupted); one pair at a time."""
    _, kept = model.run_with_cache(pair.clean, (site, layer), stop_at_layer=layer + 1)
    target = kept[site, layer][:, position]
    share = torch.tensor(np.asarray(shares), dtype=torch.float32).to(target)[:, None]

    def hook(x: Tensor) -> Tensor:
        x[:, position] += share * (target - x[:, position])
        return x

    with model.hooks({(site, layer): hook}):
        last = model.forward(pair.corrupted.expand(len(share), -1))[:, -1]
    return pair.metric(model)(last[:, None]).cpu().numpy()  # each share is a batch of one


def rank_correlation(true, guess) -> float:
    """Spearman's rank correlation of two lists of effects."""
    return float(spearmanr(np.ravel(true), np.ravel(guess)).statistic)


def strongest(effect, count: int) -> list[tuple[int, ...]]:
    """The indices of the `count` largest entries, the largest first."""
    effect = np.asarray(effect)
    order = np.argsort(-effect, axis=None, kind="stable")[:count]
    return [tuple(map(int, np.unravel_index(i, effect.shape))) for i in order]


# ------------------------------------------------------------------------------- the pronoun skew


@cache
def _world() -> World:
    return World()


JOBS = tuple(lexicon.occupations())


def true_log_odds(jobs: Sequence[str] = JOBS) -> np.ndarray:
    """log p(she) - log p(he) of each occupation in TinyWorld, (jobs,)."""
    p = np.array([lexicon.occupations()[job] for job in jobs])
    return np.log(p / (1 - p))


def pronoun_texts(seed: int, jobs: Sequence[str] = JOBS, held: bool = False) -> list[str]:
    """One sentence, with each occupation in its place, up to the first pronoun.

    The seed draws the phrasing; with `held`, one that the model was never trained on.
    """
    apart = ("templates",) if held else ()
    said = [_world().document(seed, "pronoun", apart, occupation=job) for job in jobs]
    return [each.text[: each.find("pronoun")[0].start].rstrip() for each in said]


def sides(jobs: Sequence[str] = JOBS, share: float = 1 / 3) -> tuple[list[str], list[str]]:
    """The occupations that are most often called 'she', and those most often called 'he'."""
    order = sorted(jobs, key=lexicon.occupations().get)
    count = max(1, round(share * len(order)))
    return order[-count:], order[:count]


def pronoun_pairs(
    model: LanguageModel, n: int, seed: int, jobs: Sequence[str] = JOBS, held: bool = False
) -> Pairs:
    """n pairs of one sentence: clean with a 'she' occupation, corrupted with a 'he' occupation.

    Occupations whose names have another token count than most are left out.
    """
    texts = dict(zip(jobs, pronoun_texts(seed, jobs, held), strict=True))
    counts = {job: model.tokens(text).shape[1] for job, text in texts.items()}
    usual = max(set(counts.values()), key=list(counts.values()).count)
    she, he = sides([job for job in jobs if counts[job] == usual])
    rng = random.Random(seed)
    chosen = [(texts[rng.choice(she)], texts[rng.choice(he)]) for _ in range(n)]
    return make_pairs(model, chosen, [(" she", " he")] * n)


@torch.no_grad()
def log_odds(model: LanguageModel, texts: Sequence[str], hooks: Mapping | None = None):
    """The model's log p(she) - log p(he) after each text, (texts,), under `hooks`."""
    ids = [model.tokens(text)[0].tolist() for text in texts]
    with model.hooks(hooks or {}):
        _, kept = model.run_with_cache(model.pad(ids), "resid_final", stop_at_layer=model.n_layers)
    last = kept["resid_final"][range(len(ids)), [len(row) - 1 for row in ids]]
    logits = model.unembed(last).float()
    she, he = (model.to_single_token(word) for word in (" she", " he"))
    return (logits[:, she] - logits[:, he]).cpu().numpy()


def mean_log_odds(
    model: LanguageModel,
    jobs: Sequence[str] = JOBS,
    hooks: Mapping | None = None,
    seeds: Sequence[int] = range(6),
    held: bool = True,
) -> np.ndarray:
    """Each occupation's log-odds, the mean over the sentences that the seeds draw, (jobs,)."""
    texts = [text for seed in seeds for text in pronoun_texts(seed, jobs, held)]
    return log_odds(model, texts, hooks).reshape(len(seeds), len(jobs)).mean(0)


def skew(found, jobs: Sequence[str] = JOBS) -> float:
    """The slope of the model's log-odds (jobs,) over the world's own: 1 is all of the skew, 0 none.

    slope = cov(model, world) / var(world)
    """
    truth = true_log_odds(jobs)
    truth = truth - truth.mean()
    return float((np.asarray(found) @ truth) / (truth @ truth))


def nats_lost(found, jobs: Sequence[str] = JOBS) -> float:
    """KL(world's pronoun || model's), in nats, mean over occupations: what wrong odds cost."""
    p = 1 / (1 + np.exp(-true_log_odds(jobs)))
    q = 1 / (1 + np.exp(-np.asarray(found, dtype=float)))
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())


def head_effects(
    model: LanguageModel, seeds: Sequence[int], n: int = 12, jobs: Sequence[str] = JOBS
) -> np.ndarray:
    """What each head carries of the difference between 'she' and 'he' occupations, denoising, one
    sentence per seed, (seeds, layers, heads)."""
    effects = []
    for seed in seeds:
        pairs = pronoun_pairs(model, n, seed, jobs)
        effects.append(
            activation_patch(model, pairs.clean, pairs.corrupted, "z", pairs.metric(model)).cpu()
        )
    return torch.stack(effects).numpy()


def together(hooks: Sequence[Mapping]) -> dict:
    """Several sets of hooks as one; those at one site are applied in turn."""
    chains: dict[Key, list] = {}
    for each in hooks:
        for key, hook in each.items():
            chains.setdefault(key, []).append(hook)

    def in_turn(chain):
        def hook(x: Tensor) -> Tensor:
            for each in chain:
                x = each(x)
            return x

        return hook

    return {key: in_turn(chain) for key, chain in chains.items()}


def without_heads(lab: LesionLab, heads: Sequence[tuple[int, int]], mode: str = "mean") -> dict:
    """Hooks that silence several heads at every token after the first, as lesson 00 does."""
    return together([lab.hooks("head", layer, head, mode) for layer, head in heads])


def random_heads(
    model: LanguageModel, count: int, seed: int, spared: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """The control: `count` other heads, as many in each layer as `spared` has there."""
    rng, chosen = random.Random(seed), []
    for layer in sorted({layer for layer, _ in spared}):
        taken = {head for at, head in spared if at == layer}
        others = [head for head in range(model.n_heads) if head not in taken]
        chosen += [(layer, h) for h in rng.sample(others, min(len(others), len(taken)))]
    rest = [
        (i, h)
        for i in range(model.n_layers)
        for h in range(model.n_heads)
        if (i, h) not in {*spared, *chosen}
    ]
    return chosen + rng.sample(rest, max(0, count - len(chosen)))


def carriers(effect, least: float = 0.1) -> list[tuple[int, ...]]:
    """The heads, as (layer, head), whose effect is above `least`, the strongest first."""
    return strongest(effect, int((np.asarray(effect) > least).sum()))


def stream_keys(model: LanguageModel, most: int = 6) -> list[Key]:
    """resid_post of at most `most` layers, evenly spaced, the last one included."""
    chosen = np.unique(np.linspace(0, model.n_layers - 1, min(most, model.n_layers)).round())
    return [("resid_post", int(layer)) for layer in chosen]


@torch.no_grad()
def skew_direction(
    model: LanguageModel, key: Key, jobs: Sequence[str], seeds: Sequence[int] = range(4)
) -> tuple[np.ndarray, np.ndarray]:
    """The mean stream before the pronoun of 'she' occupations less that of 'he' occupations, and
    the point half way between the two means, each (d_model,)."""
    she, he = sides(jobs, share=0.5)
    streams, labels = [], []
    for seed in seeds:
        rows = [model.tokens(text)[0].tolist() for text in pronoun_texts(seed, [*she, *he])]
        _, kept = model.run_with_cache(model.pad(rows), [key], stop_at_layer=model.n_layers)
        at = [len(row) - 1 for row in rows]
        streams.append(kept[key][range(len(rows)), at].float().cpu().numpy())
        labels += [True] * len(she) + [False] * len(he)
    x = np.concatenate(streams)
    return mean_difference(x, labels), midpoint(x, labels)


def best_direction(
    model: LanguageModel, jobs: Sequence[str], seeds: Sequence[int] = range(4)
) -> tuple[Key, np.ndarray, np.ndarray]:
    """(site, direction, centre): of the layers' `skew_direction`s, the one whose removal leaves the
    smallest slope on these same occupations."""
    cuts = {key: skew_direction(model, key, jobs, seeds) for key in stream_keys(model)}

    def left(key: Key) -> float:
        hooks = without_direction(key, *cuts[key])
        return abs(skew(mean_log_odds(model, jobs, hooks, seeds, held=False), jobs))

    key = min(cuts, key=left)
    return key, *cuts[key]


def without_direction(key: Key, direction, centre) -> dict:
    """Hooks that project a direction out of the stream, at every token after the first."""
    v, c = (torch.tensor(np.asarray(each), dtype=torch.float32) for each in (direction, centre))

    def hook(x: Tensor) -> Tensor:
        x[:, 1:] = project_out(x[:, 1:].float(), v.to(x.device), c.to(x.device)).to(x)
        return x

    return {key: hook}


def damage(model: LanguageModel, batch: Batch, hooks: Mapping) -> dict[str, float]:
    """{family: loss under the hooks less loss without}, in nats per scored token."""
    before, after = family_losses(model, batch), family_losses(model, batch, hooks)
    return {family: after[family] - before[family] for family in before}


# ------------------------------------------------------------------------------------------ paths


def writers_and_readers(effect, least: float = 0.1) -> tuple[list[tuple[int, int]], list[int]]:
    """From effects (layers, heads, positions): the layers with a head that does more than `least`
    at the last position, and the heads that do so elsewhere in an earlier layer than those.

    Returns:
        the writing heads as (layer, head), the strongest first, and the reading layers.

    Raises:
        ValueError: no head does that much at the last position, or none before it.
    """
    effect = np.asarray(effect)
    readers = np.flatnonzero(effect[..., -1].max(1) > least).tolist()
    early = effect[: readers[0], :, :-1].max(2) if readers else np.zeros((0, 0))
    writers = strongest(early, int((early > least).sum()))
    if not writers:
        raise ValueError(f"No two heads that do more than {least} follow each other here.")
    return writers, readers


@torch.no_grad()
def written_change(
    model: LanguageModel, pairs: Pairs, layer: int, head: int, post_norm: bool = True
) -> Tensor:
    """How what attention adds to the clean stream changes when one head's z is the corrupted run's,
    (n, pos, d_model):

        norm(Σ z' W_O) - norm(Σ z W_O),  or, without the post-norm, z'_h W_O,h - z_h W_O,h

    In families without a norm after attention both are the same.
    """
    key = ("z", layer)
    old, other = (
        model.run_with_cache(ids, key, stop_at_layer=layer + 1)[1][key]
        for ids in (pairs.clean, pairs.corrupted)
    )
    new = old.clone()
    new[:, :, head] = other[:, :, head]
    out, norm = model.part("o", layer), model.part("ln1_post", layer)
    before, after = out(old.flatten(2)), out(new.flatten(2))
    return norm(after) - norm(before) if post_norm and norm is not None else after - before


@torch.no_grad()
def direct_effect(
    model: LanguageModel, pairs: Pairs, layer: int, head: int, post_norm: bool = True
) -> float:
    """What the answer loses when a head's corrupted output reaches nothing but the final norm."""
    delta, metric = written_change(model, pairs, layer, head, post_norm), pairs.metric(model)
    with model.hooks({"resid_final": lambda x: x + delta}):
        return 1 - float(metric(model.forward(pairs.clean)[:, -1]))


# --------------------------------------------------------------------------- rows of the ledger


@cache
def _shipped() -> LanguageModel:
    return load_model("tiny-gemma")


def whole_scale(seed: int) -> float:
    """The metric where the clean stream is put in at all positions of a layer, mean over layers,
    less the metric of the corrupted prompts: 1 - 0."""
    model = _shipped()
    pairs = fact_pairs(model, 16, seed)
    metric = pairs.metric(model)
    whole = activation_patch(
        model, pairs.clean, pairs.corrupted, "resid_pre", metric, over="layers"
    )
    with torch.no_grad():
        return float(whole.mean() - metric(model.forward(pairs.corrupted)[:, -1]))


def noising_less_denoising(gate: Callable[[Tensor], Tensor], seed: int) -> float:
    """The effect of one wire by noising less that by denoising; the seed draws size and wire."""
    rng = random.Random(seed)
    n = rng.randint(2, 6)
    effects = gate_effects(gate, n, rng.randrange(n))
    return effects["noise"] - effects["denoise"]


def and_contrast(seed: int) -> float:
    """AND of two to six wires: 1, as each wire is needed and none is enough."""
    return noising_less_denoising(gate_and, seed)


def or_contrast(seed: int) -> float:
    """OR of two to six wires: -1, as each wire is enough and none is needed."""
    return noising_less_denoising(gate_or, seed)


def same_city_effect(seed: int) -> float:
    """The control: the largest effect of any patch of the stream between two landmarks of one city,
    in units of the gap between two cities."""
    model = _shipped()
    metric = fact_pairs(model, 16, seed).metric(model)
    alike = fact_pairs(model, 16, seed, same_city=True)
    ruler = in_units_of(alike, model, metric.clean - metric.corrupted, alike.corrupted)
    effect = activation_patch(model, alike.clean, alike.corrupted, "resid_pre", ruler)
    return float(effect.abs().max())


def attribution_order(seed: int) -> float:
    """Median rank correlation of attribution patching with true patches of the stream, pronouns."""
    model = _shipped()
    true, guess = true_and_guess(model, pronoun_pairs(model, 6, seed), "resid_pre")
    return float(np.median([rank_correlation(*each) for each in zip(true, guess, strict=True)]))


def attribution_share(seed: int) -> float:
    """What attribution says of the patch at the name's first token, layer 0, as a share of its true
    effect, for landmarks, where the answer moves far; mean over pairs."""
    true, guess = true_and_guess(_shipped(), fact_pairs(_shipped(), 6, seed), "resid_pre")
    return float(guess[:, 0].mean() / true[:, 0].mean())


def learned_skew(seed: int) -> float:
    """The slope of the model's log-odds over the world's, 40 occupations, unseen phrasings."""
    return skew(mean_log_odds(_shipped(), seeds=range(6 * seed, 6 * seed + 6)))


def _halves() -> tuple[list[str], list[str]]:
    """Every second occupation by its skew, to find something with; the others, to test it on."""
    order = sorted(JOBS, key=lexicon.occupations().get)
    return order[::2], order[1::2]


def skew_without_direction(seed: int) -> float:
    """The slope that is left, on other occupations, without the direction of the middle layer."""
    model, (learn, test) = _shipped(), _halves()
    key = ("resid_post", model.n_layers // 2)
    cut = skew_direction(model, key, learn, seeds=range(4 * seed, 4 * seed + 4))
    hooks = without_direction(key, *cut)
    return skew(mean_log_odds(model, test, hooks, range(6 * seed, 6 * seed + 6)), test)


def worst_side_effect(seed: int) -> float:
    """Without that direction: the largest loss gained by any family but the pronouns, in nats."""
    model, (learn, _) = _shipped(), _halves()
    key = ("resid_post", model.n_layers // 2)
    hooks = without_direction(key, *skew_direction(model, key, learn))
    return _worst(damage(model, make_batch(model, answers=12, seed=40_000 + seed), hooks))


def carriers_side_effect(seed: int) -> float:
    """The same without the heads that carry more than a tenth of the skew."""
    model, (learn, _) = _shipped(), _halves()
    surgery = LesionLab(model, make_batch(model, answers=12, seed=40_000 + seed))
    heads = carriers(head_effects(model, range(3), jobs=learn).mean(0))
    return _worst(damage(model, surgery.batch, without_heads(surgery, heads)))


def _worst(found: Mapping[str, float]) -> float:
    return max(nats for family, nats in found.items() if family != "pronoun")


def path_effect(seed: int, site: str) -> float:
    """What the answer loses by the paths from the previous-token heads to the keys or values of the
    layers whose heads do the induction; all are found by patching."""
    model = _shipped()
    pairs = swap_pairs(model, 12, seed)
    metric = pairs.metric(model)
    effect = activation_patch(
        model, pairs.clean, pairs.corrupted, "z", metric, over="heads x positions"
    )
    writers, layers = writers_and_readers(effect)
    receivers = [(site, layer, head) for layer in layers for head in range(model.n_kv_heads)]
    return 1 - float(path_patch(model, pairs.clean, pairs.corrupted, writers, receivers, metric))


def path_through_keys(seed: int) -> float:
    """That path's effect through the keys."""
    return path_effect(seed, "k")


def path_through_values(seed: int) -> float:
    """The control: the same path into the values."""
    return path_effect(seed, "v")
