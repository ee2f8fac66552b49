// A race: the same prompt without and with the drafter, some times over, and what came of it.

import { compare } from "./record.js";

/** The least rounds with drafts that say something about speed. */
const ENOUGH_ROUNDS = 10;
/** Repetitions whose speed-ups differ by more than this factor were disturbed by other work on the machine. */
const DISTURBED = 1.3;

/**
 * What repeated races say: the repetition with the median speed-up (`plain`, `drafted`), its `ratio` (null where no time
 * was taken), the `least` and the `greatest` ratio, whether those lie so far apart that the races were `disturbed`, and
 * the first repetition whose outputs part, if any: `token`, from 1.
 */
export function outcome(repetitions) {
  const pairs = repetitions.map(([plain, drafted]) => ({ plain, drafted, ratio: ratio(plain, drafted) }));
  const parted = pairs.map(({ plain, drafted }) => compare(plain, drafted)).find(({ identical }) => !identical);
  const middle = pairs.toSorted((a, b) => (a.ratio ?? 0) - (b.ratio ?? 0))[Math.floor(pairs.length / 2)];
  const [least, greatest] = [Math.min, Math.max].map((of) => of(...pairs.map((pair) => pair.ratio)));
  const spread = { least, greatest, disturbed: middle.ratio !== null && greatest > DISTURBED * least };
  return { ...middle, ...spread, identical: !parted, token: parted?.token ?? null, repeats: pairs.length };
}

function ratio(plain, drafted) {
  return plain.tokensPerSecond && drafted.tokensPerSecond ? drafted.tokensPerSecond / plain.tokensPerSecond : null;
}

/** In words, large: how much faster, and whether the outputs are the same. */
export function headline({ ratio: found, identical, disturbed }) {
  const same = identical ? "byte for byte the same" : "but not the same";
  if (found === null) return { speed: "", same: identical ? "Byte for byte the same" : "Not the same" };
  const times = (value) => (disturbed ? `About ${value.toFixed(1)}×` : `${value.toFixed(2)}×`);
  return { speed: found >= 1 ? `${times(found)} faster,` : `${times(1 / found)} slower,`, same };
}

/** Sentences below it. */
export function notes(result, verification, together, formatNumber) {
  const { plain, drafted, ratio: found, identical, token, repeats } = result;
  const said = [identical ? sameness(drafted) : difference(token, verification)];
  if (found !== null) {
    const speeds = [plain, drafted].map((record) => formatNumber(record.tokensPerSecond));
    const order = together ? "together, sharing the processor" : "one after the other";
    const spread = `${result.least.toFixed(2)}× to ${result.greatest.toFixed(2)}×`;
    const which = repeats > 1 ? `The median of ${repeats} races (${spread})` : "One race";
    said.push(`${speeds[0]} tokens a second without, ${speeds[1]} with, after the first token and by the server's clock.`);
    said.push(`${which}, run ${order}.`);
  }
  if (result.disturbed) {
    said.push("The races differ by more than a third: other work shares the machine. Race again when it is idle.");
  }
  const rounds = drafted.rounds.filter((round) => round.drafted > 0).length;
  if (rounds < ENOUGH_ROUNDS) {
    said.push(`Only ${rounds} ${rounds === 1 ? "round" : "rounds"} had drafts: too few to say how fast.`);
  }
  return said.join(" ");
}

function sameness(record) {
  const bytes = new TextEncoder().encode(record.text).length;
  return `${record.tokenIds.length} tokens, ${bytes} bytes: all the same.`;
}

function difference(token, verification) {
  const name = verification.charAt(0).toUpperCase() + verification.slice(1);
  const why =
    verification === "exact"
      ? "Exact verification should not let that happen."
      : `${name} verification keeps the distribution, not the tokens.`;
  return `The outputs part at token ${token}. ${why}`;
}
