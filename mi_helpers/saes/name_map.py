"""Names on a map: units whose names have words in common stand together, under a title.

found = name_map(explanations)
found.titles[found.cluster[0]], found.xy[0]           # "chess, board", where the first one is
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import hstack
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.manifold import TSNE
from sklearn.preprocessing import normalize

from mi_helpers.errors import Refused
from mi_helpers.saes.explainers import Explanation

WORD = r'(?<![^\s,&"()])[^\s,&"():]+(?=[\s,&"()]|$)'  # of a name; "at:" and the like are none
WIDTH = 50  # numbers that a name is made into, before it is put into a cluster
PIECES = 0.3  # how much beginnings, middles and ends of words weigh beside words
MOST = 60  # clusters
TITLE = 3  # words
GOLDEN = np.pi * (3 - np.sqrt(5))


@dataclass(frozen=True)
class NameMap:
    """Named units on a plane.

    Args:
        unit: (n,), their numbers.
        cluster: (n,), the number of each one's cluster.
        xy: (n, 2), where each one is. Clusters that are near have names of like words; within a
            cluster, who is nearest the middle has the most typical name.
        titles: of the clusters: the words that tell their names from others.
    """

    unit: np.ndarray
    cluster: np.ndarray
    xy: np.ndarray
    titles: tuple[str, ...]


def name_map(
    explanations: Sequence[Explanation], clusters: int | None = None, seed: int = 0
) -> NameMap:
    """Clusters of names (k-means on tf-idf), and a place for each.

    Args:
        clusters: None means √n, at most 60.

    Raises:
        Refused: there are no names.
    """
    if not explanations:
        raise Refused("There are no names to put on a map.")
    n = len(explanations)
    k = min(n, clusters or min(MOST, round(np.sqrt(n))))
    words, vectors = _vectors([each.text for each in explanations], seed)
    k = min(k, len(np.unique(vectors.round(6), axis=0)))
    means = KMeans(k, n_init=4, random_state=seed).fit(vectors)
    order = np.argsort(-np.bincount(means.labels_, minlength=k), kind="stable")  # largest first
    cluster = np.argsort(order)[means.labels_]
    centres = means.cluster_centers_[order]
    size = np.bincount(cluster, minlength=k)
    middle = _apart(_plane(centres, seed), np.sqrt(size))
    xy = np.zeros((n, 2))
    for c in range(k):
        mine = np.flatnonzero(cluster == c)
        far = np.linalg.norm(vectors[mine] - centres[c], axis=1)
        turn = np.arange(len(mine))
        around = np.sqrt(turn)[:, None] * np.stack(
            [np.cos(GOLDEN * turn), np.sin(GOLDEN * turn)], 1
        )
        xy[mine[np.argsort(far, kind="stable")]] = middle[c] + 0.8 * around
    unit = np.array([each.unit for each in explanations])
    return NameMap(unit, cluster, xy, _titles(words, cluster, k))


def _vectors(names: Sequence[str], seed: int):
    """(tf-idf of the words with their vectorizer, a vector of length 1 for each name)."""
    by_word = TfidfVectorizer(token_pattern=WORD, sublinear_tf=True)
    by_piece = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 4), sublinear_tf=True)
    words = by_word.fit_transform(names)
    both = hstack([words, PIECES * by_piece.fit_transform([f"  {name}  " for name in names])])
    width = min(WIDTH, min(both.shape) - 1)
    if width > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # 0 / 0 where all names are the same
            both = TruncatedSVD(width, random_state=seed).fit_transform(both)
    else:
        both = both.toarray()
    return (words, by_word.get_feature_names_out()), normalize(both)


def _titles(words, cluster: np.ndarray, k: int) -> tuple[str, ...]:
    """The words with the highest mean tf-idf in each cluster, less that in all names."""
    table, terms = words
    everywhere = np.asarray(table.mean(0)).ravel()
    titles = []
    for c in range(k):
        own = np.asarray(table[np.flatnonzero(cluster == c)].mean(0)).ravel() - everywhere
        best = [i for i in np.argsort(-own, kind="stable")[:TITLE] if own[i] > 0]
        best = best or [int(np.asarray(table.mean(0)).ravel().argmax())]
        title = ", ".join(terms[i] for i in best)
        titles.append(title + f" ({titles.count(title) + 1})" * (title in titles))
    return tuple(titles)


def _plane(centres: np.ndarray, seed: int) -> np.ndarray:
    """The centres on a plane, (k, 2): near ones near."""
    k = len(centres)
    if k < 4:
        return np.stack([np.arange(k), np.zeros(k)], 1).astype(float)
    return TSNE(
        perplexity=min(15.0, (k - 1) / 3), init="random", random_state=seed, method="exact"
    ).fit_transform(centres.astype(np.float64))


def _apart(middle: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The middles of discs, moved until none overlap: each pair that does is pushed apart."""
    spread = np.linalg.norm(middle - middle.mean(0), axis=1).mean()
    middle = (middle - middle.mean(0)) * (np.sqrt((radius**2).sum()) / max(spread, 1e-9))
    wanted = radius[:, None] + radius[None, :] + 2
    np.fill_diagonal(wanted, 0)
    for _ in range(500):
        step = middle[:, None] - middle[None, :]
        distance = np.linalg.norm(step, axis=-1)
        short = np.maximum(wanted - distance, 0)
        if short.max(initial=0) < 1e-3:
            break
        share = short / np.maximum(distance, 1e-9)
        middle = middle + 0.5 * (share[..., None] * step).sum(1)
    return middle
