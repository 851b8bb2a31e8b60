"""The grades of rollouts: correct, wrong, unparsable, truncated, timeout."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from types import TracebackType
from typing import NoReturn

from heal_jax.config import GradeSpec
from heal_jax.errors import RunError
from heal_jax.problems import scorers, worker
from heal_jax.problems.answers import extract
from heal_jax.problems.sources import Problem

CHUNK = 256  # answers sent at once; fewer do not pay for a process more, which takes seconds to start
STALL_SECONDS = 60.0  # wall-clock time, besides 20 timeouts, after which a process that does nothing is given up
ATTEMPTS = 2  # a hang or a crash may be the machine's fault once

Pair = tuple[Problem, str]  # a problem and an answer to it
Verdict = tuple[str, str]  # grade and reason


@dataclass(frozen=True)
class Grade:
    """A rollout's grade, the answer found in it (or empty), and the reason where the grade alone does not say it."""

    grade: str
    answer: str
    reason: str


class Grader:
    """Grades rollouts; answers are scored in processes of their own, so that a hang or a crash costs one answer.

    `grade.workers` processes at most, started when there is a chunk of answers for each; which of them scores an answer
    does not change its grade. A context manager: the processes end with it. The same answer to the same problem is
    scored once.
    """

    def __init__(self, spec: GradeSpec) -> None:
        self.spec = spec
        self.processes: list[_Process] = []
        self._known: dict[Pair, Verdict] = {}

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
        wanted: dict[Pair, None] = {}
        for (problem, _, finish), answer in zip(items, answers, strict=True):
            if finish not in ("stop", "length"):
                raise ValueError(f"finish is {finish!r}, stop or length is expected")
            if finish == "stop" and answer and (problem, answer) not in self._known:
                wanted[problem, answer] = None
        self._score(list(wanted))
        return [
            self._grade(problem, answer, finish) for (problem, _, finish), answer in zip(items, answers, strict=True)
        ]

    def unreadable(self, problems: Sequence[Problem]) -> list[tuple[Problem, str]]:
        """Problems whose reference answer is mathematical notation that math-verify cannot read, and the reason.

        Only those that it scores count; words, choices and plain numbers need no reading.
        """
        asked = [p for p in problems if p.scorer == "math" and not scorers.plain_text(p.answer)]
        pairs = [(dataclasses.replace(p, scorer="reference"), p.answer) for p in asked]
        self._score(list(dict.fromkeys(pairs)))
        return [(p, self._known[pair][1]) for p, pair in zip(asked, pairs) if self._known[pair][0] != "correct"]

    def _grade(self, problem: Problem, answer: str | None, finish: str) -> Grade:
        if finish == "length":
            return Grade("truncated", answer or "", "the length limit was reached")
        if answer is None:
            return Grade("unparsable", "", f"no answer between {self.spec.answer_open} and {self.spec.answer_close}")
        if not answer:
            return Grade("unparsable", "", "the answer is empty")
        grade, reason = self._known[problem, answer]
        return Grade(grade, answer, reason)

    def _score(self, pairs: list[Pair]) -> None:
        """Fill in the verdicts of pairs, with a fresh process after each hang and crash.

        Raises RunError where a scorer cannot be loaded or a process does not start.
        """
        todo = deque(range(start, min(start + CHUNK, len(pairs))) for start in range(0, len(pairs), CHUNK))
        most = self.spec.workers or os.cpu_count() or 1
        failed: Counter[int] = Counter()
        try:
            while todo or any(process.work for process in self.processes):
                idle = [process for process in self.processes if not process.work]
                while todo and (idle or len(self.processes) < most):
                    if not idle:
                        idle.append(_Process(self.spec.timeout))
                        self.processes.append(idle[0])
                    work = todo.popleft()
                    idle.pop().take(work, [pairs[index] for index in work])
                self._hear(pairs, todo, failed)
        except BaseException:
            self._stop()  # replies are still to come; the next call must not read them
            raise

    def _hear(self, pairs: list[Pair], todo: deque[range], failed: Counter[int]) -> None:
        """Wait for the processes at work; note verdicts, and give back to `todo` what a dead one leaves."""
        busy = [process for process in self.processes if process.work]
        patience = min(process.deadline for process in busy) - time.monotonic()
        ready = wait([process.connection for process in busy], max(0.0, patience))
        for process in busy:
            first, rest = process.work[0], process.work[1:]
            try:
                if process.connection in ready:
                    if (verdict := process.read()) is not None:
                        self._known[pairs[first]] = verdict
                elif time.monotonic() >= process.deadline:
                    process.give_up()
            except _LostError as lost:
                self.processes.remove(process)
                failed[first] += 1
                if failed[first] < ATTEMPTS:
                    rest = process.work
                else:
                    self._known[pairs[first]] = lost.verdict
                if rest:
                    todo.appendleft(rest)

    def _stop(self) -> None:
        while self.processes:
            self.processes.pop().stop()


class _LostError(Exception):
    """A process is gone; `verdict` is what to say of the answer that it was at."""

    def __init__(self, grade: str, reason: str) -> None:
        self.verdict = grade, reason


class _Process:
    """A scoring process, and what it has still to score: `work` counts the pairs from the one that it is at."""

    def __init__(self, timeout: float) -> None:
        self.timeout, self.work = timeout, range(0)
        self._started = False
        self.popen, self.connection = worker.start("heal_jax.problems.scorers", "serve")

    def take(self, work: range, pairs: list[Pair]) -> None:
        """Begin to score pairs, as soon as the process is there."""
        self.work, self._request = work, (self.timeout, _request(pairs))
        if self._started:
            self._send()
        self._wait()

    def read(self) -> Verdict | None:
        """The next verdict, None where the process says that it has started.

        Raises _LostError where it died, RunError where it cannot start or cannot load a scorer.
        """
        try:
            message = self.connection.recv_bytes()
            if not self._started:
                self._started = message == b"ready"
                self._send()
                self._wait()
                return None
            grade, reason = json.loads(message)
        except (EOFError, OSError, ValueError):
            status = self.stop(kill=False)
            if not self._started:
                raise RunError(f"grading: the scoring process does not start (exit status {status})") from None
            if status == -signal.SIGPROF:
                raise _LostError("timeout", f"no verdict after {self.timeout:g} s of processor time") from None
            raise _LostError("unparsable", f"the scoring process died (exit status {status})") from None
        if grade == "broken":
            raise RunError(f"grading: a scorer cannot be loaded ({reason})")
        self.work = self.work[1:]
        self._wait()
        return grade, reason

    def give_up(self) -> NoReturn:
        self.stop()
        if not self._started:
            raise RunError("grading: the scoring process does not start")
        raise _LostError("timeout", f"the scoring process did nothing for {self._patience():g} s")

    def stop(self, kill: bool = True) -> int:
        """End the process, at once or when it does so by itself; its exit status."""
        self.connection.close()
        if not kill:
            try:
                return self.popen.wait(timeout=5)
            except subprocess.TimeoutExpired:
                pass
        self.popen.kill()
        return self.popen.wait()

    def _send(self) -> None:
        with contextlib.suppress(OSError):  # a process that died is found dead when it is read
            self.connection.send(self._request)

    def _wait(self) -> None:
        self.deadline = time.monotonic() + self._patience()

    def _patience(self) -> float:
        return STALL_SECONDS + 20 * self.timeout


def _request(chunk: list[Pair]) -> list[tuple[str, dict[str, object], list[str]]]:
    """The chunk as scorers.serve reads it; neighbours of one problem share it."""
    return [
        (
            problem.scorer,
            {"question": problem.question, "answer": problem.answer, "metadata": problem.metadata},
            [answer for _, answer in pairs],
        )
        for problem, pairs in itertools.groupby(chunk, key=lambda pair: pair[0])
    ]
