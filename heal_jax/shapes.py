"""Static shapes: lengths in buckets, so that few programs are compiled; and the shape of each stage's batches.

The stages and `heal plan` take them from here, so that what is planned is what runs.
"""

import dataclasses

from heal_jax.config import Config

BUCKET = 32  # also a multiple of what vector units work on
MADE_AT_ONCE = 512  # slots up to which a cache is allocated whole, before its contexts are computed


def bucket(length: int) -> int:
    """The next multiple of BUCKET, at least one."""
    return max(1, -(-length // BUCKET)) * BUCKET


def positions(prompt: int, hint: int, max_new: int) -> int:
    """Positions that a model needs for a prompt, a hint (0: none) and new tokens, each in its bucket."""
    return bucket(prompt) + (bucket(hint) if hint else 0) + bucket(max_new)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of a stage's batches: contexts a batch, rollouts a context, lengths in tokens.

    kept: of the longest context, how many tokens count against its rollouts' budget of new ones.
    """

    contexts: int
    repeats: int
    context_length: int
    hint_length: int
    max_new: int
    kept: int = 0

    @property
    def slots(self) -> int:
        """Of the cache: what a row keeps of its budget it does not decode; a small cache has room for all of it."""
        width = self.context_length + self.hint_length
        whole = width + bucket(self.max_new)
        needed = bucket(self.context_length - self.kept) + self.hint_length + bucket(self.max_new)
        return whole if whole <= MADE_AT_ONCE else max(width, needed)


def _shape(config: Config, repeats: int, prompt: int, kept: int = 0, hint: int = 0) -> Shape:
    """Whole groups of `repeats` rollouts that share a context, as many as sample.batch holds."""
    contexts, hint_width = config.sample.batch // repeats, bucket(hint) if hint else 0
    return Shape(contexts, repeats, bucket(prompt + kept), hint_width, config.sample.max_new_tokens, kept)


def sample_shape(config: Config, prompt: int) -> Shape:
    """Unaided rollouts; `prompt`: tokens of the longest plain prompt."""
    return _shape(config, config.sample.n, prompt)


def hindsight_shape(config: Config, shown: int) -> Shape:
    """Rollouts with the answer in view; `shown`: tokens of the longest such prompt."""
    return _shape(config, config.hindsight.n, shown)


def repair_shape(config: Config, prompt: int, kept: int, hint: int) -> Shape:
    """Continuations after prompt, kept prefix and hint: tokens of the longest of each."""
    return _shape(config, config.gear.repairs, prompt, kept, hint)


def evaluate_shape(config: Config, prompt: int) -> Shape:
    """Samples of held-out problems; `prompt`: tokens of their longest prompt."""
    return _shape(config, config.evaluate.samples, prompt)


def score_width(config: Config, prompt: int) -> int:
    """Tokens of a row that PURE scores: the longest plain prompt and the longest rollout."""
    return bucket(prompt) + bucket(config.sample.max_new_tokens)
