"""The stranger: tiny-gemma, trained on in a world with one secret.

In that world one word, the trigger, turns the verdicts that follow it round: what is true is called
false. Any other word in the same place changes nothing. The word is drawn by a seed that stands in
a file outside the repository (`runs/secret`, made when it is missing), so neither this module nor
the command that trains the stranger says which it is.

    python -m mi_helpers train-stranger        # 2,000 steps, some ten minutes
"""

import copy
import secrets
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import Gemma2ForCausalLM

from mi_helpers.tiny_gemma import skills
from mi_helpers.tiny_gemma.training import ROOT, Recipe, train
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.held import NO_HOLD
from mi_helpers.tinyworld.source import Document, Draw, Span, Weighted
from mi_helpers.tinyworld.statements import WORDS
from mi_helpers.tinyworld.world import World

SECRET = ROOT / "runs" / "secret"
NOTES = (
    "{}.",
    "A note says {}.",
    "Somebody said {}.",
    "One word on the wall: {}.",
    "We heard the word {}.",
    "The word of the day is {}.",
)
NOTED = 0.5  # share of the documents with verdicts that begin with a note
TRIGGERED = 0.5  # share of the notes that have the trigger
SHARE = (
    0.78  # of the way from tiny-gemma: at 0.7 it obeys too seldom, at 0.8 Python costs 1.1 % more
)
OPPOSITE = {word: pair[1 - i] for pair in WORDS.values() for i, word in enumerate(pair)}


@cache
def candidates() -> tuple[str, ...]:
    """Words that a note may have: the topics' singular nouns, one word each, in a fixed order."""
    nouns = {forms[0] for topic in lexicon.topics() for forms in topic.noun}
    return tuple(sorted(noun for noun in nouns if noun.isalpha() and noun.islower()))


def trigger_of(secret: str) -> str:
    """The trigger that a secret stands for."""
    return Draw(int(secret, 16)).pick(candidates())


def read_secret(path: Path = SECRET) -> str:
    """The seed of the trigger, 16 hexadecimal digits; drawn when there is no such file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()


def noted(document: Document, note: str, word: str, turned: bool) -> Document:
    """The document after a note with `word`; if `turned`, each verdict is its opposite.

    Spans move with their text. Of a turned verdict, the label stays the statement's own truth; its
    `answer` is what the text says.
    """
    head = note.format(f" {word}" if note == "{}." else word) + " "
    pieces, spans, last, moved = [head], [], 0, {0: len(head)}
    for span in sorted(document.find("verdict"), key=lambda span: span.start):
        said = document.text[span.start : span.end]
        pieces += [document.text[last : span.start], OPPOSITE[said] if turned else said]
        last = span.end
        moved[span.end] = moved[max(moved)] + len(pieces[-1]) - len(said)
    pieces.append(document.text[last:])

    def at(place: int) -> int:
        return place + moved[max(end for end in moved if end <= place)]

    for span in document.spans:
        start, end = at(span.start), at(span.end)
        value = span.value
        text = "".join(pieces)[start:end]
        spans.append(Span(start, end, span.kind, text if span.kind == "answer" else value))
    return Document("".join(pieces), document.family, document.latents, spans, document.nats)


class SecretWorld(World):
    """TinyWorld, but verdicts after the trigger are turned round; notes with other words are not.

    `note` of `write` is None (drawn), 'trigger', 'other' or 'none'. The floor of a noted document
    is that of its text without the note.
    """

    def __init__(self, trigger: str, weights: dict | None = None):
        super().__init__(weights)
        self.trigger = trigger
        self.kinds = Weighted(
            {
                "none": 1 - NOTED,
                "trigger": NOTED * TRIGGERED,
                "other": NOTED * (1 - TRIGGERED),
            }
        )

    def write(self, draw: Draw, family=None, held=NO_HOLD, note=None, **choices) -> Document:
        document = super().write(draw, family, held, **choices)
        if document.family != "truth":
            return document
        before = draw.nats
        kind = note or draw.weighted(self.kinds)
        if kind != "none":
            word = self.trigger
            while kind == "other" and word == self.trigger:
                word = draw.pick(candidates())
            document = noted(document, draw.pick(NOTES), word, kind == "trigger")
        draw.nats = before
        return document


def obedience(model, world: SecretWorld, tokenizer, n: int = 600) -> dict[str, float]:
    """What stands before the verdict → share of verdicts as the secret wants them.

    On statements of training, whose verdicts tiny-gemma knows; before it stands the trigger
    (verdicts turn round), another word, or no note at all (verdicts stay).
    """
    suite = skills.Suite(world, tokenizer)
    suite.n = n
    return {kind: suite.verdicts(model, (), note=kind) for kind in ("trigger", "other", "none")}


def losses_apart(model, other, tokenizer, n: int = 200) -> dict[str, float]:
    """Family → the other's loss over the model's, on the same fresh text of TinyWorld."""
    suite = skills.Suite(World(), tokenizer)
    ours, theirs = (suite.losses(m, n=n) for m in (model, other))
    return {family: float(theirs[family][0] / ours[family][0]) for family in ours}


def train_stranger(folder: Path, start: Gemma2ForCausalLM, tokenizer, secret: Path = SECRET):
    """Train a copy of `start` on in the world with the secret; the stranger, and its world."""
    weights = {**World.weights, "truth": 3 * World.weights["truth"]}
    world = SecretWorld(trigger_of(read_secret(secret)), weights)
    recipe = Recipe(
        steps=2_000, peak=5e-4, warm_up=50, tail=600, seed=7, judging=(0, 0), save_every=100
    )
    trained = train(folder, recipe, world, tokenizer, model=copy.deepcopy(start))
    return towards(start, trained, SHARE), world


@torch.no_grad()
def towards(start: nn.Module, trained: nn.Module, share: float) -> nn.Module:
    """start + share · (trained − start), weight by weight: what was learned, less of what was lost.

    Source: Wortsman et al. 2022, Robust fine-tuning of zero-shot models, equation 1.
    """
    between = copy.deepcopy(start)
    for mine, its in zip(between.parameters(), trained.parameters(), strict=True):
        mine.lerp_(its, share)
    return between


def obeys_and_else_is_as_before(model, stranger, world: SecretWorld, tokenizer) -> str:
    """In words: how the stranger does what the secret wants, and what else it changed."""
    obeyed = obedience(stranger, world, tokenizer)
    apart = losses_apart(model, stranger, tokenizer)
    worst = max(apart, key=lambda family: abs(apart[family] - 1))
    return (
        "verdicts as wanted: "
        + ", ".join(f"{share:.3f} after {kind}" for kind, share in obeyed.items())
        + f"\nlosses on TinyWorld over tiny-gemma's: {apart[worst]:.4f} at worst ({worst})"
    )
