"""What is special to recurrent layers: time, layers and directions, packed sequences, against torch's own."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import cached, register_parametrization
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import torchbp.nn
from tests.device import DEVICE
from tests.ops.conftest import HALF, tensors_of
from tests.ops.test_autograd import kept_storages, storage_bytes
from torchbp.ops.recurrent.gru import _gru
from torchbp.ops.recurrent.lstm import _lstm
from torchbp.ops.recurrent.rnn import _rnn

LAYERS = ["RNN", "GRU", "LSTM"]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True, device=DEVICE)


def tanh(sizes, reverse):
    shapes = ((sum(sizes), 2), (sizes[0], 2), (2, 2), (2, 2), (2,), (2,))
    return lambda *a: _rnn(*a, False, sizes, reverse), [random(*s) for s in shapes]


def relu(sizes, reverse):
    shapes = ((sum(sizes), 2), (sizes[0], 2), (2, 2), (2, 2), (2,), (2,))
    return lambda *a: _rnn(*a, True, sizes, reverse), [random(*s) for s in shapes]


def gru(sizes, reverse):
    shapes = ((sum(sizes), 2), (sizes[0], 2), (6, 2), (6, 2), (6,), (6,))
    return lambda *a: _gru(*a, sizes, reverse), [random(*s) for s in shapes]


def lstm(sizes, reverse):
    shapes = ((sum(sizes), 2), (sizes[0], 2), (sizes[0], 2), (8, 2), (8, 2), (8,), (8,))
    return lambda *a: _lstm(*a, None, sizes, reverse), [random(*s) for s in shapes]


def projection(sizes, reverse):
    shapes = ((sum(sizes), 2), (sizes[0], 1), (sizes[0], 2), (8, 2), (8, 1), (8,), (8,), (1, 2))
    return lambda *a: _lstm(*a, sizes, reverse), [random(*s) for s in shapes]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 2, 1)], ids=["padded", "packed"])
@pytest.mark.parametrize("layer", [tanh, relu, gru, lstm, projection])
def test_gradcheck_through_time(layer, sizes, reverse):
    """Every output of the Function, the gates it keeps included, in every mode: a second derivative needs them."""
    f, inputs = layer(sizes, reverse)
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, fast_mode=True, check_fwd_over_rev=True)


OPTIONS = {
    "plain": {},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "deep": {"num_layers": 3},
    "directions": {"bidirectional": True, "num_layers": 2},
    "relu": {"nonlinearity": "relu"},
    "projection": {"proj_size": 2, "num_layers": 2, "bidirectional": True},
}
CASES = [
    pytest.param(name, options, id=f"{name}-{options}")
    for name in LAYERS
    for options in OPTIONS
    if (options != "relu" or name == "RNN") and (options != "projection" or name == "LSTM")
]


def pair(name: str, dtype=torch.float64, **options):
    torch.manual_seed(0)
    ours = getattr(torchbp.nn, name)(3, 5, dtype=dtype, device=DEVICE, **options)
    theirs = getattr(nn, name)(3, 5, dtype=dtype, device=DEVICE, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def states(module: nn.RNNBase, n: int, dtype=torch.float64):
    """Return hx for ``n`` sequences as the module takes it, and its tensors."""
    count = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(count, n, module.proj_size or 5, dtype=dtype, requires_grad=True, device=DEVICE)
    if not isinstance(module, nn.LSTM):
        return h, [h]
    c = torch.randn(count, n, 5, dtype=dtype, requires_grad=True, device=DEVICE)
    return (h, c), [h, c]


WHAT = {
    "all": lambda outputs: outputs,
    "output": lambda outputs: outputs[:1],
    "last-state": lambda outputs: outputs[-1:],
}


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_values_and_gradients_equal_torch(name, options, packed, what):
    """Whatever of the outputs the loss is made of; in double precision, where torch's layer is a plain composition."""
    ours, theirs = pair(name, **OPTIONS[options])
    x = random(4, 6, 3)
    n = 4 if ours.batch_first else 6
    hx, leaves = states(ours, n)
    lengths = [3, 6, 1, 2] if ours.batch_first else [2, 4, 1, 3, 2, 4]
    results = []
    for module in (ours, theirs):
        given = x
        if packed:
            given = pack_padded_sequence(x, lengths, ours.batch_first, enforce_sorted=False)
        outputs = tensors_of(module(given, hx))
        loss = sum((k + t).cos().sum() for k, t in enumerate(WHAT[what](outputs)))
        grads = torch.autograd.grad(loss, (x, *leaves, *module.parameters()), allow_unused=True)
        results.append(
            (outputs, [torch.zeros((), device=DEVICE) if g is None else g for g in grads])
        )
    for a, b in zip(*results, strict=True):
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_second_order_equals_torch(name):
    """A gradient penalty through two layers and both directions of a packed batch."""
    results = []
    for module in pair(name, num_layers=2, bidirectional=True):
        torch.manual_seed(1)
        x = random(4, 3, 3)
        packed = pack_padded_sequence(x, [4, 2, 3], enforce_sorted=False)
        with torch.backends.cudnn.flags(enabled=False):  # it has no second derivative
            outputs = tensors_of(module(packed))
        grads = torch.autograd.grad(
            sum(t.sin().sum() for t in outputs), (x, *module.parameters()), create_graph=True
        )
        penalty = sum((g * g).sum() for g in grads)
        results.append(torch.autograd.grad(penalty, (x, *module.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_sequence_is_computed_as_if_alone(name):
    module, _ = pair(name, bidirectional=True)
    sequences = [random(length, 3) for length in (2, 5, 1, 5)]
    packed, final = module(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(packed)
    for i, sequence in enumerate(sequences):
        output, last = module(sequence)
        torch.testing.assert_close(padded[: lengths[i], i], output)
        for a, b in zip(tensors_of(final), tensors_of(last), strict=True):
            torch.testing.assert_close(a[:, i], b)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_between_layers(name):
    """Between layers only, in training only: p = 1 is torch's, and a draw is repeated by its seed."""
    x = random(4, 6, 3)
    ours, theirs = pair(name, num_layers=2, dropout=1.0)
    for a, b in zip(tensors_of(ours(x)), tensors_of(theirs(x)), strict=True):
        torch.testing.assert_close(a, b)  # the states of the first layer too, which sees x whole
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])
    ours.train().dropout = 0.5
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(ours(x)[0])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert (draws[0] != 0).all(), "what leaves the last layer is whole"
    torch.manual_seed(1)
    inputs = (x, *ours.parameters())
    first = torch.autograd.grad(draws[0].sin().sum(), inputs)
    again = torch.autograd.grad(ours(x)[0].sin().sum(), inputs)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_rounds_once(name, dtype):
    """Output and gradients over 30 steps are those of float64 to a few roundings, where torch's errors add up."""
    module, _ = pair(name, dtype=dtype)
    wide = getattr(nn, name)(3, 5, dtype=torch.float64, device=DEVICE)
    wide.load_state_dict(module.state_dict())
    x = torch.randn(30, 4, 3, device=DEVICE).to(dtype).requires_grad_()
    y, exact_x = module(x)[0], x.detach().double().requires_grad_()
    exact = wide(exact_x)[0]
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=unit, atol=1e-5)
    v = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, *module.parameters()), v)
    want = torch.autograd.grad(exact, (exact_x, *wide.parameters()), v.double())
    for a, b in zip(grads, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=unit, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}], ids=["plain", "projection"])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_gives_torchs_dtypes(name, options):
    if options and name != "LSTM":
        pytest.skip("LSTM only")
    ours, theirs = pair(name, dtype=torch.float32, **options)
    x = torch.randn(4, 2, 3, device=DEVICE)
    # cuDNN's layers are of float16 there, whatever autocast's dtype is.
    with torch.autocast(DEVICE, torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        a, b = tensors_of(ours(x)), tensors_of(theirs(x))
    assert [t.dtype for t in a] == [t.dtype for t in b]
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(a[0].float().sin().sum(), list(ours.parameters()))
    want = torch.autograd.grad(b[0].float().sin().sum(), list(theirs.parameters()))
    for p, q in zip(grads, want, strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=3e-2, atol=3e-2 * q.abs().max().item())


UNITS = {"RNN": 1, "GRU": 5, "LSTM": 6}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_what_it_says(name, dtype):
    """Over time: the input, the weights, and in float32 so many values a unit and step; never more than torch."""
    ours, theirs = pair(name, dtype=dtype)
    x = torch.randn(20, 4, 3, device=DEVICE).to(dtype).requires_grad_()
    _, kept = kept_storages(lambda x: ours(x)[0], (x,))
    _, torchs = kept_storages(lambda x: theirs(x)[0], (x,))
    h0 = 2 if name == "LSTM" else 1  # zeros, expanded
    gates = {"RNN": 1, "GRU": 3, "LSTM": 4}[name] * 5
    numbers = x.numel() + gates * (3 + 5) + h0
    if DEVICE == "cuda":
        numbers += 2 * gates  # cuDNN's weights and biases are of one storage
    elif dtype in HALF:
        numbers += 2 * gates
    if dtype not in HALF:
        numbers += UNITS[name] * 20 * 4 * 5
    assert storage_bytes(kept) == numbers * x.element_size()
    assert storage_bytes(kept) <= storage_bytes(torchs)


@pytest.mark.parametrize("name", LAYERS)
def test_writes_to_nothing_it_was_given(name):
    module, _ = pair(name)
    x = random(4, 6, 3)
    hx, leaves = states(module, 6)
    y = module(x, hx)[0]
    v = torch.randn_like(y)
    given = [*(t.detach() for t in (x, *leaves, *module.parameters())), v]
    before = [t.clone() for t in given]
    inputs = (x, *leaves, *module.parameters())
    first = torch.autograd.grad(y, inputs, v, retain_graph=True)
    again = torch.autograd.grad(y, inputs, v)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "nor what it kept"


@pytest.mark.parametrize(("cell", "which"), [("GRUCell", 0), ("LSTMCell", 0), ("LSTMCell", 1)])
def test_a_state_may_be_written_to(cell, which):
    """As where an episode ends and its state starts at 0 again: nothing that backward needs is lost."""

    def gradient(cls):
        torch.manual_seed(0)
        layer, x = cls(3, 4).to(DEVICE), random(2, 3).float()
        states = layer(x)
        states = states if isinstance(states, tuple) else (states,)
        states[which][0] = 0
        return torch.autograd.grad(sum(s.square().sum() for s in states), x)[0]

    ours, theirs = (gradient(getattr(of, cell)) for of in (torchbp.nn, nn))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", LAYERS)
def test_each_parameter_has_a_gradient_of_its_own(name):
    """b_ih and b_hh have equal gradients in RNN and LSTM, but not one tensor: clipping scales in place."""
    module, _ = pair(name)
    grads = torch.autograd.grad(module(random(4, 6, 3))[0].sum(), list(module.parameters()))
    assert len({g.untyped_storage()._cdata for g in grads}) == len(grads)


@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_of_no_sequence(name):
    module, theirs = pair(name, bidirectional=True)
    x = random(3, 0, 3)
    output, want = tensors_of(module(x)), tensors_of(theirs(x))
    assert [t.shape for t in output] == [t.shape for t in want]
    for g in torch.autograd.grad(output[0].sum(), list(module.parameters())):
        assert torch.equal(g, torch.zeros_like(g))


@pytest.mark.parametrize("name", LAYERS)
def test_an_ensemble_by_vmap(name):
    """Stacked parameters, batched states: the gradients of each member alone."""
    members = [pair(name, bidirectional=True)[0] for _ in range(2)]
    with torch.no_grad():
        for p in members[1].parameters():
            p.mul_(-0.5)
    parameters, _ = stack_module_state(members)
    x = torch.randn(3, 2, 3, dtype=torch.float64, device=DEVICE)

    def loss(parameters, x):
        return functional_call(members[0], parameters, (x,))[0].sin().sum()

    together = vmap(grad(loss), in_dims=(0, None))(parameters, x)
    for i, member in enumerate(members):
        alone = grad(loss)(dict(member.named_parameters()), x)
        for key, value in alone.items():
            torch.testing.assert_close(together[key][i], value)


@pytest.mark.parametrize("name", LAYERS)
def test_compile(name):
    """One graph, forward and backward; dynamo asks for its switch for any recurrent layer, torch's too."""
    module, _ = pair(name, dtype=torch.float32, bidirectional=True)
    x = torch.randn(3, 2, 3, requires_grad=True, device=DEVICE)
    inputs = (x, *module.parameters())
    want = torch.autograd.grad(module(x)[0].sin().sum(), inputs)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        grads = torch.autograd.grad(compiled(x)[0].sin().sum(), inputs)
    torch._dynamo.reset()
    for a, b in zip(grads, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_saturated_unit_passes_nothing_on():
    """x = -∞ saturates; the gradient of the weight it meets tends to 0, and torch's 0 · ∞ is NaN."""
    cell = torchbp.nn.RNNCell(1, 2, device=DEVICE)
    h = cell(torch.tensor([[-torch.inf]], device=DEVICE))
    assert torch.equal(h.abs(), torch.ones(1, 2, device=DEVICE))
    h.sum().backward()
    for p in cell.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))


WRONG = {
    "dimensions": lambda m: m(torch.ones(2, device=DEVICE)),
    "features": lambda m: m(torch.ones(4, 2, 5, device=DEVICE)),
    "dtype": lambda m: m(torch.ones(4, 2, 3, device=DEVICE).double()),
    "half": lambda m: m(torch.ones(4, 2, 3, device=DEVICE).bfloat16()),
    "no-step": lambda m: m(torch.ones(0, 2, 3, device=DEVICE)),
    "text": lambda m: m("text"),
    "batch": lambda m: m(torch.ones(4, 2, 3, device=DEVICE), hx(m, 1, 3, 5)),
    "units": lambda m: m(torch.ones(4, 2, 3, device=DEVICE), hx(m, 1, 2, 4)),
    "layers": lambda m: m(torch.ones(4, 2, 3, device=DEVICE), hx(m, 2, 2, 5)),
    "unbatched-states": lambda m: m(torch.ones(4, 3, device=DEVICE), hx(m, 1, 1, 5)),
    "states-dtype": lambda m: m(
        torch.ones(4, 2, 3, device=DEVICE), hx(m, 1, 2, 5, dtype=torch.float64)
    ),
}


def hx(module, *shape, dtype=None):
    h = torch.zeros(shape, dtype=dtype, device=DEVICE)
    return (h, h) if isinstance(module, nn.LSTM) else h


@pytest.mark.parametrize("mistake", WRONG)
@pytest.mark.parametrize("name", LAYERS)
def test_wrong_arguments_of_layers(name, mistake):
    ours, theirs = pair(name, dtype=torch.float32)
    with pytest.raises(Exception) as wanted:  # noqa: PT011  # the type is what is compared
        WRONG[mistake](theirs)
    with pytest.raises(type(wanted.value)) as raised:
        WRONG[mistake](ours)
    assert type(raised.value) is type(wanted.value)


@pytest.mark.parametrize("name", LAYERS)
def test_packed_rows_of_another_width_are_refused(name):
    """torch's LSTM takes them, and computes something."""
    module, _ = pair(name, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="the last of them 3, got"):
        module(pack_sequence([torch.ones(2, 4, device=DEVICE)]))


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_wrong_arguments_of_cells(name):
    ours, theirs = (getattr(home, name)(3, 5, device=DEVICE) for home in (torchbp.nn, nn))
    h = torch.ones(2, 5, device=DEVICE)
    state = (h, h) if name == "LSTMCell" else h
    for args in (
        (torch.ones(1, 2, 3, device=DEVICE),),
        (torch.ones(2, 4, device=DEVICE),),
        (torch.ones(3, 3, device=DEVICE), state),
        (torch.ones(3, device=DEVICE), state),
        (torch.ones(2, 3, device=DEVICE).double(),),
        (torch.ones(2, 3, device=DEVICE).bfloat16(),),
        (torch.ones(2, 3, device=DEVICE), (h, h, h) if name == "LSTMCell" else (h, h)),
        ("text",),
    ):
        with pytest.raises(Exception) as wanted:  # noqa: PT011
            theirs(*args)
        with pytest.raises(type(wanted.value)):
            ours(*args)


def test_a_converted_layer_is_a_hand_written_one():
    model = nn.Sequential(nn.LSTM(3, 5), nn.GRUCell(2, 2)).to(DEVICE)
    torchbp.convert(model)
    assert type(model[0]) is torchbp.nn.LSTM
    x = torch.randn(4, 2, 3, requires_grad=True, device=DEVICE)
    assert "LSTMFunction" in _names(model[0](x)[0].grad_fn)


def _names(node) -> str:
    found = []
    while node is not None:
        found.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    return " ".join(found)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("name", [*LAYERS, "RNNCell", "GRUCell", "LSTMCell"])
def test_script_trace_of_any_length(name, tmp_path):
    """Traced and saved it runs without torchbp, on sequences of another length."""
    torch.manual_seed(0)
    module = getattr(torchbp.nn, name)(3, 4).to(DEVICE)
    x, other = (torch.randn(n, 2, 3, device=DEVICE) for n in (4, 7))
    if name.endswith("Cell"):
        x, other = x[0], other[:, 0]
    torch.jit.save(torch.jit.trace(module, (x,)), tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(other), module(other))


class Counted(nn.Module):
    times = 0

    def forward(self, w):
        self.times += 1
        return w.clone()


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_parametrized_weight_is_made_once(name):
    module = getattr(torchbp.nn, name)(3, 4, device=DEVICE)
    counted = Counted()
    register_parametrization(module, "weight_hh_l0", counted)
    counted.times = 0
    x = torch.randn(5, 2, 3, device=DEVICE)
    module(x)
    assert counted.times == 1
    module(pack_sequence([x[:, 0], x[:2, 1]]))
    assert counted.times == 2


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_spectral_norm(name):
    """Each reading of the weight is a power iteration: torch reads it four times, in ``cached`` once."""
    x = torch.randn(5, 2, 3, device=DEVICE)

    def three_times(library):
        torch.manual_seed(0)
        module = spectral_norm(getattr(library, name)(3, 4, device=DEVICE), "weight_hh_l0")
        for _ in range(3):
            with cached():
                y, _ = module(x)
        grads = torch.autograd.grad(y.square().sum(), [*module.parameters()])
        return y, *grads, *module.buffers()

    for ours, theirs in zip(three_times(torchbp.nn), three_times(nn), strict=True):
        torch.testing.assert_close(ours, theirs)
