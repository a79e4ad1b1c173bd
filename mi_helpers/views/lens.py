"""What a lens reads at each depth and token of a typed prompt, with ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from mi_helpers.lens import TunedLens, depth_names, ranks, read_stream, top_tokens
from mi_helpers.plots import AMOUNT, as_array
from mi_helpers.views.base import View, escape, plain, shown, spoken
from mi_helpers.views.tokens import ink

if TYPE_CHECKING:
    from mi_helpers.models import LanguageModel

MOST_TOKENS = 24  # columns that still fit a screen, with their words
LIKELIEST = 5  # tokens that are read out for a cell
PLAIN_LENS = {"logit lens": None}


class LensView(View):
    """The view of a lens, whose prompt, followed word and lens are chosen in it."""

    def __init__(self, model: LanguageModel, prompt: str, **choice):
        self.model, self.choice = model, choice
        data = lens_json(model, prompt, **choice)
        super().__init__("lens", data, lens_html(data), lens_text(data))
        self.observe(self.asked, "chosen")

    def asked(self, change) -> None:
        """Read another prompt, follow another word, or say in a sentence why that cannot be."""
        new = {name: change["new"][name] for name in ("prompt", "follow", "lens", "ranks")}
        try:
            self.data = lens_json(self.model, **(self.choice | new))
        except ValueError as error:
            self.data = self.data | new | {"message": str(error)}


def lens(model: LanguageModel, prompt: str, **choice) -> View:
    """A view of what a lens reads in a prompt: its likeliest next token at each depth and token.

    Another prompt and a word to follow are typed into it. Hover or focus a cell for its likeliest
    tokens and the rank; arrows move among cells. Args and errors are those of `lens_json`.
    """
    return LensView(model, prompt, **choice)


def lens_json(
    model: LanguageModel,
    prompt: str,
    *,
    follow: str = "",
    lenses: Mapping[str, TunedLens | None] | None = None,
    lens: str = "",
    ranks: bool = False,
) -> dict:
    """What the view draws, as JSON.

    Args:
        prompt: a text of at most 24 tokens, besides the one that begins every text.
        follow: a word whose rank is shown; "" follows, in each column, the model's final answer.
        lenses: {name: a tuned lens, or None for the logit lens}; None has the logit lens alone.
        lens: the name of the one that reads; "" takes the first.
        ranks: whether cells show the rank in place of the likeliest token.

    Returns:
        {"label", "message", "prompt", "follow", "lens", "lenses", "ranks", "vocabulary": its size,
        "tokens": [{"shown", "spoken"}], "depths": ["embed", "0", …], "followed": [a token for each
        column], "cells"}; cells[depth][column] is {"shown", "p", "rank", "likeliest": [[token, p]],
        "colours": [colour, ink] by p, "by_rank": the same by rank}.

    Raises:
        ValueError: an empty or too long text, words that the vocabulary lacks, a word to follow
            that is not one token, no such lens.
    """
    lenses = PLAIN_LENS if lenses is None else dict(lenses)
    name = lens or next(iter(lenses), "")
    if name not in lenses:
        raise ValueError(f"There is no lens {name!r} here; there are: {', '.join(lenses)}.")
    ids, texts = columns(model, prompt)
    at = ids.new_zeros(len(texts)), ids.new_tensor(range(ids.shape[1] - len(texts), ids.shape[1]))
    stream = read_stream(model, ids, at)
    p, best = top_tokens(model, stream, min(LIKELIEST, model.d_vocab), lenses[name])
    target = model.unembed(stream[-1]).argmax(-1)
    if not isinstance(follow, str):
        raise ValueError(f"follow is {follow!r}: expected a word, such as 'Paris'.")
    if follow.strip():
        target[:] = model.to_single_token(" " + follow.strip())
    place = place_of(model, stream, target, lenses[name])
    words = {int(i): model.token_text(int(i)) for i in [*best.unique(), *target.unique()]}
    cells = [
        [
            cell([words[int(i)] for i in best[d, c]], as_array(p[d, c]), int(place[d, c]), model)
            for c in range(len(texts))
        ]
        for d in range(len(stream))
    ]
    return {
        "label": f"What {model.name} would say at each depth",
        "message": "",
        "prompt": prompt,
        "follow": follow.strip(),
        "lens": name,
        "lenses": list(lenses),
        "ranks": bool(ranks),
        "vocabulary": model.d_vocab,
        "tokens": [{"shown": shown(text), "spoken": spoken(text)} for text in texts],
        "depths": depth_names(model),
        "followed": [spoken(words[int(i)]) for i in target],
        "cells": cells,
    }


def columns(model: LanguageModel, prompt: str):
    """The prompt's ids (1, pos) and the tokens that get a column: all but the first of every text.

    Raises:
        ValueError: see `lens_json`.
    """
    ids = model.tokens(prompt)
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and (ids == unknown).any():
        raise ValueError(
            f"Some of {prompt!r} is not in {model.name}'s vocabulary: use other words."
        )
    texts = model.str_tokens(ids)
    if len(texts) > 1 and int(ids[0, 0]) == model.tokenizer.bos_token_id:
        texts = texts[1:]
    if len(texts) > MOST_TOKENS:
        raise ValueError(
            f"The text has {len(texts)} tokens, and the view shows at most {MOST_TOKENS}: shorten "
            "it."
        )
    return ids, texts


def place_of(model: LanguageModel, stream, target, lens: TunedLens | None):
    """`ranks` of `mi_helpers.lens`, under a name that no argument hides."""
    return ranks(model, stream, target, lens)


def cell(words: list[str], p: np.ndarray, rank: int, model: LanguageModel) -> dict:
    """One cell of the view: its likeliest tokens with their probabilities, and the rank."""
    return {
        "shown": shown(words[0]).strip() or spoken(words[0]),
        "p": round(float(p[0]), 4),
        "rank": rank,
        "likeliest": [[spoken(w), round(float(q), 4)] for w, q in zip(words, p, strict=True)],
        "colours": painted(float(p[0])),
        "by_rank": painted(1 - np.log(rank) / np.log(max(2, model.d_vocab))),
    }


def painted(share: float) -> list[str]:
    """A colour for a share from 0 to 1, and the ink that can be read on it."""
    colour = to_hex(matplotlib.colormaps[AMOUNT](min(max(share, 0.0), 1.0)))
    return [colour, ink(colour)]


def after(depth: str) -> str:
    """A depth in words."""
    return "embedding" if depth == "embed" else f"after block {depth}"


def lens_html(data: dict) -> str:
    """The same as HTML that needs no script: a table, the model's own answer on top."""
    head = "".join(f"<th><bdi>{escape(t['shown'])}</bdi></th>" for t in data["tokens"])
    rows = []
    for depth, row in reversed(list(zip(data["depths"], data["cells"], strict=True))):
        cells = [
            f'<td style="background-color:{c["colours"][0]};color:{c["colours"][1]};'
            f'text-align:center"><bdi>{escape(c["shown"])}</bdi> {c["p"]:.2f}<br>'
            f"<small>rank {c['rank']}</small></td>"
            for c in row
        ]
        rows.append(f"<tr><th>{escape(after(depth))}</th>{''.join(cells)}</tr>")
    ranked = f"“{data['follow']}”" if data["follow"] else "the final answer of its column"
    said = f"{data['label']} ({data['lens']}): the likeliest next token, and the rank of {ranked}"
    return plain(
        f"<p><b>{escape(said)}</b></p><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    )


def lens_text(data: dict) -> str:
    """The same as plain text: a line per depth, at the last token."""
    lines = [f"{data['label']} ({data['lens']}), at “{data['tokens'][-1]['spoken']}”"]
    for depth, row in zip(data["depths"], data["cells"], strict=True):
        last = row[-1]
        rank = f"rank of {data['followed'][-1]}: {last['rank']}"
        lines.append(f"{after(depth)}: {last['shown']} {last['p']:.2f}, {rank}")
    return "\n".join(lines)
