"""Plans made for tests."""

import dataclasses
import os

from heal_jax.model.mesh import make_mesh
from heal_jax.plan import backend
from heal_jax.plan.assumptions import Assumptions
from heal_jax.plan.programs import folders, programs
from heal_jax.plan.topology import Topology
from heal_jax.plan.workload import workload

os.environ.update({k: v for k, v in backend.environment([Topology("v5e:2x2")]).items() if k != "XLA_FLAGS"})


def on_slice(config, name="v5e:2x2"):
    """The programs of a config's run and the mesh for a slice."""
    topology = Topology(name)
    mesh = make_mesh(dataclasses.asdict(config.mesh), backend.devices(topology))
    return programs(config, workload(config, folders(config), Assumptions()), mesh), mesh, topology


def named(found, stage):
    return next(p for p in found if stage in p.stages)
