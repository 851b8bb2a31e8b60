"""Several evaluation sets a run, greedy figures, the dev problems, and the task file for lm-eval."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch
import transformers
import yaml
from conftest import TINY, start
from hypothesis import given
from hypothesis import strategies as st

from heal_jax import ask
from heal_jax.bootstrap import interval
from heal_jax.cli import run as heal
from heal_jax.config import Config, EvaluateSet, GradeSpec, ProblemSpec, dump, load
from heal_jax.evaluate import MODELS, evaluate
from heal_jax.model.lm import resolve
from heal_jax.problems.grading import Grader
from heal_jax.problems.sources import load as load_problems
from heal_jax.progress import Progress
from heal_jax.run import open_run
from heal_jax.sets import draws, widest
from heal_jax.shapes import evaluate_shape
from heal_jax.store import RunDirectory
from heal_jax.summary import verdict
from heal_jax.world.problems import json_lines
from heal_jax.world.sums import Sums

TASK = Path(__file__).parents[1] / "configs" / "lm_eval" / "heal_sums.yaml"
SETTINGS = yaml.safe_load(TINY.read_text())
SETS = {
    # As many problems, samples and tokens as the main set: its programs.
    "fresh": {"problems": {"seed": 1, "counts": {"easy": 4, "hard": 2}}, "samples": 2},
    "chain": {
        "problems": {
            "source": "rg:chain_sum", "limit": 3,
            "options": {"min_terms": 3, "max_terms": 3, "min_digits": 11, "max_digits": 11},
        },
        "by": "exact", "samples": 4, "temperature": 0.5, "max_new_tokens": 120, "greedy": True,
    },
}  # fmt: skip
OWN = Path(__file__).parents[1] / "configs" / "lm_eval" / "heal_sums.jsonl"
DEV = {"problems": {"source": "world:sums", "counts": {"easy": 2, "medium": 1}}}


def configured(path: Path, **evaluation: object) -> Path:
    """configs/tiny.yaml with these settings under `evaluate`."""
    path.write_text(yaml.safe_dump(SETTINGS | {"evaluate": SETTINGS["evaluate"] | evaluation}))
    return path


def reopened(run: Path, config: Path, *stages: str) -> None:
    """Make a finished run one of another evaluation, with these stages to be done again."""
    (run / "config.yaml").write_text(dump(load(config)))
    directory = RunDirectory(run)
    directory.manifest.pop("problems", None)  # their hash, which covers the sets'
    directory.forget(*stages)


@pytest.fixture(scope="module")
def several(tiny, tmp_path_factory):
    """The tiny run's curriculum, with students chosen by dev problems and put to further sets, and the config."""
    folder = tmp_path_factory.mktemp("several")
    out, config = folder / "run", configured(folder / "a.yaml", greedy=True, sets=SETS, dev=DEV)
    shutil.copytree(tiny[0], out)
    shutil.rmtree(out / "checkpoints")
    reopened(out, config, "train", "evaluate", "export")
    process = start("run", config, "--out", out, "--until", "evaluate")
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return out, config


def test_students_are_those_that_are_best_on_dev_problems(several):
    """Assessed at the same steps; what is evaluated has the weights of the best."""
    out, _ = several
    summary = json.loads((out / "summary.json").read_text())
    for student in ("heal", "rejection_sampling"):
        found = summary["training"][student]
        ends = np.cumsum([phase["steps"] for phase in found["phases"]])
        assert list(found["dev"]) == [str(end) for end in ends] and len(ends) == 3
        best = max(found["dev"], key=lambda step: (found["dev"][step], int(step)))
        assert {best, str(ends[-1])} <= {path.name for path in (out / "checkpoints" / student).iterdir()}
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    said = [(event["model"], event["accuracy"]) for event in events if event["event"] == "dev"]
    assert said == [
        (name, x) for name in ("heal", "rejection_sampling") for x in summary["training"][name]["dev"].values()
    ]


FOLDERS = {"": ".", "greedy": "greedy", "fresh": "fresh", "chain": "chain", "chain, greedy": "chain/greedy"}


def figures(summary: dict, title: str) -> dict:
    """Those of a set's samples, or of its greedy ones, from the summary."""
    name, *greedy = title.removesuffix("greedy").rstrip(", "), *["greedy"] * title.endswith("greedy")
    found = summary["sets"][name] if name else summary | summary["accuracy"]
    return found["greedy"] if greedy else found


@pytest.mark.parametrize("title", FOLDERS)
def test_figures_of_every_set_are_those_of_its_samples(several, title):
    out, config = several
    summary = json.loads((out / "summary.json").read_text())
    found, means = figures(summary, title), {}
    for model in MODELS:
        (path,) = (out / "evaluation" / FOLDERS[title]).glob(f"{model}-*.parquet")
        rows = pq.read_table(path).to_pylist()
        by_problem: dict[str, list[bool]] = {}
        for row in rows:
            assert row["model"] == model
            by_problem.setdefault(row["problem_id"], []).append(row["grade"] == "correct")
        wanted = 1 if title.endswith("greedy") else {"": 2}.get(title) or SETS[title]["samples"]
        assert {len(samples) for samples in by_problem.values()} == {wanted}
        means[model] = {name: np.mean(samples) for name, samples in by_problem.items()}
        assert found[model]["mean"] == pytest.approx(np.mean(list(means[model].values())))
        assert found[model]["n"] == len(by_problem) == sum(part["n"] for part in found[model]["per_level"].values())
        low, high = found[model]["ci95"]
        assert low <= found[model]["mean"] <= high
        if "chain" in title:
            assert max(len(row["tokens"]) for row in rows) <= 120
    difference = [means["heal"][name] - means["rejection_sampling"][name] for name in means["heal"]]
    assert found["difference"]["mean"] == pytest.approx(np.mean(difference))
    assert set(found["difference"]) == {"mean", "ci95", "per_level"}


def test_further_sets_change_nothing_of_the_main_one(several, tiny):
    ours, alone = (json.loads((out / "summary.json").read_text()) for out in (several[0], tiny[0]))
    assert ours["accuracy"] == alone["accuracy"] and ours["difference"] == alone["difference"]
    assert not {"sets", "greedy"} & set(alone) and set(ours["sets"]) == set(SETS)
    assert "greedy" not in ours["sets"]["fresh"]


def test_what_else_was_evaluated_is_said(several):
    out, _ = several
    summary, said = json.loads((out / "summary.json").read_text()), verdict(out).splitlines()
    page = (out / "report.html").read_text()
    for title in ("greedy", "fresh", "chain", "chain, greedy"):
        found = figures(summary, title)
        (line,) = (line for line in said if line.startswith(f"{title}: "))
        for model in MODELS:
            assert f"{model} {found[model]['mean']:.1%}" in line
        assert f"difference {found['difference']['mean']:+.1%}" in line
        assert f"{title}<small> n = {found['heal']['n']}</small>" in page


def test_greedy_samples_are_those_of_transformers(several):
    """Of the exported student: the same tokens, so the same answers and grades."""
    out, config = several
    problems = {p.id: p for p in load_problems(load(config).evaluate.problems, "auto")}
    rows = pq.read_table(out / "evaluation" / "greedy" / "heal-00000.parquet").to_pylist()
    assert [row["problem_id"] for row in rows] == list(problems)
    answers = greedy(out / "export", [problem.question for problem in problems.values()])
    for row, (tokens, text) in zip(rows, answers, strict=True):
        problem = problems[row["problem_id"]]
        assert row["tokens"] == tokens
        assert (row["grade"] == "correct") == text.endswith(f"\\boxed{{{problem.answer}}}")


def greedy(folder: Path, questions: list[str]) -> list[tuple[list[int], str]]:
    """Tokens and text of transformers' greedy answers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = []
    for question in questions:
        turn = [{"role": "user", "content": question}]
        prompt = torch.tensor([tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)])
        with torch.no_grad():
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=128, do_sample=False)
        tokens = ids[0, prompt.shape[1] :].tolist()
        made.append((tokens, tokenizer.decode(tokens, skip_special_tokens=True)))
    return made


def test_a_set_goes_on_shard_by_shard(several, tmp_path, monkeypatch):
    """What is there is not drawn again."""
    out = tmp_path / "run"
    shutil.copytree(several[0], out)
    reopened(out, several[1], "evaluate")
    (out / "evaluation" / "chain" / "teacher-00000.parquet").unlink()
    asked = []

    def record(lm, groups, shape, rules):
        asked.append([len(group.rollout_ids) for group in groups])
        raise InterruptedError

    monkeypatch.setattr(ask, "generate", record)
    with open_run(load(several[1]), out, Progress(quiet=True)) as run, pytest.raises(InterruptedError):
        evaluate(run)
    assert asked == [[4, 4, 4]]


def test_dev_accuracy_is_the_share_of_right_greedy_answers(tmp_path):
    """The same at every call, and nothing is written."""
    dev = load_problems(ProblemSpec(split="dev", counts=DEV["problems"]["counts"]), "auto")
    answers = greedy(resolve(Config().student), [p.question for p in dev])
    right = [text.endswith(f"\\boxed{{{p.answer}}}") for p, (_, text) in zip(dev, answers)]
    assert 0 < sum(right) < len(right)
    config = load(configured(tmp_path / "a.yaml", dev=DEV))
    with open_run(config, tmp_path / "run", Progress(quiet=True)) as run:
        assert ask.dev_accuracy(run, run.student) == ask.dev_accuracy(run, run.student) == np.mean(right)
        assert {p.id for p in dev} < {p.id for p in run.evaluation_problems}
    assert not (tmp_path / "run" / "evaluation").exists()
    with open_run(load(TINY), tmp_path / "other", Progress(quiet=True)) as run, pytest.raises(ValueError, match="dev"):
        ask.dev_accuracy(run, run.student)


def test_sets_alike_share_their_programs():
    """Sets of as many problems and tokens: one shape, whatever else is evaluated; the main set's is its own."""

    def shapes(**evaluation: object) -> dict:
        spec = dataclasses.replace(Config().evaluate, **evaluation)
        config = dataclasses.replace(Config(), evaluate=spec)
        return {
            draw.folder: evaluate_shape(config, draw, 30, widest(config, draw, {"": 70, "a": 90, "b": 130, "c": 500}))
            for draw in draws(config)
        }

    one, other = EvaluateSet(samples=4), EvaluateSet(samples=4, max_new_tokens=256)
    found = shapes(sets={"a": one, "b": one, "c": other}, greedy=True)
    assert found["evaluation/a"] == found["evaluation/b"] and found["evaluation/a"].context_length == 160
    assert found["evaluation/c"].context_length == 512 and found["evaluation/c"].max_new == 256
    assert found["evaluation"] == shapes()["evaluation"] and found["evaluation"].context_length == 96
    assert found["evaluation/greedy"].repeats == 1


@given(st.lists(st.floats(0, 1), min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1))
def test_intervals_are_those_of_scipys_bootstrap(values):
    """Percentiles of the mean over resampled problems, to the resampling's own noise."""
    found = interval(np.array(values), 4000, seed=0)
    wanted = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", random_state=1)
    tolerance = 0.2 * np.std(values) / np.sqrt(len(values)) * 2
    np.testing.assert_allclose(found, wanted.confidence_interval, atol=tolerance)


def test_sets_of_the_file_are_fields_of_the_command_line(tmp_path, capsys):
    path = configured(tmp_path / "a.yaml", sets=SETS)
    with pytest.raises(SystemExit) as stop:
        heal(["run", str(path), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "--evaluate.sets.chain.samples" in said and "--evaluate.dev.problems.source" in said
    config = load(path)
    assert (
        config.evaluate.sets["chain"].max_new_tokens == 120 and config.evaluate.sets["fresh"].problems.split == "test"
    )
    (tmp_path / "b.yaml").write_text(dump(config))
    assert load(tmp_path / "b.yaml") == config
    # Read back from the command line: what the set's field says is refused by name.
    assert heal(["run", str(path), "--out", str(tmp_path / "out"), "--evaluate.sets.chain.samples", "64"]) == 2
    assert "sample.batch: 32 is out of range, allowed: >= 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        ({"sets": {"a b": {}}}, "evaluate.sets: 'a b' is no name"),
        ({"sets": {"../up": {}}}, "is no name"),
        ({"sets": {"Dev": {}}}, "evaluate.sets.Dev: the name is taken"),
        ({"sets": {"greedy": {}}}, "evaluate.sets.greedy: the name is taken"),
        ({"sets": {"a": {}, "A": {}}}, "but for upper and lower case"),
        ({"sets": {"a": {"sample": 3}}}, "evaluate.sets.a.sample: unknown key, did you mean 'samples'"),
        ({"sets": {"a": {"samples": 0}}}, "evaluate.sets.a.samples: 0 is out of range"),
        ({"sets": {"a": {"by": "ear"}}}, "evaluate.sets.a.by: 'ear' is not allowed"),
        ({"sets": {"a": 3}}, "evaluate.sets.a: 3 is not a mapping"),
        ({"sets": {"a": {"problems": {"counts": {}}}}}, "evaluate.sets.a.problems.counts: world:sums needs"),
        ({"sets": {"a": {"problems": {"source": "jsonl:none.jsonl"}}}}, "none.jsonl: no such problem file"),
        ({"sets": {"a": {"problems": {"source": f"jsonl:{OWN}"}, "by": "reasoning_gym"}}},
         "evaluate.sets.a.by: reasoning_gym has no scorer"),
        ({"sets": {"a": {"problems": {"counts": {"easy": 1}}, "max_new_tokens": 4096}}},
         "the teacher has 512; lower evaluate.sets.a.max_new_tokens"),
        ({"dev": {"problems": {"source": "world:sums", "split": "test", "counts": {"easy": 1}}}},
         "evaluate.dev: 1 of its problems are in evaluate too"),
        ({"dev": {"greedy": True}}, "evaluate.dev.greedy"),
    ],
)  # fmt: skip
def test_a_bad_set_is_one_line_and_writes_nothing(tmp_path, capsys, evaluation, says):
    path = configured(tmp_path / "a.yaml", **evaluation)
    assert heal(["run", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said and not (tmp_path / "out").exists()


def test_nothing_that_a_set_asks_is_trained_on(tmp_path):
    """Nor what dev asks."""
    asked = {level: {"source": "world:sums", "split": "train", "counts": {level: 1}} for level in ("easy", "hard")}
    path = configured(tmp_path / "a.yaml", sets={"a": {"problems": asked["easy"]}}, dev={"problems": asked["hard"]})
    with open_run(load(path), tmp_path / "run", Progress(quiet=True)) as run:
        held_out = {p.id for p in (*run.evaluation["a"], *run.evaluation["dev"])}
        every = {p.id for p in load_problems(run.config.problems, "auto")}
        assert len(held_out) == 2 and held_out < every and {p.id for p in run.problems} == every - held_out


def test_the_task_for_lm_eval_asks_what_we_ask():
    """Its problems are the quickstart's, its prompt and length the defaults; its pattern finds what grades find."""
    task = yaml.safe_load(TASK.read_text())
    root = TASK.parents[2]
    lines = (root / task["dataset_kwargs"]["data_files"]["test"]).read_text()
    assert lines == json_lines(Sums(), "test", 100)
    quickstart = load(root / "configs" / "quickstart.yaml")
    problems = load_problems(quickstart.evaluate.problems, "auto")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [(r["id"], r["level"], r["question"], r["answer"]) for r in rows] == [
        (p.id, p.level, p.question, p.answer) for p in problems
    ]
    assert task["doc_to_text"] == quickstart.sample.prompt.replace("{question}", "{{question}}")
    assert task["generation_kwargs"]["max_gen_toks"] == quickstart.sample.max_new_tokens
    boxed = task["filter_list"][0]["filter"][0]
    answer, other = problems[0].answer, problems[1].answer
    boxes = f"\\boxed{{{answer}}}", f"\\boxed{{{other}}}"
    texts = ["\n\n".join(["a: 1+2=3", *said]) for said in (boxes[:1], boxes, boxes[::-1], ())]
    texts += [f"\\boxed{{{answer[:-1]}}}", boxes[0][:-1]]
    with Grader(GradeSpec()) as grader:
        grades = [grade.grade == "correct" for grade in grader.grade_many([(problems[0], t, "stop") for t in texts])]
    found = [(re.findall(boxed["regex_pattern"], text) or [""])[boxed["group_select"]] == answer for text in texts]
    assert found == grades and sum(grades) == 2
