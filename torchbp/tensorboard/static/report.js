// The page as a report: one file that holds the data, opened from a disk or a mail.

import { el } from "./dom.js";
import { start } from "./page.js";
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
  const page = await start(document.body, new ReportSource(data), address());
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
  page.controls.extra.append(button);
  dark.addEventListener("change", () => {
    follow();
    page.redraw();
  });
}

function address() {
  return {
    read: () => location.hash.slice(1),
    write: (text) => history.replaceState(null, "", `#${text}`),
    listen: (changed) => window.addEventListener("hashchange", changed),
  };
}

open().catch((error) => {
  document.body.append(
    el("p", { class: "notice", role: "alert" }, `The report could not be shown: ${error.message}`),
  );
});
