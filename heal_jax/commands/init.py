"""heal init."""

import dataclasses
from pathlib import Path

from heal_jax.commands.arguments import parse
from heal_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class InitArguments:
    """Check a model folder and a file of problems, and write a commented config for them. Nothing is computed."""

    model: str
    """The teacher: a folder in Hugging Face format, or builtin:teacher."""
    problems: str
    """A .jsonl or .parquet file, the folder of a prepared tensorflow-datasets set, or a source as in the config
    (jsonl:FILE, parquet:FILE, tfds:NAME, tfds_dir:FOLDER, hf:NAME, rg:FAMILY)."""
    out: Path
    """The config to write; must not be there yet."""
    student: str | None = None
    """The student, as --model; without it the teacher teaches itself."""
    held_out: str | None = None
    """Problems to evaluate on, as --problems; without it the last part of these."""


def main(command: str, argv: list[str], progress: Progress) -> int:
    arguments = parse(InitArguments, command, argv)
    from heal_jax.init import init

    written = init(arguments.model, arguments.student, arguments.problems, arguments.held_out, arguments.out)
    for line in written:
        print(line)
    return 0
