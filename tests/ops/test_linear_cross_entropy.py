"""What is special about linear + cross entropy: gradients made in the forward, tokens, shards, a language model."""

import json
import os
import socket
import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import torchbp
import torchbp.functional as F
from tests.device import DEVICE
from tests.ops.conftest import cases_of, with_args
from tests.ops.test_autograd import storage_bytes
from tests.ops.test_values import gradients, widened
from torchbp.ops import _half_products
from torchbp.ops._op import all_ops

OP = all_ops()["linear_cross_entropy"]
CASES = cases_of(OP)
HOME = sys.modules["torchbp.ops.losses.linear_cross_entropy"]
CHUNKS = sys.modules["torchbp.ops.losses._chunked_logits"]


@pytest.fixture
def early(monkeypatch):
    """Gradients in the forward for every sample, two rows a chunk, one row a block; what scales them is noted."""
    scaled = []
    real = HOME._scaled
    monkeypatch.setattr(HOME, "_worth", lambda *_: True)
    monkeypatch.setattr(HOME, "chunk_rows", lambda *_: 2)
    monkeypatch.setattr(CHUNKS, "_BLOCK", 4)
    monkeypatch.setattr(HOME, "_scaled", lambda *args: scaled.append(args) or real(*args))
    return scaled


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("any_case", CASES, ids=repr)
def test_gradients_of_the_forward(any_case, dtype, early):
    """Whatever the option: the gradient of the definition in float64, to the roundings of the input's dtype."""
    case = any_case
    sample = case.sample(dtype)
    f, tensors = case.of_tensors(sample)
    exact = with_args(sample, lambda t: widened(t) if t.is_floating_point() else t)
    g, wide = case.of_tensors(exact, case.reference)
    unit = torch.finfo(dtype).eps
    for a, b in zip(gradients(f, tensors), gradients(g, wide), strict=True):
        assert a.dtype == dtype
        scale = b.abs().max().item() if b.numel() else 0.0
        slack = 1e-12 if dtype == torch.float64 else 1e-6  # what is float32 inside
        torch.testing.assert_close(a.double(), b, rtol=2 * unit, atol=4 * unit * scale + slack)
    through_logits = "places" in repr(case) or "trained" in repr(case) or "empty" in repr(case)
    if sample.kwargs.get("reduction") != "none" and not through_logits:
        assert early


@pytest.mark.parametrize("any_case", CASES[::7], ids=repr)
def test_second_derivatives_do_not_see_the_gradients_of_the_forward(any_case, early):
    f, tensors = any_case.of_tensors(any_case.sample())
    assert torch.autograd.gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(
        f, tensors, check_fwd_over_rev=True, check_rev_over_rev=True
    )


def example(positions=64, features=16, classes=2048):
    torch.manual_seed(0)
    x = torch.randn(positions, features, requires_grad=True, device=DEVICE)
    weight = (torch.randn(classes, features, device=DEVICE) / 4).requires_grad_()
    return x, weight, torch.randint(classes, (positions,), device=DEVICE)


def test_forward_mode_over_a_plain_backward():
    """The backward of a dual input has a tangent, though what the forward made has none."""
    x, weight, target = example()
    v = torch.randn_like(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, v)
        (g,) = torch.autograd.grad(F.linear_cross_entropy(dual, weight, target), dual)
        tangent = forward_ad.unpack_dual(g).tangent
    y = torch.nn.functional.cross_entropy(x @ weight.T, target)
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    (want,) = torch.autograd.grad(g, x, v)
    torch.testing.assert_close(tangent, want)


def test_repeated_backward_and_accumulation():
    """What is kept is scaled in place at its last use only; a gradient that accumulates does not share it."""
    x, weight, target = example()
    want = torch.autograd.grad(torch.nn.functional.cross_entropy(x @ weight.T, target), weight)[0]
    loss = F.linear_cross_entropy(x, weight, target)
    for k in range(1, 4):
        (loss * 1.0).backward(retain_graph=k < 3)
        torch.testing.assert_close(weight.grad, k * want)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    weight.grad = None
    loss = F.linear_cross_entropy(x, weight, target)
    (3 * loss).backward(retain_graph=True)
    (g,) = torch.autograd.grad(0.5 * loss, weight)
    torch.testing.assert_close(weight.grad, 3 * want)
    torch.testing.assert_close(g, 0.5 * want)


def test_keeps_no_logits():
    x, weight, target = example()
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t.detach()) or t.detach(), lambda t: t):
        loss = F.linear_cross_entropy(x, weight, target)
    made = (x.numel() + weight.numel()) * 4
    assert storage_bytes(kept) == 2 * made + target.numel() * 8
    assert made < x.shape[0] * weight.shape[0] * 4
    del loss


def test_small_gradients_of_float16_do_not_vanish():
    """The mean over many positions is taken in float32: loss scaling finds the gradients still there."""
    x, weight, target = (t.half() if t.is_floating_point() else t for t in example(2048))
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    (F.linear_cross_entropy(x, weight, target).float() * 2**12).backward()
    wide = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide[0] @ wide[1].T, target) * 2**12
    for t, g in zip((x, weight), torch.autograd.grad(exact, wide), strict=True):
        torch.testing.assert_close(t.grad.double(), g, rtol=1e-3, atol=1e-3 * g.abs().max().item())


def test_large_features_of_float16_do_not_overflow():
    """A gradient of the weight that adds up to 122 880 before it is divided by the number of positions."""
    x = torch.full((1024, 16), 120.0, dtype=torch.float16, device=DEVICE, requires_grad=True)
    weight = torch.zeros(512, 16, dtype=torch.float16, device=DEVICE, requires_grad=True)
    target = torch.zeros(1024, dtype=torch.long, device=DEVICE)
    F.linear_cross_entropy(x, weight, target).backward()
    torch.testing.assert_close(
        weight.grad[0].double(),
        torch.full_like(weight[0], -120 * 511 / 512).double(),
        rtol=1e-3,
        atol=0,
    )


@pytest.mark.parametrize("early_too", [False, True])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tokens(early_too, soft, reduction, request):
    if early_too:
        request.getfixturevalue("early")
    torch.manual_seed(0)
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True, device=DEVICE)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True, device=DEVICE)
    target = torch.randint(11, (2, 7), device=DEVICE)
    target[0, 3] = 4
    logits = (x @ weight.T).detach()
    if soft:
        target = torch.randn(2, 7, 11, dtype=torch.float64, device=DEVICE).softmax(-1)
        options, counts, label = (
            {},
            torch.ones(2, 7, dtype=torch.bool, device=DEVICE),
            target.argmax(-1),
        )
    else:
        options, counts, label = {"ignore_index": 4}, target != 4, target
    options |= {"z_loss": 0.1, "reduction": reduction}
    found = F.linear_cross_entropy(x, weight, target, **options, return_tokens=True)
    torch.testing.assert_close(found.loss, F.linear_cross_entropy(x, weight, target, **options))
    each = F.linear_cross_entropy(x, weight, target, **{**options, "reduction": "none"})
    torch.testing.assert_close(found.values, each.detach())
    assert torch.equal(found.predictions, logits.argmax(-1))
    assert found.accuracy == (logits.argmax(-1) == label)[counts].float().mean()
    assert found.loss.requires_grad
    assert not any(t.requires_grad for t in found[1:])
    found.loss.sum().backward()


def test_nothing_counts():
    """The mean of nothing is NaN, its gradient 0, as in torch; in the forward, too."""
    x, weight, target = example()
    for positions in (slice(None), slice(0, 3)):
        loss = F.linear_cross_entropy(x[positions], weight, target[positions], ignore_index=-100)
        assert loss.isfinite()
        ignored = torch.full_like(target[positions], -100)
        loss = F.linear_cross_entropy(x[positions], weight, ignored, z_loss=0.1)
        assert loss.isnan()
        assert not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))


def test_padded_vocabulary():
    """A bias of -∞ takes classes out: no loss, no gradient, no NaN."""
    x, weight, target = example(classes=2100)
    target = target % 2048
    bias = torch.zeros(2100, device=DEVICE)
    bias[2048:] = -torch.inf
    loss = F.linear_cross_entropy(x, weight, target, linear_bias=bias)
    got = torch.autograd.grad(loss, (x, weight))
    plain = F.linear_cross_entropy(x, weight[:2048], target)
    torch.testing.assert_close(loss, plain)
    for a, b in zip(got, torch.autograd.grad(plain, (x, weight)), strict=True):
        torch.testing.assert_close(a, b)


def test_options_of_torch():
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch has none")
    x, weight, target = example()
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=7)
    torch.testing.assert_close(
        F.linear_cross_entropy(x, weight, target, options=options),
        torch.nn.functional.cross_entropy(x @ weight.T, target),
    )


def test_in_a_lean_scope_and_under_a_checkpoint():
    """The same bits: the hidden states are a recipe's, the gradients of the forward are kept or made again."""
    x, weight, target = example(256, 64)  # smaller ones are not worth a recipe
    scale = torch.ones(64, requires_grad=True, device=DEVICE)

    def loss():
        return F.linear_cross_entropy(F.layer_norm(F.gelu(x), (64,), scale), weight, target)

    want = torch.autograd.grad(loss(), (x, scale, weight))
    with torchbp.lean_scope():
        lean = loss()
    checkpointed = checkpoint(loss, use_reentrant=False)
    for value in (lean, checkpointed):
        got = torch.autograd.grad(value, (x, scale, weight), retain_graph=True)
        again = torch.autograd.grad(value, (x, scale, weight))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))


class LanguageModel(nn.Module):
    """A small GPT whose head is its embedding."""

    def __init__(self, vocabulary=97, width=16):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 32, 0.0, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=DEVICE)
        return self.norm(self.block(self.token(tokens), src_mask=mask, is_causal=True))


def test_a_language_model_trains_alike():
    """Hidden states to loss, with tied weights: the losses of linear and cross entropy apart, step by step."""
    losses = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = torchbp.convert(LanguageModel()).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(1)
        losses.append([])
        for _ in range(12):
            tokens = torch.randint(97, (4, 33), generator=generator).to(DEVICE) // 3
            hidden, target = model(tokens[:, :-1]), tokens[:, 1:]
            if fused:
                loss = F.linear_cross_entropy(hidden, model.token.weight, target)
            else:
                logits = F.linear(hidden, model.token.weight)
                loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


WITHOUT = """
import torch
for home, names in ((torch.nn.functional, ["linear_cross_entropy"]),
                    (torch.nn, ["LinearCrossEntropyLoss", "LinearCrossEntropyOptions"])):
    for name in names:
        if hasattr(home, name):
            delattr(home, name)
from torchbp import nn, functional as F
torch.manual_seed(0)
loss = nn.LinearCrossEntropyLoss(5, 7, out_features=(2,), bias=True, label_smoothing=0.1)
value = loss(torch.randn(3, 5), torch.randint(7, (3, 2)))
value.backward()
assert loss.linear.weight.grad.any() and list(loss.state_dict()) == ["linear.weight", "linear.bias"]
print(loss)
print(value.item())
"""


@pytest.mark.cpu("a process of its own")
def test_where_torch_has_none():
    """In torch before 2.13 the layer and the function are there, with its constructor, repr and parameters."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT], capture_output=True, text=True, check=True
    )
    torch.manual_seed(0)
    loss = torchbp.nn.LinearCrossEntropyLoss(
        5, 7, out_features=(2,), bias=True, label_smoothing=0.1
    )
    value = loss(torch.randn(3, 5, device=DEVICE), torch.randint(7, (3, 2), device=DEVICE))
    text, _, number = run.stdout.strip().rpartition("\n")
    assert text == str(loss) or not hasattr(nn, "LinearCrossEntropyLoss")
    assert float(number) == pytest.approx(value.item())


SHARDS = """
import json, os, sys
import torch, torch.distributed as dist
import torchbp.functional as F

world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
group = None
if world > 1:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
torch.manual_seed(0)
N, D, C = 12, 5, 11
x0, w0, b0 = (torch.randn(*s, dtype=torch.float64) for s in ((N, D), (C, D), (C,)))
hard = torch.randint(C, (N,))
hard[2] = 3
soft = torch.randn(N, C, dtype=torch.float64).softmax(1)
factor = torch.rand(C, dtype=torch.float64) + 0.2
mine = slice(0, C) if world == 1 else (slice(0, 7), slice(7, C))[rank]
v = torch.randn(N, dtype=torch.float64)
found = {}
for name, padded, target, options in [
    ("plain", 0, hard, {}),
    ("sum", 0, hard, {"reduction": "sum", "ignore_index": 3}),
    ("none", 0, hard, {"reduction": "none", "z_loss": 0.1}),
    ("all", 0, hard, {"label_smoothing": 0.1, "softcap": 2.0, "z_loss": 0.1, "ignore_index": 3, "weight": factor}),
    ("soft", 0, soft, {"label_smoothing": 0.1, "weight": factor}),
    ("padded", 1, hard % 7, {}),
]:
    x, w, b = x0.clone().requires_grad_(), w0[mine].clone().requires_grad_(), b0[mine].clone()
    if padded:
        b = torch.where(torch.arange(C)[mine] < 7, b, -torch.inf)
    b.requires_grad_()
    options = dict(options)
    if "weight" in options:
        options["weight"] = factor[mine]
    t = target[:, mine] if target.dim() == 2 else target
    out = F.linear_cross_entropy(x, w, t, linear_bias=b, process_group=group, return_tokens=True, **options)
    (out.loss @ v if out.loss.dim() else out.loss * 3).backward()
    whole = [w.grad, b.grad]
    if world > 1:
        parts = [None, None]
        dist.all_gather_object(parts, whole)
        whole = [torch.cat(p) for p in zip(*parts)]
    found[name] = [t.double().tolist() for t in (*out, x.grad, *whole)]
if world > 1:
    x = x0.clone().requires_grad_()
    loss = F.linear_cross_entropy(x, w0[mine], hard, process_group=group)
    try:
        torch.autograd.grad(loss, x, create_graph=True)
        found["second"] = "went through"
    except RuntimeError as error:
        found["second"] = str(error)
    try:
        F.linear_cross_entropy(x, w0[mine], hard + C, process_group=group)
    except IndexError as error:
        found["range"] = str(error)
if rank == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
if world > 1:
    dist.barrier()
    os._exit(0)  # while the interpreter is torn down, gloo's threads may abort it (pytorch#179291)
"""


def run_shards(path, world: int) -> dict:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1"}
    if world > 1:
        environment["WORLD_SIZE"] = str(world)
    command = [sys.executable, "-W", "ignore", "-c", SHARDS, str(path)]
    runs = [
        subprocess.Popen(
            command,
            env={**environment, **({"RANK": str(r)} if world > 1 else {})},
            stderr=-1,
            text=True,
        )
        for r in range(world)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=240)
        assert run.returncode == 0, errors
    return json.loads(path.read_text())


@pytest.mark.cpu("processes of gloo")
def test_sharded_vocabulary(tmp_path):
    """Two gloo processes with 7 and 4 of the classes: loss, tokens and every gradient of one process with all."""
    one, two = run_shards(tmp_path / "one", 1), run_shards(tmp_path / "two", 2)
    for name, values in one.items():
        for a, b in zip(values, two[name], strict=True):
            torch.testing.assert_close(
                torch.tensor(b, device=DEVICE),
                torch.tensor(a, device=DEVICE),
                rtol=1e-6,
                atol=1e-7,
                msg=name,
            )
    assert "expected one backward, without create_graph" in two["second"]
    assert "expected class indices in [0, 11)" in two["range"]


@pytest.mark.skipif(_half_products._MKL is None, reason="no products of bfloat16 in float32")
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0}, {"z_loss": 1e-3}], ids=str)
def test_bfloat16_by_products_in_float32(options):
    """The processor's products of bfloat16, the gradient in halves: as near the truth as all of it in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 128, generator=generator).bfloat16()
    weight = (torch.randn(640, 128, generator=generator) / 8).bfloat16()
    target = torch.randint(640, (600,), generator=generator)

    def step(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        value = F.linear_cross_entropy(*leaves, target, **options)
        return [t.double() for t in torch.autograd.grad(value, leaves)]

    truth = step(torch.float64)
    with patch.object(_half_products, "_MKL", wraps=_half_products._MKL) as called:
        found = step(torch.bfloat16)
    assert called.call_count == 2 * (1 + 2 + 2)  # in two chunks
    with patch.object(CHUNKS, "suit", lambda *_: False):
        wide = step(torch.bfloat16)
    for a, b, c in zip(found, wide, truth, strict=True):
        assert (a - c).norm() <= 1.001 * (b - c).norm()
        assert (a - c).norm() <= 2e-3 * c.norm()


@pytest.mark.skipif(_half_products._MKL is None, reason="no products of bfloat16 in float32")
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_an_infinite_gradient_of_bfloat16(infinity):
    """Of one row: NaN and infinities where float32 has them, though the halves of an infinity are one and NaN."""
    x, weight = torch.randn(700, 64).bfloat16(), torch.randn(3000, 64).bfloat16()
    target, v = torch.randint(3000, (700,)), torch.ones(700)
    v[1] = infinity

    def gradients(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        losses = F.linear_cross_entropy(*leaves, target, reduction="none")
        return [g.float() for g in torch.autograd.grad(losses, leaves, v.to(losses.dtype))]

    for ours, want in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        for found in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(found(ours), found(want))
