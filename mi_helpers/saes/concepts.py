"""Which latents tell which concepts, against TinyWorld's labels and against other units.

tokens = labelled_tokens(model, ("resid_post", 3), 20_000)
scores = concept_scores(coder, tokens)                # best latent, neuron, random direction
own = own_latents(coder, tokens)                      # {concept: latents of its own}
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.features import firings
from mi_helpers.saes.labels import LabelledTokens
from mi_helpers.saes.scores import Best, Firings, score_units

STRONG = 0.25  # of a latent's highest activation: from there on a firing counts as strong

# ------------------------------------------------------------------------- the best single units


def best_latents(
    coder: SparseCoder, tokens: LabelledTokens, names: Sequence[str] | None = None
) -> list[Best]:
    """Each concept's best latent; unit and threshold from the first half, scores from the second.

    Args:
        names: of the concepts; None means all.
    """
    tokens = tokens.only(tokens.names if names is None else names)
    return score_units(firings(coder, tokens.x), tokens.truth, tokens.names).best()


def concept_scores(
    coder: SparseCoder, tokens: LabelledTokens, names: Sequence[str] | None = None, seed: int = 0
) -> dict[str, list[Best]]:
    """{kind: each concept's best unit}: latents, neurons, and as many random directions as latents.

    Unit and threshold are chosen on the first half of the text and scored on the second.

    Args:
        names: of the concepts; None means all.
        seed: of the random directions.
    """
    tokens = tokens.only(tokens.names if names is None else names)
    units = {
        "neuron": both_signs(tokens.neurons),
        "random direction": random_directions(tokens.x, coder.d_latent, seed),
    }
    return {"latent": best_latents(coder, tokens)} | {
        kind: score_units(values, tokens.truth, tokens.names).best()
        for kind, values in units.items()
    }


def both_signs(units: Tensor) -> np.ndarray:
    """Each unit and its negative, (n, 2 units): a neuron may mean something when it is low."""
    return torch.cat([units, -units], 1).numpy()


def random_directions(x: Tensor, n: int, seed: int = 0) -> np.ndarray:
    """The components of rows x (rows, d), less their mean, in n random directions: (rows, n)."""
    generator = torch.Generator().manual_seed(seed)
    return ((x - x.mean(0)) @ torch.randn(x.shape[1], n, generator=generator)).numpy()


# ------------------------------------------------------------------------ several latents of one


def strong_firings(found: Firings, share: float = STRONG) -> Firings:
    """The firings at `share` or more of what the latent reaches in the first half of the rows.

    The weakest firings say little: with 8 of 1,152 latents on at every token, some have to be on
    where nothing fits.
    """
    early = found.row < found.n_rows // 2
    highest = np.full(found.n_latents, np.inf)
    latents = np.unique(found.latent[early])
    reached = np.zeros(found.n_latents)
    np.maximum.at(reached, found.latent[early], found.value[early])
    highest[latents] = reached[latents]
    keep = found.value >= share * highest[found.latent]
    parts = (part[keep] for part in (found.row, found.latent, found.value))
    return Firings(*parts, found.n_rows, found.n_latents)


def union_f1(found: Firings, truth: np.ndarray, precision: float = 0.5) -> np.ndarray:
    """F1 of 'any of the concept's latents fires' on the second half of the rows, (concepts,).

    The concept's latents are those with more than `precision` of their firings in the first half
    at its tokens: where a concept is split over many latents, together they may tell it.

    Args:
        truth: (rows, concepts), whether each row has each concept.
    """
    half, scores = found.n_rows // 2, []
    early = found.row < half
    fired = np.bincount(found.latent[early], minlength=found.n_latents)
    for concept in truth.T:
        own = early & concept[found.row]
        hits = np.bincount(found.latent[own], minlength=found.n_latents)
        chosen = hits > precision * np.maximum(fired, 1)
        fires_at = np.zeros(found.n_rows, dtype=bool)
        fires_at[found.row[chosen[found.latent]]] = True
        said, true = fires_at[half:], concept[half:]
        scores.append(2 * (said & true).sum() / max(said.sum() + true.sum(), 1))
    return np.array(scores)


def count_latents(
    found: Firings, truth: np.ndarray, precision: float = 0.8, recall: float = 0.02
) -> np.ndarray:
    """How many latents belong to each concept, (concepts,).

    A latent belongs to a concept when it fires at more than `recall` of its tokens, and more than
    `precision` of the latent's firings are at them.

    Args:
        truth: (rows, concepts), whether each row has each concept.
    """
    fired = np.bincount(found.latent, minlength=found.n_latents)
    counts = []
    for concept in truth.T:
        hits = np.bincount(found.latent, weights=concept[found.row], minlength=found.n_latents)
        belongs = (hits > precision * fired) & (hits > recall * concept.sum())
        counts.append(int(belongs.sum()))
    return np.array(counts)


def own_latents(coder: SparseCoder, tokens: LabelledTokens) -> dict[str, int]:
    """{concept: how many latents belong to it}, counting strong firings alone."""
    counts = count_latents(strong_firings(firings(coder, tokens.x)), tokens.truth)
    return dict(zip(tokens.names, counts.tolist(), strict=True))
