// The page: options in, one generation or a race of two out.

import { Failure, generate, servedModel } from "./client.js";
import { Lane, formatNumber } from "./lane.js";
import { apply, fragment } from "./link.js";
import { headline, notes, outcome } from "./race.js";
import { Curve, Replay, SLOWER, timeline } from "./replay.js";
import { SAMPLES } from "./samples.js";
import { Talk } from "./talk.js";

const LONGEST_DRAFT = 16;
/** Seconds of a replay that begins by itself. */
const SHORT_REPLAY = 15;
const REPEATS = 3;
const ENDINGS = { length: "ended at the token limit", stop: "ended by itself" };
const element = (id) => document.getElementById(id);
const form = element("controls");
const curve = new Curve(element("curve"));
let running = null; // the AbortController of what runs
let replay = null; // of the race that is shown
const talk = new Talk({ start: () => start(false), say, busy: () => running !== null });

function choice(name) {
  return form.querySelector(`input[name="${name}"]:checked`)?.value;
}

function talking() {
  return choice("mode") === "conversation";
}

function readOptions() {
  const draft = element("draft-tokens").value;
  return {
    prompt: element("prompt").value,
    chat: choice("mode") === "chat",
    conversation: talking(),
    system: element("system").value.trim(),
    thinking: talking() && element("thinking").checked && !element("thinking").disabled,
    maxTokens: element("max-tokens").valueAsNumber,
    temperature: element("temperature").valueAsNumber,
    seed: element("seed").valueAsNumber,
    draftTokens: draft === "auto" ? draft : Number(draft),
    verification: element("verification").value,
  };
}

function say(text) {
  element("status").textContent = text;
}

function showError(text) {
  element("error").textContent = text;
  element("error").hidden = !text;
}

function setRunning(controller) {
  running = controller;
  for (const id of ["run", "race"]) element(id).setAttribute("aria-disabled", String(controller !== null));
  element("stop").setAttribute("aria-disabled", String(controller === null));
}

async function start(isRace) {
  if (running || !form.reportValidity()) return;
  const options = readOptions();
  clear(options.conversation);
  if (isRace && options.draftTokens === 0) {
    element("empty").hidden = false;
    showError("A race needs drafts: choose a draft length other than 0.");
    element("draft-tokens").focus();
    return;
  }
  if (!options.conversation && matchMedia("(max-width: 60rem)").matches) element("results").scrollIntoView(); // it is below the options there
  history.replaceState(null, "", fragment(form));
  const controller = new AbortController();
  setRunning(controller);
  try {
    await kindOf(isRace, options)(options, controller);
  } catch (error) {
    await explain(error);
  } finally {
    setRunning(null);
  }
}

function kindOf(isRace, options) {
  if (options.conversation) return answer;
  return isRace ? race : single;
}

async function answer(options, controller) {
  say("Running.");
  const ending = (record) => ENDINGS[record.finishReason] ?? "ended";
  say(await talk.send(options, ending, element("key").value, controller));
}

/** Nothing of an earlier run is left, neither beside a new one nor beside an error; a conversation leaves runs alone. */
function clear(conversation) {
  replay?.end();
  if (conversation) {
    showError("");
    say("");
    return;
  }
  replay = null;
  showError("");
  say("");
  element("verdict").hidden = true;
  element("empty").hidden = true;
  element("lanes").replaceChildren();
}

function newLane(title, options, kind = "") {
  return new Lane(element("lanes"), title, options.chat ? "" : options.prompt, kind);
}

async function single(options, controller) {
  const lane = newLane("Output", options);
  say("Running.");
  await follow(lane, options, controller);
  const { tokenIds, tokensPerSecond } = lane.record;
  const speed = tokensPerSecond === null ? "" : ` at ${formatNumber(tokensPerSecond)} tokens a second`;
  say(`Done: ${tokenIds.length} tokens${speed}.`);
}

async function race(options, controller) {
  const together = choice("order") === "together";
  const repeats = element("thrice").checked ? REPEATS : 1;
  const runs = [
    { title: "Without drafter", kind: "plain", options: { ...options, draftTokens: 0 } },
    { title: "With drafter", kind: "drafted", options },
  ].map((run) => ({ ...run, lane: newLane(run.title, options, run.kind) }));
  const repetitions = [];
  for (let i = 0; i < repeats; i++) {
    const which = repeats > 1 ? `, race ${i + 1} of ${repeats}` : "";
    await (together ? raceTogether : raceInTurn)(runs, which, controller);
    repetitions.push(runs.map((run) => run.lane.record));
  }
  const result = outcome(repetitions);
  runs[0].lane.show(result.plain);
  runs[1].lane.show(result.drafted);
  showVerdict(result, options, together);
  prepareReplay(runs);
}

async function raceTogether(runs, which, controller) {
  say(`Racing: both run together${which}.`);
  await Promise.all(runs.map((run) => follow(run.lane, run.options, controller)));
}

async function raceInTurn(runs, which, controller) {
  const waiting = [...runs];
  controller.signal.addEventListener("abort", () => waiting.forEach((run) => (run.lane.state = "not run")));
  runs[1].lane.wait();
  for (const [i, run] of runs.entries()) {
    say(`Racing: run ${i + 1} of 2, ${run.title.toLowerCase()}${which}.`);
    waiting.shift();
    await follow(run.lane, run.options, controller);
  }
}

/** Play one generation on its lane. When it fails, whatever runs beside it ends, too. */
async function follow(lane, options, controller) {
  lane.begin();
  try {
    for await (const chunk of generate(options, element("key").value, controller.signal)) lane.add(chunk);
    lane.end(ENDINGS[lane.record.finishReason] ?? "ended");
  } catch (error) {
    lane.end(error.name === "AbortError" ? "stopped" : "failed");
    controller.abort();
    throw error;
  }
}

function showVerdict(result, options, together) {
  const { speed, same } = headline(result);
  element("speed").textContent = speed;
  element("identical").textContent = same;
  element("identical").className = result.identical ? "good" : "bad";
  element("verdict-note").textContent = notes(result, options.verification, together, formatNumber);
  element("verdict").hidden = false;
  curve.runs = ["plain", "drafted"].map((kind) => ({
    name: kind === "plain" ? "without drafter" : "with drafter",
    kind,
    points: timeline(result[kind]),
  }));
  say(`Race finished: ${speed} ${same}.`);
}

/** What went by too fast to be seen is shown again by itself, if the visitor does not mind motion. */
function prepareReplay(runs) {
  const button = element("replay");
  replay = new Replay(
    runs.map((run) => run.lane),
    curve,
    () => button.setAttribute("aria-disabled", "false"),
  );
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (!still && replay.seconds * SLOWER <= SHORT_REPLAY) playAgain();
}

function playAgain() {
  if (!replay || element("replay").getAttribute("aria-disabled") === "true") return;
  element("replay").setAttribute("aria-disabled", "true");
  replay.play();
}

/** Say what ended a run early. */
async function explain(error) {
  if (error.name === "AbortError") {
    say("Stopped.");
    return;
  }
  say("");
  if (!(error instanceof Failure)) {
    showError("The page failed on the server's answer; the browser's console says why.");
    throw error;
  }
  showError(error.message);
  if (error.status === 401) askForKey();
}

function askForKey() {
  element("key-field").hidden = false;
  element("key").focus();
}

async function showModel() {
  try {
    const model = await servedModel(element("key").value);
    const { chat, drafter, thinking } = model.gemma_mtp;
    element("model").textContent = model.id + (drafter ? "" : " (no drafter)");
    element("max-tokens").max = model.max_model_len;
    element("no-chat").hidden = chat;
    for (const input of form.querySelectorAll('[name="mode"]:not([value="completion"])')) input.disabled = !chat;
    if (!chat) form.querySelector('[value="completion"]').checked = true;
    element("thinking").disabled = !thinking;
    showMode();
    for (const id of ["race", "draft-tokens"]) element(id).disabled = !drafter;
    showError("");
  } catch (error) {
    element("model").textContent = "unknown";
    await explain(error);
  }
}

function sampleText(sample) {
  return choice("mode") === "completion" ? sample.completion : sample.chat;
}

/** Show what belongs to the chosen mode. */
function showMode() {
  document.body.classList.toggle("talking", talking());
  for (const part of document.querySelectorAll(".of-talk")) part.hidden = !talking();
  element("prompt-label").textContent = talking() ? "Message" : "Prompt";
  element("run").textContent = talking() ? "Send" : "Run";
  element("run").classList.toggle("primary", talking());
}

/** A sample's prompt, and the seed and temperature that it is good with. */
function choose(sample) {
  element("prompt").value = sampleText(sample);
  element("seed").value = sample.seed;
  element("temperature").value = sample.temperature;
  renewLink();
}

function renewLink() {
  for (const link of document.querySelectorAll(".link")) link.href = fragment(form);
}

function setUpLink() {
  form.addEventListener("input", renewLink);
  window.addEventListener("hashchange", () => {
    apply(form, location.hash);
    showMode();
    renewLink();
  });
  renewLink();
}

function setUpSamples() {
  const prompt = element("prompt");
  for (const sample of SAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sample.name;
    button.addEventListener("click", () => choose(sample));
    element("samples").append(button);
  }
  if (!apply(form, location.hash)) choose(SAMPLES[0]);
  element("mode-field").addEventListener("change", () => {
    const shown = SAMPLES.find((sample) => [sample.chat, sample.completion].includes(prompt.value));
    if (shown) prompt.value = sampleText(shown);
    stop();
    showMode();
  });
}

function setUpDraftLengths() {
  for (let length = 0; length <= LONGEST_DRAFT; length++) {
    element("draft-tokens").append(new Option(length ? String(length) : "0 (off)", String(length)));
  }
}

function setUpTheme() {
  const select = element("theme");
  const apply = () => (document.documentElement.dataset.theme = select.value);
  try {
    select.value = localStorage.getItem("theme") ?? "";
  } catch {} // storage may be forbidden: the choice then lasts as long as the page
  apply();
  select.addEventListener("change", () => {
    apply();
    try {
      localStorage.setItem("theme", select.value);
    } catch {}
  });
}

/** End what runs, or the replay. */
function stop() {
  if (running) running.abort();
  else if (talk.giveUpEditing()) say("");
  else replay?.end();
}

function setUpKeys() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start(false);
  });
  element("race").addEventListener("click", () => start(true));
  element("stop").addEventListener("click", stop);
  element("replay").addEventListener("click", playAgain);
  element("key").addEventListener("change", showModel);
  element("letters").addEventListener("change", (event) => {
    document.body.classList.toggle("letters", event.target.checked);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      start(false);
    } else if (event.key === "Escape") {
      stop();
    }
  });
}

setUpTheme();
setUpDraftLengths();
setUpSamples();
setUpLink();
setUpKeys();
showMode();
showModel();
