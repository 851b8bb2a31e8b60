"""The text of a config for somebody's own model and problems, with comments that say what to tune."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heal_jax.config import Config

if TYPE_CHECKING:
    from heal_jax.init import Found


def text(config: Config, found: "Found", out: Path) -> str:
    """YAML that `load` reads back to `config`. All other fields have their defaults (`heal run --help`)."""
    c, t = config, config.train
    own = not c.teacher.path.startswith("builtin:")
    lines = [
        f"# Written by heal init for {found.problems} problems. Every other field has its default; `heal run --help`",
        "# explains all of them, and any can be set on the command line (--sample.n 8).",
        f"#   heal doctor {out}",
        f"#   heal run {out} --out runs/{out.stem}",
        "# A first look, in a tenth of the time: --problems.limit 50 --sample.n 8 --gear.paths 2 --gear.repairs 4",
        "",
        "# bfloat16 halves memory; float32 computes the same everywhere. A student from another family is fine.",
        f"teacher: {{path: {_(c.teacher.path)}, dtype: {c.teacher.dtype}}}",
        f"student: {{path: {_(c.student.path)}, dtype: {c.student.dtype}}}",
        "",
        "# Where one device cannot hold a model: fsdp splits weights and optimizer, tensor splits layers (must divide",
        f"# the teacher's {found.teacher.num_kv_heads} key-value heads). `heal plan` tells what fits, for TPUs.",
        "mesh: {data: -1, fsdp: 1, tensor: 1}",
        "",
        *_problems("problems", c.problems, ""),
        "",
        "sample:",
        "  # The user's turn. The teacher must be told to write its answer as grade.answer_open has it; steps are what",
        "  # empty lines part, and GEAR needs some of them to find where a rollout went wrong.",
        f"  prompt: {_(c.sample.prompt)}",
        _said(f"  n: {c.sample.n}", "rollouts a problem (paper); 8 to 16 for a first look"),
        _said(
            f"  max_new_tokens: {c.sample.max_new_tokens}",
            "longer ones are cut and not correct: raise it where many are",
        ),
        _said(f"  batch: {c.sample.batch}", "rows decoded together: as many as memory has room for"),
        "hindsight:",
        f"  prompt: {_(c.hindsight.prompt)}",
        _said(f"gear: {{paths: {c.gear.paths}, repairs: {c.gear.repairs}}}", "of an unsolved problem (paper)"),
        "pure:",
        _said(f"  threshold: {c.pure.threshold}", "of S; lower drops more: see the report's section on PURE"),
        _said(f"  batch: {c.pure.batch}", "sequences scored together; fewer where memory is short"),
        "",
        "grade:",
        _said(f"  by: {c.grade.by}", "auto is math for files and sets; math, exact, choice"),
        f"  answer_open: {_(c.grade.answer_open)}",
        f"  answer_close: {_(c.grade.answer_close)}",
    ]
    if c.grade.unreadable == "text":
        count, first = len(found.unreadable), ", ".join(found.unreadable[:3])
        lines += [f"  # math-verify cannot read {count} reference answers, which are compared as text: {_one(first)}"]
        lines += ["  unreadable: text"]
    if c.grade.think_end:
        lines += [
            "  # The teacher has thinking tags; where its chat template opens the part itself, think_open stays empty.",
            f"  think_end: {_(c.grade.think_end)}",
            f"  think_open: {_(c.grade.think_open)}",
        ]
    lines += [
        "",
        "train:",
        _said(f"  steps: {t.steps}", "for each of the two students" + ", about five epochs" * own),
        _said(
            f"  batch: {t.batch}", "rows; raise accumulate (a divisor of it) or set remat: block where memory is short"
        ),
        _said(f"  learning_rate: {t.learning_rate}", "of all weights (paper: 1e-5); about tenfold with lora.rank"),
        _said(f"  row_tokens: {t.row_tokens}", "slots of a row, which holds as many whole examples as fit"),
        _said(f"  max_tokens: {t.max_tokens}", "longer examples, prompt included, are left out and counted"),
        f"  remat: {t.remat}",
        _said("  lora: {rank: 0}", "16 to 64 trains adapters beside frozen weights, in a fraction of the memory"),
        "",
        "# Problems that nothing is trained on; what training problems share with them is left out of training.",
        "evaluate:",
        *_problems("problems", c.evaluate.problems, "  "),
        _said(f"  samples: {c.evaluate.samples}", "of a problem, by each of the four models"),
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _problems(name: str, spec: Any, indent: str) -> list[str]:
    lines = [f"{indent}{name}:", f"{indent}  source: {_(spec.source)}", f"{indent}  split: {spec.split}"]
    lines += [f"{indent}  {field}: {_(value)}" for field in ("options", "fields") if (value := getattr(spec, field))]
    lines += [f"{indent}  answer_pattern: {_(spec.answer_pattern)}"] if spec.answer_pattern else []
    if spec.skip:
        lines.append(_said(f"{indent}  skip: {spec.skip}", "the rows before are for training; nothing is shuffled"))
    return lines + ([f"{indent}  limit: {spec.limit}"] if spec.limit else [])


def _said(line: str, comment: str) -> str:
    return f"{line:<24} # {comment}"


def _(value: Any) -> str:
    """JSON, which is YAML, too: no letter of a path or a prompt means anything there."""
    return json.dumps(value, ensure_ascii=False)


def _one(said: str) -> str:
    """On one line, with nothing that ends a comment or that YAML does not allow."""
    return "".join(c if c.isprintable() else " " for c in said)
