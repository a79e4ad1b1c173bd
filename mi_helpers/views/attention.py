"""Where heads look: all of them small, one large."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.image
import numpy as np

from mi_helpers.views.base import View, escape, plain, shown, spoken

if TYPE_CHECKING:
    from mi_helpers.models import LanguageModel

MOST_TOKENS = 64  # more rows than that cannot be told apart, and make a heavy notebook


def attention(model: LanguageModel, prompt: str, **choice) -> View:
    """A view of where each head looks from each token of a prompt.

    Hover or focus a token to see where it looks, or, with the button, what looks at it. Arrows move
    among heads and among tokens. Args and errors are those of `attention_json`.
    """
    data = attention_json(model, prompt, **choice)
    return View("attention", data, attention_html(data), attention_text(data))


def attention_json(
    model: LanguageModel,
    prompt: str,
    *,
    layers: Sequence[int] | None = None,
    head: tuple[int, int] | None = None,
    token: int = -1,
) -> dict:
    """What the view draws, as JSON.

    Args:
        prompt: a text of at most 64 tokens.
        layers: which ones; None takes all.
        head: (layer, head) that is large at first; None takes the first.
        token: the position that is looked from at first.

    Returns:
        {"label", "tokens": [{"shown", "spoken"}], "columns": heads per layer, "heads": [{"name",
        "layer", "head", "rows"}], "start": {"head", "token"}}; rows[i][j], j <= i, is the share of
        its attention that token i gives to token j.

    Raises:
        ValueError: an empty or too long text, or a layer, head or token that is not there.
    """
    ids = model.tokens(prompt)
    texts = model.str_tokens(ids)
    if len(texts) > MOST_TOKENS:
        raise ValueError(
            f"The text has {len(texts)} tokens, and the view shows at most {MOST_TOKENS}: shorten "
            "it."
        )
    chosen = list(range(model.n_layers)) if layers is None else [int(each) for each in layers]
    if not chosen or any(not 0 <= each < model.n_layers for each in chosen):
        raise ValueError(f"Layers {chosen}: choose from 0 to {model.n_layers - 1}.")
    if not -len(texts) <= token < len(texts):
        raise ValueError(f"There is no token {token}: the text has {len(texts)}.")
    _, cache = model.run_with_cache(ids, [("pattern", each) for each in chosen])
    heads = [
        {"name": f"{layer}.{number}", "layer": layer, "head": number, "rows": triangle(pattern)}
        for layer in chosen
        for number, pattern in enumerate(cache["pattern", layer][0].float().cpu().numpy())
    ]
    places = [(each["layer"], each["head"]) for each in heads]
    head = places[0] if head is None else tuple(head)
    if head not in places:
        last = len(heads) // len(chosen) - 1
        raise ValueError(
            f"There is no head {head}: the view shows layers {chosen}, heads 0 to {last} of each."
        )
    return {
        "label": f"Attention in {model.name}",
        "tokens": [{"shown": shown(text), "spoken": spoken(text)} for text in texts],
        "columns": len(heads) // len(chosen),
        "heads": heads,
        "start": {"head": places.index(head), "token": token % len(texts)},
    }


def triangle(pattern: np.ndarray) -> list[list[float]]:
    """A causal pattern (q_pos, k_pos) without its empty half, to three places."""
    return [[round(float(w), 3) for w in row[: i + 1]] for i, row in enumerate(pattern)]


def mosaic(data: dict, cell: int = 2) -> bytes:
    """A PNG of all patterns, a row per layer: the darker, the more attention."""
    count, columns = len(data["tokens"]), data["columns"]
    side = cell * count + 4  # a white frame around each
    rows = len(data["heads"]) // columns
    picture = np.ones((rows * side, columns * side), dtype=np.float32)
    for index, head in enumerate(data["heads"]):
        tile = np.zeros((count, count), dtype=np.float32)
        for i, row in enumerate(head["rows"]):
            tile[i, : i + 1] = row
        top, left = index // columns * side + 2, index % columns * side + 2
        large = 0.93 * (1 - tile).repeat(cell, 0).repeat(cell, 1)
        picture[top : top + cell * count, left : left + cell * count] = large
    stream = io.BytesIO()
    matplotlib.image.imsave(
        stream, picture, cmap="gray", vmin=0, vmax=1, format="png", metadata={"Software": None}
    )
    return stream.getvalue()


def looks_at(data: dict, head: dict) -> str:
    """What the view's first token looks at most: `token weight`."""
    row = head["rows"][data["start"]["token"]]
    most = int(np.argmax(row))
    return f"{data['tokens'][most]['shown'].strip() or 'space'} {row[most]:.2f}"


def heading(data: dict) -> str:
    word = data["tokens"][data["start"]["token"]]["spoken"]
    return f"{data['label']}: where “{word}” looks most, a row per layer, a column per head"


def attention_html(data: dict) -> str:
    """The same as HTML that needs no script: a table, and a picture of all patterns."""
    columns, heads = data["columns"], data["heads"]
    top = "".join(f"<th>{head['head']}</th>" for head in heads[:columns])
    rows = "".join(
        f"<tr><th>{heads[at]['layer']}</th>"
        + "".join(f"<td>{escape(looks_at(data, h))}</td>" for h in heads[at : at + columns])
        + "</tr>"
        for at in range(0, len(heads), columns)
    )
    text = " ".join(escape(token["shown"].strip()) for token in data["tokens"])
    alt = "Every head's attention pattern: a small square each, darker where attention is."
    image = f'<img alt="{alt}" src="data:image/png;base64,{b64encode(mosaic(data)).decode()}">'
    return plain(
        f"<p><b>{escape(heading(data))}</b></p><p>{text}</p><table><tr><th></th>{top}</tr>"
        f"{rows}</table>{image}"
    )


def attention_text(data: dict) -> str:
    """The same as plain text: a line per head."""
    lines = [f"{head['name']}: {looks_at(data, head)}" for head in data["heads"]]
    return "\n".join([heading(data), *lines])
