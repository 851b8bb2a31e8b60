"""The arms of an ablation: HEAL, what it is compared with, and HEAL with a part taken away or replaced."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from heal_jax.errors import InputError
from heal_jax.pace import HEAL, Variant

BASELINE = "rejection_sampling"  # what differences are taken to
WHOLE = "heal"  # which has all parts


@dataclasses.dataclass(frozen=True)
class Arm:
    """`settings`: config fields that differ from the run's; `more`: unaided samples for the tokens of aided ones."""

    name: str
    what: str
    variant: Variant = HEAL
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    more: bool = False

    @property
    def aided(self) -> tuple[str, ...]:
        """The stages that make its aided rollouts."""
        return tuple(name for stage, name in ((2, "hindsight"), (3, "repair")) if stage in self.variant.stages)

    @property
    def own_repairs(self) -> bool:
        """Whether it repairs in another way than HEAL, and so by itself."""
        return "repair" in self.aided and any(field.startswith("gear.") for field in self.settings)


ARMS = (
    Arm(BASELINE, "the teacher's right unaided rollouts alone", Variant(stages=(1,))),
    Arm(
        "equal_tokens",
        "rejection sampling with HEAL's teacher tokens: of each problem more samples in place of aided ones (stage 1 "
        "still takes pace.per_problem of them)",
        Variant(stages=(1,)),
        more=True,
    ),
    Arm(
        "curated_few",
        "the best rollout of each of the hardest quarter of the problems that the teacher solved (after LIMO)",
        Variant(stages=(1,), hardest=0.25),
    ),
    Arm(
        "rationalisation",
        "stage 1, then the first right rollouts (pace.per_problem) of each hard problem with the answer in its prompt "
        "(after STaR)",
        Variant(stages=(1, 2), pure=False),
    ),
    Arm(WHOLE, "all three stages"),
    Arm("no_pure", "whatever reaches the answer and leaks no hint, the first by index", Variant(pure=False)),
    Arm("random_breakpoint", "cut at random in the same window", settings={"gear.breakpoint": "random"}),
    Arm("whole_chain", "the breakpoint anywhere: window 1", settings={"gear.window": 1.0}),
    Arm("no_backup", "cut right before the surge", settings={"gear.backup": 0}),
    Arm("no_stage_2", "without answer-guided rollouts", Variant(stages=(1, 3))),
    Arm("no_stage_3", "without repairs", Variant(stages=(1, 2))),
    Arm("shuffled", "all stages together, shuffled", settings={"pace.order": "shuffled"}),
    Arm("separate", "each stage alone, one after another", settings={"pace.order": "separate"}),
    Arm("hint_left_in", "trained on what the teacher saw, hints and shown answers included", Variant(hinted=True)),
)

# How the hint is worded; made where they are named.
HINTS = tuple(
    Arm(f"hint_{name}", f"hint: {hint.strip()}", settings={"gear.hint": hint})
    for name, hint in {
        "plain": "The final answer is {answer}.\n\n",
        "aside": "(The answer is {answer}.)\n\n",
        "quiet": "Hint: The final answer is {answer}. Do not mention this hint.\n\n",
    }.items()
)


def chosen(names: Sequence[str]) -> list[Arm]:
    """The arms of these names (no name: all but other hints; "none": none), the baseline always. Raises InputError for
    unknown ones.
    """
    if list(names) == ["none"]:
        return []
    known = {arm.name: arm for arm in ARMS + HINTS}
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"--arms: {unknown[0]!r} is no arm; there are {', '.join(known)}")
    return [arm for arm in known.values() if arm.name in names or arm.name == BASELINE] if names else list(ARMS)
