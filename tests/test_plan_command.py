"""`heal plan` as a command, and the paper's configuration on real topologies."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from plans import named, on_slice

from heal_jax import cli
from heal_jax.config import load
from heal_jax.model.config import decoder_config
from heal_jax.plan.estimate import estimate, roof
from heal_jax.plan.topology import SLICES

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:3x5", "v5p:4x8", "v6e:", ""])
def test_unknown_slices_are_one_line_with_the_known(name, capsys):
    assert cli.run(["plan", str(TINY), "--topology", name]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(f"{chip}: {' '.join(s)}" in said for chip, s in SLICES.items())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--topology"),
        (["--topology", "v5e:2x2", "--hard", "1.5"], "--hard"),
        (["--topology", "v5e:2x2", "--problems", "0"], "--problems"),
        (["--topology", "v5e:2x2", "--mesh.tensor", "3"], "mesh"),
        (["--topology", "v5e:2x2", "--price-per-chip-hour", "-1"], "--price-per-chip-hour"),
        (["--topology", "v5e:2x2", "--price-per-chip-hour", "nan"], "--price-per-chip-hour"),
        (["--topology", "v5e:2x2", "--hard", "0.1"], "--unsolved 0.25"),
        (["--topology", "v5e:2x2", "--decode-steps", "129"], "--decode-steps"),
        (["--topology", "v5e:2x2", "--json", "."], "--json"),
        (["--topology", "v5e:2x2", "--json", "nowhere/plan.json"], "--json"),
        (["--topology", "v5e:2x2", "--teacher.path", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, says, capsys):
    assert cli.run(["plan", str(TINY), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said


def test_two_plans_at_once():
    """libtpu guards a TPU with a lock file; compiling needs none."""
    code = (
        "import os\nfrom heal_jax.plan import backend\nfrom heal_jax.plan.topology import Topology\n"
        "t = Topology('v6e:2x2')\nos.environ.update(backend.environment([t]))\nprint(backend.usable_hbm(t))\n"
        "input()\nprint(len(backend.devices(t)))\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    lines = [process.stdout.readline() for process in both]  # both have loaded it, and both go on
    ends = [process.communicate("\n") for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    assert lines[0] == lines[1] and 30e9 < float(lines[0]) < 2**35 and all(out.strip() == "4" for out, _ in ends)


@pytest.fixture(scope="module")
def without_libtpu(tmp_path_factory):
    """`heal plan` on the tiny configuration where libtpu is not installed: what it prints and writes."""
    out = tmp_path_factory.mktemp("plan") / "plan.json"
    code = (
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'libtpu' else find(name, *a)\n"
        "from heal_jax.cli import main\nmain()\n"
    )
    arguments = ["--topology", "v5e:2x2", "--json", str(out), "--price-per-chip-hour", "1e9", "--problems", "100"]
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS",) and not k.startswith("TPU_")}
    command = [sys.executable, "-c", code, "plan", str(TINY), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_without_libtpu(without_libtpu):
    said, (plan,) = without_libtpu
    assert "warning: libtpu is not installed" in said and plan["compiler"] == "cpu"
    assert plan["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1, "expert": 1} and plan["fits"]
    assert "\x1b" not in said
    for columns in (
        "fits needs weights optimizer other cache temporary",
        "TFLOP HBM GB x least link GB time roof",
        "chip-hours cost",
    ):
        assert any(columns in " ".join(line.split()) for line in said.splitlines()), columns
    stages = [stage for program in plan["programs"] for stage in program["stages"]]
    aided = ["hindsight", "score hindsight", "repair", "score repair"]
    assert stages == ["sample", *aided, "train", "evaluate teacher", "evaluate student"]


def test_the_whole_run_adds_up(without_libtpu):
    _, (plan,) = without_libtpu
    total = 0.0
    for program in plan["programs"]:
        seconds = program["once"]["roofline_seconds"]
        if program["steps"]:
            assert program["steps"] % 128 == 0 and program["memory"]["cache"] > 0 and program["step"]["flops"] > 0
            assert program["step_bytes_over_least"] > 1
        for part in ("step", "read"):
            if program[part + "s"]:
                seconds += program[part + "s"] * program[part]["roofline_seconds"]
        assert program["seconds_a_call"] == pytest.approx(seconds)
        total += seconds * program["calls"] * 4 / 3600
    assert plan["chip_hours"] == pytest.approx(total) and plan["cost"] == pytest.approx(total * 1e9)
    calls = {stage: program["calls"] for program in plan["programs"] for stage in program["stages"]}
    # 100 problems in shards of up to two batches, of 4 x 8 or 8 x 4 rollouts: 13 of 8; 7 of 15, of which half the
    # problems are hard; 13 of 16 for 200 paths, of which a quarter are unsolved problems'.
    assert (calls["sample"], calls["hindsight"], calls["repair"]) == (13, 4, 4)
    assert calls["score hindsight"] == calls["score repair"] and calls["train"] == 16  # two students
    # 8 or 16 contexts over four devices, their 64 rollouts on 32 rows.
    loops = {stage: (p["reads"], p["steps"]) for p in plan["programs"] for stage in p["stages"]}
    assert loops["sample"] == (2, 2 * 128) and loops["hindsight"] == loops["repair"] == (4, 2 * 128)


@pytest.mark.parametrize("chips", [32, 128])
def test_the_paper_on_real_topologies(chips):
    """Qwen3-32B with 16k-token rollouts: sampling, the program that most of the run consists of, with eight layers.
    Whole, it takes minutes to compile, and so do the others (`heal plan` does it).
    """
    config = load(ROOT / "configs" / "paper.yaml")
    config = dataclasses.replace(
        config,
        teacher=dataclasses.replace(config.teacher, path=str(ROOT / config.teacher.path)),
        student=dataclasses.replace(config.student, path=str(ROOT / config.student.path)),
    )
    if chips == 128:  # 16 parts of a batch
        config = dataclasses.replace(
            config,
            sample=dataclasses.replace(config.sample, batch=240),
            train=dataclasses.replace(config.train, batch=16),
        )
    found, mesh, topology = on_slice(config, {32: "v5e:4x8", 128: "v5e:8x16"}[chips])
    assert mesh.size == chips
    sample = named(found, "sample")
    assert sample.model.config.num_layers == 64 and sample.batch.max_new == 16384 and sample.batch.repeats == 30
    layers = 8
    sample = dataclasses.replace(sample, model=sample.model.with_layers(layers))
    estimated = estimate(sample, mesh, topology)
    assert estimated.fits and not estimated.warnings, (estimated.needs / 2**30, estimated.warnings)
    # Nothing that should be split is whole on every chip.
    over = sample.over
    slots = over.rows * 16384 + over.groups * 2 * 512  # the rows' own, and two contexts a group
    assert estimated.memory.cache == 2 * layers * 8 * 128 * 2 * slots / chips
    if chips == 32:
        embeddings = 2 * 151936 * 5120 * 2
        assert estimated.memory.weights == pytest.approx(((65.5e9 - embeddings) / 8 + embeddings) / 32, rel=0.01)
    # A step reads its weights and its cache once or a little more, and sends little.
    assert 0.9 < estimated.step_excess < 1.5 and estimated.step.wire < 0.02 * estimated.step.bytes
    assert roof(estimated.step, topology.chip).name == "memory"


def test_example_models_have_the_public_sizes():
    found = sorted((ROOT / "configs" / "models").glob("qwen3-*"))
    assert len(found) == 4
    for folder in found:
        c = decoder_config(folder)
        layer = c.hidden_size * (3 * c.intermediate_size + 2 * (c.num_heads + c.num_kv_heads) * c.head_dim)
        size = c.num_layers * layer + (1 if c.tie_embeddings else 2) * c.hidden_size * c.vocab_size
        billions = int(re.search(r"(\d+)b$", folder.name)[1])
        assert size / 1e9 == pytest.approx(billions, rel=0.06)


def test_example_models_cannot_run(tmp_path, capsys):
    """One line: there is neither tokenizer nor weights."""
    folder = str(ROOT / "configs" / "models" / "qwen3-4b")
    paths = ["--teacher.path", folder, "--student.path", folder]
    assert cli.run(["run", str(TINY), *paths, "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "x").exists()
