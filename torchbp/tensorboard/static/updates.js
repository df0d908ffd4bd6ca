// Update-to-weight ratio: how the parameters are spread, against the zone of healthy training.

import { Card } from "./card.js";
import { Chart } from "./chart.js";
import { passes } from "./rows.js";
import { COARSE } from "./run.js";
import { together } from "./series.js";

const RATIO = "update_ratio";
const ZONE = [10 ** -4.5, 1e-1]; // below it hardly anything is learned, above it weights are thrown about
const TARGET = 1e-3; // the usual rule of thumb

export class Updates {
  keys = new Set(["run", "compare", "filter", "first", "last"]);
  redraws = new Set(["step"]);

  constructor(page) {
    this._page = page;
    this.card = new Card(page, "updates", "Update-to-weight ratio", {
      table: () => this._table(),
      picture: () => this._chart.picture(),
    });
    this.card.title("Update-to-weight ratio", "over all parameters");
    this._chart = new Chart(this.card.body, page.tooltip, {
      height: 250,
      label: "Update-to-weight ratio over time",
      pick: (step) => page.state.set({ step }),
      zoom: (first, last) => page.state.set({ first, last }),
    });
  }

  async update() {
    const { state } = this._page;
    const [first, last] = [state.get("first") ?? undefined, state.get("last") ?? undefined];
    this._lines = [];
    for (const run of this._page.runs) {
      const quantity = run.quantity(RATIO);
      if (!quantity) continue;
      const places = quantity.names.flatMap((name, entry) =>
        passes(state.get("filter"), name) ? [entry] : [],
      );
      if (places.length === 0) continue;
      const matrix = await run.matrix(RATIO, { first, last, columns: COARSE });
      this._lines.push({
        run,
        name: this._page.runs.length > 1 ? `median, ${run.name}` : "median",
        colour: this._page.colourOf(run),
        dash: this._page.dashOf(run),
        x: matrix.ends,
        ...spread(matrix, places),
      });
    }
    this.card.say(
      this._lines.length
        ? ""
        : "No updates were measured: watch(model, optimizer) needs the optimizer to see them.",
    );
    this.redraw();
  }

  redraw() {
    if (!this._lines?.length) return;
    this._chart.draw({
      ...together(this._lines),
      logarithm: true,
      unit: "‖update‖ / ‖weight‖",
      zone: ZONE,
      target: TARGET,
      marker: this._page.step,
      range: this._range(),
      legend: [
        ...this._lines.flatMap(({ name, colour, dash, run }) => [
          { name, colour, dash },
          { name: this._lines.length > 1 ? `all, ${run.name}` : "all", colour, kind: "band" },
        ]),
        { name: "healthy, about 10⁻³", kind: "zone" },
      ],
    });
  }

  // The zone is always in sight; a weight that began at 0 doesn't flatten the rest.
  _range() {
    const sizes = this._lines.flatMap(({ values, low, high }) => [...values, ...low, ...high]);
    const finite = sizes.filter((value) => value > 0 && Number.isFinite(value));
    const low = finite.reduce((least, value) => Math.min(least, value), ZONE[0] / 3);
    const high = finite.reduce((most, value) => Math.max(most, value), ZONE[1] * 3);
    return [Math.max(low / 1.5, 1e-12), Math.min(high * 1.5, 1e4)];
  }

  _table() {
    const rows = [["run", "step", "smallest", "median", "largest"]];
    for (const { run, x, values, low, high } of this._lines ?? []) {
      x.forEach((step, index) => {
        if (values[index] !== undefined)
          rows.push([run.name, step, low[index], values[index], high[index]]);
      });
    }
    return rows;
  }
}

// Median of the last, smallest and largest of all samples, over the entries at `places`.
function spread(matrix, places) {
  const [last, least, most] = ["last", "min", "max"].map(
    (name) => matrix.plane(matrix.exact ? "value" : name).values,
  );
  const width = matrix.entries.length;
  const there = new Float32Array(places.length);
  const [values, low, high] = [[], [], []];
  for (let column = 0; column < matrix.columns; column++) {
    let count = 0;
    let [small, large] = [Infinity, -Infinity];
    for (const place of places) {
      const at = column * width + place;
      if (!Number.isNaN(last[at])) there[count++] = last[at];
      if (least[at] < small) small = least[at];
      if (most[at] > large) large = most[at];
    }
    values.push(count ? there.subarray(0, count).sort()[count >> 1] : undefined);
    low.push(count ? small : undefined);
    high.push(count ? large : undefined);
  }
  return { values, low, high };
}
