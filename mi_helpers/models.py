"""One interface to a language model of any family: look inside, change it, run on.

model = load_model()                                      # tiny-gemma, or what MI_MODEL names
logits, cache = model.run_with_cache("The Eiffel Tower is in", ["resid_post", ("z", 3)])
cache["resid_post", 3]                                    # (batch, pos, d_model)
with model.hooks({("z", 3): lambda z: z * 0}):            # ablate layer 3's heads
    ablated = model.forward("The Eiffel Tower is in")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mi_helpers.arguments import (
    KINDS,
    indices,
    kept_positions,
    listed_sites,
    number,
    shown,
    tensor,
    whole,
)
from mi_helpers.hooks import Cache, HookedModel
from mi_helpers.layouts import NORMALIZED, SITES, Hook, Key, ModelError, normalize

SPACE = "▁"  # how SentencePiece writes a space
DEFAULT_SITES = ("embed", "attn_out", "mlp_out", "resid_post")
At = tuple[Tensor, Tensor]  # rows (n,), positions (n,): the n tokens ids[rows, positions]


class LanguageModel(HookedModel):
    """A Hugging Face causal language model: text in, logits and activations out.

    Its sizes, parts, weights and hooks are described in `HookedModel`.

    Args:
        hf: the model, of a family in `FAMILIES`; it is put into eval mode with eager attention and
            its parameters' gradients are turned off (activations can still be differentiated).
        tokenizer: its tokenizer, or None where only token ids will be used.
        name: how figures and errors call it.

    Raises:
        ModelError: the family is not in the table.
    """

    @cached_property
    def in_text(self) -> Tensor:
        """Which tokens can stand in a text, (d_vocab,), bool: all but padding and <unk>.

        Training pushes the logits of those two down at every step, so their columns of W_U are
        long, and would be at an end of every list and in every mean.
        """
        bos, eos, *never = (
            getattr(self.tokenizer, f"{name}_token_id", None)
            for name in ("bos", "eos", "pad", "unk")
        )
        found = torch.ones(self.d_vocab, dtype=torch.bool, device=self.device)
        for token in never:
            if token not in (None, bos, eos) and token < self.d_vocab:
                found[token] = False
        return found

    # ---- text and tokens

    def _tokenizer(self):
        if self.tokenizer is None:
            raise ModelError(f"{self.name} was given no tokenizer: pass token ids instead of text.")
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        """A text's token ids, without BOS.

        Raises:
            ModelError: the text is empty or none, or the model has no tokenizer.
        """
        if not isinstance(text, str):
            raise ModelError(f"The text is {text!r}: expected a string.")
        ids = self._tokenizer().encode(text, add_special_tokens=False)
        if not ids:
            raise ModelError(f"The text {text!r} is empty: give at least one word.")
        return ids

    def tokens(self, text: str | list[str], prepend_bos: bool = True, pad: bool = False) -> Tensor:
        """Text, or a list of texts, as token ids (batch, pos), int64, on the model's device.

        The tokenizer's BOS is put first if it has one. With `pad`, shorter texts are padded on the
        right, which changes nothing before the padding, as attention is causal; leave the padded
        positions out of what you average.

        Raises:
            ModelError: empty text, texts of unequal length without `pad`, longer than the context.
        """
        listed = isinstance(text, list | tuple)
        texts = list(text) if listed else [text]  # pyright: ignore[reportCallIssue]
        if not texts:
            raise ModelError("The list of texts is empty: give at least one text.")
        rows = [self.encode(t) for t in texts]
        bos = self.tokenizer.bos_token_id
        if prepend_bos and bos is not None:
            rows = [row if row[0] == bos else [bos, *row] for row in rows]
        lengths = [len(row) for row in rows]
        if len(set(lengths)) > 1 and not pad:
            raise ModelError(
                f"The texts have {min(lengths)} to {max(lengths)} tokens: choose texts of equal "
                "length, so that positions line up, or pass pad=True."
            )
        return self.ids(self.pad(rows))

    def pad(self, rows: Sequence[Sequence[int] | Tensor]) -> Tensor:
        """Rows of token ids as one batch (n, longest), int64, padded on the right.

        The padding is the tokenizer's, else its end of text, else token 0. No token before it sees
        it, as attention is causal.

        Raises:
            ModelError: no rows, or one that is not a row of token ids.
        """
        if not isinstance(rows, Tensor | np.ndarray | Sequence) or not len(rows):
            raise ModelError(f"The rows are {rows!r}: expected at least one row of token ids.")
        rows = [self._row(row) for row in rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.filler)

    @property
    def filler(self) -> int:
        """The token that `pad` fills up with."""
        named = (getattr(self.tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
        return next((i for i in named if i is not None and i < self.d_vocab), 0)

    def _row(self, row: Sequence[int] | Tensor) -> Tensor:
        """One row of ids, (pos,), which may be empty."""
        if isinstance(row, str) or not isinstance(row, Sequence | Tensor | np.ndarray):
            raise ModelError(f"A row is {shown(row)}: expected token ids.")
        return self.ids(row)[0] if len(row) else torch.empty(0, dtype=torch.int64).to(self.device)

    def str_tokens(self, text: str | list[int] | Tensor) -> list[str]:
        """Each token of one text (BOS included), or of one row of ids, as a string.

        Raises:
            ModelError: several texts, or a model without tokenizer.
        """
        ids = self.ids(text)
        if ids.shape[0] != 1:
            raise ModelError(f"str_tokens takes one text at a time, not {ids.shape[0]}.")
        return [self.token_text(i) for i in ids[0].tolist()]

    def token_text(self, token: int) -> str:
        """One token as text, with its space, as `token_text` gives it."""
        return token_text(self._tokenizer(), token)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token, such as " Paris" (mind the leading space).

        Where the tokenizer puts a space before every text, as Llama 2's does, "Paris" is the token
        that goes on with a word, and " Paris" the one that begins it: `token_text` gives the text.

        Raises:
            ModelError: it is several tokens, or not in the vocabulary.
        """
        ids = self.encode(text)
        if len(ids) != 1 or self.token_text(ids[0]) != text:
            ids = self._inside(text) or ids
        if len(ids) > 1:
            pieces = [self.token_text(i) for i in ids]
            raise ModelError(
                f"{text!r} is {len(ids)} tokens, {pieces}: choose a word that is one token, and "
                "mind the leading space."
            )
        if ids[0] == self.tokenizer.unk_token_id and text != self.tokenizer.unk_token:
            raise ModelError(f"{text!r} is not in {self.name}'s vocabulary: mind the spaces.")
        return ids[0]

    def _inside(self, text: str) -> list[int] | None:
        """The one token that is this text where it goes on from another text; None without one."""
        for before in ("\n", ".", "a"):
            first, *both = self.encode(before), *self.encode(before + text)
            if both[:-1] == first and self.token_text(both[-1]) == text:
                return both[-1:]
        return None

    def ids(self, tokens: str | list | Tensor) -> Tensor:
        """Text or token ids as checked ids (batch, pos), int64, on the model's device.

        Raises:
            ModelError: what `tokens` refuses; ids of another shape or dtype, or out of range.
        """
        first = tokens[0] if isinstance(tokens, list | tuple) and tokens else tokens
        if isinstance(first, str):
            return self.tokens(tokens)
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError):
            raise ModelError(
                f"The tokens are {shown(tokens)}: expected a text, or ids (batch, pos) in rows of "
                "equal length."
            ) from None
        ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
        if ids.ndim != 2 or ids.numel() == 0 or not KINDS["ids"](ids):
            raise ModelError(
                f"Token ids are integers of shape (batch, pos), with at least one token; "
                f"these are {ids.dtype} of shape {tuple(ids.shape)}."
            )
        if ids.shape[1] > self.n_ctx:
            raise ModelError(
                f"The text has {ids.shape[1]} tokens, more than {self.name}'s context of "
                f"{self.n_ctx}: shorten it."
            )
        if ids.device.type == "meta":
            raise ModelError("The token ids are on the meta device, so they hold no numbers.")
        low, high = (int(x) for x in ids.aminmax())
        if low < 0 or high >= self.d_vocab:
            raise ModelError(
                f"Token id {low if low < 0 else high} is out of range: {self.name} has ids 0 to "
                f"{self.d_vocab - 1}."
            )
        return ids.to(self.device, torch.int64)

    # ---- running

    def forward(self, tokens: str | list | Tensor) -> Tensor:
        """Logits (batch, pos, d_vocab), after the final soft-cap: what Hugging Face returns."""
        return self._run(ids=self.ids(tokens))

    __call__ = forward

    def run_with_cache(
        self,
        tokens: str | list | Tensor,
        sites: Iterable[str | Key] | str | None = None,
        stop_at_layer: int | None = None,
        pos: int | slice | list[int] | None = None,
    ) -> tuple[Tensor | None, Cache]:
        """Run, and keep the activations at `sites`.

        Args:
            tokens: a text, several of equal length, or ids (batch, pos).
            sites: names ("resid_post": every layer) or (name, layer); None means `DEFAULT_SITES`.
            stop_at_layer: run blocks 0 to stop_at_layer - 1 only, and no unembedding.
            pos: keep these positions only (query positions of a pattern); an int drops the axis.

        Returns:
            logits (batch, pos, d_vocab), or None if the run was stopped; the cache.

        Raises:
            ModelError: unknown site, layer or position out of range or not reached.
        """
        ids = self.ids(tokens)
        stop = self.n_layers if stop_at_layer is None else self._boundary(stop_at_layer)
        sites = DEFAULT_SITES if sites is None else sites
        keys = self.site_keys(listed_sites(sites), stop)
        pos = kept_positions(self, ids, pos)
        store: dict[Key, Tensor] = {}

        def keep(key: Key) -> Hook:
            def hook(x: Tensor) -> None:
                at = () if pos is None else (slice(None),) * (2 if key[0] == "pattern" else 1)
                store[key] = x if pos is None else x[(*at, pos)].clone()

            return hook

        with ExitStack() as undo:
            for key in keys:
                undo.callback(self.add_hook(key, keep(key)))
            logits = self._run(ids=ids, stop=None if stop_at_layer is None else stop)
        return (logits if stop_at_layer is None else None), Cache(self.n_layers, store)

    def run_from_layer(self, resid: Tensor, layer: int, stop_at_layer: int | None = None) -> Tensor:
        """Go on from `resid`, the stream as it enters block `layer` (its resid_pre).

        Positions count from 0, so `resid` (batch, pos, d_model) holds whole sequences; the batch
        may be of any size. Hooks at `layer` and after it apply.

        Returns:
            logits (batch, pos, d_vocab); with `stop_at_layer`, the stream as it enters that block.

        Raises:
            ModelError: a layer out of range, a stop before the start, a stream of another shape.
        """
        start = self._boundary(layer)
        stop = None if stop_at_layer is None else self._boundary(stop_at_layer)
        if stop is not None and stop < start:
            raise ModelError(f"Cannot stop at layer {stop} when starting from layer {start}.")
        tensor("resid", resid, "batch pos d_model", {"d_model": self.d_model})
        if resid.shape[1] > self.n_ctx:
            raise ModelError(
                f"resid has {resid.shape[1]} positions, more than {self.name}'s context of "
                f"{self.n_ctx}: shorten it."
            )
        return self._run(resid=resid.to(self.device, self.dtype), start=start, stop=stop)

    def unembed(self, resid: Tensor, softcap: bool = True) -> Tensor:
        """softcap(lm_head(ln_final(resid))), (..., d_model) -> (..., d_vocab): the logit lens.

        With softcap=False the logits are linear in the normed stream, as direct logit attribution
        needs.

        Raises:
            ModelError: another width or device, or NaN.
        """
        tensor("resid", resid, "... d_model", self)
        logits = self.lm_head(self.ln_final(resid.to(self.dtype)))
        if not softcap or self.softcap is None:
            return logits
        return torch.tanh(logits / self.softcap) * self.softcap

    def loss(self, tokens: str | list | Tensor) -> Tensor:
        """-log p(next token) at every position but the last, (batch, pos - 1), in nats.

        Raises:
            ModelError: fewer than two tokens, or what `ids` refuses.
        """
        ids = self.ids(tokens)
        if ids.shape[1] < 2:
            raise ModelError("A loss needs at least two tokens: one to read, one to predict.")
        logits = self.forward(ids)[:, :-1].float()
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    @torch.no_grad()
    def generate(self, text: str, n: int, temperature: float = 0.0, seed: int | None = None) -> str:
        """`text` and up to n more tokens: the likeliest ones, or sampled at `temperature`.

        Under `hooks` the whole text is run again for each token, so that a hook always sees all of
        it; otherwise keys and values are reused.

        Raises:
            ModelError: several texts, more tokens than the context holds, a temperature below 0.
        """
        ids, past = self.tokens(text), None
        if ids.shape[0] != 1:
            raise ModelError("generate takes one text at a time.")
        whole("n", n, 0)
        number("temperature", temperature, least=0)
        seed = None if seed is None else whole("seed", seed)
        if ids.shape[1] + n > self.n_ctx:
            raise ModelError(
                f"{ids.shape[1]} tokens and {n} new ones exceed the context of {self.n_ctx}."
            )
        rng = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        for _ in range(n):
            if self.hooked:
                logits = self.forward(ids)[0, -1]
            else:
                new = ids if past is None else ids[:, -1:]
                out = self.hf(input_ids=new, past_key_values=past, use_cache=True)
                past, logits = out.past_key_values, out.logits[0, -1]
            if temperature == 0:
                token = logits.argmax()
            else:
                p = torch.softmax(logits.float() / temperature, -1)
                token = torch.multinomial(p, 1, generator=rng)[0]
            ids = torch.cat([ids, token.reshape(1, 1)], 1)
            if token.item() == self.tokenizer.eos_token_id:
                break
        return self.tokenizer.decode(ids[0], skip_special_tokens=True)


def token_text(tokenizer, token: int) -> str:
    """One token as text, with its space.

    A decoder of a SentencePiece vocabulary may drop the first space of a text, as those of Llama 2
    and Mistral 0.1 do, and so that of a token which is decoded alone: it is put back.
    """
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    piece = tokenizer.convert_ids_to_tokens(int(token)) or ""
    piece = SPACE if piece == "<0x20>" and not text else piece
    lost = len(piece) - len(piece.lstrip(SPACE)) - (len(text) - len(text.lstrip(" ")))
    return text if text.startswith(SPACE) else " " * max(0, lost) + text


# ------------------------------------------------------------- a site as one vector per token


def site_width(model: LanguageModel, site: Key) -> int:
    """How many numbers a site has per token, heads side by side.

    Raises:
        ModelError: no such site or layer, or one that does not hold a vector per token.
    """
    name, layer = site
    if name == NORMALIZED:
        model.site_keys([("mlp_in", layer)])
        return model.d_model
    if layer is None and name in SITES and name not in ("embed", "resid_final"):
        raise ModelError(f"{name!r} needs a layer from 0 to {model.n_layers - 1}.")
    model.site_keys([site])
    axes = SITES[name].shape.split()
    if axes[:2] != ["batch", "pos"]:
        raise ModelError(f"{name!r} holds no vector per token ({SITES[name].shape}).")
    return math.prod(getattr(model, axis) for axis in axes[2:])


def checked_site(model: LanguageModel, site: Key) -> Key:
    """The site with its layer counted from the first.

    Raises:
        ModelError: what `site_width` refuses.
    """
    site_width(model, site)
    return site[0], None if site[1] is None else site[1] % model.n_layers


def site_reader(model: LanguageModel, site: Key) -> tuple[Key, Callable[[Tensor], Tensor]]:
    """How to read a site as one vector per token.

    "ln2_normalized" is the stream before the MLP, normalised but without the gain: the input of
    Gemma Scope's transcoders. All others are the model's own sites, heads side by side.

    Returns:
        The model's own site to read, and the function of it, (batch, pos, ...) to (batch, pos,
        width).
    """
    name, layer = site
    if name == NORMALIZED:
        norm = model.part("ln2", layer)
        stream = "resid_pre" if model.parallel else "resid_mid"
        return (stream, layer), lambda x: normalize(norm, x)
    if name == "resid_pre" and layer:
        site = ("resid_post", layer - 1)  # the same tensor, one block earlier
    return site, lambda x: x.flatten(2)


@torch.no_grad()
def read_sites(model: LanguageModel, ids: Tensor, sites: list[Key]) -> list[Tensor]:
    """Each site's activations, (batch, pos, width), from one run up to the last of them."""
    found = [site_reader(model, site) for site in sites]
    ends = {"embed": 0, "resid_final": model.n_layers}
    stop = max(ends[key[0]] if key[1] is None else key[1] % model.n_layers + 1 for key, _ in found)
    _, cache = model.run_with_cache(ids, [key for key, _ in found], stop_at_layer=stop)
    return [of(cache[key]) for key, of in found]


def places(at: At, ids: Tensor) -> At:
    """Rows and positions of tokens of ids (batch, pos), both (n,), counted from the first.

    Raises:
        ModelError: what `activations_at` refuses of them.
    """
    if not isinstance(at, tuple | list) or len(at) != 2:
        raise ModelError(f"`at` is {shown(at)}: expected rows (n,) and positions (n,).")
    rows, positions = (
        indices(x, n, f"`at` {name}")
        for x, n, name in zip(at, ids.shape, ("row", "position"), strict=True)
    )
    if len(rows) != len(positions) or any(x is None for x in at):
        raise ModelError(
            f"`at` holds {len(rows)} rows and {len(positions)} positions: expected as many of each."
        )
    return torch.tensor(rows, device=ids.device), torch.tensor(positions, device=ids.device)


@torch.no_grad()
def activations_at(
    model: LanguageModel, ids: Tensor, at: At, sites: Iterable[str | Key], size: int = 64
) -> dict[Key, Tensor]:
    """Activations at n tokens, {(site, layer): (n, ...)}; token j is ids[at[0][j], at[1][j]].

    Texts are run `size` at a time, those of about equal length together, each batch cut after the
    last token that is read: with causal attention nothing after it matters.

    Raises:
        ModelError: no token to read, not one position for each row, or one out of range.
    """
    ids, size, sites = model.ids(ids), whole("size", size, 1), listed_sites(sites)
    rows, positions = places(at, ids)
    last = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    last = last.scatter_reduce(0, rows, positions, "amax")
    used = rows.unique()
    found: dict[Key, Tensor] = {}
    for some in used[last[used].argsort(stable=True)].split(size):
        length = int(last[some].max()) + 1
        _, cache = model.run_with_cache(ids[some, :length], sites, stop_at_layer=model.n_layers)
        place = torch.empty(len(ids), dtype=torch.int64, device=ids.device)
        place[some] = torch.arange(len(some), device=ids.device)
        here = torch.isin(rows, some).nonzero()[:, 0]
        for key in cache:
            full = cache[key].expand(len(some), *cache[key].shape[1:])  # pos_embed has no batch
            values = full[place[rows[here]], positions[here]]
            if key not in found:
                found[key] = values.new_empty(len(rows), *values.shape[1:])
            found[key][here] = values
    return found
