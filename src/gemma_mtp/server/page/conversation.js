// A conversation on the page: its turns, each a message and its answer, and what the next request says of them.

import { formatNumber, tokenSpan } from "./lane.js";
import { Record } from "./record.js";

/** What a thought begins with, which is no part of it. */
const LABEL = "thought\n";

export class Conversation {
  #list;
  #turns = [];

  constructor(list) {
    this.#list = list;
  }

  get size() {
    return this.#turns.length;
  }

  /** The user's last message; "" before there is one. */
  get lastMessage() {
    return this.#turns.at(-1)?.message ?? "";
  }

  /** All that was said, as the API takes it, and a message after it. */
  messages(system, message) {
    const said = this.#turns.flatMap((turn) => [
      { role: "user", content: turn.message },
      { role: "assistant", content: turn.record.text },
    ]);
    return [...(system ? [{ role: "system", content: system }] : []), ...said, { role: "user", content: message }];
  }

  /** A turn to be filled. */
  begin(message) {
    const turn = new Turn(message, this.#turns.length + 1);
    this.#turns.push(turn);
    this.#list.append(turn.element);
    return turn;
  }

  /** Take the last turn off. Returns it, or undefined; `restore` puts it back. */
  takeLast() {
    const turn = this.#turns.pop();
    turn?.element.remove();
    return turn;
  }

  restore(turn) {
    this.#turns.push(turn);
    this.#list.append(turn.element);
  }

  clear() {
    this.#turns = [];
    this.#list.replaceChildren();
  }
}

class Turn {
  record = new Record();
  #drawn = 0;
  #frame = 0;
  #label = LABEL;

  constructor(message, number) {
    this.message = message;
    this.element = document.getElementById("turn").content.firstElementChild.cloneNode(true);
    this.#find(".said").textContent = message;
    this.#find(".output").setAttribute("aria-label", `Answer ${number}`);
    this.state = "running";
  }

  set state(text) {
    this.#find(".lane-state").textContent = text;
  }

  add(chunk) {
    this.record.add(chunk);
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** Draw what is left at once, and say what it took. */
  end(state) {
    cancelAnimationFrame(this.#frame);
    this.#draw();
    this.state = state;
    this.#find(".turn-figures").textContent = figures(this.record);
  }

  #find(selector) {
    return this.element.querySelector(selector);
  }

  #draw() {
    this.#frame = 0;
    const { rounds } = this.record;
    for (const token of rounds.slice(this.#drawn).flatMap((round) => round.tokens)) this.#drawToken(token);
    this.#drawn = rounds.length;
  }

  #drawToken(token) {
    if (token.part !== "thought") {
      this.#label = LABEL;
      if (token.text) this.#find(".output").append(tokenSpan(token));
      return;
    }
    const text = this.#withoutLabel(token.text);
    if (!text) return;
    this.#find(".thought").hidden = false;
    this.#find(".thinking").append(tokenSpan({ ...token, text }));
  }

  /** A thought's text after its label, which may come in several tokens. */
  #withoutLabel(text) {
    const label = this.#label;
    if (text === "" || label === "") return text;
    this.#label = label.startsWith(text) ? label.slice(text.length) : "";
    if (this.#label || label === text) return "";
    return text.startsWith(label) ? text.slice(label.length) : LABEL.slice(0, LABEL.length - label.length) + text;
  }
}

/** One line: how fast, what of the drafts, and what of the conversation was there from before. */
function figures(record) {
  const { tokenIds, tokensPerSecond, tokensARound, drafted, accepted, cachedTokens, promptTokens } = record;
  const parts = [`${tokenIds.length} tokens`];
  if (tokensPerSecond !== null) parts.push(`${formatNumber(tokensPerSecond)} tokens/s`);
  if (drafted) parts.push(`${accepted} of ${drafted} drafts accepted`);
  if (tokensARound !== null) parts.push(`${tokensARound.toFixed(2)} tokens/round`);
  if (promptTokens) parts.push(`${cachedTokens} of ${promptTokens} prompt tokens cached`);
  return parts.join(", ");
}
