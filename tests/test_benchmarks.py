"""benchmarks/run.py: what a run writes, and what of the file it leaves."""

import json

import pytest

from benchmarks import run


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Return a run of the benchmark whose rows say in which run they were made, and what stands in the file then."""
    monkeypatch.setattr(run, "DATA", tmp_path)
    monkeypatch.setattr(run, "settle_allocator", lambda: None)
    runs = iter(range(1, 9))

    def bench(*arguments):
        number = next(runs)

        def measure(op, n, dtype, device, threads, seconds):
            names = {"op": op.name, "n": n, "dtype": dtype, "threads": threads}
            return {**names, "ratio": number, "torchbp_bytes": 1, "torch_bytes": 1}

        monkeypatch.setattr(run, "measure", measure)
        monkeypatch.setattr("sys.argv", ["run.py", *arguments, "--dtypes", "float32"])
        assert run.main() == 0
        (path,) = tmp_path.iterdir()
        rows = json.loads(path.read_text())["rows"]
        return {(r["op"], r["n"], r["threads"]): r["ratio"] for r in rows}

    return bench


def test_rows_of_other_configurations_stay(bench):
    bench("relu", "tanh", "--sizes", "64", "4096", "--threads", "1")
    assert bench("relu", "--sizes", "64", "--threads", "1", "2") == {
        ("relu", 64, 1): 2,
        ("relu", 4096, 1): 1,
        ("tanh", 64, 1): 1,
        ("tanh", 4096, 1): 1,
        ("relu", 64, 2): 2,
    }


def test_resume_measures_what_is_not_there(bench):
    bench("relu", "--sizes", "64", "--threads", "1")
    found = bench("relu", "--sizes", "64", "4096", "--threads", "1", "--resume")
    assert found == {("relu", 64, 1): 1, ("relu", 4096, 1): 2}
