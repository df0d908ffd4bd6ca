// The page: the views, what they share, and when each has to be drawn again.

import { Controls } from "./controls.js";
import { el, ink } from "./dom.js";
import { HeatMap } from "./heatmap.js";
import { Lines } from "./lines.js";
import { Losses } from "./losses.js";
import { isAbsent } from "./matrix.js";
import { Noise } from "./noise.js";
import { Profile } from "./profile.js";
import { rowsOf } from "./rows.js";
import { FINE, Run } from "./run.js";
import { State } from "./state.js";
import { Tooltip } from "./tooltip.js";
import { Updates } from "./updates.js";
import { Verdicts } from "./verdicts.js";

const SHOWN_IN = {
  noise_scale: "noise",
  update_ratio: "updates",
  loss_train: "losses",
  loss_val: "losses",
};

export class Page {
  constructor(root, source, address) {
    this._source = source;
    this._pending = 0;
    this._waiting = [];
    this._known = new Map();
    this.runs = [];
    this.steps = [];
    this.chosen = [];
    this.state = new State(address);
    this.state.listen((changed) => this._changed(changed));
    this.tooltip = new Tooltip(root);
    this.controls = new Controls(this);
    this._verdicts = new Verdicts(this);
    this._heatmap = new HeatMap(this);
    this._views = [
      this._verdicts,
      this._heatmap,
      new Profile(this),
      new Lines(this),
      new Updates(this),
      new Losses(this),
      new Noise(this),
    ];
    this._notice = el("p", { class: "notice", role: "alert", hidden: true });
    this._empty = el("div", { class: "empty", hidden: true });
    this._board = el(
      "main",
      { class: "board" },
      this._views.map(({ card }) => card.element),
    );
    root.append(this.controls.element, this._notice, this._empty, this._board);
  }

  // ------------------------------------------------------------------------------ for the views
  /** The quantity looked at: the one asked for, or the first that the run has. */
  get quantity() {
    const run = this.runs[0];
    return run?.quantity(this.state.get("quantity")) ?? run?.vectors[0];
  }

  /** The step looked at; the last where none was chosen. */
  get step() {
    return this.state.get("step") ?? this.steps[this.steps.length - 1] ?? null;
  }

  /** The rows of a quantity: those that pass the filter and for which anything was ever measured. */
  async rows(run, quantity) {
    const planes = [this.state.get("extreme")];
    const whole = await run.matrix(quantity.name, { columns: FINE, planes });
    const rows = rowsOf(quantity, this.state.get("filter"), this.state.get("group"));
    const { bits } = whole.plane(planes[0]);
    const measured = (entry) => {
      for (let at = entry; at < bits.length; at += whole.entries.length) {
        if (!isAbsent(bits[at])) return true;
      }
      return false;
    };
    const kept = rows.map((row) => ({ ...row, entries: row.entries.filter(measured) }));
    return kept.filter(({ entries }) => entries.length > 0);
  }

  /** Runs differ by colour and by dash. */
  colourOf(run, other = false) {
    const place = this.runs.indexOf(run) === 0 ? "--run-a" : "--run-b";
    return ink(other ? `${place}-other` : place);
  }

  dashOf(run) {
    return this.runs.indexOf(run) === 0 ? undefined : [6, 4];
  }

  /** Leads to where a verdict is seen. */
  show(run, verdict) {
    const changes = { first: null, last: null, top: null, bottom: null, step: verdict.step };
    if (run !== this.runs[0]) Object.assign(changes, { run: run.name, compare: this.runs[0].name });
    const vector = verdict.quantities.find((name) => run.vectors.some((one) => one.name === name));
    const scalar = `run/${verdict.quantities[0]}`;
    let place = SHOWN_IN[verdict.quantities[0]] ?? (vector ? "heatmap" : "losses");
    if (verdict.layer) {
      place = "heatmap";
      Object.assign(changes, { layers: [verdict.layer], filter: "", group: 0 });
    }
    if (vector) changes.quantity = vector;
    else if (run.quantity(scalar)) changes.scalar = scalar;
    this.state.set(changes);
    this._views.find(({ card }) => card.name === place).card.point();
  }

  /** Resolves when nothing is being fetched or drawn. */
  settled() {
    return this._pending === 0
      ? Promise.resolve()
      : new Promise((resolve) => this._waiting.push(resolve));
  }

  // ------------------------------------------------------------------------------------- data
  /** Looks for new runs and new data, and draws what has changed. */
  reload() {
    return this._busy(async () => {
      this._listing = await this._source.runs();
      const { runs, message, logdir } = this._listing;
      this._tell(message);
      this._empty.hidden = runs.length > 0;
      this._board.hidden = this.controls.element.hidden = runs.length === 0;
      if (runs.length === 0) {
        this._empty.replaceChildren(...emptyState(logdir));
        return;
      }
      await this._update(this._views);
    });
  }

  async _update(views, changed = null) {
    const before = this.runs;
    await this._open();
    const grown =
      this.runs.length !== before.length || this.runs.some((run, index) => run !== before[index]);
    this.controls.draw(this._listing);
    await this._share();
    const stale = (view) => !changed || grown || [...view.keys].some((key) => changed.has(key));
    for (const view of views) {
      try {
        if (stale(view)) await view.update();
        else if ([...view.redraws].some((key) => changed.has(key))) view.redraw();
      } catch (error) {
        // A source says what is wrong in a sentence; anything else is a fault of ours.
        const expected = error.constructor === Error;
        view.card.say(expected ? error.message : `This view failed: ${error.message}`);
        if (!expected) console.error(error);
      }
    }
  }

  // The runs that are looked at, opened anew where they have grown.
  async _open() {
    const isThere = () => this._listing.runs.some(({ run }) => run === this.state.get("run"));
    if (!isThere()) this._listing = await this._source.runs(); // of a link, newer than what we know
    if (!isThere()) {
      const missed = this.state.get("run");
      if (missed) this._tell(`There is no run ${missed} here; this is another one.`);
      this.state.assume({ run: worstFirst(this._listing.runs)[0].run });
    }
    const wanted = [this.state.get("run"), this.state.get("compare")].filter((name) => name !== "");
    const opened = [];
    for (const name of wanted) {
      const listed = this._listing.runs.find(({ run }) => run === name);
      if (!listed || opened.some((run) => run.name === name)) continue;
      const known = this._known.get(name);
      if (known?.version !== listed.version) {
        const run = new Run(this._source, await this._source.overview(name));
        this._known.set(name, { version: listed.version, run });
      }
      opened.push(this._known.get(name).run);
    }
    this.runs = opened;
  }

  // What the views share: the samples' steps, and the chosen layers with their colours.
  async _share() {
    const quantity = this.quantity;
    this.steps = [];
    this.chosen = [];
    if (!quantity) return;
    const planes = [this.state.get("extreme")];
    this.steps = (await this.runs[0].matrix(quantity.name, { columns: FINE, planes })).ends;
    const layers =
      this.state.get("layers").length > 0 ? this.state.get("layers") : await this._usual();
    this.chosen = layers.map((layer, index) => ({ layer, colour: ink(`--line-${index % 8}`) }));
  }

  // Where nothing was chosen: the layer of the worst verdict, the first, one in the middle, the last.
  async _usual() {
    const rows = await this.rows(this.runs[0], this.quantity);
    const layers = [...new Set(rows.flatMap((row) => row.layers))];
    const accused = (this.runs[0].overview.verdicts ?? []).map(({ layer }) => layer);
    const guilty = accused.filter((layer) => layers.includes(layer)).slice(0, 1);
    return [
      ...new Set([layers[0], layers[layers.length >> 1], layers[layers.length - 1], ...guilty]),
    ].filter((layer) => layer !== undefined);
  }

  _changed(changed) {
    if (!this._listing || this._loading) {
      this._again = this._again ? new Set([...this._again, ...changed]) : changed;
      return;
    }
    this._busy(() => this._update(this._views, changed));
  }

  // One after the other; what changes meanwhile is drawn afterwards.
  async _busy(work) {
    this._pending++;
    document.documentElement.dataset.ready = "no";
    const turn = (this._turn ?? Promise.resolve()).then(async () => {
      this._loading = true;
      try {
        await work();
        while (this._again) {
          const changed = this._again;
          this._again = null;
          await this._update(this._views, changed);
        }
      } catch (error) {
        this._tell(`The data could not be had: ${error.message}`);
      } finally {
        this._loading = false;
      }
    });
    this._turn = turn;
    await turn;
    this._pending--;
    if (this._pending > 0) return;
    document.documentElement.dataset.ready = "yes";
    for (const resolve of this._waiting.splice(0)) resolve();
  }

  /** Draws everything again, as after a change of theme. */
  redraw() {
    return this._busy(async () => {
      if (this.runs.length > 0) await this._update(this._views);
    });
  }

  _tell(message) {
    this._notice.textContent = message || "";
    this._notice.hidden = !message;
  }
}

/** Builds the page in `root` from what `source` gives, and returns it when all is drawn. */
export async function start(root, source, address) {
  const page = new Page(root, source, address);
  await page.reload();
  return page;
}

/** Runs, the one in most trouble first, as it is what one opens; of like ones the newest. */
export function worstFirst(runs) {
  const weight = ({ verdicts }) => (verdicts ? verdicts.alert * 1e4 + verdicts.warning : 0);
  return [...runs].sort((a, b) => weight(b) - weight(a) || b.updated - a.updated);
}

function emptyState(logdir) {
  return [
    el("h2", {}, "No run of torchbp.watch here yet"),
    el(
      "p",
      {},
      "Looked in ",
      el("code", {}, logdir || "the log directory"),
      " and below it. Add one line to the training script, run it, and reload:",
    ),
    el(
      "pre",
      {},
      'import torchbp\n\nwith torchbp.watch(model, optimizer, log_dir="runs/first") as monitor:\n    ...  # the training loop, unchanged',
    ),
    el(
      "p",
      {},
      "Or see five networks that differ in one thing each: ",
      el("code", {}, "torchbp demo"),
    ),
  ];
}
