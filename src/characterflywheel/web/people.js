// The left pane: whom one can talk to, and the conversations one had. The welcome of an empty talk pane.

import * as api from "./api.js";
import { ago, el, hueOf, portrait } from "./dom.js";

const FIRST = 3;
const PAGE = 20;
const byId = (id) => document.getElementById(id);

/** The lists. `characters` and `recent` are what the service said last. */
export class People {
  constructor() {
    this.characters = [];
    this.recent = [];
    this.next = null;
    this.shown = FIRST;
    byId("search").addEventListener("input", () => this.showCharacters());
    byId("recent-more").addEventListener("click", () => this.more());
  }

  async load() {
    const [characters, page] = await Promise.all([api.characters(), api.conversations(PAGE)]);
    this.characters = characters;
    this.take(page);
    byId("character-list").removeAttribute("aria-busy");
    this.showCharacters();
    this.showRecent();
  }

  take(page) {
    this.recent.push(...page.data);
    this.next = page.next;
  }

  /** A conversation has begun. */
  begun(conversation) {
    this.recent.unshift(conversation);
    this.showRecent();
    this.showCharacters();
  }

  async more() {
    this.shown += PAGE;
    if (this.shown > this.recent.length && this.next) this.take(await api.conversations(PAGE, this.next));
    const first = byId("recent-list").children.length;
    this.showRecent();
    byId("recent-list").children[first]?.querySelector("a").focus();
  }

  knows(id) {
    return this.characters.some((one) => one.id === id);
  }

  /** A character; one that has left still has its name in old conversations. */
  character(id, name = id) {
    return this.characters.find((one) => one.id === id) ?? { id, name, traits: [], greetings: [], category: "" };
  }

  showRecent() {
    byId("recent").hidden = this.recent.length === 0;
    byId("recent-list").replaceChildren(...this.recent.slice(0, this.shown).map((one) => {
      const character = this.character(one.character, one.character_name);
      return el("li", {}, el("a", { href: `#talk/${one.id}` }, portrait(character, "small"),
        el("span", { class: "lines" }, el("b", { text: character.name }), el("small", { text: ago(one.created_at) }))));
    }));
    byId("recent-more").hidden = this.shown >= this.recent.length && !this.next;
    this.mark();
  }

  showCharacters() {
    const wanted = byId("search").value.toLocaleLowerCase().split(/\s+/).filter(Boolean);
    const found = this.characters.filter((one) => {
      const words = [one.name, one.category, ...one.traits].join(" ").toLocaleLowerCase();
      return wanted.every((word) => words.includes(word));
    });
    byId("character-list").replaceChildren(...found.map((one) => el("li", {}, el("a", { href: this.door(one) }, portrait(one),
      el("span", { class: "lines" },
        el("span", { class: "first" }, el("b", { text: one.name }), el("i", { text: one.category })),
        el("small", { text: one.traits.join(", ") }))))));
    byId("none").textContent = found.length ? "" : this.characters.length ? "Nobody here fits these words." : "No characters yet.";
    this.mark();
  }

  /** Where a character's name leads: on with the newest conversation, or to a new one. */
  door(character) {
    const newest = this.recent.find((one) => one.character === character.id);
    return newest ? `#talk/${newest.id}` : `#with/${character.id}`;
  }

  /** Mark what is open. */
  mark() {
    for (const link of byId("lists").querySelectorAll("a")) {
      if (link.getAttribute("href") === location.hash) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  /** What fills the talk pane before somebody is chosen: a few characters, each with its first words. */
  welcome(host) {
    const day = Math.floor(Date.now() / 86_400_000);
    const few = this.characters.map((_, i, all) => all[(day + i * 5) % all.length]).filter((one, i, all) => all.indexOf(one) === i).slice(0, 4);
    host.replaceChildren(el("div", { class: "welcome" },
      el("h2", { text: "Who would you like to talk to?" }),
      el("ul", { class: "cards" }, ...few.map((one) => {
        const link = el("a", { class: "card hued", href: this.door(one) }, portrait(one), el("b", { text: one.name }),
          el("q", { text: one.greetings[0] ?? one.traits.join(", ") }));
        link.style.setProperty("--hue", hueOf(one.id));
        return el("li", {}, link);
      }))));
  }
}
