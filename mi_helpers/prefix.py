"""Many changed copies of one run, each computed from where it starts to differ.

A patch changes a run at one place, say layer 3 and position 5. What comes before is the base run's
and is not computed again: layers 0 to 2, and, as attention is causal, positions 0 to 4 of every
later layer, whose keys and values are kept. What is left of a patch is a *row*: layers 3 and up,
positions 5 and up.

All rows go through the layers at the same time; at each layer, those that start there join. The
tokens of all rows are packed into one long sequence, which Hugging Face's own norms, attention and
MLP modules take. Only the attention function knows the rows: it gives each its own keys and, before
its start, the base run's. In the last block, only the last position goes on to the MLP.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import repeat_kv

from mi_helpers.arguments import tensor
from mi_helpers.hooks import EAGER, replaced_attention
from mi_helpers.layouts import ModelError
from mi_helpers.models import LanguageModel

MOST_TOKENS = 2048  # of one walk: more of them leave the processor's cache
MOST_SCORES = 2**25  # attention scores of one walk and layer: bounds the memory of long prompts

# The stage of a block at which a site's row starts; resid_post is the next block's resid_pre.
STAGES = {
    **dict.fromkeys(("resid_pre", "q", "k", "v", "pattern"), 0),
    "z": 1,
    **dict.fromkeys(("attn_out", "resid_mid"), 2),
    "mlp_out": 3,
}


@dataclass(frozen=True)
class Edit:
    """Put `value` in at some positions (and heads) of a site.

    Args:
        heads: None where the site has none.
        value: (batch, pos, ...), as the site's activation; a batch of 1 serves all rows.
    """

    site: str
    layer: int
    positions: tuple[int, ...]
    heads: tuple[int, ...] | None
    value: Tensor

    @property
    def entry(self) -> tuple[int, int]:
        """(layer, stage) at which the row of this edit starts."""
        if self.site == "resid_post":
            return self.layer + 1, 0
        return self.layer, STAGES[self.site]

    def check(self, run: BaseRun) -> None:
        """Refuse what cannot be put into the run.

        Raises:
            ModelError: no such site, layer, head or position; a value of another shape.
        """
        model, at, shape = run.model, self.positions, self.value.shape
        n_heads = model.n_kv_heads if self.site in ("k", "v") else model.n_heads
        n_heads = n_heads if self.site in ("q", "k", "v", "z", "pattern") else 0
        heads = (0,) if self.heads is None else self.heads
        if not (
            (self.site in STAGES or self.site == "resid_post")
            and 0 <= self.layer < model.n_layers
            and at
            and min(at) >= 0
            and max(at) < run.length
            and bool(n_heads) == (self.heads is not None)
            and min(heads) >= 0
            and max(heads) < max(n_heads, 1)
            and len(shape) == (4 if n_heads else 3)
            and shape[0] in (1, run.batch)
            and shape[2 if self.site == "pattern" else 1] == run.length
        ):
            raise ModelError(
                f"There is no place for an edit at site {self.site!r}, layer {self.layer}, "
                f"positions {at}, heads {self.heads} with a value of shape {tuple(shape)} in a run "
                f"of {run.batch} prompts of {run.length} tokens."
            )


@contextmanager
def _own_attention(model: LanguageModel):
    """While this lasts, attention modules do what is set for them in `replaced_attention`."""
    before = model.use_attention(EAGER)
    try:
        yield
    finally:
        model.use_attention(before)
        for layer in range(model.n_layers):
            replaced_attention.pop(model.part("attn", layer), None)  # pyright: ignore[reportCallIssue]


# ------------------------------------------------------------------------------- the base run


class BaseRun:
    """One run, with what its changed copies start from.

    Args:
        ids: (batch, pos).
        hooks: active while it runs, such as noise on "embed".

    Attributes:
        cache: embed, resid_pre, z, attn_out, mlp_out of every layer, and resid_final.
        keys, values: per layer, (batch, pos, n_kv_heads, d_head), as attention gets them.
    """

    def __init__(self, model: LanguageModel, ids: Tensor, hooks: Mapping | None = None):
        if model.hooked:
            raise ModelError(
                "Patching runs parts of the model, which hooks from outside would not understand: "
                "leave the `with model.hooks(...)` block first."
            )
        model.check_site("pattern")  # attention that cannot be entered
        self.model, ids = model, model.ids(ids)
        self.batch, self.length = ids.shape
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.calls: list[dict] = []  # what each attention module was called with
        sites = ["embed", "resid_pre", "z", "attn_out", "mlp_out", "resid_final"]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_own_attention(model))
            stack.enter_context(model.hooks(hooks or {}))
            for layer in range(model.n_layers):
                module = model.part("attn", layer)
                replaced_attention[module] = self._keep
                hook = module.register_forward_pre_hook(self._listen, with_kwargs=True)
                stack.callback(hook.remove)
            _, self.cache = model.run_with_cache(ids, sites, stop_at_layer=model.n_layers)

    def _keep(self, eager, module, query, key, value, mask, **kwargs):
        self.keys.append(key.transpose(1, 2).contiguous())
        self.values.append(value.transpose(1, 2).contiguous())
        return eager(module, query, key, value, mask, **kwargs)

    def _listen(self, _module, _args, kwargs) -> None:
        self.calls.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

    def at(self, site: str, layer: int, rows: Rows) -> Tensor:
        """The base run's activation at the tokens of these rows, (tokens, ...)."""
        if site == "resid_pre" and layer == self.model.n_layers:
            full = self.cache["resid_final"]
        else:
            full = self.cache[site, layer]
        return full.flatten(0, 1)[rows.base]

    def last(self) -> Tensor:
        """The final stream at the last position, (batch, d_model)."""
        return self.cache["resid_final"][:, -1]


class Rows:
    """The tokens that are packed: for each patch `batch` rows, from its start to the last position.

    Attributes:
        row, position: of each packed token, (tokens,).
        base: its token in the base run, (tokens,).
        pad: its place when every row has full length, (tokens,).
        last: the last packed token of each row, (rows,).
    """

    def __init__(self, patches: Sequence[int], starts: Sequence[int], run: BaseRun):
        self.patches, self.starts = list(patches), list(starts)
        self.index = {patch: i for i, patch in enumerate(self.patches)}
        batch, length, device = run.batch, run.length, run.keys[0].device
        first = torch.tensor(self.starts, dtype=torch.int64, device=device).repeat_interleave(batch)
        lengths = length - first
        ends = lengths.cumsum(0)
        n, self.count = int(ends[-1]) if len(ends) else 0, len(first)
        self.row = torch.repeat_interleave(
            torch.arange(self.count, device=device), lengths, output_size=n
        )
        self.position = torch.arange(n, device=device) + (length - ends)[self.row]
        self.pad = self.row * length + self.position
        self.base = (self.row % batch) * length + self.position
        self.last = ends - 1
        sizes = [batch * (length - s) for s in self.starts]
        self.offsets = [0, *accumulate(sizes)][:-1]
        self.batch, self.length, self.tokens = batch, length, n
        self.first = min(self.starts, default=0)

    def of(self, patch: int) -> tuple[slice, int]:
        """The tokens of a patch, and its start."""
        i = self.index[patch]
        size = self.batch * (self.length - self.starts[i])
        return slice(self.offsets[i], self.offsets[i] + size), self.starts[i]

    def unpack(self, packed: Tensor, kept: Tensor) -> Tensor:
        """Packed keys (1, heads, tokens, d_head) as (rows, heads, pos, d_head), with the base run's
        (batch, pos, heads, d_head) before each row's start."""
        packed = packed[0].transpose(0, 1)
        if self.tokens == self.count * self.length:
            return packed.unflatten(0, (self.count, self.length)).transpose(1, 2)
        full = kept.repeat(len(self.patches), 1, 1, 1)
        full.flatten(0, 1)[self.pad] = packed
        return full.transpose(1, 2)


# ----------------------------------------------------------------------------------- the walk


@torch.no_grad()
def run_edits(run: BaseRun, patches: Sequence[Sequence[Edit]], reuse_prefix: bool = True) -> Tensor:
    """The final stream at the last position under each patch (a patch is a list of edits).

    Args:
        reuse_prefix: compute only what follows a patch's first position; else whole prompts.

    Returns:
        (patches, batch, d_model); a patch without edits gives the base run.
    """
    for edits in patches:
        for edit in edits:
            edit.check(run)
    final = run.last().expand(len(patches), -1, -1).clone()
    entries = {i: min(e.entry for e in edits) for i, edits in enumerate(patches) if edits}
    starts = {i: min(min(e.positions) for e in patches[i]) for i in entries}
    if not reuse_prefix:
        starts = dict.fromkeys(starts, 0)
    order = sorted(entries, key=lambda i: (starts[i], entries[i]))
    with _own_attention(run.model):
        for chunk in _chunks(run, order, starts):
            walk = _Walk(run, {i: patches[i] for i in chunk}, entries, starts)
            final[walk.rows.patches] = walk.run().unflatten(0, (-1, run.batch))
    return final


def _chunks(run: BaseRun, order: Sequence[int], starts: Mapping[int, int]) -> list[list[int]]:
    """The patches of each walk, in the order in which they enter."""
    chunks: list[list[int]] = []
    tokens = rows = 0
    for i in order:
        size = run.batch * (run.length - starts[i])
        scores = (rows + run.batch) * run.model.n_heads * run.length**2
        if not chunks or tokens + size > MOST_TOKENS or scores > MOST_SCORES:
            chunks.append([])
            tokens = rows = 0
        chunks[-1].append(i)
        tokens, rows = tokens + size, rows + run.batch
    return chunks


class _Walk:
    """Rows of changed activations, taken through the layers."""

    def __init__(self, run: BaseRun, patches: Mapping[int, Sequence[Edit]], entries, starts):
        self.base, self.model, self.starts = run, run.model, starts
        self.entering = defaultdict(list)  # (layer, stage): patches
        self.edits = defaultdict(list)  # (site, layer): (patch, edit)
        for i, edits in patches.items():
            self.entering[entries[i]].append(i)
            for e in edits:
                stream = e.site == "resid_post"
                key = ("resid_pre", e.layer + 1) if stream else (e.site, e.layer)
                self.edits[key].append((i, e))
        self.first = min(entries[i] for i in patches)[0]
        self.rows = Rows([], [], run)

    def run(self) -> Tensor:
        """The final stream of every row, (rows, d_model)."""
        model, stream = self.model, self.base.cache["embed"].new_empty(0, self.model.d_model)
        for layer in range(self.first, model.n_layers):
            stream = self._block(layer, self._join(layer, stream))
        return self._join(model.n_layers, stream)

    def _enter(self, layer: int, stage: int) -> Rows | None:
        """The rows that start here, by themselves; in `self.rows` they come last."""
        new = self.entering.get((layer, stage))
        if not new:
            return None
        only_last = layer == self.model.n_layers or (layer == self.model.n_layers - 1 and stage)
        starts = [self.base.length - 1 if only_last else self.starts[i] for i in new]
        self.rows = Rows(self.rows.patches + new, self.rows.starts + starts, self.base)
        return Rows(new, starts, self.base)

    def _join(self, layer: int, stream: Tensor) -> Tensor:
        """The stream entering a block, with the rows that start there, and its edits."""
        if new := self._enter(layer, 0):
            stream = torch.cat([stream, self.base.at("resid_pre", layer, new)])
        self._edit("resid_pre", layer, stream)
        return stream

    def _edit(self, site: str, layer: int, x: Tensor, rows: Rows | None = None) -> None:
        """Put the edits of a site into the packed x (tokens, ...), in place."""
        rows = self.rows if rows is None else rows
        for patch, e in self.edits.get((site, layer), ()):
            if patch not in rows.index:  # it starts after this site
                continue
            tokens, start = rows.of(patch)
            at = [p for p in e.positions if p >= start]
            if not at:
                continue
            seen = x[tokens].unflatten(0, (rows.batch, -1))  # (batch, pos, ...)
            to, source = _as_slice([p - start for p in at]), _as_slice(at)
            for head in (None,) if e.heads is None else e.heads:
                where = () if head is None else (head,)
                seen[(slice(None), to, *where)] = e.value[(slice(None), source, *where)].to(x)

    def _block(self, layer: int, stream: Tensor) -> Tensor:
        """The stream of all rows after one block; in the last block, at the last position only."""
        model, run = self.model, self.base
        attn_out = self._attend(layer, stream) if self.rows.count else stream
        if layer == model.n_layers - 1:
            stream = stream[self.rows.last]
            self.rows = Rows(self.rows.patches, [run.length - 1] * len(self.rows.starts), run)
        if new := self._enter(layer, 1):
            z = run.at("z", layer, new)
            self._edit("z", layer, z, new)
            attn_out = torch.cat([attn_out, write_heads(model, layer, z)])
            stream = torch.cat([stream, run.at("resid_pre", layer, new)])
        if new := self._enter(layer, 2):
            attn_out = torch.cat([attn_out, run.at("attn_out", layer, new)])
            stream = torch.cat([stream, run.at("resid_pre", layer, new)])
        self._edit("attn_out", layer, attn_out)
        middle = stream if model.parallel else stream + attn_out
        self._edit("resid_mid", layer, middle)
        mlp_out = run_mlp(model, layer, middle) if self.rows.count else middle
        if new := self._enter(layer, 3):
            attn = run.at("attn_out", layer, new)
            before = run.at("resid_pre", layer, new)
            attn_out = torch.cat([attn_out, attn])
            middle = torch.cat([middle, before if model.parallel else before + attn])
            mlp_out = torch.cat([mlp_out, run.at("mlp_out", layer, new)])
        self._edit("mlp_out", layer, mlp_out)
        return mlp_out + attn_out + middle if model.parallel else middle + mlp_out

    def _attend(self, layer: int, stream: Tensor) -> Tensor:
        """What attention adds to every row; in the last block, at the last position only."""
        model, rows = self.model, self.rows
        module, last = model.part("attn", layer), layer == model.n_layers - 1
        call = dict(self.base.calls[layer])
        if rotary := call.get("position_embeddings"):
            call["position_embeddings"] = tuple(x[:1, rows.position] for x in rotary)

        def heads(_module, args):
            z = model.split_heads("z", args[0][0])  # (tokens, n_heads, d_head)
            self._edit("z", layer, z)
            return (z[rows.last if last else slice(None)].flatten(-2)[None],)

        with ExitStack() as stack:
            stack.callback(model.part("o", layer).register_forward_pre_hook(heads).remove)
            for site in "qkv":
                if (site, layer) in self.edits:
                    edit = lambda x, site=site: self._edit(site, layer, x[0])  # noqa: E731
                    stack.callback(model.add_hook((site, layer), edit))
            replaced_attention[module] = lambda *args, **kwargs: self._mix(layer, *args, **kwargs)
            out = module(model.part("ln1", layer)(stream)[None], **call)[0]
        return post_norm(model, "ln1_post", layer, out[0])

    def _mix(self, layer, eager, module, query, key, value, mask, **kwargs):
        """The attention function for packed queries (1, heads, tokens, d_head): each row by itself,
        with the base run's keys and values before its start."""
        rows, run = self.rows, self.base
        key, value = (
            rows.unpack(x, kept[layer]) for x, kept in ((key, run.keys), (value, run.values))
        )
        query = query[0].transpose(0, 1)  # (tokens, heads, d_head)
        last = layer == self.model.n_layers - 1
        first = run.length - 1 if last else rows.first
        width = run.length - first
        to = rows.row * width + rows.position - first
        if last:
            to, source = slice(None), rows.last
            queries = query[rows.last]
        else:
            source = slice(None)
            queries = query.new_zeros(rows.count * width, *query.shape[1:])
            queries[to] = query
        queries = queries.unflatten(0, (rows.count, width)).transpose(1, 2)
        z, pattern = eager(module, queries, key, value, mask[:1, :, first:], **kwargs)
        if self._edit_pattern(layer, pattern, first):
            values = repeat_kv(value, queries.shape[1] // value.shape[1])
            z = torch.matmul(pattern, values).transpose(1, 2)
        packed = torch.zeros_like(query)
        packed[source] = z.flatten(0, 1)[to]
        return packed[None], None

    def _edit_pattern(self, layer: int, pattern: Tensor, first: int) -> bool:
        """Put the edits into the patterns (rows, n_heads, q_pos - first, k_pos), in place."""
        edits = self.edits.get(("pattern", layer), ())
        for patch, e in edits:
            i = self.rows.index[patch] * self.rows.batch
            at = [p for p in e.positions if p >= first]
            if not at:
                continue
            to, source = _as_slice([p - first for p in at]), _as_slice(at)
            for head in e.heads:
                pattern[i : i + self.rows.batch, head, to] = e.value[:, head, source].to(pattern)
        return bool(edits)


def _as_slice(at: list[int]) -> slice | list[int]:
    """Positions, as a slice where they are consecutive: no copy."""
    return slice(at[0], at[-1] + 1) if at == list(range(at[0], at[0] + len(at))) else at


# ------------------------------------------------------------------------------ parts of a block


def post_norm(model: LanguageModel, name: str, layer: int, x: Tensor) -> Tensor:
    """x through the norm after a sublayer ("ln1_post", "ln2_post"), where the family has one."""
    norm = model.part(name, layer)
    return x if norm is None else norm(x)


def write_heads(model: LanguageModel, layer: int, z: Tensor) -> Tensor:
    """What attention adds to the stream, from z (..., n_heads, d_head), through its post-norm."""
    tensor("z", z, "... n_heads d_head", model)
    return post_norm(model, "ln1_post", layer, model.part("o", layer)(z.flatten(-2)))


def run_mlp(model: LanguageModel, layer: int, stream: Tensor) -> Tensor:
    """What the MLP adds to the stream that it reads (resid_mid), through both its norms."""
    out = model.part("mlp", layer)(model.part("ln2", layer)(stream))
    return post_norm(model, "ln2_post", layer, out)
