// Small tools for the page: elements, icons, portraits, words. What people wrote goes in as text nodes only.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `props` are attributes; `on...` are listeners; `class`, `text`, `hidden` and the like as in HTML. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** An icon of icons.svg; always beside a name, so hidden from screen readers. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(SVG, "use"));
  svg.firstChild.setAttribute("href", `/static/icons.svg#${name}`);
  return svg;
}

/** A button that shows an icon; `label` is its name. */
export const iconButton = (name, label, onclick, props = {}) =>
  el("button", { type: "button", class: "tool", "aria-label": label, title: label, onclick, ...props }, icon(name));

/** A hue in degrees that belongs to an id, the same everywhere (FNV-1a, spread by the golden angle). */
export function hueOf(id) {
  let hash = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(id)) hash = Math.imul(hash ^ byte, 0x01000193) >>> 0;
  return Math.round((hash % 1009) * 137.508) % 360;
}

/** At most two initials: of the first and the last word that begin with a letter. */
export function initials(name) {
  const words = name.split(/[\s.,_-]+/u).filter((word) => /^\p{L}|^\p{N}/u.test(word) && !/^(the|dr|mr|mrs|ms)$/iu.test(word));
  const letters = words.map((word) => [...word][0].toUpperCase());
  return letters.length > 1 ? letters[0] + letters.at(-1) : (letters[0] ?? [...name][0] ?? "?");
}

/** A character's picture where it has one, else its initials on its colour. Decoration: the name stands beside it. */
export function portrait(character, size = "") {
  const node = el("span", { class: `portrait ${size}`, "aria-hidden": "true" });
  node.style.setProperty("--hue", hueOf(character.id));
  node.append(el("span", { text: initials(character.name) }));
  if (character.picture) {
    const image = el("img", { alt: "", loading: "lazy", src: character.picture, onerror: () => image.remove() });
    node.append(image);
  }
  return node;
}

/** Words of a character: `*what it does*` is set apart, as people write it in role play. Text nodes only. */
export function prose(node, text) {
  const parts = text.split(/(\*[^*\n]+\*)/);
  node.replaceChildren(
    ...parts.filter(Boolean).map((part) =>
      /^\*[^*\n]+\*$/.test(part) ? el("em", { text: part.slice(1, -1) }) : document.createTextNode(part),
    ),
  );
}

/** Say something to screen readers, politely, also if it was said before. */
export function announce(text) {
  const live = document.getElementById("live");
  live.textContent = live.textContent === text ? `${text}\u00a0` : text;
}

const LANGUAGE = document.documentElement.lang;
const STEPS = [[60, "second"], [60, "minute"], [24, "hour"], [7, "day"], [4.35, "week"], [12, "month"], [Infinity, "year"]];

/** "3 minutes ago", "yesterday". */
export function ago(when) {
  let amount = (Date.parse(when) - Date.now()) / 1000;
  if (Math.abs(amount) < 45) return "just now";
  for (const [many, unit] of STEPS) {
    if (Math.abs(amount) < many) return new Intl.RelativeTimeFormat(LANGUAGE, { numeric: "auto" }).format(Math.round(amount), unit);
    amount /= many;
  }
}

/** "in 8 seconds", "in 2 minutes": when to come back. */
export function soon(seconds) {
  const whole = Math.max(1, Math.ceil(seconds));
  const [amount, unit] = whole < 90 ? [whole, "second"] : [Math.ceil(whole / 60), "minute"];
  return `in ${amount} ${unit}${amount === 1 ? "" : "s"}`;
}
