// What a click can do beyond links and forms: copy, open a dialog, switch the theme. Listened for on the document, so
// that it works in what was fetched later as well.

const PREFERENCE = "path=/; SameSite=Strict; max-age=31536000";

/** Begin to listen. */
export function enhance() {
  document.addEventListener("click", onClick);
  document.addEventListener("submit", onSubmit);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") for (const pop of document.querySelectorAll("details.pop[open]")) pop.open = false;
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-submit]")) event.target.form.requestSubmit();
    if (event.target.matches("[data-sample-of]")) fillSample(event.target);
  });
  const address = document.querySelector("[data-address]");
  if (address) history.replaceState(null, "", address.dataset.address); // to load it again sends nothing again
  const theme = document.querySelector("[data-theme-form] button");
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  if (theme && !document.documentElement.dataset.theme && isDark) offerTheme(theme, "light");
  const url = new URL(location.href);
  if (url.searchParams.has("note")) {
    url.searchParams.delete("note");
    history.replaceState(null, "", url);
  }
}

/** Say something to those who do not see it. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

function onClick(event) {
  const copy = event.target.closest("[data-copy]");
  if (copy) copyText(copy);
  const opener = event.target.closest("[data-dialog]");
  const dialog = opener && document.getElementById(opener.dataset.dialog);
  if (dialog && !event.ctrlKey && !event.metaKey) {
    event.preventDefault();
    dialog.showModal();
  }
  const closer = event.target.closest("dialog [data-close]");
  if (closer) {
    event.preventDefault();
    closer.closest("dialog").close();
  }
  if (event.target instanceof HTMLDialogElement) event.target.close(); // the backdrop: a click on it hits the dialog itself
  for (const pop of document.querySelectorAll("details.pop[open]")) if (!pop.contains(event.target)) pop.open = false;
}

async function copyText(button) {
  const source = button.dataset.copy.startsWith("#") ? document.getElementById(button.dataset.copy.slice(1)) : null;
  try {
    await navigator.clipboard.writeText(source ? source.textContent : button.dataset.copy);
    flash(button, "Copied");
  } catch {
    flash(button, "Press Ctrl+C");
    if (source) getSelection().selectAllChildren(source);
  }
}

function flash(button, text) {
  const before = (button.dataset.label ??= button.textContent);
  button.textContent = text;
  announce(text);
  setTimeout(() => (button.textContent = before), 1500);
}

/** Put the sample of the chosen type into its field, unless somebody has written there. */
function fillSample(select) {
  const area = document.getElementById(select.dataset.sampleOf);
  const samples = [...select.options].map((option) => option.dataset.sample);
  const sample = select.selectedOptions[0].dataset.sample;
  if (sample !== undefined && (samples.includes(area.value) || !area.value.trim())) area.value = sample;
}

function onSubmit(event) {
  const form = event.target;
  if (form.matches("[data-theme-form]")) {
    event.preventDefault();
    switchTheme(event.submitter);
    return;
  }
  if (form.method !== "post" || !event.submitter) return;
  if (form.dataset.sent) event.preventDefault(); // a second click sends nothing twice
  form.dataset.sent = "yes";
  event.submitter.setAttribute("aria-busy", "true");
}

function switchTheme(button) {
  const theme = button.value;
  offerTheme(button, theme === "dark" ? "light" : "dark");
  document.documentElement.dataset.theme = theme;
  document.querySelector('meta[name="color-scheme"]').content = theme;
  document.cookie = `dispatcher_theme=${theme}; ${PREFERENCE}`;
}

function offerTheme(button, theme) {
  button.value = theme;
  button.textContent = theme === "dark" ? "Dark" : "Light";
}

// A page that comes back from the browser's memory may be sent again.
addEventListener("pageshow", () => {
  for (const form of document.querySelectorAll("form[data-sent]")) {
    delete form.dataset.sent;
    for (const button of form.querySelectorAll('[aria-busy="true"]')) button.removeAttribute("aria-busy");
  }
});
