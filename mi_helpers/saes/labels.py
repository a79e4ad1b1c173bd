"""TinyWorld's truth for every row of a harvest: what `scores` holds latents and neurons against.

labels = token_labels(held, model.tokenizer)
truth, names = labels.table()                        # (known rows, concepts)
scores = score_units(firings(held, coder).where(labels.known), truth, names)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mi_helpers.files import RunError
from mi_helpers.saes.activations import Activations
from mi_helpers.saes.features import words
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
        """Mask (rows,) of the rows with a label."""
        return self.index >= 0

    def table(self, names: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
        """(truth (known rows, concepts), names), for `scores.score_units`."""
        chosen = tuple(names or self.names)
        for name in chosen:
            if name not in self.names:
                raise ValueError(f"There is no label {name!r}; there are {', '.join(self.names)}.")
        wanted = np.array([self.names.index(name) for name in chosen])
        return self.index[self.known][:, None] == wanted, chosen


def subject(tokenizer, source: TinyWorldText, document: Document) -> list[str | None]:
    """What each token is about: prose's topic where a perfect reader is sure of it, the family of
    Norwegian and Python, "other" elsewhere; unknown in facts, which name what topics name too."""
    n = len(offsets(tokenizer, document.text)[0])
    if document.family == "prose":
        sure = token_posterior(tokenizer, source.world, document)[1:]  # without <bos>
        topics = source.world.topics
        return [topics[int(p.argmax())] if p.max() >= KNOWN else None for p in sure]
    if document.family in ("facts", "two_hop"):
        return [None] * n
    return [document.family if document.family in ("norwegian", "python") else "other"] * n


def token_labels(held: Activations, tokenizer, label=subject) -> Labels:
    """TinyWorld's labels of a harvest's rows: its documents are written again and labelled.

    label  (tokenizer, source, document) → a name or None per token, `<bos>` left out

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
