"""Training: an optimizer step beside PyTorch's, and beside the matrix products alone."""

import dataclasses

from heal_jax.bench import ours
from heal_jax.bench.context import Bench
from heal_jax.bench.figure import Figure
from heal_jax.bench.timing import following
from heal_jax.config import TrainSpec


def figures(bench: Bench) -> list[Figure]:
    """Full rows (as packing leaves them), float32: forward, backward, clipping, AdamW. Steps that follow another, as in
    training: what comes between, here the other sides, takes the memory away that a step finds."""
    rows, length = (2, 16) if bench.quick else (4, 256)
    tokens = bench.tokens(rows, length)
    spec = TrainSpec(learning_rate=1e-5)
    bench.say(f"train: {rows} rows of {length}")
    took = bench.turns(
        {
            "ours": following(ours.training(bench.lm, tokens, spec)),
            "limit": bench.products.side(rows * length, rows * length, backward=True),
            "torch": bench.asking("torch", "train", tokens=tokens.tolist(), learning_rate=spec.learning_rate),
        }
    )
    flops = bench.products.flops(rows * length, rows * length, backward=True)
    limit = Figure(
        f"train, {rows} x {length} tokens",
        "matrix products alone",
        took["ours"],
        took["limit"],
        rows * length,
        reach=0.5,
        limit=took["limit"],
        flops=flops,
    )
    if "torch" not in took:
        return [limit]
    return [dataclasses.replace(limit, against="PyTorch eager", theirs=took["torch"], reach=1.0), limit]
