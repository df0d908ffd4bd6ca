// The legend of a line chart: as elements on the page, and on a canvas for a saved picture.

import { fade } from "./colour.js";
import { el, ink } from "./dom.js";
import { rule } from "./paint.js";

/** A row of the legend: `{name, colour, dash}` of a line, `{name, colour, kind}` of an area. */
export function legendEntry({ name, colour, dash, kind }) {
  const style = dash ? (dash[0] < 4 ? "dotted" : "dashed") : "line";
  const swatch = el("i", { class: `swatch ${kind ?? style}` });
  if (colour) swatch.style.setProperty("--colour", colour);
  return el("span", {}, swatch, name);
}

/** A picture of `chart`, a canvas, with the rows of its legend below. */
export function withLegend(chart, rows) {
  const ratio = devicePixelRatio;
  const picture = el("canvas", { width: chart.width, height: chart.height });
  const context = picture.getContext("2d");
  const font = `${12 * ratio}px system-ui, sans-serif`;
  context.font = font;
  const places = flow(rows, chart.width, (name) => context.measureText(name).width + 42 * ratio);
  if (rows.length > 0) picture.height += (places[places.length - 1].line + 1) * 20 * ratio;
  context.drawImage(chart, 0, 0);
  context.font = font; // a canvas forgets it when its size changes
  places.forEach(({ x, line }, index) => {
    const { name, colour, dash, kind } = rows[index];
    const y = chart.height + (line * 20 + 10) * ratio;
    if (kind) {
      context.fillStyle = kind === "zone" ? ink("--healthy") : fade(colour, 0.25);
      context.fillRect(x, y - 5 * ratio, 18 * ratio, 10 * ratio);
    } else {
      const dashes = dash ? dash.map((length) => length * ratio) : [];
      rule(context, [x, y], [x + 18 * ratio, y], colour, dashes);
    }
    context.fillStyle = ink("--text");
    context.fillText(name, x + 24 * ratio, y + 4 * ratio);
  });
  return picture;
}

// Where things of some width stand that follow one another in lines.
function flow(rows, width, measure) {
  let [x, line] = [0, 0];
  return rows.map(({ name }) => {
    const size = measure(name);
    if (x > 0 && x + size > width) [x, line] = [0, line + 1];
    const place = { x, line };
    x += size;
    return place;
  });
}
