// The rows of the heat map and the places of the profile: layers (or parameters) by themselves or grouped
// by module, after the name filter.

/** The layer that an entry of a quantity belongs to: of a parameter, its name without the last part. */
export function layerOf(quantity, name) {
  if (quantity.axis !== "parameter") return name;
  return name.includes(".") ? name.slice(0, name.lastIndexOf(".")) : "";
}

/** Whether a name passes the filter: one of the comma-separated parts is in it; * stands for anything. */
export function passes(filter, name) {
  const parts = filter.split(",").map((part) => part.trim().toLowerCase());
  const wanted = parts.filter((part) => part !== "");
  if (wanted.length === 0) return true;
  const low = name.toLowerCase();
  return wanted.some((part) => inOrder(part.split("*"), low));
}

// Without regular expressions: a name or a filter may hold anything.
function inOrder(pieces, name) {
  let from = 0;
  for (const piece of pieces) {
    const at = name.indexOf(piece, from);
    if (at < 0) return false;
    from = at + piece.length;
  }
  return true;
}

/** How deep the names of a quantity are nested: 1 where none has a dot. */
export function depth(names) {
  return Math.max(1, ...names.map((name) => name.split(".").length));
}

/**
 * Rows of a quantity: `{label, kind, layers, entries}`, where `entries` are places in its names. `group` 0
 * gives each a row; n puts those together whose names share the first n parts.
 */
export function rowsOf(quantity, filter, group) {
  const { names, kinds } = quantity;
  const rows = new Map();
  names.forEach((name, entry) => {
    if (!passes(filter, name)) return;
    const label = group > 0 ? name.split(".").slice(0, group).join(".") : name;
    const row = rows.get(label) ?? { label, kind: kinds[entry] ?? "", layers: [], entries: [] };
    const layer = layerOf(quantity, name);
    if (!row.layers.includes(layer)) row.layers.push(layer);
    row.entries.push(entry);
    rows.set(label, row);
  });
  return [...rows.values()];
}

/** Whether a row holds a layer. */
export function holds(row, layer) {
  return row.layers.includes(layer);
}
