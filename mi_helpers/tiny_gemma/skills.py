"""What the model can do, measured on held-out text against TinyWorld's truth.

`python -m mi_helpers skills` prints the table with its thresholds.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch.nn import functional as F

from mi_helpers.layouts import ModelError
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.saes.concepts import concept_scores
from mi_helpers.saes.labels import labelled_tokens
from mi_helpers.saes.training import TrainConfig, fit
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.copying import vocabulary
from mi_helpers.tinyworld.grammar import BE_FORMS
from mi_helpers.tinyworld.statements import WORDS as VERDICT_WORDS
from mi_helpers.tinyworld.tokenizer import offsets
from mi_helpers.tinyworld.world import World

CONTEXT = 128


@dataclass
class Encoded:
    """Documents as one right-padded batch. A causal model does not see the padding.

    ids (n, length) with `<bos>` first and `<eos>` after the text; lengths (n,) count both
    """

    documents: list
    ids: torch.Tensor
    lengths: torch.Tensor
    ranges: list


def encode(tokenizer, documents: list) -> Encoded:
    """Encode documents; those that do not fit into the context are left out."""
    kept, rows, ranges = [], [], []
    for document in documents:
        ids, where = offsets(tokenizer, document.text)
        if len(ids) + 2 <= CONTEXT:
            kept.append(document)
            rows.append([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])
            ranges.append(where)
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id or 0)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return Encoded(kept, ids, torch.tensor([len(row) for row in rows]), ranges)


@torch.no_grad()
def log_probs(model, ids: torch.Tensor, rows: int = 64):
    """Yield (first row, log-probabilities (rows, length, d_vocab)) in chunks, float32."""
    for start in range(0, len(ids), rows):
        chunk = ids[start : start + rows].to(model.device)
        yield start, F.log_softmax(model(input_ids=chunk, use_cache=False).logits.float(), -1).cpu()


def token_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """-log p(token | before), nats, (n, length - 1)."""
    parts = []
    for start, scores in log_probs(model, ids):
        target = ids[start : start + len(scores), 1:, None]
        parts.append(-scores[:, :-1].gather(-1, target).squeeze(-1))
    return torch.cat(parts)


def document_losses(model, encoded: Encoded) -> np.ndarray:
    """-log p(document with its `<eos>`), nats, (n,)."""
    losses = token_losses(model, encoded.ids)
    inside = torch.arange(losses.shape[1])[None] < (encoded.lengths - 1)[:, None]
    return (losses * inside).sum(1).numpy()


def answer_positions(encoded: Encoded, i: int) -> list[int]:
    """Row positions of the first token of each answer of document i."""
    starts = encoded.ranges[i][:, 0]
    spans = encoded.documents[i].find("answer")
    return [1 + int(np.searchsorted(starts, span.start)) for span in spans]


def answer_scores(model, encoded: Encoded):
    """Yield (document, position, log-probabilities (d_vocab,) at the token before the answer)."""
    for start, scores in log_probs(model, encoded.ids):
        for i in range(len(scores)):
            for position in answer_positions(encoded, start + i):
                yield (
                    encoded.documents[start + i],
                    encoded.ids[start + i, position],
                    scores[i, position - 1],
                )


def accuracy(model, encoded: Encoded) -> float:
    """Share of answers that are the model's first choice among all tokens."""
    right = [int(score.argmax() == answer) for _, answer, score in answer_scores(model, encoded)]
    return float(np.mean(right))


def second_and_first(encoded: Encoded, start: int, rows: int):
    """(row, position of a name's second mention, position of its first), for each in rows."""
    for row in range(rows):
        document, begins = encoded.documents[start + row], encoded.ranges[start + row][:, 0]
        at = {}
        for span in sorted(document.spans, key=lambda span: span.start):
            if span.value in ("person", "S2"):
                name = document.text[span.start : span.end]
                here = 1 + int(np.searchsorted(begins, span.start))
                if name in at:
                    yield row, here, at[name]
                at[name] = here


def is_own_city(document) -> bool:
    """Whether the capital that a two-hop document asks for is the landmark's own city."""
    spans = document.find("entity")
    name = next(document.text[s.start : s.end] for s in spans if s.value == "landmark")
    place = next(place for place in lexicon.landmarks() if place.name == name)
    return lexicon.countries()[place.country].capital == place.city


class Suite:
    """The documents that the skills are measured on, made once and encoded once."""

    def __init__(self, world: World, tokenizer, small: bool = False, seed: int = 10_000):
        self.world, self.tokenizer = world, tokenizer
        self.n = 96 if small else 600
        self.seed = seed

    def texts(self, family: str, held=(), n: int | None = None, **choices) -> Encoded:
        stream = self.world.documents(self.seed, family, held, **choices)
        return encode(self.tokenizer, [next(stream) for _ in range(n or self.n)])

    def single(self, word: str) -> int:
        (token,) = self.tokenizer.encode(word, add_special_tokens=False)
        return token

    # One method per skill; each returns plain numbers.

    def facts(self, model) -> float:
        return accuracy(model, self.texts("facts", ("templates",), count=1))

    def two_hop(self, model) -> float:
        return accuracy(model, self.texts("two_hop", ("entities",), count=1))

    def hops(self, model) -> dict[str, float]:
        """Accuracy by what is asked of a landmark's country, on combinations never trained.

        Without 'country', which the facts state for every landmark; and the capital only where
        it is not the landmark's own city, which would do as an answer without any hop.
        """
        result = {}
        for hop in ("capital", "language", "currency", "continent", "city-capital"):
            encoded = self.texts("two_hop", ("entities",), relation=hop, count=1)
            right = [
                int(score.argmax() == answer)
                for document, answer, score in answer_scores(model, encoded)
                if hop != "capital" or not is_own_city(document)
            ]
            result[hop] = float(np.mean(right))
        return result

    def ioi(self, model, held=("entities",), **choices) -> tuple[float, float]:
        """On unseen pairs: share where IO is the first choice, share where it is above the others.

        The others are the names that have come up twice.
        """
        first, above = [], []
        for document, answer, score in answer_scores(model, self.texts("ioi", held, **choices)):
            others = [self.single(f" {name}") for name in document.latents["others"]]
            first.append(int(score.argmax() == answer))
            above.append(int(score[answer] > score[others].max()))
        return float(np.mean(first)), float(np.mean(above))

    def verdicts(self, model, held=("entities",), **choices) -> float:
        """Share of verdicts where the right words have more mass than their opposites."""
        ids = {
            verdict: [self.single(f" {pair[verdict]}") for pair in VERDICT_WORDS.values()]
            for verdict in (True, False)
        }
        right = []
        for _, answer, score in answer_scores(model, self.texts("truth", held, count=1, **choices)):
            mass = {v: float(score[ids[v]].exp().sum()) for v in ids}
            truth = int(answer) in ids[True]
            right.append(mass[truth] > mass[not truth])
        return float(np.mean(right))

    @torch.no_grad()
    def second_mentions(self, model) -> float:
        """Highest mean attention of any head from a name's second mention to its first.

        In sentences of one name each, where new and repeated names stand alike; a duplicate-token
        head (Wang et al. 2022, section 3) attends there.
        """
        encoded = self.texts("ioi", form="crowd", opening=1, giver="nameless")
        total, n = torch.zeros(()), 0
        for start in range(0, len(encoded.ids), 64):
            ids = encoded.ids[start : start + 64].to(model.device)
            out = model(input_ids=ids, output_attentions=True, use_cache=False)
            patterns = torch.stack(out.attentions)  # (layers, rows, heads, query, key)
            for row, query, key in second_and_first(encoded, start, len(ids)):
                total = total + patterns[:, row, :, query, key].cpu()
                n += 1
        return float((total / n).max())

    def repetition(self, model) -> float:
        """Sequences of 16, 32 and 48 random words, written twice: accuracy in the second half."""
        n = max(16, self.n // 12)
        scores = [
            accuracy(model, self.texts("repetition", n=n, length=length, times=2))
            for length in (16, 32, 48)
        ]
        return float(np.mean(scores))

    def made_up(self, model) -> float:
        return accuracy(model, self.texts("made_up"))

    def agreement(self, model) -> float:
        """With every noun between of the other number: share with more mass on right forms."""
        ids = {n: [self.single(" " + w) for w in forms] for n, forms in BE_FORMS.items()}
        right = []
        for document, _, score in answer_scores(
            model, self.texts("agreement", ("entities",), mismatch=True)
        ):
            mass = {n: float(score[ids[n]].exp().sum()) for n in ids}
            right.append(
                mass[document.latents["number"]]
                > max(mass[n] for n in ids if n != document.latents["number"])
            )
        return float(np.mean(right))

    def years(self, model, held=()) -> float:
        """Mean probability on the years that are later than the first."""
        two_digits = [self.single(f"{n:02d}") for n in range(100)]
        mass = [
            float(score[two_digits[document.latents["first"] + 1 :]].exp().sum())
            for document, _, score in answer_scores(model, self.texts("years", held, count=1))
        ]
        return float(np.mean(mass))

    def pronouns(self, model, per_job: int = 40, held=()) -> dict[str, tuple[float, float]]:
        """Occupation → (true p(she), the model's p(she) / (p(she) + p(he)) at the pronoun)."""
        she, he = self.single(" she"), self.single(" he")
        result = {}
        for job, truth in lexicon.occupations().items():
            encoded = self.texts("pronoun", held, per_job, occupation=job)
            ratios = []
            for start, scores in log_probs(model, encoded.ids):
                for i in range(len(scores)):
                    span = encoded.documents[start + i].find("pronoun")[0]
                    position = 1 + int(np.searchsorted(encoded.ranges[start + i][:, 0], span.start))
                    p = scores[i, position - 1].exp()
                    ratios.append(float(p[she] / (p[she] + p[he])))
            result[job] = (truth, float(np.mean(ratios)))
        return result

    def calendar(self, model, held=()) -> float:
        return accuracy(model, self.texts("calendar", held, count=1))

    def arithmetic(self, model, held=()) -> float:
        return accuracy(model, self.texts("arithmetic", held, count=1))

    def brackets(self, model) -> float:
        """At closers: the right kind of bracket has more mass than the two wrong ones."""
        closers = [self.single(" " + c) for c in ")]}"]
        right = [
            int(max(closers, key=lambda c: float(score[c])) == answer)
            for _, answer, score in answer_scores(model, self.texts("brackets"))
        ]
        return float(np.mean(right))

    def losses(self, model, n: int | None = None) -> dict[str, tuple[float, float]]:
        """Family → (loss, floor), both nats per token over whole fresh documents with `<eos>`.

        The floor includes the choice of the family, which a reader has to find out as well.
        """
        names, probs = self.world.mixture.items, self.world.mixture.probs
        result = {}
        for family, p in zip(names, probs, strict=True):
            encoded = self.texts(family, n=n)
            tokens = float((encoded.lengths - 1).sum())
            floor = sum(self.world.floor(d) - np.log(p) for d in encoded.documents)
            result[family] = (document_losses(model, encoded).sum() / tokens, floor / tokens)
        return result

    def in_context(self, model) -> float:
        """In-context-learning score: loss at prose tokens 60–79 less loss at tokens 5–14, nats."""
        encoded = self.texts("prose", n=2 * self.n)
        keep = encoded.lengths >= 81
        losses = token_losses(model, encoded.ids[keep])
        return float(losses[:, 60:80].mean() - losses[:, 5:15].mean())

    @torch.no_grad()
    def head_scores(self, model, length: int = 30, n: int = 16) -> tuple[float, float]:
        """Highest induction and previous-token score of any head, on random words repeated once.

        induction: mean attention from a token of the second half to the one after its first
        occurrence; previous token: mean attention to the position before (Olsson et al. 2022).
        """
        generator = torch.Generator().manual_seed(self.seed)
        words = torch.tensor([self.single(f" {word}") for word in vocabulary()])
        half = words[torch.randint(len(words), (n, length), generator=generator)]
        bos = torch.full((n, 1), self.tokenizer.bos_token_id)
        ids = torch.cat([bos, half, half], 1).to(model.device)
        attentions = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
        induction = previous = 0.0
        for pattern in attentions:  # (n, heads, query, key)
            back = pattern.diagonal(-(length - 1), 2, 3)[..., 2:]  # second half → one after
            induction = max(induction, float(back.mean((0, 2)).max()))
            previous = max(previous, float(pattern.diagonal(-1, 2, 3).mean((0, 2)).max()))
        return induction, previous

    def brief(self, model) -> dict[str, float]:
        """A row of the training log: a few seconds."""
        losses = self.losses(model, n=32)
        induction, previous = self.head_scores(model)
        row = {
            "loss": sum(p * losses[f][0] for f, p in self.share().items()),
            "floor": sum(p * losses[f][1] for f, p in self.share().items()),
            "prose_floor": losses["prose"][1],
            "in_context": self.in_context(model),
            "induction_head": induction,
            "previous_token_head": previous,
            "repetition": self.repetition(model),
            "ioi": np.mean([self.ioi(model, order=order)[0] for order in ("ABB", "BAB")]),
            "ioi_crowd": self.ioi(model, form="crowd")[0],
            "second_mention_head": self.second_mentions(model),
            "verdicts": self.verdicts(model),
            "facts": self.facts(model),
            "two_hop": self.two_hop(model),
            "agreement": self.agreement(model),
            "years": self.years(model),
            "pronoun_error": max(abs(t - p) for t, p in self.pronouns(model, 6).values()),
            "arithmetic": self.arithmetic(model),
            "calendar": self.calendar(model),
            "brackets": self.brackets(model),
            **{f"loss_{family}": loss for family, (loss, _) in losses.items()},
        }
        return {key: round(float(value), 4) for key, value in row.items()}

    def share(self) -> dict[str, float]:
        """Family → its share of all tokens, measured once on a thousand documents."""
        if not hasattr(self, "_share"):
            stream, counts = self.world.documents(self.seed), dict.fromkeys(self.world.families, 0)
            for _ in range(1_000):
                document = next(stream)
                counts[document.family] += len(offsets(self.tokenizer, document.text)[0]) + 1
            total = sum(counts.values())
            self._share = {family: n / total for family, n in counts.items()}
        return self._share


@dataclass
class Row:
    """A line of the skills table: a measured value and what it has to reach.

    better  'above' or 'below' the threshold is right; None for a number that is only reported
    """

    skill: str
    value: float
    threshold: float | None = None
    better: str = "above"
    note: str = ""

    @property
    def met(self) -> bool:
        if self.threshold is None:
            return True
        if self.better == "above":
            return self.value >= self.threshold
        return self.value <= self.threshold


EXACT = tuple(f for f in World.families if f != "prose")  # families whose floor is exact


CROWDS = {  # forms of `ioi` in which repetition is the only cue
    "after an opening, a named giver": {"opening": 2, "giver": "named"},
    "after an opening, a nameless giver": {"opening": 2, "giver": "nameless"},
    "one name a sentence, of two": {"people": 2, "opening": 1},
    "one name a sentence, of three": {"people": 3, "opening": 1},
}


def ioi_rows(model, suite: Suite) -> list[Row]:
    unseen = ("entities", "templates")
    rows = []
    for order in ("ABB", "BAB"):
        first, above = suite.ioi(model, order=order)
        rows.append(Row(f"indirect object, unseen pairs, {order}: first choice", first, 0.99))
        rows.append(Row(f"indirect object, unseen pairs, {order}: above the giver", above, 0.99))
        first, _ = suite.ioi(model, unseen, order=order)
        rows.append(Row(f"indirect object, unseen pairs and phrasings, {order}", first))
    for name, choices in CROWDS.items():
        first, above = suite.ioi(model, form="crowd", **choices)
        rows.append(Row(f"receiver, {name}", first, 0.99, note=f"above the others {above:.3f}"))
    first, _ = suite.ioi(model, unseen, form="crowd")
    rows.append(Row("receiver in a crowd, unseen pairs and phrasings", first))
    rows.append(Row("attention, second mention to first: best head", suite.second_mentions(model)))
    return rows


def verdict_rows(model, suite: Suite) -> list[Row]:
    new = ("entities",)
    return [
        Row("verdicts, unseen entities", suite.verdicts(model, new), 0.95),
        Row("verdicts, unseen entities, negated", suite.verdicts(model, new, negated=True), 0.90),
        Row("verdicts, unseen entities and phrasings", suite.verdicts(model, (*new, "templates"))),
        Row("verdicts, a relation without verdicts", suite.verdicts(model, ("relations",))),
    ]


def pronoun_rows(model, suite: Suite) -> list[Row]:
    rows = []
    for name, held, limit in (("unseen", ("templates",), 0.05), ("trained", (), None)):
        skews = suite.pronouns(model, held=held)
        error = {job: abs(truth - p) for job, (truth, p) in skews.items()}
        worst = max(error, key=error.get)
        mean = float(np.mean(list(error.values())))
        note = f"{worst}; mean of the 40 occupations {mean:.3f}"
        row = f"pronoun skew, {name} phrasings: largest error"
        rows.append(Row(row, error[worst], limit, "below", note))
    return rows


def measure(model, suite: Suite) -> list[Row]:
    """Every skill with its threshold; thresholds are for what was held out of training."""
    unseen = ("templates",)
    hops = {"capital": 0.90}
    rows = [
        Row("facts, unseen phrasings", suite.facts(model), 0.99),
        *ioi_rows(model, suite),
        *verdict_rows(model, suite),
        Row("repeated random words, second half", suite.repetition(model), 0.95),
        Row("agreement across attractors, unseen pairs", suite.agreement(model), 0.97),
        Row("years, unseen phrasings: probability on later ones", suite.years(model, unseen), 0.90),
        *pronoun_rows(model, suite),
        *(
            Row(f"two hops, unseen combinations: {hop}", value, hops.get(hop))
            for hop, value in suite.hops(model).items()
        ),
        Row("made-up words, second half", suite.made_up(model)),
        Row("calendar, trained phrasings", suite.calendar(model)),
        Row("calendar, unseen phrasings", suite.calendar(model, unseen), 0.95),
        Row("arithmetic, trained sums", suite.arithmetic(model)),
        Row("arithmetic, unseen phrasings", suite.arithmetic(model, unseen), 0.95),
        Row("arithmetic, unseen order", suite.arithmetic(model, ("entities",))),
        Row("brackets: the right kind closes", suite.brackets(model)),
    ]
    for family, (loss, floor) in suite.losses(model).items():
        exact = family in EXACT
        note = f"{loss:.3f} against {floor:.3f} nats per token" + ("" if exact else ", near-exact")
        limit = 1.05 if exact else 1.10
        rows.append(Row(f"loss over floor: {family}", loss / floor, limit, "below", note))
    return rows


def topic_rows(model: LanguageModel, steps: int = 1_500) -> list[Row]:
    """A quick TopK autoencoder of the middle layer: F1 of each topic's best latent, and controls.

    On prose, at the tokens from which a perfect reader can know the topic; k = 32.
    """
    site = ("resid_post", model.n_layers // 2)
    train, test = (
        labelled_tokens(model, site, tokens, seed, "tinyworld:prose")
        for seed, tokens in ((0, 250_000), (1, 60_000))
    )
    coder = fit(train.x, TrainConfig(8 * model.d_model, 32, steps=steps, batch=2_048))
    scores = concept_scores(coder, test, test.scorable())
    rows = []
    for kind, found in scores.items():
        f1 = [best.f1 for best in found]
        limit = {"latent": (0.75, "above"), "random direction": (0.45, "below")}.get(kind, ())
        note = f"{min(f1):.2f} to {max(f1):.2f}"
        rows.append(Row(f"topic F1, best {kind}: median", float(np.median(f1)), *limit, note=note))
    return rows


def table(rows: list[Row]) -> str:
    """The skills as text, one line each."""
    lines = [f"{'skill':52} {'value':>8}  {'threshold':12} met"]
    for row in rows:
        sign = {"above": "≥", "below": "≤"}[row.better]
        wanted = "" if row.threshold is None else f"{sign} {row.threshold:.2f}"
        met = "" if row.threshold is None else ("yes" if row.met else "NO")
        lines.append(f"{row.skill:52} {row.value:8.3f}  {wanted:12} {met:4} {row.note}".rstrip())
    return "\n".join(lines)


def main(name: tyro.conf.Positional[str] = "tiny-gemma", topics: bool = True) -> int:
    """What a model can do, measured anew; exit code 1 when a threshold is missed.

    Args:
        name: a model that ships (tiny-gemma, tiny-gemma-twin, stranger), or a model's folder
        topics: train a quick autoencoder too, and score its latents
    """
    try:
        model = load_model(name)
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    rows = measure(model.hf, Suite(World(), model.tokenizer))
    if topics:
        rows += topic_rows(model)
    print(table(rows))
    return 0 if all(row.met for row in rows) else 1
