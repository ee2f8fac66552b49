// Anthropic's client for JavaScript: what it makes of the server's answers, as one line of JSON.
import Anthropic from "@anthropic-ai/sdk";

const client = new Anthropic({ baseURL: process.env.SERVER, apiKey: "none", maxRetries: 0 });
const asked = (content) => ({
  model: process.env.MODEL, max_tokens: 2000, temperature: 0, messages: [{ role: "user", content }],
});
const tools = [{ name: "get_weather", input_schema: { type: "object" } }];
const said = {};

const first = await client.messages.create({ ...asked("WEATHER"), tools });
said.call = [first.stop_reason, first.content[0].input];
const result = { type: "tool_result", tool_use_id: first.content[0].id, content: "sun" };
const messages = [
  ...asked("WEATHER").messages, { role: "assistant", content: first.content }, { role: "user", content: [result] },
];
said.text = await client.messages.stream({ ...asked("WEATHER"), messages, tools }).finalText();
const thinking = { type: "enabled", budget_tokens: 1024 };
const thought = await client.messages.stream({ ...asked("THINK"), thinking }).finalMessage();
said.thought = thought.content.map((block) => block.thinking ?? block.text);
said.counted = (await client.messages.countTokens({ model: process.env.MODEL, messages })).input_tokens > 0;
console.log(JSON.stringify(said));
