// Decisions: a question with a fixed set of answers, asked with exits off and on.

import { postJson } from "./api.js";
import { byId, check, checked, h, number, percent } from "./dom.js";
import { model } from "./depth.js";
import { qualityOptions } from "./settings.js";

const SAMPLES = {
  predicate: ["Is the writer happy with what they bought?", ""],
  choice: ["What is this text about?", "food\ntravel\nsport"],
  score: ["How urgent is this message?", "can wait\nthis week\ntoday\nnow"],
};
const INPUT = "A moving and beautifully acted film, easily the best of the year.";

const question = byId("decision-question");
const answers = byId("decision-answers");
/** A trained task by name, while the fields are as it filled them. */
let task = null;

function kindChanged() {
  const kind = checked("kind");
  [question.value, answers.value] = SAMPLES[kind];
  edited();
}

/** The fields are no longer those of a task. */
function edited() {
  const kind = checked("kind");
  task = null;
  byId("answers-field").hidden = kind === "predicate";
  byId("answers-label").textContent = kind === "score" ? "Levels, lowest first, one a line" : "Answers, one a line";
  showTasks();
}

function showTasks() {
  const names = Object.keys(model.tasks);
  byId("tasks").replaceChildren(
    ...(names.length ? [h("span", { className: "note" }, "Trained here:")] : []),
    ...names.map((name) =>
      h("button", { type: "button", className: "chip", aria: { pressed: String(name === task) }, on: { click: () => useTask(name) } }, name)),
  );
  const quality = byId("decision-quality");
  quality.replaceChildren(...qualityOptions(task ? model.tasks[task].qualities : []));
  quality.disabled = !task;
}

/** Fill in a task's question: its wording's first line, without what yes-or-no questions begin with. */
function useTask(name) {
  const trained = model.tasks[name];
  const isYesNo = trained.answers.join() === "yes,no" || trained.answers.join() === "no,yes";
  check("kind", isYesNo ? "predicate" : "choice");
  question.value = trained.question.split("\n")[0].replace(/^Is the following true\? /, "");
  answers.value = trained.answers.join("\n");
  edited();
  task = name;
  showTasks();
}

function asked() {
  const kind = checked("kind");
  const lines = answers.value.split("\n").map((line) => line.trim()).filter(Boolean);
  const own = { type: kind, instructions: question.value.trim() };
  if (kind === "choice") own.choices = lines.map((value) => ({ value }));
  if (kind === "score") own.levels = lines.map((label) => ({ label }));
  return own;
}

function requestBody(mode, input) {
  const wish = { mode };
  const quality = byId("decision-quality").value;
  if (task && mode === "adaptive") Object.assign(wish, { task }, quality && { quality: Number(quality) });
  return { model: model.name, input: [{ role: "user", content: input }], questions: [asked()], early_exit: wish };
}

async function decide() {
  const text = byId("decision-input").value.trim();
  const box = byId("verdicts");
  byId("decide").disabled = true;
  box.replaceChildren(h("p", { className: "waiting" }, "Asking with early exit, then with every layer"));
  try {
    const ask = (mode, input) => postJson("/v1/decisions", requestBody(mode, input));
    // A new question is first asked about nothing, for its bias: that is not part of the time.
    await ask("off", ".");
    // What one run leaves in the prefix cache the next one finds. Full depth comes second, so that
    // this is never to the credit of early exit.
    const early = Object.keys(model.tasks).length ? await ask("adaptive", text) : null;
    const full = await ask("off", text);
    const other = early
      ? verdict("Early exit", early)
      : h("p", { className: "waiting" }, "No task is trained for this model, so no question leaves early.");
    box.replaceChildren(verdict("Every layer", full), other);
  } catch (error) {
    const code = error.code ? h("code", {}, error.code) : null;
    box.replaceChildren(h("p", { className: "error", aria: { role: "alert" } }, error.message, " ", code));
  } finally {
    byId("decide").disabled = false;
  }
}

function verdict(title, { answers: [answer], metrics, usage }) {
  const total = metrics.early_exit.layers_total;
  const rows = shares(answer);
  const best = Math.max(...rows.map(([, share]) => share));
  return h("section", { className: "card verdict-card" },
    h("header", {}, h("h2", {}, title), h("p", { className: "note" }, answer.task ? `answered by the task ${answer.task}` : "answered by the model")),
    h("ol", { className: "others" }, rows.map(([name, share]) =>
      h("li", { className: share === best ? "chosen" : "" },
        h("span", { className: "answer-name" }, name), h("i", { className: "meter", vars: { "--share": share } }), h("span", {}, percent(share))))),
    h("div", { className: "depth-gauge", data: { layer: answer.exit_layer } }, h("i", { className: "meter", data: { layer: answer.exit_layer }, vars: { "--share": answer.exit_layer / total } })),
    h("dl", { className: "tiles" },
      tile(`layer of ${total}`, String(answer.exit_layer)),
      tile("time", `${number(1000 * metrics.seconds, 1)} ms`),
      tile("prompt tokens", String(usage.input_tokens), usage.input_tokens_details.cached_tokens && `${usage.input_tokens_details.cached_tokens} cached`)));
}

const tile = (name, value, more) => h("div", {}, h("dt", {}, name), h("dd", {}, value, more ? h("small", {}, more) : null));

function shares(answer) {
  if (answer.type === "predicate") return [["yes", answer.probability], ["no", 1 - answer.probability]];
  return answer.probabilities.map((each) => [String(each.label ?? each.value), each.probability]);
}

byId("decision-input").value = INPUT;
byId("decision-form").addEventListener("submit", (event) => {
  event.preventDefault();
  decide();
});
for (const radio of document.querySelectorAll('input[name="kind"]')) radio.addEventListener("change", kindChanged);
question.addEventListener("input", edited);
answers.addEventListener("input", edited);
document.addEventListener("model", () => {
  const [first] = Object.keys(model.tasks);
  if (first) useTask(first);
  else kindChanged();
});
