// The frame of an open conversation: whom one talks to, the list of turns, the field to write in.

import { el, hueOf, icon, iconButton, portrait } from "./dom.js";

const HAS_KEYBOARD = matchMedia("(hover: hover) and (pointer: fine)");
const NEAR = 80; // pixels from the end that still count as being there

/**
 * Build the frame in `host`. `acts`: say(text), stop(), rate(), swipe(li, step), draft(text).
 *
 * Returns {list, field, focus(), toEnd(), follow(change), busy(yes), put(text)}.
 */
export function buildRoom(host, character, acts) {
  let stops = false;
  const title = el("h2", { text: character.name, tabindex: "-1" });
  const bar = el(
    "header", { class: "bar" },
    el("a", { class: "tool back", href: "#", "aria-label": "All characters" }, icon("back")),
    portrait(character), el("div", { class: "who" }, title, el("p", { text: character.traits.join(" · ") })),
    iconButton("star", "Rate this conversation", acts.rate),
    el("a", { class: "tool", href: `#with/${character.id}`, "aria-label": "New conversation", title: "New conversation" }, icon("fresh")),
  );
  const intro = el("div", { class: "intro" }, portrait(character, "large"), el("b", { text: character.name }),
    el("p", { text: [character.category, ...character.traits].filter(Boolean).join(" · ") }));
  const list = el("ol", { class: "turns", "aria-label": "Messages" });
  const scroller = el("div", { class: "scroller" }, intro, list);
  const field = el("textarea", { id: "words", rows: 1, placeholder: `Say something to ${character.name}`, enterkeyhint: HAS_KEYBOARD.matches ? "send" : "enter" });
  const button = el("button", { class: "send", "aria-label": "Send" }, icon("send"));
  const form = el("form", { class: "composer" }, el("label", { class: "unseen", for: "words", text: `Message to ${character.name}` }), field, button);

  const send = () => {
    const text = field.value.trim();
    if (stops || !text) return;
    put("");
    acts.say(text);
  };
  const put = (text) => {
    field.value = text;
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight + 2}px`;
  };
  const toEnd = () => (scroller.scrollTop = scroller.scrollHeight);
  /** Change the page and stay at the end, for those who are there; others read on undisturbed. */
  const follow = (change) => {
    const there = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    change();
    if (there) toEnd();
  };
  const busy = (yes) => {
    if (stops === yes) return;
    stops = yes;
    button.setAttribute("aria-label", yes ? "Stop" : "Send");
    button.replaceChildren(icon(yes ? "stop" : "send"));
  };

  form.addEventListener("submit", (event) => (event.preventDefault(), stops ? acts.stop() : send()));
  field.addEventListener("input", () => (put(field.value), acts.draft(field.value)));
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || !HAS_KEYBOARD.matches) return;
    event.preventDefault();
    send();
  });
  const room = el("div", { class: "room" }, bar, scroller, form);
  room.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const writes = event.target.closest("textarea, input");
    const free = !writes || (writes === field && !field.value);
    if (!step || !free || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    acts.swipe(event.target.closest(".turn"), step);
  });
  swipesByTouch(scroller, acts.swipe);
  document.documentElement.style.setProperty("--hue", hueOf(character.id));
  document.title = `${character.name} · Characters`;
  host.replaceChildren(room);
  put("");
  return { list, field, toEnd, follow, busy, put, focus: () => (HAS_KEYBOARD.matches ? field : title).focus() };
}

/** A finger drawn across a turn, more sideways than up or down. */
function swipesByTouch(scroller, swipe) {
  let from = null;
  scroller.addEventListener("touchstart", (event) => (from = event.touches.length === 1 ? event.touches[0] : null), { passive: true });
  scroller.addEventListener("touchend", (event) => {
    const to = event.changedTouches[0];
    const across = from ? to.clientX - from.clientX : 0;
    const turn = event.target.closest(".turn");
    if (turn && Math.abs(across) > 60 && Math.abs(across) > 2 * Math.abs(to.clientY - from.clientY)) swipe(turn, across < 0 ? 1 : -1);
    from = null;
  }, { passive: true });
}
