// One generation on the page: its figures, its tokens in colour, its acceptance, its rounds. Drawn once a frame.

import { Record } from "./record.js";

const NAMES = { draft: "accepted draft", first: "first token" }; // others are called as their kinds
/** Pixels from the end of the output within which it follows the text. */
const NEAR_END = 24;

export class Lane {
  record = new Record();
  #element;
  #rounds = []; // not drawn yet
  #frame = 0;
  #rows = 0;

  constructor(parent, title, prompt) {
    const template = document.getElementById("lane");
    this.#element = template.content.firstElementChild.cloneNode(true);
    this.#find("h2").textContent = title;
    this.#find(".output").setAttribute("aria-label", `Generated text: ${title}`);
    this.#find(".output").append(make("span", "prompt", prompt));
    this.#find("details").addEventListener("toggle", () => this.#drawRows());
    parent.append(this.#element);
  }

  set state(text) {
    this.#find(".lane-state").textContent = text;
  }

  begin() {
    this.record = new Record();
    this.state = "running";
  }

  add(chunk) {
    const round = this.record.add(chunk);
    if (round) this.#rounds.push(round);
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** Draw what is left at once: frames do not come in a hidden tab. */
  end(state) {
    cancelAnimationFrame(this.#frame);
    this.#draw();
    this.state = state;
  }

  #find(selector) {
    return this.#element.querySelector(selector);
  }

  #draw() {
    this.#frame = 0;
    this.#drawTokens();
    this.#drawFigures();
    this.#drawAcceptance();
    this.#drawRows();
  }

  #drawTokens() {
    const output = this.#find(".output");
    const follows = output.scrollHeight - output.scrollTop - output.clientHeight < NEAR_END;
    const first = this.record.rounds.length - this.#rounds.length;
    output.append(...this.#rounds.splice(0).map((round, i) => roundSpan(round, first + i)));
    if (follows) output.scrollTop = output.scrollHeight;
  }

  #drawFigures() {
    const { tokensPerSecond, tokensARound, firstTokenMilliseconds, tokenIds } = this.record;
    const figures = {
      speed: tokensPerSecond === null ? "–" : formatNumber(tokensPerSecond),
      round: tokensARound === null ? "–" : tokensARound.toFixed(2),
      first: firstTokenMilliseconds === null ? "–" : formatMilliseconds(firstTokenMilliseconds),
      tokens: String(tokenIds.length),
    };
    for (const [name, value] of Object.entries(figures)) this.#find(`[data-figure="${name}"]`).textContent = value;
  }

  #drawAcceptance() {
    const bars = this.#find(".bars");
    const { acceptance } = this.record;
    this.#find(".none").hidden = acceptance.length > 0;
    this.#find(".explain").hidden = acceptance.length === 0;
    while (bars.children.length < acceptance.length) bars.append(bar(bars.children.length + 1));
    acceptance.forEach(({ reached, accepted }, i) => {
      const share = Math.round((100 * accepted) / reached);
      const row = bars.children[i];
      row.querySelector(".fill").style.setProperty("--share", String(share));
      row.querySelector(".share").textContent = `${share}%`;
      row.querySelector(".count").textContent = `${accepted} of ${reached}`;
    });
  }

  #drawRows() {
    if (!this.#find("details").open) return;
    const rounds = this.record.rounds.slice(this.#rows);
    this.#find("tbody").append(...rounds.map((round, i) => roundRow(round, this.#rows + i)));
    this.#rows += rounds.length;
  }
}

export function formatNumber(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toFixed(1);
}

function formatMilliseconds(value) {
  return value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${Math.round(value)} ms`;
}

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function roundSpan(round, number) {
  const span = make("span", "round");
  span.append(...round.tokens.map((token) => make("span", `token ${token.kind} part-${token.part}`, token.text)));
  const kinds = round.tokens.map((token) => NAMES[token.kind] ?? token.kind).join(", ");
  const drafts = number ? `${round.drafted} drafted, ${round.accepted} accepted` : "the prompt";
  span.title = `Round ${number}: ${drafts}; ${formatMilliseconds(round.seconds * 1000)}\n${kinds}`;
  return span;
}

function roundRow(round, number) {
  const row = document.createElement("tr");
  const cells = [number || "prompt", round.drafted, round.accepted, (round.seconds * 1000).toFixed(2)];
  row.append(...cells.map((value) => make("td", "", String(value))));
  const tokens = make("td", "");
  const shown = round.tokens.map(({ kind, text }) => make("span", `token ${kind}`, text.replaceAll("\n", "⏎")));
  tokens.append(...shown);
  row.append(tokens);
  return row;
}

function bar(position) {
  const row = make("li", "");
  const track = make("span", "track");
  track.append(make("span", "fill"));
  row.append(make("span", "place", String(position)), track, make("span", "share"), make("span", "count"));
  return row;
}
