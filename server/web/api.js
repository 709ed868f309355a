// Requests to the server that served this page: JSON, streams of events, its key.

import { byId } from "./dom.js";

const KEY = "offramp-key";

/** An error in the server's own words. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code ?? null;
    this.param = error.param ?? null;
  }
}

async function refusal(response) {
  try {
    return new ApiError(response.status, (await response.json()).error);
  } catch {
    return new ApiError(response.status, { message: `The server answered ${response.status}.` });
  }
}

let asking = null;

/** Ask for a key; whether one was given. Requests that wait for it share the question. */
function askKey(reason) {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    byId("key-reason").textContent = reason;
    byId("key").value = "";
    const given = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, byId("key").value.trim());
      dialog.close("given");
    };
    const cancel = () => dialog.close("");
    byId("key-form").addEventListener("submit", given);
    byId("key-cancel").addEventListener("click", cancel);
    dialog.addEventListener("close", () => {
      byId("key-form").removeEventListener("submit", given);
      byId("key-cancel").removeEventListener("click", cancel);
      asking = null;
      resolve(dialog.returnValue === "given");
    }, { once: true });
    dialog.returnValue = "";
    dialog.showModal();
  });
  return asking;
}

/** Fetch with the key; asks for one where the server refuses. Raises ApiError, or AbortError. */
async function send(path, options = {}) {
  for (;;) {
    const headers = { ...options.headers };
    const key = sessionStorage.getItem(KEY);
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: "The server cannot be reached." });
    }
    if (response.ok) return response;
    const error = await refusal(response);
    // Another request may have asked for the key meanwhile.
    const renewed = sessionStorage.getItem(KEY) !== key;
    if (response.status !== 401 || !(renewed || (await askKey(error.message)))) throw error;
  }
}

const post = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

export const getJson = async (path) => (await send(path)).json();

export const postJson = async (path, body, signal) => (await send(path, post(body, signal))).json();

/** Send a body with `stream: true`; gives each event's object. Raises ApiError, or AbortError. */
export async function* stream(path, body, signal) {
  const response = await send(path, post({ ...body, stream: true }, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let ended = false;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      const data = event.slice("data: ".length);
      if (data === "[DONE]") {
        ended = true;
        continue;
      }
      const parsed = JSON.parse(data);
      if (parsed.error) throw new ApiError(response.status, parsed.error);
      yield parsed;
    }
  }
  if (!ended) throw new ApiError(response.status, { message: "The answer was cut off." });
}

/** Tokens that left early and were read again at full depth, of all requests, and those that differed. */
export async function audits() {
  const text = await (await fetch("/metrics")).text();
  const [audited, differed] = ["audits", "disagreements"].map((name) =>
    Number(text.match(new RegExp(`^offramp:exit_${name}_total\\S* (\\S+)`, "m"))?.[1] ?? 0),
  );
  return { audited, differed };
}

/** What /ready says, with its status code; null where the server cannot be reached. */
export async function readiness() {
  try {
    const response = await fetch("/ready");
    return { ready: response.ok, ...(await response.json()) };
  } catch {
    return null;
  }
}
