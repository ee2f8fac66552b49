// A finished race played again, slower, by the times that the server took: in the lanes, and as a curve above them.

const NAMESPACE = "http://www.w3.org/2000/svg";
export const SLOWER = 10;
/** Room in pixels around the curves: for numbers at the left, for names at the right, for seconds below. */
const MARGIN = { left: 40, right: 116, top: 12, bottom: 24 };
const HEIGHT = 190;

/** [{seconds, tokens}] after each round; the first round, which is the prompt's, is at 0. */
export function timeline(record) {
  let [seconds, tokens] = [0, 0];
  return record.rounds.map((round, i) => {
    seconds += i ? round.seconds : 0;
    tokens += round.tokens.length;
    return { seconds, tokens };
  });
}

/** Tokens over time of some runs, as steps in an SVG element, drawn as far as a moment. */
export class Curve {
  #svg;
  #runs = [];
  #until = Infinity;

  constructor(svg) {
    this.#svg = svg;
    new ResizeObserver(() => this.draw(this.#until)).observe(svg);
  }

  /** `runs`: [{name, kind, points}]; `kind` is a class, `points` a timeline. */
  set runs(runs) {
    this.#runs = runs;
    const said = runs.map(({ name, points }) => `${points.at(-1).tokens} tokens in ${inSeconds(points.at(-1).seconds)} ${name}`);
    this.#svg.setAttribute("aria-label", `Tokens over time: ${said.join(", ")}.`);
    this.draw();
  }

  draw(until = Infinity) {
    this.#until = until;
    const width = this.#svg.clientWidth;
    if (!width || !this.#runs.length) return;
    this.#svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const ends = this.#runs.map(({ points }) => points.at(-1));
    const most = { seconds: Math.max(...ends.map((end) => end.seconds)), tokens: Math.max(...ends.map((end) => end.tokens)) };
    const x = (seconds) => MARGIN.left + ((width - MARGIN.left - MARGIN.right) * seconds) / (most.seconds || 1);
    const y = (tokens) => HEIGHT - MARGIN.bottom - ((HEIGHT - MARGIN.top - MARGIN.bottom) * tokens) / most.tokens;
    this.#svg.replaceChildren(
      ...axes(x, y, most),
      ...this.#runs.flatMap((run) => curve(run, x, y, until)),
    );
  }
}

/** Plays lanes and the curve of their records; `ended` is called when it is over or was ended. */
export class Replay {
  #frame = 0;

  constructor(lanes, curve, ended) {
    this.lanes = lanes;
    this.curve = curve;
    this.ended = ended;
  }

  get seconds() {
    return Math.max(...this.lanes.map((lane) => timeline(lane.record).at(-1)?.seconds ?? 0));
  }

  play() {
    const [started, seconds] = [performance.now(), this.seconds];
    const step = () => {
      const now = (performance.now() - started) / 1000 / SLOWER;
      if (now >= seconds) {
        this.end();
        return;
      }
      this.#show(now);
      this.#frame = requestAnimationFrame(step);
    };
    step();
  }

  /** Show the end at once. */
  end() {
    cancelAnimationFrame(this.#frame);
    this.#show(Infinity);
    this.ended();
  }

  #show(seconds) {
    for (const lane of this.lanes) lane.showUntil(seconds);
    this.curve.draw(seconds);
  }
}

export function inSeconds(value) {
  return value >= 1 ? `${value.toFixed(2)} s` : `${Math.round(1000 * value)} ms`;
}

function axes(x, y, most) {
  const ground = shape("line", "axis", { x1: x(0), x2: x(most.seconds), y1: y(0), y2: y(0) });
  const marks = [0.5, 1].flatMap((share) => {
    const [tokens, seconds] = [Math.round(share * most.tokens), share * most.seconds];
    return [
      shape("line", "grid", { x1: x(0), x2: x(most.seconds), y1: y(tokens), y2: y(tokens) }),
      shape("text", "", { x: x(0) - 8, y: y(tokens) + 4, "text-anchor": "end" }, String(tokens)),
      shape("text", "", { x: x(seconds), y: y(0) + 17, "text-anchor": "middle" }, inSeconds(seconds)),
    ];
  });
  return [...marks, ground, shape("text", "", { x: x(0), y: y(0) + 17, "text-anchor": "start" }, "tokens over time")];
}

/** Steps up to a moment, and the name of the run at their end. */
function curve({ name, kind, points }, x, y, until) {
  const shown = points.filter((point) => point.seconds <= until);
  const end = { seconds: Math.min(until, points.at(-1).seconds), tokens: shown.at(-1).tokens };
  const steps = [...shown, end].map((p, i) => {
    const before = i ? shown[i - 1].tokens : 0;
    return `${x(p.seconds)},${y(before)} ${x(p.seconds)},${y(p.tokens)}`;
  });
  const place = { x: x(end.seconds) + 8, y: y(end.tokens) + 4, "text-anchor": "start" };
  return [shape("polyline", `run ${kind}`, { points: steps.join(" ") }), shape("text", kind, place, name)];
}

function shape(tag, className, attributes, text = "") {
  const made = document.createElementNS(NAMESPACE, tag);
  made.setAttribute("class", className);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.textContent = text;
  return made;
}
