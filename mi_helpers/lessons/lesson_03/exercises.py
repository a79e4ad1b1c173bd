"""Exercises of lesson 03: activation patching."""

import numpy as np
import torch

from mi_helpers.course.check import Wrong, agree, exercise, expect
from mi_helpers.lessons.lesson_03.pairs import (
    JOBS,
    fact_pairs,
    giver_pairs,
    number_pairs,
    pronoun_texts,
    unequal_pairs,
)
from mi_helpers.lessons.lesson_03.predictions import (  # noqa: F401, the course looks here
    better_estimated,
    between,
    costs_more,
    part_of_the_last_word,
    score_country,
    strongest_head,
    untrained_map,
    with_noise,
)
from mi_helpers.lessons.lesson_03.tools import (
    attribution,
    bias_slope,
    both_ways,
    patch_each,
    patch_heads,
    patch_vector,
    restored,
    scale,
    sweep,
)
from mi_helpers.lessons.shared import shipped_model
from mi_helpers.patching import activation_patch, normalised_logit_diff
from mi_helpers.sweeps import Sweep
from mi_helpers.tinyworld import lexicon

PROBE = "The Eiffel Tower is in the city of"
ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


def on_model(answer, reference, make, mistakes, otherwise: str, cases: int = 3) -> None:
    """`agree` where an answer changes the model: afterwards it has to be as it was."""
    before = shipped_model()(PROBE)
    try:
        agree(answer, reference, make, (), otherwise, 1e-4, cases)
    except Wrong:  # only now are the mistakes run, each of which costs as much as an answer
        agree(answer, reference, make, mistakes, otherwise, 1e-4, cases)
        raise
    finally:
        left = not torch.equal(shipped_model()(PROBE), before)
        if left:
            shipped_model.cache_clear()  # the next check gets a model that nobody has changed
    expect(
        not left,
        "The numbers are right, but the model stays changed afterwards: set the hook in a `with`.",
    )


def some_pairs(draw, count: int = 3):
    """One to `count` pairs of prompts of one of three kinds."""
    make = draw.choice((fact_pairs, number_pairs, giver_pairs))
    return make(shipped_model(), draw.integer(2, count), draw.integer(0, 100_000))


def told_apart(draw, make, run):
    """Arguments that `make` draws, drawn again until the patch that `run` makes changes logits."""
    for _ in range(30):
        given = make(draw)
        plain_run = shipped_model()(given[1])[:, -1]
        if (run(*given) - plain_run).abs().amax(-1).min() > 0.2:
            break
    return given


# -- 3.1 -------------------------------------------------------------------------------------

STUB_31 = '''\
def scale(last, answer, wrong, at_clean, at_corrupted):
    """The prompts' mean logit difference, moved so that at_corrupted is 0 and at_clean is 1.

    last  logits at the last token, (batch, d_vocab); answer, wrong  token ids, (batch,)
    at_clean, at_corrupted  the mean logit differences of the two unpatched runs
    """
    ...
'''


def moved(ends):
    """scale with other ends: ends(difference, at_clean, at_corrupted)."""

    def run(last, answer, wrong, at_clean, at_corrupted):
        return ends(scale(last, answer, wrong, 1, 0), at_clean, at_corrupted)

    return run


def unpaired(last, answer, wrong, at_clean, at_corrupted):
    difference = (last[:, answer] - last[:, wrong]).mean()
    return (difference - at_corrupted) / (at_clean - at_corrupted)


def in_probabilities(last, answer, wrong, at_clean, at_corrupted):
    return scale(last.softmax(-1), answer, wrong, at_clean, at_corrupted)


def answer_alone(last, answer, wrong, at_clean, at_corrupted):
    picked = last[torch.arange(len(last)), answer].mean()
    return (picked - at_corrupted) / (at_clean - at_corrupted)


def each_prompt(last, answer, wrong, at_clean, at_corrupted):
    rows = torch.arange(len(last))
    return (last[rows, answer] - last[rows, wrong] - at_corrupted) / (at_clean - at_corrupted)


MISTAKES_31 = [
    (moved(lambda d, c, k: (d - c) / (k - c)), "The ends are swapped: the clean run should be 1."),
    (moved(lambda d, c, k: d / c), "Shift first, so that the corrupted run becomes 0."),
    (moved(lambda d, c, k: (d - k) / c), "Divide by the gap between the two runs."),
    (moved(lambda d, c, k: d - k), "The corrupted run is 0, but the clean run is not 1 yet."),
    (
        moved(lambda d, c, k: torch.clamp((d - k) / (c - k), 0, 1)),
        "Nothing is cut off: a patch may lead beyond 1 or below 0, and that is a finding.",
    ),
    (moved(lambda d, c, k: (-d - k) / (c - k)), "The difference is turned round: answer − wrong."),
    (unpaired, "`last[:, answer]` takes every answer from every prompt: pair rows with ids."),
    (in_probabilities, "These are probabilities: take the logits as they are."),
    (answer_alone, "Subtract the wrong answer's logit: a patch may make all words likelier."),
    (each_prompt, "Give one number: the mean over the prompts."),
]


def scale_by_gather(last, answer, wrong, at_clean, at_corrupted):
    both = last.gather(1, torch.stack([answer, wrong], 1)).double().numpy()
    return float(((both[:, 0] - both[:, 1]).mean() - at_corrupted) / (at_clean - at_corrupted))


@exercise(
    "3.1",
    title="From 0 to 1",
    difficulty=2,
    importance=5,
    minutes=5,
    stub=STUB_31,
    reference=scale,
    right=[scale_by_gather],
    hints=[
        "`last[torch.arange(len(last)), answer]` takes one entry from each row.",
        "Two steps: subtract at_corrupted, then divide by what at_clean is after that.",
    ],
    wrong=MISTAKES_31,
)
def check_31(answer) -> None:
    def make(draw):
        last = draw.normal("batch", "d_vocab", scale=3)
        size = last.shape[1]
        right = draw.integers(0, size - 1, "batch")
        wrong = (right + draw.integers(1, size - 1, "batch")) % size
        return last, right, wrong, draw.number(0.2, 1), draw.number(-1, -0.2)

    agree(answer, scale, make, MISTAKES_31, "The mean difference, then the two ends of the scale.")


# -- 3.2 -------------------------------------------------------------------------------------

STUB_32 = '''\
def patch_vector(model, base, other, layer, position):
    """Logits at the last token, (batch, d_vocab), of base with one vector of each prompt replaced.

    base, other  token ids (batch, pos). The vector at `position` of the stream that enters `layer`,
    ("resid_pre", layer), comes from the run on other. Afterwards the model is intact.
    """
    ...
'''


def putting(change, site="resid_pre", shift=0):
    """patch_vector with another change(stream, other stream, position) in place."""

    def run(model, base, other, layer, position):
        key = (site, min(max(layer + shift, 0), model.n_layers - 1))
        kept = model.run_with_cache(other, key)[1][key]
        with model.hooks({key: lambda x: change(x, kept, position)}):
            return model(base)[:, -1]

    return run


def put(x, kept, position):
    x[:, position] = kept[:, position]
    return x


def put_first_only(x, kept, position):
    x[0, position] = kept[0, position]
    return x


def put_sum(x, kept, position):
    x[:, position] += kept[:, position]
    return x


def swapped_runs(model, base, other, layer, position):
    return patch_vector(model, other, base, layer, position)


def all_logits(model, base, other, layer, position):
    key = ("resid_pre", layer)
    kept = model.run_with_cache(other, key)[1][key]
    with model.hooks({key: lambda x: put(x, kept, position)}):
        return model(base)


def never_patched(model, base, other, layer, position):
    return model(base)[:, -1]


MISTAKES_32 = [
    (swapped_runs, "The runs are swapped: base is run, and other gives the vector."),
    (putting(lambda x, kept, position: kept), "Every position is replaced, not one."),
    (putting(put, "resid_post"), "This is the stream that leaves the layer: use resid_pre."),
    (putting(put, "attn_out"), "This is what attention adds: the stream is at resid_pre."),
    (putting(put, shift=-1), "This is another layer."),
    (putting(put_first_only), "Only the first prompt of the batch is patched."),
    (putting(put_sum), "The vector is added: it should replace the one that was there."),
    (all_logits, "Give the logits at the last token alone, (batch, d_vocab)."),
    (never_patched, "Nothing changed: does the hook return the stream, inside the `with`?"),
]


def patch_one_by_one(model, base, other, layer, position):
    rows = zip(base, other, strict=True)
    return [patch_vector(model, b[None], o[None], layer, position)[0] for b, o in rows]


@exercise(
    "3.2",
    title="One patch",
    difficulty=2,
    importance=5,
    minutes=6,
    stub=STUB_32,
    reference=patch_vector,
    right=[patch_one_by_one],
    survivors=ONE_MODEL,
    hints=[
        '`_, kept = model.run_with_cache(other, ("resid_pre", layer))` keeps the other run\'s '
        'stream: `kept["resid_pre", layer]` is (batch, pos, d_model).',
        "A hook gets the stream, changes it, and returns it.",
        '`with model.hooks({("resid_pre", layer): hook}): return model(base)[:, -1]`',
    ],
    wrong=MISTAKES_32,
)
def check_32(answer) -> None:
    def make(draw):
        pairs = some_pairs(draw)
        at = draw.choice([*pairs.subject, pairs.clean.shape[1] - 1])
        layer = draw.integer(1, shipped_model().n_layers - 2)
        return shipped_model(), pairs.corrupted, pairs.clean, layer, at

    on_model(
        answer,
        patch_vector,
        lambda draw: told_apart(draw, make, patch_vector),
        MISTAKES_32,
        "Only stream[:, position] of this layer should come from the other run.",
    )


# -- 3.3 -------------------------------------------------------------------------------------

STUB_33 = '''\
def sweep(model, clean, corrupted, answer, wrong):
    """The scale's value for each patch of a clean vector into the corrupted run, (layers, pos).

    clean, corrupted  token ids (batch, pos); answer, wrong  token ids (batch,)
    """
    ...
'''


def sweep_by_library(model, clean, corrupted, answer, wrong):
    metric = normalised_logit_diff(model, clean, corrupted, answer.tolist(), wrong.tolist())
    return activation_patch(model, clean, corrupted, "resid_pre", metric)


def swept(change, site="resid_pre", mode="denoise"):
    """A wrong sweep: change(map, clean end, corrupted end)."""

    def run(model, clean, corrupted, answer, wrong):
        metric = normalised_logit_diff(model, clean, corrupted, answer.tolist(), wrong.tolist())
        found = activation_patch(model, clean, corrupted, site, metric, mode)
        return change(found, metric.clean, metric.corrupted)

    return run


MISTAKES_33 = [
    (swept(lambda m, c, k: m, mode="noise"), "These are corrupted vectors in the clean run."),
    (swept(lambda m, c, k: 1 - m, mode="noise"), "This is what is lost in the clean run."),
    (swept(lambda m, c, k: m.T), "The layers come first: (layers, positions)."),
    (swept(lambda m, c, k: k + m * (c - k)), "These are logit differences: put them on the scale."),
    (swept(lambda m, c, k: m * (c - k)), "These are changes in logits: divide by the gap."),
    (swept(lambda m, c, k: m, "resid_post"), "This is the stream that leaves each layer."),
    (swept(lambda m, c, k: m, "attn_out"), "These are patches of what attention adds."),
    (swept(lambda m, c, k: 1 - m), "The ends are swapped: with no effect the value is 0."),
]


@exercise(
    "3.3",
    title="The sweep",
    difficulty=2,
    importance=5,
    minutes=6,
    stub=STUB_33,
    reference=sweep,
    right=[sweep_by_library],
    survivors=ONE_MODEL,
    hints=[
        "First the two unpatched runs: `scale(model(ids)[:, -1], answer, wrong, 1, 0)` is a bare "
        "logit difference.",
        "Then two loops around `patch_vector(model, corrupted, clean, layer, position)`.",
    ],
    wrong=MISTAKES_33,
)
def check_33(answer) -> None:
    def make(draw):
        pairs = draw.choice((fact_pairs, number_pairs))(
            shipped_model(), draw.integer(1, 3), draw.integer(0, 100_000)
        )
        ids = (torch.tensor(each) for each in (pairs.answer, pairs.wrong))
        return shipped_model(), pairs.clean, pairs.corrupted, *ids

    on_model(
        answer, sweep, make, MISTAKES_33, "One patch for each layer and position, on the scale.", 2
    )


# -- 3.4 -------------------------------------------------------------------------------------

STUB_34 = '''\
def patch_heads(model, base, other, heads):
    """Logits at the last token, (batch, d_vocab), of base with some heads taken from other.

    heads  [(layer, head), …]; two may be of one layer
    Only at the last token: z, ("z", layer), is (batch, pos, n_heads, d_head).
    """
    ...
'''


def heads_with(at=lambda z, heads: (slice(None), -1, heads), which=lambda heads, layer: heads):
    """patch_heads with other indices: at(z, heads of the layer), or other heads of each layer."""

    def run(model, base, other, heads):
        kept, hooks = model.run_with_cache(other, "z")[1], {}
        for layer in {layer for layer, _ in heads}:
            chosen = which([head for each, head in heads if each == layer], layer)

            def hook(z, layer=layer, chosen=chosen):
                z[at(z, chosen)] = kept["z", layer][at(z, chosen)]
                return z

            hooks["z", layer] = hook
        with model.hooks(hooks):
            return model(base)[:, -1]

    return run


def heads_swapped(model, base, other, heads):
    return patch_heads(model, other, base, heads)


def first_head_only(model, base, other, heads):
    return patch_heads(model, base, other, heads[:1])


MISTAKES_34 = [
    (
        heads_with(which=lambda heads, layer: heads[-1:]),
        "Only the last head of each layer is replaced: a dictionary holds one hook for a key, so "
        "one hook has to replace all heads of its layer.",
    ),
    (heads_with(lambda z, heads: (slice(None), slice(None), heads)), "Every token is patched."),
    (heads_with(lambda z, heads: (slice(None), -1)), "All heads of the layer are replaced."),
    (heads_with(lambda z, heads: (slice(None), 0, heads)), "The first token is patched."),
    (heads_with(lambda z, heads: (0, -1, heads)), "Only the first prompt is patched."),
    (heads_swapped, "The runs are swapped: base is run, and other gives the heads."),
    (first_head_only, "Only the first head of the list is replaced."),
]


def heads_in_one_loop(model, base, other, heads):
    values = {layer: model.run_with_cache(other, ("z", layer))[1]["z", layer] for layer, _ in heads}

    def hook_of(layer):
        def hook(z):
            new = z.clone()
            for head in [h for each, h in heads if each == layer]:
                new[:, -1, head] = values[layer][:, -1, head]
            return new

        return hook

    with model.hooks({("z", layer): hook_of(layer) for layer in values}):
        return model(base)[:, -1]


@exercise(
    "3.4",
    title="Several heads at once",
    difficulty=3,
    importance=5,
    minutes=7,
    stub=STUB_34,
    reference=patch_heads,
    right=[heads_in_one_loop],
    survivors=ONE_MODEL,
    hints=[
        'As in 3.2, with the site "z". `model.run_with_cache(other, "z")` keeps all layers.',
        "Group the heads by layer: one hook for a layer replaces all of its heads.",
        "A function made in a loop sees the loop's last value; `def put_in(z, layer=layer):` keeps "
        "the one it was made with.",
    ],
    wrong=MISTAKES_34,
)
def check_34(answer) -> None:
    def make(draw):
        pairs, model = some_pairs(draw), shipped_model()
        late = draw.integer(model.n_layers // 2, model.n_layers - 2)
        early = draw.integer(1, model.n_layers // 2 - 1)
        first = draw.integer(0, model.n_heads - 1)
        second = (first + draw.integer(1, model.n_heads - 1)) % model.n_heads
        heads = [(late, first), (early, draw.integer(0, model.n_heads - 1)), (late, second)]
        return model, pairs.corrupted, pairs.clean, heads

    on_model(
        answer,
        patch_heads,
        make,
        MISTAKES_34,
        "z[:, -1, head] of each head in the list should come from the other run, and no other.",
    )


# -- 3.5 -------------------------------------------------------------------------------------

STUB_35 = '''\
def both_ways(run, clean, corrupted):
    """How far each wire of a small network is enough, and how far it is needed: two (n,) tensors.

    run(wires)        one number, for wires (n,); clean and corrupted are the wires of the two runs
    enough[i]         where run(corrupted with wire i clean) lies: 0 is run(corrupted), 1 run(clean)
    needed[i]         how much of 1 is lost by run(clean with wire i corrupted)
    """
    ...
'''


def without_putting_back(run, clean, corrupted):
    low, gap = run(corrupted), run(clean) - run(corrupted)
    enough, needed = torch.zeros(len(clean)), torch.zeros(len(clean))
    one, rest = corrupted.clone(), clean.clone()
    for i in range(len(clean)):
        one[i], rest[i] = clean[i], corrupted[i]
        enough[i], needed[i] = (run(one) - low) / gap, 1 - (run(rest) - low) / gap
    return enough, needed


def raw_both_ways(run, clean, corrupted):
    gap = run(clean) - run(corrupted)
    return tuple(gap * each for each in both_ways(run, clean, corrupted))


def with_zeros(run, clean, corrupted):
    return both_ways(run, clean, torch.zeros_like(corrupted))


MISTAKES_35 = [
    (lambda *a: both_ways(*a)[::-1], "The two are swapped: enough puts a clean wire in."),
    (
        lambda *a: (both_ways(*a)[0], 1 - both_ways(*a)[1]),
        "The second is what is left of the clean run: needed is what is lost, 1 minus it.",
    ),
    (without_putting_back, "Put each wire back before the next: start from a `clone()`."),
    (raw_both_ways, "Put both on the scale: divide by run(clean) − run(corrupted)."),
    (with_zeros, "The corrupted wires are not zero: take their values from `corrupted`."),
    (lambda *a: (both_ways(*a)[0],) * 2, "Both are the same direction."),
]


def both_ways_by_masks(run, clean, corrupted):
    ends, found = [float(run(x)) for x in (corrupted, clean)], ([], [])
    for row in torch.eye(len(clean)).bool():
        for kept, wires in zip(found, (row, ~row), strict=True):
            value = float(run(torch.where(wires, clean, corrupted)))
            kept.append((value - ends[0]) / (ends[1] - ends[0]))
    return found[0], [1 - value for value in found[1]]


@exercise(
    "3.5",
    title="Enough and needed",
    difficulty=2,
    importance=5,
    minutes=5,
    stub=STUB_35,
    reference=both_ways,
    right=[both_ways_by_masks],
    copies=False,
    hints=[
        "For wire i: a copy of corrupted with the clean value at i, and the reverse.",
        "Both are put on the scale; needed is 1 minus what the scale says.",
    ],
    wrong=MISTAKES_35,
)
def check_35(answer) -> None:
    def make(draw):
        W, v = draw.normal("n", "hidden"), draw.normal("hidden")
        while True:
            clean, corrupted = draw.normal("n", scale=1.5), draw.normal("n", scale=1.5)

            def run(wires):
                return torch.relu(torch.as_tensor(wires) @ W) @ v

            if (run(clean) - run(corrupted)).abs() > 1:
                return run, clean, corrupted

    def watched(run, clean, corrupted):
        kept = clean.clone(), corrupted.clone()
        found = answer(run, clean, corrupted)
        same = torch.equal(clean, kept[0]) and torch.equal(corrupted, kept[1])
        expect(same, "Your function changes clean or corrupted itself: work on a `clone()`.")
        return found

    agree(watched, both_ways, make, MISTAKES_35, "One wire at a time, the others as they were.")


# -- 3.6 -------------------------------------------------------------------------------------

STUB_36 = '''\
def restored(model, ids, noise, layer, position):
    """Logits at the last token, (batch, d_vocab), with noise on the embedding, one vector clean.

    ids    token ids (batch, pos)
    noise  (batch, pos, d_model), added at the site "embed"; 0 outside the subject
    The vector at `position` of ("resid_pre", layer) is that of the run without noise.
    """
    ...
'''


def noised(clean_under_noise=False, restore=True, add=True, site="resid_pre", everywhere=False):
    """restored with a mistake."""

    def run(model, ids, noise, layer, position):
        key = (site, layer)
        disturb = {"embed": (lambda x: x + noise) if add else (lambda x: noise + 0 * x)}
        with model.hooks(disturb if clean_under_noise else {}):
            clean = model.run_with_cache(ids, key)[1][key]
        at = slice(None) if everywhere else position

        def hook(x):
            x[:, at] = clean[:, at]
            return x

        with model.hooks(disturb | ({key: hook} if restore else {})):
            return model(ids)[:, -1]

    return run


def no_noise(model, ids, noise, layer, position):
    return model(ids)[:, -1]


MISTAKES_36 = [
    (noised(restore=False), "Nothing is restored: one vector should be the clean run's."),
    (no_noise, "There is no noise in this run: is the hook returning the embedding plus noise?"),
    (noised(clean_under_noise=True), "The vector comes from a run with noise: keep the clean one."),
    (noised(add=False), "The noise replaces the embedding: add it."),
    (noised(everywhere=True), "Every position is restored, not one."),
    (noised(site="attn_out"), "This restores what attention adds: the stream is at resid_pre."),
]


def restored_in_two_blocks(model, ids, noise, layer, position):
    clean = model.run_with_cache(ids, ("resid_pre", layer))[1]["resid_pre", layer]

    def mixed(x):
        return torch.stack(
            [clean[:, i] if i == position else x[:, i] for i in range(x.shape[1])], 1
        )

    with model.hooks({"embed": lambda x: x + noise}), model.hooks({("resid_pre", layer): mixed}):
        return model(ids)[:, -1]


@exercise(
    "3.6",
    title="Noise, and one vector restored",
    difficulty=3,
    importance=4,
    minutes=5,
    stub=STUB_36,
    reference=restored,
    right=[restored_in_two_blocks],
    survivors=ONE_MODEL,
    hints=[
        "Run once without noise, and keep the stream that enters the layer.",
        'Then one run with two hooks: {"embed": …, ("resid_pre", layer): …}.',
    ],
    wrong=MISTAKES_36,
)
def check_36(answer) -> None:
    def make(draw):
        model, pairs = shipped_model(), some_pairs(draw)
        ids, noise = pairs.clean, torch.zeros(*pairs.clean.shape, model.d_model)
        size = float(model.run_with_cache(ids, "embed")[1]["embed"].std())
        at = draw.choice(pairs.subject)
        noise[:, at:-1] = draw.normal(
            len(ids), ids.shape[1] - at - 1, model.d_model, scale=3 * size
        )
        return model, ids, noise, draw.integer(1, model.n_layers - 2), at

    on_model(
        answer,
        restored,
        make,
        MISTAKES_36,
        "Noise on the embedding of every position where it is not 0, and one clean vector.",
    )


# -- 3.7 -------------------------------------------------------------------------------------

STUB_37 = '''\
def patch_each(model, base, other, layer, at, taken):
    """As patch_vector, for prompts of any lengths: each one's last logits, (prompts, d_vocab).

    base, other  lists of texts. at, taken  a position for each prompt: where the vector is put in
    its base text, and where it is taken from in its other text; -1 is that text's last token.
    """
    ...
'''


def placed(of_at=lambda to, of, n, m: to, of_taken=lambda to, of, n, m: of):
    """patch_each with other places, from those given and the two texts' lengths."""

    def run(model, base, other, layer, at, taken):
        sizes = [[model.tokens(text).shape[1] for text in each] for each in (base, other)]
        rows = list(zip(at, taken, *sizes, strict=True))
        to, of = ([f(*row) for row in rows] for f in (of_at, of_taken))
        return patch_each(model, base, other, layer, to, of)

    return run


def at_the_padding(model, base, other, layer, at, taken):
    ids, there = (model.tokens(texts, pad=True) for texts in (base, other))
    key = ("resid_pre", layer)
    kept = model.run_with_cache(there, key)[1][key]

    def hook(x):
        x[range(len(x)), at] = kept[range(len(x)), taken]
        return x

    with model.hooks({key: hook}):
        return model(ids)[:, -1]


MISTAKES_37 = [
    (
        at_the_padding,
        "Shorter texts are padded on the right, so position -1 is padding: count from each text's "
        "own end.",
    ),
    (placed(of_taken=lambda to, of, n, m: to), "Both texts use `at`: the vector is at `taken`."),
    (placed(lambda to, of, n, m: of), "Both texts use `taken`: the vector is put in at `at`."),
    (placed(lambda to, of, n, m: of, lambda to, of, n, m: to), "`at` and `taken` are swapped."),
    (placed(lambda to, of, n, m: -1, lambda to, of, n, m: -1), "The last tokens are patched."),
    (lambda m, b, o, layer, at, of: patch_each(m, o, b, layer, of, at), "The runs are swapped."),
    (lambda m, b, *_: torch.stack([m(text)[0, -1] for text in b]), "Nothing is patched."),
]


def padded_with_care(model, base, other, layer, at, taken):
    key, rows = ("resid_pre", layer), range(len(base))
    ids, there = (model.tokens(texts, pad=True) for texts in (base, other))
    n, m = ([model.tokens(text).shape[1] for text in texts] for texts in (base, other))
    kept = model.run_with_cache(there, key)[1][key]

    def hook(x):
        to, of = (
            [p % size for p, size in zip(ps, s, strict=True)] for ps, s in ((at, n), (taken, m))
        )
        x[rows, to] = kept[rows, of]
        return x

    with model.hooks({key: hook}):
        return model(ids)[rows, [size - 1 for size in n]].numpy()


def patch_each_by_library(model, base, other, layer, at, taken):
    found = []
    for row in zip(base, other, at, taken, strict=True):
        ids = [model.tokens(text) for text in row[:2]]
        where = Sweep("layers", layers=layer, positions=row[2], source=row[3])
        activation_patch(model, ids[1], ids[0], "resid_pre", lambda x: keep(found, x), over=where)
    return torch.cat(found)


def keep(found: list, logits):
    found.append(logits.flatten(0, -2))
    return logits[..., 0, 0]


@exercise(
    "3.7",
    title="Prompts of unequal length",
    difficulty=3,
    importance=4,
    minutes=6,
    stub=STUB_37,
    reference=patch_each,
    right=[padded_with_care, patch_each_by_library],
    survivors=ONE_MODEL,
    hints=[
        "One prompt at a time needs no padding: `zip(base, other, at, taken)`.",
        '`model.run_with_cache(other_text, ("resid_pre", layer))` takes a text as well as ids.',
    ],
    wrong=MISTAKES_37,
)
def check_37(answer) -> None:
    def make(draw):
        model = shipped_model()
        clean, corrupted, *_ = unequal_pairs(model, draw.integer(3, 4), draw.integer(0, 100_000))
        at = [draw.choice([2, 3, -1, -2]) for _ in clean]
        taken = [draw.choice([3, 2, -3, 4]) for _ in clean]
        return model, corrupted, clean, draw.integer(1, model.n_layers - 2), at, taken

    on_model(
        answer, patch_each, make, MISTAKES_37, "Each prompt has its own two positions.", cases=4
    )


# -- 3.8 -------------------------------------------------------------------------------------

STUB_38 = '''\
def attribution(model, base, other, layer, answer, wrong):
    """The estimated change of the mean logit difference by a patch at each position, (pos,).

    base, other  token ids (batch, pos); the patches are of ("resid_pre", layer), from other.
    answer, wrong  token ids (batch,). One backward pass, by torch.autograd.grad.
    """
    ...
'''


def estimated(rule, at="base", site="resid_pre", difference=True):
    """A wrong estimate: rule(here, there, gradient), each (batch, pos, d_model)."""

    def run(model, base, other, layer, answer, wrong):
        key, held = (site, layer), {}
        first, second = (base, other) if at == "base" else (other, base)
        there = model.run_with_cache(second, key)[1][key]
        with model.hooks({key: lambda x: held.setdefault("x", x.requires_grad_())}):
            last, rows = model(first)[:, -1], torch.arange(len(base))
            value = last[rows, answer] - (last[rows, wrong] if difference else 0)
        (gradient,) = torch.autograd.grad(value.mean(), held["x"])
        here, there = (held["x"].detach(), there) if at == "base" else (there, held["x"].detach())
        return rule(here, there, gradient)

    return run


def dotted(here, there, gradient):
    return ((there - here) * gradient).sum((0, 2))


MISTAKES_38 = [
    (estimated(lambda h, t, g: -dotted(h, t, g)), "The sign is turned round: from base to other."),
    (
        estimated(lambda h, t, g: (t * g).sum((0, 2))),
        "The change is other − base: base is removed.",
    ),
    (estimated(dotted, at="other"), "The gradient is of the other run: take it in the base run."),
    (estimated(lambda h, t, g: ((t - h) * g).sum(2)), "Sum over the prompts, too: (pos,)."),
    (estimated(lambda h, t, g: ((t - h) * g).sum()), "One number for each position."),
    (estimated(lambda h, t, g: ((t - h) * g).mean((0, 2))), "Sum the products, don't average."),
    (
        estimated(lambda h, t, g: ((t - h).norm(dim=2) * g.norm(dim=2)).sum(0)),
        "Lengths alone forget the angle: take the dot product.",
    ),
    (estimated(dotted, difference=False), "This is of the answer's logit alone: subtract wrong's."),
    (
        estimated(lambda h, t, g: len(h) * dotted(h, t, g)),
        "This is of the sum over the prompts: differentiate their mean.",
    ),
]


def attribution_by_backward(model, base, other, layer, answer, wrong):
    key, held = ("resid_pre", layer), []
    there = model.run_with_cache(other, key)[1][key]

    def hook(x):
        x = x.detach().requires_grad_()
        held.append(x)
        return x

    with model.hooks({key: hook}):
        last = model(base)[:, -1]
        chosen = last.gather(1, answer[:, None]) - last.gather(1, wrong[:, None])
        chosen.mean().backward()
    return ((there - held[0].detach()) * held[0].grad).sum(-1).sum(0).numpy()


@exercise(
    "3.8",
    title="Every patch from one gradient",
    difficulty=4,
    importance=5,
    minutes=8,
    stub=STUB_38,
    reference=attribution,
    right=[attribution_by_backward],
    survivors=ONE_MODEL,
    hints=[
        "In the base run a hook keeps the stream, `kept.append(x.requires_grad_())`, and gives it.",
        "`torch.autograd.grad(scale(…, 1, 0), kept[0])` gives the gradient of the difference.",
        "Multiply it with other's stream minus base's, and sum over prompts and d_model.",
    ],
    wrong=MISTAKES_38,
)
def check_38(answer) -> None:
    def make(draw):
        pairs, model = some_pairs(draw), shipped_model()
        ids = (torch.tensor(each) for each in (pairs.answer, pairs.wrong))
        layer = draw.integer(1, model.n_layers - 2)
        return model, pairs.corrupted, pairs.clean, layer, *ids

    on_model(answer, attribution, make, MISTAKES_38, "Per position: (other − base) · gradient.")


# -- 3.9 -------------------------------------------------------------------------------------

STUB_39 = '''\
def bias_slope(model, sentences, p_she):
    """The slope of the model's log-odds of "she" against "he" over the world's, one number.

    sentences  texts of any lengths, each up to its pronoun
    p_she      the world's probability of "she" for each sentence's occupation, a list
    """
    ...
'''


def sloped(rule, odds=True):
    """A wrong slope: rule(model's, world's), as log-odds or as probabilities of she."""

    def run(model, sentences, p_she):
        she, he = (model.to_single_token(word) for word in (" she", " he"))
        last = torch.stack([model(each)[0, -1] for each in sentences])
        said, world = last[:, she] - last[:, he], torch.logit(torch.tensor(p_she))
        return float(rule(said, world) if odds else rule(said.sigmoid(), world.sigmoid()))

    return run


def regressed(y, x):
    x = x - x.mean()
    return (x * y).sum() / (x * x).sum()


MISTAKES_39 = [
    (sloped(regressed, odds=False), "These are probabilities: take log-odds on both sides."),
    (sloped(lambda y, x: regressed(x, y)), "This is the world over the model: turn it round."),
    (sloped(lambda y, x: regressed(-y, x)), "The sign is turned round: she over he."),
    (sloped(lambda y, x: (x * y).sum() / (x * x).sum()), "Centre the world's log-odds first."),
    (
        sloped(lambda y, x: torch.corrcoef(torch.stack([y, x]))[0, 1]),
        "This is the correlation: it does not say how large the bias is.",
    ),
    (sloped(lambda y, x: (y - x).mean()), "This is a mean difference: a slope is cov / var."),
]


def slope_by_polyfit(model, sentences, p_she):
    found = []
    for text in sentences:
        p = model(text)[0, -1].softmax(-1)
        she, he = (float(p[model.to_single_token(word)]) for word in (" she", " he"))
        found.append(np.log(she / he))
    p = np.array(p_she)
    return np.polyfit(np.log(p / (1 - p)), found, 1)[0]


@exercise(
    "3.9",
    title="How much of the bias the model has",
    difficulty=2,
    importance=3,
    minutes=5,
    stub=STUB_39,
    reference=bias_slope,
    right=[slope_by_polyfit],
    survivors=ONE_MODEL,
    hints=[
        "log p(she) − log p(he) is the difference of two logits at the last token.",
        "The world's log-odds are `torch.logit(torch.tensor(p_she))`.",
        "With x centred, the slope of y over x is (x · y).sum() / (x · x).sum().",
    ],
    wrong=MISTAKES_39,
    after="That was the last exercise. The investigation is waiting.",
)
def check_39(answer) -> None:
    def make(draw):
        jobs = draw.sample(JOBS, "jobs")
        texts = pronoun_texts(draw.integer(0, 999), jobs) + pronoun_texts(
            draw.integer(0, 999), jobs[1:]
        )
        p = [lexicon.occupations()[job] for job in jobs + jobs[1:]]
        return shipped_model(), texts, p

    on_model(answer, bias_slope, make, MISTAKES_39, "The slope is cov(model, world) / var(world).")
