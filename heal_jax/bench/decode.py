"""Decoding: tokens a second beside transformers and Tunix, and beside the matrix products alone."""

import itertools
from collections.abc import Callable
from typing import Any

from heal_jax.bench import ours
from heal_jax.bench.context import Bench
from heal_jax.bench.figure import Figure
from heal_jax.bench.timing import Side, timed

STEPS = 3  # of the limit's decode steps that are run for one repeat; the others would be the same
TRANSFORMERS: dict[str, dict[str, str | bool]] = {
    "transformers": {"cache": "dynamic"},
    "transformers, static cache": {"cache": "static"},
    "transformers, compiled": {"cache": "static", "compiled": True},
}
ALONE = "without entropies and log-probabilities"
REACH = {"transformers": 2.2, "Tunix sampler": 1.5, ALONE: 0.97}


def figures(bench: Bench) -> list[Figure]:
    """One prompt a row, nothing shared; temperature 1, no EOS, the same number of tokens on every side."""
    small, large, prompt, new, few = (2, 4, 8, 4, 4) if bench.quick else (32, 128, 32, 64, 32)
    return [*_beside_others(bench, small, prompt, new), _beside_limit(bench, large, prompt, few)]


def _ours(bench: Bench, rows: int, prompt: int, new: int, way: Callable[..., Callable[[int], Any]]) -> Side:
    decode, seeds = way(bench.lm, bench.tokens(rows, prompt), 1, new), itertools.count()
    return timed(lambda: decode(next(seeds)))


def _limit(bench: Bench, rows: int, prompt: int, new: int) -> Side:
    """The products of computing the prompts and then, for every token after the first, one step."""
    prompts, step = bench.products.side(rows * prompt, rows), bench.products.side(rows, rows)
    return lambda: prompts() + (new - 1) / STEPS * sum(step() for _ in range(STEPS))


def _flops(bench: Bench, rows: int, prompt: int, new: int) -> float:
    return bench.products.flops(rows * prompt, rows) + (new - 1) * bench.products.flops(rows, rows)


def _beside_others(bench: Bench, rows: int, prompt: int, new: int) -> list[Figure]:
    request = {"prompts": bench.tokens(rows, prompt).tolist(), "new": new, "seed": 0}
    ways = dict(itertools.islice(TRANSFORMERS.items(), 1 if bench.quick else None))  # compiling takes minutes
    others = {name: bench.asking("torch", "decode", **request, **how) for name, how in ways.items()}
    others["Tunix sampler"] = bench.asking("tunix", "decode", **request)
    bench.say(f"decode: {rows} rows")
    took = bench.turns(
        {
            "ours": _ours(bench, rows, prompt, new, ours.sampling),
            "limit": _limit(bench, rows, prompt, new),
            ALONE: _ours(bench, rows, prompt, new, ours.sampling_alone),
            **others,
        }
    )
    flops = _flops(bench, rows, prompt, new)
    return [
        Figure(
            f"decode, {rows} rows of {prompt} + {new} tokens",
            name,
            took["ours"],
            seconds,
            rows * new,
            reach=REACH.get(name),
            limit=took["limit"],
            flops=flops,
        )
        for name, seconds in took.items()
        if name in others or name == ALONE
    ]


def _beside_limit(bench: Bench, rows: int, prompt: int, new: int) -> Figure:
    bench.say(f"decode: {rows} rows")
    took = bench.turns(
        {"ours": _ours(bench, rows, prompt, new, ours.sampling), "limit": _limit(bench, rows, prompt, new)}
    )
    name = f"decode, {rows} rows of {prompt} + {new} tokens"
    flops = _flops(bench, rows, prompt, new)
    return Figure(
        name,
        "matrix products alone",
        took["ours"],
        took["limit"],
        rows * new,
        reach=0.6,
        limit=took["limit"],
        flops=flops,
    )
