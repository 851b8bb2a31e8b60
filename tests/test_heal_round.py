"""The fused round against the stages that make the same rollouts one program after another, and its compiled text."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import same_rollout

from heal_jax import gear
from heal_jax.config import load
from heal_jax.model.config import decoder_config
from heal_jax.model.decoder import Model, abstract
from heal_jax.model.mesh import make_mesh, put_batch, sharding, using
from heal_jax.model.weights import shardings
from heal_jax.plan import backend
from heal_jax.plan.topology import Topology
from heal_jax.problems.sources import load as load_problems
from heal_jax.rollout.heal_round import Problems, RoundSpec, heal_round
from heal_jax.rollout.prepare import prepare
from heal_jax.rollout.sampling import rules
from heal_jax.shapes import bucket
from heal_jax.store import RunDirectory
from heal_jax.world import model_folder

SLOTS = 4


def round_spec(config, slots=SLOTS):
    gear = dataclasses.replace(config.gear, slots=slots)
    return RoundSpec(rules(config.sample), bucket(config.sample.max_new_tokens), gear, config.pure)


def rolled(config, lm, problems, mesh=None, slots=SLOTS):
    arrays = prepare(config, lm.tokenizer, problems)
    whole, newlines = arrays[:-1], arrays.newlines
    placed = Problems(*put_batch(mesh, whole, "context"), put_batch(mesh, newlines, None))
    eos = put_batch(mesh, np.asarray(lm.tokenizer.eos_ids, np.int32), None)
    with using(mesh):
        return jax.device_get(heal_round(lm.model.graph, lm.model.params, placed, eos, spec=round_spec(config, slots)))


@pytest.fixture(scope="module")
def stages(tiny):
    """Config, problems and rollouts of a run that went stage by stage."""
    config = load(tiny[0] / "config.yaml")
    problems = load_problems(config.problems, config.grade.by, "problems")
    return config, problems, {row["rollout_id"]: row for row in RunDirectory(tiny[0]).rollouts().to_pylist()}


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2}], ids=["one device", "data2-tensor2"])
def test_the_round_makes_what_the_stages_make(teacher, stages, mesh):
    """Tokens, entropies, log-probabilities, breakpoints, kept prefixes, hint-free PURE scores, and which are right."""
    config, problems, rows = stages
    n, repairs, paths = config.sample.n, config.gear.repairs, config.gear.paths
    lm, devices = teacher, None
    if mesh:
        devices = make_mesh(mesh, jax.devices()[:4])
        params = jax.device_put(lm.model.params, shardings(lm.model, devices))
        lm = dataclasses.replace(lm, model=dataclasses.replace(lm.model, params=params), mesh=devices)
    # Each of two parts of the mesh has its own slots; all four unsolved problems are in the first.
    made = rolled(config, lm, problems, devices, slots=2 * SLOTS if mesh else SLOTS)
    parted = set()

    def compare(row, out, k, kept=()):
        """One rollout; False where it parted at a tie."""
        length = out.length[k]
        decoded = row["tokens"][len(kept) :]
        if not same_rollout(
            teacher, row["context_tokens"], row["rollout_id"], decoded, out.tokens[k, :length].tolist()
        ):
            parted.add(row["rollout_id"])
            return False
        assert row["finish"] == ("stop" if out.stopped[k] else "length")
        for name in ("entropy", "logprob", "sampling_logprob"):
            np.testing.assert_allclose(row[name], getattr(out, name)[k, :length], atol=1e-4)
        return True

    for i, problem in enumerate(problems):
        for j in range(n):
            row = rows[f"{problem.id}/base/{j}/s0"]
            if compare(row, made.base, i * n + j):
                assert (row["grade"] == "correct") == made.correct[i * n + j]
    unsolved = [i for i in range(len(problems)) if made.correct.reshape(-1, n)[i].sum() <= config.gear.max_correct]
    assert sorted(made.problem[made.problem >= 0]) == sorted(unsolved) and len(unsolved) <= SLOTS
    seen = 0
    for slot, parent in enumerate(made.parent):
        assert parent < 0 or parent // n == made.problem[slot // paths]
        if parent < 0:
            assert not made.repairs.length[slot * repairs : (slot + 1) * repairs].any()
            continue
        problem, number = problems[parent // n], parent % n
        failed = rows[f"{problem.id}/base/{number}/s0"]
        if failed["rollout_id"] in parted:
            continue
        kept = failed["tokens"][: made.kept[parent]]
        for j in range(repairs):
            k, row = slot * repairs + j, rows[f"{problem.id}/repair/{number}.{j}/s0"]
            assert row["breakpoint_step"] == (None if made.breakpoint[parent] == gear.NONE else made.breakpoint[parent])
            assert row["kept_tokens"] == len(kept) and row["tokens"][: len(kept)] == kept
            if not compare(row, made.repairs, k, kept):
                continue
            assert (row["grade"] == "correct") == made.repaired[k]
            if made.repaired[k]:
                np.testing.assert_allclose(made.score[k], row["pure_score"], atol=1e-3)
                seen += 1
            else:
                assert made.score[k] == np.inf and not made.logprob[k].any()
    # All that the stages repaired was repaired here.
    assert seen > 10 and (made.parent >= 0).sum() * repairs == sum(row["kind"] == "repair" for row in rows.values())
    assert len(parted) <= 2


MOVES = re.compile(r"\b(infeed|outfeed|send|recv)(-done)?\(|callback|MoveToHost|S\(5\)")


def lowered(config, mesh=None):
    """The round of a small model, from shapes alone."""
    small = dataclasses.replace(decoder_config(model_folder("teacher")), num_layers=1)
    graph, shapes = abstract(small, jnp.dtype("float32"))
    places = jax.tree.map(lambda x: sharding(mesh, (None,) * x.ndim, x.shape), shapes)
    if mesh is not None:
        places = shardings(Model(graph, shapes, small), mesh)

    def array(dims, kind=jnp.int32, axis="context"):
        return jax.ShapeDtypeStruct(dims, kind, sharding=sharding(mesh, (axis, *(None,) * (len(dims) - 1)), dims))

    n, repairs, words = config.sample.n, config.gear.repairs, jnp.uint32
    problems = Problems(
        array((8, 32)), array((8,)), array((8, 32)), array((8,)), array((8, 32)), array((8,)), array((8, 2)),
        array((8, n, 2), words), array((8, n, 2), words), array((8, n, repairs, 2), words),
        tuple(array((small.vocab_size,), kind, None) for kind in (jnp.int8, jnp.int8, bool, bool, bool)),
    )  # fmt: skip
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
    with using(mesh):
        return heal_round.lower(graph, params, problems, array((1,), axis=None), spec=round_spec(config))


def test_nothing_goes_through_the_host(stages):
    through = jax.jit(lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((), np.float32), x))
    assert MOVES.search(through.lower(np.float32(1)).compile().as_text())
    text = lowered(stages[0]).compile().as_text()
    assert text.count(" while(") > 3 and not MOVES.search(text)


@pytest.mark.skipif(not backend.has_libtpu(), reason="needs libtpu, the TPU compiler: pip install '.[plan]'")
def test_nothing_goes_through_the_host_of_a_tpu(stages):
    topology = Topology("v5e:2x2")
    mesh = make_mesh({"data": 2, "tensor": 2}, backend.devices(topology))
    text = lowered(stages[0], mesh).compile().as_text()
    assert text.count(" while(") > 3 and not MOVES.search(text)
