"""The same latents in two models: matched by where they fire in the same text.

    found = universality((model, coder), (twin, its_coder), ids)
    found["matched"], found["chance"]

Directions of two models cannot be compared, as each has axes of its own; firing can. Any two models
do that read the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mi_helpers.layouts import Key, ModelError
from mi_helpers.models import LanguageModel, read_sites
from mi_helpers.saes.coder import SparseCoder

Side = tuple[LanguageModel, SparseCoder, Key]  # a model, a coder of it, and the site it is of
SAME = 0.7  # correlation above which two latents count as the same


@torch.no_grad()
def values(side: Side, texts: Sequence[Tensor]) -> Tensor:
    """A coder's values at every token but the first of each text, (tokens, latents)."""
    model, coder, site = side
    rows = [read_sites(model, ids[None].to(model.device), [site])[0][0, 1:] for ids in texts]
    return coder.encode(torch.cat(rows).to(coder.device, torch.float32)).cpu()


def correlations(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlations of each column of one (n, a) with each of another (n, b): (a, b).

    A column that does not vary has 0 with all.
    """
    sides = [x - x.mean(0) for x in (one, other)]
    sides = [x / x.norm(dim=0).clamp(min=1e-9) for x in sides]
    return sides[0].T @ sides[1]


def universality(one: Side, other: Side, texts: Sequence[Tensor], seed: int = 0) -> dict:
    """How many latents of one model's coder have a partner in another's that fires alike.

    Args:
        texts: token ids (pos,), BOS first, which both models read.
        seed: of the control, in which the other's tokens are in another order.

    Returns:
        {"best": (latents,), each latent's highest correlation with any of the other's, NaN where it
        never fires; "matched": the share above SAME of those that fire; "chance": the same with
        the tokens of the other in another order; "alive": how many fire}.

    Raises:
        ModelError: the models do not read the same tokens.
    """
    sizes = [side[0].d_vocab for side in (one, other)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"The models have vocabularies of {sizes[0]:,} and {sizes[1]:,} tokens: latents can "
            "be matched by their firing only where both read the same tokens."
        )
    a, b = (values(side, texts) for side in (one, other))
    alive = (a > 0).any(0)
    order = torch.randperm(len(b), generator=torch.Generator().manual_seed(seed))
    best, chance = (correlations(a, x).amax(1) for x in (b, b[order]))
    return {
        "best": torch.where(alive, best, torch.nan),
        "matched": float((best[alive] > SAME).float().mean()),
        "chance": float((chance[alive] > SAME).float().mean()),
        "alive": int(alive.sum()),
    }
