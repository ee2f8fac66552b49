// One generation on the page: its figures, its tokens in colour, its acceptance, its rounds. Drawn once a frame.

import { Record } from "./record.js";
import { timeline } from "./replay.js";

const NAMES = { draft: "accepted draft", first: "first token" }; // others are called as their kinds
/** Pixels from the end of the output within which it follows the text. */
const NEAR_END = 24;
/** Positions of drafts that are shown unasked. */
const POSITIONS = 6;
/** The palest that a bar of few drafts gets. */
const PALEST = 0.3;

export class Lane {
  record = new Record();
  #element;
  #rounds = []; // not drawn yet
  #frame = 0;
  #rows = 0;

  /** `kind`, a class, says which side of a race it is. */
  constructor(parent, title, prompt, kind = "") {
    const template = document.getElementById("lane");
    this.#element = template.content.firstElementChild.cloneNode(true);
    if (kind) this.#element.classList.add(kind);
    this.#find("h2").textContent = title;
    this.#find(".output").setAttribute("aria-label", `Generated text: ${title}`);
    this.#find(".output").append(make("span", "prompt", prompt));
    this.#find("details.rounds").addEventListener("toggle", () => this.#drawRows());
    parent.append(this.#element);
  }

  set state(text) {
    this.#find(".lane-state").textContent = text;
  }

  begin() {
    this.#clear(new Record());
    this.state = "running";
  }

  wait() {
    this.#clear(new Record());
    this.#draw();
    this.state = "waiting";
  }

  /** Show another generation, which has ended. */
  show(record) {
    this.#clear(record);
    this.#rounds = [...record.rounds];
    this.#draw();
  }

  /** Hide what came later than so many seconds after the first token; it keeps its place. */
  showUntil(seconds) {
    const spans = this.#find(".output").querySelectorAll(".round");
    timeline(this.record).forEach((point, i) => spans[i].classList.toggle("later", point.seconds > seconds));
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

  #clear(record) {
    cancelAnimationFrame(this.#frame);
    this.record = record;
    this.#rounds = [];
    this.#rows = 0;
    for (const shown of this.#element.querySelectorAll(".round, .bars > li, tbody > tr")) shown.remove();
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
    this.#find(".cached").hidden = this.record.cachedTokens === 0;
  }

  #drawAcceptance() {
    const { acceptance } = this.record;
    this.#find(".none").hidden = acceptance.length > 0;
    this.#find(".explain").hidden = acceptance.length === 0;
    const more = this.#find("details.more");
    more.hidden = acceptance.length <= POSITIONS;
    more.querySelector("summary").textContent = `Positions ${POSITIONS + 1} to ${acceptance.length}`;
    const lists = this.#element.querySelectorAll(".bars");
    acceptance.forEach(({ reached, accepted }, i) => {
      const share = Math.round((100 * accepted) / reached);
      const [list, place] = i < POSITIONS ? [lists[0], i] : [lists[1], i - POSITIONS];
      const row = list.children[place] ?? list.appendChild(bar(i + 1));
      row.querySelector(".fill").style.setProperty("--share", String(share));
      row.querySelector(".fill").style.setProperty("--weight", Math.max(PALEST, reached / acceptance[0].reached).toFixed(2));
      row.querySelector(".share").textContent = `${share}%`;
      row.querySelector(".count").textContent = `${accepted} of ${reached}`;
    });
  }

  #drawRows() {
    if (!this.#find("details.rounds").open) return;
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

export function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

export function tokenSpan({ kind, part, text }) {
  return make("span", `token ${kind} part-${part}`, text);
}

function roundSpan(round, number) {
  const span = make("span", "round");
  span.append(...round.tokens.map(tokenSpan));
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
