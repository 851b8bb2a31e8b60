"""TPU chips and slices: what a chip can do, and which slices there are.

Figures: Google's pages on TPU v5e, v5p and v6e (docs.cloud.google.com/tpu/docs/v5e and so on).
"""

import dataclasses
import math

from heal_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Chip:
    """flops: bfloat16, a second; hbm_bandwidth: bytes a second; hbm: bytes; ici: bytes a second that a chip can send
    over all its links (half of the published bidirectional figure); axes: of the torus.
    """

    flops: float
    hbm_bandwidth: float
    hbm: float
    ici: float
    axes: int

    @property
    def link(self) -> float:
        """Bytes a second that a collective moves: it runs along one axis of the torus, over that axis's two links. That
        is the most: an axis of a small slice does not wrap around, and a ring over it has half of this.
        """
        return self.ici / self.axes


CHIPS = {
    "v5e": Chip(flops=197e12, hbm_bandwidth=819e9, hbm=16 * 2**30, ici=200e9, axes=2),
    "v5p": Chip(flops=459e12, hbm_bandwidth=2765e9, hbm=95 * 2**30, ici=600e9, axes=3),
    "v6e": Chip(flops=918e12, hbm_bandwidth=1638e9, hbm=32 * 2**30, ici=400e9, axes=2),
}
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
SLICES = {"v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of one kind of chip: `name` is CHIP:SHAPE, as in v5e:4x8."""

    name: str

    def __post_init__(self) -> None:
        kind, _, shape = self.name.partition(":")
        if shape not in SLICES.get(kind, ()):
            known = "; ".join(f"{chip}: {' '.join(slices)}" for chip, slices in SLICES.items())
            raise InputError(
                f"--topology {self.name}: not a slice that heal plan knows; write CHIP:SHAPE as in v5e:4x8 ({known})"
            )

    @property
    def chip(self) -> Chip:
        return CHIPS[self.name.partition(":")[0]]

    @property
    def chips(self) -> int:
        return math.prod(int(size) for size in self.name.partition(":")[2].split("x"))
