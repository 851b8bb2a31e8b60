"""Worlds by name."""

from heal_jax.world.base import World
from heal_jax.world.legs import Legs
from heal_jax.world.rewriting import Rewriting
from heal_jax.world.sums import Sums

WORLDS: dict[str, World] = {world.name: world for world in (Sums(), Rewriting(), Legs())}


def world_of(source: str) -> World | None:
    """The world of a source of problems, such as world:rewriting; None for other sources."""
    scheme, _, name = source.partition(":")
    return WORLDS.get(name) if scheme == "world" else None
