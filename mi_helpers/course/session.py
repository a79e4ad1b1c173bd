"""The learner's session: what a check has to know of it, and what it must leave as it was."""

import ast
import contextlib
import inspect
import random
import re
import sys
import textwrap
from collections.abc import Callable, Iterator

import numpy as np

from mi_helpers.course.values import code

# -- libraries that were changed -------------------------------------------------------------

WATCHED = ("torch", "torch.nn.functional", "torch.Tensor", "numpy", "math", "random")
_originals: dict[str, dict] = {}  # name of a namespace -> its public names, as first seen


def namespaces() -> dict[str, object]:
    """What is watched, as far as it is loaded."""
    found = {name: sys.modules[name] for name in WATCHED if name in sys.modules}
    if torch := sys.modules.get("torch"):
        found["torch.Tensor"] = torch.Tensor
    return found


def remember() -> None:
    """Note every public name of the libraries that are loaded and not noted yet."""
    for name, space in namespaces().items():
        if name not in _originals:
            names = {key: value for key, value in vars(space).items() if key[0] != "_"}
            _originals[name] = names


def replaced() -> list[tuple[str, str]]:
    """(namespace, name) of each public name that is another object than it was, or gone.

    Libraries wrap a few of their own functions while they load; that is none of it.
    """
    return [
        (space, key)
        for space, now in namespaces().items()
        for key, value in _originals.get(space, {}).items()
        if vars(now).get(key, key) is not value and not own_wrapper(vars(now).get(key), value)
    ]


def own_wrapper(now, before) -> bool:
    """Whether a function was put in the place of one by the library that it belongs to."""
    name, other = (getattr(each, "__qualname__", None) for each in (now, before))
    home = str(getattr(now, "__module__", "")).partition(".")[0]
    return name is not None and name == other and home in ("torch", "numpy", "transformers")


@contextlib.contextmanager
def fresh() -> Iterator[list[str]]:
    """The libraries as they were loaded, with gradients on and float32, for the time of a block.

    Yields the names that the session has replaced, such as "torch.softmax". Afterwards these, the
    defaults and the states of the random generators are again what they were.
    """
    remember()
    found, spaces = replaced(), namespaces()
    missing = object()
    theirs = {pair: vars(spaces[pair[0]]).get(pair[1], missing) for pair in found}
    for space, key in found:
        setattr(spaces[space], key, _originals[space][key])
    with generators(), torch_defaults():
        try:
            yield [f"{space}.{key}" for space, key in found]
        finally:
            for (space, key), value in theirs.items():
                if value is missing:
                    delattr(spaces[space], key)
                else:
                    setattr(spaces[space], key, value)


@contextlib.contextmanager
def generators() -> Iterator[None]:
    """Give the random generators of Python, NumPy and torch their states back afterwards."""
    torch = sys.modules.get("torch")
    python, numpy = random.getstate(), np.random.get_state()
    ours = torch.get_rng_state() if torch else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if torch and ours is not None:
            torch.set_rng_state(ours)


@contextlib.contextmanager
def torch_defaults() -> Iterator[None]:
    """Gradients on, float32, for the time of a block."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)


# -- the notebook's cells --------------------------------------------------------------------


def shell():
    """IPython's shell, or None outside of it."""
    try:
        from IPython import get_ipython
    except ImportError:
        return None
    return get_ipython()


def look_up(name: str) -> Callable | None:
    """What the notebook has under a name, or None."""
    here = shell()
    return here.user_ns.get(name) if here else vars(sys.modules["__main__"]).get(name)


def assigns(call: str, exercise_id: str) -> bool:
    """Whether the cell that runs now keeps the result of `call("exercise_id", …)`."""
    here = shell()
    cell = (here.user_ns.get("In") or [""])[-1] if here else ""
    quoted = rf"{call}\(\s*[\"']{re.escape(exercise_id)}[\"']"
    return re.search(rf"=\s*(?:\w+\.)?{quoted}", cell) is not None


def stale(answer: Callable) -> str:
    """Why an answer is not what the notebook's latest cell about it says; "" when it is.

    A cell that could not be read, or that stopped before its `def`, leaves the function of an
    earlier cell in place.
    """
    here, own = shell(), inspect.unwrap(answer)
    name = getattr(own, "__name__", "")
    if here is None or not name.isidentifier():
        return ""
    cell = latest_definition(here.user_ns.get("In", []), name)
    if cell is None:
        return ""
    try:
        tree = ast.parse(here.transform_cell(cell))
    except SyntaxError as error:
        line = f", in line {error.lineno}: {code(error.text)}" if error.text else ""
        return (
            f"Python could not read the latest cell that defines {code(name)} "
            f"({code(f'{type(error).__name__}: {error.msg}')}{line}), so {code(name)} is still the "
            "one from before: mend that cell, run it, then check again."
        )
    written = [node for node in tree.body if getattr(node, "name", None) == name]
    if not written or source_agrees(own, written[-1]):
        return ""
    return (
        f"The latest cell that defines {code(name)} stopped with an error before it came to it, so "
        f"{code(name)} is still the one from before: mend that cell, run it, then check again."
    )


def latest_definition(cells: list[str], name: str) -> str | None:
    """The last cell run that has a `def` of this name at its left edge."""
    pattern = re.compile(rf"^(?:async +)?def +{re.escape(name)}\b", re.MULTILINE)
    return next((cell for cell in reversed(cells) if pattern.search(cell)), None)


def source_agrees(function: Callable, written: ast.AST) -> bool:
    """Whether a function was made from this definition; True where its source cannot be had."""
    try:
        (made,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, ValueError, SyntaxError):
        return True
    return ast.dump(made) == ast.dump(written)


def say_name_errors(calls: tuple[str, ...]) -> None:
    """Let IPython say in one sentence that a name given to one of our calls is not defined yet.

    Every other NameError is shown as always.
    """
    here = shell()
    if here is None or not hasattr(here, "set_custom_exc"):
        return
    pattern = re.compile(rf"\b(?:{'|'.join(calls)})\(")

    def show(self, kind, error, trace, tb_offset=None):
        name, frames = getattr(error, "name", None), trace
        while frames.tb_next is not None:
            frames = frames.tb_next
        cell = self.user_ns.get("In", [""])[-1]
        if name and frames.tb_frame.f_code.co_name == "<module>" and pattern.search(cell):
            print(
                f"⚠️ {name} is not defined yet: run the cell that defines it (an exercise's is just "
                "above its check), then this one again."
            )
        else:
            self.showtraceback((kind, error, trace), tb_offset=tb_offset)

    here.set_custom_exc((NameError,), show)


def say_unimported(error: BaseException) -> str:
    """A hint after a NameError in an answer: the imports were not run, or a name is misspelt."""
    name = getattr(error, "name", None) if isinstance(error, NameError) else None
    if not name or isinstance(error, UnboundLocalError):
        return ""
    return (
        f" If {code(name)} is one of the lesson's names, run the notebook's first code cell, which "
        "imports them, then the cell of your function, then this one."
    )
