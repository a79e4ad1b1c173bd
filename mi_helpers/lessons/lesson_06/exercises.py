"""Exercises of lesson 06: sparse autoencoders."""

import copy
import functools

import numpy as np
import torch

from mi_helpers.course.answers import describe
from mi_helpers.course.check import (
    Wrong,
    agree,
    draws,
    edits,
    exercise,
    expect,
    expect_close,
)
from mi_helpers.course.investigate import investigation
from mi_helpers.course.predict import prediction
from mi_helpers.lessons.lesson_06 import experiments as lab
from mi_helpers.lessons.lesson_06 import naming, rivals, universality
from mi_helpers.lessons.shared import on_model, repeated_tokens, shipped_model
from mi_helpers.saes.coder import SparseCoder
from mi_helpers.saes.files import load_coder
from mi_helpers.tinyworld.world import World

ONE_MODEL = {"model → its first value, always": "all inputs are for one model, the course's own"}


@functools.cache
def shipped_coder() -> SparseCoder:
    """The autoencoder of tiny-gemma that ships, loaded once."""
    return load_coder(lab.CODER).requires_grad_(False)


def token_ids(draw) -> torch.Tensor:
    """Random words, (batch, pos), BOS first."""
    n, length = draw.size("batch", 2, 4), draw.size("pos", 6, 11)
    return repeated_tokens(shipped_model(), n, length, draw.integer(0, 9999), times=1)


def a_site(draw) -> tuple[str, int]:
    """The stream after one of the blocks, the last left out."""
    return "resid_post", draw.integer(0, shipped_model().n_layers - 2)


# -- 6.1 -------------------------------------------------------------------------------------


def turned_up(model, ids, site, direction, strength):
    """p(next token), (batch, pos, d_vocab), with a direction added to the stream at a site.

    At every position but the first, which is BOS, the stream goes on as x + strength · d, where d
    is the direction at length 1.
    ids (batch, pos); site, such as ("resid_post", 3), holds (batch, pos, d_model);
    direction (d_model,), of any length; strength, a number
    """

    def add(x):
        x[:, 1:] += strength * direction / direction.norm()
        return x

    with model.hooks({site: add}):
        return model(ids).softmax(-1)


def turned_up_by_mask(model, ids, site, direction, strength):
    d = torch.nn.functional.normalize(direction, dim=0)
    mask = (torch.arange(ids.shape[1]) > 0).float()[None, :, None]
    with model.hooks({site: lambda x: x + strength * mask * d}):
        return torch.softmax(model(ids), dim=-1)


MISTAKES_61 = edits(
    turned_up,
    """
    x[:, 1:] += → x +=
        BOS is changed, too: leave the first position as it is.
    x[:, 1:] += → x[:, -1:] +=
        Only the last position is changed: change every one but the first.
     / direction.norm() →
        The direction is added at its own length: bring it to length 1 first.
     / direction.norm() → / direction.norm() ** 2
        Dividing by the squared length makes it too short: divide by the length.
    x[:, 1:] += → x[:, 1:] =
        The stream is replaced by the direction: add it.
    strength * →
        The strength is left out.
    model(ids).softmax(-1) → model(ids)
        These are logits: a softmax over the vocabulary makes probabilities of them.
    model(ids).softmax(-1) → model(ids)[:, -1].softmax(-1)
        These are the last position's alone: give those of every position.
    return model(ids).softmax(-1) → pass; return model(ids).log_softmax(-1)
        These are logarithms: give the probabilities themselves.
    """,
) + [
    (
        lambda model, ids, *_: model(ids).softmax(-1),
        "Nothing has changed: does your hook return the stream, and the model run inside the "
        "`with`?",
    )
]


@exercise(
    "6.1",
    title="Turn it up",
    difficulty=2,
    importance=5,
    minutes=6,
    reference=turned_up,
    survivors=ONE_MODEL,
    right=[turned_up_by_mask],
    hints=[
        "A hook is a function of the stream at the site; what it returns, the model goes on with.",
        "`x[:, 1:] += strength * direction / direction.norm()`, then return x.",
        "`with model.hooks({site: add}): return model(ids).softmax(-1)`.",
    ],
    wrong=MISTAKES_61,
)
def check_61(answer) -> None:
    def inputs(draw) -> tuple:
        model = shipped_model()
        direction = draw.normal(model.d_model, scale=2)
        return model, token_ids(draw), a_site(draw), direction, draw.number(4, 20)

    on_model(
        answer,
        turned_up,
        inputs,
        MISTAKES_61,
        "Add strength · direction / ‖direction‖ at every position but the first.",
    )


# -- 6.2 -------------------------------------------------------------------------------------


def topk_activation(pre, k):
    """ReLU of the k largest pre-activations of each row, in their places; 0 everywhere else.

    pre (rows, latents). Returns the same shape.
    """
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def topk_by_threshold(pre, k):
    least = pre.sort(-1, descending=True).values[:, k - 1 : k]
    return torch.where(pre >= least, pre, 0).clamp(min=0)


MISTAKES_62 = edits(
    topk_activation,
    """
    values.relu() → values
        A latent that is kept still passes the ReLU: some values here are negative.
    pre.topk(k, dim=-1) → (lambda at: (pre.gather(-1, at), at))(pre.abs().topk(k).indices)
        These are the largest in *absolute* value: a strongly negative one takes a place.
    torch.zeros_like(pre).scatter(-1, indices, values.relu()) → values.relu()
        The shape is (rows, k): put the values back in their places.
    torch.zeros_like(pre).scatter(-1, indices, values.relu()) → pre.relu()
        This is the ReLU alone: keep only the k largest of each row.
    values.relu() → (values > 0).to(pre)
        This says which latents fire: give how strongly.
    pre.topk(k, dim=-1) → pre.topk(k, dim=-1, largest=False)
        These are the k smallest.
    pre.topk(k, dim=-1) → pre.relu().topk(min(k + 1, pre.shape[-1]), dim=-1)
        One too many is kept in each row.
    """,
) + [
    (
        lambda pre, k: pre.relu() * (pre >= pre.flatten().topk(k * len(pre)).values.min()),
        "The k · rows largest of the whole batch are kept. That is BatchTopK; TopK keeps k in each "
        "row.",
    )
]


@exercise(
    "6.2",
    title="The k largest",
    difficulty=2,
    importance=5,
    minutes=4,
    reference=topk_activation,
    right=[topk_by_threshold],
    hints=[
        "`values, indices = pre.topk(k, dim=-1)` gives the k largest of each row.",
        "`torch.zeros_like(pre).scatter(-1, indices, …)` puts values into their places.",
    ],
    wrong=MISTAKES_62,
)
def check_62(answer) -> None:
    def inputs(draw) -> tuple:
        n = draw.size("latents", 8, 14)
        pre = 3 * draw.normal("rows", n) - 1
        pre[0] = -pre[0].abs() - 0.1  # a row in which one alone is positive
        pre[0, draw.integer(0, n - 1)] = 0.5
        pre[1] = pre[1].abs() + 1  # one in which all are
        return pre, draw.integer(3, 6)

    agree(
        answer,
        topk_activation,
        inputs,
        mistakes=MISTAKES_62,
        otherwise="Each row should keep its k largest entries, where they are positive.",
    )


# -- 6.3 -------------------------------------------------------------------------------------


def train_step(coder, x, optimizer):
    """One step of training: returns the loss before it, the mean over rows of |x - coder(x)|².

    1. Gradients of the loss, with none left from the step before.
    2. From coder.W_dec.grad, take away each row's part along the same row of coder.W_dec.
    3. optimizer.step(), then bring each row of coder.W_dec back to length 1.
    x (rows, d); coder.W_dec (latents, d), a parameter whose rows have length 1; change it and its
    gradient in place, under `with torch.no_grad():`
    """
    optimizer.zero_grad()
    loss = (x - coder(x)).pow(2).sum(-1).mean()
    loss.backward()
    with torch.no_grad():
        grad, rows = coder.W_dec.grad, coder.W_dec
        grad -= (grad * rows).sum(-1, keepdim=True) * rows
        optimizer.step()
        rows /= rows.norm(dim=-1, keepdim=True)
    return loss.item()


def train_step_otherwise(coder, x, optimizer):
    loss = torch.nn.functional.mse_loss(coder(x), x) * x.shape[1]
    for parameter in coder.parameters():
        parameter.grad = None
    loss.backward()
    W = coder.W_dec.data
    coder.W_dec.grad.sub_(W * torch.einsum("ld,ld->l", W, coder.W_dec.grad)[:, None])
    optimizer.step()
    W.copy_(torch.nn.functional.normalize(W, dim=1))
    return loss


MISTAKES_63 = edits(
    train_step,
    """
    optimizer.zero_grad() → pass
        Gradients of the step before are still there: call `optimizer.zero_grad()` first.
    .sum(-1).mean() → .mean()
        The loss is divided by the width, too: sum over the d numbers, mean over rows.
    .sum(-1).mean() → .sum()
        The loss is summed over the rows: take their mean.
    .pow(2).sum(-1).mean() → .norm(dim=-1).mean()
        This is the length of the error, not its square.
    grad -= (grad * rows).sum(-1, keepdim=True) * rows → pass
        The gradient keeps its part along the rows, and the optimizer's moments fill up with it.
    grad -= → grad +=
        The part along the rows is added: take it away.
    (grad * rows).sum(-1, keepdim=True) * rows → rows
        The whole row is taken away, whatever the gradient's part along it is.
    rows /= rows.norm(dim=-1, keepdim=True) → pass
        The rows of W_dec do not have length 1 afterwards.
    rows /= rows.norm(dim=-1, keepdim=True) → rows /= rows.norm(dim=0, keepdim=True)
        The columns of W_dec have length 1 now: it should be the rows.
    optimizer.step() → pass
        Nothing has been trained: `optimizer.step()` is missing.
    loss.item() → (x - coder(x)).pow(2).sum(-1).mean().item()
        This is the loss after the step: return the one before.
    """,
)


def small_coder(draw) -> tuple[SparseCoder, torch.Tensor]:
    """A coder, and rows; neither square, gradients left over, biases that are not 0."""
    d, latents = draw.size("d", 4, 7), draw.size("latents", 9, 14)
    coder = SparseCoder(d, latents, k=draw.integer(2, 4), seed=draw.integer(0, 99))
    with torch.no_grad():
        coder.b_dec += draw.normal(d, scale=0.3)
        coder.b_enc += draw.positive(latents, high=0.5)
    for parameter in coder.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    return coder, draw.normal(draw.size("rows", 5, 8), d)


def after_steps(step, coder: SparseCoder, x, rate: float) -> dict[str, torch.Tensor]:
    """What two steps of SGD return, and leave behind, of a copy of a coder."""
    mine = copy.deepcopy(coder)
    for parameter, other in zip(mine.parameters(), coder.parameters(), strict=True):
        parameter.grad = other.grad.clone()
    optimizer = torch.optim.SGD(mine.parameters(), rate, momentum=0.5)
    losses = [step(mine, x.clone(), optimizer) for _ in range(2)]
    if any(loss is None for loss in losses):
        raise Wrong("Return the loss, a number.")
    losses = [torch.as_tensor(loss).detach().double().reshape(()) for loss in losses]
    kept = {name: p.detach().clone() for name, p in mine.named_parameters()}
    return kept | {"the loss": torch.stack(losses)}


@exercise(
    "6.3",
    title="One step of training",
    difficulty=3,
    importance=5,
    minutes=8,
    reference=train_step,
    right=[train_step_otherwise],
    copies=False,
    hints=[
        "`loss = (x - coder(x)).pow(2).sum(-1).mean()`, then `loss.backward()`.",
        "The part of a row g along a row w of length 1 is (g · w) w: "
        "`(grad * rows).sum(-1, keepdim=True) * rows`.",
        "In place: `coder.W_dec.grad -= …`, and `coder.W_dec /= …` after the optimizer's step.",
    ],
    wrong=MISTAKES_63,
)
def check_63(answer) -> None:
    alive, problem = list(MISTAKES_63), ""
    for draw in draws(3):
        coder, x = small_coder(draw)
        given = coder, x, draw.number(0.02, 0.1)
        want, got = after_steps(train_step, *given), after_steps(answer, *given)
        far = [name for name, value in want.items() if not close(got[name], value)]
        problem = problem or (f"Two steps leave {far[0]} another than they should." if far else "")
        alive = [pair for pair in alive if same_steps(pair[0], given, got)]
    expect(not problem, alive[0][1] if alive else problem)


def close(got, want) -> bool:
    """Whether two tensors agree, as far as two steps in float32 do."""
    return got.shape == want.shape and torch.allclose(got.to(want), want, rtol=1e-4, atol=1e-5)


def same_steps(step, given: tuple, got: dict) -> bool:
    """Whether a mistaken step leaves the same behind."""
    return all(close(got[name], value) for name, value in after_steps(step, *given).items())


# -- 6.4 -------------------------------------------------------------------------------------


def explained_variance(x, x_hat):
    """1 - E|x - x_hat|² / E|x - E x|², over all rows and numbers together: one number.

    x, x_hat (rows, d)
    """
    return 1 - (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()


def explained_in_numpy(x, x_hat):
    x, x_hat = np.asarray(x), np.asarray(x_hat)
    return float(1 - np.square(x - x_hat).mean() / x.var(0).mean())


MISTAKES_64 = edits(
    explained_variance,
    """
    (x - x.mean(0)) → x
        Below the line stands E|x|²: a coder that always gives the mean would score well. Take the
        mean of each number away first.
    x.mean(0) → x.mean()
        One mean is taken over all numbers: each of the d numbers has its own.
    x.mean(0) → x.mean(1, keepdim=True)
        The mean is taken over each row: take it over the rows, for each number.
    1 - →
        This is the normalised MSE: explained variance is one minus it.
    (x - x_hat).pow(2).sum() → ((x - x_hat) - (x - x_hat).mean(0)).pow(2).sum()
        The variance of the error leaves out its mean: a reconstruction that is off by a constant
        would count as perfect.
    (x - x.mean(0)) → (x_hat - x_hat.mean(0))
        Below the line stands the variance of the reconstruction: it should be that of x.
    pow(2) → abs()
        These are sizes, not squares.
    """,
) + [
    (
        lambda x, x_hat: (1 - (x - x_hat).pow(2).sum(0) / (x - x.mean(0)).pow(2).sum(0)).mean(),
        "This averages over the d numbers, so one that hardly varies counts as much as one that "
        "varies most. Sum first, then divide.",
    )
]


@exercise(
    "6.4",
    title="Explained variance",
    difficulty=2,
    importance=5,
    minutes=4,
    reference=explained_variance,
    right=[explained_in_numpy],
    hints=["Two sums of squares, and one division.", "The mean is over the rows: `x.mean(0)`."],
    wrong=MISTAKES_64,
)
def check_64(answer) -> None:
    def inputs(draw) -> tuple:
        rows, d = draw.size("rows", 12, 30), draw.size("d", 3, 8)
        x = draw.normal(rows, d) * draw.positive(d) + draw.normal(d, scale=3)
        return x, x + draw.number(0.2, 0.8) * draw.normal(rows, d)

    agree(
        answer,
        explained_variance,
        inputs,
        mistakes=MISTAKES_64,
        otherwise="Compare with 1 - Σ (x - x̂)² / Σ (x - x̄)².",
    )


# -- 6.5 -------------------------------------------------------------------------------------


def loss_recovered(model, ids, site, reconstruct):
    """The share of the loss that comes back when the model goes on with reconstruct(x):
    (loss with zeros - loss with reconstruct(x)) / (loss with zeros - loss as it is).

    As SAELens has it: zeros stand at every position, BOS included; reconstruct(x) at every one but
    the first. A loss is the mean of model.loss(ids) without its first column, which BOS predicts.
    ids (batch, pos); the site holds x (batch, pos, d_model), and reconstruct keeps that shape
    """

    def splice(x):
        x[:, 1:] = reconstruct(x)[:, 1:]
        return x

    def loss(hooks):
        with model.hooks(hooks):
            return model.loss(ids)[:, 1:].mean()

    clean, spliced, zero = loss({}), loss({site: splice}), loss({site: lambda x: 0 * x})
    return (zero - spliced) / (zero - clean)


def recovered_otherwise(model, ids, site, reconstruct):
    def put(x):
        return torch.cat([x[:, :1], reconstruct(x[:, 1:])], 1)

    losses = []
    for hook in (lambda x: x, put, torch.zeros_like):
        with model.hooks({site: hook}):
            losses.append(float(model.loss(ids)[:, 1:].mean()))
    clean, spliced, zero = losses
    return 1 - (spliced - clean) / (zero - clean)


MISTAKES_65 = edits(
    loss_recovered,
    """
    x[:, 1:] = reconstruct(x)[:, 1:] → x[:] = reconstruct(x)
        BOS is reconstructed, too: no autoencoder is trained on it, so leave it as it is.
    lambda x: 0 * x → lambda x: torch.cat([x[:, :1], 0 * x[:, 1:]], 1)
        BOS stays when you put zeros: put them at every position. A model that keeps its BOS alone
        is worse than one that knows nothing, and every coder looks better beside it.
    model.loss(ids)[:, 1:] → model.loss(ids)
        The tokens that BOS alone predicts are in the mean: leave out the first column.
    (zero - spliced) → (spliced - clean)
        This is the share that is *lost*: one minus it comes back.
     / (zero - clean) →
        This is in nats: divide by what there is to win back.
    (zero - clean) → zero
        Below the line stands the loss with zeros: only what is above the clean loss can be won.
    (zero - spliced) → (spliced - zero)
        The sign is turned round: a good reconstruction is near +1.
    lambda x: 0 * x → lambda x: x.mean((0, 1)).expand_as(x)
        You put the mean where zeros belong.
    lambda x: 0 * x → lambda x: 0 * x + 1
        You put ones where zeros belong.
    return (zero - spliced) / (zero - clean) → return clean / spliced
        A ratio of losses has no zero: subtract before you divide.
    """,
)


@exercise(
    "6.5",
    title="Loss recovered",
    difficulty=3,
    importance=5,
    minutes=8,
    reference=loss_recovered,
    survivors=ONE_MODEL
    | {
        "0 * x → 0 / x": "that is 0 as well",
        "model.loss(ids)[:, 1:].mean() → model.loss(ids)[:, 1:].sum()": "all three are sums over "
        "as many tokens, so the share is the same",
    },
    right=[recovered_otherwise],
    hints=[
        "Three runs: without a hook, with the reconstruction, with zeros.",
        "A hook that writes `x[:, 1:] = reconstruct(x)[:, 1:]` and returns x leaves BOS alone.",
        "`model.loss(ids)[:, 1:].mean()` inside the `with`.",
    ],
    wrong=MISTAKES_65,
)
def check_65(answer) -> None:
    def inputs(draw) -> tuple:
        model, share = shipped_model(), draw.number(0.3, 0.8)
        shift = draw.normal(model.d_model, scale=2)
        return model, prose(draw), a_site(draw), lambda x: share * x + shift

    on_model(
        answer,
        loss_recovered,
        inputs,
        MISTAKES_65,
        "(zero - spliced) / (zero - clean), of three mean losses.",
    )


def prose(draw) -> torch.Tensor:
    """The beginnings of a few documents, (batch, pos), BOS first."""
    n, length = draw.size("batch", 2, 4), draw.size("pos", 9, 14)
    return lab.starts(shipped_model(), n, length, draw.integer(0, 200))


# -- 6.6 -------------------------------------------------------------------------------------


def top_contexts(model, coder, site, latent, texts, n, around):
    """Where a latent fires most: a list of up to n texts, the strongest firing first.

    One context per text, at its highest value, the first position (BOS) left out; none where the
    latent is silent. A context goes from `around` tokens before to `around` after, as far as there
    are tokens, BOS never among them; the firing token stands in [[ ]], its leading blank before
    them: "the [[virus]] of".
    model.str_tokens(text)  the tokens, BOS first; coder.encode(x) (pos, d_model) to (pos, latents)
    """
    found = []
    for text in texts:
        tokens = model.str_tokens(text)
        _, cache = model.run_with_cache(text, [site])
        values = coder.encode(cache[site][0])[1:, latent]
        at = int(values.argmax()) + 1
        if values.max() > 0:
            bare = tokens[at].lstrip(" ")
            blank = " " * (len(tokens[at]) - len(bare))
            before, after = tokens[max(1, at - around) : at], tokens[at + 1 : at + around + 1]
            context = "".join([*before, f"{blank}[[{bare}]]", *after])
            found.append((float(values.max()), context))
    found.sort(key=lambda pair: pair[0], reverse=True)
    return [context for _, context in found[:n]]


MISTAKES_66 = edits(
    top_contexts,
    """
    [1:, latent] → [:-1, latent]
        The token in brackets is not the one that fires: is position 0, BOS, where you count from?
    if values.max() > 0: → if True:
        Texts in which the latent is silent are among them: leave those out.
    reverse=True → reverse=False
        The weakest comes first.
    found[:n] → found
        There are more than n: keep the strongest n.
    found.sort(key=lambda pair: pair[0], reverse=True) → pass
        They are in the order of the texts: the strongest firing comes first.
    {blank}[[{bare}]] → [[{blank}{bare}]]
        The blank is inside the brackets: it belongs before them.
    {blank}[[{bare}]] → [[{bare}]]
        The blank before the firing token is lost.
    {blank}[[{bare}]] → {blank}[{bare}]
        The brackets are single: [[ ]].
    max(1, at - around) → max(0, at - around)
        BOS is in the context: leave it out.
    max(1, at - around) → at - around
        Near the beginning of a text, at - around is below 0, and counts from the end.
    at + around + 1 → at + around
        There is one token too few after the firing one.
    [context for _, context in found[:n]] → found[:n]
        Return the contexts alone, without the values.
    """,
)


@functools.cache
def pool() -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Texts; each latent's highest value in each, (texts, latents), BOS left out; and where."""
    model, stream = shipped_model(), World().documents(66)
    texts = [next(stream).text[:70] for _ in range(40)]
    found = []
    for _, _, (x,) in rivals.read_texts(model, texts, [lab.middle(model)]):
        found.append(shipped_coder().encode(x).detach().max(0))
    return texts, torch.stack([f.values for f in found]), torch.stack([f.indices for f in found])


def texts_and_latent(draw) -> tuple:
    """Texts in some of which a latent fires, in one of them near the beginning."""
    texts, values, places = pool()
    rows = draw.sample(range(len(texts)), draw.size("texts", 6, 8))
    fires, count = values[rows] > 0, (values[rows] > 0).sum(0)
    some = (count >= 3) & (count < len(rows)) & (fires & (places[rows] < 3)).any(0)
    some &= (fires & (values[rows] < 1)).any(0)  # weakly, too
    latent = draw.choice(some.nonzero()[:, 0].tolist() or [int(count.argmax())])
    model, most = shipped_model(), draw.choice([2, len(rows)])
    kept = [texts[i] for i in rows]
    site = lab.middle(model)
    return model, shipped_coder(), site, latent, kept, most, draw.integer(3, 6)


@exercise(
    "6.6",
    title="Contexts in brackets",
    difficulty=3,
    importance=4,
    minutes=8,
    reference=top_contexts,
    survivors=ONE_MODEL
    | {
        "coder → its first value, always": "the course has one autoencoder",
        "site → its first value, always": "and that reads one site",
    },
    hints=[
        "`model.run_with_cache(text, [site])[1][site][0]` is (pos, d_model), BOS first.",
        "`coder.encode(x)[1:, latent]` leaves BOS out, so add 1 to the place of its maximum.",
        "Split a token into its blank and the rest with `token.lstrip(' ')`.",
    ],
    wrong=MISTAKES_66,
)
def check_66(answer) -> None:
    on_model(
        answer,
        top_contexts,
        texts_and_latent,
        MISTAKES_66,
        "Each context is the tokens around the highest value, with that token in [[ ]].",
    )


# -- 6.7 -------------------------------------------------------------------------------------


def raised(model, direction, n):
    """The ids of the n tokens whose logits a direction in the stream raises most, the most first.

    By the direct path: through the final norm's gain, 1 + w, and the unembedding.
    model.ln_final.weight (d_model,) is w; model.W_U (d_model, d_vocab). Tokens that no text has,
    where model.in_text is False, are left out.
    """
    logits = (direction * (1 + model.ln_final.weight)) @ model.W_U
    return logits.masked_fill(~model.in_text, -torch.inf).topk(n).indices


def raised_by_sorting(model, direction, n):
    logits = model.W_U.T @ ((1 + model.ln_final.weight) * direction)
    order = logits.argsort(descending=True).tolist()
    return [i for i in order if model.in_text[i]][:n]


MISTAKES_67 = edits(
    raised,
    """
    (1 + model.ln_final.weight) → model.ln_final.weight
        The gain is w here: Gemma's norm multiplies by 1 + w.
     * (1 + model.ln_final.weight) →
        The final norm's gain is left out.
    .masked_fill(~model.in_text, -torch.inf) →
        Tokens that stand in no text are among them: leave those out.
    .topk(n) → .topk(n, largest=False)
        These are the ones that it lowers most.
    .topk(n) → .abs().topk(n)
        Some of these it lowers: take the logits themselves, not their size.
    topk(n).indices → topk(n).values
        These are the logits: give the tokens' ids.
    """,
)


@exercise(
    "6.7",
    title="What it writes",
    difficulty=2,
    importance=4,
    minutes=4,
    reference=raised,
    survivors=ONE_MODEL,
    right=[raised_by_sorting],
    hints=["`direction * (1 + w)`, then `@ model.W_U`.", "`.topk(n).indices`, highest first."],
    wrong=MISTAKES_67,
)
def check_67(answer) -> None:
    def inputs(draw) -> tuple:
        model = shipped_model()
        odd = model.W_U[:, ~model.in_text].sum(-1)  # a direction that also raises what no text has
        direction = draw.normal(model.d_model) / 3 + draw.number(0.5, 2) * odd / odd.norm()
        return model, direction, draw.integer(4, 12)

    on_model(
        answer,
        raised,
        inputs,
        MISTAKES_67,
        "Compare with the highest entries of (direction * (1 + w)) @ W_U.",
    )


# -- 6.8 -------------------------------------------------------------------------------------


def honest_f1(fires, truth):
    """The F1 of the best unit, chosen on the first half of the rows and scored on the second.

    F1 = 2 · true positives / (times it fires + times it should).
    fires (rows, units), truth (rows,): booleans, NumPy arrays. Returns one number.
    """
    half = len(truth) // 2

    def f1(rows):
        hits = (fires[rows] & truth[rows, None]).sum(0)
        return 2 * hits / (fires[rows].sum(0) + truth[rows].sum())

    return f1(slice(half, None))[f1(slice(half)).argmax()]


MISTAKES_68 = edits(
    honest_f1,
    """
    f1(slice(half)).argmax() → f1(slice(half, None)).argmax()
        The unit is chosen on the second half, on which it is scored: luck is scored, too.
    return f1(slice(half, None))[f1(slice(half)).argmax()] → return f1(slice(None)).max()
        Chosen and scored on all rows: the best of many looks good by luck.
    return f1(slice(half, None))[f1(slice(half)).argmax()] → return f1(slice(half)).max()
        This is the score on the first half, where the unit was chosen.
    return f1(slice(half, None)) → early = slice(half); half = 0; return f1(early)
        The halves are swapped: choose on the first, score on the second.
    2 * hits / (fires[rows].sum(0) + truth[rows].sum()) → hits / fires[rows].sum(0).clip(1)
        This is precision: a unit that fires once, rightly, would be best.
    2 * hits / (fires[rows].sum(0) + truth[rows].sum()) → hits / truth[rows].sum()
        This is recall: a unit that always fires would be best.
    2 * hits / (fires[rows].sum(0) + truth[rows].sum()) → (fires[rows] == truth[rows, None]).mean(0)
        This is accuracy: where a concept is rare, a unit that never fires would be best.
    2 * hits → hits
        The 2 is missing: a perfect unit has an F1 of 1.
    """,
)


def honest_by_loops(fires, truth):
    half, scores = len(truth) // 2, []
    for rows in (range(half), range(half, len(truth))):
        said, true = fires[list(rows)], truth[list(rows)]
        both = [int((column & true).sum()) for column in said.T]
        scores.append([2 * b / (c.sum() + true.sum()) for b, c in zip(both, said.T, strict=True)])
    return float(scores[1][int(np.argmax(scores[0]))])


@exercise(
    "6.8",
    title="An honest best unit",
    difficulty=3,
    importance=5,
    minutes=7,
    reference=honest_f1,
    right=[honest_by_loops],
    hints=[
        "Write the F1 of all units on some rows first: true positives are "
        "`(fires[rows] & truth[rows, None]).sum(0)`.",
        "`argmax` on the first half, then that unit's F1 on the second.",
    ],
    wrong=MISTAKES_68,
)
def check_68(answer) -> None:
    def inputs(draw) -> tuple:
        n, units = 2 * draw.size("half", 24, 40) + draw.integer(0, 1), draw.size("units", 6, 12)
        truth = draw.booleans(n, share=0.25)
        truth[[0, 1, n - 2, n - 1]] = True
        truth[[2, n - 3]] = False
        noise = [draw.booleans(n, share=draw.number(0.1, 0.7)) for _ in range(units)]
        fires = np.stack([truth ^ (each & (draw.rng.random(n) < 0.5)) for each in noise], 1)
        at = draw.rng.permutation(units)
        fires[:, at[0]] = True  # the best recall
        fires[:, at[1]] = truth & (np.cumsum(truth) % 5 == 1)  # the best precision
        fires[:, at[2]] = False  # the best accuracy, nearly
        second = np.arange(n) >= n // 2
        fires[:, at[3]] = np.where(second, ~truth, truth)  # perfect at first
        fires[:, at[4]] = truth & (second | (np.cumsum(truth) % 3 == 0))  # perfect later
        return fires, truth

    agree(
        answer,
        honest_f1,
        varied(inputs),
        mistakes=MISTAKES_68,
        otherwise="Choose on rows 0 to n // 2, score on the others: F1 = 2 TP / (fired + true).",
        numpy=True,
    )


def varied(inputs):
    """The same inputs; in every second case no unit is perfect in one half alone."""
    count = iter(range(10**6))

    def make(draw) -> tuple:
        fires, truth = inputs(draw)
        if next(count) % 2:
            fires = fires ^ (draw.rng.random(fires.shape) < 0.1)
        return fires, truth

    return make


# -- 6.9 -------------------------------------------------------------------------------------


def partners(a, b):
    """For each latent of one dictionary, how alike its best partner in another fires: (latents,).

    The highest of its correlations with the latents of the other, over the same tokens: the cosine
    of their values, each less its mean. A latent that never fires has 0 with all.
    a (tokens, latents), b (tokens, other latents)
    """

    def standard(x):
        x = x - x.mean(0)
        return x / x.norm(dim=0).clamp(min=1e-9)

    return (standard(a).T @ standard(b)).amax(1)


def partners_in_numpy(a, b):
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    with np.errstate(invalid="ignore"):
        found = np.nan_to_num(np.corrcoef(a.T, b.T)[: a.shape[1], a.shape[1] :])
    return found.max(1)


MISTAKES_69 = edits(
    partners,
    """
    x = x - x.mean(0) → pass
        The mean is not taken off: two latents that are often on at all look alike.
    x.mean(0) → x.mean()
        One mean is taken over all latents: each has its own.
    x.mean(0) → x.mean(1, keepdim=True)
        The mean is over the latents of each token: take it over the tokens.
    norm(dim=0) → norm(dim=1, keepdim=True)
        Each token has length 1 here: it should be each latent.
    amax(1) → amax(0)
        These are the partners of the other dictionary's latents: one for each latent of `a`.
    amax(1) → mean(1)
        This is the mean over all partners: take the best.
    amax(1) → abs().amax(1)
        A partner that is silent where the latent fires is no partner: no absolute value.
    .amax(1) → .argmax(1)
        This says which partner: give how alike they are.
    """,
)


@exercise(
    "6.9",
    title="The same latent elsewhere",
    difficulty=3,
    importance=4,
    minutes=6,
    reference=partners,
    survivors={"1e-09 → 2e-09": "it is there for what is 0"},
    right=[partners_in_numpy],
    hints=[
        "Take the mean over tokens off each column, then divide it by its length.",
        "One matrix product of the two gives all correlations, (latents, other latents).",
        "A silent column has length 0: `clamp(min=1e-9)` before you divide.",
    ],
    wrong=MISTAKES_69,
)
def check_69(answer) -> None:
    def inputs(draw) -> tuple:
        n, a, b = draw.size("tokens", 20, 40), draw.size("a", 4, 8), draw.size("b", 6, 12)
        one = (draw.normal(n, a) + draw.normal(a)).clamp(min=0)
        other = (draw.normal(n, b) + draw.normal(b)).clamp(min=0)
        other[:, 0] = (other[:, 0] + draw.number(0.5, 2) * one[:, 0]).clamp(min=0)
        other[:, 1] = 4 - one[:, 1]  # fires where the latent is silent
        one[:, 2] = 0
        other[:, 3] = 0
        return one, other

    agree(
        answer,
        partners,
        inputs,
        mistakes=MISTAKES_69,
        otherwise="Compare with the highest entry of each row of the correlations.",
        tolerance=1e-4,
    )


# -- 6.10, going further ---------------------------------------------------------------------


def jumprelu_encode(x, W_enc, b_enc, threshold):
    """Gemma Scope's encoder: pre = x W_enc + b_enc, and f = pre where pre > threshold, else 0.

    x (rows, d); W_enc (d, latents); b_enc, threshold (latents,), thresholds above 0
    """
    pre = x @ W_enc + b_enc
    return pre * (pre > threshold)


MISTAKES_610 = edits(
    jumprelu_encode,
    """
    pre * (pre > threshold) → (pre - threshold).relu()
        The threshold is taken away from what passes: above it a latent has its full
        pre-activation. That is the jump.
    pre * (pre > threshold) → pre.relu()
        The threshold is not used: this is a plain ReLU.
    pre * (pre > threshold) → (pre > threshold).float()
        This says where latents fire, not how strongly.
    (pre > threshold) → (pre.abs() > threshold)
        A strongly negative pre-activation fires, too.
    pre > threshold → pre < threshold
        The comparison is turned round.
     + b_enc →
        b_enc is missing.
    pre * (pre > threshold) → torch.maximum(pre, threshold)
        Below the threshold the activation is 0.
    """,
)


@exercise(
    "6.10",
    title="The jump of JumpReLU (going further)",
    difficulty=1,
    importance=3,
    minutes=3,
    reference=jumprelu_encode,
    hints=["No b_dec is taken from the input.", "A comparison gives a mask; multiply."],
    wrong=MISTAKES_610,
)
def check_610(answer) -> None:
    agree(
        answer,
        jumprelu_encode,
        lambda draw: (
            draw.normal("rows", "d"),
            draw.normal("d", "latents"),
            draw.normal("latents"),
            draw.positive("latents", low=0.2, high=2),
        ),
        mistakes=MISTAKES_610,
        otherwise="Compare with pre · [pre > θ].",
    )
    one = torch.ones(1, 1)
    expect_close(answer(one, one, 0 * one[0], one[0]), [[0.0]], "At the threshold it is 0.")


# -- predictions -----------------------------------------------------------------------------

SHARES = ["under 3 %", "3 to 10 %", "over 10 %"]
THIRDS = ["under a third", "a third to two thirds", "over two thirds"]


@prediction(
    "6.11",
    question="Turned up to 1.5 times its highest, what share of the next words is its topic's?",
    options=SHARES,
)
def share_when_turned_up() -> str:
    model, coder = shipped_model(), shipped_coder()
    tokens = rivals.ground(model, lab.middle(model), seed=1, neurons=False)
    latent = lab.opening_latent(coder, tokens)
    highest = float(coder.encode(tokens.x)[:, latent].max())
    p = turned_up(
        model, lab.starts(model), lab.middle(model), coder.W_dec[latent].detach(), 1.5 * highest
    )
    share = float(p[:, 1:, lab.topic_words(model, lab.OPENING)].sum(-1).mean())
    return SHARES[0] if share < 0.03 else SHARES[1] if share < 0.1 else SHARES[2]


@prediction(
    "6.12",
    question="Which of these tells six concepts best, by the median F1?",
    options=["the best neuron", "a difference of means", "a logistic probe"],
)
def strongest_rival() -> str:
    judged = lab.told(1).judged
    found = {
        "the best neuron": judged["neuron of a block below"].median,
        "a difference of means": judged["difference of means"].median,
        "a logistic probe": judged["logistic probe"].median,
    }
    return max(found, key=lambda name: found[name])


@prediction(
    "6.13",
    question="How many latents have a partner in the dictionary of another seed?",
    options=THIRDS,
)
def found_again() -> str:
    share = elsewhere()["another seed"]
    return THIRDS[0] if share < 1 / 3 else THIRDS[1] if share < 2 / 3 else THIRDS[2]


IN_THE_TWIN = ["hardly any", "about two thirds as many", "as many"]


@prediction(
    "6.14",
    question="And how many, against that, in the dictionary of the twin?",
    options=IN_THE_TWIN,
)
def found_in_the_twin() -> str:
    share = elsewhere()["the twin"] / elsewhere()["another seed"]
    return IN_THE_TWIN[0 if share < 1 / 3 else 1 if share < 0.9 else 2]


@functools.cache
def elsewhere() -> dict[str, float]:
    """How many latents are found again elsewhere, measured once."""
    return universality.shares(shipped_model())


# -- the investigation -----------------------------------------------------------------------


@functools.cache
def seen() -> naming.Sample:
    """The text from which names are found."""
    return naming.sample(shipped_model(), shipped_coder(), lab.middle(shipped_model()), seed=700)


@functools.cache
def held_out() -> naming.Sample:
    """The text on which names are scored; the notebook has none of it."""
    return naming.sample(shipped_model(), shipped_coder(), lab.middle(shipped_model()), seed=900)


@functools.cache
def five() -> tuple[int, ...]:
    """The latents to be named."""
    return tuple(naming.to_be_named(seen()))


def best_names() -> dict[int, str]:
    """The names that predict best in the text that is not the held-out one."""
    return {latent: naming.best_name(seen(), latent)[0] for latent in five()}


def some_names(rng) -> dict[int, str]:
    """Names drawn without looking: a subject, or tokens of the text."""
    words = sorted(set(seen().facts["at"]) - {""})
    made = (
        lambda: f"about: {rng.choice(naming.subjects())}",
        lambda: f"at: {', '.join(rng.sample(words, 3))}",
        lambda: f"after: {', '.join(rng.sample(words, 3))}",
    )
    return {latent: rng.choice(made)() for latent in five()}


@investigation(
    "6",
    title="Name five latents",
    form='a dictionary of names by latent, such as {17: "about: chess", 99: "at: the, each"}',
    chance=some_names,
    best=best_names,
    good=lambda: dict(list(best_names().items())[:3]),
    foolish=["chess", {10**6: "about: chess"}, {-1: "about: chess"}, [1, 2], {"a": 3}],
)
def score_names(answer) -> float:
    """The mean over the five latents of the F1 of what their names say on held-out text."""
    if not isinstance(answer, dict):
        raise Wrong(f"Give a dictionary {{latent: name}}, not {describe(answer)}.")
    strange = [latent for latent in answer if latent not in five()]
    if strange:
        listed = ", ".join(map(str, five()))
        raise Wrong(f"{describe(strange[0])} is none of the five latents: {listed}.")
    highest, total = seen().values.max(0), 0.0
    for latent, name in answer.items():
        true = naming.strong(held_out(), latent, float(highest[latent]))
        total += naming.f1(naming.says(name, held_out()), true)
    return total / len(five())
