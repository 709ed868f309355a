// Side by side: one prompt in every mode, one run after another, in rounds.

import { announce, byId, h, number, sendsOnEnter } from "./dom.js";
import { model } from "./depth.js";
import { costs, generate, rateOf, summary, whyNoneLeft } from "./generation.js";
import { earlyExit, sampling, systemMessages } from "./settings.js";
import { TokenView } from "./tokens.js";

const MODES = [
  ["off", "Off", "full depth, a pass a token"],
  ["lossless", "Lossless", "guessed, confirmed at full depth"],
  ["adaptive", "Adaptive", "tokens leave at an exit"],
];
// Where none is set, any seed below this will do.
const SEEDS = 2 ** 31;

const stacked = matchMedia("(max-width: 960px)");
let running = null;

function column(mode, title, words) {
  const content = h("div", {}, h("p", { className: "waiting" }, "Not run yet"));
  const tiles = h("dl", { className: "tiles" });
  const element = h("section", { className: "column card", data: { mode }, aria: { label: title } },
    h("header", {}, h("h2", {}, title), h("p", { className: "note" }, words)), tiles, content);
  return { element, content, tiles };
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
  const messages = [...systemMessages(), { role: "user", content: text }];
  const controller = new AbortController();
  running = controller;
  byId("compare-run").textContent = "Stop";
  const places = MODES.map(([mode, ...words]) => ({
    ...column(mode, ...words),
    mode,
    body: { messages, ...settings, early_exit: earlyExit(mode) },
    rates: [],
  }));
  byId("compare-columns").replaceChildren(...places.map(({ element }) => element));
  try {
    // In turns, so that what else the machine does meets all modes alike.
    for (let round = Number(byId("rounds").value); round > 0; round -= 1) {
      for (const place of places) {
        if (!place.failed) await runOnce(place, places[0], controller.signal);
      }
    }
    announce("All modes have run");
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    announce("Stopped");
  } finally {
    byId("compare-run").textContent = "Run all three";
    running = null;
  }
}

/** Run one mode: the first time its tokens are shown, later it is only measured. */
async function runOnce(place, off, signal) {
  const { element, body, content } = place;
  if (place.mode === "adaptive" && !model.exits.length) {
    content.replaceChildren(h("p", { className: "waiting" }, "No exits are loaded for this model."));
    place.failed = true;
    return;
  }
  element.classList.add("running");
  const first = !place.view;
  const view = new TokenView(`Tokens of ${place.mode}`);
  if (first) {
    if (stacked.matches) element.scrollIntoView({ block: "start" });
    content.replaceChildren(view.element);
    place.view = view;
  }
  try {
    const { finish, metrics } = await generate({ body, top: 0, view, signal });
    const rate = rateOf(metrics);
    if (rate) place.rates.push(rate);
    if (first) {
      place.metrics = metrics;
      view.end({ speak: false });
      content.append(h("p", { className: "foot" }, summary(metrics, finish)));
      if (place !== off && !off.failed) content.append(...verdict(place, off));
    }
    for (const each of [place, off]) showCosts(each, off);
  } catch (error) {
    place.failed = true;
    const stopped = error.name === "AbortError";
    content.append(h("p", { className: stopped ? "foot" : "error", aria: { role: "alert" } }, stopped ? "Stopped" : error.message));
    if (stopped) throw error;
  } finally {
    element.classList.remove("running");
  }
}

const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};

/** What the mode cost; of several rounds the median rate. */
function showCosts(place, off) {
  if (!place.metrics) return;
  const found = costs(place.metrics);
  if (place.rates.length) {
    const rate = median(place.rates);
    const notes = place !== off && off.rates.length ? `${number(rate / median(off.rates), 2)} × off` : "";
    found[0] = ["tokens/s", number(rate, 0), notes];
  }
  place.tiles.replaceChildren(
    ...found.map(([name, value, more]) =>
      h("div", {}, h("dt", {}, name), h("dd", {}, value, more && h("small", {}, more)))),
  );
}

/** How the answer differs from that of full depth, and why tokens did not leave. */
function verdict({ view, body, metrics }, { view: off }) {
  const places = differing(off.ids, view.ids).filter((index) => index < view.tokens.length);
  view.markDiffering(places);
  const same = view.ids.length === off.ids.length && view.ids.every((id, index) => id === off.ids[index]);
  const words = same
    ? "The same answer as off, token for token"
    : `${places.length} of ${view.tokens.length} tokens are not in off's answer, underlined`;
  const { mode, when } = body.early_exit;
  const stays = mode === "adaptive" && when === "pays" && metrics.early_exit.mean_exit_layer === model.layers;
  return [
    h("p", { className: `verdict ${same ? "same" : "other"}` }, words),
    stays && h("p", { className: "note" }, `${whyNoneLeft(metrics)} With “always” above they do.`),
  ].filter(Boolean);
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
sendsOnEnter(byId("compare-prompt"), () => running);
byId("compare-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("compare-prompt").value.trim();
  if (running) running.abort();
  else if (text && model.name) runAll(text);
});
