"""`python -m mi_helpers lens --text my.txt`: a tuned lens of any model, from one's own text.

A part of the text is held out; on it the lens is measured beside the logit lens. In Python:

    lens = TunedLens.load("runs/lens", model)
    logit_lens(model, "The Eiffel Tower is in", lens=lens)
"""

from __future__ import annotations

from pathlib import Path

from mi_helpers.arguments import whole
from mi_helpers.files import RunError
from mi_helpers.layouts import ModelError
from mi_helpers.lens import (
    Readout,
    TunedLens,
    depth_names,
    read_out,
    sample_stream,
    train_tuned_lens,
)
from mi_helpers.loading import load_model
from mi_helpers.models import LanguageModel
from mi_helpers.saes.sources import Source, open_source

HELD_SHARE = 4  # one held-out token for so many that the lens is trained on


def tune(
    model: LanguageModel,
    source: Source,
    tokens: int = 20_000,
    steps: int = 250,
    seed: int = 0,
    progress: bool = False,
) -> tuple[TunedLens, Readout, Readout]:
    """A tuned lens of a model, trained on random tokens of a text's later part.

    Args:
        source: its first texts are held out, those after them are trained on.
        tokens: to train on; a quarter as many are held out.
        steps: of training, each on 128 of the tokens.
        progress: whether a bar is shown.

    Returns:
        the lens; what the logit lens reads in the held-out tokens, and what the tuned lens reads.

    Raises:
        RunError: too little text.
        ModelError, SourceError: the text cannot be read.
    """
    whole("tokens", tokens, HELD_SHARE)
    whole("steps", steps, 1)
    texts = source.texts()
    try:
        held = sample_stream(model, texts, tokens // HELD_SHARE, seed)
        stream = sample_stream(model, texts, tokens, seed)  # goes on where the held-out part ended
    except ModelError as error:
        raise RunError(
            f"{source.name} is too short: {error} Give more text, or ask for fewer with --tokens."
        ) from None
    lens, _ = train_tuned_lens(model, stream, steps, seed=seed, progress=progress)
    return lens, read_out(model, held), read_out(model, held, lens=lens)


def table(model: LanguageModel, plain: Readout, tuned: Readout) -> str:
    """What stopping at each depth costs, with either lens, a line per depth."""
    lines = ["held-out text, KL(final ‖ lens) in nats, share right about the final token"]
    lines.append(f"{'after block':>11}  {'logit lens':>16}  {'tuned lens':>16}")
    for depth, name in enumerate(depth_names(model)):
        costs = [float(each.kl[depth].mean()) for each in (plain, tuned)]
        right = [float((each.rank[depth] == 1).double().mean()) for each in (plain, tuned)]
        cells = [f"{nats:9.3f} {share:6.0%}" for nats, share in zip(costs, right, strict=True)]
        lines.append(f"{name:>11}  {cells[0]}  {cells[1]}")
    return "\n".join(lines)


def main(
    text: str = "tinyworld",
    folder: Path = Path("runs/lens"),
    model: str = "",
    tokens: int = 20_000,
    steps: int = 250,
    column: str = "text",
    device: str = "",
    seed: int = 0,
) -> int:
    """Train a tuned lens of a model on text of your own, and measure it on a held-out part.

    Args:
        text: tinyworld[:FAMILY,...], a file, a folder, or hf:NAME
        folder: where the lens is written; it has to be new or empty
        model: a name, a folder, or of the hub; default: MI_MODEL, else tiny-gemma
        tokens: of the text to train on; all of them are in memory, at every depth
        steps: of training, each on 128 tokens
        column: the field of a .jsonl, .parquet or dataset that holds the text
        device: auto, cpu, cuda or mps; default: MI_DEVICE, else the CPU
        seed: of the choice of tokens, and of TinyWorld's text
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} is there already: choose another --folder, or move it away.")
    source = open_source(text, seed, column)
    loaded = load_model(model or None, device=device or None)
    lens, plain, tuned = tune(loaded, source, tokens, steps, seed, progress=True)
    lens.save(folder)
    print(table(loaded, plain, tuned))
    print(f"The lens is in {folder}: TunedLens.load({str(folder)!r}, model) reads it.")
    return 0
