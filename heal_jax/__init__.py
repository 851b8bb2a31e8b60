"""heal_jax: hindsight entropy-assisted learning for reasoning distillation, in JAX.

`load`, `LanguageModel.logits`, `LanguageModel.generate` and `save` are the interface for programs; `heal` is the
command.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from heal_jax.model.lm import LanguageModel

__version__ = "0.1.0"
__all__ = ["load", "save"]


def load(
    path: str | os.PathLike, dtype: str = "float32", mesh: "Mesh | Mapping[str, int] | None" = None
) -> "LanguageModel":
    """Open a Hugging Face model folder (or builtin:teacher, builtin:student).

    dtype: float32, bfloat16 or float16, of weights and computation. mesh: None (the first device), sizes of the axes
    data, fsdp, tensor and expert such as {"tensor": 8} (one may be -1: what is left), or a mesh with those axes.
    Raises heal_jax.errors.InputError, in one line, for whatever is wrong with the folder.
    """
    from heal_jax.config import ModelSpec
    from heal_jax.divide import model_sizes, require
    from heal_jax.errors import InputError
    from heal_jax.model.config import decoder_config
    from heal_jax.model.lm import open_model, resolve
    from heal_jax.model.mesh import adopt, make_mesh

    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype: {dtype!r} is not one of float32, bfloat16, float16")
    spec = ModelSpec(str(path), dtype)  # type: ignore[arg-type]
    if isinstance(mesh, Mapping):
        mesh = make_mesh(mesh)
    elif mesh is not None:
        mesh = adopt(mesh)
    if mesh is not None:
        require(mesh.shape, model_sizes(decoder_config(resolve(spec)), "model"))
    return open_model(spec, mesh)


def save(lm: "LanguageModel", path: str | os.PathLike) -> None:
    """Write a model as a Hugging Face folder: safetensors, config.json, and its tokenizer's files byte for byte.

    Written beside it and renamed: the folder is whole, or what it was. Raises InputError where it cannot be written.
    """
    from heal_jax.export import save

    save(lm, Path(path))
