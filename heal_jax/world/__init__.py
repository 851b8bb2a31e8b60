"""The built-in worlds: problems of reasoning-gym families, and small models pretrained for them.

Each has a teacher with a ceiling that is planted (`heal_jax.world.base`): unaided it hardly ever solves a hard problem,
with the answer in view it mostly does.
"""

from pathlib import Path

from heal_jax.errors import InputError

# The first world's models go without its name: builtin:teacher.
MODELS = tuple(f"{world}{role}" for world in ("", "rewriting-", "legs-") for role in ("teacher", "student"))


def model_folder(name: str) -> Path:
    """The folder of a shipped model, such as teacher or rewriting-student."""
    if name not in MODELS:
        raise InputError(
            f"builtin:{name}: no such built-in model; there are {', '.join(f'builtin:{known}' for known in MODELS)}"
        )
    return Path(__file__).parent / "models" / name
