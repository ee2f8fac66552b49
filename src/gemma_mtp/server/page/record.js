// What is known of one generation. Rounds count as `GenerationResult` in Python counts them: the first, which is the
// prompt's, is no decode round.

export class Record {
  text = "";
  rounds = [];
  finishReason = null;
  #started = performance.now();
  #firstToken = null;

  /** Take in a chunk. Returns its round: drafted, accepted, tokens (id, text, kind), seconds; or null. */
  add(chunk) {
    for (const choice of chunk.choices) {
      this.text += choice.text ?? choice.delta.content ?? "";
      this.finishReason = choice.finish_reason ?? this.finishReason;
    }
    const round = chunk.gemma_mtp ?? null;
    if (round) {
      this.#firstToken ??= performance.now();
      this.rounds.push(round);
    }
    return round;
  }

  get decodeRounds() {
    return this.rounds.slice(1);
  }

  get tokenIds() {
    return this.rounds.flatMap((round) => round.tokens.map((token) => token.id));
  }

  get tokenCount() {
    return count(this.rounds);
  }

  /** Milliseconds until the first token was here, by this browser's clock; null before. */
  get firstTokenMilliseconds() {
    return this.#firstToken === null ? null : this.#firstToken - this.#started;
  }

  /** Tokens after the first, over the time of their rounds by the server's clock; null without any. */
  get tokensPerSecond() {
    const seconds = this.decodeRounds.reduce((sum, round) => sum + round.seconds, 0);
    return seconds > 0 ? count(this.decodeRounds) / seconds : null;
  }

  /** Tokens a decode round, the target's own included; null without any. */
  get tokensARound() {
    const rounds = this.decodeRounds;
    return rounds.length ? count(rounds) / rounds.length : null;
  }

  /** For each draft position: in how many rounds it was reached, those before it accepted, and in how many accepted. */
  get acceptance() {
    const longest = Math.max(0, ...this.decodeRounds.map((round) => round.drafted));
    return Array.from({ length: longest }, (_, position) => {
      const reached = this.decodeRounds.filter((round) => round.drafted > position && round.accepted >= position);
      return { reached: reached.length, accepted: reached.filter((round) => round.accepted > position).length };
    });
  }
}

/** Whether two outputs are the same, token by token and byte by byte, and the token (from 1) at which they part. */
export function compare(one, other) {
  const [a, b] = [one.tokenIds, other.tokenIds];
  const place = a.findIndex((id, i) => id !== b[i]);
  const identical = place < 0 && a.length === b.length && one.text === other.text;
  return { identical, token: identical ? null : (place < 0 ? Math.min(a.length, b.length) : place) + 1 };
}

function count(rounds) {
  return rounds.reduce((sum, round) => sum + round.tokens.length, 0);
}
