"""Recurrent cells and layers with their steps in one loop: what they are without it, and at infinity."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import torchbp.nn
from tests.ops.test_half_products import GATES, cell, step
from torchbp.ops._precision import ulps
from torchbp.ops.kernels import _library, disabled


def used() -> bool:
    """Whether loops ran, and all that were asked for: one that can't be written down is a fault, not another way."""
    return bool(_library.remembered) and None not in _library.remembered.values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GATES)
def test_a_cell_in_one_loop(compiled, name, dtype):
    """As near the truth as without the loop: half precision rounds once."""
    if dtype == torch.float32 and name.startswith("rnn"):
        pytest.skip("torch's kernels of one step are as fast")
    arguments, leaves, v = cell(name, dtype)
    compiled(lambda: step(name, arguments, leaves, v))
    found = step(name, arguments, leaves, v)
    assert used()
    wide = {id(t): t.detach().double().requires_grad_() for t in leaves}
    over = lambda t: tuple(wide[id(s)] for s in t) if isinstance(t, tuple) else wide[id(t)]  # noqa: E731
    exact = step(name, tuple(map(over, arguments)), list(wide.values()), v.double())
    with disabled():
        without = step(name, arguments, leaves, v)
    for a, b, c in zip(found, without, exact, strict=True):
        assert a.dtype == b.dtype == dtype
        assert a.stride() == b.stride()
        of_a, of_b = (ulps(t, c, dtype, c.square().mean().sqrt() / 16) for t in (a, b))
        noise = 1.1 if a.numel() > 10_000 else 1.4  # sums of rows: few
        assert of_a.mean() <= noise * of_b.mean() + 0.01
        assert of_a.max() <= (0.56 if dtype == torch.bfloat16 else 2 * of_b.max() + 1)


@pytest.mark.parametrize("which", ["x", "h", "v"])
@pytest.mark.parametrize("name", GATES)
def test_infinities(compiled, name, which):
    arguments, leaves, v = cell(name)
    compiled(lambda: step(name, arguments, leaves, v))
    with torch.no_grad():
        {"x": leaves[0], "h": leaves[1], "v": v}[which][0, 0] = torch.inf
    found = step(name, arguments, leaves, v)
    with disabled():
        without = step(name, arguments, leaves, v)
    for a, b in zip(found, without, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-9, equal_nan=True)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "options"), [("GRU", {}), ("LSTM", {}), ("LSTM", {"proj_size": 32})]
)
def test_a_layer_over_time(compiled, name, options, dtype, packed):
    """Every step in a loop, of rows that become fewer in a packed batch; the final states count, too."""
    generator = torch.Generator().manual_seed(0)
    module = getattr(torchbp.nn, name)(64, 128, bidirectional=True, dtype=dtype, **options)
    x = torch.randn(4, 320, 64, generator=generator).to(dtype).requires_grad_()
    lengths = torch.tensor([4] * 200 + [2] * 120)

    def run() -> list[torch.Tensor]:
        output, final = module(pack_padded_sequence(x, lengths) if packed else x)
        of_all = [
            output.data if packed else output,
            *(final if isinstance(final, tuple) else [final]),
        ]
        loss = sum(t.float().sin().sum() for t in of_all)
        return [*of_all, *torch.autograd.grad(loss, (x, *module.parameters()))]

    compiled(run)
    found = run()
    assert used()
    with disabled():
        without = run()
    unit = torch.finfo(dtype).eps
    for a, b in zip(found, without, strict=True):
        size = b.detach().abs().max().item()
        # of half precision a rounding: where the directions' gradients of x, each rounded, cancel, it is one of theirs
        atol = 16 * 2**-23 * size if dtype == torch.float32 else 0.5 * unit * size
        torch.testing.assert_close(a, b, rtol=unit, atol=atol)


def test_a_second_derivative_takes_the_formula(compiled):
    """Of what a loop computed forward, in half precision, where it returns no gates."""
    arguments, leaves, v = cell("lstm_cell")
    compiled(lambda: step("lstm_cell", arguments, leaves, v))

    def second() -> list[torch.Tensor]:
        h, c = torchbp.functional.lstm_cell(*arguments)
        grads = torch.autograd.grad((h, c), leaves, (v, v), create_graph=True)
        penalty = sum(g.float().square().sum() for g in grads)
        return list(torch.autograd.grad(penalty, leaves))

    found = second()
    with disabled():
        without = second()
    for a, b in zip(found, without, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=2**-7 * b.abs().max().item())
