"""Builds the library of compiled formulas: every op is run once to list what it asks for, then a compiler is called."""

import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchbp.ops._op import Op, all_ops
from torchbp.ops._samples import Make, Sample
from torchbp.ops.kernels import _library
from torchbp.ops.kernels._flags import of_all_threads
from torchbp.ops.kernels._loop import MANY

__all__ = ["DTYPES", "asked_for", "build", "compiler", "many"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COMPILERS = ("c++", "g++", "clang++")
_A_FILE = 8  # kernels a source file: one takes a quarter of a second, the headers as long


def compiler() -> str | None:
    """Return the C++ compiler of this machine, ``$CXX`` first; ``None`` where there is none."""
    given = os.environ.get("CXX")
    return next((c for c in ((given,) if given else _COMPILERS) if shutil.which(c)), None)


def asked_for(
    ops: dict[str, Op] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> dict[str, str]:
    """Return the sources, by name, of the formulas that ``ops`` run on many elements, with their samples' options."""
    with _library.recording() as sources, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_all_threads(1)
        for op in (ops or all_ops()).values():
            for dtype in dtypes:
                for sample in many(op, dtype):
                    _step(op, sample)
                    _step(op, sample, all_of_them=True)
                _step(op, op.benchmark(Make(dtype), 2 * MANY))  # what is most usual
    return dict(sources)


def many(op: Op, dtype: torch.dtype) -> Iterator[Sample]:
    """Yield the op's samples, made as long as kernels want them: by rows, for some ops compare all elements of one."""
    for sample in op.samples(Make(dtype)):
        first = next((a for a in sample.args if isinstance(a, Tensor)), None)
        if first is None or first.dtype != dtype or first.dim() < 2 or not first.numel():
            continue
        rows, times = first.shape[0], -(-2 * MANY // first.numel())  # what takes halves has as many

        def longer(t: Tensor, rows: int = rows, times: int = times) -> Tensor:
            if not t.dim() or t.shape[0] != rows:
                return t
            return torch.cat([t.detach()] * times).requires_grad_(t.requires_grad)

        yield sample.over_tensors(longer)


def _step(op: Op, sample: Sample, *, all_of_them: bool = False) -> None:
    """Run forward and backward, with a gradient for each tensor that wants one, or for each that may have one.

    What does not fit is left out.
    """
    leaves = [t for t in sample.tensors() if t.requires_grad]
    if all_of_them:
        leaves = [t.requires_grad_() for t in sample.tensors() if t.is_floating_point()]
    try:
        made: Any = op.function(*sample.args, **sample.kwargs)
        for y in made if isinstance(made, tuple) else (made,):
            torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True, retain_graph=True)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return


def build(
    sources: dict[str, str], file: Path, progress: Callable[[int, int], object] = lambda *_: None
) -> None:
    """Compile ``sources`` into the shared library ``file``, on all cores.

    Args:
        sources: What :func:`asked_for` returns.
        file: Replaced in one step, when all has been compiled.
        progress: Called with how many kernels are done, and how many there are.

    Raises:
        RuntimeError: There is no compiler, or it fails: with what it says.
    """
    command = compiler()
    if command is None:
        message = f"kernels: expected a C++ compiler ({', '.join(_COMPILERS)} or $CXX), got none; install one"
        raise RuntimeError(message)
    file.parent.mkdir(parents=True, exist_ok=True)
    ordered = [sources[name] for name in sorted(sources)]
    parts = [ordered[i : i + _A_FILE] for i in range(0, len(ordered), _A_FILE)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        work = Path(folder)
        call = [command, *_flags(command, work), "-iquote", str(_library.HERE)]

        def compile_part(i: int) -> Path:
            source, made = work / f"{i}.cpp", work / f"{i}.o"
            source.write_text(_file(parts[i]))
            _run([*call, "-c", str(source), "-o", str(made)])
            return made

        jobs = {pool.submit(compile_part, i): i for i in range(len(parts))}
        made, done = [], 0
        for job in as_completed(jobs):
            made.append(str(job.result()))
            done += len(parts[jobs[job]])
            progress(done, len(ordered))
        library = work / file.name
        _run([*call, "-shared", *made, "-o", str(library)])
        beside = file.with_suffix(f".{os.getpid()}")
        shutil.copyfile(library, beside)
        beside.replace(file)


def _flags(command: str, work: Path) -> list[str]:
    """Return the compiler's options; without threads where it has no OpenMP, as Apple's has not."""
    flags = _library.flags().split()
    source = work / "threads.cpp"
    source.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
    try:
        _run([command, *flags, "-shared", str(source), "-o", str(work / "threads.so")])
    except RuntimeError:
        return ["-fopenmp-simd" if flag == "-fopenmp" else flag for flag in flags]
    return flags


def _file(kernels: list[str]) -> str:
    return '#include "loop.h"\n\nusing namespace torchbp;\n\n' + "\n".join(kernels)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"kernels: {command[0]} failed:\n{done.stderr.strip()}")
