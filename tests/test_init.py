"""`heal init`: configs for models and problems as people have them (a run of one: tests/test_terminal.py)."""

import json

import pytest
import sets
from conftest import refused
from folders import own_student, thinking_teacher

from heal_jax import init as module
from heal_jax.cli import run as heal
from heal_jax.config import load
from heal_jax.problems.sources import load as load_problems

ROWS = [
    {"problem": f"What is {n} + {n}?", "solution": f"{n} and {n} make {2 * n}.\n#### {2 * n}", "uuid": f"u{n}"}
    for n in range(1, 16)
]


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    monkeypatch.setattr(module.machine, "devices", lambda: {"platform": "cpu", "count": 1, "memory": 0})


def made(tmp_path, problems: object, *arguments: object, model: object = "builtin:teacher"):
    out = tmp_path / "made.yaml"
    command = ["init", "--model", model, "--problems", problems, "--out", out, *arguments]
    assert heal([str(argument) for argument in command]) == 0
    return load(out)


def jsonl(tmp_path, rows: list[dict], name: str = "mine.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tfds_dir", "hf"])
def test_problems_of_each_kind(kind, tmp_path):
    source = sets.write(kind, tmp_path / "set", ROWS)
    config = made(tmp_path, source)
    assert config.problems.source == source
    assert config.problems.fields == {"question": "problem", "answer": "solution", "id": "uuid"}
    train, test = (load_problems(spec, "auto") for spec in (config.problems, config.evaluate.problems))
    assert [p.answer for p in (*train, *test)] == [str(2 * n) for n in range(1, 16)] and len(test) == 3
    assert {p.split for p in train} == {"train"} and {p.split for p in test} == {"test"}


def test_a_path_is_enough(tmp_path):
    path = jsonl(tmp_path, ROWS)
    assert made(tmp_path, path).problems.source == f"jsonl:{path}"


def test_held_out_problems_of_their_own(tmp_path):
    config = made(tmp_path, jsonl(tmp_path, ROWS), "--held-out", jsonl(tmp_path, ROWS[:2], "test.jsonl"))
    assert (config.problems.limit, config.evaluate.problems.limit) == (0, 0)
    assert config.evaluate.problems.source.endswith("test.jsonl") and config.evaluate.problems.split == "test"


def test_generated_problems(tmp_path):
    config = made(tmp_path, "rg:chain_sum")
    train, test = (load_problems(spec, "auto") for spec in (config.problems, config.evaluate.problems))
    assert not {p.question for p in train} & {p.question for p in test} and config.evaluate.problems.skip == len(train)


def test_boxed_solutions_choices_and_answers_that_cannot_be_read(tmp_path, capsys):
    boxed = [{"question": f"q{n}", "solution": f"So $x = \\boxed{{\\frac{{{n}}}{{7}}}}$."} for n in range(12)]
    config = made(tmp_path, jsonl(tmp_path, boxed))
    assert load_problems(config.problems, "auto")[3].answer == "\\frac{3}{7}"
    (tmp_path / "made.yaml").unlink()
    letters = [{"Question": f"q{n}", "Answer": "ABCD"[n % 4]} for n in range(12)]
    config = made(tmp_path, jsonl(tmp_path, letters))
    assert config.grade.by == "choice" and config.problems.fields == {"question": "Question", "answer": "Answer"}
    (tmp_path / "made.yaml").unlink()
    odd = [{"question": f"q{n}", "answer": "\\frac{1}{" if n == 4 else str(n)} for n in range(12)]
    assert made(tmp_path, jsonl(tmp_path, odd)).grade.unreadable == "text"
    assert "mine.jsonl:5 " in (tmp_path / "made.yaml").read_text()


def test_a_model_of_ones_own_is_told_how_to_answer(tmp_path):
    student = own_student(tmp_path / "student")
    config = made(tmp_path, jsonl(tmp_path, ROWS), "--student", student)
    assert config.student.path == str(student) and config.sample.prompt == "{question}"
    (tmp_path / "made.yaml").unlink()
    config = made(tmp_path, jsonl(tmp_path, ROWS), model=student)
    assert "\\boxed{}" in config.sample.prompt and "{answer}" in config.hindsight.prompt
    assert config.teacher == config.student and config.train.learning_rate == 1e-5
    # 512 positions: prompt and rollout share them.
    assert config.sample.max_new_tokens % 32 == 0 and 32 <= config.sample.max_new_tokens < 512


def test_a_thinking_model(tmp_path):
    for opens, tag in ((True, ""), (False, "<think>\n")):
        teacher = thinking_teacher(tmp_path / str(opens), opens)
        config = made(tmp_path, "rg:chain_sum", model=teacher)
        assert (config.grade.think_end, config.grade.think_open) == ("</think>", tag)
        (tmp_path / "made.yaml").unlink()


def test_memory_bounds_the_rows(tmp_path, monkeypatch):
    found = {"platform": "gpu", "count": 4, "memory": 3_000_000}
    monkeypatch.setattr(module.machine, "devices", lambda: found)
    small = made(tmp_path, "rg:chain_sum").sample.batch
    assert small < 240 and small % 4 == 0 and small % 30 == 0


def test_odd_names_are_written_as_they_are(tmp_path):
    """YAML has a meaning for most of these."""
    folder = tmp_path / "my: #1 [é] {x} 'quoted\" \\n"
    folder.mkdir()
    path = jsonl(folder, ROWS)
    assert made(tmp_path, path).problems.source == f"jsonl:{path}"


def test_what_is_refused_writes_nothing(tmp_path, capsys):
    mine, out = jsonl(tmp_path, ROWS), tmp_path / "new.yaml"
    base = ["init", "--out", out, "--model", "builtin:teacher", "--problems"]
    assert "no column looks like the answer (there is: 'question', 'x')" in refused(
        capsys, *base, jsonl(tmp_path, [{"question": "q", "x": 1}] * 12, "columns.jsonl")
    )
    assert "too few" in refused(capsys, *base, jsonl(tmp_path, ROWS[:5], "few.jsonl"))
    assert "no such problem file" in refused(capsys, *base, tmp_path / "none.jsonl")
    broken = jsonl(tmp_path, [*ROWS, {"problem": "and?", "solution": "no mark"}], "broken.jsonl")
    assert "not in 'no mark'" in refused(capsys, *base, broken)
    mixed = [{"question": f"q{n}", "solution": f"\\boxed{{{n}}} where \\frac{{1}}{{2}}"} for n in range(12)]
    assert "give a column of their own" in refused(capsys, *base, jsonl(tmp_path, mixed, "mixed.jsonl"))
    assert "is expected" in refused(capsys, *base, tmp_path / "mine.csv")
    assert "quickstart" in refused(capsys, *base, "world:sums")
    assert "no such model folder" in refused(capsys, *base, mine, "--student", "nowhere")
    assert "ends in .yaml" in refused(capsys, *base, mine, "--out", tmp_path / "new.txt")
    assert "folder that is there" in refused(capsys, *base, mine, "--out", tmp_path / "none" / "new.yaml")
    assert not out.exists()
    out.write_text("mine")
    assert "is there already" in refused(capsys, *base, mine) and out.read_text() == "mine"


@pytest.mark.parametrize("line", ["{", "[1]", "question,answer"])
def test_a_bad_line_is_named(line, tmp_path, capsys):
    path = jsonl(tmp_path, ROWS[:2])
    path.write_text(path.read_text(encoding="utf-8") + line, encoding="utf-8")
    command = ["init", "--model", "builtin:teacher", "--problems", path, "--out", tmp_path / "made.yaml"]
    assert f"{path}:3: " in refused(capsys, *command)
