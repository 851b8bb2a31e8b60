"""PURE, Perplexity-Uncertainty Ratio Estimator (arXiv 2603.10359; the formula is ours, DESIGN section 2).

B candidates, T tokens, K scored steps at most. All probabilities are the teacher's, without the hint.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from heal_jax.gear import segment_mean


class Purity(NamedTuple):
    """ppl, expected_ppl [B, K] float32 (1 for absent steps); steps [B] int32; score [B] float32 (S)."""

    ppl: Array
    expected_ppl: Array
    steps: Array
    score: Array


def scored_steps(step_index: np.ndarray, answer: tuple[int, int] | None, kept: int, length: int) -> np.ndarray:
    """Which scored step each token of one rollout belongs to, -1 for none: [T] int32.

    step_index [T] text steps; answer: first and last + 1 token of the answer, which become one more step, the last;
    kept: tokens of the kept prefix, whose steps are not scored; length: tokens without the EOS. A step left empty
    vanishes: the numbers are dense.
    """
    at = np.arange(len(step_index))
    # A step is scored when it starts at or after the cut: a continuation may begin with what still belongs to the kept
    # prefix's last step (white space). Tokens of no step (after a thinking part) are scored only in the answer.
    inside = (at >= kept) & (at < length)
    raw = np.where(inside & (step_index > (step_index[kept - 1] if kept else -1)), step_index, -1)
    if answer is not None:
        raw = np.where(inside & (at >= answer[0]) & (at < answer[1]), np.iinfo(np.int32).max, raw)
    present = np.unique(raw[raw >= 0])
    return np.where(raw >= 0, np.searchsorted(present, raw), -1).astype(np.int32)


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
