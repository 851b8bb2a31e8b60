"""Broken and hostile input: a few hundred drawn cases, and each one that was ever found to get through."""

import json
import os
from pathlib import Path

import pytest

from heal_jax.bench.fuzz import command, watch, worker
from heal_jax.bench.fuzz.config import LAUGHS
from heal_jax.bench.fuzz.model import INDEX, PICKLE, TEMPLATE, WEIGHTS, Folder
from heal_jax.bench.fuzz.problems import Problems
from heal_jax.bench.fuzz.run import Damage, signed
from heal_jax.errors import InputError, RunError
from heal_jax.progress import Progress

CASES = {"config": 150, "problems": 120, "model": 40, "run": 10}
ALIAS = b"problems: {options: {a: &a [*a]}}"


@pytest.fixture(scope="module")
def kinds(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    out, _, _ = tiny
    made = {}
    for name in CASES:
        (folder / name).mkdir()
        made[name] = worker.kind(name, folder / name, out)
    return made, folder


@pytest.mark.parametrize("name", CASES)
def test_no_case_gets_through(kinds, name):
    made, folder = kinds
    done = worker.work(made[name], CASES[name], 0, folder / name)
    assert done["failures"] == []
    assert done["cases"] == done["accepted"] + done["refused"] >= CASES[name]
    assert done["accepted"] and done["refused"]  # else the cases are all alike


@pytest.mark.parametrize(
    "text, said",
    [
        (b"[" * 3000, "nested too deeply"),
        (b"seed: [[[[" + b"{a: " * 60 + b"1", "flow"),
        (LAUGHS.encode() + b"\nseed: *a29", "too many or too deeply nested"),
        (ALIAS, "an alias of what it is in"),
        (b"seed: 2001-13-45", "line 1: '2001-13-45' is no timestamp"),
        (b"sample:\n  n: !!int abc", "line 2: 'abc' is no int"),
        (b"seed: !!float ''", "is no float"),
        (b"seed: !!bool maybe", "is no bool"),
        (b"seed: !!timestamp x", "is no timestamp"),
        (b"problems: !!map 3", "'3' is not a mapping"),
        (b"seed: " + b"9" * 5000, "is no int"),
        (b"seed: 0x" + b"f" * 5000, "seed: a number of thousands of digits is out of range"),
        (b"pure: {epsilon: 1" + b"0" * 400 + b"}", "pure.epsilon: "),
        (b"log: {project: \"\\ud800\"}", "log.project: "),
        (b"teacher: {path: \"\\0\"}", "teacher.path: "),
        (b"problems: {options: {a: .nan}}", "problems.options.a: nan is not plain data"),
        (b"problems: {options: {a: 2001-01-01}}", "problems.options.a: "),
        (b"problems: {options: {1: 2}}", "problems.options: 1 is not text"),
        (b"seed: 1\nseed: 2", "config.yaml: seed: given twice"),
        (b"gear: {leak_patterns: ['" + b"(" * 2000 + b"']}", "gear.leak_patterns: "),
        (b"#" * (1 << 18), "a config is short"),
        (b"x: !!python/object/apply:os.system [id]", "could not determine a constructor"),
    ],
)  # fmt: skip
def test_configs_are_refused_by_field_or_line(kinds, tmp_path, text, said):
    assert said in watch.refusal(kinds[0]["config"], text, tmp_path)


def _config(**fields):
    from heal_jax.world import model_folder

    raw = json.loads((model_folder("student") / "config.json").read_text())
    return {"config.json": json.dumps(raw | fields).encode()}


def _index(name):
    return {INDEX: json.dumps({"weight_map": {"model.norm.weight": name}}).encode()}


LOOPS = b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "files, said",
    [
        (_config(num_hidden_layers=10**9), "config.json: num_hidden_layers is out of range"),
        (_config(num_hidden_layers=900), "tensors are too few for 900 layers"),
        (_config(head_dim=10**400), "config.json: head_dim is out of range"),
        (_config(rope_parameters={"rope_type": "default", "rope_theta": 10**400}), "rope_parameters is out of range"),
        ({"generation_config.json": b'{"eos_token_id": [{}, []]}'}, "no valid eos_token_id"),
        ({"tokenizer_config.json": b"[" * 100_000}, "tokenizer_config.json: not valid JSON"),
        ({"generation_config.json": b"[" * 100_000}, "generation_config.json: not a JSON object"),
        ({TEMPLATE: b"{{ 'x' * 10**7 }}"}, "chat template cannot be applied (it raises numbers to powers"),
        ({TEMPLATE: b"{{ 'x' * 10000000 }}"}, "chat template cannot be applied (it makes a prompt of 10000000"),
        (_index("../outside.safetensors"), "'../outside.safetensors' is not a file in this folder"),
        (_index("x" * 300), "is not a file in this folder"),
        ({WEIGHTS: None, "pytorch_model.bin": PICKLE}, "no model.safetensors"),
        ({WEIGHTS: (2**62).to_bytes(8, "little") + b"{}"}, "damaged or truncated"),
    ],
)  # fmt: skip
def test_model_folders_are_refused_by_name(kinds, tmp_path, files, said):
    assert said in watch.refusal(kinds[0]["model"], Folder("llama", files), tmp_path)


def test_a_length_in_the_tokenizer_that_is_none(kinds, tmp_path):
    """It has no meaning here: prompts are measured against the model's positions."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "model_max_length": []}
    case = Folder("llama", {"tokenizer_config.json": json.dumps(settings).encode()})
    assert watch.refusal(kinds[0]["model"], case, tmp_path) == ""


def test_a_template_that_loops_is_stopped(kinds, tmp_path, monkeypatch):
    monkeypatch.setattr("heal_jax.model.tokenizer.TEMPLATE_SECONDS", 0.2)
    assert "TimeoutError" in watch.refusal(kinds[0]["model"], Folder("llama", {TEMPLATE: LOOPS}), tmp_path)


@pytest.mark.parametrize("pattern", ["(" * 2000, "(a{99999999999})"])
def test_an_answer_pattern_that_python_cannot_compile(kinds, tmp_path, pattern):
    case = Problems("jsonl", b'{"question": "a", "answer": 1}', spec={"answer_pattern": pattern})
    assert "problems.answer_pattern: " in watch.refusal(kinds[0]["problems"], case, tmp_path)


def test_a_table_with_two_columns_of_one_name(kinds, tmp_path):
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 3, names=["question", "answer", "question"]), file)
    said = watch.refusal(kinds[0]["problems"], Problems("parquet", file.getvalue()), tmp_path)
    assert "two columns are named 'question'" in said


def _manifests(out, **changes):
    """Both copies, changed and signed."""
    data = signed(json.loads((out / "manifest.json").read_text()) | changes)
    return tuple((name, "bytes", data) for name in ("manifest.json", "manifest.json.backup"))


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": {"../beside": "0" * 64}},
        {"shards": {"rollouts/" + "x" * 300: "0" * 64}},
        {"files": {"train": {"/etc/hostname": "0" * 64}}},
        {"models": {"teacher": None}},
        {"models": {"other": {"path": "", "sha256": ""}}},
        {"also": 3},
    ],
)
def test_manifests_that_name_other_things_are_refused(kinds, tiny, tmp_path, changes):
    case = Damage(_manifests(tiny[0], **changes), "open")
    assert "manifest.json: damaged" in watch.refusal(kinds[0]["run"], case, tmp_path)


@pytest.mark.parametrize(
    "edits, does, said",
    [
        ([(".lock", "folder", None)], "open", ".lock: cannot be opened"),
        ([(".lock", "link", "../beside.parquet")], "open", ".lock: cannot be opened"),
        ([("manifest.json", "folder", None)], "open", ""),
        ([("config.yaml", "folder", None), ("removed.jsonl", "folder", None)], "open", ""),
        ([("report.html", "folder", None)], "report", ""),
        ([("metrics.jsonl", "folder", None), ("summary.json", "folder", None)], "report", ""),
        ([("summary.json", "bytes", b'{"accuracy": 5, "strata": {}}')], "report", ""),
        ([("summary.json", "bytes", b"[" * 100_000)], "report", ""),
        ([("metrics.jsonl", "bytes", b'{"event": "train", "model": [], "step": "x"}\n')], "report", ""),
        ([("problems.parquet", "swap", "decisions.parquet")], "report", ""),
    ],
)
def test_damaged_runs_are_opened_or_refused(kinds, tmp_path, edits, does, said):
    found = watch.refusal(kinds[0]["run"], Damage(tuple(edits), does), tmp_path)
    assert said in found if said else not found


def _kind(attempt):
    return watch.Kind("made", None, None, lambda case, folder: attempt(), lambda case, folder: ("mine.txt",))


def test_what_no_case_may_do_is_a_failure(tmp_path, monkeypatch):
    """The watch sees a hang, code that data runs, a culprit without a name, and memory without end."""

    def unpickle():
        import pickle

        pickle.loads(PICKLE)

    def refuse():
        raise InputError("something is wrong")

    def hang():
        while True:
            try:
                while True:
                    pass
            except Exception:  # as code that wraps whatever a library raises
                continue

    monkeypatch.setattr(watch, "SECONDS", 0.2)
    for attempt, said in ((unpickle, "ran or fetched"), (refuse, "not named"), (hang, "more than 0.2 s")):
        with pytest.raises(watch.Failure, match=said):
            watch.refusal(_kind(attempt), None, tmp_path)
    with pytest.raises(MemoryError):
        watch.refusal(_kind(lambda: bytearray(1 << 36)), None, tmp_path)


def test_a_failure_is_shrunk_and_ends_the_command(tmp_path, monkeypatch, capsys):
    from hypothesis import strategies as st

    def attempt(case, folder):
        if len(case) > 3:
            raise KeyError("a bug")

    kind = watch.Kind("made", "", st.text(), attempt, lambda case, folder: ())
    done = worker.work(kind, 200, 0, tmp_path)
    (failure,) = done["failures"]
    assert failure["case"] == repr("0000") and "KeyError" in failure["what"] and "attempt" in failure["where"]

    result = {
        "seed": 0,
        "cases": 1,
        "accepted": 0,
        "refused": 0,
        "failures": 1,
        "kinds": {"made": done},
        "seconds": 1.0,
    }
    monkeypatch.setattr(command, "measure", lambda *arguments: result)
    with pytest.raises(RunError, match="1 cases fail"):
        command.run(1, 0, Path("tiny.yaml"), Progress(quiet=True), tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == result
    said = capsys.readouterr().out
    kept = Path(next(line for line in said.splitlines() if ".txt: " in line).partition(": ")[0])
    assert "heal bench fuzz --cases 1 --seed 0" in kept.read_text() and repr("0000") in kept.read_text()


def test_a_process_that_dies_is_a_failure(tmp_path, monkeypatch):
    """As a crash of a library in C would end it: the case is known."""
    (tmp_path / "made").mkdir()
    program = "import sys, os; open(os.path.join(sys.argv[6], 'current.txt'), 'w').write('7\\nthe case'); os.abort()"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {os.sys.executable} -c "{program}" "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(command.sys, "executable", str(fake))
    found = command._kind("made", 10, 0, tmp_path, dict(os.environ), Progress(quiet=True))
    assert found["cases"] == 7 and found["failures"][0]["case"] == "the case"


def test_without_hypothesis_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'heal-jax\[fuzz\]'"):
        command.run(1, 0, Path("tiny.yaml"), Progress(quiet=True), None)


def test_a_deadline_ends_loops_on_any_thread_and_nothing_after():
    import threading
    import time

    from heal_jax.deadline import deadline

    found = []

    def late():
        try:
            with deadline(0.05):
                while True:
                    pass
        except TimeoutError:
            found.append("late")

    thread = threading.Thread(target=late)
    thread.start()
    with deadline(0.1):
        found.append("in time")
    thread.join(20)
    time.sleep(0.2)  # past both
    assert sorted(found) == ["in time", "late"]
