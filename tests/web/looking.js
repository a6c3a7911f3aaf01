// What a person with other eyes or ears would trip over, asked of the page in the browser. Returns sentences.
() => {
  const found = [];
  const visible = (node) => node.checkVisibility({ checkVisibilityCSS: true, opacityProperty: true });
  const name = (node) => `${node.tagName.toLowerCase()}.${node.className} "${(node.textContent ?? "").trim().slice(0, 30)}"`;

  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const pixels = new Map();
  const rgba = (colour) => {
    if (!pixels.has(colour)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = colour;
      canvas.fillRect(0, 0, 1, 1);
      pixels.set(colour, [...canvas.getImageData(0, 0, 1, 1).data].map((c, i) => (i < 3 ? c : c / 255)));
    }
    return pixels.get(colour);
  };
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const contrast = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      const stops = style.backgroundImage.match(/(oklch|rgba?|color)\([^)]*\)/g);
      if (stops) return stops.map(rgba);
      const colour = rgba(style.backgroundColor);
      if (colour[3] > 0.99) return [colour];
    }
    return [rgba("white")];
  };
  const check = (node, colour, least) => {
    for (const ground of behind(node)) {
      const ratio = contrast(rgba(colour), ground);
      if (ratio < least) found.push(`contrast ${ratio.toFixed(2)} < ${least}: ${name(node)} ${colour} on ${ground}`);
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (walker.currentNode.textContent.trim() && visible(node) && !node.closest(".unseen, .skip, script, noscript, [aria-disabled=true], :disabled")) check(node, getComputedStyle(node).color, 4.5);
  }
  for (const icon of document.querySelectorAll("svg.icon")) if (visible(icon) && !icon.closest("[aria-disabled=true]")) check(icon.parentElement, getComputedStyle(icon).color, 3);
  for (const field of document.querySelectorAll("input:not([type=radio]), textarea")) {
    if (!visible(field)) continue;
    check(field.parentElement, getComputedStyle(field).borderTopColor, 3);
    if (field.placeholder) check(field, getComputedStyle(field, "::placeholder").color, 4.5);
  }

  let level = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    if (!visible(heading)) continue;
    const next = Number(heading.tagName[1]);
    if (next > level + 1 && level > 0) found.push(`h${next} follows h${level}: ${name(heading)}`);
    level = next;
  }
  const ids = [...document.querySelectorAll("[id]")].map((node) => node.id);
  for (const id of new Set(ids.filter((id, i) => ids.indexOf(id) !== i))) found.push(`two elements have the id ${id}`);
  for (const node of document.querySelectorAll("[aria-labelledby], [aria-describedby], label[for]"))
    for (const attribute of ["aria-labelledby", "aria-describedby", "for"])
      for (const id of (node.getAttribute(attribute) ?? "").split(" ").filter(Boolean))
        if (!document.getElementById(id)) found.push(`${attribute}=${id} leads nowhere`);
  for (const node of document.querySelectorAll("a, button, input, textarea, summary")) {
    if (!visible(node) || node.closest(".skip")) continue;
    const box = (node.closest("label") ?? node).getBoundingClientRect();
    if (box.width < 24 || box.height < 24) found.push(`${Math.round(box.width)} x ${Math.round(box.height)} is too small to hit: ${name(node)}`);
    if (node.tabIndex > 0) found.push(`tabindex ${node.tabIndex}: ${name(node)}`);
  }
  for (const node of document.querySelectorAll("*"))
    if (node.getBoundingClientRect().right > innerWidth + 1 && visible(node) && !node.closest(".unseen, .skip")) found.push(`out of the window: ${name(node)}`);
  if (document.documentElement.scrollWidth > innerWidth) found.push(`${document.documentElement.scrollWidth} wide in a window of ${innerWidth}`);
  return found;
}
