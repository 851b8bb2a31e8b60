"""The tiny configuration from the command line: every stage, interruptions, refusals."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from conftest import TINY, refused, start

from heal_jax.bench.faults import content
from heal_jax.cli import run as heal
from heal_jax.config import Config, ModelSpec, dump
from heal_jax.model.lm import open_model, resolve
from heal_jax.rollout.generate import Group, generate
from heal_jax.rollout.sampling import Greedy
from heal_jax.shapes import at_once
from heal_jax.store import RunDirectory
from heal_jax.train.data import read_stage


def test_files_and_figures_agree(tiny):
    out, stdout, stderr = tiny
    assert "HEAL minus rejection sampling" in stdout and "tokens/s" not in stdout
    assert "base" in stderr and "correct" in stderr
    for name in ("config.yaml", "manifest.json", "problems.parquet", "decisions.parquet", "metrics.jsonl",
                 "summary.json", "report.html", "export/config.json", "export/tokenizer.json"):  # fmt: skip
        assert (out / name).is_file(), name
    summary = json.loads((out / "summary.json").read_text())
    problems = pq.read_table(out / "problems.parquet").to_pylist()
    decisions = {d["rollout_id"]: d for d in pq.read_table(out / "decisions.parquet").to_pylist()}
    rows = RunDirectory(out).rollouts().to_pylist()
    assert len({row["rollout_id"] for row in rows}) == len(rows) == len(decisions)
    base = [row for row in rows if row["kind"] == "base"]
    for problem in problems:
        grades = [row["grade"] for row in base if row["problem_id"] == problem["id"]]
        assert len(grades) == 8
        rate = grades.count("correct") / 8
        assert problem["pass_rate"] == pytest.approx(rate)
        want = "solved" if rate >= 0.5 else "unsolved" if rate <= 1 / 8 else "hard"
        assert problem["stratum"] == want
    strata = [problem["stratum"] for problem in problems]
    assert summary["strata"] == {
        "solved": strata.count("solved"),
        "hard": len(strata) - strata.count("solved"),
        "unsolved": strata.count("unsolved"),
    }
    by_stage = {s: [i for i, d in decisions.items() if d["stage"] == s] for s in (0, 1, 2, 3)}
    for stage in (1, 2, 3):
        assert summary["stages"][str(stage)]["examples"] == len(by_stage[stage])
        folder = out / "curriculum" / f"stage{stage}"
        examples = read_stage(folder) if folder.is_dir() else []
        assert [e.rollout_id for e in examples] == by_stage[stage]
        stored = {row["rollout_id"]: row for row in rows}
        for e in examples:
            row = stored[e.rollout_id]
            assert list(e.tokens) == row["prompt_tokens"] + row["tokens"] and row["grade"] == "correct"
    for kind in ("hindsight", "repair"):
        of_kind = [row for row in rows if row["kind"] == kind]
        assert summary[kind]["candidates"] == len(of_kind)
        assert summary[kind]["correct"] == sum(row["grade"] == "correct" for row in of_kind)
        assert summary[kind]["kept"] == sum(decisions[row["rollout_id"]]["kept"] for row in of_kind)
    for name, figures in summary["accuracy"].items():
        samples = pq.read_table(out / "evaluation" / f"{name}-00000.parquet").to_pylist()
        assert figures["mean"] == pytest.approx(np.mean([s["grade"] == "correct" for s in samples]))
        assert figures["ci95"][0] <= figures["mean"] <= figures["ci95"][1] and figures["n"] == 6
        assert set(figures["per_level"]) == {"easy", "medium", "hard"}
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["models"]) == {"teacher", "student"} and manifest["versions"]["jax"]
    assert manifest["seeds"]["run"] == 0 and manifest["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1, "expert": 1}


def test_hints_are_in_no_training_text(tiny):
    out, *_ = tiny
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "export")
    for row in RunDirectory(out).rollouts().to_pylist():
        prompt = tokenizer.decode(row["prompt_tokens"])
        assert "final answer is" not in prompt
        if row["kind"] == "repair":
            assert row["context_tokens"][: len(row["prompt_tokens"]) + row["kept_tokens"]] == (
                row["prompt_tokens"] + row["tokens"][: row["kept_tokens"]]
            )
            assert "Hint: The final answer is" in tokenizer.decode(row["context_tokens"])
            assert len(row["entropy"]) == len(row["tokens"]) - row["kept_tokens"]
    for stage in out.glob("curriculum/stage*"):
        for example in read_stage(stage):
            assert "int:" not in tokenizer.decode(example.tokens) and "answer is" not in tokenizer.decode(
                example.tokens
            )


def test_a_finished_run_is_left_alone(tiny):
    out, *_ = tiny
    before = content(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    process = start("run", TINY, "--out", out)
    _, stderr = process.communicate()
    assert process.returncode == 0 and "export     done before" in stderr
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == times
    assert content(out) == before


def test_a_changed_config_is_refused_with_a_diff(tiny, capsys):
    said = refused(capsys, "run", TINY, "--out", tiny[0], "--sample.n", "16", "--gear.window", "0.5")
    assert "sample.n: 8 -> 16" in said and "gear.window: 0.33" in said and "another --out" in said


@pytest.mark.parametrize(
    ("yaml_text", "says"),
    [
        ("sampel: {n: 3}", "did you mean 'sample'"),
        ("sample: {n: 0}", "sample.n: 0 is out of range, allowed: >= 1"),
        ("sample: {n: many}", "sample.n: 'many' is not a whole number"),
        ("gear: {hint: no}", "gear.hint"),
        ("gear: {hint: nothing}", "must contain {answer}"),
        ("pace: {steps: [1, 1, 1]}", "sum to 1"),
        ("teacher: {path: nowhere}", "no such model folder"),
        ("problems: {source: 'jsonl:nowhere.jsonl'}", "nowhere.jsonl"),
        ("problems: {split: test}", "no training problem is left: 6 of 6 training problems are left out (6 held out)"),
        ("problems: {fields: {question: q}}", "problems.fields: has no meaning"),
        ("grade: {by: choose}", "'choose' is not allowed"),
        ("sample: {n: 8, n: 9}", "n: given twice"),
        ("sample: {batch: 4}", "sample.batch: 4 is out of range, allowed: >= 8"),
        ("evaluate: {problems: {source: 'rg:nothing'}}", "rg:nothing"),
        ("seed: -1", "seed: -1 is out of range"),
        ("grade: {timeout: .inf}", "grade.timeout"),
        ("grade: {think_open: <think>}", "grade.think_open"),
        ("grade: {think_open: ' ', think_end: </think>}", "grade.think_open"),
        ("sample: {max_new_tokens: 4000}", "positions"),
        ("mesh: {data: 3}", "devices"),
        ("mesh: {tensor: 2}", "the student's 3 key-value heads; nearest: tensor=1"),
        ("- 1", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, yaml_text, says):
    config = yaml.safe_load(TINY.read_text())
    try:
        change = yaml.safe_load(yaml_text)
    except yaml.YAMLError:
        change = None
    path = tmp_path / "config.yaml"
    if isinstance(change, dict) and "twice" not in says:
        for key, value in change.items():
            config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
        if "split" in change.get("problems", {}):
            config["problems"] = {**config["evaluate"]["problems"]}
        path.write_text(yaml.safe_dump(config))
    else:
        path.write_text(yaml_text)
    out = tmp_path / "out"
    assert says in refused(capsys, "run", path, "--out", out)
    assert not out.exists()


def test_commands_that_make_no_sense(tmp_path, capsys):
    assert "did you mean 'sample'" in refused(capsys, "sampel")
    assert "no such config file" in refused(capsys, "run", tmp_path / "none.yaml", "--out", tmp_path / "out")
    assert "not a run directory" in refused(capsys, "report", tmp_path)
    assert "not a run directory" in refused(capsys, "show", tmp_path)
    assert "run `heal sample`" in refused(capsys, "repair", TINY, "--out", tmp_path / "out")
    assert "--sample.n" in refused(capsys, "run", TINY, "--out", tmp_path / "out", "--sample.n", "many")
    assert "--no-such" in refused(capsys, "run", TINY, "--out", tmp_path / "out", "--no-such", "1")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, "run", TINY, "--out", tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("weights", "model.safetensors"),
        ("generation", "not a JSON object"),
        ("epsilon", "rms_norm_eps"),
        ("eos", "no valid eos_token_id"),
        ("template", "chat template cannot be applied"),
        ("raising template", "chat template cannot be applied (no)"),
        ("more tokens", "ids up to 5000, the model's vocabulary ends at 301"),
        ("ids out of range", "ids up to 900, the model's vocabulary ends at 301"),
        ("truncated tokenizer", "no usable tokenizer"),
        ("other format", "no usable tokenizer"),
        ("no tokenizer", "no tokenizer.json"),
        ("pickle", "no tokenizer.json"),
        ("remote code", "auto_map names code"),
        ("other files", "fast_tokenizer_files names code or files"),
        ("settings", "a JSON object is expected"),
        ("truncated settings", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_damaged_model_folder_is_one_line_and_writes_nothing(tmp_path, capsys, how, says, which):
    folder = tmp_path / which
    shutil.copytree(resolve(ModelSpec(f"builtin:{which}")), folder)
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    marker = tmp_path / "executed"
    if how == "epsilon":
        config["rms_norm_eps"] = "small"
    elif how == "template":
        settings["chat_template"] = "{% for %}"
    elif how == "raising template":
        settings["chat_template"] = "{{ raise_exception('no') }}"
    elif how == "more tokens":
        tokenizer["model"]["vocab"] |= {f"more{i}": i for i in range(302, 5001)}
    elif how == "ids out of range":
        tokenizer["model"]["vocab"]["~"] = 900
    elif how == "other format":
        tokenizer = {"version": "1.0", "model": {"type": "Markov"}}
    elif how == "remote code":
        settings |= {"auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}, "tokenizer_class": "Own"}
        (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    elif how == "other files":
        settings["fast_tokenizer_files"] = ["tokenizer.4.0.json"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("[]" if how == "settings" else json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, file in (("weights", "model.safetensors"), ("truncated tokenizer", "tokenizer.json"),
                       ("truncated settings", "tokenizer_config.json")):  # fmt: skip
        if how == name:
            (folder / file).write_bytes((folder / file).read_bytes()[:-5])
    if how == "generation":
        (folder / "generation_config.json").write_text("[1")
    elif how == "eos":
        (folder / "generation_config.json").write_text('{"eos_token_id": [2, 700]}')
    elif how in ("no tokenizer", "pickle"):
        (folder / "tokenizer.json").unlink()
    if how == "pickle":  # whoever unpickles it leaves a mark
        (folder / "vocab.pkl").write_bytes(pickle.dumps(Executed(marker)))
        (folder / "tokenizer.model").write_bytes(pickle.dumps(Executed(marker)))
    said = refused(capsys, "run", TINY, "--out", tmp_path / "out", f"--{which}.path", folder)
    assert says in said and which in said
    assert not (tmp_path / "out").exists() and not marker.exists()


class Executed:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        heal(["run", "--help"])
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for name in ("--sample.n", "--gear.window", "--pure.threshold", "--evaluate.problems.split", "--mesh.tensor"):
        assert name in said
    assert heal([]) == 0 and "heal run CONFIG.yaml" in capsys.readouterr().out


def test_export_gives_the_same_logits_and_greedy_text(tiny):
    out, *_ = tiny
    folder = out / "export"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lm = open_model(ModelSpec(str(folder)))
    import jax.numpy as jnp
    from flax import nnx

    decoder = nnx.merge(lm.model.graph, lm.model.params)
    for problem in pq.read_table(out / "problems.parquet").to_pylist()[:3]:
        turn = [{"role": "user", "content": problem["question"]}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert prompt == lm.tokenizer.prompt(problem["question"])
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt])).logits.numpy()
            generated = theirs.generate(torch.tensor([prompt]), max_new_tokens=128, do_sample=False)[0, len(prompt) :]
        np.testing.assert_allclose(decoder.logits(decoder(jnp.asarray([prompt]))), logits, atol=1e-3, rtol=1e-4)
        ours = generate(lm, [Group(tuple(prompt), ("g",), 128)], at_once(1, 1, 64, 128), (Greedy(),))[0][0]
        assert lm.tokenizer.text(list(ours.tokens)) == tokenizer.decode(generated, skip_special_tokens=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (open_model(ModelSpec("builtin:student")).folder / name).read_bytes()


def test_your_own_problems(tmp_path):
    problems = tmp_path / "mine.jsonl"
    pairs = [(4829110374, 9938201847, 7718829103), (1182033471, 2210044512, 3310220114)]
    question = "State the final answer to the following arithmetic problem: {} + {} + {} ="
    lines = [json.dumps({"question": question.format(*terms), "answer": sum(terms)}) for terms in pairs]
    problems.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    config = yaml.safe_load(TINY.read_text()) | {"problems": {"source": f"jsonl:{problems}"}}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(config))
    process = start("sample", path, "--out", out)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    rows = RunDirectory(out).rollouts("base").to_pylist()
    for row in rows:
        right = row["answer"] == str(sum(pairs[[r["problem_id"] for r in rows].index(row["problem_id"]) // 8]))
        assert (row["grade"] == "correct") == right
    assert {row["grade"] for row in rows} >= {"correct"}


def test_training_problems_are_cleaned_before_anything_uses_them(tmp_path, capsys):
    from heal_jax.config import load
    from heal_jax.progress import Progress
    from heal_jax.run import open_run
    from heal_jax.summary import summarise

    def write(name, *pairs):
        lines = (json.dumps({"question": question, "answer": answer}) for question, answer in pairs)
        (tmp_path / name).write_text("\n".join(lines) + "\n")

    copied = "How many of the seven red hens sit in the old barn when it rains?"
    write("train.jsonl", ("1 + 1?", "2"), ("1 + 1? ", "2"), ("2 + 2?", "4"), (f"Say: {copied}", "7"), ("3 + 3?", "6"))
    write("test.jsonl", (copied, "7"), ("2  + 2?", "4"))
    settings = {
        "problems": {"source": f"jsonl:{tmp_path}/train.jsonl"},
        "train": {"batch": 8},
        "evaluate": {"problems": {"source": f"jsonl:{tmp_path}/test.jsonl", "split": "test"}},
    }
    path, out = tmp_path / "a.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(settings))
    written = []
    for _ in range(2):  # begun, and gone on with
        with open_run(load(path), out, Progress(quiet=True)) as run:
            assert [p.id for p in run.problems] == ["train-train-1", "train-train-5"]
            assert len(run.evaluation_problems) == 2
            figures = {"duplicates": 1, "conflicts": 0, "near_duplicates": 0, "held_out": 1, "ngrams": 1}
            assert summarise(run)["hygiene"] == {"loaded": 5, **figures, "kept": 2}
        written.append((out / "removed.jsonl").read_text())
    rows = [json.loads(line) for line in written[0].splitlines()]
    assert [(row["place"].rpartition("/")[2], row["reason"]) for row in rows] == [
        ("train.jsonl:2", "duplicate"),
        ("train.jsonl:3", "held out"),
        ("train.jsonl:4", "n-gram"),
    ]
    assert rows[2]["ngram"] == "how many of the seven red hens sit" and rows[2]["other_place"].endswith("test.jsonl:1")
    assert written[0] == written[1]
    # The run is about what stays: other problems that are left out change nothing, others that stay do.
    write("train.jsonl", ("1 + 1?", "2"), *[("1  + 1?", "3")] * 2, ("2 + 2?", "4"), ("3 + 3?", "6"))
    with open_run(load(path), out, Progress(quiet=True)) as run:
        assert run.hygiene["conflicts"] == 2 and (out / "removed.jsonl").read_text().count('"conflict"') == 2
    write("train.jsonl", ("1 + 1?", "2"), *[("1  + 1?", "3")] * 2, ("2 + 4?", "6"), ("3 + 3?", "6"))
    assert "its problems have changed" in refused(capsys, "sample", path, "--out", out)


def test_reference_answers_that_cannot_be_compared_are_refused_with_their_line(tmp_path, capsys):
    lines = [{"question": f"{n}?", "answer": answer} for n, answer in enumerate(("4", "x^2+", "x^2", "\\frac{1}{"))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = yaml.safe_load(TINY.read_text()) | {"problems": {"source": f"jsonl:{tmp_path}/train.jsonl"}}
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(config))
    said = refused(capsys, "sample", path, "--out", tmp_path / "out")
    assert (
        "train.jsonl:2: no answer can be compared with 'x^2+'" in said and f"1 more: {tmp_path}/train.jsonl:4" in said
    )
    assert "grade.unreadable" in said and not (tmp_path / "out").exists()


def test_config_survives_its_own_file(tmp_path):
    from heal_jax.config import load

    path = tmp_path / "config.yaml"
    path.write_text(dump(Config()))
    assert load(path) == Config()


def test_the_prompt_template_stands_wherever_a_plain_prompt_does(tmp_path, monkeypatch):
    from heal_jax import ask, collect, evaluate
    from heal_jax.config import load
    from heal_jax.progress import Progress
    from heal_jax.run import open_run

    for split, terms in (("train", "12 + 7"), ("test", "30 + 4")):
        line = {"question": f"Add: {terms}", "answer": "19", "id": f"{split}-0"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
    settings = {
        "problems": {"source": f"jsonl:{tmp_path}/train.jsonl"},
        "train": {"batch": 8},
        "sample": {"prompt": "{question} {x} ="},
        "evaluate": {"problems": {"source": f"jsonl:{tmp_path}/test.jsonl", "split": "test"}},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(settings))

    def decode(lm, groups, *_):
        seen.extend(group.context for group in groups)
        raise InterruptedError

    seen = []
    for module in (collect, ask):
        monkeypatch.setattr(module, "generate", decode)
    with open_run(load(tmp_path / "a.yaml"), tmp_path / "out", Progress(quiet=True)) as run:
        for stage in (lambda: collect.sample(run), lambda: evaluate.evaluate_one(run, "teacher")):
            with pytest.raises(InterruptedError):
                stage()
        written = [tuple(run.teacher.tokenizer.prompt(f"Add: {terms} {{x}} =")) for terms in ("12 + 7", "30 + 4")]
        assert seen == written and run.prompts == {"train-0": written[0]}


def test_a_prompt_template_without_a_question_is_refused(tmp_path, capsys):
    said = refused(capsys, "run", TINY, "--out", tmp_path / "out", "--sample.prompt", "Reply with a number.")
    assert "sample.prompt" in said and "{question}" in said and not (tmp_path / "out").exists()
