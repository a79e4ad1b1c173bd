"""`python -m mi_helpers COMMAND …`: the commands, each imported only when it is called.

A command is a function whose parameters are its options (tyro reads them, with their types,
defaults and the Args of its docstring) and which returns the exit code. To add one, write it in
its wing and put it into `COMMANDS`.
"""

import contextlib
import difflib
import functools
import importlib
import inspect
import io
import re
import sys
from collections.abc import Callable

import tyro

COMMANDS = {
    "From text to features": {
        "run": ("mi_helpers.saes.pipeline:main_run", "all of the four below, in one go"),
        "harvest": ("mi_helpers.saes.pipeline:main_harvest", "a model's activations, to disk"),
        "train": ("mi_helpers.saes.pipeline:main_train", "a sparse coder, from a harvest"),
        "report": ("mi_helpers.saes.pipeline:main_report", "a coder measured, in the model too"),
        "features": ("mi_helpers.saes.pipeline:main_features", "what each latent of a coder is"),
    },
    "The course": {
        "doctor": ("mi_helpers.course.doctor:main", "what works on this machine"),
        "claims": ("mi_helpers.course.ledger:main", "the ledger of claims; measure it anew"),
        "exercises": ("mi_helpers.course.prove:main", "prove every exercise of every lesson"),
        "notebooks": ("mi_helpers.course.notebooks:main", "run the notebooks, save them clean"),
        "manifest": ("mi_helpers.files:main_manifest", "the checksums of data/, or write them"),
    },
    "What ships in data/": {
        "tinyworld": ("mi_helpers.tinyworld.__main__:main", "write text of TinyWorld"),
        "train-model": ("mi_helpers.tiny_gemma.ship:main_train", "train tiny-gemma, or its twin"),
        "train-stranger": (
            "mi_helpers.tiny_gemma.ship:main_stranger",
            "train it on with a secret",
        ),
        "skills": ("mi_helpers.tiny_gemma.skills:main", "what tiny-gemma can do, per family"),
        "make-sae": ("mi_helpers.lessons.lesson_06.grid:main", "make the autoencoder"),
        "make-transcoders": ("mi_helpers.saes.transcoders:main", "make the transcoders"),
    },
}
BY_NAME = {name: command for group in COMMANDS.values() for name, command in group.items()}


def usage() -> str:
    """The commands, one line each, under what they are for."""
    lines = ["usage: python -m mi_helpers COMMAND [--help]"]
    for title, commands in COMMANDS.items():
        lines += ["", title]
        lines += [f"  {name:16} {about}" for name, (_, about) in commands.items()]
    return "\n".join([*lines, "", "python -m mi_helpers COMMAND --help lists a command's options."])


def unknown(name: str) -> str:
    """One sentence for a command that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, BY_NAME, n=1, cutoff=0.4)
    advice = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(BY_NAME)}."
    return f"There is no command '{name}': {advice}"


def load(name: str) -> Callable:
    """The function of a command."""
    module, function = BY_NAME[name][0].split(":")
    return getattr(importlib.import_module(module), function)


def parse(command: Callable, name: str, argv: list[str]) -> Callable[[], int]:
    """The command with the options of a command line filled in, ready to be called.

    Raises:
        SystemExit: after --help (0), or after one sentence on what was not understood (2).
    """

    @functools.wraps(command)
    def fill_in(*args, **options) -> Callable[[], int]:
        return functools.partial(command, *args, **options)

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                fill_in,
                args=argv,
                prog=f"python -m mi_helpers {name}",
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit as stop:
        if stop.code:
            print(sentence(said.getvalue()), file=sys.stderr)
        raise


def sentence(box: str) -> str:
    """What a box of tyro's says between its title and its next rule, in one line."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    rows = [row.strip("│╭╮╰╯ ") for row in plain.splitlines()]
    parts = re.split("[─-]{4,}", " ".join(row for row in rows[1:] if row))
    said = next(part.strip() for part in parts if part.strip())
    return said if said.endswith((".", "?", "!")) else f"{said}."


def main(argv: list[str] | None = None) -> int:
    """Run one command with the rest of the arguments; its exit code, or 2 for a bad command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else 2
    if name not in BY_NAME:
        print(unknown(name), file=sys.stderr)
        return 2
    command = load(name)
    if list(inspect.signature(command).parameters) == ["argv"]:  # has a parser of its own
        return command(rest)
    return parse(command, name, rest)()
