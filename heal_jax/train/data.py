"""Training data: PACE stages as tensorflow-datasets (ArrayRecord), batches through Grain.

TensorFlow itself is never imported. A stage's folder is the dataset's own: `tfds.builder_from_directory` opens it.
"""

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from heal_jax.errors import InputError
from heal_jax.shapes import bucket
from heal_jax.share.markdown import escape


@dataclasses.dataclass(frozen=True)
class Example:
    """tokens: prompt and target, EOS included; the first prompt_length of them are given, the rest is learned.

    Raises ValueError where there is nothing to learn or no prompt (nothing would predict the first token).
    """

    rollout_id: str
    problem_id: str
    kind: str
    tokens: tuple[int, ...]
    prompt_length: int

    def __post_init__(self) -> None:
        if not 0 < self.prompt_length < len(self.tokens):
            raise ValueError(
                f"example {self.rollout_id}: prompt of {self.prompt_length} in {len(self.tokens)} tokens; "
                "a prompt and something to learn after it are expected"
            )


class Pace(tfds.core.GeneratorBasedBuilder):
    """Training examples of one PACE stage, in order."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, stage: int, examples: Sequence[Example], **kwargs: Any):
        self.stage, self.examples = stage, examples
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "rollout_id": tfds.features.Text(),
            "problem_id": tfds.features.Text(),
            "kind": tfds.features.Text(),
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "prompt_length": tfds.features.Scalar(np.int32),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"PACE stage {self.stage}: prompt and target tokens, in the order of curation.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, example in enumerate(self.examples):
            yield index, vars(example) | {"tokens": np.asarray(example.tokens, np.int32)}


WHAT = {
    1: "the teacher's right solutions, unaided",
    2: "right solutions of hard problems with the answer in view (global hindsight), as PURE kept them",
    3: "repairs of failed solutions of problems that the teacher cannot solve (GEAR), as PURE kept them",
}


LICENCES = "The solutions are a model's: the licences of the teacher and of the problems apply."


def contents(stage: int, examples: Sequence[Example]) -> str:
    """What a stage holds, as a card says it (Markdown)."""
    learned = sum(len(e.tokens) - e.prompt_length for e in examples)
    what = WHAT[stage]
    return f"""{what[0].upper()}{what[1:]}.

- examples: {len(examples)}, of {len({e.problem_id for e in examples})} problems
- tokens to learn: {learned}, and {sum(e.prompt_length for e in examples)} of prompts
"""


def made_from(origin: Mapping[str, str]) -> str:
    """What examples were made from, by name, as a card says it (Markdown)."""
    return "".join(f"- {name}: {escape(value)}\n" for name, value in origin.items())


def card(stage: int, examples: Sequence[Example], origin: Mapping[str, str]) -> str:
    """A dataset card (Markdown): what a stage holds, what it was made from, how to read it."""
    return f"""# PACE stage {stage}

Training examples for reasoning distillation, made by heal_jax after HEAL (arXiv 2603.10359).

{contents(stage, examples)}{made_from(origin)}
An example has `tokens` (int32, prompt and solution, EOS included, in the student's vocabulary), of which the first
`prompt_length` are given and the rest is learned; `rollout_id`, `problem_id` and `kind` (base, hindsight, repair) say
where it comes from. In the order of curation. ArrayRecord; TensorFlow is not needed:

```python
import tensorflow_datasets as tfds

source = tfds.builder_from_directory("stage{stage}").as_data_source(split="train")
```

{LICENCES}
"""


def write_stage(folder: Path, stage: int, examples: Sequence[Example], origin: Mapping[str, str]) -> None:
    """Write a stage into its folder (such as curriculum/stage1), split "train", replacing what is there, with its
    `card`; origin: what it was made from, by name.

    It is written beside the folder and renamed, so that a folder is a whole stage or absent.
    Raises ValueError for an empty stage, which has no folder.
    """
    if not examples:
        raise ValueError(f"stage {stage} has no examples: an empty stage has no folder")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # tfds announces itself
        builder = Pace(stage, examples, data_dir=partial)
        builder.download_and_prepare(file_format="array_record")
    Path(builder.data_dir, "README.md").write_text(card(stage, examples, origin), encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    Path(builder.data_dir).rename(folder)
    shutil.rmtree(partial)


def read_stage(folder: Path) -> list[Example]:
    """The examples of a stage, in order. Raises InputError where the folder holds no stage."""
    if not (folder / "dataset_info.json").is_file():
        raise InputError(f"{folder}: no stage of a curriculum here (no dataset_info.json); run `heal curate` first")
    source = tfds.builder_from_directory(folder).as_data_source(split="train")
    return [
        Example(
            rollout_id=row["rollout_id"].decode(),
            problem_id=row["problem_id"].decode(),
            kind=row["kind"].decode(),
            tokens=tuple(row["tokens"].tolist()),
            prompt_length=int(row["prompt_length"]),
        )
        for row in source
    ]


def row_length(examples: Sequence[Example], tokens: int = 0) -> int:
    """Slots of a row: `tokens`, or what the longest example needs (in steps of 32) where that is more. One length, so
    one compilation, for a whole training. Raises ValueError without examples.
    """
    return max(tokens, bucket(max(len(example.tokens) for example in examples)))


class Batch(NamedTuple):
    """Rows of whole examples, one after another.

    tokens [rows, length] int32, padded on the right; segments [rows, length] int32: 1, 2, ... for a row's examples, 0
    for padding; positions [rows, length] int32, from 0 in each example; mask [rows, length] bool: what is learned.
    """

    tokens: Any
    segments: Any
    positions: Any
    mask: Any


READ = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # from memory: more threads only wait for each other
FEW = 16  # examples; Grain's shuffle takes milliseconds for each of fewer (ten of two, a tenth of 500)
BINS = 256  # rows that are open for an example at once; 64 leave up to a tenth of the slots empty


def batches(
    examples: Sequence[Example], rows: int, length: int, seed: int, pad_id: int
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless batches of `rows` rows by a Grain iterator, whose `get_state` goes on anywhere; `unpack` reads them.

    Every epoch is a new order, fixed by seed (0 <= seed < 2**32); batches go on over the end of an epoch. Examples are
    packed first-fit, never split. The mask is set from prompt_length to the last token (EOS included), by lengths and
    never by token ids: an EOS or a sampled token that equals pad_id is learned. Every process makes the same rows and
    keeps those of its devices, so that what is in a batch does not depend on their number. Close it: a thread works
    ahead. Raises ValueError without examples and for one longer than `length`.
    """
    if not examples:
        raise ValueError("no examples to make batches of")
    if max(len(example.tokens) for example in examples) > length:
        raise ValueError(f"an example is longer than {length} tokens: give a larger length")

    def features(index: int) -> dict[str, np.ndarray]:
        example = examples[index]
        count = len(example.tokens)
        return {
            "tokens": np.asarray(example.tokens, np.int32),
            "mask": np.arange(count) >= example.prompt_length,
            "example": np.full(count, index, np.int32),
        }

    packed = grain.experimental.FirstFitPackIterDataset(
        _order(len(examples), seed).map(features).to_iter_dataset(READ),
        length_struct={"tokens": length, "mask": length, "example": length},
        num_packing_bins=BINS,
        shuffle_bins=False,
        meta_features=("mask", "example"),
        padding_struct={"tokens": pad_id, "mask": False, "example": -1},
    ).batch(rows)
    return iter(grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=2))


def _order(count: int, seed: int) -> grain.MapDataset[int]:
    """Endless indices below count: in each epoch all of them, in a new order. Below FEW orders come again after 4096
    indices."""
    if count >= FEW:
        return grain.MapDataset.source(range(count)).seed(seed).shuffle().repeat()
    rng = np.random.default_rng(seed)
    return grain.MapDataset.source([i for _ in range(4096 // count) for i in rng.permutation(count).tolist()]).repeat()


def filled_up(batch: Batch, rows: int) -> Batch:
    """The batch with empty rows below its own: [rows, length], for a mesh that does not divide its rows."""
    return Batch(*(np.pad(x, ((0, rows - len(x)), (0, 0))) for x in batch))


def unpack(features: dict[str, np.ndarray]) -> tuple[Batch, np.ndarray]:
    """A batch of `batches`, and the index of each slot's example, [rows, length] int32, -1 for padding."""
    f = features
    return Batch(f["tokens"], f["tokens_segment_ids"], f["tokens_positions"], f["mask"]), f["example"]
