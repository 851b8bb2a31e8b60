// The list of rollouts: filters, order, keyboard, and the fragment of the address that names one.

const ROW = 70; // pixels, as browser.css has it
const PURE = ["passes", "fails", "not scored"];
const FRAGMENT = "#rollout=";

const place = document.getElementById("browser");

function start(index) {
  const { rollouts, problems, settings } = index;
  const store = new Rollouts(index);
  const total = rollouts.id.length;
  const form = place.querySelector("form");
  const rows = place.querySelector(".rows");
  const space = place.querySelector(".space");
  const numbered = new Map(rollouts.id.map((id, i) => [id, i]));
  const score = rollouts.score.map(number);
  const pure = score.map((s) => (s === null ? 2 : s <= settings.threshold ? 0 : 1));
  const words = problems.id.map((id, p) => `${id}\n${problems.question[p]}\n${problems.answer[p]}`.toLowerCase());
  const rank = new Array(total).fill(index.examples.length);
  index.examples.forEach((i, position) => (rank[i] = position));

  // Filters by a choice: what each rollout has, and the names of that.
  const byProblem = (column) => ({ names: column.names, of: rollouts.problem.map((p) => column.of[p]) });
  const choices = {
    kind: rollouts.kind,
    grade: rollouts.grade,
    stratum: byProblem(problems.stratum),
    level: byProblem(problems.level),
    pure: { names: PURE, of: pure },
    why: rollouts.why,
  };
  const said = { stratum: "no stratum yet", level: "no level", grade: "no grade" };
  const names = Object.keys(choices);
  for (const name of names) {
    const options = choices[name].names.map((text, value) => new Option(plain(text) || said[name], value));
    form.elements[name].replaceChildren(new Option("any", ""), ...options);
    form.elements[name].closest("label").hidden = name === "level" && choices.level.names.length < 2;
  }

  const up = (of) => (a, b) => (of(a) ?? Infinity) - (of(b) ?? Infinity) || a - b;
  const down = (of) => (a, b) => (of(b) ?? -Infinity) - (of(a) ?? -Infinity) || a - b;
  const orders = {
    "examples first": up((i) => rank[i]),
    "PURE score, lowest first": up((i) => score[i]),
    "PURE score, highest first": down((i) => score[i]),
    "entropy, highest first": down((i) => number(rollouts.entropy[i])),
    "longest first": down((i) => rollouts.tokens[i]),
    "shortest first": up((i) => rollouts.tokens[i]),
    "hardest problem first": up((i) => problems.rate[rollouts.problem[i]]),
  };
  form.elements.sort.replaceChildren(...Object.keys(orders).map((text) => new Option(text)));

  let shown = [];
  let selected = -1;

  function filter() {
    const value = (name) => form.elements[name].value;
    const wanted = names.map((name) => (value(name) === "" ? -1 : Number(value(name))));
    const columns = names.map((name) => choices[name].of);
    const text = value("search").trim().toLowerCase();
    const found = words.map((word) => word.includes(text));
    const low = value("low") === "" ? null : Number(value("low"));
    const high = value("high") === "" ? null : Number(value("high"));
    const counts = names.map((name) => new Array(choices[name].names.length).fill(0));
    shown = [];
    for (let i = 0; i < total; i++) {
      if (text && !found[rollouts.problem[i]] && !rollouts.id[i].toLowerCase().includes(text)
        && !(rollouts.answer[i] || "").toLowerCase().includes(text)) continue;
      if (low !== null && !(score[i] !== null && score[i] >= low)) continue;
      if (high !== null && !(score[i] !== null && score[i] <= high)) continue;
      let misses = 0;
      let missed = -1;
      for (let f = 0; f < wanted.length && misses < 2; f++) {
        if (wanted[f] >= 0 && columns[f][i] !== wanted[f]) {
          misses += 1;
          missed = f;
        }
      }
      // An option says how many there would be with it: what misses by one filter alone counts for that filter.
      if (misses === 0) {
        shown.push(i);
        columns.forEach((column, f) => (counts[f][column[i]] += 1));
      } else if (misses === 1) counts[missed][columns[missed][i]] += 1;
    }
    shown.sort(orders[value("sort")]);
    names.forEach((name, f) => {
      [...form.elements[name].options].slice(1).forEach((option, k) => {
        option.textContent = `${plain(choices[name].names[k]) || said[name] || "none"} (${count(counts[f][k])})`;
      });
      form.elements[name].classList.toggle("set", wanted[f] >= 0);
    });
    const all = shown.length === total;
    place.querySelector(".count").textContent =
      all ? `${count(total)} rollouts` : `${count(shown.length)} of ${count(total)} rollouts`;
    rows.scrollTop = 0;
    space.style.height = `${shown.length * ROW}px`;
    draw();
  }

  // Only the rows in view are elements.
  function draw() {
    const first = Math.max(0, Math.floor(rows.scrollTop / ROW) - 4);
    const last = Math.min(shown.length, first + Math.ceil(rows.clientHeight / ROW) + 8);
    const made = [];
    for (let position = first; position < last; position++) made.push(row(shown[position], position));
    space.replaceChildren(...made);
    if (!shown.length) space.append(node("p.nothing", {}, "No rollout is like that. "));
    const active = space.querySelector("[aria-selected=true]");
    if (active) rows.setAttribute("aria-activedescendant", active.id);
    else rows.removeAttribute("aria-activedescendant");
  }

  function row(i, position) {
    const kind = rollouts.kind.names[rollouts.kind.of[i]];
    const problem = rollouts.problem[i];
    const grade = rollouts.grade.names[rollouts.grade.of[i]];
    const stage = rollouts.stage[i];
    const made = node("div.row", { id: `row-${i}`, role: "option", "aria-selected": String(i === selected),
      "aria-posinset": position + 1, "aria-setsize": shown.length },
    node("p", {}, node("span.name", {}, isolated(shortName(index, i))),
      stage ? node("span.stage", { title: `kept, stage ${stage}` }, `stage ${stage}`) : null),
    node("p.marks", {}, node(`span.kind.${["base", "hindsight", "repair"].includes(kind) ? kind : "other"}`, {}, plain(kind)),
      node(`span.grade.${grade === "correct" ? "good" : "bad"}`, {}, plain(grade || "no grade")),
      score[i] === null ? null : node(`span.score${pure[i] ? ".over" : ""}`, { title: "PURE score S" }, `S ${figure(score[i])}`)),
    node("p.about", {}, isolated(problems.question[problem].slice(0, 200))));
    made.style.top = `${position * ROW}px`;
    made.addEventListener("click", () => go(i));
    return made;
  }

  // Show a rollout by its address, so that the browser's back button leads to the one before; `step`: in its place.
  function go(i, step = false) {
    const target = FRAGMENT + encodeURIComponent(wellFormed(rollouts.id[i]));
    if (step) location.replace(target);
    else location.hash = target;
    if (!step && matchMedia("(max-width: 900px)").matches) place.querySelector(".detail").scrollIntoView();
  }

  function reveal(i) {
    const position = shown.indexOf(i);
    if (position < 0) return;
    const top = position * ROW;
    if (top < rows.scrollTop) rows.scrollTop = top;
    if (top + ROW > rows.scrollTop + rows.clientHeight) rows.scrollTop = top + ROW - rows.clientHeight;
  }

  const links = { go, step: (by) => step(by), back: () => { rows.focus(); rows.scrollIntoView({ block: "nearest" }); } };
  const detail = new Detail(place.querySelector(".detail"), index, store, links);

  function select(i) {
    selected = i;
    reveal(i);
    draw();
    return detail.show(i);
  }

  function step(by) {
    if (!shown.length) return;
    const position = shown.indexOf(selected);
    const next = position < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, position + by));
    if (shown[next] !== selected) go(shown[next], true);
  }

  // The rollout that the address names; without one the first of the list.
  function follow(landed) {
    if (!location.hash.startsWith(FRAGMENT)) {
      if (selected < 0 && shown.length) select(shown[0]);
      return;
    }
    let id = location.hash.slice(FRAGMENT.length);
    try {
      id = decodeURIComponent(id);
    } catch {
      // shown as it is
    }
    const i = numbered.get(id);
    if (i === undefined) detail.missing(id);
    else select(i);
    const box = place.getBoundingClientRect(); // links from other sections lead here, too
    if (landed || box.bottom < 0 || box.top > innerHeight) place.closest("section").scrollIntoView();
  }

  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  rows.addEventListener("scroll", draw, { passive: true });
  new ResizeObserver(draw).observe(rows);
  addEventListener("hashchange", () => follow(false));

  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const typing = event.target.closest?.("input, select, textarea");
    const inList = event.target === rows;
    const moves = { j: 1, k: -1, ...(inList ? { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8,
      Home: -total, End: total } : {}) };
    const box = place.getBoundingClientRect();
    const seen = box.top < innerHeight && box.bottom > 0;
    if (event.key === "Escape" && place.contains(event.target)) {
      if (typing && event.target.value && event.target.type === "search") return; // the browser empties it
      links.back();
    } else if (typing) {
      if (event.key !== "Enter" || event.target.name !== "search" || !shown.length) return;
      if (!shown.includes(selected)) go(shown[0]);
      rows.focus();
    } else if (event.key === "/") {
      form.elements.search.focus();
      form.elements.search.select();
    } else if (event.key in moves && seen) step(moves[event.key]);
    else if (event.key === "Enter" && inList) place.querySelector(".detail").focus();
    else return;
    event.preventDefault();
  });

  place.hidden = false;
  form.reset(); // browsers keep what was typed when a page is loaded again
  filter();
  follow(true);
}

// A rollout's name without that of its problem, where it begins with it.
function shortName(index, i) {
  const { id, problem } = index.rollouts;
  const name = index.problems.id[problem[i]];
  return id[i].startsWith(`${name}/`) ? `${name} ${id[i].slice(name.length + 1).replace(/\/s\d+$/, "")}` : id[i];
}

// encodeURIComponent refuses lone surrogates.
function wellFormed(text) {
  return text.toWellFormed ? text.toWellFormed() : text;
}

function failed(error) {
  const old = typeof DecompressionStream === "undefined";
  place.hidden = false;
  place.replaceChildren(node("p.todo", {}, old
    ? "This browser is too old to unpack the rollouts: any of 2023 or later shows them."
    : `The rollouts in this page cannot be read (${plain(String(error))}): write it again with heal report.`));
}

if (place) readIndex().then(start).catch(failed);
