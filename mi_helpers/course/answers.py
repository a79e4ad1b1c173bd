"""Answers and what a check is written with: `agree` over inputs drawn anew, single expectations.

def check_26(answer):
    agree(
        answer,
        project_out,  # the reference
        lambda draw: (draw.normal("n", "d"), draw.normal("d"), draw.normal("d")),
        mistakes=[(lambda x, v, centre: x - …, "The centre is left out: …")],
        otherwise="Each row should end level with the centre.",
    )
"""

import contextlib
import contextvars
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

CASES = 4  # how many inputs `agree` draws


class Wrong(Exception):
    """Raised by a check: its message names the mistake, in Markdown."""


# -- in words --------------------------------------------------------------------------------


def code(text: str) -> str:
    """Markdown code of one line, whatever backticks the text holds."""
    text = re.sub(r"\s*[\n\r]\s*", " ", text.strip())
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def describe(value) -> str:
    """A value in a few words: its type, and itself when that is short."""
    kind = type(value).__name__
    try:
        text = repr(value)
    except Exception:
        return f"a {kind} that cannot be shown"
    return f"{kind} {code(text)}" if len(text) <= 40 and "\n" not in text else f"a {kind}"


def say_error(error: BaseException) -> str:
    """An exception as Markdown code, also when its text cannot be had."""
    try:
        text = str(error)
    except Exception:
        text = ""
    text = text if len(text) <= 300 else f"{text[:300]}…"
    return code(f"{type(error).__name__}: {text}" if text else type(error).__name__)


# -- numbers of any make ---------------------------------------------------------------------


def is_tensor(value) -> bool:
    """Whether a value is a torch tensor, without loading torch for it."""
    return hasattr(value, "detach") and hasattr(value, "dtype")


def bare(value) -> np.ndarray:
    """An array of a number, of (nested) lists of them, arrays or tensors, in their own sort."""
    if is_tensor(value):
        value = value.detach().cpu()
        value = value.to_dense() if value.is_sparse else value
        return (value.double() if value.is_floating_point() else value).numpy()
    if isinstance(value, (list, tuple)):
        return np.array([bare(each) for each in value])
    return np.asarray(value)


def as_numbers(value) -> np.ndarray:
    """A float64 array of numbers: one, (nested) lists of them, arrays, tensors on any device.

    Raises:
        TypeError: there is something in it that is no real number.
        ValueError: its rows have several lengths.
    """
    array = bare(list(value) if isinstance(value, range) else value)
    if array.dtype == object and array.ndim:
        array = bare(array.tolist())
    if array.dtype.kind not in "biuf":
        raise TypeError(f"not a number: {describe(value)}")
    return array.astype(np.float64)


def same(got, other) -> bool:
    """Whether two values agree in shape and, to 1e-6, in numbers."""
    try:
        got, other = as_numbers(got), as_numbers(other)
        return got.shape == other.shape and np.allclose(got, other, atol=1e-6, equal_nan=True)
    except Exception:  # of a value that does not let itself be read
        return False


def like(value, other):
    """A value in the make of another: list, array, tensor, dtype, Python's own number.

    Floats keep to floats, integers to integers and booleans to booleans: what would become another
    sort of thing stays as it is, and whoever judges it says what it is.
    """
    try:
        return converted(value, other)
    except Exception:
        return value


def converted(value, other):
    """What `like` makes of a value; the same object where it has that make already."""
    if is_tensor(other) or isinstance(other, np.ndarray):
        if type(value) is type(other) and value.dtype == other.dtype:
            return value
        made, wanted = bare(value), bare(other).dtype.kind
        if made.dtype.kind not in {"f": "fiu", "i": "iu", "u": "iu"}.get(wanted, wanted):
            return value
        if is_tensor(other):
            import torch

            if type(value) in (list, tuple) and all(map(is_tensor, value)):
                value = torch.stack(tuple(value))
            value = value if is_tensor(value) else torch.from_numpy(made.copy())
            return value.to(other.dtype)  # and gradients get through
        return made.astype(other.dtype)
    if type(other) in (list, tuple):
        plain = type(value) in (list, tuple, np.ndarray) or is_tensor(value)
        rows = list(value) if plain else []
        if type(other) is tuple and len(rows) != len(other):
            return value
        models = other if type(other) is tuple else other[:1] * len(rows)
        made = type(other)(map(like, rows, models))
        kept = type(value) is type(other) and all(a is b for a, b in zip(made, value, strict=True))
        return value if kept or not rows else made
    if type(other) is dict and type(value) is dict and other:
        model = next(iter(other.values()))
        return {key: like(each, model) for key, each in value.items()}
    if isinstance(other, (bool, int, float)) and type(value) is not type(other):
        found, wanted = bare(value), "b" if isinstance(other, bool) else "iuf"
        one = found.item() if not found.ndim and found.dtype.kind in wanted else None
        return type(other)(one) if one is not None and type(other)(one) == one else value
    return value


# -- copies ----------------------------------------------------------------------------------


def clone(value):
    """A copy of numbers and of plain containers; anything else, such as a model, as it is.

    A leaf that gradients are collected in stays the same object.
    """
    if is_tensor(value):
        return value if value.is_leaf and value.requires_grad else value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) is dict:
        return {key: clone(each) for key, each in value.items()}
    if type(value) in (list, tuple, set):
        return type(value)(map(clone, value))
    return value


def unchanged(value, copy) -> bool:
    """Whether a copy that was handed out still equals its original."""
    if is_tensor(value) or isinstance(value, np.ndarray):
        return copy is value or same(value, copy)
    if type(value) is dict:
        return copy.keys() == value.keys() and all(unchanged(value[k], copy[k]) for k in value)
    if type(value) in (list, tuple):
        return len(copy) == len(value) and all(map(unchanged, value, copy))
    return copy is value or type(value) is not set or copy == value


# -- expectations ----------------------------------------------------------------------------


def expect(condition: bool, message: str) -> None:
    """Raise `Wrong(message)` unless the condition holds."""
    if not condition:
        raise Wrong(message)


def expect_shape(got, shape: tuple[int, ...], name: str = "The result") -> None:
    """Raise `Wrong` unless a tensor, an array or nested lists have this shape."""
    try:
        got_shape = tuple(got.shape) if hasattr(got, "shape") else as_numbers(got).shape
    except Exception:
        got_shape = ()
    if not got_shape and not hasattr(got, "shape"):
        raise Wrong(f"{name} should be a tensor of shape {shape}, not {describe(got)}.")
    expect(got_shape == shape, f"{name} has shape {got_shape}, expected {shape}.")


def expect_close(got, want, message: str, tolerance: float = 1e-5) -> None:
    """Raise `Wrong(message)` unless |got - want| <= tolerance everywhere; shapes must agree too."""
    want = as_numbers(want)
    try:
        numbers = as_numbers(got)
    except (TypeError, ValueError):
        raise Wrong(f"Expected numbers of shape {want.shape}, got {describe(got)}.") from None
    expect(
        numbers.shape == want.shape,
        f"The result has shape {numbers.shape}, expected {want.shape}.",
    )
    expect(bool(np.allclose(numbers, want, rtol=0, atol=tolerance, equal_nan=True)), message)


def expect_none_of(got, *mistakes: tuple[object, str]) -> None:
    """Raise `Wrong(message)` for the first pair (mistake, message) that the answer equals."""
    for mistake, message in mistakes:
        expect(not same(got, mistake), message)


def draw(*shape: int, seed: int = 0):
    """Standard normal numbers, the same for the same seed."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- inputs drawn anew -----------------------------------------------------------------------

_seed: contextvars.ContextVar[int | None] = contextvars.ContextVar("seed", default=None)
_naming = contextvars.ContextVar("naming", default=True)  # mistakes, in `agree`


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Let every `draws()` inside the block begin from this seed; None: anew each time."""
    token = _seed.set(seed)
    try:
        yield
    finally:
        _seed.reset(token)


class Draw:
    """One case: its axes have names and sizes, and its values vary from case to case.

    An axis is given by its name, "n", and has the same size wherever it stands in one case, another
    size than every other axis, and another one than in the case before; or by its size, 3. Tensors
    are float32; with `numpy=True` arrays of float64.
    """

    def __init__(self, seed: int, before: "Draw | None" = None, numpy: bool = False):
        self.rng = np.random.default_rng(seed)
        self.sizes: dict[str, int] = {}
        self.before = before
        self.numpy = numpy
        self._made: list = []  # numbers drawn one at a time, in order

    def size(self, axis: "str | int", low: int = 3, high: int = 11) -> int:
        """The size of an axis, from `low` to `high` when it is drawn now."""
        if isinstance(axis, int):
            return axis
        if axis not in self.sizes:
            taken = set(self.sizes.values())
            taken |= {self.before.sizes.get(axis)} if self.before else set()
            free = [n for n in range(low, high + 1) if n not in taken]
            free = free or [max(high, *self.sizes.values()) + 1]
            self.sizes[axis] = int(self.rng.choice(free))
        return self.sizes[axis]

    def _shape(self, axes: Iterable) -> tuple[int, ...]:
        return tuple(self.size(axis) for axis in axes)

    def _out(self, array: np.ndarray):
        if self.numpy:
            return array
        import torch

        made = torch.from_numpy(np.ascontiguousarray(array))
        return made.float() if made.is_floating_point() else made

    def normal(self, *axes, scale: float = 1.0):
        """Numbers of both signs; the spread, 0.5 to 2 times `scale`, and the mean vary by case."""
        shape = self._shape(axes)
        spread, mean = scale * self.rng.uniform(0.5, 2.0), scale * self.rng.uniform(-0.7, 0.7)
        values = self.rng.normal(mean, spread, shape)
        flat = values.reshape(-1)
        if flat.size > 1 and (flat > 0).all() | (flat < 0).all():
            flat[self.rng.integers(flat.size)] *= -1
        return self._out(values)

    def positive(self, *axes, low: float = 0.1, high: float = 3.0):
        """Numbers between two positive ones, spread evenly in their logarithm."""
        return self._out(np.exp(self.rng.uniform(math.log(low), math.log(high), self._shape(axes))))

    def probabilities(self, *axes):
        """Positive numbers that sum to 1 along the last axis."""
        shape = self._shape(axes)
        return self._out(self.rng.dirichlet(np.ones(shape[-1]), shape[:-1]))

    def unit(self, *axes):
        """Vectors of length 1 along the last axis."""
        values = self.rng.normal(size=self._shape(axes))
        return self._out(values / np.linalg.norm(values, axis=-1, keepdims=True))

    def attention(self, *axes):
        """Causal attention patterns: (..., pos) gives (..., pos, pos), each row summing to 1."""
        shape = self._shape(axes)
        scores = 2 * self.rng.normal(size=(*shape, shape[-1]))
        scores = np.where(np.tri(shape[-1], dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return self._out(weights / weights.sum(-1, keepdims=True))

    def integers(self, low: int, high: int, *axes):
        """Whole numbers from `low` to `high`, both included."""
        return self._out(self.rng.integers(low, high + 1, self._shape(axes)))

    def booleans(self, *axes, share: float = 0.5):
        """Booleans of which both values occur where there are two or more."""
        values = self.rng.random(self._shape(axes)) < share
        flat = values.reshape(-1)
        if flat.size > 1 and flat.all() | ~flat.any():
            flat[self.rng.integers(flat.size)] ^= True
        return self._out(values)

    def permutation(self, axis):
        """The whole numbers below the size of an axis, in some order."""
        return self._out(self.rng.permutation(self.size(axis)))

    def number(self, low: float, high: float) -> float:
        """One number, another in each case."""
        return self._another(lambda: float(self.rng.uniform(low, high)))

    def integer(self, low: int, high: int) -> int:
        """One whole number from `low` to `high`, both included, another than in the case before."""
        return self._another(lambda: int(self.rng.integers(low, high + 1)))

    def choice(self, options):
        """One of some options, another than in the case before."""
        options = list(options)
        return options[self._another(lambda: int(self.rng.integers(len(options))))]

    def sample(self, options, axis) -> list:
        """As many different options as the axis is long, in some order."""
        options, count = list(options), self.size(axis)
        return [options[i] for i in self.rng.permutation(len(options))[:count]]

    def _another(self, make: Callable):
        """A number that differs from the one drawn at this place in the case before."""
        place = len(self._made)
        made = self.before._made if self.before else []  # noqa: SLF001
        last = made[place] if place < len(made) else None
        new = next((each for each in (make() for _ in range(20)) if each != last), last)
        self._made.append(new)
        return new


def draws(count: int = CASES, numpy: bool = False) -> Iterator[Draw]:
    """So many cases, each with other sizes than the one before; other ones at each check."""
    seed = _seed.get()
    source = random.Random(seed)
    case = None
    for _ in range(count):
        case = Draw(source.getrandbits(40), case, numpy)
        yield case
        case.before = None


def agree(
    answer: Callable,
    reference: Callable,
    make: Callable[[Draw], tuple],
    mistakes: Iterable[tuple[Callable, str]] = (),
    otherwise: str = "The result is another.",
    tolerance: float = 1e-5,
    cases: int = CASES,
    numpy: bool = False,
) -> None:
    """Raise `Wrong` unless an answer agrees with the reference on inputs drawn anew.

    Args:
        make: the arguments of one case, a tuple, from a `Draw`
        mistakes: pairs (a function of the same arguments that makes a mistake, what to say of it);
            the first that gives the answer's results in every case is named
        otherwise: what is said of any other result
        tolerance: of a number, times the largest in the reference's result, or 1
        numpy: arrays in place of tensors
    """
    failed, tried = "", []
    for case in draws(cases, numpy):
        given = make(case)
        want, got = reference(*clone(given)), answer(*clone(given))
        failed = failed or difference(got, want, otherwise, tolerance)
        if failed and not _naming.get():
            raise Wrong(failed)
        tried.append((given, got))
    for mistake, said in mistakes if failed else ():
        if all(makes(mistake, *each, tolerance) for each in tried):
            raise Wrong(said)
    if failed:
        raise Wrong(failed)


@contextlib.contextmanager
def unnamed() -> Iterator[None]:
    """While it lasts, `agree` says that an answer is wrong, and looks for no mistake's name."""
    token = _naming.set(False)
    try:
        yield
    finally:
        _naming.reset(token)


def makes(mistake: Callable, given: tuple, got, tolerance: float) -> bool:
    """Whether a mistaken function gives this result."""
    try:
        return not difference(got, mistake(*clone(given)), "other", tolerance)
    except Exception:  # the mistake cannot be made with these arguments
        return False


def difference(got, want, otherwise: str, tolerance: float = 1e-5) -> str:
    """What is wrong with a result, in a sentence; "" where it agrees, of whatever make it is."""
    pairs = None
    if isinstance(want, dict):
        if not isinstance(got, dict):
            return f"Return a dictionary, not {describe(got)}."
        if got.keys() != want.keys():
            return f"The dictionary has {len(got)} keys, and they should be other ones."
        pairs = [(got[key], want[key]) for key in want]
    elif isinstance(want, tuple) or (isinstance(want, list) and not is_numeric(want)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return f"Return {len(want)} things, not {describe(got)}."
        pairs = zip(got, want, strict=True)
    if pairs is not None:
        found = (difference(g, w, otherwise, tolerance) for g, w in pairs)
        return next(filter(None, found), "")
    if not is_numeric(want):
        return "" if got == want else otherwise
    numbers = as_numbers(want)
    scale = max(1.0, float(np.abs(numbers[np.isfinite(numbers)]).max(initial=0)))
    try:
        expect_close(got, want, otherwise, tolerance * scale)
    except Wrong as wrong:
        return str(wrong)
    return ""


def is_numeric(value) -> bool:
    """Whether a value is one of numbers throughout."""
    try:
        as_numbers(value)
    except Exception:
        return False
    return True
