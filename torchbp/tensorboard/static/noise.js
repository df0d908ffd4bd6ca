// Gradient noise scale with its interval, against the batch size in use.

import { Card } from "./card.js";
import { Chart, together } from "./chart.js";
import { COARSE } from "./run.js";

export class Noise {
  keys = new Set(["run", "compare", "first", "last"]);
  redraws = new Set(["step"]);

  constructor(page) {
    this._page = page;
    this.card = new Card("noise", "Gradient noise scale", {
      table: () => this._table(),
      picture: () => this._chart.canvas,
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
      if (run.quantity("run/batch")) {
        const matrix = await run.matrix("run/batch", options);
        this._lines.push({
          ...about,
          name: `batch size${suffix}`,
          dash: [3, 3],
          width: 1.2,
          x: matrix.ends,
          values: matrix.line(matrix.exact ? "value" : "last", 0),
        });
      }
    }
    this.card.say(
      measured
        ? ""
        : "No noise scale was measured: it takes several backward passes a step (micro-batches), or several ranks, to tell noise from signal.",
    );
    this.redraw();
  }

  redraw() {
    if (!this._lines?.length) return;
    this._chart.draw({
      ...together(this._lines),
      logarithm: true,
      unit: "samples",
      marker: this._page.step,
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
