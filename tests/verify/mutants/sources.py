"""Which functions of an op's files compute its gradients, and nothing else."""

import ast
import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["File", "file_of", "gradient_functions", "importers"]

_ROOTS = ("backward", "jvp", "setup_context")


@dataclass(frozen=True)
class File:
    """A module's source: its functions and methods, and what each name stands for."""

    module: str
    path: Path
    text: str
    functions: dict[str, ast.AST]  # "f", or "Class.method"
    classes: dict[str, tuple[str, ...]]  # the methods of each
    values: dict[str, ast.AST]  # what is assigned to a name of the module
    imported: dict[str, tuple[str, str]]  # a name -> the module and name it comes from

    def __hash__(self):
        return hash(self.module)


@cache
def file_of(module):
    """Return the source of a module of torchbp's ops."""
    path = Path(importlib.util.find_spec(module).origin)
    text = path.read_text()
    functions, classes, values, imported = {}, {}, {}, {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            functions.update((f"{node.name}.{m.name}", m) for m in methods)
            classes[node.name] = tuple(m.name for m in methods)
        elif isinstance(node, ast.Assign):
            values.update((t.id, node.value) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.update((a.asname or a.name, (node.module, a.name)) for a in node.names)
    return File(module, path, text, functions, classes, values, imported)


def gradient_functions(module, function):
    """Return (module, name) of all functions that the gradient of ``function`` needs and its value does not.

    Those of the op's file and of private files beside it: what all ops share is tested by all of them.
    """
    folder = module.rpartition(".")[0]
    value, classes = _reached([(module, function)])
    gradient, todo = set(), set(classes)
    seen = set()
    while todo:
        seen |= todo
        roots = [
            (m, f"{name}.{method}")
            for m, name in todo
            for method in file_of(m).classes[name]
            if method in _ROOTS
        ]
        found, others = _reached(roots)
        gradient |= found
        todo = others - seen
    own = {m for m, _ in gradient if m == module or m.startswith(f"{folder}._")}
    return sorted((m, name) for m, name in gradient - value if m in own)


def _reached(start):
    """Return the functions reached from ``start`` and the classes of Functions whose forward is among them."""
    functions, classes, values, todo = set(), set(), set(), list(start)
    while todo:
        module, name = todo.pop()
        file = file_of(module)
        if name in file.imported and name not in file.functions:
            origin, of = file.imported[name]
            if origin.count(".") > 2 and origin.startswith("torchbp.ops."):
                todo.append((origin, of))
        elif name in file.functions and (module, name) not in functions:
            functions.add((module, name))
            todo += [(module, n) for n in _names(file.functions[name])]
        elif name in file.values and (module, name) not in values:
            values.add((module, name))
            todo += [(module, n) for n in _names(file.values[name])]
        elif "backward" in file.classes.get(name, ()) and (module, name) not in classes:
            classes.add((module, name))
            todo.append((module, f"{name}.forward"))
    return functions, classes


def _names(node):
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def importers(module):
    """Return the modules of ops that import ``module``, however indirectly, and itself."""
    uses = {}
    for name in [n for n in sys.modules if n.startswith("torchbp.ops.") and n.count(".") > 2]:
        uses[name] = {origin for origin, _ in file_of(name).imported.values()}
    found, before = {module}, set()
    while found != before:
        before = set(found)
        found |= {name for name, of in uses.items() if of & before}
    return found
