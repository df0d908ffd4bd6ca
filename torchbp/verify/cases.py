"""The function under test and its sample, in one form that every check can call."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchbp import _random
from torchbp.verify.calls import Calls, Plain
from torchbp.verify.generators import are_same, seed_all, states_of
from torchbp.verify.observed import Observed, observe
from torchbp.verify.precision import precision
from torchbp.verify.raised import BackwardRaised, ForwardRaised, reason
from torchbp.verify.sample import Sample
from torchbp.verify.tensors import apart, is_dense, kinds_in, signed_like, tensors_in
from torchbp.verify.wild import refuse_wild
from torchbp.verify.work import Bounded, TooMuch

__all__ = ["Case"]

LARGER = (
    1.0625 + 2.0**-30
)  # times; in float64 the product has more bits than float32, whatever ``t`` has


# A checkpoint says, where use_reentrant=True: it asks for what `.backward()` leaves in `.grad`.
ACCUMULATES = "incompatible with .grad()"
DRAWS_BACK = "whether backward draws random numbers, and forward none"  # asked once


class Case(Sample):
    """A sample's function, called: forward, backward, and what other ways of running are compared with.

    Attributes:
        options: The arguments of gradcheck.
        calls: Calls made so far.
        generators: Random generators of the function's own.
        copies_leaves: Whether an input is copied first, for a function that writes in it.
        given: The case in the sample's own precision.
        wrong_here: Whether the gradient is known to be wrong at the sample; its variants' need not be looked at then.
        wrong_twice: The same of the second derivative.
        wrote: How many elements of its grad_output the backward of ``plain`` wrote to.
        touched: The name of an input that it wrote to.
        bounded: Whether its first call and backward are ended where they do too much, at sizes that nobody gave; if
            not 1, how many times as much they may do.
        stopped: Whether one was.
        refusal: What forward said where it raised: it is not asked again.
    """

    measured = ("first", "plain", "second", "again", "nearby", "epsilon", "refusal", "_positions")
    refusal = ""
    kinds = ""  # of what is among the outputs and not looked into
    _positions: tuple[int, ...] | None = None  # which outputs require grad

    def __init__(
        self,
        func: Callable[..., Any],
        inputs: Sequence[Any],
        kwargs: Mapping[str, Any] | None = None,
        *,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        generators: Sequence[Any] = (),
    ) -> None:
        super().__init__(func, inputs, kwargs, seed=seed)
        self.options = dict(options or {})
        self.calls = Calls()
        self.copies_leaves = False
        self.wrong_here = self.wrong_twice = False
        self.wrote, self.touched = 0, ""
        self._passed: list[tuple[str, Tensor]] = []  # to the first call
        self.bounded, self.stopped = 0, False
        self.given = self
        self.generators = generators

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> "Case":
        """Return the case of the same function with other arguments."""
        given = {"seed": self.seed, "options": self.options, "generators": self.generators}
        other = Case(self.func, args, kwargs, **given)
        other.calls, other.copies_leaves = self.calls, self.copies_leaves
        other.origin = self.origin
        return other

    def fresh(self) -> list[Tensor]:
        """Return new leaves that require grad."""
        return [leaf.clone().requires_grad_() for leaf in self.leaves]

    def call(
        self,
        leaves: Sequence[Tensor],
        *,
        seed: int | None = None,
        seeded: bool = True,
        func: Callable[..., Any] | None = None,
        fixed: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> Any:
        """Call the function on ``leaves``; every call draws the same random numbers.

        Args:
            leaves: One tensor a leaf.
            seed: Another seed than the case's.
            seeded: ``False`` leaves the random state alone, as vmap demands.
            func: Another function of the same arguments.
            fixed: Makes what is passed of a tensor that is not a leaf; by default a copy, for functions that write.
        """
        self.calls.count(forward=1)
        refuse_wild(self, leaves)
        if self.copies_leaves:
            leaves = [leaf.clone() for leaf in leaves]
        others = {i: fixed(x) for i, x in enumerate(self.flat) if isinstance(x, Tensor)}
        flat = self._filled(leaves, others)
        if seeded:
            self.reseed(self.seed if seed is None else seed)
        wanted = [leaf.requires_grad for leaf in leaves]
        try:
            return self.invoke(flat, func)
        except Exception as error:
            raise ForwardRaised(reason(error)) from error
        finally:
            if seeded:
                self._note_asked(leaves, wanted)
                # What runs after a forward, its backward first of all, meets another state each time.
                self.states_after = _random.states()
                self.own_after = states_of(self.generators)
                self.reseed(self.seed + 1 + self.calls.forward)

    def reseed(self, seed: int) -> None:
        """Seed what everybody draws from, and the function's own generators."""
        _random.seed(seed)
        seed_all(self.generators, seed)

    def _note_asked(self, leaves: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        """Note the name of a leaf that asks for a gradient now, and did not before the call."""
        for name, leaf, was in zip(self.names, leaves, wanted, strict=True):
            if leaf.requires_grad and not was:
                self.calls.asked = name

    def bare(self) -> Callable[[Sequence[Tensor]], Any]:
        """Return the function of the leaves alone, with nothing of ours around it that a tracer would meet."""
        others = {i: x.clone() for i, x in enumerate(self.flat) if isinstance(x, Tensor)}

        def run(leaves: Sequence[Tensor]) -> Any:
            return self.invoke(self._filled(leaves, others))

        return run

    def forward_of(self, module: nn.Module) -> list[Tensor]:
        """Return the outputs of ``module``, with its own parameters, on the sample."""
        args, kwargs = self.structure()
        return tensors_in(module(*args, **kwargs))

    def forward(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the output tensors that require grad on the sample."""
        return self._chosen(tensors_in(self.call(leaves)), leaves)

    def _chosen(self, outputs: list[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self._positions is None and all(leaf.requires_grad for leaf in leaves):
            self._positions = tuple(i for i, y in enumerate(outputs) if y.requires_grad)
        return tuple(outputs[i] for i in self.differentiable)

    def backward(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        *,
        retain_graph: bool = False,
        create_graph: bool = False,
        exposed: bool = False,
    ) -> tuple[Tensor, ...]:
        """Return the gradient of every leaf, zeros where there is none.

        A backward that is known to write to its grad_output is given a copy, unless that is to be ``exposed`` to it:
        what one check found, others would find as something else.

        Raises:
            BackwardRaised: From whatever the function's backward raised.
        """
        self.calls.count(backward=1)
        pairs = [
            (y, v)
            for y, v in zip(outputs, cotangents, strict=True)
            if v is not None and y.requires_grad
        ]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        if self.wrote and not exposed:
            pairs = [(y, v.clone() if v.requires_grad else apart(v)) for y, v in pairs]

        ys, vs = [y for y, _ in pairs], [v for _, v in pairs]
        retain_graph |= create_graph

        def run() -> Sequence[Tensor | None]:
            if self.calls.accumulates and create_graph:
                raise NotImplementedError("what a backward leaves in .grad has no graph")
            if not self.calls.accumulates:
                try:
                    return torch.autograd.grad(
                        ys, wanted, vs, retain_graph, create_graph, allow_unused=True
                    )
                except RuntimeError as error:
                    if ACCUMULATES not in str(error):
                        raise
                    self.calls.accumulates = True
            return _accumulated(ys, wanted, vs, retain_graph, create_graph)

        try:
            grads = self.with_state(leaves, run)
        except Exception as error:
            raise BackwardRaised(reason(error)) from error
        given = iter(grads)
        full = [next(given) if leaf.requires_grad else None for leaf in leaves]
        return tuple(
            torch.zeros_like(leaf) if g is None else g if is_dense(g) else g.to_dense()
            for leaf, g in zip(leaves, full, strict=True)
        )

    def graph(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Return the leaves and outputs of a new call."""
        leaves = self.fresh()
        return leaves, self.forward(leaves)

    def vjp(self, cotangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Forward and backward on the sample."""
        leaves, outputs = self.graph()
        return self.backward(outputs, leaves, cotangents)

    def vjps(self, several: Sequence[Sequence[Tensor | None]]) -> list[tuple[Tensor, ...]]:
        """Several backwards through the first call's graph; a forward each where that can be run once only."""
        leaves, outputs = self.kept
        found = []
        for cotangents in several:
            try:
                found.append(self.backward(outputs, leaves, cotangents, retain_graph=True))
            except BackwardRaised:  # noqa: PERF203
                found.append(self.vjp(cotangents))
        return found

    # ------------------------------------------------------------------------ what is trusted
    @cached_property
    def first(self) -> tuple[list[Tensor], list[Tensor]]:
        """The first call: its leaves and all its output tensors, with their graph."""
        if self.refusal:
            raise ForwardRaised(self.refusal)
        leaves, fixed = self.fresh(), []

        def keep(t: Tensor) -> Tensor:
            fixed.append(t.clone())
            return fixed[-1]

        try:
            with self.within():
                result = self.call(leaves, fixed=keep)
        except ForwardRaised as error:
            if "leaf Variable" not in str(error.__cause__):
                self.refusal = str(error)
                raise
            self.copies_leaves = True
            leaves = self.fresh()  # it may have written in those before it raised
            result = self.call(leaves)
        names = [
            *self.names,
            *(self.name_at[i] for i, x in enumerate(self.flat) if torch.is_tensor(x)),
        ]
        self._passed = list(zip(names, (*leaves, *fixed), strict=False))
        outputs = tensors_in(result)
        self.kinds = kinds_in(result)
        self.first_states, own = self.states_after, self.own_after
        self.reseed(self.seed)
        self.draws = not all(_random.equal(_random.states(), self.first_states))
        self.draws |= not are_same(states_of(self.generators), own)
        self.reseed(self.seed + 1 + self.calls.forward)
        return leaves, outputs

    @contextmanager
    def within(self) -> Iterator[None]:
        """End what does too much, if that is asked."""
        self.stopped = False
        try:
            with Bounded(self.bounded) if self.bounded else nullcontext():
                yield
        except (ForwardRaised, BackwardRaised) as error:
            self.stopped = isinstance(error.__cause__, TooMuch)
            raise

    @property
    def kept(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The first call: its leaves and the outputs that require grad."""
        leaves, outputs = self.first
        return leaves, self._chosen(outputs, leaves)

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Which outputs require grad, by position among the output tensors."""
        if self._positions is None:
            _ = self.kept
        return self._positions or ()

    @property
    def all_outputs(self) -> list[Tensor]:
        """The values of all output tensors."""
        return [y.detach() for y in self.first[1]]

    @cached_property
    def plain(self) -> Plain:
        """The first call, and its backward with a random signed, contiguous grad_output."""
        leaves, outputs = self.kept
        values = tuple(y.detach().clone() for y in outputs)
        cotangents = self.cotangents(outputs, "plain")
        if self.options.get("check_backward_ad", True):
            own = [
                v.clone() for v in cotangents
            ]  # a backward that writes in them is another check's
            before = [t._version for _, t in self._passed]  # noqa: SLF001  # no public way to ask
            asked = DRAWS_BACK in self.given.memo
            was = [] if asked else _random.states()
            with self.within():
                grads = self.backward(outputs, leaves, own, retain_graph=True, exposed=True)
            if not asked:
                now = _random.states()
                drew = len(was) == len(now) and not all(_random.equal(was, now))
                self.given.memo[DRAWS_BACK] = drew and not self.draws
            after = zip(self._passed, before, strict=True)
            self.touched = next((name for (name, t), n in after if t._version > n), "")  # noqa: SLF001
            self.wrote = sum(_differ(a, b) for a, b in zip(own, cotangents, strict=True))
        else:
            grads = tuple(torch.zeros_like(leaf) for leaf in leaves)
        return Plain(values, cotangents, tuple(g.detach().clone() for g in grads))

    @property
    def draws_back(self) -> bool:
        """Whether the first backward drew random numbers, and forward none."""
        return self.given.memo.get(DRAWS_BACK, False)

    @property
    def writes(self) -> bool:
        """Whether backward wrote to its grad_output here, or to an input, and not so in the user's sample."""
        return bool(self.wrote or (self.touched and not self.given.touched))

    @cached_property
    def second(self) -> tuple[Tensor, ...] | BackwardRaised:
        """A second backward through the first call's graph, with the same grad_output; or what it raises."""
        leaves, outputs = self.kept
        try:
            return self.backward(outputs, leaves, self.plain.cotangents, retain_graph=True)
        except BackwardRaised as error:
            return error

    @property
    def runs_again(self) -> bool:
        """Whether the first call's graph can be run more than once."""
        return not isinstance(self.second, BackwardRaised)

    @cached_property
    def again(self) -> Observed:
        """A second call, and its backward with the same grad_output, watched."""
        return observe(self)

    @cached_property
    def nearby(self) -> "Case":
        """The case with all floating-point tensors a sixteenth larger, the leaves' elements in each other's places.

        Where forward does not take that, as of points in order, they stay in their own. A Module's buffers do not grow.
        """
        buffers = {*range(self.size, len(self.flat))}.difference(self.where)
        larger = self.edited(lambda i, t: t if i in buffers else _larger(t), parameters=True)
        turned = larger.edited(
            lambda i, t: t.reshape(-1).roll(1).view(t.shape) if i in self.where else t,
            parameters=True,
        )
        try:
            if all(bool(y.isfinite().all()) for y in turned.all_outputs):
                return turned
        except ForwardRaised:
            pass
        return larger

    @property
    def steady(self) -> bool:
        """Whether forward gives the same values twice, but for rounding."""
        slack = 1e3 * self.epsilon
        return all(
            a.shape == b.shape and torch.allclose(a, b, rtol=slack, atol=slack, equal_nan=True)
            for a, b in zip(self.again.outputs, self.plain.outputs, strict=True)
        )

    @cached_property
    def epsilon(self) -> float:
        """Precision the function works in."""
        return precision(self)

    def cotangents(self, outputs: Sequence[Tensor], purpose: str) -> tuple[Tensor, ...]:
        """Return a random grad_output for each output."""
        generator = self.generator(purpose)
        return tuple(signed_like(y, generator) for y in outputs)


def _accumulated(
    outputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    v: Sequence[Tensor],
    retain_graph: bool,  # as torch.autograd.backward has them
    create_graph: bool,
) -> list[Tensor | None]:
    """Return the gradients that a backward leaves in ``.grad``, which is then as it was."""
    was = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(outputs, v, retain_graph, create_graph)
    grads = [leaf.grad for leaf in leaves]
    for leaf, grad in zip(leaves, was, strict=True):
        leaf.grad = grad
    return grads


def _differ(a: Tensor, b: Tensor) -> int:
    """Return in how many elements: all of them where one was resized."""
    return int((a != b).sum()) if a.shape == b.shape else max(1, b.numel())


def _larger(t: Tensor) -> Tensor:
    return t * LARGER if t.is_floating_point() or t.is_complex() else t
