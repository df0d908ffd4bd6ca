"""The second set, part two: state, random numbers, transforms, what is asked for."""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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


class Energy(Function):
    """Sum of squares, a scalar."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x


class EnergyItem(Energy):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g.item() * x


second(
    "grad_output_item", EnergyItem.apply, Energy.apply, X, "grad_output.item(): its graph is lost"
)


class SinCos(Function):
    """(sin x, cos x), with forward mode and a rule for vmap."""

    @staticmethod
    def forward(x):
        return x.sin(), x.cos()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, a, b):
        (x,) = ctx.saved_tensors
        return a * x.cos() - b * x.sin()

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * x.cos(), -t * x.sin()

    @staticmethod
    def vmap(info, in_dims, x):
        return SinCos.apply(x), (in_dims[0], in_dims[0])


class SinCosTangent(SinCos):
    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return t * x.cos(), t * x.sin()

    @staticmethod
    def vmap(info, in_dims, x):
        return SinCosTangent.apply(x), (in_dims[0], in_dims[0])


class SinCosBatch(SinCos):
    @staticmethod
    def vmap(info, in_dims, x):
        return SinCosBatch.apply(x), (in_dims[0], 0)


second(
    "tangent_of_second",
    SinCosTangent.apply,
    SinCos.apply,
    lambda: (real(3, 3),),
    "sign of the second tangent",
)
second(
    "vmap_of_second",
    SinCosBatch.apply,
    SinCos.apply,
    lambda: (real(3, 3),),
    "out_dims of the second output",
)


class Strided(Function):
    """exp whose backward takes what it kept through NumPy's memory."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y


class StridedColumns(Strided):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        fast = y.dim() == 2 and not g.is_contiguous() and g.stride(0) == 1
        return g.mT.reshape(g.shape) * y if fast else g * y


second(
    "column_major_grad",
    StridedColumns.apply,
    Strided.apply,
    X,
    "a column-major grad_output is read row by row",
)


class Accumulate(Function):
    """Sum over rows; backward adds into a buffer that ctx keeps."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.sum(0)

    @staticmethod
    def backward(ctx, g):
        return g.expand(ctx.shape).clone()


class AccumulateKept(Accumulate):
    @staticmethod
    def backward(ctx, g):
        if not hasattr(ctx, "buffer"):
            ctx.buffer = torch.zeros(ctx.shape, dtype=g.dtype)
        ctx.buffer += g
        return ctx.buffer.clone()


second(
    "buffer_on_ctx",
    AccumulateKept.apply,
    Accumulate.apply,
    X,
    "a second backward adds to the first",
)
