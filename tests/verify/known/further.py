"""Faults of forward mode and of second derivatives that show at other sizes, or with other arguments, only."""

from torch.autograd import Function

from tests.verify.known import rand, register


class RowSquares(Function):
    """The mean of the squares of each row, with a jvp."""

    @staticmethod
    def forward(x):
        return x.square().mean(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g[..., None] / x.shape[-1]

    @staticmethod
    def jvp(ctx, tangent_x):
        (x,) = ctx.saved_tensors
        return (2 * x * tangent_x).mean(-1)


class RowSquaresOverRows(RowSquares):
    @staticmethod
    def jvp(ctx, tangent_x):
        (x,) = ctx.saved_tensors
        return (2 * x * tangent_x).sum(-1) / x.shape[0]


class WeightedSquare(Function):
    """w x², for a weight that may be left out, with a jvp."""

    @staticmethod
    def forward(x, w):
        return x.square() if w is None else w * x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        if w is None:
            return 2 * x * g, None
        return 2 * w * x * g, x.square() * g

    @staticmethod
    def jvp(ctx, tangent_x, tangent_w):
        x, w = ctx.saved_tensors
        if w is None:
            return 2 * x * tangent_x
        along_x = 2 * w * x * tangent_x
        return along_x if tangent_w is None else along_x + x.square() * tangent_w


class WeightedSquareFrozen(WeightedSquare):
    @staticmethod
    def jvp(ctx, tangent_x, _):
        x, w = ctx.saved_tensors
        return 2 * (1 if w is None else w) * x * tangent_x


class Hill(Function):
    """x² (1 + cx) for a number c: twice differentiable, too."""

    @staticmethod
    def forward(ctx, x, c):
        ctx.save_for_backward(x)
        ctx.c = c
        return x.square() * (1 + c * x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (2 * x + 3 * ctx.c * x.square()), None


class HillDetached(Hill):
    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (2 * x + 3 * ctx.c * x.detach().square()), None


register("jvp_mean_over_rows", "further", RowSquaresOverRows.apply, RowSquares.apply, rand((3, 3)),
         bug="the tangent of a mean over columns is divided by the number of rows",
         trigger="forward mode at other sizes")  # fmt: skip
register("jvp_of_a_weight", "further", lambda x, weight=None: WeightedSquareFrozen.apply(x, weight),
         lambda x, weight=None: WeightedSquare.apply(x, weight), rand((3, 4)),
         bug="the weight's own tangent is dropped", trigger="forward mode where a weight is given")  # fmt: skip
register("second_derivative_of_another_number", "further", lambda x, skew=0.0: HillDetached.apply(x, skew),
         lambda x, skew=0.0: Hill.apply(x, skew), rand((3, 4)),
         bug="a term that the number makes is detached in backward",
         trigger="second order with another number")  # fmt: skip
