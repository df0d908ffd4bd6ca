// Numbers and names as people read them.

const SUPERSCRIPT = {
  "-": "⁻",
  0: "⁰",
  1: "¹",
  2: "²",
  3: "³",
  4: "⁴",
  5: "⁵",
  6: "⁶",
  7: "⁷",
  8: "⁸",
  9: "⁹",
};

/** The shortest decimal that reads back as this very float32: what was measured, no digit more. */
export function exact(value) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "inf" : "-inf";
  const single = Math.fround(value);
  for (let digits = 1; digits <= 9; digits++) {
    const text = Number(single.toPrecision(digits));
    if (Math.fround(text) === single) return plain(text);
  }
  return plain(single);
}

/** Three digits, for where space is short. */
export function short(value) {
  if (!Number.isFinite(value)) return exact(value);
  return plain(Number(value.toPrecision(3)));
}

function plain(value) {
  const size = Math.abs(value);
  if (value === 0 || (size >= 1e-3 && size < 1e6)) return String(value);
  return value.toExponential().replace("e+", "e");
}

/** 10ⁿ as people write it. */
export function power(exponent) {
  return `10${[...String(exponent)].map((digit) => SUPERSCRIPT[digit]).join("")}`;
}

/** A tick of a logarithmic axis: 10⁻⁷, 2·10⁻⁷, and 0.02 as it is. */
export function logTick(value) {
  const exponent = Math.floor(Math.log10(value) + 1e-9);
  if (exponent > -3 && exponent < 4) return String(Number(value.toPrecision(3)));
  const factor = Number((value / 10 ** exponent).toPrecision(2));
  return factor === 1 ? power(exponent) : `${factor}·${power(exponent)}`;
}

/** 12 345 with thin spaces. */
export function count(value) {
  return String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u2009");
}

/** A share as per cent. */
export function percent(share) {
  return `${Number((share * 100).toPrecision(3))} %`;
}

/** `text`, at most `length` characters: the end of a layer's name tells more than its beginning. */
export function clip(text, length) {
  return text.length <= length ? text : `…${text.slice(text.length - length + 1)}`;
}

/** A quantity's name in words: `error_signal` is "error signal". */
export function words(name) {
  return name.replaceAll("_", " ");
}

/** CSV of a table; what a spreadsheet would run as a formula is quoted as text. */
export function csv(rows) {
  const cell = (value) => {
    let text = typeof value === "number" ? exact(value) : String(value ?? "");
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return rows.map((row) => `${row.map(cell).join(",")}\r\n`).join("");
}
