// The words, keys and building blocks of the rating page.

export const VERDICTS = [
  { value: "good", label: "Good", sign: "✓", key: "g" },
  { value: "bad", label: "Bad", sign: "✕", key: "b" },
  { value: "skip", label: "Skip", sign: "–", key: "s" },
];

export const SIDES = [
  { value: "left", label: "A is better", key: "a", arrow: "ArrowLeft" },
  { value: "tie", label: "Tie", key: "t", arrow: "ArrowDown" },
  { value: "right", label: "B is better", key: "b", arrow: "ArrowRight" },
];

export const QUESTIONS = {
  "": "Does each image show all of this?",
  alignment: "Which set fits this text better?",
  fidelity: "Which set looks better?",
};

const COMMON_KEYS = [["Z", "Zoom"], ["Enter", "Save"], ["U", "Undo"], ["?", "Guidelines"]];

export const KEYS = {
  alignment: [["G", "Good"], ["B", "Bad"], ["S", "Skip"], ["← →", "Move"], ["1 2 3", "Choose image"], ...COMMON_KEYS],
  comparison: [["A ←", "A is better"], ["B →", "B is better"], ["T ↓", "Tie"], ["1 … 8", "Zoom in"], ...COMMON_KEYS],
};

// Keys that are not written on a button anyway.
export const HINTS = {
  alignment: [["← →", "Move"], ["Z", "Zoom"]],
  comparison: [["← ↓ →", "Choose"], ["1 … 8", "Zoom in"]],
};

// What the page says when there is no task to show: its state, its mark, a title and a text.
export function restWords({ ended, problem, reachable, busy, waiting, mine }) {
  if (ended) {
    return ["ended", "!", "Your session has ended", ended + (waiting ? " Your answers are kept in this browser." : "")];
  }
  if (problem) return ["ended", "!", "There is nothing to show", problem];
  if (!reachable) {
    const kept = waiting ? " Your answers are kept in this browser, and sent when it is back." : "";
    return ["offline", "⋯", "Waiting for the connection", `The server cannot be reached.${kept}`];
  }
  if (busy) return ["loading", "⋯", "One moment", "The next images are on their way."];
  const saved = mine ? `, and all ${mine} answers of yours are saved` : "";
  return ["done", "✓", "All done", `Thank you. There is nothing left for you to judge${saved}.`];
}

// The chip in the head: its state and its text.
export function stateWords({ ended, reachable, waiting, refused, mine }) {
  const answers = waiting === 1 ? "1 answer" : `${waiting} answers`;
  if (ended) return ["ended", "Session ended"];
  if (!reachable) return ["offline", waiting ? `Offline · ${answers} kept here` : "Offline"];
  if (waiting) return ["waiting", `Saving ${answers}…`];
  if (refused) return ["refused", "Some not saved"];
  return ["saved", mine ? "All saved" : "Ready"];
}

// Texts go in as text, never as HTML: a prompt may hold anything.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function keyHints(list, tag) {
  return list.map(([key, text]) => make(tag, {}, make("kbd", {}, key), text));
}
