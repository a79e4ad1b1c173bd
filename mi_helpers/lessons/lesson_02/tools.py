"""What the learner of lesson 02 writes, written: the answers to its exercises."""

import random

import numpy as np


def read_at(model, text, end, site):
    """The stream at the token that holds the character text[end - 1], (d_model,).

    `end` is the end of a word. What stands after it must not matter.
    model.run_with_cache(text, [site]) gives logits and a cache; cache[site] is (1, pos, d_model).
    """
    _, cache = model.run_with_cache(text[:end], [site])
    return cache[site][0, -1]


def principal_directions(x, k):
    """The k directions along which x varies most, (k, d), the first the most.

    x (n, d), an array. Each has length 1 and is at right angles to the others; signs are free.
    """
    centred = x - x.mean(0)
    return np.linalg.svd(centred, full_matrices=False)[2][:k]


def mean_difference_probe(x, y, fresh):
    """Classify by the difference of the class means alone: booleans (m,), no training.

    x (n, d), y booleans (n,), fresh (m, d), all arrays. A fresh row is true if it lies beyond the
    point half way between the two means, in the direction of the true ones.
    """
    true, false = x[y].mean(0), x[~y].mean(0)
    return (fresh - (true + false) / 2) @ (true - false) > 0


def train_probe(x, y, steps, rate, penalty):
    """A linear probe trained by gradient descent: its weights (d,) and its bias, a number.

    x (n, d), y (n,) of 0 and 1. p(y = 1) = sigmoid(x @ w + b). The loss is the mean over examples
    of -log p(y), plus penalty / 2 · |w|². Begin at zero, take `steps` steps, each of `rate` times
    the gradient over all examples.
    """
    w, b = np.zeros(x.shape[1]), 0.0
    for _ in range(steps):
        error = 1 / (1 + np.exp(-(x @ w + b))) - y  # (n,)
        w = w - rate * (x.T @ error / len(x) + penalty * w)
        b = b - rate * error.mean()
    return w, b


def control_task(words, labels, seed):
    """A random label for each word type, always the same one: {word: label}.

    words   one word per example, many of them repeated
    labels  the examples' true labels; draw from this list, so that common labels stay common
    """
    rng = random.Random(seed)
    return {word: rng.choice(list(labels)) for word in sorted(set(words))}


def split_by_group(groups, share, seed):
    """A mask (n,), True for the test set: a random `share` of the *groups*, each as a whole.

    groups  one name per example, such as the landmark that its sentence is about
    """
    names = sorted(set(groups))
    chosen = random.Random(seed).sample(names, round(share * len(names)))
    return np.array([group in chosen for group in groups])


def excess(probe_p, ideal_p):
    """How many nats a probe pays more than the ideal reader, in expectation: (n,), one per example.

    probe_p, ideal_p  probabilities (n, classes), arrays; the ideal reader's may be 0
    The label is drawn with the ideal reader's probabilities. Each pays -log of what it gave it.
    """
    possible = np.where(ideal_p > 0, ideal_p, 1)
    return (ideal_p * (np.log(possible) - np.log(probe_p))).sum(1)


def push(model, tokens, site, position, vector):
    """The logits of the last token, (d_vocab,), with `vector` added to the stream at one position.

    tokens (1, pos), vector (d_model,), site such as ("resid_post", 3). In
    `with model.hooks({site: hook}):` a run goes on with hook(stream), where the stream is
    (1, pos, d_model). Afterwards the model is intact.
    """

    def hook(stream):
        stream = stream.clone()
        stream[:, position] += vector
        return stream

    with model.hooks({site: hook}):
        return model(tokens)[0, -1]


def project_out(x, v, centre):
    """Each row of x moved along the direction v until it is level with the centre, (n, d).

    x (n, d), v (d,) of any length, centre (d,), all tensors. Across v nothing changes.
    """
    u = v / v.norm()
    return x - ((x - centre) @ u)[:, None] * u


def share_lost(train, test, site, place, noun):
    """The share of the mean margin that is lost when the number of `noun` is removed at `place`.

    The mean difference is found in `train` and removed from `test`. place, noun: "head" or "last"
    train.stream[place][site], train.plural[noun]   arrays (n, d_model) and booleans (n,)
    test.margins(), test.margins(hooks)             nats (n,), of the model as it is, under hooks
    test.remove(site, place, direction, centre)     hooks that project a direction out
    """
    x, y = train.stream[place][site], train.plural[noun]
    true, false = x[y].mean(0), x[~y].mean(0)
    hooks = test.remove(site, place, true - false, (true + false) / 2)
    return 1 - test.margins(hooks).mean() / test.margins().mean()
