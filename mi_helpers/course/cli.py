"""`python -m mi_helpers COMMAND …`: the commands, each imported only when it is called.

A command is a function whose parameters are its options (tyro reads them, with their types,
defaults and the Args of its docstring) and which returns the exit code. To add one, write it in
its wing and put it into `COMMANDS`. What it raises is told in one sentence by `main`.
"""

import codecs
import contextlib
import difflib
import functools
import importlib
import inspect
import io
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable

import tyro

from mi_helpers.errors import TRACEBACK, Refused, first_line

COMMANDS = {
    "From text to features": {
        "run": ("mi_helpers.saes.pipeline:main_run", "all of the four below, in one go"),
        "harvest": ("mi_helpers.saes.pipeline:main_harvest", "a model's activations, to disk"),
        "train": ("mi_helpers.saes.pipeline:main_train", "a sparse coder, from a harvest"),
        "report": ("mi_helpers.saes.pipeline:main_report", "a coder measured, in the model too"),
        "features": ("mi_helpers.saes.pipeline:main_features", "what each latent of a coder is"),
        "find": ("mi_helpers.saes.find:main", "a run's latents that fire at a text"),
        "name": ("mi_helpers.saes.name_run:main", "names for a run's latents, scored; a map"),
        "browse": ("mi_helpers.saes.browse:main", "a run's latents as one page, to search"),
        "lens": ("mi_helpers.saes.tuned:main", "a tuned lens of any model, from your own text"),
    },
    "The course": {
        "doctor": ("mi_helpers.course.doctor:main", "what works on this machine"),
        "claims": ("mi_helpers.course.ledger:main", "the ledger of claims; measure it anew"),
        "exercises": ("mi_helpers.course.prove:main", "prove every exercise of every lesson"),
        "lessons": (
            "mi_helpers.course.notebooks:main_lessons",
            "your copies, up to date",
        ),
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
    """Run one command with the rest of the arguments; its exit code.

    What it raises becomes one sentence on stderr, here and nowhere else: 2 for what it was given,
    1 for what nobody foresaw, 130 for Ctrl-C, 141 for a reader that has gone. `--traceback`, or
    MI_TRACEBACK=1, shows where it was raised, too.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    traced = "--traceback" in given or os.environ.get(TRACEBACK, "") not in ("", "0")
    given = [word for word in given if word != "--traceback"]
    print_plainly()
    try:
        code = run(given)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        tell("Stopped. Nothing that was written is lost: run the same command again to go on.")
        return 130
    except BrokenPipeError:  # as with `| head`: nobody is there to be told
        close_stdout()
        return 141
    except Exception as error:
        if traced:
            traceback.print_exc()
        tell(told(error, given[0] if given else "", traced))
        return getattr(error, "exit_code", 2 if is_ours(error) else 1)


def run(argv: list[str]) -> int:
    """Find a command and call it; 2 for one that does not exist."""
    name, *rest = argv or [""]
    if name in ("", "-h", "--help", "help"):
        print(usage())
        return 0 if name else 2
    if name not in BY_NAME:
        tell(unknown(name))
        return 2
    command = load(name)
    if list(inspect.signature(command).parameters) == ["argv"]:  # has a parser of its own
        return command(rest)
    return parse(command, name, rest)()


def told(error: Exception, name: str, traced: bool = False) -> str:
    """One sentence for whatever a command raised; where nobody foresaw it, what to do about it."""
    if is_ours(error):
        return str(error)
    if isinstance(error, MemoryError):
        return f"{name} needs more memory than there is: close other programs, or ask for less."
    if isinstance(error, OSError) and error.strerror:
        file = f"{error.filename}: " if error.filename else ""
        return f"{name} stopped: {file}{error.strerror}."
    report = "with what is written above" if traced else "with what `--traceback` adds"
    return (
        f"{name} stopped, and it should not have ({type(error).__name__}: {first_line(error)}): "
        f"please report this to whom you have the course from, {report}."
    )


def is_ours(error: Exception) -> bool:
    """Whether this course refused what it was given: then the error's text is a sentence of ours.

    A ValueError is one where it was raised by the course's own code, and not inside a library.
    """
    if isinstance(error, Refused) or not isinstance(error, ValueError):
        return isinstance(error, Refused)
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("mi_helpers.") and " " in str(error)


def tell(sentence: str) -> None:
    """Print a sentence to stderr, as far as anybody is there."""
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- any terminal

PLAIN = {
    "→": "->", "←": "<-", "↔": "<->", "↵": "\\n", "⏎": "\\n", "…": "...", "–": "-", "—": "-",
    "−": "-", "×": "x", "·": "*", "±": "+-", "≥": ">=", "≤": "<=", "≈": "~", "∞": "inf", "✓": "ok",
    "✔": "ok", "✗": "no", "✅": "ok", "⚠": "!", "\ufe0f": "", "│": "|", "─": "-", "█": "#",
    "▏": "|", "“": '"', "”": '"', "‘": "'", "’": "'", "␣": "_", "•": "*",
}  # fmt: skip
CORNERS = dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+")


def in_plain_characters(error: UnicodeError) -> tuple[str, int]:
    """For a terminal that lacks a character: one like it, a letter without its accent, or \\u…."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    written = []
    for character in error.object[error.start : error.end]:
        bare = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        like = (PLAIN | CORNERS).get(character)
        escaped = character.encode("ascii", "backslashreplace").decode()
        written.append(like if like is not None else bare or escaped)
    return "".join(written), error.end


def print_plainly() -> None:
    """Let stdout and stderr print what they lack in plain characters."""
    codecs.register_error("mi_plain", in_plain_characters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="mi_plain")


def close_stdout() -> None:
    """Send what is still to be written nowhere, so that Python ends without a word about it."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
