// Side by side: one prompt in every mode, one run after the other.

import { announce, byId, h, number } from "./dom.js";
import { model } from "./depth.js";
import { costs, generate, rateOf, summary } from "./generation.js";
import { earlyExit, sampling, systemMessages } from "./settings.js";
import { TokenView } from "./tokens.js";

const MODES = [
  ["off", "Off", "full depth, a pass a token"],
  ["lossless", "Lossless", "guessed, confirmed at full depth"],
  ["adaptive", "Adaptive", "tokens leave at an exit"],
];
// The first part of a generation's seeds; any will do where none is set.
const SEEDS = 2 ** 31;

const stacked = matchMedia("(max-width: 960px)");
let running = null;

function column(mode, title, words) {
  const body = h("div", { className: "column-body" }, h("p", { className: "waiting" }, "Not run yet"));
  const tiles = h("dl", { className: "tiles" });
  const element = h("section", { className: "column card", data: { mode }, aria: { label: title } },
    h("header", {}, h("h2", {}, title), h("p", { className: "note" }, words)), tiles, body);
  return { element, body, tiles };
}

async function runAll(text) {
  let settings;
  try {
    settings = sampling();
  } catch (error) {
    announce(error.message);
    return;
  }
  // With one seed lossless has to draw what off draws.
  settings.seed ??= Math.floor(Math.random() * SEEDS);
  const controller = new AbortController();
  running = controller;
  byId("compare-run").textContent = "Stop";
  const columns = MODES.map((mode) => column(...mode));
  byId("compare-columns").replaceChildren(...columns.map(({ element }) => element));
  const messages = [...systemMessages(), { role: "user", content: text }];
  let off = null;
  for (const [index, [mode]] of MODES.entries()) {
    const place = columns[index];
    if (mode === "adaptive" && !model.exits.length) {
      place.body.replaceChildren(h("p", { className: "waiting" }, "No exits are loaded for this model."));
      continue;
    }
    place.element.classList.add("running");
    if (stacked.matches) place.element.scrollIntoView({ block: "start" });
    const view = new TokenView(`Tokens of ${mode}`);
    place.body.replaceChildren(view.element);
    try {
      const body = { messages, ...settings, early_exit: earlyExit(mode) };
      const { finish, metrics } = await generate({ body, top: 0, view, signal: controller.signal });
      view.end({ speak: false });
      if (mode === "off") off = { view, metrics };
      report(place, view, metrics, finish, off);
    } catch (error) {
      const stopped = error.name === "AbortError";
      const words = stopped ? "Stopped" : error.message;
      place.body.append(h("p", { className: stopped ? "foot" : "error", aria: { role: "alert" } }, words));
    }
    place.element.classList.remove("running");
    if (controller.signal.aborted) break;
  }
  byId("compare-run").textContent = "Run all three";
  running = null;
  announce("All modes have run");
}

function report(place, view, metrics, finish, off) {
  const found = costs(metrics);
  const rate = rateOf(metrics);
  const offRate = off && rateOf(off.metrics);
  if (off && off.view !== view && rate && offRate) found[0].push(`${number(rate / offRate, 2)} × off`);
  place.tiles.replaceChildren(
    ...found.map(([name, value, more]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, value, more && h("small", {}, more)))),
  );
  place.body.append(h("p", { className: "foot" }, summary(metrics, finish)));
  if (off && off.view !== view) place.body.append(verdict(view, off.view));
}

function verdict(view, off) {
  const places = differing(off.ids, view.ids).filter((index) => index < view.tokens.length);
  view.markDiffering(places);
  const same = view.ids.length === off.ids.length && view.ids.every((id, index) => id === off.ids[index]);
  const words = same
    ? "The same answer as off, token for token"
    : `${places.length} of ${view.tokens.length} tokens are not in off's answer, underlined`;
  return h("p", { className: `verdict ${same ? "same" : "other"}` }, words);
}

/** Places of `own` that are not part of the longest common subsequence with `other`. */
export function differing(other, own) {
  const width = other.length + 1;
  const lengths = new Uint16Array((own.length + 1) * width);
  for (let i = own.length - 1; i >= 0; i -= 1) {
    for (let j = other.length - 1; j >= 0; j -= 1) {
      lengths[i * width + j] =
        own[i] === other[j]
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1]);
    }
  }
  const found = [];
  let j = 0;
  for (let i = 0; i < own.length; i += 1) {
    while (j < other.length && own[i] !== other[j] && lengths[i * width + j + 1] >= lengths[(i + 1) * width + j]) j += 1;
    if (j < other.length && own[i] === other[j]) j += 1;
    else found.push(i);
  }
  return found;
}

byId("compare-columns").replaceChildren(...MODES.map((mode) => column(...mode).element));
byId("compare-prompt").value = "Explain in a few sentences why the sky is blue.";
byId("compare-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("compare-prompt").value.trim();
  if (running) running.abort();
  else if (text && model.name) runAll(text);
});
