// The bar above the views: which run, against which, which quantity, which names; and what the run is.

import { el } from "./dom.js";
import { count, exact, words } from "./format.js";
import { depth } from "./rows.js";

const ORDER = [
  "error_signal",
  "layer_gradient_norm",
  "gradient_norm",
  "update_ratio",
  "dead_share",
  "saturated_share",
];
const STATES = { finished: "finished", running: "still running", "broken off": "broken off" };
const MARKS_OF = { alert: "▲", warning: "◆", info: "●" };

const TOLD = ["model", "parameters", "activation", "optimizer", "lr", "batch_size"];

export class Controls {
  constructor(page) {
    this._page = page;
    const { state } = page;
    const choice = (key, change) =>
      el("select", { id: `choose-${key}`, on: { change: (event) => change(event.target.value) } });
    const all = { first: null, last: null, top: null, bottom: null };
    this._run = choice("run", (run) =>
      state.set({
        ...all,
        run,
        layers: [],
        step: null,
        ...(run === state.get("compare") ? { compare: "" } : {}),
      }),
    );
    this._compare = choice("compare", (compare) => state.set({ compare }));
    this._quantity = choice("quantity", (quantity) =>
      state.set({ quantity, top: null, bottom: null }),
    );
    this._group = choice("group", (group) =>
      state.set({ group: Number(group), top: null, bottom: null }),
    );
    this._filter = el("input", {
      id: "choose-filter",
      type: "search",
      placeholder: "e.g. encoder.*attn, head",
      spellcheck: false,
      title: "Parts of names, separated by commas; * stands for anything",
      on: { input: () => state.set({ filter: this._filter.value, top: null, bottom: null }) },
    });
    const field = (label, node) => el("label", { for: node.id }, el("span", {}, label), node);
    this._facts = el("p", { class: "facts" });
    this.extra = el("span", { class: "extra" });
    this.element = el(
      "div",
      { class: "bar", role: "toolbar", "aria-label": "What is shown" },
      field("Run", this._run),
      field("Compare with", this._compare),
      field("Quantity", this._quantity),
      field("Rows", this._group),
      field("Names", this._filter),
      this.extra,
      this._facts,
    );
  }

  draw(listing) {
    const { state, runs, quantity } = this._page;
    const label = ({ run, verdicts, state: how }) => {
      const worst = ["alert", "warning", "info"].find((severity) => verdicts?.[severity] > 0);
      const sign = worst ? ` ${MARKS_OF[worst]}` : verdicts ? " ✓" : "";
      return `${run}${sign}${how === "running" ? " (running)" : ""}`;
    };
    const options = listing.runs.map((one) => el("option", { value: one.run }, label(one)));
    fill(this._run, options, state.get("run"));
    const others = listing.runs.filter(({ run }) => run !== state.get("run"));
    fill(
      this._compare,
      [
        el("option", { value: "" }, "nothing"),
        ...others.map((one) => el("option", { value: one.run }, label(one))),
      ],
      state.get("compare"),
    );
    const main = runs[0];
    const rank = ({ name }) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);
    const vectors = [...(main?.vectors ?? [])].sort((a, b) => rank(a) - rank(b));
    const named = (one) => {
      const twin = one.axis === "parameter" && one.name === "gradient_norm";
      return el(
        "option",
        { value: one.name, title: one.title },
        twin ? "gradient norm, per parameter" : words(one.name),
      );
    };
    fill(this._quantity, vectors.map(named), quantity?.name ?? "");
    const deepest = quantity ? Math.min(depth(quantity.names) - 1, 6) : 0;
    const groups = Array.from({ length: deepest }, (_, index) => index + 1);
    fill(
      this._group,
      [
        el(
          "option",
          { value: 0 },
          quantity?.axis === "parameter" ? "every parameter" : "every layer",
        ),
        ...groups.map((n) =>
          el("option", { value: n }, n === 1 ? "top modules" : `modules, ${n} parts deep`),
        ),
      ],
      String(Math.min(state.get("group"), deepest)),
    );
    if (document.activeElement !== this._filter) this._filter.value = state.get("filter");
    this._facts.replaceChildren(...runs.flatMap((run) => this._factsOf(run)));
  }

  _factsOf({ name, overview }) {
    const { hparams = {}, last_step: last, state, entries } = overview;
    const layers = this._page.runs
      .find((run) => run.name === name)
      .vectors.find(({ axis }) => axis === "layer");
    const size = layers
      ? `${count(layers.names.length)} layers`
      : `${entries.length} kinds of entries`;
    const told = TOLD.filter((key) => hparams[key] !== undefined).map((key) =>
      fact(key, hparams[key]),
    );
    const all = Object.entries(hparams).map(([key, value]) => `${words(key)}: ${value}`);
    const facts = [STATES[state] ?? state, `step ${count(last)}`, size, ...told];
    return [
      el(
        "span",
        { title: all.join("\n"), class: `state ${state === "finished" ? "" : "open"}` },
        el("b", {}, name),
        ` ${facts.join(" · ")}`,
      ),
    ];
  }
}

function fact(key, value) {
  if (key === "parameters") return `${count(value)} parameters`;
  if (typeof value !== "number") return String(value);
  return `${words(key)} ${exact(value)}`;
}

function fill(select, options, value) {
  select.replaceChildren(...options);
  select.value = value;
  select.disabled = options.length < 2;
}
