"""PURE, Perplexity-Uncertainty Ratio Estimator (arXiv 2603.10359; the formula is ours, DESIGN section 2).

B candidates, T tokens, K scored steps at most. All probabilities are the teacher's, without the hint.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from heal_jax.gear import segment_mean


class Purity(NamedTuple):
    """ppl, expected_ppl [B, K] float32 (1 for absent steps); steps [B] int32; score [B] float32 (S)."""

    ppl: Array
    expected_ppl: Array
    steps: Array
    score: Array


@jax.jit
def scored_steps(step_index: Array, answer: Array, kept: Array, length: Array) -> Array:
    """Which scored step each token of each rollout belongs to, -1 for none: [B, T] int32.

    step_index [B, T] int32, text steps; answer [B, 2] int32: first and last + 1 token of the answer, which become one
    more step, the last (none where the two are equal); kept [B] int32: tokens of the kept prefix, whose steps are not
    scored; length [B] int32: tokens without the EOS. A step left empty vanishes: the numbers are dense.
    """
    rows, width = step_index.shape
    at = jnp.arange(width)
    # A step is scored when it starts at or after the cut: a continuation may begin with what still belongs to the kept
    # prefix's last step (white space). Tokens of no step (after a thinking part) are scored only in the answer.
    inside = (at >= kept[:, None]) & (at < length[:, None])
    cut = jnp.take_along_axis(step_index, jnp.maximum(kept - 1, 0)[:, None], axis=1)
    raw = jnp.where(inside & (step_index > jnp.where(kept[:, None] > 0, cut, -1)), step_index, -1)
    in_answer = inside & (at >= answer[:, :1]) & (at < answer[:, 1:])
    raw = jnp.where(in_answer, -1, raw)
    seen = jnp.zeros((rows, width + 1), bool).at[jnp.arange(rows)[:, None], jnp.where(raw < 0, width, raw)].set(True)
    number = jnp.cumsum(seen[:, :width], axis=1) - 1
    dense = jnp.where(raw < 0, -1, jnp.take_along_axis(number, jnp.maximum(raw, 0), axis=1))
    return jnp.where(in_answer, number[:, -1:] + 1, dense).astype(jnp.int32)


@partial(jax.jit, static_argnames=("steps",))
def purity(
    logprob: Array, entropy: Array, step_index: Array, epsilon: float, max_weight: float, *, steps: int
) -> Purity:
    """Step perplexities and the PURE score.

    logprob, entropy [B, T] float32 of the tokens; step_index [B, T] int32 from `scored_steps`; `steps` = K.

    PPL_k = exp(mean of -logprob), E_k = exp(mean of H), r_k = PPL_k / (E_k + epsilon),
    S = (1 - max_weight) * mean_k r_k + max_weight * max_k r_k. A candidate with nothing scored gets S = inf.
    """
    ppl = jnp.exp(segment_mean(-logprob, step_index, steps))
    expected = jnp.exp(segment_mean(entropy, step_index, steps))
    count = jnp.max(step_index, axis=1, initial=-1) + 1
    real = jnp.arange(steps) < count[:, None]
    ratio = jnp.where(real, ppl / (expected + epsilon), 0.0)
    mean = jnp.sum(ratio, axis=1) / jnp.maximum(count, 1)
    total = (1 - max_weight) * mean + max_weight * jnp.max(ratio, axis=1)
    return Purity(ppl, expected, count, jnp.where(count > 0, total, jnp.inf))
