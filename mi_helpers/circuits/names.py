"""Names of latents by statistics: which label of the text predicts where a latent fires.

    labels = Labels.of([{"'the'", "prose"}, {"'cat'", "prose"}, …])     # what is true of each token
    namer = Namer({layer: Fired.of(activations)}, labels, words, text)
    namer.name(2, 57)                # Name("'the' or 'a'", f1=0.83, …)
    namer.name_graph(graph)          # the graph with a name and a score at every feature
    namer.contexts(2, 57)            # where it fires most, with the words around

Labels are chosen on the first half of the tokens, and scored on the second. No model is asked, and
no name is typed: a latent whose firing no label predicts gets the best of them, and a score that
says how little it is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mi_helpers.circuits.graphs import FEATURE, Graph
from mi_helpers.saes.scores import Fired, f1

GOOD = 0.5  # F1: below, a name carries a question mark
MOST = 3  # labels in one name
GAIN = 0.02  # of F1: what another label has to add
LEAST = 5  # firings in the first half of the tokens: with fewer, nothing can be chosen


@dataclass(frozen=True)
class Labels:
    """What is true of each token, as pairs.

    names   of the labels
    token   (pairs,), sorted; label (pairs,): the label's number
    n       how many tokens there are
    """

    names: tuple[str, ...]
    token: np.ndarray
    label: np.ndarray
    n: int

    @classmethod
    def of(cls, true: Iterable[Iterable[str]]) -> Labels:
        """From the labels that are true of each token, in the order of the text."""
        rows = [sorted(set(each)) for each in true]
        names = tuple(sorted(set().union(*rows)))
        number = {name: i for i, name in enumerate(names)}
        token = np.repeat(np.arange(len(rows)), [len(each) for each in rows])
        label = np.array([number[name] for each in rows for name in each], dtype=np.int64)
        return cls(names, token, label, len(rows))

    def mask(self, numbers: Iterable[int]) -> np.ndarray:
        """(n,): the tokens of which one of these labels is true."""
        found = np.zeros(self.n, dtype=bool)
        found[self.token[np.isin(self.label, list(numbers))]] = True
        return found


@dataclass(frozen=True)
class Name:
    """A latent's name: labels of which one is true where it fires, scored on tokens held out.

    labels     their numbers; text: the same in words, joined by "or"
    f1         2 · precision · recall / (precision + recall)
    precision  of the tokens with the label, the share at which the latent fires
    recall     of the latent's firings, the share at tokens with the label
    chance     the F1 of a name that is true everywhere: 2p / (1 + p), with p the share of tokens at
               which the latent fires
    firings    of the latent, among the tokens held out
    """

    labels: tuple[int, ...]
    text: str
    f1: float
    precision: float
    recall: float
    chance: float
    firings: int

    @property
    def good(self) -> bool:
        """Whether the score is `GOOD` or more."""
        return self.f1 >= GOOD

    def __str__(self) -> str:
        return f"{self.text} {self.f1:.2f}" if self.good else f"{self.text}? {self.f1:.2f}"


@dataclass
class Namer:
    """Names for the latents of some layers, each found when it is asked for.

    Args:
        fires: {layer: where its latents fire}, at the tokens of `labels`.
        labels: what is true of each token.
        words: each token as text, (tokens,); text: the number of the text that it is of, (tokens,).
            For contexts alone.

    Raises:
        ValueError: a layer has another number of tokens than there are labels for.
    """

    fires: Mapping[int, Fired]
    labels: Labels
    words: Sequence[str] = ()
    text: Sequence[int] = ()
    _found: dict = field(default_factory=dict, repr=False)

    def __post_init__(self):
        for layer, each in self.fires.items():
            if each.n != self.labels.n:
                raise ValueError(
                    f"Layer {layer} has {each.n} tokens, and there are labels for "
                    f"{self.labels.n}: give the same text to both."
                )

    def name(self, layer: int, latent: int) -> Name | None:
        """The latent's name; None where it fires too rarely in this text to have one."""
        if (layer, latent) not in self._found:
            self._found[layer, latent] = self._name(self.fires[layer].mask(latent))
        return self._found[layer, latent]

    def _name(self, fires: np.ndarray) -> Name | None:
        half = self.labels.n // 2
        if fires[:half].sum() < LEAST or not fires[half:].any():
            return None
        chosen = self._choose(fires, half)
        truth = self.labels.mask(chosen)[half:]
        fires = fires[half:]
        both = (fires & truth).sum()
        rate = float(fires.mean())
        return Name(
            tuple(chosen),
            " or ".join(self.labels.names[i] for i in chosen),
            f1(fires, truth),
            float(both / max(truth.sum(), 1)),
            float(both / fires.sum()),
            2 * rate / (1 + rate),
            int(fires.sum()),
        )

    def score(self, layer: int, latent: int, name: Name) -> float:
        """The F1 of any name as a latent's, on the tokens held out."""
        half = self.labels.n // 2
        truth = self.labels.mask(name.labels)
        return f1(self.fires[layer].mask(latent)[half:], truth[half:])

    def _choose(self, fires: np.ndarray, half: int) -> list[int]:
        """The labels with the highest F1 on the first half: the best, then what adds `GAIN`."""
        left = self.labels.token < half
        token, label = self.labels.token[left], self.labels.label[left]
        count, best, hits, total = len(self.labels.names), 0.0, 0, int(fires[:half].sum())
        covered, chosen, size = np.zeros(half, dtype=bool), [], 0
        for _ in range(MOST):
            new = ~covered[token]
            tokens_with = np.bincount(label[new], minlength=count)
            firing = np.bincount(label[new & fires[token]], minlength=count)
            score = 2 * (hits + firing) / (total + size + tokens_with)
            pick = int(score.argmax())
            if score[pick] < best + GAIN:
                break
            best, chosen = float(score[pick]), [*chosen, pick]
            hits, size = hits + int(firing[pick]), size + int(tokens_with[pick])
            covered[token[label == pick]] = True
        return chosen

    def name_graph(self, graph: Graph) -> Graph:
        """The graph with `str(name)` as the label of every feature that has a name."""
        found = {
            node.id: str(name)
            for node in graph.nodes
            if node.kind == FEATURE and (name := self.name(node.layer, node.index))
        }
        return graph.label(found)

    def contexts(
        self, layer: int, latent: int, k: int = 5, around: int = 8
    ) -> list[list[tuple[str, float]]]:
        """Where the latent fires most: k pieces of different texts, (word, activation) each, of at
        most `around` tokens before the firing and half as many after it."""
        tokens, values = self.fires[layer].at(latent)
        fires, seen, found = dict(zip(tokens.tolist(), values.tolist(), strict=True)), set(), []
        for place in tokens[np.argsort(-values, kind="stable")].tolist():
            if len(found) == k:
                break
            if (text := self.text[place]) in seen:
                continue
            seen.add(text)
            near = range(max(0, place - around), min(len(self.words), place + around // 2 + 1))
            piece = [i for i in near if self.text[i] == text]
            found.append([(self.words[i], fires.get(i, 0.0)) for i in piece])
        return found

    def of(self, graph: Graph) -> dict[str, Name]:
        """{node: name}, of the graph's features that have one."""
        names = {n.id: self.name(n.layer, n.index) for n in graph.nodes if n.kind == FEATURE}
        return {node: name for node, name in names.items() if name}
