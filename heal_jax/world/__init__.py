"""The built-in world: problems, and small models pretrained for them."""

from pathlib import Path

from heal_jax.errors import InputError


def model_folder(name: str) -> Path:
    """The folder of a shipped model, teacher or student."""
    folder = Path(__file__).parent / "models" / name
    if name not in ("teacher", "student"):
        raise InputError(f"builtin:{name}: no such built-in model; there are builtin:teacher and builtin:student")
    return folder
