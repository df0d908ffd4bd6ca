"""lean on a GPU: the same bits, far fewer bytes by CUDA's own count. Run by ``--device cuda``."""

import copy
import gc
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

import torchbp
from benchmarks.models import GPT, MODELS, Llama, ResNet, loss
from tests.device import DEVICE
from tests.recompute.compared import Count, both, same, step
from torchbp.recompute._budget import Plan
from torchbp.verify.tensors import graph

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation"),
    pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled"),
    pytest.mark.filterwarnings("ignore:lean. expected a budget that can be met"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),
]

CONTEXTS = {
    "float32": nullcontext,
    "bfloat16": partial(torch.autocast, DEVICE, torch.bfloat16),
    "float16": partial(torch.autocast, DEVICE, torch.float16),
}


@pytest.fixture(autouse=True)
def _deterministic():
    """Two runs of one model must give the same bits, or nothing can be asked of a lean one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def made(name):
    torch.manual_seed(0)
    config = MODELS[name]
    model = config.small().to(DEVICE)
    x, y = config.small_data(3)
    return model, x.to(DEVICE), y.to(DEVICE)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("name", MODELS)
def test_same_bits(name, context, monkeypatch):
    model, x, y = made(name)
    converted, lean = both(model)
    again = copy.deepcopy(converted)
    want = step(converted, x, y, loss, context)
    same(step(again, x, y, loss, context), want)
    count = Count(monkeypatch)
    same(step(lean, x, y, loss, context), want)
    assert count.shared


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("budget", [0.4, 0.01])
@pytest.mark.parametrize("name", MODELS)
def test_same_bits_within_a_budget(name, budget, context):
    model, x, y = made(name)
    converted, lean = torchbp.convert(copy.deepcopy(model)), torchbp.lean(model, budget)
    for _ in range(3):
        for m in (converted, lean):
            m.zero_grad()
        same(step(lean, x, y, loss, context), step(converted, x, y, loss, context))


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_attention_is_made_again_within_a_budget(context, monkeypatch):
    """Where nearly nothing may be kept, no attention's output is; the nodes are other ones than the CPU's."""
    torch.manual_seed(0)
    model = GPT(vocabulary=64, width=64, heads=4, depth=2, length=64).to(DEVICE)
    x = torch.randint(64, (4, 64)).to(DEVICE)
    lean = torchbp.lean(model, 0.01)
    calls: list[str] = []
    choose = Plan.choose

    def noted(plan, measured):
        calls.extend(getattr(c.recipe.call, "__qualname__", "") for c in measured.candidates)
        choose(plan, measured)

    monkeypatch.setattr(Plan, "choose", noted)
    with context():
        value = loss(lean(x), x)
    used = {node.name() for node in graph([value]) if "Attention" in node.name()}
    assert sum("_attention" in call for call in calls) == 2, (used, calls)


@pytest.mark.parametrize("name", ["GPT", "ResNet-20"])
def test_trains_with_a_scaler_to_the_same_bits(name):
    model, x, y = made(name)

    def trained(m):
        optimizer = torch.optim.AdamW(m.parameters(), 1e-3, fused=True)
        scaler = torch.amp.GradScaler(DEVICE)
        torch.manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.float16):
                value = loss(m(x), y)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        return [*m.parameters(), *m.buffers(), torch.cuda.get_rng_state()]

    converted, lean = both(model)
    same(trained(lean), trained(converted))


def test_dropout_draws_once():
    """Backward makes it again with the same mask, and leaves the generator as a model that keeps it does."""
    torch.manual_seed(0)
    parts = [part for _ in range(3) for part in (nn.Linear(64, 64), nn.GELU(), nn.Dropout(0.5))]
    model = nn.Sequential(*parts, nn.Linear(64, 64)).to(DEVICE)
    x = torch.randn(256, 64, device=DEVICE)

    def run(m):
        torch.manual_seed(3)
        m(x).square().sum().backward()
        return [torch.cuda.get_rng_state(), *(p.grad for p in m.parameters())]

    converted, lean = both(model)
    same(run(lean), run(converted))


def test_a_step_in_a_side_stream():
    model, x, y = made("GPT")
    converted, lean = both(model)
    want = step(converted, x, y, loss)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(lean, x, y, loss)
    torch.cuda.synchronize()
    same(got, want)


def test_no_step_waits_for_the_gpu():
    torch.use_deterministic_algorithms(False)  # of which some wait
    model, x, y = made("GPT")
    lean = torchbp.lean(model)
    loss(lean(x), y).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(lean(x), y).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_in_a_graph():
    """Forward and backward of a lean model in one CUDA graph: recipes are kernels as any others."""
    model, x, y = made("ViT")
    converted, lean = both(model.eval())
    want = step(converted, x, y, loss)[1:]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            lean.zero_grad()
            loss(lean(x), y).backward()
    torch.cuda.current_stream().wait_stream(stream)
    lean.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss(lean(x), y).backward()
    graph.replay()
    torch.cuda.synchronize()
    got = [*(p.grad for p in lean.parameters()), *lean.buffers()]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_compiled_it_is_inert():
    model, x, y = made("ViT")
    converted, lean = both(model.eval())
    want = step(torch.compile(converted, backend="aot_eager", fullgraph=True), x, y, loss)
    same(step(torch.compile(lean, backend="aot_eager", fullgraph=True), x, y, loss), want)


# ----------------------------------------------------------------------------------------- bytes
MIDDLING = {
    "GPT": lambda: GPT(vocabulary=64, width=256, heads=4, depth=4, length=256),
    "Llama": lambda: Llama(vocabulary=64, width=256, heads=4, hidden=704, depth=4),
    "ResNet-20": lambda: ResNet(width=16, blocks=3, classes=10),
}
# Of what torch keeps: in float32, and under autocast.
SHARES = {"GPT": (0.64, 0.65), "Llama": (0.66, 0.64), "ResNet-20": (0.62, 0.62)}


def taken(model, x, y, context):
    """Return bytes alive between forward and backward, and at most in the step, beyond what was there before."""
    for _ in range(3):  # a budget is measured in the first
        model.zero_grad(set_to_none=False)
        with context():
            loss(model(x), y).backward()
    model.zero_grad(set_to_none=False)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with context():
        value = loss(model(x), y)
    kept = torch.cuda.memory_allocated() - before
    value.backward()
    return kept, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", SHARES)
def test_keeps_far_fewer_bytes(name):
    torch.manual_seed(0)
    model = MIDDLING[name]().to(DEVICE)
    x, y = torch.randint(64, (2, 16, 256)).to(DEVICE)
    if name == "ResNet-20":
        x, y = torch.randn(64, 3, 32, 32).to(DEVICE), torch.randint(10, (64,)).to(DEVICE)
    lean = torchbp.lean(copy.deepcopy(model))
    tight = torchbp.lean(copy.deepcopy(model), 0.3)
    found = {}
    for kind, context in (("float32", nullcontext), ("autocast", CONTEXTS["bfloat16"])):
        torchs = taken(model, x, y, context)
        for way, m in (("lean", lean), ("lean 0.3", tight)):
            mine = taken(m, x, y, context)
            found[way, kind] = mine[0] / torchs[0], mine[1] / torchs[1]
    print(name, found)
    for k, kind in enumerate(("float32", "autocast")):
        assert found["lean", kind][0] <= SHARES[name][k], found
        assert found["lean 0.3", kind][0] <= 0.33, found
    assert found["lean", "float32"][1] <= 0.9, found


def test_memory_is_given_back():
    model, x, y = made("GPT")
    lean = torchbp.lean(model, 0.3)
    for _ in range(2):
        lean.zero_grad(set_to_none=False)
        loss(lean(x), y).backward()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        lean.zero_grad(set_to_none=False)
        loss(lean(x), y).backward()
    loss(lean(x), y)  # with no backward
    gc.collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("name", ["GPT", "ResNet-20"])
def test_the_table_is_the_cpus(name):
    """What is kept is the same on both but for attention, whose kernels keep other things."""
    model, x, _ = made(name)
    model.eval()
    state = torch.cuda.get_rng_state(), torch.get_rng_state()
    got = torchbp.memory(model, x, budgets=(0.5,))
    assert torch.equal(torch.cuda.get_rng_state(), state[0])
    assert torch.equal(torch.get_rng_state(), state[1])
    want = torchbp.memory(copy.deepcopy(model).cpu(), x.cpu(), budgets=(0.5,))
    assert got.ways.keys() == want.ways.keys()
    for way, usage in want.ways.items():
        assert abs(got.ways[way].kept_bytes - usage.kept_bytes) <= 0.1 * usage.kept_bytes, way
    assert got.parameters == want.parameters
    assert "lean" in str(got)


def test_a_functions_random_state_is_put_back():
    x = torch.ones(64, device=DEVICE, requires_grad=True)
    state = torch.cuda.get_rng_state()
    torchbp.memory(lambda t: torch.nn.functional.dropout(t * 2, 0.5), x)
    assert torch.equal(torch.cuda.get_rng_state(), state)
