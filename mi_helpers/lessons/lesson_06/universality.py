"""The same latents elsewhere: with another seed, in a twin, in a model that has only words left.

    found = dictionaries(model)
    correlations(found["this one"], found["the twin"]).amax(1)    # each latent's best partner

Directions of two models cannot be compared, as each has axes of its own; firing can, where both
read the same tokens. The twin is tiny-gemma trained again on the same world from other random
weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mi_helpers.lessons.lesson_06.experiments import K, stream_rows
from mi_helpers.lessons.shared import MODELS
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.saes.training import TrainConfig, fit

SAME = 0.7  # correlation above which two latents count as the same


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlations of each column of one (n, a) with each of another (n, b): (a, b).

    A column that does not vary has 0 with all.
    """
    sides = [x - x.mean(0) for x in (one, other)]
    sides = [x / x.norm(dim=0).clamp(min=1e-9) for x in sides]
    return sides[0].T @ sides[1]


def dictionaries(model: LanguageModel, tokens: int = 20_000, seed: int = 0) -> dict[str, Tensor]:
    """Small SAEs of a model and of others: their values at the same tokens of TinyWorld.

    Args:
        tokens: of the text; four fifths are trained on, the values are at the last fifth.
        seed: of the text, of the SAEs' random weights, and of the controls.

    Returns:
        {"this one", "another seed" (of the same model), "the twin" (of tiny-gemma alone), "trained
        embedding only", "in another order" (the other seed's tokens shuffled): (tokens / 5,
        latents)}.
    """
    models = {"this one": model, "another seed": model}
    if model.name == "tiny-gemma":
        models["the twin"] = load_model("tiny-gemma-twin")
    models["trained embedding only"] = MODELS["trained embedding only"](model, seed)
    x, found = {}, {}
    for number, (name, each) in enumerate(models.items()):
        if id(each) not in x:
            x[id(each)] = stream_rows(each, tokens, 700 + seed)
        rows, of_training = x[id(each)], tokens * 4 // 5
        width = 4 * rows.shape[1]
        config = TrainConfig(width, K, steps=250, batch=1_024, seed=10 * seed + number)
        coder = fit(rows[:of_training], config)
        found[name] = coder.encode(rows[of_training:]).detach()
    order = torch.randperm(len(found["this one"]), generator=torch.Generator().manual_seed(seed))
    return found | {"in another order": found["another seed"][order]}


def shares(model: LanguageModel, seed: int = 0) -> dict[str, float]:
    """{of `dictionaries`: the share of this one's latents with a partner there above SAME}."""
    found = dictionaries(model, seed=seed)
    one = found.pop("this one")
    return {
        name: float((correlations(one, other).amax(1) > SAME).float().mean())
        for name, other in found.items()
    }
