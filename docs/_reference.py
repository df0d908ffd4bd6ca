"""The directive ``.. ops:: FAMILY``: every op of a folder of torchbp/ops, from its record and its docstrings.

An op is one file, so what the site shows of it is one section: the function, its Modules, and the derivation that
stands at the head of the file. A new op appears without an edit here. Two small things besides: formulas are MathML,
and a link out of docs/ leads to the file.
"""

import re
import sys
from inspect import unwrap
from textwrap import indent
from typing import Any, ClassVar

from docutils.nodes import Node, SkipNode, math_block
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from torch import nn

from torchbp.ops._op import Op, all_ops


class Ops(SphinxDirective):
    """One section an op."""

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[Node]:
        """Return the sections."""
        written: set[str] = set()
        text: list[str] = []
        for name, op in all_ops().items():
            home = _home(op)
            if home.startswith(f"torchbp.ops.{self.arguments[0]}."):
                text.append(_section(name, op, home if home not in written else None))
                written.add(home)
        if not text:
            raise self.error(f"ops: expected a folder of torchbp/ops, got {self.arguments[0]}")
        return self.parse_text_to_nodes("\n\n".join(text), allow_section_headings=True)


def _home(op: Op) -> str:
    """Return the name of the file that the op stands in."""
    return unwrap(op.function).__globals__["__name__"]


def _section(name: str, op: Op, home: str | None) -> str:
    parts = [f"{name}\n{'-' * len(name)}", f".. autofunction:: torchbp.functional.{name}"]
    parts += [f".. autoclass:: torchbp.nn.{_call(module)}" for module in op.modules]
    if home is not None:
        derivation = (sys.modules[home].__doc__ or "").strip()
        parts.append(
            f".. code-block:: text\n   :caption: Derivation\n\n{indent(derivation, '   ')}"
        )
    return "\n\n".join(parts)


def _call(module: type[nn.Module]) -> str:
    """Return the name, with empty brackets where there is nothing to say to the constructor."""
    return module.__name__ + "()" * (module.__init__ is nn.Module.__init__)


def _formula(self: Any, node: Node) -> None:
    """Write a formula as MathML, which browsers show without a script from elsewhere."""
    self.body.append(tex2mathml(node.astext(), as_block=isinstance(node, math_block)))
    raise SkipNode


def _outward(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Make of a link to a Markdown file outside of docs/, which is no page of the site, one to the file."""
    source[0] = re.sub(r"\]\((\.\./[^)#\s]+\.md)(#[^)\s]*)?\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all three."""
    app.add_directive("ops", Ops)
    app.connect("source-read", _outward)
    app.add_html_math_renderer("mathml", (_formula, None), (_formula, None))
    return {"parallel_read_safe": True}
