// One rollout: what was asked, its steps with their entropies, what the teacher saw, what PURE measured, the verdict.

const SHADES = 10; // classes s0..s9 of the style sheet
const LONG_STEP = 48; // characters of a step on average from which its figures stand below its text

// s_k of step entropies (DESIGN section 2; gear.surge); null for the first.
function surges(h, kind) {
  return h.map((value, k) => {
    if (k === 0 || value === null || h[k - 1] === null) return null;
    if (kind === "ratio") return value / (h[k - 1] + 0.01);
    if (kind !== "zscore") return value - h[k - 1];
    const before = h.slice(0, k);
    const mean = before.reduce((a, b) => a + b) / k;
    return (value - mean) / (Math.sqrt(before.reduce((sum, x) => sum + (x - mean) ** 2, 0) / k) + 0.01);
  });
}

class Detail {
  constructor(place, index, store, links) {
    Object.assign(this, { place, index, store, links });
    const { rollouts } = index;
    this.children = new Map();
    this.siblings = new Map();
    rollouts.id.forEach((_, i) => {
      if (rollouts.parent[i] >= 0) add(this.children, rollouts.parent[i], i);
      add(this.siblings, rollouts.problem[i], i);
    });
    new ResizeObserver(() => this.fit()).observe(place);
    new Readout(place, document.getElementById("value"), index.quantum);
  }

  missing(id) {
    this.asked = -1;
    this.place.replaceChildren(node("p.todo", {}, "There is no rollout ", isolated(id), " in this page."));
  }

  async show(i) {
    this.asked = i;
    const { rollouts } = this.index;
    const parent = rollouts.parent[i];
    const one = await this.store.read(i);
    const other = parent >= 0 && one ? await this.store.read(parent) : null;
    if (this.asked !== i) return; // another one was asked for meanwhile
    const long = [one, other].some((r) => r && r.starts.length && letters(r) / r.starts.length > LONG_STEP);
    const top = scale([one, other]);
    const body = !one ? [this.absent(i)] : other ? this.repair(i, one, other, top) : this.single(i, one, top);
    this.long = long;
    this.fit();
    this.place.replaceChildren(this.head(i, one), ...body, this.family(i));
    this.place.scrollTop = 0;
  }

  // Figures stand below the text of a step where texts are long or there is little room.
  fit() {
    this.place.classList.toggle("stacked", this.long || this.place.clientWidth < 480);
  }

  head(i, one) {
    const { rollouts, problems, settings } = this.index;
    const p = rollouts.problem[i];
    const button = (text, label, act) => node("button", { type: "button", title: label, "aria-label": label, onclick: act }, text);
    const facts = [
      ["problem", isolated(problems.id[p])],
      ["level", problems.level.names[problems.level.of[p]] && isolated(problems.level.names[problems.level.of[p]])],
      ["stratum", plain(problems.stratum.names[problems.stratum.of[p]])],
      ["pass rate", percent(number(problems.rate[p]))],
      ["true answer", problems.answer[p] === null ? null : isolated(problems.answer[p], "b")],
      ["its answer", isolated(rollouts.answer[i] || "none", "b")],
      ["graded", plain(rollouts.grade.names[rollouts.grade.of[i]])],
      ["tokens", count(rollouts.tokens[i])],
      ["finish", one && one.finish],
    ];
    return node("div.head", {},
      node("div.bar", {}, node("h3", {}, isolated(rollouts.id[i])), this.verdict(i),
        node("span.tools", {},
          button("‹ list", "back to the list (Esc)", this.links.back),
          button("↑", "the one before (k)", () => this.links.step(-1)),
          button("↓", "the next one (j)", () => this.links.step(1)),
          button("copy link", "copy a link to this rollout", (event) => copy(event.target, location.href.split("#")[0] + FRAGMENT
            + encodeURIComponent(wellFormed(rollouts.id[i])))),
          one && button("copy text", "copy question and rollout", (event) => copy(event.target,
            `${problems.question[p]}\n\n${one.pieces.map((piece) => piece.text).join("")}`)))),
      node("dl.figures", {}, facts.filter(([, value]) => value).map(([name, value]) =>
        node("div", {}, node("dt", {}, name), node("dd", {}, value)))),
      one ? this.pure(i, one, settings) : null,
      node("div.question", { dir: "auto" }, visible(problems.question[p])));
  }

  verdict(i) {
    const { rollouts } = this.index;
    const stage = rollouts.stage[i];
    if (stage === null) return node("span.badge", {}, "not decided yet");
    if (stage > 0) return node("span.badge.kept", {}, `kept, stage ${stage}`);
    return node("span.badge", {}, "dropped: ", isolated(rollouts.reason.names[rollouts.reason.of[i]]));
  }

  // S, and what it is made of.
  pure(i, one, { threshold, epsilon, weight }) {
    const score = number(this.index.rollouts.score[i]);
    if (score === null) return node("p.pure", {}, "PURE: not scored");
    const ratios = ratioList(one, epsilon);
    const mean = ratios.reduce((a, b) => a + b, 0) / ratios.length;
    const parts = ratios.length
      ? ` = ${+(1 - weight).toFixed(4)} × mean ratio ${figure(mean, 3)} + ${+weight.toFixed(4)} × largest ratio ${figure(Math.max(...ratios), 3)}`
      : "";
    const passes = score <= threshold;
    return node("p.pure", {}, "PURE: S = ", node(`b${passes ? "" : ".over"}`, {}, figure(score, 3)), parts,
      passes ? ` ≤ ${threshold}: passes` : ` > ${threshold}: fails`);
  }

  absent(i) {
    return node("p.todo", {}, "The text of this rollout is not in the page, to keep it small: ",
      node("code", {}, "heal show DIR "), isolated(this.index.rollouts.id[i], "code"), " prints it.");
  }

  // A repair beside the failure that it came from: what they share, then both from the cut on.
  repair(i, one, other, top) {
    const { rollouts } = this.index;
    const at = rollouts.breakpoint[i];
    const cut = Math.min(one.kept, other.starts.length);
    const where = at === null ? "no breakpoint: a single step" : `breakpoint at step ${at}`;
    const prefix = cut ? [
      node("h4", {}, `Kept from the failed rollout: ${steps(cut)}, ${count(one.keptTokens)} tokens`),
      this.table(other, 0, cut, top, { surge: true, at, state: "kept" }),
    ] : [];
    return [
      this.charts([["failed rollout", other, { at, cut }], ["repair", one, { kept: cut, h: [...other.h.slice(0, cut), ...one.h.slice(cut)] }]]),
      legend(top, one.shaded, this.index.quantum),
      ...prefix,
      node("p.cut", {}, cut ? `cut after ${steps(cut)} · ${where} of the failed rollout` : `nothing is kept · ${where}`),
      node("div.pair", {},
        node("div", {}, node("h4", {}, "The failed rollout goes on ", this.link(rollouts.parent[i])),
          this.table(other, cut, other.starts.length, top, { surge: true, at }), this.after(other, top)),
        node("div", {}, node("h4", {}, "The repair"),
          this.hint(one, "the teacher alone sees"),
          this.table(one, cut, one.starts.length, top, { pure: true, answer: rollouts.answer[i] }), this.after(one, top))),
    ];
  }

  single(i, one, top) {
    const { rollouts } = this.index;
    const repairs = this.children.get(i) || [];
    const at = repairs.length ? rollouts.breakpoint[repairs[0]] : null;
    const kind = rollouts.kind.names[rollouts.kind.of[i]];
    return [
      this.charts([["step entropy", one, { at }]]),
      legend(top, one.shaded, this.index.quantum),
      kind === "repair" ? node("p.todo", {}, "The failed rollout that this repair came from is not in the page.") : null,
      this.hint(one, kind === "repair" ? "the teacher alone sees" : "the teacher was asked, with the answer"),
      this.table(one, 0, one.starts.length, top, { surge: kind === "base", at, pure: true, answer: rollouts.answer[i] }),
      this.after(one, top),
    ].filter(Boolean);
  }

  hint(one, title) {
    return one.hint ? node("div.hint", {}, node("b", {}, title), node("div", { dir: "auto" }, visible(one.hint.replace(/\n+$/, "")))) : null;
  }

  after(one, top) {
    const rest = one.pieces.slice(one.end);
    if (!rest.some((piece) => piece.text.trim())) return null;
    return node("div.after", {}, node("h4", {}, "After the thinking part"),
      node("div.text", { dir: "auto", tabIndex: 0 }, shaded(rest, one.end, top)));
  }

  // Steps from..to-1 as rows. surge: with the rise of the entropy; pure: with PURE's figures and the answer.
  table(one, from, to, top, { surge = false, pure = false, at = null, answer, state = "" }) {
    const { settings } = this.index;
    const rise = surges(one.h, settings.surge);
    const scored = pure && one.ppl.some((value) => value !== null) || pure && one.answer;
    const highest = Math.max(0.05, ...one.h.filter((value) => value !== null));
    const last = this.index.window[one.starts.length] ?? 0;
    const rows = [];
    for (let k = from; k < to; k++) {
      const end = k + 1 < one.starts.length ? one.starts[k + 1] : one.end;
      const inWindow = surge && k >= 1 && k <= last && one.starts.length > 1;
      rows.push(node(`tr${k === at && surge ? ".broken" : ""}${inWindow ? ".window" : ""}${state && "." + state}`, { "data-step": k },
        node("th", { scope: "row" }, String(k)),
        node("td.text", {}, node("div", { dir: "auto", tabIndex: 0, "aria-label": `tokens of step ${k}` },
          shaded(one.pieces.slice(one.starts[k], end), one.starts[k], top)),
        k === at && surge ? node("span.chip", {}, "breakpoint") : null),
        cell("entropy", meter(one.h[k], highest), figure(one.h[k], 3)),
        surge ? cell(settings.surge === "difference" ? "rise" : settings.surge, k ? signed(rise[k], 3) : "–") : null,
        scored ? purity(one.ppl[k], one.expected[k], settings) : null));
    }
    if (scored && one.answer) {
      rows.push(node("tr.answer", {}, node("th", { scope: "row" }, "A"),
        node("td.text", {}, "the answer, scored as one more step: ", isolated(answer || "", "b")), cell("", ""), surge ? cell("", "") : null,
        purity(...one.answer, settings)));
    }
    const heads = ["", "step", "entropy", surge ? (settings.surge === "difference" ? "rise" : settings.surge) : null,
      ...(scored ? ["PPL", "expected", "ratio"] : [])].filter((name) => name !== null);
    return node("table.steps", {}, node("thead", {}, node("tr", {}, heads.map((name) => node("th", { scope: "col" }, name)))),
      node("tbody", {}, rows));
  }

  // Step entropies as bars, one scale for all; the window, the breakpoint and the cut marked.
  charts(list) {
    const highest = Math.max(0.05, ...list.flatMap(([, one, { h }]) => h || one.h).filter((value) => value !== null));
    return node("div.charts", {}, list.map(([title, one, { at = null, cut = null, kept = 0, h = one.h }]) => {
      const last = this.index.window[h.length] ?? 0;
      const base = !kept && title !== "repair";
      const bars = h.map((value, k) => {
        const made = node(`i.bar${k === at && base ? ".broken" : ""}${base && k >= 1 && k <= last && h.length > 1 ? ".window" : ""}${k < kept || k < cut ? ".kept" : ""}${k === cut && base ? ".cutline" : ""}`,
          { title: `step ${k}: ${figure(value, 3)} nats` }, node("i"));
        made.firstChild.style.height = `${(100 * (value || 0)) / highest}%`;
        return made;
      });
      const marks = base ? [at === null ? null : node("span.mark.broken", {}, "breakpoint"), h.length > 1 ? node("span.mark.window", {},
        `window: steps 1–${Math.min(last, h.length - 1)} of ${h.length}`) : null, cut ? node("span.mark.kept", {}, "kept") : null]
        : [kept ? node("span.mark.kept", {}, "kept") : null];
      const label = `${title}: entropy of ${steps(h.length)}, up to ${figure(highest)} nats${at === null ? "" : `, breakpoint at step ${at}`}`;
      return node("figure", {}, node("div.bars", { role: "img", "aria-label": label }, bars),
        node("figcaption", {}, node("b", {}, title === "step entropy" ? title : `${title}: step entropy`), marks,
          node("span", {}, `highest ${figure(highest)} nats`)));
    }));
  }

  link(i, text) {
    const { rollouts } = this.index;
    return node("a", { href: FRAGMENT + encodeURIComponent(wellFormed(rollouts.id[i])) }, isolated(text || rollouts.id[i]));
  }

  // Links to the failure, the repairs and all other rollouts of the problem.
  family(i) {
    const { rollouts, problems } = this.index;
    const all = this.siblings.get(rollouts.problem[i]);
    const repairs = this.children.get(i) || [];
    const groups = [];
    if (rollouts.parent[i] >= 0) groups.push(["The failed rollout", [rollouts.parent[i]]]);
    if (rollouts.parent[i] >= 0) groups.push(["Repairs of the same failure", this.children.get(rollouts.parent[i])]);
    if (repairs.length) groups.push(["Repairs of this rollout", repairs]);
    rollouts.kind.names.forEach((name, k) => {
      const some = all.filter((j) => rollouts.kind.of[j] === k);
      if (some.length) groups.push([`All ${plain(name)} rollouts of the problem`, some]);
    });
    const near = groups.findIndex(([title]) => title.startsWith("All "));
    const block = ([title, list]) => node("div.group", {}, node("h4", {}, `${title} `, node("small", {}, count(list.length))),
      node("p.chips", {}, list.map((j) => {
        const chip = this.link(j, shortName(this.index, j).slice(problems.id[rollouts.problem[j]].length + 1) || rollouts.id[j]);
        const grade = rollouts.grade.names[rollouts.grade.of[j]];
        chip.className = `${grade === "correct" ? "good" : "bad"}${rollouts.stage[j] ? " kept" : ""}`;
        chip.title = `${plain(grade)}${rollouts.stage[j] ? `, kept, stage ${rollouts.stage[j]}` : ""}`;
        if (j === i) chip.setAttribute("aria-current", "true");
        return chip;
      })));
    return node("footer", {}, groups.slice(0, near).map(block),
      node("details", {}, node("summary", {}, `All ${count(all.length)} rollouts of this problem`), groups.slice(near).map(block)));
  }
}

// The value of the token under the pointer, or of the one that the arrow keys reach inside a step.
class Readout {
  constructor(place, box, quantum) {
    Object.assign(this, { place, box, quantum });
    place.addEventListener("pointerover", (event) => this.show(event.target.closest(".t")));
    place.addEventListener("click", (event) => this.show(event.target.closest(".t")));
    place.addEventListener("pointerleave", () => this.show(null));
    place.addEventListener("focusout", () => this.show(null));
    place.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      const tokens = [...(event.target.closest("[dir][tabindex]")?.querySelectorAll(".t") || [])];
      if (!by || !tokens.length) return;
      const at = tokens.indexOf(this.token);
      this.show(tokens[at < 0 ? 0 : Math.min(tokens.length - 1, Math.max(0, at + by))]);
      event.preventDefault();
    });
  }

  show(token) {
    this.token?.classList.remove("at");
    this.token = token;
    this.box.hidden = !token;
    if (!token) return;
    token.classList.add("at");
    const piece = token.piece;
    const value = piece.entropy === null ? "entropy not recorded" : `${figure(piece.entropy, this.quantum < 0.01 ? 3 : 2)} nats`;
    this.box.replaceChildren(node("b", {}, value), ` token ${count(token.number)} `,
      node("bdi.quoted", { dir: "auto" }, piece.end ? "end of the rollout" : piece.text ? visible(piece.text, false) : "part of a character"));
    const box = token.getClientRects()[0] || token.getBoundingClientRect();
    const width = this.box.offsetWidth;
    const room = document.documentElement.clientWidth;
    this.box.style.left = `${Math.max(4, Math.min(box.left, room - width - 4))}px`;
    this.box.style.top = `${box.top > 40 ? box.top - this.box.offsetHeight - 4 : box.bottom + 4}px`;
  }
}

function add(map, key, value) {
  if (map.has(key)) map.get(key).push(value);
  else map.set(key, [value]);
}

function letters(one) {
  return one.pieces.reduce((sum, piece) => sum + piece.text.length, 0);
}

function steps(n) {
  return `${count(n)} step${n === 1 ? "" : "s"}`;
}

// The end of the colour scale, in tenths of a nat, without the top 1 %: outliers make the rest pale.
function scale(list) {
  const values = list.flatMap((one) => (one ? one.pieces.map((piece) => piece.entropy) : [])).filter((value) => value !== null);
  values.sort((a, b) => a - b);
  const high = values.length ? values[Math.floor(0.99 * (values.length - 1))] : 0;
  return Math.max(0.1, Math.ceil(high * 10 - 1e-6) / 10);
}

function legend(top, known, quantum) {
  if (!known) return node("p.todo", {}, "Without the teacher’s tokenizer the texts are plain: no entropies of single tokens.");
  const cells = Array.from({ length: SHADES }, (_, k) => node(`i.s${k}`));
  return node("p.legend", {}, "token entropy, nats: 0 ", node("span.ramp", { "aria-hidden": "true" }, cells), ` ${top.toFixed(1)} or more`,
    node("small", {}, `to ${quantum} nats; point at a token, or focus a step and use ← →`));
}

// Tokens, each on a shade of its entropy.
function shaded(pieces, first, top) {
  return pieces.map((piece, k) => {
    const shade = piece.entropy === null ? "" : `.s${Math.min(SHADES - 1, Math.floor((piece.entropy / top) * SHADES))}`;
    // Line breaks at the end of a step are marked alone: the next step begins on its own line anyhow.
    const rest = pieces.slice(k + 1).some((later) => later.text.trim());
    const made = node(`i.t${shade}${piece.end ? ".end" : piece.text ? "" : ".part"}`, {},
      piece.end ? "⟨end⟩" : visible(piece.text, rest || Boolean(piece.text.trim() && !piece.text.endsWith("\n"))));
    made.piece = piece;
    made.number = first + k;
    return made;
  });
}

function cell(name, ...content) {
  return node("td", { "data-label": name || null }, content);
}

function meter(value, highest) {
  const made = node("span.meter", { "aria-hidden": "true" }, node("i"));
  made.firstChild.style.width = `${(100 * (value || 0)) / highest}%`;
  return value === null ? null : made;
}

function purity(ppl, expected, { epsilon, threshold }) {
  if (ppl === null || ppl === undefined) return [cell("PPL", ""), cell("expected", ""), cell("ratio", "")];
  const ratio = ppl / (expected + epsilon);
  return [cell("PPL", figure(ppl)), cell("expected", figure(expected)), cell("ratio", node(ratio > threshold ? "b.over" : "span", {}, figure(ratio)))];
}

function ratioList(one, epsilon) {
  const pairs = one.ppl.map((ppl, k) => [ppl, one.expected[k]]);
  if (one.answer) pairs.push(one.answer);
  return pairs.filter(([ppl]) => ppl !== null).map(([ppl, expected]) => ppl / (expected + epsilon));
}

async function copy(button, text) {
  const before = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    button.textContent = "not allowed here";
  }
  setTimeout(() => (button.textContent = before), 1500);
}
