// Heat map: layers × steps, one panel a run, on one colour scale.

import { Card } from "./card.js";
import { css, INF, NAN, Scale, viridis, ZERO } from "./colour.js";
import { el, ink, onWidth } from "./dom.js";
import { count, exact, logTick, percent, short, words } from "./format.js";
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
    this.card = new Card("heatmap", "Heat map", {
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
    this._heads = [];
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
    this._shown = shown;
    if (shown.length === 0 || shown.every(({ grid }) => grid.rows.length === 0)) {
      this.card.say(
        shown.length
          ? "No name passes the filter."
          : `Neither run has ${words(name)}; choose another quantity.`,
      );
      return;
    }
    this.card.say("");
    const { logarithm, unit, title } = shown[0].quantity;
    const share = unit === "1" && name.endsWith("_share");
    this._scale = Scale.over(
      shown.map(({ whole, grid }) => whole.plane(whole.exact ? "value" : grid.extreme).values),
      { logarithm, share },
    );
    for (const one of shown) one.codes = one.grid.codes(this._scale);
    this.card.title(title, unit === "1" ? "" : unit);
    this._extreme.hidden =
      shown.every(({ grid }) => grid.matrix.exact) &&
      shown.every(({ grid }) => grid.rows.every((row) => row.entries.length === 1));
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
    drawLegend(context, this._scale, width);
  }

  _image() {
    const canvases = this._panels.filter(({ box }) => !box.hidden).map(({ panel }) => panel.canvas);
    const ratio = devicePixelRatio;
    const head = 44 * ratio;
    const gap = 16 * ratio;
    const width = canvases.reduce((sum, canvas) => sum + canvas.width + gap, -gap);
    const height =
      head + Math.max(...canvases.map((canvas) => canvas.height)) + this._legend.height;
    const out = el("canvas", { width: width + 2 * gap, height: height + gap });
    const context = out.getContext("2d");
    context.fillStyle = ink("--card");
    context.fillRect(0, 0, out.width, out.height);
    let x = gap;
    canvases.forEach((canvas, index) => {
      context.fillStyle = ink("--text");
      context.font = `600 ${13 * ratio}px system-ui, sans-serif`;
      const { run, quantity } = this._shown[index];
      context.fillText(`${run.name}: ${quantity.title}`, x, 26 * ratio, canvas.width);
      context.drawImage(canvas, x, head);
      x += canvas.width + gap;
    });
    context.drawImage(this._legend, gap, height - this._legend.height);
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

function colourOf(code) {
  if (code === 0) return "";
  if (code === 1) return css(ZERO);
  if (code === 256) return css(INF);
  if (code === 257) return css(NAN);
  return css(viridis((code - 2) / 253));
}

// The colour bar with its ticks, and what has a colour of its own.
function drawLegend(context, scale, width) {
  const own = [
    ["not measured", null],
    ["NaN", NAN],
    ["inf", INF],
    ...(scale.logarithm ? [["0", ZERO]] : []),
  ];
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const left = 20;
  const bar = Math.max(width - 320, 120);
  for (let x = 0; x < bar; x++) {
    context.fillStyle = css(viridis(x / (bar - 1)));
    context.fillRect(left + x, 6, 1, 10);
  }
  context.fillStyle = ink("--muted");
  context.textAlign = "center";
  for (const [share, label] of ticksOf(scale, bar / 60)) {
    context.fillRect(Math.round(left + share * bar), 16, 1, 3);
    context.fillText(label, left + share * bar, 27);
  }
  context.textAlign = "left";
  let x = left + bar + 28;
  for (const [label, colour] of own.reverse()) {
    context.fillStyle = colour ? css(colour) : ink("--grid");
    if (colour) context.fillRect(x, 6, 12, 10);
    else {
      context.strokeStyle = ink("--muted");
      context.strokeRect(x + 0.5, 6.5, 11, 9);
      context.beginPath();
      context.moveTo(x + 2, 15);
      context.lineTo(x + 10, 7);
      context.stroke();
    }
    context.fillStyle = ink("--muted");
    context.fillText(label, x + 17, 11.5);
    x += 17 + context.measureText(label).width + 18;
  }
}

function ticksOf({ logarithm, low, high }, most) {
  if (!logarithm) {
    const label = low === 0 && high === 1 ? percent : short;
    return [0, 0.25, 0.5, 0.75, 1].map((share) => [share, label(low + share * (high - low))]);
  }
  const [from, to] = [Math.round(Math.log10(low)), Math.round(Math.log10(high))];
  const every = Math.max(1, Math.ceil((to - from) / most));
  const ticks = [];
  for (let exponent = from; exponent <= to; exponent += every) {
    ticks.push([(exponent - from) / (to - from), logTick(Number(`1e${exponent}`))]);
  }
  return ticks;
}
