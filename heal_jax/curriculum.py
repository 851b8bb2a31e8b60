"""From rollouts to students: decisions, the three stages on disk, HEAL's training and the baseline's."""

import dataclasses
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from typing import Any

from heal_jax import pace
from heal_jax.ask import dev_accuracy
from heal_jax.config import DEV, MAIN, LogSpec
from heal_jax.errors import InputError, RunError
from heal_jax.model.config import decoder_config
from heal_jax.model.decoder import Model
from heal_jax.model.lora import merged
from heal_jax.processes import once, primary
from heal_jax.run import Run
from heal_jax.sets import draw_of
from heal_jax.share import naming
from heal_jax.storage import pull
from heal_jax.store import DECISIONS, write_table
from heal_jax.strict import to_dict
from heal_jax.trackers import Track, tracking
from heal_jax.train.checkpoint import Progress
from heal_jax.train.data import Example, read_stage, row_length, write_stage
from heal_jax.train.loop import Phase, Trained, stage_steps, train

PACE_STAGES = (1, 2, 3)
STUDENTS = ("heal", "rejection_sampling")


def curate(run: Run, variant: pace.Variant = pace.HEAL) -> None:
    """PURE and PACE: a decision for every rollout in decisions.parquet, the stages as datasets in curriculum/.

    Of stages that have not finished it takes what is there. Raises InputError where there is nothing.
    """
    stages = {1: "sample", 2: "hindsight", 3: "repair"}
    if unfinished := [stages[stage] for stage in variant.stages if run.directory.done(stages[stage]) is None]:
        run.progress.say(f"curate     what is there so far: not finished are {', '.join(unfinished)}")
    record = once(lambda: _curate(run, variant))
    run.directory.finish("curate", [run.root / "decisions.parquet", run.root / "curriculum"], **record)
    examples = {stage: figures["examples"] for stage, figures in record["stages"].items()}
    aided = {kind: record[kind] for kind in ("hindsight", "repair")}
    run.progress.update("curate", 1, 1, counts={"examples": examples, **aided})
    if own := record.get("retokenised"):
        run.progress.say(
            "curate     the student has another tokenizer or chat template: it learns its own ids of the same texts, "
            f"{own['student_tokens']} tokens in place of {own['teacher_tokens']} in {own['examples']} examples; "
            f"{own['dropped']} right rollouts are dropped since it cannot write them"
        )
        if own["longest"] > (most := draw_of(run.config, MAIN).max_new_tokens):
            run.progress.say(
                f"curate     note: an example has {own['longest']} of the student's tokens after the prompt; "
                f"evaluation cuts at {most}"
            )


def _curate(run: Run, variant: pace.Variant) -> dict[str, Any]:
    """Writes all of it; what the manifest is to say."""
    config, tokenizer = run.config, run.tokenizers["teacher"]
    patterns = [re.compile(pattern) for pattern in config.gear.leak_patterns]
    with run.work("curate"):
        rows = run.directory.rollouts().to_pylist()
        strata = _strata(run, rows)
        rows = [row for row in rows if row["problem_id"] in strata]
        if not rows:
            raise InputError(f"{run.root}: no unaided rollouts yet; run `heal sample` or `heal run` first")
        learned = [as_learned(run, row, variant.hinted) for row in rows]
        candidates = []
        for i, row in enumerate(rows):
            said = tokenizer.text(row["tokens"][row["kept_tokens"] or 0 :]) if row["kind"] != "base" else ""
            candidates.append(
                pace.Candidate(
                    rollout_id=row["rollout_id"],
                    problem_id=row["problem_id"],
                    kind=row["kind"],
                    index=i,
                    grade=row["grade"],
                    leaked=any(pattern.search(said) for pattern in patterns),
                    sequence=(*learned[i][0], *learned[i][1]) if learned[i][1] else (),
                    score=row["pure_score"],
                )
            )
        # Without this bound, a student whose tokenizer is finer might see more positions than it has.
        most = min(config.train.max_tokens, decoder_config(run.tokenizers["student"].folder).max_positions)
        decisions = pace.curate(candidates, strata, config.pure.threshold, config.pace.per_problem, most, variant)
        write_table(run.root / "decisions.parquet", [dataclasses.asdict(d) for d in decisions], DECISIONS)
        stages: dict[int, list[Example]] = {stage: [] for stage in PACE_STAGES}
        for row, candidate, decision, (prompt, _) in zip(rows, candidates, decisions, learned):
            if decision.kept:
                example = Example(
                    row["rollout_id"],
                    row["problem_id"],
                    row["kind"],
                    candidate.sequence,
                    len(prompt),
                )
                stages[decision.stage].append(example)
        origin = naming.origin(config, run.directory.manifest)
        for stage, examples in stages.items():
            folder = run.root / "curriculum" / f"stage{stage}"
            if examples:
                write_stage(folder, stage, examples, origin)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                run.progress.say(f"curate     stage {stage} is empty: it is skipped, its steps go to the others")
    record: dict[str, Any] = {
        "hindsight": _counts("hindsight", candidates, decisions),
        "repair": _counts("repair", candidates, decisions),
        "stages": {
            str(stage): {
                "examples": len(examples),
                "tokens": sum(len(e.tokens) - e.prompt_length for e in examples),
            }
            for stage, examples in stages.items()
        },
        "curriculum": hashlib.sha256(repr(stages).encode()).hexdigest(),
    }
    if not run.same_ids:
        record["retokenised"] = _retokenised(rows, learned, decisions)
    return record


def _strata(run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Strata of the problems whose unaided rollouts are there: a shard holds all of a problem's."""
    spec, base = run.config.sample, [row for row in rows if row["kind"] == "base"]
    correct = Counter(row["problem_id"] for row in base if row["grade"] == "correct")
    found = dict.fromkeys(row["problem_id"] for row in base)
    if len(found) < len(run.problems):
        run.progress.say(f"curate     {len(found)} of {len(run.problems)} problems have all their unaided rollouts")
    return {problem: pace.stratum(correct[problem], spec.n, run.config.gear.max_correct) for problem in found}


def as_learned(run: Run, row: dict[str, Any], hinted: bool = False) -> tuple[Sequence[int], Sequence[int]]:
    """Prompt and target of a rollout as the student will see them; an empty target where it cannot, or never will.

    hinted: as the teacher saw it (`pace.Variant.hinted`), for a student with its ids.

    The ids as sampled where the student has the teacher's. Otherwise its own: its chat template's prompt of the plain
    question, its encoding of the whole text (thinking part included), its EOS. No text is rendered through a template:
    templates drop thinking parts.
    """
    tokenizer = run.tokenizers["student"]
    if run.same_ids:  # but the student's vocabulary may be padded less
        prompt, tokens = row["prompt_tokens"], row["tokens"]
        if hinted and row["kind"] == "hindsight":
            prompt = row["context_tokens"]
        elif hinted and row["kind"] == "repair":
            tokens = [*row["context_tokens"][len(prompt) :], *tokens[row["kept_tokens"] :]]
        return prompt, tokens if max(tokens, default=0) < tokenizer.vocab_size else ()
    ended = row["grade"] == "correct"  # so it stopped by itself: what was cut by its length is `truncated`
    return run.student_prompts[row["problem_id"]], tokenizer.turn(row["text"]) if ended else ()


def _retokenised(
    rows: Sequence[dict[str, Any]],
    learned: Sequence[tuple[Sequence[int], Sequence[int]]],
    decisions: Sequence[pace.Decision],
) -> dict[str, int]:
    """Examples in the student's own ids, their tokens after the prompt in the teacher's ids and in the student's, and
    the right rollouts that the student's tokenizer cannot write.
    """
    kept = [(row["tokens"], target) for row, (_, target), d in zip(rows, learned, decisions) if d.kept]
    return {
        "examples": len(kept),
        "teacher_tokens": sum(len(tokens) for tokens, _ in kept),
        "student_tokens": sum(len(target) for _, target in kept),
        "longest": max((len(target) for _, target in kept), default=0),
        "dropped": sum(row["grade"] == "correct" and not target for row, (_, target) in zip(rows, learned)),
    }


def _counts(kind: str, candidates: list[pace.Candidate], decisions: list[pace.Decision]) -> dict[str, Any]:
    """What became of the rollouts of a kind."""
    pairs = [(c, d) for c, d in zip(candidates, decisions) if c.kind == kind]
    reasons = Counter(re.split(r"[ 0-9]", d.reason)[0] for _, d in pairs)
    kept = [c for c, d in pairs if d.kept]
    return {
        "problems": len({c.problem_id for c, _ in pairs}),
        "problems_kept": len({c.problem_id for c in kept}),
        "candidates": len(pairs),
        "correct": sum(c.grade == "correct" for c, _ in pairs),
        "leaked": reasons["talks"],
        "kept": len(kept),
        "duplicates": reasons["same"],
    }


def train_students(run: Run, names: Sequence[str] = STUDENTS) -> None:
    """HEAL's student through the curriculum, and the rejection-sampling student on stage 1 for as many steps."""
    run.release_teacher()
    phases, length = training_plan(run)
    accounts: dict[str, Any] = {}
    spec = run.config.log if primary() else LogSpec()
    for name in names:
        run.progress.at(f"train {name}", "compiling")
        with tracking(spec, run.root, name, to_dict(run.config)) as track:
            _, done, dev = train_one(run, name, phases[name], length, track)
        accounts[name] = {
            "phases": [{"name": p.name, "examples": len(p.examples), "steps": p.steps} for p in phases[name]],
            **{field: getattr(done, field) for field in ("tokens", "loss_tokens", "skipped")},
            **({"dev": {str(step): accuracy for step, accuracy in dev.items()}} if dev else {}),
            "packing": round(done.tokens / (done.step * run.config.train.batch * length), 4) if done.step else None,
        }
    run.directory.finish("train", (), length=length, **accounts)


def training_plan(run: Run) -> tuple[dict[str, list[Phase]], int]:
    """Phases of both students, and the common row length in tokens.

    Raises InputError where a stage on disk is not what `curate` wrote, RunError where all are empty.
    """
    spec, recorded = run.config.train, run.directory.manifest["stages"]["curate"]["stages"]
    stages: list[list[Example]] = []
    pull(run.root / "curriculum")
    for stage in PACE_STAGES:
        folder = run.root / "curriculum" / f"stage{stage}"
        stages.append(read_stage(folder) if folder.is_dir() else [])
        if len(stages[-1]) != (wanted := recorded[str(stage)]["examples"]):
            raise InputError(f"{folder}: holds {len(stages[-1])} examples, not the {wanted} written; use another --out")
    if not any(stages):
        raise RunError(f"{run.root}: no training example was kept; see decisions.parquet for the reasons")
    order = run.config.pace.order
    groups = pace.phases(order, stages)
    sizes = (len(stages[0]), len(stages[1]), len(stages[2]))
    if order == "shuffled" or sum(map(bool, stages)) == 1:
        steps = [spec.steps]
    else:
        shares = stage_steps(run.config.pace.steps, spec.steps, sizes)
        steps = [shares[i] for i in range(3) if stages[i]]
    heal = []
    for group, n in zip(groups, steps):
        joined = [e for i in group for e in stages[i]]
        distinct = tuple(joined[i] for i in pace.pool([e.tokens for e in joined]))
        heal.append(Phase("stage " + "+".join(str(i + 1) for i in group), distinct, n))
    # Where checkpoints are chosen by dev problems, the baseline's are assessed at the same steps.
    parts = steps if DEV in run.evaluation else [spec.steps]
    baseline = [Phase("stage 1", tuple(stages[0]), n) for n in parts] if stages[0] else []
    length = row_length([e for stage in stages for e in stage], spec.row_tokens)
    return {"heal": heal, "rejection_sampling": baseline}, length


def train_one(
    run: Run, name: str, phases: list[Phase], length: int, track: Track = lambda step, figures: None
) -> Trained:
    """Train one student, or restore it where that is done. Without phases it stays what it was."""
    if not phases:
        run.progress.say(f"train      {name}: the teacher solved nothing, so there is nothing to train on")
        return Trained(run.student.model, Progress(), {})

    work = run.directory.manifest.setdefault("work", {})
    stage = f"train {name}"

    def log(metrics: dict[str, Any]) -> None:
        run.log("train", model=name, **metrics)
        made = metrics["tokens"] - work.get(stage, {"tokens": 0})["tokens"]
        work[stage] = {"seconds": round(metrics["seconds"], 3), "tokens": metrics["tokens"]}  # over all attempts
        counts = {field: metrics.get(field) for field in ("phase", "loss", "learning_rate", "grad_norm", "mfu")}
        run.progress.update(stage, metrics["step"], run.config.train.steps, "steps", tokens=made, counts=counts)
        track(metrics["step"], {key: x for key, x in metrics.items() if isinstance(x, float)})

    def assess(model: Model) -> float:
        accuracy = dev_accuracy(run, run.student.with_params(merged(model)))
        run.log("dev", model=name, accuracy=accuracy)
        run.progress.say(f"{stage}: {accuracy:.1%} of the dev samples are right")
        return accuracy

    return train(
        run.student.model,
        phases,
        run.config.train,
        length=length,
        pad_id=run.student.tokenizer.pad_id,
        seed=run.config.seed,
        folder=run.root / "checkpoints" / name,
        checkpoint_seconds=run.config.checkpoint.seconds,
        mesh=run.mesh,
        log=log,
        say=run.progress.say,
        assess=assess if DEV in run.evaluation else None,
    )
