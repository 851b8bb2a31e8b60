"""The compiler: libtpu's, which needs no TPU, or without libtpu the CPU's on fake devices.

jax is imported inside the functions: `environment` must be in effect before.
"""

import contextlib
import ctypes
import functools
import gc
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

from heal_jax.plan.topology import Topology


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed (pip install 'heal-jax[plan]')."""
    return importlib.util.find_spec("libtpu") is not None


def environment(topologies: Sequence[Topology]) -> dict[str, str]:
    """Environment variables to set before jax is imported."""
    if has_libtpu():
        return {
            "JAX_PLATFORMS": "cpu",  # arrays, of which there are hardly any; the compiler is asked for by name
            "TPU_SKIP_MDS_QUERY": "1",  # there is no cloud machine to ask what it is
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": "v5litepod-32",  # any: each topology is given by name
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another plan, or a run, may hold libtpu's lock file
        }
    count = max(topology.chips for topology in topologies)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def devices(topology: Topology) -> list[Any]:
    """The devices to compile for: the slice's, or as many fake CPU devices."""
    import jax
    from jax.experimental import topologies

    if has_libtpu():
        # A single chip is less than a host, which some versions want to be told.
        host = {"chips_per_host_bounds": (1, 1, 1)} if topology.chips == 1 else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **host).devices)
    return list(jax.devices("cpu")[: topology.chips])


def let_go() -> None:
    """Give memory back after a program: caches of traces, and the compiler's heap, which libc else keeps (9 GB after
    the seven programs of a 64-layer model).
    """
    import jax

    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def needed(error: Exception) -> tuple[float, float] | None:
    """Bytes a program needs and bytes there are, from the compiler's refusal; None where the error is another."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)", str(error))
    if found is None:
        return None
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(found[1]) * scale[found[2]], float(found[3]) * scale[found[4]]


@functools.cache
def usable_hbm(topology: Topology) -> float:
    """Bytes of a chip's memory that programs may use: a little less than it has. The TPU compiler says how much when it
    refuses a program that is too large; without it, the nominal size.
    """
    if not has_libtpu():
        return topology.chip.hbm
    import jax
    import jax.numpy as jnp

    where = jax.sharding.SingleDeviceSharding(devices(topology)[0])
    too_large = jax.ShapeDtypeStruct((1 << 40,), jnp.float32, sharding=where)
    try:
        jax.jit(jnp.sin).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        found = needed(error)
        if found:
            return found[1]
    return topology.chip.hbm
