// A line chart: uPlot, with axes, tooltip and colours as everywhere on this page.

import { css, fade, INF, NAN, ZERO } from "./colour.js";
import { el, ink, onWidth } from "./dom.js";
import { count, exact, logTick, short } from "./format.js";
import { legendEntry, withLegend } from "./legend.js";
import { rule } from "./paint.js";
import { decades, markOf, nearest, within } from "./series.js";

const MARKS = { zero: css(ZERO), nan: css(NAN), inf: css(INF) };

export class Chart {
  /** `tooltip` is the page's; `pick(x)` and `zoom(first, last)` are called with places on the x axis. */
  constructor(body, tooltip, { height = 240, pick, zoom, label } = {}) {
    this._tooltip = tooltip;
    this._height = height;
    this._pick = pick;
    this._zoom = zoom;
    this._drawing = null;
    this._inside = false;
    this._width = 0;
    this._box = el("div", { class: "chart", tabIndex: 0, role: "img", "aria-label": label ?? "" });
    this._box.addEventListener("keydown", (event) => this._key(event));
    this._box.addEventListener("mouseleave", () => tooltip.hide());
    this._box.addEventListener("blur", () => tooltip.hide());
    this._legend = el("div", { class: "legend-line" });
    body.append(this._box, this._legend);
    onWidth(this._box, (width) => {
      this._width = width;
      this._make();
    });
  }

  /** The chart with its legend, and `more` rows of it, on a canvas of its own. */
  picture(more = []) {
    return withLegend(this._box.querySelector("canvas"), [
      ...more,
      ...(this._drawing.legend ?? []),
    ]);
  }

  /**
   * Draws. A drawing is `{x, series, logarithm, unit, marker, zone, target, range, place, ticks, legend}`:
   * `x` ascending numbers; a series `{name, colour, dash, width, values, low, high, points, size, quiet}` with
   * numbers or undefined, `low` and `high` bounding a band, a quiet one not in the tooltip; `marker` a
   * vertical line; `zone` and `target` healthy values; `place(index)` what is at an x; `ticks` a function
   * from x to a label; `legend` rows of `{name, colour, dash}` or `{name, kind}` below.
   */
  draw(drawing) {
    this._drawing = drawing;
    this._make();
  }

  _make() {
    if (!this._drawing || this._width === 0) return;
    this._plot?.destroy();
    const { x, series, legend } = this._drawing;
    const range = this._range();
    const data = [x];
    const lines = [{}];
    const bands = [];
    for (const one of series) {
      if (one.low) {
        const place = data.length;
        data.push(within(one.high, range), within(one.low, range));
        const edge = { stroke: "transparent", width: 0, points: { show: false } };
        lines.push(edge, edge);
        bands.push({ series: [place, place + 1], fill: fade(one.colour, 0.2) });
      }
      data.push(this._drawable(one.values));
      lines.push({
        stroke: one.colour,
        width: one.width ?? 1.5,
        dash: one.dash,
        spanGaps: false,
        points: { show: one.points ?? x.length < 2, size: one.size ?? 4, fill: one.colour },
      });
    }
    this._plot = new uPlot(this._options(lines, bands, range), data, this._box);
    this._legend.replaceChildren(...(legend ?? []).map(legendEntry));
    this._box.dataset.series = series.length;
  }

  // What has no place on a logarithmic axis is a gap here, and a mark at the edge.
  _drawable(values) {
    const logarithm = this._drawing.logarithm;
    return values.map((value) =>
      value === undefined
        ? undefined
        : Number.isFinite(value) && !(logarithm && value <= 0)
          ? value
          : null,
    );
  }

  _options(series, bands, range) {
    const { logarithm, unit, ticks } = this._drawing;
    const axis = {
      stroke: ink("--muted"),
      font: "11px system-ui, sans-serif",
      grid: { stroke: ink("--grid"), width: 1 },
      ticks: { stroke: ink("--grid"), width: 1, size: 4 },
    };
    const across = {
      ...axis,
      values: (_, splits) => splits.map((at) => (Number.isInteger(at) ? (ticks ?? count)(at) : "")),
      ...(ticks
        ? { rotate: 45, size: 78, space: 18, splits: (plot) => this._places(plot) }
        : { size: 30 }),
    };
    const up = {
      ...axis,
      size: 58,
      values: (_, splits) => splits.map(logarithm ? logTick : short),
      ...(logarithm
        ? { splits: (_, __, low, high) => decades(low, high), filter: (_, s) => s }
        : {}),
      label: unit,
      labelFont: "11px system-ui, sans-serif",
      labelSize: 16,
    };
    return {
      width: this._width,
      height: this._height,
      series,
      bands,
      axes: [across, up],
      legend: { show: false },
      scales: {
        x: {
          time: false,
          range: (_, low, high) => (high > low ? [low, high] : [low - 0.5, low + 0.5]),
        },
        y: { distr: logarithm ? 3 : 1, range: () => range },
      },
      cursor: {
        y: false,
        drag: { x: Boolean(this._zoom), y: false, setScale: false },
        points: { size: (_, index) => (series[index].width === 0 ? 0 : 6) },
        sync: ticks ? undefined : { key: "steps", setSeries: false, scales: ["x", null] },
      },
      hooks: {
        drawClear: [(plot) => this._under(plot)],
        draw: [(plot) => this._over(plot)],
        setCursor: [(plot) => this._hover(plot)],
        setSelect: [(plot) => this._brushed(plot)],
        ready: [(plot) => this._listen(plot)],
      },
    };
  }

  _places(plot) {
    const { min, max } = plot.scales.x;
    const room = Math.max(1, Math.floor(plot.bbox.width / devicePixelRatio / 20));
    const every = Math.max(1, Math.ceil((max - min + 1) / room));
    const places = [];
    for (let at = Math.ceil(min / every) * every; at <= max; at += every) places.push(at);
    return places;
  }

  _range() {
    const { series, logarithm, range } = this._drawing;
    if (range) return range;
    let low = Infinity;
    let high = -Infinity;
    for (const one of series) {
      for (const values of [one.values, one.low ?? [], one.high ?? []]) {
        for (const value of values) {
          if (!Number.isFinite(value) || (logarithm && value <= 0)) continue;
          if (value < low) low = value;
          if (value > high) high = value;
        }
      }
    }
    if (low > high) return logarithm ? [0.1, 1] : [0, 1];
    if (!logarithm) {
      const room = (high - low || Math.abs(high) || 1) * 0.06;
      return [low >= 0 && low < room * 4 ? 0 : low - room, high + room];
    }
    const room = Math.max(Math.log10(high / low) * 0.06, 0.15);
    return [low / 10 ** room, high * 10 ** room];
  }

  // Below the lines: the healthy zone.
  _under(plot) {
    const { zone } = this._drawing;
    if (!zone) return;
    const { ctx, bbox } = plot;
    const [bottom, top] = zone.map((value) => level(plot, value));
    ctx.save();
    ctx.fillStyle = ink("--healthy");
    ctx.fillRect(bbox.left, top, bbox.width, bottom - top);
    ctx.restore();
  }

  // Above the lines: the step looked at, and marks for what the axis can't hold.
  _over(plot) {
    const { ctx, bbox } = plot;
    const { x, series, marker, logarithm, target } = this._drawing;
    const { min, max } = plot.scales.x;
    ctx.save();
    if (target !== undefined) {
      const at = Math.round(level(plot, target)) + 0.5;
      const dash = [6 * devicePixelRatio, 4 * devicePixelRatio];
      rule(ctx, [bbox.left, at], [bbox.left + bbox.width, at], ink("--healthy-line"), dash);
    }
    if (marker !== undefined && marker !== null && marker >= min && marker <= max) {
      const at = Math.round(plot.valToPos(marker, "x", true)) + 0.5;
      rule(ctx, [at, bbox.top], [at, bbox.top + bbox.height], ink("--marker"));
    }
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    const last = {};
    for (const { values, quiet } of series) {
      if (quiet) continue;
      values.forEach((value, index) => {
        const kind = markOf(value, logarithm);
        if (!kind || x[index] < min || x[index] > max) return;
        const at = plot.valToPos(x[index], "x", true);
        if (Math.abs(at - (last[kind] ?? -Infinity)) < 7 * devicePixelRatio) return;
        last[kind] = at;
        ctx.fillStyle = MARKS[kind];
        ctx.textBaseline = kind === "zero" ? "bottom" : "top";
        const sign = { zero: "▾", inf: "▴", nan: "✕" }[kind];
        const rise = kind === "nan" ? 11 * devicePixelRatio : 0;
        ctx.fillText(sign, at, kind === "zero" ? bbox.top + bbox.height : bbox.top + rise);
      });
    }
    ctx.restore();
  }

  _hover(plot) {
    const { idx, left, top } = plot.cursor;
    if (!this._inside) return; // another chart's cursor, shown here too
    if (idx === null || idx === undefined || left < 0) {
      this._tooltip.hide();
      return;
    }
    const box = plot.over.getBoundingClientRect();
    this._show(idx, box.left + left, box.top + Math.max(top, 0));
  }

  _show(index, x, y) {
    const { place, series, unit } = this._drawing;
    const rows = [];
    for (const one of series.filter(({ quiet }) => !quiet)) {
      const at = nearest(one.values, index);
      if (at === null) continue;
      const spread =
        one.low && one.low[at] !== one.high[at]
          ? `${exact(one.low[at])} … ${exact(one.high[at])}`
          : "";
      const value = exact(one.values[at]);
      rows.push({
        colour: one.colour,
        name: one.name,
        value,
        note: [unit, spread].filter(Boolean).join("  "),
      });
    }
    this._tooltip.show(x, y, place ? place(index) : `step ${count(this._drawing.x[index])}`, rows);
  }

  _listen(plot) {
    let pressed = null;
    plot.over.addEventListener("mouseenter", () => {
      this._inside = true;
    });
    plot.over.addEventListener("mouseleave", () => {
      this._inside = false;
      this._tooltip.hide();
    });
    plot.over.addEventListener("mousedown", (event) => {
      pressed = event.clientX;
    });
    plot.over.addEventListener("click", (event) => {
      const index = plot.cursor.idx;
      if (Math.abs(event.clientX - pressed) < 4 && index !== null && index !== undefined) {
        this._pick?.(this._drawing.x[index]);
      }
    });
    plot.over.addEventListener("dblclick", () => this._zoom?.(null, null));
  }

  _brushed(plot) {
    const { left, width } = plot.select;
    if (width < 4 || !this._zoom) return;
    const [first, last] = [left, left + width].map((at) => Math.round(plot.posToVal(at, "x")));
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    if (last > first) this._zoom(first, last);
  }

  _key(event) {
    const { x } = this._drawing ?? { x: [] };
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this._zoom?.(null, null);
    else if (event.key === "Enter" && this._at !== undefined) this._pick?.(x[this._at]);
    else if (by && x.length > 0) {
      this._at = Math.min(
        Math.max((this._at ?? -1) + by * (event.shiftKey ? 10 : 1), 0),
        x.length - 1,
      );
      const box = this._plot.over.getBoundingClientRect();
      const left = this._plot.valToPos(x[this._at], "x");
      this._plot.setCursor({ left, top: 10 }, false);
      this._show(this._at, box.left + left, box.top + 10);
    } else return;
    event.preventDefault();
  }
}

// Where a value stands; at the edge if it is beyond it.
function level({ valToPos, bbox }, value) {
  return Math.min(Math.max(valToPos(value, "y", true), bbox.top), bbox.top + bbox.height);
}
