"""Several samples in one call: as a batch, where forward is known to make of one what it makes of its samples."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from torchbp.verify.calls import Plain
from torchbp.verify.cases import Case
from torchbp.verify.lines import Lines
from torchbp.verify.raised import BackwardRaised, ForwardRaised
from torchbp.verify.smooth import leaves_a_question, right_at_once
from torchbp.verify.tensors import Directions

__all__ = ["ADDED", "STACKED", "all_right", "no_question"]

STACKED = "positions of what forward takes a batch of, whose samples it does not mix"
ADDED = "positions of what forward takes a batch of, whose samples' outputs it adds, or averages"


def no_question(case: Case, samples: Sequence[Case], most: float) -> list[bool | None]:
    """Return for each sample whether its gradient is right, or forward not smooth there; ``None`` says nothing.

    Args:
        case: The function, at the user's sample.
        samples: The same at others.
        most: The largest gradient in the user's sample.
    """
    stacked = case.memo.get(STACKED, ())
    chosen = [k for k, other in enumerate(samples) if _differs_in(case, other) <= set(stacked)]
    answers: list[bool | None] = [None] * len(samples)
    if len(chosen) < 2:
        return answers
    try:
        batch = _Batch([samples[k] for k in chosen], stacked)
        for number, k in enumerate(chosen if not batch.wrote else ()):
            lines = _Lines(batch, number)
            if all(bool(y.isfinite().all()) for y in lines.case.plain.outputs):
                answers[k] = not leaves_a_question(lines.case, lines, most)
    except (ForwardRaised, BackwardRaised):
        answers = [None] * len(samples)
    for k in chosen:
        if not answers[k]:  # looked at alone, it has a gradient of its own
            samples[k].__dict__.pop("plain", None)
    return answers


def all_right(case: Case, samples: Sequence[Case]) -> bool:
    """Whether a batch of the samples, whose outputs are added, is right at once: so are they, then."""
    added = set(case.memo.get(ADDED, ()))
    if len(samples) < 2 or not all(_differs_in(case, other) <= added for other in samples):
        return False
    return right_at_once(_stacked(samples, added))


def _stacked(samples: Sequence[Case], chosen: Collection[int]) -> Case:
    return samples[0].edited(
        lambda i, t: torch.stack([c.flat[i] for c in samples]) if i in chosen else t
    )


def _differs_in(case: Case, other: Case) -> set[int]:
    return {i for i, t in enumerate(case.flat) if isinstance(t, Tensor) and other.flat[i] is not t}


class _Batch:
    """The samples stacked, and the calls made of them: at a step of all, each along its own direction."""

    def __init__(self, samples: Sequence[Case], stacked: Collection[int]) -> None:
        self.samples, self.stacked = samples, stacked
        self.wrote = False  # whether a backward wrote to its grad_output
        self.case = _stacked(samples, stacked)
        leaves, outputs = self.case.kept
        for k, sample in enumerate(samples):
            values = tuple(y[k].detach().clone() for y in outputs)
            v = sample.cotangents(values, "plain")
            sample.__dict__["plain"] = Plain(values, v, self.gradients(leaves, outputs, k, v))
        self.lines = [Lines(sample, elsewhere=True) for sample in samples]
        self._ends: dict[tuple[float, bytes], tuple[list[Tensor], tuple[Tensor, ...]]] = {}

    def end(self, moving: Directions, step: float) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Return leaves and outputs after a step of all samples, of those elements that are ``moving``."""
        masks = {i: d != 0 for i, d in moving.items()}
        key = step, b"".join(bytes(m.tolist()) for m in masks.values())
        if key not in self._ends:
            several = [
                lines.moved({i: d * masks[i] for i, d in lines.direction(0).items()}, step)
                for lines in self.lines
            ]
            leaves = [
                (torch.stack(parts) if i in self.stacked else parts[0]).detach().requires_grad_()
                for i, parts in zip(self.case.where, zip(*several, strict=True), strict=True)
            ]
            self._ends[key] = leaves, self.case.forward(leaves)
        return self._ends[key]

    def gradients(
        self, leaves: Sequence[Tensor], outputs: Sequence[Tensor], k: int, v: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the gradients of one sample for its grad_output: the others have none."""
        alone = [torch.zeros_like(y, memory_format=torch.contiguous_format) for y in outputs]
        for whole, part in zip(alone, v, strict=True):
            whole[k] = part
        before = [t.clone() for t in alone]
        grads = self.case.backward(outputs, leaves, alone, retain_graph=True)
        self.wrote |= not all(map(torch.equal, alone, before))
        return tuple(
            g[k] if i in self.stacked else g for i, g in zip(self.case.where, grads, strict=True)
        )


class _Lines(Lines):
    """Lines through one of the samples, whose ends are those of all."""

    def __init__(self, batch: _Batch, number: int) -> None:
        super().__init__(batch.samples[number], elsewhere=True)
        self.batch, self.number = batch, number

    def _off(self, directions: Directions, step: float, got: float) -> float:
        leaves, outputs = self.batch.end(directions, step)
        self.rise = self.rise_to([y[self.number] for y in outputs])
        v = self.case.plain.cotangents
        there = self.batch.gradients(leaves, outputs, self.number, v)
        slope, _ = self._along([g.detach().cpu() for g in there], directions)
        off = self.rise / step - (got + slope) / 2
        return off if off == off else float("inf")  # noqa: PLR0124  # NaN

    def value(self, directions: Directions, t: float) -> float:
        """Return ⟨v, f(x + t·directions) - f(x)⟩."""
        return self.rise_to([y[self.number] for y in self.batch.end(directions, t)[1]])
