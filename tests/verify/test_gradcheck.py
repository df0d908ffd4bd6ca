"""The call, the report, the exception."""

import json
import pickle
import time

import pytest
import torch
from torch.autograd import Function
from torch.autograd.gradcheck import GradcheckError

import torchbp
from torchbp.verify import GradientError


class Scaled(Function):
    """y = 3 x, with a gradient that is off by a factor of 2."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad_y):
        return 6 * grad_y


def sample(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def test_right_function_gives_a_truthy_report():
    report = torchbp.gradcheck(torch.tanh, (sample(3, 4),))
    assert report
    assert not report.wrong
    assert report.capabilities["values"].status == "ok"
    assert "no fault found" in str(report)


def test_wrong_function_raises_an_exception_that_carries_the_report():
    with pytest.raises(GradcheckError) as caught:
        torchbp.gradcheck(Scaled.apply, (sample(3, 4),))
    assert isinstance(caught.value, GradientError)
    assert not caught.value.report
    assert not pickle.loads(pickle.dumps(caught.value)).report
    for part in ("[values] grad of input 0 wrong in 12/12 elements", "got", "expected", "factor 2"):
        assert part in str(caught.value)


def test_finding_says_where_and_how_far():
    report = torchbp.gradcheck(Scaled.apply, sample(5), raise_exception=False)
    assert not report
    first = report.findings[0]
    assert (first.check, first.severity, first.input) == ("values", "wrong", "input 0")
    assert len(first.index) == 1
    assert first.ratio == pytest.approx(2.0)
    assert abs(first.got) == pytest.approx(2 * abs(first.expected))
    assert first.cause == "factor 2 too large"
    assert "checks='values'" in first.repeat
    assert "seed=0" in first.repeat


def row_0(g):
    return torch.cat([g[-1:], torch.zeros_like(g[1:])])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda g: -g, "wrong sign"),
        (lambda g: 3 * g, "factor 3 too large, a size of the data: mean and sum confused"),
        (lambda g: g.flip(0), "reversed along dimension 0"),
        (lambda g: g.roll(1, 1), "shifted by one along dimension 1"),
        (row_0, "written in slice 0 of dimension 0 only"),
        (lambda g: g.float().double(), "computed in a lower precision than the input's"),
        (
            lambda g: g * (torch.arange(5) < 4),
            "no gradient there: detached, masked, or not written",
        ),
    ],
)
def test_likely_cause(change, cause):
    class Changed(Function):
        @staticmethod
        def forward(ctx, x):
            return 2.1 * x

        @staticmethod
        def backward(ctx, g):
            return change(2.1 * g)

    report = torchbp.gradcheck(Changed.apply, sample(3, 5), checks="values", raise_exception=False)
    assert report.findings[0].cause.startswith(cause)


def test_json_and_markdown_say_the_same():
    report = torchbp.gradcheck(Scaled.apply, sample(5), raise_exception=False)
    record = json.loads(report.to_json())
    assert record["ok"] is False
    assert record["findings"][0]["cause"] == "factor 2 too large"
    assert record["capabilities"]["values"]["status"] == "wrong"
    assert "| values | wrong |" in report.to_markdown()


def test_what_keeps_many_checks_from_running_is_said():
    count = [0.0]

    def counted(x):
        count[0] += 1.0
        return x + count[0]

    text = " ".join(str(torchbp.gradcheck(counted, sample(3), skip=COMPILE)).split())
    assert " - values, input_layouts, " in text
    assert ": forward gives other values each time it is called - reference, " in text
    text = str(torchbp.gradcheck(torch.sin, sample(3), level="quick"))
    assert "reference, " in text
    assert "no reference= given" not in text


def test_markdown_holds_torchs_matrices_in_one_line():
    report = torchbp.gradcheck(Scaled.apply, sample(3, 4), checks="torch", raise_exception=False)
    assert "\n" in report.wrong[0].message
    lines = report.to_markdown().splitlines()
    assert sum(line.startswith("|") for line in lines) == 3
    assert len([line for line in lines if line]) == 6


def test_report_wraps_to_the_terminal_and_nowhere_else(monkeypatch):
    report = torchbp.gradcheck(Scaled.apply, sample(5), level="quick", raise_exception=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = str(report).splitlines()
    assert max(map(len, lines)) > 100
    monkeypatch.setenv("COLUMNS", "80")
    wrapped = str(report).splitlines()
    assert " ".join(str(report).split()) == " ".join(" ".join(lines).split())
    assert all(len(line) <= 80 for line in wrapped if "repeat:" not in line)
    assert [line for line in wrapped if "repeat:" in line] == [x for x in lines if "repeat:" in x]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_low_precision_inputs_are_checked_in_float64(dtype):
    assert torchbp.gradcheck(torch.tanh, sample(4, dtype=dtype), checks="values")


def test_module_parameters_are_checked_and_left_alone():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh())
    before = {k: v.clone() for k, v in module.state_dict().items()}
    report = torchbp.gradcheck(module, torch.randn(5, 3))
    assert report
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_wrong_parameter_gradient_is_named():
    class Wrong(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x + Scaled.apply(self.weight)

    report = torchbp.gradcheck(Wrong(), sample(3, 4), raise_exception=False)
    assert {f.input for f in report.wrong} == {"parameter weight"}


class WithStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        mean, count = x.mean(), torch.ones_like(x)
        ctx.mark_non_differentiable(mean, count)
        ctx.save_for_backward(x)
        return x.exp(), mean, count

    @staticmethod
    def backward(ctx, grad_y, _mean, _count):
        return grad_y * ctx.saved_tensors[0].exp()


def test_an_output_without_gradient_that_depends_on_the_input_is_noted():
    report = torchbp.gradcheck(WithStatistics.apply, (sample(3),), checks=("outputs",))
    assert report
    (note,) = report.findings
    assert (note.check, note.severity) == ("outputs", "note")
    assert "output 1 changes with the inputs, and has no gradient" in str(report)


class Normed(Function):
    """A row divided by its norm; the bound of that has no gradient."""

    @staticmethod
    def forward(ctx, x, least):
        y = x / x.norm(dim=-1, keepdim=True).clamp_min(least)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        n = x.norm(dim=-1, keepdim=True)
        return (grad_y - x * (x * grad_y).sum(-1, keepdim=True) / n**2) / n, None


@pytest.mark.parametrize("stacks", [False, True], ids=["one", "any number"])
def test_what_hands_on_its_arguments_takes_as_many_as_what_is_behind_it(stacks):
    """A tensor more would be the bound, whose gradient nobody promised."""

    def normed(x, least=1e-12):
        return Normed.apply(x, least)

    def behind(*tensors):
        return sum(normed(x) for x in tensors) if stacks else normed(*tensors)

    x = torch.tensor([[0.3, -0.8, 1.2], [2.0, 0.5, -0.7]], dtype=torch.float64, requires_grad=True)
    report = torchbp.gradcheck(behind, (x,), checks=["values", "counts"])
    assert report.capabilities["counts"].status == ("ok" if stacks else "not applicable")


def test_nested_inputs_and_outputs():
    def function(pair, *, scale, flag):
        return {"a": pair["x"] * scale if flag else None, "b": [pair["y"].sin()]}

    inputs = ({"x": sample(2), "y": sample(3)},)
    assert torchbp.gradcheck(function, inputs, kwargs={"scale": sample(2), "flag": True})


def test_random_function_draws_the_same_numbers_and_leaves_the_state():
    x = sample(20)
    state = torch.get_rng_state()
    assert torchbp.gradcheck(lambda x: torch.nn.functional.dropout(x, 0.5), x)
    assert torch.equal(torch.get_rng_state(), state)


COMPILE = ("compile",)


def test_deadline_holds_within_a_check(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(x):
        now[0] += 1.0
        return x.sin()

    report = torchbp.gradcheck(slow, sample(3), deadline=6.5)  # values alone takes four calls
    late = [c for c in report.capabilities.values() if "deadline" in c.detail]
    assert report
    assert report.capabilities["values"].status == "ok"
    assert len(late) > 15
    assert all(c.status == "not run" for c in late)
    assert now[0] == 7.0


def test_forward_mode_alone():
    class NoBackward(Function):
        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_forward(*inputs)

        @staticmethod
        def jvp(ctx, tangent):
            return tangent * ctx.saved_tensors[0].cos()

    class Wrong(NoBackward):
        @staticmethod
        def jvp(ctx, tangent):
            return tangent * ctx.saved_tensors[0].sin()

    options = {"check_backward_ad": False, "check_forward_ad": True, "raise_exception": False}
    assert torchbp.gradcheck(NoBackward.apply, sample(3), **options)
    assert not torchbp.gradcheck(Wrong.apply, sample(3), **options)


class Unbatched(Scaled):
    """In the old style, and its backward leaves torch: neither forward mode nor vmap work."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad_y):
        return 3 * torch.from_numpy(grad_y.numpy())


class UnbatchedTangent(Unbatched):
    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent


@pytest.mark.parametrize(
    ("option", "function", "check"),
    [
        ("check_batched_grad", Unbatched, "batched_grad"),
        ("check_forward_ad", Unbatched, "forward_mode"),
        ("check_batched_forward_grad", UnbatchedTangent, "forward_mode"),
    ],
)
def test_a_refusal_is_wrong_where_an_argument_of_torch_asks(option, function, check):
    options = {"checks": ("values", check), "raise_exception": False}
    assert torchbp.gradcheck(function.apply, sample(3), **options)
    report = torchbp.gradcheck(function.apply, sample(3), **options, **{option: True})
    assert [f.check for f in report.wrong] == [check]
    assert option in str(report)


def test_one_wrong_element_of_many_is_found():
    class Last(Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, grad_y):
            (x,) = ctx.saved_tensors
            grad_x = grad_y * x.cos()
            grad_x[3, 57] *= 1.01
            return grad_x

    report = torchbp.gradcheck(Last.apply, sample(60, 70), checks="values", raise_exception=False)
    assert report.wrong[0].index == (3, 57)
    assert report.wrong[0].ratio == pytest.approx(1.01)


def test_a_right_gradient_beside_a_wrong_one_is_not_named():
    """Where both sides are rounded alike there seems to be no bend, and the difference is off in the ninth digit."""

    class Score(Function):
        @staticmethod
        def forward(ctx, x, y, z):
            ctx.save_for_backward(x, y, z)
            return (x * y * z).sum(-1)

        @staticmethod
        def backward(ctx, g):
            x, y, z = ctx.saved_tensors
            g = g[:, None]
            return -g * y * z, g * x * z, g * x * y

    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        inputs = [
            torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
            for _ in range(3)
        ]
        report = torchbp.gradcheck(Score.apply, inputs, checks="values", raise_exception=False)
        assert {f.input for f in report.wrong} == {"input 0"}


def test_kink_in_the_sample_is_no_fault():
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torchbp.gradcheck(torch.relu, x, checks="values")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: torchbp.gradcheck(torch.tanh, torch.randn(3)), "requires grad"),
        (lambda: torchbp.gradcheck(torch.tanh, 3.0), "requires grad"),
        (lambda: torchbp.gradcheck(lambda x: x.argmax(), sample(3)), "output"),
        (lambda: torchbp.gradcheck(torch.tanh, sample(3), checks="nope"), "nope"),
        (lambda: torchbp.gradcheck(torch.tanh, sample(3), level="some"), "level"),
        (
            lambda: torchbp.gradcheck(torch.tanh, sample(3), checks="values", skip=["values"]),
            "none",
        ),
        (lambda: torchbp.gradcheck(torch.tanh, sample(3), deadline=-1.0), "deadline"),
    ],
)
def test_never_passes_on_nothing(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_error_of_the_function_itself_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torchbp.gradcheck(torch.mm, (sample(2, 3), sample(2, 3)))


def test_torch_arguments_are_accepted():
    assert torchbp.gradcheck(
        torch.tanh,
        (sample(3),),
        eps=1e-6,
        atol=1e-5,
        rtol=1e-3,
        nondet_tol=0.0,
        check_undefined_grad=True,
        check_grad_dtypes=True,
        check_batched_grad=False,
        check_batched_forward_grad=False,
        check_forward_ad=False,
        check_backward_ad=True,
        fast_mode=True,
        masked=False,
    )


class Sine(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y * ctx.saved_tensors[0].cos()


def test_tells_whether_the_backward_is_used():
    report = torchbp.gradcheck(Sine.apply, sample(3), checks="backward_used")
    assert [f.message for f in report.findings] == [
        "torch.compile of torch.func.vjp does not call backward: it differentiates forward instead"
    ]


def test_estimator_passes_without_what_uses_differences():
    class Round(Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, grad_y):
            return grad_y

    assert not torchbp.gradcheck(Round.apply, sample(3, 4), raise_exception=False, skip=COMPILE)
    assert torchbp.gradcheck(Round.apply, sample(3, 4), skip=["differences", "compile"])


def test_a_flag_may_ask_for_a_straight_through_gradient():
    def choice(x, w, hard=False):
        soft = x.softmax(-1)
        chosen = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
        return w * (chosen + soft - soft.detach() if hard else soft)

    report = torchbp.gradcheck(choice, (sample(2, 3), sample(2, 3)), skip=("compile",))
    assert report.capabilities["arguments"].status == "ok"


def test_whatever_the_default_device_is():
    def function(x, w):
        return (x.relu() @ w).sort().values.softmax(-1)

    inputs = sample(3, 4), sample(4, 3)
    with torch.device("meta"):
        report = torchbp.gradcheck(function, inputs, skip=COMPILE)
    assert report
    assert not [c.detail for c in report.capabilities.values() if "itself failed" in c.detail]


class Hinge(Function):
    """max(0, x), with a slope that is off by a thousandth."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad_y):
        (x,) = ctx.saved_tensors
        return grad_y * (x > 0) * 1.001


def selected(x):
    return x.clamp(min=0)


def in_float32(x):
    return x.float().clamp(min=0).to(x.dtype)


@pytest.mark.parametrize(("function", "status"), [(selected, "ok"), (in_float32, "not applicable")])
def test_a_selection_of_float32_samples_is_no_float32_function(function, status):
    report = torchbp.gradcheck(function, sample(3, 4, dtype=torch.float32))
    assert report.capabilities["low_precision"].status == status


def test_a_selection_of_float32_samples_is_checked_in_float64():
    report = torchbp.gradcheck(
        Hinge.apply, sample(3, 4, dtype=torch.float32), checks="values", raise_exception=False
    )
    assert not report
    assert report.wrong[0].ratio == pytest.approx(1.001)


def test_a_float32_selection_is_not():
    def rounded(x):
        return in_float32(x) * 1.0

    assert torchbp.gradcheck(rounded, sample(3, 4), skip=["compile"])


class Cancelled(torch.autograd.Function):
    """x², with a gradient of differences of ever larger numbers, the larger x is."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @classmethod
    def backward(cls, ctx, grad_y):
        (x,) = ctx.saved_tensors
        far = 1e3 * x.abs().max() ** 3
        return grad_y * ((x + far) ** 2 - x**2 - far**2) / far


class CancelledWrong(Cancelled):
    @classmethod
    def backward(cls, ctx, grad_y):
        (x,) = ctx.saved_tensors
        return super().backward(ctx, grad_y) * (1 + 1e-4 * (x.abs().max() > 100))


@pytest.mark.parametrize(("function", "right"), [(Cancelled, True), (CancelledWrong, False)])
def test_what_rounding_explains_at_another_sample_is_let_pass(function, right):
    report = torchbp.gradcheck(function.apply, sample(3, 4), checks="scales", raise_exception=False)
    assert report.capabilities["scales"].status == ("ok" if right else "wrong")


def test_a_series_is_not_asked_for_far_below_zero():
    """Torch would sum it for hours."""
    asked = []

    def trigamma(x):
        asked.append(float(x.detach().nan_to_num().min()))
        if asked[-1] < -1e6:
            raise ValueError("expected numbers above -1e6")
        return torch.polygamma(1, x)

    x = torch.linspace(-1.2, 2.3, 12, dtype=torch.float64).view(3, 4).requires_grad_()
    assert torchbp.gradcheck(trigamma, x, checks=["edges"])
    assert -1e6 < min(asked) < -1e3
