// Verdicts: what is wrong, worst first; a click leads to where it can be seen.

import { Card } from "./card.js";
import { el } from "./dom.js";
import { count, words } from "./format.js";

const SIGNS = { alert: "▲", warning: "◆", info: "●" };
const SHOWN_FIRST = 6;

export class Verdicts {
  keys = new Set(["run", "compare"]);
  redraws = new Set();

  constructor(page) {
    this._page = page;
    this._all = false;
    this._list = el("div", { class: "verdicts" });
    this.card = new Card("verdicts", "Verdicts", { table: () => this._table() });
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
    const shown = this._all ? verdicts : verdicts.slice(0, SHOWN_FIRST);
    const more = verdicts.length - shown.length;
    return [
      el(
        "ol",
        {},
        shown.map((verdict) => this._item(run, verdict)),
      ),
      more > 0
        ? el(
            "button",
            {
              type: "button",
              on: {
                click: () => {
                  this._all = true;
                  this.redraw();
                },
              },
            },
            `Show ${more} more`,
          )
        : null,
    ];
  }

  _item(run, verdict) {
    const { severity, kind, layer, step, until, evidence, advice, threshold, source } = verdict;
    const over = until !== null && until !== undefined;
    const since = over
      ? `steps ${count(step)} to ${count(until)}, over`
      : `since step ${count(step)}`;
    return el(
      "li",
      { class: over ? "verdict over" : "verdict" },
      el(
        "button",
        {
          type: "button",
          class: "go",
          title: "Show where this is seen",
          on: { click: () => this._page.show(run, verdict) },
        },
        el(
          "span",
          { class: "what" },
          el(
            "span",
            { class: `sign ${severity in SIGNS ? severity : "info"}` },
            `${SIGNS[severity] ?? "●"} ${severity}`,
          ),
          el("b", {}, words(kind)),
          el("span", { class: "since" }, since),
        ),
        el("code", {}, layer || "the run as a whole"),
      ),
      el("p", { class: "evidence" }, evidence),
      el("p", { class: "advice" }, el("b", {}, "Try "), advice),
      el("details", {}, el("summary", {}, "Rule"), el("p", {}, `${threshold} (${source})`)),
    );
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
