"""A language model as the pipeline uses it: decoder, tokenizer, folder."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from heal_jax.config import ModelSpec
from heal_jax.errors import InputError
from heal_jax.model.config import decoder_config
from heal_jax.model.decoder import Model
from heal_jax.model.mesh import put_batch
from heal_jax.model.tokenizer import Tokenizer
from heal_jax.model.weights import load
from heal_jax.world import model_folder


def resolve(spec: ModelSpec) -> Path:
    """The folder of a model. Raises InputError where there is none."""
    kind, _, name = spec.path.partition(":")
    if kind == "builtin":
        return model_folder(name)
    folder = Path(spec.path).expanduser()
    if not folder.is_dir():
        raise InputError(f"{spec.path}: no such model folder; give a Hugging Face model directory or builtin:teacher")
    return folder.resolve()


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """`model` lives on the devices of `mesh` (None: the first device)."""

    model: Model
    tokenizer: Tokenizer
    folder: Path
    mesh: Mesh | None

    @functools.cached_property
    def eos_ids(self) -> jax.Array:
        """[E] int32, on every device."""
        return put_batch(self.mesh, np.asarray(self.tokenizer.eos_ids, np.int32), None)

    def with_params(self, model: Model) -> "LanguageModel":
        """The same tokenizer and folder with other weights."""
        return dataclasses.replace(self, model=model)


def open_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, checked against the vocabulary of its config.json."""
    return Tokenizer(folder, decoder_config(folder).vocab_size)


def open_model(spec: ModelSpec, mesh: Mesh | None = None) -> LanguageModel:
    """Load weights and tokenizer of a folder. Raises InputError (one line) for anything wrong with it."""
    folder = resolve(spec)
    tokenizer = open_tokenizer(folder)
    return LanguageModel(load(folder, jnp.dtype(spec.dtype), mesh), tokenizer, folder, mesh)
