// What stands in each cell of a heat map: rows × samples, as values and as colour codes.

import { CODE_INF, CODE_NONE } from "./colour.js";
import { isAbsent } from "./matrix.js";

export class Grid {
  /**
   * `extreme`, "max" or "min", stands for a cell that holds several layers or samples; `last` is the
   * last step of the run.
   */
  constructor(matrix, rows, extreme, last = Infinity) {
    this.matrix = matrix;
    this.rows = rows;
    this.extreme = extreme;
    this.columns = matrix.columns;
    this.plane = matrix.plane(matrix.exact ? "value" : extreme);
    this._edges = edges(matrix, last);
  }

  /** The step at which column `column` begins; that of the column after the last one is the end. */
  edge(column) {
    return this._edges[column];
  }

  /** The column that is drawn at `step`, or -1. */
  columnAt(step) {
    let low = 0;
    let high = this.columns;
    if (high === 0 || step < this._edges[0] || step >= this._edges[high]) return -1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this._edges[middle] <= step) low = middle;
      else high = middle;
    }
    return low;
  }

  /** The place in the matrix of what a cell shows; -1 where nothing was there to measure. */
  place(row, column) {
    const { values, bits } = this.plane;
    const base = column * this.matrix.entries.length;
    const { entries } = this.rows[row];
    if (entries.length === 1) return isAbsent(bits[base + entries[0]]) ? -1 : base + entries[0];
    let best = -1;
    for (const entry of entries) {
      const at = base + entry;
      if (isAbsent(bits[at])) continue;
      const value = values[at];
      if (best < 0 || Number.isNaN(value)) best = at;
      else if (!Number.isNaN(values[best])) {
        if (this.extreme === "min" ? value < values[best] : value > values[best]) best = at;
      }
    }
    return best;
  }

  /** What a cell shows: `{value, entry}`, the value undefined where nothing was there to measure. */
  cell(row, column) {
    const at = this.place(row, column);
    if (at < 0) return { value: undefined, entry: this.rows[row].entries[0] };
    return { value: this.plane.values[at], entry: at % this.matrix.entries.length };
  }

  /** Codes of all cells, column by column. */
  codes(scale) {
    const codes = new Uint16Array(this.columns * this.rows.length);
    let at = 0;
    for (let column = 0; column < this.columns; column++) {
      for (let row = 0; row < this.rows.length; row++) {
        const place = this.place(row, column);
        codes[at++] = place < 0 ? CODE_NONE : scale.code(this.plane.values[place]);
      }
    }
    return codes;
  }
}

/** The code that wins where a pixel holds several cells: NaN, inf, then the extreme. */
export function winner(one, other, extreme) {
  if (one === CODE_NONE || other === CODE_NONE) return one + other;
  const largest = extreme === "max" || one >= CODE_INF || other >= CODE_INF;
  return largest ? Math.max(one, other) : Math.min(one, other);
}

// A sample is drawn until the next one; the last as wide as is usual, but hardly beyond the run's end.
function edges({ steps, ends }, last) {
  if (steps.length === 0) return [];
  const pauses = steps.slice(1).map((step, index) => step - ends[index]);
  const usual = pauses.length ? [...pauses].sort((a, b) => a - b)[pauses.length >> 1] : 1;
  const end = ends[ends.length - 1];
  const visible = end + (end - steps[0]) * 0.015;
  return [...steps, Math.max(Math.min(end + usual, Math.max(last + 1, visible)), end + 1)];
}
