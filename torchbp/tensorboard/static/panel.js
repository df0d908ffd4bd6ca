// The heat map of one run on a canvas: cells, axes, and above them what is pointed at and selected.

import { cellPicture } from "./cells.js";
import { el, ink, oncePerFrame } from "./dom.js";
import { clip, count } from "./format.js";
import { hatch, niceSteps, rule } from "./paint.js";

const BOTTOM = 24;
const FONT = "11px system-ui, sans-serif";

export class Panel {
  /**
   * `on` has what happens: `hover(row, column, x, y)` (row -1: nowhere), `pick(row, column, adds)`,
   * `brush({first, last, top, bottom})`, `reset()`.
   */
  constructor(on) {
    this._on = on;
    this.canvas = el("canvas", { class: "cells" });
    this._overlay = el("canvas", { class: "overlay" });
    this.element = el(
      "div",
      { class: "panel", tabIndex: 0, role: "application", "aria-roledescription": "heat map" },
      this.canvas,
      this._overlay,
    );
    this._cursor = null;
    this._brush = null;
    this._drawOverlay = oncePerFrame(() => this._overlayNow());
    this._listen();
  }

  /**
   * Draws `{grid, codes, name, top, bottom, first, last, width, height, marker, selected}`: the rows from
   * top to bottom and the steps from first to last; `selected` maps a layer to its colour.
   */
  draw(drawing) {
    this._drawing = drawing;
    const { grid, width, height, name } = drawing;
    this.element.setAttribute(
      "aria-label",
      `${name}: ${grid.rows.length} rows, ${grid.columns} samples`,
    );
    for (const canvas of [this.canvas, this._overlay]) {
      canvas.width = Math.round(width * devicePixelRatio);
      canvas.height = Math.round(height * devicePixelRatio);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
    }
    this._measure();
    this._picture = cellPicture(drawing, this._width, this._height);
    this._axes();
    this._overlayNow();
  }

  /** Marks a cell from outside, as when the other run's panel is pointed at; null for none. */
  cross(cursor) {
    this._cursor = cursor;
    this._drawOverlay();
  }

  _measure() {
    const { grid, width, height, top, bottom, first, last } = this._drawing;
    const context = this.canvas.getContext("2d");
    context.font = FONT;
    this._labels = grid.rows.map((row) => clip(row.label, 26));
    let gutter = 24;
    for (let row = top; row <= bottom; row++) {
      gutter = Math.max(gutter, context.measureText(this._labels[row]).width);
    }
    this._left = Math.min(Math.ceil(gutter) + 20, Math.floor(width * 0.4));
    this._width = Math.max(width - this._left - 10, 10);
    this._height = height - BOTTOM;
    this._rowHeight = this._height / (bottom - top + 1);
    this._stepWidth = this._width / (last - first);
    // Where the cells are, for whoever looks from outside, as tests do.
    this.element.dataset.cells = [this._left, 0, this._width, this._height].join(" ");
  }

  _x(step) {
    return this._left + (step - this._drawing.first) * this._stepWidth;
  }

  _y(row) {
    return (row - this._drawing.top) * this._rowHeight;
  }

  _axes() {
    const { first, last, width, height } = this._drawing;
    const context = this.canvas.getContext("2d");
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, width, height);
    hatch(context, this._left, 0, this._width, this._height);
    context.imageSmoothingEnabled = false;
    context.drawImage(this._picture, this._left, 0, this._width, this._height);
    context.font = FONT;
    context.textBaseline = "middle";
    context.textAlign = "right";
    this._rowLabels(context);
    context.textAlign = "center";
    context.fillStyle = ink("--muted");
    for (const step of niceSteps(first, last, this._width / 80)) {
      const x = Math.round(this._x(step)) + 0.5;
      rule(context, [x, this._height], [x, this._height + 4], ink("--grid"), [], 1);
      const half = context.measureText(count(step)).width / 2;
      context.fillText(count(step), Math.min(Math.max(x, half), width - half), this._height + 14);
    }
  }

  // The selected rows' labels first; of the others those that have room.
  _rowLabels(context) {
    const { grid, top, bottom, selected } = this._drawing;
    const taken = [];
    const middle = (row) => this._y(row) + this._rowHeight / 2;
    const label = (row, colour) => {
      const y = Math.min(Math.max(middle(row), 6), this._height - 6);
      if (taken.some((other) => Math.abs(other - y) < 12.5)) return;
      taken.push(y);
      context.fillStyle = ink(colour);
      context.fillText(this._labels[row], this._left - 12, y, this._left - 14);
    };
    const rows = [];
    for (let row = top; row <= bottom; row++) rows.push(row);
    for (const row of rows) {
      const layer = grid.rows[row].layers.find((one) => selected.has(one));
      const colour = selected.get(layer);
      if (!colour) continue;
      label(row, "--text");
      const size = Math.min(Math.max(this._rowHeight - 1, 3), 12);
      context.fillStyle = colour;
      context.fillRect(this._left - 8, middle(row) - size / 2, 4, size);
    }
    const every = Math.max(1, Math.ceil(13 / this._rowHeight));
    for (const row of rows) if ((row - top) % every === 0) label(row, "--muted");
  }

  _overlayNow() {
    if (!this._drawing) return;
    const { width, height, marker, grid, top, bottom } = this._drawing;
    const context = this._overlay.getContext("2d");
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, width, height);
    const right = this._left + this._width;
    const inside = (x) => Math.min(Math.max(x, this._left), right);
    if (marker !== null && this._x(marker) >= this._left && this._x(marker) <= right) {
      const x = Math.round(this._x(marker)) + 0.5;
      rule(context, [x, 0], [x, this._height], ink("--marker"), [], 1);
    }
    if (this._cursor) {
      const { row, column } = this._cursor;
      if (row >= top && row <= bottom && column >= 0 && column < grid.columns) {
        const [x0, x1] = [
          inside(this._x(grid.edge(column))),
          inside(this._x(grid.edge(column + 1))),
        ];
        for (const [colour, thick] of [
          ["#000", 3],
          ["#fff", 1],
        ]) {
          context.strokeStyle = colour;
          context.lineWidth = thick;
          const size = [Math.max(x1 - x0, 3), Math.max(this._rowHeight, 3)];
          context.strokeRect(x0, this._y(row), ...size);
        }
      }
    }
    if (this._brush) {
      const { x0, y0, x1, y1 } = this._brush;
      const box = [Math.min(x0, x1), Math.min(y0, y1), Math.abs(x1 - x0), Math.abs(y1 - y0)];
      context.fillStyle = "rgba(255, 255, 255, 0.25)";
      context.strokeStyle = "#fff";
      context.fillRect(...box);
      context.strokeRect(...box);
    }
  }

  // The cell at a point of the element, or null.
  _cell(x, y) {
    const { grid, top, bottom, first } = this._drawing;
    if (x < 0 || y < 0 || y >= this._height || x > this._left + this._width) return null;
    const row = Math.min(top + Math.floor(y / this._rowHeight), bottom);
    const step = first + (x - this._left) / this._stepWidth;
    return { row, column: x < this._left ? -1 : grid.columnAt(step), step };
  }

  _listen() {
    const { element } = this;
    const point = (event) => {
      const box = element.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !this._drawing) return;
      const [x, y] = point(event);
      this._pressed = { x, y };
      element.setPointerCapture(event.pointerId);
    });
    element.addEventListener("pointermove", (event) => {
      if (!this._drawing) return;
      const [x, y] = point(event);
      if (this._pressed && Math.hypot(x - this._pressed.x, y - this._pressed.y) > 5) {
        this._brush = this._corners(this._pressed, { x, y });
        this._on.hover(-1, -1);
        this._drawOverlay();
        return;
      }
      const cell = this._cell(x, y);
      if (!cell || cell.column < 0) this._on.hover(-1, -1);
      else this._on.hover(cell.row, cell.column, event.clientX, event.clientY);
    });
    element.addEventListener("pointerup", (event) => {
      if (!this._pressed) return;
      const brush = this._brush;
      const cell = this._cell(...point(event));
      this._pressed = this._brush = null;
      this._drawOverlay();
      if (brush) this._brushed(brush);
      else if (cell)
        this._on.pick(cell.row, cell.column, event.shiftKey || event.ctrlKey || event.metaKey);
    });
    element.addEventListener("pointercancel", () => {
      this._pressed = this._brush = null;
      this._drawOverlay();
    });
    element.addEventListener("pointerleave", () => this._on.hover(-1, -1));
    element.addEventListener("dblclick", () => this._on.reset());
    element.addEventListener("keydown", (event) => this._key(event));
    element.addEventListener("blur", () => this._on.hover(-1, -1));
  }

  _corners(from, to) {
    const right = this._left + this._width;
    const x = (at) => Math.min(Math.max(at, this._left), right);
    const y = (at) => Math.min(Math.max(at, 0), this._height);
    return { x0: x(from.x), y0: y(from.y), x1: x(to.x), y1: y(to.y) };
  }

  // A brush that is all wide or all high zooms one way only.
  _brushed({ x0, y0, x1, y1 }) {
    const { top, bottom, first } = this._drawing;
    const zoom = {};
    if (Math.abs(x1 - x0) > 8) {
      const [from, to] = [Math.min(x0, x1), Math.max(x0, x1)].map(
        (x) => first + (x - this._left) / this._stepWidth,
      );
      zoom.first = Math.floor(from);
      zoom.last = Math.max(Math.ceil(to), zoom.first + 1);
    }
    if (Math.abs(y1 - y0) > Math.max(8, this._rowHeight * 0.75)) {
      const at = (y) => Math.min(top + Math.floor(y / this._rowHeight), bottom);
      zoom.top = at(Math.min(y0, y1));
      zoom.bottom = at(Math.max(y0, y1) - 0.01);
    }
    if (Object.keys(zoom).length > 0) this._on.brush(zoom);
  }

  _key(event) {
    if (!this._drawing || this._drawing.grid.columns === 0) return;
    const { grid, top, bottom } = this._drawing;
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[
      event.key
    ];
    const at = this._cursor ?? { row: top, column: 0 };
    if (by) {
      const far = event.shiftKey ? 10 : 1;
      const within = (value, low, high) => Math.min(Math.max(value, low), high);
      const row = this._cursor ? within(at.row + by[0] * far, top, bottom) : top;
      const column = this._cursor ? within(at.column + by[1] * far, 0, grid.columns - 1) : 0;
      const box = this.element.getBoundingClientRect();
      const x = (this._x(grid.edge(column)) + this._x(grid.edge(column + 1))) / 2;
      this._on.hover(row, column, box.left + x, box.top + this._y(row) + this._rowHeight / 2);
    } else if (event.key === "Enter" || event.key === " ")
      this._on.pick(at.row, at.column, event.shiftKey);
    else if (event.key === "Escape") this._on.reset();
    else return;
    event.preventDefault();
  }
}
