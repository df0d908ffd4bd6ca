// The frame of a view: its title, what belongs beside it, a place for a message, and the export buttons.

import { el, ink, save } from "./dom.js";
import { csv } from "./format.js";

export class Card {
  /**
   * `name` is its id and the name of exported files. `table()` gives the rows of its CSV file, `picture()`
   * a canvas; either may be missing.
   */
  constructor(name, title, { table, picture } = {}) {
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

  _picture(canvas) {
    // A canvas is clear where nothing is drawn: a picture gets the card as its ground.
    const picture = el("canvas", { width: canvas.width, height: canvas.height });
    const context = picture.getContext("2d");
    context.fillStyle = ink("--card");
    context.fillRect(0, 0, picture.width, picture.height);
    context.drawImage(canvas, 0, 0);
    picture.toBlob((blob) => save(`${this.name}.png`, blob));
  }
}
