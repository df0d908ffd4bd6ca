// One tooltip for the page: a heading, and rows of colour, name, value and unit.

import { el } from "./dom.js";

export class Tooltip {
  constructor(root) {
    this._box = el("div", { class: "tooltip", role: "tooltip", hidden: true });
    root.append(this._box);
  }

  /** Shows it beside the point `x`, `y` of the window. A row is `{colour, name, value, note}`. */
  show(x, y, title, rows) {
    const line = ({ colour, name, value, note }) => {
      const swatch = el("i", { class: "swatch" });
      if (colour) swatch.style.background = colour;
      else swatch.hidden = true;
      return el(
        "tr",
        {},
        el("th", {}, swatch, name),
        el("td", { class: "number" }, value),
        el("td", { class: "muted" }, note ?? ""),
      );
    };
    this._box.replaceChildren(el("b", {}, title), el("table", {}, rows.map(line)));
    this._box.hidden = false;
    const { width, height } = this._box.getBoundingClientRect();
    const left = x + 16 + width > window.innerWidth ? x - 16 - width : x + 16;
    const top = y + 16 + height > window.innerHeight ? y - 12 - height : y + 16;
    this._box.style.left = `${Math.max(left, 4)}px`;
    this._box.style.top = `${Math.max(top, 4)}px`;
  }

  hide() {
    this._box.hidden = true;
  }
}
