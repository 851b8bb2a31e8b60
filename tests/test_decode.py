"""The decode loop: what it records, what it draws, and what does not change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import hf_folder, hf_logits

from heal_jax.config import SampleSpec
from heal_jax.model.mesh import make_mesh, put_batch, using
from heal_jax.model.weights import load, shardings
from heal_jax.rollout.decode import roll_out
from heal_jax.rollout.draw import block_width, draw, entropy_of
from heal_jax.rollout.generate import Group, batch_arrays, generate, key_of, pad_rows
from heal_jax.rollout.sampling import Greedy, MinP, Temperature, TopK, TopP, apply, rules
from heal_jax.rollout.score import score
from heal_jax.shapes import Shape, at_once, bucket, in_view

VOCAB = 61


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    theirs = hf_folder(folder, "qwen3")
    return load(folder), theirs


def sample(
    model,
    contexts,
    names,
    *,
    hints=None,
    rules=(),
    max_new=16,
    budget=None,
    eos=(1,),
    mesh=None,
    rows=None,
):
    """Rollouts of the contexts as NumPy arrays; `names` seed them. rows: groups and members of them (default: a row for
    every rollout)."""
    contexts = [[*context, *hint] for context, hint in zip(contexts, hints or [[]] * len(contexts))]
    arrays = pad_rows(contexts, 12, len(contexts))
    keys = np.stack([key_of(name) for name in names]).reshape(len(contexts), -1, 2)
    limit = np.broadcast_to(max_new if budget is None else budget, len(names)).astype(np.int32).reshape(keys.shape[:2])
    groups, members = rows or keys.shape[:2]
    placed = put_batch(mesh, (*arrays, keys, limit), "context")
    static = {"rules": tuple(rules), "max_new": max_new, "groups": groups, "members": members}
    with using(mesh):
        return jax.device_get(roll_out(model.graph, model.params, *placed, jnp.asarray(eos), **static))


def log_softmax(logits):
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def same(a, b, row_a, row_b, tolerance=1e-4):
    n = a.length[row_a]
    assert n == b.length[row_b] and a.stopped[row_a] == b.stopped[row_b]
    np.testing.assert_array_equal(a.tokens[row_a, :n], b.tokens[row_b, :n])
    for name in ("entropy", "logprob", "sampling_logprob"):
        np.testing.assert_allclose(getattr(a, name)[row_a, :n], getattr(b, name)[row_b, :n], atol=tolerance)


CONTEXTS = [[5, 9, 2], [7, 7, 8, 3, 30, 12], [4]]
HINTS = [[11, 12], [13], [14, 15, 16]]


def test_records_equal_transformers(models, monkeypatch):
    model, theirs = models
    names = [f"r{i}" for i in range(6)]
    spec = (Temperature(0.7), TopK(20))
    out = sample(model, CONTEXTS, names, hints=HINTS, rules=spec)
    for row in range(6):
        n = out.length[row]
        context = CONTEXTS[row // 2] + HINTS[row // 2]
        tokens = out.tokens[row, :n]
        logits = hf_logits(theirs, [[*context, *tokens]])[0, len(context) - 1 : -1]
        logp = log_softmax(logits)
        np.testing.assert_allclose(out.entropy[row, :n], -(np.exp(logp) * logp).sum(-1), atol=1e-4)
        np.testing.assert_allclose(out.logprob[row, :n], logp[np.arange(n), tokens], atol=1e-4)
        drawn = logits / 0.7
        drawn[drawn < np.sort(drawn, -1)[:, [-20]]] = -np.inf
        np.testing.assert_allclose(out.sampling_logprob[row, :n], log_softmax(drawn)[np.arange(n), tokens], atol=1e-4)
    # The same by one teacher-forced pass after each context, in chunks that do not divide the length.
    monkeypatch.setattr("heal_jax.rollout.score.CHUNK", 5)
    contexts = pad_rows([c + h for c, h in zip(CONTEXTS, HINTS)], 12, 3)
    scored = score(model.graph, model.params, *contexts, np.array([0, 0, 1, 1, 2, 2]), out.tokens)
    for ours, theirs in zip(scored, (out.logprob, out.entropy)):
        for row, n in enumerate(out.length):
            np.testing.assert_allclose(ours[row, :n], theirs[row, :n], atol=1e-4)


def test_greedy_equals_transformers_generate(models):
    model, theirs = models
    out = sample(model, [CONTEXTS[1]], ["x"], rules=(Greedy(),), eos=(1, 2))
    want = theirs.generate(
        torch.tensor([CONTEXTS[1]]), max_new_tokens=16, do_sample=False, eos_token_id=[1, 2], pad_token_id=0
    )[0, len(CONTEXTS[1]) :].numpy()
    n = out.length[0]
    np.testing.assert_array_equal(out.tokens[0, :n], want[:n])
    assert len(want) == n
    np.testing.assert_allclose(out.sampling_logprob[0, :n], 0.0, atol=1e-6)


def test_neighbours_order_and_batch_do_not_change_a_rollout(models):
    model, _ = models
    names = ["a", "b", "c"]
    together = sample(model, CONTEXTS, names)
    for order in ([2, 0, 1], [1, 2, 0]):
        moved = sample(model, [CONTEXTS[i] for i in order], [names[i] for i in order])
        for row, i in enumerate(order):
            same(together, moved, i, row, 1e-6)
    for i in range(3):  # alone: another batch size, so equal up to rounding
        same(together, sample(model, [CONTEXTS[i]], [names[i]]), i, 0)
    doubled = sample(model, CONTEXTS, [n for name in names for n in (name, name + "'")])
    for i in range(3):
        same(together, doubled, i, 2 * i)
    assert not np.array_equal(doubled.tokens[0], doubled.tokens[1])


def test_on_a_mesh(teacher):
    model = teacher.model
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    contexts = CONTEXTS + [[3, 3]]
    alone = sample(model, contexts, list("abcd"))
    placed = dataclasses.replace(model, params=jax.device_put(model.params, shardings(model, mesh)))
    sharded = sample(placed, contexts, list("abcd"), mesh=mesh)
    for row in range(4):
        same(alone, sharded, row, row)


@pytest.mark.parametrize("how", [{"cache_tokens": 48}, {"eight_bit": True}], ids=["legs", "eight bit"])
def test_caches_of_other_kinds_on_a_mesh(teacher, how):
    """Rollouts by fewer rows than there are, and in the last leg fewer than parts of the mesh."""
    mesh = make_mesh({"data": 4, "tensor": 2})
    params = jax.device_put(teacher.model.params, shardings(teacher.model, mesh))
    split = dataclasses.replace(teacher, model=dataclasses.replace(teacher.model, params=params), mesh=mesh)
    groups = [Group((5 + i, 9, 2), tuple(f"{i}/{j}" for j in range(2)), 96) for i in range(8)]
    shape = dataclasses.replace(Shape(8, 2, 32, 96, 4, 1), **how)
    assert shape.legs()[-1].rows < 4 or "eight_bit" in how
    for a, b in zip(generate(teacher, groups, shape, ()), generate(split, groups, shape, ()), strict=True):
        assert [d.tokens.tolist() for d in a] == [d.tokens.tolist() for d in b]
        assert max(len(d.tokens) for d in a) > 32 or "eight_bit" in how


def test_lengths_stops_and_budgets(models):
    model, _ = models
    everything = tuple(range(VOCAB))
    at_once = sample(model, CONTEXTS, list("abc"), eos=everything)
    assert at_once.length.tolist() == [1, 1, 1] and at_once.stopped.all()
    never = sample(model, CONTEXTS, list("abc"), eos=(VOCAB + 5,), budget=[3, 16, 0])
    assert never.length.tolist() == [3, 16, 0] and not never.stopped.any()
    # Any of several EOS ids ends a row, the id that pads does not, and each row up to its end is what it was.
    free = sample(model, CONTEXTS, list("abc"), eos=(VOCAB + 5,))
    stop = (int(free.tokens[0, 4]), int(free.tokens[1, 7]))
    stopped = sample(model, CONTEXTS, list("abc"), eos=stop)
    for row in range(3):
        hits = np.flatnonzero(np.isin(free.tokens[row], stop))
        want = hits[0] + 1 if len(hits) else 16
        assert stopped.length[row] == want and stopped.stopped[row] == bool(len(hits))
        np.testing.assert_array_equal(stopped.tokens[row, :want], free.tokens[row, :want])


@settings(max_examples=6)
@given(st.integers(0, 99), st.sampled_from([(1, 1), (2, 6), (3, 2)]))
def test_rows_that_take_one_rollout_after_another(models, seed, rows):
    """Whatever the rows, a rollout is what it is with a row of its own; some have no budget, some contexts are
    padding."""
    model, _ = models
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(3, VOCAB, rng.integers(1, 12)).tolist() for _ in range(5)] + [[]]
    names, budget = [f"{seed}/{i}" for i in range(36)], rng.integers(0, 17, 36)
    budget[30:] = 0
    free = sample(model, contexts, names, budget=budget, eos=(1, 2, 3, 4))
    few = sample(model, contexts, names, budget=budget, eos=(1, 2, 3, 4), rows=rows)
    for row in range(30):
        same(free, few, row, row)
    useful = free.length.sum() / (few.steps * rows[0] * rows[1])
    assert few.steps >= free.length.max() and useful <= 1
    if rows == (1, 1):
        idle = few.steps - free.length.sum()
        assert 0 <= idle <= np.sum(budget == 0)  # one row only waits for rollouts of no length


def test_rows_are_seldom_idle(models):
    """Lengths spread 10:1, two groups of 6 rows, 16 rollouts a row one after another: nine steps in ten make a
    token."""
    model, _ = models
    rng = np.random.default_rng(0)
    budget = rng.integers(4, 41, (16, 12))
    contexts = [rng.integers(3, VOCAB, 5).tolist() for _ in budget]
    names = [f"{i}" for i in range(budget.size)]
    out = sample(model, contexts, names, budget=budget.ravel(), eos=(VOCAB + 5,), max_new=48, rows=(2, 6))
    np.testing.assert_array_equal(out.length, budget.ravel())
    assert in_view(6) == 2 and out.length.sum() / (out.steps * 12) >= 0.9


@pytest.mark.parametrize("rows", [None, (2, 2)], ids=["at once", "in turn"])
def test_a_rollout_in_legs_is_the_same_rollout(teacher, rows):
    """Rollouts of up to 96 tokens, whole and with room for 16 at first: the same tokens, records and ends."""
    prompts = [teacher.tokenizer.prompt(text) for text in ("7+8", "25+38+4", "81-7+12-3")]
    groups = [
        Group(tuple(prompt), tuple(f"{i}/{j}" for j in range(4)), budget)
        for (i, prompt), budget in zip(enumerate(prompts), (96, 40, 7))
    ]
    whole = at_once(3, 4, max(map(len, prompts)), 96)
    if rows:
        whole = dataclasses.replace(whole, groups=rows[0], members=rows[1])
    parts = dataclasses.replace(whole, cache_tokens=16)
    assert [(s.max_new, s.done) for s in parts.legs()] == [(16, 0), (16, 16), (32, 32), (32, 64)]
    made, again = ([d for several in generate(teacher, groups, shape, ()) for d in several] for shape in (whole, parts))
    assert max(len(d.tokens) for d in made) > 64 and any(16 < len(d.tokens) < 64 for d in made)
    for a, b in zip(made, again, strict=True):
        assert (a.rollout_id, a.finish) == (b.rollout_id, b.finish)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        for name in ("entropy", "logprob", "sampling_logprob"):
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=1e-4)


@given(
    st.integers(1, 64), st.integers(1, 30), st.integers(1, 6000), st.integers(1, 9000), st.integers(1, 900),
    st.integers(0, 240),
)  # fmt: skip
def test_legs_hold_what_the_first_holds(groups, members, context, most, first, batch):
    shape = Shape(groups * 3, members * 2, bucket(context), most, groups, members, first, batch)
    legs = shape.legs()
    assert sum(leg.max_new for leg in legs) == most and legs[0].max_new == min(first, most)
    room = max(batch, shape.rows) * bucket(first) + 2 * groups * shape.context_length
    for i, leg in enumerate(legs[1:], 1):
        assert leg.done == sum(other.max_new for other in legs[:i]) >= leg.max_new
        assert leg.context_length >= shape.context_length + leg.done and leg.contexts == shape.contexts * shape.repeats
        slots = leg.context_length + leg.slots
        assert leg.rows == 1 or leg.rows * slots <= room
        assert leg.rows == leg.contexts or (leg.rows + 1) * slots > room


def test_memory_of_long_rollouts_is_bounded(teacher):
    """By XLA's count of scratch, where the cache is: rollouts 8 times as long need the memory of short ones."""

    def scratch(shape):
        arrays = batch_arrays([Group((5,), ("x",), 1)], shape, 1)
        params = teacher.model.graph, teacher.model.params
        lowered = roll_out.lower(*params, *arrays, teacher.eos_ids, rules=(), **shape.static)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    whole = Shape(64, 8, 32, 1024, 32, 4)
    short, *longer = map(scratch, dataclasses.replace(whole, cache_tokens=128).legs())
    assert len(longer) == 3 and max(longer) < 1.3 * short  # reading takes some
    assert 5 * short < scratch(whole)


def test_pad_id_is_an_ordinary_token(models):
    model, theirs = models
    out = sample(model, [[0, 0, 5, 0]], ["z"], eos=(VOCAB + 5,))
    logp = log_softmax(hf_logits(theirs, [[0, 0, 5, 0, *out.tokens[0]]])[0, 3:-1])
    np.testing.assert_allclose(out.logprob[0], logp[np.arange(16), out.tokens[0]], atol=1e-4)


def test_drawn_frequencies_match_the_distribution(models):
    model, theirs = models
    rows = 4000
    out = sample(model, [CONTEXTS[0]], [f"n{i}" for i in range(rows)], max_new=1, rules=(TopK(8),))
    logits = hf_logits(theirs, [CONTEXTS[0]])[0, -1]
    best = np.argsort(logits)[-8:]
    expected = rows * np.exp(log_softmax(logits[best]))
    counts = np.bincount(out.tokens[:, 0], minlength=VOCAB)
    assert counts.sum() == counts[best].sum()
    assert ((counts[best] - expected) ** 2 / expected).sum() < 24.3  # chi-square, 7 degrees of freedom, 0.1 %


def test_a_longer_context_or_budget_in_the_bucket_does_not_compile_again(models):
    model, _ = models
    sample(model, CONTEXTS, list("abc"))
    before = roll_out._cache_size()
    sample(model, [[3] * 12, [2] * 9, [4]], list("xyz"), budget=[2, 9, 16], eos=(5,))
    assert roll_out._cache_size() == before
    sample(model, CONTEXTS, list("abc"), max_new=32)
    assert roll_out._cache_size() == before + 1


@settings(max_examples=10)
@given(st.integers(0, 99), st.sampled_from([2, 61, 96, 302, 512]), st.booleans())
def test_draws_are_of_the_distribution(seed, vocab, ruled):
    """By blocks of the vocabulary or not: frequencies (chi-square), and what is recorded of each token."""
    assert vocab % block_width(vocab) == 0
    rng = np.random.default_rng(seed)
    logits, rows = rng.normal(0, 2, vocab).astype(np.float32), 4000
    spec = (Temperature(0.8), TopK(40)) if ruled else ()
    keys = jax.random.split(jax.random.key(seed), rows)
    drawn = jax.jit(lambda x, keys: draw(jnp.broadcast_to(x, (rows, vocab)), keys, spec))(logits, keys)
    from_ = np.asarray(apply(spec, jnp.asarray(logits)[None])[0])
    p = np.exp(log_softmax(from_))
    counts = np.bincount(drawn.token, minlength=vocab)
    assert not counts[p == 0].any()
    order = np.argsort(-p)
    grouped = np.add.reduceat(np.stack([counts[order], rows * p[order]]), np.arange(0, vocab, -(-vocab // 12)), axis=1)
    often = grouped[1] > 5
    chi = ((grouped[0] - grouped[1]) ** 2 / np.maximum(grouped[1], 1e-9))[often].sum()
    assert chi < 38  # at most 11 degrees of freedom, 0.01 %
    logp = log_softmax(logits)
    np.testing.assert_allclose(drawn.entropy, -(np.exp(logp) * logp).sum(), atol=1e-4)
    np.testing.assert_allclose(drawn.logprob, logp[drawn.token], atol=1e-4)
    np.testing.assert_allclose(drawn.sampling_logprob, np.log(p[drawn.token]), atol=1e-4)


@given(st.integers(0, 999), st.floats(0.2, 3.0), st.integers(1, 40), st.floats(0.05, 0.99), st.floats(0.01, 0.9))
def test_rules_equal_transformers(seed, temperature, k, p, least):
    logits = np.random.default_rng(seed).normal(0, 3, (4, 40)).astype(np.float32)
    pairs = [
        (Temperature(temperature), transformers.TemperatureLogitsWarper(temperature)),
        (TopK(k), transformers.TopKLogitsWarper(k)),
        (TopP(p), transformers.TopPLogitsWarper(p)),
        (MinP(least), transformers.MinPLogitsWarper(least)),
    ]
    ours, theirs = jnp.asarray(logits), torch.tensor(logits)
    for our_rule, their_rule in pairs:
        np.testing.assert_allclose(our_rule(jnp.asarray(logits)), their_rule(None, torch.tensor(logits)), rtol=1e-5)
        ours, theirs = our_rule(ours), their_rule(None, theirs)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    spec = SampleSpec(temperature=temperature, top_k=k, top_p=p, min_p=least)
    np.testing.assert_array_equal(apply(rules(spec), jnp.asarray(logits)), ours)


@settings(max_examples=50)
@given(st.integers(0, 999), st.sampled_from([0.01, 1.0, 30.0, 300.0]), st.sampled_from([-1e4, 0.0, 1e4]))
def test_entropy_equals_float64(seed, scale, shift):
    logits = (np.random.default_rng(seed).normal(0, scale, (3, 50)) + shift).astype(np.float32)
    logp = log_softmax(logits)
    entropy, log_z = entropy_of(jnp.asarray(logits))
    np.testing.assert_allclose(entropy, -(np.exp(logp) * logp).sum(-1), atol=1e-5, rtol=1e-5)
    wide = logits.astype(np.float64)
    np.testing.assert_allclose(
        log_z, wide.max(-1) + np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)), rtol=1e-6
    )


def test_entropy_where_tokens_are_ruled_out():
    entropy, _ = entropy_of(jnp.array([[0.0, 0.0, -1e30], [5.0, -1e30, -1e30]]))
    np.testing.assert_allclose(entropy, [np.log(2), 0.0], atol=1e-6)
