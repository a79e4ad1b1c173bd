"""Cards of a graph's features: where they fire, which words they raise and lower, and what the
answer becomes when they are multiplied.

views.graph(graph_json(graph) | {"cards": cards(model, coders, graph, namer)})
views.graph(trace, prompt, act_on(model, coders))                 # the model answers
views.graph_page(graph_json(graph) | {"interventions": interventions(model, coders, graph)})
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from mi_helpers.arguments import whole
from mi_helpers.circuits.graphs import EMBEDDING, Graph
from mi_helpers.circuits.interventions import Changes, intervene
from mi_helpers.circuits.names import Namer
from mi_helpers.circuits.replacement import Coders, Prompt, by_layer
from mi_helpers.models import LanguageModel
from mi_helpers.saes.features import extremes, logit_effects


@torch.no_grad()
def cards(
    model: LanguageModel,
    coders: Coders,
    graph: Graph,
    namer: Namer,
    contexts: int = 3,
    words: int = 5,
) -> dict[str, dict]:
    """{feature: its card}, as JSON.

    Args:
        graph: a pruned one: each feature's row goes through the unembedding.
        contexts, words: how many of each.

    Returns:
        a card is {"contexts": [[[word, share], …], …], "raises": [[token, effect], …], "lowers":
        …}; a share is the activation over the largest in this piece of text, an effect that of the
        feature's activation on the logit, directly.
    """
    held, features = by_layer(coders), graph.features()
    if not features:
        return {}
    rows = torch.stack([graph.value(n) * held[n.layer].W_dec[n.index].float() for n in features])
    (top, high), (bottom, low) = _ends(model, logit_effects(model, rows).cpu(), words)
    found = {}
    for i, node in enumerate(features):
        pieces = namer.contexts(node.layer, node.index, contexts) if namer.words else []
        found[node.id] = {
            "contexts": [_shares(piece) for piece in pieces],
            "raises": list(zip(top[i], high[i], strict=True)),
            "lowers": list(zip(bottom[i], low[i], strict=True)),
        }
    return found


def _ends(model: LanguageModel, effects: torch.Tensor, n: int) -> list[tuple[list, list]]:
    """The n highest and the n lowest of each row: (texts, effects)."""
    made = []
    for values, ids in extremes(model, effects, n):
        texts = [[model.token_text(int(i)) for i in row] for row in ids]
        made.append((texts, [[round(float(v), 3) for v in row] for row in values]))
    return made


def _shares(piece: list[tuple[str, float]]) -> list[list]:
    """Activations over the largest among them."""
    most = max(value for _, value in piece)
    return [[word, round(value / most, 2) if most > 0 else 0.0] for word, value in piece]


# ---------------------------------------------------------------------------- acting from the card

FACTORS = (0.0, -1.0, 2.0)  # those that the view offers


def answers(
    model: LanguageModel, coders: Coders, prompt: Prompt, factors: Changes, k: int = 3
) -> list[tuple[str, float, float]]:
    """(token, probability before, after) of the k likeliest next tokens before and after some
    nodes are multiplied, the likeliest after first; measured by `intervene`, attention frozen."""
    return intervene(model, coders, prompt, factors).top(k)


def act_on(model: LanguageModel, coders: Coders) -> Callable[[Prompt, Changes], list]:
    """`answers` of this model, of a prompt and {node: factor}: `views.graph` takes it as `act`."""
    return partial(answers, model, coders)


def interventions(
    model: LanguageModel,
    coders: Coders,
    graph: Graph,
    strongest: int = 10,
    factors: Sequence[float] = FACTORS,
) -> list[dict]:
    """What the answer becomes, as JSON, for a page that has no model: for each of the graph's
    supernodes, and for each of its `strongest` features alone.

    Returns:
        [{"nodes": names, "factor", "answers": [[token, before, after]]}]
    """
    ids = [node.index for node in graph.nodes if node.kind == EMBEDDING]
    targets = [list(names) for names in graph.supernodes.values()]
    n = whole("strongest", strongest, 0)
    targets += [[node.id] for node in graph.features()[:n] if [node.id] not in targets]
    return [
        {
            "nodes": names,
            "factor": factor,
            "answers": answers(model, coders, ids, dict.fromkeys(names, factor)),
        }
        for names in targets
        for factor in factors
    ]
