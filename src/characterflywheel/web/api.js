// The HTTP contract (DESIGN section 10) as the pages use it: one function a call, one kind of error.

/** What went wrong. `status` 0: the service was not reached. `retryAfter`: seconds, where the service says them. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { name: "ApiError", status, code, retryAfter });
  }
}

async function reach(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = { ...headers };
  if (body !== undefined) sent["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method, headers: sent, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The service cannot be reached.", { code: "unreachable" });
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => null); // a proxy may answer with something else than our JSON
  const wait = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ApiError(body?.error?.message ?? `The service answered ${response.status}.`, {
    status: response.status,
    code: body?.error?.code ?? null,
    retryAfter: Number.isFinite(wait) ? wait : null,
  });
}

/** Begin an anonymous session, or take up the one of this browser's cookie; says who the visitor is. */
export const session = async () => (await reach("/v1/session", { method: "POST" })).json();

/** A call in the visitor's session; one that has expired is begun anew. */
async function inSession(path, options) {
  try {
    return await reach(path, options);
  } catch (error) {
    if (error.status !== 401) throw error;
    await session();
    return reach(path, options);
  }
}

const read = async (path, options) => (await inSession(path, options)).json();
const at = encodeURIComponent;

export const setConsent = (consent) => read("/v1/me", { method: "PATCH", body: { consent } });
export const characters = async () => (await read("/v1/characters")).data;
export const conversations = (limit, before = null) =>
  read(`/v1/conversations?limit=${limit}${before ? `&before=${at(before)}` : ""}`);
export const conversation = (id) => read(`/v1/conversations/${at(id)}`);
export const openConversation = (character, greeting) =>
  read("/v1/conversations", { method: "POST", body: { character, greeting } });

/** What the user did after a reply. The same act twice is one signal. */
export const feedback = (messageId, kind, { value, text } = {}) =>
  read("/v1/feedback", { method: "POST", body: { message_id: messageId, kind, value, text } });

/**
 * A reply as it is written: yields `{id, said, text, finish, fallback}`, `text` being what is new and `said` the id
 * of the user's message. Throws ApiError, also where the stream breaks off. The same words said again in the same place
 * are the same message to the service, so that trying again says nothing twice.
 */
export async function* streamReply(body, signal) {
  const response = await inSession("/v1/chat/completions", { method: "POST", body: { ...body, stream: true }, signal });
  let finished = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, { status: 500, code: chunk.error.code });
    const choice = chunk.choices[0];
    if (!choice) continue;
    finished ||= Boolean(choice.finish_reason);
    yield {
      id: chunk.id, said: chunk.flywheel_message, text: choice.delta.content ?? "",
      finish: choice.finish_reason, fallback: Boolean(chunk.flywheel_fallback),
    };
  }
  if (!finished) throw new ApiError("The reply broke off.", { code: "broken_off" });
}

/** The `data` of each server-sent event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (waiting + value).split(/\r?\n\r?\n/);
      waiting = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The reply broke off.", { code: "broken_off" });
  } finally {
    reader.cancel().catch(() => {}); // nothing to do: it is being thrown away
  }
}

/** Calls of the review page, which go by key instead of session. */
export const reviewer = (secret) => {
  const headers = { Authorization: `Bearer ${secret}` };
  return {
    queue: async () => (await (await reach("/v1/reviews", { headers })).json()).data,
    picture: async (path) => URL.createObjectURL(await (await reach(path, { headers })).blob()),
    decide: async ({ id, version }, decision, reason) =>
      (await reach(`/v1/reviews/${at(id)}`, { method: "POST", body: { decision, reason, version }, headers })).json(),
  };
};
