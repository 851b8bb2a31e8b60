"""The least memory that a run needs on each device, by formula: what must be there, without what a compiler adds.

`heal plan` compiles and knows better, for TPUs; this takes no time and is for any machine.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from heal_jax.config import Config
from heal_jax.model.config import DecoderConfig
from heal_jax.model.decoder import abstract
from heal_jax.model.kv_cache import bytes_per_slot
from heal_jax.model.lora import count
from heal_jax.shapes import bucket


class Need(NamedTuple):
    """Bytes a device: what for, and what it is made of."""

    what: str
    parts: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


@functools.cache
def parameters(config: DecoderConfig) -> int:
    """Weights of a decoder."""
    if config.num_layers > 2 and not config.experts:  # layers are alike: two of them tell
        one, two = (_shallow(config, layers) for layers in (1, 2))
        return parameters(one) + (config.num_layers - 1) * (parameters(two) - parameters(one))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config, jnp.float32)[1]))


def _shallow(config: DecoderConfig, layers: int) -> DecoderConfig:
    return dataclasses.replace(config, num_layers=layers, sliding=config.sliding[:layers])


def cache_row(config: Config, teacher: DecoderConfig) -> float:
    """Bytes of the cache of one row of `sample.batch`, its context aside."""
    dtype = jnp.int8 if config.sample.cache_dtype == "int8" else jnp.dtype(config.teacher.dtype)
    slots = bucket(config.sample.cache_tokens or config.sample.max_new_tokens)
    return slots * bytes_per_slot(teacher, dtype)


def needs(config: Config, models: Mapping[str, DecoderConfig], mesh: Mapping[str, int]) -> list[Need]:
    """Of rollouts and of training. models: teacher and student; mesh: the size of every axis."""
    split = mesh["fsdp"] * mesh["tensor"]
    rows = math.prod(mesh[axis] for axis in ("data", "fsdp", "expert"))
    teacher, student = models["teacher"], models["student"]

    def whole(model: DecoderConfig, dtype: str) -> float:
        return parameters(model) * jnp.dtype(dtype).itemsize / (split * (mesh["expert"] if model.experts else 1))

    cache = config.sample.batch * cache_row(config, teacher) / (rows * mesh["tensor"])
    rollouts = {"weights": whole(teacher, config.teacher.dtype), "caches": cache}
    adapters = 4.0 * count(student, config.train.lora) / split
    learning = adapters or whole(student, "float32")  # the master weights; AdamW has two moments for each
    gradients = learning * jnp.dtype(config.student.dtype).itemsize / 4
    before = {"weights as they were": whole(student, config.student.dtype)}
    training = before | {"master weights": learning, "moments": 2 * learning, "gradients": gradients}
    return [Need("rollouts", rollouts), Need("training", training)]


def checkpoint_bytes(config: Config, student: DecoderConfig) -> float:
    """Of one checkpoint of training: master weights and moments."""
    return 12.0 * (count(student, config.train.lora) or parameters(student))
