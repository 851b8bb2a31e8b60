"""What a mesh divides, and where arrays lie: read from the arrays and from the compiled programs."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heal_jax.config import Config, SampleSpec, TrainSpec
from heal_jax.divide import Size, batch_sizes, divides, model_sizes, require, undivided
from heal_jax.errors import InputError
from heal_jax.model.config import decoder_config
from heal_jax.model.decoder import initialise
from heal_jax.model.mesh import AXES, MAY_STAY_WHOLE, RULES, make_mesh, mesh_shape, put_batch, shapes, using
from heal_jax.model.weights import shardings
from heal_jax.rollout.decode import roll_out, score
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
        if left != int(left) and size.axis not in ("vocab", "context"):
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
    # 100 // 30 * 30 = 90 rows, 100 // 10 * 10 = 100, 100 // 20 * 20, 100 // 4 * 4
    config = Config(sample=SampleSpec(batch=100), train=TrainSpec(batch=20))
    assert {size.size for size in batch_sizes(config) if size.axis == "batch"} == {20, 90, 100}
    with pytest.raises(
        InputError, match="data=4 does not divide the 90 rows of sample.batch at sample.n; nearest: data=5"
    ):
        require(full(data=4), batch_sizes(config))
    # Contexts may be fewer than the devices (3 problems at sample.n = 30); the run says so.
    require(full(data=5, fsdp=2), batch_sizes(config))
    assert [s.size for s in undivided(full(data=5, fsdp=2), batch_sizes(config))] == [3, 5, 25]


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: "-".join(f"{k}{v}" for k, v in shape.items()))
def placed(request):
    """A random decoder with one layer, of the built-in teacher's widths, on a mesh."""
    mesh = make_mesh(request.param)
    config = dataclasses.replace(decoder_config(model_folder("teacher")), num_layers=1)
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
    batch = put_batch(mesh, (tokens, np.ones((8, 32), bool)))
    assert [cut(x) for x in batch] == [parts(mesh, ("data", "fsdp", "expert"))] * 2
    with using(mesh):
        params, opt_state, _ = train_step(
            model.graph, transform, state["params"], state["opt_state"], *batch, None, pinned
        )
    moments = [x for x in jax.tree.leaves(opt_state) if x.ndim]
    weights = jax.tree.leaves(params)
    assert len(moments) == 2 * len(weights)
    for array in (*weights, *moments):
        assert cut(array) == expected_cut(array, mesh), array.sharding


def loops(compiled) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Of each loop of a compiled program: dtype and shape, on one device, of what it carries."""
    carried = []
    for line in compiled.as_text().splitlines():
        found = re.search(r"= \((.*)\) while\(", line)
        if found:
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
            carried.append([(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in arrays])
    return carried


@pytest.mark.parametrize("contexts, repeats", [(8, 3), (2, 12)])
def test_the_cache_is_split_over_rows_and_heads(placed, contexts, repeats):
    model, mesh = placed
    c, width, max_new, rows = model.config, 32, 32, contexts * repeats
    context = put_batch(mesh, (np.full((contexts, width), 5, np.int32), np.full(contexts, 9, np.int32)), "context")
    hint = put_batch(mesh, (np.zeros((contexts, 0), np.int32), np.zeros(contexts, np.int32)), "context")
    drawn = put_batch(mesh, (np.zeros((rows, 2), np.uint32), np.full(rows, 32, np.int32)))
    static = {"rules": (), "repeats": repeats, "max_new": max_new}
    with using(mesh):
        lowered = roll_out.lower(model.graph, model.params, *context, *hint, *drawn, np.array([2]), **static)
    (carried,) = [loop for loop in loops(lowered.compile()) if any(len(shape) == 4 for _, shape in loop)]
    b, k, slots = rows // parts(mesh, RULES["batch"]), c.num_kv_heads // mesh.shape["tensor"], width + max_new
    wide = [shape for kind, shape in carried if len(shape) == 4]
    assert sorted(wide) == sorted([(b, k, c.head_dim, slots), (b, k, slots, c.head_dim)] * c.num_layers)
    assert ("f32", (b, c.vocab_size // mesh.shape["tensor"])) in carried  # the logits
    assert ("s32", (b, max_new)) in carried and ("f32", (b, max_new)) in carried
    assert not any(rows in shape for _, shape in carried)


def test_scoring_never_holds_all_rows_of_logits(placed):
    model, mesh = placed
    rows, length = 16, 65
    tokens = put_batch(mesh, np.full((rows, length), 5, np.int32))
    with using(mesh):
        text = score.lower(model.graph, model.params, tokens).compile().as_text()
    local = rows // parts(mesh, RULES["batch"])
    vocab = model.config.vocab_size // mesh.shape["tensor"]
    sizes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    logits = {s for s in sizes if s[-1] in (vocab, model.config.vocab_size) and len(s) == 3}
    assert logits and all((rows, width) == (local, vocab) for rows, _, width in logits)


def test_a_vocabulary_that_does_not_divide_stays_whole_and_is_said():
    config = dataclasses.replace(decoder_config(model_folder("teacher")), vocab_size=303)
    shape = full(tensor=2)
    assert [s.axis for s in undivided(shape, model_sizes(config, "teacher"))] == ["vocab"]
    require(shape, model_sizes(config, "teacher"))
