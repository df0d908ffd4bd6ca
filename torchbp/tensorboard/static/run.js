// One run as the views ask for it: its overview, and what was fetched of it so far.

export const FINE = 1000; // columns at most: of a heat map
export const COARSE = 500; // and of a line

const KEPT = 24; // answers, of some megabytes each at most

export class Run {
  constructor(source, overview) {
    this._source = source;
    this._answers = new Map();
    this.overview = overview;
    this.name = overview.run;
    this.quantities = overview.quantities.map((quantity) => ({
      ...quantity,
      names: overview.entries[quantity.entries]?.names ?? [],
      kinds: overview.entries[quantity.entries]?.kinds ?? [],
    }));
  }

  quantity(name) {
    return this.quantities.find((quantity) => quantity.name === name);
  }

  /** The quantities that have a value per layer or parameter. */
  get vectors() {
    return this.quantities.filter(({ axis }) => axis === "layer" || axis === "parameter");
  }

  get scalars() {
    return this.quantities.filter(({ axis }) => axis === "run");
  }

  matrix(quantity, options) {
    return this._ask("matrix", quantity, options);
  }

  profile(quantity, step) {
    return this._ask("profile", quantity, step);
  }

  _ask(method, quantity, about) {
    const key = JSON.stringify([method, quantity, about]);
    let answer = this._answers.get(key);
    if (!answer) {
      answer = this._source[method](this.name, quantity, about);
      answer.catch(() => this._answers.delete(key));
    }
    this._answers.delete(key); // to the end: what is asked for is kept longest
    this._answers.set(key, answer);
    if (this._answers.size > KEPT) this._answers.delete(this._answers.keys().next().value);
    return answer;
  }
}
