// The mode of conversations: what its buttons do, and one answer at a time.

import { generate } from "./client.js";
import { Conversation } from "./conversation.js";
import { formatNumber } from "./lane.js";

const element = (id) => document.getElementById(id);

export class Talk {
  #conversation = new Conversation(element("turns"));
  #editing = false;

  /** `start` sends what the prompt's field holds; `say` tells the visitor; `busy` is whether something runs. */
  constructor({ start, say, busy }) {
    const idle = (act) => () => {
      if (!busy()) act();
    };
    element("retry").addEventListener("click", idle(() => this.#retry(start)));
    element("edit").addEventListener("click", idle(() => this.#edit(say)));
    element("new").addEventListener("click", idle(() => this.#startAnew(say)));
  }

  /** Leave editing: the next message is a new one. Returns whether one was edited. */
  giveUpEditing() {
    const was = this.#editing;
    this.#editing = false;
    return was;
  }

  /** What is asked when a message is sent now. An edited one takes the place of the last. */
  send(options, ending, key, controller) {
    const replaced = this.giveUpEditing() ? this.#conversation.takeLast() : undefined;
    const asked = { ...options, chat: true, messages: this.#conversation.messages(options.system, options.prompt) };
    element("prompt").value = "";
    return this.#answer(asked, replaced, ending, key, controller);
  }

  async #answer(options, replaced, ending, key, controller) {
    const turn = this.#conversation.begin(options.prompt);
    this.#show();
    turn.element.scrollIntoView({ block: "nearest" });
    try {
      for await (const chunk of generate(options, key, controller.signal)) turn.add(chunk);
      turn.end(ending(turn.record));
    } catch (error) {
      if (error.name === "AbortError" && turn.record.text) turn.end("stopped");
      else this.#giveBack(options.prompt, replaced);
      if (error.status === 400 && this.#conversation.size) {
        error.message += " If the conversation has become too long, begin a new one.";
      }
      throw error;
    } finally {
      this.#show();
    }
    const { tokenIds, tokensPerSecond } = turn.record;
    const speed = tokensPerSecond === null ? "" : ` at ${formatNumber(tokensPerSecond)} tokens a second`;
    return `Answered: ${tokenIds.length} tokens${speed}.`;
  }

  /** A message that got no text for an answer is no turn; it is there to be sent again. */
  #giveBack(message, replaced) {
    this.#conversation.takeLast();
    if (replaced) {
      this.#conversation.restore(replaced);
      this.#editing = true;
    }
    element("prompt").value ||= message;
  }

  #show() {
    element("silent").hidden = this.#conversation.size > 0;
    element("turn-actions").hidden = this.#conversation.size === 0;
  }

  /** The last message once more, with the next seed; what is being written meanwhile stays. */
  #retry(start) {
    const written = this.#editing ? "" : element("prompt").value;
    element("seed").value = String(Number(element("seed").value) + 1);
    element("prompt").value = this.#conversation.lastMessage;
    this.#editing = true;
    start();
    element("prompt").value ||= written;
  }

  #edit(say) {
    this.#editing = true;
    element("prompt").value = this.#conversation.lastMessage;
    element("prompt").focus();
    say("Send replaces the last message and its answer; Esc keeps them.");
  }

  #startAnew(say) {
    this.#editing = false;
    this.#conversation.clear();
    this.#show();
    element("prompt").focus();
    say("The conversation begins anew.");
  }
}
