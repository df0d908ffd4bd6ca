// Profile: one quantity over depth at a chosen step.

import { Card } from "./card.js";
import { Chart } from "./chart.js";
import { el } from "./dom.js";
import { clip, count, words } from "./format.js";
import { Grid } from "./grid.js";
import { MOST_LINES } from "./lines.js";
import { holds } from "./rows.js";

const FRAME = 150; // ms a step while it plays

export class Profile {
  keys = new Set(["run", "compare", "quantity", "filter", "group", "step", "extreme"]);
  redraws = new Set(["layers"]);

  constructor(page) {
    this._page = page;
    this.card = new Card(page, "profile", "Profile over depth", {
      table: () => this._table(),
      picture: () => this._chart.picture(),
    });
    this._slider = el("input", {
      type: "range",
      min: 0,
      step: 1,
      "aria-label": "step",
      on: { input: () => this._slid() },
    });
    this._play = el(
      "button",
      { type: "button", class: "play", on: { click: () => this._toggle() } },
      "▶",
    );
    this._step = el("output", { class: "number" });
    this.card.body.append(el("div", { class: "player" }, this._play, this._slider, this._step));
    this._chart = new Chart(this.card.body, page.tooltip, {
      height: 300,
      label: "Profile over depth",
      pick: (row) => this._pick(row),
    });
    this._stopped();
  }

  async update() {
    const name = this._page.quantity?.name;
    const steps = this._page.steps;
    if (!name || steps.length === 0) {
      this.card.say("Nothing was measured yet.");
      return;
    }
    const { step } = this._page;
    const shown = [];
    for (const run of this._page.runs) {
      const quantity = run.quantity(name);
      if (!quantity) continue;
      const matrix = await run.profile(name, step);
      const rows = await this._page.rows(run, quantity);
      shown.push({ run, quantity, grid: new Grid(matrix, rows, this._page.state.get("extreme")) });
    }
    this._shown = shown.filter(({ grid }) => grid.rows.length > 0 && grid.columns > 0);
    this.card.say(this._shown.length ? "" : "No name passes the filter.");
    const index = steps.findIndex((one) => one >= step);
    this._slider.max = steps.length - 1;
    this._slider.value = index < 0 ? steps.length - 1 : index;
    const sample = this._shown[0]?.grid.matrix.ends[0] ?? step; // the one nearest to the step
    this._step.textContent = `step ${count(sample)}`;
    this._slider.setAttribute("aria-valuetext", `step ${sample}`);
    this.redraw();
  }

  redraw() {
    if (!this._shown?.length) return;
    const { quantity, grid } = this._shown[0];
    this.card.title("Profile over depth", words(quantity.name));
    const longest = this._shown.reduce((one, other) =>
      other.grid.rows.length > one.grid.rows.length ? other : one,
    );
    const x = longest.grid.rows.map((_, row) => row);
    const values = ({ grid: one }) =>
      x.map((row) => (row < one.rows.length ? one.cell(row, 0).value : undefined));
    const several = this._shown.length > 1;
    const lines = this._shown.map((one) => ({
      name: several ? one.run.name : words(quantity.name),
      colour: this._page.colourOf(one.run),
      dash: this._page.dashOf(one.run),
      values: values(one),
      points: x.length <= 64,
    }));
    const marks = this._page.chosen.flatMap(({ layer, colour }) => {
      const row = grid.rows.findIndex((one) => holds(one, layer));
      if (row < 0) return [];
      const at = x.map((one) => (one === row ? grid.cell(row, 0).value : undefined));
      return [{ name: layer, colour, values: at, points: true, size: 9, quiet: true }];
    });
    const labels = longest.grid.rows.map(({ label }) => clip(label, 16));
    this._chart.draw({
      x,
      series: [...lines, ...marks],
      logarithm: quantity.logarithm,
      unit: quantity.unit === "1" ? words(quantity.name) : quantity.unit,
      legend: several ? lines : [],
      ticks: (row) => labels[row] ?? "",
      place: (row) => longest.grid.rows[row].label,
    });
  }

  _pick(row) {
    const layers = this._shown[0].grid.rows[row]?.layers;
    if (layers) this._page.state.set({ layers: layers.slice(0, MOST_LINES) });
  }

  _slid() {
    this._page.state.set({ step: this._page.steps[Number(this._slider.value)] });
  }

  _toggle() {
    if (this._timer) {
      this._stopped();
      return;
    }
    if (Number(this._slider.value) >= Number(this._slider.max)) this._slider.value = 0;
    this._play.textContent = "❚❚";
    this._play.setAttribute("aria-label", "pause");
    const next = async () => {
      this._slid();
      await this._page.settled();
      if (!this._timer) return;
      if (Number(this._slider.value) >= Number(this._slider.max)) this._stopped();
      else {
        this._slider.value = Number(this._slider.value) + 1;
        this._timer = setTimeout(next, FRAME);
      }
    };
    this._timer = setTimeout(next, 0);
  }

  _stopped() {
    clearTimeout(this._timer);
    this._timer = null;
    this._play.textContent = "▶";
    this._play.setAttribute("aria-label", "play");
  }

  _table() {
    const rows = [["run", "quantity", "step", "place", "layer", "value"]];
    for (const { run, quantity, grid } of this._shown ?? []) {
      grid.rows.forEach(({ label }, row) => {
        rows.push([
          run.name,
          quantity.name,
          grid.matrix.ends[0],
          row,
          label,
          grid.cell(row, 0).value,
        ]);
      });
    }
    return rows;
  }
}
