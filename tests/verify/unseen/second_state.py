"""The second set, part three: random numbers, what is asked for, what a call leaves behind."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.second_functions import X, second


class Noisy(Function):
    """Dropout by recomputation: backward draws the mask again, from the state that forward began in."""

    @staticmethod
    def mask(x):
        return (torch.rand(x.shape, dtype=torch.float64, device=x.device) > 0.3).to(x.dtype)

    @staticmethod
    def forward(ctx, x):
        ctx.state = torch.get_rng_state()
        return x * Noisy.mask(x)

    @staticmethod
    def backward(ctx, g):
        with torch.random.fork_rng():
            torch.set_rng_state(ctx.state)
            return g * Noisy.mask(g)


class NoisyAnew(Noisy):
    @staticmethod
    def backward(ctx, g):
        return g * Noisy.mask(g)


class NoisyLeft(Noisy):
    @staticmethod
    def backward(ctx, g):
        torch.set_rng_state(ctx.state)
        return g * Noisy.mask(g)


second("mask_drawn_anew", NoisyAnew.apply, Noisy.apply, X, "recomputation without the random state")
second(
    "state_left_behind",
    NoisyLeft.apply,
    Noisy.apply,
    X,
    "backward sets the global random state back",
)


class Two(Function):
    """(x y, x + y), without materialized gradients."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        ctx.set_materialize_grads(False)
        return x * y, x + y

    @staticmethod
    def backward(ctx, a, b):
        x, y = ctx.saved_tensors
        zero = torch.zeros_like(x)
        a, b = (zero if t is None else t for t in (a, b))
        return a * y + b, a * x + b


class TwoOrNothing(Two):
    @staticmethod
    def backward(ctx, a, b):
        if a is None or b is None:
            return None, None
        return Two.backward(ctx, a, b)


XY = lambda: (real(3, 4), real(3, 4, seed=1))  # noqa: E731
second(
    "unused_output",
    TwoOrNothing.apply,
    Two.apply,
    XY,
    "no gradient where one of the outputs is not used",
)


class Dense(Function):
    """x w^T + b, each gradient on demand."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return x @ w.T + b

    @staticmethod
    def pull(ctx, g, needs):
        x, w = ctx.saved_tensors
        g = g.to(w.dtype)
        return (
            g @ w if needs[0] else None,
            g.mT @ x if needs[1] else None,
            g.sum(0) if needs[2] else None,
        )

    @staticmethod
    def backward(ctx, g):
        return Dense.pull(ctx, g, ctx.needs_input_grad)


class DenseTied(Dense):
    @staticmethod
    def backward(ctx, g):
        x, w, b = ctx.needs_input_grad
        return Dense.pull(ctx, g, (x, w and b, b))


class DenseHalfSum(Dense):
    @staticmethod
    def backward(ctx, g):
        gx, gw, gb = Dense.backward(ctx, g)
        return gx, gw, None if gb is None else g.bfloat16().sum(0).to(g.dtype)


DENSE = lambda: (real(4, 3), real(5, 3, seed=1), real(5, seed=2))  # noqa: E731
second(
    "weight_hangs_on_bias",
    DenseTied.apply,
    Dense.apply,
    DENSE,
    "with a frozen bias the weight gets nothing",
)
second(
    "bias_in_bfloat16",
    DenseHalfSum.apply,
    Dense.apply,
    DENSE,
    "the bias' gradient is summed in bfloat16",
)


class Square(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class SquareGraphMode(Square):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (3 if torch.is_grad_enabled() else 2) * g * x


class SquareWarm(Square):
    calls = 0

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        SquareWarm.calls += 1
        return (2 if SquareWarm.calls < 4 else 2.125) * g * x


class SquareOncePerShape(Square):
    seen: dict = {}  # noqa: RUF012  # the bug

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        scale = SquareOncePerShape.seen.setdefault(tuple(x.shape), (2 * x).detach())
        return g * scale


second(
    "other_path_with_graph",
    SquareGraphMode.apply,
    Square.apply,
    X,
    "under create_graph another factor",
)
second("wrong_after_warm_up", SquareWarm.apply, Square.apply, X, "wrong from the fourth call on")
second(
    "cached_by_shape",
    SquareOncePerShape.apply,
    Square.apply,
    X,
    "a factor is cached by the input's shape",
)
