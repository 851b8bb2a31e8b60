"""Through the layers of a full pass: where they repeat, as a loop, so that programs do not grow with depth.

Parameters stay one array a layer: a loop's are stacked inside the compiled function. Layers are alike where window,
rope and experts are; families repeat patterns of them (Gemma: five local layers and a global one).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from heal_jax.model.config import DecoderConfig
from heal_jax.model.mesh import platform

SCAN_FROM = 4  # repetitions; fewer save little compiling, and their weights are copied together all the same
# Where layers are never a loop. A CPU's compiler takes 8 s for a training step of 30 layers, 24 s for one with a loop,
# which is slower by a fifth and takes two thirds more memory. A TPU's takes minutes for as few as two layers.
UNROLLED = ("cpu",)

Remat = Literal["none", "dots", "block"]
"""What the backward pass computes again: nothing; of each block all but its matrix products with weights; all of it."""
Apply = Callable[[Any, Array], Array]  # a block, x [B, T, D] -> x [B, T, D]


def in_turn(apply: Apply, blocks: Sequence[Any], config: DecoderConfig, x: Array, remat: Remat) -> Array:
    """x [B, T, D] through all blocks."""
    if remat != "none":
        kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        apply = nnx.remat(apply, policy=kept)
    for start, period, times in stretches(config):
        stretch = blocks[start : start + period * times]
        if times > 1 and platform() not in UNROLLED:
            x = _scan(apply, stretch, period, x)
        else:
            x = functools.reduce(lambda x, block: apply(block, x), stretch, x)
    return x


def _scan(apply: Apply, blocks: Sequence[Any], period: int, x: Array) -> Array:
    """x [B, T, D] through all blocks, of which those `period` apart are alike: a loop over their stacked weights."""
    graphs, states = zip(*map(nnx.split, blocks))
    stacked = [jax.tree.map(lambda *weights: jnp.stack(weights), *states[i::period]) for i in range(period)]

    def body(x: Array, states: list[nnx.State]) -> tuple[Array, None]:
        for graph, state in zip(graphs, states):
            x = apply(nnx.merge(graph, state), x)
        return x, None

    return jax.lax.scan(body, x, stacked)[0]


def stretches(config: DecoderConfig) -> Iterator[tuple[int, int, int]]:
    """The layers as (first layer, period, times): `period` kinds of layer that follow each other `times` times.

    The longest repetition there is from each layer on, with the shortest period; what repeats less than SCAN_FROM times
    is single layers: (layer, 1, 1).
    """
    kinds = [(config.layer_window(i), config.layer_rope(i), config.has_experts(i)) for i in range(config.num_layers)]

    def times(start: int, period: int) -> int:
        same = itertools.takewhile(lambda i: kinds[i] == kinds[i - period], range(start + period, len(kinds)))
        return 1 + len(list(same)) // period

    start = 0
    while start < len(kinds):
        found = [(period, times(start, period)) for period in range(1, len(kinds) - start + 1)]
        repeated = [(period, n) for period, n in found if n >= SCAN_FROM]
        period, n = max(repeated, key=lambda pair: pair[0] * pair[1], default=(1, 1))
        yield start, period, n
        start += period * n
