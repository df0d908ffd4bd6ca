"""convert() and revert() change classes and nothing else."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import torchbp
from torchbp.swap import report, twins


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.LayerNorm(8),
        nn.ReLU(),
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.0)),
        nn.Sigmoid(),
        nn.Linear(8, 3),
    )


def trained(model: nn.Module, steps: int = 20) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, y = torch.randn(32, 6), torch.randint(3, (32,))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_every_module_has_a_twin():
    assert twins()[nn.Linear] is torchbp.nn.Linear
    assert all(theirs.__module__.startswith("torch.nn") for theirs in twins())


def test_trains_to_the_same_losses():
    torch.testing.assert_close(
        trained(torchbp.convert(network())), trained(network()), rtol=0, atol=1e-5
    )


def test_converts_in_place_and_reverts():
    model = network()
    classes = [type(m) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    assert torchbp.convert(model) is model
    converted = [type(m) for m in model.modules()]
    assert sum(c.__module__ == "torchbp.nn" for c in converted) == 8
    assert torchbp.convert(model) is model
    assert [type(m) for m in model.modules()] == converted, "twice is once"
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(state) == list(model.state_dict())
    torchbp.revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert all(
        torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True)
    )


def test_reverts_what_is_parametrized():
    model = torchbp.convert(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    for layer in (model[0], model[2]):
        weight_norm(layer)
    twin = copy.deepcopy(model)
    assert len(report(model).hand_written) == 3
    x = torch.randn(3, 4)
    want = model(x)
    torchbp.revert(model)
    assert report(model).hand_written == ()
    torch.testing.assert_close(model(x), want)
    assert len(report(twin).hand_written) == 3
    assert not any(issubclass(type(m), torchbp.nn.Linear) for m in model)
    remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), want)


def test_the_root_itself_is_converted():
    layer = nn.Linear(2, 2)
    torchbp.convert(layer)
    assert type(layer) is torchbp.nn.Linear


def test_keeps_hooks_and_optimizer():
    model = network()
    seen = []
    model[0].register_forward_hook(lambda m, a, y: seen.append(type(m)))
    model[5].weight.register_hook(lambda g: seen.append("grad"))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torchbp.convert(model)
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    assert seen == [torchbp.nn.Linear, "grad"]
    assert not torch.equal(before, model[0].weight)


def test_converted_models_copy_and_pickle():
    model = torchbp.convert(network()).eval()
    x = torch.randn(2, 6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert type(twin[0]) is torchbp.nn.Linear


class Doubled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_leaves_what_is_not_plainly_torchs():
    replaced = nn.Linear(3, 3)
    replaced.forward = lambda x: x
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    model = nn.Sequential(
        Doubled(3, 3), replaced, parametrized, nn.Conv1d(1, 1, 1), nn.Linear(3, 3)
    )
    torchbp.convert(model)
    assert [type(m).__module__ == "torchbp.nn" for m in model] == [False] * 4 + [True]
    left = {name: reason for name, _, reason in report(model).left}
    assert "subclass of Linear" in left["0"]
    assert "replaced on the instance" in left["1"]
    assert "subclass of Linear" in left["2"]
    assert "no hand-written twin" in left["3"]
    assert report(model).hand_written == (("4", "Linear"),)


def test_report_counts_layers_that_torch_lacks():
    model = torchbp.nn.Sequential(
        torchbp.nn.GradientReversal(), torchbp.nn.FeedbackAlignmentLinear(2, 2)
    )
    assert report(model).hand_written == (
        ("0", "GradientReversal"),
        ("1", "FeedbackAlignmentLinear"),
    )
    assert not report(torchbp.convert(model)).left


def test_report_before_and_after():
    model = network()
    before, after = report(model), report(torchbp.convert(model))
    assert before.convertible == after.hand_written
    assert not before.hand_written
    assert not after.convertible
    assert "8 layers are torchbp's, 0 can be converted, 0 stay torch's own" in str(after)


@pytest.mark.parametrize("verb", [torchbp.convert, torchbp.revert], ids=["convert", "revert"])
def test_refuses_what_is_no_module(verb):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got type"):
        verb(nn.Linear)


def test_refuses_a_sharded_model(single_process_group):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model[0])
    classes = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match=r"after fully_shard; convert it first"):
        torchbp.convert(model)
    assert [type(m) for m in model.modules()] == classes, "nothing is half-done"


def test_converted_before_sharding_trains(single_process_group):
    from torch.distributed.fsdp import fully_shard

    model = torchbp.convert(network())
    fully_shard(model)
    torch.testing.assert_close(trained(model), trained(network()), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch.jit and torch.ao.quantization are deprecated
def test_what_goes_by_the_exact_class_takes_a_reverted_model():
    """By isinstance a layer is torch's; by its class or its source it is not, which is told, and reverting helps."""
    model = torchbp.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())).eval()
    synchronous = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(synchronous[1]) is nn.SyncBatchNorm
    with pytest.raises(RuntimeError):
        torch.jit.script(model)
    with pytest.raises(AssertionError, match="did not find fuser method"):
        torch.ao.quantization.fuse_modules(model, [["0", "1", "2"]])
    x = torch.randn(2, 1, 5, 5)
    want = model(x)
    plain = torchbp.revert(model)
    torch.testing.assert_close(torch.jit.script(plain)(x), want)
    fused = torch.ao.quantization.fuse_modules(plain, [["0", "1", "2"]])
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), want)


def test_converting_after_compile_recompiles():
    model = network().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.randn(2, 6)
    want = compiled(x)
    torchbp.convert(compiled)
    assert type(model[0]) is torchbp.nn.Linear
    torch.testing.assert_close(compiled(x), want)


# ------------------------------------------------------------- whole networks, converted and not
class Tagger(nn.Module):
    """Embedding, a two-layer LSTM, a classifier of each position."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.output = nn.Linear(12, 4)

    def forward(self, x):
        return self.output(self.lstm(self.embedding(x))[0]).transpose(1, 2)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, dropout=0.0, activation=nn.GELU(), batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.output = nn.Linear(16, 4)

    def forward(self, x):
        return self.output(self.encoder(self.embedding(x))).transpose(1, 2)


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 4),
    )


@pytest.mark.parametrize("build", [cnn, Tagger, Transformer], ids=["cnn", "lstm", "transformer"])
def test_networks_train_to_the_same_losses(build):
    """Seed for seed, 50 steps of float32, forward, backward, loss and all."""
    losses = []
    for convert in (lambda m: m, torchbp.convert):
        torch.manual_seed(0)
        model, criterion = convert(build()), convert(nn.CrossEntropyLoss(label_smoothing=0.1))
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        x = torch.randn(16, 1, 6, 6) if build is cnn else torch.randint(11, (16, 7))
        y = torch.randint(4, (16,) if build is cnn else (16, 7))
        losses.append([])
        for _ in range(50):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    plain, converted = map(torch.tensor, losses)
    assert plain[-1] < plain[0]
    torch.testing.assert_close(converted, plain, rtol=0, atol=1e-5)


def test_converted_networks_are_traced_by_fx_as_torchs_are():
    """The same graph, layer for layer, and a model that can be reverted still."""

    class Recurrent(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x))[0])

    for build in (
        cnn,
        Tagger,
        lambda: Recurrent(nn.Linear(3, 3), nn.GRU(3, 4, batch_first=True), nn.Dropout()),
    ):
        model = build()
        plain = torch.fx.symbolic_trace(model)
        traced = torch.fx.symbolic_trace(torchbp.convert(model))
        assert [str(n) for n in traced.graph.nodes] == [str(n) for n in plain.graph.nodes]
        kinds = [type(m) for m in torchbp.revert(traced).modules()]
        assert [k.__module__ for k in kinds if k.__module__.startswith("torchbp")] == []
