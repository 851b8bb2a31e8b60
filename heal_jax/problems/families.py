"""reasoning-gym's problems, made in a process of their own (`worker` says why)."""

import random
from dataclasses import fields
from multiprocessing.connection import Connection
from typing import Any

from heal_jax.errors import InputError, RunError
from heal_jax.problems import worker
from heal_jax.problems.text import near, short

MAX_LEVEL = 60  # characters; a family's difficulty that is longer is no label

Entry = tuple[str, str, dict[str, Any]]  # question, answer, metadata


def draw(family: str, size: int, seed: int, options: dict[str, Any]) -> list[Entry]:
    """The first `size` problems that a family makes of a seed. Raises InputError, RunError where the process dies."""
    process, connection = worker.start(__name__, "generate")
    try:
        connection.send((family, size, seed, options))
        made = connection.recv()
    except (EOFError, OSError):
        raise RunError(f"rg:{family}: reasoning-gym ended without an answer; is it installed?") from None
    finally:
        connection.close()
        process.kill()
        process.wait()
    if isinstance(made, str):
        raise InputError(made)
    return made


def generate(connection: Connection) -> None:
    """In the child process: read (family, size, seed, options), write the entries or what is wrong."""
    family, size, seed, options = connection.recv()
    try:
        connection.send(entries(family, size, seed, options))
    except InputError as error:
        connection.send(str(error))


def entries(family: str, size: int, seed: int, options: dict[str, Any]) -> list[Entry]:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        raise InputError(f"rg:{family}: reasoning-gym has no such family{near(family, DATASETS)}")
    allowed = [field.name for field in fields(DATASETS[family][1]) if field.name not in ("size", "seed")]
    for name in options:
        if name not in allowed:
            advice = f", use problems.{'limit' if name == 'size' else name}" if name in ("size", "seed") else ""
            raise InputError(f"problems.options.{name}: no option of rg:{family}{advice or near(name, allowed)}")
    try:
        data = reasoning_gym.create_dataset(family, size=size, seed=seed, **options)
    except Exception as error:
        reason = short(str(error)) or type(error).__name__
        raise InputError(f"problems.options: rg:{family} refuses {options or 'its defaults'}: {reason}") from None
    out = []
    for index in range(size):
        random.seed(f"{seed} {index}")  # one family draws from the global generator
        try:
            entry = data[index]
        except Exception as error:
            reason = f"{type(error).__name__}: {short(str(error))}"
            raise InputError(f"rg:{family}: problem {index} cannot be made with these options ({reason})") from None
        question, answer = entry["question"], entry["answer"]
        if not isinstance(answer, str) or not answer.strip():
            raise InputError(
                f"rg:{family}: problem {index} comes without an answer, and the hint must show one; use another family"
            )
        out.append((question, answer.strip(), entry["metadata"]))
    return out


def difficulty(value: Any) -> str:
    """ "terms=2..6,digits=1..4", or empty where that would not be short."""
    parts = []
    for name, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, tuple | list) and len(item) == 2 and not name.endswith("weights"):
            item = f"{item[0]}..{item[1]}" if item[0] != item[1] else item[0]
        if isinstance(item, int | float | str):
            parts.append(f"{name}={item}")
    text = ",".join(parts) if isinstance(value, dict) else str(value) if isinstance(value, int | float | str) else ""
    return text if len(text) <= MAX_LEVEL else ""
