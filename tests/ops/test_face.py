"""The face of every op and Module is torch's: signatures, errors, repr, state, initialisation, pickles, docs."""

import copy
import doctest
import inspect
import io
import pickle
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.utils import swap_tensors

import torchbp
from tests.device import DEVICE
from tests.ops.conftest import changed, make, tensors_of, torchs, twin, with_args


def twins(constructed):
    """The module and torch's, made with the same arguments after the same seed, and an input."""
    op, i = constructed
    cls, ctor, inputs = list(op.module_samples(make(torch.float32)))[i]
    made = []
    for kind in (cls, twin(cls)):
        torch.manual_seed(0)
        made.append(kind(*ctor.args, **ctor.kwargs).to(DEVICE))
    return *made, inputs


class OfReference(torch.nn.Module):
    """What stands for torch's Module where torch has none: the op's reference, with our arguments and parameters."""

    def __init__(self, op, ours, ctor):
        super().__init__()
        bound = inspect.signature(type(ours).__init__).bind(self, *ctor.args, **ctor.kwargs)
        bound.apply_defaults()
        self.kwargs = {
            k: v
            for k, v in bound.arguments.items()
            if k in inspect.signature(op.reference).parameters
        }
        self.reference = op.reference
        for name, parameter in ours._parameters.items():
            self.register_parameter(name, copy.deepcopy(parameter))
            self.kwargs.pop(name, None)  # bias=False means no such parameter
        for name, buffer in ours.named_buffers():
            self.register_buffer(name, buffer.clone())

    def forward(self, *inputs):
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        return self.reference(*inputs, **{**self.kwargs, **tensors})


# Values that are looked at on the CPU alone: elsewhere looking would wait for the device.
OUT_OF_RANGE = {
    *("index", "index-above", "index-below", "negative", "range"),
    *("input-above", "target-below", "nan"),
}


@pytest.mark.cpu("the same on every device")
def test_signature(op):
    """Names, order, defaults and kinds of torch's arguments, or of the reference's; extras are keyword-only."""
    theirs = torchs(op)
    try:
        wanted = inspect.signature(theirs).parameters
    except (
        ValueError
    ):  # a builtin: its signature is in its docstring, or in the list of what can be overridden
        if theirs.__doc__ is None:
            stand_in = torch.overrides.get_testing_overrides()[theirs]
            assert inspect.signature(stand_in).parameters == {
                k: p.replace(annotation=p.empty)
                for k, p in inspect.signature(op.function).parameters.items()
            }
            return
        first = theirs.__doc__.strip().splitlines()[0]
        names = first[first.index("(") + 1 : first.index(")")].split(", ")
        assert [p.split("=")[0].strip() for p in names] == list(
            inspect.signature(op.function).parameters
        )
        return
    ours = dict(inspect.signature(op.function).parameters)
    extras = {k: p for k, p in ours.items() if k not in wanted}
    assert all(p.kind is p.KEYWORD_ONLY for p in extras.values())
    assert [(k, p.default, p.kind) for k, p in ours.items() if k in wanted] == [
        (k, p.default, p.kind) for k, p in wanted.items()
    ]


def test_wrong_arguments(wrong):
    op, i = wrong
    sample = list(op.errors(make()))[i]
    if DEVICE != "cpu" and sample.name in OUT_OF_RANGE:
        pytest.skip("another device's kernels abort the process for it, torch's and ours")
    reference = op.reference or torchs(op)
    ours = (reference.__module__ or "").startswith("torchbp")
    if op.random or ours:  # a reference of ours states values, not errors
        reference = getattr(torch.nn.functional, op.name, reference)
    with pytest.raises(Exception) as theirs:  # noqa: PT011  # the type is what is compared
        reference(*sample.args, **sample.kwargs)
    with pytest.raises(Exception) as ours:  # noqa: PT011
        op.function(*sample.args, **sample.kwargs)
    if DEVICE != "cpu" and type(theirs.value) is NotImplementedError:
        assert isinstance(ours.value, RuntimeError)  # torch has looked for a kernel, and found none
    else:
        assert type(ours.value) is type(theirs.value)
    assert str(ours.value)


@pytest.mark.cpu("the same on every device")
def test_no_tensors(op):
    """A list, a number or ``None`` for the first tensor: an exception of torch's type, which hides none of ours."""
    if op.torchs is None:
        pytest.skip("torch has none")
    for sample, given in product(op.samples(make()), ([1.0, 2.0], 1.5, None)):
        raised = []
        for function in (op.torchs, op.function):
            with pytest.raises((TypeError, AttributeError)) as error:
                function(given, *sample.args[1:], **sample.kwargs)
            raised.append(error)
        theirs, ours = raised
        # sigmoid and tanh are torch's own methods there: 'list' object has no attribute 'tanh'
        assert ours.type is theirs.type or op.name in {"sigmoid", "tanh"}
        assert ours.value.__suppress_context__ or ours.value.__context__ is None


@pytest.mark.cpu("the same on every device")
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_integers(first, dtype):
    """In the place of floating-point numbers: torch's value and dtype, in every reduction, or an error of its type."""
    if first.op.torchs is None or first.op.random:
        pytest.skip("torch has none, or draws")
    sample = with_args(
        first.sample(torch.float32),
        lambda t: (t.detach() * 3).to(dtype) if t.is_floating_point() else t,
    )
    ways = ("none", "sum") if "reduction" in sample.kwargs else (None,)
    for changes in [{} if way is None else {"reduction": way} for way in ways]:

        def outcome(function, changes=changes):
            try:
                return function(*sample.args, **(sample.kwargs | changes))
            except Exception as error:
                return type(error)

        ours, theirs = outcome(first.op.function), outcome(first.op.torchs)
        if isinstance(theirs, type):
            assert ours is theirs
        else:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.cpu("the same on every device")
def test_public_names(op):
    assert getattr(torchbp.functional, op.name) is op.function
    assert pickle.loads(pickle.dumps(op.function)) is op.function
    for module in op.modules:
        assert getattr(torchbp.nn, module.__name__) is module
        assert module.__module__ == "torchbp.nn"
        if twin(module) is module:  # beyond torch
            assert issubclass(module, torch.nn.Module)
            continue
        assert issubclass(module, twin(module))
        own = set(vars(module)) - {"__module__", "__doc__", "forward"}
        own -= {"__firstlineno__", "__static_attributes__", "__annotations__"}
        assert not own, "a Module overrides forward only"
        theirs = getattr(torch.nn, module.__name__).forward
        ours, wanted = inspect.signature(module.forward), inspect.signature(theirs)
        assert [(k, p.default, p.kind) for k, p in ours.parameters.items()] == [
            (k, p.default, p.kind) for k, p in wanted.parameters.items()
        ]


@pytest.mark.cpu("the same on every device")
def test_docstring(op):
    """Every public function says what it takes, gives and raises, and its example runs."""
    text = op.function.__doc__
    assert all(f"{part}:\n" in text for part in ("Args", "Returns", "Raises", "Example"))
    documented = text[text.index("Args:") : text.index("Returns:")]
    for name in inspect.signature(op.function).parameters:
        assert f"{name}: " in documented
    example = doctest.DocTestParser().get_doctest(text, {}, op.name, None, 0)
    assert len(example.examples) >= 3
    failures = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(example, out=failures.write)
    assert not runner.failures, failures.getvalue()
    source = inspect.getmodule(inspect.unwrap(op.function)).__doc__
    assert all(
        f"{part}:\n" in source for part in ("Derivation", "Saves", "Edge values", "Sources")
    ) or ("Derivation" in source and "Sources:\n" in source)


def test_module_repr_and_training(constructed):
    ours, theirs, _ = twins(constructed)
    assert repr(ours) == repr(theirs)
    assert ours.training == theirs.training
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), "the same seed gives the same parameters"


def test_module_value_and_gradient(constructed):
    ours, theirs, inputs = twins(constructed)
    if type(ours).__name__ == "LinearCrossEntropyLoss" and type(theirs) is type(ours):
        pytest.skip("torch has none before 2.13")
    if type(theirs) is type(ours):  # beyond torch
        op, i = constructed
        theirs = OfReference(op, ours, list(op.module_samples(make(torch.float32)))[i][1])
    ours.eval()
    theirs.eval()
    results = []
    for module in (ours, theirs):
        args = changed(inputs.args, lambda t: t.detach().clone().requires_grad_(t.requires_grad))
        with torch.backends.cudnn.flags(enabled=False):  # it has no backward in evaluation
            output = module(*args)
        for k, y in enumerate(tensors_of(output)):
            if y.requires_grad:
                y.backward(torch.full_like(y, k + 1), retain_graph=True)
        results.append((output, [t.grad for t in (*tensors_of(args), *module.parameters())]))
    (output, ours_grads), (their_output, their_grads) = results
    assert type(output) is type(their_output)
    for y, z in zip(tensors_of(output), tensors_of(their_output), strict=True):
        torch.testing.assert_close(y, z)
    if constructed[0].other_gradient:
        return
    for a, b in zip(ours_grads, their_grads, strict=True):
        torch.testing.assert_close(a, b)


def test_module_state_dict_goes_both_ways(constructed):
    ours, theirs, _ = twins(constructed)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(1)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_module_copies_and_pickles(constructed):
    ours, _, inputs = twins(constructed)
    ours.eval()
    args = changed(inputs.args, Tensor.detach)
    want = tensors_of(ours(*copy.deepcopy(args)))
    pickled = pickle.dumps(ours)
    assert b"torchbp.nn" in pickled
    assert b"torchbp.ops" not in pickled
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(ours),
        pickle.loads(pickled),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is type(ours)
        torch.testing.assert_close(tensors_of(other(*copy.deepcopy(args))), want)


# Identities, whose output is the input: no copy is made of it.
VIEWS = ("direct_feedback_alignment", "gradient_reversal", "gradient_scale", "straight_through")


def test_output_may_be_written_to(case):
    """As by ``ReLU(inplace=True)`` or ``+=`` behind it: right, or it raises where the output is kept."""
    if case.op.name in VIEWS or (case.op.name == "linear_cross_entropy" and "places" in case.name):
        pytest.skip("gives a view")

    def gradients(function, double):
        torch.manual_seed(1)
        f, tensors = case.of_tensors(case.sample(), function)
        y = f(*tensors)
        if not y.requires_grad:
            pytest.skip("nothing to differentiate")
        y = double(y)
        return torch.autograd.grad(y.sum(), tensors, allow_unused=True)

    try:
        gradients(torchs(case.op), lambda y: y.mul_(2))
    except (RuntimeError, TypeError):
        pytest.skip("torch's own can't")
    try:
        written = gradients(case.op.function, lambda y: y.mul_(2))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return
    torch.testing.assert_close(written, gradients(case.op.function, lambda y: y * 2))


def test_inplace_as_in_torch(op):
    """``inplace=True`` writes the result where torch writes it, with torch's gradient; a leaf raises as in torch."""
    if "inplace" not in inspect.signature(op.function).parameters:
        pytest.skip("no inplace form")
    sample = next(iter(op.samples(make())))
    others = sample.args[1:]
    leaf = torch.randn(sample.args[0].shape, dtype=torch.float64, requires_grad=True, device=DEVICE)
    arguments = inspect.signature(op.function).parameters
    given = inspect.signature(op.function).bind(*sample.args).arguments
    active = {"training": True} if "training" in {*arguments} - {*given} else {}
    for view in (lambda t: t, lambda t: t[1:], lambda t: t.mT):
        results = []
        for inplace in (False, True):
            torch.manual_seed(1)
            x = leaf * 1
            y = op.function(view(x), *others, inplace=inplace, **active)
            if inplace:
                assert y.data_ptr() == view(x).data_ptr()
                assert torch.equal(view(x), y)
            y.sin().sum().backward()
            results.append((y.detach(), leaf.grad))
            leaf.grad = None
        (y, g), (z, h) = results
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(g, h)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        op.function(leaf, *others, inplace=True, **active)
    with torch.no_grad():
        for data in (leaf.detach().clone(), leaf.detach().clone().requires_grad_()):
            requires = data.requires_grad
            assert op.function(data, *others, inplace=True, **active) is data
            assert data.requires_grad == requires


def test_module_to_dtype(constructed):
    module, _, inputs = twins(constructed)
    module = module.to(torch.bfloat16).eval()
    args = changed(inputs.args, lambda t: t.detach().bfloat16())
    assert {t.dtype for t in tensors_of(module(*args))} == {torch.bfloat16}


def test_module_with_other_parameters(constructed):
    """Pruned, reparametrised, called with parameters given, swapped for others: what torch's own layer then gives."""
    ours, theirs, inputs = twins(constructed)
    names = [name for name, p in ours.named_parameters(recurse=False) if p.dim() > 1]
    if not names or type(ours) is type(theirs):
        pytest.skip("no weight, or torch has none")

    def outcomes(module):
        module.eval()
        args = changed(inputs.args, Tensor.detach)
        given = {name: p.detach() / 2 for name, p in module.named_parameters()}
        yield functional_call(module, given, args)
        weight_norm(module, names[0])
        yield module(*args)
        remove_parametrizations(module, names[0])
        prune.l1_unstructured(module, names[0], amount=0.4)
        yield module(*args)
        prune.remove(module, names[0])
        swap_tensors(getattr(module, names[0]), nn.Parameter(given[names[0]]))
        yield module(*args)

    for y, z in zip(outcomes(ours), outcomes(theirs), strict=True):
        torch.testing.assert_close(tensors_of(y), tensors_of(z), equal_nan=True)  # a norm of 0
