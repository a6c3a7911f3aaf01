// The chat page: which view is open, consent, being offline.

import * as api from "./api.js";
import { Chat } from "./chat.js";
import { announce, el } from "./dom.js";
import { People } from "./people.js";

const talk = document.getElementById("talk");
const people = new People();
const HOME = document.title;
let chat = null;
let moves = 0;

/** Say something in passing. */
function tell(text) {
  document.querySelector(".toast")?.remove();
  const toast = el("p", { class: "toast", text });
  document.body.append(toast);
  announce(text);
  setTimeout(() => toast.remove(), 5000);
}

async function go() {
  const [view, id] = location.hash.slice(1).split("/");
  if (chat && view === "talk" && chat.id === id) return; // it has just begun here
  const move = ++moves;
  chat?.close();
  chat = null;
  people.mark();
  document.body.dataset.view = view ? "talk" : "people";
  if (view === "with" && people.knows(id)) {
    open(people.character(id), null);
  } else if (view === "talk") {
    try {
      const conversation = await api.conversation(id);
      if (move === moves) open(people.character(conversation.character, conversation.character_name), conversation);
    } catch (error) {
      if (move === moves) lost(error);
    }
  } else if (view) {
    lost(new api.ApiError("There is no such character.", { status: 404 }));
  } else {
    document.documentElement.style.removeProperty("--hue");
    document.title = HOME;
    people.welcome(talk);
  }
}

function open(character, conversation) {
  chat = new Chat(talk, character, conversation, {
    tell,
    onOpened(begun) {
      history.replaceState(null, "", `#talk/${begun.id}`);
      people.begun({ ...begun, character_name: character.name });
    },
  });
}

/** A conversation, or the whole service, that cannot be had. */
function lost(error) {
  const text = error.code === "conversation_not_found" ? "This conversation is not yours to read, or no longer there." : error.message;
  document.body.dataset.view = "talk";
  talk.replaceChildren(el("div", { class: "welcome" }, el("h2", { text }),
    el("p", {}, el("a", { href: "#", text: "All characters" }), " · ", el("button", { type: "button", class: "quiet", text: "Try again", onclick: start }))));
}

const consent = document.getElementById("consent");
consent.addEventListener("change", async () => {
  const wanted = consent.checked;
  try {
    consent.checked = (await api.setConsent(wanted)).consent;
    tell(consent.checked ? "Thank you. Characters may learn from your chats." : "Your chats are no longer used for training.");
  } catch (error) {
    consent.checked = !wanted;
    tell(error.message);
  }
});

function online() {
  document.getElementById("offline").hidden = navigator.onLine;
}
addEventListener("online", online);
addEventListener("offline", online);
addEventListener("hashchange", go);
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  (document.getElementById("words") ?? talk).focus();
});

async function start() {
  online();
  try {
    consent.checked = (await api.session()).consent;
    consent.disabled = false;
    people.recent = [];
    await people.load();
  } catch (error) {
    lost(error);
    return;
  }
  await go();
}

await start();
