"""Exercises of lesson 07: transcoders."""

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

from mi_helpers.circuits import rules
from mi_helpers.circuits.replacement import by_coder, replaced
from mi_helpers.course.check import (
    Wrong,
    agree,
    as_numbers,
    describe,
    draws,
    edited,
    edits,
    exercise,
    expect,
    expect_shape,
)
from mi_helpers.course.investigate import investigation, some_of
from mi_helpers.course.predict import prediction
from mi_helpers.lessons.lesson_07 import currencies, experiments
from mi_helpers.lessons.shared import make_batch, on_model, shipped_model, word_ids
from mi_helpers.saes.transcoders import K, load_transcoders, read_mlps

ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


@functools.cache
def shipped_coders() -> dict:
    """{layer: tiny-gemma's transcoder}."""
    return {i: coder.requires_grad_(False) for i, coder in enumerate(load_transcoders())}


def words(draw):
    """ids (batch, pos) of random words of TinyWorld, <bos> first."""
    model, pool = shipped_model(), word_ids(shipped_model())
    ids = pool[draw.integers(0, len(pool) - 1, draw.size("batch", 2, 3), draw.size("pos", 4, 7))]
    return torch.cat([torch.full_like(ids[:, :1], model.tokenizer.bos_token_id), ids], 1)


# -- 7.1 -------------------------------------------------------------------------------------


def transcode(x, W_enc, b_enc, W_dec, b_dec, k):
    """A TopK transcoder's prediction of the MLP's output: (tokens, d_model).

    x      (tokens, d_model), what the MLP reads
    W_enc  (d_model, latents), b_enc (latents,); W_dec (latents, d_model), b_dec (d_model,)
    k      how many latents may fire at a token
    """
    values, indices = (x @ W_enc + b_enc).topk(k, dim=-1)
    f = torch.zeros(len(x), len(b_enc)).scatter(1, indices, torch.relu(values))
    return f @ W_dec + b_dec


def transcode_by_threshold(x, W_enc, b_enc, W_dec, b_dec, k):
    pre = x @ W_enc + b_enc
    last = pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where(pre >= last, pre.clamp(min=0), 0.0) @ W_dec + b_dec


def transcode_in_numpy(x, W_enc, b_enc, W_dec, b_dec, k):
    x, W_enc, b_enc, W_dec, b_dec = (t.double().numpy() for t in (x, W_enc, b_enc, W_dec, b_dec))
    pre = x @ W_enc + b_enc
    out = []
    for row in pre:
        best = np.argsort(-row)[:k]
        out.append(np.maximum(row[best], 0) @ W_dec[best] + b_dec)
    return out


def one_choice(x, W_enc, b_enc, W_dec, b_dec, k):
    pre = x @ W_enc + b_enc
    keep = pre.flatten().topk(k * len(x)).values[-1]
    return torch.where(pre >= keep, pre.clamp(min=0), 0.0) @ W_dec + b_dec


def by_size(x, W_enc, b_enc, W_dec, b_dec, k):
    pre = x @ W_enc + b_enc
    at = pre.abs().topk(k, dim=-1).indices
    return torch.zeros_like(pre).scatter(1, at, pre.gather(1, at).relu()) @ W_dec + b_dec


MISTAKES_71 = [
    *edits(
        transcode,
        """
        (x @ W_enc → ((x - b_dec) @ W_enc
            b_dec is taken from the input, as in an autoencoder: here it belongs to the output
            alone.
        torch.relu(values) → values
            Some of the k largest are negative: a ReLU comes after the choice.
        f @ W_dec + b_dec → f @ W_dec
            The bias b_dec is missing.
        (x @ W_enc + b_enc) → (x @ W_enc)
            The bias b_enc is missing: it belongs to the choice, too.
        """,
    ),
    (
        lambda x, W_enc, b_enc, W_dec, b_dec, k: torch.relu(x @ W_enc + b_enc) @ W_dec + b_dec,
        "Every positive latent is used: keep the k largest at each token.",
    ),
    (one_choice, "The k largest are chosen over all tokens together: choose at each token."),
    (by_size, "Choose the k largest, not the k largest in size: the negative ones never fire."),
]


@exercise(
    "7.1",
    title="The one-line swap",
    difficulty=2,
    importance=5,
    minutes=5,
    reference=transcode,
    right=[transcode_by_threshold, transcode_in_numpy],
    wrong=MISTAKES_71,
    hints=[
        "First the pre-activations `x @ W_enc + b_enc`, then `topk` along the last axis.",
        "`torch.zeros(len(x), latents).scatter(1, indices, values)` puts them into their places.",
    ],
)
def check_71(answer) -> None:
    def a_coder(draw) -> tuple:
        """About a half of the pre-activations is positive: in some rows more than k, or fewer."""
        x, W_enc = draw.normal("tokens", "d"), draw.normal("d", "latents")
        b_enc = draw.normal("latents") - (x @ W_enc).mean()
        latents = draw.size("latents")
        k = draw.integer(2, latents // 2 + 1) if latents > 3 else 2
        return x, W_enc, b_enc, draw.normal("latents", "d"), draw.normal("d"), k

    otherwise = "Encode x, keep the k largest at each token, ReLU, decode."
    agree(answer, transcode, a_coder, MISTAKES_71, otherwise, cases=5)


# -- 7.2 -------------------------------------------------------------------------------------


def training_step(x, y, weights, k, optimizer):
    """One step of training a transcoder, by autograd. Returns the loss before the step.

    The loss is |y - prediction|², summed over d_model, a mean over the tokens.
    x, y      (tokens, d_model), what the MLP reads, and what it writes
    weights   [W_enc, b_enc, W_dec, b_dec], which require gradients; `optimizer` moves them
    """
    loss = (y - transcode(x, *weights, k)).pow(2).sum(1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def step_by_grad(x, y, weights, k, optimizer):
    """Gradients put where the optimizer looks."""
    off = transcode_by_threshold(x, *weights, k) - y
    loss = torch.einsum("td,td->", off, off) / len(x)
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.grad = gradient
    optimizer.step()
    return loss.detach()


def loss_after(x, y, weights, k, optimizer):
    training_step(x, y, weights, k, optimizer)
    return (y - transcode(x, *weights, k)).pow(2).sum(1).mean().item()


def own_optimizer(x, y, weights, k, optimizer):
    return training_step(x, y, weights, k, torch.optim.Adam(weights, lr=1e-3))


MISTAKES_72 = [
    *edits(
        training_step,
        """
        y - transcode → x - transcode
            The prediction is compared with x, what it was made from: that is an autoencoder.
        transcode(x, → transcode(y,
            The encoder reads y: then there is nothing to predict.
        .sum(1).mean() → .mean()
            The mean is taken over d_model, too: sum over it first.
        .sum(1).mean() → .sum()
            This is the sum over the tokens: take their mean.
        pow(2).sum(1).mean() → pow(2).sum(1).sqrt().mean()
            This is the mean distance: the loss is its square.
        optimizer.zero_grad() → pass
            Gradients of all steps add up: call `optimizer.zero_grad()` before backward.
        """,
    ),
    (loss_after, "Return the loss *before* the step."),
    (own_optimizer, "Use the optimizer that is given: a new one has no memory."),
]
OPTIMIZERS = {"SGD": torch.optim.SGD, "Adam": functools.partial(torch.optim.Adam, eps=1e-4)}


def step_case(draw) -> tuple:
    """Three batches (x, y), weights to begin with, k, and how to make an optimizer."""
    batches = [(draw.normal("tokens", "d"), draw.normal("tokens", "d")) for _ in range(3)]
    shapes = (("d", "latents"), ("latents",), ("latents", "d"), ("d",))
    weights = [draw.normal(*shape, scale=0.3) for shape in shapes]
    kind, lr = OPTIMIZERS[draw.choice(OPTIMIZERS)], draw.number(0.001, 0.004)
    return batches, weights, draw.integer(2, 3), lambda parts: kind(parts, lr=lr)


def stepped(step, batches, weights, k, made) -> tuple:
    """What a step returns over some batches, and the weights after them, from a copy of them."""
    weights = [each.clone().requires_grad_() for each in weights]
    optimizer = made(weights)
    with torch.enable_grad():
        losses = [step(x, y, weights, k, optimizer) for x, y in batches]
    return losses, [each.detach() for each in weights]


def equal_runs(one: tuple, other: tuple) -> bool:
    """Whether two runs had the same losses and moved the weights alike."""
    pairs = zip([torch.tensor(one[0]), *one[1]], [torch.tensor(other[0]), *other[1]], strict=True)
    return all(torch.allclose(a, b, atol=2e-5, rtol=1e-3) for a, b in pairs)


@exercise(
    "7.2",
    title="Train it",
    difficulty=3,
    importance=5,
    minutes=6,
    reference=training_step,
    right=[step_by_grad],
    copies=False,
    wrong=[
        *MISTAKES_72,
        (edited(training_step, "    optimizer.step()\n", ""), "did not move"),
        (lambda x, y, weights, k, optimizer: "done", "Return the loss"),
    ],
    hints=[
        "`transcode(x, *weights, k)` is the prediction; compare it with y.",
        "`optimizer.zero_grad()`, `loss.backward()`, `optimizer.step()`.",
        "Outside of `with torch.enable_grad():` this notebook keeps no gradients.",
    ],
)
def check_72(answer) -> None:
    for draw in draws(3):
        case = step_case(draw)
        got, want = stepped(answer, *case), stepped(training_step, *case)
        try:
            got = as_numbers(got[0]).astype(np.float32).tolist(), got[1]
        except (TypeError, ValueError):
            raise Wrong(f"Return the loss, one number, not {describe(got[0][0])}.") from None
        expect_shape(got[0], (3,), "What three steps return, side by side,")
        moved = any(not torch.equal(a, b) for a, b in zip(got[1], case[1], strict=True))
        expect(moved, "The weights did not move: does the optimizer step?")
        if equal_runs(got, want):
            continue
        for mistake, message in MISTAKES_72:
            expect(not equal_runs(got, stepped(mistake, *case)), message)
        raise Wrong("Weights or loss come out otherwise: loss, zero_grad, backward, step.")


# -- 7.3 -------------------------------------------------------------------------------------


def with_transcoders(model, ids, coders):
    """The model's logits with the MLPs of some layers replaced, (batch, pos, d_vocab).

    coders  {layer: transcoder}; `coders[layer](x)` predicts the MLP's output from what it reads
    Sites: ("mlp_in", layer) and ("mlp_out", layer), both (batch, pos, d_model). A hook that
    returns None only looks. At the first position (<bos>) the MLPs stay as they are.
    """
    read, hooks = {}, {}
    for layer in coders:

        def look(x, layer=layer):
            read[layer] = x

        def put(y, layer=layer):
            predicted = coders[layer](read[layer])
            predicted[:, 0] = y[:, 0]
            return predicted

        hooks[("mlp_in", layer)], hooks[("mlp_out", layer)] = look, put
    with model.hooks(hooks):
        return model(ids)


def in_place(model, ids, coders):
    with replaced(model, {layer: by_coder(coder) for layer, coder in coders.items()}):
        return model(ids)


def of_the_clean_run(model, ids, coders):
    _, cache = model.run_with_cache(ids, ["mlp_in"])

    def put(layer):
        def hook(y):
            return torch.cat([y[:, :1], coders[layer](cache["mlp_in", layer])[:, 1:]], 1)

        return hook

    with model.hooks({("mlp_out", layer): put(layer) for layer in coders}):
        return model(ids)


def one_layer_for_all(model, ids, coders):
    """A closure's mistake: every hook uses the last layer's coder."""
    last, read = list(coders)[-1], {}

    def look(x):
        read[0] = x

    def put(y):
        return torch.cat([y[:, :1], coders[last](read[0])[:, 1:]], 1)

    hooks = {("mlp_in", layer): look for layer in coders}
    with model.hooks(hooks | {("mlp_out", layer): put for layer in coders}):
        return model(ids)


MISTAKES_73 = [
    (
        of_the_clean_run,
        "The coders read what the MLPs read in the *clean* run: each has to read what the others "
        "have changed, so look and put in one run.",
    ),
    (
        one_layer_for_all,
        "Every layer gets the last layer's transcoder: a function made in a loop sees the loop's "
        "last value. Write `layer=layer` among its arguments.",
    ),
    (
        edited(with_transcoders, "            predicted[:, 0] = y[:, 0]\n", ""),
        "The first position is replaced, too: leave what the MLP writes there.",
    ),
    (
        edited(with_transcoders, "coders[layer](read[layer])", "y + coders[layer](read[layer])"),
        "The transcoder writes beside the MLP, not in its place.",
    ),
    (lambda model, ids, coders: model(ids), "These are the logits of the model as it is."),
    (
        edited(with_transcoders, "model(ids)", "model(ids)[:, -1]"),
        "Return the logits at every position.",
    ),
]


@exercise(
    "7.3",
    title="In the place of the MLPs",
    difficulty=4,
    importance=5,
    minutes=9,
    reference=with_transcoders,
    right=[in_place],
    survivors=ONE_MODEL,
    wrong=MISTAKES_73,
    hints=[
        "One hook on `mlp_in` keeps what is read; one on `mlp_out` returns the prediction.",
        "Functions made in a loop: write `def put(y, layer=layer)`.",
        "`predicted[:, 0] = y[:, 0]` before you return it.",
    ],
)
def check_73(answer) -> None:
    def some_layers(draw) -> tuple:
        layers = draw.sample(range(shipped_model().n_layers), draw.integer(2, 4))
        return shipped_model(), words(draw), {i: shipped_coders()[i] for i in sorted(layers)}

    otherwise = "Each coder reads mlp_in of this very run, and writes in the place of mlp_out."
    on_model(answer, with_transcoders, some_layers, MISTAKES_73, otherwise)


# -- 7.4 -------------------------------------------------------------------------------------


def recovered(clean, replaced, zero):
    """The share of the loss that comes back, of the mean loss over families: one number.

    clean, replaced, zero  {family: loss in nats} of the model as it is, with something in the place
                           of its MLPs, and with zeros there. 1 where nothing is lost.
    """
    a, b, c = (sum(each.values()) / len(each) for each in (clean, replaced, zero))
    return (c - b) / (c - a)


def mean_of_shares(clean, replaced, zero):
    return np.mean([(zero[f] - replaced[f]) / (zero[f] - clean[f]) for f in clean])


def recovered_in_numpy(clean, replaced, zero):
    a, b, c = (np.array(list(each.values())).sum() for each in (clean, replaced, zero))
    return 1 - (b - a) / (c - a)


MISTAKES_74 = [
    (
        mean_of_shares,
        "This is the mean of the families' shares: a family in which zeros do little harm has any "
        "share, and swamps the others. Average the losses first.",
    ),
    (lambda *given: 1 - recovered(*given), "This is the share that is lost."),
    *edits(
        recovered,
        """
        / (c - a) → / c
            Below the line stands the loss with zeros: subtract the clean loss there, too.
        (c - b) / (c - a) → a / b
            A ratio of losses does not know what zeros would cost.
        (c - b) / (c - a) → b - a
            This is the loss that is added, in nats: compare it with what zeros add.
        """,
    ),
]


@exercise(
    "7.4",
    title="Loss recovered",
    difficulty=1,
    importance=4,
    minutes=4,
    reference=recovered,
    right=[recovered_in_numpy],
    survivors={
        "sum(each.values()) / len(each) → sum(each.values()) * len(each)": (
            "a factor that all three losses have cancels"
        )
    },
    wrong=MISTAKES_74,
    hints=[
        "Average each of the three over the families.",
        "How much of the way from the zeros' loss down to the clean loss is gone?",
    ],
)
def check_74(answer) -> None:
    def losses(draw) -> tuple:
        names = [f"family {i}" for i in range(draw.size("families"))]
        made = []
        for low, high in ((0.1, 1.0), (0.3, 2.0), (1.5, 9.0)):
            values = draw.positive("families", low=low, high=high).tolist()
            made.append(dict(zip(names, values, strict=True)))
        return tuple(made)

    agree(answer, recovered, losses, MISTAKES_74, "Average over families, then divide.")


# -- 7.5 -------------------------------------------------------------------------------------


def strongest(units, rows, n):
    """What the n units that write most at each token write together: (tokens, d_model).

    units  (tokens, units), how much each fires: neurons have both signs
    rows   (units, d_model), what each writes when it fires by 1
    The length of what a unit writes is |how much it fires| · |its row|.
    """
    kept = (units.abs() * rows.norm(dim=1)).topk(n, dim=1).indices
    return torch.zeros_like(units).scatter(1, kept, units.gather(1, kept)) @ rows


def strongest_by_loops(units, rows, n):
    found = []
    for token in units.tolist():
        written = [value * row for value, row in zip(token, rows, strict=True)]
        found.append(sum(sorted(written, key=lambda each: -float(each.norm()))[:n]))
    return found


MISTAKES_75 = edits(
    strongest,
    """
    units.abs() * rows.norm(dim=1) → units * rows.norm(dim=1)
        A neuron that fires below 0 writes, too: take the size of how much it fires.
    units.abs() * rows.norm(dim=1) → units.abs()
        The units that fire most are kept, not those that write most: a row's length counts.
    units.abs() * rows.norm(dim=1) → 0 * units + rows.norm(dim=1)
        The units with the longest rows are kept at every token: how much they fire counts.
    (units.abs() → (0 * units + units.abs().mean(0)
        The same units are kept at every token: choose anew at each.
    units.gather(1, kept) → units.gather(1, kept).abs()
        The sign is lost: what is kept writes as it did.
    dim=1).indices → dim=1, largest=False).indices
        These are the weakest: keep those that write most.
    """,
)


@exercise(
    "7.5",
    title="A fair rival",
    difficulty=3,
    importance=4,
    minutes=5,
    reference=strongest,
    right=[strongest_by_loops],
    wrong=MISTAKES_75,
    hints=[
        "`units.abs() * rows.norm(dim=1)` is how long a vector each unit writes, (tokens, units).",
        "`topk(n, dim=1).indices`, then `scatter` as in 7.1, then `@ rows`.",
    ],
)
def check_75(answer) -> None:
    def some_units(draw) -> tuple:
        rows = draw.normal("units", "d_model") * draw.positive("units", low=0.2)[:, None]
        return draw.normal("tokens", "units"), rows, draw.integer(1, 2)

    otherwise = (
        "Keep the n largest |units| · |row| of each token, as they are, and multiply by rows."
    )
    agree(answer, strongest, some_units, MISTAKES_75, otherwise, cases=4)


# -- 7.6 -------------------------------------------------------------------------------------


def fires_for(model, layer, embedded, reads, bias):
    """A latent's pre-activation at each word, were the stream its embedding alone: (words,).

    embedded     (words, d_model), embeddings as they enter the stream
    reads, bias  the latent's column of W_enc (d_model,), and its number of b_enc
    model.part("ln2", layer) is the norm before the layer's MLP, a function of the stream.
    """
    return model.part("ln2", layer)(embedded) @ reads + bias


def fires_by_formula(model, layer, embedded, reads, bias):
    w, x = model.part("ln2", layer).weight.double(), embedded.double()
    return (x / x.pow(2).mean(1, keepdim=True).sqrt() * (1 + w) * reads).sum(1) + bias


MISTAKES_76 = edits(
    fires_for,
    """
    model.part("ln2", layer)(embedded) → embedded
        The encoder reads what the MLP reads, which is normed: `model.part("ln2", layer)`.
    "ln2" → "ln1"
        "ln1" is the norm before attention: the MLP reads through "ln2".
    model.part("ln2", layer)(embedded) → model.ln_final(embedded)
        This is the final norm: the MLP reads through "ln2" of its layer.
    "ln2", layer)(embedded) → "ln2", 0)(embedded)
        Each layer has a norm of its own.
    @ reads + bias → @ reads + 0 * bias
        The bias is missing.
    """,
)


@exercise(
    "7.6",
    title="What fires it",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=fires_for,
    right=[fires_by_formula],
    survivors=ONE_MODEL,
    wrong=MISTAKES_76,
    hints=[
        "The encoder does not read the stream but the norm of it.",
        '`model.part("ln2", layer)(embedded)` is (words, d_model): one product is missing.',
    ],
)
def check_76(answer) -> None:
    def a_latent(draw) -> tuple:
        model, pool = shipped_model(), word_ids(shipped_model())
        layer = draw.integer(1, model.n_layers - 1)
        coder = shipped_coders()[layer]
        latent = draw.integer(0, coder.d_latent - 1)
        bias = float(coder.b_enc[latent]) + draw.number(2.0, 9.0)
        words = pool[draw.integers(0, len(pool) - 1, "words")]
        return model, layer, model.part("embed")(words), coder.W_enc[:, latent], bias

    on_model(answer, fires_for, a_latent, MISTAKES_76, "norm(embedded) @ reads + bias.")


# -- 7.7 -------------------------------------------------------------------------------------


def writes(model, row):
    """What a latent that fires by 1 adds to each logit, directly: (d_vocab,).

    row  (d_model,), its row of W_dec. On its way it meets the final norm's gain, 1 + w with
         w = model.ln_final.weight, and the unembedding model.W_U (d_model, d_vocab). Leave out the
         norm's division and the soft-cap. Logits that all rise alike change nothing: subtract the
         mean over the vocabulary.
    """
    logits = row * (1 + model.ln_final.weight) @ model.W_U
    return logits - logits.mean()


def writes_in_numpy(model, row):
    gain = 1 + model.ln_final.weight.double().numpy()
    logits = (row.double().numpy() * gain) @ model.W_U.double().numpy()
    return logits - logits.mean()


MISTAKES_77 = edits(
    writes,
    """
    row * (1 + model.ln_final.weight) → row
        The final norm's gain is missing: it stands between the stream and the unembedding.
    (1 + model.ln_final.weight) → model.ln_final.weight
        The gain is 1 + w, not w.
    row * (1 + model.ln_final.weight) → model.ln_final(row)
        The row is normed by itself: the norm divides the whole stream, so leave its division out.
    - logits.mean() → - 0 * logits.mean()
        Subtract the mean over the vocabulary.
    logits - logits.mean() → (logits - logits.mean()) / logits.std()
        Leave the size as it is: it is in logits.
    """,
)


@exercise(
    "7.7",
    title="What it writes",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=writes,
    right=[writes_in_numpy],
    survivors=ONE_MODEL,
    wrong=MISTAKES_77,
    hints=[
        "Times the gain, number by number; then the unembedding.",
        "`row * (1 + model.ln_final.weight) @ model.W_U`, less its mean.",
    ],
)
def check_77(answer) -> None:
    def a_row(draw) -> tuple:
        coder = shipped_coders()[draw.integer(0, shipped_model().n_layers - 1)]
        latent = draw.integer(0, coder.d_latent - 1)
        common = draw.number(0.2, 1.0) * shipped_model().W_U.mean(1)  # raises all logits alike
        return shipped_model(), coder.W_dec[latent] + 30 * common

    on_model(answer, writes, a_row, MISTAKES_77, "row · gain @ W_U, less its mean.")


# -- 7.8 -------------------------------------------------------------------------------------


def silence(model, ids, layer, coder, latents):
    """The *model's* logits when some rules of a layer no longer write, (batch, pos, d_vocab).

    The MLP stays; what these latents would write, given what it reads, is taken from its output,
    at every position. `coder.encode(x)` gives activations (batch, pos, latents).
    latents  a list of numbers. Sites as in 7.3
    """
    read = []

    def take(y):
        f = coder.encode(read[-1])[..., latents]
        return y - f @ coder.W_dec[latents]

    with model.hooks({("mlp_in", layer): read.append, ("mlp_out", layer): take}):
        return model(ids)


def silence_in_two_runs(model, ids, layer, coder, latents):
    """The layers below are as they are, so what the MLP reads is that of the clean run."""
    _, cache = model.run_with_cache(ids, [("mlp_in", layer), ("resid_post", layer)])
    mask = torch.zeros(coder.d_latent)
    mask[latents] = 1
    taken = (coder.encode(cache["mlp_in", layer]) * mask) @ coder.W_dec
    return model.run_from_layer(cache["resid_post", layer] - taken, layer + 1)


MISTAKES_78 = edits(
    silence,
    """
    y - f @ coder.W_dec[latents] → coder(read[-1]) - f @ coder.W_dec[latents]
        The transcoder has taken the MLP's place: leave the MLP, so that its error stays.
    y - f → y + f
        The rules write twice: subtract.
    coder.encode( → coder.encode_pre_act(
        These are pre-activations: a latent that does not fire writes nothing.
    return y - f @ coder.W_dec[latents] → y[:, -1] -= f[:, -1] @ coder.W_dec[latents]; return y
        Only the last position has changed: silence the rules everywhere.
    return y - f @ coder.W_dec[latents] → return y - (y - f @ coder.W_dec[latents])
        Everything but these rules is gone.
    y - f @ coder.W_dec[latents] → y - coder.W_dec[latents].sum(0)
        A rule writes its row times how much it fires.
    y - f @ coder.W_dec[latents] → y - f @ coder.W_dec[latents] - coder.b_dec
        The bias is no rule: it stays.
    """,
)


@exercise(
    "7.8",
    title="Silence a rule",
    difficulty=3,
    importance=5,
    minutes=7,
    reference=silence,
    right=[silence_in_two_runs],
    survivors=ONE_MODEL,
    wrong=MISTAKES_78,
    hints=[
        "Keep what the MLP reads, in a hook on `mlp_in`; the hook on `mlp_out` gets its output y.",
        "`coder.encode(x)[..., latents] @ coder.W_dec[latents]` is what the rules write.",
    ],
)
def check_78(answer) -> None:
    def some_rules(draw) -> tuple:
        """Rules that fire at these words, and one that does not."""
        model, ids = shipped_model(), words(draw)
        layer = draw.integer(0, model.n_layers - 1)
        coder = shipped_coders()[layer]
        f = coder.encode(model.run_with_cache(ids, [("mlp_in", layer)])[1]["mlp_in", layer])
        most = f[:, 1:].sum((0, 1)).topk(6).indices.tolist()
        idle = int(f.sum((0, 1)).argmin())
        return model, ids, layer, coder, [*most[: draw.integer(2, 6)], idle]

    otherwise = "Take encode(mlp_in)[..., latents] @ W_dec[latents] from mlp_out."
    on_model(answer, silence, some_rules, MISTAKES_78, otherwise)


# -- 7.9 -------------------------------------------------------------------------------------


def virtual_weights(model, W_dec, W_enc, layer):
    """What each latent of an early layer adds, when it fires by 1, to the pre-activation of each
    latent of a later one at the same token, along the stream: (early, late).

    W_dec  (early, d_model); W_enc (d_model, late), of the later layer, whose number is `layer`.
    Its MLP reads through model.part("ln2", layer), with a gain of 1 + its weight. Leave out the
    norm's division.
    """
    return W_dec * (1 + model.part("ln2", layer).weight) @ W_enc


def virtual_by_einsum(model, W_dec, W_enc, layer):
    gain = 1 + model.part("ln2", layer).weight.double()
    return torch.einsum("ed,d,dl->el", W_dec.double(), gain, W_enc.double())


MISTAKES_79 = edits(
    virtual_weights,
    """
    W_dec * (1 + model.part("ln2", layer).weight) → W_dec
        The later MLP reads through a norm: its gain is missing.
    (1 + model.part("ln2", layer).weight) → model.part("ln2", layer).weight
        The gain is 1 + w, not w.
    "ln2" → "ln1"
        "ln1" is the norm before attention: the MLP reads through "ln2".
    "ln2", layer) → "ln2", layer - 1)
        The gain is that of the *later* layer's norm, whose number is given.
    W_dec * (1 + model.part("ln2", layer).weight) → model.part("ln2", layer)(W_dec)
        Each row is normed by itself: the norm divides the whole stream, so leave that out.
    """,
)


@exercise(
    "7.9",
    title="Virtual weights",
    difficulty=2,
    importance=5,
    minutes=4,
    reference=virtual_weights,
    right=[virtual_by_einsum],
    survivors=ONE_MODEL,
    wrong=[
        *MISTAKES_79,
        (lambda *given: virtual_weights(*given).T, "shape"),
    ],
    hints=["Write, pass the gain, read: three factors, from left to right."],
    after="That was the last exercise of the main path. The investigation is waiting.",
)
def check_79(answer) -> None:
    def two_layers(draw) -> tuple:
        layer = draw.integer(1, shipped_model().n_layers - 1)
        below, above = shipped_coders()[layer - 1], shipped_coders()[layer]
        some = draw.permutation(40)[: draw.size("early")], draw.permutation(40)[: draw.size("late")]
        return shipped_model(), below.W_dec[some[0]], above.W_enc[:, some[1]], layer

    on_model(answer, virtual_weights, two_layers, MISTAKES_79, "(W_dec · gain) @ W_enc.")


# -- 7.10, going further ---------------------------------------------------------------------


def for_mlp_in(W_enc, gain):
    """The encoder that does with `mlp_in` what W_enc does with the normed stream without its gain.

    W_enc  (d_model, latents), of a published transcoder, which reads x / rms(x)
    gain   (d_model,); mlp_in is x / rms(x) · gain. Returns (d_model, latents)
    """
    return W_enc / gain[:, None]


def for_mlp_in_by_matrix(W_enc, gain):
    return torch.linalg.inv(torch.diag(gain.double())) @ W_enc.double()


MISTAKES_710 = [
    *edits(
        for_mlp_in,
        """
        W_enc / gain[:, None] → W_enc * gain[:, None]
            The gain is in the input already: divide by it, or it counts twice.
        W_enc / gain[:, None] → W_enc / gain.mean()
            Each of the d_model numbers has a gain of its own.
        W_enc / gain[:, None] → W_enc / (1 + gain)[:, None]
            The gain that is given is 1 + w already.
        """,
    ),
    (lambda W_enc, gain: (W_enc / gain[:, None]).T, "Keep the shape, (d_model, latents)."),
]


@exercise(
    "7.10",
    title="With the gain or without (going further)",
    difficulty=2,
    importance=3,
    minutes=5,
    reference=for_mlp_in,
    right=[for_mlp_in_by_matrix],
    wrong=[(MISTAKES_710[0][0], "divide by it"), *MISTAKES_710[1:3], (MISTAKES_710[3][0], "shape")],
    hints=["x W = (x · gain) (W / gain): which axis of W belongs to the stream?"],
)
def check_710(answer) -> None:
    def an_encoder(draw) -> tuple:
        return draw.normal("d_model", "latents"), draw.positive("d_model", low=0.3)

    agree(answer, for_mlp_in, an_encoder, MISTAKES_710, "Divide row i of W_enc by gain[i].")


# -- predictions -----------------------------------------------------------------------------

TOGETHER = ["less than the sum", "about the sum", "more than the sum"]


@prediction("7.11", question="All MLPs replaced at once add, in nats…", options=TOGETHER)
def together_or_one_by_one() -> str:
    model, by = shipped_model(), experiments.by_coders(shipped_coders())
    runs = experiments.compare(model, make_batch(model, answers=8), {"": by})
    *single, both = (each.added for each in runs.values())
    ratio = both / max(sum(single), 1e-6)
    return TOGETHER[0 if ratio < 0.8 else 1 if ratio < 1.25 else 2]


ALSO = ["as much or more", "about half as much", "hardly at all"]


@prediction("7.12", question="Whatever latents harm most, neurons harm…", options=ALSO)
def harmed_by_neurons() -> str:
    model, batch = shipped_model(), make_batch(shipped_model(), answers=40)
    added = experiments.rivals(model, shipped_coders(), read_mlps(model, 3_000), batch, K)
    worst = max(added["latents"], key=added["latents"].get)
    ratio = added["neurons"][worst] / added["latents"][worst]
    return ALSO[0 if ratio > 0.75 else 1 if ratio > 0.25 else 2]


FORETOLD = ["nearly no latent", "about a third", "most of them"]


@prediction("7.13", question="In the last layer, its word is foretold for…", options=FORETOLD)
def foretold_in_the_last_layer() -> str:
    last = shipped_model().n_layers - 1
    with tempfile.TemporaryDirectory() as folder:
        coders = {last: shipped_coders()[last]}
        pages = experiments.make_pages(shipped_model(), coders, Path(folder), 4_000)
        share, _ = experiments.predicted_tokens(pages[last], last)
    return FORETOLD[0 if share < 0.15 else 1 if share < 0.5 else 2]


CAPITALS = ["almost nothing", "about half as much", "as much or more"]


@prediction("7.14", question="Of its lead, the country's capital loses…", options=CAPITALS)
def the_capital_loses() -> str:
    some = currencies.with_own_currency()[::3]
    found = currencies.strongest_writers(shipped_model(), shipped_coders(), some)
    own = np.median([each.own for each in found])
    capital = np.median([each.capital for each in found])
    return CAPITALS[0 if capital < own / 4 else 1 if capital < 0.75 * own else 2]


MEET = ["under a third", "about half", "over two thirds"]


@prediction("7.15", question="How many of these pairs ever fire at one token?", options=MEET)
def pairs_that_meet() -> str:
    model, coders = shipped_model(), shipped_coders()
    low, high = model.n_layers // 3, model.n_layers - 1
    rows = read_mlps(model, 4_000, 1, [low, high])
    weights = rules.virtual_weights(model, coders[low], coders[high], high)
    inputs = rows[low][0], rows[high][0]
    share = rules.share_firing_at_once(coders[low], coders[high], *inputs, weights)
    return MEET[0 if share < 0.34 else 1 if share < 0.67 else 2]


# -- the investigation -----------------------------------------------------------------------

CURRENCY, PRICE = "yen", 0.01


@functools.cache
def judges() -> tuple:
    """((the currency, its leads), (others, their leads)), on questions that no lesson asks."""
    model, own = shipped_model(), currencies.countries_of(CURRENCY)
    others = [name for name in currencies.with_currency() if name not in own]
    asked = (
        currencies.ask(model, "currency", own, [*currencies.FRESH, currencies.NATION]),
        currencies.ask(model, "currency", others, currencies.FRESH[:1]),
    )
    return tuple((each, currencies.leads(model, each)) for each in asked)


def on_the_course() -> currencies.Questions:
    """What the lesson asks of the currency."""
    return currencies.ask(shipped_model(), "currency", currencies.countries_of(CURRENCY))


@functools.cache
def lost(chosen: frozenset, own: bool) -> float:
    """What silencing rules costs the currency, or the others, as a share of the lead."""
    asked, whole = judges()[0 if own else 1]
    by = currencies.without(shipped_coders(), chosen)
    share = currencies.share_lost(shipped_model(), asked, by, whole)
    return min(max(share, 0.0), 1.0) if own else min(abs(share), 1.0)


def writers(n: int) -> list:
    """The n rules that write most for the currency, directly."""
    found = currencies.direct_writes(shipped_model(), shipped_coders(), on_the_course())
    return [each.rule for each in found[:n]]


def best_rules() -> set:
    """A greedy search among the rules that write most and leave other currencies alone."""
    apart = [rule for rule in writers(12) if lost(frozenset([rule]), False) < PRICE]
    return currencies.greedy(apart, lambda rules: lost(frozenset(rules), True) - PRICE * len(rules))


@functools.cache
def that_fire() -> list:
    """Every rule that fires at the last word of the lesson's questions."""
    found = currencies.direct_writes(shipped_model(), shipped_coders(), on_the_course())
    return sorted(each.rule for each in found)


@functools.cache
def all_rules() -> dict:
    """Every (layer, latent), in order."""
    coders = shipped_coders().items()
    return {(layer, latent): None for layer, coder in coders for latent in range(coder.d_latent)}


@investigation(
    "7",
    title=f"Who writes the {CURRENCY}?",
    form="a set of rules, each (layer, latent)",
    chance=lambda rng: rng.sample(that_fire(), 3),
    best=best_rules,
    good=lambda: writers(1),
    foolish=["L4L49", {(99, 0)}, (4, 99_999), [[1], [2]], {4: 49}, 49],
)
def score_rules(answer) -> float:
    """The share of the currency's lead that is lost without the rules, less what the others lose,
    less `PRICE` for each rule."""
    chosen = frozenset(some_of(answer, all_rules(), "rules"))
    return lost(chosen, True) - lost(chosen, False) - PRICE * len(chosen)
