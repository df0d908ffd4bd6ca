// What a source gives for a quantity: samples (columns) × entries (layers, parameters).

const ABSENT = 0x7fc0ab5e; // the NaN that says: nothing was there to measure
const TO_LEFT_OUT = new Float32Array(0);

export class Matrix {
  /** `header` as the contract (README.md beside this folder) has it; `values` is a Float32Array. */
  constructor(header, values) {
    this.header = header;
    this.steps = header.steps;
    this.ends = header.ends;
    this.planes = header.planes;
    this.entries = header.entries;
    this.exact = header.exact;
    this.values = values;
    this._bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  }

  get columns() {
    return this.steps.length;
  }

  /** The plane of that name; that of the samples themselves where they aren't put together. */
  plane(name) {
    const index = Math.max(this.planes.indexOf(name), 0);
    const size = this.columns * this.entries.length;
    return {
      values: this.values.subarray(index * size, (index + 1) * size),
      bits: this._bits.subarray(index * size, (index + 1) * size),
    };
  }

  /** One entry over time in a plane: numbers, undefined where there was nothing to measure. */
  line(name, entry) {
    const { values, bits } = this.plane(name);
    const width = this.entries.length;
    return this.steps.map((_, column) => {
      const at = column * width + entry;
      return isAbsent(bits[at]) ? undefined : values[at];
    });
  }

  /** The column whose samples are nearest to `step`. */
  column(step) {
    let best = 0;
    for (let column = 0; column < this.columns; column++) {
      if (this._distance(column, step) < this._distance(best, step)) best = column;
    }
    return best;
  }

  _distance(column, step) {
    return Math.max(this.steps[column] - step, step - this.ends[column], 0);
  }

  /** The columns that have samples in `first` to `last`, and of those only `entries`. */
  slice(first, last, entries) {
    const keep = [];
    for (let column = 0; column < this.columns; column++) {
      if (this.ends[column] >= first && this.steps[column] <= last) keep.push(column);
    }
    const places = entries ? entries.map((entry) => this.entries.indexOf(entry)) : null;
    if (!places && keep.length === this.columns) return this;
    const width = places ? places.length : this.entries.length;
    const bits = new Uint32Array(this.planes.length * keep.length * width);
    let at = 0;
    for (const name of this.planes) {
      const plane = this.plane(name).bits;
      for (const column of keep) {
        const row = plane.subarray(
          column * this.entries.length,
          (column + 1) * this.entries.length,
        );
        if (places) for (const place of places) bits[at++] = row[place];
        else {
          bits.set(row, at);
          at += width;
        }
      }
    }
    const pick = (list) => keep.map((column) => list[column]);
    const header = { ...this.header, steps: pick(this.steps), ends: pick(this.ends) };
    if (entries) header.entries = entries;
    return new Matrix(header, new Float32Array(bits.buffer));
  }

  /** No samples at all. */
  static empty() {
    return new Matrix(
      { steps: [], ends: [], planes: ["value"], entries: [], exact: true },
      TO_LEFT_OUT,
    );
  }

  /** Of the bytes that the tab's server sends. */
  static of(buffer) {
    const length = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
    return new Matrix(header, new Float32Array(buffer, 4 + length));
  }
}

/** Whether a value's bits say that nothing was there to measure. */
export function isAbsent(bits) {
  return bits === ABSENT;
}
