// Keeps the numbers fresh, and copies links. The page works without it.
const EVERY_MS = 15_000;

async function refresh() {
  const live = document.querySelector("[data-live]");
  if (!live || document.hidden) return;
  const note = document.getElementById("fresh");
  try {
    const current = document.querySelector("[aria-current=page]");
    const response = await fetch(current.href, { credentials: "same-origin", signal: AbortSignal.timeout(EVERY_MS) });
    if (!response.ok || response.redirected) throw new Error("signed out");
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    if (!live.contains(document.activeElement)) live.replaceWith(fresh.querySelector("[data-live]"));
    note.textContent = "";
  } catch {
    note.textContent = "These numbers are old: the service cannot be reached, or you were signed out.";
  }
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const field = document.getElementById(button.dataset.copy);
    field.select();
    try {
      await navigator.clipboard.writeText(field.value);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Press Ctrl-C"; // the clipboard is there on https only
    }
  });
}

setInterval(refresh, EVERY_MS);
