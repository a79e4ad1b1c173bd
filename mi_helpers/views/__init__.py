"""Interactive views: what Python knows as JSON, what the browser draws with one ES module each.

    from mi_helpers.views import attention, graph, latents, lens, tokens

    tokens(model.str_tokens(text), losses, label="surprise", unit="nats")
    attention(model, "The Eiffel Tower is in")
    latents("runs/tiny/latents.jsonl")
    lens(model, "The Eiffel Tower is in the city of")
    graph(data)  # an attribution graph's JSON

Each is used by mouse, by keyboard and with a screen reader, asks nothing of another machine, and
leaves HTML for a reader who has no kernel.
"""

from mi_helpers.views.attention import attention, attention_json
from mi_helpers.views.base import View
from mi_helpers.views.graph import graph, graph_page, graph_view_json
from mi_helpers.views.latents import latents, latents_json, latents_page
from mi_helpers.views.lens import lens, lens_json
from mi_helpers.views.tokens import tokens, tokens_json

__all__ = [
    "View",
    "attention",
    "attention_json",
    "graph",
    "graph_page",
    "graph_view_json",
    "latents",
    "latents_json",
    "latents_page",
    "lens",
    "lens_json",
    "tokens",
    "tokens_json",
]
