"""Whether a mesh divides what it splits: heads, widths, experts, batches. Pure; nothing is computed or placed."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from heal_jax.config import Config
from heal_jax.errors import InputError
from heal_jax.model.config import DecoderConfig
from heal_jax.model.mesh import AXES, MAY_STAY_WHOLE, RULES, describe, nearest, shapes
from heal_jax.sets import draws, place
from heal_jax.shapes import groups, members


class Size(NamedTuple):
    """Something that a mesh splits: in words, its logical axis, how many."""

    what: str
    axis: str
    size: int


def model_sizes(config: DecoderConfig, name: str) -> list[Size]:
    """What a mesh splits of a model. Heads are split whole, and what divides the key-value heads divides all heads."""
    sizes = [
        Size(f"the {name}'s {config.num_kv_heads} key-value heads", "kv_heads", config.num_kv_heads),
        Size(f"the {name}'s hidden size {config.hidden_size}", "hidden", config.hidden_size),
        Size(f"the {name}'s vocabulary of {config.vocab_size}", "vocab", config.vocab_size),
    ]
    mixed = [config.has_experts(layer) for layer in range(config.num_layers)]
    if any(mixed):
        sizes.append(Size(f"the {name}'s {config.experts} experts", "expert", config.experts))
        sizes.append(Size(f"the {name}'s expert size {config.expert_size}", "mlp", config.expert_size))
    if not all(mixed):
        sizes.append(
            Size(f"the {name}'s intermediate size {config.intermediate_size}", "mlp", config.intermediate_size)
        )
    return sizes


def batch_sizes(config: Config) -> list[Size]:
    """The rows of batches of rollouts: whole groups of those of one problem or path. Training fills its rows up."""
    sizes = []
    asked = draws(config, dev=True)
    for name, n in (
        ("sample.n", config.sample.n),
        ("hindsight.n", config.hindsight.n),
        ("gear.repairs", config.gear.repairs),
        *((f"{place(draw.set)}.{'greedy' if draw.greedy else 'samples'}", draw.samples) for draw in asked),
    ):
        rows = groups(config, n) * members(n)
        what = f"sample.batch {rows}" if rows == config.sample.batch else f"the {rows} rows of sample.batch at {name}"
        sizes.append(Size(what, "batch", rows))
    return list(dict.fromkeys(sizes))


def sizes(config: Config, models: Mapping[str, DecoderConfig]) -> list[Size]:
    """All that a mesh splits in a run; `models` by name (teacher, student)."""
    return batch_sizes(config) + [size for name, model in models.items() for size in model_sizes(model, name)]


def undivided(shape: Mapping[str, int], sizes: Sequence[Size]) -> list[Size]:
    """Those that this mesh shape does not divide, of which MAY_STAY_WHOLE can stay whole."""
    return [s for s in sizes if s.size % math.prod(shape[axis] for axis in RULES[s.axis])]


def divides(shape: Mapping[str, int], sizes: Sequence[Size]) -> bool:
    """Whether a run can use this mesh shape."""
    return all(s.axis in MAY_STAY_WHOLE for s in undivided(shape, sizes))


def require(shape: Mapping[str, int], sizes: Sequence[Size]) -> None:
    """Raises InputError that names all that this mesh shape does not divide, and the nearest that do."""
    faults = [s for s in undivided(shape, sizes) if s.axis not in MAY_STAY_WHOLE]
    if not faults:
        return
    clauses = []
    for names in dict.fromkeys(RULES[s.axis] for s in faults):
        what = " and ".join(s.what for s in faults if RULES[s.axis] == names)
        asked = {axis: shape[axis] for axis in names if shape[axis] > 1}
        parts = math.prod(asked.values())
        common = math.gcd(*(s.size for s in sizes if RULES[s.axis] == names and s.axis not in MAY_STAY_WHOLE))
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        near = sorted(divisors, key=lambda d: (abs(math.log(d / parts)), -d))[:2]
        label = " x ".join(asked)
        advice = f" (or a batch that is a multiple of {parts})" if names == RULES["batch"] else ""
        choices = " or ".join(f"{label}={d}" for d in near)
        clauses.append(f"mesh {describe(asked)} does not divide {what}; nearest: {choices}{advice}")
    whole = [candidate for candidate in shapes(math.prod(shape[axis] for axis in AXES)) if divides(candidate, sizes)]
    if whole:
        clauses.append(f"over these devices: {describe(nearest(shape, whole))}")
    raise InputError("; ".join(clauses))
