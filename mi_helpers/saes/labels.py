"""TinyWorld's truth for every row of a harvest: what units are scored against.

labels = token_labels(held, model.tokenizer)
truth, names = labels.table()                         # (known rows, concepts)
tokens = labelled_tokens(model, ("resid_post", 3))    # activations with their labels, in memory
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mi_helpers.files import RunError
from mi_helpers.layouts import Key
from mi_helpers.models import LanguageModel
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.features import words
from mi_helpers.saes.harvest import HarvestConfig, harvest
from mi_helpers.saes.sources import TinyWorldText, open_source
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.tokenizer import offsets, token_posterior

KNOWN = 0.9  # a token counts where a perfect reader is this sure of the topic


@dataclass(frozen=True)
class Labels:
    """One label per row: names[index[row]], or unknown where index is -1."""

    names: tuple[str, ...]
    index: np.ndarray

    @property
    def known(self) -> np.ndarray:
        """Whether each row has a label, (rows,)."""
        return self.index >= 0

    def table(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """(truth (known rows, concepts), names), for `scores.score_units`."""
        return self.index[self.known][:, None] == np.arange(len(self.names)), self.names


def subject(tokenizer, source: TinyWorldText, document: Document) -> list[str | None]:
    """What each token is about, `<bos>` left out; None where it is unknown.

    Prose has its topic where a perfect reader is sure of it, Norwegian and Python their family, and
    other families "other". Facts and verdicts are unknown, as they name what topics name too.
    """
    n = len(offsets(tokenizer, document.text)[0])
    if document.family == "prose":
        sure = token_posterior(tokenizer, source.world, document)[1:]  # without <bos>
        topics = source.world.topics
        return [topics[int(p.argmax())] if p.max() >= KNOWN else None for p in sure]
    if document.family in ("facts", "two_hop", "truth"):
        return [None] * n
    return [document.family if document.family in ("norwegian", "python") else "other"] * n


def token_labels(held: Activations, tokenizer, label: Callable = subject) -> Labels:
    """TinyWorld's labels of a harvest's rows: its documents are written again and labelled.

    Args:
        label: (tokenizer, source, document) -> a name or None per token, `<bos>` left out.

    Raises:
        RunError: the harvest is not of TinyWorld.
    """
    text = held.manifest["text"]
    if not text["name"].startswith("tinyworld"):
        raise RunError(f"Only TinyWorld has labels; this harvest is of {text['name']}.")
    source = open_source(text["name"], text["seed"])
    found: list[str | None] = []
    for index in range(len(held.sizes)):
        document, labels = -1, []
        for number, position in words(held, index).place.tolist():
            if number != document:
                document, labels = number, label(tokenizer, source, source.document(number))
            found.append(labels[position])
    names = tuple(sorted({name for name in found if name is not None}))
    number = {name: i for i, name in enumerate(names)} | {None: -1}
    return Labels(names, np.array([number[name] for name in found], dtype=np.int32))


# --------------------------------------------------------------------------- labelled activations


@dataclass(frozen=True)
class LabelledTokens:
    """Tokens in the order of the text, with their activations and labels.

    Args:
        x: (n, width), the activations at a site.
        neurons: (n, d_mlp), the neurons of the MLP in the same block.
        truth: (n, concepts), whether the token is about the concept.
        names: of the concepts.
        tokens: (n,), token ids.
    """

    x: Tensor
    neurons: Tensor
    truth: np.ndarray
    names: tuple[str, ...]
    tokens: np.ndarray

    def only(self, names: Sequence[str]) -> LabelledTokens:
        """The same tokens with these concepts alone."""
        columns = [self.names.index(name) for name in names]
        return LabelledTokens(
            self.x, self.neurons, self.truth[:, columns], tuple(names), self.tokens
        )

    def scorable(self, names: Sequence[str] | None = None) -> list[str]:
        """Those of `names` (None: all) that occur in both halves of the text, as a score needs."""
        half = len(self.truth) // 2
        both = self.truth[:half].any(0) & self.truth[half:].any(0)
        names = self.names if names is None else names
        return [name for name in names if name in self.names and both[self.names.index(name)]]


def labelled_tokens(
    model: LanguageModel,
    site: Key,
    tokens: int = 20_000,
    seed: int = 1,
    text: str = "tinyworld:prose,norwegian",
) -> LabelledTokens:
    """Tokens of TinyWorld with a known label, with the activations at a site and its MLP's neurons.

    A token of prose is labelled where a reader who knows the generator is at least 90 % sure of the
    topic from what stands before it; Norwegian is labelled throughout.

    Args:
        site: (name, layer); the neurons are those of the same layer.
        tokens: how many are read; those without a label are left out.
        seed, text: see `sources.open_source`.
    """
    config = HarvestConfig(site, ("post", site[1]), tokens)
    with tempfile.TemporaryDirectory() as folder:
        held = harvest(model, open_source(text, seed), folder, config, progress=False)
        labels = token_labels(held, model.tokenizer)
        x, neurons = held.slice(0, held.rows)
        ids = held.tokens.numpy()
    truth, names = labels.table()
    known = labels.known
    return LabelledTokens(x[known], neurons[known], truth, names, ids[known])
