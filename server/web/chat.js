// The chat: turns, one running answer, errors in the server's words.

import { announce, byId, grows, h, number, sendsOnEnter } from "./dom.js";
import { model } from "./depth.js";
import { generate, rateOf, summary, whyNoneLeft } from "./generation.js";
import { live } from "./live.js";
import { earlyExit, sampling, systemMessages } from "./settings.js";
import { TokenView } from "./tokens.js";
import { look, untilReady } from "./server.js";

// Best tokens beside each one that came.
const TOP = 5;
const EXAMPLES = [
  "Why is the sky blue?",
  "Count from one to twenty.",
  "Write a haiku about the sea.",
  "Repeat three times: early exits let easy tokens leave the model early.",
];

const turns = byId("turns");
const prompt = byId("prompt");
const fit = grows(prompt);
/** What was said so far, as the API has it. */
let messages = [];
/** The AbortController of the running answer, or null. */
let running = null;
/** The body of the last answer that came to its end, to measure the same with exits off. */
let last = null;

function setRunning(controller) {
  running = controller;
  const send = byId("send");
  send.textContent = controller ? "Stop" : "Send";
  send.classList.toggle("stop", Boolean(controller));
  byId("measure-off").disabled = Boolean(controller) || !last;
}

const follow = () => {
  turns.scrollTop = turns.scrollHeight;
};

function addTurn(role, ...children) {
  byId("empty").hidden = true;
  const turn = h("article", { className: `turn ${role}`, aria: { label: role === "user" ? "You" : "The model" } }, children);
  turns.append(turn);
  follow();
  return turn;
}

/** The settings as they stand; null, and told, where one is at fault. */
function wishes() {
  try {
    return { ...sampling(), early_exit: earlyExit() };
  } catch (error) {
    announce(error.message);
    return null;
  }
}

async function send(text) {
  const settings = wishes();
  if (!settings) return;
  for (const button of turns.querySelectorAll(".retry")) button.remove();
  prompt.value = "";
  fit();
  addTurn("user", h("p", {}, text));
  messages.push({ role: "user", content: text });
  await answer(settings);
}

async function answer(settings) {
  const controller = new AbortController();
  setRunning(controller);
  last = null;
  live.reset();
  const body = { messages: [...systemMessages(), ...messages], ...settings };
  const view = new TokenView("Tokens of the answer");
  const foot = h("p", { className: "foot" }, "…");
  const turn = addTurn("assistant", view.element, foot);
  try {
    const onTokens = (tokens) => {
      const near = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 120;
      live.add(tokens);
      if (near) follow();
    };
    const { finish, metrics } = await generate({ body, top: TOP, view, signal: controller.signal, onTokens });
    last = body;
    live.end(metrics);
    foot.textContent = summary(metrics, finish);
    adviseAdaptive(foot, settings, metrics);
    view.end();
    messages.push({ role: "assistant", content: view.text });
  } catch (error) {
    await ended(error, { turn, view, foot, settings, controller });
  } finally {
    if (running === controller) setRunning(null);
    follow();
  }
}

/** The answer did not come to its own end. */
async function ended(error, { turn, view, foot, settings, controller }) {
  if (error.name === "AbortError") {
    foot.textContent = `Stopped after ${view.tokens.length} tokens`;
    view.end({ speak: false });
    announce("Stopped");
    if (turn.isConnected && view.text) messages.push({ role: "assistant", content: view.text });
    else if (turn.isConnected) messages.pop();
    return;
  }
  // What was not answered is no part of the conversation, unless it is sent again.
  const asked = messages.pop();
  const again = (wished) => {
    if (!wished) return null;
    turn.remove();
    messages.push(asked);
    return answer(wished);
  };
  const click = () => again(wishes());
  const retry = h("button", { type: "button", className: "quiet small retry", on: { click } }, "Try again");
  const code = error.code ? h("code", {}, error.code) : null;
  foot.replaceChildren(h("span", { className: "error", aria: { role: "alert" } }, error.message, " ", code), retry);
  if (error.status !== 503) return;
  retry.remove();
  foot.append(h("span", {}, "It is sent again when the server is ready."));
  await untilReady(controller.signal);
  if (!controller.signal.aborted && foot.isConnected) await again(settings);
}

/** Where no token left early: say why, and how to see them leave. */
function adviseAdaptive(foot, settings, metrics) {
  const { mode, when } = settings.early_exit;
  const { mean_exit_layer: mean, layers_total: total } = metrics.early_exit;
  if (mode !== "adaptive" || when !== "pays" || mean < total) return;
  const show = () => {
    byId("when").value = "always";
    messages.splice(-1);
    foot.closest(".turn").remove();
    return answer({ ...settings, early_exit: earlyExit("adaptive") });
  };
  foot.append(
    h("span", { className: "advice" }, whyNoneLeft(metrics)),
    h("button", { type: "button", className: "quiet small", on: { click: show } }, "Let them leave anyway"),
  );
}

/** Run the last request once more with exits off, for its rate alone. */
async function measureOff() {
  const controller = new AbortController();
  const body = { ...last, early_exit: { mode: "off" } };
  setRunning(controller);
  const button = byId("measure-off");
  button.textContent = "Measuring";
  try {
    const view = new TokenView("");
    const { metrics } = await generate({ body, top: TOP, view, signal: controller.signal });
    const rate = rateOf(metrics);
    live.setOff(rate);
    announce(rate == null ? "Too short to measure" : `With exits off: ${number(rate, 0)} tokens per second`);
  } catch (error) {
    announce(error.message);
  } finally {
    button.textContent = "Measure the same with exits off";
    if (running === controller) setRunning(null);
  }
}

function clear() {
  running?.abort();
  messages = [];
  last = null;
  turns.replaceChildren(byId("empty"));
  byId("empty").hidden = false;
  live.reset();
  setRunning(null);
  prompt.focus();
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (running) running.abort();
  else if (text && model.name) send(text);
  // Nothing is known yet; perhaps for want of a key.
  else if (text) look();
});
sendsOnEnter(prompt, () => running);
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !byId("chat").hidden) running?.abort();
});
byId("new-chat").addEventListener("click", clear);
byId("measure-off").addEventListener("click", measureOff);
byId("examples").replaceChildren(
  ...EXAMPLES.map((text) =>
    h("button", { type: "button", className: "chip", on: { click: () => running || !model.name || send(text) } }, text),
  ),
);
