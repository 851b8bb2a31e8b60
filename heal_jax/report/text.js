// Elements and text. Texts come from problems and models: they are shown, never read as markup.

// An element: node("td.text.wide", {title: "..."}, child, [more], "text").
function node(name, properties = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  if (classes.length) made.className = classes.join(" ");
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (key in made && key !== "role") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return made;
}

// What could reorder or hide its surroundings: control and format characters (marks of direction among them), line and
// paragraph separators, lone surrogates, private and unassigned code points, what broken UTF-8 became. The two joiners
// are left: scripts and emoji need them, and they reorder nothing.
const HIDDEN = /(?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}\ufffd]/gu;

// As terminal.py writes it out: \x1b, \u202e, \U000e0001.
function writtenOut(character) {
  const code = character.codePointAt(0);
  const [letter, digits] = code < 0x100 ? ["x", 2] : code < 0x10000 ? ["u", 4] : ["U", 8];
  return character === "\r" ? "\\r" : `\\${letter}${code.toString(16).padStart(digits, "0")}`;
}

// One line of text, for places that hold no elements.
function plain(text) {
  return text.replace(HIDDEN, (found) => (found === "\ufffd" ? found : writtenOut(found))).replace(/\s+/gu, " ");
}

// Text with its hidden characters named and its line breaks marked; `breaks`: also broken there.
function visible(text, breaks = true) {
  const parts = [];
  let at = 0;
  for (const match of text.matchAll(new RegExp(`\\n|${HIDDEN.source}`, "gu"))) {
    if (match.index > at) parts.push(text.slice(at, match.index));
    at = match.index + match[0].length;
    if (match[0] === "\n") parts.push(node("span.newline", {}, "↵"), breaks ? "\n" : "");
    else if (match[0] === "\ufffd") parts.push(node("span.control", { title: "U+FFFD: broken UTF-8" }, "\ufffd"));
    else parts.push(node("span.control", { title: "shown, not obeyed" }, writtenOut(match[0])));
  }
  if (at < text.length) parts.push(text.slice(at));
  return parts;
}

// A name or short text of any direction that leaves its surroundings alone.
function isolated(text, name = "bdi") {
  return node(name, { dir: "auto" }, plain(text));
}

function figure(value, digits = 2) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value < 0 ? "−∞" : "∞";
  const size = Math.abs(value);
  return (value < 0 ? "−" : "") + (size >= 1e6 ? size.toExponential(1) : size.toFixed(digits));
}

function signed(value, digits = 2) {
  if (value === null || !Number.isFinite(value)) return figure(value);
  const shown = figure(Math.abs(value), digits);
  return Number(shown) === 0 ? shown : (value < 0 ? "−" : "+") + shown;
}

function count(value) {
  return value.toLocaleString("en-US");
}

function percent(value) {
  return value === null ? "–" : `${(100 * value).toFixed(1)} %`;
}
