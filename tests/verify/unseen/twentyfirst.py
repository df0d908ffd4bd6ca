"""Twenty-first set: one fault each in functions of many fields, from statistics and finance to optics and robotics.

Where the fault was found in a repository, `bug` names it; facts were carried over, neither code nor sentences.
`trigger` says in which situation the gradient is wrong: about half are right at the sample with ones as grad_output.
"""

from functools import partial

from tests.verify.unseen import TWENTYFIRST, twentieth
from tests.verify.unseen.twentieth import check, indices, same, sized

__all__ = ["add", "check", "indices", "positive", "same", "sized"]

add = partial(twentieth.add, into=TWENTYFIRST, ending="21")


def positive(name, t):
    """Refuse anything but positive finite numbers."""
    check(bool(((t > 0) & t.isfinite()).all()), f"{name}: expected positive numbers")
