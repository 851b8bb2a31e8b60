"""The machine: what it is, and what it can do at most at the shapes that the figures use."""

import functools
import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from heal_jax import processors
from heal_jax.bench.timing import Side, timed
from heal_jax.errors import InputError
from heal_jax.model.decoder import Model

PACKAGES = ("heal-jax", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers")
READ_BYTES = 1 << 30  # far beyond every cache
AT_ONCE = (
    16 << 20
)  # bytes of results of one program: larger ones are new memory, whose pages cost more than the product


def threads() -> int:
    """Threads that every side gets: the cores this process may use, or NPROC, which JAX heeds, too."""
    return min(len(processors.usable()), processors.threads())


def describe() -> dict[str, Any]:
    """Processor, device, cores, memory, load, versions."""
    return {
        "processor": processors.processor(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "threads": threads(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_before": os.getloadavg()[0],
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def bandwidth(size: int = READ_BYTES, repeats: int = 5) -> dict[str, float]:
    """Bytes a second of reading `size` bytes, and of copying them (both ways counted): medians."""
    array = jnp.zeros((64, size // 256), jnp.float32)
    read = timed(functools.partial(_read, array))
    copy = timed(functools.partial(_copy, array))
    read(), copy()
    return {
        "read": size / statistics.median(read() for _ in range(repeats)),
        "copy": 2 * size / statistics.median(copy() for _ in range(repeats)),
    }


@jax.jit
def _read(x: Array) -> Array:
    return jnp.sum(x, axis=1)


@jax.jit
def _copy(x: Array) -> Array:
    return x + 1


class Products:
    """The matrix products of a dense decoder alone, with its own weights: the limit of what computes it."""

    def __init__(self, model: Model):
        if model.config.experts:
            raise InputError("bench: a dense model is expected; mixtures of experts are not measured")
        # By shape: those of a shape, [in, out] each, go through one program.
        self.kinds: dict[tuple[int, int], list[Array]] = {}
        for path, leaf in nnx.to_flat_state(model.params):
            if path[0] == "blocks" and path[-1] == "kernel":
                kernel = leaf[...]
                self.kinds.setdefault(kernel.shape, []).append(kernel)
        self.tied = model.config.tie_embeddings  # then the head is the embedding, [out, in]
        params: Any = model.params
        self.head: Array = (params["embed"] if self.tied else params["head"]["kernel"])[...]

    def flops(self, rows: int, head_rows: int, backward: bool = False) -> float:
        """Of one pass over `rows` tokens, logits of `head_rows` of them."""
        blocks = sum(a * b * len(kernels) for (a, b), kernels in self.kinds.items())
        return 2.0 * (3 if backward else 1) * (rows * blocks + head_rows * self.head.size)

    def side(self, rows: int, head_rows: int, backward: bool = False) -> Side:
        """One pass; backward: and the products for the gradients of inputs and weights."""
        work: list[tuple[Callable[..., Any], tuple[Array, ...]]] = []
        passes = [(kernels, rows, False) for kernels in self.kinds.values()] + [([self.head], head_rows, self.tied)]
        for kernels, count, turned in passes:
            x, y = (jnp.ones((count, size)) for size in kernels[0].shape)
            if backward or not turned:
                work += [(_times, (x, *part)) for part in _groups(kernels, y.size)]
            if backward or turned:
                work += [(_times_transposed, (y, *part)) for part in _groups(kernels, x.size)]
            if backward:
                work += [(_to_weights, (x, y)) for _ in kernels]

        def run() -> None:
            for function, arguments in work:
                jax.block_until_ready(function(*arguments))

        return timed(run)


def _groups(kernels: Sequence[Array], result: int) -> list[tuple[Array, ...]]:
    """Kernels whose results, of `result` floats each, are small enough together."""
    step = max(1, AT_ONCE // (4 * result))
    return [tuple(kernels[i : i + step]) for i in range(0, len(kernels), step)]


@jax.jit
def _times(x: Array, *kernels: Array) -> list[Array]:
    return [x @ kernel for kernel in kernels]


@jax.jit
def _times_transposed(y: Array, *kernels: Array) -> list[Array]:
    return [y @ kernel.T for kernel in kernels]


@jax.jit
def _to_weights(x: Array, y: Array) -> Array:
    return x.T @ y
