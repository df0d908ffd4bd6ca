"""The Grad flow page in a real browser, in a real TensorBoard: what is seen is what was written."""

import csv
import json
import re
from urllib.parse import unquote

import numpy as np
import pytest

from tests.tensorboard.conftest import HOSTILE, SPECIAL, SPIKE
from tests.tensorboard.page import Tab, tensorboard
from torchbp.cli import main
from torchbp.tensorboard import EventWriter, Layout, read

pytestmark = pytest.mark.browser

CARDS = ("verdicts", "heatmap", "profile", "lines", "updates", "losses", "noise")
RUN_A, LINE_0, ZONE_LINE = (0, 114, 178), (0, 114, 178), (0, 158, 115)
ZERO, NAN, INF = (158, 158, 158, 255), (214, 0, 122, 255), (255, 106, 0, 255)


def number(tooltip: str, row: int = 0) -> np.float32:
    """The value in a row of a tooltip, as exactly as it was measured."""
    return np.float32(tooltip.splitlines()[1 + row].split("\t")[1])


def test_every_view_is_drawn(tab):
    tab.open(run="sick")
    assert len(tab.colours("#heatmap canvas.cells")) > 40
    assert tab.colours("#profile canvas")[RUN_A] > 100
    assert tab.colours("#lines canvas")[LINE_0] > 100
    updates = tab.colours("#updates canvas")
    assert updates[RUN_A] > 100
    assert updates[ZONE_LINE] > 50
    assert sum(tab.colours("#updates canvas", alpha=26).values()) > 1000  # the healthy zone
    assert tab.colours("#losses canvas")[RUN_A] > 100
    assert tab.colours("#noise canvas")[RUN_A] > 20
    assert re.match(r"validation [\d.]+ % above training at step 50", tab.text("#losses .note"))
    for card in CARDS:
        assert not tab.frame.is_visible(f"#{card} .message"), card
    verdict = tab.text("#verdicts")
    assert "▲ alert" in verdict
    assert "vanishing" in verdict
    assert "Try residual connections" in verdict
    assert "Adam · lr 0.001" in tab.text(".facts")


@pytest.mark.parametrize("quantity", ["error_signal", "layer_gradient_norm", "update_ratio"])
def test_hovered_values_are_those_that_were_written(tab, logdir, quantity):
    series = read(logdir / "sick").vectors[quantity]
    tab.open(run="sick", quantity=quantity)
    for row, share in ((0, 0.3), (5, 0.5), (len(series.names) - 1, 0.95)):
        said = tab.hover(*tab.cell(row, len(series.names), share))
        step = int(re.search(r"step (\d+)", said)[1])
        assert said.startswith(series.names[row])
        assert number(said) == series.values[list(series.steps).index(step), row]


def test_values_in_the_charts_are_those_that_were_written(tab, logdir):
    run = read(logdir / "sick")
    signals = run.vectors["error_signal"]
    tab.open(run="sick", step=20)
    at = list(signals.steps).index(20)
    said = tab.hover(1, 60, "#profile .u-over")
    assert said.startswith("0.0")
    assert number(said) == signals.values[at, 0]
    said = tab.hover(1, 60, "#lines .u-over")
    assert said.startswith("step 0")
    assert number(said) == signals.values[0, 0]
    losses = run.scalars["loss/train"].values
    assert number(tab.hover(1, 60, "#losses .u-over")) == losses[0]


def test_zero_nan_inf_and_absent_are_told_apart(tab):
    tab.open(run="special")
    cells = {(0, 1): ZERO, (1, 0): NAN, (1, 1): INF}
    for (column, row), colour in cells.items():
        point = tab.cell(row, 3, (column + 0.5) / 2.1)
        assert tab.colour_at(*point) == colour
        np.testing.assert_equal(number(tab.hover(*point)), SPECIAL[column, row])
    point = tab.cell(2, 3, 0.99)
    assert "not measured" in tab.hover(*point)
    assert tab.colour_at(*point)[:3] not in {colour[:3] for colour in cells.values()}


def test_a_spike_of_one_step_is_seen_among_thousands(tab):
    tab.open(run="long")
    x, y = tab.cell(0, 2, SPIKE / 2500)
    tones = {tab.colour_at(x + offset, y) for offset in (-2, -1, 0, 1, 2)}
    assert len(tones) == 2
    said = [tab.hover(x + offset, y) for offset in (-1, 0, 1)]
    assert any(number(one) == 1000 for one in said)
    assert number(tab.hover(*tab.cell(1, 2, SPIKE / 2500))) == 1
    tab.set("#heatmap select", "min")
    said = [tab.hover(x + offset, tab.cell(1, 2, 0)[1]) for offset in (-1, 0, 1)]
    assert any(number(one) == np.float32(1e-3) for one in said)
    band = tab.colours("#lines canvas")
    tab.open(run="long", first=SPIKE - 10, last=SPIKE + 10)
    said = tab.hover(*tab.cell(0, 2, 10.5 / 20))
    assert said.startswith("a, step 1\u2009001")
    assert number(said) == 1000
    assert tab.colours("#lines canvas") != band


def test_a_brush_zooms_and_a_double_click_shows_all_again(tab):
    tab.open(run="sick")
    box = tab.frame.query_selector(".panel").bounding_box()
    (x0, y0), (x1, y1) = tab.cell(3, 13, 0.4), tab.cell(6, 13, 0.6)
    tab.page.mouse.move(box["x"] + x0, box["y"] + y0)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + x1, box["y"] + y1, steps=4)
    tab.page.mouse.up()
    tab.ready()
    assert "p.torchbp.top=3&p.torchbp.bottom=6" in tab.page.url
    assert tab.hover(*tab.cell(0, 4, 0.5)).startswith("3.0 (Linear), step 3")
    assert int(re.search(r"first=(\d+)", tab.page.url)[1]) >= 20
    tab.click(".panel", click_count=2, position={"x": x0, "y": y0})
    assert "top=" not in tab.page.url
    assert "first=" not in tab.page.url


def test_the_keyboard_moves_through_the_heat_map(tab, logdir):
    signals = read(logdir / "sick").vectors["error_signal"]
    tab.open(run="sick")
    tab.frame.focus(".panel")
    for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.page.keyboard.press(key)
    assert number(tab.tooltip()) == signals.values[1, 2]
    assert f"{signals.names[2]}, step {signals.steps[1]}" in tab.text("#heatmap .spoken")
    tab.page.keyboard.press("Enter")
    tab.ready()
    assert tab.text("#lines .key") == signals.names[2]
    assert tab.text("#profile output") == "step 1"


def test_a_verdict_leads_to_where_it_is_seen(tab):
    tab.open(run="sick", quantity="activation_rms", filter="12")
    tab.click(".go")
    assert tab.frame.input_value("#choose-quantity") == "error_signal"
    assert tab.frame.input_value("#choose-filter") == ""
    layer = tab.text(".go code")
    assert tab.text("#lines .key") == layer
    assert "pointed" in tab.frame.get_attribute("#heatmap", "class")


def test_like_verdicts_of_several_layers_are_one_item(tab):
    tab.open(run="special")
    assert tab.text(".verdict .others").startswith("Also at")
    assert len(tab.frame.query_selector_all(".verdict")) == 2
    assert len(tab.frame.query_selector_all(".others .chip")) == 8
    tab.click(".others .more")
    assert len(tab.frame.query_selector_all(".others .chip")) == 11
    tab.click(".others .chip >> nth=1")
    assert tab.text("#lines .key") == "c"
    assert tab.text("#profile output") == "step 20"
    assert "steps 0 to 10, over" in tab.text(".verdict.over")


def test_two_runs_are_compared(tab, logdir):
    tab.open(run="sick", compare="sound")
    assert tab.text("#heatmap .panels h3 >> nth=1") == "sound"
    said = tab.hover(*tab.cell(0, 13, 0.01))
    for row, run in enumerate(("sick", "sound")):
        assert said.splitlines()[1 + row].startswith(run)
        assert number(said, row) == read(logdir / run).vectors["error_signal"].values[0, 0]
    dark, light = (sum(tab.colour_at(*tab.cell(1, 13, 0.5, panel), panel)[:3]) for panel in (0, 1))
    assert dark < light - 50
    assert tab.colours("#profile canvas")[213, 94, 0] > 50
    tab.set("#choose-run", "sound")
    assert tab.frame.input_value("#choose-compare") == ""


def test_dark_mode_follows_tensorboard(fresh):
    fresh.open(run="sick")
    light = fresh.frame.evaluate("getComputedStyle(document.body).backgroundColor")
    bright = fresh.colours("#profile canvas")
    fresh.page.evaluate("document.body.classList.add('dark-mode')")
    fresh.frame.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    fresh.ready()
    assert fresh.frame.evaluate("getComputedStyle(document.body).backgroundColor") != light
    dark = fresh.colours("#profile canvas")
    assert bright[RUN_A] > 100 > dark.get(RUN_A, 0)
    assert dark[90, 180, 240] > 100


def test_a_run_that_grows_is_seen_after_a_reload(tab, logdir):
    layout = Layout("error_signal", "layer", ("a", "b"), logarithm=True)
    with EventWriter(logdir / "growing") as writer:
        writer.vector(layout, 0, [1.0, 0.5])
        tab.open(run="growing")
        assert "running · step 0" in tab.text(".facts")
        writer.vector(layout, 1, [0.25, 0.125])
        tab.page.click(".reload-button")
        tab.frame.wait_for_function("document.querySelector('.facts').innerText.includes('step 1')")
        tab.ready()
        assert number(tab.hover(*tab.cell(0, 2, 0.9))) == 0.25
        assert tab.text("#profile output") == "step 1"


def test_names_are_filtered_and_grouped(tab, logdir):
    tab.open(run="sick", filter="1.0, 12")
    assert tab.frame.get_attribute(".panel", "aria-label").endswith("3 rows, 16 samples")
    tab.set("#choose-filter", "*.0")
    assert " 12 rows" in tab.frame.get_attribute(".panel", "aria-label")
    tab.set("#choose-filter", "[")
    assert tab.text("#heatmap .message") == "No name passes the filter."
    tab.set("#choose-filter", "")
    tab.set("#choose-quantity", "gradient_norm")
    assert " 26 rows" in tab.frame.get_attribute(".panel", "aria-label")
    tab.set("#choose-group", "1")
    assert " 13 rows" in tab.frame.get_attribute(".panel", "aria-label")
    both = read(logdir / "sick").vectors["gradient_norm"].values[30, :2]
    for extreme in ("max", "min"):
        tab.set("#heatmap select", extreme)
        said = tab.hover(*tab.cell(0, 13, 30.5 / 60))
        assert said.startswith("0 (2 in it), step 30")
        assert number(said) == getattr(both, extreme)()


def test_a_run_without_a_row_that_passes_is_left_out(tab):
    tab.open(run="special", compare="sick", filter="12")
    assert tab.text("#heatmap .panels").strip() == ""
    assert len([p for p in tab.frame.query_selector_all(".panel") if p.is_visible()]) == 1
    assert tab.frame.get_attribute(".panel", "aria-label").endswith("sick: 1 rows, 16 samples")
    tab.open(run="special", filter="12")
    assert tab.text("#heatmap .message") == "No name passes the filter."


def test_a_link_leads_back(tab, fresh):
    tab.open(run="sound")
    tab.set("#choose-quantity", "activation_rms")
    tab.set("#choose-compare", "sick")
    tab.click(".panel", position=dict(zip("xy", tab.cell(4, 13, 0.5), strict=True)))
    link, step = unquote(tab.page.url), tab.text("#profile output")
    assert "p.torchbp.run=sound&p.torchbp.compare=sick&p.torchbp.quantity=activation_rms" in link
    fresh.open_link(tab.page.url)
    assert fresh.text("#profile output") == step
    assert fresh.text("#lines .key") == "4.0"
    assert fresh.frame.input_value("#choose-quantity") == "activation_rms"


def test_the_profile_plays(tab):
    tab.open(run="sick", step=0)
    assert tab.text("#profile output") == "step 0"
    tab.frame.click("#profile .play")
    tab.frame.wait_for_function("document.querySelector('#profile output').innerText !== 'step 0'")
    tab.frame.click("#profile .play")
    tab.ready()


def test_exports_hold_what_is_seen(tab, logdir, tmp_path):
    signals = read(logdir / "sick").vectors["error_signal"]
    tab.open(run="sick")
    with tab.page.expect_download() as download:
        tab.frame.click("#heatmap .export >> text=CSV")
    download.value.save_as(tmp_path / "cells.csv")
    with (tmp_path / "cells.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == signals.values.size
    assert rows[0]["layer"] == signals.names[0]
    written = {(int(row["last_step"]), row["layer"]): np.float32(row["value"]) for row in rows}
    for step, values in zip(signals.steps, signals.values, strict=True):
        for name, value in zip(signals.names, values, strict=True):
            assert written[int(step), name] == value
    for card in CARDS[1:]:
        with tab.page.expect_download() as download:
            tab.frame.click(f"#{card} .export >> text=PNG")
        download.value.save_as(tmp_path / f"{card}.png")
        assert (tmp_path / f"{card}.png").read_bytes().startswith(b"\x89PNG")


def test_hostile_names_are_shown_and_never_executed(tab, tmp_path):
    tab.open(run=HOSTILE)
    assert tab.frame.input_value("#choose-run") == HOSTILE
    assert HOSTILE in tab.text(".facts")
    assert tab.text(".verdict .evidence") == HOSTILE
    assert HOSTILE in tab.hover(*tab.cell(0, 3, 0.5))
    assert "<b>bold</b>" in tab.hover(*tab.cell(2, 3, 0.5))
    tab.set("#losses select", HOSTILE)
    tab.click(".go")
    for page in (tab.frame, tab.page):
        assert page.evaluate("window.hacked") is None
    assert tab.frame.query_selector("img, b b, .board script, .bar script, .tooltip script") is None
    with tab.page.expect_download() as download:
        tab.frame.click("#verdicts .export")
    download.value.save_as(tmp_path / "verdicts.csv")
    with (tmp_path / "verdicts.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["evidence"] == HOSTILE


def test_broken_and_foreign_files_do_no_harm(tab):
    tab.open()
    runs = tab.frame.eval_on_selector(
        "#choose-run", "(node) => [...node.options].map((o) => o.value)"
    )
    assert {"sick", "sound", "special", "torn", HOSTILE} <= set(runs)
    assert not {"garbage", "hollow", "zeros", "foreign"} & set(runs)
    tab.set("#choose-run", "torn")
    assert len(tab.colours("#heatmap canvas.cells")) > 40


def test_without_a_run_the_page_says_what_to_do(fresh):
    nothing = {"logdir": "some/where", "message": "", "runs": []}
    fresh.page.route("**/torchbp/runs", lambda route: route.fulfill(json=nothing))
    fresh.open()
    assert "torchbp.watch(model, optimizer, log_dir=" in fresh.text(".empty")
    assert "some/where" in fresh.text(".empty")
    assert fresh.frame.is_visible(".empty")
    assert not fresh.frame.is_visible(".board")


def test_what_the_server_refuses_is_said_and_the_rest_is_shown(page, server):
    tab = Tab(page, server)
    answer = {"status": 500, "body": json.dumps({"error": "the disk is on fire"})}
    page.route("**/torchbp/profile*", lambda route: route.fulfill(**answer))
    tab.open(run="sick")
    assert "the disk is on fire" in tab.text("#profile .message")
    assert tab.colours("#lines canvas")[LINE_0] > 100
    assert all("500" in error for error in tab.errors)


def test_with_the_python_loader_and_a_path_prefix(page, logdir):
    with tensorboard(logdir, "--load_fast=false", "--path_prefix=/a/b") as address:
        tab = Tab(page, address).open(run="sick")
        signals = read(logdir / "sick").vectors["error_signal"]
        assert number(tab.hover(*tab.cell(0, 13, 0.01))) == signals.values[0, 0]
        assert len(tab.colours("#heatmap canvas.cells")) > 40
        assert tab.errors == []


def test_the_report_is_the_same_page_without_a_server(page, logdir, tmp_path, capsys):
    file = tmp_path / "report.html"
    runs = [str(logdir / run) for run in ("sick", "sound", HOSTILE, "special")]
    assert main(["report", *runs, "-o", str(file)]) == 1
    capsys.readouterr()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    tab = Tab(page, "").open_file(file)
    assert tab.frame.input_value("#choose-run") == HOSTILE  # the newest with an alert
    assert tab.frame.input_value("#choose-compare") == "sound"
    assert tab.text(".verdict .evidence") == HOSTILE
    tab.set("#choose-run", "sick")
    assert "vanishing" in tab.text("#verdicts")
    signals = read(logdir / "sick").vectors["error_signal"]
    assert number(tab.hover(*tab.cell(4, 13, 0.01))) == signals.values[0, 4]
    tab.set("#choose-compare", "")
    for canvas in ("#profile", "#updates", "#losses", "#noise"):
        assert tab.colours(f"{canvas} canvas")[RUN_A] > 20, canvas
    light = tab.frame.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click(".theme")
    tab.click(".theme")
    assert tab.text(".theme") == "☾ dark"
    assert tab.frame.evaluate("getComputedStyle(document.body).backgroundColor") != light
    for quantity in tab.frame.eval_on_selector(
        "#choose-quantity", "(node) => [...node.options].map((option) => option.value)"
    ):
        tab.set("#choose-quantity", quantity)
        assert not tab.frame.is_visible("#heatmap .message"), quantity
    tab.set("#choose-run", "special")
    np.testing.assert_equal(number(tab.hover(*tab.cell(0, 3, 1.5 / 2.1))), SPECIAL[1, 0])
    assert "not measured" in tab.hover(*tab.cell(2, 3, 0.99))
    assert tab.frame.evaluate("window.hacked") is None
    assert tab.errors == []
    assert asked == [file.as_uri()]
    page.emulate_media(color_scheme="dark")
    tab.open_file(file, "#run=sound&quantity=activation_rms")
    assert tab.frame.get_attribute("html", "data-theme") == "dark"
    assert tab.frame.input_value("#choose-quantity") == "activation_rms"
