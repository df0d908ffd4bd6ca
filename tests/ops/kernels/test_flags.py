"""The flags of all threads that share a kernel's work: an invalid operation in any is found, and no look is made."""

from unittest.mock import patch

import pytest
import torch

import torchbp.functional as F
from torchbp.ops import _invalid
from torchbp.ops._invalid import INVALID, at_hand_of_all
from torchbp.ops.kernels import _flags, _library, of_all_threads

N = 1 << 18
THREADS = [1, 2, 3]


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def flags(compiled):
    compiled(lambda: of_all_threads(INVALID))
    if of_all_threads(INVALID) is None:
        pytest.skip("torch's threads are not the compiler's")
    assert at_hand_of_all(N)


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("place", [0, N // 2 - 1, N // 2, N - 1])
def test_an_invalid_operation_anywhere(threads, place, flags):
    x = torch.zeros(N)
    count = of_all_threads(INVALID)
    count()
    x.mul(2)
    assert count() == 0
    x[place] = torch.inf
    x.mul(0)
    assert count() == 1
    assert count() == 0, "it was taken down"


@pytest.mark.parametrize("threads", THREADS, indirect=True)
@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_no_look_at_many_elements(name, threads, flags):
    function, x = getattr(F, name), torch.randn(N, generator=torch.Generator().manual_seed(0))
    of_all_threads(INVALID)()
    with patch.object(torch.Tensor, "sum", side_effect=AssertionError("a look")):
        function(x)
    x[[3, N - 3]] = torch.tensor([-torch.inf, torch.inf])
    assert function(x)[[3, N - 3]].tolist() == [0, torch.inf]


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_threads_that_are_others_are_found_out(threads, flags, monkeypatch):
    """A library whose function asks the calling thread alone is not believed."""
    run = _flags._compiled()
    assert run is not None
    assert _flags._tried(run, threads, INVALID) is not None

    def of_one(_, which, count):
        run(1, which, count)

    assert _flags._tried(of_one, threads, INVALID) is None
    monkeypatch.setattr(_flags, "_tried", lambda *_: None)
    _library.remembered.clear()
    assert not at_hand_of_all(N)


@pytest.mark.parametrize("threads", [2], indirect=True)
def test_without_the_library_there_is_a_look(threads, monkeypatch):
    monkeypatch.setattr(_library._State, "opened", None)
    assert not at_hand_of_all(N)
    assert _invalid.sound(torch.ones(N))
    assert not _invalid.sound(torch.full((N,), torch.nan))
