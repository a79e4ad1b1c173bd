"""Which rule writes a country's currency: prompts, what it costs to silence rules, and a search.

yen = ask(model, "currency", ["Japan"])
share_lost(model, yen, without(coders, [(4, 17)]))   # of the yen's lead over other currencies
direct_writes(model, coders, yen)[0]                 # the rule that writes most for it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_helpers.circuits.replacement import FrozenNorm, Replacement, replaced
from mi_helpers.lessons.lesson_07.experiments import neurons
from mi_helpers.models import LanguageModel
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.tinyworld import lexicon

Rule = tuple[int, int]  # (layer, latent)
Coders = Mapping[int, SparseCoder]
FRAMES = {  # ways to ask of a country, as TinyWorld has them
    "currency": (
        "The currency of {} is the",
        "People in {} pay with the",
        "The money of {} is the",
    ),
    "capital": ("The capital of {} is", "{} has its capital in", "The government of {} meets in"),
    "language": ("The language of {} is", "People in {} speak", "In {} most people speak"),
}
FRESH = (  # other ways to ask for its currency
    "In {} people pay with the",
    "The banks in {} count in the",
    "People say that the currency of {} is the",
    "Today the money of {} is the",
)
NATION = "The money of the country with the {} is the"  # of a landmark's country


@dataclass(frozen=True)
class Questions:
    """Prompts with one kind of answer; their last token is what the answer comes after.

    ids     (n, pos), right-padded; last (n,), the last token's position
    answer  (n,), the right answer's place in pool
    pool    (answers,), the first token's id of every answer of the kind
    """

    ids: Tensor
    last: Tensor
    answer: Tensor
    pool: Tensor

    def __len__(self) -> int:
        return len(self.last)


def with_currency() -> list[str]:
    """The countries of TinyWorld that have a currency of which the word is not "currency"."""
    return [name for name, each in lexicon.countries().items() if each.currency != "currency"]


def countries_of(currency: str) -> list[str]:
    """The countries that pay with it."""
    return [name for name, each in lexicon.countries().items() if each.currency == currency]


def with_own_currency() -> list[str]:
    """Those that share it with no other country."""
    table = lexicon.countries()
    return [name for name in with_currency() if len(countries_of(table[name].currency)) == 1]


def ask(
    model: LanguageModel,
    kind: str,
    countries: Iterable[str] | None = None,
    frames: Sequence[str] = (),
) -> Questions:
    """One question for each country and frame.

    Args:
        kind: "currency", "capital" or "language".
        countries: by default all that have a currency.
        frames: with {} for the country; by default those of `FRAMES`. With `NATION`, one for each
            of its landmarks.
    """
    table, rows, answers = lexicon.countries(), [], []
    pool = {model.encode(f" {getattr(table[name], kind)}")[0] for name in with_currency()}
    pool = sorted(pool)
    for name in with_currency() if countries is None else countries:
        first = model.encode(f" {getattr(table[name], kind)}")[0]
        for frame in frames or FRAMES[kind]:
            sights = [each.name for each in lexicon.landmarks() if each.country == name]
            for said in sights if frame == NATION else [name]:
                rows.append(model.tokens(frame.format(said))[0].tolist())
                answers.append(pool.index(first))
    last = torch.tensor([len(row) - 1 for row in rows])
    return Questions(model.pad(rows), last, torch.tensor(answers), torch.tensor(pool))


# -- what is lost ----------------------------------------------------------------------------


@torch.no_grad()
def leads(
    model: LanguageModel, asked: Questions, by: Mapping[int, Replacement] | None = None
) -> Tensor:
    """The logit of the right answer, less the mean of all others of its kind: (n,)."""
    with replaced(model, by or {}):
        _, cache = model.run_with_cache(asked.ids, "resid_final", stop_at_layer=model.n_layers)
    rows = torch.arange(len(asked))
    logits = model.unembed(cache["resid_final"][rows, asked.last]).float()[:, asked.pool]
    own = logits[rows, asked.answer]
    return own - (logits.sum(1) - own) / (len(asked.pool) - 1)


def share_lost(
    model: LanguageModel,
    asked: Questions,
    by: Mapping[int, Replacement],
    whole: Tensor | None = None,
) -> float:
    """The share of the mean lead that goes with a change of the MLPs: 1 where nothing is left.

    Args:
        whole: `leads` of the model as it is, where it is known.
    """
    whole = leads(model, asked) if whole is None else whole
    return float(1 - leads(model, asked, by).mean() / whole.mean())


def without(coders: Coders, rules: Collection[Rule]) -> dict[int, Replacement]:
    """The model's MLPs without what some rules write: the rest of each MLP stays as it is."""

    def of_layer(layer: int) -> Replacement:
        latents = torch.tensor(sorted({latent for where, latent in rules if where == layer}))
        coder = coders[layer]
        return lambda x, y: y - (coder.encode(x.float())[..., latents] @ coder.W_dec[latents]).to(y)

    return {layer: of_layer(layer) for layer in sorted({layer for layer, _ in rules})}


def without_neuron(model: LanguageModel, layer: int, neuron: int) -> dict[int, Replacement]:
    """The same for one neuron of an MLP; the norm after the MLP stays as it is."""

    def replacement(x: Tensor, y: Tensor) -> Tensor:
        post, rows, after = neurons(model, layer, x)
        return y - after(post[..., [neuron]] @ rows[[neuron]]).to(y)

    return {layer: replacement}


# -- who writes it ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Writer:
    """A rule (or a neuron) with what it writes on the right answer's lead, in logits, and the share
    of the prompts at whose last token it fires."""

    layer: int
    unit: int
    writes: float
    fires: float

    @property
    def rule(self) -> Rule:
        return self.layer, self.unit


@torch.no_grad()
def direct_writes(model: LanguageModel, coders: Coders, asked: Questions) -> list[Writer]:
    """Every rule that fires at the last token, the one that writes most for the answer first: its
    activation times its decoder row, through the final norm as it is on each prompt, on the lead.

    As lesson 04 splits a logit; what later layers make of it is left out.
    """
    along, inputs = _along_the_lead(model, asked)
    found = []
    for layer, coder in coders.items():
        fires = coder.encode(inputs[layer])  # (n, latents)
        found += _writers(layer, fires, (along @ coder.W_dec.T) * fires)
    return sorted(found, key=lambda each: -each.writes)


@torch.no_grad()
def neuron_writes(model: LanguageModel, asked: Questions) -> list[Writer]:
    """`direct_writes` of the MLPs' neurons."""
    along, inputs = _along_the_lead(model, asked)
    found = []
    for layer, x in inputs.items():
        post, rows, after = neurons(model, layer, x)
        back = after.backward(along) if isinstance(after, FrozenNorm) else along
        written = (back @ rows.T) * post
        found += _writers(layer, post, written)
    return sorted(found, key=lambda each: -each.writes)


def _along_the_lead(model: LanguageModel, asked: Questions) -> tuple[Tensor, dict[int, Tensor]]:
    """What a vector is multiplied with to give its part of each prompt's lead, (n, d_model), and
    {layer: what its MLP reads at the last token, (n, d_model)}."""
    _, cache = model.run_with_cache(asked.ids, ["mlp_in", "resid_final"])
    rows = torch.arange(len(asked))
    final = cache["resid_final"][rows, asked.last].float()
    U = model.W_U[:, asked.pool].float()
    U = (U - U.mean(1, keepdim=True)) * len(asked.pool) / (len(asked.pool) - 1)
    along = model.ln_final(final).float() / final * U[:, asked.answer].T
    inputs = {i: cache["mlp_in", i][rows, asked.last].float() for i in range(model.n_layers)}
    return along, inputs


def _writers(layer: int, fires: Tensor, written: Tensor) -> list[Writer]:
    """The units that fire on any prompt."""
    share, mean = (fires != 0).float().mean(0), written.mean(0)
    return [Writer(layer, int(i), float(mean[i]), float(share[i])) for i in share.nonzero()[:, 0]]


def greedy(candidates: Sequence[Rule], score: Callable[[set[Rule]], float]) -> set[Rule]:
    """A set of rules with a high score: the best one, then whichever raises it most, as long as
    one does."""
    chosen: set[Rule] = set()
    best = float("-inf")
    while rest := [each for each in candidates if each not in chosen]:
        value, rule = max((score({*chosen, each}), each) for each in rest)
        if value <= best:
            break
        best = value
        chosen.add(rule)
    return chosen


# -- country by country ----------------------------------------------------------------------


@dataclass(frozen=True)
class Strongest:
    """What goes when the rule that writes a country's currency most is silenced, in shares of the
    lead: of the currency, of the country's capital, of other countries' currencies; and of the
    currency when the neuron that writes it most is silenced."""

    country: str
    own: float
    capital: float
    others: float
    neuron: float


def strongest_writers(
    model: LanguageModel, coders: Coders, countries: Sequence[str] | None = None
) -> list[Strongest]:
    """For each country with a currency of its own: the rule, and the neuron, that write it most.

    Args:
        countries: by default those of `with_own_currency`.
    """
    everyone, found = ask(model, "currency", frames=FRAMES["currency"][:1]), []
    whole = leads(model, everyone)
    for country in with_own_currency() if countries is None else countries:
        asked, capital = (ask(model, kind, [country]) for kind in ("currency", "capital"))
        by = without(coders, [direct_writes(model, coders, asked)[0].rule])
        neuron = neuron_writes(model, asked)[0]
        rest = [i for i, name in enumerate(with_currency()) if name != country]
        left = leads(model, everyone, by)[rest].mean() / whole[rest].mean()
        found.append(
            Strongest(
                country,
                share_lost(model, asked, by),
                share_lost(model, capital, by),
                float(1 - left),
                share_lost(model, asked, without_neuron(model, neuron.layer, neuron.unit)),
            )
        )
    return found
