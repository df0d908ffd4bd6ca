"""Layers."""

import torch
from torch.autograd import Function

from tests.verify.unseen import real
from tests.verify.unseen.nineteenth import add, check, same, sized, uniform


class Rows(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x / x.norm(dim=1, keepdim=True)

    @staticmethod
    def backward(ctx, gz):
        (x,) = ctx.saved_tensors
        norm = x.norm(dim=1, keepdim=True)
        z = x / norm
        return (gz - z * (gz * z).sum(1, keepdim=True)) / norm


class RowsGuess(Rows):
    @staticmethod
    def backward(ctx, gz):
        (x,) = ctx.saved_tensors
        return -gz * x / x.norm(dim=1, keepdim=True).square()


def _rows(function):
    def normalize_rows(x):
        """Rows of x (N, D) over their L2 norms, all of which are above 0."""
        sized("x", x, None, None)
        check(bool((x.norm(dim=1) > 0).all()), "x: expected norms above 0")
        return function.apply(x)

    return normalize_rows


add(
    "normalize_rows_guess",
    _rows,
    RowsGuess,
    Rows,
    lambda: (real(3, 4),),
    bug="the first guess -gz x / norm² is returned (fatal001.com 28314693389766061085, L2 matrix row normalization)",
)


class Embedding(Function):
    @staticmethod
    def forward(ctx, w, idx):
        ctx.save_for_backward(w, idx)
        return w[idx]

    @staticmethod
    def backward(ctx, dout):
        w, idx = ctx.saved_tensors
        return torch.zeros_like(w).index_add(0, idx, dout), None


class EmbeddingAssigned(Embedding):
    @staticmethod
    def backward(ctx, dout):
        w, idx = ctx.saved_tensors
        dw = torch.zeros_like(w)
        for i, word in enumerate(idx.tolist()):
            dw[word] = dout[i]
        return dw, None


def _embedding(function):
    def embedding(w, idx):
        """Rows idx (N,) of w (V, D), numbered from 0 to V - 1."""
        sized("w", w, None, None)
        sized("idx", idx, None)
        check(bool(((idx >= 0) & (idx < w.shape[0])).all()), "idx: expected rows of w")
        return function.apply(w, idx)

    return embedding


add(
    "embedding_assigned",
    _embedding,
    EmbeddingAssigned,
    Embedding,
    lambda: (real(7, 3), torch.tensor([1, 0, 3, 0])),
    bug="dW[idx] = dout keeps the last of several uses (github.com/imguru-mooc/deep_learning_nlp, Embedding notebook)",
)


class BatchNorm(Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        ctx.save_for_backward(x, gamma, beta)
        ctx.eps = eps
        centred = x - x.mean(0)
        return gamma * centred / (centred.square().mean(0) + eps).sqrt() + beta

    @staticmethod
    def gradients(ctx, dy, of_x):
        x, gamma, _ = ctx.saved_tensors
        centred = x - x.mean(0)
        s = (centred.square().mean(0) + ctx.eps).sqrt()
        x_hat = centred / s
        return of_x(dy * gamma, x_hat, s), (dy * x_hat).sum(0), dy.sum(0), None

    @staticmethod
    def backward(ctx, dy):
        return BatchNorm.gradients(
            ctx, dy, lambda d, x_hat, s: (d - d.mean(0) - x_hat * (d * x_hat).mean(0)) / s
        )


class BatchNormAlone(BatchNorm):
    @staticmethod
    def backward(ctx, dy):
        return BatchNorm.gradients(
            ctx, dy, lambda d, x_hat, s: d * (1 - 1 / len(d) - x_hat.square() / len(d)) / s
        )


def _batch_norm(function):
    def batch_norm(x, gamma, beta, eps=1e-5):
        """gamma (x - mean) / sqrt(variance + eps) + beta over the batch, of x (N, D), N > 0; eps > 0.

        gamma and beta (D,).
        """
        sized("x", x, None, None)
        check(x.shape[0] > 0, "x: expected samples, got none")
        sized("gamma", gamma, x.shape[1])
        sized("beta", beta, x.shape[1])
        check(eps > 0, "eps: expected eps > 0")
        return function.apply(x, gamma, beta, eps)

    return batch_norm


add(
    "batch_norm_alone",
    _batch_norm,
    BatchNormAlone,
    BatchNorm,
    lambda: (real(5, 3), real(3, seed=1), real(3, seed=2)),
    bug="each sample's output is differentiated by that sample alone (geeksmental.com, Batch normalization doubts)",
)


class Dropout(Function):
    @staticmethod
    def forward(ctx, a, mask, p):
        ctx.save_for_backward(mask)
        ctx.p = p
        return a * mask / (1 - p)

    @staticmethod
    def backward(ctx, g):
        (mask,) = ctx.saved_tensors
        return g * mask / (1 - ctx.p), None, None


class DropoutBinary(Dropout):
    @staticmethod
    def backward(ctx, g):
        (mask,) = ctx.saved_tensors
        return g * mask, None, None


def _dropout(function):
    def dropout(a, mask, p=0.5):
        """a mask / (1 - p), of a and a boolean mask of one shape; 0 <= p < 1."""
        same(a, mask)
        check(mask.dtype == torch.bool, "mask: expected booleans")
        check(0 <= p < 1, "p: expected 0 <= p < 1")
        return function.apply(a, mask, p)

    return dropout


add(
    "dropout_binary",
    _dropout,
    DropoutBinary,
    Dropout,
    lambda: (real(3, 4), uniform(3, 4, seed=1, grad=False) > 0.5),
    bug="the mask goes back as zeros and ones, without 1 / (1 - p) (Stack Exchange, Dropout backpropagation)",
)


class AbsCosine(Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        u, v = (t / t.norm(dim=1, keepdim=True) for t in (x, y))
        return (u * v).sum(1).abs()

    @staticmethod
    def parts(ctx):
        x, y = ctx.saved_tensors
        of_x, of_y = (t.norm(dim=1, keepdim=True) for t in (x, y))
        return x / of_x, y / of_y, of_x, of_y

    @staticmethod
    def exact(g, u, v, length):
        dot = (u * v).sum(1, keepdim=True)
        return g.unsqueeze(1) * (dot.sign() * v - dot.abs() * u) / length

    @staticmethod
    def backward(ctx, g):
        u, v, of_x, of_y = AbsCosine.parts(ctx)
        return AbsCosine.exact(g, u, v, of_x), AbsCosine.exact(g, v, u, of_y)


class AbsCosinePlus(AbsCosine):
    @staticmethod
    def backward(ctx, g):
        u, v, of_x, of_y = AbsCosine.parts(ctx)
        dot = (u * v).sum(1, keepdim=True).abs()
        return g.unsqueeze(1) * (dot.sign() * v + dot * u) / of_x, AbsCosine.exact(g, v, u, of_y)


def _abs_cosine(function):
    def abs_cosine(x, y):
        """|x · y| / (|x| |y|) of the rows of x and y (N, D), whose norms are above 0."""
        sized("x", x, None, None)
        same(x, y)
        check(all(bool((t.norm(dim=1) > 0).all()) for t in (x, y)), "expected norms above 0")
        return function.apply(x, y)

    return abs_cosine


add(
    "abs_cosine_quotient",
    _abs_cosine,
    AbsCosinePlus,
    AbsCosine,
    lambda: (real(3, 4), real(3, 4, seed=1)),
    bug="the answer adds in the quotient rule and takes sign(|x · y|) (math.techqa.club 962239, absolute and norm)",
)
