"""The figures of lesson 04: a lens' readings in, Figure out. Only `LensViewer` runs the model."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mi_helpers import lens as lenses
from mi_helpers.files import literal
from mi_helpers.layouts import ModelError
from mi_helpers.lens import TunedLens, depth_names
from mi_helpers.models import LanguageModel
from mi_helpers.plots import AMOUNT, DPI, OKABE_ITO, Picture, as_array, style

MOST_COLUMNS = 12  # tokens of a prompt that the viewer shows: its last ones
WIDE, LOW = 11.5, 3.2  # inches: the viewer's width, and the height of its lower panels
GRID = (0.08, 0.14, 0.905, 0.72)  # where the cells lie in the upper panel
LENSES = ("logit lens", "tuned lens")


def shown(token: str, most: int = 11) -> str:
    """A token as a cell shows it: spaces stay, other invisible characters become visible."""
    text = token.replace("\n", "↵").replace("\t", "⇥").replace("�", "·")
    text = "".join(letter if letter.isprintable() else "·" for letter in text)
    return text if len(text) <= most else text[: most - 1] + "…"


def draw_grid(axes, tokens: Sequence[str], names: Sequence[str], tops, p) -> None:
    """Draw the likeliest token of each cell, coloured by its probability.

    Args:
        tokens: of the positions, to the right; names: of the depths, upwards.
        tops: likeliest tokens as text; p: their probabilities; both (depths, positions).
    """
    p = as_array(p)
    axes.pcolormesh(p, cmap=AMOUNT, vmin=0, vmax=1, edgecolors="white", linewidth=1)
    for (row, column), value in np.ndenumerate(p):
        red, green, blue, _ = colormaps[AMOUNT](value)
        colour = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
        place = (column + 0.5, row + 0.5)
        axes.text(*place, shown(tops[row][column]), ha="center", va="center", color=colour, size=9)
    axes.set_xticks(np.arange(len(tokens)) + 0.5, [shown(token) for token in tokens], size=9)
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def lens_table(names: Sequence[str], words: Sequence[Sequence[str]], p) -> str:
    """A Markdown table: one row per depth, the likeliest tokens with their probabilities.

    Args:
        names: of the depths; words, p: tokens and probabilities, (depths, k), the likeliest first.
    """
    p = as_array(p)
    lines = ["| after block | " + " | ".join(map(str, range(1, p.shape[1] + 1))) + " |"]
    lines.append("|---" * (p.shape[1] + 1) + "|")
    for name, row, values in zip(names, words, p, strict=True):
        cells = [f"{written(word)} {q:.3f}" for word, q in zip(row, values, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def written(token: str) -> str:
    """A token as Markdown code that can stand in a table, its space as ␣."""
    text = token.replace(" ", "␣").replace("\n", "↵")
    plain = text and not set(text) & set("`|$\r")
    return f"`{text}`" if plain else f"<code>{literal(text)}</code>"


@style()
def lens_grid(
    tokens: Sequence[str], names: Sequence[str], tops: Sequence[Sequence[str]], p, title: str = ""
) -> Figure:
    """The lens' likeliest token at each depth and position.

    Args:
        tokens: of the prompt, one per column; names: of the depths, one per row, the first lowest.
        tops: likeliest tokens as text; p: their probabilities; both (depths, columns).

    Raises:
        ValueError: p of another shape.

    Source: nostalgebraist 2020, interpreting GPT: the logit lens.
    """
    p = as_array(p)
    if p.shape != (len(names), len(tokens)):
        raise ValueError(f"p has shape {p.shape}, expected {(len(names), len(tokens))}.")
    picture = Picture(figsize=(2.2 + 0.95 * len(tokens), 1.3 + 0.36 * len(names)))
    axes = picture.subplots()
    draw_grid(axes, tokens, names, tops, p)
    axes.set(title=title, xlabel="token that is read", ylabel="after block")
    picture.colorbar(axes.collections[0], ax=axes, label="probability of the token shown")
    return picture


@dataclass(frozen=True)
class Seen:
    """What the viewer shows of one prompt with one lens.

    tokens (columns,); p, ids (depths, columns, 5); stream (depths, columns, d_model)
    """

    tokens: list[str]
    p: torch.Tensor
    ids: torch.Tensor
    stream: torch.Tensor


class LensViewer:
    """A lens on a typed prompt, as a figure of its controls: `explore(viewer.figure, ...)`."""

    def __init__(self, model: LanguageModel, tuned: TunedLens | None = None):
        self.model, self.lenses = model, dict(zip(LENSES, (None, tuned), strict=True))
        self.names = depth_names(model)
        self.see = functools.lru_cache(64)(self._see)
        self.trace = functools.lru_cache(256)(self._trace)
        self.grid = functools.lru_cache(64)(self._grid)
        self.high = 1.0 + 0.3 * len(self.names)  # inches

    def _see(self, prompt: str, lens: str) -> Seen:
        ids = self.model.tokens(prompt)
        unknown = self.model.tokenizer.unk_token_id
        if unknown is not None and (ids == unknown).any():
            raise ModelError(
                f"Some of {prompt!r} is not in {self.model.name}'s vocabulary: use other words."
            )
        length = ids.shape[1]
        columns = torch.arange(max(0, length - MOST_COLUMNS), length)
        stream = lenses.read_stream(self.model, ids, (torch.zeros_like(columns), columns))
        p, best = lenses.top_tokens(self.model, stream, 5, self.lenses[lens])
        return Seen(self.model.str_tokens(ids)[-len(columns) :], p, best, stream)

    def _trace(self, prompt: str, lens: str, column: int, token: int) -> np.ndarray:
        stream = self.see(prompt, lens).stream[:, [column]]
        target = torch.tensor([token], device=stream.device)
        return as_array(lenses.ranks(self.model, stream, target, self.lenses[lens])[:, 0])

    def word(self, token: int) -> str:
        """One token as text."""
        return self.model.token_text(token)

    @style()
    def figure(
        self,
        prompt: str,
        layer: int = -1,
        back: int = 0,
        lens: str = LENSES[0],
        follow: str = "",
    ) -> Figure:
        """Above, the likeliest token at each depth and position; below, the five likeliest in the
        framed cell, and the ranks of the final answer and of a chosen token.

        Args:
            layer: the depth of the framed cell: -1 the embedding, else the block just left.
            back: its position, counted back from the last token.
            lens: one of `LENSES`.
            follow: a word whose rank is drawn, too; "" for none.

        Raises:
            ValueError: a prompt that is empty or too long, a position before its first token, an
                unknown lens, a word to follow that is not one token.
        """
        if self.lenses.get(lens, 0) == 0 or (lens == LENSES[1] and self.lenses[lens] is None):
            there = [name for name in LENSES if name == LENSES[0] or self.lenses[name] is not None]
            raise ValueError(f"There is no {lens!r} here: choose one of {', '.join(there)}.")
        depth = layer + 1
        if not 0 <= depth < len(self.names):
            raise ValueError(f"There is no layer {layer}: choose -1 to {self.model.n_layers - 1}.")
        seen = self.see(prompt, lens)
        column = len(seen.tokens) - 1 - back
        if back < 0 or column < 0:
            raise ValueError(
                f"{len(seen.tokens)} tokens are shown: go back 0 to {len(seen.tokens) - 1}."
            )
        answer = int(seen.ids[-1, column, 0])
        traced = {answer: f"final answer {shown(self.word(answer))!r}"}
        if follow.strip():
            token = self.model.to_single_token(" " + follow.strip())
            traced.setdefault(token, f"followed {shown(self.word(token))!r}")
        traces = {label: self.trace(prompt, lens, column, token) for token, label in traced.items()}
        return self.draw(seen, depth, column, traces, self.grid(prompt, lens))

    def _grid(self, prompt: str, lens: str) -> np.ndarray:
        """The upper panel as pixels (height, width, 4), which stay while the sliders move."""
        seen = self.see(prompt, lens)
        picture = Picture(figsize=(WIDE, self.high), layout="none", dpi=DPI)
        canvas = FigureCanvasAgg(picture)
        axes = picture.add_axes(GRID)
        tops = [[self.word(int(token)) for token in row] for row in seen.ids[:, :, 0]]
        draw_grid(axes, seen.tokens, self.names, tops, seen.p[:, :, 0])
        axes.set_title(f"{lens}: the likeliest next token, and its probability as colour", size=12)
        axes.set_ylabel("after block")
        canvas.draw()
        return np.asarray(canvas.buffer_rgba()).copy()

    def draw(self, seen: Seen, depth: int, column: int, traces: dict, grid: np.ndarray) -> Figure:
        """The three panels, with the frame at a depth and a column.

        Args:
            traces: {label: ranks (depths,)}; grid: as from `_grid`.
        """
        total = self.high + LOW
        picture = Picture(figsize=(WIDE, total), layout="none")
        upper = picture.add_axes((0, LOW / total, 1, self.high / total))
        upper.imshow(grid, aspect="auto", interpolation="none", extent=(0, 1, 0, 1))
        upper.axis("off")
        x, y, width, height = GRID
        cell = (width / len(seen.tokens), height / len(self.names))
        corner = (x + column * cell[0], y + depth * cell[1])
        upper.add_patch(Rectangle(corner, *cell, fill=False, edgecolor=OKABE_ITO[5], linewidth=3))
        left = picture.add_axes((0.14, 0.62 / total, 0.3, 2.0 / total))
        right = picture.add_axes((0.57, 0.62 / total, 0.41, 2.0 / total))
        self.draw_likeliest(left, seen, depth, column)
        best = np.min(list(traces.values()), axis=0)
        for label, values in traces.items():
            line = right.plot(range(len(values)), values, label=label)[0]
            for place, value in enumerate(values):
                lift = 7 if value == best[place] else -16
                offset = {"textcoords": "offset points", "xytext": (0, lift), "ha": "center"}
                look = {"fontsize": 9, "color": line.get_color()}
                right.annotate(f"{value:.0f}", (place, value), **offset, **look)
        right.axvline(depth, color="grey", linestyle=":", marker="", linewidth=1.5)
        right.set(yscale="log", ylim=(3 * self.model.d_vocab, 0.4), xlabel="after block")
        right.minorticks_off()
        powers = [10**i for i in range(7) if 10**i <= self.model.d_vocab]
        right.set_yticks(powers, [f"{power:,}" for power in powers])
        right.set_xticks(range(len(self.names)), self.names)
        right.set_ylabel("rank")
        right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=10)
        return picture

    def draw_likeliest(self, axes, seen: Seen, depth: int, column: int) -> None:
        """Draw the five likeliest tokens of one cell as bars."""
        words = [shown(self.word(int(token))) for token in seen.ids[depth, column]]
        p = as_array(seen.p[depth, column])
        drawn = axes.barh(range(len(p)), p, color=OKABE_ITO[0])
        axes.bar_label(drawn, [f"{value:.3f}" for value in p], padding=3, fontsize=11)
        axes.set_yticks(range(len(p)), [repr(word) for word in words])
        axes.set_xticks([0, 0.5, 1])
        axes.invert_yaxis()
        axes.set(xlim=(0, 1.2), xlabel="probability")
        where = "in the embedding" if depth == 0 else f"after block {self.names[depth]}"
        axes.set_title(f"{where}, at {shown(seen.tokens[column])!r}", size=12)
