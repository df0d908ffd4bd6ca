"""What the function under test raises, and whether it meant to."""

import dis
import textwrap
from pathlib import Path
from types import TracebackType

import torch

__all__ = ["SHAPE", "BackwardRaised", "ForwardRaised", "PastDeadline", "is_deliberate", "reason"]

SHAPE = (
    "returned an invalid gradient"  # what the engine says of a shape: nobody meant to raise that
)
LONGEST = 160  # characters of what an exception says
_TORCH = str(Path(torch.__file__).parent)


class ForwardRaised(Exception):  # noqa: N818  # carries the user's exception to the driver
    """The function under test raised; ``__cause__`` is what."""


class BackwardRaised(Exception):  # noqa: N818  # carries the user's exception to the driver
    """The backward of the function under test raised; ``__cause__`` is what."""


class PastDeadline(BaseException):  # no Exception: a check must not read it as a refusal
    """The time that gradcheck was given is over; ends the check that runs."""


def reason(error: BaseException) -> str:
    """Return an exception in one line."""
    if isinstance(error, (BackwardRaised, ForwardRaised)):
        return str(error)
    text = str(error).strip().splitlines() or [""]
    return textwrap.shorten(
        f"{type(error).__name__}: {text[0]}".rstrip(": "), LONGEST, placeholder=" ..."
    )


# What torch says of what it does not do, loudly, in a backward that may be right.
_SAID = (
    "once_differentiable",
    "use_reentrant=True",  # checkpointing that torch.autograd.grad cannot pass
    "Can't call numpy() on Tensor that requires grad",  # its gradient would be lost else
)


def is_deliberate(error: BaseException) -> bool:
    """Whether ``error`` was meant: NotImplementedError, a ``raise`` written outside of torch, a refusal of torch's."""
    if isinstance(error, NotImplementedError) or any(said in str(error) for said in _SAID):
        return True
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_code.co_filename.startswith(_TORCH):
        return False
    code = last.tb_frame.f_code
    return any(
        i.opname == "RAISE_VARARGS" and i.offset == last.tb_lasti
        for i in dis.get_instructions(code)
    )
