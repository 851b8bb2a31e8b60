"""What is held and read once: prompts, kept prefixes, contexts of what PURE scores; and what recording costs."""

import jax
import numpy as np

from heal_jax.bench import ours
from heal_jax.bench.context import Bench
from heal_jax.bench.figure import Figure
from heal_jax.bench.timing import seeded, timed
from heal_jax.model.kv_cache import bytes_per_slot


def decoding(bench: Bench) -> list[Figure]:
    """Repairs of a kept prefix, and rollouts of a long prompt."""
    return [*_repairs(bench), *_prompts(bench)]


def _repairs(bench: Bench) -> list[Figure]:
    """R continuations of a path: its prefix read and held once, against read and held for each."""
    each, kept, new = (4, 32, 8) if bench.quick else (20, 512, 128)
    prefix = bench.tokens(1, kept)
    bench.say(f"decode: {each} repairs after {kept} tokens")
    took = bench.turns(
        {
            "ours": seeded(ours.sampling(bench.lm, prefix, each, new)),
            "each": seeded(ours.reading_each(bench.lm, prefix, each, new)),
        }
    )
    name = f"{each} repairs, {kept} kept, {new} new tokens"
    slot = float(bytes_per_slot(bench.lm.model.config, bench.products.head.dtype))
    held = (kept + each * new) * slot, each * (kept + new) * slot
    return [
        Figure(name, "reading each prefix", took["ours"], took["each"], each * new, reach=3.0),
        Figure(f"{name}: cache", "a cache for each", held[:1], held[1:], reach=3.0, quantity="bytes", unit="bytes"),
    ]


def _prompts(bench: Bench) -> list[Figure]:
    """N rollouts of one prompt: a long one against a short one, and against copies of its keys and values."""
    each, short, long, new = (4, 16, 64, 8) if bench.quick else (30, 256, 1024, 24)
    bench.say(f"decode: {each} rollouts of a prompt of {long} tokens")
    ways = {"long": (long, False), "short": (short, False), "copies": (long, True)}
    took = bench.turns(
        {
            name: seeded(ours.after_prompt(bench.lm, bench.tokens(1, width), each, new, copies=copies))
            for name, (width, copies) in ways.items()
        }
    )
    name = f"{each} rollouts after a prompt of {long}"
    return [
        Figure(name, f"after one of {short}", took["long"], took["short"], each * new, reach=0.8),
        Figure(name, "with a copy of its cache each", took["long"], took["copies"], each * new, reach=1.5),
    ]


def scoring(bench: Bench) -> list[Figure]:
    """PURE's pass over continuations after a context that is read once, against whole texts from nothing."""
    each, width, length = (4, 32, 16) if bench.quick else (5, 512, 128)
    contexts, texts = bench.tokens(1, width), np.repeat(bench.tokens(1, length), each, axis=0)
    bench.say(f"pure: {each} texts of {length} tokens after {width}")
    sides = ours.scoring(bench.lm, contexts, texts, each), ours.scoring_whole(bench.lm, contexts, texts, each)
    ahead, whole = (jax.device_get(side()) for side in sides)
    worst = max(float(np.abs(a - b[:, -length:]).max()) for a, b in zip(ahead, whole))
    bench.note(f"pure: largest difference of log-probabilities and entropies between the two ways: {worst:.1e}")
    took = bench.turns({"ours": timed(sides[0]), "whole": timed(sides[1])}, warm=True)
    name = f"PURE, {each} texts of {length} tokens after {width}"
    return [Figure(name, "whole texts from nothing", took["ours"], took["whole"], each * length, reach=3.0)]
