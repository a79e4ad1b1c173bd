"""Lesson 03's experiments: gates, pairs of prompts, effects over many pairs, paths of two heads.

    pairs = fact_pairs(model, 24, seed=0)
    effect = activation_patch(model, pairs.clean, pairs.corrupted, "resid_pre", pairs.metric(model))

The engine is `mi_helpers.patching`; the pronouns are in `pronouns`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from mi_helpers.gradients import attribution_patch
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel
from mi_helpers.patching import (
    LogitDiff,
    activation_patch,
    normalised_logit_diff,
)
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.copying import vocabulary

# -------------------------------------------------------------------------------------------- gates


def gate_and(wires: Tensor) -> Tensor:
    """ReLU(Σ wires - (n - 1)), (..., n) -> (...,): 1 where all n wires are 1, else 0."""
    return torch.relu(wires.sum(-1) - (wires.shape[-1] - 1))


def gate_or(wires: Tensor) -> Tensor:
    """ReLU(Σ wires) - ReLU(Σ wires - 1), (..., n) -> (...,): 1 where any wire is 1, else 0."""
    total = wires.sum(-1)
    return torch.relu(total) - torch.relu(total - 1)


def gate_effects(gate: Callable[[Tensor], Tensor], n: int = 2, wire: int = 0) -> dict[str, float]:
    """The effect of one wire of a gate in both directions; clean: all wires 1, corrupted: all 0.

    Args:
        gate: wires (n,) -> output.
        n: the number of wires.

    Returns:
        denoise: the output with this wire 1 and the others 0.
        noise: 1 - the output with this wire 0 and the others 1.

    Raises:
        ValueError: no such wire, or fewer than two.
    """
    if n < 2 or not 0 <= wire < n:
        raise ValueError(f"Wire {wire} of {n} is no choice: a gate has two wires or more, from 0.")
    one = torch.eye(n)[wire]
    return {"denoise": float(gate(one)), "noise": 1 - float(gate(1 - one))}


# --------------------------------------------------------------------------------- pairs of prompts


@dataclass(frozen=True)
class Pairs:
    """n pairs of prompts, all with the same number of tokens, so that their positions line up.

    Attributes:
        clean, corrupted: token ids (n, pos).
        answer, wrong: the ids that complete them.
        texts: both prompts of each pair.
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
        """A label for each position: its word in all prompts, or `name` where they differ."""
        words = model.str_tokens(self.clean[0])
        return [name if i in self.subject else word.strip() for i, word in enumerate(words)]

    def metric(self, model: LanguageModel) -> LogitDiff:
        """The normalised logit difference, averaged over the pairs before it is normalised."""
        return normalised_logit_diff(model, self.clean, self.corrupted, self.answer, self.wrong)


def make_pairs(
    model: LanguageModel, texts: Sequence[tuple[str, str]], answers: Sequence[tuple[str, str]]
) -> Pairs:
    """Pairs of texts.

    Args:
        answers: the words that complete each pair (one token, mind the space).

    Raises:
        ModelError: the texts' token counts differ, or an answer is not one token.
    """
    answer, wrong = ([model.to_single_token(pair[i]) for pair in answers] for i in (0, 1))
    ids = model.tokens([text for pair in texts for text in pair])  # clean, corrupted, clean, …
    return Pairs(ids[::2], ids[1::2], answer, wrong, list(texts))


CITY = "The {} is in the city of"


def _is_token(model: LanguageModel, text: str) -> bool:
    """Whether a text is one token that the model knows."""
    try:
        model.to_single_token(text)
    except ModelError:
        return False
    return True


@lru_cache(maxsize=8)
def _aligned(model: LanguageModel) -> tuple[lexicon.Landmark, ...]:
    """Of the landmarks whose city is one token, those with the commonest token count."""
    by_count: dict[int, list] = {}
    for place in lexicon.landmarks():
        if _is_token(model, f" {place.city}"):
            count = model.tokens(CITY.format(place.name)).shape[1]
            by_count.setdefault(count, []).append(place)
    return tuple(max(by_count.values(), key=len)) if by_count else ()


def equally_long_landmark(model: LanguageModel, name: str, city: str) -> lexicon.Landmark:
    """A landmark in another city whose name has as many tokens, if possible one of `city`.

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


def fact_pairs(model: LanguageModel, n: int, seed: int, same_city: bool = False) -> Pairs:
    """n pairs of landmarks in different cities, with names of the same number of tokens.

    Args:
        same_city: the control: two landmarks of one city, and another city as the wrong answer.

    Raises:
        ValueError: the model's tokenizer leaves fewer than two landmarks to choose from.
    """
    places, rng = _aligned(model), random.Random(seed)
    cities = sorted({place.city for place in places})
    if len(cities) < 2:
        raise ValueError(f"{model.name} has too few landmarks of one token count for pairs.")
    chosen: list[tuple] = []
    while len(chosen) < n:
        clean, corrupted = rng.sample(places, 2)
        if (clean.city == corrupted.city) == same_city:
            chosen.append((clean, corrupted))
    texts = [(CITY.format(a.name), CITY.format(b.name)) for a, b in chosen]
    wrong = [
        rng.choice([city for city in cities if city != b.city]) if same_city else b.city
        for _, b in chosen
    ]
    return make_pairs(
        model, texts, [(f" {a.city}", f" {w}") for (a, _), w in zip(chosen, wrong, strict=True)]
    )


def swap_pairs(model: LanguageModel, n: int, seed: int, length: int = 8) -> Pairs:
    """n pairs of random words, written again up to word j. In the corrupted prompt, words j and k
    have changed places the first time, so another word follows the last one's first occurrence.

        clean:      a b c D e f G h | a b c D -> e        (j = 3, k = 6 of length 8)
        corrupted:  a b c G e f D h | a b c D -> h

    The possible answers keep their positions; only the words before them differ.
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


# ---------------------------------------------------------------------------------- over many pairs


def scaled_metric(model: LanguageModel, pairs: Pairs, gap: float, base: Tensor) -> LogitDiff:
    """A metric for pairs with the same answer: 0 on the prompts `base`, and 1 where the logit
    difference is larger by `gap`, the difference between the two runs of ordinary pairs."""
    raw = LogitDiff(torch.tensor(pairs.answer), torch.tensor(pairs.wrong))
    with torch.no_grad():
        at = float(raw.raw(model.forward(base)[:, -1]))
    return replace(raw, clean=at + gap, corrupted=at)


def true_and_guess(
    model: LanguageModel, pairs: Pairs, site: str, mode: str = "denoise"
) -> tuple[np.ndarray, np.ndarray]:
    """Every patch's effect (the change of the metric) and its estimate by attribution patching.

    Returns:
        (n, cells) each, pair by pair. Cells are layers × positions (for "z": × heads) from the
        first position that differs; before it both are 0.
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
def interpolate(
    model: LanguageModel, pair: Pairs, site: str, layer: int, position: int, shares: Sequence[float]
) -> np.ndarray:
    """The metric as one activation of the corrupted run is moved to the clean run's, (shares,):

        a = a_corrupted + share · (a_clean - a_corrupted)

    Args:
        pair: a single pair.
    """
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
    """The indices of the `count` largest entries of an array, the largest first."""
    effect = np.asarray(effect)
    order = np.argsort(-effect, axis=None, kind="stable")[:count]
    return [tuple(map(int, np.unravel_index(i, effect.shape))) for i in order]


# -------------------------------------------------------------------------------------------- paths


def writers_and_readers(effect, least: float = 0.1) -> tuple[list[tuple[int, int]], list[int]]:
    """The heads of a two-head path: those that read have an effect above `least` at the last
    position, those that write have one elsewhere, in an earlier layer.

    Args:
        effect: (layers, heads, positions).

    Returns:
        The writing heads as (layer, head), the strongest first, and the reading layers.

    Raises:
        ValueError: no head has such an effect at the last position, or none before it.
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
    """The change of what attention adds to the clean stream with one head's corrupted z:

        norm(Σ z' W_O) - norm(Σ z W_O),  or, without the post-norm, z'_h W_O,h - z_h W_O,h

    In families without a norm after attention both are the same.

    Returns:
        (n, pos, d_model).
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
    """The loss of the metric when a head's corrupted output reaches only the final norm."""
    delta, metric = written_change(model, pairs, layer, head, post_norm), pairs.metric(model)
    with model.hooks({"resid_final": lambda x: x + delta}):
        return 1 - float(metric(model.forward(pairs.clean)[:, -1]))
