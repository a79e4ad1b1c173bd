"""What an answer returns and is given: numbers of any make, kinds, copies; a value in words."""

import numbers
import re
import types

import numpy as np

PLAIN = (list, tuple, dict, set)
FLOATS = "f"  # NumPy's letter


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


def is_tensor(value) -> bool:
    """Whether a value is a torch tensor, without loading torch for it."""
    return hasattr(value, "detach") and hasattr(value, "dtype")


def as_numbers(value) -> np.ndarray:
    """A float64 array of numbers: one, (nested) lists of them, arrays, tensors on any device.

    Raises:
        TypeError: there is something in it that is no real number.
    """
    if is_tensor(value):
        value = value.detach().double().cpu()
        return (value.to_dense() if value.is_sparse else value).numpy()
    if isinstance(value, (list, tuple, range)):
        return np.array([as_numbers(each) for each in value], dtype=np.float64)
    array = np.asarray(value)
    if array.dtype == object and array.ndim:
        return np.array([as_numbers(each) for each in array.tolist()], dtype=np.float64)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"not a number: {describe(value)}")
    return array.astype(np.float64)


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
    if type(value) in PLAIN:
        return type(value)(clone(each) for each in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(clone, value))
    return value


def unchanged(value, copy) -> bool:
    """Whether a copy that was handed out still equals its original."""
    if copy is value:
        return True
    if is_tensor(value) or isinstance(value, np.ndarray):
        if type(copy) is not type(value) or copy.shape != value.shape:
            return False
        return same(copy, value) if value.dtype != object else True
    if isinstance(value, dict):
        return copy.keys() == value.keys() and all(unchanged(value[k], copy[k]) for k in value)
    if isinstance(value, (list, tuple)):
        return len(copy) == len(value) and all(map(unchanged, value, copy))
    return bool(copy == value)


def same(got, other) -> bool:
    """Whether two values agree in shape and, to 1e-6, in numbers."""
    try:
        got, other = as_numbers(got), as_numbers(other)
        return got.shape == other.shape and np.allclose(got, other, atol=1e-6, equal_nan=True)
    except Exception:  # of a value that does not let itself be read
        return False


# -- kinds -----------------------------------------------------------------------------------


def kind_of(value):
    """What a value is made of, for `as_kind`: hashable, compared with ==."""
    if is_tensor(value):
        return "tensor", value.dtype
    if isinstance(value, np.ndarray):
        return "array", value.dtype.str
    if isinstance(value, tuple):
        return ("tuple", *map(kind_of, value))
    if isinstance(value, list):
        return "list", kind_of(value[0]) if value else None
    if isinstance(value, dict):
        return "dict", kind_of(next(iter(value.values()))) if value else None
    return "one", type(value)


def as_kind(value, kind):
    """The same answer in the make that a reference has; as it is where that would change it.

    A list, an array or a tensor becomes whichever the kind says; floats keep to floats, integers to
    integers and booleans to booleans; a stacked tensor becomes the tuple of its rows.
    """
    try:
        made = converted(value, kind)
    except Exception:  # it cannot be read as that kind: whoever judges it says what it is
        return value
    return value if made is None else made


def converted(value, kind):
    """What `as_kind` makes of a value, or None where it does not apply."""
    if kind is None or kind_of(value) == kind:
        return value
    name, *rest = kind
    if name in ("tensor", "array"):
        return as_array(value, name, rest[0])
    if name == "tuple":
        rows = list(value) if is_sequence(value) else []
        return tuple(map(as_kind, rows, rest)) if len(rows) == len(rest) else None
    if name == "list":
        made = [converted(each, rest[0]) for each in value] if is_sequence(value) else [None]
        return None if any(each is None for each in made) else made
    if name == "dict":
        return {k: as_kind(v, rest[0]) for k, v in value.items()} if type(value) is dict else None
    return as_one(value, rest[0])


def is_sequence(value) -> bool:
    """Whether a value has rows in order."""
    if is_tensor(value) or isinstance(value, np.ndarray):
        return value.ndim > 0
    return type(value) in (list, tuple)


def as_array(value, name: str, dtype):
    """A tensor or an array of this dtype; None where that would not be the same sort of number."""
    import torch

    found = bare(value)
    sort = "i" if found.dtype.kind == "u" else found.dtype.kind
    wanted = np.dtype(dtype).kind if name == "array" else sort_of(dtype)
    wanted = "i" if wanted == "u" else wanted
    if sort not in "bif" or (sort != wanted and (sort, wanted) != ("i", FLOATS)):
        return None
    return found.astype(dtype) if name == "array" else torch.from_numpy(found.copy()).to(dtype)


def bare(value) -> np.ndarray:
    """An array of a tensor, an array or nested lists, in their own sort of number."""
    if is_tensor(value):
        value = value.detach().cpu()
        return (value if sort_of(value.dtype) != FLOATS else value.double()).numpy()
    if isinstance(value, (list, tuple)):
        return np.array([bare(each) for each in value])
    return np.asarray(value)


def sort_of(dtype) -> str:
    """ "f", "i" or "b": whether a torch dtype holds floats, integers or booleans."""
    if dtype.is_floating_point:
        return FLOATS
    return "b" if str(dtype) == "torch.bool" else "i"


def as_one(value, kind: type):
    """A single number as Python's own, or None."""
    if kind is type(None) or isinstance(value, types.FunctionType):
        return None
    if kind is set and isinstance(value, (frozenset, list, tuple)):
        return set(value) if len(set(value)) == len(value) else None
    if not issubclass(kind, (numbers.Number, np.generic)):
        return None
    found = bare(value)
    if found.ndim or found.dtype.kind not in "biufc":
        return None
    one = found.item()
    if isinstance(one, bool) != issubclass(kind, (bool, np.bool_)):
        return None
    if issubclass(kind, (int, np.integer)) and one != int(one):
        return None
    return kind(one)
