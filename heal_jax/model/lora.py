"""Low-rank adapters (LoRA; Hu et al., arXiv 2106.09685): a few weights that learn beside a decoder's frozen ones.

An adapted kernel W [in, out] has adapters A [in, r] and B [r, out], and x becomes x W + alpha / r (x A) B: beside the
kernel, not merged into it in each step. The gradient of a merged kernel is a whole [in, out], for which backward passes
spend half of their products, and where layers are a loop the merged kernels and these gradients are held for all of
them at once. This way no gradient of a frozen weight is formed.
"""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, Sharding

from heal_jax.config import LoraSpec
from heal_jax.model.config import DecoderConfig
from heal_jax.model.decoder import Linear, Model, abstract
from heal_jax.model.mesh import sharding
from heal_jax.model.weights import Row, adapter_rows


def adapted(model: Model, spec: LoraSpec, mesh: Mesh | None, seed: int | None) -> Model:
    """The model with adapters, float32, beside the kernels of `spec.targets`; with rank 0 the model itself.

    As PEFT starts them: A is uniform within 1 / sqrt(in) (Kaiming, a = sqrt(5)), by seed and name of the tensor, and
    B is zero, so that the model computes what it did. Without a seed they are shapes alone. Raises InputError where
    targets name experts.
    """
    if not spec.rank:
        return model
    decoder = nnx.merge(model.graph, model.params)
    for row in adapter_rows(model.config, spec.targets):
        *parents, name = row.path
        linear = functools.reduce(_child, parents, decoder)
        size_in, size_out = linear.kernel.shape
        shape = (size_in, spec.rank) if name == "lora_a" else (spec.rank, size_out)
        where = sharding(mesh, row.axes, shape)
        value = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        setattr(linear, name, nnx.LoRAParam(value if seed is None else _first(row, shape, seed, where)))
        linear.adapter_scale = spec.alpha / spec.rank
    return Model(*nnx.split(decoder), model.config)


def _child(module: Any, name: str | int) -> Any:
    return module[name] if isinstance(name, int) else getattr(module, name)


def _first(row: Row, shape: tuple[int, int], seed: int, where: Sharding) -> Array:
    """On the host, so that it is the same on every kind of device and mesh."""
    if row.path[-1] == "lora_a":
        draw = np.random.default_rng([seed % 2**64, zlib.crc32(row.tensor.encode())])
        host = draw.uniform(-1, 1, shape).astype(np.float32) / np.float32(shape[0] ** 0.5)
    else:
        host = np.zeros(shape, np.float32)
    return jax.make_array_from_callback(shape, where, lambda index: host[index])


def split(params: nnx.State) -> tuple[nnx.State, nnx.State]:
    """The parameters that learn and those that do not: adapters and the others, or all and none."""
    adapters, others = nnx.split_state(params, nnx.LoRAParam, ...)
    return (adapters, others) if jax.tree.leaves(adapters) else (others, adapters)


def merged(model: Model) -> Model:
    """An ordinary model that computes the same: kernels W + alpha / r A B, summed in float32, in the model's dtype and
    place. One without adapters is returned as it is.
    """
    decoder = nnx.merge(model.graph, model.params)
    linears = [m for _, m in nnx.iter_modules(decoder) if isinstance(m, Linear) and m.adapter_scale is not None]
    if not linears:
        return model
    for linear in linears:
        kernel, a, b = linear.kernel[...], linear.lora_a[...], linear.lora_b[...]
        linear.kernel = nnx.Param(_sum(kernel, a, b, linear.adapter_scale, kernel.sharding))
        del linear.lora_a, linear.lora_b
        linear.adapter_scale = None
    return Model(*nnx.split(decoder), model.config)


@functools.partial(jax.jit, static_argnames="where")
def _sum(kernel: Array, a: Array, b: Array, scale: float, where: Sharding) -> Array:
    whole = kernel.astype(jnp.float32) + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.with_sharding_constraint(whole.astype(kernel.dtype), where)


@functools.cache
def count(config: DecoderConfig, spec: LoraSpec) -> int:
    """The number of weights in the adapters of a decoder."""
    if not spec.rank:
        return 0
    params = adapted(Model(*abstract(config, jnp.float32), config), spec, None, None).params
    return sum(leaf.size for leaf in jax.tree.leaves(split(params)[0]))
