// Verdicts: what is wrong, worst first; a click leads to where it can be seen.

import { Card } from "./card.js";
import { el } from "./dom.js";
import { count, words } from "./format.js";

const SIGNS = { alert: "▲", warning: "◆", info: "●" };
const SHOWN_FIRST = 6;
const OTHERS_FIRST = 8;

export class Verdicts {
  keys = new Set(["run", "compare"]);
  redraws = new Set();

  constructor(page) {
    this._page = page;
    this._all = false;
    this._list = el("div", { class: "verdicts" });
    this.card = new Card(page, "verdicts", "Verdicts", { table: () => this._table() });
    this.card.body.append(this._list);
  }

  async update() {
    this.redraw();
  }

  redraw() {
    const parts = this._page.runs.map((run) => [
      this._page.runs.length > 1 ? el("h3", {}, run.name) : null,
      ...this._of(run),
    ]);
    this._list.replaceChildren(...parts.flat().filter((part) => part !== null));
  }

  _of(run) {
    const { verdicts, verdicts_text: text } = run.overview;
    if (!verdicts) {
      if (text) return [el("pre", { class: "plain" }, text)];
      return [el("p", { class: "healthy" }, "This run holds no verdicts.")];
    }
    if (verdicts.length === 0) {
      return [
        el(
          "p",
          { class: "healthy" },
          el("span", { class: "sign" }, "✓ "),
          "Nothing is wrong, as far as was measured.",
        ),
      ];
    }
    const groups = alike(verdicts);
    const shown = this._all ? groups : groups.slice(0, SHOWN_FIRST);
    const more = groups.length - shown.length;
    return [
      el(
        "ol",
        {},
        shown.map((group) => this._item(run, group)),
      ),
      this._more(more),
    ];
  }

  // Verdicts that say the same of several layers are one item: the first in full, then the others' layers.
  _item(run, [verdict, ...others]) {
    const { severity, kind, step, until, evidence, advice, threshold, source } = verdict;
    const known = severity in SIGNS ? severity : "info";
    return el(
      "li",
      { class: isOver(verdict) ? "verdict over" : "verdict" },
      this._go(
        run,
        verdict,
        "go",
        el(
          "span",
          { class: "what" },
          el("span", { class: `sign ${known}` }, `${SIGNS[known]} ${severity}`),
          el("b", {}, words(kind)),
          el(
            "span",
            { class: "since" },
            isOver(verdict)
              ? `steps ${count(step)} to ${count(until)}, over`
              : `since step ${count(step)}`,
          ),
        ),
        el("code", {}, verdict.layer || "the run as a whole"),
      ),
      el("p", { class: "evidence" }, evidence),
      others.length > 0 ? this._others(run, others) : null,
      el("p", { class: "advice" }, el("b", {}, "Try "), advice),
      el("details", {}, el("summary", {}, "Rule"), el("p", {}, `${threshold} (${source})`)),
    );
  }

  _others(run, others) {
    const shown = this._all ? others : others.slice(0, OTHERS_FIRST);
    const more = others.length - shown.length;
    return el(
      "p",
      { class: "others" },
      "Also at ",
      shown.map((verdict) =>
        this._go(run, verdict, "chip", el("code", {}, verdict.layer || "the run as a whole")),
      ),
      this._more(more),
    );
  }

  _more(number) {
    if (number === 0) return null;
    const click = () => {
      this._all = true;
      this.redraw();
    };
    return el("button", { type: "button", class: "more", on: { click } }, `Show ${number} more`);
  }

  _go(run, verdict, style, ...children) {
    const click = () => this._page.show(run, verdict);
    const title = `${verdict.evidence}, since step ${verdict.step}: click to see it`;
    return el("button", { type: "button", class: style, title, on: { click } }, ...children);
  }

  _table() {
    const fields = [
      "severity",
      "kind",
      "layer",
      "step",
      "until",
      "evidence",
      "threshold",
      "source",
      "advice",
    ];
    const rows = [["run", ...fields]];
    for (const { name, overview } of this._page.runs) {
      for (const verdict of overview.verdicts ?? [])
        rows.push([name, ...fields.map((field) => verdict[field])]);
    }
    return rows;
  }
}

function isOver({ until }) {
  return until !== null && until !== undefined;
}

// Verdicts that differ only in layer, step and evidence, in the order of the first of each.
function alike(verdicts) {
  const groups = new Map();
  for (const verdict of verdicts) {
    const { severity, kind, advice, threshold } = verdict;
    const key = JSON.stringify([isOver(verdict), severity, kind, advice, threshold]);
    groups.set(key, [...(groups.get(key) ?? []), verdict]);
  }
  return [...groups.values()];
}
