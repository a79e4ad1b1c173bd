"""Exercises of lesson 03: activation patching."""

import numpy as np
import torch

from mi_helpers.course.check import agree, edited, exercise, expect
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
    directions_under_noise,
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
from mi_helpers.lessons.shared import on_model, shipped_model
from mi_helpers.patching import activation_patch, normalised_logit_diff
from mi_helpers.sweeps import Sweep
from mi_helpers.tinyworld import lexicon

ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


def some_pairs(draw, count: int = 3):
    """One to `count` pairs of prompts of one of three kinds."""
    make = draw.choice((fact_pairs, number_pairs, giver_pairs))
    return make(shipped_model(), draw.integer(2, count), draw.integer(0, 100_000))


def slips(reference, *rows) -> list:
    """Wrong answers with what is said of them: pieces of the reference's text, old, new, …, or a
    function; then the sentence."""
    return [
        (changes[0] if callable(changes[0]) else edited(reference, *changes), sentence)
        for *changes, sentence in rows
    ]


def told_apart(draw, make, run):
    """Arguments that `make` draws, drawn again until the patch that `run` makes changes logits."""
    for _ in range(30):
        given = make(draw)
        plain_run = shipped_model()(given[1])[:, -1]
        if (run(*given) - plain_run).abs().amax(-1).min() > 0.2:
            break
    return given


# -- 3.1 -------------------------------------------------------------------------------------

ON_SCALE = "(difference - at_corrupted) / (at_clean - at_corrupted)"
MISTAKES_31 = slips(
    scale,
    (
        ON_SCALE,
        "(difference - at_clean) / (at_corrupted - at_clean)",
        "The ends are swapped: the clean run should be 1.",
    ),
    (ON_SCALE, "difference / at_clean", "Shift first, so that the corrupted run becomes 0."),
    (
        ON_SCALE,
        "(difference - at_corrupted) / at_clean",
        "Divide by the gap between the two runs.",
    ),
    (ON_SCALE, "difference - at_corrupted", "The corrupted run is 0, but the clean one not yet 1."),
    (
        ON_SCALE,
        f"torch.clamp({ON_SCALE}, 0, 1)",
        "Nothing is cut off: a patch may lead beyond 1 or below 0, and that is a finding.",
    ),
    (
        "return (difference",
        "return (-difference",
        "The difference is turned round: answer − wrong.",
    ),
    (
        "last[rows, ",
        "last[:, ",
        "`last[:, answer]` takes every answer from every prompt: pair rows with ids.",
    ),
    ("rows = ", "last = last.softmax(-1); rows = ", "These are probabilities: take the logits."),
    (
        " - last[rows, wrong]",
        "",
        "Subtract the wrong answer's logit: a patch may make all words likelier.",
    ),
    (".mean()", "", "Give one number: the mean over the prompts."),
)


def scale_by_gather(last, answer, wrong, at_clean, at_corrupted):
    both = last.gather(1, torch.stack([answer, wrong], 1)).double().numpy()
    return float(((both[:, 0] - both[:, 1]).mean() - at_corrupted) / (at_clean - at_corrupted))


@exercise(
    "3.1",
    title="From 0 to 1",
    difficulty=2,
    importance=5,
    minutes=5,
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

PUT = "stream[:, position] = kept[key][:, position]"
MISTAKES_32 = slips(
    patch_vector,
    (
        lambda model, base, other, *at: patch_vector(model, other, base, *at),
        "The runs are swapped: base is run, and other gives the vector.",
    ),
    (PUT, "stream[:] = kept[key]", "Every position is replaced, not one."),
    ("resid_pre", "resid_post", "This is the stream that leaves the layer: use resid_pre."),
    ("resid_pre", "attn_out", "This is what attention adds: the stream is at resid_pre."),
    ("layer)\n    _", "layer - 1)\n    _", "This is another layer."),
    (
        PUT,
        "stream[0, position] = kept[key][0, position]",
        "Only the first prompt of the batch is patched.",
    ),
    (PUT, PUT.replace(" = ", " += "), "The vector is added: replace the one that was there."),
    ("model(base)[:, -1]", "model(base)", "Give the logits at the last token, (batch, d_vocab)."),
    (PUT, "pass", "Nothing changed: does the hook change and return the stream, in the `with`?"),
)


def patch_one_by_one(model, base, other, layer, position):
    rows = zip(base, other, strict=True)
    return [patch_vector(model, b[None], o[None], layer, position)[0] for b, o in rows]


@exercise(
    "3.2",
    title="One patch",
    difficulty=2,
    importance=5,
    minutes=6,
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


def sweep_by_library(model, clean, corrupted, answer, wrong):
    metric = normalised_logit_diff(model, clean, corrupted, answer.tolist(), wrong.tolist())
    return activation_patch(model, clean, corrupted, "resid_pre", metric)


EACH = "scale(last, answer, wrong, *ends)"
MISTAKES_33 = slips(
    sweep,
    (
        "corrupted, clean, layer",
        "clean, corrupted, layer",
        "These are corrupted vectors, put into the clean run.",
    ),
    (EACH, f"1 - {EACH}", "The ends are swapped: where a patch does nothing the value is 0."),
    ("return effect", "return effect.T", "The layers come first: (layers, positions)."),
    (EACH, "scale(last, answer, wrong, 1, 0)", "These are logit differences: use the scale."),
    (EACH, "scale(last, answer, wrong, 1, 0) - ends[1]", "These are changes: divide by the gap."),
    ("clean, layer, position)", "clean, max(layer - 1, 0), position)", "The layers are shifted."),
    ("clean, layer, position)", "clean, layer, -1)", "Every patch is at the last token."),
)


@exercise(
    "3.3",
    title="The sweep",
    difficulty=2,
    importance=5,
    minutes=6,
    reference=sweep,
    seconds=60,  # a slow machine takes ten
    right=[sweep_by_library],
    survivors=ONE_MODEL
    | {"range(clean.shape[1]) → range(1, clean.shape[1])": "at 0 both have <bos>: no effect"},
    hints=[
        "First the two unpatched runs: `scale(model(ids)[:, -1], answer, wrong, 1, 0)` is a bare "
        "logit difference.",
        "Then two loops around `patch_vector(model, corrupted, clean, layer, position)`.",
    ],
    wrong=MISTAKES_33,
)
def check_33(answer) -> None:
    def make(draw):
        pairs = number_pairs(shipped_model(), draw.integer(1, 3), draw.integer(0, 100_000))
        sides = [(pairs.clean, pairs.answer), (pairs.corrupted, pairs.wrong)]
        (clean, said), (corrupted, other) = draw.choice([sides, sides[::-1]])  # are or is
        return shipped_model(), clean, corrupted, torch.tensor(said), torch.tensor(other)

    on_model(
        answer, sweep, make, MISTAKES_33, "One patch for each layer and position, on the scale.", 2
    )


# -- 3.4 -------------------------------------------------------------------------------------


def at_the_padding(model, base, other, layer, at, taken):
    ids, there = (model.tokens(texts, pad=True) for texts in (base, other))
    key = ("resid_pre", layer)
    kept = model.run_with_cache(there, key)[1][key]

    def hook(x):
        x[range(len(x)), at] = kept[range(len(x)), taken]
        return x

    with model.hooks({key: hook}):
        return model(ids)[:, -1]


MISTAKES_34 = slips(
    patch_each,
    (
        at_the_padding,
        "Shorter texts are padded on the right, so position -1 is padding: count from each text's "
        "own end.",
    ),
    ("[0, of]", "[0, to]", "Both texts use `at`: the vector is at `taken`."),
    ("to=to", "to=of", "Both texts use `taken`: the vector is put in at `at`."),
    ("to=to", "to=of", "[0, of]", "[0, to]", "`at` and `taken` are swapped."),
    ("to=to", "to=-1", "[0, of]", "[0, -1]", "The last tokens are patched."),
    (
        lambda model, base, other, layer, at, of: patch_each(model, other, base, layer, of, at),
        "The runs are swapped: base is run, and other gives the vectors.",
    ),
    ("stream[0, to] = vector", "pass", "Nothing is patched."),
)


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
    "3.4",
    title="Prompts of unequal length",
    difficulty=3,
    importance=4,
    minutes=6,
    reference=patch_each,
    right=[padded_with_care, patch_each_by_library],
    survivors=ONE_MODEL | {"True → False": "the four lists are always equally long"},
    hints=[
        "One prompt at a time needs no padding: `zip(base, other, at, taken)`.",
        '`model.run_with_cache(other_text, ("resid_pre", layer))` takes a text as well as ids.',
    ],
    wrong=MISTAKES_34,
)
def check_34(answer) -> None:
    def make(draw):
        model = shipped_model()
        clean, corrupted, *_ = unequal_pairs(model, draw.integer(3, 4), draw.integer(0, 100_000))
        at = [draw.choice([2, 3, -1, -2]) for _ in clean]
        taken = [draw.choice([3, 2, -3, 4]) for _ in clean]
        return model, corrupted, clean, draw.integer(1, model.n_layers - 2), at, taken

    on_model(
        answer, patch_each, make, MISTAKES_34, "Each prompt has its own two positions.", cases=4
    )


# -- 3.5 -------------------------------------------------------------------------------------

MISTAKES_35 = slips(
    restored,
    (
        ", key: put_in}",
        "}",
        "Nothing is restored: put in the vector that the run *without* noise has there.",
    ),
    (
        '"embed": lambda x: x + noise, ',
        "",
        "This is the clean run: the noise is missing, or every position is restored.",
    ),
    ("x + noise", "noise + 0 * x", "The noise replaces the embedding: add it."),
    ("resid_pre", "attn_out", "This restores what attention adds: the stream is at resid_pre."),
    ("[:, position]", "[:, position + 1]", "Another position is restored."),
    ("[:, position]", "[:, : position + 1]", "Every position up to this one is restored."),
    ("[:, position]", "[0, position]", "Only the first prompt is restored."),
)


def restored_in_two_blocks(model, ids, noise, layer, position):
    clean = model.run_with_cache(ids, ("resid_pre", layer))[1]["resid_pre", layer]

    def mixed(x):
        return torch.stack(
            [clean[:, i] if i == position else x[:, i] for i in range(x.shape[1])], 1
        )

    with model.hooks({"embed": lambda x: x + noise}), model.hooks({("resid_pre", layer): mixed}):
        return model(ids)[:, -1]


@exercise(
    "3.5",
    title="Noise, and one vector restored",
    difficulty=3,
    importance=4,
    minutes=5,
    reference=restored,
    right=[restored_in_two_blocks],
    survivors=ONE_MODEL,
    hints=[
        "Run once without noise, and keep the stream that enters the layer.",
        'Then one run with two hooks: {"embed": …, ("resid_pre", layer): …}.',
    ],
    wrong=MISTAKES_35,
)
def check_35(answer) -> None:
    def make(draw):
        model, pairs = shipped_model(), some_pairs(draw)
        ids, noise = pairs.clean, torch.zeros(*pairs.clean.shape, model.d_model)
        size = float(model.run_with_cache(ids, "embed")[1]["embed"].std())
        places, at = ids.shape[1] - 2, draw.choice(pairs.subject)
        noise[:, 1:-1] = draw.normal(len(ids), places, model.d_model, scale=3 * size)
        return model, ids, noise, draw.integer(1, model.n_layers - 2), at

    on_model(
        answer,
        restored,
        make,
        MISTAKES_35,
        "Noise on the embedding of every position where it is not 0, and one clean vector.",
    )


# -- 3.6 -------------------------------------------------------------------------------------


def bound_late(model, base, other, heads):
    """As the reference, but the hooks share the loop's variables."""
    _, kept = model.run_with_cache(other, "z")
    hooks = {}
    for layer in dict(heads):
        chosen = [head for each, head in heads if each == layer]

        def put_in(z):
            z[:, -1, chosen] = kept["z", layer][:, -1, chosen]  # noqa: B023
            return z

        hooks["z", layer] = put_in
    with model.hooks(hooks):
        return model(base)[:, -1]


MISTAKES_36 = slips(
    patch_heads,
    (
        bound_late,
        "All hooks replace the heads of the loop's last layer: a function made in a loop sees the "
        "variables as they are when it runs.",
    ),
    (
        "if each == layer]",
        "if each == layer][-1:]",
        "Only the last head of each layer is replaced: a dictionary holds one hook for a key, so "
        "one hook has to replace all heads of its layer.",
    ),
    ("[:, -1, chosen]", "[:, :, chosen]", "Every token is patched, not the last alone."),
    ("[:, -1, chosen]", "[:, -1]", "All heads of the layer are replaced."),
    ("[:, -1, chosen]", "[:, 0, chosen]", "The first token is patched."),
    ("[:, -1, chosen]", "[0, -1, chosen]", "Only the first prompt is patched."),
    (
        lambda model, base, other, heads: patch_heads(model, other, base, heads),
        "The runs are swapped: base is run, and other gives the heads.",
    ),
    (
        lambda model, base, other, heads: patch_heads(model, base, other, heads[:1]),
        "Only the first head of the list is replaced.",
    ),
)


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
    "3.6",
    title="Several heads at once",
    difficulty=3,
    importance=5,
    minutes=7,
    reference=patch_heads,
    right=[heads_in_one_loop],
    survivors=ONE_MODEL,
    hints=[
        'As in 3.2, with the site "z". `model.run_with_cache(other, "z")` keeps all layers.',
        "Group the heads by layer: one hook for a layer replaces all of its heads.",
        "A function made in a loop sees the loop's last value; `def put_in(z, layer=layer):` keeps "
        "the one it was made with.",
    ],
    wrong=MISTAKES_36,
)
def check_36(answer) -> None:
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
        MISTAKES_36,
        "z[:, -1, head] of each head in the list should come from the other run, and no other.",
    )


# -- 3.7 -------------------------------------------------------------------------------------

COPIES = "one, rest = corrupted.clone(), clean.clone()"
MISTAKES_37 = slips(
    both_ways,
    (
        "return enough, needed",
        "return needed, enough",
        "The two are swapped: enough puts a clean wire in.",
    ),
    (
        "1 - (run(rest)",
        "(run(rest)",
        "The second is what is left of the clean run: needed is what is lost, 1 minus it.",
    ),
    (
        f"        {COPIES}\n",
        "",
        "    enough, needed",
        f"    {COPIES}\n    enough, needed",
        "Put each wire back before the next: start from a `clone()`.",
    ),
    (" / gap", "", "Put both on the scale: divide by run(clean) − run(corrupted)."),
    (
        lambda run, clean, corrupted: both_ways(run, clean, torch.zeros_like(corrupted)),
        "The corrupted wires are not zero: take their values from `corrupted`.",
    ),
    ("return enough, needed", "return enough, enough", "Both are the same direction."),
)


def both_ways_by_masks(run, clean, corrupted):
    ends, found = [float(run(x)) for x in (corrupted, clean)], ([], [])
    for row in torch.eye(len(clean)).bool():
        for kept, wires in zip(found, (row, ~row), strict=True):
            value = float(run(torch.where(wires, clean, corrupted)))
            kept.append((value - ends[0]) / (ends[1] - ends[0]))
    return found[0], [1 - value for value in found[1]]


@exercise(
    "3.7",
    title="Enough and needed",
    difficulty=2,
    importance=5,
    minutes=5,
    reference=both_ways,
    right=[both_ways_by_masks],
    copies=False,
    hints=[
        "For wire i: a copy of corrupted with the clean value at i, and the reverse.",
        "Both are put on the scale; needed is 1 minus what the scale says.",
    ],
    wrong=MISTAKES_37,
)
def check_37(answer) -> None:
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

    agree(watched, both_ways, make, MISTAKES_37, "One wire at a time, the others as they were.")


# -- 3.8 -------------------------------------------------------------------------------------

CHANGE = '(there[key] - held["here"])'
PRODUCT = f"({CHANGE} * gradient).sum((0, 2))"
MISTAKES_38 = slips(
    attribution,
    (CHANGE, f"-{CHANGE}", "The sign is turned round: the patch goes from base to other."),
    (CHANGE, "there[key]", "The change is other − base: the patch removes base, too."),
    (
        lambda model, base, other, *rest: -attribution(model, other, base, *rest),
        "The gradient is of the other run: take it in the base run.",
    ),
    ("sum((0, 2))", "sum(2)", "Sum over the prompts, too: (pos,)."),
    ("sum((0, 2))", "sum()", "One number for each position."),
    ("sum((0, 2))", "mean((0, 2))", "Sum the products, don't average them."),
    (
        PRODUCT,
        f"({CHANGE}.norm(dim=2) * gradient.norm(dim=2)).sum(0)",
        "Lengths alone forget the angle: take the dot product.",
    ),
    (
        "scale(model(base)[:, -1], answer, wrong, 1, 0)",
        "model(base)[range(len(base)), -1, answer].mean()",
        "This is of the answer's logit alone: subtract the wrong one's.",
    ),
    (
        "wrong, 1, 0)",
        "wrong, 1, 0) * len(base)",
        "This is of the sum over the prompts: differentiate their mean.",
    ),
)


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

FIT = "(said * world).sum() / (world * world).sum()"
MISTAKES_39 = slips(
    bias_slope,
    (
        "last = torch.stack(",
        "last = torch.softmax(torch.stack(",
        " for each in sentences])",
        " for each in sentences]), -1)",
        "torch.logit(torch.tensor(p_she))",
        "torch.tensor(p_she)",
        "These are probabilities: take log-odds on both sides.",
    ),
    (
        FIT,
        "(said * world).sum() / ((said - said.mean()) ** 2).sum()",
        "Turn it round: this is the world over the model.",
    ),
    (
        "last[:, she] - last[:, he]",
        "last[:, he] - last[:, she]",
        "The sign is turned round: she over he.",
    ),
    ("world = world - world.mean()", "pass", "Centre the world's log-odds first."),
    (
        FIT,
        "torch.corrcoef(torch.stack([said, world]))[0, 1]",
        "This is the correlation: it does not say how large the bias is.",
    ),
    (
        "last[:, she] - last[:, he]",
        "last.softmax(-1)[:, she].logit()",
        "This is she against all other words: take she against he.",
    ),
    (
        "[0, -1]",
        "[0, 0]",
        'The slope is 0: take the last token\'s logits, and the ids of " she" and " he", each with '
        "its space.",
    ),
)


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
        cut = [text.rsplit(" ", draw.choice([0, 1]))[0] for text in texts]  # not only she or he
        return shipped_model(), cut, p

    on_model(answer, bias_slope, make, MISTAKES_39, "The slope is cov(model, world) / var(world).")
