// Colours. The scale is viridis (even in lightness, so readable without colour vision and in print); what
// has no logarithm gets a colour of its own that viridis doesn't hold.

const VIRIDIS = [
  0x440154, 0x482475, 0x414487, 0x355f8d, 0x2a788e, 0x21918c, 0x22a884, 0x44bf70, 0x7ad151,
  0xbddf26, 0xfde725,
];

export const ZERO = [158, 158, 158];
export const NAN = [214, 0, 122];
export const INF = [255, 106, 0];

// Codes of what a cell shows, in the order in which they win where a pixel holds several cells.
export const CODE_NONE = 0;
export const CODE_ZERO = 1;
export const CODE_LOWEST = 2;
export const CODE_HIGHEST = 255;
export const CODE_INF = 256;
export const CODE_NAN = 257;

const LEVELS = CODE_HIGHEST - CODE_LOWEST;

export function css([red, green, blue]) {
  return `rgb(${red}, ${green}, ${blue})`;
}

/** The colour at `share` (0 to 1) of the scale. */
export function viridis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  const part = (shift) => {
    const [a, b] = [VIRIDIS[low], VIRIDIS[low + 1]].map((colour) => (colour >> shift) & 255);
    return Math.round(a + (b - a) * (at - low));
  };
  return [part(16), part(8), part(0)];
}

/** The colours by code, as canvas pixels (little-endian RGBA); what wasn't measured is clear. */
export function pixels() {
  const pack = ([red, green, blue]) => (255 << 24) | (blue << 16) | (green << 8) | red;
  const table = new Uint32Array(CODE_NAN + 1);
  for (let code = CODE_LOWEST; code <= CODE_HIGHEST; code++) {
    table[code] = pack(viridis((code - CODE_LOWEST) / LEVELS));
  }
  table[CODE_ZERO] = pack(ZERO);
  table[CODE_INF] = pack(INF);
  table[CODE_NAN] = pack(NAN);
  return table;
}

/**
 * A scale from values to codes. On a logarithmic one 0 has a colour of its own; on a linear one, such
 * as a share of dead units, it is a value like any other.
 */
export class Scale {
  constructor(logarithm, low, high) {
    this.logarithm = logarithm;
    this.low = low;
    this.high = high;
    this._from = logarithm ? Math.log10(low) : low;
    this._factor = LEVELS / ((logarithm ? Math.log10(high) : high) - this._from);
  }

  code(value) {
    if (Number.isNaN(value)) return CODE_NAN;
    if (value === Infinity || value === -Infinity) return CODE_INF;
    if (this.logarithm && value === 0) return CODE_ZERO;
    const level =
      ((this.logarithm ? Math.log10(Math.abs(value)) : value) - this._from) * this._factor;
    return CODE_LOWEST + (level < 0 ? 0 : level > LEVELS ? LEVELS : Math.round(level));
  }

  /** A scale that spans the finite values of all `arrays`: shares 0 to 1, logarithms whole decades. */
  static over(arrays, { logarithm, share }) {
    let low = Infinity;
    let high = -Infinity;
    for (const values of arrays) {
      for (const value of values) {
        const size = logarithm ? Math.abs(value) : value;
        if (size - size !== 0 || (logarithm && size === 0)) continue;
        if (size < low) low = size;
        if (size > high) high = size;
      }
    }
    if (share) return new Scale(false, 0, 1);
    if (low > high) return logarithm ? new Scale(true, 0.1, 1) : new Scale(false, 0, 1);
    if (!logarithm) return new Scale(false, low, high > low ? high : low + 1);
    const from = Math.floor(Math.log10(low) + 1e-9);
    return new Scale(
      true,
      10 ** from,
      10 ** Math.max(Math.ceil(Math.log10(high) - 1e-9), from + 1),
    );
  }
}

/** `#rrggbb` with an opacity. */
export function fade(colour, opacity) {
  const part = (at) => Number.parseInt(colour.slice(at, at + 2), 16);
  return `rgba(${part(1)}, ${part(3)}, ${part(5)}, ${opacity})`;
}

/** The colour of a code; "" for none. */
export function colourOf(code) {
  if (code === CODE_NONE) return "";
  if (code === CODE_ZERO) return css(ZERO);
  if (code === CODE_INF) return css(INF);
  if (code === CODE_NAN) return css(NAN);
  return css(viridis((code - CODE_LOWEST) / LEVELS));
}
