// The page as a report: one file that holds the data, opened from a disk or a mail.

import { el } from "./dom.js";
import { words } from "./format.js";
import { start, worstFirst } from "./page.js";
import { ReportSource } from "./source.js";

const THEMES = { auto: "◐ auto", light: "☀ light", dark: "☾ dark" };

async function open() {
  const data = JSON.parse(document.getElementById("torchbp-data").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let choice = "auto";
  const follow = () => {
    const shown = choice === "auto" ? (dark.matches ? "dark" : "light") : choice;
    document.documentElement.dataset.theme = shown;
  };
  follow();
  const page = await start(document.body, new ReportSource(data), address(data.runs.runs));
  const button = el(
    "button",
    { type: "button", class: "theme", title: "Colours: of the system, light, dark" },
    THEMES.auto,
  );
  button.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    choice = names[(names.indexOf(choice) + 1) % names.length];
    button.textContent = THEMES[choice];
    follow();
    page.redraw();
  });
  const leftOut = [...new Set(Object.values(data.left_out).flat())].map(words);
  if (leftOut.length > 0) {
    const note = `left out for the size of the file: ${leftOut.join(", ")}`;
    page.controls.extra.append(el("span", { class: "muted left-out", title: note }, note));
  }
  const made = new Date(data.made * 1000).toLocaleString();
  page.controls.extra.append(el("span", { class: "muted" }, `made ${made}`), button);
  dark.addEventListener("change", () => {
    follow();
    page.redraw();
  });
}

// A report of several runs begins with the worst beside the best.
function address(runs) {
  const names = worstFirst(runs).map(({ run }) => run);
  const both = { run: names[0], compare: names[names.length - 1] };
  const first = names.length < 2 ? "" : new URLSearchParams(both).toString();
  return {
    read: () => location.hash.slice(1) || first,
    write: (text) => history.replaceState(null, "", `#${text}`),
    listen: (changed) => window.addEventListener("hashchange", changed),
  };
}

open().catch((error) => {
  document.body.append(
    el("p", { class: "notice", role: "alert" }, `The report could not be shown: ${error.message}`),
  );
});
