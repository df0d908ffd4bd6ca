// The cells of a heat map as pixels. Where one pixel holds several cells, the winner of their codes is seen.

import { pixels } from "./colour.js";
import { winner } from "./grid.js";

const COLOURS = pixels();
const APART = 12; // rows of so many pixels and more have a gap between them

/** A picture of `{grid, codes, top, bottom, first, last}` of some width and height in CSS pixels. */
export function cellPicture({ grid, codes, top, bottom, first, last }, width, height) {
  const ratio = devicePixelRatio;
  const [wide, high] = [width, height].map((size) => Math.max(1, Math.round(size * ratio)));
  const image = new ImageData(wide, high);
  const colours = new Uint32Array(image.data.buffer);
  const rows = bottom - top + 1;
  const gap = high / rows >= APART * ratio ? ratio : 0;
  const [begin, end] = [new Int32Array(high), new Int32Array(high)];
  for (let y = 0; y < high; y++) {
    begin[y] = top + Math.floor((y * rows) / high);
    end[y] = gap ? begin[y] : Math.max(top + Math.ceil(((y + 1) * rows) / high) - 1, begin[y]);
  }
  const isGap = (y) => gap && (((y + 1) * rows) / high) % 1 < (gap * rows) / high;
  const column = new Uint16Array(grid.rows.length);
  let from = 0;
  for (let x = 0; x < wide; x++) {
    const [left, right] = [x, x + 1].map((at) => first + (at * (last - first)) / wide);
    while (from < grid.columns && grid.edge(from + 1) <= left) from++;
    if (from >= grid.columns) break;
    if (grid.edge(from) >= right) continue;
    merge(column, grid, codes, from, right);
    for (let y = 0; y < high; y++) {
      if (isGap(y)) continue;
      let code = column[begin[y]];
      for (let row = begin[y] + 1; row <= end[y]; row++) {
        code = winner(code, column[row], grid.extreme);
      }
      colours[y * wide + x] = COLOURS[code];
    }
  }
  const picture = new OffscreenCanvas(wide, high);
  picture.getContext("2d").putImageData(image, 0, 0);
  return picture;
}

// The codes of all rows in the columns from `from` on that begin before the step `end`.
function merge(into, grid, codes, from, end) {
  const rows = grid.rows.length;
  into.set(codes.subarray(from * rows, (from + 1) * rows));
  for (let column = from + 1; column < grid.columns && grid.edge(column) < end; column++) {
    for (let row = 0; row < rows; row++) {
      into[row] = winner(into[row], codes[column * rows + row], grid.extreme);
    }
  }
}
