// The page: tabs, theme, and the modules of each view.

import "./chat.js";
import "./compare.js";
import "./decisions.js";
import { byId } from "./dom.js";
import { showMarks } from "./depth.js";
import { look } from "./server.js";

const THEME = "offramp-theme";
const VIEWS = ["chat", "compare", "decisions"];
const system = matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  const dark = theme ? theme === "dark" : system.matches;
  byId("theme").textContent = dark ? "☀" : "☾";
}

function show(view) {
  for (const each of VIEWS) {
    const tab = byId(`tab-${each}`);
    byId(each).hidden = each !== view;
    tab.setAttribute("aria-selected", String(each === view));
    tab.tabIndex = each === view ? 0 : -1;
  }
  document.body.dataset.view = view;
  history.replaceState(null, "", `#${view}`);
}

byId("theme").addEventListener("click", () => {
  const dark = (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const theme = dark ? "light" : "dark";
  localStorage.setItem(THEME, theme);
  setTheme(theme);
});
system.addEventListener("change", () => setTheme(localStorage.getItem(THEME)));

for (const [index, view] of VIEWS.entries()) {
  const tab = byId(`tab-${view}`);
  tab.addEventListener("click", () => show(view));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = VIEWS[(index + step + VIEWS.length) % VIEWS.length];
    show(next);
    byId(`tab-${next}`).focus();
  });
}

// Below the conversation they would be in the way of what was measured.
byId("settings").open = !matchMedia("(max-width: 960px)").matches;
setTheme(localStorage.getItem(THEME));
showMarks();
const asked = location.hash.slice(1);
show(VIEWS.includes(asked) ? asked : "chat");
look();
