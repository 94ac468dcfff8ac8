// Answers on their way to the server. They wait in localStorage, in order, each under its own idempotency key:
// sent twice they count once, and a closed tab loses none. Nothing here is called saved before the server said so.

export class Unreachable extends Error {}

export class Refused extends Error {
  constructor(status, message, reason) {
    super(message);
    this.status = status;
    this.reason = reason;
  }
}

// crypto.randomUUID is there on https only, and phones on a home network have http.
export function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// Answers may arrive in another order than their questions: each carries its question's number, `asked`.
let asked = 0;

export async function call(path, body) {
  const number = (asked += 1);
  const csrf = document.querySelector("meta[name=csrf-token]").content;
  let response;
  try {
    response = await fetch(path, {
      method: "POST",
      credentials: "same-origin",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": csrf },
      body: JSON.stringify(body),
      signal: AbortSignal.timeout(20_000),
    });
    if (response.ok) return { ...(await response.json()), asked: number };
  } catch {
    throw new Unreachable("The server cannot be reached.");
  }
  const problem = await response.json().catch(() => ({}));
  const message = problem.message || `The server answered with status ${response.status}.`;
  if (response.status >= 500 || response.status === 429) throw new Unreachable(message);
  throw new Refused(response.status, message, problem.reason);
}

export class Outbox {
  // Called back: `changed()` after every change, `acknowledged(entry, reply)` when the server has committed one,
  // `drained()` when nothing waits any more.
  constructor(name, { changed, acknowledged, drained }) {
    this.name = name;
    this.changed = changed;
    this.acknowledged = acknowledged;
    this.drained = drained;
    this.memory = []; // where the browser forbids localStorage, or it is full:
    this.stored = true; // then what it still holds is older than this
    this.reachable = true;
    this.ended = "";
    this.running = null;
    this.timer = null;
    this.failures = 0;
    addEventListener("online", () => this.flush());
    addEventListener("offline", () => this.lost());
    addEventListener("storage", (event) => event.key === name && this.changed());
    document.addEventListener("visibilitychange", () => document.hidden || this.flush());
  }

  read() {
    if (!this.stored) return this.memory;
    try {
      return JSON.parse(localStorage.getItem(this.name)) ?? this.memory;
    } catch {
      return this.memory;
    }
  }

  // Read anew each time: another tab of the same rater may have written.
  update(change) {
    this.memory = change(this.read());
    try {
      localStorage.setItem(this.name, JSON.stringify(this.memory));
      this.stored = true;
    } catch {
      this.stored = false;
      // Full or forbidden: then it lives as long as this tab.
    }
    this.changed();
  }

  get waiting() { return this.read().filter((entry) => !entry.problem); }
  get refused() { return this.read().filter((entry) => entry.problem); }

  push(entry) {
    this.update((entries) => [...entries, { tried: false, problem: "", ...entry }]);
    return this.flush();
  }

  remove(id) { this.update((entries) => entries.filter((entry) => entry.id !== id)); }
  mark(id, change) { this.update((entries) => entries.map((entry) => (entry.id === id ? { ...entry, ...change } : entry))); }

  lost() {
    this.reachable = false;
    this.changed();
  }

  flush() {
    clearTimeout(this.timer);
    this.running ??= this.send().finally(() => {
      this.running = null;
      this.changed();
    });
    return this.running;
  }

  async send() {
    for (let entry; (entry = this.waiting[0]); ) {
      // From here on the server may have it, whatever we hear.
      if (!entry.tried) this.mark(entry.id, { tried: true });
      let reply;
      try {
        reply = await call(entry.path, entry.body);
      } catch (error) {
        if (error instanceof Refused && (error.status === 401 || error.reason === "FORBIDDEN")) {
          // The session is over, or another one's by now: the answers stay, for the rater's next one.
          this.ended = error.message;
          return;
        }
        if (error instanceof Refused) {
          this.mark(entry.id, { problem: error.message });
          continue;
        }
        this.later();
        return;
      }
      this.reachable = true;
      this.failures = 0;
      this.remove(entry.id);
      this.acknowledged(entry, reply);
    }
    this.drained();
  }

  later() {
    this.reachable = false;
    this.failures += 1;
    this.timer = setTimeout(() => this.flush(), Math.min(15_000, 500 * 2 ** this.failures));
  }
}
