"""Lenses: what the stream already says about the next token, and which parts said it.

    at = (rows, positions)                                   # which tokens are read
    stream = read_stream(model, ids, at)                     # (depths, n, d_model)
    read_out(model, stream).rank                             # of the final answer, at each depth
    lens, _ = train_tuned_lens(model, sample_stream(model, 8_000))
    read_out(model, stream, lens=lens).kl                    # KL(final ‖ lens), nats

*Depth* 0 is the stream as it enters the first block (the embedding), depth d the stream after d
blocks; the last depth is the model's own output. `direct_logit_attribution` splits the same logits
into what each component, or each head, wrote.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_helpers.ablation import SITE, answer_positions, lesion, part_name
from mi_helpers.files import RunError, load_tensors, read_json, save_tensors, write_json
from mi_helpers.layouts import Key, ModelError, norm_gain
from mi_helpers.loading import load_model, untrained
from mi_helpers.models import LanguageModel
from mi_helpers.tiny_gemma.skills import is_own_city
from mi_helpers.tinyworld import lexicon
from mi_helpers.tinyworld.facts import city_country
from mi_helpers.tinyworld.source import Document
from mi_helpers.tinyworld.tokenizer import offsets
from mi_helpers.tinyworld.world import World

At = tuple[Tensor, Tensor]  # rows (n,), positions (n,): the n tokens ids[rows, positions]
LENS_SITES = ("resid_post", "resid_mid", "attn_out", "mlp_out")
MOST_LOGITS = 2**29  # what `logit_lens` returns at most: 2 GB in float32
LONGEST = 128  # tokens of a text that `sample_stream` reads
AT_ONCE = 2**24  # logits held at a time where only a summary is kept: 64 MB in float32

# ---------------------------------------------------------------------------------- the stream


def depth_names(model: LanguageModel) -> list[str]:
    """ "embed", then the number of the block that the stream has left: n_layers + 1 names."""
    return ["embed", *(str(layer) for layer in range(model.n_layers))]


def depth_keys(model: LanguageModel) -> list[Key]:
    """The site of each depth: what enters block 0, and what leaves each block."""
    return [("resid_pre", 0), *(("resid_post", layer) for layer in range(model.n_layers))]


@torch.no_grad()
def read_sites(
    model: LanguageModel, ids: Tensor, at: At, sites: Sequence[str | Key], size: int = 64
) -> dict[Key, Tensor]:
    """Activations at n tokens, {(site, layer): (n, ...)}; token j is ids[at[0][j], at[1][j]].

    Texts are run `size` at a time, those of about equal length together, each batch cut after the
    last token that is read: with causal attention nothing after it matters.
    """
    rows, positions = (torch.as_tensor(x, device=ids.device) for x in at)
    if rows.shape != positions.shape or rows.ndim != 1 or not len(rows):
        raise ModelError(
            f"`at` holds rows and positions of shapes {tuple(rows.shape)} and "
            f"{tuple(positions.shape)}, expected two equal lists of at least one number."
        )
    last = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    last = last.scatter_reduce(0, rows, positions, "amax")
    used = rows.unique()
    found: dict[Key, Tensor] = {}
    for some in used[last[used].argsort()].split(size):
        length = int(last[some].max()) + 1
        _, cache = model.run_with_cache(ids[some, :length], sites, stop_at_layer=model.n_layers)
        place = torch.empty(len(ids), dtype=torch.int64, device=ids.device)
        place[some] = torch.arange(len(some), device=ids.device)
        here = torch.isin(rows, some).nonzero()[:, 0]
        for key in cache:
            whole = cache[key].expand(len(some), *cache[key].shape[1:])  # pos_embed has no batch
            values = whole[place[rows[here]], positions[here]]
            if key not in found:
                found[key] = values.new_empty(len(rows), *values.shape[1:])
            found[key][here] = values
    return found


def read_stream(model: LanguageModel, ids: Tensor, at: At, size: int = 64) -> Tensor:
    """The stream at n tokens and every depth, (n_layers + 1, n, d_model)."""
    found = read_sites(model, ids, at, depth_keys(model), size)
    return torch.stack([found[key] for key in depth_keys(model)])


# ------------------------------------------------------------------------------- the logit lens


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
        site: "resid_post" reads depth 0 to n_layers, so n_layers + 1 of them, the last being the
            model's own logits; "resid_mid", "attn_out" and "mlp_out" read each layer's.
        pos: these positions only; an int drops the axis.
        lens: a `TunedLens` to pass the stream through first.
        softcap: False leaves out Gemma's final soft-cap, as many tools do: the order of the tokens
            stays, their probabilities change.

    Raises:
        ModelError: no such site; more logits than fit (`read_out` keeps none of them).

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    if site not in LENS_SITES:
        raise ModelError(f"The lens reads {', '.join(LENS_SITES)}, not {site!r}.")
    if lens is not None and site != "resid_post":
        raise ModelError(f"A tuned lens is trained on what leaves a block, not on {site!r}.")
    ids = model.tokens(tokens) if _is_text(tokens) else torch.as_tensor(tokens)
    keys = depth_keys(model) if site == "resid_post" else [(site, i) for i in range(model.n_layers)]
    _, cache = model.run_with_cache(ids, keys, stop_at_layer=model.n_layers, pos=pos)
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


def _is_text(tokens) -> bool:
    return isinstance(tokens[0] if isinstance(tokens, list) and tokens else tokens, str)


@dataclass(frozen=True)
class Readout:
    """What a lens says at n tokens, depth by depth; every field is (depths, n).

    top      the token with the highest logit
    rank     the place of the target in the lens' order, 1 the first
    p        the target's probability
    entropy  of the lens' distribution, nats
    kl       KL(final ‖ lens): what is lost by stopping here, nats; 0 at the last depth
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
    """Decode a stream (depths, n, d_model), and keep a summary of it instead of the logits.

    Args:
        target: token ids (n,) whose rank and probability are wanted; by default the model's own
            final answers, which are the likeliest tokens at the last depth.
        lens, softcap: as in `logit_lens`.
    """
    size = max(1, AT_ONCE // model.d_vocab)
    parts = []
    for start in range(0, stream.shape[1], size):
        some = stream[:, start : start + size]
        final = _log_probs(model, some[-1], softcap=softcap)
        goal = final.argmax(-1) if target is None else target[start : start + size].to(final.device)
        parts.append([_summary(model, some, depth, final, goal, lens, softcap)
                      for depth in range(len(some))])  # fmt: skip
    fields = [
        torch.stack([torch.cat([part[depth][i] for part in parts]) for depth in range(len(stream))])
        for i in range(5)
    ]
    return Readout(*fields)


def _log_probs(
    model: LanguageModel, x: Tensor, depth: int | None = None, lens=None, softcap: bool = True
) -> Tensor:
    """log softmax(lens(x)), (n, d_vocab), float32."""
    x = x if lens is None else lens(x, depth)
    return F.log_softmax(model.unembed(x, softcap=softcap).float(), -1)


def _summary(model, stream, depth, final, goal, lens, softcap) -> tuple[Tensor, ...]:
    """One depth's fields of a `Readout`, each (n,)."""
    log_p = _log_probs(model, stream[depth], depth, lens, softcap)
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
    """The k likeliest tokens: probabilities and ids, both (depths, n, k)."""
    if not 1 <= k <= model.d_vocab:
        raise ModelError(f"k is {k}: choose 1 to {model.d_vocab}, the size of the vocabulary.")
    size = max(1, AT_ONCE // model.d_vocab)
    best = []
    for depth, x in enumerate(stream):
        some = [_log_probs(model, c, depth, lens, softcap).topk(k, -1) for c in x.split(size)]
        best.append([torch.cat(each) for each in zip(*some, strict=True)])
    values, ids = (torch.stack(each) for each in zip(*best, strict=True))
    return values.exp(), ids


def favourites(
    model: LanguageModel, stream: Tensor, lens: TunedLens | None = None
) -> list[tuple[int, float, float]]:
    """For each depth the token that is on top at the most of n tokens: its id, at what share of
    them it is on top, and its mean probability there."""
    p, ids = (x[..., 0] for x in top_tokens(model, stream, 1, lens))
    found = []
    for at_depth, each in zip(p, ids, strict=True):
        tokens, counts = each.unique(return_counts=True)
        best = tokens[counts.argmax()]
        share, sure = counts.max() / len(each), at_depth[each == best].mean()
        found.append((int(best), float(share), float(sure)))
    return found


@torch.no_grad()
def ranks(
    model: LanguageModel,
    stream: Tensor,
    target: Tensor,
    lens: TunedLens | None = None,
    among: Tensor | None = None,
) -> Tensor:
    """The rank of each token's target at every depth, (depths, n), 1 the first.

    among: ids (k,) of the only tokens that count, such as all names of countries; the targets are
    some of them. The same as `read_out(...).rank`, for a fraction of the time.
    """
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
    """The depth at which the target first has rank 1, (n,); `depths` where it never has."""
    first = rank == 1  # (depths, n)
    return torch.where(first.any(0), first.int().argmax(0), len(rank))


def settled_depth(rank: Tensor) -> Tensor:
    """The depth from which on the target keeps rank 1 to the end, (n,); `depths` if it has not."""
    wrong = (rank != 1).flip(0)  # from the end
    return len(rank) - torch.where(wrong.any(0), wrong.int().argmax(0), len(rank))


def shares(depth: Tensor, depths: int) -> Tensor:
    """How often each depth occurs, (depths + 1,): the last entry is for 'never'."""
    return torch.bincount(depth, minlength=depths + 1) / max(1, len(depth))


# ------------------------------------------------------------------------------- the tuned lens


class TunedLens(nn.Module):
    """One affine map per depth below the last: lens(h, d) = h + W_d h + b_d; d = n_layers is h.

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
        """(..., d_model) at `depth` as the last depth would have it, same shape and dtype."""
        if h.shape[-1] != self.d_model:
            raise ModelError(
                f"This lens reads a stream {self.d_model} wide, and was given one of "
                f"{h.shape[-1]}: it belongs to {self.name or 'another model'}."
            )
        if not 0 <= depth <= self.n_layers:
            raise ModelError(f"There is no depth {depth}: this lens has 0 to {self.n_layers}.")
        if depth == self.n_layers:
            return h
        x = h.to(self.weight.dtype)
        return (x + x @ self.weight[depth].T + self.bias[depth]).to(h.dtype)

    def save(self, folder: str | Path) -> None:
        """lens.safetensors and cfg.json, each written whole or not at all.

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
        """What `save` left; with `model`, checked against it.

        Raises:
            RunError: a file is missing or damaged.
            ModelError: the folder holds something else, or the lens does not fit the model.
        """
        folder = Path(folder)
        advice = "Train the lens again, and save it."
        about = read_json(folder / "cfg.json")
        if not {"kind", "n_layers", "d_model"} <= set(about) or about["kind"] != "tuned lens":
            raise ModelError(f"{folder} holds no tuned lens: its cfg.json does not describe one.")
        tensors, _ = load_tensors(folder / "lens.safetensors", advice=advice)
        lens = cls(about["n_layers"], about["d_model"], about.get("model", ""))
        shapes = {name: tuple(x.shape) for name, x in tensors.items()}
        wanted = {name: tuple(x.shape) for name, x in lens.state_dict().items()}
        if shapes != wanted:
            raise RunError(f"{folder} has weights {shapes}, but cfg.json says {wanted}. {advice}")
        lens.load_state_dict(tensors)
        if model is not None:
            lens.check(model)
        return lens.requires_grad_(False)

    def check(self, model: LanguageModel) -> None:
        """ModelError when this lens cannot be of that model."""
        own, other = (self.n_layers, self.d_model), (model.n_layers, model.d_model)
        if own != other:
            raise ModelError(
                f"This lens is for {own[0]} layers of width {own[1]} ({self.name or 'unnamed'}), "
                f"and {model.name} has {other[0]} of width {other[1]}: train one for it."
            )


def sample_stream(model: LanguageModel, n: int, seed: int = 0, held: Iterable[str] = ()) -> Tensor:
    """The stream at n random tokens of TinyWorld's own mixture, (n_layers + 1, n, d_model).

    Never at the first token of a text. `held` names what comes from the held-out part of the world.
    """
    documents, rows, count = World().documents(seed, None, frozenset(held)), [], 0
    first = [] if model.tokenizer.bos_token_id is None else [model.tokenizer.bos_token_id]
    while count < 2 * n:
        ids = first + offsets(model.tokenizer, next(documents).text)[0]
        rows.append(torch.tensor(ids[: min(LONGEST, model.n_ctx)], device=model.device))
        count += len(rows[-1]) - 1
    ids = model.pad(rows)
    row = torch.cat([torch.full((len(ids) - 1,), i) for i, ids in enumerate(rows)])
    position = torch.cat([torch.arange(1, len(ids)) for ids in rows])
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n]
    return read_stream(model, ids, (row[chosen], position[chosen]))


def train_tuned_lens(
    model: LanguageModel,
    stream: Tensor,
    steps: int = 150,
    size: int = 128,
    lr: float | None = None,
    seed: int = 0,
) -> tuple[TunedLens, list[float]]:
    """Fit a `TunedLens` to a stream (n_layers + 1, n, d_model), with Adam, `size` tokens a step.

    Minimises, for each depth by itself, the mean over tokens of KL(final ‖ lens), where `final`
    is the model's own distribution at that token (Belrose et al. 2023).

    Args:
        lr: at the first step; it falls linearly to 0. By default 0.7 / d_model, so that a step
            can turn the stream by as much in a wide model as in a narrow one.

    Returns:
        the lens, and the loss of each step: nats, mean over the depths.
    """
    if stream.ndim != 3 or stream.shape[0] != model.n_layers + 1:
        raise ModelError(
            f"The stream has shape {tuple(stream.shape)}, expected "
            f"({model.n_layers + 1}, tokens, {model.d_model})."
        )
    lr = 0.7 / model.d_model if lr is None else lr
    lens = TunedLens(model.n_layers, model.d_model, model.name).to(stream.device)
    optimizer = torch.optim.Adam(lens.parameters(), lr=lr, betas=(0.9, 0.99))
    rng = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
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


# ------------------------------------------------------------------- direct logit attribution


@dataclass(frozen=True)
class Attribution:
    """What each part of the model adds to a logit, or to a difference of two.

    names  of the terms; terms (n, len(names)), float64, in logits
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
        """`error` over the largest |logit|: what a float32 can hold is about 1e-7 of it."""
        return self.error / float(self.logit.abs().max())

    def mean(self) -> dict[str, float]:
        """{name: mean over the prompts}, in the order of the model."""
        return dict(zip(self.names, self.terms.mean(0).tolist(), strict=True))

    def heads(self) -> Tensor:
        """(n, n_layers, n_heads), of an attribution to heads; ModelError for one to components."""
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
    """Split the logit of `answer`, less that of `wrong`, into what each part wrote to the stream.

        logit = norm_final(Σ parts) · u = Σ part · v  (+ biases),  v = gain ⊙ u / scale

    u = W_U[:, answer] - W_U[:, wrong]. The final norm is *frozen*: `scale` is the one that it had
    on the whole stream (1 / rms, or 1 / standard deviation), so that v is the same for all parts
    and the sum is exact. For a LayerNorm each part is centred, and its bias is a term of its own.
    A head's part, in a model with a norm after attention (Gemma 2), goes through that norm, frozen
    likewise:  z_h W_O,h ⊙ gain_post / rms(Σ z_h W_O,h).

    Args:
        tokens: one text, several of equal length, or ids (n, pos), padded on the right if need be.
        answer, wrong: a text that is one token, or an id; or one for each of the n prompts.
        unit: "component" (embedding, attention and MLP of each layer) or "head" (each head, the
            output bias of attention where there is one, each MLP).
        pos: where to read: a position, or one for each prompt (n,).
        post_norm: False leaves out the norm after attention: a mistake, to see its size.

    Raises:
        ModelError: no such unit; answers of several tokens, or not one per prompt, or equal.
    """
    if unit not in ("component", "head"):
        raise ModelError(f'The unit is {unit!r}: choose "component" or "head".')
    ids = model.tokens(tokens) if _is_text(tokens) else torch.as_tensor(tokens)
    ids = (ids.unsqueeze(0) if ids.ndim == 1 else ids).to(model.device)
    n = len(ids)
    where = _places(pos, n, ids.shape[1]).to(ids.device)
    sites = ["embed", "attn_out", "mlp_out", "resid_final"]
    sites += ["z"] if unit == "head" else []
    sites += ["pos_embed"] if model.layout.pos_embed else []
    found = read_sites(model, ids, (torch.arange(n), where), sites)
    right = _token_ids(model, answer, n, "answer")
    other = None if wrong is None else _token_ids(model, wrong, n, "wrong")
    if other is not None and (right == other).any():
        raise ModelError("The answer and the wrong answer are the same token in some prompt.")
    v, constants = answer_direction(model, found["resid_final", None], right, other)
    terms = {"embed": found["embed", None].double() * v}
    if model.layout.pos_embed:
        terms["position"] = found["pos_embed", None].double() * v
    for layer in range(model.n_layers):
        if unit == "head":
            heads, bias = head_writes(model, found["z", layer], layer, post_norm)
            for head in range(model.n_heads):
                terms[part_name(("head", layer, head))] = heads[:, head] * v
            if bias is not None:
                terms[f"L{layer} attention bias"] = bias * v
        else:
            terms[part_name(("attn", layer, None))] = found["attn_out", layer].double() * v
        terms[part_name(("mlp", layer, None))] = found["mlp_out", layer].double() * v
    sums = {name: part.sum(-1) for name, part in terms.items()} | constants
    logit = _logit(model, found["resid_final", None], right, other)
    return Attribution(tuple(sums), torch.stack(list(sums.values()), 1), logit)


def _places(pos, n: int, length: int) -> Tensor:
    """One position for each prompt, (n,), counted from the start."""
    places = torch.as_tensor(pos)
    if places.ndim and places.shape != (n,):
        raise ModelError(f"`pos` has {places.numel()} entries for {n} prompts: give one, or {n}.")
    if (places < -length).any() or (places >= length).any():
        wrong = int(places.reshape(-1)[((places < -length) | (places >= length)).reshape(-1)][0])
        raise ModelError(f"Position {wrong} is out of range: the text has {length} tokens.")
    return places.expand(n) % length


def answer_direction(
    model: LanguageModel, final: Tensor, answer: Tensor, wrong: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a part of the stream has to point along to raise the answer, under a frozen final norm.

    Args:
        final: the whole stream before the final norm, (n, d_model).

    Returns:
        v (n, d_model), float64, with logit = final · v + constants; the constants by name, (n,):
        the biases of the final norm and of the unembedding, where the model has them.
    """
    u = model.W_U.T[answer].double()
    u = u if wrong is None else u - model.W_U.T[wrong].double()  # (n, d_model)
    scale, centred = frozen_scale(model.ln_final, final)
    v = scale * norm_gain(model.ln_final).double() * u
    if centred:
        v = v - v.mean(-1, keepdim=True)
    constants = {}
    if getattr(model.ln_final, "bias", None) is not None:
        constants["final norm bias"] = u @ model.ln_final.bias.double()
    if (bias := model.lm_head.bias) is not None:
        of_wrong = 0.0 if wrong is None else bias[wrong].double()
        constants["unembedding bias"] = bias[answer].double() - of_wrong
    return v, constants


def frozen_scale(norm: nn.Module, x: Tensor) -> tuple[Tensor, bool]:
    """What a norm multiplies x (..., d_model) by, before its gain, (..., 1), float64.

    And whether it takes the mean away first (LayerNorm) or not (RMSNorm).
    """
    x = x.double()
    centred = isinstance(norm, nn.LayerNorm)
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    spread = x.var(-1, correction=0, keepdim=True) if centred else (x * x).mean(-1, keepdim=True)
    return (spread + eps).rsqrt(), centred


def head_writes(
    model: LanguageModel, z: Tensor, layer: int, post_norm: bool = True
) -> tuple[Tensor, Tensor | None]:
    """What each head adds to the stream, (..., n_heads, d_model), float64, from z (..., n_heads,
    d_head); and what the output bias adds, (..., d_model), or None. Together they are attn_out.

    In a model with a norm after attention each head's vector is scaled as that norm scales their
    sum; `post_norm=False` forgets it.
    """
    heads = torch.einsum("...hi,hid->...hd", z.double(), model.weight("W_O", layer).double())
    bias = model.part("o", layer).bias
    bias = None if bias is None else bias.double().expand_as(heads[..., 0, :])
    norm = model.part("ln1_post", layer)
    if norm is None or not post_norm:
        return heads, bias
    whole = heads.sum(-2) if bias is None else heads.sum(-2) + bias
    gain = frozen_scale(norm, whole)[0] * norm_gain(norm).double()  # (..., d_model)
    return heads * gain.unsqueeze(-2), None if bias is None else bias * gain


def _logit(model, final: Tensor, answer: Tensor, wrong: Tensor | None) -> Tensor:
    """The model's own pre-softcap logit of the answer, less that of the wrong one, (n,)."""
    size, parts = max(1, AT_ONCE // model.d_vocab), []
    for start in range(0, len(final), size):
        some = slice(start, start + size)
        logits = model.unembed(final[some], softcap=False).double()
        value = logits.gather(1, answer[some, None])[:, 0]
        value -= 0.0 if wrong is None else logits.gather(1, wrong[some, None])[:, 0]
        parts.append(value)
    return torch.cat(parts)


def _token_ids(model: LanguageModel, given, n: int, name: str) -> Tensor:
    """One token id per prompt, (n,), from a text, an id, or a list of either."""
    each = given if isinstance(given, list | tuple) else None
    if isinstance(given, Tensor):
        each = given.reshape(-1).tolist() if given.ndim else None
    each = [given] * n if each is None else each
    if len(each) != n:
        raise ModelError(f"`{name}` has {len(each)} entries for {n} prompts: give one, or {n}.")
    ids = [model.to_single_token(x) if isinstance(x, str) else int(x) for x in each]
    if min(ids) < 0 or max(ids) >= model.d_vocab:
        raise ModelError(f"`{name}` holds ids outside 0 to {model.d_vocab - 1}: check them.")
    return torch.tensor(ids, device=model.device)


# ----------------------------------------------------------------------- prompts, from TinyWorld


@dataclass(frozen=True)
class Prompts:
    """n documents, each read at the token before its last answer.

    ids (n, length), padded on the right; last (n,) the position that is read; answer (n,) the
    first token of what the document says there; wrong (n,) a token that it could have said
    """

    documents: tuple[Document, ...]
    ids: Tensor
    last: Tensor
    answer: Tensor
    wrong: Tensor

    @property
    def at(self) -> At:
        """Rows and positions, for `read_stream`."""
        return torch.arange(len(self.ids), device=self.ids.device), self.last

    def text(self, i: int) -> str:
        """What a reader of prompt i has seen."""
        return self.documents[i].text[: self.documents[i].find("answer")[-1].start].rstrip()


def make_prompts(
    model: LanguageModel,
    family: str,
    n: int,
    seed: int = 0,
    held: Iterable[str] = (),
    keep: Callable[[Document], bool] = lambda document: True,
    **choices,
) -> Prompts:
    """n TinyWorld documents with an answer, for families such as "facts" and "ioi".

    The wrong answer is, in "ioi", the giver, and elsewhere the right answer of another document
    that asks for the same kind of thing. Documents longer than the context are left out.

    Raises:
        ValueError: an unknown family or choice, or one whose documents have no answer.
    """
    found, wanted = [], max(n, 20)  # the others lend their answers as wrong ones
    documents = World().documents(seed, family, frozenset(held), **choices)
    for document in itertools.islice(documents, 50 * wanted):
        ids = [*_first(model), *offsets(model.tokenizer, document.text)[0]]
        places = answer_positions(model, document) if document.find("answer") else []
        if places and len(ids) <= model.n_ctx and keep(document):
            found.append((document, ids, places[-1]))
        if len(found) == wanted:
            break
    if len(found) < n:
        raise ValueError(f"Only {len(found)} of {n} prompts of {family!r} could be made.")
    documents = tuple(document for document, *_ in found)
    wrong = _wrong(model, documents, [ids[place] for _, ids, place in found], seed)
    found = found[:n]
    ids = model.pad([ids[: place + 1] for _, ids, place in found])
    answer = torch.tensor([ids[place] for _, ids, place in found], device=model.device)
    last = torch.tensor([place - 1 for *_, place in found], device=model.device)
    return Prompts(documents[:n], ids, last, answer, torch.tensor(wrong[:n], device=model.device))


def _first(model: LanguageModel) -> list[int]:
    return [] if model.tokenizer.bos_token_id is None else [model.tokenizer.bos_token_id]


def _wrong(model: LanguageModel, documents, answer: list[int], seed: int) -> list[int]:
    """A wrong answer for each document: see `make_prompts`."""
    if "S" in documents[0].latents:
        return [model.encode(" " + document.latents["S"])[0] for document in documents]
    kinds = [_asked(document) for document in documents]
    rng = random.Random(seed)
    wrong = []
    for kind, token in zip(kinds, answer, strict=True):
        others = sorted({a for k, a in zip(kinds, answer, strict=True) if k == kind} - {token})
        others = others or sorted(set(answer) - {token})
        wrong.append(rng.choice(others))
    return wrong


def _asked(document: Document) -> str:
    """What kind of thing the last answer is: the label that stands on the same characters."""
    answer = document.find("answer")[-1]
    same = [s for s in document.spans if (s.start, s.end) == (answer.start, answer.end)]
    return next((f"{s.kind} {s.value}" for s in same if s.kind == "entity"), same[0].kind)


@torch.no_grad()
def total_effects(model: LanguageModel, p: Prompts) -> dict[str, float]:
    """{component: by how much the answer's logit, less the wrong one's, falls without it}.

    What the component writes is replaced, at every token but the first, by its mean over the
    prompts, and the rest of the model runs on. So this counts all that later parts made of it,
    where direct logit attribution counts none. Logits before the soft-cap, mean over the prompts.
    """
    places = torch.arange(p.ids.shape[1], device=p.ids.device)
    inside = (places > 0) & (places <= p.last[:, None])
    sites = ["resid_pre", "attn_out", "mlp_out", "resid_final"]
    _, cache = model.run_with_cache(p.ids, sites, stop_at_layer=model.n_layers)

    def difference(final: Tensor) -> Tensor:
        return _logit(model, final[p.at], p.answer, p.wrong)

    before, effects = difference(cache["resid_final"]), {}
    for layer in range(model.n_layers):
        for kind in ("attn", "mlp"):
            reference = cache[SITE[kind], layer][inside]
            with model.hooks(lesion(model, kind, layer, mode="mean", reference=reference)):
                resid = cache["resid_pre", layer]
                final = model.run_from_layer(resid, layer, stop_at_layer=model.n_layers)
            name = part_name((kind, layer, None))
            effects[name] = float((before - difference(final)).mean())
    return effects


def country_of(document: Document) -> str:
    """The country of the landmark that a document names; ValueError where it names none."""
    for span in document.find("entity"):
        name = document.text[span.start : span.end]
        for place in lexicon.landmarks():
            if span.value == "landmark" and place.name == name:
                return place.country
    raise ValueError(f"No landmark is named in {document.text!r}.")


BRIDGES = {  # relation -> (family, the words that could be its answer)
    "language": ("two_hop", lambda: [c.language for c in lexicon.countries().values()]),
    "currency": ("two_hop", lambda: [c.currency for c in lexicon.countries().values()]),
    "capital": ("two_hop", lambda: [c.capital for c in lexicon.countries().values()]),
    "landmark-city": ("facts", lambda: list(city_country())),
}


def bridge_scan(
    model: LanguageModel, relation: str, n: int = 200, seed: int = 0, lens: TunedLens | None = None
) -> dict[str, Tensor]:
    """Where a landmark's country and the answer come first: shares of n prompts, (depths,) each.

    relation: what is asked. Of the landmark's *country*, in pairs that were never trained:
    "language", "currency", or "capital" (where it is not the landmark's own city). Of the landmark
    itself, as the control: "landmark-city".

    Raises:
        ValueError: an unknown relation.
    """
    if relation not in BRIDGES:
        raise ValueError(f"There is no {relation!r} here; there are: {', '.join(BRIDGES)}.")
    family, words = BRIDGES[relation]
    p = make_prompts(
        model,
        family,
        n,
        seed,
        held=("entities",) if family == "two_hop" else (),
        keep=lambda document: relation != "capital" or not is_own_city(document),
        relation=relation,
        count=1,
    )
    stream = read_stream(model, p.ids, p.at)
    country = word_tokens(model, [country_of(document) for document in p.documents])
    countries = word_tokens(model, lexicon.countries())
    kind = torch.cat([word_tokens(model, words()), p.answer]).unique()
    asked = {
        "country (of countries)": (country, countries),
        "answer (of its kind)": (p.answer, kind),
        "answer (of all)": (p.answer, None),
        "country (of all)": (country, None),
    }
    return {
        name: (ranks(model, stream, target, lens, among) == 1).float().mean(1)
        for name, (target, among) in asked.items()
    }


def word_tokens(model: LanguageModel, words: Iterable[str]) -> Tensor:
    """The first token of each word as it stands within a text, (n,)."""
    return torch.tensor([model.encode(f" {word}")[0] for word in words], device=model.device)


# -------------------------------------------------------------------------------- for the ledger


def _completeness(seed: int, unit: str) -> float:
    model, errors = load_model(), []
    for family in ("facts", "ioi", "agreement"):
        p = make_prompts(model, family, 40, seed)
        for wrong in (None, p.wrong):
            split = direct_logit_attribution(model, p.ids, p.answer, wrong, unit, p.last)
            errors.append(split.relative_error)
    return max(errors)


def component_error(seed: int) -> float:
    """max |Σ terms - logit| / max |logit| on 120 prompts, answers alone and against wrong ones."""
    return _completeness(seed, "component")


def head_error(seed: int) -> float:
    """The same with each head a term of its own."""
    return _completeness(seed, "head")


def heads_off(with_norm: Attribution, without: Attribution) -> float:
    """Σ |term without the post-norm - term| / Σ |term|, over all heads and prompts."""
    right, wrong = with_norm.heads(), without.heads()
    return float((wrong - right).abs().sum() / right.abs().sum())


def error_without_post_norm(seed: int) -> float:
    """`heads_off` on 100 IOI prompts, IO against S."""
    model = load_model()
    p = make_prompts(model, "ioi", 100, seed)
    both = [
        direct_logit_attribution(model, p.ids, p.answer, p.wrong, "head", p.last, norm)
        for norm in (True, False)
    ]
    return heads_off(*both)


def tuned_lens_gain(seed: int) -> float:
    """KL of the logit lens less KL of a tuned lens, nats: the smallest over the depths below the
    last, on held-out phrasings and entities.

    Source: Belrose et al. 2023, which finds the tuned lens closer to the final output than the
    logit lens at every layer.
    """
    model = load_model()
    lens, _ = train_tuned_lens(model, sample_stream(model, 4_000, seed), steps=60, seed=seed)
    held = sample_stream(model, 1_500, 1_000 + seed, ("templates", "entities"))
    plain, tuned = (read_out(model, held, lens=each).kl.mean(1) for each in (None, lens))
    return float((plain - tuned)[:-1].min())


def untrained_hits(seed: int) -> float:
    """Negative control: the highest share, over depths, of right answers at rank 1 when the lens
    is put on an untrained model; 100 facts and 100 IOI prompts."""
    model = untrained(load_model(), seed)
    hits = []
    for family in ("facts", "ioi"):
        p = make_prompts(model, family, 100, seed)
        hits.append(ranks(model, read_stream(model, p.ids, p.at), p.answer) == 1)
    return float(torch.cat(hits, 1).float().mean(1).max())


def random_token_rank(seed: int) -> float:
    """Negative control: the rank of a random token over the vocabulary's size, mean over 1000
    tokens of text; of all depths the one furthest from 1/2."""
    model = load_model()
    stream = sample_stream(model, 1_000, seed)
    rng = torch.Generator().manual_seed(seed)
    target = torch.randint(model.d_vocab, (1_000,), generator=rng)
    mean = ranks(model, stream, target).double().mean(1) / model.d_vocab
    return float(mean[(mean - 0.5).abs().argmax()])
