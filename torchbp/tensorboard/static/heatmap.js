// Heat map: layers × steps, one panel a run, on one colour scale.

import { Card } from "./card.js";
import { colourOf, Scale } from "./colour.js";
import { drawColourBar } from "./colourbar.js";
import { el, ink, onWidth } from "./dom.js";
import { count, exact, words } from "./format.js";
import { Grid } from "./grid.js";
import { MOST_LINES } from "./lines.js";
import { Panel } from "./panel.js";
import { FINE } from "./run.js";

const ROW_HEIGHT = 26;
const [LOWEST, HIGHEST] = [160, 470];

export class HeatMap {
  keys = new Set(["run", "compare", "quantity", "filter", "group", "first", "last", "extreme"]);
  redraws = new Set(["step", "layers", "top", "bottom"]);

  constructor(page) {
    this._page = page;
    this.card = new Card(page, "heatmap", "Heat map", {
      table: () => this._table(),
      picture: () => this._image(),
    });
    this._extreme = el(
      "select",
      {
        hidden: true,
        title: "What a cell shows that holds several samples or layers",
        "aria-label": "extreme",
        on: { change: () => page.state.set({ extreme: this._extreme.value }) },
      },
      el("option", { value: "max" }, "largest"),
      el("option", { value: "min" }, "smallest"),
    );
    this._whole = el(
      "button",
      {
        type: "button",
        hidden: true,
        title: "Show all steps and layers again (double-click, Escape)",
        on: { click: () => this._reset() },
      },
      "Reset zoom",
    );
    this.card.controls.append(this._extreme, this._whole);
    this._panels = [];
    this._box = el("div", { class: "panels" });
    this._legend = el("canvas", { class: "legend" });
    this._spoken = el("p", { class: "spoken", "aria-live": "polite" });
    this.card.body.append(this._box, this._legend, this._spoken);
    onWidth(this._box, (width) => {
      this._width = width;
      this.redraw();
    });
  }

  async update() {
    const { state } = this._page;
    const name = this._page.quantity?.name;
    if (!name) {
      this.card.say(
        "This run has no values per layer: torchbp.watch writes them when a model trains.",
      );
      return;
    }
    const shown = [];
    for (const run of this._page.runs) {
      const quantity = run.quantity(name);
      if (!quantity) continue;
      const extreme = state.get("extreme");
      const rows = await this._page.rows(run, quantity);
      const whole = await run.matrix(name, { columns: FINE, planes: [extreme] });
      const [first, last] = [state.get("first"), state.get("last")];
      let matrix = whole;
      if (first !== null) {
        matrix = whole.exact
          ? whole.slice(first, last)
          : await run.matrix(name, { first, last, columns: FINE, planes: [extreme] });
      }
      shown.push({
        run,
        quantity,
        whole,
        grid: new Grid(matrix, rows, extreme, run.overview.last_step),
      });
    }
    const filled = shown.filter(({ grid }) => grid.rows.length > 0);
    this._shown = filled;
    if (filled.length === 0) {
      const nowhere = `Neither run has ${words(name)}; choose another quantity.`;
      this.card.say(shown.length > 0 ? "No name passes the filter." : nowhere);
      return;
    }
    this.card.say("");
    const { logarithm, unit, title } = filled[0].quantity;
    const share = unit === "1" && name.endsWith("_share");
    this._scale = Scale.over(
      filled.map(({ whole, grid }) => whole.plane(whole.exact ? "value" : grid.extreme).values),
      { logarithm, share },
    );
    for (const one of filled) one.codes = one.grid.codes(this._scale);
    this.card.title(title, unit === "1" ? "" : unit);
    this._extreme.hidden =
      filled.every(({ grid }) => grid.matrix.exact) &&
      filled.every(({ grid }) => grid.rows.every((row) => row.entries.length === 1));
    this._extreme.value = state.get("extreme");
    this.redraw();
  }

  redraw() {
    if (!this._shown?.length || !this._scale || !this._width) return;
    const { state } = this._page;
    while (this._panels.length < this._shown.length) this._addPanel();
    const zoomed = ["first", "top"].some((key) => state.get(key) !== null);
    this._whole.hidden = !zoomed;
    const gap = 16;
    const width = Math.floor((this._width - gap * (this._shown.length - 1)) / this._shown.length);
    const selected = new Map(this._page.chosen.map(({ layer, colour }) => [layer, colour]));
    const span = ({ grid }) => {
      const rows = grid.rows.length;
      const top = Math.min(state.get("top") ?? 0, rows - 1);
      return { top, bottom: Math.min(state.get("bottom") ?? rows - 1, rows - 1) };
    };
    const tallest = Math.max(...this._shown.map(span).map(({ top, bottom }) => bottom - top + 1));
    const height = Math.min(Math.max(tallest * ROW_HEIGHT, LOWEST), HIGHEST);
    this._panels.forEach((panel, index) => {
      const one = this._shown[index];
      panel.box.hidden = !one;
      if (!one) return;
      const { grid, codes, run, quantity } = one;
      panel.head.textContent = this._shown.length > 1 ? run.name : "";
      const [begin, end] = grid.columns ? [grid.edge(0), grid.edge(grid.columns)] : [0, 1];
      const first = state.get("first") ?? begin;
      const last = state.get("last") ?? end;
      panel.panel.draw({
        grid,
        codes,
        name: `${quantity.title}, ${run.name}`,
        ...span(one),
        first,
        last: Math.max(last, first + 1),
        width,
        height: height + 24,
        marker: this._page.step,
        selected,
      });
    });
    this._drawLegend();
  }

  _addPanel() {
    const index = this._panels.length;
    const panel = new Panel({
      hover: (row, column, x, y) => this._hover(index, row, column, x, y),
      pick: (row, column, adds) => this._pick(index, row, column, adds),
      brush: (zoom) => this._page.state.set(zoom),
      reset: () => this._reset(),
    });
    const head = el("h3", {});
    const box = el("div", {}, head, panel.element);
    this._panels.push({ panel, head, box });
    this._box.append(box);
  }

  _reset() {
    this._page.state.set({ first: null, last: null, top: null, bottom: null });
  }

  _hover(index, row, column, x, y) {
    if (row < 0) {
      this._page.tooltip.hide();
      for (const { panel } of this._panels) panel.cross(null);
      return;
    }
    const { grid, quantity } = this._shown[index];
    const step = grid.matrix.ends[column];
    const lines = [];
    this._shown.forEach((one, other) => {
      const place = other === index ? { row, column } : this._same(one, grid.rows[row], step);
      this._panels[other].panel.cross(place);
      if (place) lines.push(this._line(one, place));
    });
    const { label, kind, entries } = grid.rows[row];
    const what = entries.length > 1 ? `${entries.length} in it` : kind;
    const from = grid.matrix.steps[column];
    const when = from === step ? `step ${count(step)}` : `steps ${count(from)} to ${count(step)}`;
    this._page.tooltip.show(x, y, `${label}${what ? ` (${what})` : ""}, ${when}`, lines);
    this._spoken.textContent = `${label}, ${when}: ${lines.map(({ value }) => value).join(", ")} ${quantity.unit}`;
  }

  // The cell of the other run with the same row and step.
  _same({ grid }, { label }, step) {
    const row = grid.rows.findIndex((one) => one.label === label);
    const column = grid.columns ? grid.columnAt(step) : -1;
    return row < 0 || column < 0 ? null : { row, column };
  }

  _line({ grid, run, quantity, codes }, { row, column }) {
    const { value, entry } = grid.cell(row, column);
    const single = grid.rows[row].entries.length === 1;
    const code = codes[column * grid.rows.length + row];
    return {
      colour: colourOf(code),
      name:
        this._shown.length > 1 ? run.name : single ? words(quantity.name) : quantity.names[entry],
      value: value === undefined ? "not measured" : exact(value),
      note: quantity.unit === "1" ? "" : quantity.unit,
    };
  }

  _pick(index, row, column, adds) {
    const { grid } = this._shown[index];
    const changes = {};
    if (column >= 0) changes.step = grid.matrix.ends[column];
    const { layers } = grid.rows[row];
    const chosen = this._page.chosen.map((one) => one.layer);
    if (!adds) changes.layers = layers.slice(0, MOST_LINES);
    else if (layers.every((layer) => chosen.includes(layer))) {
      changes.layers = chosen.filter((layer) => !layers.includes(layer));
    } else changes.layers = [...new Set([...chosen, ...layers])].slice(0, MOST_LINES);
    this._page.state.set(changes);
  }

  _drawLegend() {
    const width = Math.min(this._width, 720);
    this._legend.width = width * devicePixelRatio;
    this._legend.height = 38 * devicePixelRatio;
    this._legend.style.width = `${width}px`;
    this._legend.style.height = "38px";
    const context = this._legend.getContext("2d");
    context.scale(devicePixelRatio, devicePixelRatio);
    drawColourBar(context, this._scale, width);
  }

  // The panels side by side, with the names of the runs if there are two, and the legend.
  _image() {
    const canvases = this._panels.filter(({ box }) => !box.hidden).map(({ panel }) => panel.canvas);
    const ratio = devicePixelRatio;
    const [gap, head] = [16 * ratio, canvases.length > 1 ? 24 * ratio : 0];
    const width = canvases.reduce((sum, canvas) => sum + canvas.width + gap, -gap);
    const height = head + canvases[0].height + gap + this._legend.height;
    const out = el("canvas", { width, height });
    const context = out.getContext("2d");
    context.fillStyle = ink("--text");
    context.font = `600 ${12 * ratio}px system-ui, sans-serif`;
    canvases.forEach((canvas, index) => {
      const x = index * (canvas.width + gap);
      if (head) context.fillText(this._shown[index].run.name, x, 14 * ratio, canvas.width);
      context.drawImage(canvas, x, head);
    });
    context.drawImage(this._legend, 0, height - this._legend.height);
    return out;
  }

  _table() {
    const rows = [["run", "quantity", "layer", "first_step", "last_step", "value"]];
    for (const { run, quantity, grid } of this._shown) {
      for (let row = 0; row < grid.rows.length; row++) {
        for (let column = 0; column < grid.columns; column++) {
          const { value } = grid.cell(row, column);
          if (value === undefined) continue;
          const { steps, ends } = grid.matrix;
          rows.push([
            run.name,
            quantity.name,
            grid.rows[row].label,
            steps[column],
            ends[column],
            value,
          ]);
        }
      }
    }
    return rows;
  }
}
