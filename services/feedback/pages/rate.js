// The rating page. It shows the first task of `queue`; the second waits with its images loaded.
import { Outbox, Refused, call, newKey } from "./outbox.js";
import { HINTS, KEYS, QUESTIONS, SIDES, VERDICTS, keyHints, make, restWords, stateWords } from "./words.js";

const $ = (id) => document.getElementById(id);
const { campaign, rater, kind } = document.body.dataset;
const comparison = kind === "comparison";
const HISTORY = `accord.history.${campaign}.${rater}`;
const KEPT = 20;

let queue = []; // {task, pictures, choice}; choice: verdicts by image, or [preference]
let active = 0; // the image that keys act on
let progress = null;
let progressAsked = 0;
let filling = null;
let finished = false; // the server had nothing more to give
let problem = ""; // why no task can be shown

const outbox = new Outbox(`accord.outbox.${campaign}.${rater}`, {
  changed: showState, acknowledged, drained: fill,
});

// --- tasks ---------------------------------------------------------------------------------------------------

function hold(task, choice = []) {
  const pictures = [...task.images, ...task.right_images].map((digest) => {
    const image = new Image();
    image.alt = "";
    image.draggable = false;
    image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 200));
    image.src = `/images/${digest}`;
    return image;
  });
  return { task, pictures, choice: [...choice], until: Date.now() + task.expires_in_s * 1000 };
}

function fill() {
  filling ??= fetchTasks().finally(() => {
    filling = null;
    showState();
  });
  return filling;
}

async function fetchTasks() {
  // Answers that wait go first: the server would hand out their tasks again.
  while (queue.length < 2 && !outbox.waiting.length && !outbox.ended) {
    try {
      const held = queue.map((entry) => entry.task.task_id);
      const reply = await call("/api/next", { held });
      outbox.reachable = true;
      learn(reply);
      problem = "";
      finished = !reply.task;
      if (finished) return;
      if (queue.some((entry) => entry.task.task_id === reply.task.task_id)) return;
      queue.push(hold(reply.task));
      if (queue.length === 1) showTask();
    } catch (error) {
      if (!(error instanceof Refused)) {
        outbox.later();
        return;
      }
      if (error.status === 401) outbox.ended = error.message;
      else problem = error.message;
      return;
    }
  }
}

// What a question asked earlier says is older, and is not shown.
function learn({ progress: told, asked }) {
  if (!told || asked < progressAsked) return;
  progress = told;
  progressAsked = asked;
}

async function acknowledged(entry, reply) {
  learn(reply);
  if (entry.op !== "undo") return;
  if (!reply.task) {
    say("There is nothing to take back.");
    return;
  }
  const past = history().find((item) => item.task.task_id === reply.task.task_id);
  putBack(reply.task, past?.choice);
}

function putBack(task, choice) {
  queue = [hold(task, choice), ...queue.filter((entry) => entry.task.task_id !== task.task_id)];
  finished = false;
  showTask();
  say("Taken back. Judge it again.");
}

function history() {
  try {
    return JSON.parse(localStorage.getItem(HISTORY)) ?? [];
  } catch {
    return [];
  }
}

function remember(task, choice) {
  try {
    localStorage.setItem(HISTORY, JSON.stringify([{ task, choice }, ...history()].slice(0, KEPT)));
  } catch {
    // Then an undone task comes back without its old marks.
  }
}

// --- what the rater does -------------------------------------------------------------------------------------

const complete = ({ task, choice }) =>
  comparison ? Boolean(choice[0]) : task.images.every((_, i) => choice[i]);

function choose(index, value) {
  const current = queue[0];
  if (!current) return;
  current.choice[index] = value;
  if (!comparison) {
    // To the next that is not judged; when all are, as after an undo, to the next one.
    const count = current.task.images.length;
    const open = [...Array(count).keys()].filter((i) => !current.choice[i]);
    active = open.find((i) => i > index) ?? open[0] ?? Math.min(index + 1, count - 1);
  }
  showChoice();
  if (complete(current)) say("Judged. Press Enter to save.");
}

function save() {
  const current = queue[0];
  if (!current || !complete(current)) return;
  const { task, choice } = current;
  const id = newKey();
  const answer = comparison ? { preference: choice[0] } : { verdicts: choice };
  remember(task, choice);
  queue = queue.filter((entry, i) => i > 0 && entry.until > Date.now());
  outbox.push({
    id, op: "answer", task, choice,
    path: `/api/tasks/${task.task_id}/answer`,
    body: { ...answer, idempotency_key: id },
  });
  showTask();
}

function undo() {
  if ($("undo").disabled) return;
  const last = outbox.waiting.at(-1);
  if (last?.op === "answer" && !last.tried) {
    outbox.remove(last.id); // it never left
    putBack(last.task, last.choice);
    return;
  }
  if (!outbox.reachable) {
    say("You are offline. Undo works again when the connection is back.");
    return;
  }
  const id = newKey();
  outbox.push({ id, op: "undo", path: "/api/undo", body: { idempotency_key: id } });
}

// --- what the page shows -------------------------------------------------------------------------------------

function showTask() {
  const current = queue[0];
  if (current) {
    active = 0;
    $("question").textContent = QUESTIONS[current.task.question];
    $("prompt").textContent = current.task.prompt;
    $("cards").className = comparison ? "cards sets" : "cards images";
    $("cards").replaceChildren(...(comparison ? setCards(current) : imageCards(current)));
    $("work").dataset.task = current.task.task_id;
    showChoice();
  }
  showState();
  if (!current) $("rest-title").focus();
  if (!document.querySelector("dialog[open]")) scrollTo(0, 0);
}

function picture(current, index, name) {
  const image = current.pictures[index];
  const button = make(
    "button", { type: "button", class: "picture", "aria-label": `Zoom into ${name}`, onclick: () => zoom(index) },
    image, make("span", { class: "lost" }, "This image could not be loaded. Press to try again."),
  );
  image.addEventListener("error", () => button.classList.add("broken"));
  image.addEventListener("load", () => button.classList.remove("broken"));
  if (image.complete && !image.naturalWidth) button.classList.add("broken");
  return button;
}

function verdictButtons(index) {
  return VERDICTS.map(({ value, label, sign, key }) =>
    make(
      "button",
      { type: "button", class: "verdict", "data-value": value, "data-index": index, onclick: () => choose(index, value) },
      make("span", { "aria-hidden": "true" }, sign), label, make("kbd", { "aria-hidden": "true" }, key.toUpperCase()),
    ));
}

function imageCards(current) {
  return current.task.images.map((_, index) =>
    make(
      "article",
      { class: "card", role: "group", tabindex: "0", "data-index": index, onfocusin: () => activate(index) },
      picture(current, index, `image ${index + 1}`),
      make("div", { class: "verdicts" }, ...verdictButtons(index)),
    ));
}

function setCards(current) {
  const count = current.task.images.length;
  const cards = ["left", "right"].map((side, i) =>
    make(
      "article", { class: "card set", role: "group", "aria-label": `Set ${"AB"[i]}`, "data-side": side },
      make("h2", {}, make("span", { class: "sr" }, "Set "), "AB"[i]),
      make(
        "div", { class: "grid" },
        ...(i ? current.task.right_images : current.task.images).map((_, j) =>
          picture(current, i * count + j, imageName(current, i * count + j))),
      ),
    ));
  const buttons = SIDES.map(({ value, label, key }) =>
    make(
      "button",
      { type: "button", class: `verdict ${value === "tie" ? "" : "side"}`, "data-value": value, "data-index": 0, onclick: () => choose(0, value) },
      label, make("kbd", { "aria-hidden": "true" }, key.toUpperCase()),
    ));
  return [...cards, make("div", { class: "verdicts choice", role: "group", "aria-label": "Your choice" }, ...buttons)];
}

function imageName(current, index) {
  const count = current.task.images.length;
  if (!comparison) return `image ${index + 1} of ${count}`;
  return `image ${(index % count) + 1} of set ${index < count ? "A" : "B"}`;
}

function activate(index) {
  active = index;
  for (const card of document.querySelectorAll(".images .card")) {
    card.classList.toggle("active", Number(card.dataset.index) === index);
  }
}

function showChoice() {
  const current = queue[0];
  for (const button of document.querySelectorAll(".verdict")) {
    const pressed = current.choice[Number(button.dataset.index)] === button.dataset.value;
    button.setAttribute("aria-pressed", String(pressed));
  }
  for (const card of document.querySelectorAll(".card[data-index]")) {
    const verdict = current.choice[Number(card.dataset.index)] ?? "";
    card.dataset.verdict = verdict;
    card.setAttribute("aria-label", `Image ${Number(card.dataset.index) + 1}, ${verdict || "not judged"}`);
  }
  for (const card of document.querySelectorAll(".card[data-side]")) {
    card.dataset.picked = String(current.choice[0] === card.dataset.side);
  }
  $("save").disabled = !complete(current);
  if (!comparison) {
    activate(active);
    if (!document.querySelector("dialog[open]")) {
      document.querySelector(`.card[data-index="${active}"]`)?.focus({ preventScroll: true });
    }
  }
}

function showState() {
  const situation = {
    ended: outbox.ended, problem, reachable: outbox.reachable, waiting: outbox.waiting.length,
    refused: outbox.refused.length, mine: progress?.mine ?? 0,
    busy: filling || outbox.waiting.length > 0 || !finished,
  };
  const [state, text] = stateWords(situation);
  $("status").dataset.state = state;
  $("status").dataset.waiting = situation.waiting;
  if ($("status").textContent !== text) $("status").textContent = text;
  $("refused").hidden = !situation.refused;
  $("refused").replaceChildren(...outbox.refused.map(refusal));
  const undoing = outbox.waiting.some((entry) => entry.op === "undo");
  $("undo").disabled = Boolean(outbox.ended) || undoing || !(situation.mine || situation.waiting);
  if (progress) {
    $("progress").max = Math.max(1, progress.wanted);
    $("progress").value = progress.answered;
    $("count").textContent = `${progress.mine} saved by you`;
  }
  document.body.dataset.held = queue.length;
  const rest = !queue.length || Boolean(outbox.ended);
  $("work").hidden = rest;
  $("rest").hidden = !rest;
  if (rest) showRest(restWords(situation));
}

function showRest([state, mark, title, text]) {
  $("rest").dataset.state = state;
  $("rest-mark").dataset.state = state;
  $("rest-mark").textContent = mark;
  if ($("rest-title").textContent !== title) say(title);
  $("rest-title").textContent = title;
  $("rest-text").textContent = text;
  $("rest-again").hidden = state === "ended" || state === "loading";
}

function refusal(entry) {
  const what = entry.op === "undo" ? "An undo" : `Your answer to “${entry.task.prompt}”`;
  return make(
    "div", { class: "refusal", role: "alert" },
    make("p", {}, `${what} was not saved: ${entry.problem}`),
    make("button", { class: "button", type: "button", onclick: () => outbox.remove(entry.id) }, "I see"),
  );
}

function say(text) { $("news").textContent = text; }

// --- zoom, guidelines, keys ----------------------------------------------------------------------------------

let zoomed = 0;

function zoom(index) {
  const current = queue[0];
  if (!current) return;
  const image = current.pictures[index];
  if (!image.naturalWidth) image.src = image.src; // try again
  zoomed = index;
  if (!comparison) activate(index);
  $("zoom-title").textContent = imageName(current, index);
  $("zoom-image").src = image.src;
  $("zoom-image").alt = `${imageName(current, index)}, enlarged`;
  $("zoom-image").classList.toggle("small", image.naturalWidth < 200);
  $("zoom-verdicts").replaceChildren(...(comparison ? [] : verdictButtons(index)));
  showChoice();
  if (!$("zoom").open) $("zoom").showModal();
}

function turn(step) {
  const count = queue[0].pictures.length;
  zoom((zoomed + step + count) % count);
}

function toggleGuide() {
  if ($("guide").open) $("guide").close();
  else $("guide").showModal();
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.defaultPrevented) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "?") return act(event, toggleGuide);
  if ($("guide").open) return undefined;
  if (key === "u" && !$("zoom").open) return act(event, undo);
  if (!queue.length || outbox.ended) return undefined;
  if ($("zoom").open) return onZoomKey(event, key);
  if (key === "z") return act(event, () => zoom(active));
  if (key === "Enter" && !event.target.closest("button, a")) return act(event, save);
  return comparison ? onComparisonKey(event, key) : onAlignmentKey(event, key);
}

function onZoomKey(event, key) {
  const verdict = !comparison && VERDICTS.find((item) => item.key === key);
  if (verdict) return act(event, () => { choose(zoomed, verdict.value); if (!complete(queue[0])) zoom(active); else $("zoom").close(); });
  if (key === "ArrowRight") return act(event, () => turn(1));
  if (key === "ArrowLeft") return act(event, () => turn(-1));
  return key === "z" ? act(event, () => $("zoom").close()) : undefined;
}

function onAlignmentKey(event, key) {
  const verdict = VERDICTS.find((item) => item.key === key);
  const count = queue[0].task.images.length;
  if (verdict) return act(event, () => choose(active, verdict.value));
  if (key >= "1" && key <= String(count)) return act(event, () => go(Number(key) - 1));
  if (key === "ArrowRight") return act(event, () => go((active + 1) % count));
  if (key === "ArrowLeft") return act(event, () => go((active + count - 1) % count));
  return undefined;
}

function onComparisonKey(event, key) {
  const side = SIDES.find((item) => item.key === key || item.arrow === key);
  if (side) return act(event, () => choose(0, side.value));
  if (key >= "1" && key <= String(queue[0].pictures.length)) return act(event, () => zoom(Number(key) - 1));
  return undefined;
}

function act(event, action) {
  event.preventDefault();
  if (!event.repeat) action(); // a key held down must not judge the next task
}

function go(index) {
  active = index;
  showChoice();
}

document.addEventListener("keydown", onKey);
$("save").addEventListener("click", save);
$("undo").addEventListener("click", undo);
$("guide-open").addEventListener("click", toggleGuide);
$("guide-close").addEventListener("click", toggleGuide);
$("zoom-close").addEventListener("click", () => $("zoom").close());
$("zoom-back").addEventListener("click", () => turn(-1));
$("zoom-on").addEventListener("click", () => turn(1));
$("zoom").addEventListener("close", () => queue[0] && showChoice());
$("rest-again").addEventListener("click", () => outbox.flush());
$("keys").replaceChildren(...keyHints(HINTS[kind], "span"));
$("keylist").replaceChildren(...KEYS[kind].flatMap(([key, text]) => [
  make("dt", {}, make("kbd", {}, key)), make("dd", {}, text),
]));

showState();
outbox.flush();
