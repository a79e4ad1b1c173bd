"""The pronoun skew: the occupations that a model calls 'she' or 'he'; what carries and removes it.

    pairs = pronoun_pairs(model, 24, seed=0)
    slope = skew(mean_log_odds(model))               # 1: all of the world's skew, 0: none of it
    hooks = without_direction(*best_direction(model, JOBS))

TinyWorld's own skew is `lexicon.occupations()`, the probability of 'she' for each occupation.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mi_helpers.layouts import Key
from mi_helpers.lessons.lesson_03.experiments import strongest
from mi_helpers.lessons.lesson_03.pairs import JOBS, pronoun_pairs, pronoun_texts, sides
from mi_helpers.lessons.shared import Batch, family_losses
from mi_helpers.models import LanguageModel
from mi_helpers.patching import activation_patch
from mi_helpers.probes import mean_difference, midpoint, project_out, some_layers
from mi_helpers.tinyworld import lexicon


def true_log_odds(jobs: Sequence[str] = JOBS) -> np.ndarray:
    """log p(she) - log p(he) of each occupation in TinyWorld, (jobs,)."""
    p = np.array([lexicon.occupations()[job] for job in jobs])
    return np.log(p / (1 - p))


def learn_and_test() -> tuple[list[str], list[str]]:
    """Every second occupation by its skew, to find something with; the others, to test it on."""
    order = sorted(JOBS, key=lexicon.occupations().get)
    return order[::2], order[1::2]


@torch.no_grad()
def log_odds(
    model: LanguageModel, texts: Sequence[str], hooks: Mapping | None = None
) -> np.ndarray:
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
    """Each occupation's log-odds, averaged over the sentences of the seeds, (jobs,)."""
    texts = [text for seed in seeds for text in pronoun_texts(seed, jobs, held)]
    return log_odds(model, texts, hooks).reshape(len(seeds), len(jobs)).mean(0)


def skew(found, jobs: Sequence[str] = JOBS) -> float:
    """The slope of the model's log-odds (jobs,) over the world's: 1 is all of the skew, 0 none.

    slope = cov(model, world) / var(world)
    """
    truth = true_log_odds(jobs)
    truth = truth - truth.mean()
    return float((np.asarray(found) @ truth) / (truth @ truth))


def head_effects(
    model: LanguageModel, seeds: Sequence[int], n: int = 12, jobs: Sequence[str] = JOBS
) -> np.ndarray:
    """The share of the difference between 'she' and 'he' occupations that each head carries, by
    denoising, (seeds, layers, heads), with one sentence for each seed."""
    effects = []
    for seed in seeds:
        pairs = pronoun_pairs(model, n, seed, jobs)
        effects.append(
            activation_patch(model, pairs.clean, pairs.corrupted, "z", pairs.metric(model)).cpu()
        )
    return torch.stack(effects).numpy()


def random_heads(
    model: LanguageModel, count: int, seed: int, spared: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """The control: `count` random heads, none in `spared`, but as many in each layer as it has."""
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


@torch.no_grad()
def skew_direction(
    model: LanguageModel, key: Key, jobs: Sequence[str], seeds: Sequence[int] = range(4)
) -> tuple[np.ndarray, np.ndarray]:
    """The mean stream before the pronoun of 'she' occupations less that of 'he' occupations, and
    the midpoint of the two means, each (d_model,)."""
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
    """The layers' `skew_direction` whose removal leaves the smallest slope on these occupations.

    Returns:
        (site, direction, centre).
    """
    cuts = {key: skew_direction(model, key, jobs, seeds) for key in some_layers(model)[1:]}

    def left(key: Key) -> float:
        hooks = without_direction(key, *cuts[key])
        return abs(skew(mean_log_odds(model, jobs, hooks, seeds, held=False), jobs))

    key = min(cuts, key=left)
    return key, *cuts[key]


def without_direction(key: Key, direction, centre) -> dict:
    """Hooks that project a direction out of the stream (about a centre), after the first token."""
    v, c = (torch.tensor(np.asarray(each), dtype=torch.float32) for each in (direction, centre))

    def hook(x: Tensor) -> Tensor:
        x[:, 1:] = project_out(x[:, 1:].float(), v.to(x.device), c.to(x.device)).to(x)
        return x

    return {key: hook}


def damage(model: LanguageModel, batch: Batch, hooks: Mapping) -> dict[str, float]:
    """{family: loss under the hooks less loss without}, in nats per scored token."""
    before, after = family_losses(model, batch), family_losses(model, batch, hooks)
    return {family: after[family] - before[family] for family in before}
