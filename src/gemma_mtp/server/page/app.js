// The page: options in, one generation or a race of two out.

import { Failure, generate, servedModel } from "./client.js";
import { Lane, formatNumber } from "./lane.js";
import { compare } from "./record.js";
import { SAMPLES } from "./samples.js";

const LONGEST_DRAFT = 16;
/** Drafts below which a race says little of the speed. */
const FEW_DRAFTS = 20;
const ENDINGS = { length: "ended at the token limit", stop: "ended by itself" };
const element = (id) => document.getElementById(id);
const form = element("controls");
let running = null; // the AbortController of what runs

function choice(name) {
  return form.querySelector(`input[name="${name}"]:checked`)?.value;
}

function readOptions() {
  const draft = element("draft-tokens").value;
  return {
    prompt: element("prompt").value,
    chat: choice("mode") === "chat",
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
  if (isRace && options.draftTokens === 0) {
    showError("A race needs drafts: choose a draft length other than 0.");
    element("draft-tokens").focus();
    return;
  }
  prepare();
  const controller = new AbortController();
  setRunning(controller);
  try {
    await (isRace ? race(options, controller) : single(options, controller));
  } catch (error) {
    await explain(error);
  } finally {
    setRunning(null);
  }
}

function prepare() {
  showError("");
  say("");
  element("verdict").hidden = true;
  element("empty").hidden = true;
  element("lanes").replaceChildren();
  if (matchMedia("(max-width: 60rem)").matches) element("results").scrollIntoView(); // it is below the options there
}

function newLane(title, options) {
  return new Lane(element("lanes"), title, options.chat ? "" : options.prompt);
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
  const runs = [
    { title: "Without drafter", options: { ...options, draftTokens: 0 } },
    { title: "With drafter", options },
  ].map((run) => ({ ...run, lane: newLane(run.title, options) }));
  if (together) {
    say("Racing: both run together.");
    await Promise.all(runs.map((run) => follow(run.lane, run.options, controller)));
  } else {
    const waiting = [...runs];
    controller.signal.addEventListener("abort", () => waiting.forEach((run) => (run.lane.state = "not run")));
    runs[1].lane.state = "waiting";
    for (const [i, run] of runs.entries()) {
      say(`Racing: run ${i + 1} of 2, ${run.title.toLowerCase()}.`);
      waiting.shift();
      await follow(run.lane, run.options, controller);
    }
  }
  showVerdict(runs[0].lane.record, runs[1].lane.record, options, together);
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

function showVerdict(plain, drafted, options, together) {
  const { identical, token } = compare(plain, drafted);
  const answer = identical ? "yes" : "no";
  const [before, after] = [plain.tokensPerSecond, drafted.tokensPerSecond];
  const ratio = before && after ? `${(after / before).toFixed(2)}×` : "–";
  const notes = [identical ? sameness(drafted) : difference(token, options.verification)];
  if (before && after) notes.push(speeds(before, after, together));
  if (drafted.drafted < FEW_DRAFTS) notes.push(fewDrafts(drafted.drafted));
  element("identical").textContent = answer;
  element("identical").className = identical ? "good" : "bad";
  element("ratio").textContent = ratio;
  element("verdict-note").textContent = notes.join(" ");
  element("verdict").hidden = false;
  say(`Race finished. Identical: ${answer}. Speed with the drafter: ${ratio}`);
}

function sameness(record) {
  const bytes = new TextEncoder().encode(record.text).length;
  return `${record.tokenIds.length} tokens, ${bytes} bytes: all the same.`;
}

function difference(token, verification) {
  const why =
    verification === "exact"
      ? "Exact verification should not let that happen."
      : `${capital(verification)} verification keeps the distribution, not the tokens.`;
  return `The outputs part at token ${token}. ${why}`;
}

function speeds(before, after, together) {
  const order = together ? "together, sharing the processor" : "one after the other";
  const both = `${formatNumber(before)} tokens a second without, ${formatNumber(after)} with`;
  return `${both}, after the first token and by the server's clock; run ${order}.`;
}

function fewDrafts(count) {
  const drafts = count === 1 ? "draft was" : "drafts were";
  return `Only ${count} ${drafts} made: too few to say how fast drafting is. Ask for more tokens.`;
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
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
    const { chat, drafter } = model.gemma_mtp;
    element("model").textContent = model.id + (drafter ? "" : " (no drafter)");
    element("max-tokens").max = model.max_model_len;
    element("mode-field").hidden = !chat;
    for (const id of ["race", "draft-tokens"]) element(id).disabled = !drafter;
    showError("");
  } catch (error) {
    element("model").textContent = "unknown";
    await explain(error);
  }
}

function sampleText(sample) {
  return choice("mode") === "chat" ? sample.chat : sample.completion;
}

function setUpSamples() {
  const prompt = element("prompt");
  for (const sample of SAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = sample.name;
    button.addEventListener("click", () => (prompt.value = sampleText(sample)));
    element("samples").append(button);
  }
  prompt.value ||= sampleText(SAMPLES[0]);
  element("mode-field").addEventListener("change", () => {
    const shown = SAMPLES.find((sample) => [sample.chat, sample.completion].includes(prompt.value));
    if (shown) prompt.value = sampleText(shown);
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

function setUpKeys() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    start(false);
  });
  element("race").addEventListener("click", () => start(true));
  element("stop").addEventListener("click", () => running?.abort());
  element("key").addEventListener("change", showModel);
  element("letters").addEventListener("change", (event) => {
    document.body.classList.toggle("letters", event.target.checked);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      start(false);
    } else if (event.key === "Escape") {
      running?.abort();
    }
  });
}

setUpTheme();
setUpDraftLengths();
setUpSamples();
setUpKeys();
showModel();
