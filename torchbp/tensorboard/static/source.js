// Where the page gets its data: from TensorBoard's server, or from the report it stands in. Both sources
// have the same methods; the README beside this folder is their contract.

import { Matrix } from "./matrix.js";

/** Asks the plugin's routes, relative to the page, so that a path prefix is kept. */
export class TabSource {
  async runs() {
    return (await this._get("runs", {})).json();
  }

  async overview(run) {
    return (await this._get("overview", { run })).json();
  }

  async matrix(run, quantity, { first, last, columns, planes, entries } = {}) {
    const asked = {
      run,
      quantity,
      first,
      last,
      columns,
      planes: planes?.join(","),
      entries: entries?.join(","),
    };
    return Matrix.of(await (await this._get("matrix", asked)).arrayBuffer());
  }

  async profile(run, quantity, step) {
    return Matrix.of(await (await this._get("profile", { run, quantity, step })).arrayBuffer());
  }

  async _get(route, parameters) {
    const given = Object.entries(parameters).filter(
      ([, value]) => value !== undefined && value !== null,
    );
    const query = new URLSearchParams(given).toString();
    const response = await fetch(query ? `${route}?${query}` : route, { cache: "no-store" });
    if (response.ok) return response;
    let sentence = `TensorBoard answered ${response.status} for ${route}`;
    try {
      sentence = (await response.json()).error || sentence;
    } catch {
      // Not ours: a proxy's page, say.
    }
    throw new Error(sentence);
  }
}

/** Reads what the report holds. */
export class ReportSource {
  constructor(data) {
    this._data = data;
    this._matrices = new Map();
  }

  async runs() {
    return this._data.runs;
  }

  async overview(run) {
    return this._data.overviews[run];
  }

  async matrix(run, quantity, { first = -Infinity, last = Infinity, entries } = {}) {
    return (await this._whole(run, quantity)).slice(first, last, entries);
  }

  async profile(run, quantity, step) {
    const whole = await this._whole(run, quantity);
    if (whole.columns === 0) return whole;
    const column = whole.column(step);
    const one = whole.slice(whole.ends[column], whole.ends[column]);
    const { values } = one.plane(one.exact ? "value" : "last");
    const ends = one.ends;
    return new Matrix(
      { ...one.header, planes: ["value"], steps: ends, exact: true },
      values.slice(),
    );
  }

  _whole(run, quantity) {
    const key = JSON.stringify([run, quantity]);
    if (!this._matrices.has(key)) this._matrices.set(key, this._unpack(run, quantity));
    return this._matrices.get(key);
  }

  async _unpack(run, quantity) {
    const found = this._data.matrices[run]?.[quantity];
    if (!found)
      throw new Error(
        `${quantity} is not in this report: it was left out for the size of the file`,
      );
    const packed = Uint8Array.from(atob(found.data), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const planar = new Uint8Array(await new Response(stream).arrayBuffer());
    const count = planar.length / 4;
    const bytes = new Uint8Array(planar.length);
    for (let place = 0; place < 4; place++) {
      for (let index = 0; index < count; index++)
        bytes[4 * index + place] = planar[place * count + index];
    }
    return new Matrix(found.header, new Float32Array(bytes.buffer));
  }
}
