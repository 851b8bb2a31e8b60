"""What a mesh divides, and where arrays lie: read from the arrays and from the compiled programs."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from heal_jax.config import Config, SampleSpec, TrainSpec
from heal_jax.divide import Size, batch_sizes, divides, model_sizes, require, undivided
from heal_jax.errors import InputError
from heal_jax.model.config import decoder_config
from heal_jax.model.decoder import initialise
from heal_jax.model.mesh import (
    AXES,
    MAY_STAY_WHOLE,
    RULES,
    batch_parts,
    make_mesh,
    mesh_shape,
    put_batch,
    shapes,
    using,
)
from heal_jax.model.weights import shardings
from heal_jax.rollout.decode import roll_out
from heal_jax.rollout.generate import Group, batch_arrays, dealt
from heal_jax.rollout.score import score
from heal_jax.shapes import Shape
from heal_jax.train.data import Batch
from heal_jax.train.loop import _initial_state, abstract_state, optimizer
from heal_jax.train.step import train_step
from heal_jax.world import model_folder

SHAPES = [{"data": 4, "tensor": 2}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "expert": 2}]
FEW_SIZES = st.lists(st.tuples(st.sampled_from(sorted(RULES)), st.integers(1, 48)), min_size=1, max_size=6)


def full(**shape):
    return {axis: shape.get(axis, 1) for axis in AXES}


@given(FEW_SIZES, st.tuples(*[st.sampled_from([1, 2, 3, 4, 8])] * 4))
def test_what_does_not_divide_is_named_with_what_does(pairs, numbers):
    shape = dict(zip(AXES, numbers))
    sizes = [Size(f"thing {i}", axis, size) for i, (axis, size) in enumerate(pairs)]
    faults = []
    for size in sizes:  # by hand: deal the rows out one axis after another
        left = size.size
        for axis in RULES[size.axis]:
            left = left / shape[axis]
        if left != int(left) and size.axis not in MAY_STAY_WHOLE:
            faults.append(size)
    assert divides(shape, sizes) == (not faults)
    if not faults:
        return require(shape, sizes)
    with pytest.raises(InputError) as error:
        require(shape, sizes)
    said = str(error.value)
    assert "\n" not in said and all(size.what in said for size in faults)
    clause, _, over = said.partition("over these devices: ")
    for names, numbers in re.findall(r"nearest: ([a-z x]+)=(\d+)", clause):
        parts = int(numbers)
        group = [s for s in sizes if set(names.split(" x ")) <= set(RULES[s.axis]) and s.axis not in MAY_STAY_WHOLE]
        assert group and all(s.size % parts == 0 for s in group)
    possible = [s for s in shapes(math.prod(shape.values())) if divides(s, sizes)]
    assert bool(over) == bool(possible)
    if over:
        suggested = full(**{name: int(n) for name, n in re.findall(r"(\w+)=(\d+)", over)})
        assert suggested in possible


@given(st.integers(1, 24), st.tuples(*[st.sampled_from([-1, 1, 2, 3, 4])] * 4))
def test_a_shape_is_over_all_devices_or_refused(devices, numbers):
    wanted = dict(zip(AXES, numbers))
    try:
        shape = mesh_shape(wanted, devices)
    except InputError as error:
        fills = [s for s in shapes(devices) if all(wanted[a] in (-1, s[a]) for a in AXES)]
        assert list(numbers).count(-1) > 1 or not fills
        nearest = re.search(r"nearest: (.*)", str(error))
        if nearest:
            assert math.prod(int(n) for n in re.findall(r"=(\d+)", nearest[1])) == devices
    else:
        assert math.prod(shape.values()) == devices and all(wanted[a] in (-1, shape[a]) for a in AXES)


def test_heads_are_not_cut():
    student, teacher = (decoder_config(model_folder(name)) for name in ("student", "teacher"))
    # 3 heads of 32: the kernel's 96 columns would divide by 2.
    with pytest.raises(
        InputError, match=r"tensor=2 does not divide the student's 3 key-value heads; nearest: tensor=1"
    ):
        require(full(tensor=2), model_sizes(student, "student"))
    require(full(tensor=2), model_sizes(teacher, "teacher"))
    with pytest.raises(InputError, match="tensor=4 .* 2 key-value heads; nearest: tensor=2 or tensor=1"):
        require(full(tensor=4), model_sizes(teacher, "teacher"))


def test_experts_are_counted_and_an_mlp_only_where_there_is_one():
    teacher = decoder_config(model_folder("teacher"))
    mixed = dataclasses.replace(teacher, experts=6, experts_per_token=2, expert_size=10)
    require(full(expert=3, tensor=2), model_sizes(mixed, "teacher"))
    with pytest.raises(
        InputError, match="expert=4 does not divide the teacher's 6 experts; nearest: expert=3 or expert=6"
    ):
        require(full(expert=4), model_sizes(mixed, "teacher"))
    odd = dataclasses.replace(mixed, intermediate_size=7)
    require(full(tensor=2), model_sizes(odd, "teacher"))  # no layer has it
    with pytest.raises(InputError, match="intermediate size 7"):
        require(full(tensor=2), model_sizes(dataclasses.replace(odd, dense_layers=(0,)), "teacher"))


def test_batches_are_counted_as_they_are_made():
    # 100 // 30 * 30 = 90 rows, 100 // 10 * 10 = 100, 100 // 20 * 20, 100 // 4 * 4; those of training are filled up.
    config = Config(sample=SampleSpec(batch=100), train=TrainSpec(batch=7))
    assert {size.size for size in batch_sizes(config) if size.axis == "batch"} == {90, 100}
    with pytest.raises(
        InputError, match="data=4 does not divide the 90 rows of sample.batch at sample.n; nearest: data=5"
    ):
        require(full(data=4), batch_sizes(config))
    assert not undivided(full(data=5, fsdp=2), batch_sizes(config))


@pytest.mark.parametrize("split", [1, 2, 4, 8])
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_contexts_are_dealt_to_all_parts_in_turn(split, contexts, repeats, groups, at_once):
    shape = Shape(contexts, repeats, 32, 32, contexts, repeats)
    if not at_once:
        shape = dataclasses.replace(shape, groups=groups, members=split)
        assume(not shape.at_once)
    over, place = dealt(shape, split)
    assert over.contexts >= contexts and sorted(place) == list(range(over.contexts))
    assert over.rows % split == 0 and (at_once or over.rows == shape.rows)
    if over.groups % split == 0 and over.contexts % split == 0:
        of_part = np.bincount(place[:contexts] // (over.contexts // split), minlength=split)
        assert of_part.max() - of_part.min() <= 1
    assert shape.at_once or over.groups % split == 0


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "-".join(f"{k}{v}" for k, v in shape.items()))
def placed(request):
    """A random decoder with one layer, of the built-in teacher's widths and a vocabulary that 16 divides, on a mesh."""
    mesh = make_mesh(request.param)
    config = dataclasses.replace(decoder_config(model_folder("teacher")), num_layers=1, vocab_size=304)
    model = initialise(config, 0)
    return dataclasses.replace(model, params=jax.device_put(model.params, shardings(model, mesh))), mesh


def parts(mesh, names):
    return math.prod(mesh.shape[name] for name in names)


def cut(array) -> int:
    """Into how many parts an array is cut, from the memory of its first shard."""
    return array.size // array.addressable_shards[0].data.size


def expected_cut(array, mesh) -> int:
    """Every matrix over fsdp and tensor, vectors (norms) whole."""
    return parts(mesh, ("fsdp", "tensor")) if array.ndim > 1 else 1


def test_no_weight_or_moment_is_whole(placed):
    model, mesh = placed
    for array in jax.tree.leaves(model.params):
        assert cut(array) == expected_cut(array, mesh), array.sharding
    transform = optimizer(TrainSpec(steps=4), 4)
    target = abstract_state(model, transform, mesh)
    state = _initial_state(model, transform, target)
    pinned = tuple(leaf.sharding for leaf in jax.tree.leaves((target["params"], target["opt_state"])))
    tokens = np.random.default_rng(0).integers(3, 300, (8, 32)).astype(np.int32)
    segments, positions = np.ones((8, 32), np.int32), np.broadcast_to(np.arange(32, dtype=np.int32), (8, 32))
    batch = put_batch(mesh, Batch(tokens, segments, positions, np.ones((8, 32), bool)))
    assert [cut(x) for x in batch] == [parts(mesh, ("data", "fsdp", "expert"))] * 4
    with using(mesh):
        params, opt_state, _ = train_step(
            model.graph, transform, state["params"], state["opt_state"], batch, None, pinned
        )
    moments = [x for x in jax.tree.leaves(opt_state) if x.ndim]
    weights = jax.tree.leaves(params)
    assert len(moments) == 2 * len(weights)
    for array in (*weights, *moments):
        assert cut(array) == expected_cut(array, mesh), array.sharding


SHAPES_OF_BATCHES = {
    "at once": Shape(8, 3, 32, 32, 8, 3),
    "at once, few contexts": Shape(2, 12, 32, 32, 2, 12),  # that no mesh here divides
    "in turn, groups that do not divide": Shape(13, 8, 32, 32, 6, 4),
}
of_batches = pytest.mark.parametrize("shape", SHAPES_OF_BATCHES.values(), ids=SHAPES_OF_BATCHES)


def rolled_out(model, mesh, shape, groups):
    """Arguments of `roll_out`."""
    over = dealt(shape, batch_parts(mesh))[0]
    arrays = put_batch(mesh, batch_arrays(groups, shape, batch_parts(mesh)), "context")
    return (model.graph, model.params, *arrays, np.array([2])), {"rules": (), **over.static}, over


def instructions(text, opcode):
    """Name scope, and dtype and shape on one device of each result, of every instruction of a kind."""
    for line in text.splitlines():
        found = re.search(rf" = (.*?) {opcode}\(", line)
        if found:
            arrays = [(kind, tuple(map(int, filter(None, dims.split(","))))) for kind, dims in
                      re.findall(r"(\w+)\[([\d,]*)\]", found[1])]  # fmt: skip
            name = re.search(r'op_name="([^"]*)"', line)
            yield name[1] if name else "", arrays


@of_batches
def test_caches_are_split_and_stay_where_they_are(placed, shape):
    model, mesh = placed
    c, split = model.config, parts(mesh, RULES["batch"])
    arguments, static, over = rolled_out(model, mesh, shape, [Group((5,), ("x",), 1)])
    with using(mesh):
        text = roll_out.lower(*arguments, **static).compile().as_text()
    (carried,) = [arrays for name, arrays in instructions(text, "while") if name.endswith("/decode_steps/while")]
    rows, k = over.rows // split, c.num_kv_heads // mesh.shape["tensor"]
    groups, slots = over.groups // split, 32 if shape.at_once else 64
    if shape.contexts == 2:  # which the mesh does not divide: the compiler splits them as far as it goes
        groups = min(dims[0] for _, dims in carried if len(dims) == 4)
    caches = [(rows, k, c.head_dim, 32), (rows, k, 32, c.head_dim)]
    caches += [(groups, k, c.head_dim, slots), (groups, k, slots, c.head_dim)]
    assert groups <= 2 and sorted(dims for _, dims in carried if len(dims) == 4) == sorted(caches)
    # What is recorded, and hidden states: the only thing of all rows, with a part of each.
    hidden = (over.rows // parts(mesh, RULES["row"]), c.hidden_size // mesh.shape["fsdp"])
    records = (rows, 32) if shape.at_once else (1, over.contexts // split * over.repeats, 32)
    assert math.prod(hidden) in {math.prod(dims) for _, dims in carried} and ("s32", records) in carried
    assert not [dims for _, dims in carried if over.rows in dims[:1] and dims != hidden]
    # Each step nothing moves between devices that is as large as a cache, a weight, or the logits.
    smallest = c.hidden_size * c.num_kv_heads * c.head_dim // parts(mesh, ("fsdp", "tensor"))
    for opcode in ("all-gather", "all-to-all", "collective-permute"):
        for name, arrays in instructions(text, opcode):
            if "/decode_steps/" in name:
                most = max(over.rows * c.hidden_size, smallest)
                assert all(math.prod(dims) <= most and c.vocab_size not in dims for _, dims in arrays), (name, arrays)
            assert opcode != "all-gather" or all(len(dims) < 4 or math.prod(dims) <= over.rows for _, dims in arrays), (
                name,
                arrays,
            )


def test_a_mesh_changes_no_token(placed):
    """Contexts and groups that it does not divide, rows that wait."""
    model, mesh = placed
    shape = SHAPES_OF_BATCHES["in turn, groups that do not divide"]
    draw = np.random.default_rng(0)
    groups = [
        Group(tuple(map(int, draw.integers(3, 300, 1 + i))), tuple(f"{i}/{j}" for j in range(8)), 4 + 2 * i)
        for i in range(13)
    ]

    def tokens(model, mesh):
        arguments, static, _ = rolled_out(model, mesh, shape, groups)
        with using(mesh):
            out = jax.device_get(roll_out(*arguments, **static))
        place = dealt(shape, batch_parts(mesh))[1]
        rows = [i * 8 + j for i, _ in zip(place, groups) for j in range(8)]
        assert out.length[rows].min() > 0
        return [out.tokens[row, : out.length[row]].tolist() for row in rows]

    alone = dataclasses.replace(model, params=jax.device_put(model.params, jax.devices()[0]))
    assert tokens(model, mesh) == tokens(alone, None)


def test_scoring_never_holds_all_rows_of_logits(placed):
    model, mesh = placed
    split = parts(mesh, RULES["batch"])
    contexts, rows, width, length = 8, 16, 32, 64
    context = put_batch(mesh, (np.full((contexts, width), 5, np.int32), np.full(contexts, 9, np.int32)), "context")
    texts = put_batch(mesh, (np.zeros(rows, np.int32), np.full((rows, length), 5, np.int32)))
    with using(mesh):
        text = score.lower(model.graph, model.params, *context, *texts).compile().as_text()
    local, vocab = rows // split, model.config.vocab_size // mesh.shape["tensor"]
    sizes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    logits = {s for s in sizes if s[-1] in (vocab, model.config.vocab_size) and len(s) == 3}
    assert logits and all((rows, width) == (local, vocab) for rows, _, width in logits)
    # Neither caches nor the hidden states of all rows or contexts.
    for _, arrays in instructions(text, "all-gather"):
        floats = [dims for kind, dims in arrays if kind == "f32"]
        assert not any(len(dims) > 3 or (len(dims) == 3 and dims[0] in (rows, contexts)) for dims in floats), arrays


def test_a_vocabulary_that_does_not_divide_stays_whole_and_is_said():
    config = dataclasses.replace(decoder_config(model_folder("teacher")), vocab_size=303)
    shape = full(tensor=2)
    assert [s.axis for s in undivided(shape, model_sizes(config, "teacher"))] == ["vocab"]
    require(shape, model_sizes(config, "teacher"))
