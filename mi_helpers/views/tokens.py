"""Tokens coloured by a number: losses, activations, attributions."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from mi_helpers.plots import AMOUNT, EFFECT, as_array, colour_limits
from mi_helpers.views.base import View, escape, plain, shown, spoken

Lines = Sequence[str] | Sequence[Sequence[str]]
UNKNOWN = "#ffffff"  # a token without a number


def tokens(tokens: Lines, values, **look) -> View:
    """A view of tokens coloured by a number, which is read on hover, on focus, or all at once.

    Args and errors are those of `tokens_json`.
    """
    data = tokens_json(tokens, values, **look)
    return View("tokens", data, tokens_html(data), tokens_text(data))


def tokens_json(
    tokens: Lines,
    values,
    *,
    label: str = "value",
    unit: str = "",
    names: Sequence[str] = (),
    centre_zero: bool = False,
    limit: float | None = None,
    form: str = "z.3g",
) -> dict:
    """What the view draws, as JSON.

    Args:
        tokens: one line of tokens, or several.
        values: a number per token, in the same shape; NaN where there is none.
        label, unit: what the numbers are.
        names: a name per line, such as "context 1".
        centre_zero: effects, on a diverging map symmetric around zero; otherwise amounts.
        limit: the end of the colour scale; None takes the largest.
        form: how a number is written.

    Returns:
        {"label", "scale": {"low", "high", "said", "colours"}, "lines": [{"name", "tokens":
        [{"shown", "spoken", "value", "said", "short", "colour", "ink"}]}]}.

    Raises:
        ValueError: no tokens, or another number of values or names than of tokens or lines.
    """
    if len(tokens) and isinstance(tokens[0], str):
        tokens, values = [tokens], [values]
    rows = [as_array(each) for each in values]
    if not len(tokens) or any(not len(line) for line in tokens):
        raise ValueError("There are no tokens to colour: give at least one in each line.")
    if len(rows) != len(tokens) or (names and len(names) != len(tokens)):
        raise ValueError(
            f"{len(tokens)} lines of tokens came with {len(rows)} lines of values and "
            f"{len(names)} names: give one of each per line."
        )
    for number, (line, row) in enumerate(zip(tokens, rows, strict=True)):
        if row.shape != (len(line),):
            raise ValueError(f"Line {number} has {len(line)} tokens and values {row.shape}.")
    low, high = colour_limits(np.concatenate(rows), centre_zero, limit)
    colours = matplotlib.colormaps[EFFECT if centre_zero else AMOUNT]

    def one(token: str, value: float) -> dict:
        known = bool(np.isfinite(value))
        share = (value - low) / (high - low) if high > low else 0.5
        colour = to_hex(colours(min(max(share, 0.0), 1.0))) if known else UNKNOWN
        short = format(value, form) if known else "–"
        said = " ".join(filter(None, [label, short if known else "no number", known and unit]))
        return {
            "shown": shown(token),
            "spoken": spoken(token),
            "value": float(value) if known else None,
            "said": said,
            "short": short,
            "colour": colour,
            "ink": ink(colour),
        }

    ends = [" ".join(filter(None, [format(end, form), unit])) for end in (low, high)]
    return {
        "label": label,
        "scale": {
            "low": ends[0],
            "high": ends[1],
            "said": f"colours from {ends[0]} to {ends[1]}",
            "colours": [to_hex(colours(share)) for share in np.linspace(0, 1, 9)],
        },
        "lines": [
            {"name": str(name), "tokens": [one(*pair) for pair in zip(line, row, strict=True)]}
            for name, line, row in zip(names or [""] * len(rows), tokens, rows, strict=True)
        ],
    }


def luminance(colour: str) -> float:
    """A colour's relative luminance, 0 to 1. Source: WCAG 2.2, "relative luminance"."""
    parts = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def ink(colour: str) -> str:
    """Black or white, whichever contrasts more with a colour: at least 4.5 to 1."""
    light = luminance(colour)
    return "#000000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#ffffff"


def tokens_html(data: dict) -> str:
    """The same as HTML that needs no script: coloured text, and the numbers as a folded table."""
    lines, numbers = [], []
    for line in data["lines"]:
        name = f"<b>{escape(line['name'])}</b> " if line["name"] else ""
        words = [
            f'<span title="{escape(t["said"])}" style="background-color:{t["colour"]};'
            f'color:{t["ink"]};white-space:pre-wrap"><bdi>{escape(t["shown"])}</bdi></span>'
            for t in line["tokens"]
        ]
        lines.append(f"<p>{name}{'<wbr>'.join(words)}</p>")
        numbers += [(t["shown"], t["short"]) for t in line["tokens"]]
    cells = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in numbers)
    scale = f"{data['label']}, {data['scale']['said']}"
    return plain(
        f"<p><b>{escape(scale)}</b></p>{''.join(lines)}<details><summary>The numbers"
        f"</summary><table><tr><th>token</th><th>{escape(data['label'])}</th></tr>{cells}</table>"
        "</details>"
    )


def tokens_text(data: dict) -> str:
    """The same as plain text: `token [number]` one after the other."""
    lines = [
        " ".join(f"{token['shown']} [{token['short']}]" for token in line["tokens"])
        for line in data["lines"]
    ]
    return "\n".join([f"{data['label']}, {data['scale']['said']}", *lines])
