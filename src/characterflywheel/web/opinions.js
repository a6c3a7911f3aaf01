// What the user thinks of a reply or a conversation, told to the service as signals.

import * as api from "./api.js";
import { announce } from "./dom.js";
import { askOpinion, askReport } from "./dialogs.js";

/** What to tell the user about an error, in words of the page where it knows better than the service. */
export function sentence(error) {
  if (error.code === "unreachable") return navigator.onLine ? "The service cannot be reached at the moment." : "You are offline.";
  if (error.code === "rate_limited") return "That was a little fast.";
  if (error.status === 429) return "Many people are talking at once.";
  if (error.code === "model_not_found" || error.code === "character_not_found") return "This character is no longer here.";
  if (error.status >= 500) return "That did not work, and it is not your fault.";
  return error.message || "That did not work.";
}

/** React to a reply: shown at once, taken back if it did not arrive. What was given stays; thumbs exclude each other. */
export async function react(reply, { kind, text, against }, mark, { refresh, tell }) {
  if (!reply.id || reply.signals.has(mark)) return;
  const had = new Set(reply.signals);
  reply.signals.add(mark);
  if (against) reply.signals.delete(against);
  refresh();
  try {
    await api.feedback(reply.id, kind, { text });
    announce("Noted.");
  } catch (error) {
    reply.signals = had;
    refresh();
    tell(sentence(error));
  }
}

/** Keep the user's wording of a reply; says whether it arrived. */
export async function edit(reply, text, tell) {
  try {
    await api.feedback(reply.id, "edit", { text });
  } catch (error) {
    tell(sentence(error));
    return false;
  }
  reply.edited = text;
  tell("Thank you. Your wording was kept.");
  return true;
}

/** Report a reply, with a reason asked for in a dialog. */
export async function report(reply, name, tell) {
  const sent = await askReport(name, (reason) => api.feedback(reply.id, "report", { text: reason }));
  if (sent) tell("Thank you. The report was sent.");
}

/** Rate a conversation by its newest reply, and say something about it, in a dialog. */
export async function rate(reply, name, tell) {
  if (!reply) {
    tell(`Say something to ${name} first.`);
    return;
  }
  const sent = await askOpinion(name, async ({ rating, text }) => {
    if (rating !== null) await api.feedback(reply.id, "rating", { value: rating });
    if (text !== null) await api.feedback(reply.id, "feedback", { text });
  });
  if (sent) tell("Thank you for your opinion.");
}
