"""GEAR, Guided Entropy-Assisted Repair (arXiv 2603.10359; DESIGN section 2).

B rollouts, T tokens, K steps at most. Entropies are in nats.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NONE = -1  # no breakpoint


@partial(jax.jit, static_argnames="steps")
def step_entropy(entropy: Array, step_index: Array, steps: int) -> Array:
    """h_k = mean of H_t over the tokens of step k.

    entropy [B, T] float32, step_index [B, T] int32 (-1: of no step) -> [B, steps] float32; 0 for absent steps.
    """
    return segment_mean(entropy, step_index, steps)


def segment_mean(values: Array, index: Array, segments: int) -> Array:
    """Mean of values [B, T] over the positions of each index 0..segments-1 -> [B, segments]; 0 where there is none."""

    def row(values: Array, index: Array) -> Array:
        inside = index >= 0
        where = jnp.where(inside, index, segments)
        total = jax.ops.segment_sum(values * inside, where, num_segments=segments + 1)[:segments]
        count = jax.ops.segment_sum(inside.astype(values.dtype), where, num_segments=segments + 1)[:segments]
        return total / jnp.maximum(count, 1)

    return jax.vmap(row)(values, index)


def surge(h: Array, kind: str) -> Array:
    """s_k for k >= 1; entry 0 is -inf. h [B, K] float32 -> [B, K].

    difference: h_k - h_(k-1). ratio: h_k / (h_(k-1) + 0.01). zscore (ours): (h_k - mean of h_0..h_(k-1)) /
    (their standard deviation + 0.01).
    """
    before = jnp.pad(h, ((0, 0), (1, 0)))[:, :-1]
    if kind == "difference":
        s = h - before
    elif kind == "ratio":
        s = h / (before + 0.01)
    elif kind == "zscore":
        seen = jnp.maximum(jnp.arange(h.shape[1]), 1)
        mean = jnp.cumsum(before, axis=1) / seen
        # Two passes: the one-pass variance cancels where entropies are nearly equal.
        earlier = jnp.tril(jnp.ones((h.shape[1], h.shape[1])), -1)
        spread = (h[:, None, :] - mean[:, :, None]) ** 2 * earlier
        s = (h - mean) / (jnp.sqrt(jnp.sum(spread, axis=2) / seen) + 0.01)
    else:
        raise ValueError(f"surge {kind!r}")
    return s.at[:, 0].set(-jnp.inf)


def last_candidate(steps: int, window: float) -> np.ndarray:
    """Largest k that may be the breakpoint, by K = 0..steps: max(1, ceil(K * window) - 1); [steps + 1] int32.

    On the host in float64, less a hair, so that K * (1/3) of a multiple of three is not rounded up a step.
    """
    counts = np.arange(steps + 1)
    return np.maximum(1, np.ceil(counts * window - 1e-9).astype(np.int32) - 1).astype(np.int32)


@partial(jax.jit, static_argnames=("kind", "surge_kind"))
def breakpoints(
    h: Array, count: Array, last: Array, keys: Array, oracle: Array, *, kind: str, surge_kind: str
) -> Array:
    """k* of each rollout, NONE where K <= 1: [B] int32.

    h [B, K] step entropies; count [B] steps of each; last [B]: largest candidate (`last_candidate`); keys [B, 2]
    uint32 for kind random; oracle [B] int32, the first wrong step, for kind oracle (kept within 1..K-1).
    """
    k = jnp.arange(h.shape[1])[None, :]
    candidate = (k >= 1) & (k <= last[:, None]) & (k < count[:, None])
    if kind == "surge":
        chosen = jnp.argmax(jnp.where(candidate, surge(h, surge_kind), -jnp.inf), axis=1)  # ties: the earliest
    elif kind == "random":
        typed = jax.random.wrap_key_data(keys, impl="threefry2x32")
        high = jnp.minimum(last, count - 1)
        chosen = jax.vmap(lambda key, top: jax.random.randint(key, (), 1, jnp.maximum(top, 1) + 1))(typed, high)
    elif kind == "oracle":
        chosen = jnp.clip(oracle, 1, jnp.maximum(count - 1, 1))
    else:
        raise ValueError(f"breakpoint {kind!r}")
    return jnp.where(count > 1, chosen, NONE).astype(jnp.int32)


@partial(jax.jit, static_argnames=("backup",))
def kept_tokens(starts: Array, breakpoint: Array, *, backup: int) -> Array:
    """Tokens of the first max(0, k* - backup) steps: [B] int32; 0 where there is no breakpoint.

    starts [B, T] bool, first tokens of steps; breakpoint [B] int32.
    """
    steps = jnp.maximum(breakpoint - backup, 0)
    before = jnp.cumsum(starts, axis=1)  # steps begun up to and with each token
    kept = jnp.sum(before <= steps[:, None], axis=1)
    return jnp.where(steps > 0, kept, 0).astype(jnp.int32)
