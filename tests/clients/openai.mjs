// OpenAI's own client for JavaScript: what it makes of the server's answers, as one line of JSON.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: `${process.env.SERVER}/v1`, apiKey: "none", maxRetries: 0 });
const asked = (key) => ({ model: process.env.MODEL, temperature: 0, messages: [{ role: "user", content: key }] });
const parameters = z.object({ city: z.string(), days: z.int() });
const said = {};

said.chat = (await client.chat.completions.create(asked("TEXT"))).choices[0].message.content;

let streamed = "", thought = "";
for await (const chunk of await client.chat.completions.create({ ...asked("THINK"), stream: true })) {
  streamed += chunk.choices[0]?.delta.content ?? "";
  thought += chunk.choices[0]?.delta.reasoning_content ?? "";
}
said.streamed = [thought, streamed];

const calls = [];
const tool = {
  type: "function",
  function: {
    name: "get_weather", description: "The weather.", parse: JSON.parse,
    parameters: z.toJSONSchema(parameters), function: (made) => { calls.push(made); return "sun"; },
  },
};
said.runTools = await client.chat.completions.runTools({ ...asked("WEATHER"), tools: [tool] }).finalContent();
const stream = client.chat.completions.runTools({ ...asked("WEATHER"), tools: [tool], stream: true });
said.streamedTools = await stream.finalContent();
said.calls = calls;

const strict = zodFunction({ name: "get_weather", parameters });
const parsed = await client.chat.completions.parse({ ...asked("WEATHER"), tools: [strict] });
said.parsedCall = parsed.choices[0].message.tool_calls[0].function.parsed_arguments;
const form = zodResponseFormat(z.object({ city: z.string() }), "place");
said.parsed = (await client.chat.completions.parse({ ...asked("JSON"), response_format: form })).choices[0].message.parsed;

const item = { model: process.env.MODEL, temperature: 0 };
const first = await client.responses.create({
  ...item, input: "WEATHER",
  tools: [{ type: "function", name: "get_weather", parameters: z.toJSONSchema(parameters), strict: false }],
});
said.responseCall = JSON.parse(first.output[0].arguments);
const answer = { type: "function_call_output", call_id: first.output[0].call_id, output: "sun" };
const input = [{ role: "user", content: "WEATHER" }, ...first.output, answer];
said.response = (await client.responses.create({ ...item, input })).output_text;
const events = client.responses.stream({ ...item, input: "THINK" });
said.events = [];
for await (const event of events) said.events.push(event.type);
said.streamedResponse = (await events.finalResponse()).output_text;

try {
  await client.chat.completions.create(asked("word ".repeat(5000)));
} catch (error) {
  said.error = [error.status, error.code];
}
console.log(JSON.stringify(said));
