"""A student with another tokenizer, chat template and EOS than its teacher: the tiny run through all stages."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from conftest import TINY, start
from folders import own_student
from tokenizers import normalizers

from heal_jax.config import ModelSpec, ProblemSpec, dump
from heal_jax.config import load as load_config
from heal_jax.curriculum import curate
from heal_jax.model.lm import open_tokenizer
from heal_jax.problems.sources import load
from heal_jax.progress import Progress
from heal_jax.run import open_run
from heal_jax.store import RunDirectory
from heal_jax.train.data import batches, read_stage, unpack
from heal_jax.world import model_folder

HELD_OUT = ProblemSpec(split="test", counts={"easy": 2, "medium": 2, "hard": 2})


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The student's folder, the finished run, what it said."""
    student = own_student(tmp_path_factory.mktemp("own") / "student")
    out = tmp_path_factory.mktemp("own") / "run"
    greedy = ("--evaluate.temperature", "0", "--evaluate.samples", "1")
    process = start("run", TINY, "--out", out, "--student.path", student, *greedy)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return student, out, stderr


def test_examples_are_the_students_own_ids(own):
    student, out, stderr = own
    theirs = transformers.AutoTokenizer.from_pretrained(student)
    rows = {row["rollout_id"]: row for row in RunDirectory(out).rollouts().to_pylist()}
    questions = {p["id"]: p["question"] for p in pq.read_table(out / "problems.parquet").to_pylist()}
    decisions = pq.read_table(out / "decisions.parquet").to_pylist()
    teacher = transformers.AutoTokenizer.from_pretrained(model_folder("teacher"))
    seen, teacher_tokens, target_tokens = [], 0, []
    for folder in sorted(out.glob("curriculum/stage*")):
        for example in read_stage(folder):
            row = rows[example.rollout_id]
            turn = [{"role": "user", "content": questions[row["problem_id"]]}]
            prompt = theirs.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            said = teacher.decode(row["tokens"], skip_special_tokens=True)
            assert theirs.decode(example.tokens) == prompt + said + "<|im_end|>"
            assert theirs.decode(example.tokens[: example.prompt_length]) == prompt
            assert list(example.tokens[:-1]) == theirs.encode(prompt) + theirs.encode(said)
            assert example.tokens[-1] == 2 and "Hint" not in said
            with contextlib.closing(batches([example], 1, len(example.tokens), 0, pad_id=0)) as stream:
                batch, _ = unpack(next(stream))
            learned = batch.tokens[batch.mask].tolist()
            assert theirs.decode(learned) == said + "<|im_end|>" and learned[-1] == 2
            seen.append(example.rollout_id)
            teacher_tokens += len(row["tokens"])
            target_tokens.append(len(learned))
    assert sorted(seen) == sorted(d["rollout_id"] for d in decisions if d["kept"]) and len(seen) > 5
    told = {
        "examples": len(seen), "teacher_tokens": teacher_tokens, "student_tokens": sum(target_tokens),
        "longest": max(target_tokens), "dropped": 0,
    }  # fmt: skip
    assert teacher_tokens != sum(target_tokens)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["retokenised"] == told
    assert json.loads((out / "manifest.json").read_text())["stages"]["curate"]["retokenised"] == told
    assert f"{told['student_tokens']} tokens in place of {teacher_tokens} in {len(seen)} examples" in stderr
    assert sum(stage["tokens"] for stage in summary["stages"].values()) == sum(target_tokens)
    # What the teacher wrote is recorded in its own ids.
    for row in rows.values():
        assert teacher.decode(row["tokens"], skip_special_tokens=True) == row["text"]
        assert teacher.decode(row["prompt_tokens"]).endswith("<|assistant|>")


def test_rollouts_and_decisions_of_the_teacher_do_not_depend_on_the_student(own, tiny):
    ours, other = (RunDirectory(out) for out in (own[1], tiny[0]))
    assert ours.rollouts().to_pylist() == other.rollouts().to_pylist()


def greedy(folder: Path, question: str) -> list[int]:
    """What transformers makes of a question, prompt left out."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turn = [{"role": "user", "content": question}]
    prompt = torch.tensor([tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)])
    with torch.no_grad():
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=128, do_sample=False)
    return made[0, prompt.shape[1] :].tolist()


def test_each_model_is_evaluated_with_its_own_tokenizer_template_and_eos(own):
    student, out, _ = own
    folders = {"teacher": model_folder("teacher"), "student_base": student, "heal": out / "export"}
    questions = {p.id: p.question for p in load(HELD_OUT, "auto")}
    for name, folder in folders.items():
        samples = pq.read_table(out / "evaluation" / f"{name}-00000.parquet").to_pylist()
        assert {s["problem_id"] for s in samples} == set(questions)
        for sample in samples[::3]:
            assert sample["tokens"] == greedy(folder, questions[sample["problem_id"]]), name
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / "export" / name).read_bytes() == (student / name).read_bytes()


def test_texts_that_a_tokenizer_cannot_write_have_no_ids(tmp_path):
    plain = open_tokenizer(own_student(tmp_path / "plain"))
    folding = open_tokenizer(own_student(tmp_path / "folding", normalizers.Lowercase()))
    builtin = open_tokenizer(model_folder("student"))
    assert plain.turn_end == 2 and builtin.turn_end == builtin.eos_ids[0]
    for text in ("a: 1+2=3\n\n\\boxed{3}", "Aé日\n", " x", "\n\nx ", "<think>\nx\n\n</think>\n\ny", ""):
        ids = plain.turn(text)
        assert ids[-1] == 2 and plain.hf.decode(ids[:-1]) == text
    assert folding.turn("abc")[-1] == 2
    assert folding.turn("Abc") == ()  # normalised away
    assert builtin.turn("é") == ()  # unknown
    assert plain.turn("a<|im_end|>b") == plain.turn("a<|endoftext|>") == ()  # an EOS within
    assert plain.turn("a\ufffdb") == ()  # broken characters


def test_dropped_texts_are_counted(own, tmp_path):
    """The same rollouts for a student whose tokenizer loses the answer of one of the problems."""
    out = tmp_path / "run"
    shutil.copytree(own[1], out)
    right = [row for row in RunDirectory(out).rollouts().to_pylist() if row["grade"] == "correct"]
    lost = [row["rollout_id"] for row in right if f"{{{right[0]['answer']}}}" in row["text"]]
    folder = own_student(tmp_path / "student", normalizers.Replace(right[0]["answer"] + "}", "}"))
    config = load_config(out / "config.yaml")
    config = dataclasses.replace(config, student=ModelSpec(str(folder)))
    (out / "config.yaml").write_text(dump(config))
    directory = RunDirectory(out)
    del directory.manifest["models"]["student"]
    directory.forget("curate", "train", "evaluate", "export")
    with open_run(config, out, Progress(quiet=True)) as run:
        curate(run)
        told = run.directory.done("curate")["retokenised"]
    assert told["dropped"] == len(lost) < len(right)
    reasons = {d["rollout_id"]: d["reason"] for d in pq.read_table(out / "decisions.parquet").to_pylist()}
    leaked = [row["rollout_id"] for row in right if "hint" in row["text"].lower()]  # that is said first
    assert [i for i in reasons if reasons[i] == "text that the student's tokenizer cannot write"] == [
        i for i in lost if i not in leaked
    ]
