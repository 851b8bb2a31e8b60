"""Static shapes: lengths in buckets, so that few programs are compiled; and the shape of each stage's batches.

The stages and `heal plan` take them from here, so that what is planned is what runs.
"""

import dataclasses

from heal_jax.config import Config, SampleSpec, TrainSpec
from heal_jax.sets import Draw

BUCKET = 32  # also a multiple of what vector units work on


def bucket(length: int) -> int:
    """The next multiple of BUCKET, at least one."""
    return max(1, -(-length // BUCKET)) * BUCKET


def positions(context: int, max_new: int) -> int:
    """Positions that a model needs for a context and new tokens, each in its bucket."""
    return bucket(context) + bucket(max_new)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static shape of a stage's shards: contexts a shard, rollouts a context, lengths in tokens, and the rows that
    decode them: `groups` of `members` that share a context. With a row for every rollout all are decoded at once.
    cache_tokens: new tokens that a row has room for at first (`SampleSpec.cache_tokens`; 0: for all), in `batch` rows
    if that is more than it has; eight_bit: how they are held (`SampleSpec.cache_dtype`); done: tokens of each rollout
    that are decoded already, with which its context ends.
    """

    contexts: int
    repeats: int
    context_length: int
    max_new: int
    groups: int
    members: int
    cache_tokens: int = 0
    batch: int = 0
    eight_bit: bool = False
    done: int = 0

    @property
    def rows(self) -> int:
        return self.groups * self.members

    @property
    def at_once(self) -> bool:
        """Whether every rollout has a row of its own."""
        return self.rows >= self.contexts * self.repeats

    @property
    def slots(self) -> int:
        """Of a row's own cache."""
        return bucket(self.max_new)

    @property
    def shared_slots(self) -> int:
        """Of the contexts that a group of rows has in view."""
        return self.context_length * (1 if self.at_once else in_view(self.repeats))

    @property
    def static(self) -> dict[str, int]:
        """What `roll_out` is compiled for, besides the shapes of its arrays and the sampling rules."""
        names = "groups", "members", "done", "eight_bit"
        return {"max_new": self.slots} | {name: getattr(self, name) for name in names}

    def legs(self) -> "list[Shape]":
        """The programs that decode it, one after another: the first to cache_tokens a rollout; each of the others goes
        on with the rollouts that are not done, to twice as many tokens, each a context of its own. They have as many
        rows as fit into the slots that the first has room for, and one at least.
        """
        if not 0 < self.cache_tokens < self.max_new:
            return [dataclasses.replace(self, cache_tokens=0, batch=0)]
        found = [dataclasses.replace(self, max_new=self.cache_tokens, cache_tokens=0, batch=0)]
        done, count = self.cache_tokens, self.contexts * self.repeats
        room = max(self.batch, self.rows) * bucket(self.cache_tokens) + self.groups * self.shared_slots
        while done < self.max_new:
            width, new = bucket(self.context_length + done), min(done, self.max_new - done)
            rows = max(1, min(count, room // (width + bucket(new))))
            found.append(Shape(count, 1, width, new, rows, 1, eight_bit=self.eight_bit, done=done))
            done += new
        return found


def train_rows(spec: TrainSpec, parts: int) -> int:
    """Rows of a training step where a mesh splits rows into `parts`: empty ones below the batch's own where need be."""
    multiple = spec.accumulate * parts
    return -(-spec.batch // multiple) * multiple


def at_once(contexts: int, repeats: int, context: int, max_new: int) -> Shape:
    """Every rollout has a row; `context`: tokens of the longest."""
    return Shape(contexts, repeats, bucket(context), max_new, contexts, repeats)


def with_caches(shape: Shape, spec: SampleSpec) -> Shape:
    """With caches as `spec` has them."""
    eight_bit = spec.cache_dtype == "int8"
    return dataclasses.replace(shape, cache_tokens=spec.cache_tokens, batch=spec.batch, eight_bit=eight_bit)


def in_view(repeats: int) -> int:
    """Contexts that a group of rows works on at a time, where rows take one rollout after another: two, so that the
    first rollouts of one fill the group up with the last of the other; one where each context has one rollout."""
    return min(repeats, 2)


def members(repeats: int) -> int:
    """Rows of a group, where rows take one rollout after another: half of a context's rollouts, so that the last ones
    of one context and the first of the next fill the group together.
    """
    return repeats // 2 if repeats % 2 == 0 else repeats


def groups(config: Config, repeats: int) -> int:
    """As many as sample.batch has rows for."""
    return config.sample.batch // members(repeats)


def _shape(config: Config, repeats: int, units: int, context: int, max_new: int = 0) -> Shape:
    """`units`: how many contexts there are at most; they are dealt out evenly to as few shards as sample.rounds
    allows. `max_new`: 0 for sample.max_new_tokens."""
    batch, spec = config.sample.batch // repeats, config.sample
    shards = -(-units // (batch * config.sample.rounds))
    contexts, max_new = -(-units // max(1, shards)), max_new or spec.max_new_tokens
    if contexts <= batch:
        return with_caches(at_once(contexts, repeats, context, max_new), spec)
    rows = groups(config, repeats), members(repeats)
    return with_caches(Shape(contexts, repeats, bucket(context), max_new, *rows), spec)


def sample_shape(config: Config, problems: int, prompt: int) -> Shape:
    """Unaided rollouts; `prompt`: tokens of the longest plain prompt."""
    return _shape(config, config.sample.n, problems, prompt)


def hindsight_shape(config: Config, problems: int, shown: int) -> Shape:
    """Rollouts with the answer in view; `shown`: tokens of the longest such prompt."""
    return _shape(config, config.hindsight.n, problems, shown)


def repair_shape(config: Config, problems: int, context: int) -> Shape:
    """Continuations; `context`: tokens of the longest prompt, kept prefix and hint together."""
    return _shape(config, config.gear.repairs, problems * config.gear.paths, context)


def evaluate_shape(config: Config, draw: Draw, problems: int, prompt: int) -> Shape:
    """Samples of held-out problems; `prompt`: tokens that their prompts get (`sets.widest`)."""
    return _shape(config, draw.samples, problems, prompt, draw.max_new_tokens)


@dataclasses.dataclass(frozen=True)
class ScoreShape:
    """The static shape of a batch that PURE scores: `rows` texts of `length` tokens after any of `contexts`."""

    contexts: int
    rows: int
    context_length: int
    length: int


def score_shape(config: Config, context: int) -> ScoreShape:
    """`context`: tokens of the longest plain prompt, with the longest kept prefix where there is one."""
    rows = config.pure.batch
    return ScoreShape(-(-rows // 2), rows, bucket(context), bucket(config.sample.max_new_tokens))
