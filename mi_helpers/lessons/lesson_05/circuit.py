"""The circuit of a task: found, tested and explained as in Wang et al. 2022.

    circuit = find_circuit(task)                     # {(layer, head, role), …}
    completeness(task, circuit, removals(groups, circuit, 8, seed=0))
    minimality(task, circuit)
    jobs(attention_by_role(task), own, relayed)      # {node: its job}

`ioi.Task` measures any circuit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_helpers.heads import Head, head_name
from mi_helpers.lessons.lesson_05.ioi import ROLES, Node, Task, to_nodes
from mi_helpers.paths import path_patch, path_patch_map, receivers_of

# --------------------------------------------------------------------------------------- the search


def find_circuit(task: Task, step: float = 0.01, within: float = 0.1) -> set[Node]:
    """A small circuit that does what the model does: |F(circuit) - F(model)| <= within * F(model).

    1. From the last layer to the first, drop sets of nodes whose removal changes F by at most
       `step` of F(model); halve a set that changes it more, down to single nodes.
    2. Drop the nodes that are left one by one, the least important first, as long as F stays within
       the bound; repeat until none can be dropped.

    Source: the order, from output to input, is that of ACDC (Conmy et al. 2023).
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


def random_circuits(
    task: Task, circuit: Iterable[Node], count: int, seed: int = 0, same_roles: bool = False
) -> list[set[Node]]:
    """`count` random sets of as many nodes as the circuit has: the control.

    Args:
        same_roles: draw as many nodes at each role as the circuit has there, a harder control.
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
) -> dict[str, tuple[float, float]]:
    """{name of K: (F(model without K), F(circuit without K))}, both as shares of F(model).

    A complete circuit has all that the model can fall back on, so the two are equal for every K.
    Source: Wang et al. 2022, section 4.2.
    """
    every = task.nodes()
    return {
        name: (task.faithfulness(every - K), task.faithfulness(circuit - K))
        for name, K in sets.items()
    }


def minimality(
    task: Task, circuit: set[Node], sets: Mapping[str, set[Node]] | None = None
) -> dict[Node, float]:
    """{node v: the change of F when v leaves the circuit, as a share of F(model)}:

        the largest |F(circuit without K and v) - F(circuit without K)| over K = {} and `sets`.

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
    """The share of the nodes of either circuit that are in both (Jaccard)."""
    return len(a & b) / len(a | b) if a | b else 1.0


# --------------------------------------------------------------------------- what the heads do here


LOOKS = (  # (from, to): the attention that is measured
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


JOBS = {  # in order of precedence: the role at which a head has the job, and what it is
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
    """The heads that bring the giver's name to END-2: the couriers of `jobs`."""
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


# -------------------------------------------------------------------------------------- self-repair


@dataclass(frozen=True)
class Repair:
    """What happens to the metric when nodes are removed, before the soft-cap, in logits:

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

    @property
    def repaired(self) -> float:
        """Share of the lost direct effect that the rest makes up for: 0 none, 1 all of it, negative
        when the rest loses as well; NaN when nothing was lost."""
        return 1 - (self.before - self.after) / -self.own if self.own else math.nan


def repair(task: Task, removed: Iterable[Node], within: Iterable[Node] | None = None) -> Repair:
    """Remove nodes, and measure the direct effects of all other parts before and after.

    Args:
        within: the nodes that are there before; by default the whole model.

    Source: Wang et al. 2022, backup name mover heads; McGrath et al. 2023, The Hydra Effect.
    """
    start, removed = set(task.nodes() if within is None else within), set(removed)
    one, two = task.parts(start), task.parts(start - removed)
    v, w = task.direction(one["stream"]), task.direction(two["stream"])

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


# ------------------------------------------------------------------------------ paths to the answer


def path_shares(
    task: Task,
    receivers: Sequence | str = "logits",
    through_mlps: bool = False,
    senders: str = "heads",
) -> Tensor:
    """The share of F(model) that each sender's path to the receivers carries:

        1 - F with that path patched from the sentence with other names / F(model)

    Args:
        receivers, through_mlps, senders: as in `path_patch_map`.

    Returns:
        (n_layers, n_heads), or (n_layers,) for senders "mlp".
    """
    clean, corrupted = task.prompts.ids, task.prompts.others[:, 0]
    patched = path_patch_map(
        task.model, clean, corrupted, receivers, task.metric, "noise", through_mlps, senders
    )
    return 1 - patched / task.full


def inputs(task: Task, heads: Iterable[Head]) -> dict[str, dict[str, float]]:
    """Where the queries, keys and values of some heads get the names from, by path patching.

    Returns:
        {"q": {"embedding": share of F, "best head": …, "best MLP": …}, "k": …, "v": …}.
    """
    clean, corrupted, found = task.prompts.ids, task.prompts.others[:, 0], {}
    for site in "qkv":
        receivers = receivers_of(task.model, heads, site)
        straight = path_patch(
            task.model, clean, corrupted, ["embed"], receivers, task.metric, "noise"
        )
        found[site] = {
            "embedding": float(1 - straight / task.full),
            "best head": float(path_shares(task, receivers).max()),
            "best MLP": float(path_shares(task, receivers, senders="mlp").max()),
        }
    return found
