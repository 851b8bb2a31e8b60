"""Is entropy informative, and does it pay? Repairs from every cut of failed rollouts, and what each rule makes of them.

A repair depends on the rollout and on how many of its steps are kept, not on the rule that chose them. So a few
continuations from every cut are decoded once, and any rule is judged by those at its own cut: how many are flawless
(the right answer, and every step right by the world's checker), for how many of the teacher's tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from heal_jax import gear, processes
from heal_jax.collect import Path, failed_paths, longest_prompt, wrong_step
from heal_jax.rollout.generate import Decoded, Group, generate
from heal_jax.rollout.sampling import rules
from heal_jax.run import Run, hint_text
from heal_jax.shapes import repair_shape
from heal_jax.store import read_json, write_json

WINDOWS = {"1/3": 1 / 3, "2/3": 2 / 3, "1": 1.0}
BACKUPS = (0, 1, 2)
SURGES = ("difference", "ratio", "zscore")


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Of one failed rollout of K steps, at each cut c (steps kept, 0..K-1): flawless and correct, shares of its
    continuations, and tokens, the mean number that a continuation has; [K] float64 each. entropy [K] float32: h_k;
    wrong: its first wrong step.
    """

    problem: str
    wrong: int
    entropy: np.ndarray
    flawless: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.entropy)


def decode(run: Run, paths: int, repeats: int) -> list[Cuts]:
    """`repeats` continuations (or as many as a batch has rows) from every cut of the first `paths` failed rollouts of
    each unsolved problem. What a batch comes to is kept in cuts-N.json of the run's directory until `forget`.
    """
    repeats = min(repeats, run.config.sample.batch)
    taken: dict[str, list[Path]] = {}
    for path in failed_paths(run):
        several = taken.setdefault(path.problem.id, [])
        if len(several) < paths and len(path.row["step_starts"]) > 1:
            several.append(path)
    units = [(path, c) for several in taken.values() for path in several for c in range(len(path.row["step_starts"]))]
    if not units:
        return []
    lm, config = run.teacher, run.config
    hints = {p.id: tuple(lm.tokenizer.encode(hint_text(config, p))) for p in run.problems}

    def group(path: Path, c: int) -> Group:
        stem = path.row["rollout_id"].removesuffix(f"/s{config.seed}")
        ids = tuple(f"{stem}/cut{c}.{i}/s{config.seed}" for i in range(repeats))
        context = run.prompts[path.problem.id] + _kept(path, c) + hints[path.problem.id]
        return Group(context, ids, config.sample.max_new_tokens - len(_kept(path, c)))

    longest = longest_prompt(run) + max(len(_kept(*unit)) for unit in units) + max(map(len, hints.values()))
    alike = dataclasses.replace(config, gear=dataclasses.replace(config.gear, repairs=repeats, paths=1))
    shape = repair_shape(alike, len(units), longest)
    found: dict[tuple[str, int], list[float]] = {}
    total = -(-len(units) // shape.contexts)
    for number in range(total):
        part = units[number * shape.contexts : (number + 1) * shape.contexts]
        file = run.root / f"cuts-{number}.json"
        if not file.is_file():
            run.progress.doing(f"decoding from {len(part)} cuts")
            made = generate(lm, [group(*unit) for unit in part], shape, rules(config.sample))
            processes.once(functools.partial(write_json, file, _continued(run, part, made)))
        found |= {(unit[0].row["rollout_id"], unit[1]): shares for unit, shares in zip(part, read_json(file))}
        run.progress.update("cuts", number + 1, total, "shards", tokens=0)
    out = []
    for path in (path for several in taken.values() for path in several):
        values = np.array([found[path.row["rollout_id"], c] for c in range(len(path.row["step_starts"]))])
        wrong = wrong_step(path.problem, path.row["text"])
        bounds = [*path.row["step_starts"], len(path.row["tokens"])]
        h = np.array([np.mean(path.row["entropy"][a:b]) for a, b in zip(bounds, bounds[1:])], np.float32)
        out.append(Cuts(path.problem.id, len(h) if wrong is None else wrong, h, *values.T))
    return out


def forget(run: Run) -> None:
    """Remove what `decode` kept."""
    for file in run.root.glob("cuts-*.json"):
        file.unlink()


def _kept(path: Path, c: int) -> tuple[int, ...]:
    """The tokens before a cut."""
    return tuple(path.row["tokens"][: path.row["step_starts"][c]])


def _continued(run: Run, units: Sequence[tuple[Path, int]], made: Sequence[Sequence[Decoded]]) -> list[list[float]]:
    """Of each cut: the shares of its continuations that are flawless and correct, and their tokens on average."""
    tokenizer = run.teacher.tokenizer
    graded = run.grade(
        [(unit[0].problem, tokenizer.text(list(d.tokens)), d.finish)
         for unit, several in zip(units, made) for d in several], 0
    )  # fmt: skip
    right = np.array([grade.grade == "correct" for grade in graded]).reshape(len(units), -1)
    found = []
    for unit, several, correct in zip(units, made, right):
        written = [tokenizer.text([*_kept(*unit), *d.tokens]) for d in several]
        flawless = [ok and wrong_step(unit[0].problem, text) is None for ok, text in zip(correct, written)]
        found.append(
            [float(np.mean(flawless)), float(correct.mean()), float(np.mean([len(d.tokens) for d in several]))]
        )
    return found


Chosen = Callable[[Cuts], np.ndarray]  # how likely each cut c is, [K]


def rules_of_cutting() -> dict[str, Chosen]:
    """By name, what is looked at: each way to find the surge, in each window, with each backup; controls."""
    found: dict[str, Chosen] = {}
    for window in WINDOWS:
        for backup in BACKUPS:
            for kind in SURGES:
                found[f"{kind}, window {window}, backup {backup}"] = _surging(kind, WINDOWS[window], backup)
            found[f"entropy, window {window}, backup {backup}"] = _highest(WINDOWS[window], backup)
            found[f"random, window {window}, backup {backup}"] = _random(WINDOWS[window], backup)
    for backup in BACKUPS:
        found[f"first surge, backup {backup}"] = _first(backup)
    found["restart"] = lambda cuts: _at(cuts, 0)
    found["oracle"] = lambda cuts: _at(cuts, min(cuts.wrong, cuts.steps - 1))
    return found


def _at(cuts: Cuts, c: int) -> np.ndarray:
    return (np.arange(cuts.steps) == c).astype(float)


def _candidates(cuts: Cuts, window: float) -> np.ndarray:
    """The k that may be the breakpoint."""
    last = min(int(gear.last_candidate(cuts.steps, window)[cuts.steps]), cuts.steps - 1)
    return np.arange(1, last + 1)


def _surging(kind: str, window: float, backup: int) -> Chosen:
    def choose(cuts: Cuts) -> np.ndarray:
        s, k = np.asarray(gear.surge(jnp.asarray(cuts.entropy[None]), kind))[0], _candidates(cuts, window)
        return _at(cuts, max(0, int(k[np.argmax(s[k])]) - backup))

    return choose


def _highest(window: float, backup: int) -> Chosen:
    """The step of the highest entropy itself."""

    def choose(cuts: Cuts) -> np.ndarray:
        k = _candidates(cuts, window)
        return _at(cuts, max(0, int(k[np.argmax(cuts.entropy[k])]) - backup))

    return choose


def _random(window: float, backup: int) -> Chosen:
    def choose(cuts: Cuts) -> np.ndarray:
        likely = np.zeros(cuts.steps)
        k = _candidates(cuts, window)
        np.add.at(likely, np.maximum(0, k - backup), 1 / len(k))
        return likely

    return choose


def _first(backup: int) -> Chosen:
    """The first surge that is at least half of the chain's largest: what comes before it was easy for the teacher."""

    def choose(cuts: Cuts) -> np.ndarray:
        s = np.diff(cuts.entropy)
        k = 1 + int(np.argmax(s >= 0.5 * s.max()))
        return _at(cuts, max(0, k - backup))

    return choose


def judged(cuts: Sequence[Cuts], chosen: Chosen, resamples: int, seed: int) -> dict[str, Any]:
    """Of a rule: flawless and correct, shares of its repairs; tokens of one; flawless_per_1000_tokens {mean, ci95}
    (problems resampled); kept, the mean share of a chain; keeps_a_fault, how often the first wrong step is kept.
    """
    likely = [chosen(c) for c in cuts]
    sums = np.array([[w @ c.flawless, w @ c.correct, w @ c.tokens] for w, c in zip(likely, cuts)])
    names = np.unique([c.problem for c in cuts], return_inverse=True)[1]
    totals = np.zeros((names.max() + 1, 2))
    np.add.at(totals, names, sums[:, [0, 2]])
    rng = np.random.default_rng([seed, len(totals)])
    drawn = totals[rng.integers(0, len(totals), size=(resamples, len(totals)))].sum(axis=1)
    low, high = np.quantile(1000 * drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    flawless, correct, tokens = sums.mean(axis=0)
    return {
        "flawless": float(flawless),
        "correct": float(correct),
        "tokens": float(tokens),
        "flawless_per_1000_tokens": {"mean": float(1000 * flawless / tokens), "ci95": [float(low), float(high)]},
        "kept": float(np.mean([w @ np.arange(c.steps) / c.steps for w, c in zip(likely, cuts)])),
        "keeps_a_fault": float(np.mean([w[c.wrong + 1 :].sum() for w, c in zip(likely, cuts)])),
    }


def located(cuts: Sequence[Cuts], choose: Chosen) -> dict[str, float]:
    """How often a breakpoint (a rule with backup 0) is at, before and after the first wrong step."""
    likely = [choose(c) for c in cuts]
    at = float(np.mean([w[c.wrong] if c.wrong < c.steps else 0.0 for w, c in zip(likely, cuts)]))
    before = float(np.mean([w[: c.wrong].sum() for w, c in zip(likely, cuts)]))
    return {"before": before, "at": at, "after": 1 - at - before}


def measured(cuts: Sequence[Cuts], resamples: int, seed: int) -> dict[str, Any]:
    """All of it: rollouts, problems, steps, first_wrong (share of the chain); rules; where; by_offset, what repairs
    come to by how far the cut is from the first wrong step.
    """
    if not cuts:
        return {"rollouts": 0}
    named = rules_of_cutting()
    offsets: dict[int, list[tuple[float, float]]] = {}
    for c in cuts:
        for k in range(c.steps):
            offsets.setdefault(k - c.wrong, []).append((c.flawless[k], c.tokens[k]))
    inside = [c.wrong <= _candidates(c, 1 / 3)[-1] for c in cuts]
    return {
        "rollouts": len(cuts),
        "problems": len({c.problem for c in cuts}),
        "steps": float(np.mean([c.steps for c in cuts])),
        "first_wrong": np.histogram([c.wrong / c.steps for c in cuts], bins=10, range=(0, 1))[0].tolist(),
        "first_wrong_in_window": float(np.mean(inside)),
        "where": {
            f"{kind}, window {window}": located(cuts, named[f"{kind}, window {window}, backup 0"])
            for kind in (*SURGES, "entropy", "random")
            for window in WINDOWS
        }
        | {"first surge": located(cuts, named["first surge, backup 0"])},
        "rules": {name: judged(cuts, choose, resamples, seed) for name, choose in named.items()},
        "by_offset": {
            str(offset): {"flawless": float(np.mean([f for f, _ in values])),
                          "tokens": float(np.mean([t for _, t in values])), "cuts": len(values)}
            for offset, values in sorted(offsets.items()) if -12 <= offset <= 12
        },
    }  # fmt: skip
