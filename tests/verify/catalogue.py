"""torch's own catalogue of functions, with the samples of its test suite: right functions that nobody here chose.

What gradcheck finds on them stands in `DEFECTS`, each looked at: a defect of torch 2.13, or what the function means.
"""

import warnings

import torch
from torch.utils._pytree import tree_leaves

LARGEST = 300  # elements of all inputs
DRAWS = ("dropout", "rrelu", "bernoulli", "normal", "multinomial", "rand")
CRASH = (
    "nn.functional.pdist",
    "segment_reduce",
    "native_batch_norm",  # writes beyond the end of statistics, as does
    "_batch_norm_with_update",
)  # the process, at other sizes: indices are not looked at
INPUT_MEANS_MEMORY = ("as_strided",)  # its result goes by strides, on purpose

DEFECTS = {
    "cholesky_inverse": "forward mode is another number than differences and backward",
    "index_fill": "backward fails for an empty index into a scalar",
    "kron": "an input modified in place changes the gradient, and no error is raised",
    "linalg.cholesky_ex": "is meant for matrices that are positive definite, says so in a flag, and goes on",
    "linalg.det": "of a singular matrix the gradient is 0, where a cofactor is due",
    "linalg.pinv": "backward fails under autocast: it multiplies bfloat16 with float32",
    "logcumsumexp": "in float32 its gradient is off by 4e-4: it is made by way of logarithms",
    "masked.median": "of an expanded tensor it returns memory that was never written",
    "narrow_copy": "of a negative start, which forward takes, backward fails; narrow's does not",
    "native_group_norm": "mean and rstd are outputs without a gradient, though they have a grad_fn",
    "nn.functional.binary_cross_entropy": "the gradient of target is infinite where the loss is clamped",
    "nn.functional.linear_cross_entropy": "with options for chunks: no second order, no forward mode, and no error",
    "nn.functional.max_unpool3d": "places named twice get two gradients; backward fails for inputs of another layout",
    "nn.functional.poisson_nll_loss": "full=True: the gradient of target is NaN at 0",
    "nn.functional.softshrink": "lambd=0: the gradient at 0 is 0, of the identity",
    "pca_lowrank": "of zeros, the gradient is NaN",
    "polar": "of a negative absolute value, which forward takes, the gradient has the wrong sign",
    "scatter_reduce": "'prod' without include_self: forward mode is 0",
    "svd_lowrank": "of zeros, the gradient is NaN",
    "to_sparse": "an element that is 0 is not there, and gets no gradient",
}


def functions(only=()):
    """Yield name, function and inputs: of each function the first sample that is small and has a gradient.

    Args:
        only: The functions to take, by name; all where there is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised while torch's list is made
        from torch.testing._internal.common_methods_invocations import op_db
    for op in op_db:
        if only and op.name not in only:
            continue
        without = torch.float64 not in op.backward_dtypes or not op.supports_autograd
        if without or any(word in op.name for word in DRAWS + CRASH + INPUT_MEANS_MEMORY):
            continue
        sample = _small(op)
        if sample is not None:
            yield (
                f"{op.name} {op.variant_test_name}".strip(),
                _call(op, sample),
                (sample.input, *sample.args),
            )


def _small(op):
    torch.manual_seed(0)
    for sample in op.sample_inputs("cpu", torch.float64, requires_grad=True):
        leaves = [
            t for t in tree_leaves((sample.input, sample.args, sample.kwargs)) if torch.is_tensor(t)
        ]
        needed = [t for t in leaves if t.requires_grad]
        strided = all(t.layout == torch.strided for t in leaves)
        if strided and needed and 1 < sum(t.numel() for t in needed) <= LARGEST:
            return sample
    return None


def _call(op, sample):
    def call(*args):
        output = op.gradcheck_wrapper(op.get_op(), *args, **sample.kwargs)
        return sample.output_process_fn_grad(output)

    call.__name__ = op.name
    return call
