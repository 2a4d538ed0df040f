// Moments in the reader's zone. The server renders them so as soon as it knows the zone, which it learns from a cookie.

const PREFERENCE = "path=/; SameSite=Strict; max-age=31536000";
const STEPS = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];

/** Remember the zone for the server, spell every moment of the page in it, and keep the relative ones going. */
export function localTimes() {
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  const known = document.cookie.split("; ").includes(`dispatcher_zone=${zone}`);
  if (zone && /^[\w+/-]{1,64}$/.test(zone) && !known) {
    document.cookie = `dispatcher_zone=${zone}; ${PREFERENCE}`;
  }
  spell(document);
  setInterval(() => tick(document), 1000);
}

/** Spell the moments below an element. */
export function spell(root) {
  for (const time of root.querySelectorAll("time[data-time]")) {
    if (time.dataset.time !== "relative") time.textContent = clock(new Date(time.dateTime), time.dataset.time === "seconds");
  }
  tick(root);
}

function tick(root) {
  for (const time of root.querySelectorAll('time[data-time="relative"]')) {
    const text = relative((Date.now() - Date.parse(time.dateTime)) / 1000);
    if (time.textContent !== text) time.textContent = text;
  }
}

function clock(at, seconds) {
  const pad = (n) => String(n).padStart(2, "0");
  const time = [at.getHours(), at.getMinutes(), ...(seconds ? [at.getSeconds()] : [])].map(pad).join(":");
  const now = new Date();
  if (at.toDateString() === now.toDateString()) return time;
  const year = at.getFullYear() === now.getFullYear() ? "" : ` ${at.getFullYear()}`;
  return `${at.getDate()} ${at.toLocaleString("en", { month: "short" })}${year}, ${time}`;
}

function relative(seconds) {
  if (Math.abs(seconds) < 1) return "now";
  return seconds > 0 ? `${duration(seconds)} ago` : `in ${duration(-seconds)}`;
}

/** As `duration` of the server: one unit, or two where the second one matters. */
export function duration(seconds) {
  let left = Math.floor(seconds);
  for (const [place, [size, unit]] of STEPS.entries()) {
    if (left < size) continue;
    const count = Math.floor(left / size);
    left -= count * size;
    if (size < 3600 || (unit === "d" && count >= 10)) return `${count} ${unit}`;
    const [nextSize, nextUnit] = STEPS[place + 1];
    return left >= nextSize ? `${count} ${unit} ${Math.floor(left / nextSize)} ${nextUnit}` : `${count} ${unit}`;
  }
  return "0 s";
}
