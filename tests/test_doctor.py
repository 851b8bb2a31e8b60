"""`heal doctor`, on machines and configs that are well and on ones that are not."""

import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import TINY
from folders import thinking_teacher
from rich.console import Console

from heal_jax import cache, doctor
from heal_jax.cli import run as heal
from heal_jax.config import Config, load
from heal_jax.doctor import OK, PROBLEM, WARNING, asked, host, machine
from heal_jax.world import model_folder

CPU = {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1, "memory": 0, "used": 0}


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    """As if JAX had found this: asking takes a process. And without the eight devices of the suite."""
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(machine, "devices", lambda: CPU)


def examined(capsys, *arguments: object, status: int) -> list[dict]:
    """The findings that the command prints."""
    capsys.readouterr()
    assert heal(["doctor", *map(str, arguments), "--json"]) == status
    printed = json.loads(capsys.readouterr().out)
    levels = [finding["level"] for finding in printed["findings"]]
    assert [printed["problems"], printed["warnings"]] == [levels.count(PROBLEM), levels.count(WARNING)]
    return printed["findings"]


def bad(findings: list[dict]) -> str:
    return "\n".join(f"{f['level']} {f['topic']}: {f['text']} -> {f['advice']}" for f in findings if f["level"] != OK)


def test_nothing_is_wrong_with_the_built_in_world(tmp_path, capsys):
    found = examined(capsys, TINY, "--out", tmp_path / "new" / "run", status=0)
    topics = {f["topic"] for f in found}
    assert topics >= {"packages", "devices", "memory", "processes", "cache", "disk", "models", "tokenizer", "problems",
                      "lengths", "mesh"}  # fmt: skip
    assert "asked for: " not in bad(found) and "6 held-out problems" in bad(found)
    assert not any(f["level"] == PROBLEM for f in found) and not (tmp_path / "new").exists()
    text = " ".join(f["text"] for f in found)
    assert "12 to train on (0 left out), 6 held out" in text and "0.8 M parameters" in text


def test_the_lines_fit_80_columns(capsys):
    doctor.show(list(doctor.examine(load(TINY), Path("x"))), Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1].startswith("0 problems, 1 warning")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--teacher.path", "nowhere"], "nowhere: no such model folder"),
        (["--mesh.tensor", "3"], "needs 3 devices, there are 1"),
        (["--sample.max_new_tokens", "4000"], "positions, the model has 512 -> lower sample.max_new_tokens"),
        (["--grade.answer_open", "\u4e2d\u6587"], "does not come back as it was, so no answer is found"),
        (["--log.to", "trackio"], "trackio is missing, and the config needs it"),
    ],
)
def test_what_a_run_would_stumble_over(arguments, says, capsys):
    assert says in bad(examined(capsys, TINY, *arguments, status=1))


def test_a_problem_file_that_is_not_there(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("problems: {source: 'jsonl:none.jsonl'}")
    assert "no such problem file" in bad(examined(capsys, tmp_path / "a.yaml", status=1))


def test_example_models_have_no_weights_but_need_memory(capsys):
    said = bad(examined(capsys, TINY.parent / "paper.yaml", "--mesh.fsdp", "1", "--mesh.tensor", "1", status=1))
    assert "no model.safetensors" in said and "no tokenizer.json" in said
    assert "training: at least" in said and "-> set train.lora.rank" in said


def test_a_bad_config_is_one_line(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("sample: {n: many}")
    assert heal(["doctor", str(tmp_path / "bad.yaml")]) == 2
    assert "sample.n" in capsys.readouterr().err


def test_think_tags(tmp_path):
    from heal_jax.config import GradeSpec
    from heal_jax.model.lm import open_tokenizer

    teacher = open_tokenizer(thinking_teacher(tmp_path / "teacher", opens=True))
    (forgotten,) = [f for f in asked.of_tokenizer(Config(), "teacher", teacher) if "think" in f.text]
    assert "grade.think_end is empty" in forgotten.text
    twice = Config(grade=GradeSpec(think_end="</think>", think_open="<think>\n"))
    (opened,) = [f for f in asked.of_tokenizer(twice, "teacher", teacher) if f.level == PROBLEM]
    assert "opens the thinking part" in opened.text


def test_a_tokenizer_without_a_template(tmp_path):
    from heal_jax.model.lm import open_tokenizer

    folder = shutil.copytree(model_folder("teacher"), tmp_path / "base")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    found = list(asked.of_tokenizer(Config(), "teacher", open_tokenizer(folder)))
    assert any(f.level == WARNING and "no chat template" in f.text for f in found)


def test_versions_out_of_bounds(monkeypatch):
    monkeypatch.setattr(host, "_asked_for", lambda: ["numpy>=99", "no-such-package>=1", "rich>=1", "x; extra == 'y'"])
    (wrong,) = [f for f in host.packages() if f.level == PROBLEM]
    assert "numpy" in wrong.text and "no-such-package missing" in wrong.text and "rich" not in wrong.text


def process_with(proc: Path, number: int, command: bytes, *files: str) -> None:
    (proc / str(number) / "fd").mkdir(parents=True)
    (proc / str(number) / "cmdline").write_bytes(command)
    for i, file in enumerate(files):
        os.symlink(file, proc / str(number) / "fd" / str(i))


def test_who_holds_the_tpu(tmp_path, monkeypatch):
    process_with(tmp_path / "proc", 7, b"python\0train.py\0", "/dev/null", "/dev/accel0")
    process_with(tmp_path / "proc", 8, b"bash\0", "/dev/null")
    assert machine.tpu_holders(tmp_path / "proc") == [(7, "python train.py")]
    lock = tmp_path / "libtpu_lockfile"
    assert machine.locked(lock) == ""
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert machine.locked(lock) == "held"
    assert machine.locked(lock) == ""
    monkeypatch.setattr(machine, "tpu_holders", lambda: [(7, "python train.py")])
    first, found = host.of_devices("no devices", "tpu", "")
    assert first.level == PROBLEM and "process 7: python train.py" in first.text and "JAX finds none" in found.text


def test_an_accelerator_that_is_not_used(tmp_path):
    (tmp_path / "nvidia0").touch()
    assert machine.accelerators(tmp_path) == "gpu" and machine.accelerators(tmp_path / "x") == ""
    (unused,) = host.of_devices(CPU, "gpu", "")
    assert unused.level == WARNING and unused.advice == "pip install 'heal-jax[gpu]'"
    (masked,) = host.of_devices(CPU, "gpu", "cpu")
    assert masked.advice == "unset JAX_PLATFORMS to use it"
    (used,) = host.of_devices(CPU | {"platform": "gpu", "kind": "H100", "memory": 80 * 10**9, "count": 8}, "gpu", "")
    assert used.level == OK and used.text == "8 gpu devices (H100, 80.0 GB each)"


def test_a_pod_host_that_is_alone():
    (alone,) = host.of_processes({"TPU_WORKER_HOSTNAMES": "a,b,c,d"})
    assert alone.level == PROBLEM and "HEAL_COORDINATOR=auto" in alone.advice
    (joined,) = host.of_processes({"TPU_WORKER_HOSTNAMES": "a,b", "HEAL_COORDINATOR": "auto"})
    assert joined.level == OK
    with pytest.raises(Exception, match="HEAL_PROCESSES is set"):
        list(host.of_processes({"HEAL_PROCESSES": "2"}))


def test_memory_of_a_container(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  8000000 kB\nMemAvailable:  6000000 kB\n")
    assert machine.host_memory(tmp_path, tmp_path) == (8000000 << 10, 6000000 << 10)
    (tmp_path / "memory.max").write_text("2000000000\n")
    (tmp_path / "memory.current").write_text("500000000\n")
    assert machine.host_memory(tmp_path, tmp_path) == (2000000000, 1500000000)
    assert machine.host_memory(tmp_path / "none", tmp_path) is None


def test_a_cache_that_others_may_write(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [f.level for f in host.compile_cache()] == [OK] and not list(tmp_path.iterdir())
    cache.folder().mkdir(parents=True)
    cache.folder().chmod(0o777)
    (open_to_all,) = host.compile_cache()
    assert open_to_all.level == WARNING and "others may write there" in open_to_all.text


def test_a_check_that_fails_is_a_finding(monkeypatch):
    monkeypatch.setattr(host, "packages", lambda: 1 / 0)
    found = list(doctor.examine(None, Path("x")))
    assert "ZeroDivisionError" in found[0].text and found[-1].topic == "disk"


def test_asking_for_devices(monkeypatch):
    monkeypatch.undo()  # the real thing
    assert machine.devices({**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})["platform"] == "cpu"
    assert "after 0 s" in machine.devices(seconds=0.01)
    assert "nonsense" in machine.devices({**os.environ, "JAX_PLATFORMS": "nonsense"})
