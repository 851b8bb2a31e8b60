"""heal ablate: arms that share rollouts, what is measured directly, and the figures."""

import dataclasses
import io
import json
import os
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from compare import metrics
from conftest import TINY, refused, start
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy.stats import mannwhitneyu

from heal_jax import collect, gear
from heal_jax.ablate import cuts, run, shortcuts
from heal_jax.ablate.arms import ARMS, BASELINE, chosen
from heal_jax.ablate.page import in_terminal
from heal_jax.bootstrap import crossed
from heal_jax.config import load
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.progress import Progress
from heal_jax.run import open_run
from heal_jax.store import RunDirectory
from heal_jax.strict import flatten
from heal_jax.world import model_folder

ASKED = "heal,equal_tokens,hint_left_in,hint_plain"
SEEDS = 2


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """An ablation of configs/tiny.yaml with two seeds, made by two processes, and its command for one."""
    out = tmp_path_factory.mktemp("ablation") / "out"
    command = ["ablate", TINY, "--out", out, "--seeds", SEEDS, "--arms", ASKED, "--measure"]
    process = start(*command, "--jobs", 2)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return out, command, stdout, stderr


def found(out: Path) -> dict:
    return json.loads((out / "ablation.json").read_text())


def samples(root: Path, model: str) -> list[dict]:
    return [
        row for path in sorted(root.glob(f"evaluation/{model}-*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def test_heal_and_its_baseline_are_those_of_heal_run(ablated, tiny):
    """The same tokens of the same students."""
    out, alone = ablated[0], tiny[0]
    for arm, model in (("heal", "heal"), (BASELINE, "rejection_sampling")):
        mine, theirs = samples(out / "seed0" / arm, "heal"), samples(alone, model)
        assert [row["tokens"] for row in mine] == [row["tokens"] for row in theirs]
    for model in ("teacher", "student_base"):
        assert samples(out / "seed0" / "teacher", model) == samples(alone, model)
    losses = [
        [line["loss"] for line in metrics(root) if line["model"] == "heal"] for root in (out / "seed0/heal", alone)
    ]
    assert losses[0] == losses[1] != []
    made = found(out)["arms"]["heal"]
    summary = json.loads((alone / "summary.json").read_text())
    first = RunDirectory(out / "seed0" / "heal").manifest["stages"]
    assert first["curate"]["stages"] == summary["stages"]
    assert first["train"]["heal"] == summary["training"]["heal"]
    assert set(made["examples"]) == {"1", "2", "3"}


def test_rollouts_are_paid_for_once(ablated):
    out = ablated[0]
    for seed in range(SEEDS):
        folder = out / f"seed{seed}"
        for arm in chosen(ASKED.split(",")):
            shared = ["base", *(kind for kind in arm.aided if kind != "repair" or not arm.own_repairs)]
            for kind in shared:
                sources = list((folder / "teacher" / "rollouts").glob(f"{kind}-0*.parquet"))
                assert sources
                for source in sources:
                    assert os.path.samefile(source, folder / arm.name / "rollouts" / source.name)
            assert not (folder / arm.name / "checkpoints").exists()
    own = RunDirectory(out / "seed0" / "hint_plain").rollouts("repair")
    assert own.num_rows == RunDirectory(out / "seed0" / "teacher").rollouts("repair").num_rows
    assert not os.path.samefile(
        out / "seed0" / "hint_plain" / "rollouts" / "repair-00000.parquet",
        out / "seed0" / "teacher" / "rollouts" / "repair-00000.parquet",
    )


def test_equal_tokens_are_about_equal_and_the_first_samples_the_same(ablated):
    out = ablated[0]
    made = found(out)["arms"]
    assert made["equal_tokens"]["teacher_tokens"]["all"] == pytest.approx(
        made["heal"]["teacher_tokens"]["all"], rel=0.1
    )
    directory = RunDirectory(out / "seed0" / "equal_tokens")
    ids = directory.rollouts("base")["rollout_id"].to_pylist()
    first = RunDirectory(out / "seed0" / "teacher").rollouts("base")["rollout_id"].to_pylist()
    assert ids[: len(first)] == first and len(set(ids)) == len(ids) > len(first)
    hard = {p["id"] for p in pq.read_table(out / "seed0" / "teacher" / "problems.parquet").to_pylist()
            if p["stratum"] != "solved"}  # fmt: skip
    assert {i.rsplit("/", 3)[0] for i in ids[len(first) :]} <= hard


def test_another_hint_is_in_repairs_alone(ablated):
    out = ablated[0]
    tokenizer = Tokenizer(model_folder("teacher"), 400)
    rows = {arm: RunDirectory(out / "seed0" / arm).rollouts("repair").to_pylist() for arm in ("heal", "hint_plain")}
    for arm, words in (("heal", "Hint: The final answer is "), ("hint_plain", "The final answer is ")):
        for row in rows[arm]:
            shown = row["context_tokens"][len(row["prompt_tokens"]) + row["kept_tokens"] :]
            assert tokenizer.text(shown).startswith(words)
    said = found(out)["arms"]
    for arm, repairs in rows.items():
        mean = (len(repairs) + len(RunDirectory(out / "seed1" / arm).rollouts("repair"))) / SEEDS
        assert said[arm]["repairs"]["candidates"] == round(mean) and said[arm]["repairs"]["leaked"] >= 0
    assert "What does the hint cost?" in (out / "report.html").read_text()


def test_hints_stay_where_they_are_left_in(ablated):
    out = ablated[0]
    from heal_jax.train.data import read_stage

    plain, hinted = (read_stage(out / "seed0" / arm / "curriculum" / "stage3") for arm in ("heal", "hint_left_in"))
    by_id = {row["rollout_id"]: row for row in RunDirectory(out / "seed0" / "teacher").rollouts("repair").to_pylist()}
    assert [e.rollout_id for e in plain] == [e.rollout_id for e in hinted]
    for without, left_in in zip(plain, hinted):
        row = by_id[left_in.rollout_id]
        assert left_in.tokens == (*row["context_tokens"], *row["tokens"][row["kept_tokens"] :])
        assert left_in.prompt_length == without.prompt_length == len(row["prompt_tokens"])
        assert len(left_in.tokens) > len(without.tokens)


def test_figures_are_those_of_the_shards(ablated):
    """Means and differences recomputed from the graded samples; intervals hold them."""
    out, said = ablated[0], found(ablated[0])
    problems = {row["problem_id"] for row in samples(out / "seed0" / "heal", "heal")}

    def means(arm: str, model: str = "heal") -> np.ndarray:
        rows = []
        for seed in range(SEEDS):
            right = {p: [] for p in sorted(problems)}
            for row in samples(out / f"seed{seed}" / arm, model):
                right[row["problem_id"]].append(row["grade"] == "correct")
            rows.append([np.mean(values) for values in right.values()])
        return np.array(rows)

    teacher = means("teacher", "teacher").mean(axis=0)
    assert list(said["arms"]) == [arm.name for arm in chosen(ASKED.split(","))]
    for name, arm in said["arms"].items():
        assert arm["accuracy"]["mean"] == pytest.approx(means(name).mean())
        assert arm["accuracy"]["n"] == len(problems)
        low, high = arm["accuracy"]["ci95"]
        assert low <= arm["accuracy"]["mean"] <= high
        gained = means(name) - means("teacher", "student_base")
        assert arm["gain"]["per_seed"] == pytest.approx(list(gained.mean(axis=1)))
        parts = arm["accuracy"]["per_stratum"]
        assert sum(part["n"] for part in parts.values()) == len(problems)
        assert parts["solved"]["mean"] == pytest.approx(means(name)[:, teacher >= 0.5].mean())
        assert parts["unsolved"]["mean"] == pytest.approx(means(name)[:, teacher == 0].mean())
        if name != BASELINE:
            difference = means(name) - means(BASELINE)
            assert arm["difference"]["mean"] == pytest.approx(difference.mean())
            assert arm["difference"]["per_seed"] == pytest.approx(list(difference.mean(axis=1)))
        if name != "heal":
            assert arm["heal_minus"]["mean"] == pytest.approx((means("heal") - means(name)).mean())
        more = arm["per_problem"]["over_student_base"]
        assert (more["tokens"] is None) == (more["problems"] <= 0)
    assert [sum(t["pass_rates"]) for t in said["teacher"]] == [12] * SEEDS
    tokens = sum(len(row["entropy"]) for row in RunDirectory(out / "seed0" / "heal").rollouts().to_pylist())
    second = sum(len(row["entropy"]) for row in RunDirectory(out / "seed1" / "heal").rollouts().to_pylist())
    assert said["arms"]["heal"]["teacher_tokens"]["all"] == round((tokens + second) / 2)


def test_the_same_command_makes_nothing_again(ablated):
    out, command, stdout, _ = ablated
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    text = (out / "ablation.json").read_text()
    (out / "ablation.json").unlink()
    process = start(*command)
    again, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == before
    assert (out / "ablation.json").read_text() == text and again == stdout
    assert "heal" in stdout and "equal_tokens" in stdout


def test_without_arms_what_is_measured_is_there(ablated, tmp_path):
    """What was measured before is not measured again, unless the rollouts are others."""
    out = tmp_path / "out"
    shutil.copytree(ablated[0], out)
    measures = out / "seed0" / "teacher" / "measures.json"
    known = json.loads(measures.read_text())
    measures.write_text(json.dumps(known | {"planted": "as it was"}))
    command = ["ablate", TINY, "--out", out, "--arms", "none", "--measure"]
    for of, planted in ((known["of"], "as it was"), ("others", found(ablated[0])["planted"])):
        measures.write_text(json.dumps(json.loads(measures.read_text()) | {"of": of}))
        process = start(*command)
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        assert found(out)["arms"] == {} and found(out)["planted"] == planted
    assert found(out)["cuts"] == found(ablated[0])["cuts"]


def test_more_samples_than_before_are_dealt_anew(tmp_path, monkeypatch):
    """A budget that is another one puts other blocks into each shard."""
    directory, config = RunDirectory(tmp_path), load(TINY)
    n = config.sample.n
    rows = [{"problem_id": "p", "rollout_id": f"p/base/{i}/s0", "kind": "base", "tokens": [1] * 10} for i in range(n)]
    directory.shard("rollouts/base-00000", lambda: rows)
    asked = SimpleNamespace(config=config, directory=directory, problems=[SimpleNamespace(id="p")])
    monkeypatch.setattr(collect, "longest_prompt", lambda run: 32)

    def shards(run, kind, units, *_):
        made = [rows[0] | {"rollout_id": f"p/base/{number * n}/s0"} for _, number in units]
        run.directory.shard(f"rollouts/{collect.MORE}-00000", lambda: made)

    monkeypatch.setattr(collect, "_shards", shards)
    for blocks in (1, 1, 3, 2):
        collect.sample_more(asked, {"p": 10 * n * blocks})
        assert directory.read(f"rollouts/{collect.MORE}-00000").num_rows == blocks


def test_the_page_has_the_arms_and_what_was_measured(ablated):
    page = (ablated[0] / "report.html").read_text()
    for words in ("What is each part worth?", "Is entropy informative", "Does PURE separate?", "hint_left_in"):
        assert words in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("width", [80, 140])
def test_the_table_fits_a_terminal(ablated, width):
    """A narrow one has the figures that count, a wide one all of them."""
    console = Console(width=width, file=io.StringIO())
    console.print(in_terminal(found(ablated[0]), width))
    printed = console.file.getvalue()
    assert "…" not in printed and max(map(len, printed.splitlines())) <= width
    assert len(printed.splitlines()) == 1 + 2 + len(found(ablated[0])["arms"])
    assert ("medium" in printed) == ("loss tokens" in printed) == (width > 80)


def test_bad_arguments_are_one_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "x")]
    assert "'hael' is no arm; there are rejection_sampling," in refused(capsys, "ablate", TINY, *out, "--arms", "hael")
    assert "--seeds" in refused(capsys, "ablate", TINY, *out, "--seeds", "0")
    assert "--jobs" in refused(capsys, "ablate", TINY, *out, "--jobs", "0")
    assert "a folder on a disk" in refused(capsys, "ablate", TINY, "--out", "gs://bucket/x")
    said = refused(capsys, "ablate", TINY, *out, "--train.row_tokens", "128")
    assert "train.row_tokens: 128" in said and "256" in said
    dev = tmp_path / "dev.yaml"
    dev.write_text(
        "evaluate: {dev: {problems: {source: 'world:sums', split: dev, counts: {easy: 1}}}}\n"
        "problems: {counts: {easy: 1}}\n"
    )
    assert "evaluate.dev" in refused(capsys, "ablate", dev, *out)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    assert "the directory of a run" in refused(capsys, "ablate", TINY, "--out", tmp_path / "run")
    assert not (tmp_path / "x").exists()


def test_rollouts_that_were_made_anew_are_adopted_anew(tmp_path):
    """And what an arm made of the old ones counts no more."""
    teacher, arm = RunDirectory(tmp_path / "teacher"), RunDirectory(tmp_path / "arm")
    row = {"problem_id": "p", "rollout_id": "p/base/0/s0", "kind": "base", "tokens": [1]}
    for tokens in ([1], [2]):
        teacher.forget("sample", shards=lambda name: True)
        teacher.shard("rollouts/base-00000", lambda tokens=tokens: [row | {"tokens": tokens}])
        teacher.finish("sample", correct={})
        arm.adopt(teacher, ["sample"])
        assert arm.read("rollouts/base-00000")["tokens"].to_pylist() == [tokens]
        assert arm.done("sample") is not None and arm.done("curate") is None
        arm.begin("curate")
        arm.finish("curate")
        assert arm.done("curate") is not None
        arm.adopt(teacher, ["sample"])  # nothing new
        assert arm.done("curate") is not None


def test_arms():
    assert [arm.name for arm in chosen([])] == [arm.name for arm in ARMS] and ARMS[0].name == BASELINE
    assert [arm.name for arm in chosen(["heal"])] == [BASELINE, "heal"] and chosen(["none"]) == []
    from heal_jax.config import Config

    known = flatten(dataclasses.asdict(Config()))
    for arm in ARMS:
        assert arm.what and set(arm.settings) <= set(known)


@given(st.integers(0, 5))
def test_intervals_over_seeds_and_problems(seed):
    """Against resampling by indices, one by one."""
    rng = np.random.default_rng(seed)
    values = rng.random((3, 8)) < rng.random(8)
    drawn = [
        np.mean([values[s][p] for s, p in [(s, p) for s in rng.integers(0, 3, 3) for p in problems]])
        for problems in rng.integers(0, 8, (3000, 8))
    ]
    assert crossed(values.astype(float), 3000, 1) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.06)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_auc(right, wrong):
    expected = mannwhitneyu(wrong, right).statistic / (len(right) * len(wrong))
    assert shortcuts.auc(np.array(right), np.array(wrong)) == pytest.approx(expected)


def test_spoilt_solutions():
    steps, others = ["a", "b", "c", "d", "\\boxed{1}"], ["x", "y", "\\boxed{2}"]
    for seed in range(20):
        made = shortcuts.spoilt(steps, others, lambda step: step + "!", np.random.default_rng(seed))
        assert list(made) == list(shortcuts.KINDS) and all(m[-1] == steps[-1] and m != steps for m in made.values())
        assert len(made["removed"]) == 4 and set(made["removed"]) < set(steps) and made["removed"][0] == "a"
        assert sum(step.endswith("!") for step in made["corrupted"]) == 1 and made["corrupted"][0] == "a"
        assert sorted(made["swapped"]) == sorted(steps)
        assert made["replaced"] == steps[-1:] and made["foreign"] == ["x", "y", steps[-1]]
    assert list(shortcuts.spoilt(["a", "z"], others, str, np.random.default_rng(0))) == ["replaced", "foreign"]
    assert shortcuts.spoilt(["z"], others, str, np.random.default_rng(0)) == {}
    assert shortcuts.another_digit("7 + 5 = 12.", np.random.default_rng(0)) != "7 + 5 = 12."


chains = st.integers(2, 14).flatmap(
    lambda k: st.tuples(
        st.lists(st.floats(0, 2, width=32), min_size=k, max_size=k), st.integers(0, k), st.integers(0, 9)
    )
)


@given(chains)
def test_rules_of_cutting(chain):
    """The method's own rule cuts where the method does; every rule is a distribution over the cuts."""
    entropy, wrong, seed = np.array(chain[0], np.float32), chain[1], chain[2]
    k, rng = len(entropy), np.random.default_rng(seed)
    flawless, correct = np.sort(rng.random((2, k)), axis=0)
    one = cuts.Cuts("p", wrong, entropy, flawless, correct, 1 + rng.random(k))
    for name, choose in cuts.rules_of_cutting().items():
        likely = choose(one)
        assert likely.shape == (k,) and likely.sum() == pytest.approx(1) and (likely >= 0).all(), name
    last = gear.last_candidate(k, 1 / 3)[k]
    for kind in cuts.SURGES:
        at = gear.breakpoints(
            entropy[None], np.array([k]), np.array([last]), np.zeros((1, 2), np.uint32), np.zeros(1, np.int32),
            kind="surge", surge_kind=kind,
        )  # fmt: skip
        for backup in cuts.BACKUPS:
            chosen_cut = cuts.rules_of_cutting()[f"{kind}, window 1/3, backup {backup}"](one)
            assert int(np.argmax(chosen_cut)) == max(0, int(at[0]) - backup)
    where = cuts.located([one], cuts.rules_of_cutting()["random, window 1, backup 0"])
    assert sum(where.values()) == pytest.approx(1) and min(where.values()) > -1e-9


def test_certainty_after_a_step_is_that_of_a_step():
    """Where a text has other paragraphs than steps, as after a thinking part, there is none."""
    ppl, certainty = np.array([3.0, 2.0, 1.5, 1.0]), np.array([0.5, 0.25, 0.125, 0.1])
    named = shortcuts.readings(0.1, 0.5)

    def read(name: str, known: int) -> float:
        return named[name](shortcuts.Text(ppl, ppl, -1.0, 9, certainty[:known]))

    after, before = ppl[:3] / (certainty[:3] + 1), ppl[1:3] / (certainty[:2] + 1)
    assert read("PPL / (U after + 1)", 3) == pytest.approx((after.mean() + after.max()) / 2)
    assert read("PPL / (U before + 1)", 3) == pytest.approx((before.mean() + before.max()) / 2)
    assert np.isnan([read(name, 4) for name in named if name.startswith("PPL / (U")]).all()


def test_yields_are_sums_over_sums():
    rng = np.random.default_rng(0)
    made = [
        cuts.Cuts(f"p{i // 2}", 1, rng.random(4).astype(np.float32), rng.random(4), rng.random(4), 9 + rng.random(4))
        for i in range(6)
    ]
    judged = cuts.judged(made, cuts.rules_of_cutting()["restart"], 500, 0)
    flawless, tokens = sum(c.flawless[0] for c in made), sum(c.tokens[0] for c in made)
    assert judged["flawless_per_1000_tokens"]["mean"] == pytest.approx(1000 * flawless / tokens)
    low, high = judged["flawless_per_1000_tokens"]["ci95"]
    assert low < 1000 * flawless / tokens < high and judged["kept"] == 0 == judged["keeps_a_fault"]


def test_cuts_that_were_decoded_are_kept(tiny, tmp_path, monkeypatch):
    """Where it was stopped between two batches of them, say."""
    out = tmp_path / "out"
    shutil.copytree(tiny[0], out)
    with open_run(load(TINY), out, Progress(quiet=True)) as run:
        first = cuts.decode(run, 1, 2)
        assert first and list(out.glob("cuts-*.json"))
        monkeypatch.setattr(cuts, "generate", None)
        for a, b in zip(first, cuts.decode(run, 1, 2), strict=True):
            np.testing.assert_array_equal((a.flawless, a.correct, a.tokens), (b.flawless, b.correct, b.tokens))
        cuts.forget(run)
    assert not list(out.glob("cuts-*.json"))


def test_measured_on_the_tiny_run(ablated):
    said = found(ablated[0])
    where, rules = said["cuts"]["where"], said["cuts"]["rules"]
    assert all(sum(part.values()) == pytest.approx(1) for part in where.values())
    assert rules["restart"]["kept"] == 0 and rules["oracle"]["keeps_a_fault"] == 0
    assert set(said["planted"]["auc"]["default"]) == set(shortcuts.KINDS)
    assert said["planted"]["auc"]["default"]["replaced"]["mean"] > 0.9  # this teacher's answers come at the end
    assert {"thresholds", "hindsight", "repair"} <= set(said["natural"])


@pytest.mark.parametrize("first", [0, -1])
def test_arms_that_are_done_before_the_baseline_wait_for_it(tmp_path, monkeypatch, first):
    """Two at a time, of which the older or the newer one is always done first."""

    class Later:
        def __init__(self, f, *args):
            self.result = partial(f, *args)

    asked = []
    monkeypatch.setattr(run, "opened", lambda *_: nullcontext(Later))
    monkeypatch.setattr(run, "wait", lambda running, **_: SimpleNamespace(done=[list(running)[first]]))
    monkeypatch.setattr(run.seeds, "shared", lambda *_: {"means": {"student_base": []}})
    monkeypatch.setattr(run.seeds, "one", lambda config, arm, *_: arm.name)
    monkeypatch.setattr(run, "ablation", lambda config, problems, arms, teachers, made: asked.append(made) or {})
    monkeypatch.setattr(run, "_together", lambda jobs: None)
    monkeypatch.setattr(run, "_write", lambda *_: None)
    arms = chosen(["heal", "no_pure"])
    run.ablate(load(TINY), arms, 2, tmp_path / "out", Progress(quiet=True), jobs=2)
    assert len(asked) > 1 and all(BASELINE in made and made[BASELINE] for made in asked)
    assert asked[-1] == {arm.name: [arm.name] * 2 for arm in arms}
