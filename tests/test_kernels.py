"""Fused attention: against the plain version and against float64, and that other devices' programs contain it."""

import dataclasses
import functools
import os
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heal_jax.model import kernels
from heal_jax.model.config import decoder_config
from heal_jax.model.decoder import Model, abstract
from heal_jax.model.kernels import _cudnn, _plain, _splash, _split, block_size, full_attention, scores
from heal_jax.model.mesh import make_mesh, sharding, using
from heal_jax.model.weights import shardings
from heal_jax.plan import backend
from heal_jax.plan.cost import Compiled
from heal_jax.plan.topology import Topology
from heal_jax.rollout.score import score
from heal_jax.train.data import Batch
from heal_jax.train.step import train_step
from heal_jax.world import model_folder

os.environ.update({k: v for k, v in backend.environment([Topology("v5e:2x2")]).items() if k != "XLA_FLAGS"})

splash = functools.partial(_splash, interpret=True)
# Rows, query heads, key-value heads, tokens, head dimension, window, segments: one block and several, lengths that are
# no multiple of a block, windows shorter and longer than a block.
CASES = [
    (2, 4, 2, 128, 64, 0, False),
    (1, 2, 1, 200, 80, 37, True),
    (2, 2, 2, 700, 8, 100, True),
    (1, 4, 1, 1100, 16, 600, False),
    (1, 2, 1, 520, 128, 1, False),
]


def inputs(rows, heads, kv_heads, tokens, size, segmented, dtype=jnp.float32):
    rng = np.random.default_rng([rows, heads, tokens, size])
    shapes = (rows, heads, tokens, size), (rows, kv_heads, size, tokens), (rows, kv_heads, tokens, size)
    q, k, v = (jnp.asarray(rng.normal(0, 1, shape), dtype) for shape in shapes)
    segments = np.sort(rng.integers(0, 3, (rows, tokens)), axis=1).astype(np.int32)
    return q, k, v, jnp.asarray(segments) if segmented else None


def by_hand(q, k, v, segments, scale, window):
    """In float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k.swapaxes(2, 3), v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    t = np.arange(q.shape[2])
    mask = (t <= t[:, None]) & (t > t[:, None] - (window or len(t)))
    if segments is not None:
        mask = mask & (np.asarray(segments)[:, None, :, None] == np.asarray(segments)[:, None, None, :])
    s = np.where(mask, q @ k.swapaxes(2, 3) * scale, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("rows, heads, kv_heads, tokens, size, window, segmented", CASES)
def test_the_tpu_kernel_and_its_gradients(rows, heads, kv_heads, tokens, size, window, segmented):
    q, k, v, segments = inputs(rows, heads, kv_heads, tokens, size, segmented)
    towards = inputs(rows, heads, kv_heads, tokens, size, segmented)[0] + 1

    def loss(kernel, q, k, v):
        out = kernel(q, k, v, segments, scale=0.3, window=window)
        return jnp.sum(out * towards), out

    found, wanted = (
        jax.jit(jax.value_and_grad(functools.partial(loss, kernel), (0, 1, 2), has_aux=True))(q, k, v)
        for kernel in (splash, _plain)
    )
    exact = by_hand(q, k, v, segments, 0.3, window)
    for (_, out), _ in (found, wanted):
        np.testing.assert_allclose(out, exact, atol=1e-5)
    for a, b in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_half_precision_is_as_exact_as_without_the_kernel():
    q, k, v, _ = inputs(2, 4, 2, 300, 64, False, jnp.bfloat16)
    exact = by_hand(q, k, v, None, 0.125, 0)
    errors = [np.abs(f(q, k, v, None, scale=0.125, window=0) - exact).mean() for f in (splash, _plain)]
    assert errors[0] < 1.2 * errors[1] < 0.01


@pytest.mark.parametrize("rows, heads, kv_heads, tokens, size, window, segmented", [c for c in CASES if not c[-1]])
def test_the_gpu_call(rows, heads, kv_heads, tokens, size, window, segmented):
    """Its layout, scale and window, with the same function's other implementation, which runs anywhere."""
    q, k, v, _ = inputs(rows, heads, kv_heads, tokens, size, False)
    found = _cudnn(q, k, v, None, scale=0.3, window=window, implementation="xla")
    np.testing.assert_allclose(found, by_hand(q, k, v, None, 0.3, window), atol=1e-5)


@pytest.mark.parametrize(
    "dtype, size, fused", [("bfloat16", 64, True), ("float32", 64, False), ("bfloat16", 60, False)]
)
def test_a_gpu_program_contains_it(monkeypatch, dtype, size, fused):
    """Lowered for CUDA here, where there is no GPU; elsewhere, or with other sizes, the plain version."""
    monkeypatch.setattr(kernels, "has_cudnn", lambda: True)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    q, k, v, _ = inputs(2, 4, 2, 140, size, False, jnp.dtype(dtype))

    def loss(q, k, v):
        return jnp.sum(full_attention(q, k, v, scale=1.0, window=30).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss)).trace(q, k, v)
    for platform in ("cuda", "cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        wanted = int(fused and platform == "cuda")
        assert (text.count("@__cudnn$fmhaSoftmax("), text.count("@__cudnn$fmhaSoftmaxBackward(")) == (wanted, wanted)
        assert "tpu_custom_call" not in text


@given(st.integers(1, 3000), st.sampled_from([0, 1, 2, 100, 384, 385, 512, 513, 514, 5000]))
def test_blocks_that_are_computed(tokens, window):
    size = block_size(tokens)
    count = -(-tokens // size)
    assert size % 128 == 0 and size <= 512 and tokens <= count * size < tokens + 128 * count
    t = np.arange(count * size)
    mask = (t <= t[:, None]) & (t > t[:, None] - (window or len(t)))
    assert scores(tokens, window) == mask.reshape(count, size, count, size).any(axis=(1, 3)).sum() * size**2


@pytest.mark.parametrize("shape, rows", [({"data": 2, "fsdp": 2, "tensor": 2}, 4), ({"data": 4, "tensor": 2}, 3)])
def test_a_mesh_gives_the_same(shape, rows):
    """Rows that the mesh divides, and rows that it does not."""
    mesh = make_mesh(shape)
    q, k, v, segments = inputs(rows, 4, 2, 150, 16, True)

    def loss(q, k, v, segments):
        return jnp.sum(jnp.sin(_split(splash, q, k, v, segments, scale=0.3, window=40)))

    wanted = jax.grad(lambda q: jnp.sum(jnp.sin(_plain(q, k, v, segments, scale=0.3, window=40))))(q)
    axes = ("context", "heads", None, None), ("context", None)
    with using(mesh):
        placed = [jax.device_put(x, sharding(mesh, axes[x.ndim == 2], x.shape)) for x in (q, k, v, segments)]
        found = jax.jit(jax.grad(loss))(*placed)
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_tpu_programs_contain_it():
    """Scoring and an update with rematerialised blocks, over data and tensor, of a model with a windowed layer."""
    config = decoder_config(model_folder("teacher"))
    config = dataclasses.replace(config, num_layers=2, window=64, sliding=(True, False))
    mesh = make_mesh({"data": 2, "tensor": 2}, backend.devices(Topology("v5e:2x2")))

    def model(dtype):
        graph, shapes = abstract(config, jnp.dtype(dtype))
        places = shardings(Model(graph, shapes, config), mesh)
        put = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
        return graph, put

    def batch(dtype, *dims):
        dims = dims or (4, 150)
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding(mesh, ("batch", None)[: len(dims)], dims))

    def kernels_of(lowered):
        text = lowered.compile().as_text()
        assert not Compiled(text).cost(0).uncounted
        return Counter(re.findall(r"%splash_mha_(fwd|dq|dkv)\S* = ", text))

    with using(mesh):
        graph, params = model("bfloat16")
        texts = batch(jnp.int32), batch(jnp.int32, 4), batch(jnp.int32, 4), batch(jnp.int32, 4, 32)
        scored = score.lower(graph, params, *texts)
        graph, params = model("float32")
        transform = optax.sgd(0.1)
        state = jax.eval_shape(transform.init, params)
        half = jnp.dtype("bfloat16")
        updated = train_step.lower(
            graph, transform, params, state, Batch(*map(batch, (*(jnp.int32,) * 3, jnp.bool_))), half, remat="block"
        )
        plain = score.lower(graph, params, *texts)  # in float32
    # Contexts are read in it, of whose last layer keys and values are enough.
    assert kernels_of(scored) == {"fwd": 1} and not kernels_of(plain)
    assert kernels_of(updated) == {"fwd": 4, "dq": 2, "dkv": 2}
