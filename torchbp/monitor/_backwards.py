"""When a backward has ended, with its gradients final: reduced over ranks and not yet clipped.

A post-accumulate hook on a parameter tells that a backward is under way and queues a callback for
its end. The callback queues itself once more, because DDP queues its reduction after ours.

A hook costs time whenever its parameter gets a gradient, so only a few witnesses carry one: parameters
such that every backward seen so far reaches at least one. At first, and now and then later, all carry
one, and it is seen which each backward reaches. They do for good where parameters are stepped inside
backward: there is no gradient left at its end, so it is read in the hook, which stands before the user's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from torchbp.monitor._bundle import Bundle
from torchbp.monitor._catalogue import Catalogue
from torchbp.monitor._norms import norms
from torchbp.monitor._row import Pieces

__all__ = ["Backwards", "graph_task", "in_backward", "is_captured"]

_KEPT = 16
_CAPTURED = (
    "watch: expected a backward that runs, got one that a CUDA graph captures, whose replays call no hook; "
    "capture layers instead, by torch.cuda.make_graphed_callables, or close the monitor first"
)
graph_task = torch._C._current_graph_task_id  # noqa: SLF001
_queue = torch.autograd.Variable._execution_engine.queue_callback  # noqa: SLF001


def is_captured() -> bool:
    """Whether a CUDA graph captures the current stream: nothing is computed there now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def in_backward() -> bool:
    """Whether the thread is inside a backward."""
    return graph_task() != -1


class Backwards:
    """Calls ``ended`` at the end of every backward that reaches a watched parameter.

    Args:
        catalogue: The parameters.
        local: Gives this rank's part of a gradient, dense.
        before: Called when the gradients are there but not yet reduced over ranks by DDP.
        ended: Takes whether this is another backward than the one before; checkpointing in its
            reentrant form makes one of several that reach different parameters.

    Attributes:
        paused: Whether nothing is called for now.
        passed: Whether there was a backward while paused.
        away: Whether nothing is called for, and no backward counts.
        early: Norms of gradients that are gone at the end of the backward.
        everywhere: Whether every parameter carries a hook.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        local: Callable[[Tensor], Tensor],
        before: Callable[[], None] | None,
        ended: Callable[[bool], None],
    ) -> None:
        self.paused = self.passed = self.away = False
        self.early: Pieces = []
        self._catalogue, self._local = catalogue, local
        self._before, self._ended = before, ended
        self._hooks: list[RemovableHandle] = []
        self._task = -1
        self._fired: dict[int, None] = {}  # in the graph task under way, in order
        self._skipped: dict[int, None] = {}  # while paused, in the step under way
        self._reached: set[int] = set()  # in the backward under way
        self._seen: list[tuple[int, ...]] = []
        self.everywhere = self._learned = False
        # One that was missed is waited for until all are learnt for the second time.
        self._missing = 0
        self._stepped: set[int] | None = None  # inside backward; not known before the first
        self.learn()

    def learn(self) -> None:
        """Put a hook on every parameter, until :meth:`settle`."""
        self._missing = max(self._missing - 1, 0)
        if not self.everywhere:
            self.everywhere, self._learned = True, False
            self._attach(dict(self._catalogue.alive()))

    def miss(self) -> None:
        """There was a backward that reached no witness: learn until one that is new has been seen."""
        self.learn()
        self._missing = 2

    def settle(self) -> None:
        """Leave hooks on the witnesses only."""
        if self.everywhere and self._learned and not (self._stepped or self._missing):
            self.everywhere = False
            alive = dict(self._catalogue.alive())
            self._attach({i: alive[i] for i in _witnesses(self._seen) if i in alive})

    def begin_step(self) -> None:
        """Forget what the last step's backward reached."""
        self._reached = set()

    def skip(self) -> None:
        """End a step that was paused: one whose backward reaches others has to be met again."""
        self._see(tuple(self._skipped))
        self.passed, self._skipped = False, {}

    def close(self) -> None:
        """Take every hook away."""
        self._attach({})

    def _attach(self, parameters: dict[int, Tensor]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for index, parameter in parameters.items():
            frozen = not parameter.requires_grad  # perhaps while others have their turn
            parameter.requires_grad_(True)  # or torch takes no hook
            hook = parameter.register_post_accumulate_grad_hook(partial(self._fire, index))
            parameter.requires_grad_(not frozen)
            self._hooks.append(hook)
            _put_first(parameter._post_accumulate_grad_hooks, hook.id)  # noqa: SLF001

    def _fire(self, index: int, parameter: Tensor) -> None:
        if parameter.is_cuda and is_captured():
            raise RuntimeError(_CAPTURED)
        if self.away:
            return
        if self.paused:
            self.passed = True
            if self.everywhere:
                self._skipped[index] = None
            return
        # By the number of the graph task: a flag would stay set after an exception in backward.
        task = graph_task()
        if task != self._task:
            self._task, self._fired, self.early = task, {}, []
            _queue(self._first_end)
        self._fired[index] = None
        stepped = self._stepped
        if (stepped is None or index in stepped) and parameter.grad is not None:
            with torch.no_grad():
                bundle = Bundle([self._local(parameter.grad)])
                self.early.append(((index,), bundle.measured(norms)))

    def _first_end(self) -> None:
        if self._before is not None:
            self._before()
        _queue(self._end)

    def _end(self) -> None:
        order, self._fired, self._task = tuple(self._fired), {}, -1
        fired = set(order)
        self._learned = True
        another = not self._reached or bool(fired & self._reached)
        self._reached = fired if another else self._reached | fired
        self._see(order)
        self._ended(another)

    def _see(self, order: tuple[int, ...]) -> None:
        """Remember what a backward reaches."""
        new = self.everywhere and order and set(order) not in map(set, self._seen)
        if new and len(self._seen) < _KEPT:
            self._seen.append(order)
            self._missing = 0

    def gone(self, present: set[int]) -> Pieces:
        """Return the norms of the gradients that were there in backward and are not ``present`` now."""
        pieces = [piece for piece in self.early if piece[0][0] not in present]
        self.early = []
        if self._stepped is None:
            self._stepped = {piece[0][0] for piece in pieces}
        return pieces


def _witnesses(seen: list[tuple[int, ...]]) -> set[int]:
    """Return few indices such that each of the sets has one of them.

    Of equals the one whose gradient comes first: DDP queues its reduction with the last.
    """
    chosen: set[int] = set()
    left = list(seen)
    while left:
        counts: dict[int, int] = {}
        for indices in left:
            for index in indices:
                counts[index] = counts.get(index, 0) + 1
        best = max(counts, key=lambda index: counts[index])
        chosen.add(best)
        left = [indices for indices in left if best not in indices]
    return chosen


def _put_first(hooks: Any, key: int) -> None:
    """Let a hook run before those that were there. Torch runs them as a plain dict is ordered."""
    if isinstance(hooks, dict) and len(hooks) > 1:
        others = {k: v for k, v in hooks.items() if k != key}
        mine = hooks[key]
        hooks.clear()
        hooks[key] = mine
        hooks.update(others)
