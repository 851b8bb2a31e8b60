"""What commands share: reading arguments, and refusing them in one line."""

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path
from typing import Any

import tyro

from heal_jax.config import Config, load
from heal_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Said:
    """How a long command says what it does."""

    quiet: bool = False
    """No progress, only errors."""
    json_log: bool = False
    """Progress as JSON, one object a line, on stdout: start, stage_start, progress (stage, done, total, unit, tokens,
    tokens_per_s, eta_seconds, counts), note, stage_end, result, error, end (README, "Commands"). stderr is as without
    it; where stdout is a terminal, they take the display's place."""


def parse(kind: type, command: str, argv: list[str], **settings: Any) -> Any:
    """tyro's parser, its boxed complaints made one line. Raises InputError; SystemExit for --help."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, prog=f"heal {command}", args=argv, **settings)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        text = " ".join(re.sub(r"[^\x20-\x7e]", " ", said.getvalue()).split())
        raise InputError(f"{command}: {re.sub(r'-{5,}', '', text)}") from None


def configured(
    kind: type, command: str, usage: str, argv: list[str], description: str, needed: bool = True, **defaults: Any
) -> Any:
    """The arguments of a command with a config. Its YAML file gives the defaults that the other arguments override, so
    it is read first. needed: whether there must be one."""
    path = next((a for a in argv if a.endswith((".yaml", ".yml"))), None)
    if needed and path is None and not any(a in ("-h", "--help") for a in argv):
        raise InputError(f"heal {command} CONFIG.yaml {usage}: no config file ending in .yaml is given")
    settings = load(path) if path is not None else Config()
    default = kind(config=tyro.MISSING if needed else None, settings=settings, **defaults)
    return parse(kind, command, argv, default=default, description=description)


def run_directory(folder: Path) -> Path:
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{folder}: not a run directory (no manifest.json); give the --out of `heal run`")
    return folder


def check_json(file: Path | None) -> None:
    if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK)):
        raise InputError(f"--json {file}: not a file that can be written; name one in a folder that is there")
