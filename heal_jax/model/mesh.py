"""The device mesh and the one table from logical axes to mesh axes.

Axes are Auto: this table places the arrays, the compiler places the collectives.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from heal_jax.errors import InputError

AXES = ("data", "fsdp", "tensor", "expert")

# Weights are split over fsdp along hidden and over tensor along the wide axis (Megatron's column-then-row layout, one
# all-reduce a half block), the experts of a mixture over expert. Batches are split over data and fsdp, and over expert
# too, as MaxText does: outside the experts a layer would else compute and cache the same rows once an expert group.
# So for a model without experts the expert axis is one more data axis.
_BATCH = ("data", "fsdp", "expert")
RULES: dict[str, tuple[str, ...]] = {
    "batch": _BATCH,
    "context": _BATCH,
    "row": ("data", "expert"),  # of one token: its hidden state is split over fsdp as weights are, which then stay put
    "hidden": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
}
# Logical axes that stay whole where their mesh axes do not divide them; `open_run` says so. Vocabularies of odd sizes
# are common (tokens were added) and only embedding and logits have one; contexts are few, their rollouts are many.
MAY_STAY_WHOLE = ("vocab", "context", "row")


def mesh_shape(wanted: Mapping[str, int], devices: int) -> dict[str, int]:
    """The size of every axis over `devices` devices; one axis of `wanted` may be -1 (what is left).

    Raises InputError where the sizes do not make up the devices, with the nearest that do.
    """
    if unknown := sorted(set(wanted) - set(AXES)):
        raise InputError(f"mesh: no axis {', '.join(unknown)}; the axes are {', '.join(AXES)}")
    shape = {axis: wanted.get(axis, 1) for axis in AXES}
    if list(shape.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in shape.values()):
        raise InputError(f"mesh {describe(shape)}: sizes are positive, and at most one is -1 (what is left)")
    known = math.prod(size for size in shape.values() if size != -1)
    filled = {axis: max(1, devices // known) if size == -1 else size for axis, size in shape.items()}
    if (needed := math.prod(filled.values())) != devices:
        raise InputError(
            f"mesh {describe(shape)} needs {needed} devices, there are {devices}; "
            f"nearest: {describe(nearest(filled, shapes(devices)))}"
        )
    return filled


def shapes(devices: int) -> list[dict[str, int]]:
    """Every mesh shape over `devices` devices."""

    def split(count: int, axes: tuple[str, ...]) -> list[dict[str, int]]:
        if len(axes) == 1:
            return [{axes[0]: count}]
        sizes = [size for size in range(1, count + 1) if count % size == 0]
        return [{axes[0]: size, **rest} for size in sizes for rest in split(count // size, axes[1:])]

    return split(devices, AXES)


def nearest(shape: Mapping[str, int], candidates: list[dict[str, int]]) -> dict[str, int]:
    """The candidate that differs least: by the factors between the sizes, then by the number of axes that change, then
    with the least on expert, on tensor, on fsdp (which cost communication)."""

    def distance(candidate: dict[str, int]) -> tuple[float, ...]:
        factors = [abs(math.log(candidate[axis] / shape[axis])) for axis in AXES]
        return round(sum(factors), 9), sum(f > 0 for f in factors), *(candidate[axis] for axis in reversed(AXES))

    return min(candidates, key=distance)


def describe(shape: Mapping[str, int]) -> str:
    """As on a command line, without the axes of size 1: "data=4 tensor=2"."""
    return " ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "data=1"


def make_mesh(wanted: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with AXES over the devices, without any over all (of all processes); one axis may be -1 (what is left).

    Raises InputError.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(mesh_shape(wanted, len(devices)).values())
    # jax.make_mesh raises where an axis is not made of whole axes of the chips' torus, as data=2 fsdp=2 of v6e:4x8.
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def adopt(mesh: Mesh) -> Mesh:
    """A mesh made elsewhere, with Auto axes. Raises InputError where its axes are not AXES."""
    if set(mesh.axis_names) != set(AXES):
        raise InputError(f"mesh: axes {', '.join(map(str, mesh.axis_names))}; the axes {', '.join(AXES)} are expected")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(AXES))


def spec(mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of an array with these logical axes.

    Raises InputError where the mesh does not divide an axis that may not stay whole.
    """
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        names = RULES[axis] if axis is not None else ()
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts and axis not in MAY_STAY_WHOLE:
            sizes = describe({name: mesh.shape[name] for name in names})
            raise InputError(f"mesh {sizes} does not divide {axis} ({size}); choose sizes that do")
        entries.append(names if names and size % parts == 0 else None)
    return PartitionSpec(*entries)


def sharding(
    mesh: Mesh | None, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding | SingleDeviceSharding:
    """Where an array with these logical axes lives; without a mesh, on the first device."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    entries = list(spec(mesh, axes, shape))
    while entries and entries[-1] is None:  # as compiled functions write theirs: another spelling is compiled for anew
        entries.pop()
    return NamedSharding(mesh, PartitionSpec(*entries))


def batch_parts(mesh: Mesh | None) -> int:
    """How many parts a batch is split into."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """`with using(mesh):` compiled functions see the mesh, for `constrain`."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def platform() -> str:
    """Inside a compiled function: what it is compiled for, such as cpu or tpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def constrain(x: Array, *axes: str | None) -> Array:
    """Inside a compiled function: x, split as its logical axes say over the mesh of `using`; without one, x."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec(mesh, axes, x.shape))


def parts_of(parts: int, *sizes: int) -> int:
    """Into how many parts contexts are split over `parts` parts of a mesh: these where they divide all sizes, else
    1."""
    return parts if all(size % parts == 0 for size in sizes) else 1


def parts_here(*sizes: int) -> int:
    """`parts_of` inside a compiled function."""
    mesh = jax.sharding.get_abstract_mesh()
    return parts_of(1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["context"]), *sizes)


def put_batch(mesh: Mesh | None, tree: Any, axis: str | None = "batch") -> Any:
    """Host arrays to devices, the first axis split as logical `axis`. Every process gives the same whole arrays."""

    def place(x: Any) -> Array:
        x = np.asarray(x)
        where = sharding(mesh, (axis, *(None,) * (x.ndim - 1)), x.shape)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(place, tree)
