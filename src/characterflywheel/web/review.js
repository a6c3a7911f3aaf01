// The review page: characters that safety was in doubt about, with all that is known of them, for a person to decide.

import { reviewer } from "./api.js";
import { announce, el, hueOf, portrait } from "./dom.js";

const KEY = "flywheel.review-key"; // sessionStorage: this tab only
const queue = document.getElementById("queue");
const entry = document.getElementById("entry");
const leave = document.getElementById("leave");
const trouble = document.getElementById("entry-trouble");

const wordsOf = (name) => name.replaceAll("_", " ").replace(/^./, (letter) => letter.toUpperCase());
const isEmpty = (value) =>
  value === null || value === "" || (typeof value === "object" && Object.values(value).every(isEmpty));

/** Any JSON value as it is, as text: lists as lists, objects as names with values. */
function shown(value) {
  if (Array.isArray(value)) return el("ol", { class: "values" }, ...value.map((one) => el("li", {}, shown(one))));
  if (value !== null && typeof value === "object") return fields(value);
  return el("p", { class: "value", text: String(value) });
}

/** Every field of an object that has content; with `all`, the others are named in one line at the end. */
function fields(object, all = false) {
  const rows = Object.entries(object);
  const full = rows.filter(([, value]) => !isEmpty(value));
  const bare = all ? rows.filter(([, value]) => isEmpty(value)).map(([name]) => wordsOf(name)) : [];
  return el("dl", {}, ...full.map(([name, value]) => el("div", {}, el("dt", { text: wordsOf(name) }), el("dd", {}, shown(value)))),
    bare.length ? el("div", { class: "bare" }, el("dt", { text: "Empty" }), el("dd", {}, el("p", { text: bare.join(", ") }))) : null);
}

/** One character of the queue, with its decision. */
function dossier({ character, reason, in_service: serving, picture }, api) {
  const { id, version, name, card, safety, ...rest } = character; // `safety` is not known before the decision
  const title = el("h2", { text: name, tabindex: "-1" });
  const field = el("textarea", { id: `reason-${id}`, rows: 2, required: true, maxlength: 2000 });
  const failed = el("p", { class: "trouble", role: "alert", hidden: true });
  const buttons = [
    el("button", { class: "primary", value: "approved", text: "Approve" }),
    el("button", { class: "primary refuse", value: "refused", text: "Refuse" }),
  ];
  const form = el("form", { class: "decide" }, el("label", { for: field.id, text: "Your reason" }), field, failed, el("div", { class: "row" }, ...buttons));
  const more = serving ? `Version ${serving} is in service meanwhile.` : "Nobody can talk to it yet.";
  const image = picture ? el("img", { class: "waiting", alt: `The picture of ${name}` }) : null;
  if (image) api.picture(picture).then((address) => (image.src = address), () => image.replaceWith("Its picture could not be loaded."));
  const node = el("article", { class: "dossier hued" },
    el("header", {}, portrait(character), el("div", {}, title, el("p", { text: `${id}, version ${version}. ${more}` }))),
    el("div", { class: "found" }, el("h3", { text: "What safety found" }), el("p", { class: "value", text: reason })), image,
    fields(rest, true), card ? el("section", {}, el("h3", { text: "The card it came from" }), fields(card, true)) : null, form);
  node.style.setProperty("--hue", hueOf(id));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const decision = event.submitter.value;
    buttons.forEach((button) => (button.disabled = true));
    try {
      await api.decide(character, decision, field.value.trim());
    } catch (error) {
      failed.textContent = error.message;
      failed.hidden = false;
      buttons.forEach((button) => (button.disabled = false));
      return;
    }
    const next = node.nextElementSibling ?? node.previousElementSibling;
    node.remove();
    announce(`${name}: ${decision}.`);
    if (next) next.querySelector("h2").focus();
    else show([], api);
  });
  return node;
}

function show(states, api) {
  leave.hidden = false;
  const done = el("div", { class: "done" }, el("h2", { text: "Nothing waits for you", tabindex: "-1" }), el("p", { text: "Characters that safety is in doubt about appear here." }));
  queue.replaceChildren(...(states.length ? states.map((state) => dossier(state, api)) : [done]));
  queue.querySelector("h2").focus();
}

async function open(key) {
  const api = reviewer(key);
  let states;
  try {
    states = await api.queue();
  } catch (error) {
    if (error.status === 401 || error.status === 403) sessionStorage.removeItem(KEY);
    trouble.textContent = error.message;
    trouble.hidden = false;
    return;
  }
  sessionStorage.setItem(KEY, key);
  show(states, api);
}

entry.addEventListener("submit", (event) => {
  event.preventDefault();
  open(document.getElementById("key").value.trim());
});
leave.addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
if (sessionStorage.getItem(KEY)) await open(sessionStorage.getItem(KEY));
