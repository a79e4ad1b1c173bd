"""Figures of interventions; a graph is drawn by `mi_helpers.views.graph`."""

from matplotlib.figure import Figure

from mi_helpers.circuits.interventions import Intervention
from mi_helpers.plots import OKABE_ITO, before_after

ADDS = OKABE_ITO[0]


def intervention_figure(result: Intervention, title: str = "", k: int = 6) -> Figure:
    """The probabilities of the likeliest next tokens before and after an intervention, where they
    are 0.005 or more."""
    top = [row for row in result.top(k) if max(row[1:]) >= 0.005] or result.top(1)
    before = {repr(text): p for text, p, _ in top}
    after = {repr(text): p for text, _, p in top}
    xlabel = "probability of the next token"
    return before_after(before, after, title, xlabel=xlabel, limits=(0.0, 1.0))
