"""Direct logit attribution: a logit as a sum of what each part of the model wrote.

    split = direct_logit_attribution(model, "The Eiffel Tower is in the city of", " Paris", " Rome")
    split.mean()                                             # {"embed": …, "L0 attention": …, …}
    split.relative_error                                     # completeness: about 1e-7

Every part adds a vector to the residual stream, and the final norm and the unembedding read the
sum. With the norm's scale *frozen* at its value for the whole stream that reading is linear, so
that the logit before the soft-cap is a sum over the parts, exactly.

Source: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mi_helpers.arguments import (
    exact,
    indices,
    one_of,
    padding_token,
    prompt_rows,
    tensor,
    token_ids,
)
from mi_helpers.layouts import Key, ModelError, norm_gain
from mi_helpers.models import LanguageModel, activations_at

AT_ONCE = 2**24  # logits in memory at a time: 64 MB in float32
UNITS = ("component", "head")


@dataclass(frozen=True)
class Attribution:
    """What each part of the model adds to a logit, or to a difference of two.

    names  of the terms; terms (n, len(names)), float64 (float32 on MPS), in logits
    logit  (n,), the model's own, before the soft-cap: what the terms should sum to
    """

    names: tuple[str, ...]
    terms: Tensor
    logit: Tensor

    @property
    def error(self) -> float:
        """Completeness: the largest |sum of the terms - logit| of the n prompts."""
        return float((self.terms.sum(-1) - self.logit).abs().max())

    @property
    def relative_error(self) -> float:
        """`error` over the largest |logit|: the rounding of a float32 is about 1e-7 of it."""
        return self.error / float(self.logit.abs().max())

    def mean(self) -> dict[str, float]:
        """{name: mean over the prompts}, in the order of the model."""
        return dict(zip(self.names, self.terms.mean(0).tolist(), strict=True))

    def heads(self) -> Tensor:
        """The heads' terms, (n, n_layers, n_heads).

        Raises:
            ModelError: this is an attribution to components.
        """
        chosen = [i for i, name in enumerate(self.names) if " head " in name]
        if not chosen:
            raise ModelError('There are no heads in this attribution: ask for unit="head".')
        layers = 1 + max(int(self.names[i].split()[0][1:]) for i in chosen)
        return self.terms[:, chosen].unflatten(1, (layers, -1))


@torch.no_grad()
def direct_logit_attribution(
    model: LanguageModel,
    tokens: str | list | Tensor,
    answer: str | int | Sequence | Tensor,
    wrong: str | int | Sequence | Tensor | None = None,
    unit: str = "component",
    pos: int | Tensor = -1,
    post_norm: bool = True,
) -> Attribution:
    """The logit of `answer`, less that of `wrong`, split into what each part wrote to the stream.

        logit = norm_final(Σ parts) · u = Σ part · v  (+ biases),  v = gain ⊙ u / scale

    with u = W_U[:, answer] - W_U[:, wrong], and `scale` the final norm's on the whole stream (its
    root mean square, or its standard deviation), the same for all parts. For a LayerNorm each part
    is centred, and its bias is a term of its own.

    Args:
        tokens: one text, several of equal length, or ids (n, pos), padded on the right if need be.
        answer, wrong: a text that is one token, or an id; or one for each of the n prompts.
        unit: "component" (embedding, attention and MLP of each layer) or "head" (each head, the
            output bias of attention where there is one, each MLP).
        pos: the position to read, or one for each prompt (n,); a negative one counts from the end
            of each prompt, whatever it is padded with.
        post_norm: False leaves out the norm after attention (see `head_writes`): a mistake, to see
            its size.

    Raises:
        ModelError: no such unit; answers of several tokens, or not one per prompt, or equal; a
            position out of range.
    """
    one_of("unit", unit, UNITS)
    rows = _rows(model, tokens, pos)
    ids, n = model.pad(rows), len(rows)
    right = _token_ids(model, answer, n, "answer")
    other = None if wrong is None else _token_ids(model, wrong, n, "wrong")
    if other is not None and (right == other).any():
        raise ModelError("The answer and the wrong answer are the same token in some prompt.")
    at = torch.arange(n, device=ids.device), _positions(pos, rows).to(ids.device)
    parts, final = written_parts(model, ids, at, unit, post_norm)
    v, constants = answer_direction(model, final, right, other)
    sums = {name: (part * v).sum(-1) for name, part in parts.items()} | constants
    logit = answer_logit(model, final, right, other)
    return Attribution(tuple(sums), torch.stack(list(sums.values()), 1), logit)


def written_parts(
    model: LanguageModel,
    ids: Tensor,
    at: tuple[Tensor, Tensor],
    unit: str = "component",
    post_norm: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """What each part wrote to the stream at n tokens, and the stream itself.

    Args:
        ids: (texts, pos); at: rows (n,) and positions (n,) of the tokens.
        unit, post_norm: as in `direct_logit_attribution`.

    Returns:
        {name: (n, d_model)}, float64 (float32 on MPS); and their sum as the model has it, the
        stream before the final norm, (n, d_model).
    """
    one_of("unit", unit, UNITS)
    inside = "z" if unit == "head" else "attn_out"
    sites = ["embed", inside, "mlp_out", "resid_final"]
    sites += ["pos_embed"] if model.layout.pos_embed else []
    found: dict[Key, Tensor] = activations_at(model, ids, at, sites)
    parts = {"embed": exact(found["embed", None])}
    if model.layout.pos_embed:
        parts["position"] = exact(found["pos_embed", None])
    for layer in range(model.n_layers):
        x = found[inside, layer]
        if unit == "head":
            heads, bias = head_writes(model, x, layer, post_norm)
            for head in range(model.n_heads):
                parts[f"L{layer} head {head}"] = heads[:, head]
            if bias is not None:
                parts[f"L{layer} attention bias"] = bias
        else:
            parts[f"L{layer} attention"] = exact(x)
        parts[f"L{layer} MLP"] = exact(found["mlp_out", layer])
    return parts, found["resid_final", None]


def answer_direction(
    model: LanguageModel, final: Tensor, answer: Tensor, wrong: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The direction in the stream that raises the answer's logit, with the final norm frozen.

    Args:
        final: the whole stream before the final norm, (n, d_model).
        answer, wrong: token ids, (n,).

    Returns:
        v (n, d_model), float64 (float32 on MPS), with logit = final · v + constants; the constants
        by name, (n,): the biases of the final norm and of the unembedding, where the model has
        them.
    """
    tensor("final", final, "n d_model", model)
    answer, wrong = _ids_for(model, final, answer, wrong)  # pyright: ignore[reportAssignmentType]
    u = exact(model.W_U.T[answer])
    u = u if wrong is None else u - exact(model.W_U.T[wrong])  # (n, d_model)
    constants = {}
    if getattr(model.ln_final, "bias", None) is not None:
        constants["final norm bias"] = u @ exact(model.ln_final.bias)
    if (bias := model.lm_head.bias) is not None:
        of_wrong = 0.0 if wrong is None else exact(bias[wrong])
        constants["unembedding bias"] = exact(bias[answer]) - of_wrong
    return stream_direction(model, final, u), constants


def stream_direction(model: LanguageModel, final: Tensor, u: Tensor) -> Tensor:
    """v with norm_final(x) · u = x · v (+ the norm's bias), the norm frozen at the stream `final`.

    Args:
        final: (n, d_model), the whole stream before the final norm.
        u: (n, d_model), a direction after it, such as a column of W_U.

    Returns:
        v = gain ⊙ u / scale, less its mean for a LayerNorm, (n, d_model), float64 (float32 on MPS).
    """
    tensor("final", final, "n d_model", model)
    tensor("u", u, "n d_model", {"n": len(final), "d_model": model.d_model})
    scale, centred = frozen_scale(model.ln_final, exact(final))
    v = scale * exact(norm_gain(model.ln_final)) * exact(u)
    return v - v.mean(-1, keepdim=True) if centred else v


def frozen_scale(norm: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """The factor by which a norm multiplies x (..., d_model) before its gain, in x's dtype.

    Returns:
        1 / √(mean x² + ε), (..., 1), of x less its mean for a LayerNorm; and whether the norm
        subtracts the mean first (LayerNorm) or not (RMSNorm).
    """
    tensor("x", x, "... d_model", {"d_model": norm.weight.shape[0]})
    centred = isinstance(norm, nn.LayerNorm)
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    x = x - x.mean(-1, keepdim=True) if centred else x
    return (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt(), centred


def head_writes(
    model: LanguageModel, z: Tensor, layer: int, post_norm: bool = True
) -> tuple[Tensor, Tensor | None]:
    """What each head of a layer adds to the stream: z_h W_O,h, whose sum with the bias is attn_out.

    In a model with a norm after attention (Gemma 2) that norm scales each head's vector by the
    factor by which it scales their sum:  z_h W_O,h ⊙ gain_post / rms(Σ z_h W_O,h).

    Args:
        z: (..., n_heads, d_head).
        post_norm: False leaves that norm out.

    Returns:
        the heads' vectors, (..., n_heads, d_model), float64 (float32 on MPS); the vector of the
        output bias, (..., d_model), or None where there is none.
    """
    tensor("z", z, "... n_heads d_head", model)
    heads = torch.einsum("...hi,hid->...hd", exact(z), exact(model.weight("W_O", layer)))
    bias = model.part("o", layer).bias
    bias = None if bias is None else exact(bias).expand_as(heads[..., 0, :])
    norm = model.part("ln1_post", layer)
    if norm is None or not post_norm:
        return heads, bias
    whole = heads.sum(-2) if bias is None else heads.sum(-2) + bias
    gain = frozen_scale(norm, whole)[0] * exact(norm_gain(norm))  # (..., d_model)
    return heads * gain.unsqueeze(-2), None if bias is None else bias * gain


@torch.no_grad()
def answer_logit(
    model: LanguageModel, final: Tensor, answer: Tensor, wrong: Tensor | None = None
) -> Tensor:
    """The model's logit of the answer before the soft-cap, less that of the wrong one, (n,).

    Args:
        final: the stream before the final norm, (n, d_model).
        answer, wrong: token ids, (n,).
    """
    tensor("final", final, "n d_model", model)
    answer, wrong = _ids_for(model, final, answer, wrong)  # pyright: ignore[reportAssignmentType]
    size, parts = max(1, AT_ONCE // model.d_vocab), []
    for start in range(0, len(final), size):
        some = slice(start, start + size)
        logits = model.unembed(final[some], softcap=False)
        value = exact(logits.gather(1, answer[some, None])[:, 0])
        value -= 0.0 if wrong is None else exact(logits.gather(1, wrong[some, None])[:, 0])
        parts.append(value)
    return torch.cat(parts)


def _rows(model: LanguageModel, tokens, pos) -> list[Tensor]:
    """The prompts without padding, which no position from the start needs to be told from text."""
    each = pos if isinstance(pos, list | tuple) or getattr(pos, "ndim", 0) else [pos]
    from_start = all(isinstance(p, int | Tensor) and p >= 0 for p in each)
    if from_start and isinstance(tokens, Tensor) and padding_token(model) is None:
        return list(model.ids(tokens))
    return prompt_rows(model, tokens, "The tokens")


def _positions(pos, rows: Sequence[Tensor]) -> Tensor:
    """One position for each prompt, (n,), counted from its start."""
    many = isinstance(pos, list | tuple) or (isinstance(pos, Tensor) and pos.ndim)
    each = list(pos) if many else [pos] * len(rows)
    if len(each) != len(rows):
        raise ModelError(f"`pos` has {len(each)} entries for {len(rows)} prompts: give one each.")
    found = [indices(p, len(row), "position")[0] for p, row in zip(each, rows, strict=True)]
    return torch.tensor(found)


def _ids_for(model: LanguageModel, final: Tensor, answer, wrong) -> tuple[Tensor, Tensor | None]:
    """Answer and wrong answer as token ids (n,), one for each row of `final`; None stays None."""

    def ids(what: str, given) -> Tensor:
        found = token_ids(what, given, model.d_vocab)
        if len(found) != len(final):
            raise ModelError(
                f"{what} has {len(found)} ids for {len(final)} rows: give one for each."
            )
        return torch.tensor(found, device=model.device)

    return ids("answer", answer), None if wrong is None else ids("wrong", wrong)


def _token_ids(model: LanguageModel, given, n: int, name: str) -> Tensor:
    """One token id per prompt, (n,), from a text, an id, or a list of either."""
    each = given if isinstance(given, list | tuple) else None
    if isinstance(given, Tensor):
        each = given.reshape(-1).tolist() if given.ndim else None
    each = [given] * n if each is None else each
    if len(each) != n:
        raise ModelError(f"`{name}` has {len(each)} entries for {n} prompts: give one, or {n}.")
    ids = [model.to_single_token(x) if isinstance(x, str) else x for x in each]
    return torch.tensor(token_ids(f"`{name}`", ids, model.d_vocab), device=model.device)
