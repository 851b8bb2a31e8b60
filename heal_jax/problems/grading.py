"""The grades of rollouts: correct, wrong, unparsable, truncated, timeout."""

import itertools
import json
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType

from heal_jax.config import GradeSpec
from heal_jax.errors import RunError
from heal_jax.problems import worker
from heal_jax.problems.answers import extract
from heal_jax.problems.sources import Problem

CHUNK = 256  # answers sent at once
STALL_SECONDS = 60.0  # wall-clock time, besides 20 timeouts, after which a process that does nothing is given up
ATTEMPTS = 2  # a hang or a crash may be the machine's fault once


@dataclass(frozen=True)
class Grade:
    """A rollout's grade, the answer found in it (or empty), and the reason where the grade alone does not say it."""

    grade: str
    answer: str
    reason: str


class Grader:
    """Grades rollouts; answers are scored in a process of its own, so that a hang or a crash costs one answer.

    A context manager: the process ends with it. The same answer to the same problem is scored once.
    """

    def __init__(self, spec: GradeSpec) -> None:
        self.spec = spec
        self._known: dict[tuple[Problem, str], tuple[str, str]] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def grade(self, problem: Problem, text: str, finish: str) -> Grade:
        """One rollout's grade, from its decoded text and how it ended (stop or length)."""
        return self.grade_many([(problem, text, finish)])[0]

    def grade_many(self, items: Sequence[tuple[Problem, str, str]]) -> list[Grade]:
        """Grades of (problem, text, finish), in order.

        Raises ValueError for an unknown finish, RunError where a scorer cannot be loaded.
        """
        answers = [extract(text, self.spec) for _, text, _ in items]
        wanted: dict[tuple[Problem, str], None] = {}
        for (problem, _, finish), answer in zip(items, answers, strict=True):
            if finish not in ("stop", "length"):
                raise ValueError(f"finish is {finish!r}, stop or length is expected")
            if finish == "stop" and answer and (problem, answer) not in self._known:
                wanted[problem, answer] = None
        self._score(list(wanted))
        return [
            self._grade(problem, answer, finish) for (problem, _, finish), answer in zip(items, answers, strict=True)
        ]

    def _grade(self, problem: Problem, answer: str | None, finish: str) -> Grade:
        if finish == "length":
            return Grade("truncated", answer or "", "the length limit was reached")
        if answer is None:
            return Grade("unparsable", "", f"no answer between {self.spec.answer_open} and {self.spec.answer_close}")
        if not answer:
            return Grade("unparsable", "", "the answer is empty")
        grade, reason = self._known[problem, answer]
        return Grade(grade, answer, reason)

    def _score(self, pairs: list[tuple[Problem, str]]) -> None:
        """Fill in the verdicts of (problem, answer) pairs, with a fresh process after each hang and crash."""
        done, failures = 0, 0
        while done < len(pairs):
            chunk = pairs[done : done + CHUNK]
            verdicts, failure = self._attempt(chunk)
            self._known.update(zip(chunk, verdicts, strict=False))
            done += len(verdicts)
            failures = 0 if verdicts else failures
            if failure:
                failures += 1
                if failures == ATTEMPTS:
                    self._known[pairs[done]] = failure
                    done, failures = done + 1, 0

    def _attempt(self, chunk: list[tuple[Problem, str]]) -> tuple[list[tuple[str, str]], tuple[str, str] | None]:
        """The verdicts of a chunk up to the first answer that hangs or crashes, and what to say of that one."""
        verdicts: list[tuple[str, str]] = []
        patience = STALL_SECONDS + 20 * self.spec.timeout
        try:
            connection = self._connection or self._start()
            connection.send((self.spec.timeout, _request(chunk)))
            for _ in chunk:
                if not connection.poll(patience):
                    self._stop()
                    return verdicts, ("timeout", f"the scoring process did nothing for {patience:g} s")
                grade, reason = json.loads(connection.recv_bytes())
                if grade == "broken":
                    raise RunError(f"grading: a scorer cannot be loaded ({reason})")
                verdicts.append((grade, reason))
        except (EOFError, OSError, ValueError):
            status = self._stop(kill=False)
            if status == -signal.SIGPROF:
                return verdicts, ("timeout", f"no verdict after {self.spec.timeout:g} s of processor time")
            return verdicts, ("unparsable", f"the scoring process died (exit status {status})")
        except BaseException:
            self._stop()  # replies are still to come; the next call must not read them
            raise
        return verdicts, None

    def _start(self) -> Connection:
        self._process, self._connection = worker.start("heal_jax.problems.scorers", "serve")
        try:
            ready = self._connection.poll(STALL_SECONDS) and self._connection.recv_bytes() == b"ready"
        except (EOFError, OSError):
            ready = False
        if not ready:
            raise RunError(f"grading: the scoring process does not start (exit status {self._stop()})")
        return self._connection

    def _stop(self, kill: bool = True) -> int:
        """End the process, at once or when it does so by itself; its exit status."""
        if self._connection is not None:
            self._connection.close()
        process, self._process, self._connection = self._process, None, None
        if process is None:
            return 0
        if not kill:
            try:
                return process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                pass
        process.kill()
        return process.wait()


def _request(chunk: list[tuple[Problem, str]]) -> list[tuple[str, dict[str, object], list[str]]]:
    """The chunk as scorers.serve reads it; neighbours of one problem share it."""
    return [
        (
            problem.scorer,
            {"question": problem.question, "answer": problem.answer, "metadata": problem.metadata},
            [answer for _, answer in pairs],
        )
        for problem, pairs in itertools.groupby(chunk, key=lambda pair: pair[0])
    ]
