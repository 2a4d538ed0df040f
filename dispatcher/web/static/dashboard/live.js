// Live pages. The server says that something changed; the page is fetched once more, and what is marked `data-live` is
// replaced where it differs. So there is one way to render anything, and it is the server's.

import { hold } from "./held.js";
import { spell } from "./times.js";

const BETWEEN_MS = 1000; // two looks
const HIDDEN_MS = 60_000; // out of sight: the stream is closed after this long
const AGAIN_MS = 3000; // between two tries where the browser makes none of its own
const TELL_MS = 3000; // without a stream: a restart takes less

let looking = false;
let again = false;
let lastLook = 0;
let telling = 0;

/** Follow the account's changes while somebody looks. */
export function live() {
  const { liveEvery } = document.querySelector("main").dataset;
  if (liveEvery) setInterval(() => document.hidden || look(), liveEvery * 1000); // nobody tells these pages of changes
  if (!document.querySelector("main[data-live-page]") || !document.querySelector("[data-live]")) return;
  let source = null;
  let closing = 0;
  const open = () => {
    clearTimeout(closing);
    if (source) return;
    source = new EventSource("/live");
    source.addEventListener("change", () => {
      found();
      look();
    });
    source.addEventListener("away", () => {
      state("No database");
      tell("The database cannot be reached. What you see here is from before.");
    });
    source.addEventListener("over", () => location.reload());
    source.addEventListener("error", ({ target }) => {
      lost();
      if (target.readyState !== EventSource.CLOSED || target !== source) return;
      source = null; // answered with something else than a stream: browsers leave it at that
      setTimeout(() => document.hidden || open(), AGAIN_MS);
    });
    source.addEventListener("open", () => {
      found();
      look(); // whatever changed since the page was made, or while the stream was broken
    });
  };
  const close = () => {
    source?.close();
    source = null;
  };
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) closing = setTimeout(close, HIDDEN_MS);
    else open();
  });
  addEventListener("pagehide", close);
  addEventListener("pageshow", (event) => event.persisted && open());
  open();
}

/** Fetch the page again and take over what is live. */
export async function look() {
  if (looking) {
    again = true;
    return;
  }
  looking = true;
  try {
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, lastLook + BETWEEN_MS - Date.now())));
    lastLook = Date.now();
    const response = await fetch(location.href, { headers: { Accept: "text/html", "X-Looking": "again" }, redirect: "manual" });
    if (response.type === "opaqueredirect") location.reload();
    else if (response.ok) take(new DOMParser().parseFromString(await response.text(), "text/html"));
  } catch {
    lost();
  } finally {
    looking = false;
    if (again) {
      again = false;
      look();
    }
  }
}

function take(fresh) {
  for (const old of document.querySelectorAll("[data-live]")) {
    const now = fresh.getElementById(old.id);
    if (now && old.dataset.live === "held") hold(old, now, () => replace(old, now));
    else if (now) replace(old, now);
  }
}

/** Put `now` in the place of `old`, unless somebody is at work in it. */
function replace(old, now) {
  if (old.dataset.source === undefined) old.dataset.source = plain(old);
  const source = plain(now);
  if (source === old.dataset.source || isBusy(old)) return;
  const fresh = new Set([...now.querySelectorAll("[data-key]")].map((item) => item.dataset.key));
  for (const item of old.querySelectorAll("[data-key]")) fresh.delete(item.dataset.key);
  const focused = old.contains(document.activeElement) ? document.activeElement.id || document.activeElement.getAttribute("href") : null;
  for (const details of now.querySelectorAll("details[id]")) {
    const before = old.querySelector(`#${CSS.escape(details.id)}`); // what somebody opened stays open
    if (before) details.open = before.open;
  }
  old.replaceChildren(...[...now.childNodes].map((node) => document.importNode(node, true)));
  old.dataset.source = source;
  for (const item of old.querySelectorAll("[data-key]")) if (fresh.has(item.dataset.key)) item.classList.add("fresh");
  if (focused) old.querySelector(`#${CSS.escape(focused)}, [href="${CSS.escape(focused)}"]`)?.focus();
  spell(old);
}

/** The text of an element without what the clock alone changes. */
function plain(element) {
  const copy = element.cloneNode(true);
  for (const time of copy.querySelectorAll("time[data-time]")) time.textContent = "";
  return copy.innerHTML;
}

function isBusy(element) {
  if (element.querySelector("details.pop[open], dialog[open]")) return true;
  return [...element.querySelectorAll("input, textarea, select")].some((input) => input === document.activeElement);
}

/** Nobody says any more what changes. */
function lost() {
  state("Reconnecting");
  if (telling) return;
  telling = setTimeout(() => tell("The dispatcher cannot be reached. What you see here is from before."), TELL_MS);
}

function found() {
  clearTimeout(telling);
  telling = 0;
  tell("");
  state("Live");
}

function tell(text) {
  const notice = document.getElementById("away");
  if (notice.textContent !== text) notice.textContent = text;
  notice.hidden = !text;
}

function state(text) {
  for (const element of document.querySelectorAll("[data-live-state]")) {
    element.textContent = text;
    element.classList.toggle("warn", text !== "Live");
  }
}
