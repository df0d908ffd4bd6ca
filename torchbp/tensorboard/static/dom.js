// The few things this page asks of the DOM. Text always goes in as text, never as markup: names of
// runs and layers are whatever somebody called them.

/**
 * An element. `properties` are set on it, but for `class`, `data-*`, `aria-*` and `role`, which are
 * attributes, and `on`, which holds listeners. Children are nodes or strings; null is left out.
 */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name === "on") {
      for (const [type, listener] of Object.entries(value)) node.addEventListener(type, listener);
    } else if (name === "class" || name === "role" || name === "for" || name.includes("-")) {
      node.setAttribute(name, value);
    } else {
      node[name] = value;
    }
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Calls `draw` with the width of `node` in CSS pixels, now and whenever it changes. */
export function onWidth(node, draw) {
  let last = 0;
  const observer = new ResizeObserver(() => {
    const width = Math.floor(node.clientWidth);
    if (width > 0 && width !== last) {
      last = width;
      draw(width);
    }
  });
  observer.observe(node);
}

/** `draw`, at most once a frame. */
export function oncePerFrame(draw) {
  let waits = false;
  return () => {
    if (waits) return;
    waits = true;
    requestAnimationFrame(() => {
      waits = false;
      draw();
    });
  };
}

/** Saves `data`, a Blob or text, as a file of the user's. */
export function save(name, data) {
  const url = URL.createObjectURL(data instanceof Blob ? data : new Blob([data]));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

/** A colour of the style sheet, e.g. `ink("--text")`. */
export function ink(variable) {
  return getComputedStyle(document.body).getPropertyValue(variable).trim();
}
