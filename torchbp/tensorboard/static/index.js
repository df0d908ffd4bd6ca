// The page as a TensorBoard tab. TensorBoard imports this module in a frame of its own and calls render().

import { el } from "./dom.js";
import { listen } from "./ipc.js";
import { start } from "./page.js";
import { TabSource } from "./source.js";

const PREFIX = "p.torchbp."; // as TensorBoard has it for what plugins keep in its address

/** What TensorBoard calls. */
export async function render() {
  const here = (name) => new URL(name, import.meta.url).href;
  const sheets = ["uPlot.min.css", "style.css"].map((name) =>
    el("link", { rel: "stylesheet", href: here(name) }),
  );
  const plots = el("script", { src: here("uPlot.iife.min.js") });
  const loaded = [...sheets, plots].map(
    (node) =>
      new Promise((resolve, reject) => {
        node.addEventListener("load", resolve);
        node.addEventListener("error", () =>
          reject(new Error("a file of the tab could not be loaded")),
        );
      }),
  );
  document.head.append(...sheets, plots);
  try {
    await Promise.all(loaded);
    follow(window.parent.document.body);
    const page = await start(document.body, new TabSource(), address());
    listen("experimental.DataReloaded", async () => {
      await page.reload();
    });
    new MutationObserver(() => {
      follow(window.parent.document.body);
      page.redraw();
    }).observe(window.parent.document.body, { attributes: true, attributeFilter: ["class"] });
  } catch (error) {
    document.body.append(
      el("p", { class: "notice", role: "alert" }, `Grad flow could not start: ${error.message}`),
    );
  }
}

function follow(body) {
  document.documentElement.dataset.theme = body.classList.contains("dark-mode") ? "dark" : "light";
}

// The frame has no address that anybody sees: what is looked at stands in TensorBoard's own.
function address() {
  const { location, history } = window.parent;
  const parts = () => location.hash.slice(1).split("&");
  const own = (part) => part.startsWith(PREFIX);
  return {
    read() {
      const found = parts().filter(own);
      return found.map((part) => part.slice(PREFIX.length)).join("&");
    },
    write(text) {
      const others = parts().filter((part) => !own(part));
      const mine = text.split("&").filter((part) => part !== "");
      const hash = [...others, ...mine.map((part) => PREFIX + part)].join("&");
      history.replaceState(history.state, "", `#${hash}`);
    },
    listen(changed) {
      window.parent.addEventListener("hashchange", () => {
        if (parts().some(own)) changed();
      });
    },
  };
}
