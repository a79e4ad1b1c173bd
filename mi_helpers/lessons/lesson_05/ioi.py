"""Indirect objects: sentences that say who receives, and the metrics of a model and its circuits.

    prompts = make_prompts(model, n=24, seed=0)      # pairs of names that were never trained on
    task = Task(model, prompts, "IO - others")       # the metric
    task.faithfulness(nodes)                         # 1: they do by themselves what the model does

A *node* is a head at one role of the sentence, (layer, head, role). A circuit is a set of nodes.
Every node outside it is ablated, by default to its mean over the same sentence with three other
names (ABC), which has no information about who is who. MLPs always stay in, and read what the
circuit writes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mi_helpers.ablation import Mean, Resample, Zero, record
from mi_helpers.attribution import head_writes, stream_direction
from mi_helpers.heads import head_name
from mi_helpers.hooks import Cache
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.shared import documents, token_at
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld import lexicon

ROLES = ("IO", "S1", "S1+1", "S2", "END-2", "END", "elsewhere")
Node = tuple[int, int, str]  # layer, head, role

# ------------------------------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Prompts:
    """n sentences up to the word before the receiver, all with the same number of tokens.

    Attributes:
        ids: (n, pos); END is the last position.
        others: (n, k, pos): the same sentences with three other names (A, B and C, all different).
        role: (n, pos), an index into `ROLES`; -1 at the first token, which never changes.
        io: (n,), the ids of the receiver's name; s: (n,), those of the giver's.
        names: (n_names,), the ids of all names in the world.
        orders: n times "ABB" (the receiver is named first) or "BAB".
        texts: n sentences with their answer, as they were written.
    """

    ids: Tensor
    others: Tensor
    role: Tensor
    io: Tensor
    s: Tensor
    names: Tensor
    orders: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def one_hot(self, ids: Tensor) -> Tensor:
        """(n, n_names), 1 at the name that each of ids (n,) is."""
        return (self.names == ids[:, None]).float()

    def at(self, role: str) -> Tensor:
        """The position of a role in each sentence, (n,)."""
        if role not in ROLES[:-1]:
            raise ModelError(
                f"There is no role {role!r} with one position: {', '.join(ROLES[:-1])}."
            )
        return (self.role == ROLES.index(role)).int().argmax(1)


def make_prompts(model: LanguageModel, n: int = 24, seed: int = 0, others: int = 8) -> Prompts:
    """n of TinyWorld's sentences with an indirect object, half ABB, half BAB, with pairs of names
    that are held out of training.

    In all of them every name follows a space, so that it is the same token everywhere, and all have
    the commonest length, so that they make one batch.

    Args:
        others: k, the number of copies of each sentence with other names.

    Raises:
        ModelError: too few names are single tokens for this tokenizer.
    """
    ids = {name: model.encode(f" {name}") for name in lexicon.people()}
    single = {name: row[0] for name, row in ids.items() if len(row) == 1}
    rows = {order: [] for order in ("ABB", "BAB")}
    for order, found in rows.items():
        for document in documents("ioi", 20 * n + 100, 10_000 + seed, ("entities",), order=order):
            row = _one_prompt(model, document, single)
            if row:
                found.append(row)
    lengths = [len(row["ids"]) for found in rows.values() for row in found]
    if not lengths:
        raise ModelError(f"No sentence has names that are one token for {model.name}.")
    length = max(set(lengths), key=lengths.count)
    half = -(-n // 2)
    chosen = [
        row | {"order": order}
        for order, found in rows.items()
        for row in [r for r in found if len(r["ids"]) == length][:half]
    ]
    if len(chosen) < 2 * half:
        raise ModelError(
            f"Only {len(chosen)} sentences of {length} tokens: ask for fewer than {n}."
        )
    rng = random.Random(seed)
    made = [_with_other_names(row, sorted(single.values()), others, rng) for row in chosen]

    ids, role, io, s = ([row[key] for row in chosen] for key in ("ids", "role", "io", "s"))
    tensors = (ids, made, role, io, s, sorted(single.values()))
    return Prompts(
        *(torch.tensor(each, device=model.device) for each in tensors),
        tuple(row["order"] for row in chosen),
        tuple(row["text"] for row in chosen),
    )


def _one_prompt(model: LanguageModel, document, single: Mapping[str, int]) -> dict | None:
    """A document's prompt, its roles and its names, or None if a name is not one token."""
    spans = sorted(
        (s for s in document.spans if s.kind in ("entity", "ioi")), key=lambda s: s.start
    )
    said = [document.text[span.start : span.end] for span in spans]
    if len(spans) != 4 or spans[0].start == 0 or not all(name in single for name in said):
        return None
    whole, _ = token_at(model, document.text, 1)
    a, b, s2, io = (token_at(model, document.text, span.end)[1] for span in spans)
    if [whole[i] for i in (a, b, s2, io)] != [single[name] for name in said]:
        return None
    first, s1 = (a, b) if document.latents["order"] == "ABB" else (b, a)
    role = [-1] + [ROLES.index("elsewhere")] * (io - 1)
    for name, at in zip(ROLES, (first, s1, s1 + 1, s2, io - 3, io - 1), strict=False):
        role[at] = ROLES.index(name)
    return {
        "ids": whole[:io],
        "role": role,
        "io": whole[io],
        "s": whole[s2],
        "text": document.text,
    }


def _with_other_names(row: dict, names: Sequence[int], k: int, rng: random.Random) -> list:
    """k copies of a prompt in which IO, S1 and S2 are three different names, new to the prompt."""
    places = [row["role"].index(ROLES.index(role)) for role in ("IO", "S1", "S2")]
    free = [name for name in names if name not in (row["io"], row["s"])]
    copies = []
    for _ in range(k):
        ids = list(row["ids"])
        for place, name in zip(places, rng.sample(free, 3), strict=True):
            ids[place] = name
        copies.append(ids)
    return copies


# ---------------------------------------------------------------------------------------- behaviour


@torch.no_grad()
def behaviour(model: LanguageModel, prompts: Prompts) -> dict[str, dict[str, float]]:
    """How well the model does the task.

    Returns:
        {order: {name: mean}}: IO is the first choice, IO is above S, p(IO), p(S), and the logit
        difference of IO and S.
    """
    _, cache = model.run_with_cache(prompts.ids, "resid_final", model.n_layers, pos=-1)
    logits = model.unembed(cache["resid_final"]).float()
    p = logits.softmax(-1)
    rows = torch.arange(len(prompts), device=logits.device)
    gap = logits[rows, prompts.io] - logits[rows, prompts.s]
    each = {
        "IO first": (logits.argmax(-1) == prompts.io).float(),
        "IO above S": (gap > 0).float(),
        "p(IO)": p[rows, prompts.io],
        "p(S)": p[rows, prompts.s],
        "logit difference": gap,
    }
    found = {}
    for order in ("ABB", "BAB"):
        here = [i for i, this in enumerate(prompts.orders) if this == order]
        found[order] = {name: float(values[here].mean()) for name, values in each.items()}
    return found


@torch.no_grad()
def name_probabilities(model: LanguageModel, prompts: Prompts) -> dict[str, float]:
    """Mean probability of each name after "A and B …, C gave … to", with three different names.

    The sentences are those of `prompts.others`; the names are called by the role (IO, S1, S2) of
    the name that they replace.
    """
    rows = prompts.others.flatten(0, 1)
    _, cache = model.run_with_cache(rows, "resid_final", model.n_layers, pos=-1)
    p = model.unembed(cache["resid_final"]).float().softmax(-1)
    k = prompts.others.shape[1]
    found = {}
    for role in ("IO", "S1", "S2"):
        at = prompts.at(role).repeat_interleave(k)
        name = rows.gather(1, at[:, None])
        found[role] = float(p.gather(1, name).mean())
    return found


# ------------------------------------------------------------------------------------------ metrics


def io_less_s(prompts: Prompts) -> Tensor:
    """IO 1, S -1: which of the two names. The logit difference of Wang et al. 2022."""
    return prompts.one_hot(prompts.io) - prompts.one_hot(prompts.s)


def both_less_others(prompts: Prompts) -> Tensor:
    """IO and S 1/2 each, all other names -1 in total: one of the two, and nobody else."""
    both = prompts.one_hot(prompts.io) + prompts.one_hot(prompts.s)
    return both / 2 - (1 - both) / (len(prompts.names) - 2)


def io_less_others(prompts: Prompts) -> Tensor:
    """IO 1, all other names, S among them, -1 in total."""
    right = prompts.one_hot(prompts.io)
    return right - (1 - right) / (len(prompts.names) - 1)


METRICS: dict[str, Callable[[Prompts], Tensor]] = {  # weights of the names' logits, (n, n_names)
    "IO - S": io_less_s,
    "both - others": both_less_others,
    "IO - others": io_less_others,
}
ABLATIONS = {"mean": Mean(), "resample": Resample(), "zero": Zero()}


# -------------------------------------------------------------------------------- nodes and their F


def to_nodes(mask: Tensor) -> set[Node]:
    """A mask (n_layers, n_heads, roles) as nodes."""
    return {(layer, head, ROLES[role]) for layer, head, role in mask.nonzero().tolist()}


def node_name(node: Node) -> str:
    """(3, 1, "END") -> "L3H1 at END"."""
    return f"{head_name(node[:2])} at {node[2]}"


class Task:
    """One metric F on one batch of prompts, for the model and for any circuit in it.

    F is a weighted sum of the names' logits at END, averaged over the prompts. F(circuit) is F with
    every node outside the circuit ablated. What does not depend on a circuit is computed once.

    Args:
        metric: a key of `METRICS`.
        ablation: what a node outside the circuit becomes. Its reference is the sentence with other
            names: `Mean()` over them, `Resample()`, the first of them, or `Zero()`.

    Raises:
        ModelError: no such metric or ablation.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        metric: str = "IO - others",
        ablation: Zero | Mean | Resample = ABLATIONS["mean"],
    ):
        if metric not in METRICS:
            raise ModelError(f"There is no metric {metric!r}: choose one of {', '.join(METRICS)}.")
        if ablation not in ABLATIONS.values():
            known = ", ".join(map(str, ABLATIONS.values()))
            raise ModelError(f"{ablation!r} is no ablation here: choose one of {known}.")
        self.model, self.prompts, self.ablation = model, prompts, ablation
        self.weights = METRICS[metric](prompts)  # (n, n_names)
        self.shape = (model.n_layers, model.n_heads, len(ROLES))
        self.role = prompts.role.clamp(min=0)
        self.first = prompts.role < 0  # the first token is never ablated

    def nodes(self) -> set[Node]:
        """All of them: the whole model."""
        return to_nodes(torch.ones(self.shape, dtype=torch.bool))

    @cached_property
    def ablated(self) -> dict[int, Tensor]:
        """{layer: the z that a node outside the circuit gets, (n, pos, n_heads, d_head)}."""
        if isinstance(self.ablation, Zero):
            return {i: torch.zeros_like(self.intact["z", i]) for i in range(self.model.n_layers)}
        others = self.prompts.others
        others = others if isinstance(self.ablation, Mean) else others[:, :1]
        found = record(self.model, others.flatten(0, 1), "z")
        return {i: z.unflatten(0, others.shape[:2]).mean(1) for (_, i), z in found.items()}

    @cached_property
    def intact(self) -> Cache:
        """The model's own run."""
        sites = ["embed", "resid_pre", "pattern", "z", "attn_out", "mlp_out", "resid_final"]
        stop = self.model.n_layers
        with torch.no_grad():
            return self.model.run_with_cache(self.prompts.ids, sites, stop_at_layer=stop)[1]

    def mask(self, nodes: Iterable[Node] | Tensor) -> Tensor:
        """Nodes as booleans (n_layers, n_heads, roles)."""
        if isinstance(nodes, Tensor):
            return nodes
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.model.device)
        for layer, head, role in nodes:
            mask[layer, head, ROLES.index(role)] = True
        return mask

    def hooks(self, circuit: Iterable[Node] | Tensor) -> dict:
        """Hooks that ablate every node outside the circuit."""
        keep, instead = self.mask(circuit), self.ablated

        def ablate(layer: int):
            kept = keep[layer][:, self.role].permute(1, 2, 0) | self.first[..., None]

            def hook(z: Tensor) -> Tensor:
                return torch.where(kept[..., None], z, instead[layer])

            return hook

        cut = (~keep).flatten(1).any(1).tolist()
        return {("z", layer): ablate(layer) for layer, some in enumerate(cut) if some}

    @torch.no_grad()
    def final(self, circuit: Iterable[Node] | Tensor) -> Tensor:
        """The last stream at END, (n, d_model): run from the first layer with an ablated node."""
        hooks, stream = self.hooks(circuit), self.intact["resid_pre"]
        if not hooks:
            return self.intact["resid_final"][:, -1]
        start = min(layer for _, layer in hooks)
        with self.model.hooks(hooks):
            end = self.model.n_layers
            return self.model.run_from_layer(stream[start], start, stop_at_layer=end)[:, -1]

    def metric(self, logits: Tensor) -> Tensor:
        """Logits at END (..., n, d_vocab) -> the mean metric (...,): what patching takes."""
        return (logits[..., self.prompts.names].float() * self.weights).sum(-1).mean(-1)

    def F(self, circuit: Iterable[Node] | Tensor) -> float:
        """The circuit's mean metric."""
        return float(self.metric(self.model.unembed(self.final(circuit))))

    def first_choice(self, circuit: Iterable[Node] | Tensor) -> float:
        """Share of the prompts where IO has the highest logit of the vocabulary."""
        choice = self.model.unembed(self.final(circuit)).argmax(-1)
        return float((choice == self.prompts.io).float().mean())

    @cached_property
    def full(self) -> float:
        """F(model)."""
        return self.F(self.nodes())

    def faithfulness(self, circuit: Iterable[Node] | Tensor) -> float:
        """F(circuit) / F(model): 1 when the circuit does by itself what the model does."""
        return self.F(circuit) / self.full

    def effects(self) -> Tensor:
        """F(model) - F(model without one node), (n_layers, n_heads, roles); above 0, it helps."""
        found, every = torch.zeros(self.shape), self.nodes()
        for layer, head, role in every:
            at = (layer, head, ROLES.index(role))
            found[at] = self.full - self.F(every - {(layer, head, role)})
        return found

    # ---- direct effects: what is written to the stream at END, read by the unembedding alone

    def direction(self, final: Tensor) -> Tensor:
        """v (n, d_model), float64: a part x of the stream adds x · v to the metric, before the
        soft-cap, with the final norm frozen at the stream `final`."""
        u = self.weights.double() @ self.model.W_U[:, self.prompts.names].T.double()
        return stream_direction(self.model, final, u)

    @torch.no_grad()
    def parts(self, circuit: Iterable[Node] | Tensor | None = None) -> dict[str, Tensor]:
        """What each part writes at END, {name: (n, d_model)}, float64.

        The parts are embeddings, heads (through the norm after attention), the output bias of
        attention where there is one, and MLPs; "stream" is their sum.
        """
        hooks = {} if circuit is None else self.hooks(circuit)
        sites, end = ["embed", "z", "mlp_out", "resid_final"], self.model.n_layers
        sites += ["pos_embed"] if self.model.layout.pos_embed else []
        with self.model.hooks(hooks):
            _, cache = self.model.run_with_cache(self.prompts.ids, sites, stop_at_layer=end, pos=-1)
        found = {"stream": cache["resid_final"].double(), "embed": cache["embed"].double()}
        if "pos_embed" in sites:
            found["position"] = cache["pos_embed"].double().expand_as(found["embed"])
        for layer in range(self.model.n_layers):
            heads, bias = head_writes(self.model, cache["z", layer], layer)
            found |= {head_name((layer, h)): heads[:, h] for h in range(self.model.n_heads)}
            found |= {} if bias is None else {f"L{layer} attention bias": bias}
            found[f"L{layer} MLP"] = cache["mlp_out", layer].double()
        return found

    def direct(self, circuit: Iterable[Node] | Tensor | None = None) -> dict[str, float]:
        """Each part's direct effect on the metric, in logits, {name: mean over the prompts}."""
        parts = self.parts(circuit)
        v = self.direction(parts.pop("stream"))
        return {name: float((x * v).sum(-1).mean()) for name, x in parts.items()}
