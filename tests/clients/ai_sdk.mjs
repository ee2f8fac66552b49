// The AI SDK, by each of its ways to a server of this kind: what it makes of the answers, as one line of JSON.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";

const at = { baseURL: `${process.env.SERVER}/v1`, apiKey: "none" };
const openai = createOpenAI(at);
const compatible = createOpenAICompatible({ name: "gemma", supportsStructuredOutputs: true, ...at });
const models = {
  responses: openai.responses(process.env.MODEL),
  chat: openai.chat(process.env.MODEL),
  compatible: compatible.chatModel(process.env.MODEL),
};

const said = {};
for (const [name, model] of Object.entries(models)) {
  const calls = [];
  const tools = {
    get_weather: tool({
      description: "The weather.",
      inputSchema: z.object({ city: z.string(), days: z.int() }),
      execute: async (made) => { calls.push(made); return "sun"; },
    }),
  };
  const asked = (prompt) => ({ model, prompt, temperature: 0, maxRetries: 0 });
  const found = (said[name] = {});
  const text = await generateText({ ...asked("WEATHER"), tools, stopWhen: isStepCount(3) });
  found.generated = [text.text, text.steps.length, text.finishReason];
  const stream = streamText({ ...asked("WEATHER"), tools, stopWhen: isStepCount(3) });
  found.parts = [];
  for await (const part of stream.fullStream) found.parts.push(part.type);
  found.streamed = await stream.text;
  found.calls = calls;
  const forced = await generateText({ ...asked("TEXT"), tools, toolChoice: { type: "tool", toolName: "get_weather" } });
  found.forced = forced.toolCalls.map((call) => call.toolName);
  const thinking = streamText({
    ...asked("THINK"), providerOptions: { openai: { reasoningSummary: "auto", forceReasoning: name === "responses" } },
  });
  found.thought = [await thinking.reasoningText ?? "", await thinking.text];
  found.object = (await generateObject({ ...asked("JSON"), schema: z.object({ city: z.string() }) })).object;
  found.plain = (await generateText({ ...asked("TEXT"), system: "Be brief.", maxOutputTokens: 20 })).text;
}
console.log(JSON.stringify(said));
