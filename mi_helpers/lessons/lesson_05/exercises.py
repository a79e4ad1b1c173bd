"""Exercises of lesson 05: attention heads."""

import functools

import numpy as np
import torch

from mi_helpers.ablation import Mean, ablate, record
from mi_helpers.course.check import agree, draws, edits, exercise, expect
from mi_helpers.course.investigate import investigation, some_of
from mi_helpers.course.predict import prediction
from mi_helpers.heads import copying_map, head_scores, strongest
from mi_helpers.lessons.lesson_05 import circuit as circuits
from mi_helpers.lessons.lesson_05 import ioi
from mi_helpers.lessons.lesson_05.experiments import (
    induction_pair,
    mixed_repeats,
    share_lost,
    steepest,
    training_log,
)
from mi_helpers.lessons.shared import on_model, repeated_tokens, shipped_model
from mi_helpers.paths import path_patch as library_path_patch

ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


# -- 5.1 -------------------------------------------------------------------------------------


def induction_targets(tokens):
    """Where an induction head looks: n rows of n booleans, for a list of n token ids.

    Row i, column j is True if j comes before i and the token just before j is the same as token i.
    """
    n = len(tokens)
    return [[0 < j < i and tokens[j - 1] == tokens[i] for j in range(n)] for i in range(n)]


def targets_in_torch(tokens):
    t = torch.as_tensor(tokens)
    same = t[:, None] == torch.cat([t.new_full((1,), -1), t[:-1]])
    return same.tril(-1)


MISTAKES_51 = edits(
    induction_targets,
    """
    0 < j < i and tokens[j - 1] → j < i and tokens[j]
        This is where a *duplicate-token* head looks, at the earlier copy itself. An induction head
        looks at the token after it.
    0 < j < i → 0 < j
        This looks ahead: attention is causal, so j has to come before i.
    0 < j < i → 0 < j <= i
        A token that repeats the one before it would look at itself.
    0 < j < i and tokens[j - 1] → j < i and tokens[j + 1]
        This looks one place too early: at the token *before* the earlier copy.
    0 < j < i and tokens[j - 1] == tokens[i] → 0 < i < j and tokens[i - 1] == tokens[j]
        Rows and columns are swapped: a row is the token that looks.
    0 < j < i → j < i
        Nothing stands before position 0: there `tokens[-1]` is the last token.
    tokens[j - 1] == tokens[i] → tokens[j - 1] == tokens[i] not in tokens[j : i - 1]
        Only the latest copy is marked: every earlier copy counts.
    """,
)


@exercise(
    "5.1",
    title="Where an induction head looks",
    difficulty=2,
    importance=5,
    minutes=5,
    reference=induction_targets,
    right=[targets_in_torch],
    hints=[
        "In `[7, 3, 7]` the last 7 looks at the 3, at position 1: a 7 stands before it.",
        "`tokens[j - 1] == tokens[i]`, for j from 1 to i - 1.",
    ],
    wrong=MISTAKES_51,
)
def check_51(answer) -> None:
    def tokens(draw) -> tuple:
        row = draw.integers(0, 2, draw.size("pos", 8, 14)).tolist()
        return ([*row, row[-1], row[0]],)  # one that repeats itself, and a last one that came early

    otherwise = "Compare with tokens[j - 1] == tokens[i] for 0 < j < i."
    agree(answer, induction_targets, tokens, MISTAKES_51, otherwise)


# -- 5.2 -------------------------------------------------------------------------------------


def score_heads(model, ids, targets):
    """The share of its attention that each head gives to its targets: (n_layers, n_heads).

    A mean over all tokens that have a target, in all texts. `model.run_with_cache(ids, "pattern")`
    keeps the patterns, (n_layers, batch, n_heads, q_pos, k_pos).
    ids (batch, pos); targets (batch, q_pos, k_pos), booleans
    """
    _, cache = model.run_with_cache(ids, "pattern")
    hit = (cache["pattern"] * targets[:, None]).sum(-1)  # (n_layers, batch, n_heads, q_pos)
    return hit.sum((1, 3)) / targets.any(-1).sum()


def scores_by_loops(model, ids, targets):
    _, cache = model.run_with_cache(ids, "pattern")
    kept = [
        cache["pattern"][:, b, :, i, targets[b, i]].sum(-1)
        for b in range(len(ids))
        for i in range(ids.shape[1])
        if targets[b, i].any()
    ]
    return torch.stack(kept).mean(0)


def texts_with_targets(draw) -> tuple:
    """Texts of random tokens, and random targets: several for some tokens, none for others."""
    model, n, length = shipped_model(), draw.size("n", 2, 5), draw.size("pos", 6, 12)
    found = draw.booleans(n, length, length, share=0.3).tril(-1)
    found[:, ::3] = False
    found[0, -1, :2] = True
    found[1:, 4] = False
    return model, repeated_tokens(model, n, length, draw.integer(0, 9999), 1)[:, :length], found


MISTAKES_52 = edits(
    score_heads,
    """
    hit.sum((1, 3)) / targets.any(-1).sum() → hit.mean((1, 3))
        Tokens that have no target are in the mean: leave them out.
    targets.any(-1).sum() → targets.sum()
        You divide by the number of targets: divide by the tokens that have any.
    cache["pattern"] * → cache["pattern"].mT *
        The pattern is used the wrong way round: rows (q_pos) look at columns.
    .sum(-1)  # → .amax(-1)  #
        Only the strongest target of each token counts here: add them all up.
    / targets.any(-1).sum() →
        This is the sum: divide by the number of tokens that have a target.
    hit.sum((1, 3)) → (hit.sum(3)
    & .any(-1).sum() → .any(-1).sum(-1)[:, None]).mean(1)
        Here each text counts once: let each token that has a target count once.
    """,
)


@exercise(
    "5.2",
    title="A score for every head",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=score_heads,
    survivors=ONE_MODEL | {"1 → 2": "queries or keys first: all is summed in the next line"},
    right=[scores_by_loops],
    hints=[
        "Multiply the patterns by the targets: what is left is the attention on targets.",
        "`targets[:, None]` makes room for the axis of heads.",
        "Divide by the number of tokens with a target, `targets.any(-1).sum()`.",
    ],
    wrong=MISTAKES_52,
)
def check_52(answer) -> None:
    otherwise = "Sum pattern · targets, and divide by how many tokens have a target."
    on_model(answer, score_heads, texts_with_targets, MISTAKES_52, otherwise)


# -- 5.3 -------------------------------------------------------------------------------------


def loss_without(model, ids, heads, others):
    """model.loss(ids), (batch, pos - 1), with some heads silenced: each one's z is its mean over
    other texts, position by position.

    heads   a list of (layer, head), of several layers
    others  (texts, pos), as long as ids. ("z", layer) holds (batch, pos, n_heads, d_head)
    """
    _, cache = model.run_with_cache(others, "z")
    means = cache["z"].mean(1)  # (n_layers, pos, n_heads, d_head)

    def silence(layer):
        mine = [head for at, head in heads if at == layer]

        def hook(z):
            z[:, :, mine] = means[layer][:, mine]
            return z

        return hook

    with model.hooks({("z", layer): silence(layer) for layer, _ in heads}):
        return model.loss(ids)


def loss_by_library(model, ids, heads, others):
    with model.hooks(ablate(model, heads, Mean(record(model, others, "z")))):
        return model.loss(ids)


def heads_to_silence(draw) -> tuple:
    """Repeated words, two heads of one layer and one of another, and other texts."""
    model, n, length = shipped_model(), draw.size("n", 2, 3), draw.size("length", 4, 6)
    low, high = sorted(draw.sample(range(model.n_layers), 2))
    pair = draw.sample(range(model.n_heads), 2)
    heads = [(high, pair[0]), (low, draw.integer(0, model.n_heads - 1)), (high, pair[1])]
    ids = repeated_tokens(model, n, length, draw.integer(0, 999))
    others = repeated_tokens(model, draw.size("texts", 4, 6), length, draw.integer(1000, 1999))
    return model, ids, heads, others


MISTAKES_53 = edits(
    loss_without,
    """
    {("z", layer): silence(layer) for layer, _ in heads} → {}
        Nothing changed: does the hook return z, and the loss stand inside?
    means[layer][:, mine] → 0
        This is zero ablation: put the mean over the other texts there.
    .mean(1) → .mean((1, 2), keepdim=True)[:, 0]
        The mean runs over the positions, too: keep one for each position.
    cache(others → cache(ids
        This is the mean of these texts themselves: use the others.
    .mean(1) → [:, 0]
        This is one text of the others, not their mean.
    [head for at, head in heads if at == layer] → list(range(model.n_heads))
        The whole layer is silenced: only some heads should be.
    [head for at, head in heads if at == layer] → [h for h in range(4) if (layer, h) not in heads]
        You silenced the other heads of the layer.
    for layer, _ in heads → for layer, _ in heads[:1]
    & if at == layer → if (at, head) == heads[0]
        Only the first head is silenced: take all of them.
    silence(layer) for → silence(heads[-1][0]) for
        Every hook uses the last layer's heads and mean: a loop's variable has its last value when
        the hook runs. Make each hook in a function of its own.
    """,
)


@exercise(
    "5.3",
    title="Silence some heads",
    difficulty=3,
    importance=5,
    minutes=6,
    reference=loss_without,
    survivors=ONE_MODEL,
    right=[loss_by_library],
    hints=[
        '`model.run_with_cache(others, "z")[1]["z"].mean(1)` is (n_layers, pos, n_heads, d_head).',
        "A hook per layer: a function that makes the hook keeps each layer's own number.",
        "`with model.hooks({('z', layer): hook, …}): return model.loss(ids)`.",
    ],
    wrong=MISTAKES_53,
)
def check_53(answer) -> None:
    otherwise = "In each layer, z[:, :, heads] should be the others' mean, position by position."
    on_model(answer, loss_without, heads_to_silence, MISTAKES_53, otherwise)


# -- 5.4 -------------------------------------------------------------------------------------


def path_into_keys(model, clean, corrupted, sender, readers, freeze_mlps):
    """Logits at the last position, (batch, d_vocab), where one path alone is corrupted: from the
    sender into the readers' keys.

    1. Run both texts, and keep what you need.
    2. Run clean; every head's z is frozen to clean, the sender's to corrupted. MLPs are frozen too,
       if freeze_mlps, else recomputed. Keep the keys.
    3. Run clean; the readers' keys are those of run 2, and everything else is computed as usual.

    sender   (layer, head); readers  [(layer, kv_head), …]
    Sites: ("z", layer) (batch, pos, n_heads, d_head), ("k", layer) (batch, pos, n_kv_heads,
    d_head), ("mlp_out", layer) (batch, pos, d_model)
    """
    layer, head = sender
    _, base = model.run_with_cache(clean, ["z", "mlp_out"])
    _, other = model.run_with_cache(corrupted, [("z", layer)])
    frozen = {("z", i): base["z", i].clone() for i in range(model.n_layers)}
    frozen["z", layer][:, :, head] = other["z", layer][:, :, head]
    if freeze_mlps:
        frozen |= {("mlp_out", i): base["mlp_out", i] for i in range(model.n_layers)}
    with model.hooks({site: lambda x, site=site: frozen[site] for site in frozen}):
        _, seen = model.run_with_cache(clean, [("k", i) for i, _ in readers])

    def receive(at):
        mine = [kv for i, kv in readers if i == at]

        def hook(k):
            k[:, :, mine] = seen["k", at][:, :, mine]
            return k

        return hook

    with model.hooks({("k", i): receive(i) for i, _ in readers}):
        return model(clean)[:, -1]


def path_by_library(model, clean, corrupted, sender, readers, freeze_mlps):
    receivers = [("k", *reader) for reader in readers]
    kept = []
    library_path_patch(
        model,
        clean,
        corrupted,
        [sender],
        receivers,
        lambda logits: kept.append(logits) or logits.mean((-2, -1)),
        through_mlps=not freeze_mlps,
    )
    return kept[-1].reshape(-1, model.d_vocab)


def paths_to_patch(draw) -> tuple:
    """Induction prompts; a sender with a layer or more between it and the first reader."""
    model, n, length = shipped_model(), draw.size("n", 2, 3), draw.size("length", 4, 7)
    clean, corrupted, _ = induction_pair(model, n, length, draw.integer(0, 9999))
    layer, freeze = draw.choice([(0, True), (1, False)])
    first = draw.integer(layer + 2, model.n_layers - 2)
    readers = [(first, draw.integer(0, model.n_kv_heads - 1)), (first + 1, 0)]
    return model, clean, corrupted, (layer, draw.integer(0, model.n_heads - 1)), readers, freeze


MISTAKES_54 = edits(
    path_into_keys,
    """
    {("k", i): receive(i) for i, _ in readers} → {}
        These are the clean logits: nothing is patched in the last run.
    {("k", i): receive(i) for i, _ in readers} → {("z", layer): lambda _: frozen["z", layer]}
        This is activation patching: whatever the sender writes reaches every part. Let it reach
        the readers' keys alone.
    {("k", i): receive → {at: lambda x, at=at: frozen[at] for at in frozen} | {("k", i): receive
        In run 3 everything is still frozen: only the readers' keys are held there.
    ("z", i): base["z", i].clone() for i in range(model.n_layers) → ("z", layer): base["z", layer]
        The other heads are not frozen in run 2: longer paths count as well.
    if freeze_mlps: → if False:
        `freeze_mlps` changes nothing: here the MLPs are always recomputed.
    if freeze_mlps: → if True:
        `freeze_mlps` changes nothing: here the MLPs are always frozen.
    [kv for i, kv in readers if i == at] → list(range(model.n_kv_heads))
        The keys of all key-value heads are patched: take the readers' alone.
    [:, :, head] → [:, :, :]
        Here all heads of the sender's layer are corrupted: take one.
    {site: lambda x, site=site: frozen[site] for site in frozen} → {}
    & seen = model.run_with_cache(clean → seen = model.run_with_cache(corrupted
        These are the corrupted run's own keys: everything reaches them, not one path.
    ("k", i) → ("v", i)
    & "k", at → "v", at
        You patched the values: this path goes into the keys.
    """,
)


@exercise(
    "5.4",
    title="One path, in three runs",
    difficulty=4,
    importance=5,
    minutes=10,
    reference=path_into_keys,
    survivors=ONE_MODEL
    | {
        "range(model.n_layers) → range(model.n_layers - 1)": "the last layer writes after all "
        "readers have read"
    },
    right=[path_by_library],
    hints=[
        "Run 1 is two calls of `run_with_cache`: z and mlp_out of clean, the corrupted sender's z.",
        "A hook that ignores what it gets and returns a kept tensor freezes a site.",
        "`lambda z, i=i: frozen[i]` keeps each layer's own number.",
        "In run 3 only the readers' keys are hooked; what was frozen in run 2 is free again.",
    ],
    wrong=MISTAKES_54,
)
def check_54(answer) -> None:
    otherwise = (
        "In run 2, all z frozen to clean but the sender's; in run 3, the readers' keys from run 2."
    )
    on_model(answer, path_into_keys, paths_to_patch, MISTAKES_54, otherwise, cases=4)


# -- 5.5 -------------------------------------------------------------------------------------


def half_way(steps, values):
    """The two neighbouring checkpoints between which a curve first comes half way from its first
    value to its highest: (the last step below, the first step at or above).

    steps, values  lists, one entry for each checkpoint; the curve may fall again
    """
    half = (values[0] + max(values)) / 2
    first = next(i for i, value in enumerate(values) if value >= half)
    return steps[first - 1], steps[first]


def rising_curve(draw) -> tuple:
    """Uneven steps; values that fall first, pass one level in each step, and fall again."""
    n, first, top = draw.size("checkpoints", 10, 15), draw.number(0.2, 0.3), draw.number(0.9, 1.1)
    steps = (torch.cumsum(draw.integers(1, 9, n), 0) * 50).tolist()
    levels = [top / 2, (first - 0.15 + top) / 2, (first + top) / 2]  # of mistakes; the right one
    rise = [sum(levels[:2]) / 2, sum(levels[1:]) / 2, levels[2] + 0.1, first + 0.1, top]
    flat = draw.integer(1, n - 8)
    return steps, [first, first - 0.15, *[first + 0.1] * flat, *rise, *[first + 0.02] * n][:n]


MISTAKES_55 = edits(
    half_way,
    """
    (values[0] + max(values)) → max(values)
        This is half of the highest value: begin at the curve's first one.
    max(values) → values[-1]
        You use the last value: the curve may have fallen by then.
    values[0] + → min(values) +
        You begin at the lowest value: begin at the first one.
    next( → max(
    & value >= half → value >= half > values[i - 1]
        This is the last time that it passes half way: take the first.
    steps[first - 1], steps[first] → ((steps[first - 1] + steps[first]) / 2,) * 2
        Give the two checkpoints: what happened between them, nobody logged.
    steps[first - 1], steps[first] → first - 1, first
        These are indices: give the steps at them.
    """,
)


@exercise(
    "5.5",
    title="Between which checkpoints?",
    difficulty=2,
    importance=3,
    minutes=3,
    reference=half_way,
    hints=[
        "Half way is `(values[0] + max(values)) / 2`.",
        "The first index whose value reaches it, and the one before.",
    ],
    wrong=MISTAKES_55,
)
def check_55(answer) -> None:
    otherwise = "Find the first value that is at least half way; its step, and the one before."
    agree(answer, half_way, rising_curve, MISTAKES_55, otherwise)
    steps, values = [0, 5, 10, 15], [0.0, 0.25, 0.5, 1.0]
    expect(tuple(answer(steps, values)) == (5, 10), "A value that is just half way has arrived.")


# -- 5.6 -------------------------------------------------------------------------------------


def two_metrics(logits, names, io, s):
    """(IO - S, IO - others): the logit of the right name, less that of the one who came twice, and
    less the mean of all names that are neither of the two; each a mean over texts.

    logits (n, d_vocab); names (n_names,), the ids of all names; io, s (n,), ids
    """
    rows = torch.arange(len(logits))
    right = logits[rows, io]
    absent = (names != io[:, None]) & (names != s[:, None])  # (n, n_names)
    others = (logits[:, names] * absent).sum(1) / absent.sum(1)
    return (right - logits[rows, s]).mean(), (right - others).mean()


def metrics_by_loops(logits, names, io, s):
    found = []
    for row, i, j in zip(logits, io, s, strict=True):
        absent = row[[int(n) for n in names if n not in (i, j)]]
        found.append([row[i] - row[j], row[i] - absent.mean()])
    return [sum(column) / len(found) for column in zip(*found, strict=True)]


def some_logits(draw) -> tuple:
    """Logits of a vocabulary in which some ids are names, in no order."""
    vocabulary = draw.size("d_vocab", 20, 30)
    names = torch.from_numpy(draw.rng.permutation(vocabulary))[: draw.size("names", 6, 10)]
    n = draw.size("n", 3, 5)
    pairs = torch.stack(
        [names[torch.from_numpy(draw.rng.permutation(len(names)))] for _ in range(n)]
    )
    return 2 * draw.normal(n, vocabulary), names, pairs[:, 0], pairs[:, 1]


OTHERS = "(logits[:, names] * absent).sum(1) / absent.sum(1)"
MISTAKES_56 = edits(
    two_metrics,
    f"""
    (names != s[:, None]) → (names != -1)
        S is among the others: take the names that the text does not have.
    (names != io[:, None]) & (names != s[:, None]) → torch.ones(len(io), len(names))
        The mean is of all names: both of the two are among the others.
    {OTHERS} → logits.mean(1)
        The others are the whole vocabulary here: take names alone.
    {OTHERS} → logits[:, names].masked_fill(~absent, -1e9).amax(1)
        This is the highest of the others: take their mean.
    (right - others) → ((right + logits[rows, s]) / 2 - others)
        This is both names against the others, which does not see who is right.
    right - logits[rows, s] → logits[rows, s] - right
        The first one is turned round: IO less S.
    / absent.sum(1) →
        This takes the sum of the others: take their mean.
    .mean() →
        This is a number for each text: take the mean over texts.
    """,
)


@exercise(
    "5.6",
    title="Two metrics",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=two_metrics,
    right=[metrics_by_loops],
    hints=[
        "`logits[torch.arange(n), io]` is the right name's logit in each text.",
        "`(names != io[:, None]) & (names != s[:, None])` says which names are absent.",
    ],
    wrong=MISTAKES_56,
)
def check_56(answer) -> None:
    otherwise = "Both start at the logit of IO; look at what is subtracted."
    agree(answer, two_metrics, some_logits, MISTAKES_56, otherwise)


# -- 5.7 -------------------------------------------------------------------------------------


def copying(E, W_V, W_O, U):
    """Whether a head copies the name that it looks at: by how many standard deviations of its row
    (torch's, over n - 1) it raises that name's own logit above the row's mean; a mean over names.

    A head that looks at name a adds row a of E W_V W_O U to the names' logits. Below 0: it lowers
    the very name that it looks at.
    E (names, d_model), what the head reads at each name; W_V (d_model, d_head);
    W_O (d_head, d_model); U (d_model, names), the unembedding of the same names, in that order
    """
    logits = E @ W_V @ W_O @ U
    own = logits.diagonal() - logits.mean(1)
    return (own / logits.std(1)).mean()


def copying_in_numpy(E, V, O, U):  # noqa: E741
    x = (E @ V @ O @ U).double().numpy()
    return float(np.mean([(x[i, i] - x[i].mean()) / x[i].std(ddof=1) for i in range(len(x))]))


def a_head(draw) -> tuple:
    """A head that copies some names and lowers others."""
    n, d, h = draw.size("names", 7, 12), draw.size("d_model", 13, 18), draw.size("d_head", 3, 6)
    E, V, O = draw.normal(n, d), draw.normal(d, h), draw.normal(h, d)  # noqa: E741
    return E, V, O, draw.normal(d, n) + draw.number(-1, 1) * 0.1 * (E @ V @ O).T + draw.normal(d, 1)


MISTAKES_57 = edits(
    copying,
    """
    - logits.mean(1) →
        The row's mean is not taken off: raising all names is no copying.
    mean(1) → mean(0)
    & std(1) → std(0)
        You compare within columns: a row is the name that is looked at.
    / logits.std(1) →
        This is in logits: divide by the standard deviation of the row.
    logits.std(1) → logits.std(1, correction=0)
        Your standard deviation divides by n, as NumPy's does: torch's divides by n - 1.
    (own / logits.std(1)) → (logits.argmax(1) == torch.arange(len(E))).float()
        This is how often the own name is first: ask by how much it is raised.
    E @ W_V @ W_O @ U → E @ U
        The head is missing: go through W_V and W_O.
    mean(1) → mean()
    & std(1) → std()
        These are the mean and spread of all rows: each row has its own.
    (own / logits.std(1)).mean() → own / logits.std(1)
        This is one number for each name: take their mean.
    """,
)


@exercise(
    "5.7",
    title="Does it copy what it looks at?",
    difficulty=3,
    importance=4,
    minutes=5,
    reference=copying,
    right=[copying_in_numpy],
    hints=[
        "`E @ W_V @ W_O @ U` is square: the name that is looked at, by the name that it raises.",
        "The diagonal less `logits.mean(1)`, over `logits.std(1)`.",
    ],
    wrong=MISTAKES_57,
)
def check_57(answer) -> None:
    otherwise = "(diagonal - mean of the row) / sd of the row, and the mean of that."
    agree(answer, copying, a_head, MISTAKES_57, otherwise, tolerance=1e-4)


# -- 5.8 -------------------------------------------------------------------------------------


def circuit_logits(model, ids, places, circuit, means):
    """Logits at the last position, (n, d_vocab), when the circuit alone is left.

    Whatever stands outside it, a head or one of its positions, has its z replaced by the mean.
    circuit  a set of (layer, head, role); places  {role: (n, pos) booleans}, each position in one
    means    (n_layers, n, pos, n_heads, d_head), like the model's own z
    """
    keep = torch.zeros(means.shape[:-1], dtype=torch.bool)
    for layer, head, role in circuit:
        keep[layer, :, :, head] |= places[role]

    def only_kept(layer):
        return lambda z: torch.where(keep[layer][..., None], z, means[layer])

    with model.hooks({("z", layer): only_kept(layer) for layer in range(model.n_layers)}):
        return model(ids)[:, -1]


def circuit_by_library(model, ids, places, circuit, means):
    role = torch.zeros_like(ids)
    for name, where in places.items():
        role[where] = ioi.ROLES.index(name)
    keep = torch.zeros(model.n_layers, model.n_heads, len(ioi.ROLES), dtype=torch.bool)
    for layer, head, name in circuit:
        keep[layer, head, ioi.ROLES.index(name)] = True
    with model.hooks(ioi.keeping(keep, role, dict(enumerate(means)))):
        return model(ids)[:, -1]


@functools.cache
def some_prompts(seed: int) -> tuple:
    """Prompts of the task, where each role is in them, and the means."""
    prompts = ioi.make_prompts(shipped_model(), 3, seed, others=3)
    places = {role: prompts.role == i for i, role in enumerate(ioi.ROLES)}
    means = ioi.reference(shipped_model(), prompts.others)
    return prompts.ids, places, torch.stack(list(means.values()))


def circuit_to_run(draw) -> tuple:
    """Prompts and a circuit: some heads at some roles, and others at all but some."""
    ids, places, means = some_prompts(draw.integer(0, 3))
    model, circuit = shipped_model(), set()
    for layer in range(0, model.n_layers - 1):
        for role in ioi.ROLES:
            circuit |= {(layer, draw.integer(0, model.n_heads - 1), role)}
    return model, ids, places, circuit - set(list(sorted(circuit))[::4]), means


MISTAKES_58 = edits(
    circuit_logits,
    """
    {("z", layer): only_kept(layer) for layer in range(model.n_layers)} → {}
        These are the logits of the whole model: is anything replaced?
    , z, means[layer]) → , means[layer], z)
        This is the other way round: it removes the circuit and keeps the rest.
    |= places[role] → |= True
        A head of the circuit stays at every position: keep it at its roles.
    |= places[role] → = places[role]
    & role in circuit: → role in sorted(circuit):
        A head that stands in the circuit at two roles keeps the last one alone: use `|=`.
    keep[layer, :, :, head] |= places[role] → keep[layer] |= places[role][..., None]
        All heads of the layer stay at these positions: keep the circuit's.
    for layer in range(model.n_layers)} → for layer in {at for at, *_ in circuit}}
        A layer with no node of the circuit stays whole: hook each layer.
    , z, means[layer]) → , z, torch.zeros_like(z))
        You put zeros there: put the mean.
    model(ids)[:, -1] → model(ids)
        Return the logits at the last position alone, (n, d_vocab).
    """,
)


@exercise(
    "5.8",
    title="The circuit alone",
    difficulty=4,
    importance=5,
    minutes=8,
    reference=circuit_logits,
    survivors=ONE_MODEL,
    right=[circuit_by_library],
    hints=[
        "Begin with a mask of False, (n_layers, n, pos, n_heads), and set what the circuit keeps.",
        "`keep[layer, :, :, head] |= places[role]`: a head may stand in the circuit at two roles.",
        "`torch.where(keep[layer][..., None], z, means[layer])`, in every layer.",
    ],
    wrong=MISTAKES_58,
)
def check_58(answer) -> None:
    otherwise = "z where the mask is True, the mean elsewhere, in every layer."
    on_model(answer, circuit_logits, circuit_to_run, MISTAKES_58, otherwise)


# -- 5.9 -------------------------------------------------------------------------------------


def needed(F, circuit):
    """{node: how much F changes when this node alone leaves the circuit}, never negative.

    F        a function of a set of nodes, which gives a number; it is called as seldom as possible
    circuit  a set of nodes
    """
    whole = F(circuit)
    return {node: abs(whole - F(circuit - {node})) for node in circuit}


def one_by_one(F, circuit):
    left, found = set(circuit), {}
    for node in sorted(circuit):
        found[node] = abs(F(left) - F(left - {node}))
        left -= {node}
    return found


def in_a_loop(F, circuit):
    whole, found = F(circuit), {}
    for node in circuit:
        rest = {other for other in circuit if other != node}
        found[node] = abs(F(rest) - whole)
    return found


def toy_circuit(draw) -> tuple:
    """F with two nodes that need each other, one that works against the rest, and a floor."""
    names = list("abcdefgh")[: draw.size("nodes", 4, 8)]
    worth = dict(zip(names, draw.positive(len(names)).tolist(), strict=True))
    worth[names[0]] *= -1
    both, floor = draw.number(0.5, 3), draw.number(0.5, 2)

    def F(nodes):
        pair = both if {names[1], names[2]} <= set(nodes) else 0.0
        return floor + pair + sum(worth[node] for node in nodes)

    return F, set(names)


MISTAKES_59 = [
    *edits(
        needed,
        """
        abs(whole - F(circuit - {node})) → abs(F({node}))
            This is F of this node alone: take it *out* of the circuit.
        abs(whole - F(circuit - {node})) → whole - F(circuit - {node})
            A change counts in both directions: it is never negative.
        abs(whole - F(circuit - {node})) → max(whole - F(circuit - {node}), 0.0)
            A node that works against the rest matters as well: take the size.
        whole - F(circuit - {node}) → 1 - F(circuit - {node}) / whole
            This is a share: give the change of F itself.
        whole - F(circuit - {node}) → F({node}) - F(set())
            You add the node to nothing: take it out of the whole circuit.
        abs(whole - F(circuit - {node})) → F(circuit - {node})
            This is what is left: how much has changed?
        """,
    ),
    (one_by_one, "Nodes stay out for good here: put each node back before the next."),
]


@exercise(
    "5.9",
    title="Is every node needed?",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=needed,
    right=[in_a_loop],
    hints=["`circuit - {node}` is the circuit without it.", "Compute `F(circuit)` once, outside."],
    wrong=MISTAKES_59,
)
def check_59(answer) -> None:
    otherwise = "abs(F(circuit) - F(circuit - {node})), for each node."
    agree(answer, needed, toy_circuit, MISTAKES_59, otherwise)
    F, circuit = toy_circuit(next(draws(1)))
    calls, most = [], len(circuit) + 1
    answer(lambda nodes: calls.append(1) or F(nodes), circuit)
    expect(len(calls) <= most, f"F is called {len(calls)} times, where {most} are enough.")


# -- 5.10, going further ---------------------------------------------------------------------


def head_change(z, other, head, W_O, post_norm):
    """How what attention adds to the stream changes when one head's z is taken from another run.

    z, other   (pos, n_heads, d_head), in the two runs; W_O (n_heads, d_head, d_model)
    post_norm  a function of (pos, d_model), which the sum of all heads' outputs passes before it
               is added. Returns (pos, d_model).
    """

    def out(x):
        return post_norm(torch.einsum("phd,hdm->pm", x, W_O))

    patched = z.clone()
    patched[:, head] = other[:, head]
    return out(patched) - out(z)


def norm_with(gain: float):
    """A function: gain · x / rms(x)."""
    return lambda x: gain * x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


MISTAKES_510 = edits(
    head_change,
    """
    post_norm(torch.einsum("phd,hdm->pm", x, W_O)) → torch.einsum("phd,hdm->pm", x, W_O)
        The post-norm is left out: its scale belongs to what reaches the stream.
    out(patched) - out(z) → out(patched - z)
        This is the norm of the difference: any change would come out equally long.
    torch.einsum("phd,hdm->pm", x, W_O) → x[:, head] @ W_O[head]
        The norm is applied to this head alone: the model norms the sum.
    out(patched) - → out(other) -
        All heads are taken from the other run, not one.
    out(patched) - out(z) → out(z) - out(patched)
        The sign is turned round: the patched output less the old one.
    - out(z) →
        This is the patched output itself: subtract what attention added before.
    """,
)


@exercise(
    "5.10",
    title="A head behind a post-norm (going further)",
    difficulty=3,
    importance=3,
    minutes=5,
    reference=head_change,
    hints=[
        '`torch.einsum("phd,hdm->pm", z, W_O)` is what all heads write, before the norm.',
        "Compute that twice, with and without the patch, and subtract *after* the norm.",
    ],
    wrong=MISTAKES_510,
)
def check_510(answer) -> None:
    def two_runs(draw) -> tuple:
        axes = "pos", "heads", "d_head"
        z, other = draw.normal(*axes), draw.normal(*axes, scale=2)
        head, W_O = draw.integer(0, len(z[0]) - 1), draw.normal(*axes[1:], "d_model")
        return z, other, head, W_O, norm_with(draw.number(0.5, 3))

    otherwise = "post_norm(all heads, one patched) - post_norm(all heads)."
    agree(answer, head_change, two_runs, MISTAKES_510, otherwise, tolerance=1e-4)


# -- predictions -----------------------------------------------------------------------------

START = (
    "There was Roger. Then Rebecca laughed. After a while Roger sat down. The clerk gave a ring to"
)


SHARES = ["under a third", "about half", "over two thirds"]


def share_in_words(share: float) -> str:
    """One of `SHARES`."""
    return SHARES[0] if share < 1 / 3 else SHARES[1] if share < 2 / 3 else SHARES[2]


def looking_back(model, text: str = START, name: str = "Roger"):
    """Each head's attention from the last mention of a name to its first, (n_layers, n_heads)."""
    ids = model.tokens(text)
    first, *_, last = (ids[0] == model.to_single_token(f" {name}")).nonzero()[:, 0].tolist()
    return model.run_with_cache(ids, "pattern")[1]["pattern"][:, 0, :, last, first]


@prediction(
    "5.11",
    question="How many heads give more than half of their attention to the earlier Roger?",
    options=["none", "one to three", "more"],
)
def heads_that_look_back() -> str:
    count = int((looking_back(shipped_model()) > 0.5).sum())
    return "none" if not count else "one to three" if count <= 3 else "more"


@prediction(
    "5.12",
    question="Without the induction heads, how much of the gain from repetition is lost?",
    options=SHARES,
)
def lost_without_induction() -> str:
    found = strongest(head_scores(shipped_model(), mixed_repeats(shipped_model()))["induction"])
    lost = float(share_lost(shipped_model(), [found])[0])
    return share_in_words(lost)


@prediction(
    "5.13",
    question="When induction begins its steepest rise, how many repeated words are right already?",
    options=SHARES,
)
def right_before_induction() -> str:
    log = training_log()
    begin = steepest(log["step"], log["induction_head"], log["step"][-1] / 40)[0]
    return share_in_words(float(np.interp(begin, log["step"], log["repetition"])))


@prediction(
    "5.14",
    question="Without the heads that look at S2, in how many texts is the receiver named?",
    options=SHARES,
)
def named_without_s_inhibition() -> str:
    task = judges()[0]
    return share_in_words(task.first_choice(task.nodes() - looking_at_s2(task)))


def looking_at_s2(task: ioi.Task) -> set:
    """The nodes at END that look at S2 most."""
    own = copying_map(task.model, task.prompts.names)["own"]
    every = [node for node in task.nodes() if node[2] == "END"]
    given = circuits.jobs(every, circuits.attention_by_role(task), own)
    return circuits.by_job(given).get("S-inhibition", set())


# -- the investigation -----------------------------------------------------------------------


@functools.cache
def judges() -> list[ioi.Task]:
    """Texts that circuits are scored on; the notebook has no others of them."""
    model = shipped_model()
    return [ioi.Task(model, ioi.make_prompts(model, 24, seed=50 + i)) for i in range(2)]


@functools.cache
def search() -> frozenset:
    """The smallest circuit of a few searches that passes on the judges' texts."""
    model, found = shipped_model(), []
    for seed, within in ((20, 0.07), (21, 0.1), (22, 0.13)):
        task = ioi.Task(model, ioi.make_prompts(model, 24, seed=seed))
        found.append(frozenset(circuits.find_circuit(task, within)))
    return max(found, key=lambda circuit: score_circuit(circuit))


def all_nodes() -> list:
    """Every node of the model, in order."""
    return sorted(judges()[0].nodes())


def good_circuit() -> list:
    """The best known circuit with the heads of one more layer at END, which are not needed."""
    return [*search(), *(node for node in all_nodes() if node[0] == 0 and node[2] == "END")]


@investigation(
    "5",
    title="The smallest circuit at 90 % on both metrics",
    form='a set of nodes (layer, head, role), such as {(2, 1, "END"), (0, 3, "S2")}',
    chance=lambda rng: rng.sample(all_nodes(), 10),
    best=lambda: set(search()),
    good=good_circuit,
    foolish=["L2H1", {(99, 0, "END")}, {(0, 0, "VERB")}, [(0, 0)], {(0, 0): "END"}],
)
def score_circuit(answer) -> float:
    """min(closeness, 0.9) / 0.9, at least 0, less a hundredth for each node."""
    nodes = some_of(answer, all_nodes(), "nodes")
    close = min(task.closeness(nodes) for task in judges())
    return min(max(close, 0.0), 0.9) / 0.9 - len(nodes) / 100
