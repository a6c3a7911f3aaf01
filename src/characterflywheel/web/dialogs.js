// Dialogs: report a reply, say what one thinks of the conversation. Native <dialog>: focus stays inside, Escape closes.

import { el, icon } from "./dom.js";

const REASONS = [
  "It is harmful or dangerous",
  "It is sexual where it should not be",
  "It is hateful or cruel",
  "It reveals something private",
  "It breaks the character or makes no sense",
  "Something else",
];

/**
 * Ask in a dialog. `send` gets the form's data and may throw; the dialog stays open then and says why.
 *
 * Resolves to whether it was sent.
 */
function ask(title, intro, fields, action, send) {
  const trouble = el("p", { class: "trouble", role: "alert", hidden: true });
  const go = el("button", { class: "primary", text: action });
  const cancel = el("button", { type: "button", class: "quiet", text: "Cancel", onclick: () => dialog.close() });
  const form = el("form", { class: "ask", novalidate: true }, el("h2", { id: "ask-title", text: title }), el("p", { text: intro }), ...fields, trouble, el("div", { class: "row" }, go, cancel));
  const close = el("button", { type: "button", class: "tool close", "aria-label": "Close", onclick: () => dialog.close() }, icon("close"));
  const dialog = el("dialog", { "aria-labelledby": "ask-title" }, form, close);
  document.body.append(dialog);
  const before = document.activeElement;
  return new Promise((resolve) => {
    let sent = false;
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      go.disabled = true;
      try {
        await send(new FormData(form));
        sent = true;
        dialog.close();
      } catch (error) {
        trouble.textContent = error.message;
        trouble.hidden = false;
      } finally {
        go.disabled = false;
      }
    });
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // its backdrop
    dialog.addEventListener("close", () => {
      dialog.remove();
      before?.focus();
      resolve(sent);
    });
    dialog.showModal();
    form.querySelector("input, textarea")?.focus();
  });
}

/** Report a reply: `send(reason)` with the reason in words. */
export function askReport(name, send) {
  const reasons = el(
    "fieldset", {}, el("legend", { text: "What is wrong with it?" }),
    ...REASONS.map((text, i) => el("label", { class: "choice" }, el("input", { type: "radio", name: "reason", value: text, checked: i === 0 }), el("span", { text }))),
  );
  const more = el("label", { class: "field" }, el("span", { text: "Anything to add? (optional)" }), el("textarea", { name: "more", rows: 3, maxlength: 2000 }));
  return ask("Report this reply", `A person will read what you say, with the reply of ${name}.`, [reasons, more], "Send report", (data) => {
    const added = String(data.get("more")).trim();
    return send(added ? `${data.get("reason")}: ${added}` : String(data.get("reason")));
  });
}

const STARS = ["Poor", "Fair", "Good", "Very good", "Wonderful"];

/** What the user thinks of the conversation: `send({rating, text})`, either may be null, not both. */
export function askOpinion(name, send) {
  const chosen = el("output", { class: "chosen", text: "Not rated yet" });
  const stars = el(
    "fieldset", { class: "stars" }, el("legend", { text: `How is it to talk to ${name}?` }),
    el("div", { class: "five" }, ...STARS.map((label, i) =>
      el("label", {}, el("input", { type: "radio", name: "rating", value: i + 1, "aria-label": `${i + 1} of 5: ${label}`, onchange: () => (chosen.textContent = label) }), icon("star")),
    )),
    chosen,
  );
  const words = el("label", { class: "field" }, el("span", { text: "What was good, what was not? (optional)" }), el("textarea", { name: "text", rows: 4, maxlength: 4000 }));
  return ask("Your opinion", "It helps to make the characters better company.", [stars, words], "Send", (data) => {
    const rating = data.get("rating") ? Number(data.get("rating")) : null;
    const text = String(data.get("text")).trim() || null;
    if (rating === null && text === null) throw new Error("Choose a number of stars or write something first.");
    return send({ rating, text });
  });
}
