"""Sampling rules: each maps logits to logits, -inf where a token may not be drawn."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from heal_jax.config import SampleSpec

Rule = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Only the likeliest token (the first of equals)."""

    def __call__(self, logits: Array) -> Array:
        """logits [B, V] -> [B, V]."""
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1]) == best, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Divide by a positive temperature."""

    value: float

    def __call__(self, logits: Array) -> Array:
        """logits [B, V] -> [B, V]."""
        return logits / self.value


@dataclasses.dataclass(frozen=True)
class TopK:
    """The k likeliest tokens; equals of the k-th stay too."""

    k: int

    def __call__(self, logits: Array) -> Array:
        """logits [B, V] -> [B, V]."""
        kth = jax.lax.top_k(logits, min(self.k, logits.shape[-1]))[0][:, -1:]
        return jnp.where(logits >= kth, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class TopP:
    """The smallest set of likeliest tokens whose probability reaches p (Holtzman et al., arXiv 1904.09751)."""

    p: float

    def __call__(self, logits: Array) -> Array:
        """logits [B, V] -> [B, V]."""
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        least = jnp.min(jnp.where(before < self.p, ordered, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits >= least, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class MinP:
    """Tokens with at least p times the probability of the likeliest (Nguyen et al., arXiv 2407.01082)."""

    p: float

    def __call__(self, logits: Array) -> Array:
        """logits [B, V] -> [B, V]."""
        best = jnp.max(logits, axis=-1, keepdims=True)
        return jnp.where(logits >= best + jnp.log(self.p), logits, -jnp.inf)


def rules(spec: SampleSpec) -> tuple[Rule, ...]:
    """The rules of a config in the order of transformers: temperature, top-k, top-p, min-p."""
    if spec.temperature == 0:
        return (Greedy(),)
    chosen: list[Rule] = []
    if spec.temperature != 1:
        chosen.append(Temperature(spec.temperature))
    if spec.top_k:
        chosen.append(TopK(spec.top_k))
    if spec.top_p < 1:
        chosen.append(TopP(spec.top_p))
    if spec.min_p > 0:
        chosen.append(MinP(spec.min_p))
    return tuple(chosen)


def apply(rules: tuple[Rule, ...], logits: Array) -> Array:
    """All rules in turn: [B, V] float32 -> [B, V]."""
    for rule in rules:
        logits = rule(logits)
    return logits
