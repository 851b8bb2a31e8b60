"""What the rollouts of a stage amount to so far, for progress."""

from collections import Counter, defaultdict
from typing import Any

import pyarrow as pa

from heal_jax.config import Config
from heal_jax.pace import stratum

RATES = 11  # pass rates 0, 0.1 .. 1


class Tally:
    """Counts over shards of one kind (base, hindsight, repair)."""

    def __init__(self, config: Config, kind: str):
        self.config, self.kind = config, kind
        self.correct: dict[str, int] = defaultdict(int)  # by problem
        self._rollouts: Counter[str] = Counter()  # by problem
        self._grades: Counter[str] = Counter()
        self._paths: set[str] = set()
        self._repaired: set[str] = set()
        self._scored = self._passed = 0

    def add(self, table: pa.Table) -> None:
        """A shard's rows (store.ROLLOUTS)."""
        columns = (table[name].to_pylist() for name in ("problem_id", "grade", "pure_score", "parent_id"))
        for problem, grade, score, parent in zip(*columns):
            self._rollouts[problem] += 1
            self._grades[grade] += 1
            self.correct[problem] += grade == "correct"
            if self.kind == "repair":
                self._paths.add(parent)
            if grade == "correct" and score is not None:
                passes = score <= self.config.pure.threshold
                self._scored, self._passed = self._scored + 1, self._passed + passes
                if passes:
                    self._repaired.add(problem)

    def counts(self) -> dict[str, Any]:
        """As progress events have them."""
        counts: dict[str, Any] = {"problems": len(self._rollouts), "rollouts": self._rollouts.total()}
        if self.kind == "repair":
            counts |= {"paths": len(self._paths), "repaired": len(self._repaired)}
        counts["grades"] = dict(self._grades)
        if self.kind != "base":
            return counts | {"pure": {"scored": self._scored, "passed": self._passed}}
        rates, strata = [0] * RATES, Counter[str]()
        for problem, of in self._rollouts.items():
            rates[round((RATES - 1) * self.correct[problem] / of)] += 1
            strata[stratum(self.correct[problem], self.config.sample.n, self.config.gear.max_correct)] += 1
        unsolved = strata["unsolved"]  # the hard end of hard
        named = {"solved": strata["solved"], "hard": strata["hard"] + unsolved, "unsolved": unsolved}
        return counts | {"pass_rates": rates, "strata": named}
