"""The ways in which a function and its inputs are given, and where it is run from."""

import collections
import dataclasses
import functools
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

import torchbp


def sample(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def statuses(report):
    """Return the outcome of every check that is not right, and see that none failed by itself."""
    assert not [c.detail for c in report.capabilities.values() if "itself failed" in c.detail]
    return {n: c.status for n, c in report.capabilities.items() if c.status in ("wrong", "not run")}


# ---------------------------------------------------------------------------------------- structures
Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    scale: float
    more: dict


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    more: list


class Batch(collections.UserDict):
    """A mapping that torch's pytree takes for a leaf."""


class Named(collections.OrderedDict):
    """A dict of a class of its own."""


def wrong(x):
    return Tripled.apply(x)


class Tripled(Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad_y):
        return 2 * grad_y


GIVEN = {
    "namedtuple": (lambda f, p: Pair(f(p.a), p.b.sin()), lambda: Pair(sample(3), sample(2)), ".a"),
    "dataclass": (
        lambda f, p: Record(f(p.x) * p.scale, 2.0, {"b": p.more["w"].sin()}),
        lambda: Record(sample(3), 2.0, {"w": sample(2)}),
        ".x",
    ),
    "frozen dataclass": (
        lambda f, p: Frozen(f(p.x), [p.more[0].sin()]),
        lambda: Frozen(sample(3), [sample(2)]),
        ".x",
    ),
    "mapping": (
        lambda f, p: Batch(x=f(p["x"]), w=p["w"].sin()),
        lambda: Batch(x=sample(3), w=sample(2)),
        "['x']",
    ),
    "dict of another class": (
        lambda f, p: Named(x=f(p["x"]), w=p["w"].sin()),
        lambda: Named(x=sample(3), w=sample(2)),
        "['x']",
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_structures(name):
    function, make, place = GIVEN[name]
    given = make()
    report = torchbp.gradcheck(functools.partial(function, torch.sin), (given,))
    assert report
    assert statuses(report) == {}
    assert report.capabilities["compile"].status == "ok"
    report = torchbp.gradcheck(
        functools.partial(function, wrong), (make(),), raise_exception=False, checks="values"
    )
    assert [f.input for f in report.wrong] == [f"input 0{place}"]


class Holder:
    def __init__(self, x):
        self.x = x


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        (lambda h: h.x.sin(), (Holder(sample(3)),), "input that requires grad, .*in Holder"),
        (sum, ({sample(3)},), "input that requires grad, .*in set"),
        (lambda x: Holder(x.sin()), sample(3), "output of .*, .*in Holder"),
        (lambda x: (y for y in [x.sin()]), sample(3), "output of .*, .*in generator"),
    ],
)
def test_what_is_not_looked_into_is_named(function, inputs, message):
    with pytest.raises(ValueError, match=message):
        torchbp.gradcheck(function, inputs)


# ------------------------------------------------------------------------------- tensors not strided
def adjacency(dtype=torch.float64):
    return torch.eye(3, dtype=dtype).to_sparse()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sparse_constant_is_handed_on(dtype):
    given = adjacency(dtype), sample(3, 4, dtype=dtype)
    report = torchbp.gradcheck(torch.sparse.mm, given, skip=["autocast"])  # which torch's fails
    assert statuses(report) == {}
    assert report.capabilities["values"].status == "ok"
    report = torchbp.gradcheck(
        lambda a, x: torch.sparse.mm(a, wrong(x)), given, checks="values", raise_exception=False
    )
    assert report.wrong[0].ratio == pytest.approx(2 / 3)


def test_a_sparse_gradient_is_checked():
    i = torch.tensor([1, 2, 2])
    report = torchbp.gradcheck(nn.Embedding(5, 3, sparse=True), (i,), skip=["compile"])
    assert statuses(report) == {}
    assert report.capabilities["values"].status == "ok"


@pytest.mark.parametrize(
    ("function", "make", "message"),
    [
        (lambda x: x.to_sparse(), lambda: sample(3, 3), "strided outputs, got torch.sparse_coo"),
        (
            lambda x: x.to_padded_tensor(0.0),
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True),
            "got nested tensor in input 0",
        ),
    ],
)
def test_what_is_not_strided_is_refused_before_anything_is_done(function, make, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = make()
    with pytest.raises(TypeError, match=message):
        torchbp.gradcheck(function, given)


def test_nested_tensors_within():
    def padded(x, y):
        return torch.nested.as_nested_tensor([x, y]).sin().to_padded_tensor(0.0)

    assert statuses(torchbp.gradcheck(padded, (sample(3, 2), sample(4, 2)))) == {}


# ------------------------------------------------------------------------------------------- modules
def norm_in_eval():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    module[1].eval()
    return module


def frozen_part():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    module[0].requires_grad_(requires_grad=False)
    return module


@pytest.mark.parametrize("make", [norm_in_eval, frozen_part])
def test_what_a_module_holds_and_no_gradient_is_asked_of(make):
    """Buffers and frozen parameters of the second sample are others; vmap is compared with a loop over the first's."""
    assert torchbp.gradcheck(make(), (sample(4, 3),)).capabilities["vmap"].status == "ok"


def test_a_module_that_keeps_its_last_weight():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.nn.utils.weight_norm(nn.Linear(3, 3))
    kept = module.weight
    # Torch's gradient of the gradient is wrong there: that of the norms is not part of it.
    assert torchbp.gradcheck(module, (sample(4, 3),), skip=["second_order", "compile"])
    assert module.weight is kept


def test_an_optimized_module_is_one():
    module = torch.compile(nn.Linear(3, 3), backend="aot_eager")
    assert (
        statuses(torchbp.gradcheck(module, (sample(4, 3),), checks=["values", "arguments"])) == {}
    )


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo):
        raise ValueError("a socket")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.LazyLinear(4), ValueError, "lazy Module; call it once"),
        (lambda: nn.DataParallel(nn.Linear(3, 3)), TypeError, "DataParallel; pass its .module"),
        (
            lambda: Uncopied(3, 3),
            TypeError,
            "deepcopy takes, got Uncopied .*a socket.*; pass a fun",
        ),
    ],
)
def test_modules_that_cannot_be_checked(make, error, message):
    with pytest.raises(error, match=message):
        torchbp.gradcheck(make(), (sample(4, 3),))


def test_a_parameter_that_is_no_input_is_noted():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.ones(3, dtype=torch.float64, requires_grad=True)  # no Parameter
            self.bias = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.w + self.bias.to(x.dtype)

        def loss(self, x):
            return self(x).sum()

    module = Scale()
    for function, count in ((module, 1), (module.loss, 2), (torch.sin, 0)):
        report = torchbp.gradcheck(function, (sample(2, 3),), checks=["values", "outputs"])
        notes = [f.message for f in report.findings]
        assert len(notes) == (count > 0)
        assert not count or f"depends on {count} more that require grad, of shapes (3,)" in notes[0]
        assert module.w.grad is None


# ---------------------------------------------------------------------------------- refusals of torch's
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_no_fault(reentrant):
    def function(x):
        return checkpoint(torch.sin, x, use_reentrant=reentrant)

    report = torchbp.gradcheck(function, sample(3))
    assert report.capabilities["second_order"].status == ("refuses" if reentrant else "ok")


class Checkpointed(nn.Module):
    """Calls its parts again in backward: with the parameters of its forward, whichever these were."""

    def __init__(self, reentrant):
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.parts, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_a_module_is_no_fault(reentrant):
    torch.manual_seed(0)
    # A reentrant checkpoint of what asks for no gradient drops that of its parameters.
    skip = ("compile", "requires_grad", "modified") if reentrant else ("compile",)
    report = torchbp.gradcheck(Checkpointed(reentrant), sample(5, 3), skip=skip)
    assert report.capabilities["values"].status == "ok"
    assert report.capabilities["low_precision"].status == "ok"


def test_a_backward_in_numpy_refuses_a_second():
    class Numpy(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.from_numpy(x.detach().numpy() ** 3)

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            return torch.from_numpy(3 * x.numpy() ** 2 * grad_y.numpy())

    report = torchbp.gradcheck(Numpy.apply, sample(3))
    assert report.capabilities["second_order"].status == "refuses"


# --------------------------------------------------------------------------------------- run from where
def inference():
    return torch.inference_mode()


def anomaly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.autograd.detect_anomaly(check_nan=True)


def autocast():
    return torch.autocast("cpu")


@pytest.mark.parametrize("context", [torch.no_grad, inference, anomaly, autocast])
def test_whatever_the_caller_runs_under(context):
    def function(x, w):
        return x.abs().sqrt() @ w + x

    inputs = sample(3, 3, dtype=torch.float32), sample(3, 3, dtype=torch.float32)
    with context():
        within = torch.ones(3, 3)
        before = torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()
        assert statuses(torchbp.gradcheck(function, inputs)) == {}
        assert (torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()) == before
    report = torchbp.gradcheck(lambda x, m: x.sin() * m, (inputs[0], within))
    assert report.capabilities["compile"].status == "ok"


def test_state_that_moves_on_with_each_call_is_no_fault_of_layouts():
    mean = torch.zeros(3, dtype=torch.float64)

    def centred(x):
        nonlocal mean
        mean = 0.9 * mean + 0.1 * x.detach().mean(0)
        return x - mean

    assert torchbp.gradcheck(centred, (sample(4, 3),), skip=["compile"])


# ----------------------------------------------------------------------------------- the line to paste
class Named3:
    def __call__(self, x):
        return wrong(x)

    def method(self, x):
        return wrong(x)


@torch.library.custom_op("torchbp_tests::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    return 3 * x


tripled.register_autograd(lambda ctx, grad_y: 2 * grad_y)


class Layer(nn.Module):
    def forward(self, x):
        return wrong(x)


@pytest.mark.parametrize(
    ("function", "name", "called"),
    [
        (wrong, "wrong", "wrong"),
        (Tripled.apply, "Tripled.apply", "Tripled.apply"),
        (lambda x: wrong(x) * 1, "<lambda>", "func"),
        (functools.partial(wrong), "partial(wrong)", "func"),
        (Named3(), "Named3", "func"),
        (Named3().method, "Named3.method", "func"),
        (Layer(), "Layer", "module"),
        (tripled, "torch.ops.torchbp_tests.tripled", "torch.ops.torchbp_tests.tripled"),
        (torch.ops.torchbp_tests.tripled, "torch.ops.torchbp_tests.tripled", None),
    ],
)
def test_the_line_to_paste_names_the_function(function, name, called):
    report = torchbp.gradcheck(function, sample(3), checks="values", raise_exception=False)
    assert report.name == name
    line = report.wrong[0].repeat
    assert line.startswith(f"torchbp.gradcheck({called or name}, inputs, ")
    given = {"func": function, "module": function, "inputs": sample(3)}
    with pytest.raises(torchbp.verify.GradientError):
        eval(line, globals() | given)


def test_the_name_of_a_function_of_an_extension_is_its_own():
    def cube(x):
        return wrong(x)

    cube.__qualname__ = "pybind11_detail_function_record_v1_system_libstdcpp.cube"
    report = torchbp.gradcheck(cube, sample(3), checks="values", raise_exception=False)
    assert report.name == "cube"
    assert "torchbp.gradcheck(cube, " in str(report)


def test_the_line_to_paste_asks_for_what_was_asked():
    class Plain(Function):
        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        def backward(ctx, grad_y):
            return 3 * torch.from_numpy(grad_y.numpy())

    x = sample(3)
    asked = {"check_batched_grad": True, "checks": ["values", "batched_grad"]}
    report = torchbp.gradcheck(Plain.apply, x, **asked, raise_exception=False)
    assert [f.check for f in report.wrong] == ["batched_grad"]
    with pytest.raises(torchbp.verify.GradientError):
        eval(report.wrong[0].repeat, {"torchbp": torchbp, "Plain": Plain, "inputs": x})


def test_a_deadline_too_short_asks_for_more_time():
    with pytest.raises(ValueError, match="past the deadline of 0 s; give it more time"):
        torchbp.gradcheck(torch.tanh, sample(3), deadline=0.0)


# ------------------------------------------------------------------------------ what is so by definition
class Words(nn.Module):
    """Sentences, padded, read by a recurrent layer; the loss where a target is given."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3, padding_idx=0)
        self.layer = nn.GRU(3, 4, batch_first=True)
        self.out = nn.Linear(4, 6)
        self.out.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, words, target=None):
        y = self.out(self.layer(self.embedding(words))[1][0])
        return y if target is None else nn.functional.cross_entropy(y, target)


def bag():
    return nn.EmbeddingBag(5, 3, padding_idx=1, mode="sum")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Embedding(5, 3, padding_idx=0), [[1, 0, 2], [3, 0, 0]]),
        (bag, [[1, 0, 2], [3, 0, 0]]),
        (Words, [[1, 2, 0], [3, 0, 0]]),
        (Words, [[1, 2, 3], [5, 4, 1]]),
    ],
)
def test_the_padding_of_an_embedding_gets_no_gradient(make, words):
    """By definition; its row is held as it is, so no difference says that one was due."""
    report = torchbp.gradcheck(make(), (torch.tensor(words),), skip=["compile"])
    assert statuses(report) == {}


def test_a_wrong_gradient_beside_the_padding_is_found():
    class Wrong(nn.Embedding):
        def forward(self, i):
            return super().forward(i) * wrong(self.weight)[1]

    layer, i = Wrong(5, 3, padding_idx=0), torch.tensor([1, 0, 2])
    report = torchbp.gradcheck(layer, (i,), checks="values", raise_exception=False)
    assert {f.index[0] for f in report.wrong} == {1}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x, causal=False):
        scores = x @ x.mT
        if causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(mask, float("-inf"))
        return self.drop(scores.softmax(-1)) @ x


def test_no_part_of_a_module_is_told_to_write_in_place():
    report = torchbp.gradcheck(
        Attention(), (sample(3, 4),), kwargs={"causal": True}, skip=["compile"]
    )
    assert statuses(report) == {}


def test_ctc_loss_is_asked_for_no_target_below_zero():
    """Torch's writes where a target of -100 points, in memory of others."""

    def loss(x, target):
        return nn.functional.ctc_loss(x.log_softmax(-1), target, [4, 3], [2, 1])

    given = sample(4, 2, 3), torch.tensor([[1, 2], [2, 1]])
    report = torchbp.gradcheck(loss, given, checks=["values", "ignored_index"])
    assert report.capabilities["ignored_index"].status == "not applicable"


def test_an_estimator_is_held_against_no_slope():
    """Not of all elements together either; and the line to paste leaves that out too."""

    def quantized(x, codes):
        chosen = codes[torch.cdist(x, codes).argmin(-1)]
        return x + (chosen - x).detach(), (chosen - x.detach()).square().mean()

    given = sample(5, 3), sample(4, 3)
    assert torchbp.gradcheck(quantized, given, skip=["differences", "compile"])

    class Unlinear(Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y.clamp(-1, 1)

    report = torchbp.gradcheck(
        Unlinear.apply, sample(3), skip=["differences", "compile"], raise_exception=False
    )
    assert "skip=['differences']" in report.wrong[0].repeat


def test_a_module_of_integers_alone_has_no_degenerate_rows():
    report = torchbp.gradcheck(
        Words(), (torch.tensor([[1, 2]]), torch.tensor([1])), skip=["compile"]
    )
    assert statuses(report) == {}


# --------------------------------------------------------------------- defaults of a Function's forward
class CumsumAlongLast(Function):
    @staticmethod
    def forward(ctx, x, dim=-1):
        ctx.dim = dim
        return x.cumsum(dim)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y.flip(-1).cumsum(-1).flip(-1), None


class Cumsum(CumsumAlongLast):
    @staticmethod
    def backward(ctx, grad_y):
        return grad_y.flip(ctx.dim).cumsum(ctx.dim).flip(ctx.dim), None


class CumsumAlone(Cumsum):
    """Leaves no place for the gradient of dim, and cannot be called with one."""

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y.flip(-1).cumsum(-1).flip(-1)


class Shifted(Function):
    """In two parts; the second default is behind the first."""

    @staticmethod
    def forward(x, scale=2.0, shift=None):
        return x * scale if shift is None else x * scale + shift.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.scale, shift = (*inputs, 2.0, None)[:3] if len(inputs) < 3 else inputs
        ctx.save_for_backward(shift)

    @staticmethod
    def backward(ctx, grad_y):
        (shift,) = ctx.saved_tensors
        grad_shift = None if shift is None else (2 * grad_y * shift).sum(0)
        return grad_y * ctx.scale, None, grad_shift


class ShiftedTwice(Shifted):
    @staticmethod
    def backward(ctx, grad_y):
        grad_x, _, grad_shift = Shifted.backward(ctx, grad_y)
        return grad_x, None, None if grad_shift is None else 2 * grad_shift


@pytest.mark.parametrize(
    ("function", "check", "when"),
    [
        (Cumsum, "arguments", ""),
        (CumsumAlone, "arguments", ""),
        (CumsumAlongLast, "arguments", "dim is 0 instead of -1"),
        (Shifted, "optional", ""),
        (ShiftedTwice, "optional", "shift is a tensor of shape (3,)"),
    ],
)
def test_defaults_of_a_function_are_other_numbers_too(function, check, when):
    options = {"checks": ["values", check], "raise_exception": False}
    report = torchbp.gradcheck(function.apply, sample(4, 3), **options)
    assert report.capabilities["values"].status == "ok"
    assert [f.check for f in report.wrong] == [check] * bool(when)
    assert when in str(report)


def test_what_was_measured_of_many_is_said():
    class Permuted(Function):
        @staticmethod
        def forward(ctx, x):
            return x.permute(1, 2, 0).contiguous()

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y.permute(1, 2, 0).reshape(grad_y.permute(2, 0, 1).shape)

    report = torchbp.gradcheck(
        Permuted.apply, sample(3, 4, 6), checks="values", raise_exception=False
    )
    assert "/2 elements measured of 72" in report.wrong[0].message
    assert report.wrong[0].cause in (None, "only some elements")


# ------------------------------------------------------------------------------------ wrong arguments
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"func": sample(3).sin()},
            TypeError,
            "a callable for func, got Tensor; pass the function",
        ),
        ({"func": Tripled}, TypeError, "got 'Tripled'; pass Tripled.apply"),
        ({"kwargs": 3}, TypeError, "a mapping of keyword arguments for kwargs, got 3"),
        ({"reference": 3.0}, TypeError, "a callable for reference, got 3.0"),
        ({"seed": None}, TypeError, "a whole number for seed, got None"),
        ({"seed": 10**30}, ValueError, r"a seed below 2\*\*62"),
        ({"eps": 0.0}, ValueError, "eps to be a number above 0, got 0.0"),
        ({"atol": -1.0}, ValueError, "atol to be a number of 0 or more, got -1.0"),
        ({"skip": "value"}, ValueError, "checks among .*, got 'value'"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_done(arguments, error, message):
    called = []
    given = {"func": called.append, "inputs": sample(3), **arguments}
    with pytest.raises(error, match=f"gradcheck: expected .*{message}"):
        torchbp.gradcheck(**given)
    assert not called


def test_one_check_may_be_skipped_by_its_name():
    report = torchbp.gradcheck(torch.sin, sample(3), level="quick", skip="linearity")
    assert "linearity" not in report.capabilities


# ---------------------------------------------------------------------------------------- left behind
def contents(*tensors):
    """Return all that a user may see of tensors that they gave."""
    return [
        (
            t.detach().clone().tolist(),
            None if t.grad is None else t.grad.tolist(),
            t.requires_grad,
            t.stride(),
        )
        for t in tensors
    ]


def test_a_module_that_a_function_calls_is_left_as_it_was():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3).double()

        def loss(self, x):
            self.eval()
            self.train()
            return self.norm(x).square().sum()

    norm, wrapped = nn.BatchNorm1d(3).double(), Wrapped()
    wrapped.norm.eval()

    def normed(x):
        return norm(x)

    functions = [
        lambda x: norm(x) * 2,
        lambda x: normed(x) * 2,
        wrapped.loss,
        functools.partial(lambda layer, x: layer(x), norm),
        functools.partial(wrapped.loss),
    ]
    buffers = [*norm.buffers(), *wrapped.buffers()]
    before = contents(*buffers), norm.training, wrapped.training, wrapped.norm.training
    for function in functions:
        assert torchbp.gradcheck(function, (sample(4, 3),), level="quick")
        now = contents(*buffers), norm.training, wrapped.training, wrapped.norm.training
        assert now == before
        assert all(a is b for a, b in zip(norm.buffers(), buffers[:3], strict=True))

    def interrupted(x):
        norm(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        torchbp.gradcheck(interrupted, (sample(4, 3),))
    assert contents(*buffers) == before[0]


def test_inputs_that_a_function_writes_to_are_left_as_they_were():
    def writes(x, w, c):
        x.data.mul_(2.0)
        c.add_(1.0)
        return x * w * c

    x, w, c = sample(3, 4), sample(4), torch.ones(3, 4, dtype=torch.float64)
    wide = w.detach().expand(3, 4).requires_grad_()
    x.grad = torch.ones_like(x)
    before = contents(x, wide, c)
    assert not torchbp.gradcheck(writes, (x, wide, c), raise_exception=False)
    assert contents(x, wide, c) == before


@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        np.random.rand,  # what users draw from
        lambda: float(torch.rand(())),
    ],
    ids=["python", "numpy", "torch"],
)
def test_numbers_drawn_at_random_are_the_same_in_each_call(draw):
    def noisy(x):
        return x.sin() * (1 + draw())

    def states():
        own, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
        return own, numpys[1].tolist(), numpys[2], torch.get_rng_state().tolist()

    x = sample(3, 4)
    before = states()
    report = torchbp.gradcheck(noisy, x, skip=["compile"])
    assert statuses(report) == {}
    assert report.capabilities["values"].status == "ok"
    assert report.capabilities["edges"].detail == "forward draws random numbers"
    assert states() == before


def draw(x, generator):
    """Return random numbers, one for each of ``x``, from a generator of either kind."""
    if isinstance(generator, torch.Generator):
        return torch.rand(x.shape, generator=generator, dtype=x.dtype)
    if isinstance(generator, random.Random):
        return x.new_tensor([generator.random() for _ in range(x.numel())]).view(x.shape)
    return torch.from_numpy(generator.uniform(size=tuple(x.shape))).to(x)


class Dropped(Function):
    slope = 1.0

    @classmethod
    def of(cls, x, generator):
        return cls.apply(x, generator)

    @staticmethod
    def forward(ctx, x, generator):
        kept = draw(x, generator) > 0.4
        ctx.save_for_backward(kept)
        return x * kept

    @classmethod
    def backward(cls, ctx, grad_y):
        (kept,) = ctx.saved_tensors
        return cls.slope * grad_y * kept, None


class DroppedWrong(Dropped):
    slope = 1.01


def state(generator):
    names = ("get_state", "getstate")
    found = next((getattr(generator, n)() for n in names if hasattr(generator, n)), None)
    return str(generator.bit_generator.state if found is None else list(found))


@pytest.mark.parametrize(
    "generator",
    [
        torch.Generator().manual_seed(3),
        random.Random(3),
        np.random.default_rng(3),
        np.random.RandomState(3),  # what users have
    ],
    ids=lambda g: type(g).__name__,
)
def test_generators_of_the_functions_own_draw_the_same_in_each_call(generator):
    class Layer(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function, self.generator = function, generator

        def forward(self, x):
            return self.function.apply(x, self.generator)

    class Called:
        def __init__(self, function):
            self.function, self.generator = function, generator

        def __call__(self, x):
            return self.function.apply(x, self.generator)

    class Within:
        def __init__(self, function):
            self.function = function

        def __call__(self, x):
            return self.function.apply(x, generator)

    def closed(function):
        return lambda x: function.apply(x, generator)

    def second(function):
        inner = closed(function)
        return lambda x: 1 * inner(x)

    x, before = sample(3, 4), state(generator)
    for made in (
        closed,
        second,
        Layer,
        Called,
        Within,
        lambda f: functools.partial(f.of, generator=generator),
    ):
        report = torchbp.gradcheck(made(Dropped), (x,), level="quick")
        assert report.capabilities["values"].status == "ok"
        assert not torchbp.gradcheck(made(DroppedWrong), (x,), level="quick", raise_exception=False)
    given = {"generator": generator}
    assert torchbp.gradcheck(Dropped.of, (x,), kwargs=given, level="quick")
    assert not torchbp.gradcheck(DroppedWrong.apply, (x, generator), raise_exception=False)
    assert state(generator) == before


def test_a_forward_that_never_gives_the_same_is_noted():
    calls = iter(range(1000))

    def counted(x):
        return x.sin() * (1 + next(calls))

    report = torchbp.gradcheck(counted, sample(3))
    assert [f.severity for f in report.findings] == ["note"]
    assert "its gradient was not tested" in report.findings[0].message


def test_a_backward_that_seeds_numpy_is_found():
    class Seeds(Function):
        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        def backward(ctx, grad_y):
            np.random.seed(0)  # noqa: NPY002
            return 3 * grad_y

    report = torchbp.gradcheck(
        Seeds.apply, sample(3), checks=["values", "random_state"], raise_exception=False
    )
    assert [f.check for f in report.wrong] == ["random_state"]


class Leaky(Function):
    """Its backward writes to its grad_output."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x > 0, x, 0.1 * x)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        grad_y[x < 0] *= 0.1
        return grad_y


class Kept(Function):
    """Keeps its input where the next call's is kept, too."""

    @staticmethod
    def forward(ctx, x):
        Kept.x = x.detach()
        return x.sin()

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * Kept.x.cos()


@pytest.mark.parametrize(("function", "first"), [(Leaky, "writes"), (Kept, "two_calls")])
def test_each_finding_is_one_of_its_check_alone(function, first):
    """Whatever ran before: what a backward writes to, or keeps, is not found again as something else."""
    x = torch.linspace(-1.3, 1.6, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    report = torchbp.gradcheck(function.apply, x, skip="compile", raise_exception=False)
    assert report.wrong[0].check == first
    assert len({f.check for f in report.wrong}) < 6
    for found in report.wrong:
        with pytest.raises(torchbp.verify.GradientError):
            eval(found.repeat, globals() | {"inputs": x})


def test_buffers_of_any_kind_are_left():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("adjacency", torch.eye(3, dtype=torch.float64).to_sparse())
            self.register_buffer("nothing", None)
            self.register_buffer("places", torch.empty(3, device="meta"))
            self.lazy = nn.LazyBatchNorm1d()

    held = Held()
    assert torchbp.gradcheck(
        lambda x: torch.sparse.mm(held.adjacency, x), sample(3, 4), checks="values"
    )


def test_a_decorated_function_calls_what_its_layers_name():
    norm = nn.BatchNorm1d(3).double()

    @functools.wraps(torch.sin)
    def built_in(x):
        return torch.sin(x)

    def layer(x):
        return norm(x)

    @functools.wraps(layer)
    def decorated(x):
        return layer(x) if x.dim() else later

    for function in (built_in, decorated):
        assert torchbp.gradcheck(function, (sample(4, 3),), level="quick")
    later = None
    assert not norm.running_mean.any()
