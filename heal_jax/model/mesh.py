"""The device mesh and the one table from logical axes to mesh axes."""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from heal_jax.errors import InputError

AXES = ("data", "fsdp", "tensor", "expert")

# Batches are split over data and fsdp; weights over fsdp along hidden and over tensor along the wide axis
# (Megatron's column-then-row layout, one all-reduce a half block).
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "hidden": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "expert": "expert",
    "context": ("data", "fsdp", "expert"),
}


def make_mesh(shape: dict[str, int]) -> Mesh:
    """A mesh with axes data, fsdp, tensor over all devices; one axis may be -1 (what is left).

    Axes are Auto: the compiler places the collectives, this table places the arrays.
    """
    devices = jax.device_count()
    sizes = [shape.get(axis, 1) for axis in AXES]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"mesh {shape}: sizes are positive, and at most one is -1 (what is left)")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, devices // known)
    if math.prod(sizes) != devices:
        raise InputError(
            f"mesh {dict(zip(AXES, sizes))} needs {math.prod(sizes)} devices, there are {devices}; "
            f"set one axis to -1 or make the product {devices}"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The partition of an array with these logical axes. An axis that its mesh axes do not divide stays whole."""
    entries = []
    for axis, size in zip(axes, shape):
        names = RULES[axis] if axis is not None else ()
        names = (names,) if isinstance(names, str) else names
        divides = size % math.prod(mesh.shape[name] for name in names) == 0
        entries.append(names if names and divides else None)
    return PartitionSpec(*entries)


def sharding(
    mesh: Mesh | None, axes: tuple[str | None, ...], shape: tuple[int, ...]
) -> NamedSharding | SingleDeviceSharding:
    """Where an array with these logical axes lives; without a mesh, on the first device."""
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, spec(mesh, axes, shape))


def put_batch(mesh: Mesh | None, tree: Any) -> Any:
    """Host arrays to devices, the first axis split over data and fsdp."""
    return jax.tree.map(lambda x: jax.device_put(x, sharding(mesh, ("batch",) + (None,) * (x.ndim - 1), x.shape)), tree)
