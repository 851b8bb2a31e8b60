"""The report page and `heal show`, on a small run directory made by hand."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from heal_jax import config, pipeline, store
from heal_jax.errors import InputError
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.report import figures, numbers
from heal_jax.report.data import load
from heal_jax.report.page import write_report
from heal_jax.report.payload import pack
from heal_jax.report.ran import reproduce
from heal_jax.report.show import show
from heal_jax.report.view import view
from heal_jax.world import tokenizer as world_tokenizer
from heal_jax.world.base import PERFECT, Skill
from heal_jax.world.sums import Sums, question_of
from heal_jax.world.traces import ANSWER, HINDSIGHT, HINT, LEAK

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\u2028[bold red]&lt;b&gt;\x1b[2J"
STRATA = ["solved", "solved", "solved", "hard", "hard", "unsolved", "unsolved", "unsolved"]
SAMPLES, PATHS, REPAIRS = 10, 3, 6
SHARDS = [f"rollouts/{kind}-00000.parquet" for kind in ("base", "hindsight", "repair")]
FILES = ["config.yaml", "manifest.json", "problems.parquet", "decisions.parquet", "metrics.jsonl", "summary.json",
         "evaluation/heal-00000.parquet", *SHARDS]  # fmt: skip
SUMMARY = {
    "problems": 8, "strata": {"solved": 3, "hard": 5, "unsolved": 3},
    "repair": {"problems": 3, "repaired_problems": 2, "candidates": 1154, "correct": 927, "leaked": 19, "kept": 106},
    "hindsight": {"candidates": 5, "correct": 5, "kept": 4},
    "stages": {"1": {"examples": 33, "tokens": 333}, "2": {"examples": 4, "tokens": 44},
               "3": {"examples": 6, "tokens": 66}},
    "difference": {"mean": 0.1111, "ci95": [-0.0123, 0.2222]}, "seconds": {"base": 12.3, "repair": 45.6},
}  # fmt: skip


class World:
    """Makes rollouts that look like the built-in world's, with invented entropies."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True)
        world_tokenizer.save(Sums().tokenizer(), folder)
        vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        self.eos = vocabulary[world_tokenizer.END]
        (folder / "config.json").write_text(json.dumps({"eos_token_id": self.eos}))
        self.folder, self.vocab_size = folder, len(vocabulary)
        self.tokenizer = Tokenizer(folder, self.vocab_size)
        self.rng = np.random.default_rng(7)

    def rollout(self, problem: dict, name: str, steps: list[str], kept: int = 0, hint: str = "", **row) -> dict:
        """`steps` is what the student sees, `kept` of them not decoded; entropy surges in those that begin with "!"."""
        ids = [self.tokenizer.encode(step.removeprefix("!")) for step in steps]
        entropy = [[abs(self.rng.normal(0.75, 0.25) if step[0] == "!" else self.rng.normal(0.03, 0.02)) for _ in part]
                   for step, part in zip(steps, ids, strict=True)]  # fmt: skip
        tokens = [*sum(ids, []), self.eos]
        decoded = [*sum(entropy[kept:], []), 0.001]
        prompt, prefix = self.tokenizer.prompt(problem["question"]), sum(ids[:kept], [])
        text = self.tokenizer.text(tokens)
        answer = re.findall(r"boxed\{(.*?)\}", text)[-1]
        return {
            "problem_id": problem["id"], "rollout_id": f"{problem['id']}/{name}/s0", "kind": name.split("/")[0],
            "prompt_tokens": prompt, "tokens": tokens, "text": text, "answer": answer, "finish": "stop",
            "context_tokens": prompt + prefix + (self.tokenizer.encode(hint) if hint else []), "entropy": decoded,
            "logprob": [-e for e in decoded], "sampling_logprob": [-e for e in decoded],
            "step_starts": np.cumsum([0, *map(len, ids)])[:-1].tolist(),
            "kept_tokens": len(prefix) if name.startswith("repair") else None,
            "grade": "correct" if answer == problem["answer"] else "wrong", **row,
        }  # fmt: skip

    def scored(self, row: dict, jump: bool) -> dict:
        """With PURE figures of the steps after the cut, the answer last; `jump`: the answer comes out of nowhere."""
        steps = sum(start >= (row["kept_tokens"] or 0) for start in row["step_starts"]) + 1
        expected = 1 + abs(self.rng.normal(0, 0.1, steps))
        ppl = expected * (1 + abs(self.rng.normal(0, 0.02, steps)))
        ppl[-1] = 41.5 if jump else ppl[-1]
        ratio = ppl / (expected + 0.01)
        return row | {
            "step_ppl": ppl, "step_expected_ppl": expected, "pure_score": 0.8 * ratio.mean() + 0.2 * ratio.max()
        }  # fmt: skip


def rollouts(world: World, problem: dict, terms: list[int], hostile: str) -> list[tuple[dict, int, str]]:
    """Base, hindsight and repair rollouts of one problem, each with its stage and the reason."""
    rng, made, failures = np.random.default_rng(3), [], []
    sums, question = Sums(), question_of(terms)
    right = [f"{step}\n\n" for step in sums.solve(question, PERFECT, rng)]
    end = ANSWER.format(answer=problem["answer"])
    for n in range(SAMPLES):
        if n < round(problem["pass_rate"] * SAMPLES):
            made.append((world.rollout(problem, f"base/{n}", [*right, end]), 1, "kept"))
            continue
        lost = f"{right[2].rpartition('=')[0]}=0"  # with its carry
        wrong = [f"{step}\n\n" for step in sums.solve(question, Skill(hard=0, medium=0), rng, [*right[:2], lost])]
        steps = [*right[:3], "!" + wrong[0], *wrong[1:]]
        said = ANSWER.format(answer=sums.read(question, wrong)) + hostile
        row = world.rollout(problem, f"base/{n}", [*steps, said])
        made.append((row, 0, "wrong"))
        failures.append((row, steps))
    if problem["stratum"] != "solved":
        row = world.scored(world.rollout(problem, "hindsight/0", [*right, end]), jump="p3" in problem["id"])
        shown = HINDSIGHT.replace("{answer}", problem["answer"]).replace("{question}", problem["question"])
        row["context_tokens"] = world.tokenizer.prompt(shown)
        made.append((row, 0, "PURE 9.999 > 1.12") if "p3" in problem["id"] else (row, 2, "kept"))
    hint = HINT.format(answer=problem["answer"]) + hostile
    for j, (parent, failed) in enumerate(failures[:PATHS] if problem["stratum"] == "unsolved" else []):
        kept = j % 3
        for n in range(REPAIRS):
            tail, stage, reason = {
                0: ([*right[kept:], end], 3, "kept"),
                1: ([*right[kept:4], end], 0, f"PURE 8.123 > 1.12{hostile}"),
                2: ([LEAK, *right[kept:], end], 0, "talks about the hint"),
            }.get(n, ([*failed[kept:], ANSWER.format(answer="12")], 0, "wrong"))
            origin = {"parent_id": parent["rollout_id"], "breakpoint_step": 3}
            row = world.rollout(problem, f"repair/{j}.{n}", [*failed[:kept], *tail], kept, hint, **origin)
            if "p7" in problem["id"] and stage:  # a problem whose right repairs all fall
                stage, reason = 0, "over the limit"
            made.append((world.scored(row, jump=n == 1) if n < 3 else row, stage, reason))
    return made


def make_run(root: Path, hostile: str = "") -> Path:
    """A finished run directory with the real schemas; with `hostile` in every text that a user's files can hold."""
    world, run = World(root.parent / "teacher"), store.RunDirectory(root)
    prompt = "{answer} {question} " + hostile
    settings = config.Config(sample=config.SampleSpec(n=SAMPLES), hindsight=config.HindsightSpec(prompt=prompt))
    store.write_text(root / "config.yaml", config.dump(settings))
    rng, problems, made = np.random.default_rng(3), [], []
    for i, stratum in enumerate(STRATA):
        terms = [int(x) for x in rng.integers(10**10, 10**11, 3)]
        rate = {"solved": 0.9, "hard": 0.3, "unsolved": 0.0}[stratum]
        problems.append({
            "id": f"p{i}{hostile}", "source": "world:sums", "split": "train", "level": f"{stratum}{hostile}",
            "question": question_of(terms) + hostile, "answer": str(sum(terms)), "stratum": stratum, "pass_rate": rate,
        })  # fmt: skip
        made += rollouts(world, problems[-1], terms, hostile)
    decisions = [{"rollout_id": row["rollout_id"], "stage": stage, "kept": stage > 0, "reason": reason}
                 for row, stage, reason in made]  # fmt: skip
    store.write_table(root / "problems.parquet", problems, store.PROBLEMS)
    store.write_table(root / "decisions.parquet", decisions, store.DECISIONS)
    for kind in ("base", "hindsight", "repair"):
        run.shard(f"rollouts/{kind}-00000", lambda kind=kind: [row for row, _, _ in made if row["kind"] == kind])
    accuracy = {}
    for model, mean in {"teacher": 0.61, "student_base": 0.234, "rejection_sampling": 0.4567, "heal": 0.5678}.items():
        levels = {name + hostile: {"mean": mean * part, "n": 40, "ci95": [mean * part - 0.1, mean * part + 0.1]}
                  for name, part in (("easy", 1.4), ("hard", 0.6))}  # fmt: skip
        accuracy[model] = {"mean": mean, "ci95": [mean - 0.041, mean + 0.039], "n": 80, "per_level": levels}
        shift = 3 * len(accuracy)
        samples = [{"model": model, "problem_id": f"t{i}", "sample": j, "tokens": [1],
                    "grade": "correct" if j < (i + shift) % 5 else f"wrong{hostile}"}
                   for i in range(9) for j in range(4)]  # fmt: skip
        run.shard(f"evaluation/{model}-00000", lambda samples=samples: samples, store.EVALUATION)
    others = {"greedy": accuracy | {"difference": {"mean": 0.0321, "ci95": [-0.0234, 0.0876]}}}
    others["sets"] = {f"aime{hostile}": accuracy | {"difference": SUMMARY["difference"]} | others}
    store.write_json(root / "summary.json", SUMMARY | {"accuracy": accuracy} | others)
    lines = [
        {"event": "train", "model": model, "step": step, "phase": stages[(step - 1) // 100] + hostile,
         "loss": 2.5 * np.exp(-step / 60) + 0.05 * rng.random(), "tokens": step * 9, "loss_tokens": step * 6,
         "grad_norm": rng.random(), "learning_rate": 1e-5, "seconds": step / 4, "tokens_per_second": 36.0, "mfu": None}
        for model, stages in (("heal", ["stage 1", "stage 1+2", "stage 1+2+3"]), ("rejection_sampling", ["1"] * 3))
        for step in range(10, 310, 10)
    ]  # fmt: skip
    for model, steps in {"rejection_sampling": {300: 0.5}, "heal": {100: 0.25, 200: 0.625, 300: 0.5}}.items():
        for step, right in steps.items():
            at = next(i for i, line in enumerate(lines) if line["model"] == model and line["step"] == step)
            lines.insert(at + 1, {"event": "dev", "model": model, "accuracy": right, "step": None})
    # The last line is torn, as an interruption leaves it.
    store.write_text(root / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tra')
    teacher = {"path": str(world.folder), "sha256": "0" * 64, "vocab_size": world.vocab_size}
    stages = ("sample", "hindsight", "repair", "curate", "train", "evaluate", "export")
    work = {name: {"seconds": 2.5, "tokens": 50} for name in ("sample", "train heal", "train rejection_sampling")}
    run.update(
        work=work,
        versions={"jax": f"0.10.2{hostile}"},
        models={"teacher": teacher},
        stages={name: {} for name in stages},
    )
    return root


class Page(HTMLParser):
    """Elements and attributes of a page, its visible text, table rows and scripts."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.shapes: set[tuple[str, tuple[str, ...]]] = set()
        self.classes: set[str] = set()
        self.scripts: list[tuple[dict, str]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.inside, self.cell = "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.shapes.add((tag, tuple(sorted(name for name, _ in attrs))))
        self.classes |= set((dict(attrs).get("class") or "").split())
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if "href" in dict(attrs):
            self.links.append(dict(attrs)["href"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.inside = ""
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] = self.scripts[-1][0], self.scripts[-1][1] + data
        elif self.inside != "style":
            self.text += data
            if self.cell:
                self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row and row[0] == name)

    def figures(self) -> list[dict]:
        return [json.loads(text) for attributes, text in self.scripts if attributes.get("type") == "application/json"]


def links(flow: dict) -> dict[tuple[str, str], int]:
    """Problems from one node of the flow to another."""
    names, link = [name.split("<br>")[0] for name in flow["data"][0]["node"]["label"]], flow["data"][0]["link"]
    ends = zip(link["source"], link["target"], link["value"], strict=True)
    return {(names[a], names[b]): count for a, b, count in ends}


def stored(root: Path, name: str) -> list[dict]:
    """Rows of Parquet files of a run directory."""
    return [row for path in sorted(root.glob(name)) for row in pq.read_table(path).to_pylist()]


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
    assert "HEAL repaired 2 of these. On 80 held-out problems its student is right in 56.8 % of samples" in page.text
    assert "a difference of +11.1 points, 95 % interval −1.2 to +22.2." in page.text
    assert "does not show a difference" in page.text
    assert page.row("HEAL")[:3] == ["56.8 %52.7 to 60.7", "79.5 %69.5 to 89.5", "34.1 %24.1 to 44.1"]
    assert page.row("Difference")[0] == "+11.1−1.2 to +22.2"
    others = [page.row(f"{title} n = 80") for title in ("greedy", "aime", "aime, greedy")]
    assert [row[0] for row in others] == ["61.0 %56.9 to 64.9"] * 3 and others[1][3] == "56.8 %52.7 to 60.7"
    assert [row[4] for row in others] == ["+3.2−2.3 to +8.8", "+11.1−1.2 to +22.2", "+3.2−2.3 to +8.8"]
    assert [page.row(name)[0] for name in ("problems", "solved", "hard", "of these unsolved")] == ["8", "3", "5", "3"]
    assert page.row("repaired (a repair is kept)") == ["2"]
    assert page.row("candidates") == ["5", "1,154"] and page.row("kept") == ["4", "106"]
    assert page.row("talk about the hint") == ["–", "19"] and page.row("stage 3") == ["6", "66"]
    accuracy, _, flow, rates, _, loss, dev, _, _, _ = page.figures()
    heal = next(trace for trace in accuracy["data"] if trace["name"] == "HEAL")
    assert heal["y"] == pytest.approx([56.78, 79.492, 34.068]) and heal["error_y"]["array"][0] == pytest.approx(3.9)
    counts = {trace["name"]: (trace["x"], trace["y"]) for trace in rates["data"]}
    assert counts == {"unsolved": ([0], [3]), "hard": ([3], [2]), "solved": ([9], [3])}
    assert [trace["x"] for trace in loss["data"]] == [list(range(10, 310, 10))] * 2
    assert [trace["x"] for trace in dev["data"]] == [[300], [100, 200, 300]]
    assert dev["data"][1]["y"] == [25, 62.5, 50]
    assert links(flow) == {
        ("problems", "solved"): 3, ("problems", "hard"): 2, ("problems", "unsolved"): 3, ("solved", "stage 1"): 3,
        ("unsolved", "repair"): 3, ("repair", "right repairs"): 3, ("right repairs", "PURE keeps"): 3,
        ("PURE keeps", "stage 3"): 2,
        # One unsolved problem has no repair left, one hard problem no hindsight rollout.
        ("PURE keeps", "hindsight"): 1, ("hard", "hindsight"): 2, ("hindsight", "right answers"): 3,
        ("right answers", "PURE keeps"): 2, ("PURE keeps", "stage 2"): 2, ("right answers", "stage 1"): 1,
    }  # fmt: skip


def test_accuracy_by_what_the_teacher_solves(plain):
    rates: dict[str, dict[str, list[bool]]] = {}
    for row in stored(plain, "evaluation/*.parquet"):
        rates.setdefault(row["model"], {}).setdefault(row["problem_id"], []).append(row["grade"] == "correct")
    teacher = {problem: sum(right) / len(right) for problem, right in rates["teacher"].items()}
    found = numbers.by_teacher(load(plain))
    assert {name: part["teacher"]["n"] for name, part in found.items()} == {
        "solved": sum(rate >= 0.5 for rate in teacher.values()),
        "hard": sum(0.1 < rate < 0.5 for rate in teacher.values()),  # unsolved: at most 1 of 10
        "unsolved": sum(rate <= 0.1 for rate in teacher.values()),
    }
    solved = [problem for problem, rate in teacher.items() if rate >= 0.5]
    means = {model: np.mean([np.mean(right[p]) for p in solved]) for model, right in rates.items()}
    means["difference"] = means["heal"] - means["rejection_sampling"]
    assert {model: part["mean"] for model, part in found["solved"].items()} == pytest.approx(means)
    assert all(part["ci95"][0] <= part["mean"] <= part["ci95"][1] for part in found["solved"].values())
    assert found["unsolved"]["teacher"]["ci95"] == [0, 0]
    drawn = {trace["name"]: trace["y"] for trace in figures.by_teacher(load(plain))["data"]}
    assert drawn["HEAL"] == pytest.approx([100 * part["heal"]["mean"] for part in found.values()])


def test_scores_and_the_examples_nearest_to_the_threshold(plain):
    run, limit = load(plain), 1.12
    decisions = {row["rollout_id"]: row for row in stored(plain, "decisions.parquet")}
    right = [row for row in stored(plain, "rollouts/*.parquet") if row["kind"] != "base" and row["grade"] == "correct"]
    aided = [row for row in right if decisions[row["rollout_id"]]["reason"] != "talks about the hint"]
    drawn = [trace for trace in figures.scores(run)["data"] if trace["type"] == "bar"]
    for kind, traces in (("hindsight", drawn[:2]), ("repair", drawn[2:])):
        scores = [row["pure_score"] for row in aided if row["kind"] == kind]
        below = sum(score <= limit for score in scores)
        assert [sum(filter(None, trace["y"])) for trace in traces] == [below, len(scores) - below]
        page, title = Page(write_report(plain)), {"hindsight": "hindsight, right", "repair": "repairs, right"}[kind]
        share = f"{100 * below / len(scores):.1f} %"
        kept = sum(decisions[row["rollout_id"]]["kept"] for row in aided if row["kind"] == kind)
        assert page.row(title) == [str(len(scores)), f"{np.median(scores):.3f}", str(below), share, str(kept)]
    for above, rows in enumerate(numbers.nearest(run)):
        best = {}
        for row in aided:
            if (row["pure_score"] > limit) == above:
                best.setdefault(row["problem_id"], []).append(abs(row["pure_score"] - limit))
        distances = [abs(row["pure_score"] - limit) for row in rows]
        assert distances == sorted(min(several) for several in best.values())[:4]
        for row in rows:
            assert f"#rollout={row['rollout_id']}" in map(unquote, page.links)
            ratio = np.array(row["step_ppl"]) / (np.array(row["step_expected_ppl"]) + 0.01)
            cells = page.row(row["rollout_id"])
            assert cells[0] == f"{row['pure_score']:.4f}" and cells[2] == f"{ratio.mean():.3f}"
            assert cells[3] == f"{ratio.max():.2f}, step {ratio.argmax() + 1} of {len(ratio)}"
            assert row["pure_score"] == pytest.approx(0.8 * ratio.mean() + 0.2 * ratio.max(), rel=1e-5)


SCORE = st.floats(0.5, 60, width=32)


@given(st.lists(SCORE, min_size=1), st.lists(SCORE), st.floats(0.6, 5))
def test_no_bin_holds_scores_of_both_sides_of_the_threshold(right, other, threshold):
    found = numbers.Scores(np.array(right), np.array(other))
    edges = numbers.score_bins({"base": found}, threshold)
    assert threshold in edges and (np.diff(edges) > 0).all() and len(edges) < 250
    for values in (found.right, found.other):
        counts = numbers.binned(values, edges)
        assert counts.sum() == len(values)
        assert counts[: list(edges).index(threshold)].sum() == (values <= threshold).sum()


def test_curves_and_phases(plain):
    run = load(plain)
    assert [(p.name, p.first, p.last, p.tokens, p.seconds, p.dev) for p in numbers.phases(run, "heal")] == [
        ("stage 1", 1, 100, 900, 25, 0.25), ("stage 1+2", 101, 200, 900, 25, 0.625),
        ("stage 1+2+3", 201, 300, 900, 25, 0.5),
    ]  # fmt: skip
    page = Page(write_report(plain))
    assert page.row("HEAL, stage 1+2")[:5] == ["100", "900", "600", "25.0", "36"]
    assert "HEAL: step 200 (62.5 %)" in page.text
    assert page.row("train") == ["", "5.0", "100", "20"]  # both students
    losses = [event["loss"] for event in run.training if event["model"] == "heal"]
    assert numbers.curve(run, "heal", "loss") == list(zip(range(10, 310, 10), losses))
    few = numbers.curve(run, "heal", "loss", most=7)
    assert len(few) == 6 and few[0] == (50, pytest.approx(np.mean(losses[:5]))) and few[-1][0] == 300
    assert "Model FLOPs utilisation" not in page.text  # not known on this device


def test_figures_are_usable_elsewhere(plain):
    run = load(plain)
    several = (figures.accuracies, figures.by_teacher, figures.flow, figures.pass_rates, figures.scores, figures.losses)
    made = [*(make(run) for make in several), *(figures.training(run, name) for name in figures.CURVES)]
    for figure in made:
        for scheme, ground in (("light", "#ffffff"), ("dark", "#1d2025")):
            shown = go.Figure(figures.resolve(figure, scheme))  # refuses what is no colour
            assert shown.layout.paper_bgcolor == ground and '"$' not in shown.to_json()
    assert '"$accent"' in json.dumps(made)


def test_the_commands_make_the_run_again(hostile, tmp_path):
    root = shutil.copytree(hostile, tmp_path / "run")
    text = "a\nEND_OF_CONFIG\n$(touch made) `touch made`; 'touch made'\n\u202e\u05d0\x1b[2J"
    settings = config.Config(gear=config.GearSpec(hint="{answer} " + text), seed=3)
    store.write_text(root / "config.yaml", config.dump(settings))
    directory = store.RunDirectory(root)
    directory.update(versions={"jax": "1; touch made", "$(touch made)": "2"}, device={"kind": "cpu"}, threads=2)
    commands = reproduce(load(root).manifest, settings)
    assert re.fullmatch("[ -~\n]+", commands)
    assert commands.startswith("pip install . 'jax==1; touch made' '$(touch made)==2'\n")
    for name in ("pip", "heal"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $NPROC $#" >> said\n')
        (tmp_path / name).chmod(0o755)
    subprocess.run(["bash", "-c", commands], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True)
    assert (tmp_path / "said").read_text() == "pip  4\nheal 2 4\n" and not (tmp_path / "made").exists()
    assert config.load(tmp_path / "config.yaml") == settings


def test_what_is_there_is_told_while_a_run_goes_on(plain, tmp_path):
    root = shutil.copytree(plain, tmp_path / "run")
    for name in ("decisions.parquet", "metrics.jsonl", *SHARDS[1:], "evaluation/heal-00000.parquet"):
        (root / name).unlink()
    store.write_json(root / "summary.json", {"problems": 8, "strata": SUMMARY["strata"]})
    directory = store.RunDirectory(root)
    shards = {name: digest for name, digest in directory.manifest["shards"].items() if "base" in name}
    directory.update(stages={"sample": {}}, shards=shards)
    page = Page(write_report(root))
    assert "Of 8 problems the teacher solves 3, and leaves 3 unsolved (at most 1 of 10 tries right)." in page.text
    flow, _ = page.figures()
    assert links(flow) == {
        ("problems", "solved"): 3, ("problems", "hard"): 2, ("problems", "unsolved"): 3,
        ("solved", "not decided yet"): 3, ("hard", "not decided yet"): 2, ("unsolved", "not decided yet"): 3,
    }  # fmt: skip
    assert page.text.count("Still to come: ") == 6  # the stages, and one thing in each section but the last


def test_a_run_outlives_its_report(tmp_path, monkeypatch):
    def fail(root: Path) -> None:
        raise ValueError("no\nroom")

    said: list[str] = []
    monkeypatch.setattr(pipeline, "summarise", lambda run: None)
    monkeypatch.setattr(pipeline, "write_report", fail)
    pipeline._tell(SimpleNamespace(root=tmp_path, progress=SimpleNamespace(say=said.append)))
    assert said == [f"note: report.html was not written (no room); `heal report {tmp_path}` writes it"]


def test_examples_come_first(plain):
    run = load(plain)
    rows = {row["rollout_id"]: row for row in run.rollouts.to_pylist() if row["kind"] == "repair"}
    chosen = [rows[i] for i in pack(run).examples]
    assert len(chosen) == 8 and len({row["problem_id"] for row in chosen}) == 3
    assert all(row["kept_tokens"] for row in chosen)
    kept = [run.decisions[row["rollout_id"]]["kept"] for row in chosen]
    assert kept == [True] * 4 + [False] * 4
    page = Page(write_report(plain))  # without JavaScript
    assert all(row["rollout_id"] in page.text for row in chosen) and chosen[0]["text"] in page.text
    assert ["correct", f"{chosen[0]['pure_score']:.3f}", "kept, stage 3"] in [row[1:] for row in page.rows]


def test_the_same_run_gives_the_same_page(plain):
    before = write_report(plain).read_bytes()
    assert write_report(plain).read_bytes() == before


def test_a_step_that_holds_the_answer_alone_has_no_figures(plain):
    run = load(plain)
    row = next(row for row in run.rollouts.to_pylist() if row["kind"] == "hindsight")
    del row["step_ppl"][-2], row["step_expected_ppl"][-2]
    found = view(run, row)
    assert found.answer is not None and found.answer.ppl == row["step_ppl"][-1]
    assert [step.scored.ppl for step in found.steps[:-1]] == row["step_ppl"][:-1] and found.steps[-1].scored is None


def test_hostile_text_is_shown_and_never_run(plain, hostile):
    clean, page = Page(write_report(plain)), Page(write_report(hostile))
    assert page.shapes == clean.shapes and page.classes == clean.classes  # no element or attribute comes from a text
    assert "<script>alert(1)</script><img src=x onerror=alert(1)>" in page.text
    assert [attributes for attributes, _ in page.scripts] == [attributes for attributes, _ in clean.scripts]
    for attributes, text in page.scripts:
        assert attributes or "alert(1)" not in text
        assert not attributes or not re.search("[<>&\u2028\u2029]", text)
    assert "<script" not in json.dumps(page.figures())  # plotly reads tags in labels
    source = (hostile / "report.html").read_text(encoding="utf-8")
    assert "onerror=alert(1)>" not in source
    assert "default-src 'none'" in source and "script-src 'sha256-" in source


def test_nothing_is_fetched(plain):
    page = Page(write_report(plain))
    names = {name for _, attributes in page.shapes for name in attributes}
    assert not names & {"src", "srcset", "action", "data", "poster", "background"}
    assert page.links and all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\(|@import", (plain / "report.html").read_text(encoding="utf-8").split("</style>")[0])


@pytest.mark.parametrize("missing", [*FILES, "evaluation", "rollouts", "teacher"])
def test_half_finished_runs_have_a_page(plain, tmp_path, missing):
    root = shutil.copytree(plain, tmp_path / "run")
    path = root / missing
    if missing == "teacher":
        directory = store.RunDirectory(root)
        directory.manifest["models"]["teacher"]["path"] = str(tmp_path / "gone")
        directory.update()
        assert load(root).tokenizer  # the config has the built-in one, which is here
        store.write_text(root / "config.yaml", "teacher: {path: models/mine}")
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    page = Page(write_report(root))
    for title in ("Did it help?", "Where did the data come from?", "What does a repair look like?", "Is PURE sane?",
                  "How did training go?", "What was run?"):  # fmt: skip
        assert title in page.text
    if missing in ("summary.json", "metrics.jsonl"):
        assert f"Still to come: the {'loss' if missing == 'metrics.jsonl' else 'accuracies'}" in page.text
    if missing == "teacher":
        assert "plain text" in page.text and "\\boxed{" in page.text
    printed(root)


def test_a_run_that_has_just_begun(tmp_path):
    store.write_text(tmp_path / "config.yaml", config.dump(config.Config()))
    assert Page(write_report(tmp_path)).text.count("Still to come") >= 5
    store.RunDirectory(tmp_path).finish("sample")
    assert "Done: sample." in Page(write_report(tmp_path)).text


@pytest.mark.parametrize("others", [{"sets": 3}, {"sets": {"a": {"heal": 1}}}, {"greedy": []}, {"greedy": {}}])
def test_a_summary_of_another_form(plain, tmp_path, others):
    root = shutil.copytree(plain, tmp_path / "run")
    store.write_json(root / "summary.json", store.read_json(root / "summary.json") | others)
    assert "not a summary of heal_jax" in Page(write_report(root)).text


def test_not_a_run_directory(tmp_path):
    with pytest.raises(InputError, match="not a run directory"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def printed(root: Path, rollout_id: str | None = None, **terminal) -> str:
    out = io.StringIO()
    show(root, rollout_id, Console(file=out, width=100, **terminal))
    return out.getvalue()


def test_show(plain):
    listing = printed(plain)
    assert re.search(r"repair +54 +27 +6 +p5/repair/0\.0/s0", listing) and "kept repairs" in listing
    text = printed(plain, "p5/repair/2.1/s0")
    for part in ("question: State the final", "kept prefix", "hint (the teacher alone sees it): Hint: The final",
                 "breakpoint: step 3 of the failed rollout; kept: 2 steps", "continuation", "grade: correct, answer",
                 "41.500", "> threshold 1.12", "verdict: dropped: PURE 8.123"):  # fmt: skip
        assert part in text
    assert re.search(r"entropy 0\.\d{3} +PPL 1\.\d{3}  expected 1\.\d{3}  ratio \d\.\d{3}", text)
    assert "what the teacher saw: <|user|>" in printed(plain, "p5/hindsight/0/s0")
    assert "hint" not in printed(plain, "p5/base/0/s0")


def test_show_escapes(hostile):
    text = printed(hostile, f"p5{HOSTILE}/repair/0.0/s0", color_system="truecolor", force_terminal=True)
    assert "[bold red]" in text and "alert(1)" in text
    assert "\x1b[" in text and "\x1b[2J" not in text  # entropies are colours; the terminal does not obey the text


def test_show_refuses_unknown_ids(plain, tmp_path):
    with pytest.raises(InputError, match=r"did you mean p5/repair/0\.1/s0\?"):
        printed(plain, "p5/repair/0.1/s1")
    store.write_text(tmp_path / "config.yaml", config.dump(config.Config()))
    with pytest.raises(InputError, match="heal sample"):
        printed(tmp_path, "p5")
