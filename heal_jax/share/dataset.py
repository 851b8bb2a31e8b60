"""The stages of the curriculum as Parquet files of conversations, which `datasets` and TRL's SFTTrainer take."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from heal_jax.curriculum import PACE_STAGES
from heal_jax.run import Run, plain_question
from heal_jax.share import naming
from heal_jax.share.markdown import code, front_matter
from heal_jax.storage import pull
from heal_jax.train.data import LICENCES, Example, contents, made_from, read_stage

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
ROWS = 1000  # in a row group: what viewers read at once
SIZES = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
FOLDER = "path/to/dataset"  # in the snippet of a card that is not on the hub
TAGS = ["heal", "heal_jax", "distillation", "reasoning", "arxiv:2603.10359"]


def schema(chat: bool) -> pa.Schema:
    """Columns of a stage; chat: whether the student has a chat template, without one prompt and completion are text."""
    said = MESSAGES if chat else pa.string()
    return pa.schema(
        [
            ("prompt", said),
            ("completion", said),
            *((name, pa.string()) for name in ("rollout_id", "problem_id", "kind", "answer")),
            ("prompt_tokens", pa.int32()),
            ("completion_tokens", pa.int32()),
        ]
    )


def write(run: Run, folder: Path) -> None:
    """Write stage1.parquet, stage2.parquet, stage3.parquet, of those stages that have examples, and their card."""
    pull(run.root / "curriculum")
    tokenizer = run.tokenizers["student"]
    chat, stages, kept = tokenizer.hf.chat_template is not None, {}, 0
    for stage in PACE_STAGES:
        source = run.root / "curriculum" / f"stage{stage}"
        if not source.is_dir():
            continue
        stages[stage] = read_stage(source)
        rows = [row(run, example, chat) for example in stages[stage]]
        if chat:
            kept += sum(tokenizer.keeps(*(r[part][0]["content"] for part in ("prompt", "completion"))) for r in rows)
        table = pa.Table.from_pylist(rows, schema(chat))
        pq.write_table(table, folder / f"stage{stage}.parquet", compression="zstd", row_group_size=ROWS)
    origin = naming.origin(run.config, run.directory.manifest)
    (folder / "README.md").write_text(card(stages, origin, kept if chat else None), encoding="utf-8")


def row(run: Run, example: Example, chat: bool) -> dict[str, Any]:
    """An example in words: the question as the student is asked it, and what it learns to say, its EOS left out."""
    tokenizer, problem = run.tokenizers["student"], run.by_id[example.problem_id]
    asked = plain_question(run.config, problem)
    said = tokenizer.text(list(example.tokens[example.prompt_length :]))
    return {
        "prompt": [{"role": "user", "content": asked}] if chat else asked,
        "completion": [{"role": "assistant", "content": said}] if chat else said,
        "rollout_id": example.rollout_id,
        "problem_id": example.problem_id,
        "kind": example.kind,
        "answer": problem.answer,
        "prompt_tokens": example.prompt_length,
        "completion_tokens": len(example.tokens) - example.prompt_length,
    }


def card(stages: Mapping[int, Sequence[Example]], origin: Mapping[str, str], kept: int | None) -> str:
    """The card of the dataset. kept: examples that the student's chat template leaves as they are; None where it has
    no template.
    """
    count = sum(map(len, stages.values()))
    configs = [
        {"config_name": f"stage{stage}", "data_files": [{"split": "train", "path": f"stage{stage}.parquet"}]}
        for stage in stages
    ]
    head = front_matter(
        {
            "pretty_name": "HEAL curriculum",
            "task_categories": ["text-generation"],
            "size_categories": [next((name for most, name in SIZES if count < most), "n>1M")],
            "tags": TAGS,
            "configs": configs,
        }
    )
    said, note = "a list of one message, the user's", ""
    if kept is None:
        said = "text (the student has no chat template)"
    elif kept == count:
        note = (
            "The student's own chat template makes of every row what the student was trained on. Templates of other\n"
            "models may change finished turns, such as dropping what is thought.\n"
        )
    else:
        note = (
            f"The student's own chat template leaves {kept} of {count} rows as the student was trained on them and\n"
            "changes the others, as by dropping what is thought: train on those with another template, or as text.\n"
        )
    first = next(iter(stages), 1)
    use = code(
        f"""from datasets import load_dataset

data = load_dataset("{FOLDER}", "stage{first}", split="train")
print(data[0]["prompt"], data[0]["completion"])""",
        "python",
    )
    held = "\n".join(f"### stage{stage}\n\n{contents(stage, examples)}" for stage, examples in stages.items())
    return f"""{head}# HEAL curriculum

Examples for reasoning distillation in three stages, made by heal_jax after HEAL (Hindsight Entropy-Assisted Learning,
[arXiv 2603.10359](https://arxiv.org/abs/2603.10359)): PACE, the curriculum from what a teacher solves by itself to
what it solves only with help. Students train on the stages in this order, by default on each with those before it.

{made_from(origin)}
## Stages

{held}
## Columns

| column | |
| --- | --- |
| `prompt` | {said}: the plain question, never the answer that the teacher may have been shown |
| `completion` | the same for the assistant: the solution to learn, thinking part included, no hint in it |
| `rollout_id`, `problem_id` | where it comes from, as in the run's rollouts and problems |
| `kind` | `base`: unaided; `hindsight`: written with the answer in view; `repair`: a failed one, cut and written on |
| `answer` | the problem's reference answer |
| `prompt_tokens`, `completion_tokens` | how many tokens of the student each has; the completion's EOS counts |

Rows are in the order of curation.

## Use

{use}
The columns are those that TRL's `SFTTrainer` trains on: the loss is on `completion` alone.
{note}
## Limits

- Solutions are kept by their final answer and by PURE, an estimate from the teacher's probabilities: steps may err.
- The examples are as many, as long and as hard as one teacher's attempts on one set of problems allow.

{LICENCES}
"""
