"""The configuration: one tree of frozen dataclasses, every default with its reason.

The text under a field is its help on the command line. `load` reads YAML strictly
(heal_jax.strict). Names and meanings: DESIGN section 2.
"""

import dataclasses
import math
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from heal_jax import strict
from heal_jax.errors import InputError
from heal_jax.strict import Range

Count = Annotated[int, Range(ge=1)]
Share = Annotated[float, Range(ge=0.0, le=1.0)]
Positive = Annotated[float, Range(gt=0.0)]
NonNegative = Annotated[float, Range(ge=0.0)]
Seed = Annotated[int, Range(ge=0)]

By = Literal["auto", "reasoning_gym", "math", "exact", "choice"]

MAIN, DEV, GREEDY = "", "dev", "greedy"  # what no set in evaluate.sets is called


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A model folder in Hugging Face format."""

    path: str = "builtin:teacher"
    """A folder, or one of the models in the package, so that nothing is downloaded: builtin:teacher and builtin:student
    for world:sums, and those of the other built-in worlds (builtin:rewriting-teacher, builtin:legs-student)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32 computes the same on every machine; bfloat16 halves memory and is what accelerators are fast at."""


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """How devices are arranged; one axis may be -1 (what is left)."""

    data: int = -1
    """Rows are independent, so by default every device takes its share of them."""
    fsdp: int = 1
    """Shards weights and optimizer state where one device cannot hold them."""
    tensor: int = 1
    """Splits heads, MLP and vocabulary where a layer is too wide for one device; must divide the key-value heads."""
    expert: int = 1
    """Splits the experts of a mixture; outside them, and for other models, one more axis to split rows over."""


@dataclasses.dataclass(frozen=True)
class ProblemSpec:
    """Where problems come from."""

    source: str = "world:sums"
    """world:sums, world:rewriting, world:legs (built in), rg:FAMILY (reasoning-gym), jsonl:FILE (one object a line with
    question and answer), parquet:FILE, tfds:NAME[/CONFIG][:VERSION] (such as tfds:gsm8k), tfds_dir:FOLDER (a prepared
    set), hf:NAME (the datasets package: a set of the hub, or a local folder)."""
    split: Literal["train", "dev", "test"] = "train"
    """world: the hash split to draw from. Other sources: a label, written to problems.parquet; tfds, tfds_dir and hf
    read the split of that name where options names none."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """world: problems of each level, such as {easy: 60, medium: 80, hard: 60}."""
    limit: Annotated[int, Range(ge=0)] = 0
    """All but world: at most this many rows after those skipped (rg: draws); 0 takes all (rg: 100)."""
    skip: Annotated[int, Range(ge=0)] = 0
    """All but world: leave out the first so many, and later problems that repeat one of them: training and held-out
    problems can then come from one file, or from a family with few different questions."""
    seed: Seed = 0
    """world, rg: which problems the generator makes; apart from the run's seed so that seeds share problems. Files and
    sets are read in their own order."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """rg: the family's own configuration. tfds, tfds_dir: split. hf: split, name (the configuration), revision."""
    fields: dict[str, str] = dataclasses.field(default_factory=dict)
    """Files and sets: which column holds question, answer, id or level, such as {question: problem}; a field that is
    not named here is the column of its own name. id and level need not be there."""
    answer_pattern: str = ""
    """Files and sets: a regular expression that is searched in the answer column; its first group is the answer. GSM8K,
    whose answers end in their result: '#### (.+)'. A row that does not match is refused. Empty: the column as it is."""


@dataclasses.dataclass(frozen=True)
class HygieneSpec:
    """What is left out of the training problems; removed.jsonl lists it. Exact duplicates, and questions that are held
    out as well, always are."""

    near: Share = 0.7
    """Near-duplicates: problems with the same answer and the same numbers whose questions share at least this much of
    their three-word sequences (Jaccard); the first one stays. One word changed in twenty leaves 0.7. Problems of one
    generator (world, rg) are not compared. 0: off."""
    ngram: Annotated[int, Range(ge=0)] = 8
    """A training problem that shares so many words in a row with a held-out one is left out; 8 is common in
    decontamination. What one in a hundred of a source's questions share is its wording and does not count, nor what
    problems of one generator share. 0: off."""


@dataclasses.dataclass(frozen=True)
class SampleSpec:
    """Unaided rollouts of the teacher."""

    prompt: str = "{question}"
    """The user turn of unaided rollouts, training examples and evaluation; must contain {question}. Models that were
    not trained to give their answers as grade.answer_open asks have to be told how."""
    n: Count = 30
    """Rollouts a problem: N of the paper; fewer make the pass rate too coarse to tell unsolved from hard."""
    temperature: NonNegative = 1.0
    """1 samples the model's own distribution, the one whose entropy is read; 0 is greedy."""
    top_k: Annotated[int, Range(ge=0)] = 0
    """Keep the k likeliest tokens; 0 keeps all, since truncation hides the uncertainty that GEAR looks for."""
    top_p: Annotated[float, Range(gt=0.0, le=1.0)] = 1.0
    """Keep the smallest set with this probability; 1 keeps all."""
    min_p: Share = 0.0
    """Drop tokens below this share of the likeliest; 0 keeps all."""
    max_new_tokens: Count = 128
    """A rollout that reaches this length is truncated; 128 holds the longest solution of world:sums (124)."""
    batch: Count = 240
    """Rows decoded together, at least the rollouts of one problem or path (sample.n, hindsight.n, gear.repairs,
    evaluate.samples). Part of what fixes the bytes."""
    cache_tokens: Annotated[int, Range(ge=0)] = 0
    """New tokens that each of the `batch` rows has room for; longer rollouts go on, their first tokens read again, in
    as many rows of twice the room as that memory holds, and so on to max_new_tokens. 0: room for max_new_tokens in
    each. Part of what fixes the bytes."""
    cache_dtype: Literal["model", "int8"] = "model"
    """What keys and values are held in: the model's own dtype, or a byte a number: about half of bfloat16's memory,
    for a small error in what is drawn and recorded (README, "Long rollouts"). Hindsight and repairs are scored without
    it."""
    rounds: Count = 16
    """A shard holds up to so many batches of rollouts: the row of one that is finished takes the next, so that only the
    end of a shard has idle rows. More: fewer idle rows, and more to do again after an interruption; 1: none wait."""


@dataclasses.dataclass(frozen=True)
class HindsightSpec:
    """Rollouts with the answer in the prompt, for hard problems."""

    n: Count = 10
    """The answer makes most of them right, so a third of sample.n gives stage 2 enough."""
    prompt: str = "{question}\nThe final answer is {answer}."
    """The user turn; must contain {question} and {answer}. The stored example has the plain prompt."""


@dataclasses.dataclass(frozen=True)
class GearSpec:
    """Guided entropy-assisted repair."""

    max_correct: Annotated[int, Range(ge=0)] = 1
    """A problem with at most this many correct rollouts is unsolved: one hit in thirty may be luck."""
    paths: Count = 10
    """Failed rollouts repaired a problem (paper)."""
    repairs: Count = 20
    """Continuations a path (paper)."""
    slots: Count = 8
    """Problems that `heal_round`, the whole round as one program, repairs at most. `heal run` repairs all, stage by
    stage."""
    surge: Literal["difference", "ratio", "zscore"] = "difference"
    """Difference is the paper's rise in step entropy; ratio and zscore are for comparison."""
    breakpoint: Literal["surge", "random", "oracle"] = "surge"
    """surge is the method; random, from the same window, is its control; oracle needs a step checker."""
    window: Annotated[float, Range(gt=0.0, le=1.0)] = 1 / 3
    """The early part of the chain in which the breakpoint may lie: errors there decide the rest (paper)."""
    backup: Annotated[int, Range(ge=0)] = 1
    """Steps given up before the surge: the surge is often felt one step after its cause."""
    hint: str = "Hint: The final answer is {answer}.\n\n"
    """Put after the kept prefix, in the teacher's context only; must contain {answer}."""
    leak_patterns: tuple[str, ...] = (r"(?i)\bhint",)
    """Regular expressions: a continuation that matches one talks about the hint and is dropped."""


@dataclasses.dataclass(frozen=True)
class PureSpec:
    """Perplexity-uncertainty ratio."""

    epsilon: Positive = 0.01
    """Added to the expected perplexity (paper)."""
    max_weight: Share = 0.2
    """lambda: weight of the worst step against the mean (paper)."""
    threshold: Positive = 1.12
    """Kept at or below; on the built-in worlds it keeps 94-100 % of flawless and 3-31 % of flawed aided rollouts."""
    batch: Count = 48
    """Sequences scored together: many of a shard's are the same, so few are left; fewer where memory is short."""


@dataclasses.dataclass(frozen=True)
class PaceSpec:
    """The curriculum."""

    order: Literal["cumulative", "separate", "shuffled"] = "cumulative"
    """cumulative: stage k trains on stages 1..k; students forgot the first stages with separate ones."""
    steps: tuple[float, float, float] = (0.3, 0.2, 0.5)
    """Shares of train.steps for the three stages; the share of an empty stage goes to the others."""
    per_problem: Count = 1
    """Examples of one problem in a stage. Where right solutions are nearly unique the next best by S are flawed: on the
    built-in world's dev split, 4 in place of 1 made HEAL worse than its baseline."""


# As Hugging Face and PEFT name the kernels of a block.
Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: tuple[Target, ...] = typing.get_args(Target)


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """Low-rank adapters (LoRA, arXiv 2106.09685) beside frozen weights, in place of training all weights."""

    rank: Annotated[int, Range(ge=0)] = 0
    """0 trains all weights. 16 to 64 is usual: enough for some thousand examples, with optimizer state and checkpoints
    of about one percent. Raise train.learning_rate about tenfold with it."""
    alpha: Count = 32
    """Adapters count alpha / rank times: with alpha fixed, another rank hardly needs another learning rate (LoRA)."""
    targets: tuple[Target, ...] = TARGETS
    """The kernels of each block that get adapters. All by default: with fewer, LoRA fell short of training all weights
    (QLoRA, arXiv 2305.14314). A mixture's experts take none."""


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """Optimizer steps of the student, for HEAL and for the baseline alike."""

    steps: Count = 600
    """Optimizer steps in all, over the three stages."""
    batch: Count = 4
    """Rows a step, for the two students alike; a mesh splits them, and where it does not divide them empty rows are
    computed, too."""
    row_tokens: Annotated[int, Range(ge=0)] = 344
    """Slots of a row, which holds as many whole examples as fit (packing); a longer example makes all rows as long. 0:
    as long as the longest. 344 holds two solutions of the built-in world, and 4 % of it stays empty."""
    accumulate: Count = 1
    """Parts of the batch that are computed one after another, for less memory; must divide `batch`."""
    learning_rate: Positive = 5e-4
    """Peak; suits the built-in student (real models: 1e-5, paper)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up, over all steps; stages do not restart it, so that the baseline has the same rate at each step."""
    warmup: Share = 0.05
    """Share of the steps in which the rate rises from 0."""
    weight_decay: NonNegative = 0.0
    """Runs are short; decay would only pull the student away from what it knows."""
    clip_norm: Positive = 1.0
    """Global gradient norm."""
    remat: Literal["none", "dots", "block"] = "none"
    """What the backward pass computes again: block, each layer from its input (a third more time, a fraction of the
    memory: long examples); dots, all but products with weights (a little more time, and less memory)."""
    max_skipped: Annotated[int, Range(ge=0)] = 3
    """Steps whose loss or gradient is not finite change nothing and are counted; one more than this ends the
    training. Overflows in bfloat16 are rare and pass; more of them are a learning rate that is too high."""
    log_every: Count = 10
    """Steps between the lines of metrics.jsonl."""
    max_tokens: Count = 256
    """Longest example, prompt included; longer ones are left out, with that reason in decisions.parquet."""
    lora: LoraSpec = LoraSpec()


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    """Orbax checkpoints of training."""

    seconds: Positive = 300.0
    """Also saved when this long has passed since the last one: what an interruption may cost."""


@dataclasses.dataclass(frozen=True)
class LogSpec:
    """Where training metrics go besides metrics.jsonl."""

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """tensorboard: DIR/tensorboard (package tensorboardX), wandb, trackio (packages of these names); from the first
    process alone. Off by default: the last two send figures and config to a service that you have set up."""
    project: str = "heal_jax"
    """The project that wandb and trackio file the run under."""


@dataclasses.dataclass(frozen=True)
class GradeSpec:
    """How a rollout's answer is found and checked."""

    by: By = "auto"
    """auto: the family's own scorer for world: and rg: problems, math-verify for the others. exact: the same text.
    choice: the letter of a multiple-choice answer, such as (B), B. or Answer: B."""
    unreadable: Literal["refuse", "text"] = "refuse"
    """math: reference answers in mathematical notation that math-verify cannot read are refused with their line, since
    no rewriting of them would count as right; text compares them as text. Words, choices and numbers are fine."""
    answer_open: str = "\\boxed{"
    """The answer stands between this and its matching close; the last such span counts."""
    answer_close: str = "}"
    """Closes the answer; nested braces are matched."""
    think_end: str = ""
    """Set for thinking models (such as "</think>"): steps lie before it, the answer after it."""
    think_open: str = ""
    """With think_end, for models that open their thinking part themselves (such as "<think>\n"): a repair that keeps
    nothing puts it before the hint. Empty where the chat template's prompt ends with it."""
    timeout: Positive = 5.0
    """Seconds of processor time for one answer; a hanging expression costs this and nothing else."""
    workers: Annotated[int, Range(ge=0)] = 0
    """Processes that score answers at most, one for each 256 answers; grades do not depend on it. 0: one a core."""


@dataclasses.dataclass(frozen=True)
class EvaluateSet:
    """Held-out problems, and what each model is asked for."""

    problems: ProblemSpec = dataclasses.field(default_factory=lambda: ProblemSpec(split="test"))
    """Never trained on: what they share with the training problems is left out of those (hygiene)."""
    by: Literal["run", By] = "run"
    """How answers are checked, as in grade.by; run: as grade.by says, which may not suit a set of another kind."""
    samples: Count = 4
    """k: pass@1 is the mean over this many samples a problem."""
    temperature: NonNegative = 1.0
    """Students are judged by what they sample; 0 for greedy (with samples 1). top_k, top_p, min_p are sample's."""
    max_new_tokens: Annotated[int, Range(ge=0)] = 0
    """A sample that reaches this length is truncated, which is not right; 0: sample.max_new_tokens."""
    greedy: bool = False
    """Also one greedy sample a problem, with figures of its own: they need no k, but say less of a model that is
    sampled from."""


@dataclasses.dataclass(frozen=True)
class EvaluateSpec(EvaluateSet):
    """Accuracy on held-out problems. What stands here itself is the main set, that of accuracy and difference in
    summary.json; evaluate.sets, in the YAML file, names further ones."""

    resamples: Count = 2000
    """Bootstrap resamples of problems for the 95 % intervals; the interval's ends move by less than 0.2 points."""
    sets: dict[str, EvaluateSet] = dataclasses.field(default_factory=dict)
    """Further sets by name, such as {aime: {problems: {source: "jsonl:aime.jsonl"}, samples: 16}}, each with the fields
    above; their figures are in summary.json under sets. Named in the YAML file; then --evaluate.sets.aime.samples
    works, too."""
    dev: EvaluateSet = dataclasses.field(
        default_factory=lambda: EvaluateSet(ProblemSpec(source="", split="dev"), samples=1, temperature=0.0)
    )
    """Problems to choose by, held out from training and from the other sets; none while its source is empty. One greedy
    sample a problem by default: checkpoints are compared by the same draws, and often."""

    @property
    def all_sets(self) -> dict[str, EvaluateSet]:
        """The main set as "", the further ones by name, and "dev" where there is one."""
        dev = {DEV: self.dev} if self.dev.problems.source else {}
        return {MAIN: self, **self.sets, **dev}


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes."""

    seed: Seed = 0
    """Every random draw follows from it."""
    teacher: ModelSpec = ModelSpec("builtin:teacher")
    student: ModelSpec = ModelSpec("builtin:student")
    mesh: MeshSpec = MeshSpec()
    problems: ProblemSpec = dataclasses.field(default_factory=ProblemSpec)
    hygiene: HygieneSpec = HygieneSpec()
    sample: SampleSpec = SampleSpec()
    hindsight: HindsightSpec = HindsightSpec()
    gear: GearSpec = GearSpec()
    pure: PureSpec = PureSpec()
    pace: PaceSpec = PaceSpec()
    train: TrainSpec = TrainSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    log: LogSpec = LogSpec()
    grade: GradeSpec = GradeSpec()
    evaluate: EvaluateSpec = dataclasses.field(default_factory=EvaluateSpec)


def load(path: str | Path) -> Config:
    """Read a YAML file strictly. Raises InputError (one line)."""
    config = strict.read(Path(path), Config())
    try:
        validate(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def validate(config: Config) -> None:
    """Ranges of every field, and what must hold between fields. Raises InputError."""
    strict.check(config, "")
    for path, template, names in (
        ("sample.prompt", config.sample.prompt, {"question"}),
        ("hindsight.prompt", config.hindsight.prompt, {"question", "answer"}),
        ("gear.hint", config.gear.hint, {"answer"}),
    ):
        missing = sorted("{" + name + "}" for name in names if "{" + name + "}" not in template)
        if missing:
            raise InputError(f"{path}: {strict.shown(template)} must contain {' and '.join(missing)}")
    for pattern in config.gear.leak_patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise InputError(
                f"gear.leak_patterns: {strict.shown(pattern)} is not a regular expression ({error})"
            ) from None
    if any(share < 0 for share in config.pace.steps) or not math.isclose(sum(config.pace.steps), 1.0, abs_tol=1e-6):
        raise InputError(f"pace.steps: {list(config.pace.steps)}: three shares >= 0 that sum to 1 are expected")
    if not config.train.lora.targets:
        raise InputError("train.lora.targets: at least one is expected; train.lora.rank 0 trains all weights")
    if config.train.batch % config.train.accumulate:
        raise InputError(
            f"train.accumulate: {config.train.accumulate} does not divide train.batch = {config.train.batch}"
        )
    samples = [one.samples for one in config.evaluate.all_sets.values()]
    most = max(config.sample.n, config.hindsight.n, config.gear.repairs, *samples)
    if config.sample.batch < most:
        raise InputError(
            f"sample.batch: {config.sample.batch} is out of range, allowed: >= {most} "
            "(the largest of sample.n, hindsight.n, gear.repairs, evaluate.samples, those of evaluate.sets)"
        )
    _validate_sets(config.evaluate)
    if config.gear.breakpoint == "oracle" and not config.problems.source.startswith("world:"):
        raise InputError("gear.breakpoint: oracle needs a step checker, which only world: problems have; use surge")
    if not config.grade.answer_open or not config.grade.answer_close:
        raise InputError("grade.answer_open and grade.answer_close: text that is not empty is expected")
    if config.grade.think_open and not (config.grade.think_open.strip() and config.grade.think_end):
        raise InputError("grade.think_open: text that is not blank is expected, and grade.think_end with it")


def _validate_sets(spec: EvaluateSpec) -> None:
    """Names of evaluation sets are names of folders."""
    names = list(spec.sets)
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
            raise InputError(
                f"evaluate.sets: {name!r} is no name for a set; letters, digits, '-', '_' and '.' are expected"
            )
        if name.lower() in (DEV, GREEDY):
            raise InputError(f"evaluate.sets.{name}: the name is taken; a set to choose by is evaluate.dev")
        if [other.lower() for other in names].count(name.lower()) > 1:
            raise InputError(f"evaluate.sets.{name}: there twice but for upper and lower case; give it another name")
    if spec.dev.greedy:
        raise InputError("evaluate.dev.greedy: there is one figure to choose by; for greedy set its temperature to 0")


def dump(config: Config) -> str:
    """YAML text of every field."""
    return yaml.safe_dump(strict.to_dict(config), sort_keys=False, allow_unicode=True)
