// The frame of a view: its title, what belongs beside it, a place for a message, and the export buttons.

import { el, ink, save } from "./dom.js";
import { csv } from "./format.js";

export class Card {
  /**
   * `name` is its id and the name of exported files. `table()` gives the rows of its CSV file, `picture()`
   * a canvas; either may be missing.
   */
  constructor(page, name, title, { table, picture } = {}) {
    this._page = page;
    this.name = name;
    this._title = el("h2", {}, title);
    this._note = el("span", { class: "note" });
    this.controls = el("span", { class: "controls" });
    this.message = el("p", { class: "message", hidden: true });
    this.body = el("div", { class: "body" });
    const button = (label, title_, click) =>
      el("button", { class: "export", type: "button", title: title_, on: { click } }, label);
    this._exports = el(
      "span",
      { class: "exports" },
      picture ? button("PNG", "Save the picture", () => this._picture(picture())) : null,
      table ? button("CSV", "Save the numbers", () => save(`${name}.csv`, csv(table()))) : null,
    );
    this.element = el(
      "section",
      { class: "card", id: name, "aria-label": title, tabIndex: -1 },
      el("header", {}, this._title, this._note, this.controls, this._exports),
      this.message,
      this.body,
    );
  }

  title(text, note = "") {
    this._title.textContent = text;
    this._note.textContent = note;
  }

  /** Shows a sentence in place of the view; an empty one brings the view back. */
  say(sentence) {
    this.message.textContent = sentence;
    this.message.hidden = sentence === "";
    this.body.hidden = this._exports.hidden = sentence !== "";
  }

  /** Scrolls here, and marks it for a moment. */
  point() {
    this.element.scrollIntoView({ block: "nearest", behavior: "instant" });
    this.element.classList.remove("pointed");
    void this.element.offsetWidth; // so that the animation begins anew
    this.element.classList.add("pointed");
  }

  // A picture says by itself what it shows, and has a ground, where a canvas is clear.
  _picture(canvas) {
    const ratio = devicePixelRatio;
    const [edge, head] = [14 * ratio, 48 * ratio];
    const picture = el("canvas", {
      width: canvas.width + 2 * edge,
      height: canvas.height + head + edge,
    });
    const context = picture.getContext("2d");
    context.fillStyle = ink("--card");
    context.fillRect(0, 0, picture.width, picture.height);
    const write = (text, y, colour, weight) => {
      context.fillStyle = ink(colour);
      context.font = `${weight} ${13 * ratio}px system-ui, sans-serif`;
      context.fillText(text, edge, y * ratio, canvas.width);
    };
    const note = this._note.textContent;
    const runs = this._page.runs.map(({ name }) => name).join(" and ");
    write(this._title.textContent, 20, "--text", 600);
    write([runs, note].filter(Boolean).join(", "), 38, "--muted", 400);
    context.drawImage(canvas, edge, head);
    picture.toBlob((blob) => save(`${this.name}.png`, blob));
  }
}
