"""Exercises of lesson 07, transcoders."""

import numpy as np
import torch

from mi_helpers.course.check import draw, exercise, expect, expect_close, expect_none_of

# -- 7.1 -------------------------------------------------------------------------------------

STUB_71 = '''\
def transcoder_error(x, y, W_enc, b_enc, W_dec, b_dec, k):
    """Mean over rows of |y - y_hat|^2, y_hat being a TopK transcoder's prediction from x.

    x, y: (rows, d), the MLP's inputs and outputs; W_enc: (d, latents); b_enc: (latents,);
    W_dec: (latents, d); b_dec: (d,). Returns one number.
    """
    ...
'''


def transcoder_error(x, y, W_enc, b_enc, W_dec, b_dec, k):
    """The SAE's error with another target, and b_dec at the output alone."""
    values, indices = (x @ W_enc + b_enc).topk(k, dim=-1)
    f = torch.zeros(len(x), len(b_enc)).scatter(1, indices, torch.relu(values))
    return float((y - f @ W_dec - b_dec).pow(2).sum(1).mean())


def _sae_error(x, y, W_enc, b_enc, W_dec, b_dec, k):
    return transcoder_error(x, x, W_enc, b_enc, W_dec, b_dec, k)


def _subtracts_b_dec(x, y, W_enc, b_enc, W_dec, b_dec, k):
    return transcoder_error(x - b_dec, y, W_enc, b_enc, W_dec, b_dec, k)


def _dense_error(x, y, W_enc, b_enc, W_dec, b_dec, k):
    return (y - torch.relu(x @ W_enc + b_enc) @ W_dec - b_dec).pow(2).sum(1).mean()


@exercise(
    "7.1",
    title="The one-line swap",
    difficulty=2,
    importance=5,
    minutes=10,
    stub=STUB_71,
    reference=transcoder_error,
    hints=[
        "First the pre-activations `x @ W_enc + b_enc`, then `topk` along the last axis.",
        "Put the k values, through a ReLU, back into their places with `scatter`.",
        "Decode, `f @ W_dec + b_dec`, and compare with y: sum over d, mean over rows.",
    ],
    wrong=[
        (_sae_error, "that is an SAE"),
        (_subtracts_b_dec, "belongs to the output alone"),
        (_dense_error, "keep the k largest"),
    ],
)
def check_71(answer) -> None:
    x, y = draw(30, 5, seed=0), draw(30, 5, seed=1)
    W_enc, b_enc, W_dec, b_dec = (
        draw(5, 9, seed=2),
        draw(9, seed=3),
        draw(9, 5, seed=4),
        draw(5, seed=5),
    )
    k, want = 4, transcoder_error(x, y, W_enc, b_enc, W_dec, b_dec, 4)

    def error(target, read, relu=True, dense=False):
        pre = read @ W_enc + b_enc
        values, indices = pre.topk(k, dim=-1)
        f = torch.zeros_like(pre).scatter(1, indices, values.relu() if relu else values)
        f = pre.relu() if dense else f
        return (target - f @ W_dec - b_dec).pow(2)

    got = answer(*(each.clone() for each in (x, y, W_enc, b_enc, W_dec, b_dec)), k)
    right = error(y, x)
    expect_none_of(
        got,
        (
            error(x, x).sum(1).mean(),
            "The prediction is compared with x, what it was made from: that is an SAE. A "
            "transcoder's target is y.",
        ),
        (
            error(y, x - b_dec).sum(1).mean(),
            "b_dec is taken from the input, as in an SAE: here input and output are different "
            "spaces, and b_dec belongs to the output alone.",
        ),
        (
            error(y, y).sum(1).mean(),
            "The encoder reads y: it has to do with x, or there is nothing to predict.",
        ),
        (
            error(y, x, dense=True).sum(1).mean(),
            "Every positive latent is used: keep the k largest of each row only.",
        ),
        (
            error(y, x, relu=False).sum(1).mean(),
            "Some of the k largest are negative and used as such: a ReLU comes after the choice.",
        ),
        (right.mean(), "The mean is taken over the d numbers too: sum over these first."),
        (right.sum(), "This is the sum over the rows: take their mean."),
    )
    expect_close(got, want, "Encode x, keep the k largest, decode, compare with y.", 1e-3)


# -- 7.2 -------------------------------------------------------------------------------------

STUB_72 = '''\
def recovered(clean, spliced, zero):
    """The share of the loss that comes back, of the mean loss over families.

    clean, spliced, zero: {family: loss in nats} of the model as it is, with the transcoders in the
    place of its MLPs, and with zeros there. Returns one number, 1 where nothing is lost.
    """
    ...
'''


def recovered(clean, spliced, zero):
    """A ratio of means: a family in which zeros hardly harm cannot blow it up."""
    a, b, c = (sum(each.values()) / len(each) for each in (clean, spliced, zero))
    return (c - b) / (c - a)


def _mean_of_shares(clean, spliced, zero):
    return np.mean([(zero[f] - spliced[f]) / (zero[f] - clean[f]) for f in clean])


def _share_lost(clean, spliced, zero):
    return 1 - recovered(clean, spliced, zero)


def _ratio_of_losses(clean, spliced, zero):
    return sum(clean.values()) / sum(spliced.values())


@exercise(
    "7.2",
    title="Loss recovered, over families",
    difficulty=2,
    importance=4,
    minutes=5,
    stub=STUB_72,
    reference=recovered,
    hints=[
        "Average each of the three over the families.",
        "Then how much of the way from the zeros' loss down to the clean loss is gone?",
    ],
    wrong=[
        (_mean_of_shares, "swamps the others"),
        (_share_lost, "share that is lost"),
        (_ratio_of_losses, "what zeros would cost"),
    ],
)
def check_72(answer) -> None:
    clean = {"facts": 0.2, "agreement": 0.1, "names": 1.0, "prose": 3.0}
    spliced_in = {"facts": 0.5, "agreement": 0.3, "names": 1.1, "prose": 3.3}
    zero = {"facts": 6.2, "agreement": 2.1, "names": 1.01, "prose": 5.0}
    got = answer(dict(clean), dict(spliced_in), dict(zero))
    want = recovered(clean, spliced_in, zero)
    ratios = [(zero[f] - spliced_in[f]) / (zero[f] - clean[f]) for f in clean]
    expect_none_of(
        got,
        (
            np.mean(ratios),
            "This is the mean of the families' shares. In 'names' zeros do almost no harm, so "
            "its share is -9, and swamps the others: average the losses first.",
        ),
        (np.median(ratios), "This is a median of shares: average the losses, then divide."),
        (1 - want, "This is the share that is lost."),
        (
            (sum(zero.values()) - sum(spliced_in.values())) / sum(zero.values()),
            "Below the line stands the loss with zeros: subtract the clean loss there, which "
            "is the best that could be reached.",
        ),
        (
            sum(clean.values()) / sum(spliced_in.values()),
            "A ratio of losses does not know what zeros would cost.",
        ),
        (
            sum(spliced_in.values()) / 4 - sum(clean.values()) / 4,
            "This is the loss that is added, in nats: compare it with what zeros add.",
        ),
    )
    expect_close(got, want, "Average each of the three over families, then divide.", 1e-9)


# -- 7.3 -------------------------------------------------------------------------------------

STUB_73 = '''\
def reads_from_tokens(W_E, gain, W_enc, b_enc):
    """What each latent's pre-activation would be, were the stream a token's embedding alone.

    W_E: (tokens, d); gain: (d,), the (1 + w) of the RMSNorm in front of the MLP; W_enc:
    (d, latents); b_enc: (latents,). Leave the norm's tiny epsilon out. Returns (tokens, latents).
    """
    ...
'''


def reads_from_tokens(W_E, gain, W_enc, b_enc):
    """norm(W_E) W_enc + b_enc."""
    x = W_E / W_E.pow(2).mean(1, keepdim=True).sqrt() * gain
    return x @ W_enc + b_enc


def _no_norm(W_E, gain, W_enc, b_enc):
    return W_E @ W_enc + b_enc


def _no_gain(W_E, gain, W_enc, b_enc):
    return W_E / W_E.pow(2).mean(1, keepdim=True).sqrt() @ W_enc + b_enc


def _unit_norm(W_E, gain, W_enc, b_enc):
    return W_E / W_E.norm(dim=1, keepdim=True) * gain @ W_enc + b_enc


@exercise(
    "7.3",
    title="What fires it: the input side",
    difficulty=3,
    importance=4,
    minutes=10,
    stub=STUB_73,
    reference=reads_from_tokens,
    hints=[
        "The encoder does not read the stream but the norm of it.",
        "RMSNorm: divide a row by the root of the mean of its squares, times the gain.",
    ],
    wrong=[
        (_no_norm, "which is normalised"),
        (_no_gain, "The gain is missing"),
        (_unit_norm, "root of the *mean* square"),
    ],
)
def check_73(answer) -> None:
    W_E = draw(7, 6, seed=0) * torch.linspace(0.2, 3, 7)[:, None]
    gain, W_enc, b_enc = 1 + 0.5 * draw(6, seed=1), draw(6, 4, seed=2), draw(4, seed=3)
    got = answer(W_E.clone(), gain.clone(), W_enc.clone(), b_enc.clone())
    rms = W_E.pow(2).mean(1, keepdim=True).sqrt()
    norm = W_E.norm(dim=1, keepdim=True)
    expect_none_of(
        got,
        (
            W_E @ W_enc + b_enc,
            "The encoder reads the MLP's input, which is normalised: divide each row by its "
            "root mean square, and multiply by the gain.",
        ),
        (
            W_E * gain @ W_enc + b_enc,
            "The gain is there, but the rows are not divided by their root mean square: "
            "rare tokens with long embeddings would win.",
        ),
        (
            W_E / rms @ W_enc + b_enc,
            "The gain is missing: `mlp_in` has it. (Gemma Scope's transcoders read without.)",
        ),
        (
            W_E / norm * gain @ W_enc + b_enc,
            "The rows are divided by their norm: RMSNorm divides by the root of the *mean* "
            "square, so its output has a norm near √d.",
        ),
        (
            (W_E - W_E.mean(1, keepdim=True)) / W_E.std(1, keepdim=True) * gain @ W_enc + b_enc,
            "The mean of each row is taken away: that is LayerNorm, and RMSNorm does not.",
        ),
        (W_E / rms * gain @ W_enc, "The bias b_enc is missing."),
    )
    want = reads_from_tokens(W_E, gain, W_enc, b_enc)
    expect_close(got, want, "norm(W_E) @ W_enc + b_enc, with norm(x) = x / rms(x) · gain.", 1e-4)


# -- 7.4 -------------------------------------------------------------------------------------

STUB_74 = '''\
def raises_most(row, gain, W_U, n):
    """The ids of the n tokens whose logits a latent raises most, directly, the strongest first.

    row: (d,), its row of W_dec; gain: (d,), of the final norm; W_U: (d, tokens).
    Returns a list of n numbers.
    """
    ...
'''


def raises_most(row, gain, W_U, n):
    """The direct path: through the final norm's gain and the unembedding."""
    return ((row * gain) @ W_U).topk(n).indices.tolist()


def _raises_without_gain(row, gain, W_U, n):
    return (row @ W_U).topk(n).indices


def _strongest_either_way(row, gain, W_U, n):
    return ((row * gain) @ W_U).abs().topk(n).indices


def _weakest_first(row, gain, W_U, n):
    return ((row * gain) @ W_U).argsort()[-n:]


def _whole_topk(row, gain, W_U, n):
    return ((row * gain) @ W_U).topk(n)


@exercise(
    "7.4",
    title="What it writes: the output side",
    difficulty=2,
    importance=4,
    minutes=5,
    stub=STUB_74,
    reference=raises_most,
    hints=[
        "What stands between the stream and the logits? A norm and a matrix.",
        "`(row * gain) @ W_U` are the effects; `topk(n)` sorts them, the largest first.",
    ],
    wrong=[
        (_raises_without_gain, "gain is missing"),
        (_strongest_either_way, "absolute value"),
        (_weakest_first, "weakest first"),
        (_whole_topk, "ids alone"),
    ],
)
def check_74(answer) -> None:
    row, W_U, n = draw(8, seed=0), draw(8, 60, seed=1), 5
    gain = 1 + 0.9 * draw(8, seed=2)
    got = answer(row.clone(), gain.clone(), W_U.clone(), n)
    effects, plain = (row * gain) @ W_U, row @ W_U
    expect(
        not hasattr(got, "values") or isinstance(got, torch.Tensor),
        "Return the ids alone, not what `topk` gives: take its `.indices`.",
    )
    unit = torch.nn.functional.normalize(W_U, dim=0)
    expect_none_of(
        got,
        (plain.topk(n).indices, "The final norm's gain is missing: it stands before W_U."),
        (
            effects.abs().topk(n).indices,
            "These are the n largest in absolute value: some of them are lowered, not raised.",
        ),
        (
            effects.topk(n, largest=False).indices,
            "These are the tokens that it lowers most.",
        ),
        (
            ((row * gain) @ unit).topk(n).indices,
            "This ranks by cosine: a logit is a dot product, so the length of W_U's column counts.",
        ),
        (effects.topk(n).values, "These are the effects: return the tokens' ids."),
        (effects.argsort()[-n:], "The right tokens, but the weakest first: turn them round."),
    )
    want = effects.topk(n).indices
    expect_close(got, want, "Rank the tokens by (row · gain) @ W_U.", 1e-9)


# -- 7.5 -------------------------------------------------------------------------------------

STUB_75 = '''\
def virtual_weights(W_dec, gain, W_enc):
    """What each latent of an early layer adds, when it fires by 1, to the pre-activation of each
    latent of a later layer at the same token, along the stream; the norm's division left out.

    W_dec: (early, d); gain: (d,), of the norm that the later layer's MLP reads through; W_enc:
    (d, late). Returns (early, late).
    """
    ...
'''


def virtual_weights(W_dec, gain, W_enc):
    """Dunefsky and others 2024, section 3.2, with the norm's gain."""
    return (W_dec * gain) @ W_enc


def _virtual_without_gain(W_dec, gain, W_enc):
    return W_dec @ W_enc


def _virtual_turned(W_dec, gain, W_enc):
    return ((W_dec * gain) @ W_enc).T


def _gain_on_latents(W_dec, gain, W_enc):
    return (gain[:, None] * W_dec) @ W_enc


@exercise(
    "7.5",
    title="Virtual weights",
    difficulty=2,
    importance=5,
    minutes=5,
    stub=STUB_75,
    reference=virtual_weights,
    hints=[
        "A latent that fires by 1 adds its row of W_dec to the stream.",
        "The later encoder reads this row times the gain: one matrix product for all pairs.",
    ],
    wrong=[
        (_virtual_without_gain, "gain is missing"),
        (_virtual_turned, "turn it round"),
        (_gain_on_latents, "multiplies the *latents*"),
    ],
)
def check_75(answer) -> None:
    W_dec, gain, W_enc = draw(6, 6, seed=0), 1 + 0.7 * draw(6, seed=1), draw(6, 6, seed=2)
    got = answer(W_dec.clone(), gain.clone(), W_enc.clone())
    want = (W_dec * gain) @ W_enc
    unit = torch.nn.functional.normalize
    expect_none_of(
        got,
        (W_dec @ W_enc, "The gain is missing: the later MLP reads the stream through it."),
        (want.T, "The result is (late, early): turn it round."),
        (
            (gain[:, None] * W_dec) @ W_enc,
            "The gain multiplies the *latents* of the early layer: it belongs to the d "
            "numbers of the stream, the last axis of W_dec.",
        ),
        (
            (W_dec / gain) @ W_enc,
            "The norm multiplies by its gain: you divide by it.",
        ),
        (
            unit(W_dec * gain, dim=1) @ unit(W_enc, dim=0),
            "These are cosines: a weight keeps the lengths.",
        ),
        (
            torch.relu(want),
            "Negative weights are cut off: one latent may well hold another down.",
        ),
        (
            W_enc.T @ (W_dec * gain),
            "W_enc of the later layer comes last: write, then read.",
        ),
    )
    expect_close(got, want, "Write (a row of W_dec), gain, read (a column of W_enc).", 1e-4)


# -- 7.6 -------------------------------------------------------------------------------------

STUB_76 = '''\
def for_mlp_in(W_enc, gain):
    """The encoder that does with `mlp_in` what W_enc does with the normalised stream.

    W_enc: (d, latents), of a published transcoder, which reads x / rms(x) without the gain;
    gain: (d,); mlp_in = x / rms(x) · gain. Returns (d, latents).
    """
    ...
'''


def for_mlp_in(W_enc, gain):
    """mlp_in / gain is the normalised stream, so divide each row."""
    return W_enc / gain[:, None]


def _gain_again(W_enc, gain):
    return gain[:, None] * W_enc


def _gain_on_columns(W_enc, gain):
    return W_enc / gain


def _unchanged(W_enc, gain):
    return W_enc


@exercise(
    "7.6",
    title="With the gain or without",
    difficulty=3,
    importance=4,
    minutes=10,
    stub=STUB_76,
    reference=for_mlp_in,
    hints=[
        "Write down both pre-activations, and ask that they be equal for every x.",
        "The gain multiplies the input's numbers, so row i of W_enc has to be divided by it.",
    ],
    wrong=[
        (_gain_again, "the way back"),
        (_gain_on_columns, "first axis"),
        (_unchanged, "count the gain twice"),
    ],
)
def check_76(answer) -> None:
    W_enc, gain = draw(6, 6, seed=0), 1.5 + 0.4 * draw(6, seed=1)
    got = answer(W_enc.clone(), gain.clone())
    expect_none_of(
        got,
        (
            gain[:, None] * W_enc,
            "You multiply by the gain. That is the way back: `mlp_in` has the gain already, so "
            "the encoder has to take it out.",
        ),
        (
            W_enc / gain,
            "The gain divides the latents: it belongs to the d numbers that are read, the "
            "first axis of W_enc.",
        ),
        (W_enc * gain, "The gain multiplies the latents: divide the rows of W_enc by it."),
        (W_enc, "The encoder is unchanged, so it would count the gain twice."),
        (W_enc / (1 + gain)[:, None], "`gain` is 1 + w already: do not add the 1 again."),
    )
    x = draw(4, 6, seed=2)
    expect_close(got, W_enc / gain[:, None], "Compare x @ W_enc with (x · gain) @ yours.", 1e-4)
    expect_close((x * gain) @ got, x @ W_enc, "The pre-activations should not change.", 1e-3)


# -- 7.7 -------------------------------------------------------------------------------------

STUB_77 = '''\
def predict_with_skip(x, f, W_dec, b_dec, W_skip):
    """What a skip transcoder predicts from its input x and its latents f.

    x: (rows, d_in); f: (rows, latents); W_dec: (latents, d_out); b_dec: (d_out,);
    W_skip: (d_out, d_in), as files hold it. Returns (rows, d_out).
    """
    ...
'''


def predict_with_skip(x, f, W_dec, b_dec, W_skip):
    """Paulo and others 2025: the linear part goes around the latents."""
    return f @ W_dec + b_dec + x @ W_skip.T


def _skip_on_the_wrong_side(x, f, W_dec, b_dec, W_skip):
    return f @ W_dec + b_dec + x @ W_skip


def _identity_skip(x, f, W_dec, b_dec, W_skip):
    return f @ W_dec + b_dec + x


def _no_skip(x, f, W_dec, b_dec, W_skip):
    return f @ W_dec + b_dec


@exercise(
    "7.7",
    title="Around the latents",
    difficulty=1,
    importance=3,
    minutes=5,
    stub=STUB_77,
    reference=predict_with_skip,
    hints=[
        "Three summands: what the latents write, the bias, and what goes around.",
        "Look at the shape of W_skip: which of its axes has to meet x?",
    ],
    wrong=[
        (_skip_on_the_wrong_side, "multiply by its transpose"),
        (_identity_skip, "adds x itself"),
        (_no_skip, "skip path is missing"),
    ],
)
def check_77(answer) -> None:
    x, f, W_dec, b_dec, W_skip = (
        draw(4, 5, seed=0),
        draw(4, 9, seed=1).relu(),
        draw(9, 5, seed=2),
        draw(5, seed=3),
        draw(5, 5, seed=4),
    )
    got = answer(*(each.clone() for each in (x, f, W_dec, b_dec, W_skip)))
    latents = f @ W_dec + b_dec
    expect_none_of(
        got,
        (
            latents + x @ W_skip,
            "W_skip is (d_out, d_in), as in `nn.Linear`: multiply by its transpose. With "
            "d_in = d_out a wrong side goes unnoticed.",
        ),
        (latents, "The skip path is missing."),
        (latents + x, "This adds x itself: the skip path is a matrix, W_skip."),
        (
            latents + latents @ W_skip.T,
            "W_skip is applied to what the latents write: it reads x, around them.",
        ),
        (x @ W_skip.T + b_dec, "The latents are missing."),
        (f @ W_dec + x @ W_skip.T, "The bias b_dec is missing."),
    )
    expect_close(got, latents + x @ W_skip.T, "Latents, bias, and x through W_skip.", 1e-4)
