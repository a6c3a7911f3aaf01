// One turn on the page: what the user said, the reply, its alternatives, and what one can do about it.

import { announce, el, icon, iconButton, prose, soon } from "./dom.js";

const REACTIONS = [
  { kind: "thumb_up", icon: "up", label: "Good reply", against: "thumb_down" },
  { kind: "thumb_down", icon: "down", label: "Bad reply", against: "thumb_up" },
  { kind: "love", icon: "love", label: "Love it" },
  { kind: "reaction", text: "😂", icon: "laugh", label: "Funny" },
  { kind: "reaction", text: "😮", icon: "wow", label: "Astonishing" },
];
const markOf = ({ kind, text }) => (text ? `${kind} ${text}` : kind);

/**
 * The view of a turn: `node`, and `show(state)` which brings it up to date without losing focus.
 *
 * `acts` are what the user can do: react(reaction, mark), edit(text), report(), swipe(step), again(), retry(). `state` says what depends on the rest of
 * the conversation: `last` (it can be gone on from) and `busy` (a reply is being written).
 */
export function turnView(turn, name, acts) {
  const words = el("div", { class: "words" });
  const note = el("p", { class: "note", hidden: true });
  const reactions = REACTIONS.map((one) =>
    iconButton(one.icon, one.label, () => acts.react(one, markOf(one)), { class: `tool ${one.icon}`, "aria-pressed": "false" }),
  );
  const edit = iconButton("edit", "Write it better", () => openEditor());
  const report = iconButton("flag", "Report this reply", () => acts.report());
  const count = el("span", { class: "count" });
  const back = iconButton("left", "Earlier reply", () => acts.swipe(-1));
  const on = iconButton("right", "Later reply", () => acts.swipe(1));
  const again = iconButton("again", "Another reply", () => acts.again(), { class: "tool again" });
  const marks = el("div", { class: "marks", role: "group", "aria-label": "React to this reply" }, ...reactions, edit, report);
  const pager = el("div", { class: "pager", role: "group", "aria-label": "Other replies" }, back, count, on);
  const tools = el("div", { class: "tools" }, marks, pager, again);
  const reply = el("div", { class: "reply" }, el("span", { class: "unseen", text: `${name}: ` }), words, note, tools);
  const trouble = el("div", { class: "trouble", role: "alert", hidden: true });
  const said = turn.said && el("p", { class: "said" }, el("span", { class: "unseen", text: "You: " }), turn.said.text);
  const node = el("li", { class: "turn" }, said, reply, trouble);
  let editor = null;
  let told = null;

  function openEditor() {
    const shown = turn.replies[turn.viewed];
    const field = el("textarea", { id: `edit-${shown.id}`, rows: 4, required: true });
    field.value = shown.edited ?? shown.text;
    const close = () => {
      editor?.remove();
      editor = null;
      words.hidden = false;
      edit.focus();
    };
    const save = async (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (text && text !== (shown.edited ?? shown.text) && !(await acts.edit(text))) return;
      close();
      show(state);
    };
    editor?.remove();
    editor = el(
      "form", { class: "editor", onsubmit: save, onkeydown: (event) => event.key === "Escape" && close() },
      el("label", { for: field.id, text: `How should ${name} have put it?` }), field,
      el("div", { class: "row" }, el("button", { class: "primary", text: "Keep my wording" }), el("button", { type: "button", class: "quiet", onclick: close, text: "Cancel" })),
    );
    words.hidden = true;
    words.after(editor);
    field.focus();
  }

  let state = { last: true, busy: false };

  function show(given) {
    state = given;
    const shown = turn.replies[turn.viewed];
    reply.hidden = !shown;
    node.classList.toggle("last", state.last);
    showTrouble();
    if (!shown) return;
    prose(words, shown.edited ?? shown.text);
    words.classList.toggle("waiting", shown.writing && !shown.text);
    reply.setAttribute("aria-busy", String(shown.writing));
    note.textContent = noteOn(turn, shown, state.last);
    note.hidden = !note.textContent;
    tools.hidden = shown.writing || !(shown.id || turn.replies.length > 1);
    marks.hidden = !shown.id;
    REACTIONS.forEach((one, i) => reactions[i].setAttribute("aria-pressed", String(shown.signals.has(markOf(one)))));
    const many = turn.replies.length;
    pager.hidden = many < 2;
    count.textContent = `${turn.viewed + 1}/${many}`;
    setOff(back, turn.viewed === 0 || state.busy);
    setOff(on, turn.viewed === many - 1 || state.busy);
    again.hidden = !(state.last && turn.said && shown.id);
    setOff(again, state.busy);
  }

  function showTrouble() {
    if (told === turn.trouble) return;
    told = turn.trouble;
    trouble.hidden = !told;
    trouble.replaceChildren();
    if (!told) return;
    const button = el("button", { type: "button", class: "primary", onclick: () => acts.retry() }, icon("again"), "Try again");
    const when = el("p");
    trouble.append(el("p", { text: told.text }));
    if (told.over) return;
    trouble.append(when, button);
    const mine = told;
    (function count() {
      if (turn.trouble !== mine) return;
      const left = (mine.until - Date.now()) / 1000;
      setOff(button, left > 0);
      when.textContent = left > 0 ? `You can try again ${soon(left)}.` : "";
      when.hidden = left <= 0;
      if (left > 0) setTimeout(count, Math.min(1000, left * 1000));
    })();
  }

  /** Add to the reply being written: only its words change. */
  function write() {
    const shown = turn.replies[turn.viewed];
    words.classList.toggle("waiting", !shown.text);
    prose(words, shown.text);
  }

  return { node, show, write };
}

/** Off, but still in the tab order, so that focus is not lost when a button turns off under it. */
function setOff(button, off) {
  button.setAttribute("aria-disabled", String(off));
}

function noteOn(turn, shown, last) {
  if (shown.edited) return "Your wording, kept as an example.";
  if (shown.finish === "cancelled") return "Stopped.";
  if (shown.finish === "content_filter") return "The rest of this reply could not be shown.";
  if (shown.finish === "error") return "This reply broke off.";
  if (shown.fallback) return "A stand-in: the reply could not be shown.";
  if (!last && turn.viewed !== turn.chosen) return `You went on from ${turn.chosen + 1}/${turn.replies.length}.`;
  return "";
}

/** Tell screen readers which of several replies is shown. */
export function announceViewed(turn) {
  announce(`Reply ${turn.viewed + 1} of ${turn.replies.length}: ${turn.replies[turn.viewed].text}`);
}
