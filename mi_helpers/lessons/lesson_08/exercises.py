"""Exercises of lesson 08, circuit tracing."""

import functools

import numpy as np
import torch

from mi_helpers.circuits.interventions import intervene
from mi_helpers.circuits.replacement import LocalReplacement
from mi_helpers.course.check import agree, edits, exercise
from mi_helpers.course.investigate import investigation, some_of
from mi_helpers.course.predict import prediction
from mi_helpers.lessons.lesson_08 import prompts, stories
from mi_helpers.lessons.lesson_08.controls import DONORS, active_in, donors
from mi_helpers.lessons.lesson_08.experiments import SCORED, score_table
from mi_helpers.lessons.lesson_08.inquiry import (
    Inquiry,
    greedy_story,
    random_story,
    rule_story,
)
from mi_helpers.lessons.lesson_08.looking import parts_of
from mi_helpers.lessons.lesson_08.stories import shipped_steps
from mi_helpers.lessons.shared import on_model, shipped_model
from mi_helpers.saes.transcoders import coders_for

ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


@functools.cache
def transcoders() -> dict:
    """The transcoders of the course's model."""
    return coders_for(shipped_model(), range(shipped_model().n_layers))


@functools.cache
def asked() -> list[prompts.Question]:
    """Questions that the checks draw from."""
    return prompts.questions(shipped_model(), 14, seed=5)


def some_prompt(draw) -> str:
    return draw.choice([question.prompt for question in asked()])


# -- 8.1 -------------------------------------------------------------------------------------


def edge(write, x, gain, reader):
    """What a write adds to a reader's input, with the norm's denominator frozen: a number.

    write   (d_model,), what a source adds to the stream
    x       (d_model,), the whole stream there: the norm is x / √(mean of x²), times the gain
    gain    (d_model,)
    reader  (d_model,): the reader's input is (what the norm gives) · reader
    """
    return (write / (x**2).mean() ** 0.5 * gain) @ reader


MISTAKES_81 = edits(
    edge,
    """
    (x**2) → (write**2)
        This divides by the source's own size: the denominator is frozen at that of the whole
        stream, or edges would not sum.
    * gain → * 1
        The norm's gain is missing.
    / (x**2).mean() ** 0.5 → / 1
        Nothing is divided: the norm's denominator is missing.
    (x**2).mean() → (x**2).sum()
        This divides by the length of x: take the root of the *mean* square.
    (write / → ((x + write) /
        This is what the reader gets in all: an edge is the source's part alone.
    * gain → * (1 + gain)
        The gain is given whole: Gemma's 1 is in it already.
    """,
)


@exercise(
    "8.1",
    title="One edge",
    difficulty=2,
    importance=5,
    minutes=5,
    reference=edge,
    hints=[
        "The norm divides by the root mean square of x, whatever the source is.",
        "`write / (x**2).mean() ** 0.5 * gain`, then the product with the reader.",
    ],
    wrong=MISTAKES_81,
)
def check_81(answer) -> None:
    agree(
        answer,
        edge,
        lambda draw: (
            draw.normal("d"),
            draw.normal("d", scale=draw.number(1, 4)),
            draw.normal("d"),
            draw.normal("d"),
        ),
        mistakes=MISTAKES_81,
        otherwise="Divide by the stream's root mean square, multiply by the gain, then read.",
    )


# -- 8.2 -------------------------------------------------------------------------------------


def error_nodes(model, coder, layer, prompt):
    """What a transcoder leaves unexplained at each token of a prompt, (pos, d_model).

    The transcoder reads ("mlp_in", layer) and should write ("mlp_out", layer), both (1, pos,
    d_model). coder.encode(x) gives activations (pos, latents); each latent writes its row of
    coder.W_dec (latents, d_model), and coder.b_dec (d_model,) is always written.
    """
    _, cache = model.run_with_cache(prompt, [("mlp_in", layer), ("mlp_out", layer)])
    f = coder.encode(cache["mlp_in", layer][0])
    return cache["mlp_out", layer][0] - (f @ coder.W_dec + coder.b_dec)


MISTAKES_82 = edits(
    error_nodes,
    """
    + coder.b_dec → + 0
        `b_dec` is missing: the transcoder writes it at every token.
    (f @ coder.W_dec + coder.b_dec) → f @ coder.W_dec + coder.b_dec
        `b_dec` is added to the error: the brackets are missing.
    f @ coder → (f > 0).float() @ coder
        Each decoder row counts as often as its latent is active: multiply by the activations.
    cache["mlp_out", layer][0] - (f → -cache["mlp_out", layer][0] + (f
        The sign is turned round: transcoder plus error has to be what the MLP writes.
    coder.encode(cache["mlp_in", layer][0]) → coder.encode(cache["mlp_out", layer][0])
        The transcoder is given the MLP's output: it reads the input.
    """,
)


@exercise(
    "8.2",
    title="What is left over",
    difficulty=2,
    importance=5,
    minutes=5,
    reference=error_nodes,
    survivors=ONE_MODEL,
    hints=[
        "`model.run_with_cache(prompt, [('mlp_in', layer), ('mlp_out', layer)])` keeps both.",
        "The transcoder writes `f @ coder.W_dec + coder.b_dec`.",
    ],
    wrong=MISTAKES_82,
)
def check_82(answer) -> None:
    def given(draw) -> tuple:
        layer = draw.integer(0, shipped_model().n_layers - 1)
        return shipped_model(), transcoders()[layer], layer, some_prompt(draw)

    on_model(
        answer,
        error_nodes,
        given,
        MISTAKES_82,
        "Transcoder plus error should be exactly what the MLP writes.",
    )


# -- 8.3 -------------------------------------------------------------------------------------


def carried(model, prompt, layer, write, start, end):
    """What a layer's attention brings to position `end` of a write at position `start`, (d_model,).

    The patterns stay as they are on the prompt, and so do both norms' denominators. For each head:
    pattern[end, start] · (normed write) @ W_V @ W_O, with model.weight("W_V", layer) (n_kv_heads,
    d_model, d_head), model.weight("W_O", layer) (n_heads, d_head, d_model); several heads share a
    W_V. The norm before, "ln1", divides the stream ("resid_pre", layer) by its √(mean of squares);
    the norm after, "ln1_post", divides the sum of all heads' z @ W_O, where ("z", layer) is
    (1, pos, n_heads, d_head). Both then multiply by 1 + their weight.
    """
    sites = [(name, layer) for name in ("pattern", "resid_pre", "z")]
    _, cache = model.run_with_cache(prompt, sites)
    pattern, stream, z = (cache[site][0] for site in sites)
    W_V = model.weight("W_V", layer).repeat_interleave(model.n_heads // model.n_kv_heads, 0)
    W_O = model.weight("W_O", layer)
    read = write / stream[start].square().mean().sqrt() * (1 + model.part("ln1", layer).weight)
    moved = torch.einsum("h,d,hde,hem->m", pattern[:, end, start], read, W_V, W_O)
    whole = torch.einsum("he,hem->m", z[end], W_O)
    return moved / whole.square().mean().sqrt() * (1 + model.part("ln1_post", layer).weight)


MISTAKES_83 = edits(
    carried,
    """
    pattern[:, end, start] → pattern[:, start, end]
        Rows of a pattern look at columns: `end` is the one that looks.
    stream[start].square() → write.square()
        The first norm divides by the size of the write alone: freeze it at that of the stream.
    stream[start].square() → stream[end].square()
        The first norm is taken at `end`: values are read at `start`.
    whole.square() → moved.square()
        The second norm divides by the size of this part: freeze it at that of all heads' sum.
    * (1 + model.part("ln1_post", layer).weight) → * 1
        The gain of the norm after attention is missing: 1 + its weight.
    / whole.square().mean().sqrt() * (1 + model.part("ln1_post", layer).weight) → * 1
        The norm after attention is missing.
    z[end], W_O → z[start], W_O
        The second norm is taken at `start`: what is written, is written at `end`.
    .repeat_interleave(model.n_heads // model.n_kv_heads, 0) → .repeat(2, 1, 1)
        Heads 0 and 1 share the first W_V, heads 2 and 3 the second: `repeat_interleave`.
    """,
)


@exercise(
    "8.3",
    title="An edge through frozen attention",
    difficulty=4,
    importance=4,
    minutes=7,
    reference=carried,
    survivors=ONE_MODEL,
    hints=[
        "Norm the write with the stream's denominator at `start`, times 1 + the weight of ln1.",
        '`W_V.repeat_interleave(n_heads // n_kv_heads, 0)`, then `torch.einsum("h,d,hde,hem->m", '
        "…)`.",
        "Divide by the root mean square of Σ z[end] @ W_O, times 1 + the weight of ln1_post.",
    ],
    wrong=MISTAKES_83,
)
def check_83(answer) -> None:
    def given(draw) -> tuple:
        model, prompt = shipped_model(), some_prompt(draw)
        length = model.tokens(prompt).shape[1]
        start, end = sorted(draw.sample(range(1, length), 2))
        layer = draw.integer(0, model.n_layers - 1)
        write = torch.as_tensor(draw.normal(144, scale=draw.number(1, 3)), dtype=torch.float32)
        return model, prompt, layer, write, start, end

    on_model(
        answer,
        carried,
        given,
        MISTAKES_83,
        "Norm, each head's pattern · W_V · W_O, norm: both denominators as they are on the prompt.",
    )


# -- 8.4 -------------------------------------------------------------------------------------


def influence(edges, weights):
    """How much of the logits comes through each node, over paths of every length, (n,).

    edges    (n, n), edges[target, source], of both signs; sources come before targets
    weights  (n,): the logits' probabilities, 0 at all other nodes
    First take amounts, and let the edges into each node sum to 1 (a node without any keeps zeros):
    A. Then paths of length one carry weights @ A, of length two weights @ A @ A, and so on: add up.
    """
    size = abs(edges)
    total = size.sum(1)
    total[total == 0] = 1
    A = size / total[:, None]
    step = weights @ A
    found = step * 0
    for _ in range(len(A)):
        found = found + step
        step = step @ A
    return found


def solved(edges, weights):
    size = torch.as_tensor(np.abs(np.asarray(edges))).double()
    A = size / size.sum(1, keepdim=True).clamp(min=1e-30)
    w = torch.as_tensor(np.asarray(weights)).double()
    return (w @ torch.linalg.inv(torch.eye(len(A)).double() - A) - w).float()


MISTAKES_84 = edits(
    influence,
    """
    range(len(A)) → range(1)
        These are direct edges alone: follow the paths further, A², A³ and so on.
    range(len(A)) → range(2)
        Paths of three edges and more are missing: go on until nothing is left.
    abs(edges) → edges
        Positive and negative edges cancel: take amounts first.
    size / total[:, None] → size / total
        Rows are targets: each row should sum to 1.
    weights @ A → A @ weights
        This walks from sources to targets: A[target, source], so weights stand on the left.
    step * 0 → weights
        The path of no edge is counted, so that a logit influences itself.
    total[total == 0] = 1 → total[total == 0] = float("nan")
        A node without inputs becomes NaN: leave its row at zero.
    """,
)


@exercise(
    "8.4",
    title="All paths at once",
    difficulty=3,
    importance=5,
    minutes=5,
    reference=influence,
    right=[solved],
    survivors={
        "range(len(A)) → range(len(A) - 1)": "no path has as many edges as there are nodes",
        "range(len(A)) → range(1, len(A))": "the same: one step less is enough",
        "1 → 2": "a row without edges is zero, whatever it is divided by",
    },
    hints=[
        "`weights @ A` is what comes by one edge, `weights @ A @ A` by two.",
        "No path is longer than the graph has nodes: a loop over `range(len(A))` is enough.",
    ],
    wrong=MISTAKES_84,
)
def check_84(answer) -> None:
    def given(draw) -> tuple:
        edges = torch.as_tensor(draw.normal("n", "n")).tril(-1)
        n = len(edges)
        edges[: n // 3] = 0.0  # tokens: nothing comes in
        weights = torch.zeros_like(edges[0])
        weights[-2:] = torch.as_tensor(draw.probabilities(2)).to(weights)
        edges[-1, -2] = 0.0
        return edges, weights

    agree(
        answer,
        influence,
        given,
        mistakes=MISTAKES_84,
        otherwise="Σ weights @ Aᵏ for k = 1, 2, …, with rows of A that sum to 1.",
    )


# -- 8.5 -------------------------------------------------------------------------------------


def fewest(influence, threshold):
    """The fewest nodes whose influence sums to at least `threshold` of all: n booleans.

    influence (n,), none negative, no two alike; threshold between 0 and 1
    """
    order = (-influence).argsort()
    share = influence[order].cumsum(0) / influence.sum()
    keep = influence < 0
    keep[order[: int((share < threshold).sum()) + 1]] = True
    return keep


def one_after_another(influence, threshold):
    values = [float(each) for each in influence]
    keep, left = [False] * len(values), threshold * sum(values)
    for i in sorted(range(len(values)), key=lambda i: -values[i]):
        if left > 0:
            keep[i] = True
            left -= values[i]
    return keep


MISTAKES_85 = edits(
    fewest,
    """
    .sum()) + 1] → .sum())]
        You stop one node too early: the node that reaches the threshold is needed.
    (-influence).argsort() → influence.argsort()
        You begin with the smallest: the fewest are the largest.
    influence[order].cumsum(0) → influence.cumsum(0)
        The sums run in the order in which the nodes come: sort by influence first.
    int((share < threshold).sum()) + 1 → round(threshold * len(influence))
        This keeps a share of the *nodes*: it is the influence that should reach the threshold.
    / influence.sum() → / 1
        The threshold is a share of all influence: divide by the sum.
    keep[order[: int((share < threshold).sum()) + 1]] = True → keep = influence > influence.mean()
        This asks which node has much by itself: sum from the largest down.
    """,
)


@exercise(
    "8.5",
    title="The fewest that are enough",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=fewest,
    right=[one_after_another],
    survivors={
        "influence < 0 → influence <= 0": "all influences that are drawn are positive",
        "share < threshold → share <= threshold": "no share that is drawn is the threshold",
    },
    hints=[
        "Sort from the largest down, and sum as you go: `cumsum`.",
        "Count the sums that are still below the threshold; one node more is enough.",
    ],
    wrong=MISTAKES_85,
)
def check_85(answer) -> None:
    agree(
        answer,
        fewest,
        lambda draw: (draw.positive("n", low=0.05, high=5), draw.number(0.3, 0.9)),
        mistakes=MISTAKES_85,
        otherwise="From the largest down, until the sum reaches threshold · Σ influence.",
    )


# -- 8.6 -------------------------------------------------------------------------------------


def best_name(fires, labels):
    """The label that tells best where a latent fires, and how well: (its number, F1 held out).

    fires   (tokens,), booleans: where the latent fires
    labels  (tokens, labels), booleans: what is true of each token
    F1 = 2 · (both) / (firings + tokens with the label). Choose the label on the first half of the
    tokens, rows before len(fires) // 2, and score it on the others.
    """
    half = len(fires) // 2

    def f1(fires, labels):
        both = (fires[:, None] & labels).sum(0)
        return 2 * both / (fires.sum() + labels.sum(0))

    best = int(f1(fires[:half], labels[:half]).argmax())
    return best, float(f1(fires[half:], labels[half:])[best])


MISTAKES_86 = edits(
    best_name,
    """
    f1(fires[half:], labels[half:])[best] → f1(fires[:half], labels[:half])[best]
        The score is of the tokens on which the label was chosen: score it on the others.
    f1(fires[:half], labels[:half]).argmax() → f1(fires, labels).argmax()
        The label is chosen on all tokens: choose on the first half alone.
    2 * both / (fires.sum() + labels.sum(0)) → both / labels.sum(0)
        This is precision: a name that is true once and fires once would be perfect.
    2 * both / (fires.sum() + labels.sum(0)) → both / fires.sum()
        This is recall: a label that is true everywhere would be perfect.
    2 * both → both
        F1 has a 2 above: it is 1 for a label that is true exactly where the latent fires.
    f1(fires[half:], labels[half:])[best] → f1(fires[half:], labels[half:]).max()
        On the held-out half you choose anew: score the label that was chosen before.
    """,
)


@exercise(
    "8.6",
    title="A name and its score",
    difficulty=3,
    importance=5,
    minutes=5,
    reference=best_name,
    hints=[
        "`fires[:, None] & labels` is where both are true, (tokens, labels).",
        "Write F1 as a function of some rows, and call it once for each half.",
    ],
    wrong=MISTAKES_86,
)
def check_86(answer) -> None:
    def given(draw) -> tuple:
        tokens, count = 61 + 2 * draw.size("tokens"), draw.size("labels")
        fires = draw.booleans(tokens, share=0.4)
        labels = draw.booleans(tokens, count, share=0.45)
        labels[: tokens // 2, 0] = fires[: tokens // 2]  # the best before is not the best after
        labels[3, 0] = not fires[3]
        labels[tokens // 2 :, 1] = fires[tokens // 2 :]
        labels[:, 2] = True
        return fires, labels

    agree(
        answer,
        best_name,
        given,
        mistakes=MISTAKES_86,
        otherwise="argmax of F1 on the first half, then that label's F1 on the second.",
    )


# -- 8.7 -------------------------------------------------------------------------------------


def predicted_change(edges, values, off):
    """How the graph says the last node's value changes when some features are switched off.

    edges   (n, n), edges[target, source], sources before targets
    values  (n,), what each node's value is now
    off     the numbers of the features that are held at zero
    A node's change is Σ edges · share of its sources, where a source's share is its own change
    divided by its value, and -1 for a feature that is held at zero.
    """
    share = values * 0
    for i in range(len(values)):
        change = edges[i] @ share
        share[i] = -1 if i in off else change / values[i]
    return change


MISTAKES_87 = edits(
    predicted_change,
    """
    change / values[i] → 0
        These are the direct edges alone: the features downstream change, too, and pass it on.
    change / values[i] → change
        A change of 3 in a value of 4 passes on three quarters of its edges: divide by the value.
    return change → return -change
        The sign is turned round: what the features add is *lost*.
    return change → return values[-1] + change
        This is the value afterwards: return by how much it changes.
    -1 if i in off else change / values[i] → change / values[i] - float(i in off)
        A feature that is held at zero has a share of exactly -1, whatever its sources do.
    i in off → i == off[0]
        Only the first of the features is switched off.
    """,
)


@exercise(
    "8.7",
    title="Predict an intervention",
    difficulty=3,
    importance=5,
    minutes=5,
    reference=predicted_change,
    survivors={"0 → 1": "each share is written before it is read"},
    hints=[
        "Go through the nodes in order, and keep for each the share by which it changes.",
        "`change = edges[i] @ share`, then `share[i]` is -1, or `change / values[i]`.",
    ],
    wrong=MISTAKES_87,
)
def check_87(answer) -> None:
    def given(draw) -> tuple:
        count = draw.size("n", 6, 13)
        edges = torch.as_tensor(draw.normal("n", "n")).tril(-1)
        first, second = sorted(draw.sample(range(count - 2), 2))
        edges[second, first] = 1.5  # the second depends on the first
        return edges, draw.positive("n", low=0.5, high=3), [first, second]

    agree(
        answer,
        predicted_change,
        given,
        mistakes=MISTAKES_87,
        otherwise="change = edges[i] @ share; share = change / value, -1 where held at zero.",
        tolerance=1e-4,
    )


# -- 8.8 -------------------------------------------------------------------------------------


def set_features(model, coders, prompt, values):
    """The logits at the last position, (d_vocab,), with some features held at other activations.

    values  {(layer, latent, position): new activation}
    The model's own MLPs run. To what they write at ("mlp_out", layer), (1, pos, d_model), add
    (new - old) times the latent's row of coders[layer].W_dec, at the feature's position. `old` is
    what coders[layer].encode(("mlp_in", layer)) says in this changed run: (1, pos, latents).
    """
    read = {}

    def keep(layer):
        def hook(x):
            read[layer] = x

        return hook

    def write(layer):
        def hook(out):
            old = coders[layer].encode(read[layer][0])
            for (at, latent, position), new in values.items():
                if at == layer:
                    step = new - old[position, latent]
                    out[0, position] += step * coders[layer].W_dec[latent]
            return out

        return hook

    layers = {layer for layer, _, _ in values}
    hooks = {("mlp_in", i): keep(i) for i in layers} | {("mlp_out", i): write(i) for i in layers}
    with model.hooks(hooks):
        return model(prompt)[0, -1]


def set_by_library(model, coders, prompt, values):
    named = {f"{layer}_{latent}_{position}": v for (layer, latent, position), v in values.items()}
    return intervene(model, coders, prompt, values=named, attention="recomputed").logits_after


MISTAKES_88 = edits(
    set_features,
    """
    step = new - old[position, latent] → step = new
        The old activation is still written: add the difference, new - old.
    out[0, position] += → out[0] +=
        The change is made at every position: only at the feature's own.
    if at == layer → if True
        Every layer writes the changes of all layers: each writes its own.
    return model(prompt)[0, -1] → return model(prompt)[0, 0]
        These are the logits at the first position: return those at the last.
    step = new - old[position, latent] → step = old[position, latent] - new
        The sign is turned round: new - old.
    coders[layer].W_dec[latent] → coders[layer].W_enc[:, latent]
        This writes what the latent *reads*: its row of W_dec is what it writes.
    ("mlp_out", i): write(i) for i in layers → ("mlp_out", i): write(i) for i in sorted(layers)[:1]
        Only the first layer's features are set: take all layers.
    """,
)


def to_set(draw) -> tuple:
    """A prompt, and new activations for three features of two layers: two active ones, one not."""
    model, coders, prompt = shipped_model(), transcoders(), some_prompt(draw)
    low, high = sorted(draw.sample(range(model.n_layers), 2))
    local = LocalReplacement(model, coders, prompt)
    values = {}
    for layer, count in ((low, 1), (high, 2)):
        active = local.features[layer]
        for place in draw.sample(range(len(active)), count):
            key = layer, int(active.latents[place]), int(active.positions[place])
            values[key] = draw.number(-2, 3)
    last = local.length - 1
    values[low, draw.integer(0, coders[low].d_latent - 1), last] = draw.number(2, 5)
    return model, coders, prompt, values


@exercise(
    "8.8",
    title="Change features, and run on",
    difficulty=4,
    importance=5,
    minutes=7,
    reference=set_features,
    right=[set_by_library],
    survivors=ONE_MODEL
    | {"coders → its first value, always": "all inputs are for one set of transcoders"},
    hints=[
        'Two hooks a layer: one on ("mlp_in", layer) keeps x, one on ("mlp_out", layer) adds.',
        "A function that makes the hook keeps each layer's own number.",
        "`out[0, position] += (new - old[position, latent]) * coders[layer].W_dec[latent]`.",
    ],
    wrong=MISTAKES_88,
)
def check_88(answer) -> None:
    on_model(
        answer,
        set_features,
        to_set,
        MISTAKES_88,
        "At each feature's place, mlp_out should be as before plus (new - old) · its decoder row.",
    )


# -- 8.9 -------------------------------------------------------------------------------------


def fair_control(features, chosen):
    """For each chosen feature another one, of its layer and position, about as active.

    features  {(layer, latent, position): activation}, all that fire in a prompt
    chosen    a list of some of them
    Returns a list: for each of `chosen`, in order, the one with the nearest activation among those
    of its layer *and* position that are neither chosen nor taken already. Where none is left, the
    feature has no control, and the list is shorter.
    """
    taken, found = set(chosen), []
    for key in chosen:
        layer, _, position = key
        free = [k for k in features if k not in taken and (k[0], k[2]) == (layer, position)]
        if free:
            best = min(free, key=lambda k: abs(features[k] - features[key]))
            found.append(best)
            taken.add(best)
    return found


MISTAKES_89 = edits(
    fair_control,
    """
    (k[0], k[2]) == (layer, position) → k[0] == layer
        The position is ignored: at another token a feature may be one that nothing reads.
    (k[0], k[2]) == (layer, position) → k[2] == position
        The layer is ignored: features of one layer write for other readers than those of the next.
    abs(features[k] - features[key]) → -features[k]
        You take the most active one: take the one whose activation is nearest.
    taken.add(best) → pass
        One feature stands for two: take each at most once.
    set(chosen) → set()
        A control may not be one of the chosen features.
    abs(features[k] - features[key]) → features[k]
        You take the least active one: take the one whose activation is nearest.
    """,
)


@functools.cache
def features_of(prompt: str) -> dict[tuple[int, int, int], float]:
    """{(layer, latent, position): activation} of a prompt's features."""
    return active_in(shipped_model(), transcoders(), prompt)


@exercise(
    "8.9",
    title="A fair control",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=fair_control,
    hints=[
        "Keep a set of what is taken, which begins as `set(chosen)`.",
        "`min(free, key=lambda k: abs(features[k] - features[key]))`, where `free` is not empty.",
    ],
    wrong=MISTAKES_89,
)
def check_89(answer) -> None:
    def given(draw) -> tuple:
        every = features_of(some_prompt(draw))
        last = max(position for _, _, position in every)
        layer = draw.integer(0, 4)
        here = [key for key in every if key[0] == layer and key[2] == last]
        count = draw.size("count", 3, len(here) // 2)
        chosen = draw.sample(here, count) + draw.sample([k for k in every if k[2] < last], 5)
        crowded = {k for k in here if k not in chosen}
        most = dict.fromkeys(sorted(crowded)[: max(0, len(crowded) - count + 1)])
        return {k: v for k, v in every.items() if k not in most}, chosen

    agree(
        answer,
        fair_control,
        given,
        mistakes=MISTAKES_89,
        otherwise="Nearest in activation, same layer, same position, none twice, none chosen.",
    )


# -- 8.10 ------------------------------------------------------------------------------------


def products(model, layer, head, query_parts, key_parts, turns):
    """A head's attention score as a table, (a, b): what each pair of parts adds.

    query_parts  (a, d_model): the summands of the stream at the token that looks
    key_parts    (b, d_model): those at the token that is looked at
    turns        two of (d_head, d_head): how the rotary embedding turns queries here, and keys
    Norm each part with the denominator of its whole stream, √(mean of the square), times
    1 + model.part("ln1", layer).weight. Then q = normed @ W_Q @ turns[0], k likewise, and the score
    is q · k / √d_head. model.weight("W_Q", layer) is (n_heads, d_model, d_head), and "W_K" has one
    for each group of heads, (n_kv_heads, d_model, d_head).
    """
    gain = 1 + model.part("ln1", layer).weight
    group = head // (model.n_heads // model.n_kv_heads)

    def read(parts, W, turn):
        whole = parts.sum(0)
        return parts / whole.square().mean().sqrt() * gain @ W @ turn

    q = read(query_parts, model.weight("W_Q", layer)[head], turns[0])
    k = read(key_parts, model.weight("W_K", layer)[group], turns[1])
    return q @ k.T / model.d_head**0.5


MISTAKES_810 = edits(
    products,
    """
    whole.square().mean() → parts.square().mean(-1, keepdim=True)
        Each part is divided by its own size: freeze the denominator at that of the whole stream.
    / model.d_head**0.5 → / 1
        The score is divided by √d_head.
    @ W @ turn → @ W
        Queries and keys are not turned: the score would not know how far apart they are.
    [group] → [head % model.n_kv_heads]
        Heads 0 and 1 share the first key head, heads 2 and 3 the second.
    * gain → * 1
        The norm's gain is missing.
    q @ k.T → k @ q.T
        Rows are the query's parts, columns the key's.
    / model.d_head**0.5 → / model.d_head
        Divide by the *root* of d_head.
    """,
)


@exercise(
    "8.10",
    title="Why a head looks there",
    difficulty=3,
    importance=4,
    minutes=5,
    reference=products,
    survivors=ONE_MODEL,
    hints=[
        "`whole = parts.sum(0)`, and every part is divided by the root mean square of that.",
        "`q @ k.T` is the whole table at once.",
    ],
    wrong=MISTAKES_810,
)
def check_810(answer) -> None:
    def given(draw) -> tuple:
        model, one, other = shipped_model(), some_prompt(draw), some_prompt(draw)
        layer, head = draw.integer(1, model.n_layers - 1), draw.integer(0, model.n_heads - 1)
        turns = torch.as_tensor(draw.normal(2, model.d_head, model.d_head), dtype=torch.float32)
        key = parts_of(model, other, layer, draw.integer(1, 3))[: draw.size("key", 2, 3)]
        return model, layer, head, parts_of(model, one, layer, -1), key, turns / 6

    on_model(
        answer,
        products,
        given,
        MISTAKES_810,
        "Norm all parts with the whole stream's denominator, read, turn, and multiply.",
    )


# -- predictions -----------------------------------------------------------------------------

CITIES = ["Warsaw, as before", "Madrid", "another city", "no city"]


@prediction(
    "8.11", question="With Spain's features for Poland's: which word comes first?", options=CITIES
)
def after_the_swap() -> str:
    model, coders, steps = shipped_steps()
    question = prompts.opening(model)
    (word, *_), *_ = stories.swapped(model, coders, steps.story(question, "country")).top(1)
    known = {question.answer: CITIES[0], question.rival: CITIES[1]}
    cities = {f" {mark.city}" for mark in prompts.lexicon.landmarks()}
    return known.get(word, CITIES[2] if word in cities else CITIES[3])


@prediction(
    "8.12",
    question="Which control scores as well as the true graph?",
    options=["decoders exchanged", "untrained model", "edges dealt out anew", "none"],
)
def control_that_scores() -> str:
    model, coders, _ = shipped_steps()
    found = score_table(model, coders, prompts.questions(model, SCORED, seed=0))
    median = {name: np.median(rows[:, 0]) for name, rows in found.items()}
    own = median.pop("the graph")
    best = max(median, key=median.get)
    return best if median[best] > own - 0.05 else "none"


PLACES = ["at the name", "between", "at the last word"]


@prediction("8.13", question="Where does the country's step stand?", options=PLACES)
def where_the_country_is() -> str:
    model, _, steps = shipped_steps()
    question = prompts.opening(model)
    graph = steps.graph(question)
    amount = np.abs(steps.share_map(graph, question, "country")).sum(0)
    end = prompts.name_ends(model, question.one)
    parts = [amount[: end + 1].sum(), amount[end + 1 : -1].sum(), amount[-1]]
    return PLACES[int(np.argmax(parts))]


OFTEN = ["about as often", "less than half as often", "never"]


@prediction(
    "8.14",
    question="Donors that ask something else: how often does the other country's answer win?",
    options=OFTEN,
)
def donors_that_ask_something_else() -> str:
    model, coders, steps = shipped_steps()
    same, other = donors(model, coders, steps, DONORS, seed=0).first()
    return OFTEN[0] if other >= same / 2 else OFTEN[1] if other > 0 else OFTEN[2]


# -- the investigation -----------------------------------------------------------------------


@functools.cache
def inquiry() -> Inquiry:
    """The question that a story is told of, and what it is tested on."""
    model, coders, _ = shipped_steps()
    return Inquiry(model, coders, prompts.untold(model))


@investigation(
    "8",
    title="A story of two hops",
    form='a set of features "layer_latent_position" of either prompt, such as {"3_12_10"}',
    chance=lambda rng: random_story(inquiry(), rng),
    best=lambda: greedy_story(inquiry(), shipped_steps()[2]),
    good=lambda: rule_story(inquiry(), shipped_steps()[2]),
    foolish=["Spain", {"99_0_1"}, {"3_12_10": 1.0}, 7],
)
def score_story(answer) -> float:
    """The least of three shares, each from 0 to 1, less a thousandth for each feature: the gap lost
    without the features, the way to the partner's answer when they are swapped, and the gap kept in
    questions about other countries."""
    found = inquiry()
    return found.score(some_of(answer, found.every, "features"))
