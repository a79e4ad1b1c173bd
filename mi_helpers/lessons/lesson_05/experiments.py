"""Indirect objects: the circuit that says who receives, found and tested as in Wang et al. 2022.

    prompts = make_prompts(model, n=24, seed=0)      # pairs of names that were never trained on
    task = Task(model, prompts, "IO - others")       # the metric
    circuit = find_circuit(task)                     # {(layer, head, role), …}
    task.faithfulness(circuit)                       # 1: it does by itself what the model does

A *node* is a head at one role of the sentence, (layer, head, role). A circuit is a set of nodes.
What is not in it is mean-ablated: replaced by its mean over the same sentence with three other
names (ABC), which tells nothing about who is who. MLPs always stay in, and read what the circuit
writes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from mi_helpers.attribution import head_writes, stream_direction
from mi_helpers.heads import Head, head_name, key_heads, reference_z
from mi_helpers.hooks import Cache
from mi_helpers.layouts import ModelError
from mi_helpers.lessons.shared import documents, token_at
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.patching import path_patch, path_patch_map
from mi_helpers.tinyworld import lexicon

ROLES = ("IO", "S1", "S1+1", "S2", "END-2", "END", "elsewhere")
Node = tuple[int, int, str]  # layer, head, role

# ---------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class Prompts:
    """n sentences up to the word before the receiver, all of the same number of tokens.

    ids     (n, pos); END is the last position
    others  (n, k, pos): the same sentences, each with three other names (A, B and C, all different)
    role    (n, pos), an index into `ROLES`; the first token, which never changes, has -1
    io, s   (n,): the ids of the receiver's name and of the giver's
    names   ids of all names that occur in the world, (n_names,)
    orders  n times "ABB" (the receiver is named first) or "BAB"
    texts   n sentences with their answer, as they were written
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
    """n of TinyWorld's sentences with an indirect object, half ABB, half BAB, on pairs of names
    that are held out of training.

    Only sentences in which all names follow a space, so that a name is the same token everywhere,
    and only those of the commonest length, so that they make one batch.

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

    def stack(key: str) -> Tensor:
        return torch.tensor([row[key] for row in chosen], device=model.device)

    return Prompts(
        stack("ids"),
        torch.tensor(made, device=model.device),
        stack("role"),
        stack("io"),
        stack("s"),
        torch.tensor(sorted(single.values()), device=model.device),
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
    """k copies of a prompt in which IO, S1 and S2 are three different names that it has not."""
    places = [row["role"].index(ROLES.index(role)) for role in ("IO", "S1", "S2")]
    free = [name for name in names if name not in (row["io"], row["s"])]
    copies = []
    for _ in range(k):
        ids = list(row["ids"])
        for place, name in zip(places, rng.sample(free, 3), strict=True):
            ids[place] = name
        copies.append(ids)
    return copies


# ---------------------------------------------------------------------------------------- metrics


def which(prompts: Prompts) -> Tensor:
    """IO 1, S -1: which of the two. Wang et al. 2022's logit difference."""
    return prompts.one_hot(prompts.io) - prompts.one_hot(prompts.s)


def who(prompts: Prompts) -> Tensor:
    """IO and S 1/2 each, all other names together -1: one of the two, rather than somebody else."""
    both = prompts.one_hot(prompts.io) + prompts.one_hot(prompts.s)
    return both / 2 - (1 - both) / (len(prompts.names) - 2)


def answer(prompts: Prompts) -> Tensor:
    """IO 1, all other names together -1, S among them."""
    right = prompts.one_hot(prompts.io)
    return right - (1 - right) / (len(prompts.names) - 1)


METRICS: dict[str, Callable[[Prompts], Tensor]] = {  # weights of the names' logits, (n, n_names)
    "IO - S": which,
    "both - others": who,
    "IO - others": answer,
}
ABLATIONS = ("mean", "resample", "zero")


# ------------------------------------------------------------------------------- circuits, their F


class Task:
    """One metric F on one batch of prompts, for the model and for any circuit in it.

    F is a weighted sum of the names' logits at END, averaged over the prompts. F(circuit) is F with
    every node outside the circuit mean-ablated. What depends on no circuit is computed once.

    Args:
        metric: a key of `METRICS`.
        ablate: what a node outside the circuit becomes: "mean" over the sentence with other names,
            "resample", the first of them, or "zero".
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        metric: str = "IO - others",
        ablate: str = "mean",
    ):
        if metric not in METRICS:
            raise ModelError(f"There is no metric {metric!r}: choose one of {', '.join(METRICS)}.")
        if ablate not in ABLATIONS:
            raise ModelError(f"{ablate!r} is no ablation: choose one of {', '.join(ABLATIONS)}.")
        self.model, self.prompts, self.ablate = model, prompts, ablate
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
        if self.ablate == "zero":
            return {i: torch.zeros_like(self.intact["z", i]) for i in range(self.model.n_layers)}
        others = self.prompts.others if self.ablate == "mean" else self.prompts.others[:, :1]
        n, k, _ = others.shape
        found = reference_z(self.model, others.flatten(0, 1))
        return {layer: z.unflatten(0, (n, k)).mean(1) for layer, z in found.items()}

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
        """F(model) - F(model without one node), (n_layers, n_heads, roles): above 0, it helps."""
        found, every = torch.zeros(self.shape), self.nodes()
        for layer, head, role in every:
            at = (layer, head, ROLES.index(role))
            found[at] = self.full - self.F(every - {(layer, head, role)})
        return found

    # ---- direct effects: what is written to the stream at END, read by the unembedding alone

    def direction(self, final: Tensor) -> Tensor:
        """v (n, d_model), float64: a part of the stream x adds x · v to the metric, before the
        soft-cap, with the final norm frozen at the stream `final`."""
        u = self.weights.double() @ self.model.W_U[:, self.prompts.names].T.double()
        return stream_direction(self.model, final, u)

    @torch.no_grad()
    def parts(self, circuit: Iterable[Node] | Tensor | None = None) -> dict[str, Tensor]:
        """What each part writes at END, {name: (n, d_model)}: embeddings, heads (with the norm
        after attention), the output bias of attention where there is one, MLPs; and "stream", their
        sum."""
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
        """What each part adds to the metric directly, in logits, {name: mean over the prompts}."""
        parts = self.parts(circuit)
        v = self.direction(parts.pop("stream"))
        return {name: float((x * v).sum(-1).mean()) for name, x in parts.items()}


# --------------------------------------------------------------------------------- the search


def find_circuit(task: Task, step: float = 0.01, within: float = 0.1) -> set[Node]:
    """A small circuit that does what the model does: |F(circuit) - F(model)| <= within * F(model).

    1. From the last layer to the first, drop sets of nodes whose removal changes F by at most
       `step` of F(model); a set that changes more is halved, down to single nodes.
    2. Try to drop the nodes that are left one after the other, the least important first, as long
       as F stays `within` bounds; again, until none can be dropped.

    The order, from output to input, is that of ACDC (Conmy et al. 2023); nodes are heads at roles.
    """
    keep, now = task.mask(task.nodes()), task.full
    for layer in reversed(range(task.model.n_layers)):
        waiting = [[(layer, h, r) for r in range(len(ROLES)) for h in range(task.shape[1])]]
        while waiting:
            some = waiting.pop()
            trial = _without(keep, some)
            value = task.F(trial)
            if abs(value - now) <= step * abs(task.full):
                keep, now = trial, value
            elif len(some) > 1:
                waiting += [some[: len(some) // 2], some[len(some) // 2 :]]
    return to_nodes(prune(task, keep, within))


def prune(task: Task, keep: Tensor, within: float) -> Tensor:
    """Step 2 of `find_circuit`: afterwards no single node can be dropped."""

    def off(mask: Tensor) -> float:
        return abs(task.faithfulness(mask) - 1)

    while True:
        nodes = [tuple(at) for at in keep.nonzero().tolist()]
        order = sorted(nodes, key=lambda at: off(_without(keep, [at])))
        before = keep
        for at in order:
            trial = _without(keep, [at])
            keep = trial if off(trial) <= within else keep
        if torch.equal(before, keep):
            return keep


def _without(mask: Tensor, places: Sequence[tuple]) -> Tensor:
    mask = mask.clone()
    mask[tuple(torch.tensor(places).T)] = False
    return mask


def to_nodes(mask: Tensor) -> set[Node]:
    """A mask (n_layers, n_heads, roles) as nodes."""
    return {(layer, head, ROLES[role]) for layer, head, role in mask.nonzero().tolist()}


def node_name(node: Node) -> str:
    """(3, 1, "END") -> "L3H1 at END"."""
    return f"{head_name(node[:2])} at {node[2]}"


def random_circuits(
    task: Task, circuit: Iterable[Node], count: int, seed: int = 0, same_roles: bool = False
) -> list[set[Node]]:
    """`count` random sets of as many nodes as the circuit has: the control.

    same_roles  the harder control: as many nodes at each role as the circuit has there
    """
    rng, every, circuit = random.Random(seed), sorted(task.nodes()), list(circuit)
    if not same_roles:
        return [set(rng.sample(every, len(circuit))) for _ in range(count)]
    sizes = {role: sum(node[2] == role for node in circuit) for role in ROLES}
    pools = {role: [node for node in every if node[2] == role] for role in ROLES}
    return [
        {node for role, size in sizes.items() for node in rng.sample(pools[role], size)}
        for _ in range(count)
    ]


# ------------------------------------------------------------------- completeness and minimality


def removals(groups: Mapping[str, Iterable[Node]], circuit: Iterable[Node], count: int, seed: int):
    """Sets K of circuit nodes to take away, {name: nodes}: each group, `count` random subsets."""
    rng, nodes = random.Random(seed), sorted(circuit)
    found = {name: set(group) & set(nodes) for name, group in groups.items()}
    for i in range(count):
        found[f"random {i}"] = {node for node in nodes if rng.random() < 0.5}
    return {name: K for name, K in found.items() if K}


def completeness(
    task: Task, circuit: set[Node], sets: Mapping[str, set[Node]]
) -> dict[str, tuple[float, float]]:
    """{name of K: (F(model without K), F(circuit without K))}, both as shares of F(model).

    A complete circuit has whatever the model can fall back on, so the two are equal for every K.
    Source: Wang et al. 2022, section 4.2.
    """
    every = task.nodes()
    return {
        name: (task.faithfulness(every - K), task.faithfulness(circuit - K))
        for name, K in sets.items()
    }


def incompleteness(pairs: Mapping[str, tuple[float, float]]) -> float:
    """The largest |F(model without K) - F(circuit without K)| over the sets K, as a share."""
    return max(abs(model - circuit) for model, circuit in pairs.values())


def minimality(
    task: Task, circuit: set[Node], sets: Mapping[str, set[Node]] | None = None
) -> dict[Node, float]:
    """For each node v, how much F changes when it leaves the circuit, as a share of F(model): the
    largest |F(circuit without K and v) - F(circuit without K)| over K = nothing and the given sets.

    A node that never matters does not belong. Source: Wang et al. 2022, section 4.3.
    """
    values = {}
    for K in [set(), *(sets or {}).values()]:
        whole = task.faithfulness(circuit - K)
        for v in circuit - K:
            change = abs(task.faithfulness(circuit - K - {v}) - whole)
            values[v] = max(values.get(v, 0.0), change)
    return values


def overlap(a: set[Node], b: set[Node]) -> float:
    """Jaccard: how many of the nodes of either circuit are in both."""
    return len(a & b) / len(a | b) if a | b else 1.0


# -------------------------------------------------------------------------- what the heads do here

LOOKS = (  # (from, to): which attention is measured
    ("END", "IO"),
    ("END", "S1"),
    ("END", "S2"),
    ("END", "END-2"),
    ("END-2", "S2"),
    ("S2", "S1"),
    ("S2", "S1+1"),
    ("S1+1", "S1"),
)


def attention_by_role(task: Task) -> dict[tuple[str, str], Tensor]:
    """Mean attention from one role to another, {(from, to): (n_layers, n_heads)}."""
    pattern, prompts = task.intact["pattern"], task.prompts  # (layers, n, heads, q, k)
    rows = torch.arange(len(prompts), device=pattern.device)
    at = {role: prompts.at(role) for role in ROLES[:-1]}
    by_row = pattern.transpose(0, 1)
    return {(q, k): by_row[rows, :, :, at[q], at[k]].mean(0) for q, k in LOOKS}


JOBS = {  # in the order in which they are given: the role at which a head has it, and what it is
    "name mover": ("END", "attends to IO rather than S1, and copies"),
    "negative mover": ("END", "attends to IO rather than S1, and suppresses"),
    "candidates": ("END", "attends to IO and S1 alike, and copies: it brings both names"),
    "excluder": (
        "END",
        "attends to S2, or to what a courier has brought to END-2, and suppresses that name",
    ),
    "giver's reader": ("END", "attends to S2 and does not suppress (GPT-2: S-inhibition)"),
    "courier": ("END-2", "attends to S2, and copies: it brings the giver's name to this place"),
    "duplicate token": ("S2", "attends to S1"),
    "induction": ("S2", "attends to S1+1"),
    "previous token": ("S1+1", "attends to S1"),
}


def couriers(looks: Mapping[tuple[str, str], Tensor], own: Tensor, least: float = 0.3) -> list:
    """The heads that bring the giver's name to END-2, as `jobs` has it."""
    found = (looks["END-2", "S2"] >= least) & (own.to(looks["END-2", "S2"]) >= 1)
    return [tuple(head) for head in found.nonzero().tolist()]


def jobs(
    looks: Mapping[tuple[str, str], Tensor], own: Tensor, relayed: Tensor, least: float = 0.3
) -> dict[Node, str]:
    """{(layer, head, role): its job of `JOBS` there, by score thresholds}.

    Args:
        looks: `attention_by_role`.
        own: (n_layers, n_heads), the "own" score of `heads.copying` for the names' tokens: a head
            copies from 1 on and suppresses from -1 down (standard deviations of a row).
        relayed: the same for what `couriers` write; NaN counts as nothing.
        least: attention that counts; for two targets together, twice as much.
    """
    io, s1, s2, relay = (looks["END", role] for role in ("IO", "S1", "S2", "END-2"))
    own, relayed = own.to(io), relayed.to(io)
    rather = io - s1 >= least
    both = (io + s1 >= 2 * least) & ((io - s1).abs() < least)
    carries = torch.zeros_like(rather)
    for head in couriers(looks, own, least):
        carries[head] = True
    is_ = {
        "name mover": rather & (own >= 1),
        "negative mover": rather & (own <= -1),
        "candidates": both & (own >= 1),
        "excluder": ((s2 >= least) & (own <= -1)) | ((relay >= least) & (relayed <= -1)),
        "giver's reader": (s2 >= least) & (own > -1),
        "courier": carries,
        "duplicate token": looks["S2", "S1"] >= least,
        "induction": looks["S2", "S1+1"] >= least,
        "previous token": looks["S1+1", "S1"] >= least,
    }
    found: dict[Node, str] = {}
    for job, (role, _) in JOBS.items():
        for layer, head in is_[job].nonzero().tolist():
            found.setdefault((layer, head, role), job)
    return dict(sorted(found.items()))


def by_job(circuit: Iterable[Node], given: Mapping[Node, str]) -> dict[str, set[Node]]:
    """The circuit's nodes by their job; "no name" for the rest."""
    groups: dict[str, set[Node]] = {}
    for node in sorted(circuit):
        groups.setdefault(given.get(node, "no name"), set()).add(node)
    return groups


@torch.no_grad()
def says(model: LanguageModel, prompts: Prompts) -> dict[str, float]:
    """Mean probability of each name after "A and B …, C gave … to", three different names: those at
    IO's, S1's and S2's places, in the sentences of `prompts.others`."""
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


# ------------------------------------------------------------------------------------- self-repair


@dataclass(frozen=True)
class Repair:
    """What happens to the metric when nodes are removed, before the soft-cap, in logits.

    before, after  the metric with and without them
    own            what their heads' direct effect loses
    others         {part: how much its direct effect grows}
    norm           what the final norm's new scale adds

    after = before + own + Σ others + norm, exactly.
    """

    before: float
    after: float
    own: float
    others: dict[str, float]
    norm: float

    @property
    def repaired(self) -> float:
        """Share of the lost direct effect that the rest makes up for: 0 nothing, 1 all of it;
        negative when the rest loses as well; NaN when nothing was lost."""
        return 1 - (self.before - self.after) / -self.own if self.own else math.nan


def repair(task: Task, removed: Iterable[Node], within: Iterable[Node] | None = None) -> Repair:
    """Remove nodes, and see what the direct effects of all other parts do.

    within  the nodes that are there before; by default the whole model.

    Source: Wang et al. 2022, backup name mover heads; McGrath et al. 2023, The Hydra Effect.
    """
    start, removed = set(task.nodes() if within is None else within), set(removed)
    one, two = task.parts(start), task.parts(start - removed)
    v, w = task.direction(one["stream"]), task.direction(two["stream"])

    def adds(x: Tensor, along: Tensor) -> float:
        return float((x * along).sum(-1).mean())

    gained = {name: adds(two[name] - one[name], v) for name in one if name != "stream"}
    gone = {head_name(node[:2]) for node in removed}
    return Repair(
        adds(one["stream"], v),
        adds(two["stream"], w),
        sum(gained[name] for name in gone),
        {name: x for name, x in gained.items() if name not in gone},
        adds(two["stream"], w - v),
    )


# --------------------------------------------------------------------- behaviour, and paths to it


@torch.no_grad()
def behaviour(model: LanguageModel, prompts: Prompts) -> dict[str, dict[str, float]]:
    """{order: how often IO is the first choice, and above S; p(IO), p(S), logit difference}."""
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


def paths(
    task: Task,
    receivers: Sequence | str = "logits",
    through_mlps: bool = False,
    senders: str = "heads",
) -> Tensor:
    """Share of F(model) that hangs on the path from each sender to the receivers, (n_layers,
    n_heads), or (n_layers,) for MLPs: 1 - F with that path patched from other names / F(model)."""
    clean, corrupted = task.prompts.ids, task.prompts.others[:, 0]
    patched = path_patch_map(
        task.model, clean, corrupted, receivers, task.metric, "noise", through_mlps, senders
    )
    return 1 - patched / task.full


def inputs(task: Task, heads: Iterable[Head]) -> dict[str, dict[str, float]]:
    """Where the queries, keys and values of some heads get the names from, by path patching:
    {"q": {"embedding": share of F, "best head": …, "best MLP": …}, "k": …, "v": …}."""
    clean, corrupted, found = task.prompts.ids, task.prompts.others[:, 0], {}
    for site in "qkv":
        receivers = key_heads(task.model, heads, site)
        straight = path_patch(
            task.model, clean, corrupted, ["embed"], receivers, task.metric, "noise"
        )
        found[site] = {
            "embedding": float(1 - straight / task.full),
            "best head": float(paths(task, receivers).max()),
            "best MLP": float(paths(task, receivers, senders="mlp").max()),
        }
    return found


# ------------------------------------------------------------------------------- for the ledger


@cache
def _found() -> tuple[LanguageModel, set[Node]]:
    """The shipped model and the circuit found on its first prompts."""
    model = load_model("tiny-gemma")
    return model, find_circuit(Task(model, make_prompts(model, 24, seed=0)))


def _fresh(seed: int) -> Task:
    """Prompts on which the circuit was not searched for."""
    return Task(_found()[0], make_prompts(_found()[0], 24, seed=1 + seed))


def circuit_faithfulness(seed: int) -> float:
    """F(circuit) / F(model) on fresh prompts."""
    return _fresh(seed).faithfulness(_found()[1])


def circuit_first_choice(seed: int) -> float:
    """Share of fresh prompts where the circuit alone says the receiver."""
    return _fresh(seed).first_choice(_found()[1])


def random_faithfulness(seed: int, count: int = 10) -> float:
    """The mean faithfulness of random circuits of equal size."""
    task = _fresh(seed)
    circuits = random_circuits(task, _found()[1], count, seed)
    return sum(map(task.faithfulness, circuits)) / count


def least_needed(seed: int) -> float:
    """Minimality: how much F changes, as a share, when the least important node leaves."""
    return min(minimality(_fresh(seed), _found()[1]).values())


def giver_named(seed: int) -> float:
    """Probability of the giver, in sentences with three names where nobody is named twice."""
    model, _ = _found()
    return says(model, make_prompts(model, 24, seed=1 + seed))["S2"]
