// The same as checks.py, for clients in JavaScript.
import { appendFileSync } from "node:fs";

export const BASE_URL = process.env.BASE_URL;
export const MODEL = process.env.MODEL;
export const PROMPT = "What is the capital of France?";
export const MESSAGES = [{ role: "user", content: PROMPT }];
export const MAX_TOKENS = 24;
export const FORCED_TOKENS = 200;

const CITIES = ["Paris", "Rome"];
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string", enum: CITIES }, days: { type: "integer" } },
  required: ["city", "days"],
  additionalProperties: false,
};
export const FUNCTION = {
  name: "get_forecast",
  description: "Weather of a city for some days.",
  parameters: PARAMETERS,
};
export const TOOL_PROMPT = "How will the weather in Paris be for 3 days?";

export function expect(condition, message) {
  if (!condition) throw new Error(message);
}

export function validArguments(found) {
  const value = typeof found === "string" ? JSON.parse(found) : found;
  expect(CITIES.includes(value.city), `arguments ${JSON.stringify(value)}`);
  expect(Number.isInteger(value.days), `arguments ${JSON.stringify(value)}`);
}

export async function rejects(kind, call) {
  try {
    await call();
  } catch (fault) {
    expect(kind(fault), `raised ${fault.constructor.name}: ${fault.message}`);
    return `${fault.constructor.name}: ${fault.message}`;
  }
  throw new Error("nothing was raised");
}

export async function run(checks) {
  for (const [check, body] of Object.entries(checks)) {
    const begun = Date.now();
    let outcome = "passed";
    let detail = "";
    try {
      detail = (await body()) ?? "";
    } catch (fault) {
      outcome = "failed";
      detail = `${fault.constructor.name}: ${fault.message}`;
    }
    detail = String(detail).split(/\s+/).join(" ").slice(0, 400);
    const line = { check, outcome, detail, seconds: (Date.now() - begun) / 1000 };
    appendFileSync(process.env.RESULTS, JSON.stringify(line) + "\n");
  }
}
