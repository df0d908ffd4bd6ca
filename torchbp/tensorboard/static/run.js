// One run as the views ask for it: its overview, and what was fetched of it so far.

export const FINE = 1000; // columns at most: of a heat map
export const COARSE = 500; // and of a line

const KEPT = 25e6; // numbers in answers, 100 MB

export class Run {
  constructor(source, overview) {
    this._source = source;
    this._answers = new Map();
    this._sizes = new Map();
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

  async _ask(method, quantity, about) {
    const key = JSON.stringify([method, quantity, about]);
    const answer = this._answers.get(key) ?? this._source[method](this.name, quantity, about);
    this._answers.delete(key); // to the end: what is asked for is kept longest
    this._answers.set(key, answer);
    try {
      const matrix = await answer;
      this._sizes.set(key, matrix.values.length);
      this._forget();
      return matrix;
    } catch (error) {
      this._answers.delete(key);
      throw error;
    }
  }

  // Lets go of what wasn't asked for for long.
  _forget() {
    let size = 0;
    for (const key of this._answers.keys()) size += this._sizes.get(key) ?? 0;
    for (const key of this._answers.keys()) {
      if (size <= KEPT) return;
      size -= this._sizes.get(key) ?? 0;
      this._answers.delete(key);
    }
  }
}
