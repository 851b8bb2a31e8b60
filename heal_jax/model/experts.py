"""Mixture of experts: top-k routing without dropped tokens (Qwen3-MoE).

N tokens, D hidden, I intermediate, X experts, A = N * top-k assignments of a token to an expert. Assignments are sorted
by expert; an expert's rows then lie together and are multiplied with its matrix alone: by megablox's `gmm` on TPU
(Gale et al., MegaBlocks, arXiv 2211.15841), elsewhere in blocks of rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from heal_jax.model.mesh import spec

WASTE = 0.2  # rows computed for nothing, at most, as a share of the assignments: fixes the block size
TILE = 128  # of megablox: rows, depth and columns; what the matrix unit works on


def route(logits: Array, top_k: int, normalise: bool) -> tuple[Array, Array]:
    """Router logits [..., X] -> weights [..., top_k] in their dtype, experts [..., top_k] int32.

    The softmax is over all experts, in float32; with `normalise` the chosen weights sum to one.
    """
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), top_k)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights.astype(logits.dtype), chosen.astype(jnp.int32)


def mixture(
    x: Array,
    weights: Array,
    chosen: Array,
    matrices: tuple[Array, ...],
    activation: Callable[[Array], Array],
    experts: int,
    first: Array | int = 0,
) -> Array:
    """Weighted sum of the outputs of each token's experts.

    x [N, D]; weights, chosen [N, top_k]; matrices gate, up [X', D, I] and down [X', I, D] of the experts first ..
    first + X' - 1 (of `experts` in all; assignments to others add nothing) -> [N, D].
    """
    gate, up, down = matrices
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=experts).astype(jnp.int32)
    token = order // chosen.shape[1]
    rows = x[token]
    first = jnp.asarray(first, jnp.int32)
    hidden = activation(grouped_matmul(rows, gate, sizes, first)) * grouped_matmul(rows, up, sizes, first)
    out = grouped_matmul(hidden, down, sizes, first) * weights.reshape(-1)[order][:, None]
    return jnp.zeros_like(x).at[token].add(out)


def sharded_mixture(
    x: Array,
    weights: Array,
    chosen: Array,
    matrices: tuple[Array, Array, Array],
    activation: Callable[[Array], Array],
) -> Array:
    """`mixture` for x [B, T, D] and weights, chosen [B, T, top_k], split over the mesh in use, if there is one.

    The devices of an expert group gather their rows, each adds up what its experts (axis expert) and its columns (axis
    tensor) give, and the sums go back to where the rows were.
    """
    experts = matrices[0].shape[0]

    def local(x: Array, weights: Array, chosen: Array, *matrices: Array, first: Array | int = 0) -> Array:
        flat = [y.reshape(-1, y.shape[-1]) for y in (x, weights, chosen)]
        return mixture(flat[0], flat[1], flat[2], matrices, activation, experts, first).reshape(x.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return local(x, weights, chosen, *matrices)
    batch = spec(mesh, ("context",), x.shape[:1])  # whole where the mesh does not divide it
    split = batch != PartitionSpec(None)

    def on_device(x: Array, weights: Array, chosen: Array, *matrices: Array) -> Array:
        if split:
            x, weights, chosen = (jax.lax.all_gather(y, "expert", tiled=True) for y in (x, weights, chosen))
        first = jax.lax.axis_index("expert") * matrices[0].shape[0]
        out = jax.lax.psum(local(x, weights, chosen, *matrices, first=first), "tensor")
        return jax.lax.psum_scatter(out, "expert", tiled=True) if split else jax.lax.psum(out, "expert")

    wide, narrow = PartitionSpec("expert", None, "tensor"), PartitionSpec("expert", "tensor", None)
    specs = (batch, batch, batch, wide, wide, narrow)
    return jax.shard_map(on_device, in_specs=specs, out_specs=batch, check_vma=False)(x, weights, chosen, *matrices)


def grouped_matmul(rows: Array, matrices: Array, sizes: Array, first: Array) -> Array:
    """Rows sorted by group, each times its group's matrix.

    rows [A, D]; matrices [X', D, I] of the groups first .. first + X' - 1; sizes [X] int32 of all groups
    -> [A, I] in the rows' dtype; zero for rows of other groups.
    """
    return jax.lax.platform_dependent(rows, matrices, sizes, first, tpu=_megablox, default=_blocks)


def _megablox(rows: Array, matrices: Array, sizes: Array, first: Array, interpret: bool = False) -> Array:
    from jax.experimental.pallas.ops.tpu.megablox import gmm

    pad = -rows.shape[0] % TILE
    sizes = sizes.at[-1].add(pad)  # every row must be of some group
    tiles = (TILE, TILE, TILE)
    padded = jnp.pad(rows, ((0, pad), (0, 0)))
    out = gmm(padded, matrices, sizes, rows.dtype, tiles, first, None, False, interpret)
    return _of_groups(out[: rows.shape[0]], sizes, first, matrices.shape[0])


def _of_groups(rows: Array, sizes: Array, first: Array, count: int) -> Array:
    """Rows [A, I] of the groups first .. first + count - 1; zero elsewhere, where the kernel writes nothing."""
    ends = jnp.cumsum(sizes)
    begin = jnp.where(first > 0, ends[first - 1], 0)
    at = jnp.arange(rows.shape[0])
    return jnp.where(((at >= begin) & (at < ends[first + count - 1]))[:, None], rows, 0)


def block_rows(assignments: int, experts: int) -> int:
    """Rows of a block: each expert's last block is half empty at most, all together WASTE of the assignments."""
    return 1 + int(WASTE * assignments / experts)


class Plan:
    """Which rows of which group each block holds; `number` of blocks is known when the sizes are."""

    def __init__(self, assignments: int, sizes: Array, first: Array, count: int):
        self.rows = block_rows(assignments, sizes.shape[0])
        local = jax.lax.dynamic_slice(sizes, (first,), (count,))
        ends = jnp.cumsum(sizes)
        self.starts = jax.lax.dynamic_slice(ends - sizes, (first,), (count,))
        self.ends = self.starts + local
        self.blocks = jnp.cumsum(-(-local // self.rows))
        self.number = self.blocks[-1]

    def block(self, b: Array) -> tuple[Array, Array, Array]:
        """Group (counted from `first`), first row, and which of its rows are the group's: [], [], [rows, 1]."""
        group = jnp.searchsorted(self.blocks, b, side="right")
        before = jnp.where(group > 0, self.blocks[group - 1], 0)
        start = self.starts[group] + (b - before) * self.rows
        inside = start + jnp.arange(self.rows) < self.ends[group]
        return group, start, inside[:, None]


@jax.custom_vjp
def _blocks(rows: Array, matrices: Array, sizes: Array, first: Array) -> Array:
    return _multiply(rows, matrices, sizes, first)


def _multiply(rows: Array, matrices: Array, sizes: Array, first: Array) -> Array:
    plan = Plan(rows.shape[0], sizes, first, matrices.shape[0])
    padded = jnp.pad(rows, ((0, plan.rows), (0, 0)))

    def body(b: Array, out: Array) -> Array:
        group, start, inside = plan.block(b)
        part = jax.lax.dynamic_slice(padded, (start, 0), (plan.rows, rows.shape[1])) @ matrices[group]
        there = jax.lax.dynamic_slice(out, (start, 0), part.shape)
        return jax.lax.dynamic_update_slice(out, jnp.where(inside, part, there), (start, 0))

    out = jnp.zeros((padded.shape[0], matrices.shape[2]), rows.dtype)
    return jax.lax.fori_loop(0, plan.number, body, out)[: rows.shape[0]]


def _forward(rows: Array, matrices: Array, sizes: Array, first: Array) -> tuple[Array, Any]:
    return _multiply(rows, matrices, sizes, first), (rows, matrices, sizes, first)


def _backward(saved: Any, grad: Array) -> tuple[Array, Array, None, None]:
    rows, matrices, sizes, first = saved
    plan = Plan(rows.shape[0], sizes, first, matrices.shape[0])
    padded, grads = (jnp.pad(x, ((0, plan.rows), (0, 0))) for x in (rows, grad))

    def body(b: Array, total: Array) -> Array:
        group, start, inside = plan.block(b)
        x = jax.lax.dynamic_slice(padded, (start, 0), (plan.rows, rows.shape[1]))
        y = jax.lax.dynamic_slice(grads, (start, 0), (plan.rows, grad.shape[1]))
        return total.at[group].add((x * inside).T @ (y * inside))

    d_matrices = jax.lax.fori_loop(0, plan.number, body, jnp.zeros_like(matrices))
    return _multiply(grad, matrices.swapaxes(1, 2), sizes, first), d_matrices, None, None


_blocks.defvjp(_forward, _backward)


class Experts(nnx.Module):
    """Router and gated MLPs of X experts, in place of the MLP of a block."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        experts: int,
        top_k: int,
        normalise: bool,
        activation: Callable[[Array], Array],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        std: float,
    ):
        def normal(*shape: int) -> nnx.Param:
            return nnx.Param(std * jax.random.normal(rngs.params(), shape, dtype))

        self.router = normal(hidden, experts)
        self.gate, self.up = normal(experts, hidden, intermediate), normal(experts, hidden, intermediate)
        self.down = normal(experts, intermediate, hidden)
        self.top_k, self.normalise, self.activation = top_k, normalise, activation

    def __call__(self, x: Array) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        weights, chosen = route(x @ self.router[...], self.top_k, self.normalise)
        matrices = self.gate[...], self.up[...], self.down[...]
        return sharded_mixture(x, weights, chosen, matrices, self.activation)
