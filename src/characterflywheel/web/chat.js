// The open conversation: say, read the reply as it is written, go back to an older one, go on after trouble.

import * as api from "./api.js";
import { announce } from "./dom.js";
import * as opinions from "./opinions.js";
import { buildRoom } from "./room.js";
import { announceViewed, turnView } from "./turn_view.js";
import { newReply, newTurn, standsAt, stoodAt, turnsOf, wentBack } from "./turns.js";

/** A conversation in `host`. `conversation` is null for one that begins with the first thing said. */
export class Chat {
  constructor(host, character, conversation, { onOpened, tell }) {
    Object.assign(this, { character, onOpened, tell, stopping: null, closed: false, views: new Map() });
    this.id = conversation?.id ?? null;
    this.turns = conversation ? turnsOf(conversation.messages) : greetingTurns(character);
    const last = this.turns.at(-1);
    if (last?.said && !last.replies.length) last.trouble = { text: "This was not answered yet.", until: 0 };
    this.room = buildRoom(host, character, {
      say: (text) => this.say(text),
      stop: () => this.stopping?.abort(),
      rate: () => opinions.rate(standsAt(this.turns), character.name, tell),
      swipe: (li, step) => this.swipe([...this.views].find(([, view]) => view.node === li)?.[0] ?? this.turns.at(-1), step),
      draft: (text) => this.keepDraft(text),
    });
    this.turns.forEach((turn) => this.addView(turn));
    const draft = sessionStorage.getItem(this.draftName) ?? "";
    this.room.put(last?.trouble && last.said.text === draft ? "" : draft); // it stands there already, to be tried again
    this.show();
    this.room.toEnd();
    this.room.focus();
  }

  close() {
    this.closed = true;
    this.stopping?.abort();
  }

  get draftName() {
    return `flywheel.draft.${this.id ?? this.character.id}`;
  }

  /** What is being written outlives a reload of the page. */
  keepDraft(text) {
    if (this.closed) return;
    if (text) sessionStorage.setItem(this.draftName, text);
    else sessionStorage.removeItem(this.draftName);
  }

  addView(turn) {
    const { name } = this.character;
    const shown = () => turn.replies[turn.viewed];
    const view = turnView(turn, name, {
      react: (reaction, mark) => opinions.react(shown(), reaction, mark, { refresh: () => this.show(), tell: this.tell }),
      edit: (text) => opinions.edit(shown(), text, this.tell),
      report: () => opinions.report(shown(), name, this.tell),
      swipe: (step) => this.swipe(turn, step),
      again: () => this.stopping || this.answer(turn, shown().id),
      retry: () => this.stopping || turn.trouble.until > Date.now() || this.answer(turn, turn.trouble.replaces ?? null),
    });
    this.views.set(turn, view);
    this.room.list.append(view.node);
  }

  show() {
    for (const [turn, view] of this.views) view.show({ last: turn === this.turns.at(-1), busy: Boolean(this.stopping) });
    this.room.busy(Boolean(this.stopping));
  }

  say(text) {
    const before = stoodAt(this.turns);
    const failed = this.turns.findLast((turn) => turn.trouble);
    if (failed) failed.trouble = failed.replies.length ? null : { text: "This was not answered. The conversation went on without it.", over: true };
    const turn = newTurn({ id: null, text });
    turn.parent = standsAt(this.turns)?.id ?? null;
    turn.greeting = this.id ? 0 : Math.max(0, this.turns[0]?.viewed ?? 0);
    turn.picked = wentBack(before) ? before.replies[before.chosen].id : null;
    this.turns.push(turn);
    this.addView(turn);
    this.answer(turn, null);
  }

  /** Have a reply written for a turn; `replaces` is the one that it is another of. */
  async answer(turn, replaces) {
    const stopping = (this.stopping = new AbortController());
    const stood = turn.viewed;
    const reply = newReply();
    reply.writing = true;
    turn.trouble = null;
    turn.replies.push(reply);
    turn.viewed = turn.chosen = turn.replies.length - 1;
    this.show();
    this.room.toEnd();
    try {
      await this.open(turn);
      await this.pick(turn);
      for await (const piece of api.streamReply(this.request(turn, replaces), stopping.signal)) {
        Object.assign(reply, { id: piece.id, text: reply.text + piece.text, finish: piece.finish ?? reply.finish, fallback: reply.fallback || piece.fallback });
        turn.said.id = piece.said;
        this.room.follow(() => this.views.get(turn).write());
      }
      announce(`${this.character.name}: ${reply.text}`);
      this.keepDraft(this.room.field.value);
    } catch (error) {
      this.onTrouble(error, turn, reply, stood, replaces);
    }
    reply.writing = false;
    this.stopping = null;
    this.room.follow(() => this.show());
    if (turn.trouble) this.room.toEnd();
  }

  request(turn, replaces) {
    return {
      model: this.character.id, messages: [{ role: "user", content: turn.said.text }], flywheel_conversation: this.id,
      ...(replaces ? { flywheel_regenerate: replaces } : turn.parent ? { flywheel_parent: turn.parent } : {}),
    };
  }

  /** What failed stays said: the turn keeps its text and says what to do. A reply that the user stopped is kept. */
  onTrouble(error, turn, reply, stood, replaces) {
    const stopped = error.name === "AbortError";
    if (stopped && reply.text) {
      reply.finish = "cancelled";
      this.keepDraft(this.room.field.value);
      return;
    }
    if (!stopped && !(error instanceof api.ApiError)) console.error(error);
    turn.replies.splice(turn.replies.indexOf(reply), 1);
    turn.viewed = turn.chosen = Math.min(stood, turn.replies.length - 1);
    const until = error.retryAfter ? Date.now() + error.retryAfter * 1000 : 0;
    turn.trouble = { text: stopped ? "Stopped before there was a reply." : opinions.sentence(error), until, replaces };
    if (!replaces) this.keepDraft(this.room.field.value || turn.said.text);
  }

  /** Begin the conversation with the greeting that was chosen, where it is not begun. */
  async open(turn) {
    if (this.id) return;
    const opened = await api.openConversation(this.character.id, turn.greeting);
    sessionStorage.removeItem(this.draftName);
    this.id = opened.id;
    const [begun] = turnsOf(opened.messages);
    const [first] = this.turns;
    if (begun && first !== turn) Object.assign(first, { replies: begun.replies, chosen: begun.chosen, viewed: begun.chosen });
    turn.parent = begun ? standsAt([begun]).id : null;
    this.onOpened(opened);
    this.keepDraft(turn.said.text);
  }

  /** Going on from an older alternative is a choice between them. */
  async pick(turn) {
    if (turn.picked) await api.feedback(turn.picked, "pick");
    turn.picked = null;
  }

  swipe(turn, step) {
    const next = turn ? turn.viewed + step : -1;
    if (this.stopping || next < 0 || next >= turn.replies.length) return;
    turn.viewed = next;
    if (turn === this.turns.at(-1)) turn.chosen = next;
    this.show();
    announceViewed(turn);
  }
}

/** How a conversation begins before it exists: the character's greetings, one of which the user goes on from. */
function greetingTurns(character) {
  if (!character.greetings.length) return [];
  const turn = newTurn(null, character.greetings.map((content) => newReply({ content })));
  turn.viewed = turn.chosen = 0;
  return [turn];
}
