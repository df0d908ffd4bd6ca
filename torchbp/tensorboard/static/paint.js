// What is drawn on a canvas in several places.

import { ink } from "./dom.js";

/** A straight line from one point to another. */
export function rule(ctx, from, to, colour, dash = [], width = devicePixelRatio) {
  ctx.strokeStyle = colour;
  ctx.lineWidth = width;
  ctx.setLineDash(dash);
  ctx.beginPath();
  ctx.moveTo(...from);
  ctx.lineTo(...to);
  ctx.stroke();
}

/** The ground on which cells stand: what is seen of it wasn't measured. */
export function hatch(context, x, y, width, height) {
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  for (let at = x - height; at < x + width; at += 7) {
    rule(context, [at, y + height], [at + height, y], ink("--grid"), [], 1);
  }
  context.restore();
}

/** Round steps from `first` to `last`, at most about `most`. */
export function niceSteps(first, last, most) {
  const rough = (last - first) / Math.max(most, 1);
  const size = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
  const every = [1, 2, 5, 10].map((factor) => factor * size).find((step) => step >= rough) ?? size;
  const steps = [];
  for (let step = Math.ceil(first / every) * every; step <= last; step += every) steps.push(step);
  return steps;
}
