"""The sparse autoencoder that several lessons read, and where it reads."""

from __future__ import annotations

from mi_helpers.files import DATA
from mi_helpers.layouts import Key
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.files import load_coder

CODER = DATA / "sae" / "tiny_gemma"


def middle(model: LanguageModel) -> Key:
    """Where the autoencoder reads: the stream after the middle block.

    In tiny-gemma that is block 3 of 6; in Gemma 2 2B block 12 of 26, as in the reference run.
    """
    return "resid_post", min(model.n_layers // 2, 12)


def coder_of(model: LanguageModel) -> SparseCoder:
    """The autoencoder of a model, not to be trained: tiny-gemma's ships; Gemma 2 2B's is Gemma
    Scope's.

    Raises:
        ValueError: the model is another.
    """
    if model.name == "tiny-gemma":
        return load_coder(CODER).requires_grad_(False)
    if model.name.endswith("gemma-2-2b"):
        scope = "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"
        return load_coder(*scope).requires_grad_(False)
    raise ValueError(
        f"No autoencoder of {model.name} is at hand: train one with python -m mi_helpers run, and "
        "load its folder with load_coder."
    )
