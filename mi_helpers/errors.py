"""What goes wrong, told in one sentence: what was given, what was expected, what to do.

Everything that a caller can be told about is a `Refused`. While a file is read, `reading` turns
what any library raises into one, with the file's name; `checked` refuses an entry of a wrong kind
before it is used. Nothing heavy is imported here, as the commands need it before anything else.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

STOPS = (KeyboardInterrupt, SystemExit, GeneratorExit)
TRACEBACK = "MI_TRACEBACK"  # of the environment: show tracebacks
Kind = type | None | tuple[type | None, ...]
KINDS = {
    int: "a whole number",
    float: "a number with a decimal point",
    str: "a text",
    bool: "true or false",
    list: "a list",
    dict: "an object with entries",
    None: "null",
}


class Refused(ValueError):
    """What was given, what was expected, what to do: in one sentence."""

    exit_code = 2


@contextmanager
def reading(
    path: Path | str,
    kind: type[Refused] = Refused,
    advice: str = "",
    of: str = "",
    tell: Callable[[BaseException], str] | None = None,
) -> Iterator[None]:
    """Whatever is raised while a file is read becomes one sentence that names it.

    Args:
        path: of the file; its name stands in the sentence.
        kind: of the error that is raised.
        advice: what to do, a sentence.
        of: what the file belongs to, as the reader calls it; without it, the whole path is named.
        tell: the whole sentence, from what was raised, where `why` does not know it.

    Raises:
        Refused: of this kind; what was Refused before, and a user's interruption, pass.
    """
    try:
        yield
    except (Refused, *STOPS):
        raise
    except BaseException as error:  # the libraries in Rust panic with one that is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if tell is not None:
            raise kind(tell(error)) from None
        named = f"{of} cannot be read: its {Path(path).name}" if of else f"{path}"
        raise kind(f"{named} {why(error)}. {advice}".strip()) from None


def why(error: BaseException) -> str:
    """What is wrong with a file, from what was raised while it was read: the end of a sentence."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, RecursionError):
        return "is nested too deeply to be read"
    if isinstance(error, UnicodeError):
        return "is not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"is damaged: it is not JSON ({first_line(error)})"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "asks for more memory than there is"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, KeyError) and type(error) is KeyError and error.args:
        return f"lacks {error.args[0]!r}"
    if isinstance(error, TypeError | AttributeError | IndexError | ArithmeticError | LookupError):
        return f"holds something else than is expected there ({first_line(error)})"
    return f"is truncated or damaged ({first_line(error)})"


def first_line(error: BaseException) -> str:
    """The first line of an error's message without its full stop, else the name of its class."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


def checked(found: object, where: Path | str, kind: type[Refused], **wanted: Kind) -> dict:
    """`found`, once it is an object whose entries are of the kinds `wanted`.

    An entry that is absent passes; so does null where None is among the kinds. A whole number
    passes for float; true and false pass for bool alone; NaN and infinity pass for nothing.

    Args:
        found: as JSON or TOML gives it.
        where: the file, as the sentence calls it.
        kind: of the error that is raised.
        wanted: {key: type, or several}.

    Raises:
        Refused: of this kind; it names the file, the entry, what it is and what was expected.
    """
    if not isinstance(found, dict):
        raise kind(f"{where} holds {shown(found)}, and an object with entries is expected.")
    for key, kinds in wanted.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if key in found and not fits(found[key], kinds):
            expected = " or ".join(KINDS[k] for k in kinds)
            raise kind(f"{key} is {shown(found[key])} in {where}, and {expected} is expected.")
    return found


def fits(value: object, kinds: tuple[type | None, ...]) -> bool:
    """Whether a value of JSON is of one of these kinds."""
    if value is None:
        return None in kinds
    if type(value) is int and abs(value) >= 2**63:
        return False
    if type(value) is int and float in kinds:
        return True
    if type(value) is float and not math.isfinite(value):
        return False
    return type(value) in kinds


def shown(value: object) -> str:
    """A value of JSON in a sentence: itself, as far as it is short."""
    if isinstance(value, Mapping | list):
        return f"{'an object' if isinstance(value, Mapping) else 'a list'} of {len(value)}"
    text = json.dumps(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
