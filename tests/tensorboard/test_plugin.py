"""The tab's server inside a real TensorBoard: routes, hostile names, garbage, and a module that is broken."""

import json
import shutil
import struct
import subprocess
import sys
import threading
import time
from itertools import count
from urllib.parse import urlencode

import numpy as np
import pytest
from tensorboard import default, program
from tensorboard.backend import application
from werkzeug.test import Client

from torchbp.tensorboard import EventWriter, Layout, is_absent, read, with_absent
from torchbp.tensorboard.loader import Loader

HOSTILE = ['<img src=x onerror="alert(1)">', "a'b\"c&d", "..%2f..", "% run", "ä/ö"]
LAYOUT = Layout("error_signal", "layer", ("a", '"><script>', "c"), ("Linear",) * 3, "1", "t", True)
VERDICT = {
    "kind": "vanishing",
    "severity": "alert",
    "layer": '"><script>',
    "step": 3,
    "until": None,
    "evidence": "<b>",
    "threshold": "t",
    "source": "s",
    "advice": "a",
    "quantities": ["error_signal"],
}


def write_run(folder, steps=range(5)):
    with EventWriter(folder) as writer:
        for step in steps:
            values = with_absent([step, np.nan, np.inf], np.array([step != 2, True, True]))
            writer.vector(LAYOUT, step, values)
            writer.scalar("loss/train", step, 1 / (step + 1))
        writer.record("verdicts", 3, [[0, VERDICT]])
        writer.record("run", 3, {"optimizer": "Adam", "lr": 0.1})


class Served:
    """TensorBoard's own application with all of its plugins, without a socket."""

    def __init__(self, *arguments):
        board = program.TensorBoard(plugins=default.get_plugins())
        board.configure(("tensorboard", *arguments, "--load_fast=false", "--reload_interval=0"))
        self.flags = board.flags
        provider, multiplexer = board._make_data_provider()
        app = application.TensorBoardWSGIApp(
            board.flags, board.plugin_loaders, provider, deprecated_multiplexer=multiplexer
        )
        self._client = Client(app)

    def get(self, path, status=200, **arguments):
        answer = self._client.get(f"{path}?{urlencode(arguments)}")
        assert answer.status_code == status, answer.get_data(as_text=True)
        return answer

    def ours(self, route, status=200, **arguments):
        return self.get(f"/data/plugin/torchbp/{route}", status, **arguments)

    def matrix(self, route="matrix", **arguments):
        data = self.ours(route, **arguments).get_data()
        (length,) = struct.unpack_from("<I", data)
        header = json.loads(data[4 : 4 + length])
        shape = len(header["planes"]), len(header["steps"]), len(header["entries"])
        return header, np.frombuffer(data, "<f4", offset=4 + length).reshape(shape)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    logdir = tmp_path_factory.mktemp("logs")
    for name in ["plain", *HOSTILE]:
        write_run(logdir / name)
    with EventWriter(logdir / "foreign") as writer:
        writer.scalar("accuracy", 0, 0.5)
    next((logdir / "foreign").iterdir()).rename(logdir / "foreign" / "events.out.tfevents.1.x")
    for name, content in (("garbage", b"torchbp" * 99), ("zeros", bytes(500)), ("empty", b"")):
        (logdir / name).mkdir()
        (logdir / name / "events.out.tfevents.1.torchbp").write_bytes(content)
    (logdir / "loop").symlink_to(logdir)
    (logdir / "secret.txt").write_text("secret")
    return logdir


@pytest.fixture(scope="module")
def served(logdir):
    return Served("--logdir", str(logdir))


def test_tensorboard_lists_the_tab_at_once(served):
    listed = served.get("/data/plugins_listing").json
    assert listed["torchbp"]["enabled"]
    assert listed["torchbp"]["tab_name"] == "Grad flow"
    assert listed["scalars"]
    module = listed["torchbp"]["loading_mechanism"]["module_path"]
    assert served.get(module).mimetype == "text/javascript"


def test_where_nothing_is_ours_the_tab_is_not_active(tmp_path):
    with EventWriter(tmp_path) as writer:
        writer.scalar("accuracy", 0, 0.5)
    writer.path.rename(tmp_path / "events.out.tfevents.1.x")
    served = Served("--logdir", str(tmp_path))
    assert not served.get("/data/plugins_listing").json["torchbp"]["enabled"]
    assert served.ours("runs").json["runs"] == []


def test_runs(served):
    told = served.ours("runs").json
    assert told["message"] == ""
    runs = {line["run"]: line for line in told["runs"]}
    assert set(runs) == {"plain", *HOSTILE}
    line = runs["plain"]
    assert line["verdicts"] == {"alert": 1, "warning": 0, "info": 0}
    assert (line["first_step"], line["last_step"], line["layers"]) == (0, 4, 3)
    assert (line["state"], line["steps"]) == ("finished", 5)
    assert line["hparams"] == {"optimizer": "Adam", "lr": 0.1}


def test_overview(served):
    told = served.ours("overview", run="plain").json
    quantities = {q["name"]: q for q in told["quantities"]}
    signal = quantities["error_signal"]
    assert (signal["title"], signal["unit"], signal["logarithm"]) == ("t", "1", True)
    assert (signal["points"], signal["first_step"], signal["last_step"]) == (5, 0, 4)
    assert told["entries"][signal["entries"]] == {
        "names": list(LAYOUT.names),
        "kinds": ["Linear"] * 3,
    }
    assert quantities["loss/train"]["axis"] == "run"
    assert told["verdicts"] == [VERDICT]


def test_values_are_those_of_the_file(served, logdir):
    header, values = served.matrix(run="plain", quantity="error_signal")
    assert header["exact"]
    written = read(logdir / "plain").vectors["error_signal"]
    assert header["steps"] == written.steps.tolist()
    np.testing.assert_array_equal(values[0].view(np.uint32), written.values.view(np.uint32))
    assert is_absent(values[0])[2].tolist() == [True, False, False]
    header, values = served.matrix(
        run="plain", quantity="error_signal", columns=2, planes="last,max"
    )
    assert header["planes"] == ["last", "max"]
    assert values[0, :, 0].tolist()[-1] == 4
    header, values = served.matrix(
        run="plain", quantity="error_signal", first=1, last=3, entries="2,0"
    )
    assert header["steps"] == [1, 2, 3]
    assert values[0, 0].tolist() == [np.inf, 1]
    header, values = served.matrix("profile", run="plain", quantity="error_signal", step=3.2)
    assert header["steps"] == [3]
    assert values[0, 0, 0] == 3


@pytest.mark.parametrize("run", HOSTILE)
def test_hostile_names_are_data(served, run):
    answer = served.ours("overview", run=run)
    assert answer.mimetype == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.json["run"] == run
    header, _ = served.matrix(run=run, quantity="error_signal")
    assert header["run"] == run


@pytest.mark.parametrize(
    ("route", "arguments", "status", "said"),
    [
        ("overview", {"run": "../logs/plain"}, 404, "no run '../logs/plain'"),
        ("overview", {"run": "loop/plain"}, 404, "no run"),
        ("overview", {"run": "/etc"}, 404, "no run '/etc'"),
        ("overview", {}, 404, "no run ''"),
        ("matrix", {"run": "plain", "quantity": "nothing"}, 404, "no quantity 'nothing'"),
        ("matrix", {"run": "plain", "quantity": "error_signal", "columns": "x"}, 400, "number for columns"),
        ("matrix", {"run": "plain", "quantity": "error_signal", "columns": 0}, 400, "1 to 20000"),
        ("matrix", {"run": "plain", "quantity": "error_signal", "columns": "nan"}, 400, "number"),
        ("matrix", {"run": "plain", "quantity": "error_signal", "entries": "3"}, 400, "0 to 2"),
        ("matrix", {"run": "plain", "quantity": "error_signal", "entries": "-1"}, 400, "0 to 2"),
        ("matrix", {"run": "plain", "quantity": "error_signal", "planes": "mean"}, 400, "planes of max"),
        ("profile", {"run": "plain", "quantity": "error_signal", "step": ""}, 200, None),
        ("profile", {"run": "plain", "quantity": "error_signal", "step": "two"}, 400, "number for step"),
    ],
)  # fmt: skip
def test_a_wrong_question_gets_a_sentence(served, route, arguments, status, said):
    answer = served.ours(route, status, **arguments)
    if said:
        assert said in answer.json["error"]


@pytest.mark.parametrize(
    "name",
    ["nothing.js", "../plugin.py", "..%2Fplugin.py", "%2e%2e/loader.py", "uPlot.LICENSE", "",
     "sub/index.js/../../plugin.py"],
)  # fmt: skip
def test_only_static_files_are_served(served, name):
    answer = served._client.get(f"/data/plugin/torchbp/static/{name}")
    assert answer.status_code in {301, 404}
    assert b"def " not in answer.get_data()


def test_an_error_in_a_route_is_a_message(served, monkeypatch):
    from torchbp.tensorboard._book import Page

    monkeypatch.setattr(Page, "overview", lambda self: 1 / 0)
    answer = served.ours("overview", 500, run="plain")
    assert answer.json == {"error": "ZeroDivisionError: division by zero"}
    assert served.get("/data/plugins_listing").json["scalars"]


def test_a_run_that_grows_and_one_that_goes(tmp_path):
    with EventWriter(tmp_path / "a") as writer:
        writer.vector(LAYOUT, 0, [1, 2, 3])
        served = Served("--logdir", str(tmp_path))
        (before,) = served.ours("runs").json["runs"]
        writer.vector(LAYOUT, 1, [4, 5, 6])
        (after,) = served.ours("runs").json["runs"]
        assert before["version"] != after["version"]
        assert after["last_step"] == 1
        assert served.matrix(run="a", quantity="error_signal")[1][0].tolist() == [
            [1, 2, 3],
            [4, 5, 6],
        ]
    write_run(tmp_path / "b")
    assert {line["run"] for line in served.ours("runs").json["runs"]} == {"a", "b"}
    writer.path.unlink()
    assert [line["run"] for line in served.ours("runs").json["runs"]] == ["b"]
    served.ours("overview", 404, run="a")
    shutil.rmtree(tmp_path / "b")
    served.ours("overview", 404, run="b")


def test_many_threads(served):
    answers = []

    def ask():
        answers.append(served.matrix(run="plain", quantity="error_signal")[1].tobytes())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    assert len(set(answers)) == 1


def test_path_prefix(logdir):
    served = Served("--logdir", str(logdir), "--path_prefix", "/deep/er")
    assert served.get("/deep/er/data/plugin/torchbp/runs").json["runs"]


def test_logdir_spec_and_remote_folders(logdir, tmp_path):
    write_run(tmp_path)
    served = Served("--logdir_spec", f"one:{logdir / 'plain'},{tmp_path}")
    assert {line["run"] for line in served.ours("runs").json["runs"]} == {"one", "."}
    from tensorboard.plugins.base_plugin import TBContext

    from torchbp.tensorboard.plugin import _roots

    roots, message = _roots(TBContext(logdir="gs://bucket/logs"))
    assert roots == []
    assert "local folders only, not gs://bucket/logs" in message


def test_one_sample_a_tag_is_asked_for(served, logdir):
    assert served.flags.samples_per_plugin["torchbp"] == 1
    own = Served("--logdir", str(logdir), "--samples_per_plugin", "torchbp=7")
    assert own.flags.samples_per_plugin["torchbp"] == 7
    Loader().fix_flags(object())


@pytest.mark.parametrize("broken", ["plugin", "_book", "_proto"])
def test_a_module_that_raises_becomes_a_message(logdir, monkeypatch, broken):
    for name in [n for n in sys.modules if n.startswith("torchbp.tensorboard._")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torchbp.tensorboard.plugin", raising=False)
    monkeypatch.setitem(sys.modules, f"torchbp.tensorboard.{broken}", None)  # importing it raises
    served = Served("--logdir", str(logdir))
    listed = served.get("/data/plugins_listing").json
    assert "scalars" in listed
    module = listed["torchbp"]["loading_mechanism"]["module_path"]
    script = served.get(module).get_data(as_text=True)
    assert "torchbp could not be loaded" in script
    assert f"torchbp.tensorboard.{broken}" in script


def test_nothing_of_it_imports_torch(logdir):
    code = (
        "import sys; from torchbp.tensorboard.loader import Loader;"
        "from tensorboard.plugins.base_plugin import TBContext;"
        f"p = Loader().load(TBContext(logdir={str(logdir)!r}));"
        "assert type(p).__name__ == 'Plugin'; p._book.lines(); p._book.page('plain').overview();"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_entry_point_is_declared():
    assert Loader in default.get_dynamic_plugins()


def test_what_is_still_to_be_read_is_said(logdir, monkeypatch):
    from torchbp.tensorboard._book import Book

    book = Book([("", logdir)], patience=-1)
    lines, unread = book.lines()
    assert (lines, unread > 5) == ([], True)
    clock = count()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    read, unread = Book([("", logdir)], patience=5).lines()
    assert 0 < len(read) <= 5 < unread + 5
