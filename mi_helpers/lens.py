"""Lenses: the next token as the residual stream would have it at every depth.

    at = (rows, positions)                                   # the tokens to read
    stream = read_stream(model, ids, at)                     # (depths, n, d_model)
    read_out(model, stream).rank                             # of the final answer, at each depth
    lens, _ = train_tuned_lens(model, sample_stream(model, texts, 8_000))
    read_out(model, stream, lens=lens).kl                    # KL(final ‖ lens), nats

*Depth* 0 is the stream as it enters the first block (the embedding), depth d the stream after d
blocks; the last depth is the model's own output. `mi_helpers.attribution` splits the same logits
into what each part of the model wrote.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

from mi_helpers.arguments import indices, number, shown, tensor, token_ids, whole
from mi_helpers.files import RunError, load_tensors, read_json, save_tensors, write_json
from mi_helpers.layouts import Key, ModelError
from mi_helpers.models import At, LanguageModel, activations_at

LENS_SITES = ("resid_post", "resid_mid", "attn_out", "mlp_out")
MOST_LOGITS = 2**29  # `logit_lens` returns at most so many: 2 GB in float32
LONGEST = 128  # tokens of each text that `sample_stream` reads
AT_ONCE = 2**24  # logits in memory at a time where only a summary is kept: 64 MB in float32

# -- the stream ------------------------------------------------------------------------------


def depth_names(model: LanguageModel) -> list[str]:
    """ "embed", then the number of the block just left: n_layers + 1 names."""
    return ["embed", *(str(layer) for layer in range(model.n_layers))]


def depth_keys(model: LanguageModel) -> list[Key]:
    """The site of each depth: the input of block 0, then the output of each block."""
    return [("resid_pre", 0), *(("resid_post", layer) for layer in range(model.n_layers))]


def read_stream(model: LanguageModel, ids: Tensor, at: At, size: int = 64) -> Tensor:
    """The stream at n tokens and every depth, (n_layers + 1, n, d_model).

    Args:
        ids: (texts, pos), padded on the right if need be.
        at: rows (n,) and positions (n,) of the tokens.
        size: texts per batch.
    """
    found = activations_at(model, ids, at, depth_keys(model), size)
    return torch.stack([found[key] for key in depth_keys(model)])


def beginning(model: LanguageModel, text: str, longest: int = LONGEST) -> Tensor:
    """A text's first tokens, (pos,), BOS included: at most `longest`, and what the context holds.

    Raises:
        ModelError: an empty text, or a length below 1.
    """
    whole("longest", longest, 1)
    row, bos = model.encode(text), model.tokenizer.bos_token_id
    row = row if bos is None or row[0] == bos else [bos, *row]
    return model.ids(row[: min(longest, model.n_ctx)])[0]


def sample_stream(model: LanguageModel, texts: Iterable[str], n: int, seed: int = 0) -> Tensor:
    """The stream at n random tokens of texts, (n_layers + 1, n, d_model).

    The tokens are drawn from the first 2n of the texts, of which `LONGEST` at most from each. The
    first token of a text is never read.

    Raises:
        ModelError: the texts have fewer than n tokens.
    """
    whole("n", n, 1)
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        raise ModelError(f"texts is {shown(texts)}: expected several texts.")
    rows, count = [], 0
    for text in texts:
        rows.append(beginning(model, text))
        count += len(rows[-1]) - 1
        if count >= 2 * n:
            break
    if count < max(n, 1):
        raise ModelError(f"The texts have {count} tokens after their first: give at least {n}.")
    row = torch.cat([torch.full((len(ids) - 1,), i) for i, ids in enumerate(rows)])
    position = torch.cat([torch.arange(1, len(ids)) for ids in rows])
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n]
    return read_stream(model, model.pad(rows), (row[chosen], position[chosen]))


# -- the logit lens --------------------------------------------------------------------------


@torch.no_grad()
def logit_lens(
    model: LanguageModel,
    tokens: str | list | Tensor,
    site: str = "resid_post",
    pos: int | slice | list[int] | None = None,
    lens: TunedLens | None = None,
    softcap: bool = True,
) -> Tensor:
    """softcap(W_U norm_final(h)) for the stream h of every depth, (depths, batch, pos, d_vocab).

    Args:
        site: "resid_post" reads depths 0 to n_layers, n_layers + 1 of them, the last being the
            model's own logits; "resid_mid", "attn_out" and "mlp_out" read those of each layer.
        pos: these positions only; an int drops the axis.
        lens: a `TunedLens` to pass the stream through first.
        softcap: False leaves out Gemma's final soft-cap, as many tools do: the order of the tokens
            stays the same, their probabilities change.

    Raises:
        ModelError: no such site; more logits than `MOST_LOGITS` (`read_out` keeps none of them).

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    if site not in LENS_SITES:
        raise ModelError(f"The lens reads the site {', '.join(LENS_SITES)}, not {site!r}.")
    check_lens(lens, model)
    if lens is not None and site != "resid_post":
        raise ModelError(f"A tuned lens is trained on what leaves a block, not on {site!r}.")
    keys = depth_keys(model) if site == "resid_post" else [(site, i) for i in range(model.n_layers)]
    _, cache = model.run_with_cache(tokens, keys, stop_at_layer=model.n_layers, pos=pos)
    read = [cache[key] for key in keys]  # each (batch, pos, d_model)
    count = len(read) * read[0][..., 0].numel() * model.d_vocab
    if count > MOST_LOGITS:
        raise ModelError(
            f"That would be {count:.1e} logits ({count * 4 / 1e9:.0f} GB): choose positions with "
            "`pos`, or use `read_stream` and `read_out`, which keep only what you ask about."
        )
    if lens is not None:
        read = [lens(x, depth) for depth, x in enumerate(read)]
    return torch.stack([model.unembed(x, softcap=softcap) for x in read])


@dataclass(frozen=True)
class Readout:
    """A lens at n tokens, depth by depth; every field is (depths, n).

    top      the token with the highest logit
    rank     the place of the target in the lens' order, 1 the first
    p        the target's probability
    entropy  of the lens' distribution, nats
    kl       KL(final ‖ lens): the cost of stopping here, nats; 0 at the last depth
    """

    top: Tensor
    rank: Tensor
    p: Tensor
    entropy: Tensor
    kl: Tensor


@torch.no_grad()
def read_out(
    model: LanguageModel,
    stream: Tensor,
    target: Tensor | None = None,
    lens: TunedLens | None = None,
    softcap: bool = True,
) -> Readout:
    """A summary of what a lens reads in a stream (depths, n, d_model), without its logits.

    Args:
        target: token ids (n,) whose rank and probability are wanted; by default the model's own
            final answers, which are the likeliest tokens at the last depth.
        lens, softcap: as in `logit_lens`.

    Raises:
        ModelError: a stream or targets of another shape, NaN, or a lens of another model.
    """
    check_stream(model, stream, target)
    check_lens(lens, model)
    size = max(1, AT_ONCE // model.d_vocab)
    parts = []
    for start in range(0, stream.shape[1], size):
        some = stream[:, start : start + size]
        final = _log_probs(model, some[-1], softcap=softcap)
        goal = final.argmax(-1) if target is None else target[start : start + size].to(final.device)
        of_depth = (_log_probs(model, x, d, lens, softcap) for d, x in enumerate(some))
        parts.append([_summary(log_p, final, goal) for log_p in of_depth])
    fields = [
        torch.stack([torch.cat([part[depth][i] for part in parts]) for depth in range(len(stream))])
        for i in range(5)
    ]
    return Readout(*fields)


def check_stream(model: LanguageModel, stream: Tensor, target: Tensor | None = None) -> None:
    """Refuse a stream that is not of every depth, and targets that are not one id for each token.

    Raises:
        ModelError: what is expected, and what was given.
    """
    tensor("stream", stream, "depths n d_model", model)
    if target is None:
        return
    if not isinstance(target, Tensor) or target.shape != stream.shape[1:2]:
        raise ModelError(
            f"target is {shown(target)}: expected token ids ({stream.shape[1]},), one for each."
        )
    tensor("target", target, "n", {}, kind="ids")
    token_ids("target", target, model.d_vocab)


def check_lens(lens: TunedLens | None, model: LanguageModel) -> None:
    """Refuse what is no tuned lens of the model.

    Raises:
        ModelError: it is something else, or belongs to another model.
    """
    if lens is not None and not isinstance(lens, TunedLens):
        raise ModelError(f"lens is {shown(lens)}: expected a TunedLens, or None.")
    if lens is not None:
        lens.check(model)


def _log_probs(
    model: LanguageModel, x: Tensor, depth: int | None = None, lens=None, softcap: bool = True
) -> Tensor:
    """log softmax(lens(x)), (n, d_vocab), float32."""
    x = x if lens is None else lens(x, depth)
    return F.log_softmax(model.unembed(x, softcap=softcap).float(), -1)


def _summary(log_p: Tensor, final: Tensor, goal: Tensor) -> tuple[Tensor, ...]:
    """One depth's fields of a `Readout`, each (n,), from log-probabilities (n, d_vocab)."""
    of_goal = log_p.gather(-1, goal[:, None])
    p = log_p.exp()
    return (
        log_p.argmax(-1),
        (log_p > of_goal).sum(-1) + 1,
        of_goal[:, 0].exp(),
        -(p * log_p).sum(-1),
        (final.exp() * (final - log_p)).sum(-1),
    )


@torch.no_grad()
def top_tokens(
    model: LanguageModel,
    stream: Tensor,
    k: int = 5,
    lens: TunedLens | None = None,
    softcap: bool = True,
) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens at each depth: probabilities and ids, both (depths, n, k)."""
    check_stream(model, stream)
    check_lens(lens, model)
    whole("k", k, 1, model.d_vocab)
    size = max(1, AT_ONCE // model.d_vocab)
    best = []
    for depth, x in enumerate(stream):
        some = [_log_probs(model, c, depth, lens, softcap).topk(k, -1) for c in x.split(size)]
        best.append([torch.cat(each) for each in zip(*some, strict=True)])
    values, ids = (torch.stack(each) for each in zip(*best, strict=True))
    return values.exp(), ids


@torch.no_grad()
def ranks(
    model: LanguageModel,
    stream: Tensor,
    target: Tensor,
    lens: TunedLens | None = None,
    among: Tensor | None = None,
) -> Tensor:
    """The rank of each token's target at every depth, (depths, n), 1 the first.

    The same as `read_out(...).rank`, in a fraction of the time.

    Args:
        target: token ids (n,).
        among: ids (k,) of the only tokens that count, such as all names of countries; the targets
            are some of them.
    """
    if target is None:
        raise ModelError("target is None: expected token ids, one for each of the stream's.")
    check_stream(model, stream, target)
    check_lens(lens, model)
    if among is not None:
        among = torch.tensor(token_ids("among", among, model.d_vocab), device=stream.device)
    size, parts = max(1, AT_ONCE // model.d_vocab), []
    for depth, x in enumerate(stream):
        for start in range(0, len(x), size):
            some = x[start : start + size]
            some = some if lens is None else lens(some, depth)
            logits = model.unembed(some, softcap=False)
            goal = logits.gather(-1, target[start : start + size, None].to(logits.device))
            counted = logits if among is None else logits[:, among]
            parts.append((counted > goal).sum(-1) + 1)
    return torch.cat(parts).reshape(len(stream), -1)


def first_depth(rank: Tensor) -> Tensor:
    """The first depth at which the target has rank 1, (n,); `depths` if it never has.

    Args:
        rank: (depths, n), as from `ranks`.
    """
    first = tensor("rank", rank, "depths n", {}, kind="ids") == 1
    return torch.where(first.any(0), first.int().argmax(0), len(rank))


def settled_depth(rank: Tensor) -> Tensor:
    """The first depth from which the target has rank 1 up to the last depth, (n,); `depths` if it
    has another rank at the last.

    Args:
        rank: (depths, n), as from `ranks`.
    """
    wrong = (tensor("rank", rank, "depths n", {}, kind="ids") != 1).flip(0)  # from the end
    return len(rank) - torch.where(wrong.any(0), wrong.int().argmax(0), len(rank))


def shares(depth: Tensor, depths: int) -> Tensor:
    """How often each depth occurs among depth (n,), (depths + 1,): the last entry is 'never'."""
    whole("depths", depths, 1)
    if not isinstance(depth, Tensor) or depth.shape != (0,):
        indices(tensor("depth", depth, "n", {}, kind="ids"), depths + 1, "depth")
    return torch.bincount(depth, minlength=depths + 1) / max(1, len(depth))


# -- the tuned lens --------------------------------------------------------------------------


class TunedLens(nn.Module):
    """One affine map per depth: lens(h, d) = h + W_d h + b_d, and h itself at the last depth.

    weight  (n_layers, d_model, d_model), bias (n_layers, d_model): zero at first, so that an
            untrained tuned lens is the logit lens

    Source: Belrose et al. 2023, Eliciting Latent Predictions from Transformers with the Tuned Lens.
    """

    def __init__(self, n_layers: int, d_model: int, name: str = ""):
        super().__init__()
        self.n_layers, self.d_model, self.name = n_layers, d_model, name
        self.weight = nn.Parameter(torch.zeros(n_layers, d_model, d_model))
        self.bias = nn.Parameter(torch.zeros(n_layers, d_model))

    def forward(self, h: Tensor, depth: int) -> Tensor:
        """The stream h (..., d_model) of a depth, as it would be at the last one; same dtype.

        Raises:
            ModelError: a stream of another width, or a depth that the lens has not.
        """
        if not isinstance(h, Tensor) or not h.ndim:
            raise ModelError(f"h is {shown(h)}: expected a stream (..., {self.d_model}).")
        if h.shape[-1] != self.d_model:
            raise ModelError(
                f"This lens reads a stream {self.d_model} wide, and was given one of "
                f"{h.shape[-1]}: it belongs to {self.name or 'another model'}."
            )
        if isinstance(depth, bool) or depth not in range(self.n_layers + 1):
            raise ModelError(f"There is no depth {depth}: this lens has 0 to {self.n_layers}.")
        if depth == self.n_layers:
            return h
        x = h.to(self.weight.dtype)
        return (x + x @ self.weight[depth].T + self.bias[depth]).to(h.dtype)

    def save(self, folder: str | Path) -> None:
        """Write lens.safetensors and cfg.json, each whole or not at all.

        Raises:
            RunError: the disk is full, or the folder cannot be written.
        """
        folder = Path(folder)
        weights = {"weight": self.weight, "bias": self.bias}
        save_tensors(folder / "lens.safetensors", weights)
        about = {"n_layers": self.n_layers, "d_model": self.d_model, "model": self.name}
        write_json(folder / "cfg.json", {"kind": "tuned lens", "version": 1} | about)

    @classmethod
    def load(cls, folder: str | Path, model: LanguageModel | None = None) -> TunedLens:
        """The lens in a folder that `save` wrote; with `model`, checked against it.

        Raises:
            RunError: a file is missing or damaged.
            ModelError: the folder holds something else, or the lens does not fit the model.
        """
        folder = Path(folder)
        advice = "Train the lens again, and save it."
        about = read_json(folder / "cfg.json", n_layers=int, d_model=int, model=str)
        if not {"kind", "n_layers", "d_model"} <= set(about) or about["kind"] != "tuned lens":
            raise ModelError(f"{folder} holds no tuned lens: its cfg.json does not describe one.")
        tensors, _ = load_tensors(folder / "lens.safetensors", advice=advice)
        n, d = about["n_layers"], about["d_model"]
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        wanted = {"weight": (n, d, d), "bias": (n, d)}
        if shapes != wanted:
            raise RunError(
                f"{folder / 'lens.safetensors'} has weights {shapes}, but cfg.json says {wanted}. "
                f"{advice}"
            )
        if not all(x.is_floating_point() and bool(x.isfinite().all()) for x in tensors.values()):
            raise RunError(
                f"{folder / 'lens.safetensors'} holds NaN, infinity or whole numbers. {advice}"
            )
        lens = cls(n, d, about.get("model", ""))
        lens.load_state_dict(tensors)
        if model is not None:
            lens.check(model)
        return lens.requires_grad_(False)

    def check(self, model: LanguageModel) -> None:
        """Raise ModelError if this lens cannot belong to `model`."""
        own, other = (self.n_layers, self.d_model), (model.n_layers, model.d_model)
        if own != other:
            raise ModelError(
                f"This lens is for {own[0]} layers of width {own[1]} ({self.name or 'unnamed'}), "
                f"and {model.name} has {other[0]} of width {other[1]}: train one for it."
            )


def train_tuned_lens(
    model: LanguageModel,
    stream: Tensor,
    steps: int = 150,
    size: int = 128,
    lr: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[TunedLens, list[float]]:
    """A `TunedLens` trained on a stream: at each depth, the least mean of KL(final ‖ lens).

    `final` is the model's own distribution at the token. Adam, `size` tokens a step.

    Args:
        stream: (n_layers + 1, n, d_model), as from `sample_stream`.
        lr: the learning rate at the first step; it falls linearly to 0. By default 0.7 / d_model,
            so that a step can turn the stream of a wide model as far as that of a narrow one.
        progress: whether a bar is shown.

    Returns:
        the lens, and the loss of each step: nats, mean over the depths.

    Source: Belrose et al. 2023.
    """
    sizes = {"d_model": model.d_model}
    tensor("stream", stream, f"{model.n_layers + 1} tokens d_model", sizes)
    for what, given in (("steps", steps), ("size", size)):
        whole(what, given, 1)
    if lr is not None:
        number("lr", lr, above=0)
    lr = 0.7 / model.d_model if lr is None else lr
    lens = TunedLens(model.n_layers, model.d_model, model.name).to(stream.device)
    optimizer = torch.optim.Adam(lens.parameters(), lr=lr, betas=(0.9, 0.99))
    rng = torch.Generator().manual_seed(seed)
    losses = []
    for step in trange(steps, desc="steps", disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        some = stream[:, torch.randint(stream.shape[1], (size,), generator=rng)]
        with torch.no_grad():
            final = _log_probs(model, some[-1])
        optimizer.zero_grad()
        total = 0.0
        for depth in range(model.n_layers):  # one at a time: only one set of logits in memory
            log_p = _log_probs(model, some[depth], depth, lens)
            loss = F.kl_div(log_p, final, reduction="batchmean", log_target=True)
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total / model.n_layers)
    return lens.requires_grad_(False), losses
