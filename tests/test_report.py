"""The report page and `heal show`, on a small run directory made by hand."""

import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from heal_jax import config, store
from heal_jax.errors import InputError
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.report.page import write_report
from heal_jax.report.show import show
from heal_jax.world import tokenizer as world_tokenizer
from heal_jax.world.problems import question_of
from heal_jax.world.traces import ANSWER, HINDSIGHT, HINT, LEAK, PERFECT, Skill, read_answer, solve

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\u2028[bold red]&lt;b&gt;"
STRATA = {0: "solved", 1: "solved", 2: "solved", 3: "hard", 4: "hard", 5: "unsolved", 6: "unsolved", 7: "unsolved"}
SAMPLES, PATHS, REPAIRS = 10, 3, 6
FILES = [
    "config.yaml", "manifest.json", "problems.parquet", "decisions.parquet", "metrics.jsonl", "summary.json",
    "evaluation/heal-00000.parquet", "rollouts/base-00000.parquet", "rollouts/hindsight-00000.parquet",
    "rollouts/repair-00000.parquet",
]  # fmt: skip


class World:
    """Makes rollouts that look like the built-in world's, with invented entropies."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        world_tokenizer.save(folder)
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        self.eos = vocabulary[world_tokenizer.END]
        (folder / "config.json").write_text(json.dumps({"eos_token_id": self.eos}))
        self.folder, self.vocab_size = folder, len(vocabulary)
        self.tokenizer = Tokenizer(folder, self.vocab_size)
        self.rng = np.random.default_rng(7)

    def rollout(
        self, problem: dict, rollout_id: str, kind: str, text: str, kept: str = "", hint: str = "", **row
    ) -> dict:
        """`kept` and `text` are what the student sees; entropies surge in steps that begin with "!"."""
        steps = re.findall(r".+?(?:\n\n|\Z)", kept + text.replace("!", ""), re.DOTALL)
        marked = [part.startswith("!") for part in re.findall(r".+?(?:\n\n|\Z)", kept + text, re.DOTALL)]
        ids = [self.tokenizer.encode(step) for step in steps]
        starts = np.cumsum([0, *map(len, ids)])[:-1].tolist()
        entropy = [abs(self.rng.normal(0.75 if surge else 0.03, 0.25 if surge else 0.02)) for part, surge in zip(ids, marked)
                   for _ in part]  # fmt: skip
        n = len(self.tokenizer.encode(kept))
        tokens = [i for part in ids for i in part] + [self.eos]
        prompt = self.tokenizer.prompt(problem["question"])
        context = prompt + tokens[:n] + (self.tokenizer.encode(hint) if hint else [])
        entropy = entropy[n:] + [0.001]
        answer = re.search(r"boxed\{(.*)\}", text)
        return {
            "problem_id": problem["id"], "rollout_id": rollout_id, "kind": kind, "prompt_tokens": prompt,
            "tokens": tokens, "context_tokens": context, "entropy": entropy, "logprob": [-e for e in entropy],
            "sampling_logprob": [-e for e in entropy], "step_starts": starts, "finish": "stop",
            "grade": "correct" if answer and answer[1] == problem["answer"] else "wrong",
            "text": self.tokenizer.text(tokens), "answer": answer[1] if answer else None, **row,
        }  # fmt: skip

    def score(self, row: dict, bad: bool) -> None:
        """PURE figures of the steps after the cut, the answer last; a bad rollout jumps at its end."""
        steps = sum(start >= (row["kept_tokens"] or 0) for start in row["step_starts"]) + 1
        expected = 1 + abs(self.rng.normal(0, 0.1, steps))
        ppl = expected * (1 + abs(self.rng.normal(0, 0.02, steps)))
        if bad:
            ppl[-1] = 41.5
        ratio = ppl / (expected + 0.01)
        row |= {"step_ppl": ppl, "step_expected_ppl": expected, "pure_score": 0.8 * ratio.mean() + 0.2 * ratio.max()}


def make_run(root: Path, hostile: str = "") -> Path:
    """A finished run directory with the real schemas; with `hostile` in every text that a user's files can hold."""
    world = World(root.parent / "teacher")
    rng = np.random.default_rng(3)
    run = store.RunDirectory(root)
    settings = config.Config(
        sample=config.SampleSpec(n=SAMPLES), hindsight=config.HindsightSpec(prompt="{answer} {question} " + hostile)
    )
    store.write_text(root / "config.yaml", config.dump(settings))
    problems, rows, decisions = [], [], []

    def decide(row: dict, stage: int, reason: str) -> None:
        rows.append(row)
        decisions.append({"rollout_id": row["rollout_id"], "stage": stage, "kept": stage > 0, "reason": reason})

    for i, stratum in STRATA.items():
        terms = [int(x) for x in rng.integers(10**10, 10**11, 3)]
        problem = {
            "id": f"p{i}{hostile}", "source": "world:sums", "split": "train", "level": f"{stratum}{hostile}",
            "question": question_of(terms) + hostile, "answer": str(sum(terms)), "stratum": stratum,
            "pass_rate": {"solved": 0.9, "hard": 0.3, "unsolved": 0.0}[stratum],
        }  # fmt: skip
        problems.append(problem)
        failures = []
        for n in range(SAMPLES):
            right = n < round(problem["pass_rate"] * SAMPLES)
            steps, totals = solve(terms, PERFECT, rng)
            if not right:
                at = int(rng.integers(3, 4))
                wrong, totals = solve(terms, Skill(two=0, nine=0), rng, at, 0)
                totals = [0] * at + totals
                steps = [*steps[:at], "!" + wrong[0], *wrong[1:]]
            text = "".join(steps) + ANSWER.format(answer=read_answer(totals)) + (hostile if not right else "")
            row = world.rollout(problem, f"p{i}{hostile}/base/{n}/s0", "base", text)
            decide(row, int(right), "kept" if right else "wrong")
            failures += [] if right else [(row, steps)]
        steps, _ = solve(terms, PERFECT, rng)
        end = ANSWER.format(answer=problem["answer"])
        if stratum != "solved":
            row = world.rollout(
                problem, f"p{i}{hostile}/hindsight/0/s0", "hindsight", "".join(steps) + end, kept_tokens=None
            )
            shown = HINDSIGHT.format(question=problem["question"], answer=problem["answer"])
            row["context_tokens"] = world.tokenizer.prompt(shown)
            world.score(row, bad=i == 3)
            decide(row, *((0, "PURE 9.999 > 1.12") if i == 3 else (2, "kept")))
        for j, (parent, failed) in enumerate(failures[:PATHS] if stratum == "unsolved" else []):
            for n in range(REPAIRS):
                kept = failed[: j % 3]
                tail, reason = {
                    0: (steps[len(kept) :], "kept"),
                    1: (steps[len(kept) : 4], f"PURE 8.123 > 1.12{hostile}"),
                    2: ([LEAK, *steps[len(kept) :]], "talks about the hint"),
                }.get(n, (failed[len(kept) :], "wrong"))
                ending = end if n < 3 else ANSWER.format(answer="12")
                row = world.rollout(
                    problem, f"p{i}{hostile}/repair/{j}.{n}/s0", "repair", "".join(tail) + ending, "".join(kept),
                    HINT.format(answer=problem["answer"]) + hostile, parent_id=parent["rollout_id"], breakpoint_step=3,
                    kept_tokens=len(world.tokenizer.encode("".join(kept))),
                )  # fmt: skip
                if n < 3:
                    world.score(row, bad=n == 1)
                decide(row, 3 if reason == "kept" and i != 7 else 0, reason if i != 7 or n else "over the limit")
    store.write_table(root / "problems.parquet", problems, store.PROBLEMS)
    store.write_table(root / "decisions.parquet", decisions, store.DECISIONS)
    for kind in ("base", "hindsight", "repair"):
        made = [row for row in rows if row["kind"] == kind]
        run.shard(f"rollouts/{kind}-00000", lambda made=made: made)
    accuracy = {}
    for model, mean in {"teacher": 0.61, "student_base": 0.234, "rejection_sampling": 0.4567, "heal": 0.5678}.items():
        figures = {"mean": mean, "ci95": [mean - 0.041, mean + 0.039], "n": 80}
        levels = {f"{name}{hostile}": {"mean": round(mean * part, 4), "n": 40, "ci95": [mean * part - 0.1, mean * part + 0.1]}
                  for name, part in (("easy", 1.4), ("hard", 0.6))}  # fmt: skip
        accuracy[model] = {**figures, "per_level": levels}
        graded = [{"model": model, "problem_id": f"t{i}", "sample": 0, "tokens": [1, 2], "grade": "correct" if i < 80 * mean
                   else "wrong" + hostile} for i in range(80)]  # fmt: skip
        run.shard(f"evaluation/{model}-00000", lambda graded=graded: graded, store.EVALUATION)
    summary = {
        "problems": 8, "strata": {"solved": 3, "hard": 5, "unsolved": 3},
        "repair": {"problems": 3, "repaired_problems": 2, "candidates": 1154, "correct": 927, "leaked": 19, "kept": 106},
        "hindsight": {"candidates": 5, "correct": 5, "kept": 4},
        "stages": {"1": {"examples": 33, "tokens": 3333}, "2": {"examples": 4, "tokens": 444},
                   "3": {"examples": 6, "tokens": 666}},
        "accuracy": accuracy, "difference": {"mean": 0.1111, "ci95": [-0.0123, 0.2222]},
        "throughput": {"sample_tokens_per_s": 1234.5, "train_tokens_per_s": 4321.0},
        "seconds": {"base": 12.3, "repair": 45.6},
    }  # fmt: skip
    store.write_json(root / "summary.json", summary)
    lines = []
    for model, phases in {
        "heal": ["stage 1", "stage 1+2", "stage 1+2+3"],
        "rejection_sampling": ["stage 1"] * 3,
    }.items():
        for step in range(10, 310, 10):
            loss = 2.5 * np.exp(-step / 60) + 0.03 + 0.02 * rng.random()
            lines.append({"event": "train", "model": model, "step": step, "phase": phases[(step - 1) // 100] + hostile,
                          "loss": loss, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens": step * 100,
                          "loss_tokens": step * 60, "seconds": step * 0.1})  # fmt: skip
    store.write_text(root / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tra')
    teacher = {"path": str(world.folder), "sha256": "0" * 64, "vocab_size": world.vocab_size}
    stages = ("sample", "hindsight", "repair", "curate", "train", "evaluate", "export")
    run.update(versions={"jax": "0.10.2" + hostile}, device={"kind": "cpu", "count": 1}, models={"teacher": teacher},
               stages={name: {} for name in stages})  # fmt: skip
    return root


class Page(HTMLParser):
    """Elements and attributes of a page, its visible text, tables and script contents."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.shapes: set[tuple[str, tuple[str, ...]]] = set()
        self.classes: set[str] = set()
        self.scripts: list[tuple[dict, str]] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.inside: str | None = None
        self.cell = False
        self.feed(path.read_text(encoding="utf-8"))
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.shapes.add((tag, tuple(sorted(name for name, _ in attrs))))
        self.classes |= set((dict(attrs).get("class") or "").split())
        self.inside = tag if tag in ("script", "style") else None
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.inside = None
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] = self.scripts[-1][0], self.scripts[-1][1] + data
        elif self.inside is None:
            self.words.append(data)
            if self.cell:
                self.cells[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.cells if row and row[0] == name)

    def figures(self) -> list[dict]:
        return [json.loads(text) for attributes, text in self.scripts if attributes.get("type") == "application/json"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("plain") / "run")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("hostile") / "run", HOSTILE)


def test_figures_are_those_of_the_summary(plain):
    assert write_report(plain) == plain / "report.html"
    page = Page(plain / "report.html")
    assert "Still to come" not in page.text
    assert "a difference of +11.1 points, 95 % interval −1.2 to +22.2." in page.text
    assert "does not show a difference" in page.text
    assert page.row("HEAL")[:3] == ["56.8 %52.7 to 60.7", "79.5 %69.5 to 89.5", "34.1 %24.1 to 44.1"]
    assert page.row("Teacher")[0].startswith("61.0 %")
    assert page.row("Difference")[0] == "+11.1−1.2 to +22.2"
    assert [page.row(name)[0] for name in ("problems", "solved", "hard", "of these unsolved")] == ["8", "3", "5", "3"]
    assert page.row("repaired (a repair is kept)") == ["2"]
    assert page.row("candidates") == ["5", "1,154"] and page.row("kept") == ["4", "106"]
    assert page.row("talk about the hint") == ["–", "19"]
    assert page.row("stage 3") == ["6", "666"]
    accuracy, flow, rates, loss = page.figures()
    heal = next(trace for trace in accuracy["data"] if trace["name"] == "HEAL")
    assert heal["y"] == pytest.approx([56.78, 79.49, 34.07]) and heal["error_y"]["array"][0] == pytest.approx(3.9)
    assert {trace["name"]: (trace["x"], trace["y"]) for trace in rates["data"]} == {
        "unsolved": ([0], [3]), "hard": ([3], [2]), "solved": ([9], [3])}  # fmt: skip
    assert [len(trace["x"]) for trace in loss["data"]] == [30, 30]
    node, link = flow["data"][0]["node"], flow["data"][0]["link"]
    named = {
        (node["label"][a].split("<br>")[0], node["label"][b].split("<br>")[0]): value
        for a, b, value in zip(link["source"], link["target"], link["value"])
    }
    # Of three unsolved problems the repairs of one were all dropped: hindsight taught it.
    assert named["problems", "unsolved"] == 3 and named["right repairs", "stage 3"] == 2
    assert named["right repairs", "hindsight"] == 1 and named["hindsight", "right answers"] == 3
    assert named["right answers", "stage 2"] == 2 and named["right answers", "stage 1"] == 1
    assert named["solved", "stage 1"] == 3


def test_repairs_are_shown_with_their_figures(plain):
    write_report(plain)
    page = Page(plain / "report.html")
    assert {"s0", "s9", "cut", "hint", "broken", "kept", "answer"} <= page.classes
    assert "breakpoint" in page.text and "Hint: The final answer is " in page.text
    assert "kept, stage 3" in page.text and "PURE 8.123 > 1.12" in page.text
    rows = {row["rollout_id"]: row for row in store.RunDirectory(plain).rollouts("repair").to_pylist()}
    shown = [i for i in rows if i in page.text]
    assert len(shown) == 8 and len({rows[i]["problem_id"] for i in shown}) == 3
    assert all(rows[i]["kept_tokens"] for i in shown)
    bad = [row for row in page.cells if row[0] == "A" and row[3] == "41.50"]  # the answer comes last, and is the jump
    assert bad and bad[0][1].startswith("answer ")
    row = rows[shown[0]]
    ratio = row["step_ppl"][-1] / (row["step_expected_ppl"][-1] + 0.01)
    assert any(cells[0] == "A" and cells[-1] == f"{ratio:.2f}" for cells in page.cells)
    # The same bytes again.
    before = (plain / "report.html").read_bytes()
    write_report(plain)
    assert (plain / "report.html").read_bytes() == before


def test_hostile_text_is_shown_and_never_run(plain, hostile):
    write_report(plain)
    write_report(hostile)
    clean, page = Page(plain / "report.html"), Page(hostile / "report.html")
    assert page.shapes == clean.shapes  # no element and no attribute comes from the text
    assert page.classes == clean.classes
    assert "<script>alert(1)</script><img src=x onerror=alert(1)>" in page.text
    assert [attributes for attributes, _ in page.scripts] == [attributes for attributes, _ in clean.scripts]
    for attributes, text in page.scripts:
        if attributes.get("type") == "application/json":
            assert not re.search("[<>&\u2028\u2029]", text)
            assert "<script" not in json.dumps(json.loads(text))  # plotly reads tags in labels
        else:
            assert "alert(1)" not in text
    source = (hostile / "report.html").read_text(encoding="utf-8")
    assert "onerror=alert(1)>" not in source
    assert "default-src 'none'" in source and "'unsafe-inline'; script-src 'sha256-" in source


def test_nothing_is_fetched(plain):
    write_report(plain)
    page = Page(plain / "report.html")
    names = {name for _, attributes in page.shapes for name in attributes}
    assert not names & {"src", "href", "srcset", "action", "data", "poster", "background"}
    assert not re.search(r"url\(|@import", (plain / "report.html").read_text().split("</style>")[0])


@pytest.mark.parametrize("missing", [*FILES, "teacher", "evaluation", "rollouts"])
def test_half_finished_runs_have_a_page(plain, tmp_path, missing):
    shutil.copytree(plain, tmp_path / "run")
    if missing == "teacher":
        path = tmp_path / "run" / "manifest.json"
        path.write_text(path.read_text().replace(str(plain.parent / "teacher"), str(tmp_path / "gone")))
    elif (tmp_path / "run" / missing).is_dir():
        shutil.rmtree(tmp_path / "run" / missing)
    else:
        (tmp_path / "run" / missing).unlink()
    page = Page(write_report(tmp_path / "run"))
    for title in ("Did it help?", "Where did the data come from?", "What does a repair look like?", "What was run?"):
        assert title in page.text
    if missing == "summary.json":
        assert "Still to come: accuracies" in page.text
    if missing == "metrics.jsonl":
        assert "Still to come: the loss" in page.text
    if missing == "teacher":
        assert "plain text" in page.text and "s9" not in page.classes
        assert "Hint: The final answer is 1" in page.text and "\\boxed{" in page.text and "breakpoint" in page.text
    show(tmp_path / "run", None, Console(file=io.StringIO()))


def test_a_run_that_has_just_begun(tmp_path):
    store.write_text(tmp_path / "config.yaml", config.dump(config.Config()))
    page = Page(write_report(tmp_path))
    assert page.text.count("Still to come") >= 5
    store.RunDirectory(tmp_path).finish("sample")
    assert "Done: sample." in Page(write_report(tmp_path)).text


def test_not_a_run_directory(tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def shown(root: Path, rollout_id: str | None) -> str:
    out = io.StringIO()
    show(root, rollout_id, Console(file=out, width=100, color_system=None))
    return out.getvalue()


def test_show_lists_rollouts(plain):
    text = shown(plain, None)
    assert re.search(r"repair +54 +27 +6 +p5/repair/0\.0/s0", text)
    assert "kept repairs" in text and "p6/repair/0.0/s0" in text


def test_show_prints_a_rollout(plain):
    text = shown(plain, "p5/repair/2.1/s0")
    for part in ("question: State the final", "kept prefix", "hint (the teacher alone sees it): Hint: The final answer is",
                 "breakpoint: step 3 of the failed rollout; kept: 2 steps", "continuation", "grade: correct, answer",
                 "41.500", "> threshold 1.12", "verdict: dropped: PURE 8.123"):  # fmt: skip
        assert part in text
    assert re.search(r"entropy 0\.\d{3} +PPL 1\.\d{3}  expected 1\.\d{3}  ratio 1?0?\.\d{3}", text)
    assert "what the teacher saw: <|user|>" in shown(plain, "p5/hindsight/0/s0")
    assert "hint" not in shown(plain, "p5/base/0/s0")


def test_show_escapes(hostile):
    out = io.StringIO()
    show(
        hostile,
        f"p5{HOSTILE}/repair/0.0/s0",
        Console(file=out, width=100, color_system="truecolor", force_terminal=True),
    )
    assert "[bold red]" in out.getvalue() and "alert(1)" in out.getvalue()
    assert "\x1b[" in out.getvalue()  # entropies are colours


def test_show_refuses_unknown_ids(plain, tmp_path):
    with pytest.raises(InputError, match=r"did you mean p5/repair/0\.1/s0\?"):
        shown(plain, "p5/repair/0.1/s1")
    store.write_text(tmp_path / "config.yaml", config.dump(config.Config()))
    with pytest.raises(InputError, match="heal sample"):
        shown(tmp_path, "p5")
