// Lists that somebody reads: news is announced above them and taken over on request, so nothing moves under the eye. What
// is in sight already changes in its place.

/** Keep `old` as it is, but for rows that changed, and offer what `now` has in front of it. */
export function hold(old, now, take) {
  const bar = document.querySelector(`[data-news="${CSS.escape(old.id)}"] button`);
  const mine = rows(old);
  if (!bar || !mine.size) return take(); // an empty list has nobody reading it
  const fresh = rows(now);
  let news = 0;
  for (const [key, row] of fresh) {
    if (!mine.has(key)) news += 1;
    else if (plain(row) !== plain(mine.get(key))) mine.get(key).replaceChildren(...[...row.childNodes].map((node) => document.importNode(node, true)));
  }
  offer(bar, news);
  if (!news) return undefined;
  const text = `${news}${news === fresh.size ? "+" : ""} new`;
  if (bar.textContent !== text) bar.textContent = text;
  bar.onclick = () => {
    offer(bar, 0);
    take();
    old.querySelector("a")?.focus({ preventScroll: true });
  };
  return undefined;
}

function offer(bar, news) {
  bar.hidden = !news;
  bar.nextElementSibling.hidden = news > 0;
}

function rows(element) {
  return new Map([...element.querySelectorAll("[data-key]")].map((row) => [row.dataset.key, row]));
}

function plain(row) {
  const copy = row.cloneNode(true);
  for (const time of copy.querySelectorAll("time[data-time]")) time.textContent = "";
  return copy.innerHTML;
}
