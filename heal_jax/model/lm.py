"""A language model as the pipeline uses it: decoder, tokenizer, folder."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from heal_jax.config import ModelSpec, SampleSpec
from heal_jax.errors import InputError
from heal_jax.model.config import decoder_config
from heal_jax.model.decoder import Model
from heal_jax.model.mesh import put_batch, using
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

    def logits(self, tokens: Any) -> jax.Array:
        """Next-token logits of a full pass: tokens [batch, length] int -> [batch, length, vocab] float32.

        Raises InputError for ids outside the vocabulary and lengths beyond the model's positions.
        """
        array = np.asarray(tokens)
        if array.ndim != 2 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise InputError(f"tokens: integers of shape [batch, length] are expected, not {array.dtype} {array.shape}")
        config = self.model.config
        if array.min() < 0 or array.max() >= config.vocab_size or array.shape[1] > config.max_positions:
            raise InputError(
                f"tokens: ids of 0 to {config.vocab_size - 1} and at most {config.max_positions} a row are expected"
            )
        with using(self.mesh):
            placed = put_batch(self.mesh, array.astype(np.int32), "context")
            return _logits(self.model.graph, self.model.params, placed)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        n: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        batch: int = 32,
    ) -> list[list["Rollout"]]:
        """`n` rollouts of each prompt, with the entropy of every token: one list a prompt.

        A prompt is text, put into the chat template as the user's turn, or token ids, taken as they are. `batch` rows
        are decoded together (at least n). A rollout depends on its prompt, its index and `seed`, not on the others.
        Raises InputError for settings out of range and for prompts that leave no room.
        """
        from heal_jax.rollout.generate import rollouts  # which builds on this module

        spec = SampleSpec(
            n=n,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            max_new_tokens=max_new_tokens,
            batch=max(batch, n),
        )
        return rollouts(self, prompts, spec, seed)

    def with_params(self, model: Model) -> "LanguageModel":
        """The same tokenizer and folder with other weights."""
        return dataclasses.replace(self, model=model)


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt's continuation. tokens [T] int32 (EOS included); entropy, logprob, sampling_logprob [T] float32, nats:
    of the model's own distribution, of the token under it, and under the one drawn from; finish: stop or length.
    """

    prompt_tokens: tuple[int, ...]
    text: str
    tokens: np.ndarray
    entropy: np.ndarray
    logprob: np.ndarray
    sampling_logprob: np.ndarray
    finish: str


@functools.partial(jax.jit, static_argnames="graph")
def _logits(graph: nnx.GraphDef, params: nnx.State, tokens: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)
    return model.logits(model(tokens))


def open_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer, checked against the vocabulary of its config.json."""
    return Tokenizer(folder, decoder_config(folder).vocab_size)


def open_model(spec: ModelSpec, mesh: Mesh | None = None) -> LanguageModel:
    """Load weights and tokenizer of a folder. Raises InputError (one line) for anything wrong with it."""
    folder = resolve(spec)
    tokenizer = open_tokenizer(folder)
    return LanguageModel(load(folder, jnp.dtype(spec.dtype), mesh), tokenizer, folder, mesh)
