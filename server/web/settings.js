// The settings of generation: fields to parts of a request's body.

import { byId, check, checked, h } from "./dom.js";
import { model } from "./depth.js";

const NOTES = {
  off: "Every token runs every layer, in a pass of its own.",
  lossless: "Tokens are guessed cheaply and confirmed at full depth, several in one pass. The answer is that of full depth.",
  adaptive: "Tokens leave at an exit that is sure enough. The answer may differ from full depth as far as the quality allows.",
};

/** Fit the fields to the served model. */
export function fitSettings() {
  byId("quality").replaceChildren(...qualityOptions(model.qualities));
  document.querySelector('input[name="mode"][value="adaptive"]').disabled = !model.exits.length;
  check("mode", model.draftHead || !model.exits.length ? "lossless" : "adaptive");
  explain();
}

/** Options of a quality that can be chosen: the server's own, and those that were calibrated. */
export function qualityOptions(qualities) {
  return [
    h("option", { value: "" }, "default"),
    ...[...qualities].reverse().map((each) => h("option", { value: String(each) }, String(each))),
  ];
}

export function explain() {
  const mode = checked("mode");
  byId("mode-note").textContent = NOTES[mode];
  byId("adaptive-fields").classList.toggle("unused", mode !== "adaptive");
}

/** The sampling part of a body; raises an Error that names the field at fault. */
export function sampling() {
  const body = {};
  for (const [id, name] of [["temperature", "temperature"], ["top-p", "top_p"], ["max-tokens", "max_tokens"], ["seed", "seed"]]) {
    const field = byId(id);
    if (!field.checkValidity()) {
      byId("settings").open = true;
      field.reportValidity();
      throw new Error(`${field.labels[0].textContent}: ${field.validationMessage}`);
    }
    if (field.value !== "") body[name] = Number(field.value);
  }
  return body;
}

/** `early_exit` of a mode with the settings that belong to it. */
export function earlyExit(mode = checked("mode")) {
  if (mode !== "adaptive") return { mode };
  const quality = byId("quality").value;
  return { mode, when: byId("when").value, ...(quality && { quality: Number(quality) }) };
}

/** The system prompt as messages. */
export function systemMessages() {
  const text = byId("system").value.trim();
  return text ? [{ role: "system", content: text }] : [];
}

explain();
byId("settings-form").addEventListener("change", explain);
byId("settings-form").addEventListener("submit", (event) => event.preventDefault());
