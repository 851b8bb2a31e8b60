"""Mixtures of experts: grouped products against `ragged_dot` (dense, the reference), their work, and a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heal_jax.model.experts import Plan, _blocks, _megablox, _multiply, block_rows, mixture, route, sharded_mixture
from heal_jax.model.mesh import make_mesh, sharding

sizes_of_groups = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(sum)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(0, 0.3, shape), jnp.float32)


@settings(max_examples=8)
@given(sizes_of_groups)
def test_blocks_equal_ragged_dot(sizes):
    """Products and both gradients, for any sizes of groups, empty ones too."""
    rows, matrices = random(sum(sizes), 6), random(len(sizes), 6, 4)
    sizes = jnp.asarray(sizes, jnp.int32)

    def ours(rows, matrices):
        return jnp.sum(jnp.sin(_blocks(rows, matrices, sizes, jnp.int32(0))))

    def reference(rows, matrices):
        return jnp.sum(jnp.sin(jax.lax.ragged_dot(rows, matrices, sizes)))

    found, wanted = (jax.value_and_grad(f, argnums=(0, 1))(rows, matrices) for f in (ours, reference))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [_blocks, lambda *args: _megablox(*args, interpret=True)])
def test_some_of_the_groups(kernel):
    """With the groups split over devices each multiplies its own; the parts add up to the whole."""
    sizes = jnp.asarray([3, 0, 8, 5], jnp.int32)
    rows, matrices = random(16, 128), random(4, 128, 128)
    parts = [kernel(rows, matrices[i : i + 2], sizes, jnp.int32(i)) for i in (0, 2)]
    assert not np.any(parts[0][3:]) and not np.any(parts[1][:3])
    np.testing.assert_allclose(sum(parts), jax.lax.ragged_dot(rows, matrices, sizes), rtol=1e-4, atol=1e-3)


@settings(max_examples=50)
@given(st.integers(1, 64), st.integers(1, 3000), st.integers(0, 2**31), st.floats(0.05, 5))
def test_at_most_a_fifth_more_rows_than_were_routed(experts, assignments, seed, skew):
    """However the router spreads them: from all experts alike to nearly all to one."""
    rng = np.random.default_rng(seed)
    sizes = rng.multinomial(assignments, rng.dirichlet([skew] * experts))
    plan = Plan(assignments, jnp.asarray(sizes, jnp.int32), jnp.int32(0), experts)
    assert assignments <= int(plan.number) * plan.rows <= 1.2 * assignments


def test_a_block_costs_its_rows():
    """FLOPs that XLA counts for one block (it counts a loop's body once): with the test above, at most 1.2 times the
    routed experts' work, where `ragged_dot` on a CPU does that of all experts."""
    assignments, experts, width, out = 640, 16, 64, 96
    rows, matrices = random(assignments, width), random(experts, width, out)
    sizes = jnp.full(experts, assignments // experts, jnp.int32)

    def flops(f, *args):
        return jax.jit(f).lower(*args).compile().cost_analysis()["flops"]

    routed = 2 * assignments * width * out
    body = 2 * block_rows(assignments, experts) * width * out
    assert body <= flops(_multiply, rows, matrices, sizes, jnp.int32(0)) < 1.05 * body + 10 * assignments
    blocks = int(Plan(assignments, sizes, jnp.int32(0), experts).number)
    assert routed <= blocks * body <= 1.2 * routed
    assert flops(jax.lax.ragged_dot, rows, matrices, sizes) > 10 * routed


def test_routing_takes_the_likeliest():
    logits = random(2, 5, 7)
    weights, chosen = route(logits, 3, True)
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    best = np.sort(p, axis=-1)[..., ::-1][..., :3]
    np.testing.assert_allclose(weights, best / best.sum(-1, keepdims=True), rtol=1e-5)
    np.testing.assert_array_equal(chosen, np.argsort(-p, axis=-1)[..., :3])
    np.testing.assert_allclose(route(logits, 3, False)[0], best, rtol=1e-5)


@pytest.mark.parametrize(
    "shape, rows",
    [
        ({"expert": 8}, 8),
        ({"data": 2, "expert": 2, "tensor": 2}, 8),
        ({"data": 2, "expert": 2, "tensor": 2}, 3),
        ({"fsdp": 4, "tensor": 2}, 8),
    ],
)
def test_a_mesh_gives_the_same_mixture_and_gradients(shape, rows):
    """Rows that the mesh divides, and rows that it does not."""
    mesh = make_mesh(shape)
    x, logits = random(rows, 5, 16), random(rows, 5, 8)
    matrices = random(8, 16, 12), random(8, 16, 12, seed=1), random(8, 12, 16)
    axes = [("expert", "hidden", "mlp")] * 2 + [("expert", "mlp", "hidden")]

    def loss(x, matrices):
        weights, chosen = route(logits, 2, True)
        return jnp.sum(jnp.sin(sharded_mixture(x, weights, chosen, matrices, jax.nn.silu)))

    wanted = jax.value_and_grad(loss, argnums=(0, 1))(x, matrices)
    placed = tuple(jax.device_put(m, sharding(mesh, a, m.shape)) for m, a in zip(matrices, axes))
    with jax.set_mesh(mesh):
        where = sharding(mesh, ("context", None, None), x.shape)
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jax.device_put(x, where), placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_mixture_is_the_weighted_sum():
    x, logits = random(6, 16), random(6, 4)
    gate, up, down = random(4, 16, 12), random(4, 16, 12, seed=1), random(4, 12, 16)
    weights, chosen = route(logits, 2, False)
    found = mixture(x, weights, chosen, (gate, up, down), jax.nn.silu, 4)
    for token in range(6):
        each = [(jax.nn.silu(x[token] @ gate[e]) * (x[token] @ up[e])) @ down[e] for e in chosen[token]]
        np.testing.assert_allclose(found[token], weights[token] @ jnp.stack(each), rtol=1e-4, atol=1e-4)
