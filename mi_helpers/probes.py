"""Linear probes: what can be read from activations, and the controls that say what that means.

    probe = fit_probe(train_x, train_y)                     # scikit-learn's logistic regression
    probe.score(test_x, test_y)
    control = control_task(words, train_y)                  # {word: random label}: selectivity
    v = mean_difference(train_x, train_y)
    project_out(x, v, midpoint(train_x, train_y))           # without that direction

Activations x (n, d) are those of any model at n tokens, as arrays. A probe shows that something
*can* be read; whether the model uses it, an intervention shows.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.parallel import ThreadpoolController

from mi_helpers.arguments import array, number, shown, token_ids, whole
from mi_helpers.layouts import Key, ModelError
from mi_helpers.models import LanguageModel

ALPHA = 0.1  # ridge penalty of the circular probe, for features of unit mean square length

# -- probes ----------------------------------------------------------------------------------


def some_layers(model: LanguageModel, count: int = 6) -> list[Key]:
    """The embedding and at most `count` layers' resid_post, evenly spaced, the last one included.

    All layers of tiny-gemma, a quarter of those of Gemma 2 2B.
    """
    whole("count", count, 1)
    chosen = np.unique(np.linspace(0, model.n_layers - 1, min(count, model.n_layers)).round())
    return [("embed", None), *(("resid_post", int(layer)) for layer in chosen)]


def fit_probe(x, y, C: float = 0.1, max_iter: int = 200) -> Pipeline:
    """A linear probe: p(y | x) = softmax(W z + b) with z = (x - mean) / sd, by lbfgs.

    Args:
        x: (n, d), an array or a sparse matrix of counts.
        y: labels (n,), of two classes or more.
        C: inverse strength of the penalty |W|² / 2C, which a probe of n ≈ d examples needs.

    Returns:
        the fitted pipeline: `score(x, y)` is its accuracy, `predict_proba(x)` gives (n, classes).

    Raises:
        ValueError: no examples, unequal lengths, one class only, features that are not finite.
    """
    sparse = hasattr(x, "toarray")
    shape = x.shape if hasattr(x, "shape") else np.shape([0] * len(x or ()))
    if shape[:1] == (0,):
        raise ModelError("The probe has no examples: give at least one of each class.")
    x = x if sparse else array("x", x, "n d")
    n, y = x.shape[0], _labels(y)
    _check_lengths(n, len(y))
    number("C", C, above=0)
    whole("max_iter", max_iter, 1)
    if len(set(y.tolist())) < 2:
        raise ModelError(f"All {n} labels are {y.tolist()[0]!r}: a probe needs two classes.")
    probe = make_pipeline(
        StandardScaler(with_mean=not sparse), LogisticRegression(C=C, max_iter=max_iter)
    )
    with warnings.catch_warnings(), _libraries().limit(limits=1):  # small: one core is faster
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is a penalty, too
        return probe.fit(x, y)


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _plain(x):
    """What NumPy can read: a tensor's numbers are fetched from its device."""
    return x.detach().cpu() if hasattr(x, "detach") and not x.is_meta else x


def _labels(y) -> np.ndarray:
    """Labels (n,), of any kind but NaN."""
    try:
        found = np.asarray(_plain(y))
    except (TypeError, ValueError, NotImplementedError):
        found = np.zeros(())
    if found.ndim != 1 or (found.dtype.kind == "f" and np.isnan(found).any()):
        raise ModelError(f"y is {shown(y)}: expected labels (n,), one for each example.")
    return found


def _two_classes(x, y) -> tuple[np.ndarray, np.ndarray]:
    """x (n, d) and y (n,), booleans of which some are true and some false."""
    x, y = array("x", x, "n d"), _labels(y)
    _check_lengths(len(x), len(y))
    if not np.isin(y, (0, 1)).all():
        raise ModelError(f"y holds {sorted(set(y.tolist()), key=str)[:3]}: expected booleans.")
    y = y.astype(bool)
    if y.all() or not y.any():
        raise ModelError(f"All {len(y)} labels are equal: a difference needs two classes.")
    return x, y


def _check_lengths(n: int, labels: int) -> None:
    if n != labels:
        raise ModelError(f"There are {n} examples and {labels} labels: give one label to each.")


def split_by_group(groups: Sequence, share: float = 0.3, seed: int = 0) -> np.ndarray:
    """A mask (n,), True for the test set: about `share` of the groups, each as a whole.

    Raises:
        ValueError: fewer than two groups, or a share that leaves one side empty.
    """
    names = sorted(set(groups))
    number("share", share, 0, 1)
    n = round(share * len(names))
    if not 0 < n < len(names):
        raise ModelError(f"A share of {share} of {len(names)} groups leaves one side empty.")
    chosen = set(random.Random(seed).sample(names, n))
    return np.array([group in chosen for group in groups])


def surprise(p: np.ndarray, y, classes: Sequence) -> np.ndarray:
    """-log p(the right label), nats, (n,): the mean over fresh examples is a cross-entropy.

    Args:
        p: probabilities (n, classes), a probe's or those of an ideal reader, whose mean estimates
            H(Y | X).
        y: labels (n,).
        classes: the label of each column.

    Raises:
        ValueError: unequal lengths, or a label that is not among the classes.
    """
    p, y = array("p", p, "n classes", {"classes": len(classes)}), _labels(y)
    _check_lengths(len(p), len(y))
    if p.min() < 0 or p.max() > 1 + 1e-6:
        raise ModelError(f"p holds {p.min():g} to {p.max():g}: expected probabilities.")
    if strange := set(np.asarray(y).tolist()) - set(np.asarray(classes).tolist()):
        raise ModelError(f"The probe has never seen the label {sorted(strange)[0]!r}: train on it.")
    column = {label: i for i, label in enumerate(np.asarray(classes).tolist())}
    index = [column[label] for label in np.asarray(y).tolist()]
    return -np.log(np.maximum(p[np.arange(len(p)), index], 1e-300))


def bootstrap(values, seed: int = 0, draws: int = 1000) -> tuple[float, float, float]:
    """The mean of values (n,), and the ends of its 95 % interval from resampling them.

    Raises:
        ValueError: no values.
    """
    values = array("values", values, "n")
    whole("draws", draws, 1)
    if len(values) == 1:
        return (float(values[0]),) * 3
    rng = np.random.default_rng(seed)
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=draws, method="percentile", rng=rng
    ).confidence_interval
    return float(values.mean()), float(found.low), float(found.high)


# -- controls --------------------------------------------------------------------------------


def control_task(words: Sequence[str], labels: Sequence, seed: int = 0) -> dict:
    """{word type: a label drawn at random from `labels`}, the same for every token of the type.

    A probe that answers this has learned it by itself, since nothing in the model knows it.
    *Selectivity* is the probe's accuracy on its task minus that on this one.

    Source: Hewitt and Liang 2019, Designing and Interpreting Probes with Control Tasks.
    """
    rng, labels = random.Random(seed), list(labels)
    if not labels or isinstance(words, str):
        raise ModelError("labels and words are lists: expected at least one label.")
    return {word: rng.choice(labels) for word in sorted(set(words))}


def token_features(model: LanguageModel, tokens: np.ndarray):
    """All that a model without context could use, one-hot: sparse, (n, 2 · d_vocab).

    Args:
        tokens: (n, 2), the id of the token before the one that is read, and its own.
    """
    tokens = np.asarray(_plain(tokens))
    if tokens.ndim != 2 or tokens.shape[1] != 2 or tokens.dtype.kind not in "iu":
        raise ModelError(f"tokens has shape {tokens.shape}: expected two ids for each, (n, 2).")
    token_ids("tokens", tokens, model.d_vocab)
    return OneHotEncoder(categories=[range(model.d_vocab)] * 2).fit_transform(tokens)


# -- directions ------------------------------------------------------------------------------


def mean_difference(x, y) -> np.ndarray:
    """The mean of x where y is true minus the mean where it is false, (d,).

    Args:
        x: (n, d); y: booleans (n,).

    Raises:
        ValueError: unequal lengths, or one class only.
    """
    x, y = _two_classes(x, y)
    return x[y].mean(0) - x[~y].mean(0)


def midpoint(x, y) -> np.ndarray:
    """The point half way between the two classes' means, (d,).

    Args:
        x: (n, d); y: booleans (n,).

    Raises:
        ValueError: as for `mean_difference`.
    """
    x, y = _two_classes(x, y)
    return (x[y].mean(0) + x[~y].mean(0)) / 2


def probe_direction(probe: Pipeline) -> np.ndarray:
    """The direction of a probe of two classes in the activations' own units, W / sd, (d,).

    Raises:
        ValueError: the probe has more classes.
    """
    if not isinstance(probe, Pipeline) or not hasattr(probe[-1], "coef_"):
        raise ModelError(f"probe is {shown(probe)}: expected what `fit_probe` returned.")
    scaler, classifier = probe[0], probe[-1]
    if len(classifier.coef_) != 1:
        raise ModelError(f"The probe has {len(classifier.classes_)} classes, not two.")
    return classifier.coef_[0] / scaler.scale_


def find_direction(x, y, method: str = "mean difference", seed: int = 0) -> np.ndarray:
    """A direction for y in x, (d,).

    Args:
        x: (n, d); y: booleans (n,).
        method: "mean difference", "probe" or, as a control, "random", which `seed` decides.

    Raises:
        ValueError: an unknown method.
    """
    if method == "mean difference":
        return mean_difference(x, y)
    if method == "probe":
        return probe_direction(fit_probe(x, y))
    if method == "random":
        return np.random.default_rng(seed).normal(size=array("x", x, "n d").shape[1])
    raise ModelError(f"There is no method {method!r}: mean difference, probe or random.")


def project_out(x, direction, centre=0.0):
    """x - ((x - centre) · v) v with v = direction / |direction|, (..., d).

    Along v every row ends up level with the centre; across v nothing changes.

    Args:
        x: (..., d); direction: (d,), of any length; centre: (d,). All arrays, or all tensors.

    Raises:
        ValueError: the direction is zero, or of another width than x; NaN in any of them.
    """
    for what, given in (("x", x), ("direction", direction), ("centre", centre)):
        if not np.isfinite(np.asarray(_plain(given))).all():
            raise ModelError(f"{what} holds NaN or infinity: look for where it comes from.")
    if np.ndim(direction) != 1 or np.shape(x)[-1:] != np.shape(direction):
        raise ModelError(
            f"direction has shape {tuple(np.shape(direction))} and x {tuple(np.shape(x))}: "
            "expected (d,) and (..., d)."
        )
    if np.ndim(centre) and np.shape(centre)[-1:] != np.shape(direction):
        raise ModelError(f"centre has shape {tuple(np.shape(centre))}: expected that of direction.")
    length = (direction * direction).sum() ** 0.5
    if not length > 0:
        raise ModelError("The direction is zero: there is nothing to project out.")
    v = direction / length
    return x - ((x - centre) @ v)[..., None] * v


# -- circles ---------------------------------------------------------------------------------


def class_means(x, y, n: int) -> np.ndarray:
    """The mean of x for each label 0 … n-1, (n, d), centred and of mean square length 1.

    Args:
        x: (examples, d); y: labels (examples,), 0 to n - 1.

    Raises:
        ValueError: a label without examples.
    """
    x, y, n = array("x", x, "n d"), _labels(y), whole("n", n, 1)
    _check_lengths(len(x), len(y))
    if strange := set(y.tolist()) - set(range(n)):
        raise ModelError(f"y holds {sorted(strange, key=str)[0]!r}: expected 0 to {n - 1}.")
    if missing := [i for i in range(n) if not (y == i).any()]:
        raise ModelError(f"No example has the label {missing[0]}: give more documents.")
    means = np.array([x[y == i].mean(0) for i in range(n)])
    means -= means.mean(0)
    length = np.sqrt((means**2).sum(1).mean())
    return means / length if length > 1e-6 else means


def held_out_weights(means: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Row i: the weights with which ridge regression, trained without class i, mixes the targets of
    the others, (n, n).

    So (weights @ targets)[i] is its prediction for class i, whatever the targets (n, k) are.

    Args:
        means: (n, d), as from `class_means`.
        alpha: the ridge penalty.
    """
    means, alpha = array("means", means, "n d"), number("alpha", alpha, above=0)
    n = len(means)
    if n < 2:
        raise ModelError("means has one row: expected two classes or more.")
    weights = np.zeros((n, n))
    for i in range(n):
        others = np.arange(n) != i
        ridge = Ridge(alpha=alpha).fit(means[others], np.eye(n)[others])
        weights[i] = ridge.predict(means[i : i + 1])[0]
    return weights


def on_circle(index, n: int) -> np.ndarray:
    """(cos, sin) of 2π index / n, (..., 2)."""
    angle = 2 * np.pi * array("index", index, "...") / whole("n", n, 1)
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def angle_between(a, b) -> np.ndarray:
    """The angle between vectors of two numbers, in degrees from 0 to 180, (...,)."""
    a, b = array("a", a, "... 2"), array("b", b, "... 2")
    turn = np.arctan2(a[..., 1], a[..., 0]) - np.arctan2(b[..., 1], b[..., 0])
    return np.degrees(np.abs((turn + np.pi) % (2 * np.pi) - np.pi))


def circle_error(weights: np.ndarray, order: Sequence[int]) -> float:
    """The mean angle between the predicted and the true places of held-out classes, in degrees.

    Args:
        weights: (n, n), as from `held_out_weights`.
        order: the place of each class on the circle, 0 to n - 1.
    """
    weights = array("weights", weights, "n n", {"n": len(weights)})
    if sorted(order) != list(range(len(weights))):
        raise ModelError(f"order is {shown(order)}: expected each of 0 to {len(weights) - 1} once.")
    truth = on_circle(order, len(weights))
    return float(angle_between(weights @ truth, truth).mean())


def all_orders(n: int, most: int = 1_000, seed: int = 0) -> np.ndarray:
    """The ways to place n classes on a circle, up to turning and mirroring it, (orders, n).

    All (n - 1)! / 2 of them for n up to 7, else `most` random ones. The first is 0, 1, …, n - 1.
    """
    whole("n", n, 3)
    whole("most", most, 1)
    if n <= 7:
        rest = [p for p in itertools.permutations(range(1, n)) if p[0] < p[-1]]
        return np.array([(0, *p) for p in rest])
    rng = np.random.default_rng(seed)
    return np.array([np.arange(n), *(rng.permutation(n) for _ in range(most - 1))])
