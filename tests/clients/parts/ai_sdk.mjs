// Vercel's AI SDK, with its providers for OpenAI-compatible servers and for Open Responses.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenResponses } from "@ai-sdk/open-responses";
import { APICallError, Output, embedMany, generateText, jsonSchema, streamText, tool } from "ai";
import { z } from "zod";
import {
  BASE_URL, FORCED_TOKENS, FUNCTION, MAX_TOKENS, MODEL, PARAMETERS, PROMPT, TOOL_PROMPT,
  expect, rejects, run, validArguments,
} from "./checks.mjs";

const here = createOpenAICompatible({
  name: "here", baseURL: BASE_URL, apiKey: "none", includeUsage: true,
  supportsStructuredOutputs: true,
});
const responses = createOpenResponses({ name: "here", url: `${BASE_URL}/responses`, apiKey: "none" });
const options = { temperature: 0, maxRetries: 0, maxOutputTokens: MAX_TOKENS };
const tools = {
  [FUNCTION.name]: tool({
    description: FUNCTION.description, inputSchema: jsonSchema(PARAMETERS),
  }),
};
const forced = {
  ...options, prompt: TOOL_PROMPT, maxOutputTokens: FORCED_TOKENS, tools, toolChoice: "required",
};
const Judgement = z.object({ city: z.enum(["Paris", "Rome"]), certain: z.boolean() });

// A stream reports its fault to a callback, and its results say only that there are none.
function stream(settings) {
  let fault = null;
  const result = streamText({ ...settings, onError: ({ error }) => { fault = error; } });
  return { result, consume: async () => {
    let text = "";
    for await (const part of result.textStream) text += part;
    if (fault) throw fault;
    return text;
  } };
}

async function streamed(model) {
  const { result, consume } = stream({ ...options, model, prompt: PROMPT });
  const text = await consume();
  expect(text, "no text");
  expect((await result.usage).outputTokens > 0, "no usage");
  return text;
}

async function streamedCall(model) {
  const { result, consume } = stream({ ...forced, model });
  await consume();
  validArguments((await result.toolCalls)[0].input);
}

await run({
  chat: async () => {
    const answer = await generateText({ ...options, model: here(MODEL), prompt: PROMPT });
    expect(answer.text, "no text");
    expect(answer.usage.outputTokens > 0, "no usage");
  },
  stream: async () => {
    const whole = await generateText({ ...options, model: here(MODEL), prompt: PROMPT });
    const text = await streamed(here(MODEL));
    expect(text === whole.text, `streamed ${text}`);
  },
  completion: async () => {
    const model = here.completionModel(MODEL);
    const answer = await generateText({ ...options, model, prompt: "The capital of France is" });
    expect(answer.text, "no text");
  },
  "unknown model": async () => rejects(
    (fault) => APICallError.isInstance(fault) && fault.statusCode === 404,
    () => generateText({ ...options, model: here("no-such-model"), prompt: PROMPT }),
  ),
  "wrong value": async () => rejects(
    (fault) => APICallError.isInstance(fault) && fault.statusCode === 400,
    () => generateText({ ...options, temperature: 9, model: here(MODEL), prompt: PROMPT }),
  ),
  tools: async () => {
    const answer = await generateText({ ...forced, model: here(MODEL) });
    validArguments(answer.toolCalls[0].input);
    expect(answer.finishReason === "tool-calls", answer.finishReason);
  },
  "tools, streamed": async () => streamedCall(here(MODEL)),
  "json schema": async () => {
    const answer = await generateText({
      ...options,
      model: here(MODEL),
      prompt: PROMPT,
      maxOutputTokens: FORCED_TOKENS,
      output: Output.object({ schema: Judgement }),
    });
    Judgement.parse(answer.output);
  },
  embeddings: async () => {
    const model = here.embeddingModel(MODEL);
    const { embeddings } = await embedMany({ model, values: ["a cat", "a dog"], maxRetries: 0 });
    expect(embeddings.length === 2, "no vectors");
  },
  responses: async () => {
    const answer = await generateText({ ...options, model: responses(MODEL), prompt: PROMPT });
    expect(answer.text, "no text");
    expect(answer.usage.outputTokens > 0, "no usage");
  },
  "responses, streamed": async () => { await streamed(responses(MODEL)); },
  "responses, tools": async () => streamedCall(responses(MODEL)),
});
