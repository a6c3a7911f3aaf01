// A conversation as turns: what the user said, and the replies to it, of which one is gone on from. No page here.

/**
 * A turn: `said` is the user's message (null where the character began); `replies` its alternatives in order of
 * arrival; `chosen` the one that the conversation goes on from, `viewed` the one that is shown; `trouble` why there
 * is no reply: {text, until, replaces}, `until` the time in milliseconds from which one may try again, or {text, over}
 * where nobody will.
 */
export const newTurn = (said, replies = []) => ({
  said, replies, chosen: replies.length - 1, viewed: replies.length - 1, trouble: null,
});

/** What was given to a reply; of two thumbs the later one. */
function signalsOf(kinds) {
  const given = new Set(kinds);
  const thumbs = kinds.filter((kind) => kind.startsWith("thumb_"));
  for (const kind of thumbs.slice(0, -1)) if (kind !== thumbs.at(-1)) given.delete(kind);
  return given;
}

/** A reply, from the service's message or while it is being written (`id` null until the service names it). */
export const newReply = (message = {}) => ({
  id: message.id ?? null,
  text: message.content ?? "",
  fallback: message.fallback ?? false,
  finish: message.finish ?? null,
  signals: signalsOf(message.signals ?? []),
  writing: false,
});

/** The turns of a conversation's current path. Replies to the same message are alternatives. */
export function turnsOf(messages) {
  const turns = [];
  for (const message of messages.filter((one) => one.current)) {
    if (message.role === "user") {
      turns.push(newTurn({ id: message.id, text: message.content }));
    } else if (message.role === "assistant") {
      let turn = turns.at(-1);
      if (!turn || turn.replies.length) turns.push((turn = newTurn(null)));
      const others = message.parent_id
        ? messages.filter((one) => one.role === "assistant" && one.parent_id === message.parent_id)
        : [message];
      turn.replies = others.map(newReply);
      turn.chosen = turn.viewed = others.indexOf(message);
    }
  }
  return turns;
}

/** The turn of the reply that the conversation stands at: the last one that was answered. */
export const stoodAt = (turns) => turns.findLast((turn) => turn.replies[turn.chosen]?.id) ?? null;

/** The reply that the conversation stands at, or null. */
export function standsAt(turns) {
  const turn = stoodAt(turns);
  return turn ? turn.replies[turn.chosen] : null;
}

/** Whether the user went back to an older reply, so that going on from it is a choice. */
export const wentBack = (turn) => Boolean(turn && turn.replies.length > 1 && turn.chosen !== turn.replies.length - 1);
