"""A lens judged by intervention: the directions it leans on, and what the model makes of them.

texts = sentences(model)
basis = lens_basis(model, some_tokens(texts, depth), depth, lens)       # (k, d_model)
on_lens, on_model = influences(model, texts, depth, basis, lens_reader(model, lens, depth))

Source: Belrose et al. 2023, Tuned Lens: causal basis extraction.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mi_helpers.layouts import norm_gain
from mi_helpers.lens import TunedLens, beginning, depth_keys
from mi_helpers.lessons.shared import on_one_core
from mi_helpers.models import LanguageModel
from mi_helpers.tinyworld.world import World

BASIS_STEPS = 20  # of the search for each direction of a causal basis
Read = Callable[[Tensor], Tensor]  # a stream (..., d_model) to logits (..., d_vocab)


@dataclass(frozen=True)
class Sentences:
    """n texts of one length, for interventions: ids (n, pos), and the stream at every depth.

    stream  (depths, n, pos, d_model); the last depth is the final stream
    """

    ids: Tensor
    stream: Tensor

    def tokens(self, depth: int) -> Tensor:
        """The stream at one depth without the first token of each text, (tokens, d_model)."""
        return self.stream[depth, :, 1:].flatten(0, 1)


def sentences(model: LanguageModel, n: int = 24, length: int = 24, seed: int = 0) -> Sentences:
    """The first tokens of n documents of TinyWorld's own mixture that have so many."""
    documents = World().documents(30_000 + seed)
    every = (beginning(model, document.text, length) for document in documents)
    long = (row for row in every if len(row) == length)
    ids = torch.stack(list(itertools.islice(long, n)))
    _, cache = model.run_with_cache(ids, depth_keys(model), stop_at_layer=model.n_layers)
    return Sentences(ids, torch.stack([cache[key] for key in depth_keys(model)]))


@on_one_core
def causal_basis(read: Read, h: Tensor, k: int = 8, start: Tensor | None = None) -> Tensor:
    """k orthogonal directions whose mean ablation moves what a lens reads most, (k, d_model).

    The first direction maximises the mean of KL(read(h) ‖ read(h without it)); each further one
    does so among those at right angles to all before, by Adam.

    Args:
        read: the lens, which gradients pass through.
        h: (n, d_model), streams at one depth.
        start: (d_model, k or more), where each search begins; None takes random directions.

    Source: Belrose et al. 2023, Tuned Lens, causal basis extraction.
    """
    h, mean = h.detach().float(), h.detach().float().mean(0)
    with torch.no_grad():
        before = read(h).float().log_softmax(-1)
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(h.shape[1], k, generator=rng).to(h.device) if start is None else start
    basis = h.new_zeros(0, h.shape[1])
    for column in start.T[:k].float():
        v = column.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([v], lr=0.1)
        for _ in range(BASIS_STEPS):
            unit = _unit(v - (v @ basis.T) @ basis)
            after = read(h - ((h - mean) @ unit)[:, None] * unit).float().log_softmax(-1)
            loss = -(before.exp() * (before - after)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        v = v.detach()
        basis = torch.cat([basis, _unit(v - (v @ basis.T) @ basis)[None]])
    return basis


def _unit(v: Tensor) -> Tensor:
    return v / v.norm()


def lens_reader(model: LanguageModel, lens: TunedLens | None, depth: int) -> Read:
    """What a lens reads at a depth, as a function of the stream."""
    return lambda h: model.unembed(h if lens is None else lens(h, depth))


def lens_basis(
    model: LanguageModel, h: Tensor, depth: int, lens: TunedLens | None = None, k: int = 8
) -> Tensor:
    """`causal_basis` of a lens at a depth, begun at the directions that its unembedding reads most.

    Args:
        h: (n, d_model), streams at that depth.
    """
    to_end = torch.eye(model.d_model, device=h.device)
    to_end = to_end if lens is None else to_end + lens.weight[depth].T.to(h.device)
    read = to_end @ (norm_gain(model.ln_final).float()[:, None] * model.W_U.float())
    start = torch.linalg.eigh(read @ read.T).eigenvectors.flip(1)  # the largest first
    return causal_basis(lens_reader(model, lens, depth), h, k, start)


def random_basis(like: Tensor, seed: int = 0) -> Tensor:
    """As many orthogonal directions as `like` (k, d_model) has, drawn at random: the control."""
    drawn = torch.randn(like.shape[::-1], generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn)[0].T.to(like.device)


def influences(
    model: LanguageModel, texts: Sentences, depth: int, basis: Tensor, read: Read
) -> tuple[Tensor, Tensor]:
    """What losing each direction costs a lens, and what it costs the model: two of (k,), nats.

    KL(intact ‖ without it), the mean over all tokens but the first of each text. Along a direction,
    every token but the first gets the mean's part.

    Args:
        basis: (k, d_model), orthogonal, of length 1; read: the lens at that depth.
    """
    h, mean = texts.stream[depth], texts.tokens(depth).mean(0)
    rest = functools.partial(model.run_from_layer, layer=depth)
    found = []
    with torch.no_grad():
        intact = [reader(h)[:, 1:].float().log_softmax(-1) for reader in (read, rest)]
        for v in basis:
            along = ((h - mean) @ v)[..., None] * v
            along[:, 0] = 0
            after = [reader(h - along)[:, 1:].float().log_softmax(-1) for reader in (read, rest)]
            pairs = zip(intact, after, strict=True)
            found.append([float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs])
    lens, whole = torch.tensor(found).T
    return lens, whole


def model_over_lens(
    model: LanguageModel, lens: TunedLens | None, seed: int = 0, k: int = 8
) -> float:
    """At half depth: what the lens' own strongest directions cost the model, over what they cost
    the lens."""
    depth, texts = model.n_layers // 2, sentences(model, seed=seed)
    basis = lens_basis(model, some_tokens(texts, depth), depth, lens, k)
    on_lens, on_model = influences(model, texts, depth, basis, lens_reader(model, lens, depth))
    return float(on_model.sum() / on_lens.sum())


def some_tokens(texts: Sentences, depth: int, n: int = 128) -> Tensor:
    """n random tokens' stream at a depth, (n, d_model): what a basis is searched on."""
    tokens = texts.tokens(depth)
    rng = torch.Generator().manual_seed(0)
    return tokens[torch.randperm(len(tokens), generator=rng)[:n].to(tokens.device)]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two lists of different numbers, (k,) each."""
    ranked = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranked)[0, 1])
