"""What every ``autograd.Function`` of this package shares: how it is typed, called, and computed in half precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from inspect import Parameter, signature
from types import FunctionType, ModuleType
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _are_functorch_transforms_active as transforms_active
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._C import _is_torch_function_enabled as torch_functions_enabled
from torch._C import _is_tracing as is_script_tracing
from torch._C import _len_torch_dispatch_stack as modes_active
from torch._C._functorch import is_gradtrackingtensor, is_legacy_batchedtensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_variadic
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as mode_stack

from torchbp.ops import _recipe
from torchbp.ops._autocast import autocasts
from torchbp.ops._forward_mode import differentiable_in_forward_mode
from torchbp.ops._jagged import of_jagged
from torchbp.ops._vmapped import vmapped
from torchbp.ops._written_out import tensors, written_out

__all__ = [
    "Context",
    "as_dtype",
    "counted_up",
    "directional",
    "eager",
    "entry",
    "followed",
    "formula_only",
    "fused",
    "handed_on",
    "in_autocast_dtype",
    "in_autocast_float32",
    "in_float32",
    "in_place",
    "is_half",
    "kernel",
    "leaf",
    "modes_active",
    "overwrite",
    "plain",
    "public",
    "recorded",
    "scale_fresh",
    "transforms_active",
    "undifferentiated",
    "unviewed",
    "visible",
    "visible_in_backward",
    "widened",
]

P = ParamSpec("P")
R = TypeVar("R")

_FAKE, _PROXY = _TorchDispatchModeKey.FAKE, _TorchDispatchModeKey.PROXY
_HALF = (torch.bfloat16, torch.float16)
# What a class has that does not answer for torch's ops itself, as fake and distributed tensors do.
_PLAIN = Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
_EVERY = Tensor.__torch_function__.__func__  # pyright: ignore[reportFunctionMemberAccess]
# Torch's own (2.13) of the first two can't be exported, of the last computes other numbers once it is decomposed.
_FORMULAS_IN_EXPORTS = ("ctc_loss", "gaussian_nll_loss", "multilabel_margin_loss")
_formula_only = False


class Context(Protocol):
    """The parts of autograd's ``ctx`` that ops use; what is not a tensor is set as an attribute."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def save_for_forward(self, *tensors: Tensor | None) -> None: ...
    def mark_dirty(self, *tensors: Tensor) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def entry(
    function: type[Function],
    *,
    again: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Tensor]:
    """Return the callable that runs ``function``: eagerly, under ``torch.func``, under ``torch.compile``.

    - Dynamo (torch 2.13) refuses a Function that defines ``jvp`` (pytorch#180284), so while it traces, a subclass
      without ``jvp`` takes its place; forward and backward are the same code.
    - ``Function.apply`` binds the arguments to the signature at every call, about 13 µs. Here they are complete
      and in order, so where no functorch transform is active the C++ ``apply`` below it is called at once.
    - A small call's time is that of its Python lines: every one here, and in :func:`public` and :func:`fused`, has
      been weighed.

    Args:
        function: Function with ``forward``, ``setup_context``, ``backward`` and ``jvp``.
        again: Makes the output again, to the last bit, from the arguments of ``function.forward``, and its further
            outputs if it takes more; most often ``forward`` itself. ``lean`` then need not keep the output. ``None``
            for what can't be, or isn't worth it.
        flops: Of ``again``, from its arguments; left out where it is cheap: one pass over memory.

    Returns:
        A callable with the arguments of ``function.forward``, all positional.
    """
    function.jvp = staticmethod(differentiable_in_forward_mode(function.jvp))
    traced = type(function.__name__, (function,), {"jvp": staticmethod(Function.jvp)})
    if torch.__version__ < "2.13":  # a TorchVersion, which knows order
        traced.forward = staticmethod(_named_once(function.forward))  # pyright: ignore[reportAttributeAccessIssue]
    transformed = vmapped(function)
    numbers = _numbers_beside(function)
    places = _places_of_tensors(function.forward)
    in_one_call = function if places is None else _in_one_call(function)
    _call_directly(in_one_call)
    bare = super(Function, in_one_call).apply  # pyright: ignore[reportAttributeAccessIssue]
    noted = bare
    if again is not None:
        noting = _recipe.noting(function, again, flops)
        _call_directly(noting)
        noted = super(Function, noting).apply  # pyright: ignore[reportAttributeAccessIssue]

    may_write = [*signature(function.forward).parameters][-1] == "inplace"

    def elsewhere(*args: object) -> Tensor:
        if is_dynamo_compiling():
            numbers()
            return _compiled(traced, args, places is None)
        if transforms_active():
            return transformed.apply(*args)
        for i in range(len(args)) if places is None else places:
            a = args[i]
            if isinstance(a, Tensor) and is_gradtrackingtensor(a):  # of a transform that has ended
                args = unwrap_dead_wrappers(args)
                break
        if _recipe.asked and is_grad_enabled():
            return noted(*args)
        return bare(*args)

    if places is None:
        return elsewhere
    others = _writing(elsewhere) if may_write else elsewhere
    return _direct(function.forward, bare, others, may_write)


def _writing(called: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``called`` for a Function whose last argument says whether it writes into its first.

    One that writes has no batching rule, and would have to write its tangent, too: there a copy writes.
    """

    def call(*args: Any) -> Tensor:
        if not args[-1]:
            return called(*args)
        if not eager() or forward_ad._current_level >= 0:
            return overwrite(called, *args[:-1], False)
        y = called(*args)
        # autograd would give another tensor, without its history
        return y if is_grad_enabled() else args[0]

    return call


def _direct(
    forward: Callable[..., Any],
    bare: Callable[..., Any],
    elsewhere: Callable[..., Any],
    may_write: bool,
) -> Callable[..., Any]:
    """Return what calls ``bare``, but ``elsewhere`` what is not an eager call of living tensors that nobody notes."""
    dead = "(isinstance({0}, Tensor) and is_gradtrackingtensor({0}))"
    special = [dead.format(t) for t in tensors(forward)]
    special += ["inplace"] * may_write
    return written_out(
        f"""
        if is_dynamo_compiling() or transforms_active() or recipe.asked or {" or ".join(special)}:
            return elsewhere({{given}})
        return bare({{given}})
        """,
        forward,
        bare=bare,
        elsewhere=elsewhere,
        is_dynamo_compiling=is_dynamo_compiling,
        recipe=_recipe,
        transforms_active=transforms_active,
        is_gradtrackingtensor=is_gradtrackingtensor,
    )


def _compiled(traced: type[Function], args: tuple[Any, ...], any_number: bool) -> Any:
    """Run ``traced`` under dynamo, which without a gradient miscounts the arguments of a forward of any number."""
    asked = is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    args = tuple(+a if isinstance(a, float) else a for a in args)  # as in _numbers_beside
    return traced.forward(*args) if any_number and not asked else traced.apply(*args)


def _numbers_beside(function: type[Function]) -> Callable[[], object]:
    """Return what reads every float of the modules that ``function`` calls, for dynamo to meet it before the Function.

    Compiled with ``dynamic=True`` (torch 2.13) a float becomes a node of the graph where dynamo first meets it: inside
    of a Function, the next one that reads it ends with "lift_tracked_freevar_to_input should not be called".
    """
    spaces: list[dict[str, Any]] = [getattr(function.forward, "__globals__", {})]
    for space in spaces:  # which grows
        others = (v.__dict__ if isinstance(v, ModuleType) else _globals(v) for v in space.values())
        for other in others:
            ours = other.get("__name__", "").startswith("torchbp.")
            if ours and not any(other is s for s in spaces):
                spaces.append(other)
    reads = [_read(names, space) for space in spaces if (names := _floats(space))]

    def numbers() -> None:
        for read in reads:
            read()

    return numbers


def _globals(value: object) -> dict[str, Any]:
    return value.__globals__ if isinstance(value, FunctionType) else {}


def _floats(space: dict[str, Any]) -> list[str]:
    return [name for name, value in space.items() if type(value) is float]


def _read(names: list[str], space: dict[str, Any]) -> Callable[[], object]:
    code = compile(f"lambda: [{', '.join('+' + name for name in names)}]", "<numbers>", "eval")
    return FunctionType(code.co_consts[0], space)


def _places_of_tensors(forward: Callable[..., Any]) -> tuple[int, ...] | None:
    """Return the places of the arguments of ``forward`` that may be tensors; ``None`` where they are of any number."""
    parameters = signature(forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    names = [p.name for p in parameters]
    return tuple(map(names.index, tensors(forward)))


def _named_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Give every output of ``forward`` a name of its own: dynamo of torch 2.11 loses the gradient of one that has two.

    ``y.to(y.dtype)`` names ``y`` twice.
    """

    @wraps(forward)  # dynamo counts its parameters
    def call(*args: object) -> Any:
        outputs = forward(*args)
        if isinstance(outputs, tuple):
            return tuple(y.view_as(y) if isinstance(y, Tensor) else y for y in outputs)
        return outputs.view_as(outputs)

    return call


def _in_one_call(function: type[Function]) -> type[Function]:
    """Return ``function`` with ``setup_context`` called by ``forward``: two calls from C++ would take 0.2 µs more."""
    forward = written_out(
        """
        output = compute({given})
        setup_context(ctx, ({each},), output)
        return output
        """,
        function.forward,
        first=("ctx",),
        compute=function.forward,
        setup_context=function.setup_context,
    )
    methods = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(Function.setup_context),
    }
    return type(function.__name__, (function,), methods)


def _call_directly(function: type[Function]) -> None:
    """Spare the node what torch asks at every call: whether there is a ``vjp``, 1 µs, and what is a tensor, 0.5 µs.

    What is saved for backward is saved for forward mode too: torch lets go of it behind the forward.
    """
    node: Any = getattr(function, "_backward_cls", None)
    if node is not None:
        node.apply = function.backward
        node.save_for_backward = _save
        node.save_for_forward = _save_for_forward


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.to_save = ctx.saved_for_forward = tensors


def _save_for_forward(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.saved_for_forward = tensors


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` a citizen of ``torchbp.functional``.

    It answers ``__torch_function__`` (tensor subclasses, modes, ``torch.fx`` proxies) as torch's own functions do,
    and is pickled by its public name, whatever the file tree. Nested and sparse tensors go to torch's own function,
    formulas and samples are those of strided ones, and so do tensors whose class has a ``__torch_function__`` of its
    own, as quantized and masked ones do: it knows torch's functions, by identity. Beyond torch, what is
    :func:`row_by_row` takes jagged ones. What is passed on to others is, as torch does it, what has no default by
    place, and what is not the default by name. Where no tensor is given for one, torch's error is raised.
    ``torch.jit.trace`` and ``torch.export`` record torch's own, too: what they save runs where there is no Python, for
    any size, and is what others look for in a graph.
    """
    own = getattr(torch.nn.functional, function.__name__, None)
    passed_on = _passed_on(function)
    beyond_torch = _beyond(own, function)
    jagged = of_jagged(function)

    def elsewhere(*args: Any, **kwargs: Any) -> R:
        named, needed, chosen = passed_on(args, kwargs)
        given = tuple(named.values())
        if own is not None:
            if not beyond_torch & chosen.keys():
                if recorded(function.__name__):
                    return own(*needed, **chosen)
                # A class may take a bias by place alone, as layers pass it.
                if any(map(_answers, given)):
                    return own(*args, **{k: v for k, v in kwargs.items() if k in chosen})
            if any(map(_is_laid_out_otherwise, given)):
                return own(*needed, **chosen)
        elif jagged is not None and getattr(given[0], "layout", None) is torch.jagged:
            return jagged(dispatch, **named)
        # dynamo's has_torch_function forgets where a class has switched its own off
        if has_torch_function(given) and (not is_dynamo_compiling() or torch_functions_enabled()):
            return handle_torch_function(dispatch, given, *needed, **chosen)
        return function(*args, **kwargs)

    other = "(isinstance({0}, Tensor) and ({0}.layout is not strided or {0}.is_nested))"
    known = own is not None or jagged is not None
    special = [other.format(t) for t in tensors(function)] if known else []
    if own is not None:
        # recorded: where dynamo does not ask, an export has a mode, which has_torch_function finds
        special.append(
            "(compiler._is_exporting_flag if is_dynamo_compiling() else is_script_tracing())"
        )
    dispatch = wraps(function)(
        written_out(
            f"""
            if {" or ".join(["has_torch_function({each})", *special])}:
                return elsewhere({{given}})
            try:
                return function({{given}})
            except AttributeError as error:
                raise instead(error, {{given}}) from None
            """,
            function,
            elsewhere=elsewhere,
            function=function,
            instead=_instead(function, passed_on),
            compiler=torch.compiler,
            is_dynamo_compiling=is_dynamo_compiling,
            is_script_tracing=is_script_tracing,
            has_torch_function=has_torch_function_variadic,
            strided=torch.strided,
        )
    )
    dispatch.__module__ = "torchbp.functional"
    return dispatch


def _is_laid_out_otherwise(value: object) -> bool:
    return isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_nested)


def _answers(value: object) -> bool:
    """Whether this is a tensor whose class answers for torch's functions itself, not as every subclass does."""
    if not isinstance(value, Tensor):
        return False
    return getattr(type(value).__torch_function__, "__func__", _EVERY) is not _EVERY


def _passed_on(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what sorts arguments: all by name, those of no default, and of the others what is not the default."""
    default = {k: p.default for k, p in signature(function).parameters.items()}
    optional = {k for k, v in default.items() if v is not Parameter.empty}

    def passed_on(args: Any, kwargs: Any) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
        named = dict(zip(default, args, strict=False)) | kwargs
        needed = [v for k, v in named.items() if k not in optional]
        chosen = {k: v for k, v in named.items() if k in optional and v is not default[k]}
        return named, needed, chosen

    return passed_on


def _beyond(own: Callable[..., Any] | None, function: Callable[..., Any]) -> set[str]:
    """Return the arguments of ``function`` that torch's own has not; where it is built in, it has all."""
    try:
        known = signature(own).parameters if own is not None else ()
    except ValueError:
        return set()
    return set(signature(function).parameters) - set(known)


def _instead(function: Callable[..., Any], passed_on: Callable[..., Any]) -> Callable[..., Any]:
    """Return what finds the error to raise for one of a missing attribute: torch's, where a tensor is none."""
    name, parameters = function.__name__, signature(function).parameters
    torchs = getattr(torch.nn.functional, name, getattr(torch, name, function))
    kinds = {k: p.annotation for k, p in parameters.items()}
    kinds = {k: kind for k, kind in kinds.items() if kind in (Tensor, Tensor | None)}

    def instead(error: AttributeError, *args: Any, **kwargs: Any) -> Exception:
        named, needed, chosen = passed_on(args, kwargs)
        if all(isinstance(named[k], kind) for k, kind in kinds.items()):
            return error
        try:
            torchs(*needed, **chosen)
        except Exception as theirs:  # whatever it is
            return theirs
        return error

    return instead


def leaf(forward: Callable[P, R]) -> Callable[P, R]:
    """Make a Module's ``forward`` a leaf of ``torch.fx``, one ``call_module``, as the layers of ``torch.nn`` are.

    The tracer takes for leaves what is defined below ``torch.nn``, and would trace through ours: a dropout's or a batch
    norm's mode would be fixed at that moment, and a recurrent layer, which asks for its input's shape, refused. Traced
    through, as in torch, are the module that is itself what is traced, and one whose class has a forward of its own
    and calls this one.
    """

    @wraps(forward)
    def call(*args: P.args, **kwargs: P.kwargs) -> Any:
        module: Any
        module, *inputs = args
        given = (*inputs, *kwargs.values())
        tracer: Any = next((a.tracer for a in given if isinstance(a, torch.fx.Proxy)), None)
        if tracer is None or tracer.root is module or type(module).forward is not call:
            return forward(*args, **kwargs)
        path = tracer.path_of_module(module)
        return tracer.create_proxy("call_module", path, tuple(inputs), kwargs)

    return call


def overwrite(function: Callable[..., Tensor], x: Tensor, *args: object) -> Tensor:
    """Write ``function(x, *args)`` into ``x``: for an op whose backward needs its input, which is copied first.

    Args:
        function: What :func:`entry` gives; its value has the shape of ``x``.
        x: Written to.
        args: The other arguments of ``function``.

    Returns:
        ``x`` itself.
    """
    # A batched tensor does not tell whether it is differentiated from outside.
    kept = x.clone() if is_grad_enabled() and (x.requires_grad or not eager()) else x
    return x.copy_(function(kept, *args))


def is_half(tensor: Tensor) -> bool:
    """Whether ``tensor`` has one of the 16-bit floating-point dtypes."""
    return tensor.dtype in _HALF


def widened(t: Tensor) -> Tensor:
    """Return ``t`` in float32 where it is half precision, else itself: sums are taken so."""
    return t.float() if is_half(t) else t


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``t`` in ``dtype``; where it has it, 0.8 µs sooner than ``t.to(dtype)`` does."""
    return t if t.dtype == dtype else t.to(dtype)


def in_float32(formula: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Evaluate ``formula`` in float32 where the first tensor is half precision, and round once, at the end.

    In bfloat16 a formula of several roundings loses a gradient that has not vanished: ``1 - σ(x)`` is 0 from
    x = 6.25 on.

    Args:
        formula: Function of ``tensors``.
        tensors: Floating point; the value has the dtype of the first.

    Returns:
        The formula's value in the first tensor's own dtype.
    """
    if not is_half(tensors[0]):
        return formula(*tensors)
    return formula(*(t.float() for t in tensors)).to(tensors[0].dtype)


def in_autocast_dtype(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast as autocast does for its lower-precision ops: float16, bfloat16 and float32 become autocast's dtype.

    Outside the Function, so that autograd differentiates the cast, and what is saved is small; and not by autocast
    itself inside the Function, which would put a cast weight without history into autocast's cache.
    """

    def cast(t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        return t.to(torch.get_autocast_dtype(t.device.type))

    return tuple(cast(t) for t in tensors)


def in_autocast_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for its float32 ops, losses among them: half precision becomes float32, outside the op."""
    for t in tensors:
        if t.dtype in _HALF:
            return tuple(
                t.float() if is_half(t) and autocasts(t.device.type) else t for t in tensors
            )
    return tensors


def eager() -> bool:
    """Whether values may be looked at here: not traced by ``torch.compile`` or ``torch.jit``, transformed, or fake."""
    return not (
        is_dynamo_compiling()
        or transforms_active()
        or is_script_tracing()
        or (modes_active() and _is_fake())
    )


def visible(x: Tensor) -> bool:
    """Whether the values of ``x`` may be looked at: it breaks no trace, and waits for no device or other machine."""
    return (
        x.is_cpu
        and not (  # as `eager`, in which a call would be one more
            is_dynamo_compiling()
            or transforms_active()
            or is_script_tracing()
            or (modes_active() and _is_fake())
        )
        and (type(x) is Tensor or type(x).__torch_dispatch__ is _PLAIN)  # pyright: ignore[reportAttributeAccessIssue]
    )


def plain(t: Tensor) -> bool:
    """Whether torch's kernels compute on ``t``, not a class of its own, as that of distributed tensors does."""
    return type(t) is Tensor or type(t).__torch_dispatch__ is _PLAIN  # pyright: ignore[reportAttributeAccessIssue]


def counted_up(n: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0, 1, ..., n - 1, of the class of ``like``: beside a distributed tensor torch takes none but its like."""
    if plain(like):
        return torch.arange(n, device=like.device, dtype=dtype)
    return like.new_ones(n, dtype=dtype).cumsum(0) - 1


def visible_in_backward(x: Tensor) -> bool:
    """Whether :func:`undifferentiated` and :func:`visible` hold, in one call."""
    return (
        x.is_cpu
        and not (
            _formula_only
            or is_grad_enabled()
            or forward_ad._current_level >= 0
            or is_dynamo_compiling()
            or transforms_active()
            or is_script_tracing()
            or (modes_active() and _is_fake())
        )
        and (type(x) is Tensor or type(x).__torch_dispatch__ is _PLAIN)  # pyright: ignore[reportAttributeAccessIssue]
    )


def recorded(name: str = "") -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` records torch's own op of a name.

    Dynamo could not ask of the latter; that of torch 2.11 answers ``is_exporting()`` with True wherever it traces.
    """
    exported = torch.compiler._is_exporting_flag and name not in _FORMULAS_IN_EXPORTS
    return exported or (not is_dynamo_compiling() and is_script_tracing())


def _is_fake() -> bool:
    """Whether the mode that is active has fake tensors, or records, or a compiler follows: no choice by values."""
    return is_compiling() or any(_get_dispatch_mode(m) is not None for m in (_FAKE, _PROXY))


def followed() -> bool:
    """Whether a mode is active that may keep what it sees, as selective checkpoints do: nothing is written to then.

    One that keeps nothing says so by an attribute ``only_watches``.
    """
    return is_compiling() or not all(getattr(m, "only_watches", False) for m in mode_stack())


def fused(first: Tensor, *others: Tensor, half: bool = False) -> bool:
    """Whether a backward may run a fused kernel, or write into a tensor it has just made.

    Under double backward, ``torch.func``, ``torch.compile``, ``torch.jit.trace`` and batched gradients
    (``is_grads_batched``) only the formula is differentiable, traceable and batched; in half precision it alone
    computes in float32. A mode that keeps the outputs of ops sees the formula, which writes to none of them.

    Args:
        first: What the kernel would read: of what comes from the gradient, and else of half precision, all. Saved
            tensors are never batched.
        others: As ``first``.
        half: Whether the kernel rounds no more than once in half precision.
    """
    if (
        _formula_only
        or is_grad_enabled()  # in backward it is on exactly when create_graph was asked for
        or forward_ad._current_level >= 0
        or is_dynamo_compiling()
        or transforms_active()
        or is_script_tracing()
        or (modes_active() and followed())
        or is_legacy_batchedtensor(first)
    ):
        return False
    if not half and first.dtype in _HALF:
        return False
    for t in others:  # noqa: SIM110  # a generator costs as much as the rest
        if is_legacy_batchedtensor(t) or (not half and t.dtype in _HALF):
            return False
    return True


def undifferentiated() -> bool:
    """Whether a backward may be one call of a kernel of torch's that makes a new tensor.

    Such a kernel torch itself batches, and traces but for dynamo: so 1 µs less is asked than by :func:`fused`, nor
    the dtype.
    """
    return not (
        _formula_only
        or is_grad_enabled()
        or forward_ad._current_level >= 0
        or is_dynamo_compiling()
    )


def kernel(name: str, overload: str = "default") -> Callable[..., Any]:
    """Return torch's own ``aten::name``, found once: ``torch.ops`` looks an overload up at every call, 1 to 3 µs.

    Called through the dispatcher at once, which spares a backward another 1.3 µs, where the private function for it
    is there. It does not ask for ``__torch_function__``: for where :func:`fused` holds.

    Args:
        name: Of the operator.
        overload: The one with the arguments that it will be called with.
    """
    found = getattr(getattr(torch.ops.aten, name), overload)
    call = getattr(torch._C, "_dispatch_call_boxed", None)
    if call is None:
        return getattr(found, "_op", found)
    named = ("aten::" + name, "" if overload == "default" else overload)
    return partial(call, torch._C._dispatch_find_schema_or_throw(*named))


def unviewed(y: Tensor) -> Tensor:
    """Return ``y``, which was just made, as no view of anything: one that a Function returns nobody may write to."""
    return torch.ops.aten._unsafe_view.default(y, y.shape)


def handed_on(x: Tensor) -> Tensor:
    """Return ``x`` as the output of a Function whose rule is not the identity's: a view of it.

    In forward mode a copy: of a view torch asks that its tangent be a view of the input's, which a rule is not.
    """
    return x.view_as(x) if forward_ad._current_level < 0 else x.clone()


def in_place(*tensors: Tensor) -> bool:
    """Whether a step between these tensors may write into one of them that was just made."""
    return fused(*tensors) and all(t.dtype == tensors[0].dtype for t in tensors)


def scale_fresh(fresh: Tensor, factor: Tensor) -> Tensor:
    """Return ``fresh * factor``, written into ``fresh`` where nobody differentiates it.

    Args:
        fresh: A tensor that the caller has just made, and does not use any more.
        factor: A number, or a tensor that can be broadcast to ``fresh``.
    """
    return fresh.mul_(factor) if fused(fresh, factor) else fresh * factor


def directional(*terms: tuple[Tensor | None, Tensor]) -> Tensor:
    """Return Σ tangent · derivative over the inputs that have a tangent: what a ``jvp`` of single elements is."""
    products = [tangent * derivative for tangent, derivative in terms if tangent is not None]
    return sum(products[1:], start=products[0])


@contextmanager
def formula_only() -> Iterator[None]:
    """Run every backward by its formula, never by a fused kernel: for tests that compare the two."""
    global _formula_only  # noqa: PLW0603  # not thread-local on purpose: backward may run in another thread
    before, _formula_only = _formula_only, True
    try:
        yield
    finally:
        _formula_only = before
