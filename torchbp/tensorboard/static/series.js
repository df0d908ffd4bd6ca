// The numbers of a line chart: several lines on one axis, and what an axis can hold of them.

/**
 * Several lines on one x axis: `{x, series}` of `[{x, ...series}]`. Where a line has no sample it is
 * undefined, which is no gap.
 */
export function together(lines) {
  const x = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const places = new Map(x.map((at, index) => [at, index]));
  const spread = (line, values) => {
    if (!values) return values;
    const out = new Array(x.length).fill(undefined);
    values.forEach((value, index) => {
      out[places.get(line.x[index])] = value;
    });
    return out;
  };
  const series = lines.map((line) => ({
    ...line,
    values: spread(line, line.values),
    low: spread(line, line.low),
    high: spread(line, line.high),
  }));
  return { x, series };
}

/** The edges of a band end at the edges of the chart. */
export function within(values, [low, high]) {
  return values.map((value) => {
    if (value === undefined || Number.isNaN(value)) return value === undefined ? undefined : null;
    return Math.min(Math.max(value, low), high);
  });
}

/** Series of two runs stand on shared x: where one has no sample, its nearest one is meant. */
export function nearest(values, index) {
  for (let far = 0; far < values.length; far++) {
    for (const at of [index - far, index + far]) {
      if (at >= 0 && at < values.length && values[at] !== undefined) return at;
    }
  }
  return null;
}

/** What a value is that a (logarithmic) axis has no place for: "zero", "inf", "nan"; else "". */
export function markOf(value, logarithm) {
  if (value === undefined) return "";
  if (Number.isNaN(value)) return "nan";
  if (!Number.isFinite(value)) return "inf";
  return logarithm && value === 0 ? "zero" : "";
}

/** Ticks of a logarithmic axis: at most some seven, at whole decades; within one, at 1, 2, 5 times it. */
export function decades(low, high) {
  const [from, to] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const every = [1, 2, 3, 5, 10, 20].find((step) => (to - from) / step <= 7) ?? 20;
  const ticks = [];
  for (let exponent = Math.ceil(from / every) * every; exponent <= to; exponent += every) {
    for (const factor of to - from <= 2 ? [1, 2, 5] : [1]) {
      const tick = Number(`${factor}e${exponent}`);
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks;
}
