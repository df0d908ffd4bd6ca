// The legend of a heat map.

import { css, INF, NAN, viridis, ZERO } from "./colour.js";
import { ink } from "./dom.js";
import { logTick, percent, short } from "./format.js";

/** Draws the bar of a scale with its ticks, and what has a colour of its own. */
export function drawColourBar(context, scale, width) {
  const own = [
    ["not measured", null],
    ["NaN", NAN],
    ["inf", INF],
    ...(scale.logarithm ? [["0", ZERO]] : []),
  ];
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const left = 20;
  const bar = Math.max(width - 320, 120);
  for (let x = 0; x < bar; x++) {
    context.fillStyle = css(viridis(x / (bar - 1)));
    context.fillRect(left + x, 6, 1, 10);
  }
  context.fillStyle = ink("--muted");
  context.textAlign = "center";
  for (const [share, label] of ticksOf(scale, bar / 60)) {
    context.fillRect(Math.round(left + share * bar), 16, 1, 3);
    context.fillText(label, left + share * bar, 27);
  }
  context.textAlign = "left";
  let x = left + bar + 28;
  for (const [label, colour] of own.reverse()) {
    context.fillStyle = colour ? css(colour) : ink("--grid");
    if (colour) context.fillRect(x, 6, 12, 10);
    else {
      context.strokeStyle = ink("--muted");
      context.strokeRect(x + 0.5, 6.5, 11, 9);
      context.beginPath();
      context.moveTo(x + 2, 15);
      context.lineTo(x + 10, 7);
      context.stroke();
    }
    context.fillStyle = ink("--muted");
    context.fillText(label, x + 17, 11.5);
    x += 17 + context.measureText(label).width + 18;
  }
}

function ticksOf({ logarithm, low, high }, most) {
  if (!logarithm) {
    const label = low === 0 && high === 1 ? percent : short;
    return [0, 0.25, 0.5, 0.75, 1].map((share) => [share, label(low + share * (high - low))]);
  }
  const [from, to] = [Math.round(Math.log10(low)), Math.round(Math.log10(high))];
  const every = Math.max(1, Math.ceil((to - from) / most));
  const ticks = [];
  for (let exponent = from; exponent <= to; exponent += every) {
    ticks.push([(exponent - from) / (to - from), logTick(Number(`1e${exponent}`))]);
  }
  return ticks;
}
