"""Small wrong changes of a reference, each of which a good check tells from the right answer.

    for mutant in mutants(reference): …         # mutant.function, mutant.change: "a + b → a - b"

Operators, signs, comparisons, calls such as abs and mean, axes, constants, indices off by one,
conditions, an argument ignored: one change each.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mi_helpers.course.answers import clone

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISONS = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
}
LEFT_OUT = "abs absolute clip clamp clamp_min relu sqrt square exp log sorted flip".split()
PAIRS = "tril triu,mean sum,max min,amax amin,argmax argmin,any all,log_softmax softmax"
PAIRS = [pair.split() for pair in f"{PAIRS},zeros_like ones_like".split(",")]
MISTAKEN = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])} | {"norm": "sum"}
BUILTIN = ("sum", "max", "min", "any", "all")
AXES = ("axis", "dim")
WITH_AXIS = (
    "sum mean max min argmax argmin softmax log_softmax std var amax amin cumsum flip any all"
)
WITH_AXIS = {*WITH_AXIS.split(), "sort", "argsort", "unsqueeze", "norm"}
MODULES = ("torch", "np", "numpy", "F", "math")


@dataclass(frozen=True)
class Mutant:
    """A changed function, and the change in words: "before → after"."""

    change: str
    function: Callable


def mutants(reference: Callable) -> list[Mutant]:
    """Every mutant of a function whose text differs from its own and from each other's."""
    own = inspect.unwrap(reference)
    tree = ast.parse(textwrap.dedent(inspect.getsource(own)))
    texts = {ast.unparse(tree): ""}
    for change, text in changes(tree):
        texts.setdefault(text, change)
    found = []
    for text, change in list(texts.items())[1:]:
        names = dict(own.__globals__)
        exec(compile(text, f"<mutant of {own.__name__}>", "exec"), names)
        found.append(Mutant(change, names[own.__name__]))
    return found + [
        Mutant(f"{name} → its first value, always", stuck(reference, name))
        for name in inspect.signature(reference).parameters
    ]


def stuck(function: Callable, name: str) -> Callable:
    """The function with the value that an argument had in the first call, in every call."""
    signature, first = inspect.signature(function), []

    def call(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        if name in bound.arguments:
            first.append(clone(bound.arguments[name]))
            bound.arguments[name] = clone(first[0])
        return function(*bound.args, **bound.kwargs)

    call.__wrapped__ = function
    return call


def edited(function: Callable, *changes: str) -> Callable:
    """The function with pieces of its text replaced: a wrong answer in one line.

        edited(project_out, "x - centre", "x")

    Args:
        changes: old, new, old, new, …; every occurrence is replaced, and there has to be one

    Raises:
        ValueError: an old piece does not stand in the text.
    """
    text = textwrap.dedent(inspect.getsource(function))
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        if old not in text:
            raise ValueError(f"{function.__name__} has no {old!r} in its text.")
        text = text.replace(old, new)
    names: dict = {}
    exec(compile(text, f"<{function.__name__}, edited>", "exec"), function.__globals__, names)
    return names[function.__name__]


def edits(function: Callable, table: str) -> list[tuple[Callable, str]]:
    """Pairs (the function edited, what is to be said of it) from a table of text, for `wrong` of an
    exercise and `mistakes` of `agree` alike:

        x - centre → x
            You project x itself: the centre is left out.

    Each `old → new` stands at the margin, and its message is indented below it. An empty `new`
    leaves a piece out; a line that begins with `& ` is one more change of the same wrong answer.

    Raises:
        ValueError: a line at the margin is no change, an old piece does not stand in the text, or a
            change has no message.
    """
    found: list[tuple[list[str], list[str]]] = []  # pieces, old and new; lines of the message
    for line in textwrap.dedent(table).strip().splitlines():
        if line.startswith(" "):
            found[-1][1].append(line.strip())
            continue
        old, arrow, new = map(str.strip, line.removeprefix("& ").partition("→"))
        if not arrow:
            raise ValueError(f"{line!r} is no change: write 'old → new', its message indented.")
        if not line.startswith("& "):
            found.append(([], []))
        found[-1][0].extend((old, new))
    if not all(message for _, message in found):
        raise ValueError(f"A change of {function.__name__} has no message below it.")
    return [(edited(function, *pieces), " ".join(message)) for pieces, message in found]


# -- the changes -----------------------------------------------------------------------------


def changes(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """("before → after", the whole text with that change) for each change of each node."""
    for place, key, parent in list(spots(tree)):
        node = place[key]
        for new in variants(node, parent):
            place[key] = new
            yield (
                f"{ast.unparse(node)} → {ast.unparse(new)}",
                ast.unparse(ast.fix_missing_locations(tree)),
            )
            place[key] = node


def spots(node: ast.AST) -> Iterator[tuple]:
    """(list or dictionary, its key, parent) of each node in the bodies of functions."""
    for name, value in ast.iter_fields(node):
        if isinstance(node, ast.FunctionDef) and name != "body":
            continue  # decorators, parameters
        place = value if isinstance(value, list) else vars(node)
        for key in range(len(value)) if isinstance(value, list) else [name]:
            if isinstance(place[key], ast.AST):
                yield place, key, node
                yield from spots(place[key])


def variants(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """What one node may be mistaken for."""
    if isinstance(parent, (ast.If, ast.IfExp)) and node is parent.test:
        yield ast.UnaryOp(ast.Not(), node)
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield altered(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        if not isinstance(node.operand, ast.Constant):
            yield node.operand
    elif isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                yield altered(node, ops=[*node.ops[:place], other(), *node.ops[place + 1 :]])
    elif isinstance(node, ast.BoolOp):
        yield altered(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, ast.Call):
        yield from of_call(node)
    elif isinstance(node, ast.Subscript):
        yield from of_index(node)
    elif isinstance(node, ast.Constant):
        yield from of_constant(node, parent)
    elif isinstance(node, ast.Attribute) and node.attr in ("T", "mT"):
        yield node.value


def altered(node: ast.AST, **fields) -> ast.AST:
    """A node with other fields."""
    return type(node)(**(dict(ast.iter_fields(node)) | fields))


def of_call(node: ast.Call) -> Iterator[ast.AST]:
    """Another function, none, another axis, a range off by one."""
    method = isinstance(node.func, ast.Attribute)
    name = node.func.attr if method else getattr(node.func, "id", "")
    module = method and isinstance(node.func.value, ast.Name) and node.func.value.id in MODULES
    if name in LEFT_OUT:
        yield from node.args[:1] if module or not method else [node.func.value]
    if (other := MISTAKEN.get(name)) and (method or other in BUILTIN):
        yield altered(
            node, func=altered(node.func, attr=other) if method else ast.Name(other, ast.Load())
        )
    if name == "range":
        *start, stop = node.args[:2]
        yield altered(node, args=[*start, plus(stop, -1), *node.args[2:]])
        begin = start[0] if start else ast.Constant(0)
        yield altered(node, args=[plus(begin, 1), stop, *node.args[2:]])
    for place, keyword in enumerate(node.keywords):
        if keyword.arg in AXES and (axis := other_axis(keyword.value)):
            new = altered(keyword, value=axis)
            yield altered(node, keywords=[*node.keywords[:place], new, *node.keywords[place + 1 :]])
    at = 1 if module else 0
    if method and name in WITH_AXIS and len(node.args) > at and (axis := other_axis(node.args[at])):
        yield altered(node, args=[*node.args[:at], axis, *node.args[at + 1 :]])


def whole(node: ast.AST) -> int | None:
    """The whole number that a node is, signs included; None for others."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
    return value if type(value) is int else None


def other_axis(node: ast.AST) -> ast.AST | None:
    """Another axis than this one; None where it is no number."""
    axis = whole(node)
    return None if axis is None else number({0: 1, 1: 0, -1: 0, -2: -1}.get(axis, axis - 1))


def number(value) -> ast.AST:
    """The node of a number, negative ones included."""
    return ast.UnaryOp(ast.USub(), ast.Constant(-value)) if value < 0 else ast.Constant(value)


def plus(node: ast.AST, by: int) -> ast.AST:
    """A node plus a whole number."""
    value = whole(node)
    if value is not None:
        return number(value + by)
    return ast.BinOp(node, ast.Add() if by > 0 else ast.Sub(), ast.Constant(abs(by)))


def of_index(node: ast.Subscript) -> Iterator[ast.AST]:
    """An index that is computed, or the end of a slice, off by one."""
    index = node.slice
    if isinstance(index, ast.Slice):
        for side in ("lower", "upper"):
            if (bound := getattr(index, side)) is not None and whole(bound) is None:
                yield altered(node, slice=altered(index, **{side: plus(bound, 1)}))
    elif isinstance(index, (ast.Name, ast.BinOp)) and isinstance(node.ctx, ast.Load):
        yield altered(node, slice=plus(index, -1))


def of_constant(node: ast.Constant, parent: ast.AST) -> Iterator[ast.AST]:
    """Another boolean; a whole number plus 1; another number doubled."""
    if isinstance(parent, ast.keyword) and parent.arg in AXES:
        return  # axes have changes of their own
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield number(node.value + 1)
    elif isinstance(node.value, float):
        yield ast.Constant(2 * node.value if node.value else 1.0)
