"""Repeats that take turns, so that what else the machine does falls on every side alike."""

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

Side = Callable[[], float]
"""Does the work once; the seconds it took."""


def timed(work: Callable[[], Any]) -> Side:
    """A side of a function whose result is of JAX arrays: its seconds until they are computed."""

    def side() -> float:
        start = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - start

    return side


def following(work: Callable[[], Any]) -> Side:
    """`timed` of the second of two: one of many in a row, which finds the memory that the one before it used."""
    once = timed(work)

    def side() -> float:
        once()
        return once()

    return side


def seeded(work: Callable[[int], Any]) -> Side:
    """`timed` of a function of a seed, another one every time."""
    seeds = itertools.count()
    return timed(lambda: work(next(seeds)))


def take_turns(
    sides: Mapping[str, Side], repeats: int, done: Collection[Side | None] = ()
) -> dict[str, tuple[float, ...]]:
    """Seconds of `repeats` repeats of every side, in the order A B C A B C; each was done once before, untimed (`done`
    already). A first time holds compilation, and allocations that later ones find made.
    """
    for side in sides.values():
        if side not in done:
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side())
    return {name: tuple(found) for name, found in seconds.items()}


def median(values: tuple[float, ...]) -> float:
    """The median, NaN of nothing."""
    return statistics.median(values) if values else float("nan")
