// Lines: the chosen layers over time, each with the band between its smallest and largest value.

import { Card } from "./card.js";
import { Chart } from "./chart.js";
import { el, ink } from "./dom.js";
import { clip, words } from "./format.js";
import { layerOf } from "./rows.js";
import { COARSE } from "./run.js";
import { together } from "./series.js";

export const MOST_LINES = 8;

export class Lines {
  keys = new Set(["run", "compare", "quantity", "layers", "first", "last"]);
  redraws = new Set(["step"]);

  constructor(page) {
    this._page = page;
    this.card = new Card(page, "lines", "Chosen layers", {
      table: () => this._table(),
      picture: () =>
        this._chart.picture(page.chosen.map(({ layer, colour }) => ({ name: layer, colour }))),
    });
    this._key = el("div", { class: "key" });
    this.card.body.append(this._key);
    this._chart = new Chart(this.card.body, page.tooltip, {
      height: 300,
      label: "Chosen layers over time",
      pick: (step) => page.state.set({ step }),
      zoom: (first, last) => page.state.set({ first, last }),
    });
  }

  async update() {
    const { state, quantity: main, chosen } = this._page;
    if (!main) {
      this.card.say("Nothing was measured yet.");
      return;
    }
    const [first, last] = [state.get("first") ?? undefined, state.get("last") ?? undefined];
    this._lines = [];
    for (const run of this._page.runs) {
      const quantity = run.quantity(main.name);
      if (!quantity) continue;
      const wanted = entriesOf(quantity, chosen).slice(0, MOST_LINES);
      if (wanted.length === 0) continue;
      const entries = wanted.map(({ entry }) => entry);
      const matrix = await run.matrix(main.name, { first, last, columns: COARSE, entries });
      wanted.forEach(({ entry, colour, repeated }, place) => {
        const name = quantity.names[entry];
        this._lines.push({
          run,
          name: this._page.runs.length > 1 ? `${name}, ${run.name}` : name,
          layer: layerOf(quantity, name),
          colour,
          dash: repeated ? [2, 3] : this._page.dashOf(run),
          x: matrix.ends,
          values: matrix.line(matrix.exact ? "value" : "last", place),
          low: matrix.exact ? undefined : matrix.line("min", place),
          high: matrix.exact ? undefined : matrix.line("max", place),
        });
      });
    }
    this.card.say(
      this._lines.length ? "" : "Choose layers: click in the heat map, or Shift-click for several.",
    );
    this.redraw();
  }

  redraw() {
    if (!this._lines?.length) return;
    const { quantity } = this._page;
    this.card.title("Chosen layers", words(quantity.name));
    const { x, series } = together(this._lines);
    this._chart.draw({
      x,
      series,
      logarithm: quantity.logarithm,
      unit: quantity.unit === "1" ? words(quantity.name) : quantity.unit,
      marker: this._page.step,
      legend: this._page.runs.length > 1 ? this._page.runs.map((run) => this._sample(run)) : [],
    });
    const chips = this._page.chosen.map(({ layer, colour }) => {
      const swatch = el("i", { class: "swatch" });
      swatch.style.background = colour;
      const leave = () =>
        this._page.state.set({
          layers: this._page.chosen.map((one) => one.layer).filter((one) => one !== layer),
        });
      const title = `${layer}: click to leave it out`;
      return el(
        "button",
        { type: "button", class: "chip", title, on: { click: leave } },
        swatch,
        clip(layer, 28),
      );
    });
    this._key.replaceChildren(...chips);
  }

  // How a run's lines look, whatever their colour.
  _sample(run) {
    return { name: run.name, colour: ink("--muted"), dash: this._page.dashOf(run) };
  }

  _table() {
    const rows = [["run", "name", "step", "value", "smallest", "largest"]];
    for (const { run, name, x, values, low, high } of this._lines ?? []) {
      x.forEach((step, index) => {
        const value = values[index];
        if (value !== undefined)
          rows.push([run.name, name, step, value, low?.[index] ?? value, high?.[index] ?? value]);
      });
    }
    return rows;
  }
}

// The places of the chosen layers in a quantity; a layer has several parameters of one colour.
function entriesOf(quantity, chosen) {
  return chosen.flatMap(({ layer, colour }) => {
    const found = [];
    quantity.names.forEach((name, entry) => {
      if (layerOf(quantity, name) === layer)
        found.push({ entry, colour, repeated: found.length > 0 });
    });
    return found;
  });
}
