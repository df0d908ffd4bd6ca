"""memory(): bytes by distinct storages, by layer and op; the model, the inputs and the random state as they were."""

import copy
import gc
import json

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import torchbp
from torchbp.cli import main
from torchbp.recompute._memory_table import size


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.lstm = nn.Embedding(11, 8), nn.LSTM(8, 16, batch_first=True)

    def forward(self, tokens):
        return self.lstm(self.token(tokens))[0]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()
    )


def perceptron():
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))


MODELS = {
    "transformer": lambda: (nn.Sequential(Block(), Block()), torch.randn(4, 16, 32)),
    "convolutional": lambda: (convolutional(), torch.randn(4, 3, 16, 16)),
    "recurrent": lambda: (Recurrent(), torch.randint(11, (4, 9))),
    "perceptron": lambda: (perceptron(), torch.randn(256, 64)),
}


def saved(model, x) -> int:
    """What autograd is handed to keep, by distinct storages; the yardstick, without parameters and inputs."""
    apart = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return t.detach()

    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(x).sum()
    del loss
    return sum(n for key, n in kept.items() if key not in apart)


@pytest.mark.parametrize("name", MODELS)
def test_kept_is_what_autograd_saves(name):
    model, x = MODELS[name]()
    report = torchbp.memory(model, x)
    scalars = 64  # a count or two that an op's node keeps
    for way, change in (("torch", torchbp.revert), ("torchbp", torchbp.convert)):
        want = saved(change(copy.deepcopy(model)), x)
        assert want <= report.ways[way].kept_bytes <= want + scalars
    kept = {way: usage.kept_bytes for way, usage in report.ways.items()}
    assert kept["lean"] <= kept["torchbp"]
    for way in kept:
        for each in (False, True):
            assert sum(row.get(way, 0) for row in report.rows(each).values()) == kept[way]


def test_layers_and_ops():
    model, x = MODELS["perceptron"]()
    rows = torchbp.memory(model, x).rows()
    hidden = 256 * 64 * 4
    assert rows["0", "addmm"] == {"torch": hidden, "torchbp": hidden, "lean": hidden}
    assert rows["1", "gelu"] == {"torch": hidden, "torchbp": hidden}
    model, x = MODELS["transformer"]()
    report = torchbp.memory(model, x)
    assert {"0.norm", "1.norm"} < {layer for layer, _ in report.rows()}
    assert "*.norm" in {layer for layer, _ in report.rows(each=False)}
    numbered = {"*.mlp.0", "*.mlp.2"}
    assert numbered < {layer for layer, _ in report.rows(each=False)}, "a layer's number stays"


def test_peak():
    """Of a step whose every tensor is known; and of a checkpoint, which keeps nothing but makes all again."""
    x = torch.randn(1000, requires_grad=True)
    report = torchbp.memory(lambda x: x.exp().exp(), x)
    plain = report.ways["plain"]
    assert plain.kept_bytes == 2 * 4000
    # Both outputs and the second's gradient; the second is freed before the first's gradient is made.
    assert 3 * 4000 <= plain.peak <= 3 * 4000 + 64
    checkpointed = torchbp.memory(Checkpointed(), torch.randn(4, 16, 32)).ways["torch"]
    assert checkpointed.kept_bytes == 0
    assert (
        checkpointed.peak > torchbp.memory(Block(), torch.randn(4, 16, 32)).ways["torch"].kept_bytes
    )


def test_everything_is_as_it_was():
    model = nn.Sequential(convolutional(), nn.Dropout(0.5))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    model(x).sum().backward()
    calls.clear()
    before = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    versions = [p._version for p in (*model.parameters(), *model.buffers(), x)]
    gradient, state = x.grad.clone(), torch.get_rng_state()
    types = [type(m) for m in model.modules()]
    torchbp.memory(model, x)
    torchbp.memory(lambda x: model(x), x)  # noqa: PLW0108  # a function, not the model
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert all(torch.equal(a, p.grad) for a, p in zip(grads, model.parameters(), strict=True))
    assert torch.equal(x.grad, gradient)
    assert versions[:4] == [p._version for p in model.parameters()]
    assert [type(m) for m in model.modules()] == types
    assert len(model._forward_hooks) == 1
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_model_that_is_lean_or_converted_already():
    model, x = MODELS["perceptron"]()
    want = {k: u.kept_bytes for k, u in torchbp.memory(model, x).ways.items()}
    for change in (torchbp.convert, torchbp.lean):
        found = torchbp.memory(change(copy.deepcopy(model)), x)
        assert {k: u.kept_bytes for k, u in found.ways.items()} == want


def test_function_and_loss():
    model, x = MODELS["perceptron"]()
    torchbp.convert(model)
    target = torch.randint(8, (256,))

    def loss(y):
        return torch.nn.functional.cross_entropy(y, target)

    of_model = torchbp.memory(model, x, loss=loss)
    of_function = torchbp.memory(lambda x: loss(model(x)), x)
    assert list(of_function.ways) == ["plain", "lean_scope"]
    assert of_function.ways["plain"].kept_bytes == of_model.ways["torchbp"].kept_bytes
    assert "GELU" in {layer for layer, _ in of_function.rows()}


def test_budgets():
    """Fewer bytes for more operations, down to the last budget; without, none is made twice."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(64), Block(64), Block(64)), torch.randn(8, 32, 64)
    ways = torchbp.memory(model, x, budgets=(0.5, 0.45)).ways
    assert list(ways) == ["torch", "torchbp", "lean", "lean 0.5", "lean 0.45"]
    kept = [usage.kept_bytes for usage in ways.values()]
    assert kept == sorted(kept, reverse=True)
    assert kept[3] <= 0.51 * kept[0]
    flops = [usage.flops for usage in ways.values()]
    assert flops[0] == flops[1] == flops[2] < flops[3] <= flops[4]
    with pytest.raises(ValueError, match="expected a model where there are budgets"):
        torchbp.memory(lambda x: x, x, budgets=(0.3,))


def test_operations():
    """Of two products forward, three backward: the first input needs no gradient."""
    model, x = MODELS["perceptron"]()
    products = 2 * 256 * 64 * (64 * 2 + 8 * 3)
    assert {u.flops for u in torchbp.memory(model, x).ways.values()} == {products}


def test_nothing_stays_alive():
    model, x = MODELS["transformer"]()
    torchbp.memory(model, x)
    gc.collect()
    alive = sum(type(o) is Block for o in gc.get_objects())
    assert alive == 2


def test_exception_leaves_no_hooks():
    def fails(x):
        raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        torchbp.memory(fails, torch.randn(3))
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: torchbp.memory(3), TypeError, "expected a model or a function, got int"),
        (lambda: torchbp.memory(lambda x: x * 2, torch.ones(3)), ValueError, "requires grad"),
        (
            lambda: torchbp.memory(perceptron(), torch.ones(2, 64), loss=lambda y: y),
            ValueError,
            "scalar",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=f"memory: .*{message}"):
        call()


def test_sizes():
    assert [size(n) for n in (0, 999, 1000, 65536, 131072, 5 << 30)] == [
        *("0 B", "999 B", "1.0 KiB", "64.0 KiB", "128 KiB", "5.0 GiB")
    ]


SOURCE = """
from torch import nn
def make(): return nn.Sequential(nn.Embedding(11, 16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 2))
def loss(y): return y.square().mean()
number = 3
"""


def test_command(tmp_path, capsys):
    source, out = tmp_path / "some_models.py", tmp_path / "memory.json"
    source.write_text(SOURCE)
    line = ["memory", f"{source}:make", "--integers", "8,4:11", "--loss", f"{source}:loss"]
    assert main([*line, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "gelu" in printed
    assert "█" in printed
    written = json.loads(out.read_text())
    kept = {way: found["kept"] for way, found in written["ways"].items()}
    assert kept["lean"] < kept["torch"]
    assert sum(row["kept"].get("torch", 0) for row in written["rows"]) == kept["torch"]
    assert main(["memory", f"{source}:number", "--shape", "3"]) == 2
    assert "expected a model, got" in capsys.readouterr().err
    assert main(["memory", f"{source}:make", "--shape", "3"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert main(["memory", f"{source}:make"]) == 2
    assert "expected a --shape or --integers" in capsys.readouterr().err
