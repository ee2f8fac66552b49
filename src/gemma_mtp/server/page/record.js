// What is known of one generation. Rounds count as `GenerationResult` in Python counts them: the first, which is the
// prompt's, is no decode round.

export class Record {
  text = "";
  tokenIds = [];
  rounds = [];
  finishReason = null;
  /** Tokens of the prompt whose keys and values the server had from before. */
  cachedTokens = 0;
  promptTokens = 0;
  /** For each draft position: in how many rounds it was reached, those before it accepted, and in how many accepted. */
  acceptance = [];
  #decodeTokens = 0;
  #decodeSeconds = 0;
  #started = performance.now();
  #firstToken = null;

  /** Take in a chunk. Returns its round: drafted, accepted, tokens (id, text, kind, part), seconds; or null. */
  add(chunk) {
    for (const choice of chunk.choices) {
      this.text += choice.text ?? choice.delta.content ?? "";
      this.finishReason = choice.finish_reason ?? this.finishReason;
    }
    this.cachedTokens = chunk.usage?.prompt_tokens_details?.cached_tokens ?? this.cachedTokens;
    this.promptTokens = chunk.usage?.prompt_tokens ?? this.promptTokens;
    const round = chunk.gemma_mtp ?? null;
    if (round) this.#addRound(round);
    return round;
  }

  #addRound(round) {
    this.rounds.push(round);
    for (const token of round.tokens) this.tokenIds.push(token.id);
    if (this.rounds.length === 1) {
      this.#firstToken = performance.now();
      return;
    }
    this.#decodeTokens += round.tokens.length;
    this.#decodeSeconds += round.seconds;
    for (let position = 0; position < Math.min(round.drafted, round.accepted + 1); position++) {
      const counts = (this.acceptance[position] ??= { reached: 0, accepted: 0 });
      counts.reached += 1;
      counts.accepted += position < round.accepted;
    }
  }

  /** Milliseconds until the first token was here, by this browser's clock; null before. */
  get firstTokenMilliseconds() {
    return this.#firstToken === null ? null : this.#firstToken - this.#started;
  }

  /** Tokens after the first, over the time of their rounds by the server's clock; null without any. */
  get tokensPerSecond() {
    return this.#decodeSeconds > 0 ? this.#decodeTokens / this.#decodeSeconds : null;
  }

  /** Drafts made in all decode rounds. */
  get drafted() {
    return this.rounds.slice(1).reduce((sum, round) => sum + round.drafted, 0);
  }

  /** How many of them the target accepted. */
  get accepted() {
    return this.rounds.slice(1).reduce((sum, round) => sum + round.accepted, 0);
  }

  /** Tokens a decode round, the target's own included; null without any. */
  get tokensARound() {
    return this.rounds.length > 1 ? this.#decodeTokens / (this.rounds.length - 1) : null;
  }
}

/** Whether two outputs are the same, token by token and byte by byte, and the token (from 1) at which they part. */
export function compare(one, other) {
  const [a, b] = [one.tokenIds, other.tokenIds];
  const place = a.findIndex((id, i) => id !== b[i]);
  const identical = place < 0 && a.length === b.length && one.text === other.text;
  return { identical, token: identical ? null : (place < 0 ? Math.min(a.length, b.length) : place) + 1 };
}
