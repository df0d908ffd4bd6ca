"""The report: what stands in the file and in the terminal, for whole, killed and growing runs."""

import base64
import hashlib
import json
import os
import re
import zlib
from dataclasses import asdict

import numpy as np
import pytest

from torchbp.cli import main
from torchbp.monitor._diagnosis import Verdict
from torchbp.monitor._journal import Journal
from torchbp.tensorboard import EventWriter, Layout, read
from torchbp.tensorboard._bundle import bundle

HOSTILE = '</script><script>alert("1")</script>'
ALERT = Verdict("vanishing", "alert", "blocks.1", 3, None, "tiny", "rule", "source", "try it")


def write(folder, layers=3, steps=20, *, verdicts=(ALERT,), names=None, close=True):
    rng = np.random.default_rng(0)
    names = names or tuple(f"blocks.{i}" for i in range(layers))
    parameters = tuple(f"{n}.{p}" for n in names for p in ("weight", "bias"))
    signal = Layout("error_signal", "layer", names, logarithm=True)
    sampled = [Layout(q, "layer", names) for q in ("layer_gradient_norm", "rms")]
    dead = Layout("dead_share", "layer", names)
    ratio = Layout("update_ratio", "parameter", parameters)
    every = Layout("gradient_norm", "parameter", parameters)
    writer = EventWriter(folder)
    for step in range(steps):
        writer.scalar("loss/train", step, 1 / (step + 1))
        writer.vector(every, step, np.exp(rng.normal(size=len(parameters))))
        if step % 10 == 0:
            writer.vector(signal, step, np.exp(rng.normal(size=len(names))))
            for layout in sampled:
                writer.vector(layout, step, np.exp(rng.normal(size=len(names))))
            writer.vector(dead, step, rng.integers(0, 65, len(names)) / 64)
            writer.vector(ratio, step, np.exp(rng.normal(size=len(parameters))))
    Journal(writer).verdicts(step, list(verdicts))
    writer.close() if close else writer._file.close()
    return writer.path


def data(path):
    page = path.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="torchbp-data">(.*?)</script>', page)
    return json.loads(found[1])


def unpacked(matrix):
    planar = np.frombuffer(zlib.decompress(base64.b64decode(matrix["data"])), np.uint8)
    header = matrix["header"]
    shape = len(header["planes"]), len(header["steps"]), len(header["entries"])
    return planar.reshape(4, -1).T.copy().view("<f4").reshape(shape)


# ------------------------------------------------------------------------------------ the file
def test_the_file_holds_what_the_run_holds(tmp_path):
    write(tmp_path / "run")
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "run"), "-o", str(out)]) == 1
    held = data(out)
    (line,) = held["runs"]["runs"]
    assert line["run"] == "run"
    run = read(tmp_path / "run")
    for name, series in run.vectors.items():
        matrix = held["matrices"]["run"][name]
        assert matrix["header"]["exact"]
        np.testing.assert_array_equal(unpacked(matrix)[0], series.values)
        assert matrix["header"]["steps"] == series.steps.tolist()
    assert held["overviews"]["run"]["verdicts"] == [
        asdict(ALERT) | {"quantities": ["error_signal"]}
    ]
    assert held["left_out"] == {"run": []}


def test_nothing_is_loaded_and_only_our_scripts_run(tmp_path):
    write(tmp_path / "run")
    out = tmp_path / "report.html"
    main(["report", str(tmp_path / "run"), "-o", str(out)])
    page = out.read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    scripts = re.findall(r"<script(?: type=\"module\")?>(.*?)</script>", page, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert (len(scripts), len(styles)) == (2, 2)
    assert "The MIT License" in scripts[0], "uPlot's own"
    for kind, texts in (("script-src", scripts), ("style-src", styles)):
        hashes = [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in texts]
        assert parts[kind] == " ".join(f"'sha256-{h}'" for h in hashes)
    assert not re.search(
        r"<(link|img|iframe)|\ssrc=|href=",
        re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL),
    )


def test_hostile_names_stay_text(tmp_path, capsys):
    folder = tmp_path / "runs" / "a\x1b[31mb"
    write(folder, names=(HOSTILE, "\x1b]0;x\x07", "<!--"))
    out = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "runs"), "-o", str(out)]) == 1
    assert "\x1b" not in capsys.readouterr().out
    page = out.read_text("utf-8")
    assert page.count("</script>") == 3
    assert page.count("<!--") == 0
    names = [n for e in data(out)["overviews"]["a\x1b[31mb"]["entries"] for n in e["names"]]
    assert HOSTILE in names


def test_a_run_of_100_layers_and_1000_steps_takes_400_kb(tmp_path):
    write(tmp_path / "run", layers=100, steps=1000)
    out = tmp_path / "report.html"
    main(["report", str(tmp_path / "run"), "-o", str(out)])
    assert out.stat().st_size <= 400_000
    held = data(out)
    first = held["matrices"]["run"]["error_signal"]["header"]
    assert first["exact"]
    assert len(first["steps"]) == 100
    assert "gradient_norm" in held["left_out"]["run"], "it says what is missing"
    assert not {"layer_gradient_norm", "update_ratio", "dead_share"} & set(held["left_out"]["run"])


def test_more_samples_than_fit_are_told_in_buckets(tmp_path):
    write(tmp_path / "run", layers=60, steps=6000)
    out = tmp_path / "report.html"
    main(["report", str(tmp_path / "run"), "-o", str(out)])
    assert out.stat().st_size <= 410_000
    matrix = data(out)["matrices"]["run"]["error_signal"]
    assert matrix["header"]["planes"] == ["max", "min", "last"]
    values, series = unpacked(matrix), read(tmp_path / "run").vectors["error_signal"]
    assert values[0].max() == series.values.max()
    assert values[1].min() == series.values.min()


# -------------------------------------------------------------------------------- the terminal
def test_exit_status(tmp_path, capsys):
    over = Verdict("spike", "alert", "", 3, 5, "e", "t", "s", "a")
    mild = Verdict("dead", "warning", "blocks.0", 3, None, "e", "t", "s", "a")
    for name, verdicts, status in (
        ("alert", [ALERT], 1), ("over", [over], 0), ("mild", [mild], 0), ("well", [], 0),
    ):  # fmt: skip
        write(tmp_path / name, verdicts=verdicts)
        assert main(["report", str(tmp_path / name)]) == status, name
    out = capsys.readouterr().out
    assert "ALERT   vanishing at blocks.1 since step 3" in out
    assert "ALERT   spike since step 3 until step 5" in out
    assert "nothing is wrong" in out
    assert main(["report", str(tmp_path)]) == 1, "one of several"


@pytest.mark.parametrize("arguments", [["nowhere"], ["empty"], ["."], ["run", "-o", "no/r.html"]])
def test_what_can_not_be_done_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    (tmp_path / "empty").mkdir()
    if "run" in arguments:
        write(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main(["report", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_killed_and_growing_runs(tmp_path, capsys):
    path = write(tmp_path / "run", close=False)
    path.write_bytes(path.read_bytes()[:-10])
    main(["report", str(tmp_path / "run")])
    assert "running, last written 0 min ago" in capsys.readouterr().out
    os.utime(path, (0, 0))
    main(["report", str(tmp_path / "run")])
    assert "broken off, last written" in capsys.readouterr().out


def test_an_older_run_shows_its_text(tmp_path, capsys):
    with EventWriter(tmp_path) as writer:
        writer.vector(Layout("error_signal", "layer", ("a",)), 0, [1.0])
        writer.text("verdicts", 0, "| alert | vanishing |")
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "text only" in out
    assert "| alert | vanishing |" in out


def test_several_runs_are_compared(tmp_path, capsys):
    write(tmp_path / "one")
    write(tmp_path / "two", verdicts=[])
    main(["report", str(tmp_path / "two"), str(tmp_path / "one"), "--layers", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["run", "steps"]
    assert lines[2].split() == ["one", "20", "1", "→", "0.05", *lines[2].split()[5:-1], "vanishing"]
    assert lines[3].split()[-1] == "none"
    assert main(["report", str(tmp_path)]) == 1, "the folder of both"


def test_many_verdicts_of_a_kind_are_told_once(tmp_path, capsys):
    many = [
        Verdict("dead", "alert", f"blocks.{i}", i, None, f"e{i}", "r", "s", "a") for i in range(9)
    ]
    write(tmp_path / "run", verdicts=[*many, ALERT])
    main(["report", str(tmp_path / "run")])
    rows = [row.strip() for row in capsys.readouterr().out.splitlines()]
    assert sum(row.startswith("ALERT   dead at blocks.") for row in rows) == 5
    assert "and 4 more of dead; --json - tells all" in rows
    assert sum(row.startswith("rule") for row in rows) == 2, "one of dead, one of vanishing"


def test_json(tmp_path, capsys):
    write(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "--json", "-"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["version"], told["status"]) == (1, 1)
    assert told["runs"][0]["verdicts"][0]["kind"] == "vanishing"
    main(["report", str(tmp_path / "run"), "--json", str(tmp_path / "out.json")])
    assert json.loads((tmp_path / "out.json").read_text()) == told
    assert "ALERT" in capsys.readouterr().out


def test_the_layers_with_verdicts_are_among_those_printed(tmp_path, capsys):
    last = Verdict("dead", "warning", "blocks.77", 0, None, "e", "t", "s", "a")
    write(tmp_path / "run", layers=100, verdicts=[last])
    main(["report", str(tmp_path / "run"), "--layers", "5"])
    rows = [row for row in capsys.readouterr().out.splitlines() if "→" in row]
    assert len(rows) == 5
    assert any("blocks.77" in row for row in rows)


# ---------------------------------------------------------------------------------- the bundle
def test_modules_are_laid_behind_what_they_need(tmp_path):
    (tmp_path / "a.js").write_text(
        'import { b } from "./b.js";\nimport {\n  c,\n  d,\n} from "./c.js";\n// gone\nb(c, d);\n'
    )
    (tmp_path / "b.js").write_text(
        'import { c } from "./c.js";\nexport function b() { return c; }\n'
    )
    (tmp_path / "c.js").write_text(
        "/** gone */\nexport const c = 1;\nexport const d = `\n  kept`;\n"
    )
    assert bundle(tmp_path / "a.js") == (
        "/** gone */\nconst c = 1;\nconst d = `\n  kept`;\nfunction b() { return c; }\nb(c, d);"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('import x from "./x.js";', "expected `import"),
        ("export default 1;", "expected `import"),
        ('export { a } from "./a.js";', "expected `import"),
        ('import { a } from "./a.js";', "no cycle"),
        ('const a = "</script>";', "no </script"),
    ],
)
def test_a_module_of_another_form_is_refused(tmp_path, text, said):
    (tmp_path / "a.js").write_text(text)
    with pytest.raises(ValueError, match=said):
        bundle(tmp_path / "a.js")
