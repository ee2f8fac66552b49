// The server's API: the model it has, and generations as streams. Failures come as sentences.

import { eventData } from "./sse.js";

/** Why a request failed, in words for the visitor; `status` is 0 where no answer came. */
export class Failure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** The served model: its id, max_model_len, and what it can (`gemma_mtp`). Throws Failure. */
export async function servedModel(key) {
  const answer = await send("v1/models", key, {});
  return (await answer.json()).data[0];
}

/**
 * The body of a streamed request. `options`: prompt, chat, maxTokens, temperature, seed, draftTokens, verification, and of
 * a conversation messages and thinking.
 */
export function requestBody(options) {
  const messages = options.messages ?? [{ role: "user", content: options.prompt }];
  const asked = options.chat
    ? { messages, max_completion_tokens: options.maxTokens }
    : { prompt: options.prompt, max_tokens: options.maxTokens };
  return {
    ...asked,
    ...(options.thinking && { reasoning_effort: "high" }),
    temperature: options.temperature,
    seed: options.seed,
    draft_tokens: options.draftTokens,
    verification: options.verification,
    stream: true,
    stream_options: { include_rounds: true, include_usage: true },
  };
}

/** The chunks of a generation as they come. Throws Failure, and AbortError where `signal` ends it. */
export async function* generate(options, key, signal) {
  const path = options.chat ? "v1/chat/completions" : "v1/completions";
  const headers = { "Content-Type": "application/json" };
  const answer = await send(path, key, { method: "POST", headers, body: JSON.stringify(requestBody(options)), signal });
  try {
    for await (const data of eventData(answer.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(sentence(chunk.error.message), answer.status);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Failure("The connection to the server broke off.");
    throw error;
  }
  throw new Failure("The server ended the answer before it was whole.");
}

async function send(path, key, init) {
  const headers = { ...init.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let answer;
  try {
    answer = await fetch(path, { ...init, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(
      error instanceof TypeError && !isLatin1(key)
        ? "The API key has characters that no key can have."
        : "The server can not be reached. Is it still running?",
    );
  }
  if (!answer.ok) throw await refusal(answer, key);
  return answer;
}

async function refusal(answer, key) {
  const message = await answer.json().then(
    (body) => sentence(body.error.message),
    () => `The server answered ${answer.status}.`,
  );
  if (answer.status === 401) {
    return new Failure(key ? "The server does not know this API key." : "This server needs an API key.", 401);
  }
  const wait = Number(answer.headers.get("Retry-After")); // NaN for a date, which a proxy may send
  const later = wait > 0 ? ` Try again in ${wait} ${wait === 1 ? "second" : "seconds"}.` : "";
  return new Failure(answer.status === 429 ? `The server is busy: ${message}${later}` : message + later, answer.status);
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function isLatin1(text) {
  return /^[\x20-\xff]*$/.test(text);
}
