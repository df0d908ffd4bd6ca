// Gradient noise scale with its interval, against the batch size in use.

import { Card } from "./card.js";
import { Chart } from "./chart.js";
import { COARSE } from "./run.js";
import { together } from "./series.js";

export class Noise {
  keys = new Set(["run", "compare", "first", "last"]);
  redraws = new Set(["step"]);

  constructor(page) {
    this._page = page;
    this.card = new Card(page, "noise", "Gradient noise scale", {
      table: () => this._table(),
      picture: () => this._chart.picture(),
    });
    this.card.title("Gradient noise scale", "with its 90 % interval");
    this._chart = new Chart(this.card.body, page.tooltip, {
      height: 250,
      label: "Gradient noise scale and batch size over time",
      pick: (step) => page.state.set({ step }),
      zoom: (first, last) => page.state.set({ first, last }),
    });
  }

  async update() {
    const { state } = this._page;
    const options = {
      first: state.get("first") ?? undefined,
      last: state.get("last") ?? undefined,
      columns: COARSE,
    };
    this._lines = [];
    let measured = false;
    for (const run of this._page.runs) {
      const suffix = this._page.runs.length > 1 ? `, ${run.name}` : "";
      const about = { run, colour: this._page.colourOf(run) };
      const noise = run.quantity("noise_scale");
      if (noise) {
        measured = true;
        const matrix = await run.matrix("noise_scale", options);
        const line = (name) =>
          matrix.line(matrix.exact ? "value" : "last", noise.names.indexOf(name));
        this._lines.push({
          ...about,
          name: `noise scale${suffix}`,
          dash: this._page.dashOf(run),
          x: matrix.ends,
          values: line("value"),
          low: line("low"),
          high: line("high"),
        });
      }
      const batch = await this._batch(run, options);
      if (batch) {
        const name = `batch size${suffix}`;
        this._lines.push({ ...about, name, dash: [2, 3], width: 1.2, ...batch });
      }
    }
    this.card.say(
      measured
        ? ""
        : "No noise scale was measured: it takes several backward passes a step (micro-batches), or several ranks, to tell noise from signal.",
    );
    this.redraw();
  }

  // The samples of a step: those of a backward pass times their number.
  async _batch(run, options) {
    if (!run.quantity("run/batch")) return null;
    const last = (matrix) => matrix.line(matrix.exact ? "value" : "last", 0);
    const size = await run.matrix("run/batch", options);
    if (!run.quantity("run/backwards")) return { x: size.ends, values: last(size) };
    const passes = await run.matrix("run/backwards", options);
    const often = last(passes);
    const values = last(size).map((value, index) => {
      const column = passes.columns ? passes.column(size.ends[index]) : -1;
      return value * (often[column] ?? 1);
    });
    return { x: size.ends, values };
  }

  redraw() {
    if (!this._lines?.length) return;
    this._chart.draw({
      ...together(this._lines),
      logarithm: true,
      unit: "samples",
      marker: this._page.step,
      legend: this._lines,
    });
  }

  _table() {
    const rows = [["run", "name", "step", "value", "low", "high"]];
    for (const { run, name, x, values, low, high } of this._lines ?? []) {
      x.forEach((step, index) => {
        rows.push([run.name, name, step, values[index], low?.[index], high?.[index]]);
      });
    }
    return rows;
  }
}
