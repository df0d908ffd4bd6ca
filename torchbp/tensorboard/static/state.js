// What is looked at: run, quantity, step, layers, zoom. It stands in the address, so that a link leads back.

const DEFAULTS = {
  run: "",
  compare: "",
  quantity: "error_signal",
  step: null, // null: the last
  layers: [], // whose lines are drawn; empty: a few are chosen
  filter: "",
  group: 0, // 0: every layer by itself; n: modules by the first n parts of their names
  first: null, // the steps looked at; null: all
  last: null,
  top: null, // the rows looked at; null: all
  bottom: null,
  extreme: "max", // what stands for a cell that holds several values
  scalar: "", // which number of the run is drawn; empty: the losses
};

export class State {
  /** `address` has `read()` and `write(text)`. */
  constructor(address) {
    this._address = address;
    this._listeners = [];
    this._values = { ...DEFAULTS, ...decode(address.read()) };
    address.listen?.(() => this.set({ ...DEFAULTS, ...decode(address.read()) }));
  }

  get(key) {
    return this._values[key];
  }

  /** Changes some values and tells who listens which of them really changed. */
  set(changes) {
    const changed = Object.keys(changes).filter(
      (key) => JSON.stringify(changes[key]) !== JSON.stringify(this._values[key]),
    );
    if (changed.length === 0) return;
    for (const key of changed) this._values[key] = changes[key];
    this._address.write(encode(this._values));
    for (const listener of this._listeners) listener(new Set(changed));
  }

  /** Changes some values where whoever listens knows already. */
  assume(changes) {
    Object.assign(this._values, changes);
    this._address.write(encode(this._values));
  }

  listen(listener) {
    this._listeners.push(listener);
  }
}

function encode(values) {
  const given = new URLSearchParams();
  for (const [key, value] of Object.entries(values)) {
    if (JSON.stringify(value) === JSON.stringify(DEFAULTS[key])) continue;
    if (Array.isArray(value)) for (const item of value) given.append(key, item);
    else given.set(key, value);
  }
  return given.toString();
}

function decode(text) {
  const values = {};
  const given = new URLSearchParams(text);
  for (const [key, usual] of Object.entries(DEFAULTS)) {
    if (!given.has(key)) continue;
    if (Array.isArray(usual)) values[key] = given.getAll(key);
    else if (typeof usual === "string") values[key] = given.get(key);
    else if (Number.isFinite(Number(given.get(key)))) values[key] = Number(given.get(key));
  }
  return values;
}
