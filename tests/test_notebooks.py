"""The notebooks: what is kept in them, their first cell on each kind of run-time, both run on small settings; and the
interface that they use."""

import filecmp
import glob
import importlib.metadata
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pyarrow.parquet as pq
import pytest
from conftest import ENVIRONMENT
from hypothesis import given
from hypothesis import strategies as st

import heal_jax
from heal_jax import notebook
from heal_jax.cell import Cell, cell_console
from heal_jax.errors import InputError
from heal_jax.report.view import Token, view
from heal_jax.store import RunDirectory
from heal_jax.world import model_folder

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ("quickstart", "your_model")
SCRIPT = runpy.run_path(str(FOLDER / "execute.py"))

WORLD = {
    "problems.counts": {"easy": 4, "medium": 4, "hard": 4},
    "sample.n": 8,
    "hindsight.n": 4,
    "gear": {"paths": 2, "repairs": 4},
    "train.steps": 8,
    "evaluate.problems.counts": {"easy": 2, "medium": 2, "hard": 2},
    "evaluate.samples": 2,
}
YOURS = """
MODEL, PROBLEMS, TRAIN = "model", "mine.jsonl", 7
SETTINGS = {
    "sample.n": 4, "hindsight.n": 2, "gear": {"paths": 2, "repairs": 3}, "evaluate.samples": 1,
    "train": {"steps": 4, "batch": 2, "lora": {"rank": 4}},
}
"""
NO_TENSORFLOW = "import sys\nassert 'tensorflow' not in sys.modules"


def kept(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    return [o for cell in code(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]


def run(name, folder, parameters):
    """The notebook after its cells ran, on one device; TensorFlow must not have come in."""
    notebook = kept(name)
    notebook.cells.append(nbformat.v4.new_code_cell(NO_TENSORFLOW))
    SCRIPT["execute"](notebook, folder, parameters, ENVIRONMENT)
    said = [o for cell in code(notebook) for o in cell.outputs if o.get("name") == "stderr"]
    assert not said, said
    return notebook


@pytest.mark.parametrize("name", NAMES)
def test_kept_outputs_are_those_of_a_whole_run_of_this_code(name):
    path, notebook = FOLDER / f"{name}.ipynb", kept(name)
    nbformat.validate(notebook)
    assert notebook.metadata["heal_jax"]["outputs_of"] == SCRIPT["code_sha256"](notebook), (
        f"the code of {path.name} is not what its outputs are of: python notebooks/execute.py {path.name}"
    )
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert len(pictures(notebook)) >= 4
    text = path.read_text()
    assert not re.search(r"/(home|root|tmp|Users|work|content)/|Warning", text)
    assert len(text) < 500_000


def test_outputs_of_other_code_are_noticed():
    notebook = kept("quickstart")
    code(notebook)[-1].source += "\n"
    assert notebook.metadata["heal_jax"]["outputs_of"] != SCRIPT["code_sha256"](notebook)


def test_the_notebooks_begin_alike():
    first, second = (code(kept(name))[0].source for name in NAMES)
    assert first == second


@pytest.fixture
def setup(monkeypatch, tmp_path):
    """Runs the first cell where heal_jax is not installed; the commands that it gave."""
    commands, version, really = [], importlib.metadata.version, subprocess.run

    def install(command, **options):
        if "git" in command or "pip" in command:
            commands.append(command)
        else:  # matplotlib's, for one
            return really(command, **options)

    def not_installed(name):
        if name == "heal-jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    def first_cell(address="", devices=()):
        monkeypatch.setattr(importlib.metadata, "version", not_installed)
        monkeypatch.setattr(subprocess, "run", install)
        monkeypatch.setattr(shutil, "which", lambda name: name if name in devices else None)
        monkeypatch.setattr(glob, "glob", lambda pattern: [d for d in devices if glob.fnmatch.fnmatch(d, pattern)])
        source = code(kept("quickstart"))[0].source
        assert 'REPOSITORY = ""' in source
        exec(compile(source.replace('REPOSITORY = ""', f"REPOSITORY = {address!r}"), "cell", "exec"), {})
        return commands

    monkeypatch.chdir(tmp_path)
    return first_cell


@pytest.mark.parametrize(
    "devices, extra",
    [((), ""), (("nvidia-smi",), ",gpu-cuda12"), (("/dev/accel0",), ",tpu"), (("/dev/vfio/0",), ",tpu"),
     (("/dev/vfio/vfio",), "")],
)  # fmt: skip
def test_a_clone_is_installed_with_what_the_run_time_has(setup, monkeypatch, devices, extra):
    monkeypatch.chdir(FOLDER)
    (command,) = setup(devices=devices)
    assert command[1:4] == ["-m", "pip", "install"]
    assert command[-1] == f"{FOLDER.parent}[notebook,models{extra}]"
    extras = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"notebook", "models", extra.strip(",") or "models"} <= set(extras)


def test_elsewhere_the_repository_is_cloned_first(setup, tmp_path):
    clone, install = setup("git@example.com:someone/copy.git")
    assert clone[:2] == ["git", "clone"] and clone[-2] == "git@example.com:someone/copy.git"
    assert install[-1] == f"{clone[-1]}[notebook,models]" and Path(clone[-1]).parent == tmp_path


def test_without_an_address_the_first_cell_says_what_to_fill_in(setup):
    with pytest.raises(RuntimeError, match="Set REPOSITORY"):
        setup()


def test_what_was_imported_before_the_install_wants_a_restart(setup, monkeypatch):
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys.modules["numpy"], "__version__", "1.0")
    with pytest.raises(RuntimeError, match="Restart the session and run all again: numpy had"):
        setup()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The notebook after a run on small settings, and its run directory."""
    folder = tmp_path_factory.mktemp("quickstart")
    return run("quickstart", folder, f"SETTINGS = {WORLD}"), folder / "runs" / "quickstart-notebook"


def test_quickstart_runs(quickstart):
    assert len(pictures(quickstart[0])) == 7
    outputs = [output for cell in code(quickstart[0]) for output in cell.outputs]
    lines = [o["data"]["text/plain"] for o in outputs if o.output_type == "display_data"]
    # A stage's lines took each other's place.
    assert sum(line.startswith("train heal") for text in lines for line in text.splitlines()) == 1
    assert (quickstart[1] / "report.html").is_file()


def test_your_model_runs_on_another_folder_and_file(tmp_path):
    shutil.copytree(model_folder("teacher"), tmp_path / "model")
    sums = [(4829110374, 9938201847, 7718829103), (1182033471, 2210044512, 3310220114),
            (9917274865, 8893847766, 9979683758), (5551203348, 1111301120, 2220340421),
            (8799968877, 9888779996, 7989988759), (30211450263, 41120334102, 12203310423),
            (97885969878, 89797986959, 98979878687), (64200317752, 80911265304, 15330942211),
            (20413112051, 11204310220, 30112203411), (79898687978, 98789979889, 88979898597)]  # fmt: skip
    asked = "State the final answer to the following arithmetic problem: {} ="
    rows = [{"question": asked.format(" + ".join(map(str, terms))), "answer": sum(terms)} for terms in sums]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notebook = run("your_model", tmp_path, YOURS)
    assert len(pictures(notebook)) == 4
    assert (tmp_path / "runs" / "your-model" / "export" / "model.safetensors").is_file()


def test_a_run_goes_on_where_it_stopped_and_is_read(quickstart, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(quickstart[1], out)
    shutil.rmtree(out / "export")
    config = heal_jax.configure(WORLD)
    assert heal_jax.distill(config, out, "sample", "export", quiet=True) == out
    assert capsys.readouterr() == ("", "")
    assert filecmp.cmp(
        out / "export" / "model.safetensors", quickstart[1] / "export" / "model.safetensors", shallow=False
    )
    with pytest.raises(InputError, match="no such stage; there are: sample"):
        heal_jax.distill(config, out, "sampel")
    with pytest.raises(InputError, match="made with another config"):
        heal_jax.distill(heal_jax.configure(WORLD, {"seed": 1}), out)
    run = heal_jax.read(out)
    assert run.config == config and run.summary == json.loads((out / "summary.json").read_text())
    assert run.rollouts.num_rows == sum(pq.read_metadata(f).num_rows for f in (out / "rollouts").glob("*.parquet"))
    assert set(run.problems) == set(pq.read_table(out / "problems.parquet")["id"].to_pylist())
    with pytest.raises(InputError, match="not a run directory"):
        heal_jax.read(tmp_path)


def texts(picture):
    return [text.get_text() for text in picture.figure.axes[0].texts]


def test_pictures_of_rollouts_hold_what_was_recorded(quickstart):
    run = heal_jax.read(quickstart[1])
    rows = run.rollouts.to_pylist()
    repair = next(r for r in rows if r["kind"] == "repair" and r["kept_tokens"] and r["step_ppl"])
    failed = notebook.rollout(run, repair["parent_id"])
    steps = view(run, run.rollout(repair["parent_id"])).steps
    at, cut = repair["breakpoint_step"], view(run, repair).kept_steps
    surge = steps[at].entropy - steps[at - 1].entropy
    assert f"cut: {cut} step{'s' * (cut > 1)} kept" in texts(failed)
    assert f"{steps[at].entropy:.2f} ◀ breakpoint, {surge:+.2f}" in texts(failed)
    drawn = texts(notebook.rollout(run, repair["rollout_id"]))
    ratios = [p / (e + 0.01) for p, e in zip(repair["step_ppl"], repair["step_expected_ppl"])]
    assert [text.strip() for text in drawn if text.startswith("  ") and "." in text] == [f"{r:.2f}" for r in ratios]
    assert drawn.count("kept") == cut
    hint = heal_jax.configure(WORLD).gear.hint.replace("{answer}", repair["answer"]).strip()
    assert repair["grade"] != "correct" or hint in " ".join(drawn)
    hindsight = notebook.rollout(run, next(r["rollout_id"] for r in rows if r["kind"] == "hindsight"))
    charts = [draw(run) for draw in (notebook.pass_rates, notebook.scores, notebook.losses, notebook.accuracies)]
    for picture in (failed, hindsight, *charts):
        shown, size = picture._repr_mimebundle_()
        assert shown["image/png"].startswith(b"\x89PNG") and len(shown["image/png"]) < 60_000 and size["image/png"]
    with pytest.raises(InputError, match="no such rollout"):
        notebook.rollout(run, "nowhere")


def test_pictures_of_what_is_not_there_yet_name_the_stage(tmp_path):
    RunDirectory(tmp_path).update()
    run = heal_jax.read(tmp_path)
    for picture, stage in (("pass_rates", "sample"), ("scores", "repair"), ("losses", "train"), ("accuracies", "eval")):
        with pytest.raises(InputError, match=f"stage {stage}"):
            getattr(notebook, picture)(run)


@given(st.lists(st.text(max_size=90), max_size=12))
def test_a_step_is_drawn_whole_in_lines_that_fit(parts):
    lines = notebook._lines(SimpleNamespace(tokens=[Token(text, 0.5) for text in parts]))
    drawn = "".join(text for line in lines for text, _ in line)
    text = "".join(parts)
    assert len(drawn) == len(text)
    assert all(
        a == b or (a == "↵" and b == "\n") or (a == "\u2423" and not b.isprintable()) for a, b in zip(drawn, text)
    )
    for line in lines:
        assert sum(notebook._width(text) for text, _ in line) <= notebook.WIDE


def test_progress_in_a_cell_keeps_one_line_a_stage(monkeypatch):
    shown = []

    def display(data, **options):
        shown.append(data["text/plain"])
        return SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))

    monkeypatch.setattr("IPython.display.display", display)
    file = Cell()
    for line in ("sample     1/3", "sample     2/3", "note: a", "note: b", "repair     1/1"):
        print(line, file=file)
    assert isinstance(file, io.TextIOBase) and not file.isatty()
    assert shown[-1].splitlines() == ["sample     2/3", "note: a", "note: b", "repair     1/1"]
    assert cell_console() is None  # no notebook here
