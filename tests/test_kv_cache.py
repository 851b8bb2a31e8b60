"""Keys and values in a byte a number."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import TINY, start
from hypothesis import given
from hypothesis import strategies as st

from heal_jax.model.attention import Level, attention
from heal_jax.model.kv_cache import EightBit, bytes_per_slot, eight_bit, empty_cache, write
from heal_jax.rollout.generate import Group, generate, score_texts
from heal_jax.shapes import ScoreShape, at_once, bucket


@given(st.integers(0, 999), st.sampled_from([2, 3]), st.sampled_from([0.0, 1e-3, 1.0, 300.0]))
def test_rounding_is_to_the_nearest_step_of_its_token_and_head(seed, axis, scale):
    x = (scale * np.random.default_rng(seed).standard_normal((2, 3, 4, 5))).astype(np.float32)
    whole, step = map(np.asarray, eight_bit(jnp.asarray(x), axis))
    assert whole.dtype == np.int8 and step.shape == tuple(1 if i == axis else n for i, n in enumerate(x.shape))
    most = np.abs(x).max(axis=axis, keepdims=True)
    np.testing.assert_allclose(step, most / 127, rtol=1e-6)
    assert np.all(np.abs(x - whole * step.astype(np.float64)) <= step * 0.5001)
    assert np.all(np.abs(whole).max(axis=axis, keepdims=True) == np.where(most > 0, 127, 0))


@given(st.integers(0, 999), st.sampled_from([0, 4, 7]))
def test_a_token_is_written_as_it_would_be_read(seed, at):
    """One slot a row, or one slot for all; the others keep what they held."""
    rng = np.random.default_rng(seed)
    keys, new = (jnp.asarray(rng.standard_normal((2, 3, 4, n)), jnp.float32) for n in (8, 1))
    held = eight_bit(keys, 2)
    for where in (jnp.int32(at), jnp.full(2, at, jnp.int32)):
        got = write(held, new, where, axis=3)
        want = eight_bit(keys.at[..., at].set(new[..., 0]), 2)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@given(st.integers(0, 999), st.sampled_from([(1, 2), (2, 2), (4, 1)]))
def test_attention_equals_float64_over_what_is_held(seed, shared):
    """Two levels, the first shared by several rows, each row with slots of its own: the numbers that are held, exactly
    multiplied."""
    rng, (rows, times) = np.random.default_rng(seed), shared
    b, h, k, e, first, own = rows * times, 6, 3, 8, 5, 4
    q = rng.standard_normal((b, h, 1, e)).astype(np.float32)
    slots = [rng.standard_normal((n, k, s, e)).astype(np.float32) for n, s in ((rows, first), (b, own)) for _ in "kv"]
    last = [rng.integers(1, s + 1, (b, 1)).astype(np.int32) for s in (first, own)]
    held = [eight_bit(jnp.asarray(x.swapaxes(2, 3)), 2) if i % 2 == 0 else eight_bit(jnp.asarray(x), 3)
            for i, x in enumerate(slots)]  # fmt: skip
    nothing = np.zeros((b, 1), np.int32)
    levels = [Level(held[2 * i], held[2 * i + 1], nothing, last[i]) for i in range(2)]
    got = np.asarray(attention(jnp.asarray(q), levels, scale=e**-0.5))
    exact = [np.asarray(x.whole, np.float64) * np.asarray(x.step, np.float64) for x in held]
    for row in range(b):
        of = row // times
        keys = np.concatenate([exact[0][of].swapaxes(1, 2)[:, : last[0][row, 0]],
                               exact[2][row].swapaxes(1, 2)[:, : last[1][row, 0]]], axis=1)  # fmt: skip
        values = np.concatenate([exact[1][of][:, : last[0][row, 0]], exact[3][row][:, : last[1][row, 0]]], axis=1)
        for head in range(h):
            scores = keys[head // 2] @ q[row, head, 0].astype(np.float64) * e**-0.5
            weights = np.exp(scores - scores.max())
            want = weights @ values[head // 2] / weights.sum()
            np.testing.assert_allclose(got[row, head, 0], want, atol=1e-5)


def test_bytes(teacher):
    config = teacher.model.config
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        cache = empty_cache(config, 3, 7, dtype)
        leaves = [x for held in (*cache.keys, *cache.values) for x in (held if isinstance(held, EightBit) else [held])]
        assert sum(x.nbytes for x in leaves) == 3 * 7 * bytes_per_slot(config, dtype)


@pytest.mark.parametrize("rows", [None, (1, 3)], ids=["at once", "in turn"])
def test_rollouts_are_near_the_models_own(teacher, rows):
    """What decoding records of its tokens, against a pass over them that holds no bytes: a small error, and not none
    (else nothing was rounded); the same rollouts whatever rows decode them."""
    prompts = [tuple(teacher.tokenizer.prompt(text)) for text in ("7+8-3", "25+38+4-21")]
    groups = [Group(prompt, tuple(f"{i}/{j}" for j in range(6)), 96) for i, prompt in enumerate(prompts)]
    whole = dataclasses.replace(at_once(2, 6, 32, 96), eight_bit=True)
    shape = dataclasses.replace(whole, groups=rows[0], members=rows[1]) if rows else whole
    made = [d for several in generate(teacher, groups, shape, ()) for d in several]
    texts = [(groups[i // 6].context, tuple(map(int, d.tokens))) for i, d in enumerate(made)]
    exact = score_texts(teacher, texts, ScoreShape(2, 12, 32, bucket(96)))
    for name, of in (("logprob", 0), ("entropy", 1)):
        error = np.concatenate([np.abs(getattr(d, name) - e[of]) for d, e in zip(made, exact)])
        print(f"{name}: mean {error.mean():.1e}, largest {error.max():.1e} nats over {len(error)} tokens")
        assert 1e-5 < error.mean() < 0.02
    if rows:
        again = [d for several in generate(teacher, groups, whole, ()) for d in several]
        assert [d.tokens.tolist() for d in made] == [d.tokens.tolist() for d in again]


def test_a_run_with_small_caches(tmp_path, tiny):
    """The command: rollouts that go on in other rows are those of the fixture's run."""
    process = start("sample", TINY, "--out", tmp_path / "out", "--sample.cache_tokens", 40, "--quiet")
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    before, after = (
        pq.read_table(folder / "rollouts" / "base-00000.parquet", columns=["rollout_id", "tokens"]).to_pylist()
        for folder in (tiny[0], tmp_path / "out")
    )
    assert before == after and any(len(row["tokens"]) > 80 for row in before)
