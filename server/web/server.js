// The server behind the page: whether it takes requests, and what it serves.

import { getJson, readiness } from "./api.js";
import { byId } from "./dom.js";
import { model, setScale } from "./depth.js";
import { fitSettings } from "./settings.js";

const LOOK_MS = { waiting: 1000, ready: 10_000 };
const WORDS = {
  loading: "The model is being loaded",
  restarting: "The engine is being restarted",
  draining: "The server is shutting down",
  stopped: "The server has stopped",
  failed: "The engine has failed; the server must be restarted",
};

let since = null;
let waiting = [];

/** Resolves once the server takes requests, or the signal aborts. */
export function untilReady(signal) {
  look();
  return new Promise((resolve) => {
    waiting.push(resolve);
    signal?.addEventListener("abort", resolve);
  });
}

function show(state) {
  const ready = Boolean(state?.ready);
  const words = state ? (WORDS[state.status] ?? state.status) : "The server cannot be reached";
  byId("state").dataset.state = ready ? "ready" : (state?.status ?? "unreachable");
  byId("state").textContent = ready ? "Ready" : state ? state.status[0].toUpperCase() + state.status.slice(1) : "Unreachable";
  byId("loading").hidden = ready;
  for (const id of ["compare-run", "decide"]) byId(id).disabled = !ready;
  if (ready) {
    since = null;
  } else {
    since ??= Date.now();
    byId("loading-text").textContent = `${words} (${Math.round((Date.now() - since) / 1000)} s)`;
  }
  return ready;
}

async function learn() {
  const [card] = (await getJson("/v1/models")).data;
  model.layers = card.num_layers;
  model.exits = card.exit_layers;
  model.qualities = card.exit_qualities;
  model.tasks = card.decision_tasks;
  model.draftHead = card.draft_head;
  model.name = card.id;
  byId("model").textContent = card.id;
  setScale();
  fitSettings();
  document.dispatchEvent(new Event("model"));
}

let timer = null;

/** Look whether the server is ready, and what it serves; once in a while from now on. */
export async function look() {
  clearTimeout(timer);
  const ready = show(await readiness());
  clearTimeout(timer);
  timer = setTimeout(look, ready ? LOOK_MS.ready : LOOK_MS.waiting);
  if (!ready) return;
  if (!model.name) {
    try {
      await learn();
    } catch (error) {
      const wantsKey = error.status === 401;
      byId("state").dataset.state = "failed";
      byId("state").textContent = wantsKey ? "Needs a key" : error.message;
      // Who cancelled the question for a key is not asked again until something is sent.
      if (wantsKey) clearTimeout(timer);
      return;
    }
  }
  const resolved = waiting;
  waiting = [];
  for (const resolve of resolved) resolve();
}
