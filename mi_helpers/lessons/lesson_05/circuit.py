"""The circuit of a task: found, tested and explained as in Wang et al. 2022.

    circuit = find_circuit(task)                     # {(layer, head, role), …}
    completeness(task, circuit, removals(groups, circuit, 8, seed=0))
    needed = minimality(task, circuit)               # {node: the change of each metric}
    jobs(circuit, attention_by_role(task), own)      # {node: its job}

`ioi.Task` measures any circuit, on both metrics.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_helpers.heads import Head, effective_embedding, head_name, writing
from mi_helpers.layouts import norm_gain
from mi_helpers.lessons.lesson_05.ioi import METRICS, NAMED, ROLES, Node, Task, to_nodes
from mi_helpers.models import LanguageModel
from mi_helpers.paths import path_patch, path_patch_map

# --------------------------------------------------------------------------------------- the search


LEAST = 0.01  # a node whose loss is less than this is none of the circuit's


def find_circuit(task: Task, within: float = 0.07) -> set[Node]:
    """A small circuit that does what the model does: `task.error` stays within `within`.

    The error is of single texts, so that a circuit cannot be right on average alone.

    1. Sort the nodes by a first-order estimate of their effects, and drop as many of the smallest
       as the bound allows; estimate again in what is left, and repeat until none can go.
    2. Drop the nodes that are left one by one, the least important first, as long as the bound
       holds, or the error grows by less than `LEAST`; repeat until no single node can be dropped.

    Source: the estimate is attribution patching (Nanda 2023; Syed et al. 2023), the loop that of
    ACDC (Conmy et al. 2023).
    """
    keep = task.mask(task.nodes())
    while True:
        effects = estimates(task, keep)
        order = effects.masked_fill(~keep, torch.inf).flatten().argsort()[: int(keep.sum())]
        low, high = 0, len(order)  # `low` can go, `high` cannot
        while high - low > 1:
            middle = (low + high) // 2
            fits = task.error(_without(keep, order[:middle])) <= within
            low, high = (middle, high) if fits else (low, middle)
        keep = _without(keep, order[:low])
        if low < 4:
            return to_nodes(prune(task, keep, within))


def estimates(task: Task, keep: Tensor) -> Tensor:
    """By how much, to first order, each node that is kept changes either metric when it goes, as a
    share of the model's; (n_layers, n_heads, roles)."""
    with torch.enable_grad():
        gate = keep.float().clone().requires_grad_()
        with task.model.hooks(task.hooks(gate)):
            stream = task.intact["resid_pre"][0].detach()
            final = task.model.run_from_layer(stream, 0, stop_at_layer=task.model.n_layers)[:, -1]
        share = task.metric(task.model.unembed(final)) / task.full
        found = [torch.autograd.grad(x, gate, retain_graph=True)[0] for x in share]
    return torch.stack(found).abs().amax(0)


def prune(task: Task, keep: Tensor, within: float) -> Tensor:
    """Step 2 of `find_circuit`: afterwards no single node can be dropped."""
    while keep.any():
        now = task.error(keep)
        places = keep.flatten().nonzero()[:, 0]
        order = sorted(places, key=lambda at: task.error(_without(keep, at)))
        before = keep
        for at in order:
            trial = _without(keep, at)
            if (then := task.error(trial)) <= max(within, now + LEAST):
                keep, now = trial, then
        if torch.equal(before, keep):
            break
    return keep


def _without(mask: Tensor, places: Tensor) -> Tensor:
    """A mask without some of its places, which are indices into the flat mask."""
    flat = mask.flatten().clone()
    flat[places] = False
    return flat.view_as(mask)


def random_circuits(task: Task, circuit: Iterable[Node], count: int, seed: int = 0) -> list:
    """`count` random sets of nodes, with as many at each role as the circuit has: the control.

    It is a harder one than sets of equal size from anywhere, most of which touch no name at all.
    """
    rng, every, circuit = random.Random(seed), sorted(task.nodes()), list(circuit)
    sizes = {role: sum(node[2] == role for node in circuit) for role in ROLES}
    pools = {role: [node for node in every if node[2] == role] for role in ROLES}
    return [
        {node for role, size in sizes.items() for node in rng.sample(pools[role], size)}
        for _ in range(count)
    ]


# ------------------------------------------------------------------- completeness and minimality


def removals(
    groups: Mapping[str, Iterable[Node]], circuit: Iterable[Node], count: int, seed: int
) -> dict[str, set[Node]]:
    """Sets K of circuit nodes to remove, {name: nodes}: each group, and `count` random subsets."""
    rng, nodes = random.Random(seed), sorted(circuit)
    found = {name: set(group) & set(nodes) for name, group in groups.items()}
    for i in range(count):
        found[f"random {i}"] = {node for node in nodes if rng.random() < 0.5}
    return {name: K for name, K in found.items() if K}


def completeness(
    task: Task, circuit: set[Node], sets: Mapping[str, set[Node]]
) -> dict[str, dict[str, tuple[float, float]]]:
    """{metric: {name of K: (F(model without K), F(circuit without K))}}, as shares of F(model).

    A complete circuit has all that the model can fall back on, so the two are equal for every K.
    Source: Wang et al. 2022, section 4.2.
    """
    every, found = task.nodes(), {metric: {} for metric in METRICS}
    for name, K in sets.items():
        both = task.faithfulness(every - K), task.faithfulness(circuit - K)
        for metric, *pair in zip(METRICS, *(each.tolist() for each in both), strict=True):
            found[metric][name] = tuple(pair)
    return found


def minimality(task: Task, circuit: set[Node]) -> dict[Node, Tensor]:
    """{node: by how much each metric changes when it alone leaves the circuit, (2,), as a share}.

    A node that changes neither does not belong. Source: Wang et al. 2022, section 4.3, with K = {}.
    """
    whole = task.faithfulness(circuit)
    return {v: (task.faithfulness(circuit - {v}) - whole).abs() for v in sorted(circuit)}


def overlap(a: set[Node], b: set[Node]) -> float:
    """The share of the nodes of either circuit that are in both (Jaccard)."""
    return len(a & b) / len(a | b) if a | b else 1.0


# --------------------------------------------------------------------------- what the heads do here

FIRST = ("IO", "S1")  # the two first mentions
RELAYS = ("END-2", "END-1")
LOOKS = {  # from: to; the attention that is measured
    "S1+1": ("S1",),
    "IO": ("S1", "S2"),
    "S1": ("IO",),
    "S2": ("S1", "S1+1", "IO"),
    "END-2": ("IO", "S1", "S2"),
    "END-1": ("IO", "S1", "S2"),
    "END": (*FIRST, "S2", *RELAYS),
}
JOBS = {  # what a head does at a role, by where it looks there and whether it copies
    "previous token": "at the word after S1, looks at S1",
    "duplicate token": "at S2, looks at S1: this name has been there",
    "induction": "at S2, looks at the word after S1: the same by another route",
    "other name": "at a name, looks at an earlier one of somebody else",
    "S-inhibition": "at END, looks at S2",
    "name mover": "at END, looks at first mentions, and copies",
    "negative name mover": "at END, looks at first mentions, and suppresses",
    "relay": "at a word before END, looks at a name",
    "relay reader": "at END, above layer 0, looks at such a word",
    "other": "none of these",
}


def attention_by_role(task: Task) -> dict[tuple[str, str], Tensor]:
    """Mean attention from one role to another, {(from, to): (n_layers, n_heads)}."""
    pattern, prompts = task.intact["pattern"], task.prompts  # (layers, n, heads, q, k)
    rows, by_row = torch.arange(len(prompts), device=pattern.device), pattern.transpose(0, 1)
    at = {role: prompts.at(role) for role in ROLES[:-1]}
    return {
        (q, k): by_row[rows, :, :, at[q], at[k]].mean(0) for q, each in LOOKS.items() for k in each
    }


def jobs(
    nodes: Iterable[Node],
    looks: Mapping[tuple[str, str], Tensor],
    own: Tensor,
    least: float = 0.25,
) -> dict[Node, str]:
    """{(layer, head, role): its job of `JOBS`}: by where it looks most, if that is `least` or more.

    Args:
        looks: `attention_by_role`.
        own: (n_layers, n_heads), the "own" score of `heads.copying` for the names' tokens: above 0
            a head copies the name that it looks at.
    """

    def job(layer: int, head: int, role: str) -> str:
        seen = {to: float(looks[role, to][layer, head]) for to in LOOKS.get(role, ())}
        if role == "END":
            seen["first"] = seen.pop("IO") + seen.pop("S1")
        place = max(seen, key=lambda to: seen[to], default=None)
        if place is None or seen[place] < least:
            return "other"
        if role == "END":
            mover = "name mover" if own[layer, head] > 0 else "negative name mover"
            reader = "relay reader" if layer else "other"
            return {"first": mover, "S2": "S-inhibition"}.get(place, reader)
        if role in NAMED:
            same = role == "S2" and place == "S1"
            return "duplicate token" if same else "induction" if place == "S1+1" else "other name"
        return "previous token" if role == "S1+1" else "relay"

    return {node: job(*node) for node in sorted(nodes)}


def by_job(given: Mapping[Node, str]) -> dict[str, set[Node]]:
    """{job: its nodes}, in the order of `JOBS`."""
    groups = {job: {node for node, each in given.items() if each == job} for job in JOBS}
    return {job: nodes for job, nodes in groups.items() if nodes}


def name_circuit(model: LanguageModel, head: Head, ids: Tensor) -> tuple[Tensor, ...]:
    """What decides whether a head copies names: E (names, d_model), what it reads at each; W_V, W_O
    with the gain of the norm after attention; U (d_model, names), with the final norm's gain."""
    layer, h = head
    E = model.part("ln1", layer)(effective_embedding(model, ids, min(layer, 1))).float()
    W_V = model.weight("W_V", layer)[h * model.n_kv_heads // model.n_heads].float()
    U = norm_gain(model.ln_final).float()[:, None] * model.W_U[:, ids].float()
    return E, W_V, writing(model, layer)[h], U


# ------------------------------------------------------------------------------------ path patches


def path_share(task: Task, patched: Tensor) -> Tensor:
    """How far a path carries IO - S over to the swapped text: 0 not at all, 1 all of it.

    Args:
        patched: the metrics under a path patch, (..., 2).
    """
    _, there = (task.metric(x) for x in _last_logits(task))
    return (task.full[0] - patched[..., 0]) / (task.full[0] - there[0])


def _last_logits(task: Task) -> tuple[Tensor, Tensor]:
    """The logits at END of the texts and of the swapped ones, (n, d_vocab) each."""
    with torch.no_grad():
        return tuple(task.model(ids)[:, -1] for ids in (task.prompts.ids, task.prompts.swapped))


def senders(
    task: Task, receivers: Sequence | str, freeze_mlps: bool = False
) -> tuple[Tensor, float]:
    """What the paths from every head, and from the words themselves, to some receivers carry of
    who comes twice, as `path_share`.

    Args:
        receivers: as in `paths.path_patch`.
        freeze_mlps: True: straight paths alone; False: MLPs between are recomputed, as Wang et al.
            do.

    Returns:
        (n_layers, n_heads), and the embedding's.
    """
    clean, swapped, through = task.prompts.ids, task.prompts.swapped, not freeze_mlps
    given = (task.model, clean, swapped)
    by_head = path_patch_map(*given, receivers, task.metric, "noise", through)
    straight = path_patch(*given, ["embed"], receivers, task.metric, "noise", through)
    return path_share(task, by_head), float(path_share(task, straight))


# -------------------------------------------------------------------------------------- self-repair


@dataclass(frozen=True)
class Repair:
    """What happens to a metric when nodes are removed, before the soft-cap, in logits:

        after = before + own + Σ others + norm, exactly.

    Attributes:
        before, after: the metric with and without the nodes.
        own: the change of their heads' direct effect.
        others: {part: the change of its direct effect}.
        norm: the effect of the final norm's new scale.
    """

    before: float
    after: float
    own: float
    others: dict[str, float]
    norm: float


def repair(task: Task, removed: Iterable[Node], metric: str = METRICS[0]) -> Repair:
    """Remove nodes from the model, and measure all parts' direct effects before and after.

    Source: Wang et al. 2022, backup name mover heads; McGrath et al. 2023, The Hydra Effect.
    """
    start, removed = task.nodes(), set(removed)
    one, two = task.parts(start), task.parts(start - removed)
    v, w = (task.direction(each["stream"], metric) for each in (one, two))

    def effect(x: Tensor, direction: Tensor) -> float:
        return float((x * direction).sum(-1).mean())

    gained = {name: effect(two[name] - one[name], v) for name in one if name != "stream"}
    gone = {head_name(node[:2]) for node in removed}
    return Repair(
        effect(one["stream"], v),
        effect(two["stream"], w),
        sum(gained[name] for name in gone),
        {name: x for name, x in gained.items() if name not in gone},
        effect(two["stream"], w - v),
    )
