"""The fused round beside the stages that make the same rollouts one program after another, shared or not."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from heal_jax.bench import ours
from heal_jax.bench.context import Bench
from heal_jax.bench.figure import Figure
from heal_jax.bench.timing import median, timed
from heal_jax.collect import cut
from heal_jax.config import Config, GearSpec, GradeSpec, ModelSpec, ProblemSpec, SampleSpec
from heal_jax.model.lm import LanguageModel, open_model
from heal_jax.problems.sources import Problem, load
from heal_jax.rollout.generate import Decoded, Group, generate, pad_rows, score_texts, split_steps
from heal_jax.rollout.heal_round import Problems, RoundSpec, heal_round
from heal_jax.rollout.prepare import prepare
from heal_jax.shapes import at_once, bucket, score_shape

EXAMPLES = (("3 + 4 - 5", "3 + 4 = 7", "7 - 5 = 2", "2"), ("8 - 2 + 6", "8 - 2 = 6", "6 + 6 = 12", "12"),
            ("1 + 9 + 7", "1 + 9 = 10", "10 + 7 = 17", "17"), ("5 - 4 + 8", "5 - 4 = 1", "1 + 8 = 9", "9"),
            ("6 + 6 - 3", "6 + 6 = 12", "12 - 3 = 9", "9"))  # fmt: skip


def figures(bench: Bench) -> list[Figure]:
    """At 5, 20 and 60 % unsolved problems, on the built-in teacher and its world: there the answers are right or wrong
    as the method needs it. Hard problems are unsolved, easy ones solved."""
    teacher = open_model(ModelSpec("builtin:teacher"))
    count, few = (4, 1) if bench.quick else (20, 4)
    sizes = (3, 2, 2) if bench.quick else (10, 2, 10)
    found: list[Figure] = []
    for unsolved in dict.fromkeys(max(1, round(share * count)) for share in (0.05, 0.2, 0.6)):
        bench.say(f"round: {unsolved} of {count} problems unsolved")
        work = Work(teacher, *_problems(unsolved, count - unsolved, *sizes))
        made = {"ours": work.fused, "shared": work.stages}
        if unsolved == few:
            made |= {"unshared": work.unshared, "without PURE": work.without_pure}
        took = _turns(bench, made)
        name, tokens = f"round, {unsolved / count:.0%} unsolved", work.tokens
        found.append(Figure(name, "stages, shared prefixes", took["ours"], took["shared"], tokens))
        if unsolved == few:
            found.append(Figure(name, "stages, nothing shared", took["ours"], took["unshared"], tokens, reach=2.0))
            share = 1 - median(took["without PURE"]) / median(took["ours"])
            bench.note(f"PURE's share of the fused round's time: {share:.0%} (aim: at most 25 %)")
    return found if bench.lm.folder == teacher.folder else [*found, _of_model(bench)]


def _of_model(bench: Bench) -> Figure:
    """Of the model given, with prompts as chat models have them and a few worked examples in each; small sums."""
    worked = (
        f"Problem: {asked} =\n\n{first}\n\n{then}\n\nThe answer is {answer}." for asked, first, then, answer in EXAMPLES
    )
    prompt = "\n\n".join((*worked, "Problem: {question}"))
    problems = ProblemSpec("rg:chain_sum", limit=1, options={"min_terms": 3, "max_terms": 3, "max_digits": 1})
    config = Config(
        sample=SampleSpec(prompt, n=3 if bench.quick else 8, max_new_tokens=32),
        gear=GearSpec(paths=2, repairs=2 if bench.quick else 4),
        problems=problems,
        grade=GradeSpec(answer_open=" is ", answer_close="."),
    )
    work = Work(bench.lm, config, load(problems, config.grade.by, "problems"))
    bench.say(f"round: one problem, {config.gear.paths} x {config.gear.repairs} repairs")
    made = {"ours": work.fused, "unshared": work.unshared}
    took = _turns(bench, made)
    prompts = round(float(work.arrays.prompt_length.mean()))
    name = f"round of the model, prompts of {prompts} tokens"
    return Figure(name, "stages, nothing shared", took["ours"], took["unshared"], work.tokens, reach=2.0)


def _problems(hard: int, easy: int, n: int, paths: int, repairs: int) -> tuple[Config, list[Problem]]:
    """Unsolved problems first."""
    config = Config(
        sample=SampleSpec(n=n),
        gear=GearSpec(paths=paths, repairs=repairs),
        problems=ProblemSpec(counts={"hard": hard, "easy": easy}),
    )
    problems = load(config.problems, config.grade.by, "problems")
    return config, sorted(problems, key=lambda p: p.level != "hard")


def _turns(bench: Bench, ways: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, ...]]:
    """Seconds of each way; a note where one does not decode the same rollouts."""
    made = {name: way() for name, way in ways.items()}
    lengths = {name: [sorted(map(int, part)) for part in result] for name, result in made.items() if "PURE" not in name}
    if any(found != lengths["ours"] for found in lengths.values()):
        sums = {name: [sum(part) for part in found] for name, found in lengths.items()}
        bench.note(f"round: the sides differ in what they decoded (tokens sampled, repaired, scored): {sums}")
    return bench.turns({name: timed(way) for name, way in ways.items()}, warm=True)


@dataclasses.dataclass(eq=False)
class Work:
    """Problems of which the easy ones, which come last, are solved, and the others not; every way gives the lengths of
    base rollouts, repairs and scored texts."""

    lm: LanguageModel
    config: Config
    problems: Sequence[Problem]

    def __post_init__(self) -> None:
        self.arrays = prepare(self.config, self.lm.tokenizer, self.problems)
        self.most = bucket(self.config.sample.max_new_tokens)
        gear = dataclasses.replace(self.config.gear, slots=sum(p.level != "easy" for p in self.problems))
        self.spec = RoundSpec((), self.most, gear, self.config.pure)
        self.device: Problems = jax.device_put(self.arrays)
        # No rollout holds an answer of one token that there is not: nothing is solved, nothing scored.
        wrong = jnp.full_like(self.device.answer, -2), jnp.ones_like(self.device.answer_length)
        self.unanswered = self.device._replace(answer=wrong[0], answer_length=wrong[1])
        self.tokens = 0

    def _round(self, problems: Problems) -> Any:
        return jax.device_get(
            heal_round(self.lm.model.graph, self.lm.model.params, problems, self.lm.eos_ids, spec=self.spec)
        )

    def fused(self) -> tuple[list[int], ...]:
        """One program."""
        made = self._round(self.device)
        self.tokens = int(made.base.length.sum() + made.repairs.length.sum())
        there = np.repeat(made.parent >= 0, self.config.gear.repairs)
        return made.base.length, made.repairs.length[there], made.repairs.length[made.repaired]

    def without_pure(self) -> tuple[list[int], ...]:
        """The same with nothing to score."""
        made = self._round(self.unanswered)
        return (made.base.length,)

    def stages(self) -> tuple[list[int], ...]:
        """One program after another, contexts read and held once."""
        return self._staged(self._sampled, self._scored)

    def unshared(self) -> tuple[list[int], ...]:
        """The same with the context read for each rollout, and whole texts scored from nothing."""
        return self._staged(self._sampled_each, self._scored_whole)

    def _staged(self, sampled: Callable[..., Any], scored: Callable[..., Any]) -> tuple[list[int], ...]:
        a, config = self.arrays, self.config
        prompts = [tuple(map(int, row[:n])) for row, n in zip(a.prompt, a.prompt_length)]
        hints = [tuple(map(int, row[:n])) for row, n in zip(a.hint, a.hint_length)]
        names = [tuple(f"{p.id}/base/{i}/s0" for i in range(config.sample.n)) for p in self.problems]
        base = sampled([Group(*pair, self.most) for pair in zip(prompts, names)], len(self.problems))
        groups, kept = self._paths(base, prompts, hints)
        repairs = sampled(groups, self.spec.gear.slots * config.gear.paths) if groups else []
        texts = [
            (context, tuple(map(int, d.tokens)))
            for (i, context), several in zip(kept, repairs)
            for d in several
            if self._right(i, d)
        ]
        scored(texts)
        every = ([len(d.tokens) for several in made for d in several] for made in (base, repairs))
        return *every, [len(text) for _, text in texts]

    def _paths(
        self, base: list[list[Decoded]], prompts: Sequence[tuple[int, ...]], hints: Sequence[tuple[int, ...]]
    ) -> tuple[list[Group], list[tuple[int, tuple[int, ...]]]]:
        """Groups of repairs, and of each its problem and the context without the hint."""
        config, spec = self.config, self.config.gear
        chosen: list[tuple[int, int, Decoded]] = []
        for i, several in enumerate(base[: self.spec.gear.slots]):
            if sum(self._right(i, d) for d in several) > spec.max_correct:
                continue
            failed: dict[tuple[int, ...], tuple[int, int, Decoded]] = {}
            for j, d in enumerate(several):
                if not self._right(i, d):
                    failed.setdefault(tuple(map(int, d.tokens)), (i, j, d))
            chosen += list(failed.values())[: spec.paths]
        if not chosen:
            return [], []
        index, starts, count = split_steps(self.lm, [d.tokens.tolist() for _, _, d in chosen], self.most)
        ids = [f"{self.problems[i].id}/base/{j}/s0" for i, j, _ in chosen]
        _, kept = cut(spec, ids, [d.entropy for _, _, d in chosen], index, starts, count)
        groups, contexts = [], []
        for (i, j, d), n in zip(chosen, kept):
            context = prompts[i] + tuple(map(int, d.tokens[:n]))
            names = tuple(f"{self.problems[i].id}/repair/{j}.{r}/s0" for r in range(spec.repairs))
            groups.append(Group(context + hints[i], names, config.sample.max_new_tokens - int(n)))
            contexts.append((i, context))
        return groups, contexts

    def _right(self, i: int, d: Decoded) -> bool:
        """Whether a rollout of problem i stopped and holds the answer's tokens, as the round sees it."""
        answer = self.arrays.answer[i, : self.arrays.answer_length[i]].tolist()
        ids = d.tokens.tolist()
        found = any(ids[t : t + len(answer)] == answer for t in range(len(ids) - len(answer) + 1))
        return d.finish == "stop" and found

    def _sampled(self, groups: Sequence[Group], most: int) -> list[list[Decoded]]:
        """By a program with room for `most` groups."""
        width, each = max(len(g.context) for g in groups), len(groups[0].rollout_ids)
        return generate(self.lm, groups, at_once(most, each, width, self.most), ())

    def _sampled_each(self, groups: Sequence[Group], most: int) -> list[list[Decoded]]:
        width, each = max(len(g.context) for g in groups), len(groups[0].rollout_ids)
        alone = [Group(g.context, (name,), g.budget) for g in groups for name in g.rollout_ids]
        made = generate(self.lm, alone, at_once(most * each, 1, width, self.most), ())
        return [[d for (d,) in made[i * each : (i + 1) * each]] for i in range(len(groups))]

    def _scored(self, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        longest = max((len(context) for context, _ in texts), default=1)
        score_texts(self.lm, texts, score_shape(self.config, longest))

    def _scored_whole(self, texts: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        distinct, rows = list(dict.fromkeys(texts)), self.config.pure.batch
        width = bucket(max((len(context) for context, _ in texts), default=1)) + self.most
        for start in range(0, len(distinct), rows):
            whole = [context + text for context, text in distinct[start : start + rows]]
            jax.device_get(
                ours.scored_whole(self.lm.model.graph, self.lm.model.params, pad_rows(whole, width, rows)[0])
            )
