"""The report's browser of rollouts, in a real headless Chromium: nothing in a text runs, and what is shown is what the
Parquet files hold."""

import functools
import json
import re
import shutil
import time
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, sync_playwright
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from heal_jax import config, gear, store
from heal_jax.model.tokenizer import Tokenizer as Ours
from heal_jax.report import page as report
from heal_jax.report import payload
from heal_jax.report.data import load
from heal_jax.report.ran import reproduce
from heal_jax.report.terminal import clean

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
NASTY = (
    "<script>ran=1</script></script><img src=x onerror=ran=1><svg onload=ran=1><style>*{display:none}</style>"
    "<iframe srcdoc='<script>parent.ran=1</script>'></iframe><!--<script>]]>&lt;b&gt;\"'`${ran=1} javascript:ran=1"
    "\u202e\u2066abc\u200f\u05d0\u05d1\u2028\x1b[2J\x00\ufeff\ufffd"
)
REORDERING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
BROKEN = 0xFF  # a byte that is never in UTF-8
LEVELS = ["easy", "hard"]
STRATA = ["solved", "solved", "hard", "unsolved", "unsolved"]
PREFIX = 2  # steps that a repair keeps


class Maker:
    """Rollouts of a tokenizer whose tokens are bytes: most characters are several tokens, and some are broken."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {"<end>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"})
        )
        (folder / "config.json").write_text(json.dumps({"eos_token_id": 0}))
        self.folder, self.size = folder, len(vocabulary)
        self.ours = Ours(folder, self.size)
        # GPT-2's bytes: those that are printable stand for themselves, the others for what follows 255.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = iter(range(256, 512))
        self.ids = [vocabulary[chr(b if b in printable else next(others))] for b in range(256)]
        self.rng = np.random.default_rng(5)

    def encode(self, text: str) -> list[int]:
        return [self.ids[byte] for byte in text.encode()]

    def rollout(self, problem: dict, name: str, grade: str, steps: list[list[int]], kept: int = 0, **row) -> dict:
        answer = problem["answer"] if grade == "correct" else f"no{NASTY}"
        tokens = [*sum(steps, []), *self.encode(f"so \\boxed{{{answer}}}"), 0]
        starts = np.cumsum([0, *map(len, steps)]).tolist()
        prefix = starts[kept]
        entropy = self.rng.gamma(0.3, 1.5, len(tokens) - prefix).astype(np.float32)
        scored = len(starts) - kept + 1
        expected = np.exp(self.rng.gamma(2, 0.2, scored)).astype(np.float32)
        ppl = (expected * np.exp(self.rng.normal(0.05, 0.08, scored))).astype(np.float32)
        ratio = ppl / (expected + 0.01)
        prompt = self.encode(problem["question"])
        hint = self.encode(f"Hint {NASTY}: {problem['answer']}\n\n") if name.startswith("repair") else []
        return {
            "problem_id": problem["id"], "rollout_id": f"{problem['id']}/{name}/s0", "kind": name.split("/")[0],
            "prompt_tokens": prompt, "tokens": tokens, "context_tokens": prompt + tokens[:prefix] + hint,
            "entropy": entropy, "logprob": -entropy, "sampling_logprob": -entropy, "step_starts": starts,
            "finish": "stop", "grade": grade, "pure_score": 0.8 * ratio.mean() + 0.2 * ratio.max(), "step_ppl": ppl,
            "step_expected_ppl": expected, "text": self.ours.text(tokens), "answer": answer,
            "kept_tokens": prefix if hint else None, **row,
        }  # fmt: skip

    def steps(self, count: int) -> list[list[int]]:
        made = [self.encode(f"step {k} {self.rng.integers(10**6)}, \u00e9\u05d0\u05d1\U0001f600 {NASTY[k * 30 :]}.\n\n")
                for k in range(count)]  # fmt: skip
        made[0].insert(5, self.ids[BROKEN])
        return made


def make_run(root: Path) -> Path:
    maker, run = Maker(root.parent / "teacher"), store.RunDirectory(root)
    problems, rows, decisions = [], [], []
    for p, stratum in enumerate(STRATA):
        problem = {
            "id": f"p{p}{NASTY if p else ''}", "source": "jsonl:x", "split": "train", "level": LEVELS[p % 2] + NASTY,
            "question": f"question {p}? {NASTY}" + "x" * 8_000 * (p == 4), "answer": str(1000 + p),
            "pass_rate": [1.0, 0.75, 0.25, 0.0, 0.0][p], "stratum": stratum,
        }  # fmt: skip
        problems.append(problem)
        made: list[tuple[dict, int, str]] = []
        for n in range(4):
            right = n < problem["pass_rate"] * 4
            steps = maker.steps(8)
            if (p, n) == (0, 0):
                steps[1] = maker.encode("y" * 8_000 + "\n\n")  # a line without end
            row = maker.rollout(problem, f"base/{n}", "correct" if right else ("wrong", "truncated")[n % 2], steps)
            made.append((row, int(right), "kept" if right else row["grade"]))
            for m in range(3 if stratum == "unsolved" and n < 2 else 0):
                grade = ("correct", "correct", "unparsable")[m]
                tail = [*steps[:PREFIX], *maker.steps(3)]
                repair = maker.rollout(problem, f"repair/{n}.{m}", grade, tail, PREFIX,
                                       parent_id=row["rollout_id"], breakpoint_step=PREFIX + 1)  # fmt: skip
                if m == 2:
                    repair |= {"pure_score": None, "step_ppl": None, "step_expected_ppl": None}
                stage, reason = [(3, "kept"), (0, f"PURE 1.3 > 1.12{NASTY}"), (0, grade)][m]
                made.append((repair, stage, reason))
        if stratum != "solved":
            made.append((maker.rollout(problem, "hindsight/0", "correct", maker.steps(4)), 2, "kept"))
        rows += [row for row, _, _ in made]
        decisions += [{"rollout_id": r["rollout_id"], "stage": s, "kept": s > 0, "reason": why} for r, s, why in made]
    store.write_text(root / "config.yaml", config.dump(config.Config()))
    store.write_table(root / "problems.parquet", problems, store.PROBLEMS)
    store.write_table(root / "decisions.parquet", decisions[:-1], store.DECISIONS)  # one is not decided yet
    for kind in ("base", "hindsight", "repair"):
        run.shard(f"rollouts/{kind}-00000", lambda kind=kind: [row for row in rows if row["kind"] == kind])
    teacher = {"path": str(maker.folder), "sha256": "0" * 64, "vocab_size": maker.size}
    stages = {name: {} for name in ("sample", "hindsight", "repair", "curate")}
    run.update(models={"teacher": teacher}, stages=stages, versions={"jax": f"0\ud800{NASTY}"})
    report.write_report(root)
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("hostile") / "run")


@pytest.fixture(scope="module")
def chromium():
    """The Chromium of the machine, else playwright's own."""
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        path = found or playwright.chromium.executable_path
        if not Path(path).exists():
            pytest.fail("no Chromium: `apt-get install chromium`, or `playwright install chromium`", pytrace=False)
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Opened:
    """A report in a tab of its own; `problems`: what it did that it must not."""

    def __init__(self, chromium, root: Path, width: int = 1400, fragment: str = ""):
        self.address = (root / "report.html").as_uri()
        self.context = chromium.new_context(viewport={"width": width, "height": 900}, offline=True)
        self.context.set_default_timeout(20_000)
        self.page: Page = self.context.new_page()
        self.problems: list[str] = []
        note = self.problems.append
        self.context.on("request", lambda r: r.url.split("#")[0] == self.address or note(f"asks for {r.url[:200]}"))
        self.page.on("console", lambda m: m.type in ("error", "warning") and note(f"console: {m.text}"))
        self.page.on("pageerror", lambda error: note(f"error: {error}"))
        self.page.on("dialog", lambda dialog: (note("dialog"), dialog.dismiss()))
        self.page.add_init_script(
            "window.broken = []; addEventListener('securitypolicyviolation', (e) => broken.push(e.violatedDirective))"
        )
        self.page.goto(self.address + fragment)
        self.until("() => document.querySelector('.detail > *')")

    def check(self) -> None:
        """That nothing ran but the page's own scripts, and these without complaint."""
        assert self.problems == []
        assert self.page.evaluate("[typeof ran, broken]") == ["undefined", []]
        texts = "document.querySelectorAll('#browser script, #browser iframe, #browser img, #browser style').length"
        assert self.page.evaluate(texts) == 0
        assert not REORDERING.search(
            self.page.evaluate("[...document.querySelectorAll('header, main')].map((e) => e.textContent).join()")
        )

    def count(self) -> int:
        return int(self.page.locator(".count").inner_text().split(" ")[0].replace(",", ""))

    def open(self, rollout_id: str) -> None:
        self.page.evaluate("id => { location.hash = '#rollout=' + encodeURIComponent(id) }", rollout_id)
        self.titled(plain(rollout_id))

    def titled(self, title: str) -> None:
        same = "title => document.querySelector('.detail h3')?.textContent === title"
        self.until(same, title)

    def until(self, condition: str, argument: object = None) -> None:
        """Playwright's own wait evaluates text inside the page, which the page forbids."""
        end = time.monotonic() + 20
        while not self.page.evaluate(condition, argument):
            assert time.monotonic() < end, f"never: {condition}"
            self.page.wait_for_timeout(20)


@pytest.fixture
def opened(chromium, root):
    made = []

    def make(root: Path = root, **settings) -> Opened:
        made.append(Opened(chromium, root, **settings))
        return made[-1]

    yield make
    for one in made:
        one.check()
        one.context.close()


def plain(text: str) -> str:
    """A name as the page shows it: what could reorder its surroundings is named."""
    return re.sub(r"\s+", " ", clean(text))


def stored(root: Path) -> list[dict]:
    """Rollouts with their problem and decision, from the Parquet files."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted((root / "rollouts").glob("*.parquet"))])
    problems = {row["id"]: row for row in pq.read_table(root / "problems.parquet").to_pylist()}
    decisions = {row["rollout_id"]: row for row in pq.read_table(root / "decisions.parquet").to_pylist()}
    return [row | {"of": problems[row["problem_id"]], "decision": decisions.get(row["rollout_id"])}
            for row in table.to_pylist()]  # fmt: skip


def pure(row: dict) -> str:
    score = row["pure_score"]
    return "not scored" if score is None else "passes" if score <= 1.12 else "fails"


def why(row: dict) -> str:
    decision = row["decision"]
    if decision is None:
        return "not decided yet"
    return f"kept, stage {decision['stage']}" if decision["kept"] else decision["reason"].split(" ")[0]


CHOICES = {
    "kind": lambda row: row["kind"],
    "grade": lambda row: row["grade"],
    "stratum": lambda row: row["of"]["stratum"],
    "level": lambda row: row["of"]["level"],
    "pure": pure,
    "why": why,
}


def test_every_filter_counts_what_the_files_hold(opened, root):
    rows, tab = stored(root), opened()
    page = tab.page
    assert tab.count() == len(rows)
    for name, of in CHOICES.items():
        expected = {plain(value): n for value, n in Counter(map(of, rows)).items()}
        options = page.locator(f"select[name={name}] option").all_inner_texts()[1:]
        found = {label: int(n) for label, n in (re.fullmatch(r"(.*) \((\d+)\)", option).groups() for option in options)}
        assert {label: n for label, n in found.items() if n} == expected
        for number, option in enumerate(options):
            page.select_option(f"select[name={name}]", index=number + 1)
            value = option.rpartition(" (")[0]
            shown = [row for row in rows if plain(of(row)) == value]
            assert tab.count() == len(shown) == found[value]
            # What the other filters say is what there is of their values among these.
            kinds = page.locator("select[name=kind] option").all_inner_texts()[1:]
            if name != "kind":
                there = Counter(row["kind"] for row in shown)
                assert kinds == [f"{kind} ({there[kind]})" for kind in ("base", "hindsight", "repair")]
        page.select_option(f"select[name={name}]", index=0)
    page.select_option("select[name=kind]", label=f"repair ({sum(row['kind'] == 'repair' for row in rows)})")
    page.fill("input[name=low]", "1.02")
    page.fill("input[name=high]", "1.2")
    some = [row for row in rows if row["kind"] == "repair" and row["pure_score"] and 1.02 <= row["pure_score"] <= 1.2]
    assert tab.count() == len(some) > 0
    page.click("button[type=reset]")
    tab.until(f"() => document.querySelector('.count').textContent === '{len(rows)} rollouts'")
    scores = sorted(row["pure_score"] for row in rows if row["pure_score"] is not None)
    for order, score in (("PURE score, lowest first", scores[0]), ("PURE score, highest first", scores[-1])):
        page.select_option("select[name=sort]", label=order)
        assert page.locator(".row .score").first.inner_text() == f"S {score:.2f}"


def test_search_and_fragment_find_a_rollout(opened, root):
    rows, tab = stored(root), opened()
    page = tab.page
    page.keyboard.press("/")
    page.keyboard.type("QUESTION 3?")
    assert tab.count() == sum(row["problem_id"].startswith("p3") for row in rows)
    page.fill("input[name=search]", "repair/0.1")
    found = [row for row in rows if "repair/0.1/" in row["rollout_id"]]
    assert tab.count() == len(found)
    page.locator(".row").first.click()
    title = page.locator(".detail h3").inner_text()
    assert title in {plain(row["rollout_id"]) for row in found}
    wanted = next(row["rollout_id"] for row in rows if "/hindsight/0/" in row["rollout_id"])
    tab.open(wanted)
    assert page.locator(".detail .badge").inner_text() == "kept, stage 2"
    page.go_back()
    tab.titled(title)
    page.fill("input[name=search]", "\ud800 no such thing")
    assert tab.count() == 0


def test_an_address_opens_its_rollout(opened, root):
    row = next(row for row in stored(root) if row["rollout_id"] == "p0/base/3/s0")
    tab = opened(fragment="#rollout=p0%2Fbase%2F3%2Fs0")
    tab.titled("p0/base/3/s0")
    page = tab.page
    assert "".join(page.evaluate("[...document.querySelectorAll('.t')].map((t) => t.piece.text)")) == row["text"]
    for wrong in ("#rollout=%ED%A0%80%E2%80%AE<img src=x onerror=ran=1>", "#rollout=nobody"):
        page.evaluate("hash => { location.hash = hash }", wrong)
        tab.until("() => document.querySelector('.detail').textContent.startsWith('There is no rollout')")


@pytest.mark.parametrize("surge", ["difference", "ratio", "zscore"])
def test_figures_are_those_of_the_files(opened, root, tmp_path, surge):
    """Of a repair and the failure beside it: texts, entropies, rises, hint, perplexities, ratios, answer."""
    copy = shutil.copytree(root, tmp_path / "run")
    spec = config.Config(gear=config.GearSpec(surge=surge))
    store.write_text(copy / "config.yaml", config.dump(spec))
    rows = {row["rollout_id"]: row for row in stored(copy)}
    repair = next(row for row in rows.values() if row["kind"] == "repair" and row["pure_score"])
    parent = rows[repair["parent_id"]]
    report.write_report(copy)
    tab = opened(copy)
    tab.open(repair["rollout_id"])
    cells = """[...document.querySelectorAll('.detail table')].map((t) => [...t.tBodies[0].rows].map((row) =>
               [...row.querySelectorAll('th, td:not(.text)')].map((cell) => cell.textContent.trim())))"""
    prefix, failed, repaired = tab.page.evaluate(cells)
    h = np.array([np.mean(part) for part in np.split(np.array(parent["entropy"]), parent["step_starts"][1:])])
    rise = np.asarray(gear.surge(h[None].astype(np.float32), surge))[0]
    assert [row[0] for row in prefix + failed] == [str(k) for k in range(len(h))] and len(prefix) == PREFIX
    assert [float(row[1]) for row in prefix + failed] == pytest.approx(h, abs=6e-4)
    shown = [float(row[2].replace("−", "-")) for row in (prefix + failed)[1:]]
    assert shown == pytest.approx(rise[1:], abs=2e-3, rel=1e-3)
    ppl, expected = np.array(repair["step_ppl"]), np.array(repair["step_expected_ppl"])
    ratio = ppl / (expected + spec.pure.epsilon)
    # The last step holds text besides the answer, so it is scored as well; the answer is the last line.
    assert [row[0] for row in repaired] == [*map(str, range(PREFIX, len(repair["step_starts"]))), "A"]
    figures = np.array([[float(value) for value in row[-3:]] for row in repaired])
    assert figures == pytest.approx(np.stack([ppl, expected, ratio], axis=1), abs=6e-3)
    pieces = tab.page.evaluate("[...document.querySelectorAll('.pair > div:last-child .t')].map((t) => t.piece)")
    assert [piece["entropy"] for piece in pieces] == pytest.approx(repair["entropy"], abs=payload.QUANTA[0] / 2 + 1e-6)
    kept = tab.page.evaluate("[...document.querySelectorAll('tr.kept .t')].map((t) => t.piece.text)")
    assert "".join(kept) + "".join(piece["text"] for piece in pieces) == repair["text"]
    text = tab.page.locator(".detail").text_content()
    assert f"S = {repair['pure_score']:.3f}" in text and "Hint <script>ran=1</script>" in text
    assert f"cut after {PREFIX} steps · breakpoint at step {PREFIX + 1}" in text
    assert tab.page.locator("tr.broken th").text_content() == str(PREFIX + 1)
    last = gear.last_candidate(len(h), spec.gear.window)[-1]
    assert tab.page.locator("tr.window th").all_text_contents() == [str(k) for k in range(1, last + 1)]
    assert tab.page.locator("tr.answer b").first.text_content() == plain(repair["answer"])


def test_keyboard(opened):
    tab = opened()
    page = tab.page
    selected = "() => document.querySelector('[aria-selected=true]')?.id"
    page.focus(".rows")
    first = page.evaluate(selected)
    page.keyboard.press("ArrowDown")
    tab.until(f"{selected} !== '{first}'")
    second = page.evaluate(selected)
    page.keyboard.press("j")
    tab.until(f"{selected} !== '{second}'")
    page.keyboard.press("k")
    tab.until(f"{selected} === '{second}'")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className.split(' ')[0]") == "detail"
    page.focus(".steps .text > div")
    page.keyboard.press("ArrowRight")
    assert re.match(r"\d+\.\d{3} nats token 0 ", page.locator("#value").inner_text())
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.className") == "rows"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "search"


def test_a_phone_has_no_sideways_scroll(opened, root):
    tab = opened(width=400)
    for row in {row["kind"]: row for row in stored(root)}.values():
        tab.open(row["rollout_id"])
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
    tab.open("p0/base/0/s0")  # a line of 8,000 letters
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400
    tab.open(next(row["rollout_id"] for row in stored(root) if row["problem_id"].startswith("p4")))
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400


def test_what_does_not_fit_is_said(opened, root, tmp_path, monkeypatch):
    rows = stored(root)
    whole = payload.pack(load(root))
    assert not whole.left_out and whole.listed == len(rows)
    monkeypatch.setattr(payload, "BLOCK", 1)  # a rollout a block
    monkeypatch.setattr(report.payload, "pack", functools.partial(payload.pack, budget=40_000, most=len(rows) - 4))
    copy = shutil.copytree(root, tmp_path / "run")
    report.write_report(copy)
    tab = opened(copy)
    note = tab.page.locator("section .todo", has_text="To keep this page small").inner_text()
    assert f"4 of {len(rows)} rollouts are not listed" in note
    assert tab.count() == len(rows) - 4
    tab.page.select_option("select[name=sort]", label="longest first")
    hidden = next(row["rollout_id"] for row in rows if row["rollout_id"] == "p0/base/0/s0")
    tab.open(hidden)
    assert "The text of this rollout is not in the page" in tab.page.locator(".detail").inner_text()
    first = next(row for row in rows if row["kind"] == "repair")
    tab.open(first["rollout_id"])
    assert tab.page.locator(".detail .t").count() > 100


def test_texts_that_are_not_utf8_are_named(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "run")
    table = pq.read_table(copy / "problems.parquet")
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe"))
    column = pa.chunked_array([pa.concat_arrays([broken, *table["question"].slice(1).chunks])])
    table = table.set_column(table.schema.get_field_index("question"), "question", column)
    pq.write_table(table, copy / "problems.parquet")
    assert any("UTF8" in note for note in load(copy).notes)
    report.write_report(copy)


def test_order_puts_repairs_and_their_failures_first(root):
    run = load(root)
    order, first = payload._order(run)
    table = run.rollouts.take(pa.array(order[:first]))
    repairs = pc.sum(pc.equal(run.rollouts["kind"], "repair")).as_py()
    parents = set(run.rollouts["parent_id"].to_pylist()) - {None}
    assert first == repairs + len(parents) and sorted(order) == list(range(run.rollouts.num_rows))
    assert all(kind == "repair" or name in parents
               for kind, name in zip(table["kind"].to_pylist(), table["rollout_id"].to_pylist()))  # fmt: skip


def test_the_other_sections(opened, root):
    tab = opened()
    page = tab.page
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
    drawn = "() => [...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))"
    tab.until(drawn)
    colour = "() => getComputedStyle(document.querySelector('.plot .xtick text')).fill"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    tab.until("light => getComputedStyle(document.querySelector('.plot .xtick text')).fill !== light", light)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator(".copied button").click()
    tab.until("() => document.querySelector('.copied button').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == reproduce(load(root).manifest, load(root).settings)
    link = page.locator("#pure a.id").first
    rollout_id = unquote(link.get_attribute("href").removeprefix("#rollout="))
    assert rollout_id in {row["rollout_id"] for row in stored(root)}
    link.click()
    tab.titled(plain(rollout_id))
    tab.until("() => Math.abs(document.querySelector('#repairs').getBoundingClientRect().top) < innerHeight")


def test_the_contents_by_keyboard(opened):
    page = opened().page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0  # seen where it has the focus
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#accuracy"
    page.reload()
    names = page.evaluate("[...document.querySelectorAll('nav a')].map((a) => a.textContent)")
    assert names == page.evaluate("[...document.querySelectorAll('h2')].map((h) => h.textContent)") and len(names) == 6
