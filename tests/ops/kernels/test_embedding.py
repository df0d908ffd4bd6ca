"""An embedding's gradient compiled: sums in float32, rounded once; padding, means, any number of rows and columns."""

import pytest
import torch
from torch.testing import assert_close

import torchbp.functional as F
from tests.ops.kernels.conftest import opened
from torchbp.ops.kernels import _library, over_indices

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def gradient(index, weight, v, **options):
    w = weight.clone().requires_grad_()
    return torch.autograd.grad(F.embedding(index, w, **options), w, v)[0]


def arguments(dtype, rows=900, width=77, count=50):
    """Return indices of all of the table but its last, a table, and a gradient of the rows."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(count - 1, (rows,), generator=generator)
    v = torch.randn(rows, width, generator=generator).to(dtype)
    return index, torch.zeros(count, width, dtype=dtype), v


@pytest.fixture(scope="module", autouse=True)
def _library_of_embedding():
    with _library.recording() as sources:
        for dtype in DTYPES:
            gradient(*arguments(dtype))
    assert len(sources) == len(DTYPES)
    with opened(sources):
        yield


@dtypes
@pytest.mark.parametrize("width", [1, 16, 77, 1000])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"scale_grad_by_freq": True}], ids=str)
def test_near_the_truth(dtype, width, options):
    index, weight, v = arguments(dtype, rows=20000 // width + 1, width=width)
    index = index.view(1, -1)
    v = v.view(*index.shape, width)
    with torch.no_grad():
        assert over_indices(v, index, 50, -1, mean=False) is not None
    found = gradient(index, weight, v, **options)
    truth = gradient(index, weight.double(), v.double(), **options)
    eps = torch.finfo(dtype).eps
    exact = 1e-5 if dtype == torch.float32 else eps * 1e-3
    assert_close(found.double(), truth, rtol=0.51 * eps, atol=exact * truth.abs().max().item())
    assert not found[-1].any()


def test_indices_of_32_bits_and_rows_in_the_way_of_others():
    index, weight, v = arguments(torch.bfloat16)
    turned = v.t().contiguous().t()
    assert torch.equal(gradient(index.int(), weight, turned), gradient(index, weight, v))


def test_bits_do_not_depend_on_threads():
    given = arguments(torch.float32, width=4000, count=100)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(gradient(*given))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
