"""What the learner of lesson 10 writes: the references of its exercises."""

import numpy as np
import torch

from mi_helpers.steering import steered


def push_from(model, ids, site, vector, start):
    """The logits (batch, pos, d_vocab), with `vector` added to a site from a position on.

    At positions start, start + 1, … of the site the run goes on with x + vector; before them
    nothing changes. Afterwards the model is intact.
    ids (batch, pos); site, such as ("resid_post", 3), holds x (batch, pos, d_model);
    vector (d_model,); start, an integer
    `with model.hooks({site: hook}):` a run goes on with hook(x)
    """

    def push(x):
        x[:, start:] += vector
        return x

    with model.hooks({site: push}):
        return model(ids)


def write_on(logits_of, ids, n, choose):
    """ids (batch, pos) and n tokens more, (batch, pos + n).

    Each new token is choose(logits), where logits (batch, d_vocab) are those of the last position.
    logits_of(ids) gives (batch, pos, d_vocab); choose gives (batch,)
    """
    for _ in range(n):
        new = choose(logits_of(ids)[:, -1])
        ids = torch.cat([ids, new[:, None]], 1)
    return ids


def share_about(texts, topics_of, topic):
    """The share of the topical words in all the texts together that are the topic's.

    A word is topical if it is in `topics_of`; it is the topic's if `topic` is among its topics.
    0 where there is no topical word.
    texts: lists of words; topics_of: {word: set of topics}
    """
    topical = [topics_of[word] for text in texts for word in text if word in topics_of]
    return sum(topic in topics for topics in topical) / max(1, len(topical))


def dose_response(model, site, steer, doses, concept, cost):
    """What each dose does, and what it costs: an array (doses, 2).

    The first column is concept(model) under steer(dose), the second how much higher cost(model) is
    then than without steering. Both give a number.
    `with steered(model, site, steer(dose)):` steers; steer is a function, such as partial(Add, v)
    """
    clean = cost(model)
    rows = []
    for dose in doses:
        with steered(model, site, steer(dose)):
            rows.append((concept(model), cost(model) - clean))
    return np.array(rows)


def cost_of(wanted, concept, cost):
    """The cost at which the concept first reaches `wanted`; infinite where it never does.

    concept, cost: numbers (doses,), by rising dose. Between two doses, both go in a straight line.
    The first dose does not reach it yet.
    """
    for i in range(1, len(concept)):
        if concept[i] >= wanted:
            part = (wanted - concept[i - 1]) / (concept[i] - concept[i - 1])
            return cost[i - 1] + part * (cost[i] - cost[i - 1])
    return float("inf")


def clamp(x, coder, latent, value):
    """x with one latent of an autoencoder set to a value, and all else as it was: (rows, d).

    f = coder.encode(x), (rows, latents). Its direction is coder.W_dec[latent], (d,); what the
    autoencoder does not explain of x has to stay.
    """
    now = coder.encode(x)[:, latent]
    return x + (value - now)[:, None] * coder.W_dec[latent]


def contrast(model, site, texts, others):
    """The mean of a site over the tokens of some texts, less that over those of others: (d_model,).

    All tokens of a group count alike, in long texts and in short ones; the first, which is BOS,
    does not count. In `_, cache = model.run_with_cache(text, [site])`, cache[site] is
    (1, pos, d_model).
    """

    def mean(group):
        rows = [model.run_with_cache(text, [site])[1][site][0, 1:] for text in group]
        return torch.cat(rows).mean(0)

    return mean(texts) - mean(others)


def fair_control(noise, x, v):
    """Random directions like the rows of x, without their part along v, as long as v: (n, d).

    Each is a sum of the rows of x, less their mean, weighted by a row of noise; nothing of it
    points along v, and its length is that of v.
    noise (n, rows), x (rows, d), v (d,)
    """
    drawn = noise @ (x - x.mean(0))
    drawn = drawn - (drawn @ v / (v @ v))[:, None] * v
    return drawn / drawn.norm(dim=1, keepdim=True) * v.norm()


def mirror(model, ids, site, v, centre):
    """The logits of the last token, (batch, d_vocab), with its stream mirrored along a direction.

    At the last position of the site, what points along v from the centre points the other way
    afterwards, equally far; across v nothing changes. Afterwards the model is intact.
    ids (batch, pos); site, such as ("resid_post", 3); v (d_model,), of any length; centre
    (d_model,). `with model.hooks({site: hook}):` a run goes on with hook(x)
    """

    def turn(x):
        along = (x[:, -1] - centre) @ v / (v @ v)
        x[:, -1] -= 2 * along[:, None] * v
        return x

    with model.hooks({site: turn}):
        return model(ids)[:, -1]
