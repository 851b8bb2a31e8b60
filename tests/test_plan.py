"""`heal plan`: what is counted against counts by hand, what is read against what XLA reports, and the search against
brute force."""

import dataclasses
import functools
import json
import random
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from plans import named, on_slice

from heal_jax import ask, collect
from heal_jax import evaluate as evaluation
from heal_jax.config import EvaluateSet, LoraSpec, ProblemSpec, load
from heal_jax.errors import InputError, RunError
from heal_jax.model.kernels import full_attention, scores
from heal_jax.model.mesh import make_mesh
from heal_jax.plan import backend, flops, search
from heal_jax.plan.assumptions import Assumptions
from heal_jax.plan.cost import Compiled, Cost
from heal_jax.plan.estimate import Estimate, Memory, estimate, read, roof
from heal_jax.plan.programs import folders, per_chip, programs
from heal_jax.plan.topology import CHIPS, Topology
from heal_jax.plan.workload import workload
from heal_jax.progress import Progress
from heal_jax.run import open_run
from heal_jax.sets import draws

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny.yaml"
# D hidden, F intermediate, H heads, K key-value heads, E head dimension, V vocabulary of the models made here.
D, F, H, K, E, V = 256, 512, 8, 4, 64, 1024


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A config whose models have one layer, in bfloat16, over data 2 and tensor 2."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": 1, "num_attention_heads": H}
    sizes |= {"num_key_value_heads": K, "head_dim": E, "vocab_size": V, "tie_word_embeddings": False}
    sizes |= {"max_position_embeddings": 2**23}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", **sizes}))
    text = f"""
teacher: {{path: {folder}, dtype: bfloat16}}
student: {{path: {folder}, dtype: bfloat16}}
mesh: {{data: 2, tensor: 2}}
problems: {{source: "jsonl:nowhere.jsonl"}}
evaluate: {{problems: {{source: "jsonl:nowhere.jsonl"}}}}
sample: {{n: 8, batch: 32, max_new_tokens: 64}}
hindsight: {{n: 4}}
gear: {{repairs: 8}}
pure: {{batch: 8}}
train: {{batch: 8, row_tokens: 256, max_tokens: 256}}
"""
    (folder / "plan.yaml").write_text(text)
    return load(folder / "plan.yaml")


@pytest.fixture(scope="module")
def on_tpus(small):
    """A function: the program of this name, for four TPU chips, and as their compiler makes it, once for all tests;
    and the mesh and the slice."""
    found, mesh, topology = on_slice(small)

    @functools.cache
    def made(name):
        program = named(found, name)
        return program, program.lower(mesh).compile(), mesh, topology

    return made


def compiled_text(fn, *shapes, devices):
    """HLO of a function of bfloat16 arrays (and int32 scalars for shape ())."""
    mesh = jax.sharding.Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    kinds = [jax.ShapeDtypeStruct(s, jnp.bfloat16 if s else jnp.int32, sharding=whole) for s in shapes]
    return jax.jit(fn).lower(*kinds).compile().as_text()


@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_loops_count_as_often_as_they_run(where):
    def fn(x, w, cache, n):
        x, _ = jax.lax.scan(lambda x, wi: (jnp.tanh(x @ wi), None), x, w)  # 7 times

        def step(carry):  # as often as the data say
            i, x, cache = carry
            rows = jax.lax.map(lambda row: jnp.tanh(row @ w[0]), x.reshape(4, 16, 256))  # 4 times
            return i + 1, rows.reshape(x.shape), cache + x[:1, :1, None, None]

        with jax.named_scope("decode_steps"):
            _, x, cache = jax.lax.while_loop(lambda c: c[0] < n, step, (jnp.int32(0), x, cache))
        x = jax.lax.fori_loop(0, 6, lambda i, x: x @ w[1], x)
        return jnp.einsum("bd,cd->bc", x, x), cache

    devices = jax.devices("cpu")[:1] if where == "cpu" else backend.devices(Topology("v5e:1x1"))
    text = compiled_text(fn, (64, 256), (7, 256, 256), (1, 1, 8, 48), (), devices=devices)
    program = Compiled(text, slots=(48,))
    product = 2 * 64 * 256 * 256
    for steps in (0, 1, 10):
        assert program.cost(steps).flops == product * (7 + steps + 6) + 2 * 64 * 64 * 256
    assert not program.cost(3).uncounted and program.loops == {"decode_steps"} and program.cache <= 8 * 48 * 2
    # Without its name the loop is counted once, and that is said.
    other = Compiled(text.replace("decode_steps/while", "some_steps/while")).cost(10)
    assert other.flops == product * (7 + 1 + 6) + 2 * 64 * 64 * 256 and sum(other.uncounted.values()) == 1


@pytest.mark.parametrize("where", ["cpu", "tpu"])
def test_nested_loops_are_given_in_all(where):
    """As in a roll-out: how often the outer loop runs is no matter, since totals are given for those inside."""

    def fn(x, w, n):
        def part(name, many):
            def run(carry):
                i, x = carry
                with jax.named_scope(name):
                    more = jax.lax.while_loop(
                        lambda c: c[0] < n * many, lambda c: (c[0] + 1, jnp.tanh(c[1] @ w[many])), (i, x)
                    )
                return i + 1, more[1]

            return run

        read, step = part("read_contexts", 1), part("decode_steps", 2)
        with jax.named_scope("turns"):
            return jax.lax.while_loop(lambda c: c[0] < n, lambda c: step(read(c)), (jnp.int32(0), x))

    devices = jax.devices("cpu")[:1] if where == "cpu" else backend.devices(Topology("v5e:1x1"))
    program = Compiled(compiled_text(fn, (64, 256), (3, 256, 256), (), devices=devices))
    product = 2 * 64 * 256 * 256
    assert program.loops == {"turns", "read_contexts", "decode_steps"}
    for steps, reads in ((0, 0), (1, 0), (0, 1), (7, 3)):
        found = program.cost(steps, reads)
        assert found.flops == product * (steps + reads) and not found.uncounted


def test_batched_products_count_real_elements_only():
    """The TPU compiler writes them as dilated convolutions."""

    def fn(q, k):
        return jnp.einsum("bkne,bkes->bkns", q, k)

    text = compiled_text(fn, (6, 2, 16, 64), (6, 2, 64, 384), devices=backend.devices(Topology("v5e:1x1")))
    assert Compiled(text).cost(0).flops == 2 * 6 * 2 * 16 * 64 * 384


@pytest.mark.parametrize("rows, tokens, window", [(1, 1024, 0), (2, 2000, 700)])
def test_fused_attention_counts_the_blocks_it_computes(rows, tokens, window):
    """Nine products of [block, block, E], two of them forward, and each block read as often as another meets it."""

    def fn(q, k, v):
        return jnp.sum(full_attention(q, k, v, scale=0.1, window=window).astype(jnp.float32))

    shapes = (rows, 4, tokens, 64), (rows, 2, 64, tokens), (rows, 2, tokens, 64)
    text = compiled_text(jax.grad(fn, (0, 1, 2)), *shapes, devices=backend.devices(Topology("v5e:1x1")))
    cost, pairs = Compiled(text).cost(0), scores(tokens, window) / 512**2
    assert cost.flops == 9 * 2 * rows * 4 * pairs * 512 * 512 * 64 and not cost.uncounted
    fetched = 3 * 2 * rows * 4 * pairs * 512 * 64 * 2
    assert fetched < cost.bytes < fetched + 100 * rows * 4 * tokens * 64 * 2


def test_collectives_of_a_loop():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("x")

    def body(x):  # [16, 128] float32 a device
        def step(_, x):
            x = x + jax.lax.psum(x, "x")
            x = x + jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)])
            x = x + jax.lax.psum_scatter(jax.lax.all_gather(x, "x", tiled=True), "x", tiled=True)
            return x + jax.lax.all_to_all(x, "x", 0, 0, tiled=True)

        return jax.lax.fori_loop(0, 5, step, x)

    fn = jax.shard_map(body, mesh=mesh, in_specs=split, out_specs=split)
    x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=NamedSharding(mesh, split))
    cost = Compiled(jax.jit(fn).lower(x).compile().as_text()).cost(0)
    size = 16 * 128 * 4
    assert dict(cost.collectives) == dict.fromkeys(cost.collectives, 5) and len(cost.collectives) == 5
    wanted = {"all-reduce": size, "collective-permute": size, "all-gather": 8 * size, "reduce-scatter": 8 * size}
    assert dict(cost.payload) == {kind: 5 * n for kind, n in (wanted | {"all-to-all": size}).items()}
    share = 7 / 8
    # To all: an eighth to each other chip, which is 1, 2, 3, 4, 3, 2, 1 links away.
    assert cost.wire == pytest.approx(5 * size * (2 * share + 1 + 8 * share + 8 * share + 16 / 8))


def test_bytes_of_a_product_and_of_an_update_in_place():
    def fn(x, w, cache, i):
        return x @ w, jax.lax.dynamic_update_slice(cache, x[:1, :128], (i, 0))

    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), ("x",), axis_types=(AxisType.Auto,))
    kinds = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 256), (256, 512), (4096, 128))]
    text = jax.jit(fn, donate_argnums=2).lower(*kinds, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    cost, product = Compiled(text).cost(0), 4 * (64 * 256 + 256 * 512 + 64 * 512)
    assert mesh.size == 1 and product <= cost.bytes <= product + 4 * 128 * 8  # not the 2 MB of the cache


def test_bytes_of_collectives():
    """Each reads what it is given and writes what it gives."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    split = PartitionSpec("x")
    size = 16 * 128 * 4
    for fn, read_and_written in (
        (lambda x: jax.lax.all_gather(x, "x", tiled=True), 9 * size),
        (lambda x: jax.lax.psum(x, "x"), 2 * size),
        (lambda x: jax.lax.psum_scatter(x, "x", tiled=True), size + size / 8),
        (lambda x: jax.lax.all_to_all(x, "x", 0, 0, tiled=True), 2 * size),
    ):
        x = jax.ShapeDtypeStruct((128, 128), jnp.float32, sharding=NamedSharding(mesh, split))
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        program = Compiled(jax.jit(mapped).lower(x).compile().as_text())
        cost = program.cost(0)
        around = 4 * size  # splitting and joining
        assert program.chips == 8 and read_and_written <= cost.bytes <= read_and_written + around


@given(st.integers(1, 40), st.integers(0, 2048), st.sampled_from(["none", "dots", "block"]))
def test_formulas_by_hand(teacher, layers, slots, remat):
    config = dataclasses.replace(teacher.model.config, num_layers=layers)
    d, e, h, k = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    q, kv, o, mlp = 2 * d * h * e, 2 * (2 * d * k * e), 2 * h * e * d, 3 * (2 * d * config.intermediate_size)
    assert flops.linear(config, 0) == q + kv + o + mlp
    scores, mixed = 2 * h * e * slots, 2 * h * slots * e
    assert flops.blocks(config, 1, slots) == layers * (q + kv + o + mlp + scores + mixed)
    forward = flops.blocks(config, 300, 300) + 300 * 2 * d * config.vocab_size
    blocks = flops.blocks(config, 300, 300)
    mixed = layers * flops.attention(config, 300, 300)
    again = {"none": 0, "dots": mixed, "block": blocks}[remat]
    assert flops.training(config, 300, remat) == 3 * forward + again


def test_one_layer_against_the_real_compiler(on_tpus):
    """Each kind of program for four TPU chips: FLOPs by hand, memory as XLA reports it."""
    layer = 2 * D * (2 * H * E + 2 * K * E + 3 * F)
    for stage in ("sample", "score hindsight", "train"):
        program, compiled, mesh, topology = on_tpus(stage)
        estimated = read(program, compiled, mesh, backend.usable_hbm(topology), topology)
        once, step, memory = estimated.once, estimated.step, estimated.memory
        if stage == "sample":
            assert program.slots == (64, 2 * 512)  # its own, and two contexts in view
            by_hand = 32 * (layer + 4 * H * E * (64 + 2 * 512) + 2 * D * V)
            context = 512 * (layer + 4 * H * E * 512)
            assert step.flops * 4 == by_hand == program.analytic()[1]
            assert estimated.read.flops * 4 == pytest.approx(2 * context, rel=0.02)  # one in each part of the mesh
            assert program.analytic() == (0, by_hand, 2 * context) and once.flops == 0
            # 63 of the 1000 problems a shard, over two parts of the mesh; 8 rollouts each, on 32 rows.
            assert (program.reads, program.steps) == (32, 64 * 16)
        else:
            if stage == "train":
                by_hand = 8 * (3 * 256 * (layer + 2 * D * V) + 4.5 * 4 * H * E * 256**2)
            else:  # of contexts only keys and values are needed
                by_hand = 4 * 512 * 4 * D * K * E + 8 * 64 * (layer + 2 * D * V + 4 * H * E * (512 + 64))
            assert once.flops * 4 == pytest.approx(by_hand, rel=0.05) and step.flops == 0
            assert program.analytic() == (by_hand, 0, 0)
        assert not estimated.warnings and estimated.fits

        reported = compiled.memory_analysis()
        used = reported.argument_size_in_bytes + reported.output_size_in_bytes - reported.alias_size_in_bytes
        used += reported.temp_size_in_bytes + reported.generated_code_size_in_bytes
        assert memory.total - memory.resident == pytest.approx(used, rel=0.02)
        kernels = D * (2 * H * E + 2 * K * E + 3 * F) + 2 * V * D  # split in two
        norms = 3 * D + 2 * E  # whole
        width = 4 if stage == "train" else 2
        assert memory.weights == width * (kernels / 2 + norms)
        assert memory.optimizer == (2 * memory.weights + 2 * 4 if stage == "train" else 0)
        arguments = memory.weights + memory.optimizer
        assert arguments <= reported.argument_size_in_bytes <= 1.05 * arguments + 2**20
        assert memory.resident == (2 * (kernels / 2 + norms) if stage == "train" else 0)


def test_lora_takes_less(small):
    """An update of adapters as the run compiles it: no gradient and no moment of a frozen weight."""
    lora = dataclasses.replace(small.train, lora=LoraSpec(rank=16))
    found, mesh, topology = on_slice(dataclasses.replace(small, train=lora))
    program = named(found, "train")
    estimated = estimate(program, mesh, topology)
    assert not estimated.warnings
    layer, adapters = 2 * D * (2 * H * E + 2 * K * E + 3 * F), 16 * (2 * (D + H * E) + 2 * (D + K * E) + 3 * (D + F))
    by_hand = 8 * (256 * (2 * layer + 2 * 2 * D * V + 3 * 2 * adapters) + 4.5 * 4 * H * E * 256**2)
    assert program.analytic() == (by_hand, 0, 0)
    kernels, norms = D * (2 * H * E + 2 * K * E + 3 * F) + 2 * V * D, 3 * D + 2 * E
    # Split in two as their kernels: A of o and down, B of the others.
    split = 16 * (H * E + F + H * E + 2 * K * E + 2 * F)
    held = split / 2 + 16 * D * 7
    assert estimated.memory.weights == 2 * (kernels / 2 + norms) + 4 * held
    assert estimated.memory.optimizer == 2 * 4 * held + 2 * 4 and estimated.memory.resident == 0


def test_a_mixture_of_experts(small, tmp_path):
    """Split over an expert axis, its products in the TPU's kernel, whose FLOPs are those of the routed experts."""
    routed = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    sizes = json.loads((Path(small.teacher.path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | routed | {"model_type": "qwen3_moe"}))
    mixture = dataclasses.replace(small.teacher, path=str(tmp_path))
    shape = dataclasses.replace(small.mesh, data=-1, tensor=1, expert=2)
    found, mesh, topology = on_slice(dataclasses.replace(small, teacher=mixture, mesh=shape))
    program = named(found, "score hindsight")
    estimated = estimate(program, mesh, topology)
    assert mesh.shape["expert"] == 2 and estimated.fits and estimated.once.collectives["all-gather"]
    assert estimated.warnings == ["3 calls of tpu_custom_call have FLOPs by formula"]
    assert estimated.once.flops == program.analytic()[0] / 4


def test_weights_are_all_parameters(small):
    whole = jax.make_mesh((1,) * 4, ("data", "fsdp", "tensor", "expert"), devices=jax.devices()[:1])
    for program in programs(small, workload(small, folders(small), Assumptions()), whole):
        params = program.model.on(whole).params
        assert per_chip(params) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


def test_roofline():
    chip = CHIPS["v5e"]
    assert (
        roof(Cost(flops=197e12), chip).seconds == 1
        and roof(Cost(flops=197e12, bytes=819e9 / 2), chip).name == "compute"
    )
    assert roof(Cost(bytes=819e9, wire=1), chip).name == "memory" and roof(Cost(wire=100e9), chip).seconds == 1


def test_float32_is_planned_as_it_runs(small):
    """Six bfloat16 passes of the matrix unit through every product, as the compiled program says."""
    floats = {name: dataclasses.replace(getattr(small, name), dtype="float32") for name in ("teacher", "student")}
    found, mesh, topology = on_slice(dataclasses.replace(small, **floats))
    program = named(found, "train")
    compiled = program.lower(mesh).compile()
    products = re.findall(r" convolution\(.*", compiled.as_text())
    assert products and all("operand_precision={highest,highest}" in line for line in products)
    estimated = read(program, compiled, mesh, backend.usable_hbm(topology), topology)
    only = dataclasses.replace(estimated.once, bytes=0, wire=0)
    assert estimated.roof(only).seconds == pytest.approx(6 * only.flops / topology.chip.flops)


def test_what_the_compiler_writes_otherwise_is_one_line(on_tpus, monkeypatch):
    program, compiled, mesh, topology = on_tpus("sample")
    monkeypatch.setattr(type(program), "lower", lambda *_: SimpleNamespace(compile=lambda: compiled))
    monkeypatch.setattr(Compiled, "loops", {"decode_steps"})
    with pytest.raises(RunError, match="cannot read .loops decode_steps that carry 4 caches"):
        estimate(program, mesh, topology)


def test_more_positions_than_a_model_has(small):
    longer = dataclasses.replace(small, sample=dataclasses.replace(small.sample, max_new_tokens=2**23))
    with pytest.raises(InputError, match=f"{2**23 + 640} positions are needed .* the teacher has {2**23};"):
        on_slice(longer)


def test_too_large_is_an_answer(small):
    config = dataclasses.replace(small, sample=dataclasses.replace(small.sample, max_new_tokens=2**22))
    found, mesh, topology = on_slice(config)
    refused = estimate(named(found, "sample"), mesh, topology)
    cache = 2 * 32 * 2**22 * K * E * 2 / 4  # of the rows' own
    assert not refused.fits and refused.memory is None and refused.needs > cache > refused.usable
    assert np.isnan(refused.chip_hours)


def test_what_other_models_push_over_the_brink_has_no_cost(on_tpus):
    program, compiled, mesh, topology = on_tpus("score hindsight")
    fits = read(program, compiled, mesh, 1e9, topology)
    tight = dataclasses.replace(fits, usable=fits.needs - 1)
    assert fits.chip_hours > 0 and not tight.fits and np.isnan(tight.chip_hours)


def test_stages_and_plan_have_the_same_shapes(monkeypatch, tmp_path):
    """What the stages of a real run give `generate`, without running it."""
    world = ProblemSpec(split="test", counts={"easy": 3})
    sets = {"long": EvaluateSet(world, samples=8, max_new_tokens=256, greedy=True), "alike": EvaluateSet(world)}
    dev = EvaluateSet(ProblemSpec(split="dev", counts={"easy": 5}), samples=1, temperature=0.0)
    tiny, seen = load(TINY), []
    config = dataclasses.replace(tiny, evaluate=dataclasses.replace(tiny.evaluate, sets=sets, dev=dev))

    class Stop(Exception):
        pass

    def record(lm, groups, shape, rules):
        seen.append(shape)
        raise Stop

    monkeypatch.setattr(collect, "generate", record)
    monkeypatch.setattr(ask, "generate", record)
    with open_run(config, tmp_path / "run", Progress(quiet=True)) as run:
        for stage in (collect.sample, partial(evaluation.evaluate_one, name="teacher")):
            with pytest.raises(Stop):
                stage(run)
        with pytest.raises(Stop):
            ask.dev_accuracy(run, run.student)
        asked = {draw: [ask.prepare(run, name, draw)[1] for name in run.tokenizers] for draw in draws(config)}
        mesh = run.mesh
    planned = programs(config, workload(config, folders(config), Assumptions()), mesh)
    assert [shape.legs()[0] for shape in seen] == [
        named(planned, "sample").batch,
        named(planned, "evaluate teacher").batch,
        named(planned, "evaluate student on dev").batch,
    ]
    stages = ["", " on long", " on long, greedy", " on alike"]
    assert len(asked) == len(stages)
    for (draw, shapes), stage in zip(asked.items(), stages):
        for name, shape in zip(("teacher", "student"), shapes):
            program = named(planned, f"evaluate {name}{stage}")
            assert program.batch == shape.legs()[0] and program.steps % draw.max_new_tokens == 0
            assert program.calls == (1 if name == "teacher" else 3)


def test_legs_of_long_rollouts(small):
    """Every program of them, with what its calls do; none that no rollout is long enough for."""
    sample = dataclasses.replace(small.sample, max_new_tokens=256, cache_tokens=64)
    longer = dataclasses.replace(small, sample=sample)
    found, mesh, topology = on_slice(longer)
    legs = [program for program in found if program.stages[0].startswith("sample")]
    assert [program.name for program in legs] == ["sample", "sample beyond 64", "sample beyond 128"]
    # 32 rows of 64 tokens and two contexts of 512 in 8 groups: slots for 16 rows of 576 + 64, 13 of 640 + 128.
    assert [program.over.rows for program in legs] == [32, 16, 12]
    # All of a shard's 63 x 8 rollouts go on.
    assert [(program.steps, program.reads) for program in legs] == [(64 * 16, 32), (64 * 32, 252), (128 * 42, 252)]
    estimated = [estimate(program, mesh, topology) for program in legs]
    assert all(e.fits and not e.warnings for e in estimated)
    assert max(e.memory.cache for e in estimated) <= 1.1 * estimated[0].memory.cache
    work = workload(longer, folders(longer), Assumptions(decode_steps=64))
    assert [p.name for p in programs(longer, work, mesh) if p.name.startswith("sample")] == ["sample"]


def test_int8_halves_the_cache(small):
    """On a TPU, whose compiler keeps it so: less of it is read each step as well."""

    def planned(cache_dtype):  # rollouts so long that caches do not lie on the chip
        sample = dataclasses.replace(small.sample, max_new_tokens=16384, cache_dtype=cache_dtype)
        found, mesh, topology = on_slice(dataclasses.replace(small, sample=sample))
        return estimate(named(found, "sample"), mesh, topology)

    half, whole = planned("int8"), planned("model")
    assert 0 < half.memory.cache <= 1.01 * (E + 4) / (2 * E) * whole.memory.cache
    assert half.step.bytes < 0.6 * whole.step.bytes


def test_equal_programs_are_planned_once(small):
    alike = dataclasses.replace(small, evaluate=dataclasses.replace(small.evaluate, samples=8))
    found, _, _ = on_slice(alike)
    merged = named(found, "sample")
    assert merged.stages == ("sample", "evaluate teacher", "evaluate student")  # teacher and student have one config
    # 63 contexts a shard, for the evaluation's 500 problems as for the 1000.
    assert merged.calls == -(-1000 // 63) + 4 * -(-500 // 63) and merged.resident


def test_a_pattern_of_layers_is_kept_whole(teacher):
    qwen = teacher.model.config
    assert search.depths(qwen) == (2, 4)
    gemma = dataclasses.replace(qwen, num_layers=26, window=64, sliding=(([True] * 5 + [False]) * 5)[:26])
    assert search.depths(gemma) == (6, 12)


def test_extrapolated_equals_whole(small):
    longer = dataclasses.replace(small, sample=dataclasses.replace(small.sample, max_new_tokens=4096))
    found, mesh, topology = on_slice(longer)  # more than stays on the chip
    program = named(found, "sample")
    deep = dataclasses.replace(program.model, config=dataclasses.replace(program.model.config, num_layers=10))
    program = dataclasses.replace(program, model=deep)
    guess, whole = search.extrapolated(program, mesh, topology), estimate(program, mesh, topology)
    assert guess.layers == (2, 4) and whole.layers == (10,)
    assert guess.step.flops == whole.step.flops and guess.once.flops == pytest.approx(whole.once.flops, rel=0.01)
    assert guess.memory.weights == whole.memory.weights
    cache = 10 * 2 * (32 * 4096 + 8 * 2 * 512) * K * E * 2 / 4
    assert 0.8 * cache < whole.memory.cache <= cache  # some of it may lie in on-chip memory
    assert guess.needs == pytest.approx(whole.needs, rel=0.1)


@settings(max_examples=6)
@given(st.integers(0, 2**32 - 1))
def test_search_finds_what_brute_force_finds(small, seed):
    """Programs that take some factor longer than their bound, and need some factor more than they hold."""
    topology, asked = Topology("v5e:2x4"), []

    def measure(program, mesh):
        draw = random.Random(f"{seed} {program.name} {program.shape} {tuple(mesh.shape.values())}")
        slower, larger = draw.uniform(1, 4), draw.choice([1, 1, 1, 3e3])
        once, step, read = (x / topology.chips * slower for x in program.analytic())
        held = program.memory(mesh)
        memory = Memory(**held, cache=search._cache(program, mesh), temporary=0)
        read_bytes = (memory.weights + memory.cache) * slower
        needs, usable = memory.total * larger, 16e9
        asked.append((program, mesh))
        costs = Cost(flops=once), Cost(flops=step, bytes=read_bytes), Cost(flops=read)
        return Estimate(program, usable, memory, needs, *costs, topology.chip, topology.chips, (1,))

    work = workload(small, folders(small), Assumptions())
    costs = {}
    for c in search.candidates(small, topology, work):
        every = [dataclasses.replace(measure(p, c.mesh), program=p) for p in c.programs]
        if all(e.fits for e in every):
            costs[tuple(c.mesh.shape.values()), c.config.sample.batch] = sum(e.chip_hours for e in every)
    tried = len(asked)

    def whole(program, mesh, topology):
        return measure(program, mesh)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backend, "let_go", lambda: None)  # nothing is compiled
            patch.setattr(search, "estimate", whole)
            best = search.search(small, topology, Assumptions(), 0.0, lambda line: None, measure)
        assert best.fits and best.chip_hours == pytest.approx(min(costs.values()))
        assert costs[tuple(best.mesh.values()), best.batch] == pytest.approx(best.chip_hours)
    except InputError:
        assert not costs
    assert len(asked) - tried <= tried + len(programs_of(small, topology))


def test_search_with_the_real_compiler(small, monkeypatch):
    """Of a run of two programs: each more takes half a minute."""
    two = ("sample", "train")
    monkeypatch.setattr(search, "programs", lambda *a: [p for p in programs(*a) if p.stages[0] in two])
    said = []
    alike = dataclasses.replace(small.evaluate, samples=8)  # fewer programs
    one = dataclasses.replace(small, sample=dataclasses.replace(small.sample, batch=8), evaluate=alike)
    best = search.search(one, Topology("v5e:1x1"), Assumptions(problems=1, held_out=1), 0.0, said.append)
    assert best.fits and best.batch == 8 and f"{best.setting} it is" in said[-1] and len(said) == 2


def programs_of(config, topology):
    return next(search.candidates(config, topology, workload(config, folders(config), Assumptions()))).programs


def test_meshes_that_split_the_torus():
    """data=2 fsdp=2 tensor=8 over 4 x 8 chips: an axis of the torus is shared by two of the mesh."""
    for name in ("v5e:4x8", "v6e:4x8", "v5p:2x4x4"):
        devices = backend.devices(Topology(name))
        mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 8}, devices)
        assert mesh.size == 32 and len({d.id for d in mesh.devices.flat}) == 32
