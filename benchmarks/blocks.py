"""Whether a block fused by hand would gain what recipes do not: a SwiGLU perceptron, and RMSNorm with Linear.

Each block runs as torch, as torchbp, lean, and as one autograd.Function that keeps the least a backward without another
matrix product can do with. Bytes are those of ``torchbp.memory``; times are medians of the process's time on one
thread, in turns. ``python benchmarks/blocks.py`` writes benchmarks/data/blocks-cpu-<date>.json.
"""

import argparse
import copy
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function

import torchbp

DATA = Path(__file__).parent / "data"
ROWS, WIDTH, HIDDEN = 1024, 512, 1408  # the Llama-like model of models.py


class Perceptron(nn.Module):
    """SwiGLU: W3 (silu(W1 x) · W2 x)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, False), nn.Linear(WIDTH, HIDDEN, False)
        self.down, self.activation = nn.Linear(HIDDEN, WIDTH, False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class NormLinear(nn.Module):
    """RMSNorm and a Linear of three times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, 3 * WIDTH, False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class PerceptronFunction(Function):
    """Keeps x and the two products; the gate's product is made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        a, b = x @ w1.T, x @ w2.T
        ctx.save_for_backward(x, w1, w2, w3, a, b)
        return F.silu(a).mul_(b) @ w3.T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        (grad_y,) = grads
        x, w1, w2, w3, a, b = ctx.saved_tensors
        h = F.silu(a)
        grad_w3 = grad_y.T @ (h * b)
        grad_h = grad_y @ w3
        grad_a = torch.ops.aten.silu_backward(grad_h * b, a)
        grad_b = grad_h.mul_(h)
        grad_x = (grad_a @ w1).addmm_(grad_b, w2)
        return grad_x, grad_a.T @ x, grad_b.T @ x, grad_w3


class NormLinearFunction(Function):
    """Keeps x and 1/rms; the normalized rows are made again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, w: Tensor) -> Tensor:
        r = x.square().mean(1, keepdim=True).add_(1e-6).rsqrt_()
        ctx.save_for_backward(x, g, w, r)
        return (x * r).mul_(g) @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        (grad_y,) = grads
        x, g, w, r = ctx.saved_tensors
        n = x * r
        grad_w = grad_y.T @ (n * g)
        grad_n = grad_y @ w
        grad_g = (grad_n * n).sum(0)
        grad_n.mul_(g)
        inner = (grad_n * n).mean(1, keepdim=True)
        return grad_n.sub_(n.mul_(inner)).mul_(r), grad_g, grad_w


class Fused(nn.Module):
    """A block through its Function."""

    def __init__(self, function: type[Function], block: nn.Module) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(block.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, *self.weights)  # pyright: ignore[reportReturnType]


BLOCKS = {
    "SwiGLU perceptron": (Perceptron, PerceptronFunction),
    "RMSNorm + Linear": (NormLinear, NormLinearFunction),
}


def ways(block: nn.Module, function: type[Function]) -> dict[str, nn.Module]:
    """Return the four forms of a block, with the same parameters' values."""
    return {
        "torch": copy.deepcopy(block),
        "torchbp": torchbp.convert(copy.deepcopy(block)),
        "lean": torchbp.lean(copy.deepcopy(block)),
        "fused": Fused(function, copy.deepcopy(block)),
    }


def step(module: nn.Module, x: Tensor, v: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Return one forward and backward."""
    leaves = (x, *module.parameters())
    return lambda: torch.autograd.grad(module(x), leaves, v)


def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """Return one row a way."""
    torch.manual_seed(0)
    block, function = BLOCKS[name][0](), BLOCKS[name][1]
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    v = torch.randn_like(block(x))
    modules = ways(block, function)
    steps = {way: step(module, x, v) for way, module in modules.items()}
    want = steps["torch"]()
    for run in steps.values():
        for a, b in zip(run(), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(repeats):
        for way, run in steps.items():
            start = time.process_time()
            run()
            times[way].append(time.process_time() - start)
    kept = torchbp.memory(block, x).ways
    bytes_of = {way: usage.kept_bytes for way, usage in kept.items()}
    bytes_of["fused"] = torchbp.memory(modules["fused"], x).ways["torch"].kept_bytes
    return [
        {
            "block": name,
            "way": way,
            "ms": round(statistics.median(times[way]) * 1e3, 2),
            "time": round(statistics.median(times[way]) / statistics.median(times["torch"]), 3),
            "kept": bytes_of[way],
            "repeats": repeats,
        }
        for way in modules
    ]


def main() -> int:
    """Run the benchmark and write its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in BLOCKS for row in measure(name, args.repeats)]
    for row in rows:
        print("{block:18} {way:8} {ms:8.2f} ms {time:5.2f} of torch".format(**row), end="")
        print(f"  {row['kept'] / 2**20:6.2f} MiB kept")
    if not args.no_write:
        from run import processor

        date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        about = {
            "date": date,
            "device": processor(),
            "threads": 1,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        path = DATA / f"blocks-cpu-{date}.json"
        text = ",\n".join(json.dumps(r) for r in rows)
        path.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{text}\n]}}\n')
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
