"""Linear and cross entropy some rows at a time: a chunk of logits is made, used up in place, and made no more.

The numbers are those of the derivation in linear_cross_entropy.py. Nothing here is differentiated, traced or batched:
the formulas that are stand in linear_cross_entropy.py. One chunk is of many rows, for the matrix products; what is done
to single rows runs over blocks of it that stay in the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torchbp.ops._function import is_half
from torchbp.ops._half_products import finite, parts, product, suit
from torchbp.ops.kernels import in_memory
from torchbp.ops.losses._linear_cross_entropy_arguments import check_range
from torchbp.ops.losses._shards import Shard

__all__ = ["Gradients", "Indices", "Probabilities", "Rows", "Target", "chunk_rows", "over_chunks"]

_BLOCK = (
    1 << 20
)  # elements: 4 MB of float32, which a last cache holds; smaller ones pay more for calls


class Target(Protocol):
    """What the loss is taken against: v[n, c], the weight of -log p[n, c] in the loss of row n."""

    mass: Tensor  # (N,): Σ_c v

    def score(self, z: Tensor, rows: slice) -> Tensor:
        """Return Σ_c v z over the classes of ``z``, (n,)."""
        ...

    def subtract(self, g: Tensor, s: Tensor, rows: slice) -> None:
        """Write g - s v into ``g``; ``s`` is (N,)."""
        ...


class Indices:
    """Class indices: v[n, c] = (1 - ε) w_t [c = t] + ε/C w_c, and 0 in rows that are ignored."""

    def __init__(
        self,
        target: Tensor,
        w: Tensor | None,
        ignored: int,
        smoothing: float,
        shard: Shard,
        dtype: torch.dtype,
    ) -> None:
        target = target.long()
        ignore = target == ignored
        check_range(target, ignored, shard.all_classes)
        local = target.masked_fill(ignore, -1) - shard.first
        elsewhere = (local < 0) | (local >= shard.classes)
        self._index = local.masked_fill(elsewhere, 0).unsqueeze(1)
        ones = torch.ones(target.shape, dtype=dtype, device=target.device)
        here = ones if w is None else w.to(dtype)[self._index.squeeze(1)]
        here = here.masked_fill(elsewhere, 0)
        self.counts = ~ignore
        self.w_t = shard.sum(here.clone())  # (N,), 0 where ignored
        self._peak = (1 - smoothing) * here
        self._w = w
        self._even = None
        self.mass = (1 - smoothing) * self.w_t
        if smoothing:
            self._even = (smoothing / shard.all_classes) * self.counts.to(dtype)
            self.mass = self.mass + self._even * shard.total_weight(w)

    def score(self, z: Tensor, rows: slice) -> Tensor:
        """Return Σ_c v z."""
        peak = self._peak[rows]
        picked = z.gather(1, self._index[rows]).squeeze(1).mul_(peak)
        picked.masked_fill_(peak == 0, 0)  # not 0 · -∞
        if self._even is None:
            return picked
        return picked.addcmul_(self._even[rows], z.sum(1) if self._w is None else z @ self._w.to(z))

    def subtract(self, g: Tensor, s: Tensor, rows: slice) -> None:
        """Write g - s v into ``g``."""
        if self._even is not None:
            b = (s[rows] * self._even[rows]).unsqueeze(1)
            g.sub_(b) if self._w is None else g.addcmul_(b, self._w.to(g), value=-1)
        g.scatter_add_(1, self._index[rows], (s[rows] * self._peak[rows]).neg_().unsqueeze(1))


class Probabilities:
    """Class probabilities: v = w_c ((1 - ε) q + ε/C)."""

    def __init__(
        self, target: Tensor, w: Tensor | None, smoothing: float, shard: Shard, dtype: torch.dtype
    ) -> None:
        self._q, self._w, self._smoothing = target, w, smoothing
        self._even, self._dtype = smoothing / max(1, shard.all_classes), dtype
        blocks = _row_blocks(target)
        masses = [self._v(rows).sum(1) for rows in blocks] or [target.new_zeros(0, dtype=dtype)]
        self.mass = shard.sum(torch.cat(masses))

    def _v(self, rows: slice) -> Tensor:
        q = self._q[rows].to(self._dtype)
        if self._smoothing:
            q = q * (1 - self._smoothing) + self._even
        return q if self._w is None else q * self._w

    def score(self, z: Tensor, rows: slice) -> Tensor:
        """Return Σ_c v z."""
        return (self._v(rows) * z).sum(1)

    def subtract(self, g: Tensor, s: Tensor, rows: slice) -> None:
        """Write g - s v into ``g``."""
        g.addcmul_(self._v(rows), s[rows].unsqueeze(1), value=-1)


@dataclass(frozen=True)
class Gradients:
    """Which gradients are made, for which gradients of the values.

    Attributes:
        s: Of the cross entropy of each row, (N,).
        s_penalty: Of log² Σ_c exp z_c of each row, (N,), 0 where it does not count; ``None`` without z-loss.
        x: Whether that of the input is wanted.
        weight: Whether that of the linear weight is.
        bias: Whether that of the linear bias is.
    """

    s: Tensor
    s_penalty: Tensor | None
    x: bool
    weight: bool
    bias: bool


class Rows:
    """What comes of all rows; of half precision everything but ``predictions`` is float32.

    Attributes:
        values: The cross entropy of each row, (N,).
        log_partition: log Σ_c exp z_c of each row, (N,).
        predictions: The class of the largest logit, (N,); ``None`` if not asked for.
        x: Gradient of the input, (N, D), or ``None``.
        weight: Gradient of the linear weight, (C, D), or ``None``.
        bias: Gradient of the linear bias, (C,), or ``None``.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        gradients: Gradients | None,
        predict: bool,
        wide: torch.dtype,
    ) -> None:
        options: dict[str, Any] = {"dtype": wide, "device": x.device}
        self.values = torch.empty(len(x), **options)
        self.log_partition = torch.empty_like(self.values)
        self.predictions = torch.empty_like(self.values, dtype=torch.int64) if predict else None
        self.x = self.weight = self.bias = self._unit = None
        if gradients is None:
            return
        self.x = torch.empty(x.shape, **options) if gradients.x else None
        self.weight = torch.zeros(weight.shape, **options) if gradients.weight else None
        self.bias = torch.zeros(len(weight), **options) if gradients.bias else None
        # In half precision |g| is brought to 1: float16 would make 0 of s = 1/N.
        if weight.dtype != wide and len(x) and not x.is_cpu:
            self._unit = gradients.s.abs().amax().clamp_min(torch.finfo(wide).tiny)

    def add(self, g: Tensor, x: Tensor, weight: Tensor, chunk: slice) -> None:
        """Add what the gradient ``g`` of a chunk's logits, (n, C), gives."""
        if self.bias is not None:
            self.bias.add_(g.sum(0))  # (4)
        if self._unit is not None:
            g = (g / self._unit).to(weight.dtype)
            if self.x is not None:
                wide = wide_product(g, weight, self.x.dtype)
                torch.mul(wide, self._unit, out=self.x[chunk])  # (2)
            if self.weight is not None and g.is_cuda:
                dtype = self.weight.dtype
                torch.addmm(self.weight, g.T, x, out_dtype=dtype, out=self.weight)  # (3)
            elif self.weight is not None:
                self.weight.add_(g.T @ x)
            return
        d = parts(g) if weight.dtype == torch.bfloat16 else (g,)
        if self.x is not None:
            product(d, weight, room=self.x[chunk])  # (2)
        if self.weight is not None:
            product(tuple(part.T for part in d), x, self.weight)  # (3)

    def finish(self) -> None:
        """Give the weight's gradient its unit again."""
        if self._unit is not None and self.weight is not None:
            self.weight.mul_(self._unit)


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype, room: Tensor | None = None) -> Tensor:
    """Return a b in ``dtype``, written into ``room``; of half precision on a GPU as its kernels have summed it up."""
    if a.is_cpu or a.dtype == dtype:
        return product((a,), b, room=room)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def chunk_rows(positions: int, features: int) -> int:
    """Return how many rows of logits are made at once: 512, or half the features, if there are as many.

    The products are at full speed from some hundred rows on; with fewer, adding each chunk's share to the gradient of
    the weight takes the time (4096 rows, 256 features, 8000 classes: 1.23 of the products' time with 128 rows a chunk,
    1.12 with 256, 1.08 with 512). With half the features, a chunk takes half of what that gradient takes.
    """
    return max(1, min(positions, max(512, features // 2)))


def over_chunks(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Target,
    *,
    softcap: float | None,
    rows: int,
    shard: Shard,
    gradients: Gradients | None,
    predict: bool,
) -> Rows:
    """Return the values of all rows and the gradients asked for, holding ``rows`` rows of logits at a time.

    Args:
        x: ``(N, D)``.
        weight: ``(C, D)``: all classes, or the shard's.
        bias: ``(C,)``.
        target: What the loss is taken against.
        softcap: The bound of the logits.
        rows: Of a chunk.
        shard: Which classes these are.
        gradients: Which gradients to make.
        predict: Whether to find the class of the largest logit.
    """
    # Half precision: float32 throughout. On a CPU the products too, but where it multiplies matrices of bfloat16;
    # elsewhere the products take half precision and accumulate in float32.
    wide = torch.float32 if is_half(x) else x.dtype
    multiplied = min(rows, len(x))
    by_halves = x.dtype == weight.dtype and in_memory(x) and suit(multiplied, weight)
    if by_halves and gradients is not None:  # the halves of ∞ are ∞ and NaN
        by_halves = finite(gradients.s, gradients.s_penalty)
    low = x.dtype if is_half(x) and (by_halves or not x.is_cpu) else wide
    weight = weight.to(low)
    out = Rows(x, weight, gradients, predict, wide)
    buffer = None
    if x.is_cpu or low == wide:
        buffer = weight.new_empty(multiplied, len(weight), dtype=wide)
    for start in range(0, len(x), rows):
        chunk = slice(start, min(start + rows, len(x)))
        some = x[chunk].to(low)
        room = None if buffer is None else buffer[: len(some)]
        z = wide_product(some, weight.T, wide, room)
        # Across shards a block is a chunk: each block costs two collectives.
        for block in [slice(0, len(z))] if shard.group else _row_blocks(z):
            inside = slice(start + block.start, start + block.stop)
            _rowwise(z[block], bias, target, inside, softcap, shard, gradients, out)
        if gradients is not None:
            out.add(z, some, weight, chunk)
    out.finish()
    if out.x is not None:
        out.x = shard.sum(out.x)
    return out


def _rowwise(
    z: Tensor,
    bias: Tensor | None,
    target: Target,
    rows: slice,
    softcap: float | None,
    shard: Shard,
    gradients: Gradients | None,
    out: Rows,
) -> None:
    """Turn the logits ``z``, (n, C), into their gradient where one is wanted, and note the rows' values."""
    if bias is not None:
        z.add_(bias)
    capped = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        capped = z.clone() if gradients is not None else None
        z.mul_(softcap)
    if out.predictions is None:
        largest = z.amax(1)
    else:
        largest, index = z.max(1)
        out.predictions[rows] = shard.where_largest(largest, index)
    score = target.score(z, rows)
    # softmax in place is one pass. Its largest value is 1/Σ_c exp(z_c - largest), of full precision.
    p = torch.softmax(z, 1, out=z)
    own = largest - p.amax(1).log_()
    if shard.group:  # all -∞ here, a padded vocabulary say: these classes add nothing
        absent = largest == -torch.inf
        own.masked_fill_(absent, -torch.inf)
        p.masked_fill_(absent.unsqueeze(1), 0)
    log_partition, score = shard.combine(own, score)
    torch.sub(target.mass[rows] * log_partition, score, out=out.values[rows])  # (1)
    out.log_partition[rows] = log_partition
    if gradients is None:
        return
    scale = gradients.s[rows] * target.mass[rows]
    if gradients.s_penalty is not None:
        scale.addcmul_(gradients.s_penalty[rows], log_partition, value=2)
    if shard.group:
        scale.mul_((own - log_partition).exp_())  # p of the shard's classes becomes p of all
    g = p.mul_(scale.unsqueeze(1))
    target.subtract(g, gradients.s, rows)  # (1)
    if capped is not None:
        g.mul_(capped.square_().neg_().add_(1))  # (5)


def _row_blocks(z: Tensor) -> Iterator[slice]:
    size = max(1, _BLOCK // max(1, z.shape[1])) if z.is_cpu else max(1, len(z))
    for start in range(0, len(z), size):
        yield slice(start, min(start + size, len(z)))
