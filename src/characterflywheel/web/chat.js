// The open conversation: say, read the reply as it is written, swipe, react, and go on after trouble.

import * as api from "./api.js";
import { announce, el, hueOf, icon, iconButton, portrait } from "./dom.js";
import { askOpinion, askReport } from "./dialogs.js";
import { announceViewed, turnView } from "./turn_view.js";
import { greetingsOf, newReply, newTurn, standsAt, turnsOf, wentBack } from "./turns.js";

const HAS_KEYBOARD = matchMedia("(hover: hover) and (pointer: fine)");

/** A conversation in `host`. `conversation` is null for one that begins with the first thing said. */
export class Chat {
  constructor(host, character, conversation, { onOpened, tell }) {
    Object.assign(this, { host, character, onOpened, tell });
    this.id = conversation?.id ?? null;
    this.openingKey = api.newKey();
    this.stopping = null; // the AbortController of the reply being written
    this.turns = conversation ? turnsOf(conversation.messages) : [greetingTurn(character)];
    const last = this.turns.at(-1);
    if (last?.said && !last.replies.length) last.trouble = { text: "This was not answered yet.", until: 0 };
    this.views = new Map();
    this.build();
    this.turns.forEach((turn) => this.addView(turn));
    this.showAll();
    this.toEnd();
  }

  build() {
    const { character } = this;
    document.documentElement.style.setProperty("--hue", hueOf(character.id));
    document.title = `${character.name} · Characters`;
    this.title = el("h2", { text: character.name, tabindex: "-1" });
    const who = el("p", { text: (character.traits ?? []).join(" · ") });
    const bar = el(
      "header", { class: "bar" },
      el("a", { class: "tool back", href: "#", "aria-label": "All characters" }, icon("back")),
      portrait(character), el("div", { class: "who" }, this.title, who),
      iconButton("star", "Rate this conversation", () => this.rate()),
      el("a", { class: "tool", href: `#with/${character.id}`, "aria-label": "New conversation", title: "New conversation" }, icon("fresh")),
    );
    this.list = el("ol", { class: "turns", "aria-label": "Messages" });
    const intro = el("div", { class: "intro" }, portrait(character, "large"), el("b", { text: character.name }),
      el("p", { text: [character.category, ...(character.traits ?? [])].filter(Boolean).join(" · ") }));
    this.scroller = el("div", { class: "scroller" }, intro, this.list);
    this.field = el("textarea", { id: "words", rows: 1, placeholder: `Say something to ${character.name}`, enterkeyhint: HAS_KEYBOARD.matches ? "send" : "enter" });
    this.field.value = sessionStorage.getItem(this.draftName) ?? "";
    this.button = el("button", { class: "send", "aria-label": "Send" }, icon("send"));
    const form = el(
      "form", { class: "composer" }, el("label", { class: "unseen", for: "words", text: `Message to ${character.name}` }), this.field, this.button,
    );
    form.addEventListener("submit", (event) => (event.preventDefault(), this.stopping ? this.stopping.abort() : this.sendField()));
    this.field.addEventListener("input", () => (this.grow(), this.keepDraft(this.field.value)));
    this.field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing || !HAS_KEYBOARD.matches) return;
      event.preventDefault();
      if (!this.stopping) this.sendField();
    });
    this.room = el("div", { class: "room", onkeydown: (event) => this.onArrow(event) }, bar, this.scroller, form);
    this.host.replaceChildren(this.room);
    this.swipeByTouch();
    this.grow();
    HAS_KEYBOARD.matches ? this.field.focus() : this.title.focus();
  }

  close() {
    this.stopping?.abort();
    this.closed = true;
  }

  get draftName() {
    return `flywheel.draft.${this.id ?? this.character.id}`;
  }

  keepDraft(text) {
    if (text) sessionStorage.setItem(this.draftName, text);
    else sessionStorage.removeItem(this.draftName);
  }

  grow() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight + 2}px`;
  }

  addView(turn) {
    const view = turnView(turn, this.character.name, {
      react: (one, kind, mark) => this.react(one, kind, mark),
      again: (one) => this.again(one),
      swipe: (one, step) => this.swipe(one, step),
      edit: (reply, text) => this.edit(reply, text),
      report: (one) => this.report(one.replies[one.viewed]),
      retry: (one) => this.retry(one),
    });
    this.views.set(turn, view);
    this.list.append(view.node);
  }

  showAll() {
    const busy = Boolean(this.stopping);
    for (const [turn, view] of this.views) view.show({ last: turn === this.turns.at(-1), busy });
    this.button.setAttribute("aria-label", busy ? "Stop" : "Send");
    this.button.replaceChildren(icon(busy ? "stop" : "send"));
  }

  toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  get atEnd() {
    return this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight < 80;
  }

  sendField() {
    const text = this.field.value.trim();
    if (!text) return;
    const before = this.turns.at(-1);
    const turn = newTurn({ id: null, text });
    turn.parent = standsAt(this.turns)?.id ?? null;
    turn.greeting = this.id ? null : before.viewed;
    turn.picked = this.id && wentBack(before) ? before.replies[before.chosen] : null;
    if (before?.trouble) { // said, never answered: what is said now takes its place
      before.trouble = null;
    }
    this.turns.push(turn);
    this.addView(turn);
    this.field.value = "";
    this.grow();
    this.answer(turn, null);
  }

  again(turn) {
    if (this.stopping) return;
    this.answer(turn, turn.replies[turn.viewed].id);
  }

  retry(turn) {
    if (this.stopping || turn.trouble?.until > Date.now()) return;
    this.answer(turn, turn.trouble?.replaces ?? null, turn.trouble?.key);
  }

  /** Have a reply written for a turn; `replaces` is the one that it is another of. */
  async answer(turn, replaces, key = api.newKey()) {
    const reply = newReply();
    const stopping = (this.stopping = new AbortController());
    const stood = turn.viewed;
    reply.writing = true;
    turn.trouble = null;
    turn.replies.push(reply);
    turn.viewed = turn.chosen = turn.replies.length - 1;
    this.showAll();
    this.toEnd();
    try {
      await this.open(turn);
      await this.pick(turn);
      const body = { model: this.character.id, messages: [{ role: "user", content: turn.said.text }], flywheel_conversation: this.id };
      if (replaces) body.flywheel_regenerate = replaces;
      else if (turn.parent) body.flywheel_parent = turn.parent;
      for await (const piece of api.streamReply(body, { key, signal: stopping.signal })) {
        const follow = this.atEnd;
        reply.id = piece.id;
        turn.said.id = piece.said ?? turn.said.id;
        reply.text += piece.text;
        reply.fallback ||= piece.fallback;
        reply.finish = piece.finish ?? reply.finish;
        this.views.get(turn).write();
        if (follow) this.toEnd();
      }
      announce(`${this.character.name}: ${reply.text}`);
      this.keepDraft("");
    } catch (error) {
      this.onTrouble(error, turn, reply, stood, replaces, key);
    }
    reply.writing = false;
    if (this.stopping === stopping) this.stopping = null;
    const follow = this.atEnd;
    this.showAll();
    if (follow || turn.trouble) this.toEnd();
  }

  /** What failed stays said: the turn keeps its text and says what to do. A reply that the user stopped is kept. */
  onTrouble(error, turn, reply, stood, replaces, key) {
    const stopped = error.name === "AbortError";
    if (stopped && reply.id && reply.text) {
      reply.finish = "cancelled";
      this.keepDraft("");
      return;
    }
    if (!stopped && !(error instanceof api.ApiError)) console.error(error);
    turn.replies.splice(turn.replies.indexOf(reply), 1);
    turn.viewed = turn.chosen = Math.min(stood, turn.replies.length - 1);
    const until = error.retryAfter ? Date.now() + error.retryAfter * 1000 : 0;
    turn.trouble = { text: stopped ? "Stopped before there was a reply." : sentence(error), until, replaces, key };
    if (!this.closed) this.keepDraft(replaces ? "" : turn.said.text);
  }

  /** Begin the conversation with the greeting that was chosen, where it is not begun. */
  async open(turn) {
    if (this.id) return;
    const draft = this.draftName;
    const opened = await api.openConversation(this.character.id, turn.greeting, this.openingKey);
    sessionStorage.removeItem(draft);
    this.id = opened.id;
    const first = this.turns[0];
    const [begun] = turnsOf(opened.messages);
    if (first.said === null && begun) {
      first.replies = begun.replies;
      first.viewed = first.chosen = begun.chosen;
      turn.parent = standsAt([first])?.id ?? null;
    }
    this.onOpened(opened);
  }

  /** Going on from an older alternative is a choice between them. */
  async pick(turn) {
    if (!turn.picked) return;
    await api.feedback(turn.picked.id, "pick");
    turn.picked = null;
  }

  swipe(turn, step) {
    const next = turn.viewed + step;
    if (this.stopping || next < 0 || next >= turn.replies.length) return;
    turn.viewed = next;
    if (turn === this.turns.at(-1)) turn.chosen = next;
    this.showAll();
    announceViewed(turn);
  }

  onArrow(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const writes = event.target.closest?.("textarea, input");
    if (!step || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey || (writes && (writes !== this.field || this.field.value))) return;
    event.preventDefault();
    const li = event.target.closest(".turn");
    const turn = [...this.views].find(([, view]) => view.node === li)?.[0] ?? this.turns.at(-1);
    this.swipe(turn, step);
  }

  swipeByTouch() {
    let from = null;
    this.scroller.addEventListener("touchstart", (event) => (from = event.touches.length === 1 ? event.touches[0] : null), { passive: true });
    this.scroller.addEventListener("touchend", (event) => {
      const to = event.changedTouches[0];
      const across = from && to.clientX - from.clientX;
      const li = event.target.closest?.(".turn");
      const turn = [...this.views].find(([, view]) => view.node === li)?.[0];
      if (turn && Math.abs(across) > 60 && Math.abs(across) > 2 * Math.abs(to.clientY - from.clientY)) this.swipe(turn, across < 0 ? 1 : -1);
      from = null;
    }, { passive: true });
  }

  /** Shown at once, taken back if the service does not take it. A reaction once given stays; thumbs exclude each other. */
  async react(turn, { kind, text, against }, mark) {
    const reply = turn.replies[turn.viewed];
    if (!reply.id || reply.signals.has(mark)) return;
    const had = new Set(reply.signals);
    reply.signals.add(mark);
    if (against) reply.signals.delete(against);
    this.showAll();
    try {
      await api.feedback(reply.id, kind, { text });
      announce("Noted.");
    } catch (error) {
      reply.signals = had;
      this.showAll();
      this.tell(sentence(error));
    }
  }

  async edit(reply, text) {
    try {
      await api.feedback(reply.id, "edit", { text });
    } catch (error) {
      this.tell(sentence(error));
      return false;
    }
    reply.edited = text;
    this.tell("Thank you. Your wording was kept.");
    return true;
  }

  async report(reply) {
    const sent = await askReport(this.character.name, (reason) => api.feedback(reply.id, "report", { text: reason }));
    if (sent) this.tell("Thank you. The report was sent.");
  }

  async rate() {
    const reply = standsAt(this.turns);
    if (!reply) {
      this.tell(`Say something to ${this.character.name} first.`);
      return;
    }
    const sent = await askOpinion(this.character.name, async ({ rating, text }) => {
      if (rating !== null) await api.feedback(reply.id, "rating", { value: rating });
      if (text !== null) await api.feedback(reply.id, "feedback", { text });
    });
    if (sent) this.tell("Thank you for your opinion.");
  }
}

function greetingTurn(character) {
  const turn = newTurn(null, greetingsOf(character).map((content) => newReply({ content })));
  turn.viewed = turn.chosen = 0;
  return turn;
}

/** What to tell the user about an error, in words of the page where it knows better than the service. */
function sentence(error) {
  if (error.code === "unreachable") return navigator.onLine ? "The service cannot be reached at the moment." : "You are offline.";
  if (error.status === 429) return "Many people are talking at once.";
  if (error.status >= 500) return "That did not work; it is not your fault.";
  return error.message ?? "That did not work.";
}
