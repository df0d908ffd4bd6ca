"""Times torchbp.gradcheck in a warm process beside torch.autograd.gradcheck, and counts the calls it makes.

``python benchmarks/gradcheck.py`` prints the table and writes benchmarks/data/gradcheck-<device>-<date>.json. One
thread, the time of the process: other programs disturb it little. On a GPU the time on the wall.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from run import DATA, about, clock

import torchbp


class Squared(torch.autograd.Function):
    """A Function by hand: what gradcheck is for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class Clamped(Squared):
    """The same, wrong."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0].clamp(-1, 1)


def normal(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)


torch.manual_seed(0)
GRU = torch.nn.GRUCell(3, 3)  # 72 parameters


def lstm(i: Tensor, f: Tensor, g: Tensor, o: Tensor, c: Tensor) -> Tensor:
    """One step of an LSTM from its four gates and the cell."""
    return o.sigmoid() * (f.sigmoid() * c + i.sigmoid() * g.tanh()).tanh()


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "Function, 12 elements": (Squared.apply, normal((3, 4))),
    "Function, wrong, 12 elements": (Clamped.apply, normal((3, 4))),
    "Function, 1000 elements": (Squared.apply, normal((20, 50))),
    "Function, 40000 elements": (Squared.apply, normal((200, 200))),
    "linear, 38 elements": (F.linear, normal((4, 5), (3, 5), (3,))),
    "linear, 1020 elements": (F.linear, normal((20, 25), (20, 25), (20,))),
    "LSTM step, 60 elements": (lstm, normal(*[(3, 4)] * 5)),
    "GRUCell, a Module, 81 elements": (GRU, normal((3, 3))),
}
TORCH = [name for name, (function, _) in CASES.items() if not isinstance(function, torch.nn.Module)]
WAYS: dict[str, dict[str, Any]] = {
    "quick": {"level": "quick"},
    "full, no compile": {"skip": ("compile",)},
    "full": {},
}


def timed(run: Callable[[], Any], repeats: int, now: Callable[[], float]) -> tuple[float, Any]:
    """Return the median seconds of a call, after one that is not counted, and its result."""
    result = run()
    seconds = []
    for _ in range(repeats):
        begun = now()
        result = run()
        seconds.append(now() - begun)
    return statistics.median(seconds), result


def measure(repeats: int, cases: list[str], ways: list[str], device: str) -> list[dict[str, Any]]:
    rows = []
    now = clock(device, 1)
    for name in cases:
        function, given = CASES[name]
        inputs = tuple(t.detach().to(device).requires_grad_() for t in given)
        if isinstance(function, torch.nn.Module):
            function.to(device)
        for way in ways:
            options = WAYS[way]
            check = functools.partial(
                torchbp.gradcheck, function, inputs, raise_exception=False, **options
            )
            seconds, report = timed(check, repeats, now)
            counts = {"forwards": report.forwards, "backwards": report.backwards}
            rows.append({"case": name, "way": way, "ms": 1000 * seconds, **counts})
        for way, fast in (("torch", False), ("torch, fast_mode", True)):
            if name not in TORCH or (not fast and inputs[0].numel() > 1000):
                continue  # it checks no parameters; it would take minutes
            check = functools.partial(
                torch.autograd.gradcheck, function, inputs, raise_exception=False, fast_mode=fast
            )
            rows.append({"case": name, "way": way, "ms": 1000 * timed(check, repeats, now)[0]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", default=[""], help="by the start of a name")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = [name for name in CASES if name.startswith(tuple(args.cases))]
    rows = measure(args.repeats, cases, args.ways, args.device)
    for row in rows:
        calls = (
            f"{row['forwards']:4} forward {row['backwards']:4} backward"
            if "forwards" in row
            else ""
        )
        print(f"{row['case']:30} {row['way']:18} {row['ms']:9.1f} ms  {calls}")
    if not args.no_write:
        facts = about(args.device) | {"threads": 1}
        path = DATA / f"gradcheck-{args.device}-{facts['date']}.json"
        text = ",\n".join(json.dumps(r) for r in rows)
        path.write_text(f'{{"about": {json.dumps(facts)},\n"rows": [\n{text}\n]}}\n')


if __name__ == "__main__":
    main()
