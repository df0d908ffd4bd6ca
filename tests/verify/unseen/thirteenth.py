"""Thirteenth set: wrong gradients that somebody reported, rebuilt small and taken as they were found.

Each `bug` names the report: a repository and a number, or a forum's address. `trigger` says in which situation the
gradient is wrong. A factory builds a public function from its Function, so a wrong function and its right twin have one
signature and one docstring. Under autocast every one computes in float32.
"""

from tests.verify.unseen import THIRTEENTH, pair
from tests.verify.unseen.twelfth import in_float32


def add(name, factory, wrong, right, make, *, bug, trigger, missed=""):
    text = f"{bug}; shows with {trigger}"
    wrong, right = in_float32(factory(wrong)), in_float32(factory(right))
    pair(f"{name}_13", wrong, right, make, text, into=THIRTEENTH, missed=missed)
