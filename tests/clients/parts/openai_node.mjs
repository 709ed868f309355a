// The official client for JavaScript.
import OpenAI, { BadRequestError, NotFoundError } from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  BASE_URL, FORCED_TOKENS, FUNCTION, MAX_TOKENS, MESSAGES, MODEL, PROMPT, TOOL_PROMPT,
  expect, rejects, run, validArguments,
} from "./checks.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const chat = { model: MODEL, messages: MESSAGES, temperature: 0, max_tokens: MAX_TOKENS };
const forced = {
  ...chat,
  messages: [{ role: "user", content: TOOL_PROMPT }],
  max_tokens: FORCED_TOKENS,
  tools: [{ type: "function", function: FUNCTION }],
  tool_choice: "required",
};
const response = { model: MODEL, input: PROMPT, temperature: 0, max_output_tokens: MAX_TOKENS };
const Judgement = z.object({ city: z.enum(["Paris", "Rome"]), certain: z.boolean() });

await run({
  chat: async () => {
    const answer = await client.chat.completions.create(chat);
    expect(answer.choices[0].message.content, "no content");
    expect(answer.usage.completion_tokens > 0, "no usage");
  },
  stream: async () => {
    const whole = await client.chat.completions.create(chat);
    const options = { stream: true, stream_options: { include_usage: true } };
    let text = "";
    let usage = null;
    for await (const chunk of await client.chat.completions.create({ ...chat, ...options })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    expect(text === whole.choices[0].message.content, `streamed ${text}`);
    expect(usage?.completion_tokens === whole.usage.completion_tokens, "usage differs");
  },
  completion: async () => {
    const request = { model: MODEL, prompt: "The capital of France is", temperature: 0 };
    const answer = await client.completions.create({ ...request, max_tokens: 8 });
    expect(answer.choices[0].text.includes("Paris"), answer.choices[0].text);
  },
  models: async () => {
    const ids = [];
    for await (const card of client.models.list()) ids.push(card.id);
    expect(ids.includes(MODEL), `models ${ids}`);
  },
  "unknown model": async () => {
    await rejects((fault) => fault instanceof NotFoundError, () => client.models.retrieve("none"));
    return rejects(
      (fault) => fault instanceof NotFoundError,
      () => client.chat.completions.create({ ...chat, model: "no-such-model" }),
    );
  },
  "wrong value": async () => {
    const wrong = { ...chat, temperature: 9 };
    return rejects(
      (fault) => fault instanceof BadRequestError && fault.param === "temperature",
      () => client.chat.completions.create(wrong),
    );
  },
  tools: async () => {
    const { choices } = await client.chat.completions.create(forced);
    validArguments(choices[0].message.tool_calls[0].function.arguments);
    expect(choices[0].finish_reason === "tool_calls", choices[0].finish_reason);
  },
  "tools, streamed": async () => {
    const final = await client.chat.completions.stream(forced).finalChatCompletion();
    validArguments(final.choices[0].message.tool_calls[0].function.arguments);
  },
  "json schema": async () => {
    const format = zodResponseFormat(Judgement, "judgement");
    const answer = await client.chat.completions.parse({
      ...chat, max_tokens: FORCED_TOKENS, response_format: format,
    });
    Judgement.parse(answer.choices[0].message.parsed);
  },
  logprobs: async () => {
    const answer = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 2 });
    const tokens = answer.choices[0].logprobs.content;
    expect(tokens.length > 0 && tokens.every((token) => token.top_logprobs.length === 2), "few");
  },
  embeddings: async () => {
    const answer = await client.embeddings.create({ model: MODEL, input: ["a cat", "a dog"] });
    expect(answer.data.length === 2 && answer.data[0].embedding.length > 1, "no vectors");
  },
  responses: async () => {
    const answer = await client.responses.create(response);
    expect(answer.output_text, "no text");
  },
  "responses, streamed": async () => {
    const stream = client.responses.stream(response);
    let text = "";
    stream.on("response.output_text.delta", (event) => { text += event.delta; });
    const final = await stream.finalResponse();
    expect(text && text === final.output_text, `streamed ${text}`);
  },
  "responses, tools": async () => {
    const answer = await client.responses.create({
      ...response,
      input: TOOL_PROMPT,
      max_output_tokens: FORCED_TOKENS,
      tools: [{ type: "function", strict: true, ...FUNCTION }],
      tool_choice: "required",
    });
    validArguments(answer.output.find((item) => item.type === "function_call").arguments);
  },
  "responses, json schema": async () => {
    const answer = await client.responses.parse({
      ...response,
      max_output_tokens: FORCED_TOKENS,
      text: { format: zodTextFormat(Judgement, "judgement") },
    });
    Judgement.parse(answer.output_parsed);
  },
});
