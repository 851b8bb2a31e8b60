"""Decoding: tokens a second beside transformers and Tunix, and beside the matrix products alone."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from heal_jax.bench import ours
from heal_jax.bench.context import Bench
from heal_jax.bench.figure import Figure
from heal_jax.bench.timing import Side, seeded

STEPS = 3  # of the limit's decode steps that are run for one repeat; the others would be the same
TRANSFORMERS: dict[str, dict[str, str | bool]] = {
    "transformers": {"cache": "dynamic"},
    "transformers, static cache, compiled": {"cache": "static", "compiled": True},
}
ALONE = "without entropies and log-probabilities"
REACH = {"transformers": 2.2, "Tunix sampler": 1.5, ALONE: 0.97}


def figures(bench: Bench) -> list[Figure]:
    """One prompt a row, nothing shared; temperature 1, no EOS, the same number of tokens on every side."""
    small, large, prompt, new, few = (2, 4, 8, 4, 4) if bench.quick else (32, 128, 16, 32, 16)
    beside = [*_beside_others(bench, small, prompt, new), _beside_limit(bench, large, prompt, few)]
    return [*beside, *_refilled(bench, prompt)]


def _ours(bench: Bench, rows: int, prompt: int, new: int, way: Callable[..., Callable[[int], Any]]) -> Side:
    return seeded(way(bench.lm, bench.tokens(rows, prompt), 1, new))


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
    _error(bench, rows, prompt, new)
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
        if name not in ("ours", "limit")
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


def _error(bench: Bench, rows: int, prompt: int, new: int) -> None:
    """Say how far what is recorded with an int8 cache is from what a pass without a cache says of the same tokens."""
    prompts = bench.tokens(rows, prompt)
    for name, eight_bit in (("the model's dtype", False), ("int8", True)):
        made = ours.sampling(bench.lm, prompts, 1, new, eight_bit=eight_bit)(0)
        exact = ours.scored_whole(
            bench.lm.model.graph, bench.lm.model.params, np.concatenate([prompts, made.tokens], axis=1)
        )
        pairs = zip((made.logprob, made.entropy), exact)
        off = [np.abs(np.asarray(recorded)[:, :new] - np.asarray(whole)[:, -new:]) for recorded, whole in pairs]
        said = [f"{what} {x.mean():.1e} (mean), {x.max():.1e} (largest)" for what, x in zip(("log p", "entropy"), off)]
        bench.note(f"cache of {name}, {rows * new} tokens: off in nats by {', '.join(said)}")


def _each(batches: Sequence[Callable[[int], Any]], seed: int) -> list[Any]:
    return [batch(seed) for batch in batches]


def _refilled(bench: Bench, prompt: int) -> list[Figure]:
    """Rows that take one rollout after another, against batches that each go on to their longest: where lengths spread
    10:1, and where all are equal, which shows what taking turns costs."""
    contexts, each, groups, members = (4, 2, 2, 1) if bench.quick else (4, 8, 2, 4)
    rows, prompts = groups * members, bench.tokens(contexts, prompt)
    spread = np.random.default_rng(0).integers(2, 21, (contexts, each), dtype=np.int32)
    found = []
    for name, budget in (("lengths 10:1", spread), ("equal lengths", np.full_like(spread, spread.mean()))):
        what = f"{contexts * each} rollouts by {rows} rows, {name}"
        bench.say(f"decode: {what}")
        size = rows // each
        batches = [
            ours.in_turn(bench.lm, prompts[i : i + size], budget[i : i + size], size, each)
            for i in range(0, contexts, size)
        ]
        took = bench.turns(
            {
                "ours": seeded(ours.in_turn(bench.lm, prompts, budget, groups, members)),
                "batches": seeded(partial(_each, batches)),
            }
        )
        found.append(Figure(what, "batch after batch", took["ours"], took["batches"], float(budget.sum())))
    return found
