"""The mechanical changes: each takes a node of the syntax tree and yields what may stand in its place."""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Change", "changed", "changes"]

_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
_ORDER = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
}
_TWINS = [("add", "sub"), ("mul", "div"), ("ge", "gt"), ("le", "lt"), ("gt", "lt"), ("eq", "ne")]
_TWINS += [
    ("minimum", "maximum"),
    ("amin", "amax"),
    ("sum", "mean"),
    ("sin", "cos"),
    ("exp", "log"),
]
_OTHER_METHOD: dict[str, list[str]] = {}
for _a, _b in _TWINS:
    for _end in ("", "_"):
        _OTHER_METHOD.setdefault(_a + _end, []).append(_b + _end)
        _OTHER_METHOD.setdefault(_b + _end, []).append(_a + _end)
_COPIES = ("clone", "contiguous", "detach", "conj", "float", "double", "to", "neg", "neg_", "abs")
_COPIES += ("expand_as", "expand", "sum_to_size")
_WRITES = {ast.Add: "add_", ast.Sub: "sub_", ast.Mult: "mul_", ast.Div: "div_"}


@dataclass(frozen=True)
class Change:
    """One change to a file: what stands from ``start`` to ``end`` (bytes of its text) becomes ``new``."""

    module: str
    function: str
    kind: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self):
        place = f"{self.module.removeprefix('torchbp.ops.')}:{self.line} {self.function}"
        return f"{place} [{self.kind}] {_short(self.old)}  ->  {_short(self.new)}"


def _short(text):
    text = " ".join(text.split())
    return text if len(text) <= 90 else f"{text[:60]} ... {text[-26:]}"


def changed(text, change):
    """Return the text of the file with the change made."""
    data = text.encode()
    return (data[: change.start] + change.new.encode() + data[change.end :]).decode()


def changes(file, function) -> Iterator[Change]:
    """Yield every change to a function of a file."""
    lines = [0]
    for line in file.text.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    data = file.text.encode()
    top = file.functions[function]
    for node, parents in _body(top):
        for kind, new, *of in _of_node(node, parents, top):
            at = of[0] if of else node
            start = lines[at.lineno - 1] + at.col_offset
            end = lines[at.end_lineno - 1] + at.end_col_offset
            written = ast.unparse(new)
            written = f"({written})" if isinstance(new, ast.expr) else written
            old = data[start:end].decode()
            yield Change(file.module, function, kind, at.lineno, start, end, old, written)


def _body(top):
    """Yield the nodes of a function that may be changed, each with its parents: no annotation, no check of inputs."""
    todo = [(statement, (top,)) for statement in reversed(top.body)]
    while todo:
        node, parents = todo.pop()
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.FunctionDef, ast.arguments)):
            if isinstance(node, ast.FunctionDef):
                todo += [(s, (*parents, node)) for s in reversed(node.body)]
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.If) and all(isinstance(s, ast.Raise) for s in node.body):
            continue
        yield node, parents
        children = [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.expr_context)]
        if isinstance(node, ast.AnnAssign):
            children = [c for c in children if c is not node.annotation]
        todo += [(c, (*parents, node)) for c in reversed(children)]


def _of_node(node, parents, top) -> Iterator[tuple]:
    """Yield (kind, what may stand in its place, in whose place if not the node's)."""
    if isinstance(node, ast.BinOp):
        yield from _of_binary(node)
    elif isinstance(node, ast.UnaryOp):
        if isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            yield "sign", node.operand
            if not isinstance(node.operand, ast.Constant):
                yield "in place", _call(node.operand, "neg_")
        if isinstance(node.op, ast.Not):
            yield "condition negated", node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for other in _ORDER.get(type(node.ops[0]), ()):
            yield "comparison", _with(node, ops=[other()])
        if isinstance(node.ops[0], (ast.Is, ast.IsNot)):
            other = ast.IsNot() if isinstance(node.ops[0], ast.Is) else ast.Is()
            yield "condition negated", _with(node, ops=[other])
    elif isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield "and, or", _with(node, op=other)
        for k in range(len(node.values)):
            rest = node.values[:k] + node.values[k + 1 :]
            yield "condition dropped", rest[0] if len(rest) == 1 else _with(node, values=rest)
    elif isinstance(node, ast.IfExp):
        yield "branches exchanged", _with(node, body=node.orelse, orelse=node.body)
        yield "branch dropped", node.body
        yield "branch dropped", node.orelse
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node, parents)
    elif isinstance(node, ast.Call):
        yield from _of_call(node)
    elif isinstance(node, ast.Subscript):
        yield from _of_subscript(node)
    elif isinstance(node, ast.stmt):
        yield from _of_statement(node, parents, top)


def _of_binary(node):
    other = _ARITHMETIC.get(type(node.op))
    if other is None:
        return
    yield "arithmetic", _with(node, op=other())
    yield "operand dropped", node.left
    minus = isinstance(node.op, ast.Sub)
    yield "operand dropped", ast.UnaryOp(ast.USub(), node.right) if minus else node.right
    if isinstance(node.op, (ast.Mult, ast.Div)):
        yield "sign", ast.UnaryOp(ast.USub(), ast.BinOp(node.left, node.op, node.right))
    if not isinstance(node.left, ast.Constant):
        yield "in place", _call(node.left, _WRITES[type(node.op)], node.right)
    if isinstance(node.op, (ast.Sub, ast.Div)):
        yield "operands exchanged", _with(node, left=node.right, right=node.left)


def _of_constant(node, parents):
    value, parent = node.value, parents[-1]
    if isinstance(value, bool):
        yield "flag", ast.Constant(not value)
    elif isinstance(value, (int, float)):
        named = isinstance(parent, ast.keyword) and parent.arg == "dim"
        if isinstance(parent, ast.UnaryOp) or named:
            return  # a dimension, which _of_call changes
        other = 1 if value in (0, 0.5) else value - 1 if isinstance(value, int) else 2 * value
        yield "constant", ast.Constant(other)


def _of_call(node):
    name = node.func.attr if isinstance(node.func, ast.Attribute) else None
    if isinstance(node.func, ast.Name):
        name = node.func.id
    method = isinstance(node.func, ast.Attribute)
    if name in _OTHER_METHOD and method:
        kind = "sum, mean" if name in ("sum", "mean") else "method"
        for other in _OTHER_METHOD[name]:
            yield kind, _with(node, func=_with(node.func, attr=other))
    if (
        method
        and name in ("sum", "mean", "amax", "amin", "prod")
        and not _is_torch(node.func.value)
    ):
        yield "reduction dropped", node.func.value
    if method and name in _COPIES and not _is_torch(node.func.value):
        yield f"{name.rstrip('_')} dropped", node.func.value
    if name == "where" and len(node.args) == 3:
        a, b, c = node.args
        yield "branches exchanged", _with(node, args=[a, c, b])
    for k, word in enumerate(node.keywords):
        rest = node.keywords[:k] + node.keywords[k + 1 :]
        if word.arg == "keepdim":
            yield "keepdim dropped", _with(node, keywords=rest)
        elif word.arg in ("dim", "dtype"):
            if word.arg == "dim" and _dim(word.value) is not None:
                other = ast.keyword("dim", ast.Constant(0 if _dim(word.value) else -1))
                words = [*node.keywords[:k], other, *node.keywords[k + 1 :]]
                yield "dim", _with(node, keywords=words)
            else:
                yield f"{word.arg} dropped", _with(node, keywords=rest)
    for k, argument in enumerate(node.args):
        if isinstance(argument, ast.UnaryOp) and _dim(argument) is not None:
            args = [*node.args[:k], ast.Constant(0), *node.args[k + 1 :]]
            yield "dim", _with(node, args=args)
    saves = name in ("save_for_backward", "save_for_forward")
    for k in range(len(node.args) - 1):
        a, b = node.args[k], node.args[k + 1]
        plain = not any(isinstance(x, (ast.Starred, ast.Lambda)) for x in (a, b))
        if plain and ast.dump(a) != ast.dump(b):
            args = [*node.args[:k], b, a, *node.args[k + 2 :]]
            yield "saved exchanged" if saves else "arguments exchanged", _with(node, args=args)


def _of_subscript(node):
    about = ast.unparse(node.value)
    if isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, int):
        kind = "needs_input_grad" if about.endswith("needs_input_grad") else "index"
        for other in {0, 1, node.slice.value + 1} - {node.slice.value}:
            yield kind, _with(node, slice=ast.Constant(other))


def _of_statement(node, parents, top):
    last = isinstance(node, ast.Return)
    nested = any(isinstance(p, ast.FunctionDef) for p in parents[1:])
    root = top.name in ("backward", "jvp", "setup_context")
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
        names, about = node.targets[0].elts, ast.unparse(node.value)
        wants = "needs_input_grad" in about
        if wants or "saved" in about:
            kind = "needs_input_grad" if wants else "saved exchanged"
            for k in range(len(names) - 1):
                if ast.dump(names[k]) != ast.dump(names[k + 1]):
                    elts = [*names[:k], names[k + 1], names[k], *names[k + 2 :]]
                    new = _with(node, targets=[_with(node.targets[0], elts=elts)])
                    starred = sum(isinstance(e, ast.Starred) for e in elts)
                    if starred <= 1:
                        yield kind, new
    if last and top.name == "backward" and not nested and node.value is not None:
        values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        for k, value in enumerate(values):
            if isinstance(value, (ast.Starred, ast.Constant)):
                continue
            elts = [*values[:k], ast.Constant(None), *values[k + 1 :]]
            whole = _with(node.value, elts=elts) if isinstance(node.value, ast.Tuple) else elts[0]
            yield "None for a gradient", _with(node, value=whole)
    single = last and not isinstance(node.value, (ast.Tuple, ast.Constant, type(None)))
    if single and top.name != "setup_context":
        yield "sign", _with(node, value=ast.UnaryOp(ast.USub(), node.value))
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not root:
        yield "early return", ast.Return(node.value)
    if isinstance(node, (ast.If, ast.While)):
        yield "condition negated", ast.UnaryOp(ast.Not(), node.test), node.test
        yield "branch dropped", ast.Constant(False), node.test
        yield "branch dropped", ast.Constant(True), node.test
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "statement dropped", ast.Pass()
    if isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
        yield "arithmetic", _with(node, op=_ARITHMETIC[type(node.op)]())
        yield "statement dropped", ast.Pass()


def _is_torch(node):
    return isinstance(node, ast.Name) and node.id in ("torch", "F", "_nn", "math")


def _dim(node):
    """Return the number that a dimension is given by, or ``None``."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _call(receiver, method, *args):
    return ast.Call(ast.Attribute(receiver, method, ast.Load()), list(args), [])


def _with(node, **fields):
    """Return a copy of ``node`` with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new
