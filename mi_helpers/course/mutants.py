"""Small wrong changes of a reference, each of which a good check tells from the right answer.

    for mutant in mutants(reference): …         # mutant.function, mutant.change: "a + b → a - b"

Operators, signs, comparisons, calls such as abs and mean, axes, constants, indices off by one,
conditions, an argument ignored: one change each.
"""

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mi_helpers.course.values import clone

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
CALLS = {  # what a call is mistaken for; "" is leaving it out
    "abs": ("",),
    "absolute": ("",),
    "clip": ("",),
    "clamp": ("",),
    "clamp_min": ("",),
    "relu": ("",),
    "sqrt": ("",),
    "square": ("",),
    "exp": ("",),
    "log": ("",),
    "sorted": ("",),
    "flip": ("",),
    "tril": ("triu",),
    "triu": ("tril",),
    "mean": ("sum",),
    "sum": ("mean",),
    "max": ("min",),
    "min": ("max",),
    "amax": ("amin",),
    "amin": ("amax",),
    "argmax": ("argmin",),
    "argmin": ("argmax",),
    "any": ("all",),
    "all": ("any",),
    "log_softmax": ("softmax",),
    "softmax": ("log_softmax",),
    "zeros_like": ("ones_like",),
    "ones_like": ("zeros_like",),
    "norm": ("sum",),
}
AXES = ("axis", "dim")
WITH_AXIS = {
    "sum",
    "mean",
    "max",
    "min",
    "argmax",
    "argmin",
    "softmax",
    "log_softmax",
    "std",
    "var",
}
WITH_AXIS |= {
    "amax",
    "amin",
    "cumsum",
    "flip",
    "any",
    "all",
    "sort",
    "argsort",
    "unsqueeze",
    "norm",
}


@dataclass(frozen=True)
class Mutant:
    """A changed function, and the change in words: "before → after"."""

    change: str
    function: Callable


def mutants(reference: Callable) -> list[Mutant]:
    """Every mutant of a function whose instructions differ from its own and from each other's."""
    own = inspect.unwrap(reference)
    tree = ast.parse(textwrap.dedent(inspect.getsource(own)))
    seen, made = {code_of(tree, own)}, []
    for change, mutated in changes(tree):
        ast.fix_missing_locations(mutated)
        body = code_of(mutated, own)
        if body not in seen:
            seen.add(body)
            made.append(Mutant(change, define(mutated, own)))
    return made + [
        Mutant(f"{name} → its first value, always", stuck(reference, name))
        for name in inspect.signature(reference).parameters
    ]


def define(tree: ast.Module, own: Callable) -> Callable:
    """The function of a tree, among the names of the one that it is made from."""
    names = dict(own.__globals__)
    exec(compile(tree, f"<mutant of {own.__name__}>", "exec"), names)
    return names[own.__name__]


def code_of(tree: ast.Module, own: Callable) -> tuple:
    """The instructions of a tree, to be compared."""
    return flat(compile(tree, own.__name__, "exec", optimize=2))


def flat(body) -> tuple:
    """A code object without its lines."""
    constants = tuple(
        flat(each) if hasattr(each, "co_code") else repr(each) for each in body.co_consts
    )
    return body.co_code, body.co_names, body.co_varnames, constants


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


# -- the changes -----------------------------------------------------------------------------


def changes(tree: ast.Module) -> Iterator[tuple[str, ast.Module]]:
    """("before → after", the whole tree with that change) for each change of each node."""
    skipped = set()
    function = tree.body[0]
    for part in (*function.decorator_list, function.args, function.returns):
        skipped |= {id(node) for node in ast.walk(part)} if part else set()
    if ast.get_docstring(function):
        skipped |= {id(node) for node in ast.walk(function.body[0])}
    nodes = list(ast.walk(tree))
    parents = {id(child): node for node in nodes for child in ast.iter_child_nodes(node)}
    for place, node in enumerate(nodes):
        if id(node) in skipped:
            continue
        for new in variants(node, parents.get(id(node))):
            changed = copy.deepcopy(tree)
            replace(changed, place, new)
            yield f"{ast.unparse(node)} → {ast.unparse(new)}", changed


def replace(tree: ast.Module, place: int, new: ast.AST) -> None:
    """Put a node in the place of the one that `ast.walk` comes to at a number."""
    old = list(ast.walk(tree))[place]
    for node in ast.walk(tree):
        for name, value in ast.iter_fields(node):
            if value is old:
                setattr(node, name, new)
            elif isinstance(value, list):
                value[:] = [new if each is old else each for each in value]


def variants(node: ast.AST, parent: ast.AST | None) -> Iterator[ast.AST]:
    """What one node may be mistaken for."""
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATORS:
        yield altered(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        if not isinstance(node.operand, ast.Constant):
            yield node.operand
    elif isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS.get(type(operator), ()):
                ops = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                yield altered(node, ops=ops)
    elif isinstance(node, ast.BoolOp):
        yield altered(node, op=ast.And() if isinstance(node.op, ast.Or) else ast.Or())
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield altered(node, test=ast.UnaryOp(ast.Not(), node.test))
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
    for other in CALLS.get(name, ()):
        if other:
            new = altered(node.func, attr=other) if method else ast.Name(other, ast.Load())
            if method or other in ("sum", "max", "min", "any", "all"):
                yield altered(node, func=new)
        elif module or not method:
            yield from node.args[:1]
        else:
            yield node.func.value
    if name == "range":
        *start, stop = node.args[:2]
        yield altered(node, args=[*start, plus(stop, -1), *node.args[2:]])
        begin = start[0] if start else ast.Constant(0)
        yield altered(node, args=[plus(begin, 1), stop, *node.args[2:]])
    for place, keyword in enumerate(node.keywords):
        if keyword.arg in AXES:
            for axis in other_axes(keyword.value):
                new = altered(keyword, value=axis)
                keywords = [*node.keywords[:place], new, *node.keywords[place + 1 :]]
                yield altered(node, keywords=keywords)
    at = 1 if module else 0
    if method and name in WITH_AXIS and len(node.args) > at:
        for axis in other_axes(node.args[at]):
            yield altered(node, args=[*node.args[:at], axis, *node.args[at + 1 :]])


MODULES = ("torch", "np", "numpy", "F", "math")


def whole(node: ast.AST) -> int | None:
    """The whole number that a node is, signs included; None for others."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError):
        return None
    return value if type(value) is int else None


def other_axes(node: ast.AST) -> Iterator[ast.AST]:
    """Another axis than this one."""
    axis = whole(node)
    if axis is not None:
        yield number({0: 1, 1: 0, -1: 0, -2: -1}.get(axis, axis - 1))


def number(value) -> ast.AST:
    """The node of a number, negative ones included."""
    if value < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)


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


def of_constant(node: ast.Constant, parent: ast.AST | None) -> Iterator[ast.AST]:
    """Another boolean; a whole number plus 1; another number doubled."""
    if isinstance(parent, ast.keyword) and parent.arg in AXES:
        return  # axes have changes of their own
    if isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield number(node.value + 1)
    elif isinstance(node.value, float):
        yield ast.Constant(2 * node.value if node.value else 1.0)
