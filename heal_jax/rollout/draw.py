"""One token a row from its logits, with what is recorded of it. All from one pass over the vocabulary.

B rows, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from heal_jax.rollout.sampling import Rule, apply

WIDEST = 128  # tokens of a block of the vocabulary
SHARDS = 16  # parts that a vocabulary may be split into without a block being cut


class Drawn(NamedTuple):
    """token [B] int32; entropy, logprob, sampling_logprob [B] float32, nats: of the raw distribution, of the token
    under it, and of the token under the distribution that it was drawn from.
    """

    token: Array
    entropy: Array
    logprob: Array
    sampling_logprob: Array


def entropy_of(logits: Array) -> tuple[Array, Array]:
    """Entropy and log-normaliser of softmax(logits): [..., V] float32 -> ([...], [...]), nats.

    H = log Z - sum_v p_v * logit_v, without a second array of log-probabilities.
    """
    peak = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - peak
    weights = jnp.exp(shifted)
    total = jnp.sum(weights, axis=-1)
    entropy = jnp.log(total) - jnp.sum(weights * shifted, axis=-1) / total
    return jnp.maximum(entropy, 0.0), jnp.log(total) + peak[..., 0]


def block_width(vocab: int) -> int:
    """Tokens a block: the largest divisor of the vocabulary up to WIDEST that leaves SHARDS | blocks, where one
    does."""
    whole = vocab // SHARDS if vocab % SHARDS == 0 else vocab
    return max(d for d in range(1, min(WIDEST, whole) + 1) if whole % d == 0)


def typed(words: Array) -> Array:
    """Key data [..., 2] uint32 -> typed keys, in one row."""
    return jax.random.wrap_key_data(words.reshape(-1, 2), impl="threefry2x32")


def draw(logits: Array, keys: Array, rules: tuple[Rule, ...]) -> Drawn:
    """Draw from softmax(rules(logits)): logits [B, V] float32, keys [B] typed PRNG keys.

    The Gumbel-max trick in two steps, which is the same distribution: the largest of a block of perturbed logits is
    itself a Gumbel variable, shifted by the block's log-sum-exp. So the block is drawn by its log-sum-exp and the token
    within it by its logits, and a row takes V / 128 + 128 random numbers in place of V: on a CPU making V of them
    takes longer than the model's own products.
    """
    rows, vocab = logits.shape
    width = block_width(vocab)

    def blocks(x: Array) -> Array:
        return x.reshape(rows, vocab // width, width)

    def sums(logits: Array) -> tuple[Array, Array, Array]:
        """The largest logit [B, 1], the exponentials over it [B, V], their sums over each block [B, V / width]."""
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - peak)
        return peak, weights, jnp.sum(blocks(weights), axis=-1)

    peak, weights, of_block = sums(logits)
    total = jnp.sum(of_block, axis=-1)
    log_z = jnp.log(total) + peak[:, 0]
    entropy = jnp.log(total) - jnp.sum(weights * (logits - peak), axis=-1) / total
    drawn_from, drawn_log_z = logits, log_z
    if rules:
        drawn_from = apply(rules, logits)
        drawn_peak, _, of_block = sums(drawn_from)
        drawn_log_z = jnp.log(jnp.sum(of_block, axis=-1)) + drawn_peak[:, 0]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab // width + width,)))(keys)
    block = jnp.argmax(jnp.log(of_block) + noise[:, : vocab // width], axis=-1)
    inside = jnp.take_along_axis(blocks(drawn_from), block[:, None, None], axis=1)[:, 0]
    within = jnp.argmax(inside + noise[:, vocab // width :], axis=-1)
    token = (block * width + within).astype(jnp.int32)

    def of_token(values: Array) -> Array:
        return jnp.take_along_axis(values, token[:, None], axis=1)[:, 0]

    logprob = of_token(logits) - log_z
    sampling_logprob = of_token(drawn_from) - drawn_log_z if rules else logprob
    return Drawn(token, jnp.maximum(entropy, 0.0), logprob, sampling_logprob)
