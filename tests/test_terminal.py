"""What people see in a terminal, and programs on stdout: progress, `heal show`, `heal report --open`."""

import io
import json
import os
import re
import shlex
import subprocess
import unicodedata
import webbrowser
from collections import Counter
from pathlib import Path

import pytest
from conftest import COMMAND, ENVIRONMENT, TINY, refused, start
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from heal_jax import display
from heal_jax.cli import run as heal
from heal_jax.progress import Progress
from heal_jax.report.terminal import clean, visible

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COUNTS = {
    "problems": 60,
    "rollouts": 1800,
    "grades": {"correct": 900, "wrong": 850, "truncated": 50},
    "pass_rates": [20, 1, 0, 0, 0, 2, 0, 0, 7, 10, 20],
    "strata": {"solved": 39, "hard": 21, "unsolved": 20},
}


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def events(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def sampled(progress: Progress, clock: Clock) -> None:
    """A stage of four shards, of which the first two are found on disk; the third compiles."""
    with progress.stage("sample"):
        progress.update("sample", 0, 4, "shards")
        for done, seconds, tokens in ((1, 0.1, 0), (2, 0.1, 0), (3, 60.0, 9000), (4, 20.0, 8000)):
            clock.now += seconds
            progress.update("sample", done, 4, "shards", tokens=tokens, found=not tokens, counts=COUNTS)


def test_rate_and_time_left_count_what_was_made_now(capsys):
    clock = Clock()
    with Progress(Console(file=io.StringIO()), json_log=True, now=clock) as progress:
        sampled(progress, clock)
    said = [event for event in events(capsys) if event["event"] == "progress"]
    assert [event["done"] for event in said] == [0, 1, 2, 3, 4]
    assert [event["eta_seconds"] for event in said] == [None, None, None, 60.0, 0.0]
    assert [event["tokens_per_s"] for event in said] == [None, None, None, 150.0, 400.0]  # the first unit compiles
    assert said[-1]["counts"] == COUNTS


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=8), st.integers(0, 3))
def test_time_left_is_the_mean_unit_after_the_first(seconds, found):
    """However many units were found before."""
    clock, total = Clock(), found + len(seconds) + 5
    progress = Progress(quiet=True, now=clock)
    progress.update("x", 0, total)
    for done in range(found):
        progress.update("x", done + 1, total, found=True)
    for i, took in enumerate(seconds):
        clock.now += took
        progress.update("x", found + i + 1, total)
    mean = sum(seconds[1:]) / (len(seconds) - 1)
    assert progress._standing.eta_seconds == pytest.approx(5 * mean, abs=0.051)


def test_a_terminal_of_80_columns(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    clock, file = Clock(), Terminal()
    console = Console(file=file, width=80, force_terminal=True, color_system="truecolor", highlight=False)
    with Progress(console, now=clock) as progress:
        sampled(progress, clock)
        progress.update("train rejection_sampling", 0, 600, "steps")
        clock.now += 10
        progress.update(
            "train rejection_sampling", 10, 600, "steps", tokens=500, counts={"phase": "stage 1", "loss": 0.5}
        )
        clock.now += 10
        progress.update(
            "train rejection_sampling", 20, 600, "steps", tokens=500, counts={"phase": "stage 1", "loss": 0.25}
        )
        clock.now += 8
        live = _rendered(progress, 80)
    assert "20/600 steps 50 tokens/s 9:32 left" in live  # 580 s, of which 8 have passed
    assert "stage 1, loss 0.2500 █▁" in live
    text = ESCAPE.sub("", file.getvalue())
    assert max(map(cell_len, re.split(r"[\r\n]", text))) <= 80
    assert "pass rate 0|█▁   ▁  ▃▅█|1" in text and "39 solved, 21 hard (20 unsolved)" in text
    assert "\x1b[32m50% correct" in file.getvalue()


def _rendered(progress: Progress, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(progress._block())
    return console.file.getvalue()


def test_a_terminal_without_colours(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    clock, file = Clock(), Terminal()
    with Progress(Console(file=file, width=80, force_terminal=True), now=clock) as progress:
        sampled(progress, clock)
    codes = [code for found in re.findall(r"\x1b\[([0-9;]*)m", file.getvalue()) for code in found.split(";") if code]
    assert "50% correct" in file.getvalue() and set(codes) <= {"0", "1", "2"}  # bold and dim are no colours


@pytest.mark.parametrize("variable", ["NO_COLOR", "FORCE_COLOR"])
def test_where_there_is_no_terminal_there_are_plain_lines(monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    clock, file = Clock(), io.StringIO()
    with Progress(Console(file=file, width=80, highlight=False), now=clock) as progress:
        sampled(progress, clock)
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()
    assert [line.split()[:3] for line in lines] == [["sample", f"{i}/4", "shards,"] for i in (1, 3, 4)]
    assert lines[-1].endswith("400 tokens/s, in 1:20")


def test_quiet_says_nothing_but_programs_hear_all(capsys):
    with Progress(quiet=True, json_log=True) as progress:
        progress.say("note: \ud800 and \x1b[2J")
        progress.update("train heal", 1, 1, "steps", counts={"loss": float("nan")})
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.isascii()
    note, done = map(json.loads, printed.out.splitlines())
    assert note["text"] == "note: \ud800 and \x1b[2J" and done["counts"] == {"loss": None}


def test_a_reader_of_events_that_leaves_ends_nothing():
    code = """
import sys
from heal_jax.progress import Progress
with Progress(json_log=True) as progress:
    progress.say("first")
    sys.stdin.read()
    for _ in range(3):
        progress.say("again")
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([COMMAND[0], "-c", code], env=ENVIRONMENT, **pipes)
    assert json.loads(process.stdout.readline())["text"] == "first"
    process.stdout.close()
    process.stdin.close()
    said = process.stderr.read().splitlines()
    assert process.wait() == 0 and [line.split(":")[0] for line in said] == ["first", "note", *["again"] * 3]


def test_one_process_of_several_speaks(capsys):
    progress = Progress(json_log=True)
    progress.start("heal run")
    progress.mute()
    progress.update("sample", 1, 1)
    progress.say("note")
    progress.end(1, "an error")
    assert capsys.readouterr() == ("", "")


def test_bars_in_ascii():
    assert display.bars([0, 1, 2, 8]) == " ▂▃█" and display.bars([0, 1, 2, 8], plain=True) == " 238"


def test_errors_are_events_and_one_line(tmp_path, capsys):
    said = refused(capsys, "run", tmp_path / "none.yaml", "--out", tmp_path / "out", "--json-log")
    assert said.startswith("heal: ") and "no such config file" in said
    assert heal(["run", str(tmp_path / "none.yaml"), "--out", "x", "--json-log"]) == 2
    first, error, end = events(capsys)
    assert first["event"] == "start" and "none.yaml" in first["command"]
    assert error["status"] == end["status"] == 2 and "no such config file" in error["text"]


def test_progress_of_a_run_that_is_not_on_a_terminal(tiny):
    _, stdout, stderr = tiny
    assert "\x1b" not in stdout + stderr and "\r" not in stdout + stderr
    assert re.search(
        r"^sample +2/2 shards, 12 problems, 96 rollouts, \d+% correct, .*pass rate 0\|.{11}\|1", stderr, re.M
    )
    assert re.search(r"^repair +1/1 shards, .*PURE passes \d+% of \d+", stderr, re.M)
    assert re.search(r"^train heal +8/8 steps, stage 1\+2\+3, loss ", stderr, re.M)


def test_init_and_its_run_add_up(tmp_path):
    """A config that `heal init` wrote runs, and what the run tells programs is what it writes."""
    from heal_jax.config import ProblemSpec
    from heal_jax.problems.sources import load

    problems = load(ProblemSpec(counts={"easy": 5, "medium": 5, "hard": 6}), "auto")
    rows = [
        {"Problem": p.question, "solution": f"So\n#### {p.answer}"}
        for p in problems[::3] + problems[1::3] + problems[2::3]
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, out = tmp_path / "mine.yaml", tmp_path / "out"
    models = "--model", "builtin:teacher", "--student", "builtin:student"
    process = start("init", *models, "--problems", tmp_path / "mine.jsonl", "--out", config)
    stdout, stderr = process.communicate()
    assert process.returncode == 0 and "13 problems to train on, 3 held out" in stdout, stderr
    small = (
        "--sample.n 8 --sample.batch 32 --hindsight.n 4 --gear.paths 2 --gear.repairs 4 --train.steps 8 --train.batch 8"
    )
    process = start("run", config, "--out", out, "--json-log", "--quiet", *small.split(), "--evaluate.samples", "2")
    stdout, stderr = process.communicate()
    assert process.returncode == 0 and stderr == ""
    said = [json.loads(line) for line in stdout.splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    last = {event["stage"]: event for event in said if event["event"] == "progress"}
    made = Counter()
    for event in said:
        if event["event"] == "progress":
            made[event["stage"]] += event["tokens"]
    sample, repair = last["sample"]["counts"], last["repair"]["counts"]
    assert (
        sample["strata"] == summary["strata"] and sum(sample["pass_rates"]) == summary["problems"] == sample["problems"]
    )
    assert sample["rollouts"] == 8 * 13 == sum(sample["grades"].values())
    for kind in ("hindsight", "repair"):
        counts = last[kind]["counts"]
        assert counts["rollouts"] == summary[kind]["candidates"] == sum(counts["grades"].values())
        assert counts["grades"].get("correct", 0) == summary[kind]["correct"] >= counts["pure"]["passed"]
        assert last["curate"]["counts"][kind]["kept"] == summary[kind]["kept"]
    assert repair["problems"] == summary["repair"]["problems"]
    assert repair["repaired"] >= summary["repair"]["repaired_problems"]
    assert last["curate"]["counts"]["examples"] == {k: stage["examples"] for k, stage in summary["stages"].items()}
    for name in ("heal", "rejection_sampling"):
        assert last[f"train {name}"]["done"] == 8 and made[f"train {name}"] == summary["training"][name]["tokens"]
    for name, figures in summary["accuracy"].items():
        counts = last[f"evaluate {name}"]["counts"]
        assert counts["grades"].get("correct", 0) / counts["samples"] == pytest.approx(figures["mean"])
    started, ended = ([e["stage"] for e in said if e["event"] == f"stage_{x}"] for x in ("start", "end"))
    assert started == ended == ["sample", "hindsight", "repair", "curate", "train", "evaluate", "export"]
    assert [said[0]["event"], said[-2]["event"], said[-1]["event"]] == ["start", "result", "end"]
    assert said[-2]["accuracy"] == summary["accuracy"] and said[-1]["status"] == 0


@given(st.text(st.characters(codec=None), max_size=40))
def test_text_is_shown_and_never_obeyed(text):
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") for c in clean(text))
    assert not set(visible(text)) & set("\n\t\r\x1b\x07\u202e")
    assert clean(clean(text)) == clean(text)


def test_what_a_terminal_would_obey_is_written_out():
    assert clean("a\x1b[2J\x07\u202eb\r\n") == "a\\x1b[2J\\x07\\u202eb\\r\n"


@pytest.fixture(scope="module")
def repaired(tiny):
    """The run, and the id of a kept repair."""
    out, _, _ = tiny
    listed = shown(out, "--kind", "repair", "--kept", "--limit", "1")
    return out, listed.split()[0]


def shown(*arguments: object, **environment: str) -> str:
    """What `heal show` prints into a pipe."""
    command = [*COMMAND, "show", *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_show_lists_what_passes_the_filters(tiny, capsys):
    import pyarrow.parquet as pq

    out, _, _ = tiny
    rows = [row for file in sorted((out / "rollouts").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    decided = {row["rollout_id"]: row["kept"] for row in pq.read_table(out / "decisions.parquet").to_pylist()}
    strata = {row["id"]: row["stratum"] for row in pq.read_table(out / "problems.parquet").to_pylist()}

    def listed(*arguments: str) -> list[str]:
        capsys.readouterr()
        assert heal(["show", str(out), "--limit", "0", *arguments]) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    def wanted(passes) -> list[str]:
        return [row["rollout_id"] for row in rows if passes(row)]

    assert sorted(listed("--kind", "repair")) == sorted(wanted(lambda row: row["kind"] == "repair"))
    assert sorted(listed("--kept")) == sorted(wanted(lambda row: decided[row["rollout_id"]]))
    assert sorted(listed("--dropped", "--grade", "correct")) == sorted(
        wanted(lambda row: row["grade"] == "correct" and not decided[row["rollout_id"]])
    )
    hard = wanted(lambda row: strata[row["problem_id"]] in ("hard", "unsolved") and row["kind"] == "base")
    assert sorted(listed("--stratum", "hard", "--kind", "base")) == sorted(hard)
    problem = rows[0]["problem_id"]
    assert listed("--problem", problem) == wanted(lambda row: row["problem_id"] == problem)
    assert heal(["show", str(out), "--limit", "2", "--kind", "base"]) == 0
    assert "94 more; --limit 0 lists all" in capsys.readouterr().out
    assert "leave nothing" in refused(capsys, "show", out, "--kept", "--dropped")
    assert "leave the filters out" in refused(capsys, "show", out, rows[0]["rollout_id"], "--kept")


def test_show_in_a_pipe_of_ascii(repaired):
    text = shown(*repaired, PYTHONIOENCODING="ascii")
    assert "\x1b" not in text and "\r" not in text
    for part in ("question: ", "breakpoint: step ", "the failed rollout, from the cut on", "continuation", "entropy 0.",
                 "grade: correct", "threshold 1.12, worst ratio", "verdict: kept, stage 3"):  # fmt: skip
        assert part in text
    assert re.search(r"answer  PPL \d\.\d{3}  expected \d\.\d{3}  ratio \d\.\d{3}", text)


def test_show_side_by_side_in_a_wide_terminal(repaired):
    from heal_jax.report.show import show

    out, rollout = repaired
    for width in (80, 140):
        file = Terminal()
        show(out, rollout, Console(file=file, width=width, force_terminal=True, color_system="truecolor"))
        lines = ESCAPE.sub("", file.getvalue()).splitlines()
        together = any("the failed rollout, from the cut on" in line and "continuation" in line for line in lines)
        assert together == (width == 140)
        steps = [line for line in lines if re.search(r"\d  [█▏▎▍▌▋▊▉]", line)]
        assert steps and max(map(cell_len, steps)) <= width
        assert any("▶" in line for line in steps)  # the breakpoint


def test_a_reader_that_leaves_is_no_error(tiny):
    out, _, _ = tiny
    command = f"exec 2>&1; {shlex.join(COMMAND)} show {out} --kind base --limit 0 | head -1"
    done = subprocess.run(["bash", "-c", command], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stdout


def test_a_report_is_opened_where_there_is_a_browser(tiny, capsys, monkeypatch):
    out, _, _ = tiny
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or True)
    assert heal(["report", str(out), "--open"]) == 0
    said = capsys.readouterr()
    assert opened == [(out / "report.html").resolve().as_uri()] and Path(said.out.strip()) == out / "report.html"
    assert "browser" not in said.err

    def fails(address: str) -> bool:
        raise webbrowser.Error("no display")

    for nothing in (lambda address: False, fails):
        monkeypatch.setattr(webbrowser, "open", nothing)
        assert heal(["report", str(out), "--open"]) == 0
        assert f"open {(out / 'report.html').resolve().as_uri()}" in capsys.readouterr().err


def test_a_run_that_is_stopped_says_so_to_programs(tmp_path):
    process = start("sample", TINY, "--out", tmp_path / "out", "--json-log", environment=dict(ENVIRONMENT))
    said = []
    for line in process.stdout:  # type: ignore[union-attr]
        said.append(json.loads(line))
        if said[-1]["event"] == "stage_start":
            process.terminate()
            break
    said += [json.loads(line) for line in process.stdout]  # type: ignore[union-attr]
    assert process.wait() == 143
    assert [event["event"] for event in said[-2:]] == ["error", "end"] and said[-1]["status"] == 143
    assert os.path.exists(tmp_path / "out")
