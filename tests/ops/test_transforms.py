"""torch.func, torch.compile, torch.export, torch.fx and autocast take every op as they take torch's."""

import copy
import inspect
import io
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

import torchbp
from tests.device import DEVICE
from tests.ops.conftest import (
    Case,
    changed,
    constructed_on_device,
    make,
    tensors_of,
    torchs,
    twin,
    with_args,
)
from tests.ops.test_values import widened
from torchbp.ops._function import visible
from torchbp.ops._samples import Make

SIZED = ("ctc_loss", "local_response_norm")  # their loops are as long as a size


def closed(case: Case, function=None):
    """A scalar function of one tensor, and a batch of three inputs for it, along the first dimension.

    They stay in the domain of a function of probabilities or of positive numbers.
    """
    sample = case.sample()
    f, tensors = case.of_tensors(sample, function)
    x = tensors[0].detach()
    batch = torch.stack([x, x * 0.75, x.flatten().roll(1).view_as(x) * 0.9])
    others = [t.detach() for t in tensors[1:]]
    return (lambda x: f(x, *others).sin().sum()), batch


RANDOMNESS = {"randomness": "different"}


def test_vmap_of_grad(case):
    if not case.of_tensors(case.sample())[1][0].numel():
        pytest.skip("empty")
    f, batch = closed(case)
    if case.op.random:
        assert vmap(grad(f), **RANDOMNESS)(batch).shape == batch.shape
        return
    ours = vmap(grad(f))(batch)
    each = torch.stack([grad(f)(x) for x in batch])
    torch.testing.assert_close(ours, each)
    reference, _ = closed(case, case.reference)
    torch.testing.assert_close(ours, torch.stack([grad(reference)(x) for x in batch]))


@contextmanager
def torchs_own_loops():
    """Torch warns where an op of its own has no batching rule; that is no concern of ours in a reference."""
    torch._C._functorch._set_vmap_fallback_warning_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_warning_enabled(True)


def test_jacobians_and_hessian(case):
    f, _ = closed(case)
    g, _ = closed(case, case.reference)
    (x, *_) = case.of_tensors(case.sample())[1]
    x = x.detach()
    if not 0 < x.numel() <= 12 or case.op.random:
        pytest.skip("large, or draws anew inside the transform")
    with torchs_own_loops():
        jacobian = jacrev(g)(x)
        try:
            second = hessian(g)(x)
        except NotImplementedError:  # a GPU's fused cells have no forward mode
            second = jacrev(jacrev(g))(x)
    torch.testing.assert_close(jacrev(f)(x), jacobian)
    forward = (
        jacfwd(g)(x) if case.op.estimator else jacobian
    )  # its rule may differ, as no derivative does
    torch.testing.assert_close(jacfwd(f)(x), forward)
    torch.testing.assert_close(hessian(f)(x), second)


def test_forward_mode_in_forward_mode(first):
    """The second derivative along a direction, of all inputs at once: as forward mode has it over reverse mode."""

    def along(f):
        return lambda *xs: jvp(f, xs, tuple((x.detach() * 3).cos() for x in tensors))[1]

    if first.op.estimator:  # the tangent of a rule, of the first input
        (ours, tensors), (reference, _) = closed(first), closed(first, first.reference)
        tensors = tensors[:1]
        torch.testing.assert_close(along(along(ours))(*tensors), along(along(reference))(*tensors))
        return
    function, tensors = first.of_tensors(first.sample())
    tensors = tuple(t.detach() for t in tensors)

    def f(*xs):
        return function(*xs).sin().sum()

    changes = along(grad(f, tuple(range(len(tensors)))))(*tensors)
    second = sum((c * (x * 3).cos()).sum() for c, x in zip(changes, tensors, strict=True))
    torch.testing.assert_close(along(along(f))(*tensors), second)


def test_dual_tensors(first):
    """``torch.autograd.forward_ad`` gives the tangent of ``torch.func.jvp``."""
    if first.op.random:
        pytest.skip("draws anew")
    f, tensors = first.of_tensors(first.sample())
    tangents = tuple((t.detach() * 3).cos() for t in tensors)
    with forward_ad.dual_level():
        y = f(*map(forward_ad.make_dual, tensors, tangents))
        tangent = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, jvp(f, tensors, tangents)[1])


def test_forward_mode_three_times_and_under_vmap():
    """Of a function of several ops; each level's vmap batches what the next one saves."""
    x = torch.randn(3, dtype=torch.float64, device=DEVICE)

    def f(nn, x):
        return nn.silu(nn.normalize(nn.sigmoid(x), dim=0) * x).prod()

    ours, theirs = partial(f, torchbp.functional), partial(f, torch.nn.functional)
    torch.testing.assert_close(jacfwd(jacfwd(jacfwd(ours)))(x), jacfwd(jacfwd(jacrev(theirs)))(x))
    batch = torch.stack([x, x * 2])

    def laplacians(f):
        return lambda x: vmap(lambda x: jacfwd(jacfwd(f))(x).trace())(x * batch).sum()

    torch.testing.assert_close(jacfwd(laplacians(ours))(x), jacfwd(laplacians(theirs))(x))


@pytest.mark.parametrize("in_dim", [0, -1])
def test_vmap_of_forward(first, in_dim):
    f, batch = closed(first)
    ours = vmap(f, in_dims=in_dim, **RANDOMNESS)(batch.movedim(0, in_dim))
    if not first.op.random:
        torch.testing.assert_close(ours, torch.stack([f(x) for x in batch]))


def compiled(case: Case, backend: str, dynamic: bool = False):
    torch._dynamo.reset()
    sample = case.sample(torch.float32)
    f, tensors = case.of_tensors(sample, case.op.function)
    c = torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)
    torch.manual_seed(1)
    y = c(*tensors)
    return y, f, tensors


@pytest.mark.heavy
@pytest.mark.parametrize("batched", ["first", "last"])
def test_vmap_differentiated_from_outside(case, batched):
    """As an ensemble is trained: a vmapped forward, and a gradient of all of its results together."""
    if case.op.estimator:
        pytest.skip("a rule for each of the batch")
    f, tensors = case.of_tensors(case.sample())
    g, _ = case.of_tensors(case.sample(), case.reference)
    one = tensors[{"first": 0, "last": -1}[batched]]
    others = [t for t in tensors if t is not one]
    given = (torch.stack([one, one * 0.9]).detach().requires_grad_(), *others)

    def outcome(function):
        def of_one(t):
            return function(*(t if other is one else other for other in tensors))

        y = vmap(of_one, randomness="same")(given[0])
        return y, torch.autograd.grad(y.sin().sum(), given, allow_unused=True)

    try:
        theirs = outcome(g)
    except Exception:
        pytest.skip("torch's own refuses")
    for ours, want in zip(tree_leaves(outcome(f)), tree_leaves(theirs), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-8)


def test_inplace_under_transforms(op):
    """What writes into its input is batched, and has a tangent, as what does not."""
    if "inplace" not in inspect.signature(op.function).parameters:
        pytest.skip("no inplace form")
    sample = next(iter(op.samples(make())))
    x = sample.args[0].detach()
    batch = torch.stack([x, x / 2])
    given = inspect.signature(op.function).bind(*sample.args).arguments
    active = {"training": True} if op.random and "training" not in given else {}

    def loss(inplace, x):
        torch.manual_seed(1)
        x = x * 1
        y = op.function(x, *sample.args[1:], inplace=inplace, **active)
        return (y.sin() * (x if inplace else y)).sum()

    def each(f):
        return vmap(f, randomness="same")

    def dual(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent

    for of in (
        lambda f: each(f)(batch),
        lambda f: each(grad(f))(batch),
        lambda f: grad(lambda x: each(f)(x).sum())(batch),
        lambda f: jvp(f, (x,), (x.cos(),)),
        lambda f: each(lambda x: jvp(f, (x,), (x.cos(),)))(batch),
        lambda f: jvp(grad(f), (x,), (x.cos(),)),
        dual,
    ):
        torch.testing.assert_close(of(partial(loss, True)), of(partial(loss, False)))


def test_make_fx(first):
    """Recorded once, as by ``torch.func.linearize``, and run on other values: nothing looked at those of the first."""
    if first.op.random:
        pytest.skip("draws anew")
    f, tensors = first.of_tensors(first.sample())
    tensors = tuple(t.detach() for t in tensors)
    recorded = make_fx(f)(*tensors)
    others = tuple(t * 0.9 for t in tensors)
    torch.testing.assert_close(recorded(*others), f(*others))


@pytest.mark.heavy
def test_compile(case):
    """One graph, forward and backward, with the values and gradients of eager."""
    check_compiled(case, "aot_eager", dynamic=False)


def test_compile_dynamic(first):
    """The same where sizes are unknown."""
    if first.op.name in SIZED and torch.__version__ < "2.13":
        pytest.skip("dynamo asserts, where a size inside a Function turns out to be a number")
    check_compiled(first, "aot_eager", dynamic=True)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("times", [1, 700], ids=["as many", "many"])
def test_script_trace(first, times):
    """Traced by ``torch.jit`` and run on other values, and on a larger batch where torch's trace takes one."""
    if first.op.random:
        pytest.skip("draws anew")
    sample = first.sample(torch.float32)
    f, tensors = first.of_tensors(sample)
    g, _ = first.of_tensors(sample, first.reference)
    others = tuple(
        torch.cat([t.detach() * 0.7] * times) if t.dim() else t.detach() for t in tensors
    )
    try:
        torch.testing.assert_close(
            torch.jit.trace(g, tensors, check_trace=False)(*others), g(*others)
        )
    except Exception:
        pytest.skip("torch's own can't")
    traced = torch.jit.trace(f, tensors, check_trace=False)
    torch.testing.assert_close(traced(*others), f(*others))
    if hasattr(torch.nn.functional, first.op.name):  # else it is a Function, which is Python's
        torch.jit.save(traced, io.BytesIO())


def test_a_script_trace_says_nothing():
    """Of a choice by size torch is silent, of a size made a tensor again, as for a mean, it is not."""
    layer = "torchbp.nn.SoftMarginLoss()"
    program = (
        f"import torch, torchbp; torch.jit.trace({layer}, (torch.ones(2, 3), torch.ones(2, 3)))"
    )
    quiet = ["-W", "error", "-W", "ignore::DeprecationWarning"]
    subprocess.run([sys.executable, *quiet, "-c", program], check=True)


@pytest.mark.slow
def test_compile_dynamic_twice(first):
    check_dynamic_twice(first)


@pytest.mark.parametrize("name", ["gelu", "silu", "layer_norm"])
def test_compile_dynamic_twice_of_one(name):
    """As in every model: with ``dynamic=True`` dynamo's numbers were those of the first Function alone."""
    from torchbp.ops._op import all_ops

    check_dynamic_twice(Case(all_ops()[name], 0))


def check_dynamic_twice(case):
    f, tensors = case.of_tensors(case.sample(torch.float32), case.op.function)

    def twice(*tensors):
        return f(*tensors).sum() + f(*(t * 0.9 for t in tensors)).sum()

    torch._dynamo.reset()
    y = torch.compile(twice, backend="eager", dynamic=True, fullgraph=True)(*tensors)
    grads = torch.autograd.grad(y, tensors)
    if not case.op.random:
        want = torch.autograd.grad(twice(*tensors), tensors)
        torch.testing.assert_close(grads, want)


@pytest.mark.slow
def test_compile_inductor(first):
    check_compiled(first, "inductor")


def test_compile_inductor_of_one():
    from torchbp.ops._op import all_ops

    check_compiled(Case(all_ops()["layer_norm"], 0), "inductor")


def check_compiled(case, backend, dynamic=False):
    y, f, tensors = compiled(case, backend, dynamic)
    grads = torch.autograd.grad(y, tensors, torch.ones_like(y))
    if case.op.random:
        (x,) = tensors
        assert all(g.shape == x.shape for g in grads)
        if not case.op.elementwise:
            return
        offset = y - x * grads[0]  # one mask in both passes: the slope says which constant is added
        for slope in grads[0].unique():
            assert offset[grads[0] == slope].std(correction=0) <= 1e-6
        return
    want = f(*tensors)
    torch.testing.assert_close(y, want, equal_nan=True)
    for a, b in zip(grads, torch.autograd.grad(want, tensors, torch.ones_like(want)), strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_compiled_backward_runs_the_hand_written_one(first):
    """The graph's backward is ours: the Function's, not one that was derived from its forward."""
    from torch._dynamo.testing import EagerAndRecordGraphs

    torch._dynamo.reset()
    backend = EagerAndRecordGraphs()
    f, tensors = first.of_tensors(first.sample(torch.float32), first.op.function)
    torch.compile(f, fullgraph=True, backend=backend)(*tensors)
    code = "".join(g.print_readable(print_output=False) for g in backend.graphs)
    assert "autograd_function_apply" in code


class Named(Tensor):
    """A subclass as every other."""


@pytest.mark.parametrize("name", ["silu", "layer_norm", "cross_entropy"])
def test_compile_of_a_subclass(name):
    from torchbp.ops._op import all_ops

    torch._dynamo.reset()
    case = Case(all_ops()[name], 0)
    f, tensors = case.of_tensors(case.sample(torch.float32), case.op.function)
    given = [t.detach().as_subclass(Named).requires_grad_() for t in tensors]
    y = torch.compile(f, fullgraph=True, backend="eager")(*given)  # torch's AOT refuses its own
    assert type(y) is Named
    grads = torch.autograd.grad(y.sin().sum(), given)
    want = torch.autograd.grad(f(*tensors).sin().sum(), tensors)
    torch.testing.assert_close([g.as_subclass(Tensor) for g in grads], list(want))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_autograd(first):
    """The backward of an uncompiled forward, compiled."""
    from torch._dynamo.compiled_autograd import _enable

    torch._dynamo.reset()
    f, tensors = first.of_tensors(first.sample(torch.float32))
    with _enable(torch.compile(backend="eager")):
        f(*tensors).sin().sum().backward()
    grads = [t.grad for t in tensors]
    want = torch.autograd.grad(f(*tensors).sin().sum(), tensors)
    torch.testing.assert_close(grads, list(want))


def test_compile_without_a_gradient(first):
    """As a model is evaluated."""
    torch._dynamo.reset()
    f, tensors = first.of_tensors(first.sample(torch.float32), first.op.function)
    with torch.no_grad():
        want = f(*tensors)
        got = torch.compile(f, fullgraph=True, backend="eager")(*tensors)
    if not first.op.random:
        torch.testing.assert_close(got, want)


# "Unsafe to autocast", as probabilities in float16 would be: here they are cast to float32.
REFUSED_ON_A_GPU = {"binary_cross_entropy"} if DEVICE == "cuda" else set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case, dtype):
    """The dtypes of torch under autocast, outputs and gradients, and the values of float64, for both input dtypes."""
    for made in (torch.float32, dtype):
        sample = case.sample(made)
        f, tensors = case.of_tensors(sample)
        g, _ = case.of_tensors(sample, case.reference)
        with torch.autocast(DEVICE, dtype):
            ours = f(*tensors)
            try:
                theirs = case.of_tensors(sample, torchs(case.op))[0](*tensors)
            except Exception:  # torch has it not in half precision
                theirs = None if case.op.name in REFUSED_ON_A_GPU else g(*tensors)
        assert ours.dtype == (torch.float32 if theirs is None else theirs.dtype)
        if case.op.random:  # in another dtype it draws other numbers
            continue
        wide = with_args(sample, lambda t: widened(t) if t.is_floating_point() else t)
        g, again = case.of_tensors(wide, case.reference)
        exact = g(*again)
        near = {"rtol": 2e-2, "atol": 2e-2, "equal_nan": True}
        torch.testing.assert_close(ours.double(), exact, **near)
        grads = torch.autograd.grad(ours, tensors, torch.ones_like(ours))
        want = torch.autograd.grad(exact, again, torch.ones_like(exact))
        for t, a, b in zip(tensors, grads, want, strict=True):
            assert a.dtype == t.dtype
            torch.testing.assert_close(a.double(), b, **near)


def test_autocast_leaves_no_cast_weight_behind():
    """A weight cast under autocast keeps its history where torch's own linear meets it afterwards."""
    import torchbp.functional as F

    weight = torch.randn(3, 3, requires_grad=True, device=DEVICE)
    x = torch.randn(2, 3, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        F.linear(x, weight)
        y = torch.nn.functional.linear(x, weight)
    assert y.requires_grad


def torchs_traces(module) -> bool:
    """Whether the forward of torch's own class can be traced: one that asks for its input's shape cannot."""
    theirs = copy.copy(module)
    theirs.__class__ = twin(type(module))
    try:
        torch.fx.symbolic_trace(theirs)
    except torch.fx.proxy.TraceError:
        return False
    return True


def test_fx(constructed):
    module, inputs = constructed_on_device(constructed)
    try:
        traced = torch.fx.symbolic_trace(module.eval())
    except torch.fx.proxy.TraceError:
        assert not torchs_traces(module)
        return
    called = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    assert any(getattr(t, "__module__", "") == "torchbp.functional" for t in called)
    args = changed(inputs.args, Tensor.detach)
    torch.testing.assert_close(traced(*copy.deepcopy(args)), module(*args))


def test_fx_takes_modules_for_leaves(constructed):
    """Inside a model every Module is one node, as torch's are: recurrent layers too, and the mode can change later."""
    module, inputs = constructed_on_device(constructed)

    forwards = (
        lambda self, a: self.layer(a),
        lambda self, a, b: self.layer(a, b),
        lambda self, a, b, c: self.layer(a, b, c),
        lambda self, a, b, c, d: self.layer(a, b, c, d),
    )
    kind = type("Model", (torch.nn.Module,), {"forward": forwards[len(inputs.args) - 1]})
    model = kind()
    model.layer = module
    traced = torch.fx.symbolic_trace(model)
    (node,) = [n for n in traced.graph.nodes if n.op not in ("placeholder", "output")]
    assert (node.op, node.target) == ("call_module", "layer")
    args = changed(inputs.args, Tensor.detach)
    for training in (False, True):
        results = []
        for m in (traced, model):
            torch.manual_seed(0)
            results.append(tensors_of(copy.deepcopy(m).train(training)(*copy.deepcopy(args))))
        torch.testing.assert_close(*results)


def test_fx_traces_through_a_forward_of_ones_own():
    import torchbp.nn

    class Doubled(torchbp.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = torch.nn.Sequential(Doubled(3, 3)).to(DEVICE)
    traced = torch.fx.symbolic_trace(model)
    assert not [n for n in traced.graph.nodes if n.op == "call_module"]
    x = torch.randn(2, 3, device=DEVICE)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.heavy
@pytest.mark.filterwarnings(
    "ignore:The tensor attributes:UserWarning"
)  # of torch's recurrent layers
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(constructed, strict):
    module, inputs = constructed_on_device(constructed)
    args = changed(inputs.args, Tensor.detach)
    try:
        exported = torch.export.export(module.eval(), copy.deepcopy(args), strict=strict)
    except Exception:  # what torch's own layer cannot either: packed sequences
        module.__class__ = type(module).__mro__[1]
        with pytest.raises(Exception):  # noqa: B017, PT011
            torch.export.export(module, copy.deepcopy(args), strict=strict)
        return
    torch.testing.assert_close(
        tensors_of(exported.module()(*copy.deepcopy(args))),
        tensors_of(module(*copy.deepcopy(args))),
    )


@pytest.mark.filterwarnings(
    "ignore:The tensor attributes:UserWarning"
)  # of torch's recurrent layers
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("training", [False, True])
def test_export_records_torchs_ops(strict, training):
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3),
        nn.BatchNorm1d(4),
        nn.GELU(),
        nn.Dropout(),
        nn.Linear(8, 6),
        nn.LSTM(6, 5, batch_first=True),
    )
    x, graphs = torch.randn(2, 3, 10), []
    for converted in (False, True):
        model = torchbp.convert(model) if converted else model
        exported = torch.export.export(model.train(training), (x,), strict=strict)
        graphs.append([str(n.target) for n in exported.graph.nodes if n.op == "call_function"])
    theirs, ours = graphs
    assert ours == theirs
    assert "aten.lstm.input" in ours


def test_export_of_any_batch(op):
    """No size of the sample's stays in the program as a bound, where none does in torch's."""
    sample = op.benchmark(make(torch.float32), 300)
    leaves, structure = tree_flatten((sample.args, sample.kwargs))
    places = [i for i, a in enumerate(leaves) if isinstance(a, Tensor)]
    tensors = [leaves[i].detach() for i in places]
    rows = [bool(t.dim()) and len(t) == len(tensors[0]) for t in tensors]
    batch = torch.export.Dim("batch", min=2)

    def called(function, *given):
        filled = leaves.copy()
        for i, t in zip(places, given, strict=True):
            filled[i] = t
        args, kwargs = tree_unflatten(filled, structure)
        return function(*args, **kwargs)

    def exported(function):
        module = nn.Module()
        module.forward = lambda *given: called(function, *given)
        dims = (tuple({0: batch} if row else None for row in rows),)
        return torch.export.export(module, tuple(tensors), dynamic_shapes=dims).module()

    try:
        exported(op.torchs or op.reference)
    except Exception as error:  # of whatever type
        pytest.skip(f"torch's own can't: {type(error).__name__}")
    program = exported(op.function)
    more = [torch.cat([t, t, t]) if row else t for t, row in zip(tensors, rows, strict=True)]
    torch.manual_seed(0)
    got = program(*more)
    torch.manual_seed(0)
    if not op.random:
        torch.testing.assert_close(got, called(op.function, *more))


@pytest.mark.slow
def test_export_decomposed(first):
    """An exported program in torch's core ops, saved and loaded."""
    f, tensors = first.of_tensors(first.sample(torch.float32), first.op.function)
    tensors = tuple(t.detach() for t in tensors)
    module = nn.Module()
    module.forward = f
    exported = torch.export.export(module, tensors, strict=False).run_decompositions()
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer).module()(*tensors)
    if not first.op.random:
        torch.testing.assert_close(again, f(*tensors))


def forms(case, function, mode=None):
    """Shapes and dtypes of the outputs and gradients of a call; in a mode, on fake tensors, which have no values."""
    sample = case.sample()

    def given(t):
        own = t.detach() if mode is None else mode.from_tensor(t.detach())
        return own.requires_grad_(t.requires_grad)

    args, kwargs = tree_map_only(Tensor, given, (sample.args, sample.kwargs))
    with mode or nullcontext():
        outputs = tensors_of(function(*args, **kwargs))
        torch.autograd.backward([y.abs().sum() for y in outputs if y.requires_grad])
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
    return [(t.shape, t.dtype) for t in (*outputs, *(t.grad for t in inputs))]


def test_fake_tensors(case):
    try:
        forms(case, case.reference, FakeTensorMode())
    except Exception:  # values that it looks at, targets in bytes
        pytest.skip("torch's own refuses")
    assert forms(case, case.op.function, FakeTensorMode()) == forms(case, case.op.function)


@pytest.mark.cpu("values elsewhere are not looked at")
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_what_is_visible():
    """Values are looked at where torch's own kernels would, and nothing follows the calls."""
    seen = []

    def look(x):
        seen.append(visible(x))
        return x + 1

    x = torch.ones(3)
    for t in (x, nn.Parameter(x), x.as_subclass(type("Named", (Tensor,), {}))):
        look(t)
    assert seen == [True] * 3
    seen.clear()
    with FakeTensorMode() as mode:
        look(mode.from_tensor(x))
    look(mode.from_tensor(x))  # outside of it, too
    look(x.to("meta"))
    vmap(look)(x)
    grad(lambda x: look(x).sum())(x)
    make_fx(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    assert seen == [False] * 7


@pytest.mark.cpu("what has no values is on no device")
def test_meta_tensors(constructed):
    """A Module on the meta device runs there as torch's does: shapes and dtypes, forward and backward."""
    op, i = constructed
    cls, ctor, inputs = list(op.module_samples(Make(torch.float32)))[i]

    def forms_on(device, kind):
        def moved(t):
            return t.detach().to(device).requires_grad_(t.requires_grad)

        made = kind(*ctor.args, **ctor.kwargs).to(device)
        args = changed(inputs.args, moved)
        args = tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)  # targets
        outputs = tensors_of(made(*args))
        torch.autograd.backward([y.abs().sum() for y in outputs if y.requires_grad])
        leaves = [t for t in (*tensors_of(args), *made.parameters()) if t.requires_grad]
        return [(t.shape, t.dtype) for t in (*outputs, *(t.grad for t in leaves))]

    try:
        forms_on("meta", twin(cls))
    except Exception:  # what looks at values
        pytest.skip("torch's own refuses")
    assert forms_on("meta", cls) == forms_on("cpu", cls)
