"""What summary.json and metrics.jsonl look like, so that the page can rely on it: a run directory may be anybody's."""

import math
from typing import Any

INT, TEXT = "int", "text"
NUMBER = "number"  # finite
MAYBE = "number or null"
INTERVAL = {"mean": MAYBE, "ci95": (MAYBE, MAYBE)}
ACCURACY = {**INTERVAL, "n": INT, "per_level": {"*": {**INTERVAL, "n": INT}}}
AIDED = {f"{name}?": INT for name in ("problems", "candidates", "correct", "leaked", "kept", "duplicates")}
DIFFERENCE = {**INTERVAL, "per_level?": {"*": INTERVAL}}
COMPARED = {"teacher": ACCURACY, "difference?": DIFFERENCE, "*": ACCURACY}
# Names that end in ? may be left out, * stands for any other; a tuple is a list of so many.
SUMMARY = {
    "problems?": INT,
    "strata?": {"solved": INT, "hard": INT, "unsolved": INT},
    "repair?": {**AIDED, "repaired_problems": INT},
    "hindsight?": AIDED,
    "stages?": {"*": {"examples": INT, "tokens": INT}},
    "accuracy?": {"*": ACCURACY},
    "difference?": DIFFERENCE,
    "greedy?": COMPARED,
    "sets?": {"*": {**COMPARED, "greedy?": COMPARED}},
    "throughput?": {"*": NUMBER},
    "seconds?": {"*": NUMBER},
}
TRAIN = {"model": TEXT, "step": INT, "loss?": MAYBE, "phase?": TEXT, "tokens?": NUMBER, "loss_tokens?": NUMBER,
         "seconds?": NUMBER, "grad_norm?": MAYBE, "learning_rate?": NUMBER, "tokens_per_second?": NUMBER,
         "mfu?": MAYBE}  # fmt: skip
DEV = {"model": TEXT, "accuracy": NUMBER}
WORK = {"*": {"seconds": NUMBER, "tokens": INT}}


def fits(value: Any, form: Any) -> bool:
    """Whether a JSON value has a form; names that the form does not have are of no matter."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return False
        named = {name.removesuffix("?"): part for name, part in form.items() if name != "*"}
        return {name for name in form if name[-1:] not in ("?", "*")} <= set(value) and all(
            fits(item, named.get(name, form.get("*"))) for name, item in value.items()
        )
    if isinstance(form, tuple):
        return isinstance(value, list) and len(value) == len(form) and all(map(fits, value, form))
    if form is None or form == MAYBE and value is None:
        return True
    if form == TEXT:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if form == INT else int | float):
        return False
    return abs(value) < 1e15 and math.isfinite(value)
