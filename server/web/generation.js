// One generation: a stream of tokens into a view, and what it cost.

import { stream } from "./api.js";
import { number } from "./dom.js";
import { model } from "./depth.js";

/** Stream an answer into `view`; returns its finish reason and metrics. */
export async function generate({ body, top, view, signal, onTokens = () => {} }) {
  const start = performance.now();
  let finish = null;
  let metrics = null;
  const asked = {
    model: model.name,
    return_token_ids: true,
    return_exit_layers: true,
    return_token_sources: true,
    logprobs: true,
    top_logprobs: top,
    ...body,
  };
  for await (const chunk of stream("/v1/chat/completions", asked, signal)) {
    const choice = chunk.choices[0];
    if (choice) {
      onTokens(view.push(choice, performance.now(), start));
      finish = choice.finish_reason ?? finish;
    }
    metrics = chunk.metrics ?? metrics;
  }
  return { finish, metrics };
}

/** Tokens per second behind the first, as the server measured; null of a single token. */
export const rateOf = (metrics) => (metrics.mean_itl_ms ? 1000 / metrics.mean_itl_ms : null);

const tokensOf = (depth) => Object.values(depth.exit_histogram).reduce((a, b) => a + b, 0);

/** What an answer cost, as lists of a name, a text and perhaps a note. */
export function costs(metrics) {
  const depth = metrics.early_exit;
  const rate = rateOf(metrics);
  const found = [
    ["tokens/s", rate == null ? "–" : number(rate, 0)],
    ["passes/token", number(depth.passes / Math.max(1, tokensOf(depth)), 2)],
    ["layers/token", number(depth.layers_executed / Math.max(1, tokensOf(depth)), 1)],
    ["mean layer", number(depth.mean_exit_layer ?? 0, 1)],
  ];
  if (depth.drafted_tokens) {
    found[1].push(`${depth.accepted_tokens} of ${depth.drafted_tokens} guesses`);
  }
  if (depth.stayed) found.push(["stayed", String(depth.stayed)]);
  if (depth.activation_dtype) found[3].push(`${depth.activation_dtype} inputs`);
  return found;
}

/** The same in one line. */
export function summary(metrics, finish) {
  const depth = metrics.early_exit;
  const count = tokensOf(depth);
  const parts = [`${count} token${count === 1 ? "" : "s"}`];
  const rate = rateOf(metrics);
  if (rate != null) parts.push(`${number(rate, 0)} tokens/s`);
  parts.push(`${depth.passes} pass${depth.passes === 1 ? "" : "es"}`);
  if (metrics.time_to_first_token_ms != null) {
    parts.push(`first after ${number(metrics.time_to_first_token_ms, 0)} ms`);
  }
  if (finish === "length") parts.push("cut off at the most tokens");
  return parts.join(" · ");
}

/** Why no token left early: what was done in its place. */
export function whyNoneLeft(metrics) {
  const instead = metrics.early_exit.activation_dtype
    ? "the quality was spent on inputs of 8 bits, which saves more time here."
    : "by measured cost that saves no time here.";
  return `No token left early: ${instead}`;
}
