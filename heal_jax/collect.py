"""The teacher's three stages: unaided rollouts, global hindsight, repairs. Each makes rollout shards.

A shard is one batch; what is in it depends on the config alone.
"""

import dataclasses
import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from heal_jax import gear, processes
from heal_jax.config import GearSpec
from heal_jax.pace import stratum
from heal_jax.problems.answers import answer_tokens
from heal_jax.problems.sources import Problem
from heal_jax.pure import purity, scored_steps
from heal_jax.rollout.generate import (
    Decoded,
    Group,
    generate,
    key_of,
    score_texts,
)
from heal_jax.rollout.sampling import rules
from heal_jax.rollout.thinking import opening, thinking_steps
from heal_jax.run import Run, hindsight_question, hint_text
from heal_jax.shapes import Shape, bucket, hindsight_shape, repair_shape, sample_shape, score_shape
from heal_jax.store import PROBLEMS, digest, write_table
from heal_jax.tally import Tally
from heal_jax.world.check import first_wrong_step
from heal_jax.world.worlds import world_of

MORE = "base-more"  # shards of unaided rollouts beyond sample.n


@dataclasses.dataclass(frozen=True)
class Made:
    """A decoded rollout and its origin; `kept` precedes what was decoded, `context` is what the teacher saw."""

    problem: Problem
    kind: str
    context: tuple[int, ...]
    decoded: Decoded
    kept: tuple[int, ...] = ()
    parent_id: str | None = None
    breakpoint_step: int | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """As the student will see them, after the prompt."""
        return self.kept + tuple(map(int, self.decoded.tokens))


def sample(run: Run) -> None:
    """`sample.n` unaided rollouts of each problem; then pass rates and strata, in problems.parquet."""
    spec = run.config.sample
    shape = sample_shape(run.config, len(run.problems), longest_prompt(run))

    def group(problem: Problem) -> Group:
        ids = tuple(f"{problem.id}/base/{i}/s{run.config.seed}" for i in range(spec.n))
        return Group(run.prompts[problem.id], ids, spec.max_new_tokens)

    correct = _shards(run, "base", run.problems, shape, group, lambda p: {}, lambda p: p, longest_prompt(run)).correct
    strata = {p.id: stratum(correct[p.id], spec.n, run.config.gear.max_correct) for p in run.problems}
    rows = [
        {
            **{name: getattr(p, name) for name in ("id", "source", "split", "level", "question", "answer")},
            "pass_rate": correct[p.id] / spec.n,
            "stratum": strata[p.id],
        }
        for p in run.problems
    ]
    path = run.root / "problems.parquet"
    if processes.primary():
        write_table(path, rows, PROBLEMS)
    run.directory.finish("sample", [path], correct=dict(correct), strata=strata)


def sample_more(run: Run, budgets: Mapping[str, int]) -> None:
    """More unaided rollouts in shards of their own, about as many tokens of each problem as its budget.

    They come in blocks of `sample.n` rollouts, numbered on from the first; what a problem's blocks spend less or more
    than its budget goes to the next problem's, so that all together are met to half a block.
    """
    spec = run.config.sample
    rows = run.directory.rollouts("base").select(["problem_id", "rollout_id", "tokens"]).to_pylist()
    block = Counter[str]()  # tokens of a problem's first rollouts
    for row in rows:
        block[row["problem_id"]] += len(row["tokens"]) if _index(row["rollout_id"]) < spec.n else 0
    units, owed = [], 0.0
    for problem in run.problems:
        owed += budgets.get(problem.id, 0)
        blocks = max(0, round(owed / block[problem.id])) if budgets.get(problem.id) else 0
        owed -= blocks * block[problem.id]
        units += [(problem, 1 + i) for i in range(blocks)]
    longest = longest_prompt(run)
    shape = sample_shape(run.config, len(run.problems), longest)

    def planned() -> dict[str, Any]:
        """Budgets that are others than before deal the blocks to other shards."""
        blocks = digest([[problem.id, number] for problem, number in units])
        if run.directory.manifest.get("more", blocks) != blocks:
            run.directory.forget("curate", shards=lambda name: MORE in name)
        run.directory.update(more=blocks)
        return run.directory.manifest

    run.directory.manifest = processes.once(planned)

    def group(unit: tuple[Problem, int]) -> Group:
        problem, number = unit
        first = number * spec.n
        ids = tuple(f"{problem.id}/base/{first + i}/s{run.config.seed}" for i in range(spec.n))
        return Group(run.prompts[problem.id], ids, spec.max_new_tokens)

    _shards(run, "base", units, shape, group, lambda unit: {}, lambda unit: unit[0], longest, MORE)


def hindsight(run: Run) -> None:
    """`hindsight.n` rollouts of each hard problem with the answer in the prompt."""
    spec, lm = run.config.sample, run.teacher
    strata = run.directory.manifest["stages"]["sample"]["strata"]
    hard = [p for p in run.problems if strata[p.id] != "solved"]
    # The width is that of all problems, so that which ones are hard does not change what is compiled.
    contexts = {p.id: tuple(lm.tokenizer.prompt(hindsight_question(run.config, p))) for p in run.problems}
    n = run.config.hindsight.n
    shape = hindsight_shape(run.config, len(run.problems), max(map(len, contexts.values())))

    def group(problem: Problem) -> Group:
        ids = tuple(f"{problem.id}/hindsight/{i}/s{run.config.seed}" for i in range(n))
        return Group(contexts[problem.id], ids, spec.max_new_tokens)

    _shards(run, "hindsight", hard, shape, group, lambda p: {}, lambda p: p, longest_prompt(run))
    run.directory.finish("hindsight", problems=len(hard))


@dataclasses.dataclass(frozen=True)
class Path:
    """A failed rollout to repair."""

    problem: Problem
    row: dict[str, Any]
    breakpoint: int  # gear.NONE where there is none
    kept: tuple[int, ...]  # tokens


def repair(run: Run) -> None:
    """GEAR: `gear.repairs` continuations of each of the first `gear.paths` distinct failures of unsolved problems."""
    config, lm = run.config, run.teacher
    spec, n = config.sample, config.gear.repairs
    paths = failed_paths(run)
    hints = {p.id: tuple(lm.tokenizer.encode(hint_text(config, p))) for p in run.problems}
    longest = longest_prompt(run) + max((len(path.kept) for path in paths), default=0)
    shape = repair_shape(config, len(run.problems), longest + max(map(len, hints.values())))

    def group(path: Path) -> Group:
        parent = _index(path.row["rollout_id"])
        ids = tuple(f"{path.problem.id}/repair/{parent}.{i}/s{config.seed}" for i in range(n))
        budget = spec.max_new_tokens - len(path.kept)
        return Group(run.prompts[path.problem.id] + path.kept + hints[path.problem.id], ids, budget)

    def made(path: Path) -> dict[str, Any]:
        step = None if path.breakpoint == gear.NONE else path.breakpoint
        return {"kept": path.kept, "parent_id": path.row["rollout_id"], "breakpoint_step": step}

    _shards(run, "repair", paths, shape, group, made, lambda path: path.problem, longest)
    run.directory.finish("repair", paths=len(paths))


def failed_paths(run: Run) -> list[Path]:
    """The failures to repair, with breakpoint and kept tokens (DESIGN section 2, "Repair" and "Breakpoint")."""
    spec = run.config.gear
    strata = run.directory.manifest["stages"]["sample"]["strata"]
    chosen: dict[str, dict[tuple[int, ...], dict[str, Any]]] = defaultdict(dict)
    columns = ["rollout_id", "problem_id", "grade", "tokens", "entropy", "step_starts", "text"]
    for row in run.directory.rollouts("base").select(columns).to_pylist():
        found = chosen[row["problem_id"]]
        if strata[row["problem_id"]] == "unsolved" and row["grade"] != "correct" and len(found) < spec.paths:
            found.setdefault(tuple(row["tokens"]), row)
    rows = [row for p in run.problems for row in chosen[p.id].values()]
    if not rows:
        return []
    width = bucket(run.config.sample.max_new_tokens)
    index, starts, count = thinking_steps(run.teacher, [row["tokens"] for row in rows], width, run.config.grade)
    problems = [run.by_id[row["problem_id"]] for row in rows]
    wrong = None
    if spec.breakpoint == "oracle":
        wrong = [wrong_step(p, row["text"]) or 0 for p, row in zip(problems, rows)]
    ids, entropies = [row["rollout_id"] for row in rows], [row["entropy"] for row in rows]
    breakpoint, kept = cut(spec, ids, entropies, index, starts, count, wrong)
    return [
        Path(
            p, row, int(k), tuple(row["tokens"][:n]) or opening(run.teacher.tokenizer, row["tokens"], run.config.grade)
        )
        for p, row, k, n in zip(problems, rows, breakpoint, kept)
    ]


def wrong_step(problem: Problem, text: str) -> int | None:
    """The first wrong step of a solution, None where all are right. Raises ValueError for problems of no world."""
    world = world_of(problem.source)
    if world is None:
        raise ValueError(f"{problem.source} has no step checker")
    return first_wrong_step(world, problem.question, text)


def cut(
    spec: GearSpec,
    ids: Sequence[str],
    entropies: Sequence[Any],
    index: np.ndarray,
    starts: np.ndarray,
    count: np.ndarray,
    wrong: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """k* (gear.NONE where there is none) and kept tokens, [N] int32 each, of rollouts with these ids and entropies.

    index, starts [N, T], count [N]: their steps, from `split_steps`; wrong: the first wrong steps, for kind oracle.
    """
    entropy = np.zeros(index.shape, np.float32)
    for i, values in enumerate(entropies):
        entropy[i, : len(values)] = values
    steps = bucket(int(count.max(initial=1)))
    breakpoint = gear.breakpoints(
        gear.step_entropy(entropy, index, steps),
        count,
        gear.last_candidate(steps, spec.window)[count],
        np.stack([key_of(name + "/breakpoint") for name in ids]),
        np.asarray([0] * len(ids) if wrong is None else wrong, np.int32),
        kind=spec.breakpoint,
        surge_kind=spec.surge,
    )
    return np.asarray(breakpoint), np.asarray(gear.kept_tokens(starts, breakpoint, backup=spec.backup))


def _index(rollout_id: str) -> int:
    """Which of a problem's unaided rollouts it is."""
    return int(rollout_id.split("/")[-2])


def longest_prompt(run: Run) -> int:
    """Tokens of the longest plain prompt."""
    return max(map(len, run.prompts.values()))


def _shards(
    run: Run,
    kind: str,
    units: Sequence[Any],
    shape: Shape,
    group: Callable[[Any], Group],
    made: Callable[[Any], dict[str, Any]],
    problem: Callable[[Any], Problem],
    longest: int,
    name: str = "",
) -> Tally:
    """Make the missing shards of a stage, `shape.contexts` units each; what was found in all of them.

    longest: tokens of the longest plain prompt with its kept prefix. name: of the shards, by default the kind.
    """
    drawn = rules(run.config.sample)
    stage = {"base": "sample"}.get(kind, kind)
    tally, total = Tally(run.config, kind), -(-len(units) // shape.contexts)
    run.progress.update(stage, 0, total, "shards")

    def make(part: Sequence[Any], tokens: list[int], owner: int) -> list[dict[str, Any]]:
        with run.work(stage, tokens):
            run.progress.doing(f"decoding {len(part) * shape.repeats:,} rollouts")
            groups = [group(unit) for unit in part]
            several = generate(run.teacher, groups, shape, drawn)
            made_rollouts = [
                Made(problem(unit), kind, g.context, decoded, **made(unit))
                for unit, g, of_group in zip(part, groups, several)
                for decoded in of_group
            ]
            tokens.extend(len(m.decoded.tokens) for m in made_rollouts)
            return records(run, made_rollouts, longest, owner)

    for number in range(total):
        part, tokens = units[number * shape.contexts : (number + 1) * shape.contexts], list[int]()
        owner = number % processes.count()
        rows = functools.partial(make, part, tokens, owner)
        table = run.shard(stage, f"rollouts/{name or kind}-{number:05d}", rows, owner=owner)
        tally.add(table)
        new = sum(tokens)
        run.progress.update(stage, number + 1, total, "shards", tokens=new, found=not new, counts=tally.counts())
    return tally


def records(run: Run, made: Sequence[Made], longest: int, owner: int = 0) -> list[dict[str, Any]]:
    """Grade (in process `owner`), split and score rollouts: rows of the rollout record (DESIGN section 6)."""
    lm = run.teacher
    run.progress.doing(f"grading {len(made):,} rollouts")
    # Only what was decoded is graded: a kept prefix or a hint may hold an answer.
    texts = [lm.tokenizer.text(list(m.decoded.tokens)) for m in made]
    grades = run.grade([(m.problem, text, m.decoded.finish) for m, text in zip(made, texts)], owner)
    width = bucket(run.config.sample.max_new_tokens)
    index, starts, _ = thinking_steps(lm, [m.tokens for m in made], width, run.config.grade)
    run.progress.doing("scoring with PURE")
    scores = _pure(run, made, [g.grade for g in grades], index, longest)
    rows = []
    for i, (m, grade) in enumerate(zip(made, grades)):
        ppl, expected, score = scores[i] or (None, None, None)
        repaired = m.kind == "repair"
        rows.append(
            {
                "problem_id": m.problem.id,
                "rollout_id": m.decoded.rollout_id,
                "kind": m.kind,
                "parent_id": m.parent_id,
                "breakpoint_step": m.breakpoint_step,
                "kept_tokens": len(m.kept) if repaired else None,
                "prompt_tokens": run.prompts[m.problem.id],
                "tokens": m.tokens,
                "context_tokens": m.context,
                "entropy": m.decoded.entropy,
                "logprob": m.decoded.logprob,
                "sampling_logprob": m.decoded.sampling_logprob,
                "step_starts": np.flatnonzero(starts[i]),
                "finish": m.decoded.finish,
                "grade": grade.grade,
                "pure_score": score,
                "step_ppl": ppl,
                "step_expected_ppl": expected,
                "text": lm.tokenizer.text(list(m.tokens)),
                "answer": grade.answer,
            }
        )
    return rows


def tokens_of_answer(run: Run, m: Made) -> tuple[int, int] | None:
    """First and last + 1 index, among all tokens of a rollout, of those that overlap its answer."""
    found = tokens_of(run, m.decoded.tokens)
    return None if found is None else (len(m.kept) + found[0], len(m.kept) + found[1])


def tokens_of(run: Run, tokens: Sequence[int] | np.ndarray) -> tuple[int, int] | None:
    """First and last + 1 index of the tokens that overlap the answer in a text of the teacher's tokens."""
    grade, spans = run.config.grade, run.teacher.tokenizer.spans(list(tokens))
    return answer_tokens(spans, grade.answer_open, grade.answer_close, grade.think_end)


def _pure(
    run: Run, made: Sequence[Made], grades: Sequence[str], index: np.ndarray, longest: int
) -> list[tuple[np.ndarray, np.ndarray, float] | None]:
    """Step perplexities, expected perplexities and S of each rollout, None where it is not scored.

    Unaided rollouts are scored from what decoding recorded; the others, when correct, by one hint-free pass.
    """
    lm, spec = run.teacher, run.config.pure
    chosen = [i for i, m in enumerate(made) if m.kind == "base" or grades[i] == "correct"]
    aided = [i for i in chosen if made[i].kind != "base"]
    # The hint is left out: what was kept follows the plain prompt.
    texts = [(run.prompts[m.problem.id] + m.kept, tuple(map(int, m.decoded.tokens))) for m in (made[i] for i in aided)]
    rescored = dict(zip(aided, score_texts(lm, texts, score_shape(run.config, longest))))
    # Batches of one shape, whatever there is to score.
    rows = -(-len(made) // 256) * 256
    logprob, entropy = np.zeros((2, rows, index.shape[1]), np.float32)
    answer, kept, length = np.zeros((rows, 2), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    for i in chosen:
        m = made[i]
        n, kept[i], length[i] = len(m.tokens), len(m.kept), len(lm.tokenizer.without_eos(list(m.tokens)))
        if i in rescored:
            logprob[i, kept[i] : n], entropy[i, kept[i] : n] = rescored[i]
        else:
            logprob[i, :n], entropy[i, :n] = m.decoded.logprob, m.decoded.entropy
        answer[i] = tokens_of_answer(run, m) or (0, 0)
    padded = np.pad(index, ((0, rows - len(made)), (0, 0)), constant_values=-1)
    steps = np.asarray(scored_steps(padded, answer, kept, length))
    most = bucket(int(steps.max(initial=0)) + 1)
    result = purity(logprob, entropy, steps, spec.epsilon, spec.max_weight, steps=most)
    ppl, expected, count, score = (np.asarray(x) for x in result)
    out: list[tuple[np.ndarray, np.ndarray, float] | None] = [None] * len(made)
    for i in chosen:
        if count[i]:
            out[i] = (ppl[i, : count[i]], expected[i, : count[i]], float(score[i]))
    return out
