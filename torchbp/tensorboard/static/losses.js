// Losses with the gap between training and validation; or any other number of the run.

import { Card } from "./card.js";
import { Chart } from "./chart.js";
import { el } from "./dom.js";
import { count, percent, words } from "./format.js";
import { COARSE } from "./run.js";
import { together } from "./series.js";

const LOSSES = ["loss/train", "loss/val"];

export class Losses {
  keys = new Set(["run", "compare", "first", "last", "scalar"]);
  redraws = new Set(["step"]);

  constructor(page) {
    this._page = page;
    this.card = new Card(page, "losses", "Losses", {
      table: () => this._table(),
      picture: () => this._chart.picture(),
    });
    this._choice = el("select", {
      "aria-label": "number of the run",
      on: { change: () => page.state.set({ scalar: this._choice.value }) },
    });
    this.card.controls.append(this._choice);
    this._chart = new Chart(this.card.body, page.tooltip, {
      height: 250,
      label: "Losses over time",
      pick: (step) => page.state.set({ step }),
      zoom: (first, last) => page.state.set({ first, last }),
    });
  }

  async update() {
    const { state, runs } = this._page;
    const scalar = state.get("scalar");
    this._offer(scalar);
    const names = scalar ? [scalar] : LOSSES;
    const options = {
      first: state.get("first") ?? undefined,
      last: state.get("last") ?? undefined,
      columns: COARSE,
    };
    this._lines = [];
    for (const run of runs) {
      for (const name of names) {
        if (!run.quantity(name)) continue;
        const matrix = await run.matrix(name, options);
        const title = scalar
          ? titleOf(name)
          : { "loss/train": "training", "loss/val": "validation" }[name];
        const other = name === "loss/val";
        this._lines.push({
          run,
          tag: name,
          name: runs.length > 1 ? `${title}, ${run.name}` : title,
          colour: this._page.colourOf(run, other),
          dash: this._page.dashOf(run),
          width: other ? 2.2 : 1.2,
          points: matrix.columns < 40,
          x: matrix.ends,
          values: matrix.line(matrix.exact ? "value" : "last", 0),
          low: matrix.exact ? undefined : matrix.line("min", 0),
          high: matrix.exact ? undefined : matrix.line("max", 0),
        });
      }
    }
    this.card.title(scalar ? titleOf(scalar) : "Losses", scalar ? "" : this._gap());
    this.card.say(
      this._lines.length
        ? ""
        : "No loss was logged: monitor.log_loss(train=loss, val=...) does it.",
    );
    this.redraw();
  }

  redraw() {
    if (!this._lines?.length) return;
    const quantity = this._lines[0].run.quantity(this._lines[0].tag);
    const steep = !this._page.state.get("scalar") && spans(this._lines);
    this._chart.draw({
      ...together(this._lines),
      logarithm: quantity.logarithm || steep,
      unit:
        quantity.unit && quantity.unit !== "1"
          ? quantity.unit
          : this._page.state.get("scalar")
            ? ""
            : "loss",
      marker: this._page.step,
      legend: this._lines,
    });
  }

  // How much the last validation loss is above the training loss around it.
  _gap() {
    const [train, val] = LOSSES.map((tag) =>
      this._lines.find((line) => line.tag === tag && line.run === this._page.runs[0]),
    );
    if (!train?.x.length || !val?.x.length) return "";
    const step = val.x[val.x.length - 1];
    const near = train.x
      .map((at, index) => [Math.abs(at - step), train.values[index]])
      .sort((a, b) => a[0] - b[0]);
    const loss =
      near.slice(0, 5).reduce((sum, [, value]) => sum + value, 0) / Math.min(near.length, 5);
    const ratio = val.values[val.values.length - 1] / loss;
    if (!Number.isFinite(ratio) || ratio <= 0) return "";
    const at = `at step ${count(step)}`;
    if (ratio > 10) return `validation ${Number(ratio.toPrecision(2))} times training ${at}`;
    const gap = percent(Number(Math.abs(ratio - 1).toPrecision(2)));
    return `validation ${gap} ${ratio < 1 ? "below" : "above"} training ${at}`;
  }

  _offer(scalar) {
    const tags = [
      ...new Set(this._page.runs.flatMap((run) => run.scalars.map(({ name }) => name))),
    ];
    const others = tags.filter((tag) => !LOSSES.includes(tag)).sort();
    this._choice.replaceChildren(
      el("option", { value: "" }, "losses"),
      ...others.map((tag) => el("option", { value: tag }, tag)),
    );
    this._choice.value = scalar;
  }

  _table() {
    const rows = [["run", "name", "step", "value"]];
    for (const { run, tag, x, values } of this._lines ?? []) {
      x.forEach((step, index) => {
        rows.push([run.name, tag, step, values[index]]);
      });
    }
    return rows;
  }
}

function titleOf(tag) {
  return words(tag.replace(/^run\//, "").replace(/_log10$/, ", log10"));
}

// Losses of more than two decades are read on a logarithmic axis.
function spans(lines) {
  const values = lines.flatMap((line) => line.values).filter((value) => Number.isFinite(value));
  const low = values.reduce((least, value) => Math.min(least, value), Infinity);
  const high = values.reduce((most, value) => Math.max(most, value), -Infinity);
  return low > 0 && high / low > 100;
}
