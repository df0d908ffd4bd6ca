"""Mechanical mutants: a few of many kinds, which gradcheck sees; an op that is not changed differs nowhere."""

import ast

import pytest
import torch

from tests.verify.mutants import sweep, twins
from tests.verify.mutants.__main__ import sampled
from tests.verify.mutants.changes import changed, changes
from tests.verify.mutants.running import home, outcome_of, warm
from tests.verify.mutants.sources import file_of, gradient_functions
from torchbp.ops._op import all_ops

# The first change of the kind to the function, and the check that sees it.
SEEN = [
    ("squared_relu", "_times_derivative", "arithmetic", "values"),
    ("softmax", "SoftmaxFunction.jvp", "sign", "forward_mode"),
    ("tanhshrink", "_times_derivative", "operand dropped", "low_precision"),
    ("hardsigmoid", "_times_derivative", "constant", "sizes"),
    ("leaky_relu", "LeakyReLUFunction.setup_context", "branches exchanged", "arguments"),
]


@pytest.fixture(scope="module", autouse=True)
def warmed():
    warm()


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA cannot be used in a forked process")
@pytest.mark.parametrize(("op", "function", "kind", "check"), SEEN)
def test_change_is_seen(op, function, kind, check):
    file = file_of(home(all_ops()[op])[0])
    change = next(c for c in changes(file, function) if c.kind == kind)
    outcome = outcome_of(op, change)
    assert outcome.kind == "caught", (str(change), outcome)
    assert outcome.detail.startswith(check), (str(change), outcome)


@pytest.mark.skipif(torch.cuda.is_initialized(), reason="CUDA cannot be used in a forked process")
def test_change_to_a_right_twin_is_seen():
    own = twins.changes_of("twentyninth_losses", "normal_score.Score.backward")
    outcome = twins.outcome_of(next(c for c in own if c.kind == "operand dropped"))
    assert outcome.kind == "caught", outcome
    assert outcome.detail.startswith("values"), outcome


def test_sample_of_twins_has_one_change_of_each():
    chosen = twins.sampled(0, 60)
    assert chosen == twins.sampled(0, 60) != twins.sampled(1, 60)
    assert len({(c.module, c.function) for c in chosen}) == 60
    assert len({c.kind for c in chosen}) > 20


def test_what_is_not_changed_differs_nowhere():
    op = all_ops()["softshrink"]
    assert sweep.difference(op, op) == ("", "")


def test_another_op_differs():
    ops = all_ops()
    found, _ = sweep.difference(ops["relu"], ops["relu6"])
    assert found


def test_sample_is_even_and_each_change_is_one():
    some = ("elu", "huber_loss", "layer_norm", "linear", "softmax")
    chosen = sampled(0, 40, some)
    assert chosen == sampled(0, 40, some) != sampled(1, 40, some)
    ops = [name for name, _ in chosen]
    assert [ops.count(name) for name in some] == [8] * 5
    assert len({change.kind for _, change in chosen}) > 15
    for _, change in chosen:
        file = file_of(change.module)
        text = changed(file.text, change)
        assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(file.text))


def test_only_what_computes_gradients_is_changed():
    module = home(all_ops()["huber_loss"])[0]
    names = {name for _, name in gradient_functions(module, "huber_loss")}
    methods = {"setup_context", "backward", "jvp"}
    assert names == {f"HuberLossFunction.{m}" for m in methods} | {"_gradient"}
