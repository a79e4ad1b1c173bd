"""The figures of lesson 01 that move: a toy model per setting, and eight trainings step by step.

They are drawn with few artists, as they are drawn anew at every step of a slider.
"""

import functools

import ipywidgets
import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle, PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from mi_helpers.lessons.lesson_01 import geometry
from mi_helpers.lessons.lesson_01.experiments import Toys, Training, train, weighted_loss
from mi_helpers.lessons.lesson_01.figures import colours, flat, tip_names, turn_of
from mi_helpers.plots import EFFECT, OKABE_ITO, Picture, as_array, style
from mi_helpers.widgets import Explorer

WIDE, HIGH = 9.6, 3.9  # inches of the explorer's figure
SPARSITIES = (0.01, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)  # what the explorer offers

# -- one toy model ---------------------------------------------------------------------------

QUICK = Training(restarts=8, steps=200, batch=64, lr=0.08, samples=2048)


@functools.lru_cache(maxsize=4096)
def answer(features: int, hidden: int, sparsity: float, decay: float, correlation: float) -> Toys:
    """The toy model of the explorer's settings, trained as `QUICK` says; the seed is fixed.

    Raises:
        ValueError: a decay outside (0, 1], or settings that make no model.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"An importance decay of {decay:g} was given: take a number in (0, 1].")
    importance = decay ** torch.arange(features)
    return train(
        features,
        hidden,
        sparsity,
        importance=importance,
        correlation=correlation,
        training=QUICK,
    )


@style()
def explorer(
    features: int = 5,
    hidden: int = 2,
    sparsity: float = 0.9,
    decay: float = 1.0,
    correlation: float = 0.0,
) -> Figure:
    """A toy model, trained with these settings: its directions, its overlaps and its D_i.

    Drawn with few artists, as it is called at every step of a slider.

    Raises:
        ValueError: settings that make no model.
    """
    toys = answer(features, hidden, sparsity, round(decay, 4), round(correlation, 4))
    W, D = toys.W[0], geometry.dimensionality(toys.W[0])
    kept = int(geometry.represented(W).sum())
    picture = Picture(figsize=(WIDE, HIGH), layout="none")
    sheet = picture.add_axes([0, 0, 1, 1], xlim=(0, WIDE), ylim=(0, HIGH))  # 1 unit is 1 inch
    sheet.set_axis_off()
    held = f"{kept} of {features} features represented in {hidden} dimensions"
    words(sheet, [(0.15, HIGH - 0.25, held)], align="left")
    words(sheet, [(WIDE - 0.15, HIGH - 0.25, f"loss {toys.loss[0].item():.2g}")], align="right")
    sketch_directions(sheet, as_array(W))
    sketch_overlaps(sheet, as_array(W @ W.T))
    sketch_dimensionalities(sheet, as_array(D))
    return picture.reads(f"{held}.")


def sliders() -> dict:
    """The explorer's controls, for `mi_helpers.widgets.explore`."""
    return {
        "features": ipywidgets.IntSlider(5, min=2, max=10),
        "hidden": ipywidgets.IntSlider(2, min=2, max=5, description="hidden dimensions"),
        "sparsity": ipywidgets.SelectionSlider(options=SPARSITIES, value=0.9),
        "decay": ipywidgets.FloatSlider(
            1.0, min=0.5, max=1.0, step=0.05, description="importance, next / this"
        ),
        "correlation": ipywidgets.FloatSlider(
            0.0, min=-1, max=1, step=0.25, description="correlation of pairs"
        ),
    }


# -- eight trainings, step by step -----------------------------------------------------------

FILM = Training(steps=600, batch=64, lr=0.05, every=20)  # of each of the eight runs
RUNS, ACROSS, PANEL = 8, 4, 2.35  # panels of the film, in a row, and their width in inches


@functools.lru_cache(maxsize=2)
def reel(relu: bool) -> tuple[np.ndarray, np.ndarray]:
    """Eight trainings from different first weights: directions and losses, step by step.

    Five features in two dimensions, S = 0.9, each 0.9 times as important as the one before.

    Returns:
        W (snapshots, runs, 5, 2), turned as in the last one, and losses (snapshots, runs); the run
        whose loss is lowest in the end comes first.
    """
    importance = 0.9 ** torch.arange(5)
    output = "relu" if relu else "linear"
    toys = train(5, 2, [0.9] * RUNS, importance=importance, output=output, training=FILM)
    x = torch.rand(1, 8192, 5, generator=torch.Generator().manual_seed(1))
    x *= torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) > 0.9
    losses = torch.stack([loss_of(each, toys, x) for each in toys.path])
    order = losses[-1].argsort()
    W = as_array(toys.path[:, order, :, :2])
    turns = np.stack([turn_of(each) for each in W[-1]])
    return W @ turns, as_array(losses[:, order])


def loss_of(parameters: torch.Tensor, toys: Toys, x: torch.Tensor) -> torch.Tensor:
    """The loss of W and b side by side (runs, n_features, n_hidden + 1) on inputs, (runs,)."""
    now = Toys(parameters[..., :-1], parameters[..., -1], *[toys.importance] * 4, toys.output)
    return weighted_loss(x, now(x), toys.importance)


@style()
def film(step: int = 600, relu: bool = True) -> Figure:
    """Eight trainings of one toy model at a step: the best of them first, the others beside it.

    Raises:
        ValueError: a step at which there is no snapshot.
    """
    if step not in range(0, FILM.steps + 1, FILM.every):
        raise ValueError(
            f"Step {step} was not kept: take a multiple of {FILM.every} from 0 to {FILM.steps}."
        )
    W, losses = reel(relu)
    W, losses = W[step // FILM.every], losses[step // FILM.every]
    kept = (np.linalg.norm(W, axis=-1) > geometry.REPRESENTED).sum(-1)
    wide, high = ACROSS * PANEL, 5.6
    picture = Picture(figsize=(wide, high), layout="none")
    sheet = picture.add_axes([0, 0, 1, 1], xlim=(0, wide), ylim=(0, high))  # 1 unit is 1 inch
    sheet.set_axis_off()
    for run, weights in enumerate(W):
        column, row = run % ACROSS, run // ACROSS
        middle = np.array([(column + 0.5) * PANEL, high - 1.45 - 2.75 * row])
        sketch_plane(sheet, weights, middle, 0.8)
        text = f"loss {losses[run]:.3f}, {kept[run]} held"
        words(sheet, [(middle[0], middle[1] - 1.25, text)], size=12)
    words(sheet, [(0.5 * PANEL, high - 0.2, "best in the end")])
    model = "with ReLU" if relu else "without ReLU"
    said = [(wide - 0.15, high - 0.2, f"{model}, step {step} of {FILM.steps}")]
    words(sheet, said, align="right")
    return picture.reads(f"Held by the eight runs, the best first: {', '.join(map(str, kept))}.")


def training_film() -> Explorer:
    """The film with its controls: a button that plays it, a slider for the step, ReLU on or off."""
    controls = {
        "step": ipywidgets.IntSlider(FILM.steps, min=0, max=FILM.steps, step=FILM.every),
        "relu": ipywidgets.Checkbox(True, description="ReLU"),
    }
    made = Explorer(film, **controls)
    play = ipywidgets.Play(min=0, max=FILM.steps, step=FILM.every, interval=250)
    play.tooltip = "Play the training from its first step"
    ipywidgets.jslink((play, "value"), (controls["step"], "value"))
    made.box.children = (play, *made.box.children)
    return made


# -- parts of both ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def outline(text: str, size: float, align: str) -> Path:
    """The outline of a text's letters, in inches, around its anchor."""
    path = TextPath((0, 0), text, size=size)
    shift = {"left": 0, "center": -0.5, "right": -1}[align] * path.vertices[:, 0].max()
    return path.transformed(Affine2D().translate(shift, -0.36 * size).scale(1 / 72))


def words(sheet, places, size: float = 13, align: str = "center", colour: str = "black") -> None:
    """Write [(x, y, text), …] as one patch, in a tenth of the time of as many text artists."""
    drawn = [
        outline(text, size, align).transformed(Affine2D().translate(x, y)) for x, y, text in places
    ]
    if drawn:
        path = Path.make_compound_path(*drawn)
        sheet.add_artist(PathPatch(path, facecolor=colour, linewidth=0, zorder=4))


def sketch_directions(sheet, W: np.ndarray) -> None:
    """Draw the explorer's left part: the features in the plane, or in two of more axes."""
    middle = np.array([1.7, 1.75])
    sketch_plane(sheet, flat(W), middle, 1.05)
    text = "directions" if W.shape[1] == 2 else f"directions (2 of {W.shape[1]} axes)"
    words(sheet, [(middle[0], 0.2, text)])


def sketch_plane(sheet, points: np.ndarray, middle: np.ndarray, inch: float) -> None:
    """Draw a line to each point (n, 2), with its number, and the circle of radius `inch`."""
    tips, tint = points * inch, colours(len(points))
    sheet.add_patch(Circle(middle, inch, fill=False, color="0.75", linewidth=1))
    lines = np.stack([np.zeros_like(tips), tips], axis=1) + middle
    sheet.add_collection(LineCollection(lines, colors=tint, linewidths=3))
    sheet.scatter(*(tips + middle).T, c=tint, s=40, zorder=3)
    names = [
        (name, middle + tip * (1 + (0.15 + 0.05 * len(name)) / np.linalg.norm(tip)))
        for name, tip in tip_names(tips)
    ]
    words(sheet, [(x, y, name) for name, (x, y) in names])


def sketch_overlaps(sheet, gram: np.ndarray) -> None:
    """Draw the explorer's middle part: W W^T, from -1 (orange) through 0 (white) to 1 (violet)."""
    left, bottom, side, count = 3.75, 0.55, 2.6, len(gram)
    box = (left, left + side, bottom, bottom + side)
    sheet.imshow(gram, cmap=EFFECT, vmin=-1, vmax=1, extent=box, interpolation="nearest")
    sheet.set(xlim=(0, WIDE), ylim=(0, HIGH))
    middles = (np.arange(count) + 0.5) * side / count
    rows, columns = bottom + side - middles, left + middles
    words(sheet, [(left - 0.15, y, str(i)) for i, y in enumerate(rows)])
    size = min(11, 60 / count)
    for colour, chosen in (("black", np.abs(gram) <= 0.7), ("white", np.abs(gram) > 0.7)):
        cells = zip(*np.nonzero(chosen & (np.abs(gram) >= 0.05)), strict=True)
        places = [(columns[j], rows[i], f"{gram[i, j]:.1f}") for i, j in cells]
        words(sheet, places, size=size, colour=colour)
    words(sheet, [(left + side / 2, 0.2, "overlaps W·Wᵀ")])


def sketch_dimensionalities(sheet, D: np.ndarray) -> None:
    """Draw the explorer's right part: a bar per feature, D_i from 0 to 1, with its value."""
    left, bottom, width, height, count = 7.05, 0.55, 1.9, 2.6, len(D)
    rows = bottom + height * (1 - (np.arange(count) + 0.5) / count)
    bars = [[(left, y), (left + width * d, y)] for y, d in zip(rows, D, strict=True)]
    thick = min(16, 0.6 * 72 * height / count)
    sheet.add_collection(
        LineCollection(bars, colors=OKABE_ITO[0], linewidths=thick, capstyle="butt")
    )
    rules = [[(left + width * at, bottom), (left + width * at, bottom + height)] for at in (0.5, 1)]
    sheet.add_collection(LineCollection(rules, colors="0.6", linestyles="--", linewidths=1))
    top = bottom + height + 0.13
    words(sheet, [(left + width / 2, top, "½"), (left + width, top, "1")], size=11)
    words(sheet, [(left - 0.15, y, str(i)) for i, y in enumerate(rows)])
    values = [(left + width + 0.12, y, f"{d:.2f}") for y, d in zip(rows, D, strict=True)]
    words(sheet, values, size=11, align="left")
    words(sheet, [(left + width / 2, 0.2, "dimensionality D")])
