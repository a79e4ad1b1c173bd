"""An attribution graph to click through: nodes with cards, thresholds, pins, groups.

graph(data)                          # data: the JSON of circuit-tracer and Neuronpedia
graph(trace, prompt="The capital …") # trace(prompt) makes such JSON: any prompt can be typed
graph(trace, prompt, act)            # act(prompt, {node: factor}): any node can be multiplied
graph_page(data)                     # the same as one HTML file, which asks nothing of a network
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping

import traitlets

from mi_helpers.views.base import View, escape, module, plain, read, shown, spoken

KINDS = {
    "embedding": "embedding",
    "logit": "logit",
    "mlp reconstruction error": "error",
    "cross layer transcoder": "feature",
}
OUTPUT = re.compile(r'Output "(.*)" \(p=([0-9.]+)\)', re.DOTALL)  # what the field calls a logit
LETTERS = 16  # of a name that is written into the drawing
IN_TABLE = 20  # features in the HTML that needs no script
START = {"node": 0.7, "edge": 0.5}

Act = Callable[[str, dict[str, float]], Iterable[tuple[str, float, float]]]


class GraphView(View):
    """The view of a graph; with a function that traces, of every prompt that is typed into it, and
    with one that acts, of what the answer becomes when nodes are multiplied.

    `chosen` has what was done last: {"prompt", "node", "pinned": [ids], "groups": {name: [ids]}}.
    """

    told = traitlets.Dict().tag(sync=True)  # what the model answered to the last act

    def __init__(
        self,
        source: Mapping | Callable[[str], Mapping],
        prompt: str,
        act: Act | None,
        start: Mapping,
    ):
        self.trace, self.act, self.start = (source if callable(source) else None), act, start
        data = self.drawn(source(prompt) if callable(source) else source)
        self.prompt = prompt if callable(source) else data["prompt"]  # the one that is drawn
        super().__init__("graph", data, graph_html(data), graph_text(data))
        self.observe(self.asked, "chosen")

    def drawn(self, made: Mapping) -> dict:
        """What is drawn of a graph's JSON here."""
        live = {"live": self.trace is not None, "acts": self.act is not None}
        return graph_view_json(made, self.start) | live

    def asked(self, change) -> None:
        """Trace another prompt, or act on nodes, or say in a sentence why that cannot be."""
        prompt, act = change["new"].get("prompt"), change["new"].get("act")
        if self.trace is not None and prompt != self.data["prompt"]:
            try:
                self.data = self.drawn(self.trace(prompt)) | {"prompt": prompt}
                self.prompt = prompt
            except ValueError as error:
                self.data = self.data | {"prompt": prompt, "message": str(error)}
        elif self.act is not None and act:
            self.told = act | self.answered(act["nodes"], act["factor"])

    def answered(self, nodes: list[str], factor: float) -> dict:
        """{"answers": [[token, probability before, after]]}, or {"message": why there are none}."""
        try:
            rows = self.act(self.prompt, dict.fromkeys(nodes, float(factor)))
        except ValueError as error:
            return {"message": str(error)}
        return {"answers": _answers(rows)}


def graph(
    source: Mapping | Callable[[str], Mapping],
    prompt: str = "",
    act: Act | None = None,
    **start: float,
) -> View:
    """A view of an attribution graph.

    Arrows move among nodes, `p` pins one; the card beside it has its contexts, its effect on the
    logits, and its strongest edges, each of which leads on. Pinned nodes can be made one group.
    A node, or its group, can be multiplied by 0, -1 or 2: the card then says what the next word
    becomes.

    Args:
        source: JSON as `mi_helpers.circuits.files.graph_json` and circuit-tracer write it, with
            "cards" and "interventions" where there are any (`graph_view_json`); or a function that
            makes it from a prompt.
        prompt: what is traced first, where `source` is a function.
        act: a function of the prompt and {node: factor} that gives (token, probability before,
            after) of some next tokens; `mi_helpers.circuits.cards.act_on` makes one.
        start: `node` and `edge`, the thresholds at first, from 0 to 1.

    Raises:
        ValueError: the JSON is no such graph, or has nothing to draw.
    """
    return GraphView(source, prompt, act, START | start)


def graph_view_json(data: Mapping, start: Mapping = START) -> dict:
    """What the view draws, as JSON, from the field's JSON.

    Args:
        data: {"metadata", "nodes", "links", "qParams"}, and perhaps "cards": {node_id: {"contexts":
            [[[word, share], …], …], "raises": [[token, effect], …], "lowers": …}}, and perhaps
            "interventions": [{"nodes", "factor", "answers": [[token, before, after], …]}, …].
        start: the thresholds at first.

    Returns:
        {"label", "message", "prompt", "live": False, "tokens", "rows", "nodes", "links": [[source,
        target, weight]], "groups", "cards", "start", "acts": False, "done"}; see `graph.js`.

    Raises:
        ValueError: it is no such graph, or has no logit.
    """
    try:
        meta, entries = data["metadata"], data["nodes"]
        tokens = [str(each) for each in meta["prompt_tokens"]]
        inside = [
            int(n["layer"]) for n in entries if KINDS[n["feature_type"]] in ("feature", "error")
        ]
        depth = max(1 + max(inside, default=-1), int(meta.get("n_layers", 0)))
        nodes = [_node(entry, tokens, depth) for entry in entries]
        place = {node["id"]: i for i, node in enumerate(nodes)}
        links = [
            [place[link["source"]], place[link["target"]], float(link["weight"])]
            for link in data["links"]
        ]
        groups = {
            str(name): [each for each in ids if each in place]  # a pruned file may have lost some
            for name, *ids in data.get("qParams", {}).get("supernodes", [])
        }
        done = [
            {
                "nodes": [str(name) for name in each["nodes"]],
                "factor": float(each["factor"]),
                "answers": _answers(each["answers"]),
            }
            for each in data.get("interventions", [])
        ]
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"This is no attribution graph ({type(error).__name__} at {error}): give the JSON that "
            "`graph_json` or circuit-tracer writes."
        ) from error
    if not any(node["kind"] == "logit" for node in nodes):
        raise ValueError("The graph has no logit, so there is no answer to draw: trace it anew.")
    if len(place) < len(nodes):
        raise ValueError(
            "Several nodes of the graph have one name, so its links cannot be told apart."
        )
    return {
        "label": f"Attribution graph of “{meta['prompt']}”",
        "message": "",
        "prompt": str(meta["prompt"]),
        "live": False,
        "tokens": [{"shown": shown(each), "spoken": spoken(each)} for each in tokens],
        "rows": ["words", *map(str, range(depth)), "answer"],
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "cards": dict(data.get("cards", {})),
        "start": dict(start),
        "acts": False,
        "done": done,
    }


def _answers(rows: Iterable) -> list[list]:
    """[[token as it is said, probability before, after]]."""
    return [[spoken(str(token)), float(before), float(after)] for token, before, after in rows]


def _node(entry: Mapping, tokens: list[str], depth: int) -> dict:
    """One node as the view has it."""
    kind, column = KINDS[entry["feature_type"]], int(entry["ctx_idx"])
    row = {"embedding": 0, "logit": depth + 1}.get(kind)
    row = int(entry["layer"]) + 1 if row is None else row
    token = spoken(tokens[column])
    name = str(entry.get("clerp") or entry["node_id"])
    if kind == "embedding":
        name = f"the word {token}"
    elif kind == "error":
        name = f"error of layer {row - 1}"
    elif kind == "logit" and (output := OUTPUT.fullmatch(name)):
        name = f"{spoken(output[1])} {float(output[2]):.2f}"
    where = "" if kind in ("embedding", "logit") else f", layer {row - 1}"
    value = entry.get("activation") if kind == "feature" else entry.get("value")
    amount = "" if value is None else f", {float(value):.2f}"
    influence = entry.get("own_influence", entry.get("influence")) or 0.0
    cumulative = entry.get("influence")
    return {
        "id": str(entry["node_id"]),
        "kind": kind,
        "row": row,
        "column": column,
        "name": name,
        "short": name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…",
        "said": f"at {token}{where}{amount}",
        "influence": float(influence),
        "cumulative": 1.0 if cumulative is None else float(cumulative),
    }


def graph_html(data: dict) -> str:
    """The same as HTML that needs no script: the features with the most influence, and the
    strongest edges into the answers."""
    rows = "".join(
        f"<tr><td>{escape(node['name'])}</td><td>{escape(node['said'])}</td>"
        f"<td>{node['influence']:.3f}</td></tr>"
        for node in _largest(data)
    )
    into = "".join(f"<li>{escape(line)}</li>" for line in _into_answers(data))
    return plain(
        f"<p><b>{escape(data['label'])}</b></p><table><tr><th>feature</th><th>where</th>"
        f"<th>influence</th></tr>{rows}</table><p>Into the answers:</p><ul>{into}</ul>"
    )


def graph_text(data: dict) -> str:
    """The same as plain text."""
    lines = [f"{node['name']} {node['said']}" for node in _largest(data)]
    return "\n".join([data["label"], *lines, "Into the answers:", *_into_answers(data)])


def _largest(data: dict) -> list[dict]:
    features = [node for node in data["nodes"] if node["kind"] == "feature"]
    return sorted(features, key=lambda node: -node["influence"])[:IN_TABLE]


def _into_answers(data: dict) -> list[str]:
    """The strongest edges into logits, in words."""
    nodes = data["nodes"]
    links = [link for link in data["links"] if nodes[link[1]]["kind"] == "logit"]
    links.sort(key=lambda link: -abs(link[2]))
    return [
        f"{weight:+.2f} from {nodes[source]['name']} {nodes[source]['said']} to "
        f"{nodes[target]['name']}"
        for source, target, weight in links[:8]
    ]


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline';
 style-src 'unsafe-inline'"><style>body {{ margin: 12px; font-family: sans-serif; }}
{css}</style></head>
<body class="mi-view"><noscript>{still}</noscript>
<script type="application/json" id="data">{data}</script>
<script type="module">
{code}
document.body.append(draw(JSON.parse(document.getElementById("data").textContent), () => {{}}));
</script></body></html>
"""


def graph_page(data: Mapping, **start: float) -> str:
    """The view as one HTML page, which needs no network, no kernel and no other file.

    Args:
        data, start: as in `graph`.
    """
    made = graph_view_json(data, START | start)
    inside = json.dumps(made, ensure_ascii=False).replace("<", "\\u003c")
    return PAGE.format(
        title=escape(made["label"]),
        css=read("views.css"),
        still=graph_html(made),
        data=inside,
        code=module("graph"),
    )
