"""Who receives? Sentences in which repetition is the only cue, and what a circuit makes of them.

    prompts = make_prompts(model, n=24, seed=0)      # pairs of names that were never trained on
    task = Task(model, prompts)
    task.faithfulness(nodes)                         # (IO - S, IO - others): 1 is the model's

A *node* is a head at one role of the sentence, (layer, head, role). A circuit is a set of nodes.
Every node outside it is ablated, by default to its mean over the same text in which each mention
has another name, so that nobody comes twice. MLPs stay in, and read what the circuit writes.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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

NAMED = ("IO", "S1", "S2")  # the receiver, and the other one's first and second mention
AFTER = tuple(f"{role}+1" for role in NAMED)  # the word after each
ROLES = (*NAMED, *AFTER, "END-2", "END-1", "END", "elsewhere")
ORDERS = ("IBB", "BIB", "BBI")  # I is named once: the receiver
METRICS = ("IO - S", "IO - others")
Node = tuple[int, int, str]  # layer, head, role

# ------------------------------------------------------------------------------------------ prompts


@dataclass(frozen=True)
class Prompts:
    """n texts up to the word before the receiver, all with the same number of tokens.

    Attributes:
        ids: (n, pos); END is the last position.
        others: (n, k, pos): the same texts, each mention with another name.
        role: (n, pos), an index into `ROLES`; the first token, which never changes, is elsewhere.
        io, s: (n,), the ids of the name that comes once, and of the one that comes twice.
        names: (n_names,), the ids of all names in the world.
        orders: n times one of `ORDERS`.
        texts: n texts with their answer, as they were written.
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
        """The position of a role in each text, (n,)."""
        if role not in ROLES[:-1]:
            raise ModelError(
                f"There is no role {role!r} with one position: {', '.join(ROLES[:-1])}."
            )
        return (self.role == ROLES.index(role)).int().argmax(1)

    @cached_property
    def swapped(self) -> Tensor:
        """(n, pos): the second mention is of the other name, so that S comes once and receives.

        One token differs, and the candidates stay where they were.
        """
        ids = self.ids.clone()
        ids[torch.arange(len(ids)), self.at("S2")] = self.io
        return ids

    def weights(self) -> Tensor:
        """The names' weights in each metric, (2, n, n_names).

        IO - S: which of the two; the logit difference of Wang et al. 2022. IO - others: IO against
        the mean of all names that the text does not have.
        """
        io, s = self.one_hot(self.io), self.one_hot(self.s)
        absent = 1 - io - s
        return torch.stack([io - s, io - absent / absent.sum(1, keepdim=True)])


def single_names(model: LanguageModel) -> dict[str, int]:
    """{name: its id} of TinyWorld's names that are one token after a space."""
    ids = {name: model.encode(f" {name}") for name in lexicon.people()}
    return {name: row[0] for name, row in ids.items() if len(row) == 1}


def make_prompts(model: LanguageModel, n: int = 24, seed: int = 0, others: int = 8) -> Prompts:
    """n of TinyWorld's texts in which two people are named, one of them twice, and a stranger gives
    something to the other. The three orders are equally frequent, the pairs of names held out of
    training.

        There was Roger. Then Rebecca laughed. Roger left early. The clerk gave a ring to Rebecca.

    Each mention has a sentence of its own, and follows a space, so that a name is the same token
    everywhere. All texts have the length at which there are enough of each order.

    Args:
        others: k, the number of copies of each text with other names.

    Raises:
        ModelError: too few names are single tokens here, or too few texts have one length.
    """
    single, each = single_names(model), -(-n // len(ORDERS))
    rows = {order: [] for order in ORDERS}
    for order, found in rows.items():
        choices = {"form": "crowd", "order": order, "opening": 1, "giver": "nameless"}
        for document in documents("ioi", 12 * each + 60, 10_000 + seed, ("entities",), **choices):
            row = _one_prompt(model, document, single)
            found += [row] if row else []
    counts = [Counter(len(row["ids"]) for row in found) for found in rows.values()]
    length = max(set().union(*counts), key=lambda k: min(c[k] for c in counts), default=0)
    have = min(count[length] for count in counts)
    if have < each:
        raise ModelError(
            f"Only {have} texts of each order have {length} tokens: ask for {3 * have} at most."
        )
    fit = {order: [r for r in found if len(r["ids"]) == length] for order, found in rows.items()}
    chosen = [row | {"order": order} for order, found in fit.items() for row in found[:each]]
    rng, names = random.Random(seed), sorted(single.values())
    made = [with_other_names(row["ids"], row["role"], names, others, rng) for row in chosen]
    ids, role, io, s = ([row[key] for row in chosen] for key in ("ids", "role", "io", "s"))
    tensors = (torch.tensor(x, device=model.device) for x in (ids, made, role, io, s, names))
    orders, texts = (tuple(row[key] for row in chosen) for key in ("order", "text"))
    return Prompts(*tensors, orders, texts)


def _one_prompt(model: LanguageModel, document, single: Mapping[str, int]) -> dict | None:
    """A document's prompt, its roles and its names, or None if a name is not one token."""
    spans = [s for kind in ("entity", "ioi") for s in document.find(kind)]
    *mentions, answer = sorted(spans, key=lambda span: span.start)
    said = [document.text[span.start : span.end] for span in (*mentions, answer)]
    if mentions[0].start == 0 or not all(name in single for name in said):
        return None
    whole, end = token_at(model, document.text, answer.end)
    places = [token_at(model, document.text, span.end)[1] for span in mentions]
    if [whole[i] for i in (*places, end)] != [single[name] for name in said]:
        return None
    repeated = Counter(said[:-1]).most_common(1)[0][0]
    return {
        "ids": whole[:end],
        "role": roles(end, places, [single[name] for name in said[:-1]]),
        "io": whole[end],
        "s": single[repeated],
        "text": document.text,
    }


def roles(length: int, places: Sequence[int], names: Sequence[int]) -> list[int]:
    """The role of each position, as an index into `ROLES`.

    Args:
        places, names: the position and the id of each mention. A name that comes once is IO, the
            first mention of another S1, and all later ones S2.
    """
    found = [ROLES.index("elsewhere")] * length
    for back, role in enumerate(("END", "END-1", "END-2")):
        found[length - 1 - back] = ROLES.index(role)
    kinds = []
    for i, name in enumerate(names):
        kinds.append(0 if names.count(name) == 1 else 1 if name not in names[:i] else 2)
    for place, kind in zip(places, kinds, strict=True):
        if place + 1 < length - 3:
            found[place + 1] = ROLES.index(AFTER[kind])
    for place, kind in zip(places, kinds, strict=True):
        found[place] = ROLES.index(NAMED[kind])
    return found


def with_other_names(
    ids: Sequence[int], role: Sequence[int], names: Sequence[int], k: int, rng: random.Random
) -> list[list[int]]:
    """k copies of a text in which all mentions are different names, new to the text."""
    places = [i for i, each in enumerate(role) if each < len(NAMED)]
    free, copies = sorted(set(names) - {ids[i] for i in places}), []
    for _ in range(k):
        copy = list(ids)
        for place, name in zip(places, rng.sample(free, len(places)), strict=True):
            copy[place] = name
        copies.append(copy)
    return copies


# -------------------------------------------------------------------------------- nodes and their F

ABLATIONS = {"mean": Mean(), "resample": Resample(), "zero": Zero()}


def to_nodes(mask: Tensor) -> set[Node]:
    """A mask (n_layers, n_heads, roles) as nodes."""
    return {(layer, head, ROLES[role]) for layer, head, role in mask.nonzero().tolist()}


def node_name(node: Node) -> str:
    """(3, 1, "END") -> "L3H1 at END"."""
    return f"{head_name(node[:2])} at {node[2]}"


def closeness(faithfulness: Tensor) -> float:
    """1 less the distance from 1, of the metric that is farther off: 1 is what the model does."""
    return float((1 - (1 - faithfulness).abs()).min())


class Task:
    """Both metrics F on one batch of prompts, for the model and for any circuit in it.

    F is a weighted sum of the names' logits at END, averaged over the prompts. F(circuit) is F with
    every node outside the circuit ablated. What does not depend on a circuit is computed once.

    Args:
        ablation: what a node outside the circuit becomes: `Mean()` over `prompts.others`,
            `Resample()`, the first of them, or `Zero()`.

    Raises:
        ModelError: no such ablation.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        ablation: Zero | Mean | Resample = ABLATIONS["mean"],
    ):
        if ablation not in ABLATIONS.values():
            known = ", ".join(map(str, ABLATIONS.values()))
            raise ModelError(f"{ablation!r} is no ablation here: choose one of {known}.")
        self.model, self.prompts, self.ablation = model, prompts, ablation
        self.shape = (model.n_layers, model.n_heads, len(ROLES))

    @cached_property
    def weights(self) -> Tensor:
        """(2, n, n_names), `prompts.weights()`."""
        return self.prompts.weights()

    def nodes(self) -> set[Node]:
        """All of them: the whole model."""
        return to_nodes(torch.ones(self.shape, dtype=torch.bool))

    @cached_property
    def ablated(self) -> dict[int, Tensor]:
        """{layer: the z that a node outside the circuit gets, (n, pos, n_heads, d_head)}."""
        return reference(self.model, self.prompts.others, self.ablation)

    @cached_property
    def intact(self) -> Cache:
        """The model's own run."""
        sites = ["embed", "resid_pre", "pattern", "z", "attn_out", "mlp_out", "resid_final"]
        with torch.no_grad():
            return self.model.run_with_cache(self.prompts.ids, sites, self.model.n_layers)[1]

    def mask(self, nodes: Iterable[Node] | Tensor) -> Tensor:
        """Nodes as booleans (n_layers, n_heads, roles); a mask as it is."""
        if isinstance(nodes, Tensor):
            return nodes
        mask = torch.zeros(self.shape, dtype=torch.bool, device=self.model.device)
        for layer, head, role in nodes:
            mask[layer, head, ROLES.index(role)] = True
        return mask

    def hooks(self, circuit: Iterable[Node] | Tensor) -> dict:
        """Hooks that ablate every node outside the circuit."""
        return keeping(self.mask(circuit), self.prompts.role, self.ablated)

    def final(self, circuit: Iterable[Node] | Tensor) -> Tensor:
        """The last stream at END, (n, d_model): run from the first layer with an ablated node."""
        hooks, stream = self.hooks(circuit), self.intact["resid_pre"]
        if not hooks:
            return self.intact["resid_final"][:, -1]
        start, end = min(layer for _, layer in hooks), self.model.n_layers
        with self.model.hooks(hooks):
            return self.model.run_from_layer(stream[start], start, stop_at_layer=end)[:, -1]

    def metric(self, logits: Tensor) -> Tensor:
        """Logits at END (..., n, d_vocab) -> the mean of both metrics, (..., 2)."""
        names = logits[..., self.prompts.names].float()
        return torch.einsum("...na,mna->...m", names, self.weights) / len(self.prompts)

    @torch.no_grad()
    def each(self, circuit: Iterable[Node] | Tensor) -> Tensor:
        """The circuit's two metrics in each text, (2, n)."""
        names = self.model.unembed(self.final(circuit))[:, self.prompts.names].float()
        return torch.einsum("na,mna->mn", names, self.weights)

    def F(self, circuit: Iterable[Node] | Tensor) -> Tensor:
        """The circuit's two mean metrics, (2,)."""
        return self.each(circuit).mean(1)

    @torch.no_grad()
    def first_choice(self, circuit: Iterable[Node] | Tensor) -> float:
        """Share of the prompts in which IO has the highest logit of the vocabulary."""
        choice = self.model.unembed(self.final(circuit)).argmax(-1)
        return float((choice == self.prompts.io).float().mean())

    @cached_property
    def whole(self) -> Tensor:
        """The model's two metrics in each text, (2, n)."""
        return self.each(self.nodes())

    @property
    def full(self) -> Tensor:
        """F(model), (2,)."""
        return self.whole.mean(1)

    def faithfulness(self, circuit: Iterable[Node] | Tensor) -> Tensor:
        """F(circuit) / F(model), (2,): 1 where the circuit does by itself what the model does."""
        return self.F(circuit) / self.full

    def closeness(self, circuit: Iterable[Node] | Tensor) -> float:
        """`closeness` of the circuit: what this lesson calls success, at 0.9 or more."""
        return closeness(self.faithfulness(circuit))

    def error(self, circuit: Iterable[Node] | Tensor) -> float:
        """How far the circuit is from the model text by text, on the metric that is farther off:

            mean over the texts of |circuit - model|, over F(model)

        It is at least |faithfulness - 1|, as errors of several texts cannot cancel.
        """
        off = (self.each(circuit) - self.whole).abs().mean(1)
        return float((off / self.full.abs()).max())

    # ---- direct effects: what is written to the stream at END, read by the unembedding alone

    def direction(self, final: Tensor, metric: str = "IO - S") -> Tensor:
        """v (n, d_model), float64: a part x of the stream adds x · v to the metric, before the
        soft-cap, with the final norm frozen at the stream `final`."""
        u = self.weights[METRICS.index(metric)].double()
        u = u @ self.model.W_U[:, self.prompts.names].T.double()
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
            _, cache = self.model.run_with_cache(self.prompts.ids, sites, end, pos=-1)
        found = {"stream": cache["resid_final"].double(), "embed": cache["embed"].double()}
        if "pos_embed" in sites:
            found["position"] = cache["pos_embed"].double().expand_as(found["embed"])
        for layer in range(self.model.n_layers):
            heads, bias = head_writes(self.model, cache["z", layer], layer)
            found |= {head_name((layer, h)): heads[:, h] for h in range(self.model.n_heads)}
            found |= {} if bias is None else {f"L{layer} attention bias": bias}
            found[f"L{layer} MLP"] = cache["mlp_out", layer].double()
        return found


def reference(
    model: LanguageModel, others: Tensor, ablation: Zero | Mean | Resample = ABLATIONS["mean"]
) -> dict[int, Tensor]:
    """{layer: what an ablated z becomes, (n, pos, n_heads, d_head)}.

    Args:
        others: (n, k, pos), k copies of each text.
    """
    texts = others if isinstance(ablation, Mean) else others[:, :1]
    found = record(model, texts.flatten(0, 1), "z")
    means = {layer: z.unflatten(0, texts.shape[:2]).mean(1) for (_, layer), z in found.items()}
    if isinstance(ablation, Zero):
        return {layer: torch.zeros_like(z) for layer, z in means.items()}
    return means


def keeping(keep: Tensor, role: Tensor, instead: Mapping[int, Tensor]) -> dict:
    """Hooks on z that keep some nodes, and put `instead` in place of all others.

    Args:
        keep: (n_layers, n_heads, roles), booleans, or shares between 0 and 1.
        role: (n, pos), an index into `ROLES`; the first position is never changed.
        instead: {layer: (n, pos, n_heads, d_head)}.
    """

    def at(layer: int):
        kept = keep[layer][:, role].permute(1, 2, 0)  # (n, pos, n_heads)

        def hook(z: Tensor) -> Tensor:
            mixed = torch.lerp(instead[layer], z, kept[..., None].to(z.dtype))
            return torch.cat([z[:, :1], mixed[:, 1:]], 1)

        return hook

    cut = keep.is_floating_point() | ~keep.bool().flatten(1).all(1)  # shares are hooked everywhere
    return {("z", layer): at(layer) for layer, some in enumerate(cut.tolist()) if some}


# ----------------------------------------------------------------------------------- one's own text


def own_prompt(model: LanguageModel, text: str, others: int = 8) -> Prompts:
    """A text of one's own as `Prompts` of one row, up to the word before the receiver.

    Whoever is named once is IO, and the last such name the one that the metrics ask for; whoever is
    named twice is S.

    Raises:
        ModelError: nobody of TinyWorld is named in it, or somebody has no token of their own.
    """
    single, ids = single_names(model), model.tokens(text)[0].tolist()
    names = sorted(single.values())
    places = [i for i, token in enumerate(ids[:-3]) if token in names]
    said = [ids[i] for i in places]
    if not said:
        raise ModelError(
            f"Nobody of TinyWorld is named here, or too late: write names such as "
            f"{', '.join(list(single)[:4])}, each after a space, and some words after them."
        )
    role = roles(len(ids), places, said)
    once = [name for name in said if said.count(name) == 1] or said
    twice = [name for name in said if said.count(name) > 1 and name != once[-1]] or said
    made = with_other_names(ids, role, names, others, random.Random(0))
    tensors = [torch.tensor([x], device=model.device) for x in (ids, made, role)]
    single_ids = [torch.tensor([x[-1]], device=model.device) for x in (once, twice)]
    return Prompts(*tensors, *single_ids, torch.tensor(names, device=model.device), ("",), (text,))
