"""Lesson 00's rows of the ledger: each function measures one claim, at one seed."""

from mi_helpers.course.ledger import claim
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.tinyworld.world import World


@claim(
    "stream-sum",
    "embed + Σ attn_out + Σ mlp_out against the final residual, relative to its largest entry",
    source="Elhage et al. 2021, A Mathematical Framework, "
    "Residual Stream as a Communication Channel",
    published="0",
    tolerance="<= 1e-5",
)
def stream_sum_error(seed: int) -> float:
    """max |embed + Σ attn_out + Σ mlp_out - resid_final| / max |resid_final|, on one document.

    Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits, "Residual
    Stream as a Communication Channel": the final stream is the sum of all that was written.
    """
    model = shipped_model()
    text = World().document(seed, "prose").text
    _, cache = model.run_with_cache(text, ["embed", "attn_out", "mlp_out", "resid_final"])
    parts = cache["embed"] + cache["attn_out"].sum(0) + cache["mlp_out"].sum(0)
    final = cache["resid_final"]
    return float((parts - final).abs().max() / final.abs().max())
