"""Verdicts as programs read them, from the monitor to the file and back; and what stock tabs get."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata as hparams
from torch import nn

import torchbp
from torchbp.monitor._diagnosis import Verdict
from torchbp.monitor._journal import Journal
from torchbp.tensorboard import EventWriter, is_absent, read
from torchbp.tensorboard._index import Index
from torchbp.tensorboard._verdicts import about, verdicts, verdicts_text


def verdict(kind="dead", severity="alert", layer="a", step=0, until=None):
    return Verdict(kind, severity, layer, step, until, "e", "t", "s", "a")


def train(folder, model, *, steps=30, **settings):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
    with torchbp.watch(model, optimizer, log_dir=folder, sample_every=2, **settings) as monitor:
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.log_loss(train=loss, val=loss)
    return monitor


def deep(kind):
    layers = [m for _ in range(12) for m in (nn.Linear(8, 8), kind())]
    return nn.Sequential(*layers, nn.Linear(8, 3))


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sick")
    return train(folder, deep(nn.Sigmoid)), folder


def test_what_the_monitor_found_is_in_the_file(sick):
    monitor, folder = sick
    found = read(folder).verdicts
    assert {v["kind"] for v in found} >= {"vanishing"}
    written = [v | {"quantities": None} for v in found]
    expected = [asdict(v) | {"quantities": None} for v in monitor.verdicts]
    assert sorted(written, key=json.dumps) == sorted(expected, key=json.dumps)
    assert next(v for v in found if v["kind"] == "vanishing")["quantities"] == ["error_signal"]


def test_changes_are_folded_and_the_worst_comes_first(tmp_path):
    with EventWriter(tmp_path) as writer:
        journal = Journal(writer)
        mild, over = verdict(severity="warning", step=5), verdict(layer="b", step=1, until=9)
        journal.verdicts(6, [mild, verdict(layer="b", step=1)])
        journal.verdicts(10, [mild, over, verdict(kind="spike", severity="info", step=2)])
        journal.verdicts(12, [mild, over, verdict(kind="spike", severity="info", step=2)])
    run = read(tmp_path)
    told = [(v["severity"], v["layer"], v["step"], v["until"]) for v in run.verdicts]
    assert told == [("warning", "a", 5, None), ("info", "a", 2, None), ("alert", "b", 1, 9)]
    assert [len(changes) for _, changes in run.records["verdicts"]] == [2, 2], "only what changed"


def test_nothing_wrong_is_told_from_not_known(tmp_path):
    with EventWriter(tmp_path) as writer:
        writer.text("verdicts", 0, "an older version")
    index = Index(tmp_path)
    index.refresh()
    assert verdicts(index) is None
    assert verdicts_text(index) == "an older version"
    assert about(index) == {}
    with EventWriter(tmp_path) as writer:
        Journal(writer).verdicts(1, [])
    index.refresh()
    assert verdicts(index) == []
    assert verdicts_text(index) == "Nothing is wrong so far."


def test_where_a_run_is_resumed_what_stood_ends(tmp_path):
    with EventWriter(tmp_path) as writer:
        Journal(writer).verdicts(10, [verdict(step=3)])
    with EventWriter(tmp_path) as writer:
        writer.scalar("loss/train", 20, 1.0)
        Journal(writer).verdicts(25, [verdict(step=21)])
    found = read(tmp_path).verdicts
    assert [(v["step"], v["until"]) for v in found] == [(21, None), (3, 20)]


@pytest.mark.parametrize(
    "record",
    [
        "no list", [1], [[0]], [["0", {}]], [[0, {}]],
        [[0, asdict(verdict()) | {"severity": "fatal"}]],
        [[0, asdict(verdict()) | {"step": "0"}]],
        [[0, asdict(verdict()) | {"layer": None}]],
    ],
    ids=repr,
)  # fmt: skip
def test_a_record_that_is_not_as_we_write_it_is_passed_over(tmp_path, record):
    with EventWriter(tmp_path) as writer:
        writer.record("verdicts", 0, record)
        writer.record("verdicts", 1, [[7, asdict(verdict())]])
    assert [v["kind"] for v in read(tmp_path).verdicts] == ["dead"]


def test_a_table_of_many_verdicts_is_cut(tmp_path):
    many = [verdict(layer=str(i), severity="warning", step=i) for i in range(80)]
    with EventWriter(tmp_path) as writer:
        Journal(writer).verdicts(0, [*many, verdict(layer="worst", step=99)])
    ((_, text),) = read(tmp_path).texts["verdicts"]
    assert "`worst`" in text.splitlines()[2]
    assert text.endswith("and 31 more")
    assert len(read(tmp_path).verdicts) == 81


def test_a_layer_that_does_not_run_is_absent_not_nan(tmp_path):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.idle, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(x).relu())

    train(tmp_path, Half(), steps=3)
    signal = read(tmp_path).vectors["error_signal"]
    gone = is_absent(signal.values)
    assert [name for name, column in zip(signal.names, gone.T, strict=True) if column.all()] == [
        "idle"
    ]
    assert gone.sum() == len(signal.steps)


def test_what_the_run_was_made_with(sick):
    index = Index(sick[1])
    index.refresh()
    told = about(index)
    assert told["optimizer"] == "SGD"
    assert told["activation"] == "Sigmoid"
    assert (told["lr"], told["momentum"], told["batch_size"]) == (0.1, 0.5, 16)
    assert told["model"] == "Sequential"


def test_hparams_has_it_for_the_run_itself(sick):
    seen = EventAccumulator(str(sick[1])).Reload()
    content = seen.SummaryMetadata(hparams.SESSION_START_INFO_TAG).plugin_data.content
    start = hparams.parse_session_start_info_plugin_data(content)
    assert start.hparams["optimizer"].string_value == "SGD"
    assert start.hparams["lr"].number_value == 0.1
    assert [p.name for p in sick[1].iterdir()] == [p.name for p in sick[1].glob("*tfevents*")], (
        "no run below the run"
    )


def test_custom_scalars_names_tags_that_are_there(sick):
    seen = EventAccumulator(str(sick[1])).Reload()
    (event,) = seen.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {c.title: list(c.multiline.tag) for part in layout.category for c in part.chart}
    tags = set(read(sick[1]).scalars)
    assert charts["loss"] == ["loss/train", "loss/val"]
    missing = [tag for chart in charts.values() for tag in chart if tag not in tags]
    assert missing == []


def test_tensorboard_shows_the_stock_data(sick):
    runs = EventMultiplexer().AddRun(str(sick[1]), "sick").Reload()
    provider = MultiplexerDataProvider(runs, "")

    def tags(listing, plugin):
        listed = listing(RequestContext(), experiment_id="", plugin_name=plugin)
        return set(listed.get("sick", {}))

    assert tags(provider.list_scalars, "scalars") == set(read(sick[1]).scalars)
    assert "verdicts" in tags(provider.list_tensors, "text")
    assert "layers/error_signal_log10" in tags(provider.list_tensors, "histograms")
    assert tags(provider.list_tensors, "hparams") == {hparams.SESSION_START_INFO_TAG}
    assert tags(provider.list_tensors, "torchbp"), "or else the tab is not active"


def test_stock_scalars_are_few(sick):
    run = read(sick[1])
    assert len(run.scalars) <= 20
    assert np.isfinite(run.scalars["loss/train"].values).all()
