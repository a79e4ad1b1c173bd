"""The lesion lab of lesson 00: silence parts of a model, and see what it no longer knows.

    known = facts(model)                          # prompts that end before a landmark's city
    remembered(model, known, hooks)               # p(city) under hooks, (facts,)
    gaze(model, known)                            # how much each head looks at the landmark

    lab = LesionLab(model, make_batch(model))
    lab.damage([("head", 3, 1)], mode="mean")     # {family: (nats per answer, standard error)}

A lesion is an ablation (`mi_helpers.ablation`) of one part or of several at once.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mi_helpers.ablation import Mean, Part, Resample, Zero, ablate, checked_part, part_name
from mi_helpers.hooks import Cache
from mi_helpers.layouts import ModelError, norm_gain
from mi_helpers.lessons.shared import (
    Batch,
    documents,
    make_batch,
    shipped_model,
    token_pool,
    tokens_and_ranges,
)
from mi_helpers.models import LanguageModel
from mi_helpers.tiny_gemma.skills import Suite, document_losses
from mi_helpers.tinyworld.world import World

MODES = {"zero": Zero, "mean": Mean, "resample": Resample}
FREE = ("prose", "norwegian", "python")  # families without answers
MOST_ANSWERS = 600  # on fresh documents
FACT = "The Eiffel Tower is in the city of"  # what the lesson opens with
CITY = " Paris"


# -- loss and floor --------------------------------------------------------------------------


def gaps(model: LanguageModel, suite: Suite, n: int) -> dict[str, tuple[float, float, float]]:
    """{family: (loss, floor, standard error of loss - floor)}, nats per token, n fresh documents.

    Both are of the same documents, `<eos>` included, so most of the luck of the draw cancels. The
    floor counts the choice of the family, too.
    """
    mixture, found = suite.world.mixture, {}
    for family, share in zip(mixture.items, mixture.probs, strict=True):
        encoded = suite.texts(family, n=n)
        nats = torch.tensor([suite.world.floor(each) for each in encoded.documents])
        floor = nats.double() - torch.tensor(share).double().log()
        loss = torch.as_tensor(document_losses(model.hf, encoded)).double()
        tokens = (encoded.lengths - 1).double().mean()
        error = (loss - floor).std() / len(loss) ** 0.5
        loss, floor, error = (float(x / tokens) for x in (loss.mean(), floor.mean(), error))
        found[family] = loss, floor, error
    return found


def estimate(values: Tensor) -> tuple[float, float]:
    """(mean, its standard error) of values (n,); of one value the error is infinite."""
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else math.inf
    return float(values.mean()), error


# -- one fact, and the parts it needs --------------------------------------------------------


@torch.no_grad()
def left_of_fact(model: LanguageModel, parts: Sequence[Part]) -> Tensor:
    """p(Paris) after FACT with each of some parts silenced alone, (parts,)."""
    city, left = model.encode(CITY)[0], []
    for part in parts:
        with model.hooks(ablate(model, [part], Zero())):
            left.append(model(FACT)[0, -1].float().softmax(-1)[city])
    return torch.stack(left)


def shares(cache: Cache) -> dict[str, float]:
    """{part: w · x / (x · x)} of what each part wrote, w, to the final stream at the last token, x.

    The shares of the embedding, every attention and every MLP sum to 1.
    """
    x = cache["resid_final"][0, -1]
    written = {"embedding": cache["embed"][0, -1]}
    for layer, (attn, mlp) in enumerate(zip(cache["attn_out"], cache["mlp_out"], strict=True)):
        written[f"L{layer} attention"], written[f"L{layer} MLP"] = attn[0, -1], mlp[0, -1]
    return {name: float(w @ x / (x @ x)) for name, w in written.items()}


@torch.no_grad()
def write_ratio(model: LanguageModel, text: str = FACT) -> float:
    """How long attention's write is with one head silent, the mean over all heads and tokens."""
    ratios = []
    _, before = model.run_with_cache(text, "attn_out")
    for layer, head in itertools.product(range(model.n_layers), range(model.n_heads)):
        with model.hooks(ablate(model, [(layer, head)], Zero())):
            _, after = model.run_with_cache(text, [("attn_out", layer)])
        lengths = [c["attn_out", layer][0, 1:].norm(dim=-1) for c in (after, before)]
        ratios.append(float((lengths[0] / lengths[1]).mean()))
    return sum(ratios) / len(ratios)


# -- facts, and the heads that look at what they are about -----------------------------------


@dataclass(frozen=True)
class Fact:
    """A sentence that ends before its city: where the landmark stands, and the city's token."""

    prompt: str
    city: str
    ids: list[int]
    landmark: list[int]
    answer: int


def facts(model: LanguageModel, n: int = 40, seed: int = 40_000) -> list[Fact]:
    """n facts about different landmarks, in TinyWorld's phrasings."""
    found: dict[str, Fact] = {}
    for document in documents("facts", 20 * n, seed, relation="landmark-city", count=1):
        span = next(s for s in document.find("entity") if s.value == "landmark")
        answer = document.find("answer")[0]
        name = document.text[span.start : span.end].lower()
        if span.start > answer.start or name in found:
            continue
        prompt = document.text[: answer.start].rstrip()
        city = document.text[answer.start : answer.end]
        ids, ranges = tokens_and_ranges(model, prompt)
        at = [i for i, (a, b) in enumerate(ranges) if a >= span.start and b <= span.end]
        found[name] = Fact(prompt, city, ids, at, model.encode(f" {city}")[0])
        if len(found) == n:
            break
    return list(found.values())


@torch.no_grad()
def remembered(model: LanguageModel, known: Sequence[Fact], hooks: Mapping | None = None) -> Tensor:
    """p(city's first token | prompt) of each fact, (facts,), under hooks."""
    ids, ends = model.pad([each.ids for each in known]), [len(each.ids) - 1 for each in known]
    rows = range(len(known))
    with model.hooks(hooks or {}):
        _, cache = model.run_with_cache(ids, "resid_final", stop_at_layer=model.n_layers)
    p = model.unembed(cache["resid_final"][rows, ends]).float().softmax(-1)  # (facts, d_vocab)
    return p[rows, [each.answer for each in known]]


@torch.no_grad()
def gaze(model: LanguageModel, known: Sequence[Fact]) -> Tensor:
    """Attention from the last token to the landmark, (facts, n_layers, n_heads), each 0 to 1."""
    ids = model.pad([each.ids for each in known])
    _, cache = model.run_with_cache(ids, "pattern", stop_at_layer=model.n_layers)
    rows = []
    for i, each in enumerate(known):
        last = cache["pattern"][:, i, :, len(each.ids) - 1]  # (n_layers, n_heads, k_pos)
        rows.append(last[..., each.landmark].sum(-1))
    return torch.stack(rows).float().cpu()


def left_in_order(
    model: LanguageModel, known: Sequence[Fact], order: Sequence, most: int
) -> list[tuple[float, float]]:
    """p(city) with the first 0, 1, … most heads of an order silenced: (mean, standard error)."""
    hooks = [ablate(model, order[:n], Zero()) for n in range(most + 1)]
    return [estimate(remembered(model, known, each)) for each in hooks]


def left_at_random(
    model: LanguageModel, known: Sequence[Fact], heads: Sequence, most: int, draws: int = 10
) -> list[tuple[float, float]]:
    """p(city) with 0, 1, … most of some heads silenced, drawn at random: the mean over several
    draws, and its standard error."""
    rng = random.Random(0)
    orders = [rng.sample(list(heads), most) for _ in range(draws)]
    left = [left_in_order(model, known, order, most) for order in orders]
    return [estimate(torch.tensor([mean for mean, _ in each])) for each in zip(*left, strict=True)]


@torch.no_grad()
def said_instead(model: LanguageModel, known: Sequence[Fact], head: tuple[int, int]) -> list:
    """[(prompt, the likeliest next token)] of the facts of which the city no longer comes first
    when one head is silent."""
    found = []
    with model.hooks(ablate(model, [head], Zero())):
        for each in known:
            best = int(model(torch.tensor([each.ids], device=model.device))[0, -1].argmax())
            if best != each.answer:
                found.append((each.prompt, model.str_tokens([best])[0].strip()))
    return found


def gaze_order(model: LanguageModel, known: Sequence[Fact]) -> list[tuple[int, int]]:
    """Every (layer, head), the one that looks most at the landmark first, over all facts."""
    order = gaze(model, known).mean(0).flatten().argsort(descending=True, stable=True)
    return [divmod(int(each), model.n_heads) for each in order]


@torch.no_grad()
def fetched(model: LanguageModel, known: Sequence[Fact], layer: int, head: int) -> Tensor:
    """How well what a head writes at the last token tells each fact's city from the others,
    (facts,): the share of the other cities whose token it promotes less; chance is 1/2."""
    ids = model.pad([each.ids for each in known])
    _, cache = model.run_with_cache(ids, [("z", layer)], stop_at_layer=model.n_layers)
    rows, ends = range(len(known)), [len(each.ids) - 1 for each in known]
    z = cache["z", layer][rows, ends, head]  # (facts, d_head)
    answers = torch.tensor([each.answer for each in known])
    scores = written_words(model, z @ model.weight("W_O", layer)[head], layer)[:, answers]
    own = scores.diagonal()[:, None]
    other = answers[:, None] != answers[None]
    return ((own > scores) & other).sum(1).float() / other.sum(1)


@torch.no_grad()
def written_words(model: LanguageModel, write: Tensor, layer: int) -> Tensor:
    """What a head's term (..., d_model) adds to each token's logit, up to one positive factor per
    row: the gains of the layer's post-norm and of the final norm, then the unembedding."""
    for norm in (model.part("ln1_post", layer), model.ln_final):
        if norm is not None:
            write = write * norm_gain(norm)
    return (write @ model.W_U.to(write.dtype)).float()


def scale_and_cap(model: LanguageModel) -> tuple[float, float]:
    """What attention multiplies its scores by, and what they are bent to stay within."""
    scale = model.part("attn", 0).scaling
    return scale, getattr(model.config, "attn_logit_softcapping", None) or float("inf")


@torch.no_grad()
def rotated(model: LanguageModel, text: str, layer: int) -> tuple[Tensor, Tensor]:
    """One layer's queries (pos, n_heads, d_head) and keys (pos, n_heads, d_head) for a text, turned
    by their positions with the model's own rotary function; each key once per head that reads it.
    """
    _, cache = model.run_with_cache(text, [("q", layer), ("k", layer)])
    q, k = (cache[name, layer].transpose(1, 2) for name in "qk")  # (1, heads, pos, d_head)
    positions = torch.arange(q.shape[2], device=q.device)[None]
    cos, sin = (x[:, None] for x in model.part("rotary")(q, positions))
    half = model.d_head // 2
    q, k = (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin for x in (q, k))
    k = k.repeat_interleave(model.n_heads // model.n_kv_heads, 1)
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


# -- the lab ---------------------------------------------------------------------------------


def mean_and_error(after, before, document):
    """What a lesion costs: (mean over documents, standard error of that mean).

    after, before  (answers,), the loss at each answer with and without the lesion
    document       (answers,), which document each answer stands in

    Answers of one document share its luck, so average within documents first. One document alone
    says nothing about the error: it is infinite.
    """
    change = after - before
    means = torch.stack([change[document == each].mean() for each in document.unique()])
    error = means.std() / len(means) ** 0.5 if len(means) > 1 else math.inf
    return means.mean(), error


class LesionLab:
    """Lesions of one model, on one batch of documents; every result is computed once.

    A lesion whose first part is in layer L starts from the stream that enters layer L, which is
    kept from the intact run, so only the layers from L on are run.

    Args:
        batch: what the losses are measured on; by default `make_batch(model)`.
        reference: the other documents, whose activations the means and resamples are taken from.
        measure: (after, before, document), one number per answer, -> (mean, standard error).
    """

    def __init__(
        self,
        model: LanguageModel,
        batch: Batch | None = None,
        reference: Batch | None = None,
        measure: Callable = mean_and_error,
    ):
        self.model, self.measure = model, measure
        self.batch = make_batch(model) if batch is None else batch
        self.names = self.batch.names
        self.reference = token_pool(model, reference)
        sites = ("resid_pre", "resid_final")
        _, self.clean = model.run_with_cache(self.batch.ids, sites, stop_at_layer=model.n_layers)
        self.before = self._read(self.clean["resid_final"])  # (answers, 2): loss, right or not
        self._known: dict[tuple, Tensor] = {}

    def parts(self, layers=None) -> list[Part]:
        """(kind, layer, head) of every head and every MLP, of all layers or of some."""
        layers = range(self.model.n_layers) if layers is None else layers
        heads = range(self.model.n_heads)
        return [
            part for i in layers for part in (*(("head", i, h) for h in heads), ("mlp", i, None))
        ]

    def hooks(self, parts: Sequence, mode: str = "mean") -> dict:
        """The hooks of a lesion of some parts, with this lab's reference.

        Raises:
            ModelError: no such part or mode.
        """
        if mode not in MODES:
            raise ModelError(f"There is no mode {mode!r}: choose one of {', '.join(MODES)}.")
        how = Zero() if mode == "zero" else MODES[mode](self.reference)
        return ablate(self.model, parts, how)

    def after(self, parts: Sequence, mode: str = "mean") -> Tensor:
        """(answers, 2) with the parts silenced: the loss in nats, and whether the answer is the
        model's first choice."""
        parts = tuple(sorted(checked_part(self.model, part) for part in parts))
        hooks = self.hooks(parts, mode)
        return self._run((parts, mode), min(part[1] for part in parts), hooks)

    def noise(self, parts: Sequence, mode: str = "mean", seed: int = 0) -> Tensor:
        """The control, as `after`: the stream is pushed as far as the lesion of one layer's parts
        pushes it, at every token, but in a random direction."""
        kind, layer, _ = checked_part(self.model, parts[0])
        site = "mlp_out" if kind == "mlp" else "attn_out"
        change = self._written(site, layer, self.hooks(parts, mode))
        change = change - self._written(site, layer, {})  # (n, length, d_model)
        rng = torch.Generator().manual_seed(seed)
        push = F.normalize(torch.randn(change.shape, generator=rng).to(change), dim=-1)
        push *= change.norm(dim=-1, keepdim=True)
        return self._run((*parts, mode, "noise", seed), layer, {(site, layer): lambda x: x + push})

    def by_family(self, after: Tensor) -> dict[str, tuple[float, float]]:
        """{family: (damage, standard error)}, nats per answer, of what `after` or `noise` gave."""
        found = {}
        for index, name in enumerate(self.names):
            here = self.batch.family == index
            rows = self.batch.rows[here]
            mean, error = self.measure(after[here, 0], self.before[here, 0], rows)
            found[name] = float(mean), float(error)
        return found

    def changes(self, parts: Sequence, family: str, mode: str = "mean") -> Tensor:
        """The damage of a lesion in each document of a family, (documents,), nats per answer."""
        here = self.batch.family == self.names.index(family)
        change = (self.after(parts, mode) - self.before)[here, 0]
        rows = self.batch.rows[here]
        return torch.stack([change[rows == row].mean() for row in rows.unique()])

    def right(self, after: Tensor) -> dict[str, float]:
        """{family: share of its answers that are the model's first choice}."""
        each = ((name, self.batch.family == i) for i, name in enumerate(self.names))
        return {name: float(after[here, 1].mean()) for name, here in each}

    def damage(self, parts: Sequence, mode: str = "mean") -> dict[str, tuple[float, float]]:
        """{family: (damage, standard error)} of a lesion, nats per answer."""
        return self.by_family(self.after(parts, mode))

    def table(self, parts: Sequence[Part], mode: str = "mean") -> Tensor:
        """The damage of the lesion of each part alone, (parts, families)."""
        rows = [[mean for mean, _ in self.damage([part], mode).values()] for part in parts]
        return torch.tensor(rows)

    @torch.no_grad()
    def _run(self, key: tuple, layer: int, hooks: Mapping) -> Tensor:
        if key not in self._known:
            with self.model.hooks(hooks):
                final = self.model.run_from_layer(
                    self.clean["resid_pre", layer], layer, stop_at_layer=self.model.n_layers
                )
            self._known[key] = self._read(final)
        return self._known[key].clone()

    @torch.no_grad()
    def _read(self, final: Tensor) -> Tensor:
        """(answers, 2) from the final stream: the loss, and whether the answer comes first."""
        rows, positions, ids = self.batch.rows, self.batch.positions, self.batch.ids
        logits = self.model.unembed(final[rows, positions - 1]).float()
        truth = ids[rows, positions]
        losses = F.cross_entropy(logits, truth, reduction="none")
        return torch.stack([losses, (logits.argmax(-1) == truth).float()], -1)

    @torch.no_grad()
    def _written(self, site: str, layer: int, hooks: Mapping) -> Tensor:
        """What a layer's attention or MLP adds to the stream, (n, length, d_model)."""
        seen: list[Tensor] = []
        with self.model.hooks(hooks), self.model.hooks({(site, layer): seen.append}):
            self.model.run_from_layer(self.clean["resid_pre", layer], layer, layer + 1)
        return seen[0]


# -- skills ----------------------------------------------------------------------------------


def skills() -> tuple[str, ...]:
    """The families of TinyWorld whose documents have answers."""
    return tuple(name for name in World.families if name not in FREE)


def draw_skill(number: int, damage: Tensor, names: Sequence[str]) -> str:
    """The skill that a number of the learner's choice draws for the investigation: one that some
    lesion of a table, damage (parts, families), costs a nat or more; any where there is none."""
    harmed = {name for name, most in zip(names, damage.amax(0), strict=True) if most >= 1}
    drawn = [skill for skill in skills() if skill in harmed] or skills()
    return random.Random(f"skill {number}").choice(drawn)


# -- a double dissociation -------------------------------------------------------------------


def strongest_dissociation(damage: Tensor) -> tuple[int, int, int, int]:
    """The two parts and two skills (i, a, j, b) with the largest

        (damage[i, a] - damage[i, b]) · (damage[j, b] - damage[j, a]),    both factors positive.

    The lesion of i takes skill a and spares b, that of j takes b and spares a: Teuber's (1955)
    double dissociation. A lesion that harms all skills alike scores 0.

    Args:
        damage: (parts, skills).
    """
    gap = damage[:, :, None] - damage[:, None, :]  # (parts, skills, skills)
    best = gap.amax(0).clamp(min=0)
    strength = best * best.T  # (skills, skills)
    a, b = divmod(int(strength.argmax()), strength.shape[1])
    return int(gap[:, a, b].argmax()), a, int(gap[:, b, a].argmax()), b


@dataclass(frozen=True)
class Pair:
    """Two parts and the skills that they were chosen for: `parts[i]` harms `skills[i]`.

    table   {(part, skill): damage} where they were chosen, the four cells.
    """

    parts: tuple[Part, Part]
    skills: tuple[str, str]
    table: dict[tuple[Part, str], float]

    @property
    def weaker(self) -> tuple[Part, str]:
        """The part whose effect on its own skill is the smaller one, and that skill."""
        return min(zip(self.parts, self.skills, strict=True), key=lambda each: self.table[each])


def choose_pair(lab: LesionLab) -> Pair:
    """The strongest double dissociation among the heads, and the families that have answers."""
    skills = [name for name in lab.names if name not in FREE]
    heads = [part for part in lab.parts() if part[0] == "head"]
    damage = lab.table(heads)[:, [lab.names.index(skill) for skill in skills]]
    i, a, j, b = strongest_dissociation(damage)
    cells = {(heads[r], skills[c]): float(damage[r, c]) for r in (i, j) for c in (a, b)}
    return Pair((heads[i], heads[j]), (skills[a], skills[b]), cells)


def fresh_lab(
    lab: LesionLab,
    pair: Pair,
    answers: int,
    measure: Callable = mean_and_error,
    seed: int = 50_000,
) -> LesionLab:
    """A lab of the pair's two families on documents that had no part in the choice."""
    batch = make_batch(lab.model, answers, seed, pair.skills)
    return LesionLab(lab.model, batch, measure=measure)


def crossover(lab: LesionLab, pair: Pair) -> list[tuple[float, float]]:
    """How much more each part costs its own skill than the other: [(nats, standard error)] * 2."""
    found = []
    for part, (own, other) in zip(pair.parts, (pair.skills, pair.skills[::-1]), strict=True):
        damage = lab.damage([part])
        (mean, error), (less, its) = damage[own], damage[other]
        found.append((mean - less, (error**2 + its**2) ** 0.5))
    return found


def with_controls(lab: LesionLab, pair: Pair, blank: LanguageModel) -> dict[str, dict]:
    """{run: {"part on skill": (damage, standard error)}} of a pair on its two skills, for three
    runs: the lesion, noise of the same size, and the lesion of an untrained model."""
    control = LesionLab(blank, lab.batch, measure=lab.measure)
    found: dict[str, dict] = {"lesion": {}, "noise": {}, "untrained": {}}
    for part in pair.parts:
        runs = lab.damage([part]), lab.by_family(lab.noise([part])), control.damage([part])
        for name, damage in zip(found, runs, strict=True):
            found[name] |= {f"{part_name(part)} on {s}": damage[s] for s in pair.skills}
    return found


@functools.cache
def shipped_pair() -> tuple[LesionLab, Pair]:
    """The lab of tiny-gemma that the lesson chooses its pair in, and the pair."""
    lab = LesionLab(shipped_model(), make_batch(shipped_model(), 32))
    return lab, choose_pair(lab)
